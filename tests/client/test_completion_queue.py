"""Tasks as they end: each once, whenever it ends, and nothing left behind."""

import asyncio
import math
from collections.abc import Coroutine
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tesseract_async.client.completion_queue import CompletionQueue
from tests.client.virtual_time import run_in_virtual_time


def now() -> float:
    return asyncio.get_running_loop().time()


async def after(seconds: float, value: Any = None) -> Any:
    await asyncio.sleep(seconds)
    if isinstance(value, BaseException):
        raise value
    return value


def added(queue: CompletionQueue[Any], coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    task = asyncio.get_running_loop().create_task(coroutine)
    queue.add(task)
    return task


def test_every_ending_is_given_when_it_comes_with_its_result_error_or_cancellation() -> None:
    async def main() -> None:
        queue: CompletionQueue[Any] = CompletionQueue()
        failing = added(queue, after(1.0, ValueError("a fault")))
        cancelled = added(queue, after(math.inf))
        good = added(queue, after(3.0, "good"))
        asyncio.get_running_loop().call_at(2.0, cancelled.cancel)
        for moment, task in ((1.0, failing), (2.0, cancelled), (3.0, good)):
            assert await queue.wait(math.inf) == [task]
            assert now() == moment
        assert isinstance(failing.exception(), ValueError) and cancelled.cancelled() and good.result() == "good"

    run_in_virtual_time(main())


def test_at_the_deadline_nothing_is_given_and_what_ends_later_still_is() -> None:
    async def main() -> None:
        queue: CompletionQueue[Any] = CompletionQueue()
        task = added(queue, after(2.0))
        assert await queue.wait(1.0) == [] and now() == 1.0
        assert await queue.wait(0.5) == [], "a deadline that has passed does not wait"
        assert now() == 1.0
        assert await queue.wait(9.0) == [task] and now() == 2.0, "an ending is given at once, not at the deadline"
        assert await queue.wait(3.0) == [] and now() == 3.0, "once"

    run_in_virtual_time(main())


def test_what_has_ended_is_given_even_after_the_deadline() -> None:
    async def main() -> None:
        queue: CompletionQueue[Any] = CompletionQueue()
        task = added(queue, after(1.0))
        await asyncio.sleep(2.0)
        assert await queue.wait(0.0) == [task] and now() == 2.0

    run_in_virtual_time(main())


def test_a_task_that_ended_before_it_was_added_is_given() -> None:
    async def main() -> None:
        task = asyncio.create_task(after(0.0))
        await task
        queue: CompletionQueue[Any] = CompletionQueue()
        queue.add(task)
        assert await queue.wait(math.inf) == [task]
        assert await queue.wait(1.0) == []

    run_in_virtual_time(main())


def test_cancelling_whoever_waits_loses_no_ending() -> None:
    async def main() -> None:
        queue: CompletionQueue[Any] = CompletionQueue()
        first, second = added(queue, after(1.0)), added(queue, after(3.0))
        waiting = asyncio.create_task(queue.wait(math.inf))
        # in the very turn in which `first` has woken it, and later: both times it takes nothing with it
        first.add_done_callback(lambda _: waiting.cancel())
        with pytest.raises(asyncio.CancelledError):
            await waiting
        again = asyncio.create_task(queue.wait(math.inf))
        assert await again == [first]
        waiting = asyncio.create_task(queue.wait(5.0))
        await asyncio.sleep(0.5)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert await queue.wait(math.inf) == [second] and now() == 3.0

    run_in_virtual_time(main())


@settings(max_examples=60, deadline=None)
@given(
    ends=st.lists(st.integers(0, 12), max_size=8),
    deadlines=st.lists(st.integers(0, 12), max_size=8),
)
def test_any_order_of_endings_and_deadlines_gives_each_ending_once_and_in_time(
    ends: list[int], deadlines: list[int]
) -> None:
    async def main() -> None:
        queue: CompletionQueue[Any] = CompletionQueue()
        at = {added(queue, after(end)): end for end in ends}
        seen: list[asyncio.Task[Any]] = []
        for deadline in [*sorted(deadlines), *[math.inf] * len(ends)]:
            if len(seen) == len(ends) and deadline == math.inf:
                break
            given = await queue.wait(deadline)
            assert given or now() >= deadline, "nothing, and too early"
            assert all(task.done() for task in given)
            seen += given
        assert sorted(map(at.__getitem__, seen)) == sorted(ends)
        assert len(set(seen)) == len(seen)

    run_in_virtual_time(main())
