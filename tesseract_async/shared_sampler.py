"""SharedSampler: lets trainers that share a model go through a dataset together. It drives `sharing.share`."""

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping, Sized
from typing import Any, Final, TypeVar

import torch
from torch.utils.data import Sampler

from tesseract_async.errors import NotPrimary, Overloaded, RemoteError, TesseractError, describe
from tesseract_async.shared_parameters import SharedParameters
from tesseract_async.shared_pieces import PAUSE
from tesseract_async.sharing.samples import Allotment
from tesseract_async.sharing.share import Share
from tesseract_async.sharing.spans import decode_pieces, encode_pieces
from tesseract_async.uncopied import Uncopied
from tesseract_async.wire import messages
from tesseract_async.wire.names import new_name

logger = logging.getLogger(__name__)

B = TypeVar("B")

PERIOD: Final = 1.0
"""Seconds between two reports of a trainer that needs nothing."""
SHORT_PERIOD: Final = 0.2
"""Seconds between two reports of a trainer that waits for samples."""
LEAVE_TIMEOUT: Final = 5.0
_END: Final = object()


class SharedSampler(Uncopied, Sampler[int]):
    """Gives each sample of an epoch to one of the trainers that share a model, like a `DistributedSampler` for trainers
    that come and go.

    ::

        sampler = ta.SharedSampler(dataset, shared, batch_size=64)
        loader = DataLoader(dataset, batch_size=64, sampler=sampler)
        for epoch in range(10):
            sampler.set_epoch(epoch)
            for batch in loader:  # `async for batch in sampler.feed(loader)` on the event loop
                ...
                optimizer.step()
                shared.step()

    Batches end one after the other, with each ``shared.step()``. An `AsyncTrainer` that is given the sampler tells it
    when each batch has ended, and a batch that failed is handed out again. So are the batches of trainers that die, or
    finish nothing for ten minutes: `num_again` counts the ones that came here.
    """

    def __init__(
        self,
        dataset: Sized,
        shared: SharedParameters[Any],
        *,
        batch_size: int,
        shuffle: bool = True,
        seed: int = 0,
        ahead: int = 4,
    ) -> None:
        """`batch_size`: samples between two calls of ``shared.step()``, or of a batch of an `AsyncTrainer`. `shuffle`:
        in another order in each epoch, by `seed`, which is the same for all trainers. `ahead`: batches that are fetched
        before they are needed.

        Raises: ValueError for an empty dataset, or numbers below 1.
        """
        if min(len(dataset), batch_size, ahead) < 1:
            raise ValueError("the dataset is not empty, and batch_size and ahead are at least 1")
        self.num_samples, self.batch_size, self.shuffle, self.seed = len(dataset), batch_size, shuffle, seed
        self.epoch = 0
        self.shared, self._trainer = shared, new_name()
        self._share = Share(self.num_samples, batch_size=batch_size, ahead=ahead)
        self._news = threading.Condition()
        self._orders: dict[int, list[int]] = {}
        self._wake: asyncio.Event | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._error: BaseException | None = None
        self._is_closed = False
        self._iteration = 0
        self._num_fed: int | None = None
        """Batches that `feed` gave, where it does."""
        self._is_told = False
        """True if an AsyncTrainer says which batches have ended."""
        shared.attach(self)

    def __len__(self) -> int:
        return self.num_samples

    def __repr__(self) -> str:
        return f"SharedSampler({self.num_samples} samples, batch_size={self.batch_size}, epoch={self.epoch})"

    @property
    def num_again(self) -> int:
        """Samples that came here after another trainer had received them and not finished them."""
        return self._share.num_again

    def set_epoch(self, epoch: int) -> None:
        """Go through this epoch next. Epochs follow one another, for all trainers together."""
        if epoch < 0:
            raise ValueError(f"epochs count from 0; {epoch} is none")
        self.epoch = epoch

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch. Which of its samples are done is known where samples are handed out, with the shared
        parameters."""
        return {"epoch": self.epoch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.set_epoch(state["epoch"])

    # ------------------------------------------------------------------------------------------------ the loop's side

    def __iter__(self) -> Iterator[int]:
        with self._news:
            self._share.begin(self.epoch, gives_back=not self._is_told)
            self._iteration = iteration = self._iteration + 1
        self._notify()
        try:
            while (sample := self._next()) is not None:
                yield self._order(sample[0])[sample[1]]
        finally:
            self._end(iteration)

    def _end(self, iteration: int) -> None:
        """End an iteration, unless the next one has begun: iterators that were left are closed late."""
        with self._news:
            if iteration != self._iteration:
                return
            self._share.end()
            self._news.notify_all()
        self._notify()

    def _next(self) -> tuple[int, int] | None:
        """Return the next sample, when it is here; None at the end."""
        with self._news:
            while True:
                sample = self._share.take()
                if sample is not None or self._share.is_over or self._is_closed:
                    break
                if self._error is not None:
                    raise self._error
                # what another one holds may come free; but who waits must not hold up what it holds itself
                if self._share.is_dry and (self._share.is_filling or not self._may_wait()):
                    break
                if self._loop is not None and _running_loop() is self._loop:
                    raise RuntimeError("samples are waited for outside of the event loop: use `sampler.feed(loader)`")
                self._news.wait(PERIOD)
        if self._share.wants:
            self._notify()
        return sample

    def _may_wait(self) -> bool:
        """True if all batches that were begun are being trained on, and end by themselves."""
        return not self._share.has_begun or self._num_fed == self._share.num_begun

    def _order(self, epoch: int) -> list[int]:
        order = self._orders.get(epoch)
        if order is None:
            generator = torch.Generator().manual_seed(self.seed + epoch)
            numbers = torch.randperm(self.num_samples, generator=generator) if self.shuffle else None
            order = list(range(self.num_samples)) if numbers is None else numbers.tolist()
            self._orders = {number: one for number, one in self._orders.items() if number >= epoch - 1} | {epoch: order}
        return order

    async def feed(self, batches: Iterable[B]) -> AsyncGenerator[B, None]:
        """Yield what a loader with this sampler gives, which is waited for in a thread."""
        self._num_fed = self._share.num_begun
        iterator = await asyncio.to_thread(iter, batches)
        try:
            while True:
                batch = await asyncio.to_thread(next, iterator, _END)
                if batch is _END:
                    return
                self._num_fed += 1
                yield batch  # type: ignore[misc]
        finally:
            self._num_fed = None
            self._end(self._iteration)  # a thread that waits is let go

    # ------------------------------------------------------------------------------------------------ batches end

    def begin_run(self) -> int:
        """Begin an AsyncTrainer's run. Returns the number of its first batch."""
        self._is_told = True
        with self._news:
            self._share.end()
            self._share.give_back()
            return self._share.num_begun

    def batch_ended(self, number: int | None, *, failed: bool = False) -> None:
        """Note that this batch (None: the oldest) has been learned from, or `failed`: then it is handed out again."""
        with self._news:
            self._share.ended(number, failed=failed)
            is_dry = self._share.is_dry or self._share.is_over
        if is_dry:
            self._notify()  # others may wait for what is left

    def end_run(self) -> None:
        """End the run: samples that it did not learn from are handed out again."""
        with self._news:
            self._share.give_back()
        self._notify()

    def stepped(self) -> None:
        """Note that ``shared.step()`` was called, and so the oldest batch has ended."""
        if not self._is_told:
            self.batch_ended(None)

    # ------------------------------------------------------------------------------------------------ on the loop

    def _notify(self) -> None:
        """Let the reports begin, or the next one come at once."""
        if self._is_closed:
            return
        if self._loop is None:
            self._loop = self.shared.spawn(self._report_always())
        elif self._wake is not None:
            self._loop.call_soon_threadsafe(self._wake.set)

    async def _report_always(self) -> None:
        self._wake = asyncio.Event()
        while True:
            self._wake.clear()
            try:
                await self._report()
            except (TesseractError, TimeoutError) as error:
                if isinstance(error, RemoteError) and not isinstance(error, NotPrimary | Overloaded):
                    if not error.retryable:
                        with self._news:
                            self._error = error
                            self._news.notify_all()
                        return
                logger.info("samples cannot be asked for yet: %s", describe(error))
                await asyncio.sleep(PAUSE)
            except Exception as error:  # raised where samples are waited for
                with self._news:
                    self._error = error
                    self._news.notify_all()
                raise
            try:
                async with asyncio.timeout(SHORT_PERIOD if self._share.wants or self._share.has_news else PERIOD):
                    await self._wake.wait()
            except TimeoutError:
                pass

    async def _report(self) -> None:
        with self._news:
            turn, report = self._share.report()
        request = messages.SamplesRequest(
            self.shared.uids[0],
            self._trainer,
            turn,
            report.epoch,
            report.num_samples,
            report.wanted,
            [*encode_pieces(report.held)],
            [*encode_pieces(report.done)],
            [*encode_pieces(report.returned)],
        )
        message = await self.shared.pieces.ask(request.uid, messages.SAMPLES, request, b"")
        reply = messages.decode(messages.SamplesReply, message.body)
        grant = Allotment(decode_pieces(reply.pieces), reply.again, decode_pieces(reply.gone), reply.first, reply.waits)
        with self._news:
            self._share.granted(reply.session, report, grant)
            self._news.notify_all()

    async def leave(self) -> None:
        """Give back what is held here, and end."""
        with self._news:
            self._is_closed = True
            self._share.end()
            self._share.give_back()
            self._news.notify_all()
        if self._loop is None or self._error is not None:
            return
        try:
            async with asyncio.timeout(LEAVE_TIMEOUT):
                await self._report()
        except (TesseractError, TimeoutError) as error:
            logger.info("samples were not given back: %s", describe(error))


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
