"""Where the loop and the device's thread wake each other: no wake-up is lost, and one serves all that have ended."""

import asyncio
import contextlib
import random
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

from tesseract_async.runtime.backend import ExpertBackend
from tesseract_async.runtime.runtime import TesseractRuntime
from tesseract_async.runtime.wake_ups import Bell, Mailbox
from tesseract_async.wire.tensors import TensorSpec
from tests.computed import computed
from tests.watching import calls_of


def make_expert(module: nn.Module | None = None) -> ExpertBackend:
    schema = TensorSpec((1,))
    return ExpertBackend(module or nn.Identity(), args_schema=(schema,), outputs_schema=schema, max_batch_size=8)


class Door:
    """Holds a runtime's thread on its way to sleep: it has looked, and does not listen yet."""

    def __init__(self) -> None:
        self.reached, self.passed = threading.Semaphore(0), threading.Semaphore(0)

    def __call__(self, frame: FrameType, event: str, _: object) -> None:
        """The profile function of that thread."""
        if event == "call" and frame.f_code is Bell.wait.__code__:
            self.reached.release()
            assert self.passed.acquire(timeout=60)


@contextlib.asynccontextmanager
async def held() -> AsyncIterator[tuple[TesseractRuntime, Door]]:
    """A runtime, and the door of its thread. It is closed when the thread is next at the door."""
    runtime, door = TesseractRuntime(), Door()
    threading.setprofile(door)
    try:
        await runtime.start()
    finally:
        threading.setprofile(None)
    try:
        yield runtime, door
    finally:
        door.passed.release()
        async with asyncio.timeout(60):
            await runtime.aclose()


def test_a_bell_keeps_a_ring_and_several_are_one() -> None:
    bell = Bell()
    for _ in range(100):
        bell.ring()
        bell.ring()
        bell.wait(None)
    before = time.monotonic()
    bell.wait(0.02)
    assert time.monotonic() - before >= 0.02, "none is left"
    bell.wait(-1.0)


async def test_what_comes_while_the_thread_lies_down_wakes_it() -> None:
    expert = make_expert()
    async with held() as (runtime, door):
        for value in range(3):
            assert await asyncio.to_thread(door.reached.acquire, timeout=60)
            with calls_of(Bell.ring) as rings:
                work = runtime.submit(expert, [torch.full((1, 1), float(value))])
                again = runtime.submit(expert, [torch.full((1, 1), -float(value))])
            assert len(rings) == 1, "one ring wakes it for both"
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
        with runtime.gathering():
            pass  # nothing comes, and the thread is woken for it
    assert (await computed(runtime, expert, [torch.ones(1, 1)])).tensors[0] is not None
    await runtime.aclose()


class Held(nn.Module):
    """Computes when it is let."""

    def __init__(self) -> None:
        super().__init__()
        self.entered, self.released = threading.Event(), threading.Event()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.entered.set()
        assert self.released.wait(60)
        return x


async def test_one_wake_up_of_the_loop_serves_all_batches_that_ended_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime, num_experts = TesseractRuntime(), 5
    await runtime.start()
    await runtime.call(int)  # started, and nothing on its way
    loop, num_wake_ups = asyncio.get_running_loop(), 0
    wake, held = loop.call_soon_threadsafe, Held()

    def counted_wake(*args: Any, **options: Any) -> asyncio.Handle:
        nonlocal num_wake_ups
        num_wake_ups += 1
        return wake(*args, **options)

    monkeypatch.setattr(loop, "call_soon_threadsafe", counted_wake)
    works = [runtime.submit(make_expert(), [torch.ones(1, 1)]) for _ in range(num_experts)]
    last = runtime.submit(make_expert(held), [torch.ones(1, 1)])
    assert held.entered.wait(60), "the loop is held here, so that it sees none of the batches before it end"
    assert not any(work.answer.done() for work in works)
    async with asyncio.timeout(60):
        await asyncio.gather(*(work.answer for work in works))
        assert num_wake_ups == 1 and runtime.statistics().num_batches == num_experts + 1
        held.released.set()
        await last.answer
    assert num_wake_ups == 2, "what ends later wakes it again"
    await runtime.aclose()


async def test_a_failure_in_what_was_posted_does_not_keep_the_others_waiting() -> None:
    mailbox, loop = Mailbox(), asyncio.get_running_loop()
    mailbox.loop, is_over = loop, asyncio.Event()
    seen: list[int] = []
    logged: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: logged.append(context))
    try:

        def fail() -> None:
            raise ValueError("a fault")

        mailbox.post(fail)
        mailbox.post(seen.append, 1)
        mailbox.post(is_over.set)
        async with asyncio.timeout(60):
            await is_over.wait()
    finally:
        loop.set_exception_handler(None)
    assert seen == [1] and isinstance(logged[0]["exception"], ValueError)


async def test_what_comes_in_one_turn_of_the_loop_wakes_the_thread_once_and_is_computed_together() -> None:
    runtime, expert = TesseractRuntime(), make_expert()
    await runtime.start()
    await runtime.call(int)
    num_before = runtime.statistics().num_batches
    works = []
    with calls_of(Bell.ring) as rings:
        for _ in range(5):
            runtime.gather_turn()
            works.append(runtime.submit(expert, [torch.ones(1, 1)]))
    assert not rings, "the turn goes on"
    async with asyncio.timeout(60):
        await asyncio.gather(*(work.answer for work in works))
        assert runtime.statistics().num_batches == num_before + 1
        await computed(runtime, expert, [torch.ones(1, 1)])  # the next turn
    await runtime.aclose()


async def test_what_is_gathered_is_computed_together_though_the_thread_wakes_meanwhile() -> None:
    """It was still busy with what came before."""
    expert, released = make_expert(), threading.Event()
    async with held() as (runtime, door):
        assert await asyncio.to_thread(door.reached.acquire, timeout=60)
        before = asyncio.create_task(runtime.call(lambda: released.wait(60)))
        await asyncio.sleep(0)
        door.passed.release()
        with runtime.gathering():
            works = [runtime.submit(expert, [torch.zeros(1, 1)])]
            released.set()
            assert door.reached.acquire(timeout=60), "it has looked"
            works.append(runtime.submit(expert, [torch.zeros(1, 1)]))
        door.passed.release()
        async with asyncio.timeout(60):
            for work in works:
                await work.answer
            await before
        assert runtime.statistics().num_batches == 1
