"""Handlers that answer by a future: without a task, and like all others otherwise."""

import asyncio
import gc

import pytest

from tesseract_async.endpoint.endpoint import Endpoint, EndpointSettings, IncomingCall, Message
from tesseract_async.endpoint.handlers import Deferred
from tesseract_async.errors import ConnectionLost, Overloaded, RemoteError
from tesseract_async.identity import Identity
from tesseract_async.transport.base import PeerAddress
from tesseract_async.transport.tcp import TcpTransport
from tests.faults.serving import serving, until

PLAIN = EndpointSettings(security="plain")


def client_of(settings: EndpointSettings) -> Endpoint:
    return Endpoint(identity=Identity.generate(), transports=[TcpTransport()], settings=settings)


class Answers:
    """Answers ``later`` calls by futures that the test sets."""

    def __init__(self, server: Endpoint) -> None:
        self.futures: list[asyncio.Future[Message]] = []
        self.num_cancelled = 0
        server.handle("later", self._later)

    def _later(self, call: IncomingCall) -> Deferred[Message]:
        future: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self.futures.append(future)
        return Deferred(future, finish=future.result, cancel=self._cancelled)

    def _cancelled(self) -> None:
        self.num_cancelled += 1


async def call(client: Endpoint, address: PeerAddress, timeout: float = 30.0) -> Message:
    return await client.call(address, "later", None, timeout=timeout)


@pytest.mark.both_loops
async def test_many_are_answered_in_any_order_without_a_task() -> None:
    async with serving(PLAIN) as (server, address), client_of(PLAIN) as client:
        answers = Answers(server)
        await client.call(address, "echo", timeout=30)  # it is connected
        others = asyncio.all_tasks()
        calls = [asyncio.create_task(call(client, address)) for _ in range(8)]
        await until(lambda: len(answers.futures) == 8)
        (connection,) = server.pool.connections()
        assert asyncio.all_tasks() - others <= {*calls}
        for number, future in reversed([*enumerate(answers.futures)]):
            future.set_result(Message(number, (memoryview(bytes([number])),)))
        replies = await asyncio.gather(*calls)
        assert [reply.body for reply in replies] == [bytes(reply.buffers[0])[0] for reply in replies] == [*range(8)]
        assert not answers.num_cancelled and not connection.protocol.num_calls


async def test_what_follows_may_be_another_future() -> None:
    async with serving(PLAIN) as (server, address), client_of(PLAIN) as client:
        then: list[asyncio.Future[Message]] = []
        cancelled: list[int] = []

        def finish() -> Deferred[Message]:
            future: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
            then.append(future)
            return Deferred(future, finish=future.result, cancel=lambda: cancelled.append(1))

        def answer(call: IncomingCall) -> Deferred[Message]:
            first: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            first.set_result(None)
            return Deferred(first, finish=finish, cancel=lambda: cancelled.append(0))

        server.handle("twice", answer)
        await client.call(address, "echo", timeout=30)  # it is connected
        others = asyncio.all_tasks()
        task = asyncio.create_task(client.call(address, "twice", timeout=30))
        await until(lambda: len(then) == 1)
        assert asyncio.all_tasks() - others <= {task}
        then[0].set_result(Message("then"))
        assert (await task).body == "then"
        task = asyncio.create_task(client.call(address, "twice", timeout=30))
        await until(lambda: len(then) == 2)
        task.cancel()
        await until(lambda: cancelled == [1])


async def test_what_it_raises_reaches_the_caller(caplog: pytest.LogCaptureFixture) -> None:
    async with serving(PLAIN) as (server, address), client_of(PLAIN) as client:
        answers = Answers(server)
        for error, kind, sentence in (
            (Overloaded("later", retry_after=3.0), Overloaded, "later"),
            (ZeroDivisionError("oh"), RemoteError, "later failed: ZeroDivisionError"),
            (None, RemoteError, "later was cancelled"),
        ):
            task = asyncio.create_task(call(client, address))
            await until(lambda: any(not future.done() for future in answers.futures))
            if error is None:
                answers.futures[-1].cancel()
            else:
                answers.futures[-1].set_exception(error)
            with pytest.raises(kind, match=sentence):
                await task
        assert sum(record.exc_info is not None for record in caplog.records) == 1, "of what is nobody's to know"


async def test_a_caller_that_leaves_or_is_too_late_cancels_it() -> None:
    async with serving(PLAIN) as (server, address), client_of(PLAIN) as client:
        answers, unhandled = Answers(server), list[object]()
        asyncio.get_running_loop().set_exception_handler(lambda _, context: unhandled.append(context))
        task = asyncio.create_task(call(client, address))
        await until(lambda: len(answers.futures) == 1)
        task.cancel()
        await until(lambda: answers.num_cancelled == 1)
        with pytest.raises(TimeoutError):
            await call(client, address, timeout=0.05)
        await until(lambda: answers.num_cancelled == 2)
        for future in answers.futures:  # computed all the same: nobody waits for it
            future.set_result(Message())
        assert (await client.call(address, "echo", 1, timeout=30)).body == 1
        assert not unhandled


async def test_it_is_cancelled_with_its_connection() -> None:
    async with serving(PLAIN) as (server, address):
        answers = Answers(server)
        async with client_of(PLAIN) as client:
            task = asyncio.create_task(call(client, address))
            await until(lambda: len(answers.futures) == 1)
        with pytest.raises(ConnectionLost):
            await task
        await until(lambda: answers.num_cancelled == 1)


async def test_it_can_be_awaited() -> None:
    loop, cancelled = asyncio.get_running_loop(), []
    future: asyncio.Future[int] = loop.create_future()
    waiting = asyncio.ensure_future(Deferred(future, finish=lambda: future.result() + 1, cancel=lambda: None))
    future.set_result(1)
    assert await waiting == 2
    later = Deferred(future, finish=lambda: Deferred(future, finish=lambda: 3, cancel=int), cancel=int)
    assert await later == 3
    future = loop.create_future()
    task = loop.create_task(wait(Deferred(future, finish=future.result, cancel=lambda: cancelled.append(1))))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert cancelled == [1]
    future = loop.create_future()
    future.set_exception(Overloaded("full", retry_after=1.0))
    with pytest.raises(Overloaded):
        await Deferred(future, finish=future.result, cancel=lambda: None)
    gc.collect()


async def wait(deferred: Deferred[int]) -> int:
    return await deferred
