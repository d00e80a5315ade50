"""Sends experts' states in pieces: to followers, holders and exports.

The state travels as the file that a checkpoint would be (`server.checkpoint`): safetensors, named by the root of its
hash tree. It is copied between two batches, so training goes on while it is sent; a sealed file is sent as it is.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from tesseract_async.endpoint.endpoint import IncomingCall, Message
from tesseract_async.errors import Overloaded, ProtocolError
from tesseract_async.experts.merkle import leaves_of, root_from
from tesseract_async.experts.pieces import LIST, PIECE_BYTES
from tesseract_async.identity import PeerID
from tesseract_async.runtime.states import StateDict
from tesseract_async.server.checkpoint import EncodedState, check_state, encode
from tesseract_async.server.state_files import SealedFile
from tesseract_async.transport.throttle import Leftover, Throttle
from tesseract_async.wire import messages

MAX_COPIES_BYTES: Final = 1 << 30
MAX_RATE: Final = 16 << 20
"""Bytes of states per second that a server sends at most: sending so much takes a twentieth of a core."""
MAX_WAITING: Final = 64
"""Pieces that wait to be sent to one peer."""
KEEP_SECONDS: Final = 60.0
"""A copy that nobody asked for since then is dropped."""
REUSE_SECONDS: Final = 2.0
"""A copy so young is good enough for somebody who asks for the newest: ten followers cost one copy."""


class StateOwner(Protocol):
    """What has an expert's state: a hosted expert, or a file of it."""

    @property
    def uid(self) -> str: ...

    @property
    def version(self) -> int: ...

    async def snapshot(self) -> StateDict: ...


@dataclass(frozen=True, slots=True)
class SealedState:
    """An expert that is here as a sealed file alone: a `StateOwner` for those who only hold it."""

    uid: str
    version: int
    file: SealedFile
    aside: Callable[[Callable[[], Any]], Awaitable[Any]]

    async def snapshot(self) -> StateDict:
        """Return the state. Raises: ProtocolError if its primary sealed something else; OSError."""
        state: StateDict = await self.aside(lambda: check_state(self.uid, self.file.map()))
        return state


@dataclass(slots=True)
class _Copy:
    version: int
    root: bytes
    leaves: Sequence[bytes]
    file: EncodedState
    made: float
    used: float

    @property
    def size(self) -> int:
        return self.file.size

    def read(self, offset: int, num_bytes: int) -> bytes | memoryview:
        return self.file.read(offset, num_bytes)


class StateSource:
    """Answers ``expert.state`` calls for one server's experts. On the node's loop only."""

    def __init__(
        self,
        aside: Callable[[Callable[[], Any]], Awaitable[Any]],
        *,
        max_bytes: int = MAX_COPIES_BYTES,
        reuse: float = REUSE_SECONDS,
        throttle: Throttle | None = None,
    ) -> None:
        """`aside` runs work where it stops nobody. `max_bytes`: of copies that are kept; beyond it, newcomers are told
        to come back. `throttle`: the node's, of whose upload rate states get what other traffic leaves.
        """
        self._leftover = Leftover(MAX_RATE, throttle)
        self._turn = asyncio.Lock()
        self._waiting: Counter[PeerID] = Counter()
        self._max_bytes, self._reuse = max_bytes, reuse
        self._aside = aside
        self.find_sealed: Callable[[str, bytes], SealedFile | None] = lambda uid, root: None
        """The sealed file of an expert of a run that has this root."""
        # the same state is sent whole and weights only: two files
        self._copies: dict[tuple[str, bool], _Copy] = {}
        self._making: dict[tuple[str, bool], asyncio.Lock] = {}
        self._sweep: asyncio.TimerHandle | None = None

    def copy_of(self, uid: str) -> EncodedState | None:
        """Return the file that was sent last of the whole state, if it is still here."""
        copy = self._copies.get((uid, False))
        return None if copy is None else copy.file

    async def answer(self, owner: StateOwner, call: IncomingCall) -> Message:
        """Answer with a piece. Raises: ProtocolError for a malformed request; Overloaded for too many copies."""
        uid = owner.uid
        request = messages.decode(messages.StateRequest, call.body)
        # a whole state takes more leave than weights alone
        sealed = None if request.weights_only else self.find_sealed(uid, request.root)
        copy = await self._find_copy(owner, request) if sealed is None else None
        file = sealed or copy
        if file is None:
            return Message(messages.encode(messages.StateReply(owner.version, messages.NO_ROOT, 0, request.piece)))
        await self._take_turn(call.peer_id, min(PIECE_BYTES, file.size))
        version = owner.version if copy is None else copy.version
        if copy is not None and not copy.file.is_spread:
            return _piece(version, copy, request.piece)
        reply: Message = await self._aside(lambda: _piece(version, file, request.piece))
        return reply

    async def _take_turn(self, peer: PeerID, num_bytes: int) -> None:
        """Wait until a piece may go out beside what is more urgent. Raises: Overloaded if many of the peer's wait."""
        if self._waiting[peer] >= MAX_WAITING:
            raise Overloaded("too many pieces of states wait to be sent to you", retry_after=1.0)
        self._waiting[peer] += 1
        try:
            async with self._turn:  # a request that gives up takes nothing
                await asyncio.sleep(self._leftover.take(num_bytes, asyncio.get_running_loop().time()))
        finally:
            self._waiting[peer] -= 1
            if not self._waiting[peer]:
                del self._waiting[peer]

    async def _find_copy(self, owner: StateOwner, request: messages.StateRequest) -> _Copy | None:
        key, now = (owner.uid, request.weights_only), asyncio.get_running_loop().time()
        if request.root == messages.NO_ROOT:
            if owner.version < request.min_version:
                return None
            lock = self._making.setdefault(key, asyncio.Lock())
            async with lock:  # callers that come together share one copy
                copy = self._copies.get(key)
                if copy is None or copy.version < request.min_version or now - copy.made > self._reuse:
                    copy = await self._make(owner, request.weights_only)
                    if self._making.get(key) is lock:  # `drop` did not come meanwhile
                        self._copies[key] = copy
        else:
            copy = self._copies.get(key)
        if copy is None or request.root not in (messages.NO_ROOT, copy.root):
            return None
        copy.used = now
        return copy

    def drop(self, uid: str) -> None:
        """Forget the copies of one expert, also those being made: the next caller gets its state of that moment, to
        the last gradient."""
        for key in ((uid, True), (uid, False)):
            self._copies.pop(key, None)
            self._making.pop(key, None)

    def close(self) -> None:
        """Drop every copy."""
        self._copies.clear()
        if self._sweep is not None:
            self._sweep.cancel()
            self._sweep = None

    async def _make(self, owner: StateOwner, weights_only: bool) -> _Copy:
        held = sum(copy.file.num_held for at, copy in self._copies.items() if at != (owner.uid, weights_only))
        if held > self._max_bytes:
            raise Overloaded("too many experts' states are being sent already", retry_after=KEEP_SECONDS / 4)
        state = await owner.snapshot()
        if weights_only:
            state = {"module": state["module"], "version": state["version"]}

        def write() -> tuple[EncodedState, list[bytes]]:
            file = encode(state)
            return file, leaves_of(file)

        file, leaves = await self._aside(write)
        now = asyncio.get_running_loop().time()
        if self._sweep is None:
            self._sweep = asyncio.get_running_loop().call_later(KEEP_SECONDS, self._drop_unused)
        return _Copy(state["version"], root_from(leaves, file.size), leaves, file, now, now)

    def _drop_unused(self) -> None:
        loop = asyncio.get_running_loop()
        self._sweep = None
        self._copies = {at: copy for at, copy in self._copies.items() if loop.time() - copy.used < KEEP_SECONDS}
        self._making = {at: lock for at, lock in self._making.items() if at in self._copies or lock.locked()}
        if self._copies:
            self._sweep = loop.call_later(KEEP_SECONDS, self._drop_unused)


def _piece(version: int, file: SealedFile | _Copy, piece: int) -> Message:
    """Read one. Raises: ProtocolError if there is none of that number; OSError."""
    if piece > len(file.leaves) or (piece == 1 and len(file.leaves) == 1):
        raise ProtocolError(f"a file of {file.size} bytes has no piece {piece}")
    if piece == LIST and len(file.leaves) > 1:
        data: bytes | memoryview = b"".join(file.leaves)
    else:
        data = file.read(max(0, piece - 1) * PIECE_BYTES, PIECE_BYTES)
    return Message(messages.encode(messages.StateReply(version, file.root, file.size, piece)), (memoryview(data),))
