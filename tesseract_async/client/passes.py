"""One pass of many experts' calls: the asyncio driver of `grouping`. Replies are untrusted.

A `Pass` is one direction. It sends what the machine says, one `expert.apply` to each server, and tells it what the
replies say. What travels, and what becomes of the sums, is the business of its subclasses in `mixture`.
"""

import asyncio
import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Hashable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from tesseract_async.client.blocks import OptionalTensors, RowBlock
from tesseract_async.client.dispatch import CallsUnderWay, ExpertCall
from tesseract_async.client.experience import Experience, replica_key
from tesseract_async.client.expert_rpc import CallMode, ExpertSchema, unpack_fitting
from tesseract_async.client.failover import HEDGE_SECONDS, report, watched
from tesseract_async.client.grouping import Grouping, Request
from tesseract_async.client.latency import ABANDON_SECONDS
from tesseract_async.client.settings import MixtureSettings
from tesseract_async.endpoint.call_table import Message
from tesseract_async.errors import ExpertFailed, TesseractError, TooStale
from tesseract_async.experts.grid import ExpertReplica
from tesseract_async.experts.manifest import split_uid
from tesseract_async.runtime.encoding import pack
from tesseract_async.runtime.gradients import are_finite, per_row
from tesseract_async.tasks import end
from tesseract_async.wire.apply import ApplyPart, ApplyRequest, Integers, decode_part, encode_request, numbered
from tesseract_async.wire.tensors import TensorSpec


class PartSums(NamedTuple):
    """A part's sums, and what they are about."""

    pairs: Integers
    """Pairs of the block."""
    numbers: Integers
    """Rows of the block: those of the sums."""
    at_P: Integers
    """The row of the sums for each pair."""
    sums: OptionalTensors


class Pass(ABC):
    """One direction of a call to many experts. `run` it once."""

    reply_specs: Sequence[TensorSpec | None]
    """The sums that come back; None: a tensor without."""
    what: str
    """A word for what experts answer."""

    def __init__(
        self,
        experience: Experience,
        calls: CallsUnderWay,
        *,
        schema: ExpertSchema,
        mode: CallMode,
        settings: MixtureSettings,
    ) -> None:
        self.experience, self.calls, self.schema, self.mode, self.settings = experience, calls, schema, mode, settings
        self.codecs = schema.settle(settings.calls.codecs)  # raises before anybody is asked
        self._is_backward = calls.direction == "backward"
        self.timeout = settings.backward_timeout if self._is_backward else settings.forward_timeout
        self._deadline = 0.0
        self._grouping = Grouping(
            calls, rank=self.rank, key=self.key, hedge_after=self._hedge_after, is_strict=calls.is_strict
        )
        self._tasks: set[asyncio.Task[None]] = set()
        self._news = asyncio.Event()
        self._failure: BaseException | None = None

    @abstractmethod
    def rank(self, call: ExpertCall, found: Sequence[ExpertReplica] | None, now: float) -> Sequence[ExpertReplica]:
        """See `Grouping`. Of a call that is new (`found` is None), sets `expected` and `grace`."""

    @abstractmethod
    def key(self, call: ExpertCall, replica: ExpertReplica) -> Hashable:
        """Return a key: calls with equal keys may travel in one message. See `Grouping`."""

    @abstractmethod
    async def pack(self, request: Request) -> tuple[RowBlock, OptionalTensors, OptionalTensors]:
        """Return the message for the calls that are open in `request`: its block, inputs, and in a backward gradients.
        Without inputs, those of the block that its server keeps."""

    @abstractmethod
    def add(self, request: Request, block: RowBlock, part: ApplyPart, own: PartSums) -> None:
        """Take in the answers of a part."""

    def failed(self, call: ExpertCall, replica: ExpertReplica, error: BaseException) -> None:
        report(self.experience, replica, error)

    def cancelled(self, request: Request, now: float) -> None:  # noqa: B027 (most have nothing to learn)
        """Learn from a message that was given up before it was answered in full."""

    async def run(self, find_more: Callable[[torch.Tensor], Coroutine[object, object, None]] | None = None) -> None:
        """Run the pass to its end and learn from it. `find_more`: see `CallsUnderWay.rows_in_need`.

        Cancelling cancels its calls. Raises: the error that it ends in; errors that are not a peer's.
        """
        loop = asyncio.get_running_loop()
        calls, grouping, stalls = self.calls, self._grouping, self.experience.stalls
        carrying: dict[Request, asyncio.Task[None]] = {}
        searching: asyncio.Task[None] | None = None
        with stalls.watching():
            started, stalled = loop.time(), stalls.seconds
            self._deadline = started + self.timeout
            calls.start(started)
            try:
                while True:
                    step = grouping.step(loop.time(), stalled=stalls.seconds - stalled)
                    for replica, mismatch in step.strange:
                        self.experience.ignore(replica, mismatch)
                    if calls.is_over:
                        break
                    for request in step.send:
                        carrying[request] = self._start(self._carry(request))
                    for request in step.cancel:
                        carrying[request].cancel()
                    if step.look_up:
                        self._start(self._look_up(step.look_up))
                    rows = calls.rows_in_need
                    if rows is not None and find_more is not None and (searching is None or searching.done()):
                        searching = self._start(find_more(rows))
                    await self._wait(grouping.timer_at())
                self.experience.learn(calls, loop.time() - started)
            finally:
                await end(*self._tasks)
                del self._grouping  # what it was given are methods of this object: a cycle full of tensors
        self._raise(calls.shortage())

    def _start(self, coroutine: Coroutine[object, object, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._failure = error
        self._news.set()

    async def _wait(self, until: float) -> None:
        timer = asyncio.get_running_loop().call_at(until, self._news.set)
        try:
            await self._news.wait()
        finally:
            timer.cancel()
        self._news.clear()
        self._raise(self._failure)

    @staticmethod
    def _raise(error: BaseException | None) -> None:
        try:
            if error is not None:
                raise error
        finally:
            del error  # else its frames hold the error that holds them: a cycle full of tensors

    async def _carry(self, request: Request) -> None:
        loop, experience = asyncio.get_running_loop(), self.experience
        timeout = max(self._deadline - loop.time(), 1e-3)
        error: BaseException | None = None
        try:
            async with asyncio.timeout(timeout + ABANDON_SECONDS):  # a call to this node itself keeps no time
                rivals = self._grouping.rivals(request)
                # a pass may be over before the stream of its last answer is
                await watched(experience, self._exchange(request, timeout), rivals, request.open.values())
        except (TesseractError, TimeoutError) as caught:
            error = without_frames(caught)
            for call, replica in request.open.items():
                self.failed(call, replica, error)
        except asyncio.CancelledError:
            self.cancelled(request, loop.time())
            raise
        self._grouping.ended(request, error, loop.time())

    async def _exchange(self, request: Request, timeout: float) -> None:
        if not request.open:  # others answered between the decision to ask and this task's first turn
            return
        block, inputs, gradients = await self.pack(request)
        codecs, is_backward = self.codecs, self._is_backward
        each = [codecs.inputs] * len(inputs) + [codecs.gradients] * len(gradients)
        metas, tensors = await pack([*inputs, *gradients], each)
        if not request.open:
            return
        asked = ApplyRequest(
            prefix=self.calls.candidates.prefix,
            experts=block.coords.astype(np.uint32),
            ids=[call.id for call in block.calls],
            versions=np.array(block.versions, dtype=np.int64),
            offsets=block.offsets,
            rows=block.numbers_P.astype(np.int32),
            weights=block.weights_P,
            tensors=metas,
            num_inputs=len(inputs),
            backward=is_backward,
            training=self.mode.training,
            keep=self.mode.differentiable and not is_backward,
            seed=self.mode.seed,
            reply_codec=codecs.gradients if is_backward else codecs.outputs,
            kept=block.kept if is_backward else None,
        )
        body, numbers = encode_request(asked)
        parts = self.experience.node.apply_experts(
            request.peer,
            [call.uid for call in block.calls],
            body,
            (*numbers, *tensors),
            timeout=timeout,
            priority=self.settings.calls.priority,
        )
        async with contextlib.aclosing(parts):
            async for message in parts:
                await self._take(request, block, asked, message)
                self._news.set()

    async def _take(self, request: Request, block: RowBlock, asked: ApplyRequest, message: Message) -> None:
        """Take in a part. Raises: ProtocolError if it does not fit."""
        experience = self.experience
        part, buffers = decode_part(message.body, message.buffers, asked)
        pairs = asked.pairs(part.experts)
        numbers, at_P = numbered(asked.rows[pairs])
        sums: OptionalTensors = []
        if len(part.experts):
            sums = await unpack_fitting("a server", part.tensors, buffers, self.reply_specs, len(numbers))
        if (scales := asked.scales_of(part.experts)) is not None:
            sums = [None if x is None else x * per_row(torch.from_numpy(scales), x) for x in sums]
        if self.calls.is_over:
            return
        calls = [block.calls[place] for place in part.experts.tolist()]
        errors: dict[ExpertCall, BaseException] = {block.calls[place]: failure for place, failure in part.failures}
        if not (are_finite(sums) and np.isfinite(part.weight_gradients).all()):
            errors |= {call: ExpertFailed(f"{call.uid} answered {self.what} that are not finite") for call in calls}
        least = None if asked.backward else asked.versions[part.experts].tolist()
        for at, (version, epoch) in enumerate(zip(part.versions.tolist(), part.epochs.tolist(), strict=True)):
            try:
                experience.lineages.take(request.asked[calls[at]], epoch, version)
                if least is not None and version < least[at]:
                    raise TooStale(f"{calls[at].uid} answered at version {version}; {least[at]} is asked for")
            except TooStale as stale:
                errors[calls[at]] = stale
        for call, error in errors.items():
            self.failed(call, request.asked[call], error)
        if part.kept is not None:
            block.kept = part.kept
        if not self._grouping.part(request, calls, errors, asyncio.get_running_loop().time()) or not calls:
            return
        given = (0, len(calls)) if asked.backward else (len(numbers), 0)
        experience.node.thanks.add(split_uid(calls[0].uid)[0], request.peer.peer_id, *given)
        if experience.node.directory.has_doubts:
            for call in calls:
                experience.node.directory.report_answer(request.asked[call])
        self.add(request, block, part, PartSums(pairs, numbers, at_P, sums))

    async def _look_up(self, calls: Sequence[ExpertCall]) -> None:
        async def find(call: ExpertCall) -> Sequence[ExpertReplica]:
            with contextlib.suppress(TesseractError, TimeoutError):
                async with asyncio.timeout_at(min(self._deadline, self._grouping.gone_at(call))):
                    # one that stood still for a moment is there again long before it says so in the network
                    return await self.experience.node.directory.find(call.uid, even_failed=self.calls.is_strict)
            return ()

        found = await asyncio.gather(*map(find, calls))
        now = asyncio.get_running_loop().time()
        for call, replicas in zip(calls, found, strict=True):
            self._grouping.found(call, replicas, now)

    def _hedge_after(self, replica: ExpertReplica) -> float:
        p95 = self.experience.latencies.p95(replica_key(replica))
        return HEDGE_SECONDS if p95 is None else p95


def without_frames(error: BaseException) -> BaseException:
    """The error without its traceback, whose frames hold the call that keeps the error: a cycle full of tensors."""
    link: BaseException | None = error
    while link is not None:
        link.__traceback__ = None
        link = link.__cause__ or link.__context__
    return error
