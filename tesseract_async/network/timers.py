"""The timers of one node. Pure: times are handed in."""

import heapq
from collections.abc import Callable
from dataclasses import dataclass

TimerAction = Callable[[float], None]


@dataclass(slots=True, eq=False)
class Timer:
    """An action that is due at a time, unless it is canceled (None) before."""

    action: TimerAction | None


class Timers:
    """The timers of one node, in order of time; those of the same time in order of starting."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Timer]] = []
        self._num_started = 0

    def __len__(self) -> int:
        return sum(timer.action is not None for _, _, timer in self._heap)

    def start(self, at: float, action: TimerAction) -> Timer:
        """Call ``action(now)`` once `run` is called at `at` or later."""
        timer = Timer(action)
        self._num_started += 1
        heapq.heappush(self._heap, (at, self._num_started, timer))
        return timer

    def cancel(self, timer: Timer | None) -> None:
        """Forget a timer. Harmless where it has been run or canceled, or is None."""
        if timer is not None:
            timer.action = None

    def run(self, now: float) -> None:
        while self._heap and self._heap[0][0] <= now:
            timer = heapq.heappop(self._heap)[2]
            action, timer.action = timer.action, None
            if action is not None:
                action(now)

    def next_at(self) -> float:
        while self._heap and self._heap[0][2].action is None:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else float("inf")
