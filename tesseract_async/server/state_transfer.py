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
from typing import Final, Protocol

from tesseract_async.endpoint.endpoint import IncomingCall, Message
from tesseract_async.errors import Overloaded, ProtocolError, RemoteError, describe
from tesseract_async.experts.merkle import leaves_of, root_from
from tesseract_async.experts.pieces import LIST, PIECE_BYTES
from tesseract_async.files import write_whole
from tesseract_async.identity import PeerID
from tesseract_async.runtime.states import StateDict
from tesseract_async.server.checkpoint import EncodedState, check_state, encode_state
from tesseract_async.server.fetching import Aside
from tesseract_async.server.state_files import SealedFile
from tesseract_async.sharing.fragment import KEPT_UPDATES, LAST, NEWCOMERS
from tesseract_async.transport.throttle import Leftover, Throttle
from tesseract_async.wire import messages

MAX_COPIES_BYTES: Final = 1 << 30
MAX_RATE: Final = 16 << 20
"""Bytes of states per second that a server sends at most: sending so much takes a twentieth of a core."""
MAX_WAITING: Final = 64
"""Pieces that wait to be sent to one peer."""
MAX_POINTS: Final = 2
"""Peers whose save points of one expert are kept at a time: the disk is the server's."""
MAX_POINTS_A_MINUTE: Final = 8
"""... and how many of one expert a peer has written: each is a copy, a hash and a file."""
POINT_SECONDS: Final = 1800.0
"""A save point that nobody asked for since then is deleted: a peer fetches a server's experts one after the other."""
KEEP_SECONDS: Final = 60.0
"""A copy that nobody asked for since then is dropped."""
REUSE_SECONDS: Final = 2.0
"""A copy so young is good enough for somebody who asks for the newest: ten followers cost one copy."""


class StateOwner(Protocol):
    """The owner of an expert's state: a hosted expert, or a file of it."""

    @property
    def uid(self) -> str: ...

    @property
    def version(self) -> int: ...

    async def snapshot(self) -> StateDict: ...

    def structure(self) -> StateDict | None:
        """Return how its module is built (`runtime.structure`), as far as it is known."""


@dataclass(frozen=True, slots=True)
class SealedState:
    """An expert that is here as a sealed file alone: a `StateOwner` for those who only hold it."""

    uid: str
    version: int
    file: SealedFile
    aside: Aside

    async def snapshot(self) -> StateDict:
        """Return the state. Raises: ProtocolError if its primary sealed something else; OSError."""
        state: StateDict = await self.aside(lambda: check_state(self.uid, self.file.map()))
        return state

    def structure(self) -> None:
        """Not known from a file."""


@dataclass(slots=True)
class _Copy:
    version: int
    root: bytes
    leaves: Sequence[bytes]
    file: EncodedState | SealedFile
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
        aside: Aside,
        *,
        max_bytes: int = MAX_COPIES_BYTES,
        reuse: float = REUSE_SECONDS,
        throttle: Throttle | None = None,
        points_dir: Path | None = None,
    ) -> None:
        """`aside` runs work where it stops nobody. `max_bytes`: of copies that are kept; beyond it, newcomers are told
        to come back. `throttle`: the node's, of whose upload rate states get what other traffic leaves. `points_dir`:
        where states at save points are written; None: where temporary files are.
        """
        self._leftover = Leftover(MAX_RATE, throttle)
        self._turn = asyncio.Lock()
        self._waiting: Counter[PeerID] = Counter()
        self.max_bytes, self.reuse = max_bytes, reuse
        self._aside, self._points_dir = aside, points_dir
        self.find_sealed: Callable[[str, bytes], SealedFile | None] = lambda uid, root: None
        """The sealed file of an expert of a run that has this root."""
        # the same state is sent whole and weights only: two files
        self._copies: dict[tuple[str, bool], _Copy] = {}
        self._making: dict[tuple[str, bool], asyncio.Lock] = {}
        self._sweep: asyncio.TimerHandle | None = None
        self._written: dict[tuple[tuple[str, bool], PeerID], list[float]] = {}
        self._points: dict[tuple[str, bool], dict[tuple[PeerID, bytes], _Copy]] = {}
        self._unlinking: asyncio.Task[None] | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def copy_of(self, uid: str) -> EncodedState | None:
        """Return the file that was sent last of the whole state, if it is still here."""
        copy = self._copies.get((uid, False))
        return copy.file if copy is not None and isinstance(copy.file, EncodedState) else None

    async def answer(self, owner: StateOwner, call: IncomingCall) -> Message:
        """Answer with a piece. Raises: ProtocolError for a malformed request; Overloaded for too many copies."""
        uid = owner.uid
        request = messages.decode(messages.StateRequest, call.body)
        # a whole state takes more leave than weights alone
        sealed = None if request.weights_only else self.find_sealed(uid, request.root)
        copy = None
        if sealed is None and request.point != messages.NO_POINT:
            copy = await self._find_point(owner, request, call.peer_id)
        elif sealed is None:
            copy = await self._find_copy(owner, request)
        file = sealed or copy
        nothing = Message(messages.encode(messages.StateReply(owner.version, messages.NO_ROOT, 0, request.piece)))
        if file is None:
            return nothing
        await self._take_turn(call.peer_id, min(PIECE_BYTES, file.size))
        version = owner.version if copy is None else copy.version
        if copy is not None and isinstance(copy.file, EncodedState) and not copy.file.is_spread:
            return _piece(version, copy, request.piece)
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

    async def _find_copy(self, owner: StateOwner, request: messages.StateRequest) -> _Copy | None:
        key, now = (owner.uid, request.weights_only), asyncio.get_running_loop().time()
        if request.root == messages.NO_ROOT:
            if owner.version < request.min_version:
                return None
            lock = self._making.setdefault(key, asyncio.Lock())
            async with lock:  # callers that come together share one copy
                copy = self._copies.get(key)
                if copy is None or copy.version < request.min_version or now - copy.made > self.reuse:
                    copy = await self._make(owner, request.weights_only)
                    if self._making.get(key) is lock:  # `drop` did not come meanwhile
                        self._copies[key] = copy
        else:
            copy = self._copies.get(key)
        if copy is None or request.root not in (messages.NO_ROOT, copy.root):
            return None
        copy.used = now
        return copy

    async def _find_point(self, owner: StateOwner, request: messages.StateRequest, peer: PeerID) -> _Copy | None:
        """Return the state as it was when this peer asked first, from the disk. Of one peer the last is kept."""
        key, now = (owner.uid, request.weights_only), asyncio.get_running_loop().time()
        points, at = self._points.setdefault(key, {}), (peer, request.point)
        async with self._making.setdefault(key, asyncio.Lock()):
            copy = points.get(at)
            if copy is None:
                self._check_rate((key, peer), now)
                await self._drop_points(key, lambda other, old: other[0] == peer or now - old.used > POINT_SECONDS)
                if len(points) >= MAX_POINTS:
                    raise Overloaded(f"save points of {owner.uid} are being fetched already", retry_after=5.0)
                copy = points[at] = await self._write_point(owner, request, now)
                self._sweep_later()
        if request.root not in (messages.NO_ROOT, copy.root):
            return None
        copy.used = now
        return copy

    def _check_rate(self, who: tuple[tuple[str, bool], PeerID], now: float) -> None:
        """Raises: Overloaded for one more save point than a peer may have written."""
        self._written = {one: times for one, times in self._written.items() if times[-1] > now - 60.0}
        times = [at for at in self._written.get(who, ()) if at > now - 60.0]
        if len(times) >= MAX_POINTS_A_MINUTE:
            raise Overloaded("too many save points in a minute", retry_after=times[0] + 60.0 - now)
        self._written[who] = [*times, now]

    async def _write_point(self, owner: StateOwner, request: messages.StateRequest, now: float) -> _Copy:
        state, structure = await owner.snapshot(), owner.structure()
        if request.weights_only:
            state = _weights_of(state)
        if self._folder is None:
            for left in [] if self._points_dir is None else self._points_dir.glob(".points-*"):
                shutil.rmtree(left, ignore_errors=True)  # of a server that was killed
            self._folder = tempfile.TemporaryDirectory(prefix=".points-", dir=self._points_dir)
        path = Path(self._folder.name) / f"{os.urandom(16).hex()}.point"

        def write() -> SealedFile:
            file = encode_state({**state, "structure": structure})
            write_whole(path, file)
            leaves = leaves_of(file)
            return SealedFile(root_from(leaves, file.size), file.size, leaves, path)

        try:
            file: SealedFile = await self._aside(write)
        except OSError as error:
            raise RemoteError(f"{owner.uid} cannot be written here: {describe(error)}") from error
        return _Copy(state["version"], file.root, file.leaves, file, now, now)

    async def _drop_points(self, key: tuple[str, bool], is_old: Callable[[tuple[PeerID, bytes], _Copy], bool]) -> None:
        points = self._points[key]
        await self._unlink([points.pop(at) for at in [at for at, copy in points.items() if is_old(at, copy)]])

    async def _unlink(self, copies: Sequence[_Copy]) -> None:
        for copy in copies:
            if isinstance(copy.file, SealedFile):
                with contextlib.suppress(OSError):
                    await self._aside(partial(copy.file.path.unlink, missing_ok=True))

    def drop(self, uid: str) -> None:
        """Forget the copies of one expert, also those being made: the next caller gets its state of that moment, to
        the last gradient."""
        for key in ((uid, True), (uid, False)):
            self._copies.pop(key, None)
            self._making.pop(key, None)

    def close(self) -> None:
        self._copies.clear()
        self._points.clear()
        if self._folder is not None:
            self._folder.cleanup()
        for pending in (self._sweep, self._unlinking):
            if pending is not None:
                pending.cancel()
        self._sweep = self._unlinking = None

    async def _make(self, owner: StateOwner, weights_only: bool) -> _Copy:
        files = {at: copy.file for at, copy in self._copies.items() if at != (owner.uid, weights_only)}
        held = sum(file.num_held for file in files.values() if isinstance(file, EncodedState))
        if held > self.max_bytes:
            raise Overloaded("too many experts' states are being sent already", retry_after=KEEP_SECONDS / 4)
        state = await owner.snapshot()
        if weights_only:
            state = _weights_of(state)

        def write() -> tuple[EncodedState, list[bytes]]:
            file = encode_state(state)
            return file, leaves_of(file)

        file, leaves = await self._aside(write)
        now = asyncio.get_running_loop().time()
        self._sweep_later()
        return _Copy(state["version"], root_from(leaves, file.size), leaves, file, now, now)

    def _sweep_later(self) -> None:
        if self._sweep is None:
            self._sweep = asyncio.get_running_loop().call_later(KEEP_SECONDS, self._drop_unused)

    def _drop_unused(self) -> None:
        loop = asyncio.get_running_loop()
        self._sweep = None
        self._copies = {at: copy for at, copy in self._copies.items() if loop.time() - copy.used < KEEP_SECONDS}
        self._making = {at: lock for at, lock in self._making.items() if at in self._copies or lock.locked()}
        left = list[_Copy]()  # save points that were never fetched to the end, say
        for points in self._points.values():
            for at in [at for at, copy in points.items() if loop.time() - copy.used > POINT_SECONDS]:
                left.append(points.pop(at))
        if left:
            self._unlinking = loop.create_task(self._unlink(left), name="server: old save points")
        if self._copies or any(self._points.values()):
            self._sweep_later()


def _weights_of(state: StateDict) -> StateDict:
    module, version = state["module"], state["version"]
    if NEWCOMERS <= module.keys():  # two thirds of a fragment are for its hosts alone
        last = {LAST: module["updates"][version % KEPT_UPDATES]} if "momentum" in module else {}
        module = {name: module[name] for name in NEWCOMERS} | last
    return {"module": module, "version": version}


def _piece(version: int, file: SealedFile | _Copy, piece: int) -> Message:
    """Read one. Raises: ProtocolError if there is none of that number; OSError."""
    if piece > len(file.leaves) or (piece == 1 and len(file.leaves) == 1):
        raise ProtocolError(f"a file of {file.size} bytes has no piece {piece}")
    if piece == LIST and len(file.leaves) > 1:
        data: bytes | memoryview = b"".join(file.leaves)
    else:
        data = file.read(max(0, piece - 1) * PIECE_BYTES, PIECE_BYTES)
    return Message(messages.encode(messages.StateReply(version, file.root, file.size, piece)), (memoryview(data),))
