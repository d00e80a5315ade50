"""TesseractNetwork over real UDP on loopback."""

import asyncio
import contextlib
import itertools
import random
import socket
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from tesseract_async.admission import Policy
from tesseract_async.identity import Identity, PeerID, SignedRecord
from tesseract_async.metrics import Metrics
from tesseract_async.network import writing
from tesseract_async.network.driver import MAX_PER_TURN, NetworkDriver
from tesseract_async.network.entries import StoreItem
from tesseract_async.network.holding import RecordCheck
from tesseract_async.network.network import RECEIVE_BUFFER_BYTES, TesseractNetwork
from tesseract_async.network.protocol import NetworkProtocol
from tesseract_async.network.settings import NetworkSettings
from tesseract_async.transport.base import PeerAddress
from tests.client.virtual_time import in_made_up_time
from tests.loopback import needs_both_kinds_of_ip, needs_ipv6_loopback

PATIENT = NetworkSettings(min_timeout=5.0, join_timeout=10.0)
"""Nobody is taken for dead because the machine is busy."""
QUICK = NetworkSettings(join_timeout=2.0)
"""Where somebody is dead."""


@pytest.fixture(autouse=True)
def writers_wait_forevery_holder(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine the last of them is late, and a writer would go on without it (see `test_protocol`)."""
    monkeypatch.setattr(writing, "PATIENCE", 1e6)


class Node(TesseractNetwork):
    """One whose port is known, and that can die."""

    port = 0

    async def start(
        self, sock: socket.socket, *, initial_peers: Sequence[PeerAddress] = (), public: bool = False
    ) -> None:
        self.port, self.sock = sock.getsockname()[1], sock
        await super().start(sock, initial_peers=initial_peers, public=public)

    def die(self) -> socket.socket:
        """Ends without a farewell. Returns its socket, which keeps the port."""
        sock = self.sock.dup()
        self.abort()
        return sock


def bound(host: str = "127.0.0.1") -> socket.socket:
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
    sock.setblocking(False)
    sock.bind((host, 0))
    return sock


async def until(condition: Callable[[], bool]) -> None:
    """Turns the loop until a condition of another node's holds."""
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 (nothing announces what other nodes think)
            await asyncio.sleep(0)


@asynccontextmanager
async def node(
    *seeds: int,
    sock: socket.socket | None = None,
    host: str = "127.0.0.1",
    identity: Identity | None = None,
    settings: NetworkSettings = PATIENT,  # noqa: B008 (frozen)
    checks: Sequence[RecordCheck] = (),
) -> AsyncIterator[tuple[Node, int]]:
    sock = bound(host) if sock is None else sock
    port = sock.getsockname()[1]
    network = Node(identity=identity or Identity.generate(), settings=settings, checks=checks)
    text = f"[{host}]" if ":" in host else host
    await network.start(sock, initial_peers=[PeerAddress.parse(f"{text}:{seed}") for seed in seeds])
    try:
        yield network, port
    finally:
        await network.aclose()


@asynccontextmanager
async def swarm(count: int, host: str = "127.0.0.1", settings: NetworkSettings = PATIENT) -> AsyncIterator[list[Node]]:
    async with AsyncExitStack() as stack:
        first, seed = await stack.enter_async_context(node(host=host, settings=settings))
        others = [
            (await stack.enter_async_context(node(seed, host=host, settings=settings)))[0] for _ in range(count - 1)
        ]
        assert all([await network.wait_joined(30) for network in others])
        nodes = [first, *others]
        await until(lambda: all(network.num_contacts == count - 1 for network in nodes))
        yield nodes


@pytest.mark.both_loops
@pytest.mark.parametrize("host", ["127.0.0.1", pytest.param("::1", marks=needs_ipv6_loopback)])
async def test_values_and_dictionaries_are_seen_by_all(host: str) -> None:
    async with swarm(5, host) as nodes:
        assert await nodes[1].store("value", {"x": [1, b"2", None]}, ttl=60.0) == 5
        assert await nodes[2].store("shared", 1, ttl=60.0, subkey="a") == 5
        assert await nodes[3].store("shared", 2, ttl=60.0, subkey="b") == 5
        for network in nodes:
            assert await network.get("value") == {"x": [1, b"2", None]}
            assert await network.get("shared") == {"a": 1, "b": 2}
            assert await network.get("nothing") is None


async def test_owners_stand_side_by_side_and_the_latest_is_shown(caplog: pytest.LogCaptureFixture) -> None:
    async with swarm(4) as nodes:
        await nodes[1].store("key", "first", ttl=60.0)
        await nodes[2].store("key", "second", ttl=60.0)
        entries = await nodes[3].get_entries("key")
        assert {entry.owner: entry.value for entry in entries} == {
            nodes[1].peer_id: "first",
            nodes[2].peer_id: "second",
        }
        assert await nodes[0].get("key") == "second"
        assert "get('key') hides 1 entries of other owners" in caplog.text
        await nodes[1].store("key", "third", ttl=60.0)
        assert await nodes[0].get("key") == "third"
        assert len(caplog.records) == 1, "said once"
        await nodes[1].store("dictionary", 1, ttl=60.0, subkey="a")
        await nodes[2].store("dictionary", 2, ttl=60.0, subkey="b")
        assert await nodes[0].get("dictionary") == {"a": 1, "b": 2} and len(caplog.records) == 1
        await nodes[2].store("dictionary", 3, ttl=60.0)
        assert await nodes[0].get("dictionary") == {"a": 1, "b": 2} and len(caplog.records) == 2


async def test_a_large_dictionary_is_read_in_pages() -> None:
    async with swarm(4) as nodes:
        items = [StoreItem("big", "v" * 50, 60.0, f"subkey {index}") for index in range(100)]
        nodes[2].set_client(True)  # it holds nothing itself
        assert await nodes[1].store_many(items) == [3] * 100
        assert nodes[2].role == "client"
        values = await nodes[2].get("big")
        assert values == {item.subkey: item.value for item in items}


async def test_many_keys_at_once() -> None:
    async with swarm(4) as nodes:
        await nodes[1].store_many([StoreItem(f"key {index}", index, 60.0) for index in range(30)])
        assert await nodes[3].get_many([f"key {index}" for index in range(31)]) == [*range(30), None]


async def test_a_withdrawn_entry_is_gone_and_may_come_back() -> None:
    async with swarm(4) as nodes:
        await nodes[1].store("key", 1, ttl=60.0, subkey="a")
        await nodes[2].store("key", 2, ttl=60.0, subkey="b")
        assert await nodes[1].withdraw("key", subkey="a") == 4
        assert await nodes[3].get("key") == {"b": 2}
        await nodes[1].store("key", 3, ttl=60.0, subkey="a")
        assert await nodes[3].get("key") == {"a": 3, "b": 2}


async def test_a_restarted_owner_withdraws_what_it_published_before() -> None:
    identity = Identity.generate()
    async with swarm(3) as nodes:
        port = nodes[0].port
        async with node(port, identity=identity) as (before, _):
            await before.store("key", 1, ttl=60.0)
        async with node(port, identity=identity) as (after, _):
            assert await after.wait_joined(30)
            assert await after.withdraw("key") >= 3
        assert await nodes[1].get("key") is None


async def test_a_tombstone_outlives_everything_that_it_hides() -> None:
    identity = Identity.generate()
    taken: list[SignedRecord] = []

    def note(record: SignedRecord) -> bool:
        taken.append(record)
        return True

    def kept_until() -> float:
        assert taken[-1].tombstone
        return taken[-1].expiration - time.time()

    async with node(checks=[note]) as (_, port):
        async with node(port, identity=identity) as (owner, _):
            await owner.store("key", 1, ttl=1000.0)
            await owner.store("key", 2, ttl=10.0)  # a holder that missed it shows the first one for long
            await owner.withdraw("key")
            assert 1020.0 < kept_until() <= 1030.0
            await owner.store("key", 3, ttl=2000.0)
        async with node(port, identity=identity) as (restarted, _):
            assert await restarted.wait_joined(30)
            await restarted.withdraw("key")
            assert 2020.0 < kept_until() <= 2030.0


async def test_expired_entries_are_not_seen() -> None:
    async with swarm(3) as nodes:
        await nodes[1].store("short", 1, ttl=0.05)
        async with asyncio.timeout(30):
            while await nodes[2].get("short") is not None:
                pass


async def test_a_lonely_node_is_a_network_of_one() -> None:
    async with node() as (network, _):
        assert await network.wait_joined(0.0)
        assert await network.store("key", 5, ttl=60.0) == 1
        assert await network.get("key") == 5
        assert await network.withdraw("key") == 1
        assert await network.get("key") is None


async def test_starting_never_waits_for_seeds_and_finds_them_when_they_come() -> None:
    reserved = bound()  # nobody reads there yet, and nobody else is given the port
    async with asyncio.timeout(50):
        async with node(reserved.getsockname()[1]) as (early, _):
            assert not await early.wait_joined(0.01)
            async with node(sock=reserved) as (seed, _):
                assert await early.wait_joined(30)
                await early.store("key", 1, ttl=60.0)
                assert await seed.get("key") == 1


async def test_a_killed_node_does_not_stop_the_others() -> None:
    async with swarm(6, settings=QUICK) as nodes:
        await nodes[1].store("key", 1, ttl=60.0)
        nodes[5].die().close()
        assert await nodes[2].get("key") == 1
        assert await nodes[3].store("other", 2, ttl=60.0) == 5
        await until(lambda: nodes[3].num_contacts == 4)


async def test_a_read_that_nobody_answers_says_so_and_goes_on_once_somebody_does() -> None:
    async with swarm(2, settings=QUICK) as nodes:
        reader, holder = nodes[1], nodes[0]
        reader.set_client(True)  # it holds nothing itself
        await holder.store("key", 1, ttl=60.0)
        held = holder.die()
        with pytest.raises(TimeoutError, match="no answer from 127.0.0.1"):
            await reader.get("key")
        assert reader.num_contacts == 0
        # it comes back in the midst of another read
        reading = asyncio.create_task(reader.get("key"))
        await asyncio.sleep(0)
        async with node(sock=held, identity=holder.identity, settings=QUICK) as (back, _):
            await back.store("key", 1, ttl=60.0)
            assert await reading == 1
            assert await reader.get("absent") is None


async def test_nobody_is_asked_is_no_absence(caplog: pytest.LogCaptureFixture) -> None:
    reserved = bound()  # nobody reads there
    settings = NetworkSettings(join_timeout=0.05)
    async with node(reserved.getsockname()[1], settings=settings) as (network, port):
        with pytest.raises(TimeoutError, match="no answer from 127.0.0.1:.*Does a node run there"):
            await network.get("key")
        assert not caplog.records, "the caller was told"
        assert await network.store("key", 1, ttl=60.0) == 1
        assert [record.message for record in caplog.records] == [network.trouble]
        await network.store("key", 2, ttl=60.0)
        assert len(caplog.records) == 1, "once"
        assert await network.get("key") == 2, "what it holds itself"
    reserved.close()


@in_made_up_time
async def test_that_no_seed_answers_is_said_soon_by_a_node_that_is_asked_for_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with contextlib.closing(bound()) as silent:
        async with node(silent.getsockname()[1], settings=NetworkSettings()) as (network, _):
            await asyncio.sleep(6.0)  # of the 10 s that people are given, starting Python takes up to 4
            assert [record.message for record in caplog.records] == [network.trouble]
            await asyncio.sleep(60.0)
            assert len(caplog.records) == 1, "once"


def seed(address: int, peer_id: PeerID | None) -> PeerAddress:
    return PeerAddress(peer_id, (f"127.0.0.1:{address}",))


async def test_nothing_is_said_to_a_seed_that_proves_to_be_another(caplog: pytest.LogCaptureFixture) -> None:
    other = PeerID(bytes([0x11]) * 32)
    async with swarm(3) as nodes:
        first, port = nodes[0], nodes[0].port
        network = Node(identity=Identity.generate(), settings=NetworkSettings(join_timeout=0.05))
        await network.start(bound(), initial_peers=[seed(port, other)])
        try:
            await until(lambda: bool(network.wrong_seeds))
            assert await network.store("key", 1, ttl=60.0) == 1, "it alone"
            with pytest.raises(TimeoutError, match=f"{port} proves to be {first.peer_id.short}, not 11111111"):
                await network.get("other")
            assert await nodes[1].get("key") is None and await nodes[0].store("theirs", 1, ttl=60.0) == 3
            assert network.num_contacts == 0 and all(one.num_contacts == 2 for one in nodes)
            with pytest.raises(TimeoutError):
                await network.get("theirs")  # nor does anything come from there
            assert f"the seed 127.0.0.1:{port}/{other} proves to be {first.peer_id}" in caplog.text
        finally:
            await network.aclose()


async def test_ids_that_begin_alike_are_told_apart() -> None:
    async with swarm(1) as (first,):
        other = PeerID(bytes(first.peer_id)[:30] + b"xx")
        network = Node(identity=Identity.generate(), settings=NetworkSettings(join_timeout=0.05))
        await network.start(bound(), initial_peers=[seed(first.port, other)])
        try:
            await until(lambda: bool(network.wrong_seeds))
            assert str(first.peer_id) in str(network.trouble) and str(other) in str(network.trouble)
        finally:
            await network.aclose()


@pytest.mark.parametrize("order", [1, -1])
async def test_of_two_seeds_the_wrong_one_is_left_alone(order: int) -> None:
    """Also where the right one names it as a contact, and where its address was given without an id, too."""
    other = PeerID(bytes([0x11]) * 32)
    async with swarm(3) as nodes:
        wrong, right = nodes[0], nodes[1]
        seeds = [seed(wrong.port, other), seed(right.port, right.peer_id), seed(wrong.port, None)]
        network = Node(identity=Identity.generate(), settings=PATIENT)
        await network.start(bound(), initial_peers=seeds[::order])
        try:
            assert await network.wait_joined(30) and network.trouble is None
            await until(lambda: network.num_contacts == 2 and bool(network.wrong_seeds))
            assert await network.store("key", 1, ttl=60.0) == 3
            assert wrong.peer_id not in {contact.peer_id for contact in network.public_contacts(9)}
            assert network.role == "public"
        finally:
            await network.aclose()


async def test_a_seed_that_comes_back_as_another_is_left_alone() -> None:
    async with swarm(1, settings=QUICK) as nodes:
        port = nodes[0].port
        network = Node(identity=Identity.generate(), settings=QUICK)
        await network.start(bound(), initial_peers=[seed(port, nodes[0].peer_id)])
        try:
            assert await network.wait_joined(30)
            held = nodes[0].die()
            async with node(sock=held, settings=QUICK) as (impostor, _):
                with pytest.raises(TimeoutError, match=f"proves to be {impostor.peer_id.short}"):
                    await network.get("key")
                assert network.num_contacts == 0
        finally:
            await network.aclose()


async def test_a_remembered_peer_whose_address_is_another_s_now_is_no_contact(tmp_path: Path) -> None:
    async with swarm(2) as nodes:
        path = tmp_path / "peers"
        path.write_text(f"127.0.0.1:{nodes[0].port}/{bytes([0x11] * 32).hex()}\n")
        network = Node(identity=Identity.generate(), settings=NetworkSettings(join_timeout=0.05), peers_file=path)
        await network.start(bound())
        try:
            await until(lambda: bool(network.metrics.total("network_seeds_with_another_id")))
            assert network.num_contacts == 0 and not network.wrong_seeds
            with pytest.raises(TimeoutError, match="remembered from the last run"):
                await network.get("key")
        finally:
            await network.aclose()


async def test_a_farewell_removes_a_node_from_tables_at_once() -> None:
    async with swarm(4) as nodes:
        await nodes[3].aclose()
        await until(lambda: all(network.num_contacts == 2 for network in nodes[:3]))


async def test_closing_ends_what_is_pending_and_using_it_afterwards_says_so() -> None:
    with bound() as silent:
        async with node(silent.getsockname()[1]) as (network, _):
            waiting = asyncio.create_task(network.get("key"))
            await asyncio.sleep(0)
            await network.aclose()
            with pytest.raises((ConnectionAbortedError, RuntimeError)):
                await waiting
            with pytest.raises(RuntimeError, match="not been started"):
                await network.get("key")


async def test_a_caller_s_mistakes_raise_before_anything_is_sent() -> None:
    async with node() as (network, _):
        with pytest.raises(ValueError, match="store it in parts"):
            await network.store("key", "x" * 2000, ttl=60.0)
        with pytest.raises(ValueError, match="ttl"):
            await network.store("key", 1, ttl=0.0)
        for value in (object(), (1, 2), {(1, 2): 3}):
            with pytest.raises(TypeError):
                await network.store("key", value, ttl=60.0)
        with pytest.raises(ValueError, match="65 bits"):
            await network.store_many([StoreItem("a", 1, 60.0), StoreItem("b", 2**64, 60.0)])
        with pytest.raises(TypeError, match="a key is text, not int"):
            await network.store(5, 1, ttl=60.0)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="a subkey is text or None, not int"):
            await network.store("key", 1, ttl=60.0, subkey=5)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="a key is text, not bytes"):
            await network.get(b"key")  # type: ignore[arg-type]
        assert await network.get("key") is None and await network.get("a") is None


async def test_garbage_on_the_port_is_counted_and_disturbs_nothing() -> None:
    async with swarm(3) as nodes:
        with bound() as attacker:
            for data in (b"", b"x", bytes(1400), b"\x54\x01" + bytes(60)):
                attacker.sendto(data, ("127.0.0.1", nodes[0].port))
        await until(lambda: nodes[0].metrics.total("network_datagrams_dropped") >= 3)
        assert await nodes[1].store("key", 1, ttl=60.0) == 3


async def test_peers_are_remembered_on_disk_and_asked_beside_the_seeds(tmp_path: Path) -> None:
    path = tmp_path / "state" / "peers"
    async with swarm(3) as nodes:
        for seeds in ([PeerAddress.parse(f"127.0.0.1:{nodes[0].port}")], []):
            network = Node(identity=Identity.generate(), settings=PATIENT, peers_file=path)
            await network.start(bound(), initial_peers=seeds)
            assert await network.wait_joined(30) and network.num_contacts >= 1
            await network.aclose()
        remembered = {PeerAddress.parse(line).peer_id for line in path.read_text().split()}
        assert {network.peer_id for network in nodes} <= remembered


async def test_damaged_remembered_peers_are_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "peers"
    path.write_text("nonsense")
    network = Node(identity=Identity.generate(), settings=PATIENT, peers_file=path)
    await network.start(bound())
    assert "cannot be read" in caplog.text
    await network.aclose()


async def test_roles_and_contacts_can_be_asked_for() -> None:
    async with swarm(4) as nodes:
        assert nodes[1].role == "public"
        ports = {network.port for network in nodes}
        contacts = nodes[1].public_contacts(10)
        assert {int(peer.addresses[0].rpartition(":")[2]) for peer in contacts} == ports - {nodes[1].port}


async def test_a_change_of_role_is_told() -> None:
    changes: list[str] = []
    network = Node(identity=Identity.generate(), settings=PATIENT, on_role_change=lambda: changes.append(network.role))
    await network.start(bound())
    network.set_client(True)
    network.set_client(True)
    network.set_client(False)
    assert changes == ["client", "public"]
    await network.aclose()


async def test_a_policy_says_whose_records_a_node_holds() -> None:
    friend = Identity.generate()
    policy = Policy(hosts=[friend.peer_id])
    closed = Node(identity=Identity.generate(), settings=PATIENT, policy=policy)
    await closed.start(bound())
    async with node(closed.port, identity=friend) as (known, _), node(closed.port) as (stranger, _):
        await until(lambda: closed.num_contacts == known.num_contacts == stranger.num_contacts == 2)
        assert await known.store("key", 1, ttl=60.0) == 3
        assert await stranger.store("key", 2, ttl=60.0) == 2
    await closed.aclose()


async def test_an_owner_whose_clock_went_back_goes_beyond_what_it_published(monkeypatch: pytest.MonkeyPatch) -> None:
    identity = Identity.generate()
    async with swarm(3) as nodes:
        async with node(nodes[0].port, identity=identity) as (before, _):
            await before.store("key", "old", ttl=600.0)
        genuine = time.time
        monkeypatch.setattr(time, "time", lambda: genuine() - 20.0)
        async with node(nodes[0].port, identity=identity) as (after, _):
            assert await after.store("key", "new", ttl=600.0) >= 3
        monkeypatch.undo()
        assert await nodes[1].get("key") == "new"


@pytest.mark.both_loops
@needs_both_kinds_of_ip
@needs_ipv6_loopback
async def test_nodes_with_both_kinds_of_ip_join_those_with_one() -> None:
    """One socket serves both; who has one kind only leaves out contacts of the other, and sends nothing there."""
    both = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    both.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    both.bind(("::", 0))
    both.setblocking(False)
    port = both.getsockname()[1]
    middle = Node(identity=Identity.generate(), settings=PATIENT)
    await middle.start(both, public=True)
    async with node(port) as (old, _), node(port, host="::1") as (new, _):
        assert await old.wait_joined(30) and await new.wait_joined(30)
        await until(lambda: middle.num_contacts == 2)
        assert await old.store("key", 1, ttl=60.0) >= 1
        assert await middle.get("key") == 1
        await until(lambda: old.num_contacts == new.num_contacts == 1)
        assert {peer.addresses[0].rpartition(":")[0] for peer in middle.public_contacts(9)} == {"127.0.0.1", "[::1]"}
    await middle.aclose()


@asynccontextmanager
async def driven() -> AsyncIterator[tuple[NetworkDriver, socket.socket]]:
    """A machine at work without seeds, and its socket."""
    loop = asyncio.get_running_loop()
    protocol = NetworkProtocol(
        identity=Identity.generate(),
        settings=PATIENT,
        random=random.Random(0),
        metrics=Metrics(),
        now=loop.time(),
        wall_offset=0.0,
        is_declared_public=True,
    )
    with bound() as sock:
        driver = NetworkDriver(protocol, loop, sock, has_seeds=False, on_role_change=lambda: None)
        await loop.create_datagram_endpoint(lambda: driver, sock=sock)
        try:
            yield driver, sock
        finally:
            await driver.aclose()


@pytest.mark.both_loops
async def test_what_a_socket_cannot_send_to_is_counted() -> None:
    """The machine leaves such addresses out; but should it ever want to."""
    async with driven() as (driver, _):
        driver.protocol.outbox.send(b"x", ("::1", 9))
        driver.cycle()
        await until(lambda: driver.protocol.metrics.total("network_send_errors") == 1)


@pytest.mark.both_loops
async def test_many_datagrams_are_read_in_one_turn_of_the_loop_but_not_all() -> None:
    """In a busy process a turn is long: one for each datagram, and answers come seconds late."""
    async with driven() as (driver, sock):
        metrics, num_sent = driver.protocol.metrics, 3 * MAX_PER_TURN
        with bound() as sender:
            for _ in range(num_sent):
                sender.sendto(b"x", sock.getsockname())
        num_read = [0]
        while num_read[-1] < num_sent and len(num_read) < 1000:
            await asyncio.sleep(0)
            num_read.append(int(metrics.total("network_datagrams_dropped")))
        assert num_read[-1] == num_sent
        turns = [after - before for before, after in itertools.pairwise(num_read) if after > before]
        assert 1 < len(turns) <= 10 and max(turns) <= 2 * MAX_PER_TURN, turns


async def test_the_receive_buffer_is_raised() -> None:
    with bound() as fresh:
        before = fresh.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
    sock = bound()
    network = Node(identity=Identity.generate(), settings=PATIENT)
    await network.start(sock)
    size = sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
    assert size > before or size == before >= RECEIVE_BUFFER_BYTES, "what a machine gives by itself is not lowered"
    await network.aclose()
