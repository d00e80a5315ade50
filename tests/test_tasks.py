import asyncio
import gc

import pytest

from tesseract_async.tasks import end


async def test_tasks_are_over_and_their_errors_are_dropped(caplog: pytest.LogCaptureFixture) -> None:
    """Those that fail while they end, too; those that are over already, and None, are left as they are."""
    is_over = asyncio.Event()

    async def fail(wait: bool) -> None:
        try:
            await asyncio.sleep(3600 if wait else 0)
        finally:
            is_over.set()
            raise OSError

    over = asyncio.create_task(fail(wait=False))
    await is_over.wait()
    is_over.clear()
    waiting = asyncio.create_task(fail(wait=True))
    await asyncio.sleep(0)
    await end(over, None, waiting)
    assert is_over.is_set() and over.done() and waiting.done()
    del over, waiting
    await asyncio.sleep(0)
    gc.collect()
    assert not caplog.records
    await end()
