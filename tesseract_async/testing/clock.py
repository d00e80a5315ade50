"""Virtual time: actions happen in order, without waiting."""

import heapq
from collections.abc import Callable


class VirtualClock:
    """A clock that jumps from one scheduled action to the next.

    `now` is in seconds and starts at 0. Actions for the same moment happen in the order of scheduling.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self._queue: list[tuple[float, int, Callable[..., None], tuple[object, ...]]] = []
        self._num_scheduled = 0

    def call_at(self, at: float, action: Callable[..., None], *arguments: object) -> None:
        """Schedule ``action(*arguments)`` for the moment `at`; one in the past happens next."""
        self._num_scheduled += 1
        heapq.heappush(self._queue, (max(at, self.now), self._num_scheduled, action, arguments))

    def call_later(self, delay: float, action: Callable[..., None], *arguments: object) -> None:
        """Schedule ``action(*arguments)`` in `delay` seconds."""
        self.call_at(self.now + delay, action, *arguments)

    def step(self) -> bool:
        if not self._queue:
            return False
        self.now, _, action, arguments = heapq.heappop(self._queue)
        action(*arguments)
        return True

    def run(self, seconds: float) -> None:
        """Do all actions that are due within `seconds`, and end exactly then."""
        end = self.now + seconds
        while self._queue and self._queue[0][0] <= end:
            self.step()
        self.now = end

    def run_until(self, condition: Callable[[], bool], *, timeout: float) -> bool:
        """Run until the condition holds. Returns False if it does not within `timeout` seconds of this clock."""
        end = self.now + timeout
        while not condition():
            if not self._queue or self._queue[0][0] > end:
                self.now = end
                return False
            self.step()
        return True
