"""Codecs: how one tensor becomes one buffer, and back. `docs/design/wire.md`, section 9, says what each loses.

Only floating tensors are encoded; `wire.tensors` sends all others as ``none``. All numbers are little-endian.
"""

import ctypes
import math
import sys
from typing import Any, Final

import numpy as np
import torch

from tesseract_async.errors import ProtocolError
from tesseract_async.wire.codecs import CODECS as CODECS

BLOCK: Final = 4096
"""Elements of one block of ``uint8_blockwise``."""
SMALL_BLOCK: Final = 128
"""Elements of one block of ``int4_blockwise``."""
TILE: Final = 32
"""Blocks worked on at a time: this many stay in a core's cache between the passes."""
FP16_MAX: Final = 65504.0
_LARGE: Final = 65_536
_TINY: Final = torch.finfo(torch.float32).tiny

CASTABLE: Final[dict[torch.dtype, np.dtype[Any]]] = {
    torch.float64: np.dtype(np.float64),
    torch.float32: np.dtype(np.float32),
    torch.float16: np.dtype(np.float16),
    torch.int64: np.dtype(np.int64),
    torch.int32: np.dtype(np.int32),
    torch.uint8: np.dtype(np.uint8),
    torch.bool: np.dtype(np.bool_),
}
"""The dtypes that NumPy and memoryviews know, too: not bfloat16 and the complex ones."""

assert sys.byteorder == "little", "tensors travel as they lie in memory, which the wire defines as little-endian"


def encode(tensor: torch.Tensor, codec: str) -> memoryview:
    """The tensor's bytes by `codec`, for any dtype under ``none``, any floating one under the others; on any device.

    Any shape and strides. ``none`` shares memory with a large contiguous CPU tensor. Runs without autograd; a large one
    takes some milliseconds: not on an event loop.

    Raises: ValueError for an unknown codec or a tensor that it does not take.
    """
    if codec == "none" and (found := small_bytes(tensor)) is not None:
        return found  # as below, with half the dispatches
    if codec not in CODECS:
        raise ValueError(f"unknown codec {codec!r}; known: {', '.join(CODECS)}")
    if codec != "none" and not tensor.is_floating_point():
        raise ValueError(f"codec {codec} takes floating tensors, not {tensor.dtype}")
    if tensor.numel() == 0:
        return memoryview(b"")
    flat = flat_of(tensor)
    if codec == "bf16":
        flat = flat.to(torch.bfloat16)
    elif codec == "fp16":
        flat = flat.to(torch.float32 if flat.dtype == torch.bfloat16 else flat.dtype)
        flat = flat.clamp(-FP16_MAX, FP16_MAX).to(torch.float16)
    elif codec == "int4_blockwise":
        flat = _quantize_nibbles(flat)
    elif codec != "none":
        flat = _quantize(flat, BLOCK if codec == "uint8_blockwise" else flat.numel())
    # torch marks for good what `numpy()` has seen as shared with NumPy, and callers copy such inputs
    if flat.nbytes < _LARGE:
        return memoryview(ctypes.string_at(flat.data_ptr(), flat.nbytes))
    return memoryview(np.from_dlpack(flat.view(torch.uint8)))  # type: ignore[arg-type, unused-ignore]


def small_bytes(tensor: torch.Tensor) -> memoryview | None:
    """A copy of what codec ``none`` gives for it, if it is small, plain and lies in one piece on the CPU; else None."""
    is_plain = tensor.dtype in CASTABLE and tensor.is_cpu and not tensor.is_neg()
    if is_plain and (size := tensor.nbytes) < _LARGE and tensor.is_contiguous():
        return memoryview(ctypes.string_at(tensor.data_ptr(), size))
    return None


def flat_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor's elements in one dimension, on the CPU, side by side: the same memory if they already lie
    so."""
    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    # a view keeps the stride of a single element, over which its bytes could not be read
    return plain.as_strided((plain.numel(),), (1,))


def decode(buffer: memoryview, dtype: torch.dtype, shape: tuple[int, ...], codec: str) -> torch.Tensor:
    """The tensor that `encode` saw, less what the codec loses. ``none`` uses the memory of `buffer`.

    Untrusted. Raises: ProtocolError.
    """
    if codec not in CODECS:
        raise ProtocolError("unknown codec")
    if codec != "none" and not dtype.is_floating_point:
        raise ProtocolError(f"codec {codec} gives no tensor of {dtype}")
    count = math.prod(shape)
    if len(buffer) != (count * dtype.itemsize if codec == "none" else encoded_bytes(count, dtype, codec)):
        raise ProtocolError(f"a tensor of shape {shape} and {dtype} does not fit {len(buffer)} bytes of codec {codec}")
    try:
        if count == 0:
            return torch.empty(shape, dtype=dtype, device="cpu")
        if buffer.readonly:
            buffer = memoryview(bytearray(buffer))
        if codec == "none":
            if (known := CASTABLE.get(dtype)) is not None:
                # a view of a tensor would let go of the interpreter's lock: with a busy device thread, that is slow
                return torch.from_numpy(np.ndarray(shape, known, buffer))
            return torch.frombuffer(buffer, dtype=dtype).view(shape)
        if codec in ("bf16", "fp16"):
            half = torch.frombuffer(buffer, dtype=torch.bfloat16 if codec == "bf16" else torch.float16)
            return half.to(dtype).view(shape)
        octets = torch.frombuffer(buffer, dtype=torch.uint8)
        if codec == "int4_blockwise":
            return _dequantize_nibbles(octets, count).to(dtype).view(shape)
        flat = _dequantize(octets, count, BLOCK if codec == "uint8_blockwise" else count)
        return flat.to(dtype).view(shape)
    except RuntimeError:  # sizes whose strides overflow, next to one that is 0
        raise ProtocolError("a tensor's shape cannot be") from None


def encoded_bytes(count: int, dtype: torch.dtype, codec: str) -> int:
    """Bytes of `count` elements by `codec`."""
    if codec == "none":
        return count * dtype.itemsize
    if codec in ("bf16", "fp16"):
        return 2 * count
    if codec == "int4_blockwise":
        return 2 * -(-count // SMALL_BLOCK) + -(-count // 2)
    return count + 8 * (-(-count // BLOCK) if codec == "uint8_blockwise" else min(count, 1))


# Shapes: n elements, b whole blocks of k elements. Encoded: b' least values, b' steps (float32), n codes; b' counts
# a shorter last block, too. A code c stands for least + c * step.


def _quantize(flat_n: torch.Tensor, k: int) -> torch.Tensor:
    n = flat_n.numel()
    b = n // k
    header = 8 * -(-n // k)
    out = torch.empty(header + n, dtype=torch.uint8, device="cpu")
    scales = out[:header].view(torch.float32).view(2, -1)
    codes_n = out[header:]
    with torch.no_grad():
        _quantize_blocks(flat_n[: b * k].view(b, k), scales[:, :b], codes_n[: b * k].view(b, k))
        if b * k < n:
            _quantize_blocks(flat_n[b * k :].view(1, -1), scales[:, b:], codes_n[b * k :].view(1, -1))
    return out


def _quantize_blocks(flat_bk: torch.Tensor, scales_2b: torch.Tensor, codes_bk: torch.Tensor) -> None:
    b, k = flat_bk.shape
    rows = max(1, TILE * BLOCK // k)
    columns = min(k, TILE * BLOCK)
    scratch = torch.empty(min(b, rows), columns, dtype=torch.float32, device="cpu")
    for row in range(0, b, rows):
        tile = flat_bk[row : row + rows]
        least, step = scales_2b[0, row : row + rows], scales_2b[1, row : row + rows]
        # amin and amax: aminmax is not vectorised along a dimension
        least.copy_(tile.amin(1))
        torch.sub(tile.amax(1), least, out=step) if tile.dtype == torch.float32 else step.copy_(tile.amax(1)).sub_(
            least
        )
        step.div_(255)
        # a step of 0 leaves only codes of 0; one that is a denormal number has no reciprocal
        factor = step.clamp_min(_TINY).reciprocal_().unsqueeze(1)
        least = least.unsqueeze(1)
        for column in range(0, k, columns):
            part = tile[:, column : column + columns]
            work = scratch[: part.shape[0], : part.shape[1]]
            torch.sub(part, least, out=work) if part.dtype == torch.float32 else work.copy_(part).sub_(least)
            codes_bk[row : row + rows, column : column + columns].copy_(work.mul_(factor).add_(0.5))
    finite = torch.isfinite(scales_2b).all(0)
    if not finite.all():
        codes_bk[~finite] = 0  # what float-to-integer conversion makes of NaN differs by machine


def _dequantize(encoded: torch.Tensor, n: int, k: int) -> torch.Tensor:
    b = n // k
    header = 8 * -(-n // k)
    scales = encoded[:header].view(torch.float32).view(2, -1)
    codes_n = encoded[header:]
    out = torch.empty(n, dtype=torch.float32, device="cpu")
    _dequantize_blocks(codes_n[: b * k].view(b, k), scales[:, :b], out[: b * k].view(b, k))
    if b * k < n:
        _dequantize_blocks(codes_n[b * k :].view(1, -1), scales[:, b:], out[b * k :].view(1, -1))
    return out


def _dequantize_blocks(codes_bk: torch.Tensor, scales_2b: torch.Tensor, out_bk: torch.Tensor) -> None:
    b, k = codes_bk.shape
    rows = max(1, TILE * BLOCK // k)
    columns = min(k, TILE * BLOCK)
    least, step = scales_2b[0].view(-1, 1), scales_2b[1].view(-1, 1)
    # infinities become NaN, also where a code of 0 would hide them
    step = torch.where(torch.isfinite(step) & torch.isfinite(least), step, math.nan)
    for row in range(0, b, rows):
        for column in range(0, k, columns):
            part = out_bk[row : row + rows, column : column + columns]
            part.copy_(codes_bk[row : row + rows, column : column + columns])
            part.mul_(step[row : row + rows]).add_(least[row : row + rows])


# int4_blockwise: a step (bfloat16) for each block, then two codes in a byte, the first one in the low half. A code c
# stands for (c - 8) * step; encoders use 1 to 15.


_BYTES: Final = torch.arange(256, device="cpu", dtype=torch.int64)
_PAIRS: Final = torch.stack((_BYTES & 15, _BYTES >> 4), 1).sub(8).float().view(torch.int64).view(-1)
"""For each byte, the steps that its two codes stand for: two float32 numbers, taken as one of 8 bytes."""


def _quantize_nibbles(flat_n: torch.Tensor) -> torch.Tensor:
    n, k = flat_n.numel(), SMALL_BLOCK
    b = -(-n // k)
    out = torch.empty(2 * b + -(-n // 2), dtype=torch.uint8, device="cpu")
    with torch.no_grad():
        flat = flat_n
        if flat.dtype != torch.float32 or n < b * k:
            flat = torch.zeros(b * k, dtype=torch.float32, device="cpu")
            flat[:n] = flat_n
        flat_bk = flat.view(b, k)
        step_b = out[: 2 * b].view(torch.bfloat16)
        step_b.copy_(flat_bk.abs().amax(1).div_(7))
        exact_b = step_b.float()
        usable = torch.isfinite(exact_b) & (exact_b > 0)
        # a step that is a denormal number has no reciprocal; others are rounded by too little for a code beyond 7
        work_bk = (flat_bk * exact_b.clamp_min(_TINY).reciprocal_().unsqueeze(1)).round_()
        if not usable.all():
            work_bk[~usable] = 0  # what float-to-integer conversion makes of NaN differs by machine
        # pairs of bytes in one number each: the second code moves down next to the first
        pairs = work_bk.add_(8).to(torch.uint8).view(-1).view(torch.int16)
        out[2 * b :] = (pairs >> 4).bitwise_or_(pairs).to(torch.uint8)[: -(-n // 2)]
    return out


def _dequantize_nibbles(encoded: torch.Tensor, n: int) -> torch.Tensor:
    k = SMALL_BLOCK
    b = -(-n // k)
    packed = encoded[2 * b :]
    out = torch.empty(b * k // 2, dtype=torch.int64, device="cpu")
    torch.index_select(_PAIRS, 0, packed.int(), out=out[: len(packed)])
    step_b = encoded[: 2 * b].view(torch.bfloat16).float()
    step_b.sub_(step_b - step_b)  # infinities become NaN, also where a code of 0 would hide them
    return out.view(torch.float32).view(b, k).mul_(step_b.unsqueeze(1)).view(-1)[:n]
