"""Every codec on every kind of tensor: what comes back, what is lost, what is refused."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tesseract_async.errors import ProtocolError
from tesseract_async.wire.compression import BLOCK, CODECS, SMALL_BLOCK, TILE, decode, encode, encoded_bytes
from tesseract_async.wire.tensors import DTYPES

LOSSY = [codec for codec in CODECS if codec != "none"]
FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def through(tensor: torch.Tensor, codec: str) -> torch.Tensor:
    data = bytearray(encode(tensor, codec))
    assert len(data) == encoded_bytes(tensor.numel(), tensor.dtype, codec)
    back = decode(memoryview(data), tensor.dtype, tuple(tensor.shape), codec)
    assert back.dtype == tensor.dtype and back.shape == tensor.shape
    return back


def allowed_loss(tensor: torch.Tensor, codec: str) -> torch.Tensor:
    """The bound that the docstring promises, element by element, in float64."""
    exact = tensor.double()
    own = exact.abs() * torch.finfo(tensor.dtype).eps
    if codec == "bf16":
        return exact.abs() * 2**-8 + own
    if codec == "fp16":
        return (exact.abs() - 65504).clamp(0) + exact.abs() * 2**-11 + 2**-24 + own
    flat = exact.reshape(-1)
    if codec == "int4_blockwise":
        bound = torch.cat([(part.abs().max() / 13.9).expand(part.numel()) for part in flat.split(SMALL_BLOCK)])
        return bound.reshape(exact.shape) + own
    k = BLOCK if codec == "uint8_blockwise" else max(1, flat.numel())
    bound = torch.cat([((part.max() - part.min()) / 510).expand(part.numel()) for part in flat.split(k)])
    rounding = 4 * flat.abs().max() * max(torch.finfo(torch.float32).eps, torch.finfo(tensor.dtype).eps)
    return (bound * 1.001 + rounding).reshape(exact.shape)


@pytest.mark.parametrize("codec", CODECS)
def test_what_comes_back_differs_by_no_more_than_promised(codec: str) -> None:
    random = torch.Generator().manual_seed(1)
    for dtype in FLOATS:
        for shape in ((), (0,), (3, 0, 2), (1,), (5, 7), (BLOCK,), (3, BLOCK + 5)):
            tensor = (torch.randn(shape, dtype=torch.float64, generator=random) * 3 + 1).to(dtype)
            back = through(tensor, codec)
            if codec == "none":
                assert torch.equal(back, tensor)
            elif tensor.numel():
                loss = (back.double() - tensor.double()).abs()
                assert (loss <= allowed_loss(tensor, codec)).all(), (dtype, shape)


@pytest.mark.parametrize("codec", CODECS)
def test_constant_tensors_survive(codec: str) -> None:
    for value in (0.0, 1.0, -3.5, 2.0**-20, 5000.0):
        tensor = torch.full((3, BLOCK), value)
        assert torch.allclose(through(tensor, codec), tensor, rtol=2**-8, atol=2**-25)
        if codec.startswith("uint8"):
            assert torch.equal(through(tensor, codec), tensor)


@pytest.mark.parametrize("codec", LOSSY)
def test_blocks_that_are_not_finite_never_pass_for_finite(codec: str) -> None:
    for bad in (math.nan, math.inf, -math.inf):
        tensor = torch.randn(2 * BLOCK)
        tensor[10] = bad
        back = through(tensor, codec)
        if codec == "bf16":
            assert torch.equal(back[10], tensor[10]) or bad != bad and back[10].isnan()
        elif codec == "fp16":
            assert back[10].isnan() if bad != bad else back[10] == math.copysign(65504, bad)
        elif codec == "int4_blockwise":
            assert back[:SMALL_BLOCK].isnan().all() and back[SMALL_BLOCK:].isfinite().all()
            codes = bytes(encode(tensor, codec))[2 * 2 * BLOCK // SMALL_BLOCK :]
            assert codes[: SMALL_BLOCK // 2] == b"\x88" * (SMALL_BLOCK // 2), "the same bytes on every machine"
        else:
            assert back[:BLOCK].isnan().all()
            assert back[BLOCK:].isfinite().all() == (codec == "uint8_blockwise")
            header = encoded_bytes(2 * BLOCK, torch.float32, codec) - 2 * BLOCK
            codes = bytes(encode(tensor, codec))[header : header + BLOCK]
            assert codes == bytes(BLOCK), "the same bytes on every machine"


def test_extreme_ranges_stay_within_the_range_of_codes() -> None:
    for tensor in (
        torch.tensor([1e-45, 0.0, 2e-45]),
        torch.tensor([1e30, 1e30 * (1 + 2**-20), 1e30 * (1 + 2**-21)]),
        torch.tensor([-3e38, 3e38]),
        torch.linspace(1000, 1000.002, 100),
    ):
        assert through(tensor, "int4_blockwise").isfinite().all()
        for codec in ("uint8", "uint8_blockwise"):
            back = through(tensor, codec)
            if (tensor.max() - tensor.min()).isfinite():
                assert (back - tensor).abs().max() <= (
                    tensor.max() - tensor.min()
                ) / 500 + tensor.abs().max() * 2**-22 + 1e-35
            else:
                assert back.isnan().all()


@pytest.mark.parametrize("codec", CODECS)
def test_strides_and_gradients_do_not_matter(codec: str) -> None:
    base = torch.randn(64, 130, requires_grad=True)
    view = base[::3, 1::2].T
    assert torch.equal(through(view, codec), through(view.detach().contiguous().clone(), codec))


def test_none_takes_every_dtype() -> None:
    for dtype in DTYPES.values():
        for shape in ((), (3,), (2, 0), (2, 5)):
            tensor = torch.ones(shape, dtype=dtype)
            assert torch.equal(through(tensor, "none"), tensor)
            assert torch.equal(
                through(tensor.T if tensor.dim() == 2 else tensor, "none"), tensor.T if tensor.dim() == 2 else tensor
            )


def test_none_shares_memory_both_ways_unless_it_is_small() -> None:
    tensor = torch.zeros(16 * 1024)
    view = encode(tensor, "none")
    tensor[0] = 1.0
    assert bytes(view[:4]) == b"\x00\x00\x80\x3f"
    small = torch.zeros(8)
    view = encode(small, "none")
    small[0] = 1.0
    assert not any(view) and small.untyped_storage().resizable(), "and torch knows of nobody who shares it"
    memory = bytearray(32)
    back = decode(memoryview(memory), torch.float32, (8,), "none")
    memory[0:4] = b"\x00\x00\x80\x3f"
    assert back[0] == 1.0


def test_blockwise_needs_little_more_than_a_byte_per_element() -> None:
    assert encoded_bytes(1024 * 2048, torch.float32, "uint8_blockwise") <= 0.27 * 4 * 1024 * 2048
    outlier = torch.randn(10 * BLOCK)
    outlier[0] = 1000.0
    loss = {codec: (through(outlier, codec) - outlier)[BLOCK:].abs().max() for codec in ("uint8", "uint8_blockwise")}
    assert loss["uint8_blockwise"] < 0.02 < 1.0 < loss["uint8"]


def test_four_bits_take_an_eighth_and_small_blocks_keep_an_outlier_to_itself() -> None:
    assert encoded_bytes(1 << 20, torch.float32, "int4_blockwise") == (1 << 19) + (1 << 14)
    outlier = torch.randn(10 * BLOCK)
    outlier[0] = 1000.0
    assert (through(outlier, "int4_blockwise") - outlier)[SMALL_BLOCK:].abs().max() < 0.4
    for steps in (torch.arange(-7.0, 8.0), torch.tensor([7.0]), torch.zeros(3)):  # what is on a step survives
        assert torch.equal(through(steps, "int4_blockwise"), steps)


def test_what_no_codec_takes_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown codec 'zip'"):
        encode(torch.zeros(1), "zip")
    with pytest.raises(ValueError, match="floating"):
        encode(torch.zeros(1, dtype=torch.int64), "uint8")
    for codec, dtype, shape, data in (
        ("zip", torch.float32, (1,), bytes(4)),
        ("none", torch.float32, (2,), bytes(4)),
        ("bf16", torch.int32, (2,), bytes(4)),
        ("uint8", torch.float32, (2,), bytes(2)),
        ("uint8_blockwise", torch.float32, (BLOCK + 1,), bytes(BLOCK + 9)),
        ("int4_blockwise", torch.float32, (SMALL_BLOCK + 1,), bytes(SMALL_BLOCK // 2 + 3)),
        ("none", torch.float32, (2**39, 2**39, 0), b""),
    ):
        with pytest.raises(ProtocolError):
            decode(memoryview(bytearray(data)), dtype, shape, codec)


@given(
    st.binary(max_size=300),
    st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bool, torch.int64]),
    st.lists(st.integers(0, 2**40), max_size=4),
    st.sampled_from([*CODECS, "other"]),
)
def test_decode_raises_only_protocol_errors(data: bytes, dtype: torch.dtype, shape: list[int], codec: str) -> None:
    try:
        tensor = decode(memoryview(bytearray(data)), dtype, tuple(shape), codec)
    except ProtocolError:
        return
    assert tuple(tensor.shape) == tuple(shape)


@pytest.mark.parametrize("codec", ["uint8", "uint8_blockwise"])
def test_what_takes_several_tiles_is_as_its_parts(codec: str) -> None:
    tensor = torch.randn(2 * TILE * BLOCK + 7 * BLOCK + 100)
    tensor[:: 2 * BLOCK], tensor[1 :: 2 * BLOCK] = -9.0, 9.0  # where one scale is for all, that of each part is it, too
    parts = [through(part, codec) for part in tensor.split(2 * BLOCK)]
    assert torch.equal(through(tensor, codec), torch.cat(parts))


class Labelled(torch.Tensor):
    """A tensor class of somebody's own."""


@pytest.mark.parametrize("codec", CODECS)
def test_a_view_of_any_kind_travels_as_its_elements(codec: str) -> None:
    for dtype in DTYPES.values() if codec == "none" else FLOATS:
        row, square = ((torch.randn(*shape) * 50).to(dtype) for shape in ((1, 5), (4, 4)))
        views = [row[:, 0], row[:, 1:2], row[0, 0], row[:, :1].expand(1, 3), square[::2, ::3], row[:0], square.T]
        views += [row[:, 0].as_subclass(Labelled), square.as_subclass(Labelled)]
        if dtype.is_complex:
            views += [row.conj(), row.conj()[:, 0], square.T.conj()]
        for view in views:
            plain = view.clone(memory_format=torch.contiguous_format).as_subclass(torch.Tensor).resolve_conj()
            assert torch.equal(through(view, codec), through(plain, codec)), (dtype, view.shape, view.stride())
    negative = torch.randn(1, 5, dtype=torch.complex64).conj().imag
    assert negative.is_neg()
    for view in (negative, negative[:, 0]):
        assert torch.equal(through(view, codec), through(view.resolve_neg().clone(), codec))
