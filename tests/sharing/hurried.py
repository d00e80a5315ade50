"""Rounds that wait for somebody who does not come end at once: the loop's clock jumps over the wait."""

import asyncio
from collections.abc import Awaitable
from typing import Any

from tesseract_async.sharing.rounds import MIN_WAIT
from tests.faults.serving import let_pass


async def hurried(*work: Awaitable[Any]) -> None:
    """Await all of this. Where nothing has come of it for a moment, a round's wait passes: leases must outlast that."""
    done = asyncio.gather(*work)
    while not done.done():
        await asyncio.wait([done], timeout=0.1)
        if not done.done():
            let_pass(MIN_WAIT)
    await done
