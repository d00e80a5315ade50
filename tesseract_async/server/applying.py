"""Answers ``expert.apply``: one message for many experts of this node. Everything that arrives here is untrusted.

The rows lie once in memory, as a block; each expert's share of the message is work of its own for its runtime, which
gathers the rows. So quotas, refusals, staleness, the journal and the steps are those of single calls, by the same code
(`answering.ExpertCalls`), and one expert's failure is its own. `parts.Parts` decides what is sent, and when.
"""

import asyncio
import contextlib
import math
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch

from tesseract_async.endpoint.call_table import Answer, CallHandler, LastPart
from tesseract_async.endpoint.endpoint import IncomingCall, Message
from tesseract_async.errors import ProtocolError, RemoteError, SchemaMismatch, TooStale, UnknownMethod
from tesseract_async.experts.manifest import join_uid
from tesseract_async.runtime.encoding import pack, unpack
from tesseract_async.runtime.gradients import Gradients, per_row
from tesseract_async.runtime.runtime import TesseractRuntime
from tesseract_async.runtime.work import Work, WorkResult
from tesseract_async.server import at_once
from tesseract_async.server.answering import (
    BackwardUnderWay,
    ExpertCalls,
    journal_key,
    priority_of,
    told_of,
)
from tesseract_async.server.checks import check_codecs, check_gradients, check_growth, check_inputs, specs_of_backward
from tesseract_async.server.hosted import HostedState
from tesseract_async.server.parts import MAX_PARTS, Parts
from tesseract_async.tasks import TaskSet
from tesseract_async.wire import messages
from tesseract_async.wire.apply import APPLY, ApplyRequest, decode_request, encode_part
from tesseract_async.wire.names import new_name
from tesseract_async.wire.tensors import meta_size

SHARE_BYTES: Final = 3584
"""Bytes of the objects around one expert's share: measured at 2,200 in a forward, 3,500 in a backward."""
PORTION: Final = 64
"""The most shares begun in one turn of the loop."""

FindsExperts = Callable[[IncomingCall, Sequence[str]], Sequence[CallHandler | RemoteError]]
"""Finds experts of this node for a caller, as `TesseractNode.find_experts` does."""


class Applying:
    """Handles ``expert.apply`` at a node, for the experts of all its servers. Lives on the loop."""

    def __init__(self, calls: ExpertCalls, find: FindsExperts) -> None:
        """`calls`: of one of the servers; it keeps the blocks."""
        self._calls, self._find = calls, find

    def answer(self, call: IncomingCall) -> Answer:
        """Return the reply, as a promise or as its parts. Closing the parts withdraws the work that has not been
        computed.

        Raises only RemoteErrors, for the caller to see, now or then: where the message as a whole cannot be understood.
        """
        try:
            request, buffers = decode_request(call.body, call.buffers)
        except ProtocolError as error:
            raise told_of(error, call.method) from None
        call.body, call.buffers = None, ()
        found: Sequence[CallHandler | RemoteError] | None = None
        if at_once.is_small(request):
            uids = [join_uid(request.prefix, coords) for coords in request.experts.tolist()]
            found = self._find(_asked(call, request), uids)
            hosted, calls = [], None
            for door in found:
                if type(door) is not ExpertShares or door.calls is not (calls := calls or door.calls):
                    break
                hosted.append(door.hosted)
            else:
                assert calls is not None
                again = partial(self._in_one, call, request, buffers, found)
                deferred = at_once.begin(call, request, buffers, hosted, calls, again)
                if deferred is not None:
                    return deferred
        return self._in_parts(call, request, buffers, found)

    async def _in_one(
        self,
        call: IncomingCall,
        request: ApplyRequest,
        buffers: Sequence[memoryview],
        found: Sequence[CallHandler | RemoteError],
    ) -> Message:
        async with contextlib.aclosing(self._in_parts(call, request, buffers, found, max_parts=1)) as parts:
            return await anext(parts)

    async def _in_parts(
        self,
        call: IncomingCall,
        request: ApplyRequest,
        buffers: Sequence[memoryview],
        found: Sequence[CallHandler | RemoteError] | None,
        *,
        max_parts: int = MAX_PARTS,
    ) -> AsyncGenerator[Message, None]:
        with self._calls.answering(call):
            wave = Wave(request, call, self._calls, max_parts=max_parts)
            try:
                await wave.begin(self._find, buffers, found)
                del buffers
                async for part in wave.parts():
                    yield part
            finally:
                wave.withdraw()


@dataclass(slots=True, eq=False)
class ExpertShares:
    """One expert's handler for its share of such messages: it stands under ``expert.apply`` in the node's table."""

    calls: ExpertCalls
    hosted: HostedState

    def __call__(self, call: IncomingCall) -> Answer:
        """Refuse to be called directly: `Applying` finds this share, and begins it."""
        raise UnknownMethod(f"{self.hosted.uid} is applied together with others")


@dataclass(slots=True, eq=False)
class _Share:
    """One expert's part of a wave, and the work that it has become."""

    expert: int
    """The expert's place in the request."""
    door: ExpertShares
    rows: torch.Tensor
    num_rows: int
    num_bytes: int
    work: Work | None = None
    backward: BackwardUnderWay | None = None
    is_open: bool = True
    """True until it is answered, has failed, or nobody waits for it."""


def _asked(call: IncomingCall, request: ApplyRequest) -> IncomingCall:
    """Return the call by which one of its experts would be asked."""
    method = messages.BACKWARD if request.backward else messages.FORWARD
    return IncomingCall(call.peer_id, method, None, (), call.deadline, call.priority, call.origin)


class Wave:
    """One such message while it is answered."""

    def __init__(
        self, request: ApplyRequest, call: IncomingCall, calls: ExpertCalls, *, max_parts: int = MAX_PARTS
    ) -> None:
        self.request = request
        self._call, self._calls = call, calls
        self._loop = asyncio.get_running_loop()
        self._gathered = Parts(request, self._loop.time(), max_parts=max_parts)
        self._shares: list[_Share] = []
        self._inputs: Sequence[torch.Tensor | None] = ()
        self._gradients: Sequence[torch.Tensor | None] = ()
        self._weights: Sequence[torch.Tensor] = ()
        """Backward: of each expert's pairs."""
        self._checked: tuple[str, Sequence[torch.Tensor | None], Gradients] | None = None
        self._owner = calls.owner(call)
        self._held: dict[TesseractRuntime, int] = {}
        self._entered: list[ExpertCalls] = []
        self._tasks = TaskSet("server: apply")
        self._timer: asyncio.TimerHandle | None = None
        self._due: asyncio.Future[None] | None = None

    async def begin(
        self,
        find: FindsExperts,
        buffers: Sequence[memoryview],
        found: Sequence[CallHandler | RemoteError] | None = None,
    ) -> None:
        """Hand each expert's share to its runtime. `found`: what `find` has found, if that was asked.

        Raises: ProtocolError, SchemaMismatch for a malformed block.
        """
        request = self.request
        doors = await self._find_all(find) if found is None else self._sorted(found)
        if not doors:
            return
        first = next(iter(doors.values()))
        backend = first.hosted.backend
        if request.backward:
            specs = specs_of_backward(backend, request.tensors, request.num_inputs)
        else:
            specs = [*backend.specs(meta_size(backend.input_specs, request.tensors))[0]]
        check_growth(f"{APPLY} of {request.prefix}", request.tensors, tuple(specs), specs)
        tensors = await unpack(request.tensors, buffers)
        self._inputs = tensors[: request.num_inputs]
        self._gradients = tensors[request.num_inputs :]
        sizes = (request.offsets[1:] - request.offsets[:-1]).tolist()
        each = torch.from_numpy(request.rows).long().split_with_sizes(sizes)  # half the time of slices
        if request.backward:
            self._weights = torch.from_numpy(request.weights).split_with_sizes(sizes)
        row_bytes = self._bytes_per_row(first)
        self._entered = [*dict.fromkeys([door.calls for door in doors.values()])]
        for calls in self._entered:
            calls.entered()
        runtimes = {door.hosted.runtime for door in doors.values()}
        left = list(doors.items())
        while left:
            some, left = left[:PORTION], left[PORTION:]
            with contextlib.ExitStack() as gathering:
                for runtime in runtimes:
                    gathering.enter_context(runtime.gathering())
                for expert, door in some:
                    num_bytes = row_bytes * sizes[expert] + SHARE_BYTES
                    share = _Share(expert, door, each[expert], sizes[expert], num_bytes)
                    self._shares.append(share)
                    self._begin(share)
            if left:
                await asyncio.sleep(0)

    async def _find_all(self, find: FindsExperts) -> dict[int, ExpertShares]:
        """Return the handlers of the experts that are here and that the caller may ask, by their places."""
        request = self.request
        asked = _asked(self._call, request)
        doors: dict[int, ExpertShares] = {}
        uids = [join_uid(request.prefix, coords) for coords in request.experts.tolist()]
        for start in range(0, len(uids), PORTION):
            if start:
                await asyncio.sleep(0)
            doors |= self._sorted(find(asked, uids[start : start + PORTION]), start)
        return doors

    def _sorted(self, found: Sequence[CallHandler | RemoteError], start: int = 0) -> dict[int, ExpertShares]:
        """Return the handlers by their places; experts without a handler have failed."""
        doors: dict[int, ExpertShares] = {}
        for expert, door in enumerate(found, start):
            if isinstance(door, RemoteError):
                self._failed(expert, door)
            else:
                assert isinstance(door, ExpertShares)
                doors[expert] = door
        return doors

    def _bytes_per_row(self, door: ExpertShares) -> int:
        """Return the bytes that a pair counts as: its part of the block, which all share, and a row of the answer."""
        backend, block = door.hosted.backend, (*self._inputs, *self._gradients)
        block_bytes = sum(x.nbytes for x in block if x is not None)
        size = meta_size([*backend.input_specs[: self.request.num_inputs], *backend.output_specs], self.request.tensors)
        of_inputs, of_outputs = backend.specs(size)
        answered = of_inputs if self.request.backward else of_outputs
        return -(-block_bytes // len(self.request.rows)) + sum(spec.row_bytes for spec in answered)

    def _begin(self, share: _Share) -> None:
        calls, hosted, request = share.door.calls, share.door.hosted, self.request
        codecs = hosted.backend.settings.codecs
        try:
            if request.reply_codec not in (codecs.gradients if request.backward else codecs.outputs):
                codecs.check("gradients" if request.backward else "outputs", request.reply_codec, expert=hosted.uid)
            if not request.backward:
                share.work = self._begin_forward(share)
                share.work.answer.add_done_callback(partial(self._forward_ended, share))
            elif calls.is_primary(hosted):
                self._begin_backward(share)
            else:
                self._tasks.spawn(self._begin_elsewhere(share))
        except RemoteError as error:
            self._end(share, error)

    def _block_for(self, hosted: HostedState) -> tuple[Sequence[torch.Tensor | None], Gradients]:
        """Return inputs and gradients, once they fit the expert. Raises: SchemaMismatch, InputsForgotten."""
        request, backend = self.request, hosted.backend
        kind = backend.signature
        if self._checked is None or self._checked[0] != kind:  # else it fits as it fitted the expert before
            num_inputs, uid = request.num_inputs, hosted.uid
            check_codecs(uid, backend, "inputs", request.tensors[:num_inputs], self._inputs)
            inputs, specs = check_inputs(uid, backend, self._calls.inputs_of(uid, request.kept, self._inputs))
            gradients: Gradients = ()
            if request.backward:
                check_codecs(uid, backend, "gradients", request.tensors[num_inputs:], self._gradients)
                gradients = check_gradients(uid, backend, inputs, specs, self._gradients)
            elif not all(spec.dtype.is_floating_point or spec.dtype.is_complex for spec in backend.output_specs):
                raise SchemaMismatch(f"{uid} answers whole numbers, which cannot be weighted: call it alone")
            self._checked = kind, inputs, gradients
        return self._checked[1:]

    def _begin_forward(self, share: _Share) -> Work:
        request, call, hosted = self.request, self._call, share.door.hosted
        calls, backend = share.door.calls, hosted.backend
        if calls.refuse_forwards is not None:
            raise calls.refuse_forwards
        if backend.version < request.versions[share.expert]:
            raise TooStale(f"{hosted.uid} is at version {backend.version} here")
        return hosted.runtime.submit(
            backend,
            self._block_for(hosted)[0],
            training=request.training,
            seed=request.seed,
            deadline=call.deadline,
            priority=call.priority and priority_of(call),
            peer=self._owner,
            rows=share.rows,
            num_bytes=share.num_bytes,
        )

    def _begin_backward(self, share: _Share) -> None:
        request, call, hosted = self.request, self._call, share.door.hosted
        calls, expert = share.door.calls, share.expert
        call_id = request.ids[expert]
        key = hosted.uid, journal_key(call.peer_id, call_id)
        begun = calls.begun_backward(key)
        if isinstance(begun, WorkResult):
            self._backward_answered(share, begun)
            return
        if begun is None:
            inputs, gradients = self._block_for(hosted)
            begun = calls.begin_backward(
                key,
                hosted,
                call,
                inputs,
                gradients,
                call_id=call_id,
                training=request.training,
                seed=request.seed,
                forward_version=int(request.versions[expert]),
                rows=share.rows,
                weights=self._weights[expert],
                num_bytes=share.num_bytes,
                owner=self._owner,
            )
        begun.num_waiting += 1
        share.backward, share.work = begun, begun.work
        begun.work.answer.add_done_callback(partial(self._backward_ended, share))

    async def _begin_elsewhere(self, share: _Share) -> None:
        """Begin a backward of an expert that another server trained lately, if this one trains it now; otherwise say
        which one does."""
        try:
            await share.door.calls.check_primary(share.door.hosted)
            self._begin_backward(share)
        except Exception as error:  # nobody else would hear of it
            self._end(share, told_of(error, APPLY))

    def _forward_ended(self, share: _Share, answer: asyncio.Future[WorkResult]) -> None:
        if not share.is_open or answer.cancelled():
            return
        if (error := answer.exception()) is not None:
            self._end(share, told_of(error, APPLY))
            return
        if self.request.keep:
            share.door.calls.expect_backward(self.request.ids[share.expert], share.door.hosted, self._call)
        self._end(share, answer.result())

    def _backward_ended(self, share: _Share, answer: asyncio.Future[WorkResult]) -> None:
        if not share.is_open or answer.cancelled():
            return
        assert share.backward is not None
        share.backward.leave()
        try:
            self._backward_answered(share, share.backward.result())
        except Exception as error:  # what the computation raised
            self._end(share, told_of(error, APPLY))

    def _backward_answered(self, share: _Share, answer: WorkResult) -> None:
        """Take the answer, unless it is that of another call. Raises: RemoteError; NotPrimary."""
        hosted, calls, expert = share.door.hosted, share.door.calls, share.expert
        *gradients, weights = answer.tensors
        if (
            len(gradients) != len(hosted.backend.input_specs)
            or weights is None
            or any([x is not None and x.shape[0] != share.num_rows for x in answer.tensors])
        ):
            raise RemoteError(f"another backward of {hosted.uid} came under this id")
        calls.check_may_step(hosted)
        calls.backward_ended(hosted, self._call, self.request.ids[expert], answer, int(self.request.versions[expert]))
        self._end(share, answer)

    def _end(self, share: _Share, outcome: WorkResult | RemoteError) -> None:
        share.is_open, share.work, share.backward = False, None, None
        if isinstance(outcome, RemoteError):
            self._failed(share.expert, outcome)
        else:
            # it waits for its part, and is counted where its work was until now: as the caller's
            runtime = share.door.hosted.runtime
            runtime.hold(self._owner, share.num_bytes)
            self._held[runtime] = self._held.get(runtime, 0) + share.num_bytes
            self._gathered.answered(share.expert, outcome, share.door.hosted.epoch)
            if self._due is not None:
                self._look()

    def _let_go(self) -> None:
        for runtime, num_bytes in self._held.items():
            runtime.hold(self._owner, -num_bytes)
        self._held.clear()

    def _failed(self, expert: int, error: RemoteError) -> None:
        self._gathered.failed(expert, error)
        self._look()

    async def parts(self) -> AsyncGenerator[Message, None]:
        """Yield the reply's parts when they are due."""
        request, kept, num_failed = self.request, self._keep(), 0
        while True:
            await self._wait_due()
            part, sums = self._gathered.take(self._loop.time())
            self._let_go()
            num_failed += len(part.failures)
            if (scales := request.scales_of(part.experts)) is not None:
                sums = [None if x is None else x / per_row(torch.from_numpy(scales), x) for x in sums]
            metas, buffers = await pack(sums, request.reply_codec)
            body, first = encode_part(part._replace(tensors=metas, kept=kept), backward=request.backward)
            kept = None
            if self._gathered.is_over:
                break
            yield Message(body, (*first, *buffers))
        if request.kept is not None and not num_failed:
            self._calls.memory.inputs.pop(request.kept)
        yield LastPart(body, (*first, *buffers))

    def _keep(self) -> bytes | None:
        """Keep the block of a forward, if the caller asks for that and there is room. Returns its name."""
        request = self.request
        if request.backward or not request.keep or not any(share.is_open for share in self._shares):
            return None
        name = new_name()
        return name if self._calls.memory.keep_inputs(name, self._inputs, self._calls.owner(self._call)) else None

    async def _wait_due(self) -> None:
        while self._gathered.due_at() > self._loop.time():
            self._due = self._loop.create_future()
            self._look()
            try:
                await self._due
            finally:
                self._due = None
                if self._timer is not None:
                    self._timer.cancel()
                    self._timer = None

    def _look(self) -> None:
        """Wake the reply if a part is due, or when it will be."""
        if self._due is None or self._due.done():
            return
        due_at = self._gathered.due_at()
        if due_at <= self._loop.time():
            self._due.set_result(None)
        elif due_at < math.inf and self._timer is None:
            self._timer = self._loop.call_at(due_at, self._look_again)

    def _look_again(self) -> None:
        self._timer = None
        self._look()

    def withdraw(self) -> None:
        """Give up the work that is still under way: nobody waits for it."""
        self._let_go()
        for task in self._tasks:
            task.cancel()
        for share in self._shares:
            if share.is_open:
                work, backward = share.work, share.backward
                share.is_open, share.work, share.backward = False, None, None
                if backward is not None:
                    backward.leave()
                elif work is not None:
                    share.door.hosted.runtime.withdraw(work)
        for calls in self._entered:
            calls.left()
        self._entered.clear()
