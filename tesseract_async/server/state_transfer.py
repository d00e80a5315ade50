"""An expert's state over the network, in pieces: for followers and for exports.

The state travels as the file that a checkpoint would be (`server.checkpoint`): safetensors, with a checksum. It is
copied between two batches, so training goes on while it is sent, and a transfer that breaks off goes on where it
stopped, as long as the server still has that copy.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch

from tesseract_async.endpoint.endpoint import IncomingCall, Message
from tesseract_async.errors import CheckpointError, ConnectionLost, Overloaded, ProtocolError, describe
from tesseract_async.server import checkpoint
from tesseract_async.transport.base import PeerAddress
from tesseract_async.wire import messages

if TYPE_CHECKING:
    from tesseract_async.node import TesseractNode
    from tesseract_async.runtime.backend import ExpertBackend

logger = logging.getLogger(__name__)

NO_DIGEST: Final = bytes(16)


@dataclass(frozen=True, slots=True)
class TransferSettings:
    """How states are sent. Sizes are bytes, times seconds."""

    piece_bytes: int = 4 << 20
    """Of one reply."""
    max_state_bytes: int = 4 << 30
    """A longer file is not fetched."""
    max_cached_bytes: int = 1 << 30
    """Copies that a server keeps for transfers under way; beyond them, newcomers are told to come back."""
    keep: float = 60.0
    """A copy that nobody asked for since then is dropped."""
    reuse: float = 2.0
    """A copy so young is good enough for somebody who asks for the newest: ten followers cost one copy."""
    num_retries: int = 3
    """How often a piece is asked for again after the connection broke."""


@dataclass(slots=True)
class _Copy:
    version: int
    digest: bytes
    data: memoryview
    made: float
    used: float


class StateSource:
    """Answers ``expert.state`` calls for one server's experts. On the node's loop only."""

    def __init__(
        self,
        snapshot: Callable[[str], Awaitable[Mapping[str, Any]]],
        aside: Callable[[Callable[[], bytes]], Awaitable[bytes]],
        *,
        settings: TransferSettings = TransferSettings(),
    ) -> None:
        """`snapshot` copies an expert's state between two batches; `aside` runs work where it stops nobody."""
        self.settings = settings
        self._snapshot = snapshot
        self._aside = aside
        # the same state is sent whole and weights only: two files
        self._copies: dict[tuple[str, bool], _Copy] = {}
        self._making: dict[tuple[str, bool], asyncio.Lock] = {}
        self._sweep: asyncio.TimerHandle | None = None

    async def answer(self, uid: str, backend: ExpertBackend, call: IncomingCall) -> Message:
        """The next piece. Raises: ProtocolError for a malformed request; Overloaded if too much is being sent."""
        request = messages.decode(messages.StateRequest, call.body)
        if backend.version < request.min_version:
            return Message(messages.encode(messages.StateReply(backend.version, NO_DIGEST, 0, 0)))
        key = (uid, request.weights_only)
        lock = self._making.setdefault(key, asyncio.Lock())
        async with lock:  # callers who come together share one copy
            copy = self._copies.get(key)
            now = asyncio.get_running_loop().time()
            if copy is None or not self._good(copy, request, now):
                copy = self._copies[key] = await self._make(uid, request.weights_only)
            copy.used = now
        offset = request.offset if request.digest == copy.digest else 0
        piece = copy.data[offset : offset + self.settings.piece_bytes]
        reply = messages.StateReply(copy.version, copy.digest, len(copy.data), offset)
        return Message(messages.encode(reply), (piece,) if len(piece) else ())

    def drop(self, uid: str) -> None:
        """Forgets the copies of one expert: whoever asks next gets its state of that moment, to the last gradient."""
        for key in ((uid, True), (uid, False)):
            self._copies.pop(key, None)

    def close(self) -> None:
        """Drops every copy."""
        self._copies.clear()
        if self._sweep is not None:
            self._sweep.cancel()
            self._sweep = None

    def _good(self, copy: _Copy, request: messages.StateRequest, now: float) -> bool:
        if request.digest != NO_DIGEST:
            return copy.digest == request.digest
        return copy.version >= request.min_version and now - copy.made <= self.settings.reuse

    async def _make(self, uid: str, weights_only: bool) -> _Copy:
        held = sum(len(copy.data) for at, copy in self._copies.items() if at != (uid, weights_only))
        if held > self.settings.max_cached_bytes:
            raise Overloaded("too many experts' states are being sent already", retry_after=self.settings.keep / 4)
        state = await self._snapshot(uid)
        if weights_only:
            state = {"module": state["module"], "version": state["version"]}
        data = await self._aside(lambda: b"".join(checkpoint.encode(state)))
        now = asyncio.get_running_loop().time()
        if self._sweep is None:
            self._sweep = asyncio.get_running_loop().call_later(self.settings.keep, self._drop_unused)
        return _Copy(state["version"], _digest(data), memoryview(data), now, now)

    def _drop_unused(self) -> None:
        loop = asyncio.get_running_loop()
        self._sweep = None
        self._copies = {at: copy for at, copy in self._copies.items() if loop.time() - copy.used < self.settings.keep}
        self._making = {at: lock for at, lock in self._making.items() if at in self._copies or lock.locked()}
        if self._copies:
            self._sweep = loop.call_later(self.settings.keep, self._drop_unused)


async def fetch_state(
    node: TesseractNode,
    peer: PeerAddress,
    uid: str,
    *,
    weights_only: bool = False,
    min_version: int = 0,
    timeout: float = 60.0,
    settings: TransferSettings = TransferSettings(),
) -> dict[str, Any] | None:
    """The expert's state at that server: `module`, `version`, and unless `weights_only` also `optimizer` and `applied`.

    None if the server has not reached `min_version`. `timeout` is for each piece. What comes back was written by a
    stranger: it is checked for its form, not for its worth.

    Raises: as `TesseractNode.call_expert`; ProtocolError for what is no state, or too long a one.
    """
    file = bytearray()
    digest = NO_DIGEST
    failures = 0
    while True:
        request = messages.StateRequest(uid, weights_only, min_version, digest, len(file))
        try:
            reply = await node.call_expert(
                peer, messages.STATE, messages.encode(request), timeout=timeout, idempotent=True
            )
        except ConnectionLost:
            failures += 1
            if failures > settings.num_retries:
                raise
            continue
        head = messages.decode(messages.StateReply, reply.body)
        if head.size == 0:
            return None
        if head.size > settings.max_state_bytes:
            raise ProtocolError(f"{uid}: a state of {head.size} bytes; at most {settings.max_state_bytes} are fetched")
        if head.digest != digest:
            # the server has a newer copy now, and the one before is gone
            failures += bool(file)
            if failures > settings.num_retries:
                raise ProtocolError(f"{uid}: the server changes its state faster than it sends it")
            file.clear()
            digest = head.digest
        if (
            head.offset != len(file)
            or len(reply.buffers) != 1
            or not 0 < len(reply.buffers[0]) <= head.size - len(file)
        ):
            raise ProtocolError(f"{uid}: a piece of its state that does not fit")
        file += reply.buffers[0]
        if len(file) == head.size:
            break
    if _digest(file) != digest:
        raise ProtocolError(f"{uid}: its state was damaged on the way")
    return check_state(uid, bytes(file), weights_only=weights_only)


def check_state(uid: str, data: bytes, *, weights_only: bool) -> dict[str, Any]:
    """The state in a stranger's file. Raises: ProtocolError."""
    try:
        state = checkpoint.decode(data)
    except (CheckpointError, RecursionError, IndexError, OverflowError) as error:
        raise ProtocolError(f"{uid}: its state cannot be read: {describe(error)}") from None
    module, version = state.get("module"), state.get("version")
    if type(version) is not int or not 0 <= version < 2**63:
        raise ProtocolError(f"{uid}: a state without a version")
    if not isinstance(module, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in module.items()
    ):
        raise ProtocolError(f"{uid}: a state without weights")
    if weights_only:
        return {"module": module, "version": version}
    optimizer, applied = state.get("optimizer"), state.get("applied")
    if not (optimizer is None or isinstance(optimizer, dict)) or not isinstance(applied, dict):
        raise ProtocolError(f"{uid}: a state without an optimizer's part")
    return state


def _digest(data: bytes | bytearray) -> bytes:
    return hashlib.sha256(data).digest()[:16]
