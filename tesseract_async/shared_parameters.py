"""SharedParameters: lets trainers share one model. It drives the machines in `sharing` at one trainer.

What a trainer learns travels as differences to the fragments' hosts, which are trainers themselves. The hosts merge all
trainers' differences; the result comes back, and is added in `step`. No trainer waits for another.
"""

import asyncio
import copy
import logging
import secrets
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Generic, Protocol, Self, TypeVar

import torch
from torch import nn

from tesseract_async.client.ports import PlainCalls
from tesseract_async.errors import (
    TesseractError,
    describe,
)
from tesseract_async.experts.run import SignedRun
from tesseract_async.node import TesseractNode
from tesseract_async.runtime.states import StateDict
from tesseract_async.server.fragments import MAX_STEPS
from tesseract_async.server.other_replicas import ReplicaSettings
from tesseract_async.shared_entry import SharedEntry, genesis
from tesseract_async.shared_part import Arrived, Asked, SharedPart
from tesseract_async.shared_pieces import FoundPieces, SharedPieces
from tesseract_async.sharing.fragment import Copy, Outer, anchor_root
from tesseract_async.sharing.layout import Layout, MergeKind, is_finite
from tesseract_async.sharing.manifest import SharedManifest
from tesseract_async.tasks import TaskSet, end
from tesseract_async.uncopied import Uncopied
from tesseract_async.wire import messages

logger = logging.getLogger(__name__)

M = TypeVar("M", bound=nn.Module)

OUTSIDE: Final = (
    "this is done inside of SharedParameters: enter them by `async with`, or with a BackgroundNode by `with`"
)
FLUSH_TIMEOUT: Final = 60.0
EXIT_TIMEOUT: Final = 20.0
"""The most seconds that leaving waits for the last steps to count: the fragments' hosts may have left before."""
DEFAULT_REPLICAS: Final = ReplicaSettings(sync_every=5.0, check_every=2.0, lease=10.0)


@dataclass(frozen=True, slots=True)
class SharingReport:
    num_pushed: int
    """Fragments whose differences were sent."""
    num_merged: int
    """Fragments to which others' progress was added."""
    num_unsound: int = 0
    """Fragments that hold a NaN or infinity here, and are not sent."""
    error: TesseractError | None = None
    """The reason why a push was refused; its difference stays here, and is in the next one."""
    without_primary: Mapping[str, float] = field(default_factory=dict)
    """By uid, the pieces whose primary does not answer, nor a successor, and for how many seconds. What was learned for
    these pieces stays here, and is pushed as soon as there is a primary."""


class StepListener(Protocol):
    """An object that is told of steps: `SharedSampler`."""

    def stepped(self) -> None: ...
    async def leave(self) -> None: ...


class SharedParameters(Uncopied, Generic[M]):
    """Trains `model` together with all trainers of the run. Use it as an (asynchronous) context manager.

    ::

        async with ta.SharedParameters(node, model, run="shakespeare", every=32) as shared:
            ...
            optimizer.step()
            await shared.step()

    Entering gives the model the swarm's values, or begins the run with the model's own. From then on every `every`
    steps each piece of the parameters is sent as a difference, and what all trainers learned is added, inside `step`
    only. With an `AsyncTrainer`, `model` is its module. In a plain loop, no graph over the parameters may be alive at
    `step`: PyTorch would raise an error about versions at the next backward.

    With a `BackgroundNode` it is entered by a plain ``with``, and calls give results instead of awaitables.
    """

    def __init__(
        self,
        node: TesseractNode | PlainCalls,
        model: M,
        *,
        run: str | SignedRun,
        every: int = 32,
        host: bool | None = None,
        codec: str = "int4_blockwise",
        learning_rate: float = 1.0,
        momentum: float = 0.5,
        checkpoint_dir: str | Path | None = None,
        replicas: ReplicaSettings = DEFAULT_REPLICAS,
    ) -> None:
        """`run`: ``NAME@OWNER``, or a bare name on your own machines, where the first trainer founds the run.

        `every`: optimizer steps between two pushes of a piece. `host`: keep the pieces here, too; by default, a trainer
        does so if the name is bare and fewer than three others do. `codec`, `learning_rate`, `momentum`: of the outer
        optimizer; the founder's choice holds for all. `checkpoint_dir`: where a host keeps them. `replicas`: how hosts
        of a bare name follow one another; a run's manifest says that otherwise.

        Raises: ValueError for a model that cannot be shared (the message says why), or impossible settings.
        """
        if not 1 <= every <= MAX_STEPS:  # a push counts as no more
            raise ValueError(f"every is at least 1 and at most {MAX_STEPS}, not {every}")
        self.model, self.every = model, every
        self._given = node
        outer = Outer(learning_rate=float(learning_rate), momentum=float(momentum), codec=codec)
        self._own = SharedManifest(Layout.of(model), outer)
        self._entry = SharedEntry(run, self._own, host=host, checkpoint_dir=checkpoint_dir, replicas=replicas)
        self.parts: list[SharedPart] = []
        """This trainer's part of each piece, in the order of `uids`; empty outside of the `with`."""
        self._own_steps = 0
        self._asking, self._beside = TaskSet("shared parameters"), TaskSet("shared parameters")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._samplers: list[StepListener] = []

    def __repr__(self) -> str:
        pieces = len(self._own.layout.cuts)
        return f"SharedParameters({self._entry.name!r}, every={self.every}, pieces={pieces}, steps={self.steps})"

    @staticmethod
    def genesis_of(model: nn.Module) -> str:
        """Return the ``genesis`` of a run whose trainers begin with this model's values, and with no others."""
        layout = Layout.of(model)
        return genesis(layout, [anchor_root(layout.read(model, cut)) for cut in layout.cuts])

    @property
    def _node(self) -> TesseractNode:
        node = self._given.node if isinstance(self._given, PlainCalls) else self._given
        assert isinstance(node, TesseractNode)
        return node

    @property
    def pieces(self) -> SharedPieces:
        """The pieces' hosts. Raises: RuntimeError before sharing is entered, and after it has ended."""
        if self._entry.pieces is None:
            raise RuntimeError(OUTSIDE)
        return self._entry.pieces

    async def __aenter__(self) -> Self:
        if isinstance(self._given, PlainCalls):
            raise TypeError("with a BackgroundNode, SharedParameters is entered by a plain `with`")
        found = await self._enter(self._values())
        try:
            self._begin(found)
        except BaseException:
            await self._leave()
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None and not self._is_shared:
                await self._flush(EXIT_TIMEOUT)
        except (TesseractError, TimeoutError) as failed:
            logger.warning("the last steps were not shared: %s", describe(failed))
        finally:
            await self._leave()

    def __enter__(self) -> Self:
        if not isinstance(self._given, PlainCalls):
            raise TypeError("with a TesseractNode, SharedParameters is entered by `async with`")
        found = self._given.run(self._enter(self._values()))
        try:
            self._begin(found)
        except BaseException:
            self._given.run(self._leave())
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert isinstance(self._given, PlainCalls)
        try:
            if kind is None and not self._is_shared:
                self._flush_plainly(EXIT_TIMEOUT)
        except (TesseractError, TimeoutError) as failed:
            logger.warning("the last steps were not shared: %s", describe(failed))
        finally:
            self._given.run(self._leave())

    @property
    def _is_shared(self) -> bool:
        parts = [part for part in self.parts if part.copy.cut.kind is not MergeKind.FIXED]
        return all(part.steps_then == self._own_steps for part in parts)

    def _values(self) -> list[torch.Tensor]:
        layout = self._own.layout
        return [layout.read(self.model, cut) for cut in layout.cuts]

    async def _enter(self, values: list[torch.Tensor]) -> FoundPieces:
        if self.parts:
            raise RuntimeError("SharedParameters are entered once: make new ones of the same model to go on")
        self._loop = asyncio.get_running_loop()
        return await self._entry.enter(self._node, values)

    def _begin(self, found: FoundPieces, *, writes: bool = True) -> None:
        """Take the swarm's values and, unless told otherwise, write them into the model. On the caller's thread."""
        layout = found.manifest.layout
        num = len(layout.cuts)
        for number, (cut, (fragment, steps)) in enumerate(zip(layout.cuts, found.fragments, strict=True)):
            lost = layout.write(self.model, cut, fragment.anchor) if writes else None
            copied = Copy(fragment, epoch=found.epoch)
            # pieces take turns, so that a line is used evenly
            due_at = max(1, self.every * (number + 1) // num)
            uid, form = self.pieces.uid(number), found.manifest.part(number)
            self.parts.append(SharedPart(uid, form, copied, due_at, steps=steps, lost=lost))

    async def _leave(self) -> None:
        try:
            await end(*self._asking, *self._beside)
            for sampler in self._samplers:
                await sampler.leave()
        finally:  # cancelled, too: a host must not go on alone
            await self._entry.leave()

    def attach(self, sampler: StepListener) -> None:
        """Tell this sampler of each step, and when sharing ends."""
        self._samplers.append(sampler)

    def spawn(self, work: Coroutine[object, object, None]) -> asyncio.AbstractEventLoop:
        """Run this on the node's loop until sharing ends, and return the loop. May be called from any thread.

        Raises: RuntimeError before sharing is entered.
        """
        loop = self._loop
        if loop is None:
            work.close()
            raise RuntimeError(OUTSIDE)

        loop.call_soon_threadsafe(self._beside.spawn, work)
        return loop

    # ------------------------------------------------------------------------------------------------ a trainer's calls

    @property
    def steps(self) -> int:
        """Optimizer steps of all trainers, as far as they are known here: learning-rate schedules follow it."""
        parts = (part for part in self.parts if part.copy.cut.kind is not MergeKind.FIXED)
        return min((part.steps + self._own_steps - part.steps_then for part in parts), default=0)

    def step(self) -> Any:
        """Call it after each optimizer step (not after each micro-batch): sends what is due, and adds what came.

        Never waits for a peer. Returns what was done, a `SharingReport`, or None for nothing. Raises: RuntimeError
        before sharing is entered, and after it has ended.
        """
        if self._entry.pieces is None:
            raise RuntimeError(OUTSIDE)
        self._own_steps += 1
        for sampler in self._samplers:
            sampler.stepped()
        report = self._turn(lambda part: self._own_steps >= part.due_at)
        return report if isinstance(self._given, PlainCalls) else _at_once(report)

    def flush(self, *, timeout: float = FLUSH_TIMEOUT) -> Any:
        """Send all that was learned here, wait until it counts, and take all that others learned.

        Raises: TimeoutError, or the reason for which a push was refused; RuntimeError as `step`.
        """
        if self._entry.pieces is None:
            raise RuntimeError(OUTSIDE)
        if isinstance(self._given, PlainCalls):
            return self._flush_plainly(timeout)
        return self._flush(timeout)

    def merged(self) -> M:
        """Return a copy of the model with the swarm's values as they are known here: to evaluate, and to export.

        They are the average of what all trainers had. The next round's differences are not taken from them, but from
        values a little ahead, where the outer optimizer's momentum leads. Raises: RuntimeError before sharing is
        entered.
        """
        if not self.parts:
            raise RuntimeError(OUTSIDE)
        model = copy.deepcopy(self.model)
        for part in self.parts:
            self._own.layout.write(model, part.copy.cut, part.copy.merged())
        return model

    def state_dict(self) -> StateDict:
        """Return where this trainer stands: its steps, and when each piece is due. The values are the model's, and the
        pieces' are their hosts' (`save_model`)."""
        return {"steps": self._own_steps, "parts": [[one.due_at, one.steps_then] for one in self.parts]}

    async def rejoin(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned, with the pieces as their hosts have them now; the model stays as it
        is. Raises: ValueError for another model's state; as entering does."""
        if len(state["parts"]) != len(self.parts):
            raise ValueError("a state of parameters that are cut otherwise")
        await end(*self._asking)
        self.parts = []
        self._begin(await self.pieces.fetch_all(self._own.layout), writes=False)
        self._own_steps = state["steps"]
        for part, (due_at, steps_then) in zip(self.parts, state["parts"], strict=True):
            part.due_at, part.steps_then = due_at, steps_then

    @property
    def is_plain(self) -> bool:
        """True with a `BackgroundNode`: calls are plain."""
        return isinstance(self._given, PlainCalls)

    @property
    def uids(self) -> list[str]:
        """The pieces that the parameters are cut into."""
        return [part.uid for part in self.parts]

    def _turn(self, is_due: Callable[[SharedPart], bool]) -> SharingReport | None:
        """Add what came, and send what is due. On the caller's thread, in one go."""
        pushed = merged = unsound = 0
        error: TesseractError | None = None
        for part in self.parts:
            if (arrived := part.arrived) is not None:
                part.arrived = None
                error = error or arrived.error
                merged += self._add(part, arrived)
        for part in self.parts:
            if part.asked is not None or part.copy.cut.kind is MergeKind.FIXED or not is_due(part):
                continue
            part.due_at = self._own_steps + self.every
            values = self._own.layout.read(self.model, part.copy.cut)
            if part.lost is not None:
                values += part.lost
            if values.is_floating_point() and not is_finite(values):
                unsound += 1
                continue
            _, version, root = part.copy.base
            part.steps_sent = self._own_steps
            steps = max(1, self._own_steps - part.steps_then)
            request = messages.PushRequest(part.uid, secrets.token_bytes(16), version, root, steps)
            self._start(part, messages.PUSH, request, values)
            pushed += 1
        silent = {one.uid: time.monotonic() - one.failing_since for one in self.parts if one.failing_since is not None}
        if not (pushed or merged or unsound or error or silent):
            return None
        return SharingReport(pushed, merged, unsound, error, silent)

    def _add(self, part: SharedPart, arrived: Arrived) -> int:
        """Add an answer to the model. Returns how many fragments that changed."""
        part.asked = None
        change = arrived.change
        if change is None:
            return 0
        if arrived.counted:
            part.steps_then = part.steps_sent
            waited = self._own_steps - part.steps_sent
            if waited < self.every:  # the others push later: a little later next time, the answer is that much fresher
                part.due_at += min(waited // 2, MAX_STEPS - self.every)  # what one push may count as
        elif part.steps_sent > part.steps_then:  # its base was too old: again, from the new one, before that is, too
            part.due_at = self._own_steps
        part.steps = arrived.steps
        part.lost = self._own.layout.add(self.model, part.copy.cut, change if part.lost is None else change + part.lost)
        return 1

    async def _flush(self, timeout: float) -> None:
        async with asyncio.timeout(timeout):
            for turn in self._flushing():
                turn()
                await self.wait_answers()

    def _flush_plainly(self, timeout: float) -> None:
        assert isinstance(self._given, PlainCalls)
        ends = time.monotonic() + timeout
        for turn in self._flushing():
            turn()
            self._given.run(asyncio.wait_for(self.wait_answers(), max(0.0, ends - time.monotonic())))

    def _flushing(self) -> list[Callable[[], None]]:
        """The turns of a flush: what is under way ends, all is pushed (again where its base was too old), the newest is
        pulled, and added."""
        push = partial(self._checked_turn, lambda part: self._own_steps > part.steps_then)
        return [
            lambda: None,
            push,
            push,
            self._pull_all,
            partial(self._checked_turn, lambda part: False),
        ]

    def _checked_turn(self, is_due: Callable[[SharedPart], bool]) -> None:
        report = self._turn(is_due)
        if report is not None and report.error is not None:
            raise report.error
        if report is not None and report.num_unsound:
            logger.warning("%d pieces hold a NaN or infinity here, and are not shared", report.num_unsound)

    def _pull_all(self) -> None:
        self._checked_turn(lambda part: False)
        for part in self.parts:
            if part.asked is None and part.copy.cut.kind is not MergeKind.FIXED:
                _, version, root = part.copy.base
                self._start(part, messages.PULL, messages.PullRequest(part.uid, version, root))

    async def wait_answers(self) -> None:
        """Return when nothing that was sent is under way; the next `step` adds what came. On the node's loop."""
        await self._asking.wait_done()

    def _start(
        self,
        part: SharedPart,
        method: str,
        request: messages.PushRequest | messages.PullRequest,
        values: torch.Tensor | None = None,
    ) -> None:
        call_id = request.call_id if isinstance(request, messages.PushRequest) else b""
        part.asked = Asked(part.copy.anchor, values, call_id, part.steps_sent)
        self._spawn(part.ask(self.pieces, method, request, values))

    def _spawn(self, work: Coroutine[object, object, None]) -> None:
        """Run this next to the trainer, on the node's loop."""

        async def start() -> None:
            self._asking.spawn(work)

        if isinstance(self._given, PlainCalls):
            self._given.begin(start())
        else:
            self._asking.spawn(work)


async def _at_once(report: SharingReport | None) -> SharingReport | None:
    return report
