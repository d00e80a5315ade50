"""TesseractServer: hosts experts on a node. Answers their calls, declares them, keeps their checkpoints."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from tesseract_async.endpoint.endpoint import IncomingCall, Message
from tesseract_async.errors import (
    CheckpointError,
    ExpertNotFound,
    ProtocolError,
    RemoteError,
    SchemaMismatch,
    UnknownMethod,
    describe,
)
from tesseract_async.experts import ExpertPublisher, PublisherSettings
from tesseract_async.runtime.backend import ExpertBackend, Gradients
from tesseract_async.runtime.runtime import Answer, RuntimeSettings, TesseractRuntime, Work
from tesseract_async.server.checkpoint import CheckpointStore
from tesseract_async.wire import compression, messages
from tesseract_async.wire import tensors as wire

if TYPE_CHECKING:
    from tesseract_async.node import TesseractNode

logger = logging.getLogger(__name__)

_CallKey = tuple[str, bytes]  # uid, call id

_LOWEST_PRIORITY, _HIGHEST_PRIORITY = -1, 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """How a server keeps its experts."""

    runtime: RuntimeSettings = RuntimeSettings()
    keep_checkpoints: int = 3
    """Files kept per expert."""
    max_gradient_cache_bytes: int = 64 << 20
    """Answers of backwards kept for callers who ask again because the first answer was lost."""


class TesseractServer:
    """Hosts `experts`, uid -> backend, on one device. Use it as an async context manager.

    Entering restores each expert's newest checkpoint from `checkpoint_dir`, if given, and returns once the experts can
    be found in the network. Leaving withdraws them, saves and stops the device's thread. The backends belong to the
    server meanwhile: nobody else may touch their modules.
    """

    def __init__(
        self,
        node: TesseractNode,
        experts: Mapping[str, ExpertBackend],
        *,
        device: str | torch.device = "cpu",
        checkpoint_dir: str | Path | None = None,
        checkpoint_period: float = 60.0,
        publisher_settings: PublisherSettings | None = None,
        settings: ServerSettings = ServerSettings(),
    ) -> None:
        """`checkpoint_period`: seconds between checkpoints; a killed server falls back at most that far."""
        self.node = node
        self.experts = dict(experts)
        self.settings = settings
        self.checkpoint_period = checkpoint_period
        self._publisher_settings = publisher_settings or PublisherSettings()
        self.runtime = TesseractRuntime(device=device, settings=settings.runtime)
        self._store = (
            None if checkpoint_dir is None else CheckpointStore(checkpoint_dir, keep=settings.keep_checkpoints)
        )
        self._saved_versions: dict[str, int] = {}
        self._publisher: ExpertPublisher | None = None
        self._saver: asyncio.Task[None] | None = None
        self._backwards: dict[_CallKey, _Backward] = {}
        self._answers = _AnswerCache(settings.max_gradient_cache_bytes)
        self._hosted: list[str] = []
        self._closed = False

    async def __aenter__(self) -> TesseractServer:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def start(self) -> None:
        """What entering does. Raises: CheckpointError if an expert has checkpoints and none of them fits it."""
        await self.runtime.start()
        try:
            for uid, backend in self.experts.items():
                await self._restore(uid, backend)
            for uid in self.experts:
                self.node.host_expert(uid, self._answer)
                self._hosted.append(uid)
            self._publisher = ExpertPublisher(
                self.node.network,
                addresses=self.node.peer_address.addresses,
                settings=self._publisher_settings,
                metrics=self.node.metrics,
            )
            await self._publisher.declare(dict.fromkeys(self.experts, True))
        except BaseException:
            await self.aclose()
            raise
        if self._store is not None:
            self._saver = asyncio.create_task(self._save_periodically(), name="server: checkpoints")

    async def aclose(self) -> None:
        """Withdraws the experts, refuses what waits, saves, and stops the thread. Closing twice is harmless."""
        if self._closed:
            return
        self._closed = True
        if self._saver is not None:
            self._saver.cancel()
            await asyncio.gather(self._saver, return_exceptions=True)
        try:
            if self._publisher is not None:
                await self._publisher.aclose()
        finally:
            for uid in self._hosted:
                self.node.unhost_expert(uid)
            try:
                await self.save_checkpoints()
            except CheckpointError as error:
                logger.error("the last steps are lost: %s", error)
            finally:
                await self.runtime.aclose()

    async def save_checkpoints(self) -> int:
        """Writes a checkpoint of each expert that took steps since its last one. Returns how many.

        Raises: CheckpointError for the first that could not be written, after trying all.
        """
        if self._store is None:
            return 0
        num_saved = 0
        failed: CheckpointError | None = None
        for uid, backend in self.experts.items():
            if self._saved_versions.get(uid) == backend.version:
                continue
            # copied between two batches, written beside them
            state = await self.runtime.call(backend.state)
            version = state["version"]
            try:
                await self.runtime.call_aside(_Save(self._store, uid, state))
            except CheckpointError as error:
                failed = failed or error
                continue
            self._saved_versions[uid] = version
            num_saved += 1
        if failed is not None:
            raise failed
        return num_saved

    async def _restore(self, uid: str, backend: ExpertBackend) -> None:
        state = None
        if self._store is not None:
            store = self._store
            state = await self.runtime.call_aside(lambda: store.load(uid))

        def install() -> None:
            if state is not None:
                backend.load_state(state)
            backend.to(self.runtime.device)

        try:
            await self.runtime.call(install)
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"the checkpoint of {uid} does not fit its module: {describe(error)}") from error
        if state is not None:
            self._saved_versions[uid] = backend.version
            logger.info("%s continues at version %d", uid, backend.version)

    async def _save_periodically(self) -> None:
        while True:
            await asyncio.sleep(self.checkpoint_period)
            try:
                await self.save_checkpoints()
            except CheckpointError as error:
                logger.error("%s", error)
                self.node.metrics.count("checkpoints_failed")

    # -- Calls: what comes in is untrusted -------------------------------------------------------------------------

    async def _answer(self, call: IncomingCall) -> Message:
        """Handles one call. Raises RemoteErrors only, for the caller to see; anything else is a mistake of ours."""
        try:
            if call.method == messages.FORWARD:
                return await self._forward(call)
            if call.method == messages.BACKWARD:
                return await self._backward(call)
            if call.method == messages.INFO:
                return self._info(call)
        except ProtocolError as error:
            raise RemoteError(f"malformed {call.method}: {error}") from None
        raise UnknownMethod(f"experts do not answer {call.method!r}")

    def _info(self, call: IncomingCall) -> Message:
        request = messages.decode(messages.InfoRequest, call.body)
        backend = self._backend(request.uid)
        info = messages.ExpertInfo(
            uid=request.uid,
            args_schema=wire.encode_schema(backend.args_schema),
            kwargs_schema=wire.encode_schema(backend.kwargs_schema),
            outputs_schema=wire.encode_schema(backend.outputs_schema),
            max_batch_size=backend.max_batch_size,
            version=backend.version,
            codecs=list(compression.CODECS),
        )
        return Message(messages.encode(info))

    async def _forward(self, call: IncomingCall) -> Message:
        request = messages.decode(messages.ForwardRequest, call.body)
        backend = self._backend(request.uid)
        codec = _check_codec(request.reply_codec)
        inputs = _check_inputs(request.uid, backend, wire.unpack_tensors(request.tensors, call.buffers))
        if inputs[0].shape[0] == 0:
            answer = Answer(
                [torch.empty(0, *spec.shape, dtype=spec.dtype) for spec in backend.output_specs], backend.version
            )
        else:
            answer = await self.runtime.forward(
                backend,
                inputs,
                training=request.training,
                deadline=call.deadline,
                priority=_priority(call),
                peer=call.peer_id,
            )
        metas, buffers = wire.pack_tensors(answer.tensors, codec)
        return Message(messages.encode(messages.ForwardReply(metas, answer.version)), tuple(buffers))

    async def _backward(self, call: IncomingCall) -> Message:
        request = messages.decode(messages.BackwardRequest, call.body)
        backend = self._backend(request.uid)
        codec = _check_codec(request.reply_codec)
        key = (request.uid, request.call_id)
        answer = self._answers.get(key)
        if answer is None:
            tensors = wire.unpack_tensors(request.tensors, call.buffers)
            inputs = _check_inputs(request.uid, backend, tensors[: request.num_inputs])
            gradients = _check_gradients(request.uid, backend, inputs, tensors[request.num_inputs :])
            answer = await self._apply_once(call, key, request, backend, inputs, gradients)
        metas, buffers = wire.pack_tensors(answer.tensors, codec)
        return Message(messages.encode(messages.BackwardReply(metas, answer.version)), tuple(buffers))

    async def _apply_once(
        self,
        call: IncomingCall,
        key: _CallKey,
        request: messages.BackwardRequest,
        backend: ExpertBackend,
        inputs: list[torch.Tensor],
        gradients: Gradients,
    ) -> Answer:
        """Applies a backward unless its call id was applied before; several callers of one id share its answer."""
        if inputs[0].shape[0] == 0:
            return Answer([_zero_gradient(x) for x in inputs], backend.version)
        backward = self._backwards.get(key)
        if backward is None:
            version = backend.applied.get(request.call_id)
            work = self.runtime.submit(
                backend,
                inputs,
                gradients,
                training=request.training,
                # applied before, and its gradients were forgotten: compute them again, but take no step
                call_id=request.call_id if version is None else None,
                deadline=call.deadline,
                priority=_priority(call),
                peer=call.peer_id,
            )
            backward = self._backwards[key] = _Backward(work, version)
            work.answer.add_done_callback(lambda _: self._end_backward(key))
        backward.num_waiting += 1
        try:
            answer = await asyncio.shield(backward.work.answer)
        finally:
            backward.num_waiting -= 1
            if not backward.num_waiting and not backward.work.answer.done():
                # nobody waits any more; once it runs its step stands, and whoever asks again gets its answer
                self.runtime.withdraw(backward.work)
        return answer if backward.version is None else Answer(answer.tensors, backward.version)

    def _end_backward(self, key: _CallKey) -> None:
        backward = self._backwards.pop(key)
        answer = backward.work.answer
        if not answer.cancelled() and answer.exception() is None:
            self._answers.put(key, answer.result())

    def _backend(self, uid: str) -> ExpertBackend:
        backend = self.experts.get(uid)
        if backend is None or self._closed:
            raise ExpertNotFound(f"this server does not host {uid!r}")
        return backend


@dataclass(slots=True)
class _Backward:
    """A backward under way, and how many callers wait for it."""

    work: Work
    version: int | None
    """The version that it led to when it was applied before; None if this is the first time."""
    num_waiting: int = 0


class _AnswerCache:
    """The latest answers by call id, within a byte budget."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._answers: OrderedDict[_CallKey, Answer] = OrderedDict()

    def get(self, key: _CallKey) -> Answer | None:
        return self._answers.get(key)

    def put(self, key: _CallKey, answer: Answer) -> None:
        if key in self._answers:
            return
        self._answers[key] = answer
        self._num_bytes += _num_bytes(answer)
        while self._num_bytes > self._max_bytes:
            _, old = self._answers.popitem(last=False)
            self._num_bytes -= _num_bytes(old)


def _num_bytes(answer: Answer) -> int:
    return sum(tensor.nbytes for tensor in answer.tensors if tensor is not None)


class _Save:
    """Writes one state: a callable for the helper thread."""

    def __init__(self, store: CheckpointStore, uid: str, state: dict[str, Any]) -> None:
        self.store, self.uid, self.state = store, uid, state

    def __call__(self) -> Path:
        return self.store.save(self.uid, self.state, version=self.state["version"])


def _priority(call: IncomingCall) -> int:
    """The call's priority within the few classes that a stranger may make the batcher keep."""
    return max(_LOWEST_PRIORITY, min(call.priority, _HIGHEST_PRIORITY))


def _check_codec(codec: str) -> str:
    if codec not in compression.CODECS:
        raise SchemaMismatch(f"codec {codec!r} is not known here; known: {', '.join(compression.CODECS)}")
    return codec


def _check_inputs(uid: str, backend: ExpertBackend, tensors: list[torch.Tensor | None]) -> list[torch.Tensor]:
    """The inputs of an untrusted call. Raises: SchemaMismatch (both schemas in the sentence)."""
    if len(tensors) != len(backend.input_specs):
        raise _mismatch(uid, backend.inputs_schema, tensors)
    try:
        structure = wire.unflatten(backend.inputs_schema, tensors)
        return wire.flatten_like(backend.inputs_schema, structure, what=uid)
    except TypeError:  # an absent tensor
        raise _mismatch(uid, backend.inputs_schema, tensors) from None


def _check_gradients(
    uid: str, backend: ExpertBackend, inputs: list[torch.Tensor], tensors: list[torch.Tensor | None]
) -> Gradients:
    """The output gradients of an untrusted call: each absent, or like the output. Raises: SchemaMismatch."""
    num_rows = inputs[0].shape[0]
    fits = len(tensors) == len(backend.output_specs) and all(
        tensor is None or (tensor.dtype == spec.dtype and tuple(tensor.shape) == (num_rows, *spec.shape))
        for tensor, spec in zip(tensors, backend.output_specs, strict=True)
    )
    if not fits:
        raise _mismatch(f"backward of {uid}, for {num_rows} rows,", backend.outputs_schema, tensors)
    return tensors


def _mismatch(what: str, schema: Any, tensors: Sequence[torch.Tensor | None]) -> SchemaMismatch:
    takes, got = wire.describe_schema(schema), wire.describe_structure(tuple(tensors))
    return SchemaMismatch(f"{what} takes {takes}; got {got}")


def _zero_gradient(x: torch.Tensor) -> torch.Tensor | None:
    return torch.zeros_like(x) if x.is_floating_point() or x.is_complex() else None
