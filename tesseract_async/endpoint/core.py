"""What the two halves of a connection, its own calls and its peer's, have in common. No I/O."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from tesseract_async.endpoint.budget import NodeBudgets, Owner
from tesseract_async.endpoint.events import Event
from tesseract_async.endpoint.lanes import Lane
from tesseract_async.endpoint.liveness import Liveness
from tesseract_async.endpoint.settings import ProtocolSettings
from tesseract_async.endpoint.transfers import Transfers
from tesseract_async.endpoint.windows import Windows
from tesseract_async.errors import ProtocolError
from tesseract_async.wire import frames
from tesseract_async.wire.heads import Hello

MAX_IDLE_FRAMES: Final = 10_000
"""Frames that do nothing (pings, cancels of ended calls) which the peer may send in a burst ..."""
IDLE_FRAMES_PER_SECOND: Final = 5_000.0
"""... and how fast it may go on."""


@dataclass(slots=True)
class ConnectionCore:
    """Lanes, flow control, time and events of one connection."""

    peer: str
    """How errors name the other end."""
    theirs: Hello
    settings: ProtocolSettings
    budgets: NodeBudgets
    owner: Owner
    now: float
    lanes: Sequence[Lane]
    windows: Windows
    life: Liveness
    transfers: Transfers
    deadlines: Deadlines
    events: list[Event]
    arena: frames.Arena = field(default_factory=frames.Arena)
    _idle_frames: float = 0.0
    _idle_frames_at: float = 0.0

    def count_idle(self) -> None:
        """Counts a frame that does nothing: a few are normal. Raises: ProtocolError for a flood."""
        passed = self.now - self._idle_frames_at
        self._idle_frames_at = self.now
        self._idle_frames = max(0.0, self._idle_frames - passed * IDLE_FRAMES_PER_SECOND) + 1
        if self._idle_frames > MAX_IDLE_FRAMES:
            raise ProtocolError("the peer sends a flood of frames that do nothing")


class Deadlines:
    """When calls expire. Most end long before, so entries of ended calls are dropped from time to time."""

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
