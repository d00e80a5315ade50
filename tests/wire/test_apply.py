"""``expert.apply``: what is encoded comes back, what does not hold together is refused, and nothing else is raised."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tesseract_async.errors import (
    ExpertFailed,
    InputsForgotten,
    NotPrimary,
    Overloaded,
    ProtocolError,
    RemoteError,
    TooStale,
)
from tesseract_async.experts import manifest
from tesseract_async.wire import apply, frames, packed
from tesseract_async.wire.apply import ApplyPart, ApplyRequest


@st.composite
def requests(draw: st.DrawFn) -> ApplyRequest:
    num_dims, num_rows = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    coords = st.tuples(*[st.sampled_from((0, 1, 2, 65_536, 2**32 - 1))] * num_dims)
    experts = sorted(draw(st.sets(coords, min_size=1, max_size=6)))
    chosen = [draw(st.sets(st.integers(0, num_rows - 1), min_size=1)) for _ in experts]
    rows = [row for some in chosen for row in sorted(some)]
    backward = draw(st.booleans())
    kept = draw(st.none() | st.binary(min_size=16, max_size=16)) if backward else None
    meta = ["float32", [num_rows, 4], "none"]
    inputs = [] if kept else [meta] * draw(st.integers(1, 2))
    return ApplyRequest(
        draw(st.sampled_from(("ffn", "layer.ffn", "ü"))),
        np.array(experts, dtype=np.uint32),
        [draw(st.binary(min_size=16, max_size=16)) for _ in experts],
        np.array([draw(st.integers(0, 2**63 - 1)) for _ in experts], dtype=np.int64),
        np.cumsum([0, *map(len, chosen)]),
        np.array(rows, dtype=np.int32),
        np.array([draw(st.floats(-8, 8, width=32)) for _ in rows], dtype=np.float32),
        [*inputs, None, meta] if backward else inputs,
        len(inputs),
        backward,
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.integers(0, 2**63 - 1)),
        draw(st.sampled_from(("none", "uint8"))),
        kept,
    )


ERRORS = st.sampled_from(
    (
        Overloaded("full", retry_after=2.5),
        NotPrimary("not here", primary=b"p" * 32, retry_after=1.0),
        InputsForgotten("gone"),
        ExpertFailed("x" * 5000),
        TooStale("old"),
        RemoteError("\ud800"),
    )
)


@st.composite
def exchanges(draw: st.DrawFn) -> tuple[ApplyRequest, ApplyPart]:
    request = draw(requests())
    places = draw(st.permutations(range(len(request.ids))))
    cuts = sorted(draw(st.tuples(*[st.integers(0, len(places))] * 2)))
    experts = np.array(sorted(places[: cuts[0]]), dtype=np.int64)
    numbers = st.integers(0, 2**63 - 1)
    num_pairs = sum(int(request.offsets[e + 1] - request.offsets[e]) for e in experts) if request.backward else 0
    part = ApplyPart(
        experts,
        np.array([draw(numbers) for _ in experts], dtype=np.int64),
        np.array([draw(numbers) for _ in experts], dtype=np.int64),
        [(expert, draw(ERRORS)) for expert in places[cuts[0] : cuts[1]]],
        [["float32", [3, 4], "none"]] if len(experts) else [],
        np.arange(num_pairs, dtype=np.float32),
        draw(st.none() | st.binary(min_size=16, max_size=16)),
    )
    return request, part


def travel(body: Any, buffers: Any) -> tuple[Any, list[memoryview]]:
    received = packed.unpack(frames.pack(body), max_bytes=frames.MAX_HEAD)
    return received, [memoryview(bytearray(buffer)) for buffer in buffers]


def assert_equal(left: Any, right: Any) -> None:
    for name, one in left._asdict().items():
        other = getattr(right, name)
        if isinstance(one, np.ndarray):
            assert one.dtype == other.dtype and one.shape == other.shape and (one == other).all(), name
        elif name == "failures":
            assert [(place, type(error), error.details) for place, error in one] == [
                (place, type(error), error.details) for place, error in other
            ]
        else:
            assert one == other, name


@given(requests())
def test_a_request_comes_back(request: ApplyRequest) -> None:
    body, buffers = apply.encode_request(request)
    decoded, rest = apply.decode_request(*travel(body, [*buffers, b"block"]))
    assert_equal(decoded, request)
    assert [bytes(one) for one in rest] == [b"block"]
    assert request.num_rows == request.tensors[-1][1][0]


@given(exchanges())
def test_a_part_comes_back(exchange: tuple[ApplyRequest, ApplyPart]) -> None:
    request, part = exchange
    body, buffers = apply.encode_part(part, backward=request.backward)
    decoded, rest = apply.decode_part(*travel(body, [*buffers, b"sums"]), request)
    assert_equal(decoded, part)
    assert [bytes(one) for one in rest] == [b"sums"]
    for _, error in decoded.failures:
        assert len(str(error)) <= apply.MAX_SENTENCE_LENGTH


@given(requests(), st.data())
def test_pairs_and_rows_of_some_experts(request: ApplyRequest, data: st.DataObject) -> None:
    experts = sorted(data.draw(st.sets(st.integers(0, len(request.ids) - 1))))
    pairs = [pair for one in experts for pair in range(request.offsets[one], request.offsets[one + 1])]
    places = np.array(experts, dtype=np.int64)
    assert request.pairs(places).tolist() == pairs
    assert request.rows_of(places).tolist() == sorted({int(request.rows[pair]) for pair in pairs})


def sample(*, backward: bool = False) -> ApplyRequest:
    meta = ["float32", [3, 4], "none"]
    return ApplyRequest(
        "ffn",
        np.array([[0, 9], [1, 0], [1, 7]], dtype=np.uint32),
        [bytes([number]) * 16 for number in range(3)],
        np.zeros(3, dtype=np.int64),
        np.array([0, 2, 3, 5]),
        np.array([0, 2, 1, 0, 1], dtype=np.int32),
        np.ones(5, dtype=np.float32),
        [meta, meta] if backward else [meta],
        1,
        backward,
        training=True,
        keep=False,
        seed=0,
        reply_codec="none",
    )


REQUEST_FIELDS = (
    *("prefix", "experts", "ids", "versions", "offsets", "tensors", "num_inputs", "backward", "training", "keep"),
    *("seed", "reply_codec", "kept"),
)
PART_FIELDS = ("experts", "versions", "epochs", "failures", "tensors", "kept")


def changed(body: list[Any], names: tuple[str, ...], changes: dict[str, Any]) -> list[Any]:
    return [changes.get(name, value) for name, value in zip(names, body, strict=True)]


def u4(*numbers: int) -> bytes:
    return np.array(numbers, dtype="<u4").tobytes()


@pytest.mark.parametrize(
    "changes",
    [
        {"experts": u4(1, 0, 0, 9, 1, 7)},
        {"experts": u4(0, 9, 1, 0, 1, 0)},
        {"experts": u4(0, 9, 1, 0, 1)},
        {"experts": b""},
        {"experts": u4(*range(27))},
        {"ids": b""},
        {"ids": bytes(47)},
        {"ids": bytes(16 * (apply.MAX_EXPERTS + 1))},
        {"versions": bytes(16)},
        {"versions": b"\xff" * 24},
        {"offsets": u4(0, 2, 3)},
        {"offsets": u4(0, 3, 2, 5)},
        {"offsets": u4(0, 2, 2, 5)},
        {"offsets": u4(0, 2, 3, 4)},
        {"offsets": u4(0, 2, 3, 6)},
        {"offsets": u4(1, 2, 3, 5)},
        {"rows": [0, 2, 1, 0, 3]},
        {"rows": [-1, 2, 1, 0, 1]},
        {"rows": [2, 0, 1, 0, 1]},
        {"rows": [0, 0, 1, 0, 1]},
        {"rows": [0, 2, 1, 0]},
        {"weights": [1, 1, 1, 1]},
        {"weights": [1, 1, float("nan"), 1, 1]},
        {"weights": [1, 1, float("-inf"), 1, 1]},
        {"seed": -1},
        {"seed": True},
        {"seed": 2**63},
        {"reply_codec": None},
        {"reply_codec": "x" * 300},
        {"prefix": "x" * 300},
        {"prefix": b"ffn"},
        {"backward": 0},
        {"kept": bytes(16)},
        {"num_inputs": 0},
        {"num_inputs": 2},
        {"tensors": None},
        {"tensors": []},
        {"tensors": [None]},
        {"tensors": [["float32", [], "none"]]},
        {"tensors": [["float32", ["3"], "none"]]},
        {"tensors": [["float32", [2, 4], "none"]]},
    ],
    ids=str,
)
def test_a_request_that_does_not_hold_together_is_refused(changes: dict[str, Any]) -> None:
    body, buffers = apply.encode_request(sample())
    numbers = [
        np.array(changes.pop("rows", sample().rows), dtype="<i4").tobytes(),
        np.array(changes.pop("weights", sample().weights), dtype="<f4").tobytes(),
    ]
    assert apply.decode_request(*travel(body, buffers))
    with pytest.raises(ProtocolError):
        apply.decode_request(*travel(changed(body, REQUEST_FIELDS, changes), numbers))


@pytest.mark.parametrize(
    "changes",
    [
        {"num_inputs": 0},
        {"num_inputs": 2},
        {"num_inputs": -1},
        {"kept": bytes(16)},
        {"kept": bytes(15), "num_inputs": 0},
        {"tensors": [["float32", [3, 4], "none"], ["float32", [2, 4], "none"]]},
    ],
    ids=str,
)
def test_a_backward_that_does_not_hold_together_is_refused(changes: dict[str, Any]) -> None:
    body, buffers = apply.encode_request(sample(backward=True))
    with pytest.raises(ProtocolError):
        apply.decode_request(*travel(changed(body, REQUEST_FIELDS, changes), buffers))


@pytest.mark.parametrize(
    "changes",
    [
        {"experts": u4(1, 0)},
        {"experts": u4(0, 0)},
        {"experts": u4(0, 3)},
        {"experts": u4(0)},
        {"experts": bytes(7)},
        {"versions": bytes(8)},
        {"versions": b"\xff" * 16},
        {"epochs": bytes(24)},
        {"failures": [[1, "error", "", 0.0, None]]},
        {"failures": [[3, "error", "", 0.0, None]]},
        {"failures": [[-1, "error", "", 0.0, None]]},
        {"failures": [[2, "error", "", 0.0, None]] * 2},
        {"failures": [[2, 5, "", 0.0, None]]},
        {"failures": [[2, "error", "", "soon", None]]},
        {"failures": [[2, "error", "", 0.0, []]]},
        {"failures": [[2, "error", ""]]},
        {"failures": [3]},
        {"kept": bytes(15)},
        {"tensors": 5},
        {"weight_gradients": [0, 0]},
        {"weight_gradients": [0] * 5},
        {"experts": b"", "versions": b"", "epochs": b"", "weight_gradients": []},
    ],
    ids=str,
)
def test_a_part_that_does_not_hold_together_is_refused(changes: dict[str, Any]) -> None:
    request = sample(backward=True)
    numbers = np.zeros(2, dtype=np.int64)
    part = ApplyPart(np.array([0, 1]), numbers, numbers, [], [["float32", [3, 4], "none"]], np.zeros(3, np.float32))
    body, buffers = apply.encode_part(part, backward=True)
    gradients = np.array(changes.pop("weight_gradients", [0] * 3), dtype="<f4").tobytes()
    assert apply.decode_part(*travel(body, buffers), request)
    with pytest.raises(ProtocolError):
        apply.decode_part(*travel(changed(body, PART_FIELDS, changes), [gradients]), request)
    with pytest.raises(ProtocolError):
        apply.decode_part(*travel(body, [bytes(10)]), request)
    with pytest.raises(ProtocolError):
        apply.decode_part(*travel(body, []), request)


def test_later_versions_may_add_fields_at_the_end() -> None:
    request = sample(backward=True)
    body, buffers = apply.encode_request(request)
    assert_equal(apply.decode_request(*travel([*body, "new"], buffers))[0], request)
    for bad in (body[:-1], [], {}, None):
        with pytest.raises(ProtocolError):
            apply.decode_request(*travel(bad, buffers))
        with pytest.raises(ProtocolError):
            apply.decode_part(*travel(bad, buffers), request)


def test_the_largest_messages_are_within_the_bounds_of_heads() -> None:
    num_experts = apply.MAX_EXPERTS
    request = sample()._replace(
        experts=np.arange(num_experts * apply.MAX_DIMS, dtype=np.uint32).reshape(num_experts, -1),
        ids=[bytes(16)] * num_experts,
        versions=np.full(num_experts, 2**62),
        offsets=np.arange(num_experts + 1),
        rows=np.zeros(num_experts, dtype=np.int32),
        weights=np.ones(num_experts, dtype=np.float32),
    )
    decoded, _ = apply.decode_request(*travel(*apply.encode_request(request)))
    assert len(decoded.ids) == num_experts
    numbers = np.empty(0, dtype=np.int64)
    error = NotPrimary("\U0001f600" * 3000, primary=b"p" * 32, retry_after=1.5)
    part = ApplyPart(numbers, numbers, numbers, [(e, error) for e in range(num_experts)], [], np.empty(0, np.float32))
    decoded_part, _ = apply.decode_part(*travel(*apply.encode_part(part, backward=False)), request)
    assert len(decoded_part.failures) == num_experts


def test_every_expert_of_a_manifest_can_be_named() -> None:
    assert apply.MAX_DIMS == manifest.MAX_DIMS and np.iinfo(np.uint32).max == manifest.MAX_COORDINATE
