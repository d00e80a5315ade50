"""Answers ``expert.lockstep``: the one trainer of a server's experts has all of them step. Untrusted."""

import asyncio
import math
from collections.abc import Awaitable, Callable, Mapping
from functools import partial

from tesseract_async.endpoint.endpoint import IncomingCall, Message
from tesseract_async.errors import CheckpointError, NotAllowed, ProtocolError, RemoteError, describe
from tesseract_async.experts.manifest import split_uid
from tesseract_async.experts.trust import Trust
from tesseract_async.identity import PeerID
from tesseract_async.runtime import lockstep
from tesseract_async.runtime.backend import ExpertBackend
from tesseract_async.runtime.runtime import TesseractRuntime
from tesseract_async.server.answering import ExpertCalls
from tesseract_async.server.hosted import HostedState
from tesseract_async.wire import messages


class LockstepCalls:
    """Answers for all experts of one server whose gradients are only gathered. On the loop."""

    def __init__(
        self,
        hosted: Mapping[str, HostedState],
        calls: ExpertCalls,
        trust: Trust,
        save: Callable[[], Awaitable[object]] | None,
    ) -> None:
        """`hosted`: all that the server hosts. `save` writes their checkpoints; None: nowhere."""
        self._hosted, self._calls, self._trust, self._save = hosted, calls, trust, save
        self._stepped: dict[str, PeerID] = {}  # prefix -> who had its experts step last
        self._turn = asyncio.Lock()

    async def answer(self, hosted: HostedState, call: IncomingCall) -> Message:
        """Do what the request says. Raises only RemoteErrors, for the caller to see."""
        with self._calls.answering(call):
            request = messages.decode(messages.LockstepRequest, call.body)
            if not hosted.backend.settings.lockstep:
                if request.action == "status":
                    return Message(messages.encode(messages.LockstepReply(0, 0, 0.0)))
                raise RemoteError(f"{hosted.uid} steps by itself: serve it with --step lockstep")
            async with self._turn:
                try:
                    return Message(messages.encode(await self._do(hosted, request, call)))
                except (ValueError, CheckpointError) as error:
                    raise RemoteError(str(error)) from None

    async def _do(
        self, hosted: HostedState, request: messages.LockstepRequest, call: IncomingCall
    ) -> messages.LockstepReply:
        prefix, _ = split_uid(hosted.uid)
        alike = {
            uid: one
            for uid, one in self._hosted.items()
            if one.backend.settings.lockstep and one.is_primary and split_uid(uid)[0] == prefix
        }
        for uid, one in alike.items():
            if not self._trust.may_ask(call.peer_id, "train", uid):
                raise NotAllowed(f"{call.peer_id.short} may not train {uid}, which steps together with {hosted.uid}")
            self._calls.check_may_step(one)
        by_runtime: dict[TesseractRuntime, dict[str, ExpertBackend]] = {}
        for uid, one in alike.items():
            by_runtime.setdefault(one.runtime, {})[uid] = one.backend
        everybody = {uid: one.backend for uid, one in alike.items()}
        squared_norm = 0.0
        if request.action in ("status", "step"):
            for runtime, backends in by_runtime.items():
                squared_norm += await runtime.call(partial(lockstep.squared_norm, list(backends.values())))
        if request.action == "step":
            self._check_step(prefix, everybody, squared_norm, request, call.peer_id)
            squared_norm = 0.0
            if len(request.options) > 16 or not all(type(value) in (int, float) for value in request.options.values()):
                raise ProtocolError("options of a step are numbers")
            options = {name: float(value) for name, value in request.options.items()}
            for runtime, backends in by_runtime.items():
                try:
                    await runtime.call(partial(lockstep.step, backends, request.round, request.optimizer, options))
                except (ValueError, RemoteError):
                    raise
                except Exception as error:  # an optimizer may raise anything
                    raise RemoteError(f"an optimizer raised {describe(error)}: begin from a save point") from error
            self._stepped[prefix] = call.peer_id
        elif request.action == "clear":
            for runtime, backends in by_runtime.items():
                await runtime.call(partial(lockstep.clear, list(backends.values())))
        elif request.action == "save":
            if self._save is None:
                raise RemoteError("this server has no folder for checkpoints: start it with --checkpoint-dir")
            await self._save()
        elif request.action != "status":
            raise ProtocolError(f"no action {request.action!r}")
        return messages.LockstepReply(lockstep.round_of(everybody) if everybody else 0, len(everybody), squared_norm)

    def _check_step(
        self,
        prefix: str,
        backends: Mapping[str, ExpertBackend],
        squared_norm: float,
        request: messages.LockstepRequest,
        trainer: PeerID,
    ) -> None:
        """Raises: ValueError for a step that another trainer took, or on other gradients than this one knows of."""
        versions = {one.version for one in backends.values()}
        if versions == {request.round + 1} and self._stepped.get(prefix, trainer) != trainer:
            raise ValueError(
                f"another trainer had the experts of {prefix} take step {request.round}: lockstep is for one trainer"
            )
        if versions != {request.round}:
            return
        if not math.isfinite(squared_norm):
            raise ValueError("the gradients of this step are not finite")
        if request.num_experts and (
            request.num_experts != len(backends) or not math.isclose(request.squared_norm, squared_norm, rel_tol=1e-6)
        ):
            raise ValueError(
                f"the experts of {prefix} hold other gradients than after the backward: another trainer is at work, or "
                "a server began anew. Forget the gradients (zero_grad) and run the backward again; if other servers "
                "have taken this step, begin from a save point"
            )
