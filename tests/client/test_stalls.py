from __future__ import annotations

import asyncio
from typing import Any

from tesseract_async.client.stalls import PERIOD, Stalls
from tests.client.virtual_time import in_made_up_time


@in_made_up_time
async def test_what_the_loop_stood_still_is_counted_while_somebody_watches() -> None:
    loop: Any = asyncio.get_running_loop()
    stalls = Stalls()
    loop.clock.run(3.0)
    assert stalls.seconds == 0.0
    with stalls.watching():
        await asyncio.sleep(10 * PERIOD)
        assert abs(stalls.seconds) < 1e-9
        loop.clock.run(2.0)
        assert 2.0 - PERIOD <= stalls.seconds <= 2.0, "at once, before any timer had its turn"
        with stalls.watching():
            await asyncio.sleep(1.0)
        assert 2.0 - PERIOD <= stalls.seconds <= 2.0
        await asyncio.sleep(PERIOD / 2)
        loop.clock.run(1.0)
    counted = stalls.seconds
    assert 3.0 - 2 * PERIOD <= counted <= 3.0
    loop.clock.run(5.0)
    await asyncio.sleep(1.0)
    assert stalls.seconds == counted
