"""What a connection remembers of each call under way, its own and its peer's, and when they end by themselves."""

from __future__ import annotations

import heapq
from collections.abc import Container, Sequence
from typing import Final

from tesseract_async.endpoint.budget import Reservation
from tesseract_async.endpoint.lanes import MAIN, Lane, Sending
from tesseract_async.wire import frames
from tesseract_async.wire.calls import RequestHead

MAX_OVERTAKING: Final = 64 * 2**20
"""Bytes of other messages that may pass a half-received one."""
PROGRESS_BYTES: Final = 4096
"""What must come of a half-received message until it counts as moving: a byte now and then holds nothing open."""
BUFFER_BYTES: Final = 256
"""What a large message costs for each buffer after its first: a thousand empty ones take 270 KB."""
GRACE: Final = 60.0
LEAST_RATE: Final = 4096
"""A message may take `GRACE` seconds, and one more for each `LEAST_RATE` of its bytes."""


class Arrival:
    """A large message on its way in, and when the last of it came. Parts of chunks count, too."""

    __slots__ = ("assembly", "size", "room", "lane", "progress", "begun", "granted_at", "_left", "_passed")

    def __init__(self, assembly: frames.Assembly, room: Reservation, lane: Lane, now: float, *, granted: bool) -> None:
        self.assembly = assembly
        self.size = assembly.left
        self.room = room
        self.lane = lane
        self.progress = now
        self.begun = now
        self.granted_at = now if granted else None
        """When its GRANT was sent, until something came or it is known to have arrived."""
        self._left = assembly.left
        self._passed = lane.bytes_received

    def look(self, now: float) -> None:
        """Notes whether enough came since the last look."""
        came = self._left - self.assembly.left
        if came:
            self.granted_at = None
        if came >= PROGRESS_BYTES:
            self._left = self.assembly.left
            self._passed = self.lane.bytes_received
            self.progress = now

    @property
    def overtaken(self) -> int:
        """Bytes that its lane brought since then."""
        return self.lane.bytes_received - self._passed

    def fill(self, length: int) -> bool:
        """`length` more bytes are about to come. False if there is no room for them."""
        return self.room.fill(self.size - self.assembly.left + length)

    def give_up(self) -> None:
        """What still comes is skipped, and its memory is let go at once."""
        self.lane.reader.forget(self.assembly)


def find_stalled(
    arrivals: Sequence[Arrival], *, now: float, stall_after: float, confirmed: float
) -> tuple[set[Arrival], bool]:
    """Those to which nothing came for `stall_after` seconds although it was their turn, or which take far too long.

    `confirmed`: what was sent before has arrived. On a slow way a GRANT may be under way for long, and time counts from
    its arrival only; the second result is true if one may still be: then the peer should be pinged.

    Messages take turns on a lane, so on a slow one a message may rest for long while others move: it has stalled when
    all on its lane rest, or after `MAX_OVERTAKING` bytes.
    """
    moved: dict[int, float] = {}
    unconfirmed = False
    for arrival in arrivals:
        arrival.look(now)
        if arrival.granted_at is not None:
            arrival.progress = arrival.begun = now
            if confirmed > arrival.granted_at:
                arrival.granted_at = None
            else:
                unconfirmed = True
        index = arrival.lane.index
        moved[index] = max(moved.get(index, arrival.progress), arrival.progress)
    stalled = {
        arrival
        for arrival in arrivals
        if now - arrival.begun > GRACE + arrival.size / LEAST_RATE
        or (
            now - arrival.progress > stall_after
            and (now - moved[arrival.lane.index] > stall_after or arrival.overtaken > MAX_OVERTAKING)
        )
    }
    return stalled, unconfirmed


class Outgoing:
    """An own call under way."""

    # defaults of the class: a small call sets few of them
    lane = MAIN
    small = 0
    """Bytes counted against the peer's max_small."""
    room = 0
    """Bytes that the reply may have without asking."""
    sending: Sending | None = None
    arrival: Arrival | None = None
    held: Reservation | None = None
    """What a large reply counts, from its BEGIN on."""
    standing = 0
    """Bytes of the standing window that the reply uses."""
    on_bulk = False
    """Whether request or reply travel there."""
    sent = False

    def __init__(self, head: RequestHead, buffers: tuple[memoryview, ...], sizes: list[int], deadline: float) -> None:
        self.head = head
        self.buffers = buffers
        self.sizes = sizes
        self.deadline = deadline


class Incoming:
    """A call that the peer made."""

    # defaults of the class, as above
    on_bulk = False
    delivered = False
    """Whether the handler has it; its body is the handler's alone."""
    priority = 0
    reply_room = 0
    max_reply = 0
    held: Reservation | None = None
    """What a large request counts, from its BEGIN to its answer."""
    standing = 0
    arrival: Arrival | None = None
    sending: Sending | None = None
    small = 0
    cost = 0
    """Bytes counted for a small request: see `small_calls`."""
    reply_held: Reservation | None = None
    """While a large reply waits to be taken ..."""
    reply_size = 0
    reply_since = 0.0
    """... of so many bytes, since then."""
    metered = False
    """Whether it counts against the peer's quota."""

    def __init__(self, lane: int) -> None:
        self.lane = lane


class Deadlines:
    """When calls expire. Most end long before, so entries of ended calls are dropped from time to time."""

    def __init__(self, outgoing: Container[int], incoming: Container[int]) -> None:
        self._calls = (incoming, outgoing)
        self._heap: list[tuple[float, int, bool]] = []  # time, stream, whether the call is our own

    def push(self, deadline: float, stream: int, *, own: bool, num_calls: int) -> None:
        """Adds a call; `num_calls` are under way."""
        heapq.heappush(self._heap, (deadline, stream, own))
        if len(self._heap) > 64 and len(self._heap) > 4 * num_calls:
            self._heap = [entry for entry in self._heap if entry[1] in self._calls[entry[2]]]
            heapq.heapify(self._heap)

    def __len__(self) -> int:
        return len(self._heap)

    @property
    def first(self) -> float:
        """The next deadline, maybe of a call that has ended; infinity if there is none."""
        return self._heap[0][0] if self._heap else float("inf")

    def pop(self) -> tuple[int, bool]:
        """The stream of the next call, and whether it is our own."""
        _, stream, own = heapq.heappop(self._heap)
        return stream, own
