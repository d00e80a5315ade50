"""How a batch gets to the device and back.

On the CPU, gathering is one ``torch.cat``. On a CUDA device, rows are gathered into pinned memory, copied by a stream
of their own while the batch before still computes, and copied back by a third stream; events order the three. PyTorch's
caching allocator keeps the pinned blocks, and does not hand one out again before the copies that use it have ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

cuda: Any = torch.cuda  # its classes are untyped

Columns = Sequence[Sequence[torch.Tensor] | None]
"""Per tensor of the batch: the rows that each part brings, in order; None for a tensor that nobody brings."""


class Upload(Protocol):
    """Rows on their way to the device."""

    def wait(self) -> list[torch.Tensor | None]:
        """The batch's tensors. Work that the device is given from now on runs after the copies."""


class Download(Protocol):
    """Results on their way back."""

    def wait(self) -> list[torch.Tensor | None]:
        """The tensors in host memory; blocks until they are there."""


class Staging(Protocol):
    """The way to one device and back. Used by the device's thread only."""

    overlaps: bool
    """Whether copies run beside computing, so that staging the next batch early pays."""

    def upload(self, columns: Columns) -> Upload: ...
    def download(self, tensors: Sequence[torch.Tensor | None]) -> Download: ...
    def release(self) -> None:
        """Frees cached device memory after an out-of-memory error."""


class HostStaging:
    """The device is the CPU: nothing travels, and one part alone is not even copied."""

    overlaps = False

    def upload(self, columns: Columns) -> Upload:
        return _Here(
            [None if rows is None else rows[0] if len(rows) == 1 else torch.cat(list(rows)) for rows in columns]
        )

    def download(self, tensors: Sequence[torch.Tensor | None]) -> Download:
        return _Here(list(tensors))

    def release(self) -> None:
        return


class CudaStaging:
    """Pinned memory and two copy streams beside the stream that computes."""

    overlaps = True

    def __init__(self, device: torch.device) -> None:
        if not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count():
            raise ValueError(f"no device {device} here: PyTorch sees {torch.cuda.device_count()} CUDA device(s)")
        if device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self._device = device
        torch.cuda.set_device(device)
        self._compute = cuda.Stream(device)
        self._up = cuda.Stream(device)
        self._down = cuda.Stream(device)
        torch.cuda.set_stream(self._compute)  # for this thread

    def upload(self, columns: Columns) -> Upload:
        staged: list[torch.Tensor | None] = []
        with torch.cuda.stream(self._up):
            for rows in columns:
                if rows is None:
                    staged.append(None)
                    continue
                num_rows = sum(x.shape[0] for x in rows)
                pinned = torch.empty((num_rows, *rows[0].shape[1:]), dtype=rows[0].dtype, pin_memory=True)
                torch.cat(list(rows), out=pinned)
                staged.append(pinned.to(self._device, non_blocking=True))
            done = cuda.Event()
            done.record(self._up)
        return _CudaUpload(staged, done, self._compute)

    def download(self, tensors: Sequence[torch.Tensor | None]) -> Download:
        self._down.wait_stream(self._compute)
        arrived: list[torch.Tensor | None] = []
        with torch.cuda.stream(self._down):
            for tensor in tensors:
                if tensor is None:
                    arrived.append(None)
                    continue
                host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                host.copy_(tensor, non_blocking=True)
                tensor.record_stream(self._down)  # its memory must not be taken again before the copy
                arrived.append(host)
            done = cuda.Event(blocking=True)  # blocking: a spinning wait would take the loop's core
            done.record(self._down)
        return _CudaDownload(arrived, done)

    def release(self) -> None:
        torch.cuda.empty_cache()


class _Here:
    def __init__(self, tensors: list[torch.Tensor | None]) -> None:
        self._tensors = tensors

    def wait(self) -> list[torch.Tensor | None]:
        return self._tensors


class _CudaUpload:
    def __init__(self, tensors: list[torch.Tensor | None], done: torch.cuda.Event, compute: torch.cuda.Stream) -> None:
        self._tensors = tensors
        self._done = done
        self._compute = compute

    def wait(self) -> list[torch.Tensor | None]:
        self._compute.wait_event(self._done)
        for tensor in self._tensors:
            if tensor is not None:
                tensor.record_stream(self._compute)
        return self._tensors


class _CudaDownload:
    def __init__(self, tensors: list[torch.Tensor | None], done: torch.cuda.Event) -> None:
        self._tensors = tensors
        self._done = done

    def wait(self) -> list[torch.Tensor | None]:
        self._done.synchronize()
        return self._tensors


def staging_for(device: torch.device) -> Staging:
    """Call it on the device's thread."""
    return CudaStaging(device) if device.type == "cuda" else HostStaging()
