"""`asyncio.timeout_at` for what hardly ever times out: one timer for all calls of a node instead of one for each."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Final

PERIOD: Final = 0.25
"""Seconds between looks: a timeout strikes so much too late at most."""


class CoarseTimeouts:
    """The timeouts of the calls under way on one event loop."""

    def __init__(self) -> None:
        self._open: set[_Timeout] = set()
        self._looks_on: asyncio.AbstractEventLoop | None = None

    def timeout_at(self, deadline: float) -> _Timeout:
        """A context manager that cancels the task in it at `deadline` (the loop's time), `PERIOD` late at most."""
        return _Timeout(self, deadline)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        now = loop.time()
        for timeout in list(self._open):
            if timeout.deadline <= now:
                self._open.discard(timeout)
                timeout.strike()
        if self._open:
            loop.call_later(PERIOD, self._look, loop)
        else:
            self._looks_on = None


class _Timeout:
    __slots__ = ("deadline", "_timeouts", "_task", "_cancelling", "_struck")

    def __init__(self, timeouts: CoarseTimeouts, deadline: float) -> None:
        self.deadline = deadline
        self._timeouts = timeouts
        self._struck = False

    def strike(self) -> None:
        self._struck = True
        self._task.cancel()

    def __enter__(self) -> None:
        task: asyncio.Task[object] | None = asyncio.current_task()
        if task is None:
            raise RuntimeError("a call is awaited inside a task")
        self._task = task
        self._cancelling = task.cancelling()
        timeouts, loop = self._timeouts, task.get_loop()
        timeouts._open.add(self)
        if timeouts._looks_on is not loop:
            timeouts._looks_on = loop
            loop.call_later(PERIOD, timeouts._look, loop)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._struck:
            self._timeouts._open.discard(self)
        elif self._task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            raise TimeoutError from error
