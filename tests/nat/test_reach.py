"""`Reach`: what a node finds out about its own place, with a network in memory; nodes on loopback where it matters."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from tesseract_async.endpoint.endpoint import Endpoint
from tesseract_async.identity import Identity
from tesseract_async.metrics import Metrics
from tesseract_async.nat import reach as module
from tesseract_async.nat import stun_client
from tesseract_async.nat.dial_back import Finding
from tesseract_async.nat.reach import Reach, ReachSettings
from tesseract_async.nat.webrtc import pipe as webrtc
from tesseract_async.node import TesseractNode
from tesseract_async.transport.base import PeerAddress
from tests.loopback import needs_both_kinds_of_ip

Address = tuple[str, int]


class Network:
    """As much of a `TesseractNetwork` as `Reach` looks at."""

    def __init__(self, *contacts: PeerAddress) -> None:
        self.contacts = list(contacts)
        self.role = "unknown"
        self.on_role_change: Callable[[], None] | None = None
        self.forced_client: bool | None = None

    def public_contacts(self, count: int) -> list[PeerAddress]:
        return self.contacts[:count]

    def set_client(self, forced: bool) -> None:
        self.forced_client = forced

    async def wait_joined(self, timeout: float | None = None) -> bool:
        return True


class Observers:
    """STUN servers in memory: each sees this node somewhere, after its turn in the dictionary."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seen: dict[Address, Address]) -> None:
        self.seen = seen
        self.asked: list[list[Address]] = []
        monkeypatch.setattr(stun_client, "ask", self.ask)

    async def ask(self, servers: Sequence[Address], *, local_host: str, timeout: float = 1.0) -> dict[Address, Address]:
        self.asked.append(list(servers))
        assert all((":" in host) == (":" in local_host) for host, _ in servers), "one socket speaks one kind of IP"
        return {server: self.seen[server] for server in self.seen if server in servers}


def peer(address: str) -> PeerAddress:
    return PeerAddress(Identity.generate().peer_id, (address,))


R1, R2, R3 = (peer(f"203.0.113.{number}:31337") for number in (1, 2, 3))
V6 = peer("[2001:db8::9]:31337")


def tcp_socket(host: str) -> socket.socket:
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    if host == "::":
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    sock.bind((host, 0))
    return sock


@contextlib.asynccontextmanager
async def node(
    network: Network,
    monkeypatch: pytest.MonkeyPatch,
    *,
    host: str = "0.0.0.0",
    own: tuple[str, ...] = ("192.168.1.2",),
    dialled: dict[int, tuple[bool, str]] | None = None,
    settings: ReachSettings = ReachSettings(),  # noqa: B008 (frozen)
) -> AsyncIterator[tuple[Reach, list[list[PeerAddress]]]]:
    """A node's `Reach` whose dial-backs end as `dialled` says, by kind of IP; and the helpers that were asked."""
    asked: list[list[PeerAddress]] = []
    monkeypatch.setattr(module, "own_addresses", lambda skip: list(own))
    sock = tcp_socket(host)
    port = sock.getsockname()[1]
    made = Reach(
        identity=Identity.generate(),
        network=network,  # type: ignore[arg-type]
        sock=sock,
        metrics=Metrics(),
        announced=(f"192.168.1.2:{port}",),
        public=False,
        settings=settings,
    )
    endpoint = Endpoint(identity=Identity.generate(), transports=made.transports)

    async def check(self: object, helpers: Sequence[PeerAddress], *, port: int) -> tuple[bool | None, str | None]:
        asked.append(list(helpers))
        version = 6 if helpers and helpers[0].addresses[0].startswith("[") else 4
        return (dialled or {}).get(version, (None, None)) if helpers else (None, None)

    monkeypatch.setattr(module.Reachability, "check", check)
    await made.start(endpoint)
    assert made._watcher is not None
    yield made, asked
    await made.aclose()
    await endpoint.aclose()
    sock.close()


async def checked(reach: Reach, asked: list[list[PeerAddress]], times: int) -> None:
    """Waits until helpers have been asked so often."""
    async with asyncio.timeout(30):
        while len(asked) < times:  # noqa: ASYNC110 (asking announces nothing)
            await asyncio.sleep(0)


async def known(reach: Reach) -> None:
    async with asyncio.timeout(30):
        while reach.finding.tcp is None:  # noqa: ASYNC110 (a client node without rendezvous announces nothing)
            await asyncio.sleep(0)


KEPT = {("203.0.113.1", 31337): ("198.51.100.7", 4000), ("203.0.113.2", 31337): ("198.51.100.7", 4000)}


async def test_strangers_are_asked_first(monkeypatch: pytest.MonkeyPatch) -> None:
    Observers(monkeypatch, KEPT)
    network = Network(R1, R2, R3)

    class Info:
        peer_id, path = R2.peer_id, "tcp 203.0.113.2:31337"

    monkeypatch.setattr(Endpoint, "connections", lambda self: [Info])
    async with node(network, monkeypatch, dialled={4: (True, "198.51.100.7")}) as (reach, asked):
        for times in range(1, 6):
            await checked(reach, asked, times)
            assert asked[-1][-1] == R2 and set(asked[-1]) == {R1, R2, R3}
            reach.find_out()


async def test_a_change_of_network_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    Observers(monkeypatch, KEPT)
    settings = ReachSettings(watch_period=0.01, period=3600.0)
    async with node(Network(R1, R2), monkeypatch, dialled={4: (True, "198.51.100.7")}, settings=settings) as (
        reach,
        asked,
    ):
        await checked(reach, asked, 1)
        monkeypatch.setattr(module, "own_addresses", lambda skip: ["10.9.9.9"])
        await checked(reach, asked, 2)


async def test_the_role_follows_and_others_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    Observers(monkeypatch, KEPT)
    network, changes = Network(R1, R2), []
    answers = {4: (True, "198.51.100.7")}
    async with node(network, monkeypatch, dialled=answers) as (reach, asked):
        reach.on_change = lambda: changes.append(reach.addresses[0])
        await known(reach)
        port = reach._port
        assert reach.finding.role == "public" and network.forced_client is False
        assert changes == [f"198.51.100.7:{port}"] and "takes full part" in reach.report()[0]
        answers[4] = (False, "198.51.100.7")
        reach.find_out()
        async with asyncio.timeout(30):
            while reach.finding.tcp:  # noqa: ASYNC110 (see above)
                await asyncio.sleep(0)
        assert network.forced_client is True and "forward TCP and UDP port" in " ".join(reach.report())
        del answers[4]  # nobody is there to tell: what was known stands
        reach.find_out()
        await checked(reach, asked, 4)  # the helpers are asked once more
        assert reach.finding.role == "client"


@needs_both_kinds_of_ip
async def test_ipv6_where_ipv4_is_behind_a_nat(monkeypatch: pytest.MonkeyPatch) -> None:
    Observers(monkeypatch, KEPT)
    both = {4: (False, "198.51.100.7"), 6: (True, "2001:db8::2")}
    own = ("192.168.1.2", "2001:db8::2")
    async with node(Network(R1, R2, V6), monkeypatch, host="::", own=own, dialled=both) as (reach, asked):
        await known(reach)
        address = f"[2001:db8::2]:{reach._port}"
        assert reach.finding.role == "client" and reach.behind_nat
        assert reach.addresses == reach.public_addresses == (address,)
        assert reach.symmetric is False and address in " ".join(reach.report())
        del both[4]  # IPv6 alone says nothing about the rest
        before = len(asked)
        reach.find_out()
        await checked(reach, asked, before + 1)
        for _ in range(20):  # what the helpers say is taken in
            await asyncio.sleep(0)
        assert reach.finding.role == "client"


@needs_both_kinds_of_ip
async def test_ipv4_that_works_beside_ipv6_that_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    Observers(monkeypatch, KEPT)
    both = {4: (True, "198.51.100.7"), 6: (False, "2001:db8::2")}
    own = ("192.168.1.2", "2001:db8::2")
    async with node(Network(R1, R2, V6), monkeypatch, host="::", own=own, dialled=both) as (reach, _):
        await known(reach)
        assert reach.finding.role == "public"
        assert not any("2001:db8" in address for address in reach.addresses)
        assert "By IPv6 (2001:db8::2) it is not reached" in " ".join(reach.report())


@needs_both_kinds_of_ip
async def test_ipv6_alone_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    server = ("2001:db8::9", 31337)
    observers = Observers(monkeypatch, {server: ("2001:db8::2", 5)})
    async with node(Network(V6), monkeypatch, host="::", own=("2001:db8::2",), dialled={6: (True, "2001:db8::2")}) as (
        reach,
        _,
    ):
        await known(reach)
        assert reach.finding.role == "public" and reach.finding.nat == "none"
        assert reach.addresses[0] == f"[2001:db8::2]:{reach._port}"
        assert await reach.stun_server() is None, "data channels ask over IPv4 only"
        assert [server] in observers.asked


@pytest.mark.parametrize(
    ("seen", "own", "nat"),
    [
        ({}, "192.168.1.2", "unknown"),
        ({("203.0.113.1", 31337): ("198.51.100.7", 4000)}, "192.168.1.2", "unknown"),
        (KEPT, "192.168.1.2", "keeping"),
        ({**KEPT, ("203.0.113.2", 31337): ("198.51.100.7", 4001)}, "192.168.1.2", "symmetric"),
        (KEPT, "198.51.100.7", "none"),
    ],
)
async def test_two_observers_tell_the_kind_of_nat(
    monkeypatch: pytest.MonkeyPatch, seen: dict[Address, Address], own: str, nat: str
) -> None:
    Observers(monkeypatch, seen)
    async with node(Network(R1, R2), monkeypatch, own=(own,), dialled={4: (False, "198.51.100.7")}) as (reach, _):
        await known(reach)
        assert reach.finding.nat == nat


async def test_the_stun_server_is_one_that_answered_within_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    quick, dead = ("203.0.113.2", 31337), ("203.0.113.1", 31337)
    observers = Observers(monkeypatch, {quick: ("198.51.100.7", 4000)})
    async with node(Network(R1, R2, V6), monkeypatch, dialled={4: (True, "198.51.100.7")}) as (reach, _):
        await known(reach)
        assert observers.asked == [[dead, quick]], "IPv6 servers are of no use to aioice"
        for _ in range(3):
            assert await reach.stun_server() == quick
        assert len(observers.asked) == 1
        assert reach._stun is not None
        reach._stun = (reach._stun[0], reach._stun[1] - 61.0)
        observers.seen = {dead: ("198.51.100.7", 4000)}
        assert await reach.stun_server() == dead
        assert len(observers.asked) == 2


async def test_outside_stun_servers_are_asked_beside_those_of_the_swarm(monkeypatch: pytest.MonkeyPatch) -> None:
    observers = Observers(monkeypatch, KEPT)
    settings = ReachSettings(stun_servers=("203.0.113.2:31337", "no.such.host.invalid:1"))
    loop = asyncio.get_running_loop()
    look_up = loop.getaddrinfo

    async def without_network(host: str, *args: Any, **kwargs: Any) -> Any:
        """Resolvers take their time to say no where there is no network, and some never do."""
        if host.endswith(".invalid"):
            raise socket.gaierror(socket.EAI_NONAME, "unknown")
        return await look_up(host, *args, **kwargs)

    monkeypatch.setattr(loop, "getaddrinfo", without_network)
    async with node(Network(R1), monkeypatch, dialled={4: (False, "198.51.100.7")}, settings=settings) as (reach, _):
        await known(reach)
        assert observers.asked[0] == [("203.0.113.1", 31337), ("203.0.113.2", 31337)]
        assert reach.finding.nat == "keeping"


def test_a_malformed_stun_server_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="stun.example"):
        ReachSettings(stun_servers=("stun.example",))


class Mapper:
    """A port mapping that stands."""

    outside_port = 5555

    def __init__(self) -> None:
        self.tried = asyncio.Event()
        self.tried.set()
        self.num_renewals = 0

    def start(self) -> None: ...
    async def aclose(self) -> None: ...

    def renew(self) -> None:
        self.num_renewals += 1

    def sentence(self) -> str:
        return "The router maps its port 5555 to this node."


@pytest.mark.parametrize("reached", [True, False])
async def test_a_mapped_port_is_believed_when_others_got_through(
    monkeypatch: pytest.MonkeyPatch, reached: bool
) -> None:
    Observers(monkeypatch, KEPT)
    mapper = Mapper()
    monkeypatch.setattr(module, "PortMapper", lambda *args, **settings: mapper)
    plain = module.Reach.__init__

    def with_upnp(self: Reach, **arguments: Any) -> None:
        plain(self, **arguments, upnp=True)

    monkeypatch.setattr(module.Reach, "__init__", with_upnp)
    async with node(Network(R1, R2), monkeypatch, dialled={4: (reached, "198.51.100.7")}) as (reach, _):
        await known(reach)
        text = " ".join(reach.report())
        assert "maps its port 5555" in text
        if reached:
            assert reach.addresses[0] == "198.51.100.7:5555"
        else:
            assert "a second NAT" in text and reach.finding.role == "client"


def test_on_loopback_and_on_public_nodes_nothing_of_it_is_loaded() -> None:
    """No WebRTC on a node that lives on loopback; where the role is public, aiortc is not imported either."""
    code = """
import asyncio, sys
from tesseract_async.node import TesseractNode

async def main():
    async with TesseractNode() as node:
        assert node.reach.nat is None and not node.reach.can_punch
        assert await node.wait_reachable(0.0)
        assert "serves this computer only" in node.reach.report()[0]
    async with TesseractNode("0.0.0.0", public=True, announce="127.0.0.1:1") as node:
        assert node.reach.nat is not None
    assert not {"aiortc", "aioice", "torch"} & set(sys.modules)

asyncio.run(main())
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


async def test_a_client_node_imports_aiortc_in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    Observers(monkeypatch, KEPT)
    imported: asyncio.Queue[tuple[str, bool]] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def note(name: str) -> None:
        on_loop = threading.current_thread() is threading.main_thread()
        loop.call_soon_threadsafe(imported.put_nowait, (name, on_loop))

    monkeypatch.delitem(sys.modules, "tesseract_async.nat.webrtc.association", raising=False)
    monkeypatch.setattr(webrtc.importlib, "import_module", note)
    async with node(Network(R1, R2), monkeypatch, dialled={4: (False, "198.51.100.7")}):
        async with asyncio.timeout(30):
            assert await imported.get() == ("tesseract_async.nat.webrtc.association", False)


async def test_who_says_that_it_is_public_is_believed_at_once() -> None:
    async with TesseractNode("0.0.0.0", public=True, announce="127.0.0.1:1") as declared:
        assert declared.reach.finding == replace(Finding(), tcp=True)
        assert await declared.wait_reachable(0.0)


async def test_who_says_so_and_is_not_reached_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """It stays what its owner says: the sentence, the log and the metric tell what others found."""
    with tcp_socket("127.0.0.1") as bound:  # nobody listens there
        closed = f"127.0.0.1:{bound.getsockname()[1]}"
        here = ReachSettings(on_loopback=True, watch_period=0.02)
        async with (
            TesseractNode(public=True, reach=here) as seed,
            TesseractNode(public=True, reach=here, initial_peers=[seed.address], announce=closed) as proud,
        ):
            async with asyncio.timeout(30):
                while "reachable_by_tcp" not in proud.metrics.snapshot():  # noqa: ASYNC110 (asking announces nothing)
                    await asyncio.sleep(0.01)
            [sentence] = proud.reach.report()
            assert closed in sentence and "did not get through" in sentence
            assert proud.metrics.snapshot()["reachable_by_tcp"] == 0.0
            assert proud.reach.finding.role == "public" and proud.peer_address.addresses == (closed,)
            assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [sentence]
            assert not seed.reach._doubt
