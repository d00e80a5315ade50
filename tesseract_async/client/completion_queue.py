"""Waiting for many tasks one after the other: `asyncio.wait` looks at every one of them each time."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Collection
from typing import Generic, TypeVar

T = TypeVar("T")


class CompletionQueue(Generic[T]):
    """Tasks as they end. One awaits at a time."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._ended: list[asyncio.Task[T]] = []
        self._waiter: asyncio.Future[None] | None = None

    def add(self, task: asyncio.Task[T]) -> None:
        """`wait` will give this task when it has ended, once."""
        task.add_done_callback(self._note)

    async def wait(self, until: float) -> list[asyncio.Task[T]]:
        """Those that have ended since the last time, as soon as there are any; none at `until` (the loop's time).

        The caller ends the tasks that it no longer waits for.
        """
        if not self._ended and until > self._loop.time():
            self._waiter = self._loop.create_future()
            timer = None if until == math.inf else self._loop.call_at(until, self._wake)
            try:
                await self._waiter
            finally:
                self._waiter = None
                if timer is not None:
                    timer.cancel()
        ended, self._ended = self._ended, []
        return ended

    def _note(self, task: asyncio.Task[T]) -> None:
        self._ended.append(task)
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


async def cancel_all(tasks: Collection[asyncio.Task[T]]) -> None:
    """Ends the tasks that still run, and waits for them; their errors are dropped."""
    running = []
    for task in tasks:
        if task.done():
            _forget(task)
        else:
            task.add_done_callback(_forget)
            task.cancel()
            running.append(task)
    if running:
        await asyncio.wait(running)


def _forget(task: asyncio.Task[T]) -> None:
    if not task.cancelled():
        task.exception()  # once asked for, it is not logged as lost
