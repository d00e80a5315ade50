"""Packs and unpacks tensors without holding up the loop: a lossy codec takes about 1 ms per megabyte.

Codec ``none`` copies nothing and small tensors take microseconds: these are done at once. Large ones go to threads of
their own. Only tensors that do not change meanwhile cross to these threads: no module, no device, no state.
"""

import asyncio
import concurrent.futures
import os
from collections.abc import Callable, Sequence
from typing import Final, TypeVar

import torch

from tesseract_async.wire.tensors import Meta, pack_tensors, unpack_tensors

T = TypeVar("T")

AT_ONCE_BYTES: Final = 256 * 1024
"""Bytes of tensors up to which the loop packs them itself; when unpacking, a quarter of it in bytes of buffers."""


async def pack(
    tensors: Sequence[torch.Tensor | None], codecs: str | Sequence[str]
) -> tuple[list[Meta], list[memoryview]]:
    """Do what `wire.tensors.pack_tensors` does. The tensors must not change until it ends, even if it is cancelled."""
    lossless = codecs == "none" or not isinstance(codecs, str) and all(codec == "none" for codec in codecs)
    if lossless or sum(x.nbytes for x in tensors if x is not None and x.is_floating_point()) <= AT_ONCE_BYTES:
        return pack_tensors(tensors, codecs)
    return await _in_thread(lambda: pack_tensors(tensors, codecs))


async def unpack(metas: object, buffers: Sequence[memoryview]) -> list[torch.Tensor | None]:
    """Do what `wire.tensors.unpack_tensors` does. Untrusted. Raises: ProtocolError."""
    if sum(map(len, buffers)) <= AT_ONCE_BYTES // 4 or not _has_lossy(metas):
        return unpack_tensors(metas, buffers)
    return await _in_thread(lambda: unpack_tensors(metas, buffers))


def _has_lossy(metas: object) -> bool:
    return isinstance(metas, list) and any(isinstance(meta, list) and meta[-1:] != ["none"] for meta in metas)


# Not the loop's default executor: a program may fill it with backwards (`asyncio.to_thread(loss.backward)`), which wait
# for gradients that would be packed there.
_threads: concurrent.futures.ThreadPoolExecutor


def _renew_threads() -> None:
    global _threads
    _threads = concurrent.futures.ThreadPoolExecutor(thread_name_prefix="tesseract-codec")


_renew_threads()
if hasattr(os, "register_at_fork"):  # in a fork's child the old ones do not run
    os.register_at_fork(after_in_child=_renew_threads)


async def apart(num_bytes: int, work: Callable[[], T]) -> T:
    """Do work on this many bytes without holding up the loop: at once if they are few, else in one of these threads,
    where the work ends even if the call is cancelled."""
    return work() if num_bytes <= AT_ONCE_BYTES else await _in_thread(work)


async def _in_thread(work: Callable[[], T]) -> T:
    return await asyncio.get_running_loop().run_in_executor(_threads, work)
