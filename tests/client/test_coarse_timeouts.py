import asyncio

import pytest

from tesseract_async.client.coarse_timeouts import PERIOD, CoarseTimeouts
from tests.client.virtual_time import run_in_virtual_time


async def hang(timeouts: CoarseTimeouts, seconds: float) -> None:
    with timeouts.timeout_at(asyncio.get_running_loop().time() + seconds):
        await asyncio.Event().wait()


def test_a_timeout_strikes_in_time() -> None:
    async def main() -> None:
        loop, timeouts = asyncio.get_running_loop(), CoarseTimeouts()
        for seconds in (0.1, 2.0):
            begin = loop.time()
            with pytest.raises(TimeoutError):
                await hang(timeouts, seconds)
            assert seconds <= loop.time() - begin <= seconds + PERIOD
            assert not asyncio.current_task().cancelling()  # type: ignore[union-attr]

    run_in_virtual_time(main())


def test_timeouts_of_many_tasks() -> None:
    async def main() -> None:
        loop, timeouts, ends = asyncio.get_running_loop(), CoarseTimeouts(), dict[float, float]()

        async def one(seconds: float) -> None:
            with pytest.raises(TimeoutError):
                await hang(timeouts, seconds)
            ends[seconds] = loop.time()

        begin = loop.time()
        await asyncio.gather(*(one(0.5 * n) for n in range(1, 9)))
        for seconds, end in ends.items():
            assert seconds <= end - begin <= seconds + PERIOD

    run_in_virtual_time(main())


def test_what_ends_in_time_is_left_alone() -> None:
    async def main() -> None:
        timeouts = CoarseTimeouts()
        with timeouts.timeout_at(asyncio.get_running_loop().time() + 0.1):
            await asyncio.sleep(0.01)
        await asyncio.sleep(1.0)
        with pytest.raises(ValueError, match="own"), timeouts.timeout_at(asyncio.get_running_loop().time() + 0.1):
            raise ValueError("own")
        await asyncio.sleep(1.0)

    run_in_virtual_time(main())


def test_a_cancellation_from_outside_stays_one() -> None:
    async def main() -> None:
        task = asyncio.create_task(hang(CoarseTimeouts(), 60.0))
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run_in_virtual_time(main())


def test_a_second_loop_has_its_own_looks() -> None:
    timeouts = CoarseTimeouts()

    async def abandoned() -> None:
        with timeouts.timeout_at(asyncio.get_running_loop().time() + 60.0):
            await asyncio.sleep(0.01)  # the loop ends before the next look

    async def main() -> None:
        with pytest.raises(TimeoutError):
            await hang(timeouts, 1.0)

    run_in_virtual_time(abandoned())
    run_in_virtual_time(main())
