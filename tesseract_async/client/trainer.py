"""`AsyncTrainer`: many training steps in flight over one set of local parameters."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from tesseract_async.client.autograd import backward
from tesseract_async.errors import SchemaMismatch, TesseractError

M = TypeVar("M", bound=nn.Module)
B = TypeVar("B")


@dataclass(frozen=True, slots=True, eq=False)
class StepReport:
    """How one step went."""

    loss: torch.Tensor
    """Detached; not a number if the step failed."""
    staleness: int
    """Steps that others took between this one's look at the parameters and its own optimizer step."""
    version: int
    """Steps taken by the trainer, this one included."""
    seconds: float
    """From the look at the parameters to the optimizer's step, waiting for the staleness bound included."""
    error: BaseException | None = None
    """Why the step failed; then nothing changed here, and its batch was not learnt from."""


class AsyncTrainer(Generic[M]):
    """Trains `module` with up to `in_flight` steps under way at once, so that remote experts' delays overlap.

    Each step runs on a copy of the module of its own, refreshed from the master when it starts; torch would refuse a
    backward over parameters that another step's optimizer has changed meanwhile. When a step's backward is done its
    gradients move to the master and the optimizer steps, in one turn of the loop. Gradients are thus up to
    ``in_flight - 1`` steps stale, and more where steps differ in length. `max_staleness` bounds that: at most
    ``max_staleness + 1`` steps are under way, and those that get far ahead wait for those that began early. Remote
    experts are shared by all copies.

    ::

        trainer = AsyncTrainer(model, torch.optim.Adam(model.parameters()), in_flight=64)

        async def loss_of(model, batch):
            x, y = batch
            return F.cross_entropy(await model(x), y)

        async for report in trainer.run(loss_of, batches):
            print(report.loss.item(), report.staleness)

    A step that the swarm lets down, say because no expert was alive for too long, ends the run; with
    ``trainer.run(..., max_failures=10)`` it is reported with its `error`, and only the eleventh on end is raised.

    The master, `module`, is never used for computing and always holds the latest parameters. Buffers (such as batch
    statistics) of a copy overwrite the master's when its step ends. Use on one loop only.
    """

    def __init__(
        self, module: M, optimizer: torch.optim.Optimizer, *, in_flight: int = 1, max_staleness: int | None = None
    ) -> None:
        """`optimizer` holds parameters of `module`; parameters that it does not hold stay as they are.

        Raises: ValueError for an impossible number, or if the optimizer holds parameters that are not the module's.
        """
        if in_flight < 1:
            raise ValueError(f"in_flight is at least 1, not {in_flight}")
        if max_staleness is not None and max_staleness < 0:
            raise ValueError(f"max_staleness is not negative: {max_staleness}")
        own = {id(parameter) for parameter in module.parameters()}
        if any(id(parameter) not in own for group in optimizer.param_groups for parameter in group["params"]):
            raise ValueError("the optimizer holds parameters that are not the module's")
        self.module = module
        self.optimizer = optimizer
        self.in_flight = in_flight
        self.max_staleness = max_staleness
        self.version = 0
        """Optimizer steps taken."""
        self._slots = asyncio.Semaphore(in_flight if max_staleness is None else min(in_flight, max_staleness + 1))
        self._idle: list[M] = []
        self._begun_at: dict[int, int] = {}
        """Steps under way, in the order in which they began: the version that each has seen."""
        self._num_begun = 0
        self._changed = asyncio.Event()

    async def step(self, loss_of: Callable[[M, B], Awaitable[torch.Tensor]], batch: B) -> StepReport:
        """One step: a copy of the module, ``await loss_of(copy, batch)``, backward, the optimizer.

        Waits while `in_flight` steps are under way. After an error or a cancellation the master is as it was.
        Raises: what `loss_of` and `backward` raise.
        """
        loop = asyncio.get_running_loop()
        async with self._slots:
            started = loop.time()
            replica = self._idle.pop() if self._idle else copy.deepcopy(self.module)
            number = self._num_begun
            self._num_begun += 1
            self._begun_at[number] = self.version
            try:
                self._refresh(replica)
                loss = await loss_of(replica, batch)
                await backward(loss)
                await self._wait_for_turn(number)
                staleness = self.version - self._begun_at[number]
                self._commit(replica)
            finally:
                del self._begun_at[number]
                replica.zero_grad(set_to_none=True)
                self._idle.append(replica)
                self._wake()
            return StepReport(loss.detach(), staleness, self.version, loop.time() - started)

    async def run(
        self,
        loss_of: Callable[[M, B], Awaitable[torch.Tensor]],
        batches: Iterable[B] | AsyncIterable[B],
        *,
        max_failures: int = 0,
    ) -> AsyncGenerator[StepReport, None]:
        """A step for each batch, `in_flight` at once; reports come as steps end. Batches are taken as they are needed.

        `max_failures`: so many steps on end may fail with a TesseractError or TimeoutError, the swarm's faults
        (SchemaMismatch is none); each is reported with its `error`, and its batch is given up. Any other error, and one
        failure more, ends the run: the steps under way are cancelled, and it is raised. So does closing the iterator
        (`contextlib.aclosing`) or cancelling.
        """
        num_failures = 0
        under_way: set[asyncio.Task[StepReport]] = set()
        source = _iterate(batches)
        exhausted = False
        try:
            while under_way or not exhausted:
                while not exhausted and len(under_way) < self.in_flight:
                    try:
                        batch = await anext(source)
                    except StopAsyncIteration:
                        exhausted = True
                        break
                    under_way.add(asyncio.create_task(self._try_step(loss_of, batch)))
                if under_way:
                    done, under_way = await asyncio.wait(under_way, return_when=asyncio.FIRST_COMPLETED)
                    reports = [task.result() for task in done]
                    for report in sorted(reports, key=lambda report: (report.version, report.error is not None)):
                        num_failures = 0 if report.error is None else num_failures + 1
                        if report.error is not None and num_failures > max_failures:
                            raise report.error
                        yield report
        finally:
            for task in under_way:
                task.cancel()
            await asyncio.gather(*under_way, return_exceptions=True)
            await source.aclose()

    async def _try_step(self, loss_of: Callable[[M, B], Awaitable[torch.Tensor]], batch: B) -> StepReport:
        started = asyncio.get_running_loop().time()
        try:
            return await self.step(loss_of, batch)
        except SchemaMismatch:  # the caller's own mistake
            raise
        except (TesseractError, TimeoutError) as error:
            seconds = asyncio.get_running_loop().time() - started
            return StepReport(torch.tensor(torch.nan), 0, self.version, seconds, error)

    # ------------------------------------------------------------------------------------------------ one turn each

    @torch.no_grad()
    def _refresh(self, replica: M) -> None:
        for theirs, ours in zip(_state(replica), _state(self.module), strict=True):
            theirs.copy_(ours)
        replica.train(self.module.training)

    @torch.no_grad()
    def _commit(self, replica: M) -> None:
        """Moves the gradients to the master and takes the step."""
        for theirs, ours in zip(replica.parameters(), self.module.parameters(), strict=True):
            ours.grad, theirs.grad = theirs.grad, None
        with torch.enable_grad():
            self.optimizer.step()
        self.module.zero_grad(set_to_none=True)
        for copied, own in zip(replica.buffers(), self.module.buffers(), strict=True):
            own.copy_(copied)
        self.version += 1

    async def _wait_for_turn(self, number: int) -> None:
        """Until all others under way could still end within `max_staleness` after this step, the oldest first.

        The oldest step under way never waits, and every step ends in the end, by its time-outs if nothing else.
        """
        while self.max_staleness is not None:
            others = sorted(seen for other, seen in self._begun_at.items() if other != number)
            if all(self.version + 1 + i - seen <= self.max_staleness for i, seen in enumerate(others)):
                return
            self._changed.clear()
            await self._changed.wait()

    def _wake(self) -> None:
        self._changed.set()


def _state(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


async def _iterate(batches: Iterable[Any] | AsyncIterable[Any]) -> AsyncGenerator[Any, None]:
    if isinstance(batches, AsyncIterable):
        async for batch in batches:
            yield batch
    else:
        for batch in batches:
            yield batch
