"""One pass of many experts' calls: the asyncio driver of `grouping`. Replies are untrusted.

A `Pass` is one direction. It sends what the machine says, one `expert.apply` to each server, and tells it what the
replies say. What travels, and what becomes of the sums, is the business of its subclasses in `mixture`.
"""

import asyncio
import contextlib
from collections.abc import Callable, Collection, Coroutine, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from tesseract_async.client.dispatch import CallsUnderWay, ExpertCall
from tesseract_async.client.experience import Experience, replica_key
from tesseract_async.client.expert_rpc import CallMode, ExpertSchema, unpack_fitting
from tesseract_async.client.failover import HEDGE_SECONDS, report, watched
from tesseract_async.client.grouping import Grouping, Request
from tesseract_async.client.latency import ABANDON_SECONDS
from tesseract_async.client.routing import Candidates, Indices
from tesseract_async.client.settings import CallOptions
from tesseract_async.endpoint.call_table import Message
from tesseract_async.errors import ExpertFailed, TesseractError, TooStale
from tesseract_async.experts.grid import ExpertReplica
from tesseract_async.experts.manifest import Coordinates, split_uid
from tesseract_async.runtime.gradients import are_finite, per_row
from tesseract_async.tasks import end
from tesseract_async.wire.apply import ApplyPart, ApplyRequest, Weights, decode_part, encode_request
from tesseract_async.wire.codecs import settle
from tesseract_async.wire.tensors import TensorSpec

OptionalTensors = list[torch.Tensor | None]
Values = npt.NDArray[np.floating]


@dataclass(slots=True, eq=False)
class RowBlock:
    """The rows that travel in one message, each once, and the pairs of an expert and a row."""

    calls: list[ExpertCall]
    """In the order of their coordinates."""
    coords: Coordinates
    rows: Indices
    """``[R]``: rows of the batch, ascending."""
    offsets: Indices
    """``[E + 1]``: the pairs of each call."""
    rows_P: Indices
    """The row of the batch for each pair."""
    numbers_P: Indices
    """The row of the block for each pair."""
    weights_P: Weights
    scales_R: Values | None = None
    """The unit of each row's weights."""
    kept: bytes | None = None
    """Names the block, as long as its server keeps it."""

    @classmethod
    def of(cls, calls: Collection[ExpertCall], candidates: Candidates, num_rows: int) -> "RowBlock":
        """The block of these calls for a batch of `num_rows`; the weights are for the caller to set."""
        experts = np.array([call.expert for call in calls], dtype=np.int64)
        coords = candidates.grid.coords_ND[experts]
        order = np.lexsort(coords.T[::-1])
        given = list(calls)
        calls = [given[i] for i in order.tolist()]
        rows_P = np.concatenate([call.rows for call in calls])
        is_there = np.zeros(num_rows, dtype=np.bool_)
        is_there[rows_P] = True
        rows = np.flatnonzero(is_there)
        offsets = np.zeros(len(calls) + 1, dtype=np.int64)
        np.cumsum([len(call.rows) for call in calls], out=offsets[1:])
        numbers_P = (is_there.cumsum() - 1)[rows_P]
        return cls(calls, coords[order], rows, offsets, rows_P, numbers_P, np.empty(0, dtype=np.float32))

    def experts_P(self) -> Indices:
        """Return the expert of each pair, by its number among the candidates."""
        return np.repeat([call.expert for call in self.calls], np.diff(self.offsets))


class Pass:
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
        options: CallOptions,
        timeout: float,
    ) -> None:
        """`timeout`: seconds for all messages."""
        self.experience, self.calls = experience, calls
        self.schema, self.mode, self.options = schema, mode, options
        self.codecs = settle(schema.codecs, options.codecs)
        self._timeout = timeout
        self._deadline = 0.0
        self._grouping = Grouping(
            calls, rank=self.rank, key=self.key, hedge_after=self._hedge_after, is_strict=calls.is_strict
        )
        self._tasks: set[asyncio.Task[None]] = set()
        self._news = asyncio.Event()
        self._failure: BaseException | None = None

    def rank(self, call: ExpertCall, found: Sequence[ExpertReplica] | None, now: float) -> Sequence[ExpertReplica]:
        """See `Grouping`. Of a call that is new (`found` is None), sets `expected` and `grace`."""
        raise NotImplementedError

    def key(self, call: ExpertCall, replica: ExpertReplica) -> Hashable:
        raise NotImplementedError

    async def pack(self, request: Request) -> tuple[RowBlock, ApplyRequest, Sequence[memoryview]]:
        """Return the message for the calls that are open in `request`, and the buffers of its tensors."""
        raise NotImplementedError

    def add(
        self, block: RowBlock, request: Request, part: ApplyPart, pairs: Indices, rows: Indices, sums: OptionalTensors
    ) -> None:
        """Take in a part that is about these pairs of the block, with sums of these rows of the batch."""
        raise NotImplementedError

    def failed(self, call: ExpertCall, replica: ExpertReplica, error: BaseException) -> None:
        report(self.experience, replica, error)

    def settled(self, call: ExpertCall, replica: ExpertReplica, seconds: float, path: float) -> None:
        """Learn from an answer that took so long, `path` seconds of it on the way."""

    def cancelled(self, request: Request, now: float) -> None:
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
            self._deadline = started + self._timeout
            calls.start(started)
            try:
                while True:
                    step = grouping.step(loop.time(), stalled=stalls.seconds - stalled)
                    for replica, mismatch in grouping.take_strange():
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
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(until):
                await self._news.wait()
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
        block, asked, tensors = await self.pack(request)
        if not request.open:
            return
        body, numbers = encode_request(asked)
        parts = self.experience.node.apply_experts(
            request.peer,
            [call.uid for call in block.calls],
            body,
            (*numbers, *tensors),
            timeout=timeout,
            priority=self.options.priority,
        )
        async with contextlib.aclosing(parts):
            async for message in parts:
                await self._take(request, block, asked, message)
                self._news.set()

    async def _take(self, request: Request, block: RowBlock, asked: ApplyRequest, message: Message) -> None:
        """Take in a part. Raises: ProtocolError if it does not fit."""
        experience, loop = self.experience, asyncio.get_running_loop()
        part, buffers = decode_part(message.body, message.buffers, asked)
        rows = asked.rows_of(part.experts)
        sums: OptionalTensors = []
        if len(part.experts):
            sums = await unpack_fitting("a server", part.tensors, buffers, self.reply_specs, len(rows))
        if (scales := asked.scales_of(part.experts)) is not None:
            sums = [None if x is None else x * per_row(torch.from_numpy(scales), x) for x in sums]
        if self.calls.is_over:
            return
        calls = [block.calls[place] for place in part.experts.tolist()]
        errors: dict[ExpertCall, BaseException] = {block.calls[place]: failure for place, failure in part.failures}
        if not (are_finite(sums) and np.isfinite(part.weight_gradients).all()):
            errors |= {call: ExpertFailed(f"{call.uid} answered {self.what} that are not finite") for call in calls}
        versions, epochs = part.versions.tolist(), part.epochs.tolist()
        least = asked.versions[part.experts].tolist()
        for call, version, epoch, needed in zip(calls, versions, epochs, least, strict=True):
            try:
                experience.lineages.take(request.asked[call], epoch, version)
                if version < needed and not asked.backward:
                    raise TooStale(f"{call.uid} answered at version {version}; {needed} is asked for")
            except TooStale as stale:
                errors[call] = stale
        for call, error in errors.items():
            self.failed(call, request.asked[call], error)
        now = loop.time()
        if part.kept is not None:
            block.kept = part.kept
        if not self._grouping.part(request, calls, errors, now) or not calls:
            return
        path = experience.path_seconds(request.asked[calls[0]], self._num_bytes(block))
        given = (0, len(calls)) if asked.backward else (len(rows), 0)
        experience.node.thanks.add(split_uid(calls[0].uid)[0], request.peer.peer_id, *given)
        for call in calls:
            self.settled(call, request.asked[call], now - request.sent, path)
        if experience.node.directory.has_doubts:
            for call in calls:
                experience.node.directory.report_answer(request.asked[call])
        self.add(block, request, part, asked.pairs(part.experts), block.rows[rows], sums)

    def _num_bytes(self, block: RowBlock) -> int:
        return len(block.rows) * self.schema.row_bytes

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
