"""A public node and its clients, over real connections on loopback."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

import pytest

from tesseract_async.endpoint.endpoint import Endpoint, IncomingCall, Message
from tesseract_async.errors import NotAllowed, Overloaded, ProtocolError, RemoteError
from tesseract_async.identity import Identity, PeerID
from tesseract_async.nat.rendezvous import (
    CARRY_TIMEOUT,
    DELIVER,
    MAX_CLIENTS,
    MAX_CLIENTS_PER_RANGE,
    MAX_OFFERS,
    MAX_OFFERS_PER_CLIENT,
    MAX_OWN_OFFERS,
    NUM_RENDEZVOUS,
    OFFER,
    REGISTER,
    REGISTRATION_TTL,
    RELAY,
    RendezvousClient,
    RendezvousLedger,
    RendezvousServer,
)
from tesseract_async.network.address_scope import AddressScope
from tesseract_async.transport.base import PeerAddress
from tesseract_async.transport.tcp import TcpTransport

pytestmark = pytest.mark.both_loops

SCOPE = AddressScope(["127.0.0.1", "203.0.113.9", "2001:db8::9"])


class Room:
    """A relay's room for one splice."""

    def __init__(self) -> None:
        self.owners: list[PeerID] = []

    def reserve(self, owner: PeerID, *, origin: str) -> tuple[bytes, bytes]:
        if self.owners:
            raise Overloaded("full", retry_after=1.0)
        self.owners.append(owner)
        return b"m" * 16, b"t" * 16


class Public:
    def __init__(self, endpoint: Endpoint, address: PeerAddress, server: RendezvousServer) -> None:
        self.endpoint = endpoint
        self.peer = address
        self.server = server

    def refused(self, reason: str) -> float:
        return self.endpoint.metrics.snapshot().get(f"rendezvous_refused{{reason={reason}}}", 0)


@contextlib.asynccontextmanager
async def public(
    *, relay: Room | None = None, named: Sequence[str] = (), carry_timeout: float = CARRY_TIMEOUT
) -> AsyncIterator[Public]:
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    endpoint = Endpoint(identity=Identity.generate(), transports=[TcpTransport(sock)])
    address = PeerAddress(endpoint.peer_id, (f"127.0.0.1:{sock.getsockname()[1]}",))
    await endpoint.start()
    async with endpoint:
        server = RendezvousServer(endpoint, relay=relay, own_addresses=lambda: named, carry_timeout=carry_timeout)
        server.start()
        yield Public(endpoint, address, server)


class Client:
    """A node that nobody can dial."""

    def __init__(self, contacts: list[PeerAddress], num_rendezvous: int) -> None:
        self.endpoint = Endpoint(identity=Identity.generate(), transports=[TcpTransport()])
        self.peer_id = self.endpoint.peer_id
        self.heard: list[tuple[bytes, str]] = []
        self.answer: Callable[[bytes], Awaitable[bytes]] = self.echo
        self.changed = asyncio.Event()
        self.rendezvous = RendezvousClient(
            self.endpoint,
            contacts=lambda: contacts,
            answer=self.answer_offer,
            changed=self.changed.set,
            own_origin=lambda: "127.0.0.1",
            scope=SCOPE,
            num_rendezvous=num_rendezvous,
            check_period=0.02,
        )

    async def echo(self, offer: bytes) -> bytes:
        return b"answer to " + offer

    async def answer_offer(self, data: bytes, origin: str) -> bytes:
        self.heard.append((data, origin))
        return await self.answer(data)

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(30):
            while not condition():
                self.changed.clear()
                await self.changed.wait()


@contextlib.asynccontextmanager
async def client(*contacts: PeerAddress, num_rendezvous: int = NUM_RENDEZVOUS) -> AsyncIterator[Client]:
    made = Client(list(contacts), num_rendezvous)
    async with made.endpoint:
        if contacts:
            made.rendezvous.start()
            await made.until(lambda: len(made.rendezvous.rendezvous) == min(len(contacts), num_rendezvous))
        yield made
        await made.rendezvous.stop()


async def test_an_offer_and_its_answer_are_carried() -> None:
    async with public() as house, client(house.peer) as asked, client() as asker:
        answer = await asker.rendezvous.send_offer(house.peer, asked.peer_id, b"offer", timeout=30)
        assert answer == b"answer to offer"
        assert asked.heard == [(b"offer", "127.0.0.1")]
        # the rendezvous node itself may want the client
        own = RendezvousClient(
            house.endpoint,
            contacts=lambda: [],
            answer=asked.answer_offer,
            changed=lambda: None,
            own_origin=lambda: "203.0.113.1",
            scope=SCOPE,
        )
        assert await own.send_offer(house.peer, asked.peer_id, b"mine", timeout=30) == b"answer to mine"
        assert asked.heard[-1] == (b"mine", "203.0.113.1")


async def test_only_those_who_registered_are_disturbed() -> None:
    async with public() as house, client() as stranger, client() as asker:
        with pytest.raises(NotAllowed, match="not registered"):
            await asker.rendezvous.send_offer(house.peer, stranger.peer_id, b"offer", timeout=30)
        assert house.refused("unknown_client") == 1


async def test_a_client_listens_to_its_own_rendezvous_only() -> None:
    async with public() as house, public() as other, client(house.peer) as asked:
        await asked.endpoint.call(other.peer, REGISTER, {}, timeout=30)  # connected, but not chosen
        with pytest.raises(NotAllowed, match="did not register"):
            body = {"offer": b"x", "origin": "127.0.0.1"}
            await other.endpoint.call(PeerAddress(asked.peer_id, ()), DELIVER, body, timeout=30)
        assert asked.heard == []


async def test_a_silent_client_is_a_typed_error() -> None:
    async with public(carry_timeout=0.05) as house, client(house.peer) as asked:

        async def never(offer: bytes) -> bytes:
            await asyncio.Event().wait()
            return b""

        asked.answer = never
        async with client() as asker:
            with pytest.raises(RemoteError, match="did not answer"):
                await asker.rendezvous.send_offer(house.peer, asked.peer_id, b"offer", timeout=30)
            assert house.endpoint.metrics.total("rendezvous_offers_lost") == 1
            assert not house.server.ledger.num_offers


@pytest.mark.parametrize(
    "body", [None, [], {}, {"to": b"short", "offer": b""}, {"to": bytes(32)}, {"to": bytes(32), "offer": "text"}]
)
async def test_malformed_requests(body: object) -> None:
    async with public() as house, client() as asker:
        with pytest.raises(NotAllowed):
            await asker.endpoint.call(house.peer, OFFER, body, timeout=30)
        assert house.refused("malformed") == 1


async def test_an_offer_that_is_too_large() -> None:
    async with public() as house, client() as asker:
        with pytest.raises(NotAllowed):
            body = {"to": bytes(asker.peer_id), "offer": bytes(5000)}
            await asker.endpoint.call(house.peer, OFFER, body, timeout=30)
        assert house.refused("too_large") == 1


async def test_a_sender_waits_for_its_turn() -> None:
    """With more offers than it may have under way, it queues them itself instead of being refused."""
    async with public() as house, client(house.peer) as asked, client() as asker:
        num_offers = MAX_OFFERS
        assert num_offers > MAX_OWN_OFFERS
        sends = (
            asker.rendezvous.send_offer(house.peer, asked.peer_id, b"offer", timeout=30) for _ in range(num_offers)
        )
        assert len(await asyncio.gather(*sends)) == num_offers


async def test_a_full_rendezvous_refuses() -> None:
    async with public() as house, client() as honest:
        for number in range(MAX_CLIENTS):
            house.server.ledger.register(peer(number), "127.0.0.1", is_connected=lambda one: True, now=time())
        await honest.endpoint.call(house.peer, REGISTER, {}, timeout=30)
        assert len(house.server.ledger) == 1, "those that are not connected any more leave their places to others"


def peer(number: int) -> PeerID:
    return PeerID(number.to_bytes(32, "big"))


def time() -> float:
    return asyncio.get_running_loop().time()


def register(ledger: RendezvousLedger, number: int, *, origin: str = "", now: float = 0.0) -> bool:
    return ledger.register(peer(number), origin, is_connected=lambda one: True, now=now)


async def test_registrations_are_bounded_and_end() -> None:
    ledger = RendezvousLedger()
    assert all(register(ledger, number) for number in range(MAX_CLIENTS))
    assert register(ledger, 5, now=1.0), "renewed"
    assert not register(ledger, MAX_CLIENTS)
    assert register(ledger, MAX_CLIENTS, now=REGISTRATION_TTL) and len(ledger) == 2
    assert ledger.is_registered(peer(5), now=REGISTRATION_TTL)
    assert not ledger.is_registered(peer(5), now=REGISTRATION_TTL + 1.0)
    assert not ledger.is_registered(peer(6), now=0.0)


async def test_neighbors_get_a_part_of_the_places() -> None:
    ledger = RendezvousLedger()
    assert all(register(ledger, number, origin=f"8.8.8.{number}") for number in range(MAX_CLIENTS_PER_RANGE))
    assert register(ledger, 0, origin="8.8.8.0"), "renewed"
    assert not register(ledger, 100, origin="8.8.8.100")
    assert register(ledger, 100, origin="8.8.9.100")


async def test_offers_under_way_are_few() -> None:
    ledger = RendezvousLedger()
    while ledger.begin_offer(peer(0), "", peer(100 + ledger.num_offers)):
        pass
    mine = ledger.num_offers
    assert MAX_OFFERS / 4 < mine < MAX_OFFERS / 2, "others find room"
    for number in range(1, MAX_OFFERS_PER_CLIENT):
        assert ledger.begin_offer(peer(number), "", peer(100))
    assert not ledger.begin_offer(peer(99), "", peer(100))
    ledger.end_offer(peer(0), "", peer(100))
    assert ledger.begin_offer(peer(99), "", peer(100))
    assert ledger.num_offers == mine + MAX_OFFERS_PER_CLIENT - 1


async def test_a_rendezvous_that_dies_is_replaced() -> None:
    async with contextlib.AsyncExitStack() as stack:
        houses = [await stack.enter_async_context(public()) for _ in range(3)]
        async with client(*(house.peer for house in houses), num_rendezvous=2) as member:
            first = member.rendezvous.rendezvous[0]
            [dying] = [house for house in houses if house.peer == first]
            await dying.endpoint.aclose()
            await member.until(lambda: first not in member.rendezvous.rendezvous)
            await member.until(lambda: len(member.rendezvous.rendezvous) == 2)


async def test_those_that_relay_come_first() -> None:
    async with public() as plain, public(relay=Room()) as relaying, client(plain.peer, relaying.peer) as member:
        assert member.rendezvous.rendezvous == (relaying.peer, plain.peer)


async def test_relays_are_reserved_or_refused() -> None:
    room = Room()
    async with public(relay=room) as relaying, public() as plain, client() as member:
        assert await member.rendezvous.reserve_relay(relaying.peer, timeout=30) == (b"m" * 16, b"t" * 16)
        assert room.owners == [member.peer_id]
        with pytest.raises(Overloaded):
            await member.rendezvous.reserve_relay(relaying.peer, timeout=30)
        with pytest.raises(NotAllowed, match="does not relay"):
            await member.rendezvous.reserve_relay(plain.peer, timeout=30)


async def test_a_rendezvous_that_answers_nonsense() -> None:
    async def nonsense(call: IncomingCall) -> Message:
        return Message({"answer": 5, "mine": b"short", "theirs": None, "relay": "yes"})

    async with public() as house, client() as member:
        house.server.stop()
        for method in (OFFER, RELAY, REGISTER):
            house.endpoint.handle(method, nonsense)
        with pytest.raises(ProtocolError):
            await member.rendezvous.send_offer(house.peer, member.peer_id, b"offer", timeout=30)
        with pytest.raises(ProtocolError):
            await member.rendezvous.reserve_relay(house.peer, timeout=30)
    asked = asyncio.Event()

    async def registered(call: IncomingCall) -> Message:
        asked.set()
        return await nonsense(call)

    async with public() as house:
        house.server.stop()
        house.endpoint.handle(REGISTER, registered)
        member = Client([house.peer], 1)
        async with member.endpoint:
            member.rendezvous.start()
            await asked.wait()
            await member.rendezvous.stop()
            assert member.rendezvous.rendezvous == ()


@pytest.mark.parametrize(
    ("told", "more"),
    [
        (["203.0.113.1:5", "[2001:db8::1]:5"], ("[2001:db8::1]:5",)),
        (["203.0.113.1:5"], ()),
        (["[2001:db8::1]:5", 5, None], ("[2001:db8::1]:5",)),
        ([None, "nonsense", "[::]:5"], ()),
        (["[2001:db8::1]:5"] * 5, ()),
        (["[fd00::1]:5"], ()),  # out of this node's scope
    ],
)
async def test_a_rendezvous_names_its_other_address(told: list[object], more: tuple[str, ...]) -> None:
    """Others may lack the version of IP by which this node knows it."""

    async def register(call: IncomingCall) -> Message:
        return Message({"relay": False, "addresses": told})

    async with public() as house:
        house.endpoint.unhandle(REGISTER)
        house.endpoint.handle(REGISTER, register)
        async with client(house.peer) as member:
            assert member.rendezvous.rendezvous[0].addresses == (*house.peer.addresses, *more)
