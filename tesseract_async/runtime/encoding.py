"""Packing and unpacking tensors without holding up the loop: a lossy codec takes about 1 ms per megabyte.

Codec ``none`` copies nothing and small tensors take microseconds: these are done at once. Large ones go to the loop's
default executor. Only tensors cross, and nobody else changes them meanwhile: no module, no device, no state.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Final

import torch

from tesseract_async.wire.tensors import Meta, pack_tensors, unpack_tensors

AT_ONCE_BYTES: Final = 256 * 1024
"""Up to so many bytes of tensors (of buffers, when decoding) the loop does it itself."""


async def pack(
    tensors: Sequence[torch.Tensor | None], codecs: str | Sequence[str]
) -> tuple[list[Meta], list[memoryview]]:
    """`wire.tensors.pack_tensors`; the tensors must not change before it ends, also if this call is cancelled."""
    lossless = codecs == "none" or not isinstance(codecs, str) and all(codec == "none" for codec in codecs)
    if lossless or sum(x.nbytes for x in tensors if x is not None and x.is_floating_point()) <= AT_ONCE_BYTES:
        return pack_tensors(tensors, codecs)
    return await asyncio.to_thread(pack_tensors, tensors, codecs)


async def unpack(metas: Any, buffers: Sequence[memoryview]) -> list[torch.Tensor | None]:
    """`wire.tensors.unpack_tensors`. Untrusted. Raises: ProtocolError."""
    if sum(map(len, buffers)) <= AT_ONCE_BYTES // 4 or not _has_lossy(metas):
        return unpack_tensors(metas, buffers)
    return await asyncio.to_thread(unpack_tensors, metas, buffers)


def _has_lossy(metas: Any) -> bool:
    return isinstance(metas, list) and any(isinstance(meta, list) and meta[-1:] != ["none"] for meta in metas)
