"""Files by the root of a hash tree over their pieces, proofs that a peer has one, and `PieceFetch`, a pure machine:
which piece to ask of which source, and when to ask another one."""

import hashlib
import math
from collections import deque
from collections.abc import Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, Generic, NamedTuple, Protocol, TypeVar

LEAF_BYTES: Final = 1 << 20
NUM_PROBES: Final = 16
PROBE_BYTES: Final = 4096


def leaf_of(data: bytes | bytearray | memoryview) -> bytes:
    """Return the hash of one leaf: `LEAF_BYTES` of a file, or its last bytes."""
    return _hash(b"\0", data)


def leaves_of(parts: Iterable[bytes | bytearray | memoryview]) -> list[bytes]:
    """Return the hashes of the leaves of a file that comes in parts of any length. A GB takes about 0.6 s of a core."""
    leaves, leaf, room = list[bytes](), hashlib.sha256(b"\0"), LEAF_BYTES
    for part in parts:
        view = memoryview(part).cast("B")
        while len(view):
            if not room:
                leaves.append(leaf.digest())
                leaf, room = hashlib.sha256(b"\0"), LEAF_BYTES
            leaf.update(view[:room])
            view, room = view[room:], room - min(room, len(view))
    return [*leaves, leaf.digest()]


def num_leaves(size: int) -> int:
    return max(1, -(-size // LEAF_BYTES))


def root_from(leaves: Sequence[bytes], size: int) -> bytes:
    """Return the 32 bytes that name a file, from the hashes of its leaves and its size.

    Leaves, inner nodes and the whole are hashed under different first bytes, and the whole with its size, so that no
    file passes for part of another. The tree is that of RFC 6962.
    """
    level = list(leaves)
    while len(level) > 1:
        pairs = [_hash(b"\1", left + right) for left, right in zip(level[::2], level[1::2], strict=False)]
        level = pairs + level[len(pairs) * 2 :]
    return _hash(b"\2", size.to_bytes(8, "big") + level[0])


def root_of(data: bytes | bytearray | memoryview) -> bytes:
    """Return the 32 bytes that name a file: `root_from` of its leaves."""
    return root_from(leaves_of([data]), len(memoryview(data).cast("B")))


class Readable(Protocol):
    size: int

    def read(self, offset: int, num_bytes: int) -> bytes | memoryview: ...


def possession(data: bytes | bytearray | memoryview | Readable, nonce: bytes) -> bytes:
    """Return the proof that this node has a file: a hash of the 16 pieces of 4 KiB that the asker's `nonce` chooses."""
    view = memoryview(data).cast("B") if isinstance(data, bytes | bytearray | memoryview) else data
    size = len(view) if isinstance(view, memoryview) else view.size
    proof = hashlib.sha256(b"tesseract possession 1\0" + nonce + size.to_bytes(8, "big"))
    for number in range(NUM_PROBES):
        draw = hashlib.sha256(nonce + bytes([number])).digest()
        start = int.from_bytes(draw[:8], "big") % max(1, size - PROBE_BYTES + 1)
        proof.update(
            view[start : start + PROBE_BYTES] if isinstance(view, memoryview) else view.read(start, PROBE_BYTES)
        )
    return proof.digest()


def _hash(kind: bytes, data: bytes | bytearray | memoryview) -> bytes:
    found = hashlib.sha256(kind)
    found.update(data)
    return found.digest()


PIECE_BYTES: Final = LEAF_BYTES
LIST: Final = 0
"""The piece that holds the hashes of the others."""
HASH_BYTES: Final = 32
AHEAD: Final = 1.0
"""Seconds of a source's work that it is asked for at a time, so that no round trip is waited for."""
MAX_AHEAD: Final = 16
"""Pieces that one source is asked for at a time, at most."""
MAX_UNDER_WAY: Final = 32
"""Pieces of one file that are asked for at a time: they bound its memory."""
PATIENCE: Final = 2.0
"""Seconds, or three times what a piece takes there, after which a silent source's pieces are asked of others, too."""
MAX_FAILURES: Final = 4
"""Failures in a row after which a source is left."""
RETRY_AFTER: Final = 0.5
"""Seconds after a first failure; it doubles with each."""
MEMORY: Final = 0.8
"""The weight of what was measured before, with each piece that arrives."""

Source = TypeVar("Source", bound=Hashable)


def piece_size(piece: int, size: int) -> int:
    count = num_leaves(size)
    if count == 1:
        return size
    return HASH_BYTES * count if piece == LIST else min(PIECE_BYTES, size - (piece - 1) * PIECE_BYTES)


class Ask(NamedTuple, Generic[Source]):
    """Ask this source for this piece; or, among those to withdraw, do so no more."""

    source: Source
    piece: int


@dataclass(slots=True)
class _Work:
    """One source, what it is asked for, and how fast it is."""

    busy: float
    """Seconds in which it had something to send, lately."""
    sent: float
    """The bytes that came in these."""
    asked: list[int] = field(default_factory=list)
    since: float = 0.0
    """The time at which its last piece came, or since which it has something to send."""
    num_failures: int = 0
    not_before: float = -math.inf

    @property
    def piece_time(self) -> float:
        """Seconds for one piece; 0 while nothing is known."""
        return PIECE_BYTES * self.busy / self.sent if self.sent else 0.0

    def late_at(self) -> float:
        return self.since + max(PATIENCE, 3 * self.piece_time) if self.asked else math.inf

    def has_room(self, now: float) -> bool:
        ahead = 2 if not self.sent else 1 + math.ceil(AHEAD / max(self.piece_time, AHEAD / MAX_AHEAD))
        return now >= self.not_before and now < self.late_at() and len(self.asked) < min(ahead, MAX_AHEAD)

    def rank(self, now: float) -> tuple[bool, float, int]:
        """Return a key that sorts sources by when their next piece would come, unknown ones last."""
        return not self.sent, self.due_at(len(self.asked), now), len(self.asked)

    def due_at(self, place: int, now: float) -> float:
        """Return the time at which the piece at this place of its queue is expected."""
        return max(now if not self.asked else self.since, now - self.piece_time) + (place + 1) * self.piece_time


class PieceFetch(Generic[Source]):
    """One file on its way from several sources. Times are seconds of any clock that is not set."""

    def __init__(self, root: bytes, size: int, *, silence: float) -> None:
        """A source that sends nothing for `silence` seconds is left."""
        self.root, self.size = root, size
        self.dropped: dict[Source, str] = {}
        """The sources that were left, and why."""
        self.leaves: Sequence[bytes] = ()
        """The hashes, once the list is here."""
        self.silence = silence
        self._sources: dict[Source, _Work] = {}
        self._wanted = deque([LIST])
        self._num_missing = 1

    @property
    def is_done(self) -> bool:
        return not self._num_missing

    @property
    def is_hopeless(self) -> bool:
        return not self._sources and not self.is_done

    def add(self, source: Source, *, rate: float = 0.0) -> None:
        """Take a source, and its bytes per second if something is known of them. One that was left stays so."""
        if source not in self.dropped:
            self._sources.setdefault(source, _Work(busy=1.0 if rate > 0 else 0.0, sent=rate))

    def is_right(self, piece: int, data: bytes | bytearray | memoryview) -> bool:
        """Return whether these untrusted bytes are that piece. Hashing takes a millisecond per MiB."""
        if len(data) != piece_size(piece, self.size):
            return False
        if num_leaves(self.size) == 1:
            return root_of(data) == self.root
        if piece == LIST:
            return root_from(split_list(data), self.size) == self.root
        return leaf_of(data) == self.leaves[piece - 1]

    def take_list(self, leaves: Sequence[bytes], had: Collection[int] = ()) -> None:
        """Take the hashes of the leaves, which are right, and which pieces are here already."""
        self.leaves = leaves
        self._wanted = deque(number for number in range(1, len(leaves) + 1) if number not in had)
        self._num_missing = len(self._wanted)

    def asks(self, now: float) -> list[Ask[Source]]:
        found: list[Ask[Source]] = []
        num_under_way = sum(len(work.asked) for work in self._sources.values())
        ready = {source: work for source, work in self._sources.items() if work.has_room(now)}
        while ready and num_under_way < MAX_UNDER_WAY:
            source = min(ready, key=lambda one: ready[one].rank(now))
            work = ready[source]
            piece = self._wanted.popleft() if self._wanted else self._again(work, now)
            if piece is None:
                del ready[source]
                continue
            if not work.asked:
                work.since = now
            work.asked.append(piece)
            num_under_way += 1
            found.append(Ask(source, piece))
            if not work.has_room(now):
                del ready[source]
        return found

    def _again(self, work: _Work, now: float) -> int | None:
        """Choose a piece under way elsewhere that this source would bring well before; None if there is none."""
        due: dict[int, float] = {}
        copies: dict[int, int] = {}
        for other in self._sources.values():
            is_late = now >= other.late_at()
            for place, piece in enumerate(other.asked):
                at = math.inf if is_late else other.due_at(place, now)
                due[piece] = min(due.get(piece, math.inf), at)
                copies[piece] = copies.get(piece, 0) + (not is_late)
        mine = work.due_at(len(work.asked), now)
        gain = [
            (at, -piece)
            for piece, at in due.items()
            if piece not in work.asked and copies[piece] < 2 and at - now > 2 * (mine - now)
        ]
        return -max(gain)[1] if gain else None

    def arrived(self, source: Source, piece: int, now: float) -> list[Ask[Source]]:
        """Take a right piece. Returns those that need not be sent any more."""
        work = self._sources.get(source)
        if work is not None and piece in work.asked:
            if piece != LIST:  # so short that it would measure round trips
                work.busy = MEMORY * work.busy + max(0.0, now - work.since)
                work.sent = MEMORY * work.sent + piece_size(piece, self.size)
            work.since, work.num_failures = now, 0
        is_new = piece in self._wanted
        if is_new:
            self._wanted.remove(piece)
        others: list[Ask[Source]] = []
        for one, work in list(self._sources.items()):
            if piece not in work.asked:
                continue
            is_new = True
            if one != source:
                others.append(Ask(one, piece))
                if now >= work.late_at():
                    self._count_failure(one, work, "others were faster", now)
            if piece in work.asked:
                work.asked.remove(piece)
        self._num_missing -= is_new
        return others

    def failed(self, source: Source, piece: int, reason: str, now: float, *, retry_after: float = 0.0) -> None:
        """Note that a question got no answer, and that the source may be asked again in this many seconds."""
        work = self._sources.get(source)
        if work is None or piece not in work.asked:
            return
        self._give_back(work, piece)
        self._count_failure(source, work, reason, now, retry_after)

    def _count_failure(self, source: Source, work: _Work, reason: str, now: float, retry_after: float = 0.0) -> None:
        if now >= work.not_before:  # those that fail together fail once
            work.num_failures += 1
            work.not_before = now + max(retry_after, RETRY_AFTER * 2 ** (work.num_failures - 1))
        if work.num_failures >= MAX_FAILURES:
            self.drop(source, reason)

    def drop(self, source: Source, reason: str) -> None:
        work = self._sources.pop(source, None)
        self.dropped.setdefault(source, reason)
        while work is not None and work.asked:
            self._give_back(work, work.asked[-1])

    def _give_back(self, work: _Work, piece: int) -> None:
        work.asked.remove(piece)
        if not any(piece in other.asked for other in self._sources.values()):
            self._wanted.appendleft(piece)

    def leave_silent(self, now: float) -> list[Source]:
        """Leave the sources that have sent nothing for too long, and return them."""
        gone = [one for one, work in self._sources.items() if work.asked and now >= work.since + self.silence]
        for source in gone:
            self.drop(source, "it stopped sending")
        return gone

    def wake_at(self, now: float) -> float:
        times = [math.inf]
        for work in self._sources.values():
            if work.asked:
                times += [at for at in (work.late_at(), work.since + self.silence) if at > now]
            if work.not_before > now:
                times.append(work.not_before)
        return min(times)


def split_list(data: bytes | bytearray | memoryview) -> list[bytes]:
    return [bytes(data[at : at + HASH_BYTES]) for at in range(0, len(data), HASH_BYTES)]
