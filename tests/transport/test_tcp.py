"""TCP pipes: the conformance suite, the listener, throttling."""

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from tesseract_async.identity import Identity, PeerID
from tesseract_async.transport.base import PeerAddress, Pipe, join_host_port, split_host_port
from tesseract_async.transport.tcp import EARLY_BYTES, MAX_REMEMBERED, TcpTransport, connect
from tests.loopback import needs_both_kinds_of_ip, needs_ipv6_loopback
from tests.transport import conformance
from tests.transport.conformance import *  # noqa: F403
from tests.transport.conformance import Pipes, Receiver

pytestmark = pytest.mark.both_loops


@contextlib.asynccontextmanager
async def tcp_pair() -> AsyncIterator[tuple[Pipe, Pipe]]:
    sock = socket.create_server(("127.0.0.1", 0))
    accepted: asyncio.Future[Pipe] = asyncio.get_running_loop().create_future()
    listening, dialing = TcpTransport(sock), TcpTransport()
    await listening.listen(accepted.set_result)
    (path,) = dialing.paths(PeerAddress(None, (join_host_port(*sock.getsockname()),)))
    pair = await path.open(), await accepted
    try:
        yield pair
    finally:
        ends = [Receiver(), Receiver()]
        for pipe, end in zip(pair, ends, strict=True):
            pipe.start(end)
            pipe.abort()
        for end in ends:
            await end.until(lambda end=end: bool(end.lost))  # type: ignore[misc]
        await listening.aclose()
        await dialing.aclose()


@pytest.fixture
def pipes() -> Pipes:
    return tcp_pair


def test_the_conformance_suite_is_complete_here() -> None:
    assert {name for name in vars(conformance) if name.startswith("test_")} <= set(globals())


async def test_an_impatient_peer_is_not_stored_without_a_bound() -> None:
    async with tcp_pair() as (dialed, accepted):
        mine = Receiver()
        dialed.start(mine)
        dialed.write(bytes(50 * EARLY_BYTES))
        await mine.until(lambda: bool(mine.lost))


async def test_paths_give_each_address_a_head_start() -> None:
    peer = PeerAddress(None, ("10.0.0.1:1", "[::1]:2", "example.org:3"))
    paths = TcpTransport().paths(peer)
    assert [path.name for path in paths] == ["tcp [::1]:2", "tcp 10.0.0.1:1", "tcp example.org:3"]
    assert [path.delay for path in paths] == [0.0, 0.25, 0.5]


async def test_the_address_that_worked_comes_first() -> None:
    transport = TcpTransport()
    peer = PeerAddress(Identity.generate().peer_id, ("10.0.0.1:1", "10.0.0.2:1", "[::1]:2", "[::2]:2"))

    def order(peer: PeerAddress = peer) -> list[str]:
        return [path.name.removeprefix("tcp ") for path in transport.paths(peer)]

    assert order() == ["[::1]:2", "10.0.0.1:1", "[::2]:2", "10.0.0.2:1"]
    by_name = {path.name: path for path in transport.paths(peer)}
    transport.path_finished(peer, by_name["tcp 10.0.0.2:1"], None)
    assert order() == ["10.0.0.2:1", "[::1]:2", "10.0.0.1:1", "[::2]:2"]
    assert order(replace(peer, addresses=("[::1]:2",))) == ["[::1]:2"]
    transport.path_finished(peer, by_name["tcp 10.0.0.2:1"], OSError())
    assert order()[0] == "[::1]:2"
    others = [replace(peer, peer_id=PeerID(os.urandom(32))) for _ in range(MAX_REMEMBERED + 1)]
    for other in others:
        transport.path_finished(other, by_name["tcp 10.0.0.2:1"], None)
    first, *remembered = [order(other)[0] for other in others]
    assert first == "[::1]:2" and {*remembered} == {"10.0.0.2:1"}


@needs_both_kinds_of_ip
@pytest.mark.parametrize("host", ["127.0.0.1", pytest.param("::1", marks=needs_ipv6_loopback)])
async def test_a_socket_for_both_kinds_of_ip(host: str) -> None:
    """IPv4 callers are seen under their IPv4 address: dialing them back and counting them depends on it."""
    sock = socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    transport = TcpTransport(sock)
    accepted: asyncio.Queue[Pipe] = asyncio.Queue()
    await transport.listen(accepted.put_nowait)
    pipe = await connect(join_host_port(host, sock.getsockname()[1]))
    theirs = await accepted.get()
    assert theirs.origin == host
    assert theirs.description.startswith(f"tcp {join_host_port(host, 1)[:-2]}:")
    for one in (pipe, theirs):
        one.abort()
    await transport.aclose()


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="only Linux has it")
async def test_the_kernel_gives_up_a_dead_peer_as_soon_as_the_heartbeat_does() -> None:
    async with tcp_pair() as pipes:
        timeouts = []
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(name))) as sock:
                sock.getpeername()  # raises for one that is not connected
                timeouts.append(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT))
        assert timeouts.count(15_000) == 2
        for pipe in pipes:
            pipe.start(Receiver())


def test_addresses_are_read_and_written() -> None:
    for text, parts in {"a.b:5": ("a.b", 5), "[::1]:80": ("::1", 80), "127.0.0.1:0": ("127.0.0.1", 0)}.items():
        assert split_host_port(text) == parts and join_host_port(*parts) == text
    for text in ("", "a", "a:", ":5", "::1:80", "[a]", "a:70000", "a:-1", "a:٣", "[1.2.3.4]:x"):
        with pytest.raises(ValueError, match=r"address|port"):
            split_host_port(text)


def test_peer_addresses_are_read_and_written() -> None:
    peer_id = "ab" * 32
    address = PeerAddress.parse(f"127.0.0.1:5/{peer_id}")
    assert str(address) == f"127.0.0.1:5/{peer_id}" and str(address.peer_id) == peer_id
    assert PeerAddress.parse("h:1") == PeerAddress(None, ("h:1",)) and str(PeerAddress.parse("h:1")) == "h:1"
    assert "abababab" in address.short and "no address" in PeerAddress(address.peer_id, ()).short
    for text in ("h:1/xyz", "h", "h:1/"):
        with pytest.raises(ValueError):
            PeerAddress.parse(text)
