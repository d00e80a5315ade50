"""The batches of a training run: where they come from, who is told how they ended, and how many samples one has."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, Iterable, Iterator, Mapping
from typing import Any, Final, Generic, Protocol, TypeVar, runtime_checkable

import torch

from tesseract_async.tasks import end

B = TypeVar("B")

END: Final = object()
"""Comes after the last batch."""


class Sampler(Protocol):
    """Anything that says where it stands among the samples, and can go on from there."""

    def state_dict(self) -> Mapping[str, object]:
        """Return its position among the samples."""

    def load_state_dict(self, state: Mapping[str, Any]) -> object:
        """Go on from a position that `state_dict` returned."""


@runtime_checkable
class TracksBatches(Protocol):
    """A sampler that is told what becomes of each batch: `SharedSampler`."""

    def begin_run(self) -> int:
        """Return the number of the first batch of the run that begins."""

    def feed(self, batches: Iterable[B]) -> AsyncGenerator[B, None]:
        """Yield the batches."""

    def batch_ended(self, number: int, *, failed: bool) -> None:
        """Take note of a batch."""

    def end_run(self) -> None:
        """Take note that all other batches are given up."""


class BatchSource(Generic[B]):
    """Gives batches as they are asked for. An asynchronous iterator runs in one task throughout, as its author may
    expect."""

    def __init__(self, batches: Iterable[B] | AsyncIterable[B]) -> None:
        self._wanted: asyncio.Queue[asyncio.Future[Any]] = asyncio.Queue()
        self._iterator: Iterator[B] | None = None
        self._making: asyncio.Task[None] | None = None
        if isinstance(batches, AsyncIterable):
            self._making = asyncio.create_task(self._make(batches))
        else:
            self._iterator = iter(batches)

    def take(self) -> asyncio.Future[Any]:
        """Return a future of the next batch, or of `END`. Only one may be asked for at a time."""
        taking: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        if self._iterator is None:
            self._wanted.put_nowait(taking)
            return taking
        try:
            taking.set_result(next(self._iterator, END))
        except Exception as error:  # the caller's iterator may raise anything: the taker gets it
            taking.set_exception(error)
        return taking

    async def _make(self, batches: AsyncIterable[B]) -> None:
        iterator = aiter(batches)
        while True:
            taking = await self._wanted.get()
            try:
                taking.set_result(await anext(iterator, END))
            except Exception as error:  # the caller's iterator may raise anything: the taker gets it
                taking.set_exception(error)
                return

    async def aclose(self) -> None:
        """Make no more batches."""
        await end(self._making)


def num_samples(batch: object) -> int:
    """Return the length of the first tensor in a batch; 0 if there is none."""
    if isinstance(batch, torch.Tensor):
        return len(batch) if batch.dim() else 1
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else ()
    return next((found for part in parts if (found := num_samples(part))), 0)
