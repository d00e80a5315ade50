"""The timers of one node. Pure: times are handed in."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass

Action = Callable[[float], None]

SLACK = 64
"""Canceled timers that may lie about before they are swept out."""


@dataclass(slots=True, eq=False)
class Timer:
    """An action that is due at a time, unless it is canceled (None) before."""

    action: Action | None


class Timers:
    """The timers of one node, in order of time; those of the same time in order of starting.

    Most are timeouts of requests that are answered. A canceled one lets go of its action at once: what hangs on it
    would else stay in memory until its time comes, and make the garbage collector look at everything there is.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Timer]] = []
        self._num_started = 0
        self._num_cancelled = 0

    def __len__(self) -> int:
        return len(self._heap) - self._num_cancelled

    def start(self, at: float, action: Action) -> Timer:
        """Call ``action(now)`` once `run` is called at `at` or later."""
        timer = Timer(action)
        self._num_started += 1
        heapq.heappush(self._heap, (at, self._num_started, timer))
        return timer

    def cancel(self, timer: Timer | None) -> None:
        """Forget a timer. Harmless where it has been run or canceled, or is None."""
        if timer is not None and timer.action is not None:
            timer.action = None
            self._num_cancelled += 1
            if self._num_cancelled > SLACK + len(self._heap) // 2:
                self._heap = [item for item in self._heap if item[2].action is not None]
                heapq.heapify(self._heap)
                self._num_cancelled = 0

    def run(self, now: float) -> None:
        while self._heap and self._heap[0][0] <= now:
            timer = heapq.heappop(self._heap)[2]
            action, timer.action = timer.action, None
            if action is None:
                self._num_cancelled -= 1
            else:
                action(now)

    def next_at(self) -> float:
        """Return when the next one is due; infinity if there is none."""
        while self._heap and self._heap[0][2].action is None:
            heapq.heappop(self._heap)
            self._num_cancelled -= 1
        return self._heap[0][0] if self._heap else float("inf")
