"""Sends experts' states in pieces: to followers, holders and exports.

The state travels as the file that a checkpoint would be (`server.checkpoint`): safetensors, named by the root of its
hash tree. It is copied between two batches, so training goes on while it is sent; a sealed file is sent as it is.
"""

import asyncio
import contextlib
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from tesseract_async.endpoint.endpoint import IncomingCall, Message
from tesseract_async.errors import Overloaded, ProtocolError, RemoteError, describe
from tesseract_async.experts.pieces import LIST, PIECE_BYTES
from tesseract_async.files import write_whole
from tesseract_async.identity import PeerID
from tesseract_async.runtime.states import StateDict
from tesseract_async.server.checkpoint import EncodedState, check_state, encode_state
from tesseract_async.server.fetching import Aside
from tesseract_async.server.hosted import HostedState
from tesseract_async.server.state_files import SealedFile
from tesseract_async.sharing.fragment import KEPT_UPDATES, LAST, NEWCOMERS
from tesseract_async.transport.throttle import Leftover, Throttle
from tesseract_async.wire import messages

MAX_COPIES_BYTES: Final = 1 << 30
MAX_RATE: Final = 16 << 20
"""Bytes of states per second that a server sends at most: sending that much takes a twentieth of a core."""
MAX_WAITING: Final = 64
"""The most pieces that wait to be sent to one peer."""
MAX_POINTS: Final = 2
"""The most peers whose save points of one expert are kept at a time, since they lie on the server's disk."""
MAX_POINTS_A_MINUTE: Final = 8
"""Save points of one expert that a peer may have written in a minute: each is a copy, a hash and a file."""
POINT_SECONDS: Final = 1800.0
"""Seconds after which a save point that nobody asks for is deleted: a peer fetches a server's experts in turn."""
KEEP_SECONDS: Final = 60.0
"""Seconds after which a copy that nobody asks for is dropped."""
REUSE_SECONDS: Final = 2.0
"""A copy younger than this serves a peer that asks for the newest: ten followers cost one copy."""


@dataclass(frozen=True, slots=True)
class SealedState:
    """An expert that is here only as a sealed file, as it is at members that only hold it."""

    uid: str
    version: int
    file: SealedFile
    aside: Aside

    async def snapshot(self) -> StateDict:
        """Return the state. Raises: ProtocolError if its primary sealed something else; OSError."""
        state: StateDict = await self.aside(lambda: check_state(self.uid, self.file.map()))
        return state

    def structure(self) -> None:
        """Always None: a file does not tell the structure."""


StateOwner = HostedState | SealedState


@dataclass(slots=True)
class _Copy:
    version: int
    file: EncodedState | SealedFile
    made: float
    used: float


_At = tuple[str, bool, PeerID | None, bytes]
"""A copy's key: the expert, whether it is the weights only and, for a save point, the peer that asked for it and its
name."""


class StateSource:
    """Answers ``expert.state`` calls for one server's experts. On the node's loop only."""

    def __init__(
        self,
        aside: Aside,
        *,
        throttle: Throttle | None = None,
        points_dir: Path | None = None,
    ) -> None:
        """`aside` runs work where it holds up nothing else. `throttle`: the node's; states get what other traffic
        leaves of its upload rate. `points_dir`: where states at save points are written; None: where temporary files
        are.
        """
        self._leftover = Leftover(MAX_RATE, throttle)
        self._turn = asyncio.Lock()
        self._waiting: Counter[PeerID] = Counter()
        self.max_bytes, self.reuse = MAX_COPIES_BYTES, REUSE_SECONDS
        """Bytes of copies that are kept, beyond which newcomers are told to come back; seconds for which a copy counts
        as the newest."""
        self._aside, self._points_dir = aside, points_dir
        self.find_sealed: Callable[[str, bytes], SealedFile | None] = lambda uid, root: None
        """The sealed file of an expert of a run that has this root."""
        self._copies: dict[_At, _Copy] = {}
        self._making: dict[tuple[str, bool], asyncio.Lock] = {}
        self._sweep: asyncio.TimerHandle | None = None
        self._written: dict[tuple[str, bool, PeerID], list[float]] = {}  # times of the last save points
        self._unlinking: asyncio.Task[None] | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def copy_of(self, uid: str) -> EncodedState | None:
        """Return the file that was sent last of the whole state, if it is still here."""
        copy = self._copies.get((uid, False, None, messages.NO_POINT))
        return copy.file if copy is not None and isinstance(copy.file, EncodedState) else None

    async def answer(self, owner: StateOwner, call: IncomingCall) -> Message:
        """Answer with a piece. Raises: ProtocolError for a malformed request; Overloaded for too many copies."""
        request = messages.decode(messages.StateRequest, call.body)
        # a whole state takes more leave than weights alone
        sealed = None if request.weights_only else self.find_sealed(owner.uid, request.root)
        copy = None if sealed is not None else await self._find(owner, request, call.peer_id)
        file = sealed if copy is None else copy.file
        nothing = Message(messages.encode(messages.StateReply(owner.version, messages.NO_ROOT, 0, request.piece)))
        if file is None:
            return nothing
        await self._take_turn(call.peer_id, min(PIECE_BYTES, file.size))
        version = owner.version if copy is None else copy.version
        if isinstance(file, EncodedState) and not file.is_spread:
            return _piece(version, file, request.piece)
        try:
            reply: Message = await self._aside(lambda: _piece(version, file, request.piece))
        except FileNotFoundError:  # two newer ones were sealed meanwhile
            return nothing
        return reply

    async def _take_turn(self, peer: PeerID, num_bytes: int) -> None:
        """Wait until a piece holds up nothing more urgent. Raises: Overloaded if many of the peer's wait."""
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

    async def _find(self, owner: StateOwner, request: messages.StateRequest, peer: PeerID) -> _Copy | None:
        """Return the newest state, or the peer's save point: as it was when that peer asked for it first."""
        key, now = (owner.uid, request.weights_only), asyncio.get_running_loop().time()
        is_point = request.point != messages.NO_POINT
        at: _At = (*key, peer if is_point else None, request.point)
        copy = self._copies.get(at)
        if request.root == messages.NO_ROOT and not is_point and owner.version < request.min_version:
            return None
        if request.root == messages.NO_ROOT:
            lock = self._making.setdefault(key, asyncio.Lock())
            async with lock:  # callers that come together share one copy
                copy = self._copies.get(at)
                is_old = copy is not None and (copy.version < request.min_version or now - copy.made > self.reuse)
                if copy is None or (is_old and not is_point):
                    copy = await (self._make_point(owner, at, peer, now) if is_point else self._make(owner, at))
                    if is_point or self._making.get(key) is lock:  # `drop` did not come meanwhile
                        self._copies[at] = copy
        if copy is None or request.root not in (messages.NO_ROOT, copy.file.root):
            return None
        copy.used = now
        return copy

    async def _make_point(self, owner: StateOwner, at: _At, peer: PeerID, now: float) -> _Copy:
        """Write a save point. Of one peer the last is kept.

        Raises: Overloaded for one more than a peer may have written, or than are kept; RemoteError if it cannot be.
        """
        uid, weights_only, *_ = at
        who = uid, weights_only, peer
        self._written = {one: times for one, times in self._written.items() if times[-1] > now - 60.0}
        times = [one for one in self._written.get(who, ()) if one > now - 60.0]
        if len(times) >= MAX_POINTS_A_MINUTE:
            raise Overloaded("too many save points in a minute", retry_after=times[0] + 60.0 - now)
        self._written[who] = [*times, now]
        points = {one: copy for one, copy in self._copies.items() if one[:2] == at[:2] and one[2] is not None}
        old = [one for one, copy in points.items() if one[2] == peer or now - copy.used > POINT_SECONDS]
        await self._unlink([self._copies.pop(one) for one in old])
        if len(points) - len(old) >= MAX_POINTS:
            raise Overloaded(f"save points of {uid} are being fetched already", retry_after=5.0)
        if self._folder is None:
            for left in [] if self._points_dir is None else self._points_dir.glob(".points-*"):
                shutil.rmtree(left, ignore_errors=True)  # of a server that was killed
            self._folder = tempfile.TemporaryDirectory(prefix=".points-", dir=self._points_dir)
        try:
            return await self._make(owner, at, Path(self._folder.name) / f"{os.urandom(16).hex()}.point")
        except OSError as error:
            raise RemoteError(f"{uid} cannot be written here: {describe(error)}") from error

    async def _unlink(self, copies: Sequence[_Copy]) -> None:
        for copy in copies:
            if isinstance(copy.file, SealedFile):
                with contextlib.suppress(OSError):
                    await self._aside(partial(copy.file.path.unlink, missing_ok=True))

    def drop(self, uid: str) -> None:
        """Forget the copies of one expert, also those being made: the next caller gets its state of that moment, to
        the last gradient."""
        for key in ((uid, True), (uid, False)):
            self._copies.pop((*key, None, messages.NO_POINT), None)
            self._making.pop(key, None)

    def close(self) -> None:
        self._copies.clear()
        if self._folder is not None:
            self._folder.cleanup()
        for pending in (self._sweep, self._unlinking):
            if pending is not None:
                pending.cancel()
        self._sweep = self._unlinking = None

    async def _make(self, owner: StateOwner, at: _At, path: Path | None = None) -> _Copy:
        """Copy the state as it is now: into memory, or to `path`, with how its module is built.

        Raises: Overloaded if copies take too much memory; OSError.
        """
        files = [copy.file for other, copy in self._copies.items() if other != at]
        if path is None and sum(one.num_held for one in files if isinstance(one, EncodedState)) > self.max_bytes:
            raise Overloaded("too many experts' states are being sent already", retry_after=KEEP_SECONDS / 4)
        state = await owner.snapshot()
        if at[1]:
            state = _weights_of(state)
        if path is not None:
            state = {**state, "structure": owner.structure()}

        def write() -> EncodedState | SealedFile:
            file = encode_state(state)
            if path is not None:
                write_whole(path, file)
            root = file.root
            return file if path is None else SealedFile(root, file.size, file.leaves, path)

        file = await self._aside(write)
        now = asyncio.get_running_loop().time()
        self._sweep_later()
        return _Copy(state["version"], file, now, now)

    def _sweep_later(self) -> None:
        if self._sweep is None:
            self._sweep = asyncio.get_running_loop().call_later(KEEP_SECONDS, self._drop_unused)

    def _drop_unused(self) -> None:
        loop = asyncio.get_running_loop()
        self._sweep, now = None, loop.time()
        old = [
            at
            for at, copy in self._copies.items()
            if now - copy.used >= (KEEP_SECONDS if at[2] is None else POINT_SECONDS)
        ]
        if gone := [*map(self._copies.pop, old)]:  # save points that were never fetched to the end, say
            self._unlinking = loop.create_task(self._unlink(gone), name="server: old save points")
        self._making = {key: lock for key, lock in self._making.items() if lock.locked()}
        if self._copies:
            self._sweep_later()


def _weights_of(state: StateDict) -> StateDict:
    module, version = state["module"], state["version"]
    if NEWCOMERS <= module.keys():  # two thirds of a fragment are for its hosts alone
        last = {LAST: module["updates"][version % KEPT_UPDATES]} if "momentum" in module else {}
        module = {name: module[name] for name in NEWCOMERS} | last
    return {"module": module, "version": version}


def _piece(version: int, file: SealedFile | EncodedState, piece: int) -> Message:
    """Read one. Raises: ProtocolError if there is none of that number; OSError."""
    if piece > len(file.leaves) or (piece == 1 and len(file.leaves) == 1):
        raise ProtocolError(f"a file of {file.size} bytes has no piece {piece}")
    if piece == LIST and len(file.leaves) > 1:
        data: bytes | memoryview = b"".join(file.leaves)
    else:
        data = file.read(max(0, piece - 1) * PIECE_BYTES, PIECE_BYTES)
    return Message(messages.encode(messages.StateReply(version, file.root, file.size, piece)), (memoryview(data),))
