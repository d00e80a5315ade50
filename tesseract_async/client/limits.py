"""`asyncio.timeout` for what hardly ever times out: one timer for all calls of a node instead of one for each."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Any, Final

PERIOD: Final = 0.25
"""Seconds between looks: a limit strikes so much too late at most."""


class Limits:
    """The limits of the calls under way on one event loop."""

    def __init__(self) -> None:
        self._limits: set[_Limit] = set()
        self._looks_on: asyncio.AbstractEventLoop | None = None

    def limit(self, deadline: float) -> _Limit:
        """A context manager that cancels the task in it at `deadline` (the loop's time), `PERIOD` late at most.

        As with `asyncio.timeout`, that cancellation leaves the block as TimeoutError; others pass.
        """
        return _Limit(self, deadline)

    def _add(self, limit: _Limit) -> None:
        self._limits.add(limit)
        loop = asyncio.get_running_loop()
        if self._looks_on is not loop:
            self._looks_on = loop
            loop.call_later(PERIOD, self._look, loop)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        now = loop.time()
        for limit in list(self._limits):
            if limit.deadline <= now:
                self._limits.discard(limit)
                limit.strike()
        if self._limits:
            loop.call_later(PERIOD, self._look, loop)
        else:
            self._looks_on = None


class _Limit:
    __slots__ = ("deadline", "_limits", "_task", "_cancelling", "_struck")

    def __init__(self, limits: Limits, deadline: float) -> None:
        self.deadline = deadline
        self._limits = limits
        self._struck = False

    def strike(self) -> None:
        self._struck = True
        self._task.cancel()

    def __enter__(self) -> None:
        task: asyncio.Task[Any] | None = asyncio.current_task()
        if task is None:
            raise RuntimeError("a call is awaited inside a task")
        self._task = task
        self._cancelling = task.cancelling()
        self._limits._add(self)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._struck:
            self._limits._limits.discard(self)
        elif self._task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            raise TimeoutError from error
