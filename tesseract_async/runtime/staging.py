"""The way of a batch to the device and back.

On the CPU, gathering is one ``torch.cat``. On a CUDA device, rows are gathered into pinned memory, copied by a stream
of their own while the batch before still computes, and copied back by a third stream; events order the three. PyTorch's
caching allocator keeps the pinned blocks, and does not hand one out again before the copies that use it have ended.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch

cuda: Any = torch.cuda  # its classes are untyped

Columns = Sequence[Sequence[torch.Tensor] | None]
"""Per tensor of the batch: the rows of each slice, in order; None for a tensor that no slice has."""


class Transfer(Protocol):
    """Tensors that are being copied."""

    def wait(self) -> list[torch.Tensor | None]:
        """Return the tensors: those on the device at once, for work that it is given from now on; those in host memory
        once they have arrived."""


class Staging(Protocol):
    """The way to one device and back. Used by the device's thread only."""

    overlaps: bool
    """True if copies run while the device computes, so that staging the next batch early pays."""

    def upload(self, columns: Columns) -> Transfer: ...
    def download(self, tensors: Sequence[torch.Tensor | None]) -> Transfer: ...
    def release(self) -> None:
        """Free cached device memory after an out-of-memory error."""


class HostStaging:
    """The CPU as the device: nothing is copied, unless several slices have to be gathered."""

    overlaps = False

    def upload(self, columns: Columns) -> Transfer:
        return _Here([None if rows is None else rows[0] if len(rows) == 1 else torch.cat([*rows]) for rows in columns])

    def download(self, tensors: Sequence[torch.Tensor | None]) -> Transfer:
        return _Here([*tensors])

    def release(self) -> None:
        return


class _Here:
    def __init__(self, tensors: list[torch.Tensor | None]) -> None:
        self._tensors = tensors

    def wait(self) -> list[torch.Tensor | None]:
        return self._tensors


class CudaStaging:
    """Pinned memory and two copy streams besides the stream that computes."""

    overlaps = True

    def __init__(self, device: torch.device) -> None:
        """Raises: ValueError if there is no such device."""
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

    def upload(self, columns: Columns) -> Transfer:
        staged: list[torch.Tensor | None] = []
        with torch.cuda.stream(self._up):
            for rows in columns:
                if rows is None:
                    staged.append(None)
                    continue
                num_rows = sum(x.shape[0] for x in rows)
                pinned = torch.empty((num_rows, *rows[0].shape[1:]), dtype=rows[0].dtype, pin_memory=True)
                torch.cat([*rows], out=pinned)
                staged.append(pinned.to(self._device, non_blocking=True))
            done = cuda.Event()
            done.record(self._up)
        return _CudaTransfer(staged, done, self._compute)

    def download(self, tensors: Sequence[torch.Tensor | None]) -> Transfer:
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
        return _CudaTransfer(arrived, done, None)

    def release(self) -> None:
        torch.cuda.empty_cache()


class _CudaTransfer:
    def __init__(
        self, tensors: list[torch.Tensor | None], done: torch.cuda.Event, stream: torch.cuda.Stream | None
    ) -> None:
        """`stream`: the one that waits for the copies; None: the thread does."""
        self._tensors = tensors
        self._done = done
        self._stream = stream

    def wait(self) -> list[torch.Tensor | None]:
        if self._stream is None:
            self._done.synchronize()
            return self._tensors
        self._stream.wait_event(self._done)
        for tensor in self._tensors:
            if tensor is not None:
                tensor.record_stream(self._stream)
        return self._tensors


def staging_for(device: torch.device) -> Staging:
    """Return the staging of a device. Call it on the device's thread. Raises: ValueError if there is no such device."""
    return CudaStaging(device) if device.type == "cuda" else HostStaging()
