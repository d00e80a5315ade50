"""Codecs: how one tensor becomes one buffer. Codec ``none`` is the tensor's own memory."""

from __future__ import annotations

import math

import torch

from tesseract_async.errors import ProtocolError

CODECS = ("none",)


def encode(tensor: torch.Tensor, codec: str) -> memoryview:
    """The tensor's bytes (little-endian, C order). Shares memory with a contiguous CPU tensor."""
    if codec not in CODECS:
        raise ValueError(f"unknown codec {codec!r}; known: {', '.join(CODECS)}")
    if tensor.numel() == 0:
        return memoryview(b"")
    return memoryview(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type, unused-ignore]


def decode(buffer: memoryview, dtype: torch.dtype, shape: tuple[int, ...], codec: str) -> torch.Tensor:
    """The tensor that `encode` saw, using the memory of `buffer`. Untrusted. Raises: ProtocolError."""
    if codec not in CODECS:
        raise ProtocolError("unknown codec")
    if len(buffer) != math.prod(shape) * dtype.itemsize:
        raise ProtocolError(f"a tensor of shape {shape} and {dtype} does not fit {len(buffer)} bytes")
    if len(buffer) == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(buffer, dtype=dtype).view(shape)
