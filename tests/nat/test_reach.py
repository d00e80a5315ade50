"""`Reach`: the parts together. What follows from what was found is `test_role`'s matter."""

import asyncio
import contextlib
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator

import pytest

from tesseract_async.endpoint.endpoint import Endpoint
from tesseract_async.identity import Identity
from tesseract_async.nat.dial_back import DialBack
from tesseract_async.nat.port_mapping import PortTaken
from tesseract_async.nat.reach import Reach, ReachSettings
from tesseract_async.nat.role import ListeningAddress, Reachability
from tesseract_async.network.address_scope import AddressScope
from tesseract_async.node import TesseractNode
from tesseract_async.transport.base import PeerAddress
from tesseract_async.transport.tcp import TcpTransport
from tests.nat.test_port_mapping import Router
from tests.transport.pipes import bound_socket


class Network:
    """As much of a `TesseractNetwork` as `Reach` looks at."""

    def __init__(self, *contacts: PeerAddress) -> None:
        self.contacts = list(contacts)
        self.role = "unknown"
        self.forced_client: bool | None = None

    def public_contacts(self, count: int) -> list[PeerAddress]:
        return self.contacts[:count]

    def set_client(self, forced: bool) -> None:
        self.forced_client = forced

    async def wait_joined(self, timeout: float | None = None) -> bool:
        return True


@contextlib.asynccontextmanager
async def helpers(count: int) -> AsyncIterator[list[tuple[Endpoint, PeerAddress]]]:
    """Nodes that dial others back."""
    async with contextlib.AsyncExitStack() as stack:
        made = []
        for _ in range(count):
            sock = bound_socket()
            endpoint = Endpoint(identity=Identity.generate(), transports=[TcpTransport(sock)])
            DialBack(endpoint, own_addresses=lambda: (), scope=AddressScope()).start()
            await endpoint.start()
            await stack.enter_async_context(endpoint)
            made.append((endpoint, PeerAddress(endpoint.peer_id, (f"127.0.0.1:{sock.getsockname()[1]}",))))
        yield made


@contextlib.asynccontextmanager
async def reaching(
    network: Network,
    *,
    settings: ReachSettings = ReachSettings(on_loopback=True),  # noqa: B008 (frozen)
    router: Router | None = None,
) -> AsyncIterator[tuple[Reach, Endpoint, asyncio.Queue[tuple[str, ...]]]]:
    """A node on loopback, its endpoint, and the addresses that it told others."""
    sock = bound_socket()
    port = sock.getsockname()[1]
    told: asyncio.Queue[tuple[str, ...]] = asyncio.Queue()
    endpoint = Endpoint(identity=Identity.generate())
    made = Reach(
        endpoint=endpoint,
        network=network,  # type: ignore[arg-type]
        address=ListeningAddress("127.0.0.1", port, (f"192.168.1.2:{port}",), (4,)),
        sock=sock,
        scope=AddressScope(["127.0.0.1"]),
        on_change=lambda: told.put_nowait(made.addresses),
        upnp=router is not None,
        find_router=(router or Router()).find,
        settings=settings,
    )
    async with endpoint:
        await endpoint.start(made.transports)
        made.start()
        yield made, endpoint, told
        await made.aclose()


async def test_others_are_told_what_helpers_found() -> None:
    async with helpers(2) as made:
        network = Network(*(peer for _, peer in made))
        async with reaching(network) as (reach, _, told):
            [first, *_] = await told.get()
            assert first.startswith("127.0.0.1:") and await reach.wait_known(0.0)
            assert reach.reachability.role == "public" and network.forced_client is False
            assert "takes full part" in reach.report()[0]


async def test_a_check_that_fails_unexpectedly_is_made_again(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Network):
        def public_contacts(self, count: int) -> list[PeerAddress]:
            if not caplog.records:
                raise RuntimeError("broken")
            return super().public_contacts(count)

    async with helpers(2) as made:
        network = Broken(*(peer for _, peer in made))
        settings = ReachSettings(on_loopback=True, watch_period=0.01)
        async with reaching(network, settings=settings) as (reach, _, told), asyncio.timeout(30):
            await told.get()
            assert "broken" in str(caplog.records[0].exc_info) and reach.reachability.role == "public"


async def test_strangers_are_asked_first() -> None:
    """They see this node as any stranger would."""
    async with helpers(3) as made:
        network = Network()
        async with reaching(network) as (reach, endpoint, told):
            known, known_peer = made[1]
            with pytest.raises(Exception, match="no such method"):
                await endpoint.call(known_peer, "hello", timeout=30)
            network.contacts = [peer for _, peer in made]
            reach.look_again()
            await told.get()
            assert [helper.metrics.total("dial_backs") for helper, _ in made] == [1, 0, 1]


class ShiftingRouter(Router):
    """Maps no port to the same one of a computer."""

    async def add(self, protocol: str, outside_port: int, host: str, port: int, *, lease: float) -> None:
        if outside_port == port:
            raise PortTaken("it leads elsewhere")
        await super().add(protocol, outside_port, host, port, lease=lease)


@pytest.mark.parametrize("reached", [True, False])
async def test_a_mapped_port_is_believed_when_others_got_through(reached: bool) -> None:
    router = Router() if reached else ShiftingRouter()
    async with helpers(2) as made:
        network = Network(*(peer for _, peer in made))
        async with reaching(network, router=router) as (reach, _, told):
            await told.get()
            text = " ".join(reach.report())
            [port, _] = [port for _, port in router.mappings]
            assert f"maps its port {port}" in text
            if reached:
                assert f"127.0.0.1:{port}" in reach.addresses
            else:
                assert "a second NAT" in text and reach.reachability.role == "client"


def test_a_malformed_stun_server_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="stun.example"):
        ReachSettings(stun_servers=("stun.example",))


def test_on_loopback_and_on_public_nodes_nothing_of_it_is_loaded() -> None:
    """No WebRTC on a node that lives on loopback; where the role is public, aiortc is not imported either."""
    code = """
import asyncio, sys
from tesseract_async.node import TesseractNode

async def main():
    async with TesseractNode() as node:
        assert not node.reach.enabled and len(node.reach.transports) == 1
        assert await node.wait_reachable(0.0)
        assert "serves this computer only" in node.reach.report()[0]
    async with TesseractNode("0.0.0.0", public=True, announce="127.0.0.1:1") as node:
        assert node.reach.enabled and len(node.reach.transports) == 2
    assert not {"aiortc", "aioice", "torch"} & set(sys.modules)

asyncio.run(main())
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


@pytest.mark.parametrize("punch_holes", [True, False])
async def test_a_client_node_imports_aiortc_in_a_thread_if_it_punches_holes(
    punch_holes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    imported: asyncio.Queue[tuple[str, bool]] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def note(name: str) -> None:
        on_loop = threading.current_thread() is threading.main_thread()
        if name != "aioice.stun":
            loop.call_soon_threadsafe(imported.put_nowait, (name, on_loop))

    monkeypatch.delitem(sys.modules, "tesseract_async.nat.webrtc.association", raising=False)
    monkeypatch.setattr("importlib.import_module", note)
    settings = ReachSettings(on_loopback=True, client=True, punch_holes=punch_holes)
    async with reaching(Network(), settings=settings) as (reach, _, _), asyncio.timeout(30):
        if punch_holes:
            assert await imported.get() == ("tesseract_async.nat.webrtc.association", False)
        else:
            while reach.reachability.role != "client":  # noqa: ASYNC110 (nobody is told)
                await asyncio.sleep(0.01)
    assert imported.empty(), "closing waits for what was begun"


async def test_a_node_that_is_said_to_be_public_is_believed_at_once() -> None:
    async with TesseractNode("0.0.0.0", public=True, announce="127.0.0.1:1") as declared:
        assert declared.reach.reachability == Reachability(tcp=True)
        assert await declared.wait_reachable(0.0)


async def test_a_node_that_is_said_to_be_public_and_is_not_reached_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """It stays what its owner says: the sentence, the log and the metric tell what others found."""
    with socket.socket() as bound:  # nobody listens there
        bound.bind(("127.0.0.1", 0))
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
            assert proud.reach.reachability.role == "public" and proud.peer_address.addresses == (closed,)
            assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [sentence]
            assert "did not get through" not in " ".join(seed.reach.report())
