"""The endpoint beyond single calls: who may call, which connection is used, what limits, backs off and ends."""

import asyncio
import contextlib
import dataclasses
import socket

import pytest

from tesseract_async.admission import Policy
from tesseract_async.endpoint.bounds import Bounds
from tesseract_async.endpoint.endpoint import Endpoint, EndpointSettings, IncomingCall, Message
from tesseract_async.endpoint.handlers import STARTS_PER_TURN
from tesseract_async.errors import ConnectionLost, MessageTooLarge, NotAllowed, PeerUnreachable, RemoteError
from tesseract_async.identity import Identity
from tesseract_async.transport.base import PeerAddress
from tesseract_async.transport.tcp import TcpTransport
from tesseract_async.wire import frames
from tests.faults.serving import RawPeer, echo, let_pass, serving, until

PLAIN = EndpointSettings(security="plain")


def client_of(settings: EndpointSettings | None = None) -> Endpoint:
    return Endpoint(identity=Identity.generate(), transports=[TcpTransport()], settings=settings)


async def test_the_policy_says_who_may_call_and_who_may_train() -> None:
    async with serving() as (server, address), client_of() as friend, client_of() as reader, client_of() as stranger:
        server.policy = Policy(callers={friend.peer_id, reader.peer_id}, trainers={friend.peer_id})
        server.handle("train", echo, action="train")
        assert (await friend.call(address, "train", 1, timeout=30)).body == 1
        assert (await reader.call(address, "echo", 2, timeout=30)).body == 2
        for client, method in ((reader, "train"), (stranger, "echo"), (stranger, "train")):
            with pytest.raises(NotAllowed, match=client.peer_id.short):
                await client.call(address, method, timeout=30)
        assert server.metrics.total("endpoint_calls_refused") == 3


async def test_no_memory_is_taken_for_the_large_requests_of_who_may_not_call() -> None:
    async with serving(PLAIN) as (server, address), client_of(PLAIN) as stranger:
        server.policy = Policy.only([])
        for _ in range(3):
            with pytest.raises(NotAllowed, match=stranger.peer_id.short):
                await stranger.call(address, "echo", None, [bytes(2**20)], timeout=30)
        (connection,) = server.pool.connections()
        assert server.budgets.messages.used == 0 and not connection.protocol.windows.in_bytes
        assert connection.protocol.num_calls == 0 and server.metrics.total("endpoint_calls_refused") == 3
        server.policy = Policy()
        assert len((await stranger.call(address, "echo", None, [bytes(2**20)], timeout=30)).buffers[0]) == 2**20


def test_an_allow_list_covers_every_action() -> None:
    friend, stranger = Identity.generate().peer_id, Identity.generate().peer_id
    policy = Policy.only([friend])
    for action in ("call", "train", "host"):
        assert policy.allows(friend, action) and not policy.allows(stranger, action)  # type: ignore[arg-type]
        assert Policy().allows(stranger, action)  # type: ignore[arg-type]


@pytest.mark.both_loops
async def test_an_accepted_connection_serves_calls_both_ways() -> None:
    async with serving() as (server, address), client_of() as client:
        client.handle("echo", echo)
        await client.call(address, "echo", timeout=30)
        back = PeerAddress(client.peer_id, ())
        for size in (10, 2_000_000):  # the large reply, then the large request, make the *dialer* open the bulk lane
            reply = await server.call(back, "echo", "back", [bytes(size)], timeout=30)
            assert reply.body == "back" and len(reply.buffers[0]) == size
        assert server.metrics.total("endpoint_connections_opened") == 1


async def test_one_dial_and_one_connection_serve_all_who_call_at_once() -> None:
    async with serving() as (server, address), client_of() as client:
        await asyncio.gather(*(client.call(address, "echo", timeout=30) for _ in range(50)))
        assert len(client.connections()) == len(server.connections()) == 1
        info = client.connections()[0]
        assert info.peer_id == server.peer_id and info.path == f"tcp {address.addresses[0]}" and info.dialed


@pytest.mark.both_loops
async def test_an_idle_connection_is_closed_and_comes_back() -> None:
    settings = EndpointSettings()
    async with serving() as (server, address), client_of(settings) as client:
        await client.call(address, "echo", timeout=30)
        (connection,) = client.pool.connections()
        connection.last_used -= 299
        client.tick()
        assert client.connections()
        connection.last_used -= 2
        client.tick()
        await connection.closed
        assert not client.connections()
        await client.call(address, "echo", timeout=30)
        assert client.metrics.total("endpoint_connections_opened") == 2
        assert client.metrics.total("transport_bytes_sent") > 100


@pytest.mark.both_loops
async def test_an_upgrade_moves_later_calls_and_leaves_running_ones() -> None:
    release = asyncio.Event()

    async def wait(call: IncomingCall) -> Message:
        await release.wait()
        return Message("waited")

    async with serving() as (server, address), client_of() as client:
        server.handle("wait", wait)
        running = asyncio.create_task(client.call(address, "wait", timeout=30))
        await client.call(address, "echo", timeout=30)
        (old,) = client.pool.connections()
        await client.upgrade(address, TcpTransport().paths(address))
        before = old.last_used
        await client.call(address, "echo", timeout=30)
        assert old.last_used == before and len(client.connections()) == 2
        client.tick()
        release.set()
        assert (await running).body == "waited"
        client.tick()
        await old.closed
        assert len(client.connections()) == 1


async def test_a_reply_beyond_the_callers_bound_is_an_error() -> None:
    async def big(call: IncomingCall) -> Message:
        return Message(None, (memoryview(bytes(call.body)),))

    settings = EndpointSettings(max_receive_bytes=4 * 2**20)
    async with serving() as (server, address), client_of(settings) as client:
        server.handle("big", big)
        assert (
            len((await client.call(address, "big", 10**6, timeout=30, max_reply_bytes=2 * 10**6)).buffers[0]) == 10**6
        )
        assert client.budgets.messages.used == 0, "room that was reserved is given back"
        with pytest.raises(RemoteError, match="more than the 500000"):
            await client.call(address, "big", 10**6, timeout=30, max_reply_bytes=500_000)
        with pytest.raises(MessageTooLarge):
            await client.call(address, "big", 1, timeout=30, max_reply_bytes=5 * 2**20)
        with pytest.raises(MessageTooLarge):
            await client.call(address, "big", 5 * 2**20, timeout=30)


async def test_mistakes_of_the_caller_are_raised_before_anything_is_sent() -> None:
    peer = PeerAddress.parse("127.0.0.1:1")
    async with client_of() as client:
        for wrong in (
            {"timeout": 0},
            {"timeout": -1},
            {"timeout": float("nan")},
            {"timeout": 1, "priority": 200},
        ):
            with pytest.raises(ValueError):
                await client.call(peer, "m", **wrong)  # type: ignore[arg-type]
        with pytest.raises(ValueError):
            await client.call(peer, "x" * 200, timeout=1)
        with pytest.raises(ValueError):
            client.handle("", echo)
    with pytest.raises(ValueError, match="security"):
        Endpoint(identity=Identity.generate(), settings=EndpointSettings(security="none"))  # type: ignore[arg-type]
    async with serving() as (_, address), client_of() as client:
        for body in (object(), 1 << 80, bytes(2 * 2**20)):
            with pytest.raises((TypeError, ValueError)):
                await client.call(address, "echo", body, timeout=30)
        with pytest.raises((TypeError, ValueError)):
            await client.call(address, "echo", None, [memoryview(bytes(10))[::2]], timeout=30)
        assert (await client.call(address, "echo", 1, timeout=30)).body == 1


async def test_a_handlers_unsendable_reply_is_an_error_at_the_caller(caplog: pytest.LogCaptureFixture) -> None:
    async def odd(call: IncomingCall) -> Message:
        return Message(object())

    async with serving() as (server, address), client_of() as client:
        server.handle("odd", odd)
        with pytest.raises(RemoteError, match="odd failed"):
            await client.call(address, "odd", timeout=30)


async def test_ends_with_different_security_do_not_understand_each_other_and_say_so() -> None:
    quick = dataclasses.replace(PLAIN, bounds=Bounds(handshake_timeout=0.5))
    for mine, theirs in (
        (quick, EndpointSettings(bounds=Bounds(handshake_timeout=0.5))),
        (EndpointSettings(bounds=Bounds(handshake_timeout=0.5)), quick),
    ):
        async with serving(theirs) as (_, address), client_of(mine) as client:
            with pytest.raises(PeerUnreachable):
                await client.call(address, "echo", timeout=30)


async def test_another_wire_version_is_named_by_both_sides() -> None:
    future = frames.frame(frames.HELLO, payload=b"TSRA\x00\x07" + frames.pack({"from": "the future"}))

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(future)
        await reader.read()
        writer.close()

    async with await asyncio.start_server(greet, "127.0.0.1", 0) as newer, client_of(PLAIN) as client:
        address = PeerAddress.parse(f"127.0.0.1:{newer.sockets[0].getsockname()[1]}")
        with pytest.raises(PeerUnreachable, match="wire version 7, this node 2: upgrade this node"):
            await client.call(address, "echo", timeout=30)
    async with serving(PLAIN) as (server, address), RawPeer.connected(address, greet=False) as peer:
        peer.writer.write(future)
        await peer.closed()
        assert server.metrics.counters[("endpoint_handshakes_failed", (("reason", "version"),))] == 1


async def test_failed_dials_back_off_together_and_a_returning_peer_is_found() -> None:
    settings = dataclasses.replace(PLAIN, bounds=Bounds(backoff_base=0.05, backoff_max=0.2))
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))  # nobody listens there yet, and nobody else is given the port
    identity = Identity.generate()
    address = PeerAddress(identity.peer_id, (f"127.0.0.1:{sock.getsockname()[1]}",))
    async with client_of(settings) as client:
        for _ in range(3):
            results = await asyncio.gather(
                *(client.call(address, "echo", timeout=30) for _ in range(5)), return_exceptions=True
            )
            assert all(isinstance(result, PeerUnreachable) for result in results)
        assert client.metrics.total("endpoint_dials_failed") == 3
        async with Endpoint(identity=identity, transports=[TcpTransport(sock)], settings=settings) as server:
            server.handle("echo", echo)
            await server.start()
            assert (await client.call(address, "echo", 1, timeout=30)).body == 1


async def test_a_peer_that_came_back_elsewhere_is_dialed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed server's next process has another port: how often the old one failed says nothing of it."""
    settings = dataclasses.replace(PLAIN, bounds=Bounds(backoff_base=600.0, backoff_max=600.0))
    with socket.socket() as old:
        old.bind(("127.0.0.1", 0))  # nobody listens there
        async with serving(PLAIN) as (_, address), client_of(settings) as client:
            before = PeerAddress(address.peer_id, (f"127.0.0.1:{old.getsockname()[1]}",))
            with pytest.raises(PeerUnreachable):
                await client.call(before, "echo", timeout=30)
            waited, sleep = asyncio.Event(), asyncio.sleep
            monkeypatch.setattr(asyncio, "sleep", lambda seconds: waited.wait() if seconds > 60 else sleep(seconds))
            waiting = asyncio.create_task(client.call(before, "echo", 1, timeout=30))
            await sleep(0)
            assert (await client.call(address, "echo", 2, timeout=30)).body == 2
            assert not waiting.done()
            waited.set()
            # the old place is not tried again: the peer is there
            assert (await waiting).body == 1 and client.metrics.total("endpoint_dials_failed") == 1


async def test_a_peer_that_never_answers_the_dial_ends_in_a_timeout() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = PeerAddress.parse(f"127.0.0.1:{silent.getsockname()[1]}")
        async with client_of() as client:
            with pytest.raises(TimeoutError, match="echo"):
                await client.call(address, "echo", timeout=0.2)
        async with client_of(EndpointSettings(bounds=Bounds(handshake_timeout=0.2))) as client:
            with pytest.raises(PeerUnreachable, match=r"within 0\.2 s"):
                await client.call(address, "echo", timeout=30)


@pytest.mark.both_loops
async def test_closing_fails_own_calls_and_cancels_handlers() -> None:
    started, cancelled = asyncio.Event(), asyncio.Event()

    async def forever(call: IncomingCall) -> Message:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()
        raise AssertionError

    for close_server in (True, False):
        started.clear()
        cancelled.clear()
        async with serving() as (server, address), client_of() as client:
            server.handle("forever", forever)
            task = asyncio.create_task(client.call(address, "forever", timeout=30))
            await started.wait()
            await (server if close_server else client).aclose()
            with pytest.raises(ConnectionLost, match="closing"):
                await task
            await asyncio.wait_for(cancelled.wait(), 30)
            with pytest.raises((ConnectionLost, PeerUnreachable)):
                await client.call(address, "echo", timeout=30)


async def test_security_off_says_so_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async with client_of():
        assert "security is off" not in caplog.text
    async with client_of(PLAIN):
        assert "security is off" in caplog.text


async def test_connections_are_limited_in_number_and_those_that_are_open_go_on() -> None:
    settings = dataclasses.replace(PLAIN, bounds=Bounds(max_connections=2))
    async with serving(settings) as (server, address), contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(client_of(PLAIN)) for _ in range(3)]
        for client in clients[:2]:
            assert (await client.call(address, "echo", 1, timeout=30)).body == 1
        with pytest.raises(PeerUnreachable):
            await clients[2].call(address, "echo", 1, timeout=30)
        assert len(server.connections()) == 2
        assert (await clients[0].call(address, "echo", 2, timeout=30)).body == 2
        await clients[1].aclose()
        async with asyncio.timeout(30):
            while len(server.connections()) > 1:
                await clients[0].call(address, "echo", timeout=30)
        assert (await clients[2].call(address, "echo", 3, timeout=30)).body == 3


async def test_a_call_cancelled_before_its_turn_is_never_handled() -> None:
    handled = []

    async def note(call: IncomingCall) -> Message:
        handled.append(bytes(call.buffers[0]))
        return Message()

    async with serving(PLAIN) as (server, address), RawPeer.connected(address) as peer:
        server.handle("note", note)
        first = [peer.request(stream, b"first", method="note") for stream in range(1, STARTS_PER_TURN + 1)]
        stream = STARTS_PER_TURN + 1
        cancelled = peer.request(stream, b"cancelled", method="note") + frames.frame(frames.CANCEL, stream=stream)
        peer.writer.write(b"".join(first) + cancelled + peer.request(stream + 1, b"last", method="note"))
        await until(lambda: b"last" in handled)
        assert handled == [b"first"] * STARTS_PER_TURN + [b"last"]


async def test_half_open_channels_are_limited_in_number() -> None:
    settings = dataclasses.replace(PLAIN, bounds=Bounds(max_half_open=3, handshake_timeout=60.0))
    async with serving(settings) as (server, address), contextlib.AsyncExitStack() as stack:
        peers = [await stack.enter_async_context(RawPeer.connected(address, greet=False)) for _ in range(5)]
        await until(lambda: server.metrics.total("endpoint_handshakes_failed") == 2)
        let_pass(61.0)
        await asyncio.gather(*(peer.closed() for peer in peers))
        counted = {
            dict(labels)["reason"]: value
            for (name, labels), value in server.metrics.counters.items()
            if name == "endpoint_handshakes_failed"
        }
        assert counted == {"too_many": 2, "timeout": 3}
        async with client_of(settings) as client:
            assert (await client.call(address, "echo", 1, timeout=30)).body == 1


async def test_a_standing_still_loop_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    async with serving() as (server, address), client_of() as client:
        await client.call(address, "echo", timeout=30)
        let_pass(5.0)
        client.tick()
        assert "stood still for" in caplog.text and client.metrics.gauges[("loop_lag_seconds", ())] > 3
