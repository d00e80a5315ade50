import asyncio
import gc

import pytest

from tesseract_async.tasks import PromptFuture, TaskSet, end


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


async def test_listeners_hear_at_once_in_order_and_a_fault_stays_its_own() -> None:
    loop, heard, logged = asyncio.get_running_loop(), list[object](), list[dict[str, object]]()
    loop.set_exception_handler(lambda _, context: logged.append(context))
    future = PromptFuture[int](loop=loop)

    def faulty(_: object) -> None:
        raise ZeroDivisionError

    def cancelled(_: object) -> None:
        raise asyncio.CancelledError

    for listener in (faulty, cancelled, lambda done: heard.append(done.result()), lambda _: heard.append("second")):
        future.add_listener(listener)
    future.set_result(3)
    assert heard == [3, "second"] and isinstance(logged[0]["exception"], ZeroDivisionError)
    assert await future == 3
    future.add_listener(lambda _: heard.append("late"))
    assert heard == [3, "second"]
    await asyncio.sleep(0)
    assert heard == [3, "second", "late"]
    for finish in (lambda one: one.cancel(), lambda one: one.set_exception(OSError())):
        future = PromptFuture[int](loop=loop)
        future.add_listener(heard.append)
        finish(future)
        assert heard[-1] is future and (future.cancelled() or future.exception())
        assert not future.cancel()
    loop.set_exception_handler(None)


async def test_tasks_that_nobody_waits_for_are_known_until_they_are_over() -> None:
    heard, going_on = list[BaseException](), asyncio.Event()
    tasks = TaskSet("test", on_error=heard.append)

    async def fail() -> None:
        raise OSError

    async def last() -> None:
        await going_on.wait()

    tasks.spawn(fail())
    tasks.spawn(last())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert len(tasks) == 1 and [type(error) for error in heard] == [OSError]
    going_on.set()
    await tasks.wait_done()
    going_on.clear()
    tasks.spawn(last())
    await tasks.aclose()
    tasks.spawn(last())
    assert not tasks and len(heard) == 1
