"""A tensor of a state whose parts are kept by the processes of a mesh, and is never whole anywhere."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple

import torch

BLOCK_BYTES: Final = 4 << 20
"""The approximate bytes of whole rows that are taken at a time."""


class TensorPart(NamedTuple):
    """A box of a tensor, and who keeps it."""

    rank: int
    offsets: Sequence[int]
    sizes: Sequence[int]


class SpreadTensor:
    """Reads as the whole tensor's bytes, row by row, fetched from where they are kept."""

    def __init__(
        self,
        dtype: torch.dtype,
        shape: Sequence[int],
        parts: Sequence[TensorPart],
        read: Callable[[int, int, int], bytes | bytearray | memoryview],
        owner: object,
    ) -> None:
        """`read(rank, start, stop)` returns the bytes of these rows of the part that `rank` keeps. `owner`: what lets
        the processes forget their parts when it is gone."""
        self.dtype, self.shape, self.owner = dtype, tuple(shape), owner
        self.nbytes = math.prod(self.shape) * dtype.itemsize
        kept: dict[tuple[tuple[int, ...], tuple[int, ...]], TensorPart] = {}
        for part in parts:  # what several keep is asked of the first
            if math.prod(part.sizes):
                kept.setdefault((tuple(part.offsets), tuple(part.sizes)), part)
        self._parts, self._read = list(kept.values()), read

    @property
    def num_rows(self) -> int:
        return self.shape[0] if self.shape else 1

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Return these rows of the whole tensor, on the CPU. Blocking. Raises: Overloaded if the mesh is lost."""
        block = torch.empty((stop - start, *self.shape[1:]), dtype=self.dtype)
        for part in self._parts:
            first, num = (part.offsets[0], part.sizes[0]) if self.shape else (0, 1)
            low, high = max(start, first), min(stop, first + num)
            if low < high:
                data = self._read(part.rank, low - first, high - first)
                given = torch.frombuffer(data, dtype=self.dtype).view(high - low, *part.sizes[1:])
                box = block[low - start : high - start]
                for dim, (offset, size) in enumerate(zip(part.offsets[1:], part.sizes[1:], strict=True), 1):
                    box = box.narrow(dim, offset, size)
                box.copy_(given)
        return block

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Return the first row, and the one after the last, of each block that is read at once."""
        return blocks_of(self.shape, self.dtype)


def blocks_of(shape: Sequence[int], dtype: torch.dtype) -> Iterator[tuple[int, int]]:
    """Return the first row, and the one after the last, of each block of a tensor of this shape."""
    num_rows, row = (shape[0] if shape else 1), math.prod(shape[1:]) * dtype.itemsize
    step = max(1, BLOCK_BYTES // max(1, row))
    return ((at, min(num_rows, at + step)) for at in range(0, num_rows if row else 0, step))
