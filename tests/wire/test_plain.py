"""Plain tensors, which one look is enough for: never anything else than what the careful way gives."""

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from tesseract_async.errors import ProtocolError
from tesseract_async.wire.tensors import DTYPE_NAMES, TensorSpec, may_unpack, pack_tensors, unpack_plain, unpack_tensors

SPECS = st.lists(
    st.builds(
        TensorSpec,
        st.lists(st.integers(0, 3), max_size=2).map(tuple),
        st.sampled_from([torch.float32, torch.int64, torch.bool, torch.bfloat16, torch.float64]),
    ),
    min_size=1,
    max_size=3,
)
ODD = st.sampled_from([None, "none", "bf16", "float32", 1, 2, True, 1.0, [], [1], [2, 2], "", b"none", {}, 2**40])


def careful(metas: Any, buffers: Any, specs: list[TensorSpec], num_rows: int) -> list[torch.Tensor] | None:
    """What `unpack_tensors` and the checks against a schema let through."""
    try:
        if not may_unpack(metas, specs):
            return None
        tensors = unpack_tensors(metas, buffers)
    except ProtocolError:
        return None
    if len(tensors) != len(specs):
        return None
    for tensor, spec in zip(tensors, specs, strict=True):
        if tensor is None or tensor.dtype != spec.dtype or tensor.shape != (num_rows, *spec.shape):
            return None
    return tensors  # type: ignore[return-value]


@given(specs=SPECS, num_rows=st.integers(1, 3), data=st.data())
def test_what_counts_as_plain_is_what_the_careful_way_gives(specs: list[TensorSpec], num_rows: int, data: Any) -> None:
    tensors = [torch.ones(num_rows, *spec.shape).to(spec.dtype) for spec in specs]
    metas, buffers = pack_tensors(tensors)
    received = [memoryview(bytearray(buffer)) for buffer in buffers]
    if data.draw(st.booleans()):  # one thing is wrong, or only odd
        meta = data.draw(st.sampled_from(metas))
        assert meta is not None
        where = data.draw(st.integers(0, 3))
        if where < 3:
            meta[where] = data.draw(ODD)
        elif data.draw(st.booleans()) and received:
            received[0] = received[0][: data.draw(st.integers(0, len(received[0])))]
        else:
            metas = data.draw(st.sampled_from([metas[:-1], [*metas, None], None, "x", {}]))
    found = unpack_plain(metas, received, specs, num_rows=num_rows)
    if found is not None:
        expected = careful(metas, received, specs, num_rows)
        assert expected is not None and len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == other.dtype and torch.equal(one, other)
            assert one.data_ptr() == other.data_ptr(), "both use the buffer"


def test_usual_tensors_are_plain_and_others_are_not() -> None:
    spec = TensorSpec((4,))
    x = torch.randn(2, 4)
    metas, buffers = pack_tensors([x])
    received = [memoryview(bytearray(buffers[0]))]
    (found,) = unpack_plain(metas, received, [spec]) or ()
    assert torch.equal(found, x)
    assert unpack_plain(metas, received, [spec], num_rows=3) is None
    assert unpack_plain(metas, buffers, [spec]) is None, "not ours to write"
    assert unpack_plain([["float32", [0, 4], "none"]], [memoryview(b"")], [spec]) is None
    assert unpack_plain([["float32", [2, 2, 2], "none"]], received, [spec]) is None, "as many bytes"
    assert unpack_plain(metas, [memoryview(bytearray(36))], [spec]) is None, "more bytes"
    assert unpack_plain([["float64", [1, 4], "none"]], received, [spec], num_rows=1) is None
    assert unpack_plain(metas * 2, received * 2, [spec, TensorSpec((4,), torch.float64)]) is None
    assert DTYPE_NAMES[spec.dtype] == metas[0][0]  # type: ignore[index]


def test_a_tensor_without_rows_is_not_plain() -> None:
    assert unpack_plain([["float32", [], "none"]], [memoryview(bytearray(4))], [TensorSpec(())]) is None
