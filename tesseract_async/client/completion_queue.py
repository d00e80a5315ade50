"""Waiting for many tasks one after the other: `asyncio.wait` looks at every one of them each time."""

import asyncio
import contextlib
import math
from collections.abc import Collection
from typing import Generic, TypeVar

T = TypeVar("T")


class CompletionQueue(Generic[T]):
    def __init__(self) -> None:
        self._ended: asyncio.Queue[asyncio.Future[T]] = asyncio.Queue()

    def add(self, task: asyncio.Future[T]) -> None:
        """`wait` will give this task when it has ended, once."""
        task.add_done_callback(self._ended.put_nowait)

    async def wait(self, until: float) -> list[asyncio.Future[T]]:
        """Those that have ended since the last time, as soon as there are any; none at `until` (the loop's time)."""
        ended = []
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(None if until == math.inf else until):
                ended.append(await self._ended.get())
        while not self._ended.empty():
            ended.append(self._ended.get_nowait())
        return ended


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
