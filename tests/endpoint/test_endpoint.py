"""The endpoint over real sockets: calls, errors, deadlines, cancellation, large messages."""

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator

import pytest

from tesseract_async.endpoint.endpoint import Endpoint, EndpointSettings, IncomingCall, Message
from tesseract_async.errors import (
    ConnectionLost,
    ExpertNotFound,
    Overloaded,
    PeerUnreachable,
    RemoteError,
    UnknownMethod,
)
from tesseract_async.identity import Identity
from tesseract_async.transport.base import PeerAddress
from tesseract_async.transport.tcp import TcpTransport

pytestmark = pytest.mark.both_loops


def bound_socket() -> socket.socket:
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    return sock


async def echo(call: IncomingCall) -> Message:
    return Message(call.body, call.buffers)


@contextlib.asynccontextmanager
async def serving(settings: EndpointSettings | None = None) -> AsyncIterator[tuple[Endpoint, PeerAddress]]:
    sock = bound_socket()
    port = sock.getsockname()[1]
    endpoint = Endpoint(identity=Identity.generate(), transports=[TcpTransport(sock)], settings=settings)
    await endpoint.start()
    endpoint.handle("echo", echo)
    async with endpoint:
        yield endpoint, PeerAddress(endpoint.peer_id, (f"127.0.0.1:{port}",))


@pytest.fixture(params=["tls", "plain"])
def settings(request: pytest.FixtureRequest) -> EndpointSettings:
    return EndpointSettings(security=request.param)


@contextlib.asynccontextmanager
async def pair(settings: EndpointSettings) -> AsyncIterator[tuple[Endpoint, Endpoint, PeerAddress]]:
    async with serving(settings) as (server, address):
        async with Endpoint(identity=Identity.generate(), transports=[TcpTransport()], settings=settings) as client:
            yield client, server, address


async def test_a_small_call_is_answered(settings: EndpointSettings) -> None:
    async with pair(settings) as (client, server, address):
        reply = await client.call(address, "echo", {"a": [1, "x"]}, [b"abc", b"", bytes(1000)], timeout=30)
        assert reply.body == {"a": [1, "x"]}
        assert [bytes(buffer) for buffer in reply.buffers] == [b"abc", b"", bytes(1000)]
        assert not any(buffer.readonly for buffer in reply.buffers)


async def test_large_messages_arrive_whole_and_beside_small_ones(settings: EndpointSettings) -> None:
    async with pair(settings) as (client, server, address):
        sizes = [[70_000], [3_000_000, 1, 0, 17], [9_000_000], [1_000_003] * 5, [65_530]]
        for _ in range(2):
            data = [[os.urandom(size) for size in each] for each in sizes]
            calls = [client.call(address, "echo", index, each, timeout=20) for index, each in enumerate(data)]
            calls += [client.call(address, "echo", 100 + index, [b"x"], timeout=20) for index in range(50)]
            replies = await asyncio.gather(*calls)
            for index, each in enumerate(data):
                assert replies[index].body == index
                assert [bytes(buffer) for buffer in replies[index].buffers] == each
            assert [reply.body for reply in replies[len(data) :]] == list(range(100, 150))


async def test_errors_travel_by_class(settings: EndpointSettings) -> None:
    async def missing(call: IncomingCall) -> Message:
        raise ExpertNotFound("no expert ffn.3.7 here")

    async def busy(call: IncomingCall) -> Message:
        raise Overloaded("full", retry_after=0.5)

    async with pair(settings) as (client, server, address):
        server.handle("missing", missing)
        server.handle("busy", busy)
        with pytest.raises(ExpertNotFound, match=r"ffn\.3\.7"):
            await client.call(address, "missing", timeout=30)
        with pytest.raises(Overloaded) as caught:
            await client.call(address, "busy", timeout=30)
        assert caught.value.retry_after == 0.5
        with pytest.raises(UnknownMethod, match="nothing"):
            await client.call(address, "nothing", timeout=30)


async def test_an_unexpected_error_arrives_as_a_sentence(
    settings: EndpointSettings, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(call: IncomingCall) -> Message:
        raise ZeroDivisionError("by zero")

    async with pair(settings) as (client, server, address):
        server.handle("broken", broken)
        with pytest.raises(RemoteError, match="ZeroDivisionError: by zero"):
            await client.call(address, "broken", timeout=30)
        assert "broken" in caplog.text


async def test_cancelling_the_caller_cancels_the_handler(settings: EndpointSettings) -> None:
    started, cancelled = asyncio.Event(), asyncio.Event()

    async def forever(call: IncomingCall) -> Message:
        started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise
        raise AssertionError

    async with pair(settings) as (client, server, address):
        server.handle("forever", forever)
        for size in (10, 3_000_000):
            started.clear()
            cancelled.clear()
            task = asyncio.create_task(client.call(address, "forever", None, [bytes(size)], timeout=30))
            await started.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await asyncio.wait_for(cancelled.wait(), 30)
        assert (await client.call(address, "echo", 1, timeout=30)).body == 1


async def test_a_call_ends_at_its_deadline_on_both_sides(settings: EndpointSettings) -> None:
    cancelled = asyncio.Event()
    left: list[float] = []

    async def forever(call: IncomingCall) -> Message:
        left.append(call.deadline - asyncio.get_running_loop().time())
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise
        raise AssertionError

    async with pair(settings) as (client, server, address):
        server.handle("forever", forever)
        await client.call(address, "echo", timeout=30)  # dialing and shaking hands take their own time
        with pytest.raises(TimeoutError, match="forever"):
            await client.call(address, "forever", timeout=0.5)
        await asyncio.wait_for(cancelled.wait(), 30)
        assert 0 < left[0] <= 0.55


async def test_a_dead_peer_is_unreachable_at_once(settings: EndpointSettings) -> None:
    with bound_socket() as deaf:  # nobody listens there
        port = deaf.getsockname()[1]
        async with Endpoint(identity=Identity.generate(), transports=[TcpTransport()], settings=settings) as client:
            with pytest.raises(PeerUnreachable, match="Connection refused"):
                await client.call(PeerAddress.parse(f"127.0.0.1:{port}"), "echo", timeout=30)


async def test_another_peer_than_expected_is_refused(settings: EndpointSettings) -> None:
    async with pair(settings) as (client, server, address):
        other = PeerAddress(Identity.generate().peer_id, address.addresses)
        with pytest.raises(PeerUnreachable, match="another peer"):
            await client.call(other, "echo", timeout=30)
        anybody = PeerAddress(None, address.addresses)
        assert (await client.call(anybody, "echo", 5, timeout=30)).body == 5


async def test_a_lost_connection_fails_calls_and_is_redialed(settings: EndpointSettings) -> None:
    started = asyncio.Event()

    async def forever(call: IncomingCall) -> Message:
        started.set()
        await asyncio.Event().wait()
        raise AssertionError

    async with pair(settings) as (client, server, address):
        server.handle("forever", forever)
        task = asyncio.create_task(client.call(address, "forever", timeout=30))
        await started.wait()
        for connection in server.pool.connections():
            connection.abort("test")
        with pytest.raises(ConnectionLost):
            await task
        assert (await client.call(address, "echo", 2, timeout=30)).body == 2


async def test_an_idempotent_call_is_repeated(settings: EndpointSettings) -> None:
    calls: list[object] = []

    async def once(call: IncomingCall) -> Message:
        calls.append(call.body)
        if len(calls) == 1:
            for connection in server.pool.connections():
                connection.abort("test")
        return Message("done")

    async with pair(settings) as (client, server, address):
        server.handle("once", once)
        assert (await client.call(address, "once", 7, timeout=10, idempotent=True)).body == "done"
        assert calls == [7, 7]
