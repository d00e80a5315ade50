"""Run manifests: what was signed comes back, what was not is refused, differences are told with both values."""

import dataclasses
from random import Random
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tesseract_async.errors import InvalidRecord, ProtocolError
from tesseract_async.experts.run import (
    MAX_PART_BYTES,
    RUNS,
    RunManifest,
    RunMismatch,
    join_run,
    newest_by_signer,
    sign_run,
    split_run,
    split_run_name,
)
from tesseract_async.identity import Identity

ALICE = Identity.from_seed(bytes(32))
BOB = Identity.from_seed(b"b" * 32)

DIGITS = RunManifest(
    name="digits",
    prefix="ffn",
    grid_size=(4, 8),
    expert="ffn",
    sizes={"in_features": 64, "hidden_features": 256},
    optimizer="adam",
    optimizer_options={"learning_rate": 1e-3, "amsgrad": True},
    schedule="warmup",
    schedule_options={"num_steps": 100},
    training={"max_batch_size": 512, "clip_norm": None},
    codecs={"inputs": "bf16", "outputs": "none"},
    seed=7,
    args_schema=["t", ["s", "float32", [64]]],
    kwargs_schema={"mask": ["s", "bool", [64]]},
    outputs_schema=["s", "float32", [64]],
    created=1_700_000_000_000,
)


def test_a_signed_run_survives_the_wire() -> None:
    signed = sign_run(ALICE, DIGITS)
    again = RUNS.read(signed.blob)
    assert again == signed
    assert again.manifest.grid_size == (4, 8)
    assert again.signer == ALICE.peer_id
    assert again.full_name == f"digits@{ALICE.peer_id}"
    assert len(list(again.manifest.pattern)) == 32


def test_any_changed_byte_is_noticed() -> None:
    blob = sign_run(ALICE, DIGITS).blob
    for at in range(0, len(blob), 7):
        changed = bytearray(blob)
        changed[at] ^= 1
        with pytest.raises(InvalidRecord, match="signature"):
            RUNS.read(bytes(changed))


def test_a_long_run_lies_in_parts_and_is_put_together_again() -> None:
    long = dataclasses.replace(DIGITS, sizes={f"size_{n}": "x" * 200 for n in range(20)})
    signed = sign_run(ALICE, long)
    parts = split_run(signed.blob)
    assert len(parts) > 4
    assert all(len(part) <= MAX_PART_BYTES for part in parts)
    other = split_run(sign_run(BOB, DIGITS).blob)
    mixed = [*parts, *other, b"garbage", None, 7, parts[0][:9], bytes(300)]
    Random(1).shuffle(mixed)
    assert {run.signer for run in join_run(mixed)} == {ALICE.peer_id, BOB.peer_id}
    assert join_run(parts[:-1]) == []
    wrong = [*parts[:-1], parts[-1][:-1] + b"?"]
    assert join_run(wrong) == []


def test_the_newest_of_each_signer_counts() -> None:
    old, new = sign_run(ALICE, DIGITS), sign_run(ALICE, dataclasses.replace(DIGITS, seed=8, created=DIGITS.created + 1))
    other = sign_run(BOB, DIGITS)
    foreign = sign_run(BOB, dataclasses.replace(DIGITS, name="letters", created=DIGITS.created + 9))
    found = newest_by_signer([new, old, other, foreign], "digits")
    assert found == {ALICE.peer_id: new, BOB.peer_id: other}


def test_a_mismatch_tells_both_values() -> None:
    DIGITS.check({"sizes.in_features": 64, "grid_size": (4, 8), "args_schema": ("t", ("s", "float32", (64,)))})
    with pytest.raises(RunMismatch) as caught:
        DIGITS.check({"sizes.in_features": 128, "optimizer": None, "prefix": "ffn", "sizes.unheard": 1})
    assert caught.value.differences == {
        "sizes.in_features": (64, 128),
        "optimizer": ("adam", None),
        "sizes.unheard": (None, 1),
    }
    assert "sizes.in_features is 64 in the run, but 128 here" in str(caught.value)


def test_names() -> None:
    assert split_run_name("digits") == ("digits", None)
    assert split_run_name(f"digits@{ALICE.peer_id}") == ("digits", ALICE.peer_id)
    for text in ("", "a b", "x" * 65, ".hidden", "digits@", "digits@abc"):
        with pytest.raises(ValueError, match="name|peer id"):
            split_run_name(text)


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "a/b"},
        {"prefix": "3"},
        {"prefix": ""},
        {"grid_size": ()},
        {"grid_size": (0,)},
        {"grid_size": (1,) * 9},
        {"grid_size": (2.0,)},
        {"expert": ""},
        {"optimizer": 3},
        {"sizes": {"in features": 1}},
        {"sizes": {"x": [1]}},
        {"sizes": {"x": float("nan")}},
        {"sizes": {"x": 2**63}},
        {"sizes": {f"x{n}": 1 for n in range(65)}},
        {"seed": -1},
        {"seed": True},
        {"created": 1.5},
        {"args_schema": 3},
        {"kwargs_schema": []},
        {"outputs_schema": [None]},
        {"outputs_schema": [[[[[[[[[[[1]]]]]]]]]]]},
        {"outputs_schema": [1] * 3000},
    ],
)
def test_senseless_manifests_are_refused_when_made_and_when_read(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="run|schema"):
        dataclasses.replace(DIGITS, **changes)
    data = dataclasses.asdict(DIGITS) | changes
    body = msgpack.packb(data)
    with pytest.raises(ProtocolError):
        RUNS.read(ALICE.public_key + ALICE.sign(RUNS.domain + body) + body)


def test_too_large_a_manifest_is_not_signed() -> None:
    large = dataclasses.replace(
        DIGITS,
        sizes={f"x{n}": "x" * 256 for n in range(64)},
        training={f"x{n}": "x" * 256 for n in range(64)},
    )
    with pytest.raises(ValueError, match="at most 16384 bytes"):
        sign_run(ALICE, large)


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5) | st.integers(0, 3), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=80, deadline=None)
@given(st.dictionaries(st.sampled_from([f.name for f in dataclasses.fields(RunManifest)]), anything, max_size=3))
def test_whatever_was_signed_is_read_or_refused(changes: dict[str, Any]) -> None:
    body = msgpack.packb(dataclasses.asdict(DIGITS) | changes)
    try:
        RUNS.read(ALICE.public_key + ALICE.sign(RUNS.domain + body) + body)
    except ProtocolError:
        pass


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=400))
def test_any_signed_bytes_are_read_or_refused(body: bytes) -> None:
    with pytest.raises(ProtocolError):
        RUNS.read(ALICE.public_key + ALICE.sign(RUNS.domain + body) + body)
    with pytest.raises(ProtocolError):
        RUNS.read(body)
    join_run([body, body[:100]])


@pytest.mark.parametrize("blob", [None, 3, "text", b"", bytes(96), bytes(17000)])
def test_what_is_no_run(blob: object) -> None:
    with pytest.raises(ProtocolError):
        RUNS.read(blob)
