"""Ends tasks that nobody waits for any more."""

import asyncio


async def end(*tasks: asyncio.Task[object] | None) -> None:
    """Cancel the tasks that still run, and wait until they are over; their errors are dropped."""
    running = [task for task in tasks if task is not None]
    for task in running:
        task.add_done_callback(_forget)
        task.cancel()
    if running:
        await asyncio.wait(running)


def _forget(task: asyncio.Task[object]) -> None:
    if not task.cancelled():
        task.exception()  # once asked for, it is not logged as lost
