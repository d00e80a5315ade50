"""For how long the loop stood still: time in which nobody could have been heard, and which counts against nobody."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Final

PERIOD: Final = 0.05
"""Seconds between looks: a stall shorter than this may go unseen."""


class Stalls:
    """The stalls of one event loop, counted while somebody watches."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._num_watching = 0
        self._due = 0.0
        self._timer: asyncio.TimerHandle | None = None

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Within it, `seconds` counts."""
        self._num_watching += 1
        if self._timer is None:
            self._arm()
        try:
            yield
        finally:
            self._num_watching -= 1
            if not self._num_watching and self._timer is not None:
                self._seconds = self.seconds
                self._timer.cancel()
                self._timer = None

    @property
    def seconds(self) -> float:
        """All stalls so far, the present one included: their sum grows while the loop stands still."""
        if self._timer is None:
            return self._seconds
        return self._seconds + max(0.0, asyncio.get_running_loop().time() - self._due)

    def _arm(self) -> None:
        loop = asyncio.get_running_loop()
        self._due = loop.time() + PERIOD
        self._timer = loop.call_at(self._due, self._look)

    def _look(self) -> None:
        self._seconds = self.seconds
        self._arm()
