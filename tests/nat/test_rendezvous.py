"""A public node and its clients, over real connections on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace

import pytest

from tesseract_async.endpoint.endpoint import Endpoint
from tesseract_async.errors import NotAllowed, Overloaded, ProtocolError, RemoteError
from tesseract_async.identity import Identity, PeerID
from tesseract_async.nat import rendezvous as rendezvous_module
from tesseract_async.nat.rendezvous import (
    DELIVER,
    OFFER,
    REGISTER,
    RELAY,
    RendezvousClient,
    RendezvousServer,
    RendezvousSettings,
)
from tesseract_async.transport.base import PeerAddress
from tesseract_async.transport.tcp import TcpTransport

pytestmark = pytest.mark.both_loops

SETTINGS = RendezvousSettings(check_period=0.02)


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
async def public(*, settings: RendezvousSettings = SETTINGS, relay: Room | None = None) -> AsyncIterator[Public]:
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    endpoint = Endpoint(identity=Identity.generate(), transports=[TcpTransport(sock)])
    address = PeerAddress(endpoint.peer_id, (f"127.0.0.1:{sock.getsockname()[1]}",))
    await endpoint.start()
    async with endpoint:
        server = RendezvousServer(endpoint, relay=relay, settings=settings)
        server.start()
        yield Public(endpoint, address, server)


class Client:
    """A node that nobody can dial."""

    def __init__(self, contacts: list[PeerAddress], settings: RendezvousSettings) -> None:
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
            settings=settings,
        )

    async def echo(self, offer: bytes) -> bytes:
        return b"answer to " + offer

    async def answer_offer(self, offer: bytes, *, origin: str) -> bytes:
        self.heard.append((offer, origin))
        return await self.answer(offer)

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(30):
            while not condition():
                self.changed.clear()
                await self.changed.wait()


@contextlib.asynccontextmanager
async def client(*contacts: PeerAddress, settings: RendezvousSettings = SETTINGS) -> AsyncIterator[Client]:
    made = Client(list(contacts), settings)
    async with made.endpoint:
        if contacts:
            made.rendezvous.start()
            await made.until(lambda: len(made.rendezvous.rendezvous) == min(len(contacts), settings.num_rendezvous))
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
            settings=SETTINGS,
        )
        assert await own.send_offer(house.peer, asked.peer_id, b"mine", timeout=30) == b"answer to mine"
        assert asked.heard[-1] == (b"mine", "203.0.113.1")


async def test_only_those_who_registered_are_disturbed() -> None:
    async with public() as house, client() as stranger, client() as asker:
        await stranger.endpoint.call(house.peer, REGISTER, {}, timeout=30)
        del house.server._clients[stranger.peer_id]
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
    async with public(settings=replace(SETTINGS, offer_timeout=0.05)) as house, client(house.peer) as asked:

        async def never(offer: bytes) -> bytes:
            await asyncio.Event().wait()
            return b""

        asked.answer = never
        async with client() as asker:
            with pytest.raises(RemoteError, match="did not answer"):
                await asker.rendezvous.send_offer(house.peer, asked.peer_id, b"offer", timeout=30)
            assert house.endpoint.metrics.total("rendezvous_offers_lost") == 1
            assert not house.server._senders.used and not house.server._sending and not house.server._recipients


@pytest.mark.parametrize(
    "body", [None, [], {}, {"to": b"short", "offer": b""}, {"to": bytes(32)}, {"to": bytes(32), "offer": "text"}]
)
async def test_malformed_wishes(body: object) -> None:
    async with public() as house, client() as asker:
        with pytest.raises(NotAllowed):
            await asker.endpoint.call(house.peer, OFFER, body, timeout=30)
        assert house.refused("malformed") == 1


async def test_offers_under_way_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = replace(SETTINGS, max_offers_per_sender=3, max_own_offers=10)
    async with public(settings=settings) as house, client(house.peer) as asked:
        go_on = asyncio.Event()
        started = asyncio.Event()

        async def wait(offer: bytes) -> bytes:
            if len(asked.heard) == 3:
                started.set()
            await go_on.wait()
            return offer

        asked.answer = wait
        async with client(settings=settings) as asker:

            def send() -> asyncio.Task[bytes]:
                coroutine = asker.rendezvous.send_offer(house.peer, asked.peer_id, b"offer", timeout=30)
                return asyncio.get_running_loop().create_task(coroutine)

            tasks = [send() for _ in range(3)]
            await started.wait()
            with pytest.raises(Overloaded):
                await send()
            assert house.refused("too_many") == 1
            with pytest.raises(NotAllowed):
                body = {"to": bytes(asked.peer_id), "offer": bytes(5000)}
                await asker.endpoint.call(house.peer, OFFER, body, timeout=30)
            assert house.refused("too_large") == 1
            go_on.set()
            assert await asyncio.gather(*tasks) == [b"offer"] * 3


async def test_a_sender_waits_for_its_turn() -> None:
    """With more offers than it may have under way, it queues them itself instead of being refused."""
    settings = replace(SETTINGS, max_offers_per_sender=2, max_own_offers=2)
    async with public(settings=settings) as house, client(house.peer) as asked, client(settings=settings) as asker:
        sends = (asker.rendezvous.send_offer(house.peer, asked.peer_id, b"offer", timeout=30) for _ in range(10))
        assert len(await asyncio.gather(*sends)) == 10


async def test_registrations_are_bounded_and_end() -> None:
    settings = replace(SETTINGS, max_clients=2, registration_ttl=1000.0)
    async with public(settings=settings) as house, client() as one, client() as two, client() as three:
        for member in (one, two, one):
            await member.endpoint.call(house.peer, REGISTER, {}, timeout=30)
        with pytest.raises(Overloaded):
            await three.endpoint.call(house.peer, REGISTER, {}, timeout=30)
        assert house.server.num_clients == 2
        for peer_id in house.server._clients:
            house.server._clients[peer_id] = house.server._clients[peer_id]._replace(until=0.0)
        await three.endpoint.call(house.peer, REGISTER, {}, timeout=30)
        assert house.server.num_clients == 1


async def test_who_is_not_connected_any_more_leaves_its_place_to_others() -> None:
    settings = replace(SETTINGS, max_clients=8, registration_ttl=1000.0)
    async with public(settings=settings) as house, client() as honest:
        for _ in range(8):
            async with client() as stranger:
                await stranger.endpoint.call(house.peer, REGISTER, {}, timeout=30)
        await honest.until(lambda: not house.endpoint.connections())
        await honest.endpoint.call(house.peer, REGISTER, {}, timeout=30)
        assert house.server.num_clients == 1


async def test_neighbours_get_a_part_of_the_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous_module, "range_of", lambda origin: "8.8.8.0/24")
    settings = replace(SETTINGS, max_clients_per_range=2, registration_ttl=1000.0)
    async with public(settings=settings) as house, client() as one, client() as two, client() as three:
        for member in (one, two, one):
            await member.endpoint.call(house.peer, REGISTER, {}, timeout=30)
        with pytest.raises(Overloaded):
            await three.endpoint.call(house.peer, REGISTER, {}, timeout=30)


async def test_a_rendezvous_that_dies_is_replaced() -> None:
    async with contextlib.AsyncExitStack() as stack:
        houses = [await stack.enter_async_context(public()) for _ in range(3)]
        async with client(*(house.peer for house in houses), settings=replace(SETTINGS, num_rendezvous=2)) as member:
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
    from tesseract_async.endpoint.endpoint import IncomingCall, Message

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
        await member.rendezvous._register(house.peer)
        assert member.rendezvous.rendezvous == ()


async def test_a_rendezvous_names_its_other_kind_of_address() -> None:
    """Others may lack the kind of IP by which this node knows it."""
    async with public() as house, client() as member:
        for told, expected in (
            (["203.0.113.1:5", "[2001:db8::1]:5"], (house.peer.addresses[0], "[2001:db8::1]:5")),
            (["203.0.113.1:5"], house.peer.addresses),
            (["[2001:db8::1]:5", 5, None], (house.peer.addresses[0], "[2001:db8::1]:5")),
            ([None, "nonsense", "[::]:5"], house.peer.addresses),
            (["[2001:db8::1]:5"] * 5, house.peer.addresses),
        ):
            house.server._own_addresses = lambda told=told: _Told(told)  # type: ignore[misc, assignment, return-value]
            await member.rendezvous._register(house.peer)
            assert member.rendezvous.rendezvous[0].addresses == expected


class _Told(list[object]):
    """A list that a server does not shorten."""

    def __getitem__(self, key: object) -> object:  # type: ignore[override]
        return self
