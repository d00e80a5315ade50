"""`AsyncTrainer`: many training steps in flight over one set of local parameters."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from tesseract_async.client.autograd import backward
from tesseract_async.client.batches import END, BatchSource, Sampler, TracksBatches, num_samples
from tesseract_async.client.leaves import wait_for_accumulation
from tesseract_async.client.model_copy import ModelCopy
from tesseract_async.client.progress import ProgressOf
from tesseract_async.client.scaling import Scaled
from tesseract_async.errors import SchemaMismatch, TesseractError

M = TypeVar("M", bound=nn.Module)
B = TypeVar("B")

Loss = torch.Tensor | tuple[torch.Tensor, Mapping[str, float | torch.Tensor]]
"""A loss of one element, alone or with named figures for the report."""
LossOf = Callable[[M, B], Awaitable[Loss]]

_SHARED_GRADIENTS = {"DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule"}


@dataclass(frozen=True, slots=True, eq=False)
class StepReport:
    """The result of one step."""

    loss: torch.Tensor
    """Detached; not a number if the step failed."""
    staleness: int
    """Steps that others took between this one's copy of the parameters and its own optimizer step."""
    version: int
    """Steps taken by the trainer, this one included."""
    seconds: float
    """Seconds from the copy of the parameters to the optimizer's step, including the wait for the staleness bound."""
    error: BaseException | None = None
    """The reason why the step failed: nothing changed here, and its batch taught nothing."""
    batch: int | None = None
    """The number of its batch in `AsyncTrainer.run`, counted from 0; None outside of one."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """The figures that came with the loss."""


class AsyncTrainer(Generic[M]):
    """Trains `module` with up to `in_flight` steps under way at once, so that remote experts' delays overlap.

    Each step runs on a separate copy of the module, refreshed from the master when it starts. When its backward is done
    its gradients move to the master and the optimizer steps, in one turn of the loop. Gradients are thus up to
    ``in_flight - 1`` steps stale, and more where steps differ in length. `max_staleness` bounds that: at most
    ``max_staleness + 1`` steps are under way, and those that get far ahead wait for those that began early. Stale
    gradients need smaller steps: with a small model, dividing the learning rate by the square root of `in_flight` is a
    good start.

    ::

        trainer = AsyncTrainer(model, torch.optim.Adam(model.parameters()), in_flight=64)

        async def loss_of(model, batch):
            x, y = batch
            return F.cross_entropy(await model(x), y)

        async for report in trainer.run(loss_of, batches):
            print(report.loss.item(), report.staleness)

    A step that fails because of the swarm, such as for want of a live expert, ends the run; with
    ``trainer.run(..., max_failures=10)`` it is reported with its `error`, and only the eleventh in a row is raised.

    `loss_of` may return figures with the loss, ``return loss, {"accuracy": accuracy}``; they come in the report.
    Observers are told how many samples the trainer has seen or, where a figure of this name counts them, ``tokens``.

    The master, `module`, is never used for computing and always holds the latest parameters. Each step sees which of
    them want gradients and which submodules train, as set in the master when it starts; parameters and submodules must
    not be added, exchanged or taken away once there are steps. Buffers (such as batch statistics) of a copy overwrite
    the master's when its step ends. Use on one loop only.
    """

    def __init__(
        self,
        module: M,
        optimizer: torch.optim.Optimizer,
        *,
        in_flight: int = 1,
        max_staleness: int | None = None,
        max_norm: float | None = None,
        scheduler: LRScheduler | ReduceLROnPlateau | None = None,
        scaler: torch.amp.GradScaler | None = None,
        sampler: Sampler | None = None,
        callbacks: Sequence[Callable[[StepReport], object]] = (),
        publish: bool = True,
    ) -> None:
        """`optimizer` holds parameters of `module`; parameters that it does not hold stay as they are.

        - `max_norm`: gradients of a step are scaled down to this norm (over all parameters).
        - `scheduler`: of the optimizer's learning rate; stepped once per optimizer step, ReduceLROnPlateau with the
          step's loss.
        - `scaler`: scales the losses, which come unscaled, and decides over each step of the optimizer.
        - `sampler`: where `run`'s batches come from; its position is part of `state_dict`. A `SharedSampler` learns of
          each batch how it ended.
        - `callbacks`: called with each step's report, failed ones of a run included, in the order in which steps end.
          What one raises is raised by the step, which stands.
        - `publish`: `run` shows observers, such as the dashboard, the loss of each grid that the module uses.

        Raises: ValueError for an impossible number, if the optimizer holds parameters that are not the module's, or for
        a module whose copies can't stand for it: other processes share its gradients (DistributedDataParallel, FSDP),
        or hooks wait for them on ``AccumulateGrad``. Parameters' own hooks fire when a step's gradients arrive.
        """
        if in_flight < 1:
            raise ValueError(f"in_flight is at least 1, not {in_flight}")
        if max_staleness is not None and max_staleness < 0:
            raise ValueError(f"max_staleness is not negative: {max_staleness}")
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"max_norm is a positive number, not {max_norm}")
        if scheduler is not None and scheduler.optimizer is not optimizer:
            raise ValueError("the scheduler is another optimizer's")
        for name, part in module.named_modules():
            if shared := _SHARED_GRADIENTS.intersection(cls.__name__ for cls in type(part).__mro__):
                raise ValueError(f"AsyncTrainer trains copies, and a {shared.pop()} has none: unwrap {name or 'it'}")
        self._parameters = list(module.parameters())
        own = {id(parameter) for parameter in self._parameters}
        if any(id(parameter) not in own for group in optimizer.param_groups for parameter in group["params"]):
            raise ValueError("the optimizer holds parameters that are not the module's")
        if any(wait_for_accumulation(parameter) for parameter in self._parameters):
            raise ValueError(
                "AsyncTrainer trains copies, and hooks on a parameter's AccumulateGrad would never fire: "
                "use `parameter.register_post_accumulate_grad_hook`"
            )
        self.module = module
        self.optimizer = optimizer
        self.in_flight = in_flight
        self.max_staleness = max_staleness
        self.max_norm = max_norm
        self.scheduler = scheduler
        self.scaler = scaler
        self.sampler = sampler
        self.callbacks = tuple(callbacks)
        self.publish = publish
        self.version = 0
        """Optimizer steps taken."""
        self.seen = {"samples": 0, "tokens": 0}
        """Samples and tokens of the steps; tokens only where `loss_of` counts them."""
        self._slots = asyncio.Semaphore(in_flight if max_staleness is None else min(in_flight, max_staleness + 1))
        self._idle: list[ModelCopy[M]] = []
        self._begun_at: dict[int, int] = {}
        """Steps under way, in the order in which they began: the version that each has seen."""
        self._num_begun = 0
        self._num_pauses = 0
        self._changed = asyncio.Event()

    def state_dict(self) -> dict[str, Any]:
        """Return where the training stands: steps, optimizer, scheduler, scaler and sampler, as they have them.

        The parameters are the module's: save its own ``state_dict``, too. Steps under way are not in it, nor are
        batches that were taken for them; a sampler that must not lose these is saved when no step is under way.
        """
        parts = {name: None if part is None else part.state_dict() for name, part in self._parts().items()}
        return {"version": self.version, "seen": dict(self.seen), **parts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned.

        Raises: RuntimeError while steps are under way; ValueError, before anything changes, if the state is of a
        trainer with a scheduler, scaler or sampler and this one has none, or the other way round; what they raise.
        """
        if self._begun_at:
            raise RuntimeError("steps are under way: load a state before training or between two runs")
        parts = self._parts()
        for name, part in parts.items():
            if (part is None) != (state.get(name) is None):
                has, lacks = ("this trainer", "the state") if part is not None else ("the state", "this trainer")
                raise ValueError(f"{has} has a {name}, but {lacks} has none")
        for name, part in parts.items():
            if part is not None:
                part.load_state_dict(state[name])
        self.version = int(state["version"])
        self.seen |= state.get("seen", {})

    def _parts(self) -> dict[str, Any]:
        return {
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "scaler": self.scaler,
            "sampler": self.sampler,
        }

    @contextlib.asynccontextmanager
    async def paused(self) -> AsyncGenerator[None, None]:
        """Enter when the steps under way have ended; no other begins until it is left. For a save point; several may
        pause it at a time."""
        self._num_pauses += 1
        try:
            while self._begun_at:
                self._changed.clear()
                await self._changed.wait()
            yield
        finally:
            self._num_pauses -= 1
            self._changed.set()

    async def step(self, loss_of: LossOf[M, B], batch: B) -> StepReport:
        """Take one step: a copy of the module, ``await loss_of(copy, batch)``, backward, the optimizer.

        Waits while `in_flight` steps are under way. After an error or a cancellation the master is as it was.
        Raises: what `loss_of` and `backward` raise.
        """
        report = await self._step(loss_of, batch)
        self._tell(report)
        return report

    async def _step(self, loss_of: LossOf[M, B], batch: B) -> StepReport:
        loop = asyncio.get_running_loop()
        async with self._slots:
            while self._num_pauses:
                self._changed.clear()
                await self._changed.wait()
            started = loop.time()
            replica = self._idle.pop() if self._idle else ModelCopy(self.module)
            number = self._num_begun
            self._num_begun += 1
            self._begun_at[number] = self.version
            try:
                replica.refresh()
                found = await loss_of(replica.module, batch)
                loss, metrics = found if isinstance(found, tuple) and len(found) == 2 else (found, {})
                if not isinstance(loss, torch.Tensor) or not isinstance(metrics, Mapping):
                    raise TypeError(f"loss_of returns a loss, or a loss and a dict of figures, not {_kind_of(found)}")
                scale = await self._backward(loss)
                await self._wait_for_turn(number)
                # what is no figure is an error before the step
                figures = {name: float(figure) for name, figure in metrics.items()}
                num_tokens = int(figures.get("tokens", 0))
                staleness = self.version - self._begun_at[number]
                self._commit(replica, scale, loss)
            finally:
                del self._begun_at[number]
                for mine in replica.parameters:
                    mine.grad = None
                self._idle.append(replica)
                self._changed.set()
            self.seen["samples"] += num_samples(batch)
            self.seen["tokens"] += num_tokens
            return StepReport(loss.detach(), staleness, self.version, loop.time() - started, metrics=figures)

    async def run(
        self,
        loss_of: LossOf[M, B],
        batches: Iterable[B] | AsyncIterable[B],
        *,
        max_failures: int = 0,
    ) -> AsyncGenerator[StepReport, None]:
        """A step for each batch, `in_flight` at once; reports come as steps end. Batches are taken as they are needed.

        `max_failures`: this many steps in a row may fail with a TesseractError or TimeoutError, the swarm's faults
        (SchemaMismatch is not one of them); each is reported with its `error`, and its batch is given up. Any other
        error, and one failure more, ends the run: the steps under way are cancelled, and it is raised with a note that
        names the batch. So does closing the iterator (`contextlib.aclosing`) or cancelling.
        """
        num_failures = 0
        num_taken = 0
        under_way: dict[asyncio.Future[Any], int] = {}
        ended: asyncio.Queue[asyncio.Future[Any]] = asyncio.Queue()  # `asyncio.wait` looks at all each time
        tracks = self.sampler if isinstance(self.sampler, TracksBatches) else None
        first_batch = 0 if tracks is None else tracks.begin_run()
        if tracks is not None and not isinstance(batches, AsyncIterable):
            batches = tracks.feed(batches)
        source = BatchSource(batches)
        exhausted = False
        taking: asyncio.Future[Any] | None = None
        progress = ProgressOf(self.module if self.publish else None)
        try:
            while True:
                while len(under_way) < self.in_flight and not exhausted:
                    if taking is None:
                        taking = source.take()
                        if not taking.done():
                            taking.add_done_callback(ended.put_nowait)
                    if not taking.done():
                        break
                    batch, taking = taking.result(), None
                    if batch is END:
                        exhausted = True
                    else:
                        task = asyncio.create_task(self._try_step(loss_of, batch))
                        under_way[task] = num_taken
                        num_taken += 1
                        task.add_done_callback(ended.put_nowait)
                if taking is None and not under_way:
                    break
                # steps end, and are told of, while a batch is waited for
                done = [await ended.get()]
                while not ended.empty():
                    done.append(ended.get_nowait())
                done = [one for one in done if one in under_way]
                if done:
                    outcomes = await asyncio.gather(*done, return_exceptions=True)  # every error is asked for
                    reports: list[StepReport] = []
                    broken: dict[int, BaseException] = {}
                    for one, outcome in zip(done, outcomes, strict=True):
                        batch_number = under_way.pop(one)
                        if isinstance(outcome, BaseException):
                            broken[batch_number] = outcome
                        else:
                            reports.append(replace(outcome, batch=batch_number))
                    if broken:
                        first = min(broken)
                        raise _noted(broken.pop(first), first, broken)
                    for report in sorted(reports, key=lambda report: (report.version, report.error is not None)):
                        if tracks is not None and report.batch is not None:
                            tracks.batch_ended(first_batch + report.batch, failed=report.error is not None)
                        num_failures = 0 if report.error is None else num_failures + 1
                        self._tell(report)
                        if report.error is None:
                            progress.add(report.version, float(report.loss), self.seen)
                        if report.error is not None and num_failures > max_failures:
                            raise _noted(report.error, report.batch, {})
                        yield report
        finally:
            for step in under_way:
                step.cancel()
            await asyncio.gather(*under_way, return_exceptions=True)
            await source.aclose()
            if tracks is not None:
                tracks.end_run()
            await progress.aclose()

    def _tell(self, report: StepReport) -> None:
        for callback in self.callbacks:
            callback(report)

    async def _try_step(self, loss_of: LossOf[M, B], batch: B) -> StepReport:
        started = asyncio.get_running_loop().time()
        try:
            return await self._step(loss_of, batch)
        except SchemaMismatch:  # the caller's own mistake
            raise
        except (TesseractError, TimeoutError) as error:
            seconds = asyncio.get_running_loop().time() - started
            return StepReport(torch.tensor(torch.nan), 0, self.version, seconds, error)

    async def _backward(self, loss: torch.Tensor) -> float:
        if self.scaler is None or not self.scaler.is_enabled():
            await backward(loss)
            return 1.0
        # Not the scaler's own tensor: other steps change it in place meanwhile.
        scale = self.scaler.scale(torch.ones((), device=loss.device)).clone()
        await backward(loss * scale, scaler=Scaled(float(scale)))
        return float(scale)

    def _commit(self, replica: "ModelCopy[M]", scale: float, loss: torch.Tensor) -> None:
        """Moves the gradients to the master and takes the step."""
        scaler = self.scaler if self.scaler is not None and self.scaler.is_enabled() else None
        try:
            replica.give_gradients()
            with torch.enable_grad():
                if scaler is not None and (since := scaler.get_scale() / scale) != 1.0:
                    torch._foreach_mul_([p.grad for p in self._parameters if p.grad is not None], since)
                if self.max_norm is not None:
                    if scaler is not None:
                        scaler.unscale_(self.optimizer)
                    nn.utils.clip_grad_norm_(self._parameters, self.max_norm)
                if scaler is None:
                    self.optimizer.step()
                else:
                    scaler.step(self.optimizer)
                    scaler.update()
            if isinstance(self.scheduler, ReduceLROnPlateau):
                self.scheduler.step(float(loss.detach()))
            elif self.scheduler is not None:
                self.scheduler.step()
        finally:  # a hook may have raised
            for parameter in self._parameters:
                parameter.grad = None
        replica.give_buffers()
        self.version += 1

    async def _wait_for_turn(self, number: int) -> None:
        """Wait until all others under way could still end within `max_staleness` after this step, the oldest first."""
        while self.max_staleness is not None:
            others = sorted(seen for other, seen in self._begun_at.items() if other != number)
            if all(self.version + 1 + i - seen <= self.max_staleness for i, seen in enumerate(others)):
                return
            self._changed.clear()
            await self._changed.wait()


def _noted(error: BaseException, batch: int | None, others: Mapping[int, BaseException]) -> BaseException:
    also = "".join(f"; batch {number}: {type(other).__name__}" for number, other in sorted(others.items()))
    error.add_note(f"in AsyncTrainer.run, batch {batch} (counted from 0){also}")
    return error


def _kind_of(found: object) -> str:
    kinds = [type(one).__name__ for one in found] if isinstance(found, tuple) else []
    return f"({', '.join(kinds)})" if kinds else type(found).__name__
