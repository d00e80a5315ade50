"""ExpertCalls: answers the calls that clients make to experts. Everything that arrives here is untrusted.

A forward is computed. A backward is applied once, whatever happens to its caller: callers that ask again under the same
call id share the running computation, get the remembered answer, or, if that was forgotten, have their gradients
computed again without a step. What was applied is journalled by the backend, together with the weights.
"""

import asyncio
import contextlib
import hashlib
from collections.abc import Awaitable, Callable, Coroutine, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch

from tesseract_async.endpoint.endpoint import IncomingCall, Message
from tesseract_async.endpoint.handlers import Deferred
from tesseract_async.errors import (
    InputsForgotten,
    NotPrimary,
    Overloaded,
    ProtocolError,
    RemoteError,
    describe,
)
from tesseract_async.identity import PeerID
from tesseract_async.metrics import Metrics
from tesseract_async.runtime.encoding import AT_ONCE_BYTES, pack, unpack
from tesseract_async.runtime.gradients import Gradients
from tesseract_async.runtime.runtime import TesseractRuntime
from tesseract_async.runtime.work import Work, WorkResult
from tesseract_async.server.checks import (
    check_codecs,
    check_gradients,
    check_growth,
    check_inputs,
    num_rows_of,
    specs_of_backward,
    versions_of,
)
from tesseract_async.server.hosted import HostedState, Succession
from tesseract_async.server.memory import CallerMemory, CallKey, ExpectedBackwards
from tesseract_async.tasks import in_time
from tesseract_async.transport.base import range_of
from tesseract_async.wire import messages
from tesseract_async.wire import tensors as wire
from tesseract_async.wire.names import new_name
from tesseract_async.wire.tensors import pack_tensors, plain_metas, unpack_plain

Result = TypeVar("Result")

_LOOK_PERIOD = 0.1
"""Seconds between looks for callers whose connection has ended, which nothing announces."""
_LARGE_BYTES = 32 * 1024
_STALENESS_BUCKETS = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 1024.0)


@dataclass(slots=True)
class BackwardUnderWay:
    """A backward that is queued or computed, and how many callers wait for it."""

    work: Work
    runtime: TesseractRuntime
    version: int | None
    """The version after it was applied the first time; None if this is the first time."""
    owner: Hashable
    num_waiting: int = 0

    def leave(self) -> None:
        """Note that one of the waiting callers no longer waits. If nobody waits, the backward is not computed, unless
        that has begun; then its step stands, and a caller that asks again gets its answer."""
        self.num_waiting -= 1
        if not self.num_waiting and not self.work.answer.done():
            self.runtime.withdraw(self.work)

    def result(self) -> WorkResult:
        """Return its answer, once it is there. Raises what went wrong."""
        answer: WorkResult = self.work.answer.result()
        return answer if self.version is None else WorkResult(answer.tensors, self.version)


class ExpertCalls:
    """Answers forward, backward and info calls through the experts' runtimes. Lives on the loop."""

    def __init__(
        self,
        memory: CallerMemory,
        *,
        metrics: Metrics,
        knows: Callable[[PeerID], bool],
        is_gone: Callable[[PeerID], bool],
        succession: Callable[[], Succession],
    ) -> None:
        """`knows`: whether a caller is listed or granted something, and so has a share of its own, wherever it comes
        from. `is_gone`: whether it has no connection to this node any more. `succession`: who is primary, now.
        """
        self.refuse_forwards: Overloaded | None = None
        """Raised to forwards while the server pauses or leaves."""
        self.memory = memory
        self._metrics, self._knows, self._is_gone, self._succession = metrics, knows, is_gone, succession
        self._backwards: dict[CallKey, BackwardUnderWay] = {}
        self._expected = ExpectedBackwards()
        self._num_active = 0
        self._quiet = asyncio.Event()

    async def info(self, hosted: HostedState, call: IncomingCall) -> Message:
        """Answer ``expert.info``. Raises only RemoteErrors, for the caller to see."""
        with self.answering(call):
            messages.decode(messages.InfoRequest, call.body)
            backend = hosted.backend
            info = messages.ExpertInfo(
                uid=hosted.uid,
                args_schema=wire.encode_schema(backend.args_schema),
                kwargs_schema=wire.encode_schema(backend.kwargs_schema),
                outputs_schema=wire.encode_schema(backend.outputs_schema),
                max_batch_size=backend.max_batch_size,
                version=backend.version,
                codecs=backend.settings.codecs.encode(),
            )
            return Message(messages.encode(info))

    def forward(self, hosted: HostedState, call: IncomingCall) -> Awaitable[Message]:
        """Answer ``expert.forward``, with a `Deferred` if all tensors come in codec ``none``. Raises only RemoteErrors,
        for the caller to see, now or when awaited."""
        backend = hosted.backend
        try:
            request, call.body = messages.decode(messages.ForwardRequest, call.body), None
        except ProtocolError as error:
            raise told_of(error, call.method) from None
        if self.refuse_forwards is not None:
            raise self.refuse_forwards
        codecs = backend.settings.codecs
        if request.reply_codec not in codecs.outputs:
            codecs.check("outputs", request.reply_codec, expert=hosted.uid)  # says why not
        specs: Sequence[wire.TensorSpec] = backend.input_specs
        if backend.varies:
            specs, _ = backend.specs(wire.meta_size(specs, request.tensors))
        inputs = unpack_plain(request.tensors, call.buffers, specs)
        if inputs is None or "none" not in codecs.inputs:
            return self._forward(hosted, call, request)
        hosted.runtime.gather_turn()
        return self._submit(hosted, call, request, inputs)

    async def _forward(self, hosted: HostedState, call: IncomingCall, request: messages.ForwardRequest) -> Message:
        """Do the same with other codecs, or no rows."""
        uid, backend = hosted.uid, hosted.backend
        with self.answering(call):
            specs, _ = backend.specs(wire.meta_size(backend.input_specs, request.tensors))
            check_growth(uid, request.tensors, backend.inputs_schema, specs)
            tensors = await unpack(request.tensors, call.buffers)
            check_codecs(uid, backend, "inputs", request.tensors, tensors)
            inputs, output_specs = check_inputs(uid, backend, tensors)
            if num_rows_of(inputs):
                return await self._submit(hosted, call, request, inputs)
            empty = [torch.empty(0, *spec.least_shape, dtype=spec.dtype) for spec in output_specs]
            inputs_cached = self._keep(hosted, inputs, call, self.owner(call)) if request.keep_inputs else None
            reply = messages.ForwardReply([], backend.version, inputs_cached, hosted.epoch)
            return _message(reply, *pack_tensors(empty, request.reply_codec))

    def _submit(
        self,
        hosted: HostedState,
        call: IncomingCall,
        request: messages.ForwardRequest,
        inputs: Sequence[torch.Tensor | None],
    ) -> Deferred[Message]:
        owner = self.owner(call)
        work = hosted.runtime.submit(
            hosted.backend,
            inputs,
            training=request.training,
            seed=request.seed,
            deadline=call.deadline,
            priority=call.priority and priority_of(call),
            peer=owner,
        )
        versions = versions_of(inputs) if request.keep_inputs else []
        self._num_active += 1

        def computed() -> Message | Deferred[Message]:
            self.left()
            try:
                answer = work.answer.result()
            except TimeoutError as error:
                raise told_of(error, call.method) from None
            # where a module wrote them, the backward brings them again
            keeps = request.keep_inputs and versions == versions_of(inputs)
            inputs_cached = self._keep(hosted, inputs, call, owner) if keeps else None
            reply = messages.ForwardReply([], answer.version, inputs_cached, hosted.epoch)
            return self._reply(reply, answer, request.reply_codec)

        return Deferred(work.answer, finish=computed, cancel=partial(self.withdraw, hosted, work))

    def withdraw(self, hosted: HostedState, work: Work) -> None:
        """Note that nobody waits for this work any more, and its call has ended."""
        hosted.runtime.withdraw(work)
        self.left()

    def backward(self, hosted: HostedState, call: IncomingCall) -> Awaitable[Message]:
        """Answer ``expert.backward``: by a `Deferred` as `forward` does. Raises only RemoteErrors, for the caller to
        see, now or when awaited."""
        if not self.is_primary(hosted):
            return self._backward_once_primary(hosted, call)
        try:
            request, call.body = messages.decode(messages.BackwardRequest, call.body), None
        except ProtocolError as error:
            raise told_of(error, call.method) from None
        uid, backend = hosted.uid, hosted.backend
        backend.settings.codecs.check("gradients", request.reply_codec, expert=uid)
        key = uid, journal_key(call.peer_id, request.call_id)
        begun = self.begun_backward(key)
        if begun is None:
            specs = specs_of_backward(backend, request.tensors, request.num_inputs)
            plain = unpack_plain(request.tensors, call.buffers, specs)
            if plain is not None:
                hosted.runtime.gather_turn()
                begun = self._begin_backward(key, hosted, call, request, plain)
        if isinstance(begun, BackwardUnderWay):
            return self._share(hosted, call, request, begun)
        return self._backward(key, hosted, call, request, begun)

    async def _backward_once_primary(self, hosted: HostedState, call: IncomingCall) -> Message:
        """Answer a backward of an expert that another server trained lately, if this one trains it now; otherwise say
        which one does."""
        with self.answering(call):
            await self.check_primary(hosted)
            return await self.backward(hosted, call)

    async def _backward(
        self,
        key: CallKey,
        hosted: HostedState,
        call: IncomingCall,
        request: messages.BackwardRequest,
        begun: WorkResult | BackwardUnderWay | None,
    ) -> Message:
        """Do the same with other codecs, an answer that is already there, or no rows."""
        uid, backend = hosted.uid, hosted.backend
        with self.answering(call):
            if begun is None:
                specs = specs_of_backward(backend, request.tensors, request.num_inputs)
                check_growth(f"backward of {uid}", request.tensors, tuple(specs), specs)
                tensors = await unpack(request.tensors, call.buffers)
                # the same call may have come meanwhile
                begun = self.begun_backward(key) or self._begin_backward(key, hosted, call, request, tensors)
            if isinstance(begun, BackwardUnderWay):
                return await self._share(hosted, call, request, begun)
            reply = self._backward_reply(hosted, call, request, begun)
            return await reply if isinstance(reply, Deferred) else reply

    def _share(
        self, hosted: HostedState, call: IncomingCall, request: messages.BackwardRequest, begun: BackwardUnderWay
    ) -> Deferred[Message]:
        """Wait for a backward together with all callers that asked for it."""
        begun.num_waiting += 1
        self._num_active += 1

        def leave() -> None:
            begun.leave()
            self.left()

        def computed() -> Message | Deferred[Message]:
            leave()
            try:
                answer = begun.result()
            except TimeoutError as error:
                raise told_of(error, call.method) from None
            return self._backward_reply(hosted, call, request, answer)

        return Deferred(begun.work.answer, finish=computed, cancel=leave)

    def _backward_reply(
        self, hosted: HostedState, call: IncomingCall, request: messages.BackwardRequest, answer: WorkResult
    ) -> Message | Deferred[Message]:
        """Take note of an answer, and return the reply with it. Raises: NotPrimary."""
        self.check_may_step(hosted)
        if request.inputs_cached is not None:
            self.memory.inputs.pop(request.inputs_cached)
        self.backward_ended(hosted, call, request.inputs_cached, answer, request.version)
        return self._reply(messages.BackwardReply([], answer.version, hosted.epoch), answer, request.reply_codec)

    def _reply(
        self, reply: messages.ForwardReply | messages.BackwardReply, answer: WorkResult, codec: str
    ) -> Message | Deferred[Message]:
        """Return a reply with the answer's tensors, or a promise of one while they are compressed."""
        if codec == "none" and answer.encoded is not None:
            return _message(reply, plain_metas(answer.tensors), answer.encoded)  # type: ignore[arg-type]  # none is absent
        tensors = [*map(_apart, answer.tensors)]
        if codec != "none" and sum([x.nbytes for x in tensors if x is not None]) > AT_ONCE_BYTES:

            async def compressed() -> Message:
                return _message(reply, *await pack(tensors, codec))

            return self.later(compressed())
        return _message(reply, *pack_tensors(tensors, codec))

    def later(self, rest: Coroutine[object, object, Message]) -> Deferred[Message]:
        """Let the rest of a call go on in a task, until its caller does not wait any more."""
        task = asyncio.get_running_loop().create_task(rest)
        self._num_active += 1

        def ended(end: Callable[[], Result]) -> Result:
            self.left()
            return end()

        return Deferred(task, finish=partial(ended, task.result), cancel=partial(ended, task.cancel))

    def _begin_backward(
        self,
        key: CallKey,
        hosted: HostedState,
        call: IncomingCall,
        request: messages.BackwardRequest,
        tensors: Sequence[torch.Tensor | None],
    ) -> BackwardUnderWay | WorkResult:
        uid, backend, num_inputs = hosted.uid, hosted.backend, request.num_inputs
        check_codecs(uid, backend, "inputs", request.tensors[:num_inputs], tensors[:num_inputs])
        check_codecs(uid, backend, "gradients", request.tensors[num_inputs:], tensors[num_inputs:])
        kept = self.inputs_of(uid, request.inputs_cached, tensors[:num_inputs])
        inputs, output_specs = check_inputs(uid, backend, kept)
        gradients = check_gradients(uid, backend, inputs, output_specs, tensors[num_inputs:])
        if num_rows_of(inputs) == 0:
            numbers = (x if x is not None and (x.is_floating_point() or x.is_complex()) else None for x in inputs)
            zeros = [None if x is None else torch.zeros_like(x) for x in numbers]
            return WorkResult(zeros, backend.version)
        return self.begin_backward(
            key,
            hosted,
            call,
            inputs,
            gradients,
            call_id=request.call_id,
            training=request.training,
            seed=request.seed,
            forward_version=request.version,
        )

    @contextlib.contextmanager
    def answering(self, call: IncomingCall) -> Iterator[None]:
        """Enclose a call under way, which ends in an answer or a RemoteError."""
        self._num_active += 1
        try:
            yield
        except (ProtocolError, TimeoutError) as error:
            raise told_of(error, call.method) from None
        finally:
            self.left()

    def entered(self) -> None:
        """Note a call under way, for which `wait_quiet` waits until it has `left`."""
        self._num_active += 1

    def left(self) -> None:
        self._num_active -= 1
        if not self._num_active:
            self._quiet.set()

    async def wait_backwards(self, uid: str) -> None:
        """Return once no backward of this expert is under way any more; new ones are the caller's business."""
        while pending := [one.work.answer for (at, _), one in self._backwards.items() if at == uid]:
            await asyncio.wait(pending)

    async def wait_quiet(self, expects: Callable[[str], bool]) -> None:
        """Return when no call is under way, and no backward of an answered forward is worth waiting for any more.

        `expects`: whether this server applies the backwards of an expert; else they go elsewhere.
        """
        loop = asyncio.get_running_loop()
        while True:
            now = loop.time()
            due = self._expected.next_change(now, is_gone=self._is_gone, expects=expects)
            if not self._num_active and due is None:
                return
            self._quiet.clear()
            await in_time(self._quiet.wait(), None if due is None else min(due - now, _LOOK_PERIOD))

    def is_primary(self, hosted: HostedState) -> bool:
        """Return whether this server may step the expert at this moment."""
        return hosted.is_primary and self._succession().may_step(hosted.uid)

    async def check_primary(self, hosted: HostedState) -> None:
        """Raises: NotPrimary, which says who is, if this server does not train the expert."""
        if not self.is_primary(hosted):
            primary, retry_after = await self._succession().find_primary(hosted.uid)
            if not self.is_primary(hosted):
                raise NotPrimary(f"this server only follows {hosted.uid}", primary=primary, retry_after=retry_after)

    def check_may_step(self, hosted: HostedState) -> None:
        """Check again before a step is confirmed to a caller. Raises: NotPrimary."""
        if not self._succession().may_step(hosted.uid):
            # its lease ended meanwhile: the next primary knows the call's id, if the step is in what it goes on from
            raise NotPrimary(f"this server no longer trains {hosted.uid}", retry_after=1.0)

    def inputs_of(
        self, uid: str, kept: bytes | None, tensors: Sequence[torch.Tensor | None]
    ) -> Sequence[torch.Tensor | None]:
        """Return a backward's inputs: those that came with it, or its forward's. Raises: InputsForgotten."""
        if kept is None:
            return tensors
        inputs = self.memory.inputs.get(kept)
        if inputs is None:
            raise InputsForgotten(f"the inputs of this backward of {uid} are no longer kept; send them again")
        return inputs  # of another expert, maybe

    def begun_backward(self, key: CallKey) -> BackwardUnderWay | WorkResult | None:
        """Return the answer of a backward that came before, as long as it is remembered, or the backward while it is
        under way."""
        return self.memory.answers.get(key) or self._backwards.get(key)

    def begin_backward(
        self,
        key: CallKey,
        hosted: HostedState,
        call: IncomingCall,
        inputs: Sequence[torch.Tensor | None],
        gradients: Gradients,
        *,
        call_id: bytes,
        training: bool,
        seed: int,
        forward_version: int,
        rows: torch.Tensor | None = None,
        weights: torch.Tensor | None = None,
        num_bytes: int | None = None,
        owner: Hashable | None = None,
    ) -> BackwardUnderWay:
        """Queue a backward (see `TesseractRuntime.submit`). Raises: Overloaded."""
        backend = hosted.backend
        version, owner = backend.led_to(key[1], call_id), owner or self.owner(call)
        work = hosted.runtime.submit(
            backend,
            inputs,
            gradients,
            training=training,
            seed=seed,
            # applied before, and its gradients were forgotten: compute them again, but take no step
            call_id=key[1] if version is None else None,
            forward_version=forward_version if version is None else None,
            deadline=call.deadline,
            priority=call.priority and priority_of(call),
            peer=owner,
            rows=rows,
            weights=weights,
            num_bytes=num_bytes,
        )
        backward = self._backwards[key] = BackwardUnderWay(work, hosted.runtime, version, owner)
        work.answer.add_listener(partial(self._end_backward, key))
        return backward

    def backward_ended(
        self, hosted: HostedState, call: IncomingCall, name: bytes | None, answer: WorkResult, forward_version: int
    ) -> None:
        self._expected.came(name, hosted.uid, call.peer_id, asyncio.get_running_loop().time())
        self._metrics.observe(
            "expert_staleness_steps", max(0, answer.version - 1 - forward_version), bounds=_STALENESS_BUCKETS
        )

    def _end_backward(self, key: CallKey, _: object) -> None:
        backward = self._backwards.pop(key)
        answer = backward.work.answer
        if not answer.cancelled() and answer.exception() is None:
            self.memory.keep_answer(key, backward.result(), backward.owner)

    def owner(self, call: IncomingCall) -> Hashable:
        """Return the owner of the share of memory and device time that this call takes: a known peer, else an address
        range, else (where addresses tell nothing) the peer."""
        return call.peer_id if self._knows(call.peer_id) else range_of(call.origin) or call.peer_id

    def expect_backward(self, name: bytes, hosted: HostedState, call: IncomingCall) -> None:
        """Take note of an answered forward, `name`, that a backward will follow."""
        if hosted.is_primary:
            self._expected.expect(name, hosted.uid, call.peer_id, asyncio.get_running_loop().time())

    def _keep(
        self, hosted: HostedState, inputs: Sequence[torch.Tensor | None], call: IncomingCall, owner: Hashable
    ) -> bytes | None:
        name = new_name()
        self.expect_backward(name, hosted, call)
        return name if self.memory.keep_inputs(name, inputs, owner) else None


def _message(
    reply: messages.ForwardReply | messages.BackwardReply, metas: list[wire.Meta], buffers: Sequence[memoryview]
) -> Message:
    reply.tensors.extend(metas)
    return Message(messages.encode(reply), tuple(buffers))


def told_of(error: BaseException, method: str) -> RemoteError:
    """Return the error that a caller is told."""
    if isinstance(error, RemoteError):
        return error
    if isinstance(error, ProtocolError):
        return RemoteError(f"malformed {method}: {error}")
    if isinstance(error, TimeoutError):
        return Overloaded(str(error), retry_after=0.0)
    return RemoteError(f"{method} failed: {describe(error)}")


def journal_key(trainer: PeerID, call_id: bytes) -> bytes:
    """Return the journal's key of a backward. It depends on the trainer, so that none can use up the id of another's
    call."""
    return hashlib.sha256(trainer + call_id).digest()[:16]


def priority_of(call: IncomingCall) -> int:
    """Return the call's priority, limited to the few classes that the batcher keeps for strangers."""
    return max(messages.LOWEST_PRIORITY, min(call.priority, messages.HIGHEST_PRIORITY))


def _apart(x: torch.Tensor | None) -> torch.Tensor | None:
    """Return a part of an answer that may wait for long, copied if it is a few rows that would keep the outputs of a
    large batch in memory."""
    return x if x is None or x.nbytes < _LARGE_BYTES or x.untyped_storage().nbytes() <= 4 * x.nbytes else x.clone()
