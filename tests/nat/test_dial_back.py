import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator, Sequence

import pytest

from tesseract_async.endpoint.endpoint import Endpoint, IncomingCall, Message
from tesseract_async.errors import NotAllowed, Overloaded
from tesseract_async.identity import Identity
from tesseract_async.metrics import Metrics
from tesseract_async.nat import preamble
from tesseract_async.nat.demux import PreambleDemultiplexer
from tesseract_async.nat.dial_back import DIAL_BACK, MAX_DIALS_PER_MINUTE, PROOF_TIMEOUT, DialBack
from tesseract_async.network.address_scope import AddressScope
from tesseract_async.transport import tcp
from tesseract_async.transport.base import PeerAddress
from tests.loopback import needs_ipv6_loopback

TIMEOUT = 30.0
SCOPE = AddressScope(["127.0.0.1", "203.0.113.9", "::1", "2001:db8::9"])


class Node:
    def __init__(self, *, helps: bool, named: Sequence[str] = (), proof_timeout: float = PROOF_TIMEOUT) -> None:
        self.sock = socket.socket()
        self.sock.bind(("127.0.0.1", 0))
        self.port = self.sock.getsockname()[1]
        demultiplexer = PreambleDemultiplexer(
            self.sock,
            handlers={preamble.PROBE: lambda token, pipe: self.dial_back.pipe_arrived(token, pipe)},
            metrics=Metrics(),
        )
        self.endpoint = Endpoint(identity=Identity.generate(), transports=[demultiplexer])
        self.dial_back = DialBack(
            self.endpoint,
            own_addresses=lambda: named,
            scope=SCOPE,
            dial_timeout=TIMEOUT,
            proof_timeout=proof_timeout,
        )
        self.peer = PeerAddress(self.endpoint.peer_id, (f"127.0.0.1:{self.port}",))
        if helps:
            self.dial_back.start()
        else:
            self.endpoint.handle(DIAL_BACK, self.lie)

    @property
    def num_dials(self) -> float:
        return self.endpoint.metrics.total("dial_backs")

    async def lie(self, call: IncomingCall) -> Message:
        """Says that it dialed, and did not."""
        return Message({"host": call.origin})


@contextlib.asynccontextmanager
async def nodes(
    count: int, *, liars: int = 0, named: Sequence[str] = (), proof_timeout: float = PROOF_TIMEOUT
) -> AsyncIterator[list[Node]]:
    """With a `proof_timeout` of 0, a proof that has not come before its helper's reply is none."""
    made = [Node(helps=number >= liars, named=named, proof_timeout=proof_timeout) for number in range(count)]
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
        found = await node.dial_back.check([helper.peer for helper in helpers], port=node.port)
        assert found == (True, "127.0.0.1")
        assert sum(helper.num_dials for helper in helpers) == 2, "two agree: no third is asked"


@pytest.mark.both_loops
async def test_nobody_gets_through() -> None:
    async with nodes(3, proof_timeout=0.0) as (*helpers, node):
        with deaf_port() as port:
            found = await node.dial_back.check([one.peer for one in helpers], port=port)
        assert found == (False, "127.0.0.1")


async def test_a_third_decides_where_two_disagree() -> None:
    async with nodes(4, liars=1) as (liar, one, other, node):
        peers = [liar.peer, one.peer, other.peer]
        assert await node.dial_back.check(peers, port=node.port) == (True, "127.0.0.1")
        assert one.num_dials == other.num_dials == 1


async def test_what_helpers_merely_say_proves_nothing() -> None:
    async with nodes(3, liars=2, proof_timeout=0.0) as (*liars, node):
        assert await node.dial_back.check([one.peer for one in liars], port=node.port) == (False, "127.0.0.1")


async def test_dead_helpers_have_no_vote() -> None:
    async with nodes(2) as (helper, node):
        with deaf_port() as port:
            dead = PeerAddress(Identity.generate().peer_id, (f"127.0.0.1:{port}",))
            assert await node.dial_back.check([dead], port=node.port) is None
            assert await node.dial_back.check([dead, helper.peer], port=node.port) == (True, "127.0.0.1")
        assert await node.dial_back.check([], port=node.port) is None


@pytest.mark.parametrize(
    "body", [None, {}, {"port": 0, "token": bytes(16)}, {"port": "80", "token": bytes(16)}, {"port": 80, "token": b""}]
)
async def test_malformed_requests_are_refused(body: object) -> None:
    async with nodes(2) as (helper, node):
        with pytest.raises(NotAllowed):
            await node.endpoint.call(helper.peer, DIAL_BACK, body, timeout=30)
        assert helper.num_dials == 0


async def test_a_helper_dials_seldom() -> None:
    async with nodes(2) as (helper, node):
        body = {"port": node.port, "token": bytes(16)}
        for _ in range(MAX_DIALS_PER_MINUTE):
            await node.endpoint.call(helper.peer, DIAL_BACK, body, timeout=30)
        with pytest.raises(Overloaded):
            await node.endpoint.call(helper.peer, DIAL_BACK, body, timeout=30)
        assert helper.endpoint.metrics.snapshot()["dial_backs_refused{reason=too_many}"] == 1


async def test_a_helper_dials_few_at_once_for_one_host() -> None:
    async with nodes(2) as (helper, node):
        with contextlib.ExitStack() as stack:
            deaf = stack.enter_context(socket.socket())  # its queue is full: a third connection gets no answer
            deaf.bind(("127.0.0.1", 0))
            deaf.listen(0)
            port = deaf.getsockname()[1]
            for _ in range(2):
                waiting = stack.enter_context(socket.socket())
                waiting.setblocking(False)
                waiting.connect_ex(("127.0.0.1", port))
            body = {"port": port, "token": bytes(16)}
            loop = asyncio.get_running_loop()
            calls = [loop.create_task(node.endpoint.call(helper.peer, DIAL_BACK, body, timeout=30)) for _ in range(3)]
            done, pending = await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
            [refused] = done
            assert isinstance(refused.exception(), Overloaded)
            for call in pending:
                call.cancel()
            await asyncio.wait(pending)


async def test_helpers_name_their_other_addresses() -> None:
    """A node that has IPv4 and IPv6 learns from those who helped by one where to ask by the other."""
    named = ["203.0.113.5:1", "[2001:db8::5]:1", "not an address", "224.0.0.1:5"]
    async with nodes(2, named=named) as (helper, node):
        assert await node.dial_back.check([helper.peer], port=node.port) == (True, "127.0.0.1")
        assert node.dial_back.also(6) == [PeerAddress(helper.peer.peer_id, ("[2001:db8::5]:1",))]
        assert node.dial_back.also(4) == [PeerAddress(helper.peer.peer_id, ("203.0.113.5:1",))]


@pytest.mark.parametrize("addresses", [None, 5, [1, None], ["1.2.3.4:5"] * 5])
async def test_helpers_that_name_nonsense(addresses: object) -> None:
    async with nodes(2, liars=1, proof_timeout=0.0) as (liar, node):
        liar.endpoint.unhandle(DIAL_BACK)

        async def answer(call: IncomingCall) -> Message:
            return Message({"host": call.origin, "addresses": addresses})

        liar.endpoint.handle(DIAL_BACK, answer)
        await node.dial_back.check([liar.peer], port=node.port)
        assert node.dial_back.also(4) == node.dial_back.also(6) == []


@needs_ipv6_loopback
async def test_a_helper_hears_us_by_the_kind_of_ip_that_is_asked_about() -> None:
    """It dials back where the call came from: a connection by the other kind would tell of that one."""
    async with nodes(2) as (helper, node):
        assert await node.dial_back.check([helper.peer], port=node.port) == (True, "127.0.0.1")
        sock = socket.create_server(("::1", 0), family=socket.AF_INET6)
        listener = tcp.TcpTransport(sock)
        await listener.listen(helper.endpoint.accept)
        peer = PeerAddress(helper.peer.peer_id, (f"[::1]:{sock.getsockname()[1]}",))
        with deaf_port() as port:
            assert await node.dial_back.check([peer], port=port) == (False, "::1")
        await listener.aclose()
