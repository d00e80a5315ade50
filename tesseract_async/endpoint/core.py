"""State that the two halves of a connection (outgoing and incoming calls) share. No I/O."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from typing import Final

from tesseract_async.endpoint.bounds import ConnectionBounds
from tesseract_async.endpoint.budget import NodeBudgets, Owner, Reservation
from tesseract_async.endpoint.events import Event
from tesseract_async.endpoint.lanes import MAIN, Lane, Sending
from tesseract_async.endpoint.liveness import Liveness
from tesseract_async.endpoint.windows import Windows
from tesseract_async.errors import MessageTooLarge, ProtocolError
from tesseract_async.transport.token_bucket import TokenBucket
from tesseract_async.wire import frames
from tesseract_async.wire.heads import Hello

PROGRESS_BYTES: Final = 4096
"""Bytes that must come of a half-received message for it to count as moving: a byte now and then holds nothing open."""
MAX_IDLE_FRAMES: Final = 10_000
"""Frames that do nothing (pings, cancels of ended calls) which the peer may send in a burst ..."""
IDLE_FRAMES_PER_SECOND: Final = 5_000.0
"""... and how fast it may go on."""


class ConnectionCore:
    """Lanes, flow control, time, events and calls of one connection."""

    def __init__(
        self,
        peer: str,
        theirs: Hello,
        lanes: Sequence[Lane],
        *,
        bounds: ConnectionBounds,
        budgets: NodeBudgets,
        owner: Owner,
        now: float,
        outgoing: Mapping[int, CallState],
        incoming: Mapping[int, CallState],
    ) -> None:
        self.peer = peer
        """The other end's name in errors."""
        self.theirs = theirs
        self.lanes = lanes
        self.bounds = bounds
        self.budgets = budgets
        self.owner = owner
        self.now = now
        self.outgoing = outgoing
        self.incoming = incoming
        self.life = Liveness(peer, lanes, bounds=bounds, now=now)
        self.windows = Windows(budgets.messages, owner, bounds.window_bytes, put=lanes[MAIN].put, now=now)
        self.deadlines = Deadlines(outgoing, incoming)
        self.events: list[Event] = []
        self.arena = frames.Arena()
        self._idle_frames = TokenBucket(IDLE_FRAMES_PER_SECOND, burst=MAX_IDLE_FRAMES, now=now)

    def count_idle(self) -> None:
        """Counts a frame that does nothing: a few are normal. Raises: ProtocolError for a flood."""
        if not self._idle_frames.spend(1, self.now):
            raise ProtocolError("the peer sends a flood of frames that do nothing")


class CallState:
    """The large messages of one call, one each way at a time. Most calls have none: defaults are the class's."""

    grant_kind = 0
    """Kind of the frame that lets the peer send."""
    lane = MAIN
    """The lane of its request, or of its reply if it was received here."""
    on_bulk = False
    """True if request or reply travel on the bulk lane."""
    sending: Sending | None = None
    announced: Announced | None = None
    """A message that waits for room."""
    room: Reservation | None = None
    """Room of the message that comes in, from its BEGIN on."""
    arrival: Arrival | None = None
    window_bytes = 0
    """Bytes of the flow-control window that it uses."""

    def __init__(self, stream: int) -> None:
        self.stream = stream

    @property
    def given_up(self) -> bool:
        """True if its room was taken back, which its holder has not been told yet."""
        return self.room is not None and self.room.released


class Announced:
    """The sizes of a large message, and why its sender may send it."""

    __slots__ = ("head_bytes", "sizes", "size", "room", "more", "lane")

    def __init__(self, payload: memoryview, flags: int, lane: int, *, max_message: int) -> None:
        """Reads a BEGIN frame. Raises: ProtocolError."""
        self.head_bytes, self.sizes, read = frames.decode_table(payload)
        self.size = frames.message_bytes(self.head_bytes, self.sizes)
        """Encoded bytes."""
        if read != len(payload) or self.size <= frames.MAX_SMALL:
            raise ProtocolError("malformed BEGIN")
        if self.size > max_message:
            raise MessageTooLarge(self.size, max_message)
        self.more = bool(flags & frames.MORE)
        self.room = flags & ~frames.MORE
        self.lane = lane


class Arrival:
    """A large message on its way in, and when the last of it came. Bytes of an unfinished chunk count, too."""

    __slots__ = ("assembly", "size", "lane", "progress", "begun", "granted_at", "_left", "_passed")

    def __init__(self, assembly: frames.Assembly, lane: Lane, now: float, *, granted: bool) -> None:
        self.assembly = assembly
        self.size = assembly.left
        self.lane = lane
        self.progress = now
        self.begun = now
        self.granted_at = now if granted else None
        """Time at which its GRANT was sent, until something came or the GRANT is known to have arrived."""
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


class Deadlines:
    """The deadlines of calls. Most calls end long before, so entries of ended ones are dropped from time to time."""

    def __init__(self, outgoing: Mapping[int, object], incoming: Mapping[int, object]) -> None:
        self._calls = (incoming, outgoing)
        self._heap: list[tuple[float, int, bool]] = []  # time, stream, whether the call is our own

    def push(self, deadline: float, stream: int, *, own: bool) -> None:
        """Adds a call that is under way."""
        heapq.heappush(self._heap, (deadline, stream, own))
        if len(self._heap) > 64 and len(self._heap) > 4 * sum(map(len, self._calls)):
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
