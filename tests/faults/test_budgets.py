"""Strangers who announce, hold back, drip and never take: what it costs, for how long, and what others notice."""

import asyncio
import contextlib
import dataclasses
import logging
import tracemalloc
from collections.abc import AsyncIterator

import pytest

from tesseract_async.endpoint.bounds import Bounds
from tesseract_async.endpoint.endpoint import Endpoint, EndpointSettings, IncomingCall, Message
from tesseract_async.errors import ConnectionLost, Overloaded
from tesseract_async.identity import Identity
from tesseract_async.transport.base import PeerAddress
from tesseract_async.transport.tcp import TcpTransport
from tesseract_async.wire import frames, heads
from tesseract_async.wire.heads import Hello
from tests.faults.serving import RawPeer, let_pass, serving, until

PLAIN = EndpointSettings(security="plain")
MIB = 2**20
GIB = 2**30 - 1000


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)


def client_of(settings: EndpointSettings = PLAIN) -> Endpoint:
    return Endpoint(identity=Identity.generate(), transports=[TcpTransport()], settings=settings)


def begin(stream: int, size: int) -> bytes:
    """Announces a request of one buffer of `size` bytes; room is asked for."""
    return frames.frame(frames.BEGIN_REQUEST, stream=stream, payload=frames.encode_table(8, [size]))


async def sends_large(client: Endpoint, address: PeerAddress, size: int) -> None:
    reply = await client.call(address, "echo", None, [bytes(size)], timeout=30)
    assert len(reply.buffers[0]) == size


@pytest.mark.parametrize("num_strangers", [1, 40])
async def test_announcing_a_gigabyte_takes_nothing_from_others(num_strangers: int) -> None:
    async with serving(PLAIN) as (server, address), client_of() as old, client_of() as new:
        await sends_large(old, address, MIB)
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(num_strangers):
                stranger = await stack.enter_async_context(RawPeer.connected(address))
                stranger.writer.write(begin(1, GIB) + begin(2, GIB) + begin(3, MIB))
            await until(lambda: server.budgets.messages.num_waiting == 2 * num_strangers)
            assert server.budgets.messages.used <= 2 * MIB * num_strangers
            await sends_large(old, address, MIB)
            await sends_large(new, address, 24 * MIB)
        await until(lambda: server.budgets.messages.num_waiting == 0)


@pytest.mark.slow
async def test_a_gigabyte_arrives_beside_strangers_that_announce_as_much() -> None:
    async with serving(PLAIN) as (server, address), client_of() as client:
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(16):
                stranger = await stack.enter_async_context(RawPeer.connected(address))
                stranger.writer.write(begin(1, GIB) + frames.HEADER.pack(frames.CHUNK_REQUEST, 0, 0, MIB, 1) + bytes(9))
            await until(lambda: len(server.connections()) == 16)
            server.handle("count", lambda call: _count(call))
            reply = await client.call(address, "count", None, [bytes(2**30 - 4096)], timeout=300)
            assert reply.body == 2**30 - 4096


async def _count(call: IncomingCall) -> Message:
    return Message(len(call.buffers[0]))


async def test_a_byte_now_and_then_holds_nothing_open() -> None:
    async with serving(PLAIN) as (server, address), client_of() as client:
        async with RawPeer.connected(address) as stranger:
            stranger.writer.write(begin(1, GIB) + frames.HEADER.pack(frames.CHUNK_REQUEST, 0, 0, MIB, 1))
            await until(lambda: server.budgets.messages.used > 0)
            (connection,) = server.pool.connections()
            now = asyncio.get_running_loop().time()
            for second in range(0, 40, 2):
                stranger.writer.write(b"x" + frames.HEADER.pack(frames.PING, 0, 0, 0, 0)[:0])
                received = connection.protocol.lanes[0].bytes_received
                await until(lambda: connection.protocol.lanes[0].bytes_received > received)  # noqa: B023
                connection.protocol.life.received(1, now + second, 0)
                connection.protocol.handle_timer(now + second)
            assert server.budgets.messages.used == 0, "given up, although a byte came every other second"
            await sends_large(client, address, 24 * MIB)


async def test_who_really_sends_most_makes_room_for_others() -> None:
    settings = dataclasses.replace(PLAIN, max_receive_bytes=32 * MIB)
    async with serving(settings) as (server, address), client_of(settings) as client:
        async with contextlib.AsyncExitStack() as stack:
            strangers = [await stack.enter_async_context(RawPeer.connected(address)) for _ in range(2)]
            for stranger in strangers:  # each 12 of 13 MiB that it announced
                chunk = frames.HEADER.pack(frames.CHUNK_REQUEST, 0, 0, MIB, 1) + bytes(MIB)
                stranger.writer.write(begin(1, 13 * MIB) + 12 * chunk)
            await until(lambda: server.budgets.messages.used == 24 * MIB)
            await sends_large(client, address, 10 * MIB)
            assert server.budgets.messages.num_given_up == 1 and server.budgets.messages.used <= 12 * MIB


class EvilServer:
    """Answers every call with the announcement of a reply that never comes."""

    def __init__(self) -> None:
        self.identity = Identity.generate()
        self.num_calls = 0

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[PeerAddress]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        try:
            yield PeerAddress(self.identity.peer_id, (f"127.0.0.1:{server.sockets[0].getsockname()[1]}",))
        finally:
            server.close()
            await server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            header = frames.HEADER.unpack(await reader.readexactly(16))
            hello = heads.decode_hello(memoryview(await reader.readexactly(header[3])))
            mine = Hello(hello.session, hello.bulk, bytes(self.identity.peer_id), 1024, 2**23, 2**30)
            writer.write(frames.frame(frames.HELLO, payload=heads.encode_hello(mine)))
            while True:
                kind, _, _, length, stream = frames.HEADER.unpack(await reader.readexactly(16))
                await reader.readexactly(length)
                if kind == frames.REQUEST:
                    self.num_calls += 1
                    flags = (frames.ROOM_ASKED, frames.ROOM_RESERVED)[self.num_calls % 2]
                    table = frames.encode_table(8, [GIB])
                    writer.write(frames.frame(frames.BEGIN_REPLY, stream=stream, flags=flags, payload=table))
        writer.close()


async def test_a_server_that_announces_a_reply_takes_nothing_from_calls_to_others() -> None:
    evil = EvilServer()
    async with serving(PLAIN) as (_, address), evil.listening() as bad, client_of() as client:
        lost = [asyncio.create_task(client.call(bad, "m", timeout=60, max_reply_bytes=2**30 - 100)) for _ in range(8)]
        await until(lambda: evil.num_calls == 8)
        await sends_large(client, address, 24 * MIB)
        reply = await client.call(address, "echo", None, [bytes(MIB)], timeout=30, max_reply_bytes=64 * MIB)
        assert len(reply.buffers[0]) == MIB
        assert client.budgets.messages.used <= 8 * 2 * MIB
        for task in lost:
            task.cancel()
        await asyncio.gather(*lost, return_exceptions=True)
        assert client.budgets.messages.used == 0


@pytest.mark.parametrize("size", [10, 60_000])
async def test_a_server_that_says_more_for_ever_is_cut_off(size: int) -> None:
    identity = Identity.generate()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            header = frames.HEADER.unpack(await reader.readexactly(16))
            hello = heads.decode_hello(memoryview(await reader.readexactly(header[3])))
            limits = (1024, 2**23, 2**30)
            mine = Hello(hello.session, hello.bulk, bytes(identity.peer_id), *limits, features=heads.FEATURES)
            writer.write(frames.frame(frames.HELLO, payload=heads.encode_hello(mine)))
            part = frames.encode_small(
                frames.REPLY, 1, heads.encode_result(1), [size], [memoryview(bytes(size))], flags=frames.MORE
            )
            while (await reader.readexactly(16))[0] != frames.REQUEST:
                pass
            while True:
                writer.write(part)
                await writer.drain()
        writer.close()

    listener = await asyncio.start_server(serve, "127.0.0.1", 0)
    bad = PeerAddress(identity.peer_id, (f"127.0.0.1:{listener.sockets[0].getsockname()[1]}",))
    async with serving(PLAIN) as (_, address), client_of() as client:
        num_parts = 0
        with pytest.raises(ConnectionLost):
            async for _part in client.call_parts(bad, "m", timeout=30):
                num_parts += 1
                await client.call(address, "echo", timeout=30)  # takes its time
        assert num_parts <= frames.MAX_PARTS and client.budgets.messages.used == 0
        assert client.metrics.total("endpoint_connections_dropped") == 1
    listener.close()


@pytest.mark.parametrize("grant", [False, True], ids=["never granted", "granted and never read"])
async def test_replies_that_nobody_takes_end_in_seconds(grant: bool) -> None:
    bounds = Bounds(dead_after=10_000.0, stall_after=10_000.0)  # it is not for its silence that it is dropped
    settings = dataclasses.replace(PLAIN, bounds=bounds)

    async def swell(call: IncomingCall) -> Message:
        return Message(None, (memoryview(bytearray(MIB)),))

    async with serving(settings) as (server, address), client_of(settings) as client:
        server.handle("swell", swell)
        async with RawPeer.connected(address) as stranger:
            for stream in range(1, 41):
                head = frames.pack(("swell", 600_000_000, 0, 2**30 if grant else 0, 2**30, None))
                stranger.writer.write(frames.encode_small(frames.REQUEST, stream, head, [], []))
            await until(lambda: server.budgets.replies.used > 30 * MIB)
            let_pass(15.0)
            (connection,) = server.pool.connections()
            connection._wake()
            assert server.budgets.replies.used > 30 * MIB
            for _ in range(4):
                let_pass(16.0)
                connection._timer_fired() if connection.is_open else None
            assert server.budgets.replies.used == 0
            await sends_large(client, address, 2 * MIB)


async def test_who_does_not_read_small_replies_is_dropped_in_seconds() -> None:
    bounds = Bounds(dead_after=10_000.0, stall_after=10_000.0)  # it is not for its silence that it is dropped

    async def swell(call: IncomingCall) -> Message:
        return Message(None, (memoryview(bytes(60_000)),))

    async with serving(dataclasses.replace(PLAIN, bounds=bounds)) as (server, address):
        server.handle("swell", swell)
        async with RawPeer.connected(address) as stranger:
            stranger.writer.transport.pause_reading()  # type: ignore[attr-defined]
            for stream in range(1, 400):
                stranger.writer.write(stranger.request(stream, method="swell"))
            await until(lambda: server.budgets.replies.used > 4 * MIB)
            (connection,) = server.pool.connections()
            await until(lambda: not connection.protocol.num_calls and connection._channels[0].paused)
            for _ in range(3):
                let_pass(12.0)
                connection._timer_fired() if connection.is_open else None
            assert not connection.is_open and server.budgets.replies.used == 0


async def test_one_who_takes_no_replies_leaves_room_for_those_of_others() -> None:
    settings = dataclasses.replace(PLAIN, max_receive_bytes=32 * MIB)

    async def swell(call: IncomingCall) -> Message:
        return Message(None, (memoryview(bytearray(MIB)),))

    async with serving(settings) as (server, address), client_of(settings) as client:
        server.handle("swell", swell)
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(12):  # identities cost nothing
                stranger = await stack.enter_async_context(RawPeer.connected(address))
                for stream in range(1, 20):
                    stranger.writer.write(stranger.request(stream, method="swell"))
            await until(lambda: server.budgets.replies.num_given_up > 10)
            assert server.budgets.replies.used <= 16 * MIB
            for _ in range(3):
                assert len((await client.call(address, "swell", timeout=30)).buffers[0]) == MIB


async def test_heads_of_waiting_calls_are_bounded_by_what_they_cost() -> None:
    settings = dataclasses.replace(PLAIN, max_receive_bytes=24 * MIB)
    parked = asyncio.Event()

    async def park(call: IncomingCall) -> Message:
        await parked.wait()
        return Message(call.body is not None)

    head = frames.pack(("park", 600_000, 0, 0, 2**20, [[]] * 8000))
    async with serving(settings) as (server, address), client_of(settings) as client:
        server.handle("park", park)
        tracemalloc.start()
        try:
            before = tracemalloc.get_traced_memory()[0]
            async with contextlib.AsyncExitStack() as stack:
                for _ in range(3):
                    stranger = await stack.enter_async_context(RawPeer.connected(address))
                    for stream in range(1, 10):
                        stranger.writer.write(frames.encode_small(frames.REQUEST, stream, head, [], []))
                    await stranger.writer.drain()
                    for _ in range(10):
                        kind = frames.HEADER.unpack(await stranger.reader.readexactly(16))
                        answer = await stranger.reader.readexactly(kind[3])
                        if b"overloaded" in answer:
                            break
                    else:
                        raise AssertionError("all were taken")
                    assert (await client.call(address, "echo", 1, timeout=30)).body == 1
                assert tracemalloc.get_traced_memory()[0] - before < 12 * MIB
                assert server.budgets.small_calls.used <= 6 * MIB
            parked.set()
        finally:
            tracemalloc.stop()


async def test_a_crowd_of_calls_leaves_some_room_for_the_next_one() -> None:
    settings = dataclasses.replace(PLAIN, max_receive_bytes=96 * MIB)
    parked = asyncio.Event()

    async def park(call: IncomingCall) -> Message:
        await parked.wait()
        return Message()

    async with serving(settings) as (server, address), client_of(settings) as client:
        server.handle("park", park)
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(5):
                stranger = await stack.enter_async_context(RawPeer.connected(address))
                for stream in range(1, 1000):
                    stranger.writer.write(stranger.request(stream, method="park"))
                await stranger.writer.drain()
            await until(lambda: server.budgets.small_calls.used > 18 * MIB)
            waiting = [asyncio.create_task(client.call(address, "park", timeout=30)) for _ in range(16)]
            echoes = await asyncio.gather(*(client.call(address, "echo", n, timeout=30) for n in range(8)))
            assert [reply.body for reply in echoes] == list(range(8))
            parked.set()
            await asyncio.gather(*waiting)


async def test_a_storm_of_cancels_leaves_nothing_behind() -> None:
    async with serving(PLAIN) as (server, address), client_of() as client:
        async with RawPeer.connected(address) as stranger:
            for stream in range(1, 3000):
                stranger.writer.write(begin(stream, GIB) + frames.frame(frames.CANCEL, stream=stream))
            stranger.writer.write(stranger.request(3000))
            await stranger.writer.drain()
            await until(lambda: server.pool.connections()[0].protocol.incoming.last_seen == 3000)
            await sends_large(client, address, 2 * MIB)
            assert server.budgets.messages.num_waiting == 0
        await until(lambda: server.budgets.messages.used == 0)


async def test_a_flood_of_announcements_ends_the_connection_of_who_sends_it() -> None:
    settings = dataclasses.replace(PLAIN, max_receive_bytes=MIB)
    async with serving(settings) as (server, address), client_of(settings) as client:
        async with RawPeer.connected(address) as stranger:
            for stream in range(1, 20_000):
                stranger.writer.write(begin(stream, 2 * MIB))
            await stranger.closed()
        await sends_large(client, address, MIB // 4)
        assert server.budgets.messages.used <= MIB


async def test_errors_of_who_makes_room_can_be_tried_again() -> None:
    assert Overloaded("", retry_after=1.0).retryable and ConnectionLost("", "").retryable
