"""An expert's state over the network, in pieces: for followers and for exports.

The state travels as the file that a checkpoint would be (`server.checkpoint`): safetensors, with a checksum. It is
copied between two batches, so training goes on while it is sent, and a transfer that breaks off goes on where it
stopped, as long as the server still has that copy.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from tesseract_async.endpoint.endpoint import IncomingCall, Message
from tesseract_async.errors import ConnectionLost, Overloaded, ProtocolError
from tesseract_async.server.checkpoint import encode
from tesseract_async.server.state_files import SealedFile
from tesseract_async.transport.base import PeerAddress
from tesseract_async.wire import messages

if TYPE_CHECKING:
    from tesseract_async.node import TesseractNode
    from tesseract_async.server.hosted import HostedState

NO_DIGEST: Final = bytes(16)
PIECE_BYTES: Final = 4 << 20
"""The size of one reply: large enough that round trips cost little, small enough to be sent again."""
MIN_PIECE_BYTES: Final = 64 << 10
"""A source that sends less at a time, before the end, is left for another one."""
MIN_RATE: Final = 32 << 10
"""Bytes per second: a state that takes longer, and the time-out of a piece more, is left as well."""
MAX_STATE_BYTES: Final = 4 << 30
"""A longer file is not fetched."""
MAX_COPIES_BYTES: Final = 1 << 30
KEEP_SECONDS: Final = 60.0
"""A copy that nobody asked for since then is dropped."""
REUSE_SECONDS: Final = 2.0
"""A copy so young is good enough for somebody who asks for the newest: ten followers cost one copy."""
NUM_RETRIES: Final = 3
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
        aside: Callable[[Callable[[], bytes]], Awaitable[bytes]],
        *,
        max_bytes: int = MAX_COPIES_BYTES,
        piece_bytes: int = PIECE_BYTES,
        reuse: float = REUSE_SECONDS,
    ) -> None:
        """`aside` runs work where it stops nobody. `max_bytes`: of copies that are kept; beyond it, newcomers are told
        to come back.
        """
        self._max_bytes, self._piece_bytes, self._reuse = max_bytes, piece_bytes, reuse
        self._aside = aside
        self.find_sealed: Callable[[str, bytes], SealedFile | None] = lambda uid, digest: None
        """The sealed file of an expert of a run whose root begins so."""
        # the same state is sent whole and weights only: two files
        self._copies: dict[tuple[str, bool], _Copy] = {}
        self._making: dict[tuple[str, bool], asyncio.Lock] = {}
        self._sweep: asyncio.TimerHandle | None = None

    def copy_of(self, uid: str) -> memoryview | None:
        """Return the file that was sent last of the whole state, if it is still here."""
        copy = self._copies.get((uid, False))
        return None if copy is None else copy.data

    async def answer(self, hosted: HostedState, call: IncomingCall) -> Message:
        """Answer with the next piece. Raises: ProtocolError for a malformed request; Overloaded for too many copies."""
        uid, backend = hosted.uid, hosted.backend
        request = messages.decode(messages.StateRequest, call.body)
        # a whole state, which takes more leave than weights alone
        whole = not request.weights_only and request.digest != NO_DIGEST
        if whole and (sealed := self.find_sealed(uid, request.digest)) is not None:
            part = await self._aside(lambda: sealed.read(request.offset, self._piece_bytes))
            return _piece(backend.version, request.digest, sealed.size, request.offset, memoryview(part))
        if backend.version < request.min_version:
            return _piece(backend.version, NO_DIGEST, 0, 0, memoryview(b""))
        key = (uid, request.weights_only)
        lock = self._making.setdefault(key, asyncio.Lock())
        async with lock:  # callers that come together share one copy
            copy = self._copies.get(key)
            now = asyncio.get_running_loop().time()
            if copy is None or not self._good(copy, request, now):
                copy = self._copies[key] = await self._make(hosted, request.weights_only)
            copy.used = now
        offset = request.offset if request.digest == copy.digest else 0
        piece = copy.data[offset : offset + self._piece_bytes]
        return _piece(copy.version, copy.digest, len(copy.data), offset, piece)

    def drop(self, uid: str) -> None:
        """Forget the copies of one expert: the next caller gets its state of that moment, to the last gradient."""
        for key in ((uid, True), (uid, False)):
            self._copies.pop(key, None)

    def close(self) -> None:
        """Drop every copy."""
        self._copies.clear()
        if self._sweep is not None:
            self._sweep.cancel()
            self._sweep = None

    def _good(self, copy: _Copy, request: messages.StateRequest, now: float) -> bool:
        if request.digest != NO_DIGEST:
            return copy.digest == request.digest
        return copy.version >= request.min_version and now - copy.made <= self._reuse

    async def _make(self, hosted: HostedState, weights_only: bool) -> _Copy:
        held = sum(len(copy.data) for at, copy in self._copies.items() if at != (hosted.uid, weights_only))
        if held > self._max_bytes:
            raise Overloaded("too many experts' states are being sent already", retry_after=KEEP_SECONDS / 4)
        state = await hosted.snapshot()
        if weights_only:
            state = {"module": state["module"], "version": state["version"]}
        data = await self._aside(lambda: b"".join(encode(state)))
        now = asyncio.get_running_loop().time()
        if self._sweep is None:
            self._sweep = asyncio.get_running_loop().call_later(KEEP_SECONDS, self._drop_unused)
        return _Copy(state["version"], _digest(data), memoryview(data), now, now)

    def _drop_unused(self) -> None:
        loop = asyncio.get_running_loop()
        self._sweep = None
        self._copies = {at: copy for at, copy in self._copies.items() if loop.time() - copy.used < KEEP_SECONDS}
        self._making = {at: lock for at, lock in self._making.items() if at in self._copies or lock.locked()}
        if self._copies:
            self._sweep = loop.call_later(KEEP_SECONDS, self._drop_unused)


async def fetch_file(
    node: TesseractNode,
    peer: PeerAddress,
    uid: str,
    *,
    weights_only: bool = False,
    min_version: int = 0,
    root: bytes | None = None,
    max_bytes: int = MAX_STATE_BYTES,
    timeout: float = 60.0,
) -> bytes | None:
    """Return the file of an expert's state; with `root` the sealed one, whose root the caller checks.

    `timeout` is for each piece; the whole may take longer by its size at `MIN_RATE`. Raises: as
    `TesseractNode.call_expert`; ProtocolError for too long a file, or one that does not fit its digest; TimeoutError.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout
    file = bytearray()
    digest = NO_DIGEST if root is None else root[:16]
    started, failures = False, 0
    while True:
        request = messages.StateRequest(uid, weights_only, min_version, digest, len(file))
        try:
            left = min(timeout, deadline - loop.time())
            if left <= 0:
                raise TimeoutError(f"the state of {uid} comes too slowly: {len(file)} bytes so far")
            reply = await node.call_expert(
                peer, messages.STATE, messages.encode(request), timeout=left, idempotent=True
            )
        except ConnectionLost:
            failures += 1
            if failures > NUM_RETRIES:
                raise
            continue
        head = messages.decode(messages.StateReply, reply.body)
        if head.size == 0:
            return None
        if head.size > max_bytes:
            raise ProtocolError(f"{uid}: a state of {head.size} bytes; at most {max_bytes} are fetched")
        if not started:
            started = True
            deadline += head.size / MIN_RATE
        if head.digest != digest:
            if root is not None:
                raise ProtocolError(f"{uid}: the server does not have the file that was sealed")
            # the server has a newer copy now, and the one before is gone
            failures += bool(file)
            if failures > NUM_RETRIES:
                raise ProtocolError(f"{uid}: the server changes its state faster than it sends it")
            file.clear()
            digest = head.digest
        if (
            head.offset != len(file)
            or len(reply.buffers) != 1
            or not 0 < len(reply.buffers[0]) <= head.size - len(file)
            or len(reply.buffers[0]) < min(MIN_PIECE_BYTES, head.size - len(file))
        ):
            raise ProtocolError(f"{uid}: a piece of its state that does not fit")
        file += reply.buffers[0]
        if len(file) == head.size:
            break
    if root is None and _digest(file) != digest:
        raise ProtocolError(f"{uid}: its state was damaged on the way")
    return bytes(file)


def _piece(version: int, digest: bytes, size: int, offset: int, piece: memoryview) -> Message:
    head = messages.encode(messages.StateReply(version, digest, size, offset))
    return Message(head, (piece,) if len(piece) else ())


def _digest(data: bytes | bytearray) -> bytes:
    return hashlib.sha256(data).digest()[:16]
