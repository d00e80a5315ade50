"""Where the loop and the device's thread wake each other: no wake-up is lost, and one serves all that have ended."""

import asyncio
import random
import sys
import threading
from collections.abc import Iterator
from queue import SimpleQueue
from typing import Any

import pytest
import torch
from torch import nn

from tesseract_async.runtime.backend import ExpertBackend
from tesseract_async.runtime.runtime import TesseractRuntime
from tesseract_async.wire.tensors import TensorSpec
from tests.computed import computed


def make_expert() -> ExpertBackend:
    return ExpertBackend(nn.Identity(), args_schema=(TensorSpec((1,)),), max_batch_size=8)


class Door:
    """The thread's bell, where the thread can be held on its way to sleep: it has looked, and does not listen yet."""

    def __init__(self) -> None:
        self.rings: SimpleQueue[None] = SimpleQueue()
        self.reached, self.passed = threading.Semaphore(0), threading.Semaphore(0)

    def locked(self) -> bool:
        return self.rings.empty()

    def release(self) -> None:
        self.rings.put(None)

    def acquire(self, timeout: float) -> None:
        self.reached.release()
        assert self.passed.acquire(timeout=60)
        self.rings.get(timeout=None if timeout < 0 else timeout)


async def test_what_comes_while_the_thread_lies_down_wakes_it() -> None:
    runtime, door = TesseractRuntime(), Door()
    runtime._bell = door  # type: ignore[assignment]
    await runtime.start()
    expert = make_expert()
    for value in range(3):
        assert await asyncio.to_thread(door.reached.acquire, timeout=60)
        work = runtime.submit(expert, [torch.full((1, 1), float(value))])
        again = runtime.submit(expert, [torch.full((1, 1), -float(value))])
        assert door.rings.qsize() == 1, "one ring wakes it for both"
        door.passed.release()
        async with asyncio.timeout(60):
            assert float((await work.answer).tensors[0]) == value == -float((await again.answer).tensors[0])
    assert await asyncio.to_thread(door.reached.acquire, timeout=60)
    closing = asyncio.create_task(runtime.aclose())
    await asyncio.sleep(0)
    door.passed.release()
    async with asyncio.timeout(60):
        await closing


@pytest.fixture
def hasty_threads() -> Iterator[None]:
    """Threads take turns as often as Python lets them."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


async def test_thousands_of_naps_end_with_the_next_request(hasty_threads: None) -> None:
    """Requests come when the thread is about to sleep, sleeps, or is awake; deadlines make it nap with a timer."""
    runtime, expert, dice = TesseractRuntime(), make_expert(), random.Random(5)
    await runtime.start()
    loop = asyncio.get_running_loop()
    x = torch.ones(1, 1)

    async def caller() -> None:
        for _ in range(300):
            if dice.random() < 0.5:
                await runtime.call(int)
            else:
                await computed(runtime, expert, [x], deadline=loop.time() + 60 if dice.random() < 0.5 else None)

    async with asyncio.timeout(100):
        for num_callers in (1, 4):
            await asyncio.gather(*(caller() for _ in range(num_callers)))
    await runtime.aclose()


async def test_rings_too_many_do_no_harm() -> None:
    runtime, expert = TesseractRuntime(), make_expert()
    await runtime.start()
    for _ in range(100):
        with runtime._lock:
            runtime._is_idle = True
            runtime._wake_thread()
    assert (await computed(runtime, expert, [torch.ones(1, 1)])).tensors[0] is not None
    await runtime.aclose()


async def test_one_wake_up_of_the_loop_serves_all_batches_that_ended_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime, num_experts = TesseractRuntime(), 5
    await runtime.start()
    await runtime.call(int)  # started, and nothing on its way
    loop = asyncio.get_running_loop()
    num_wake_ups, all_posted, num_posted = 0, threading.Event(), 0
    wake, post = loop.call_soon_threadsafe, runtime._post

    def counted_wake(*args: Any, **options: Any) -> asyncio.Handle:
        nonlocal num_wake_ups
        num_wake_ups += 1
        return wake(*args, **options)

    def counted_post(*args: Any) -> None:
        nonlocal num_posted
        post(*args)
        num_posted += 1
        if num_posted == num_experts:
            all_posted.set()

    monkeypatch.setattr(loop, "call_soon_threadsafe", counted_wake)
    monkeypatch.setattr(runtime, "_post", counted_post)
    works = [runtime.submit(make_expert(), [torch.ones(1, 1)]) for _ in range(num_experts)]
    assert all_posted.wait(60), "the loop is held here, so that it sees none of the batches end"
    assert not any(work.answer.done() for work in works)
    async with asyncio.timeout(60):
        await asyncio.gather(*(work.answer for work in works))
    assert num_wake_ups == 1 and runtime.statistics().num_batches == num_experts
    await computed(runtime, make_expert(), [torch.ones(1, 1)])
    assert num_wake_ups == 2, "what ends later wakes it again"
    await runtime.aclose()


async def test_a_failure_in_what_was_posted_does_not_keep_the_others_waiting() -> None:
    runtime = TesseractRuntime()
    await runtime.start()
    loop = asyncio.get_running_loop()
    seen: list[int] = []
    logged: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: logged.append(context))
    try:

        def fail() -> None:
            raise ValueError("a fault")

        runtime._post(fail)
        runtime._post(seen.append, 1)
        await runtime.call(int)
    finally:
        loop.set_exception_handler(None)
    assert seen == [1] and isinstance(logged[0]["exception"], ValueError)
    await runtime.aclose()


async def test_what_comes_in_one_turn_of_the_loop_wakes_the_thread_once_and_is_computed_together() -> None:
    runtime, expert = TesseractRuntime(), make_expert()
    await runtime.start()
    await runtime.call(int)
    num_before = runtime.statistics().num_batches
    works = []
    for _ in range(5):
        runtime.gather_turn()
        works.append(runtime.submit(expert, [torch.ones(1, 1)]))
    assert runtime._bell.locked(), "the turn goes on"
    async with asyncio.timeout(60):
        await asyncio.gather(*(work.answer for work in works))
        assert runtime.statistics().num_batches == num_before + 1
        await computed(runtime, expert, [torch.ones(1, 1)])  # the next turn
    await runtime.aclose()


async def test_what_is_gathered_is_computed_together_though_the_thread_wakes_meanwhile() -> None:
    """As where it was still busy with what came before."""
    runtime, door = TesseractRuntime(), Door()
    runtime._bell = door  # type: ignore[assignment]
    await runtime.start()
    expert = make_expert()
    with runtime.gathering():
        works = [runtime.submit(expert, [torch.zeros(1, 1)])]
        assert door.reached.acquire(timeout=60)
        door.release()
        door.passed.release()
        assert door.reached.acquire(timeout=60), "it has looked"
        works.append(runtime.submit(expert, [torch.zeros(1, 1)]))
    door.passed.release()
    async with asyncio.timeout(60):
        for work in works:
            await work.answer
    assert runtime.statistics().num_batches == 1
    door.passed.release()
    await runtime.aclose()
