"""What a connection remembers of each call under way, its own and its peer's, and when they end by themselves."""

from __future__ import annotations

import heapq
from collections.abc import Container

from tesseract_async.endpoint.budget import Reservation
from tesseract_async.endpoint.lanes import MAIN, Sending
from tesseract_async.wire import frames
from tesseract_async.wire.calls import RequestHead


class Outgoing:
    """An own call under way."""

    __slots__ = (
        *("head", "buffers", "sizes", "on_bulk", "deadline", "lane", "small", "room", "sending", "assembly"),
        *("reply_held", "standing", "sent"),
    )

    def __init__(self, head: RequestHead, buffers: tuple[memoryview, ...], sizes: list[int], deadline: float) -> None:
        self.head = head
        self.buffers = buffers
        self.sizes = sizes
        self.deadline = deadline
        self.lane = MAIN
        self.small = 0  # bytes counted against the peer's max_small
        self.room: Reservation | None = None  # reserved before the request went out
        self.sending: Sending | None = None
        self.assembly: frames.Assembly | None = None
        self.reply_held: Reservation | None = None  # reserved when the reply asked
        self.standing = 0  # bytes of the standing window that the reply uses
        self.on_bulk = False  # whether request or reply travel there
        self.sent = False


class Incoming:
    """A call that the peer made."""

    __slots__ = ("on_bulk", "lane", "head", "held", "standing", "assembly", "progress", "sending", "small", "metered")

    def __init__(self, lane: int, now: float) -> None:
        self.lane = lane
        self.on_bulk = False
        self.head: RequestHead | None = None
        self.held: Reservation | None = None
        self.standing = 0
        self.assembly: frames.Assembly | None = None
        self.progress = now
        self.sending: Sending | None = None
        self.small = 0
        self.metered = False  # whether it counts against the peer's quota


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
