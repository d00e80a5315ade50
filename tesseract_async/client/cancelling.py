"""Ends tasks that nobody waits for any more."""

import asyncio
from collections.abc import Collection
from typing import TypeVar

T = TypeVar("T")


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
