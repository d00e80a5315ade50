from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace

import pytest

from tesseract_async.endpoint.endpoint import Endpoint, IncomingCall, Message
from tesseract_async.errors import NotAllowed, Overloaded
from tesseract_async.identity import Identity
from tesseract_async.metrics import Metrics
from tesseract_async.nat.demux import PreambleDemultiplexer
from tesseract_async.nat.dial_back import (
    DIAL_BACK,
    DialBackServer,
    Finding,
    Reachability,
    ReachabilitySettings,
)
from tesseract_async.transport import tcp
from tesseract_async.transport.base import PeerAddress
from tests.loopback import needs_ipv6_loopback

SETTINGS = ReachabilitySettings(dial_timeout=30.0)


class Node:
    def __init__(self, settings: ReachabilitySettings, *, helps: bool) -> None:
        self.sock = socket.socket()
        self.sock.bind(("127.0.0.1", 0))
        self.port = self.sock.getsockname()[1]
        demultiplexer = PreambleDemultiplexer(
            tcp.TcpTransport(self.sock),
            special=lambda kind, token, pipe: self.reachability.pipe_arrived(token, pipe),
            metrics=Metrics(),
        )
        self.endpoint = Endpoint(identity=Identity.generate(), transports=[demultiplexer])
        self.reachability = Reachability(self.endpoint, settings=settings)
        self.peer = PeerAddress(self.endpoint.peer_id, (f"127.0.0.1:{self.port}",))
        self.num_dials = 0
        if helps:
            DialBackServer(self.endpoint, connect=self.connect, settings=settings)
        else:
            self.endpoint.handle(DIAL_BACK, self.lie)

    async def connect(self, address: str) -> tcp.TcpPipe:
        self.num_dials += 1
        return await tcp.connect(address)

    async def lie(self, call: IncomingCall) -> Message:
        """Says that it dialled, and did not."""
        return Message({"host": call.origin})


@contextlib.asynccontextmanager
async def nodes(count: int, *, liars: int = 0, settings: ReachabilitySettings = SETTINGS) -> AsyncIterator[list[Node]]:
    made = [Node(settings, helps=number >= liars) for number in range(count)]
    for node in made:
        await node.endpoint.start()
    yield made
    for node in made:
        await node.endpoint.aclose()


@contextlib.contextmanager
def deaf_port() -> Iterator[int]:
    """Nobody listens there, and nobody else is given it meanwhile."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield int(sock.getsockname()[1])


@pytest.mark.both_loops
async def test_two_helpers_find_it_reachable() -> None:
    async with nodes(4) as (*helpers, node):
        found = await node.reachability.check([helper.peer for helper in helpers], port=node.port)
        assert found == (True, "127.0.0.1")
        assert sum(helper.num_dials for helper in helpers) == 2, "two agree: no third is asked"


@pytest.mark.both_loops
async def test_nobody_gets_through() -> None:
    async with nodes(3) as (*helpers, node):
        with deaf_port() as port:
            found = await node.reachability.check([one.peer for one in helpers], port=port)
        assert found == (False, "127.0.0.1")


async def test_a_third_decides_where_two_disagree() -> None:
    async with nodes(4, liars=1) as (liar, one, other, node):
        peers = [liar.peer, one.peer, other.peer]
        assert await node.reachability.check(peers, port=node.port) == (True, "127.0.0.1")
        assert one.num_dials == other.num_dials == 1


async def test_what_helpers_merely_say_proves_nothing() -> None:
    async with nodes(3, liars=2) as (*liars, node):
        assert await node.reachability.check([one.peer for one in liars], port=node.port) == (False, "127.0.0.1")


async def test_dead_helpers_have_no_vote() -> None:
    async with nodes(2) as (helper, node):
        with deaf_port() as port:
            dead = PeerAddress(Identity.generate().peer_id, (f"127.0.0.1:{port}",))
            assert await node.reachability.check([dead], port=node.port) == (None, None)
            assert await node.reachability.check([dead, helper.peer], port=node.port) == (True, "127.0.0.1")
        assert await node.reachability.check([], port=node.port) == (None, None)


@pytest.mark.parametrize(
    "body", [None, {}, {"port": 0, "token": bytes(16)}, {"port": "80", "token": bytes(16)}, {"port": 80, "token": b""}]
)
async def test_malformed_wishes_are_refused(body: object) -> None:
    async with nodes(2) as (helper, node):
        with pytest.raises(NotAllowed):
            await node.endpoint.call(helper.peer, DIAL_BACK, body, timeout=30)
        assert helper.num_dials == 0


async def test_a_helper_dials_seldom() -> None:
    async with nodes(2, settings=replace(SETTINGS, max_dials_per_minute=3)) as (helper, node):
        body = {"port": node.port, "token": bytes(16)}
        for _ in range(3):
            await node.endpoint.call(helper.peer, DIAL_BACK, body, timeout=30)
        with pytest.raises(Overloaded):
            await node.endpoint.call(helper.peer, DIAL_BACK, body, timeout=30)
        assert helper.endpoint.metrics.snapshot()["dial_backs_refused{reason=too_many}"] == 1


async def test_a_helper_dials_few_at_once() -> None:
    async with nodes(2, settings=replace(SETTINGS, max_dials_per_host=2)) as (helper, node):
        waiting = asyncio.Event()
        go_on = asyncio.Event()

        async def slow(address: str) -> tcp.TcpPipe:
            helper.num_dials += 1
            if helper.num_dials == 2:
                waiting.set()
            await go_on.wait()
            raise OSError("refused")

        helper.endpoint.unhandle(DIAL_BACK)
        DialBackServer(helper.endpoint, connect=slow, settings=SETTINGS)
        body = {"port": node.port, "token": bytes(16)}
        loop = asyncio.get_running_loop()
        calls = [loop.create_task(node.endpoint.call(helper.peer, DIAL_BACK, body, timeout=30)) for _ in range(2)]
        await waiting.wait()
        with pytest.raises(Overloaded):
            await node.endpoint.call(helper.peer, DIAL_BACK, body, timeout=30)
        go_on.set()
        await asyncio.gather(*calls)


def test_the_role_follows_from_what_was_found() -> None:
    assert Finding().role == "unknown"
    assert Finding(tcp=True).role == "public"
    assert Finding(tcp=True, udp=True).role == "public"
    assert Finding(tcp=True, udp=False).role == "client"
    assert Finding(tcp=False, udp=True).role == "client"


@pytest.mark.parametrize(
    ("finding", "words"),
    [
        (Finding(), "No other node"),
        (Finding(tcp=True, udp=True, host="203.0.113.5"), "203.0.113.5:31337"),
        (Finding(tcp=True, udp=False, host="203.0.113.5"), "UDP port 31337"),
        (Finding(tcp=False, nat="keeping", host="203.0.113.5"), "holes can be punched"),
        (Finding(tcp=False, nat="symmetric", host="203.0.113.5"), "relay"),
        (Finding(tcp=False, nat="none", host="203.0.113.5"), "firewall"),
        (Finding(tcp=False), "forward TCP and UDP port 31337"),
    ],
)
def test_the_user_is_told_what_to_do(finding: Finding, words: str) -> None:
    assert words in " ".join(finding.sentences(31337))


async def test_helpers_name_their_other_addresses() -> None:
    """Whoever has IPv4 and IPv6 learns from those who helped by one where to ask by the other."""
    async with nodes(2) as (helper, node):
        named = ["203.0.113.5:1", "[2001:db8::5]:1", "not an address", "224.0.0.1:5"]
        helper.endpoint.unhandle(DIAL_BACK)
        DialBackServer(helper.endpoint, connect=helper.connect, own_addresses=lambda: named, settings=SETTINGS)
        assert await node.reachability.check([helper.peer], port=node.port) == (True, "127.0.0.1")
        assert node.reachability.also(6) == [PeerAddress(helper.peer.peer_id, ("[2001:db8::5]:1",))]
        assert node.reachability.also(4) == [PeerAddress(helper.peer.peer_id, ("203.0.113.5:1",))]


@pytest.mark.parametrize("addresses", [None, 5, [1, None], ["1.2.3.4:5"] * 5])
async def test_helpers_that_name_nonsense(addresses: object) -> None:
    async with nodes(2, liars=1) as (liar, node):
        liar.endpoint.unhandle(DIAL_BACK)

        async def answer(call: IncomingCall) -> Message:
            return Message({"host": call.origin, "addresses": addresses})

        liar.endpoint.handle(DIAL_BACK, answer)
        await node.reachability.check([liar.peer], port=node.port)
        assert node.reachability.also(4) == node.reachability.also(6) == []


@needs_ipv6_loopback
async def test_a_helper_hears_us_by_the_kind_of_ip_that_is_asked_about() -> None:
    """It dials back where the call came from: a connection by the other kind would tell of that one."""
    async with nodes(2) as (helper, node):
        assert (await node.reachability.check([helper.peer], port=node.port))[1] == "127.0.0.1"
        sock = socket.create_server(("::1", 0), family=socket.AF_INET6)
        listener = tcp.TcpTransport(sock)
        await listener.listen(helper.endpoint.accept)
        peer = PeerAddress(helper.peer.peer_id, (f"[::1]:{sock.getsockname()[1]}",))
        with deaf_port() as port:
            _, host = await node.reachability.check([peer], port=port)
        assert host == "::1"
        await listener.aclose()
