"""`NatTransport` against another one, with signalling in memory: the ways, and those who spoil them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from tesseract_async.errors import InvalidRecord, NotAllowed, Overloaded, PeerUnreachable, ProtocolError
from tesseract_async.identity import Identity, PeerID
from tesseract_async.metrics import Metrics
from tesseract_async.nat import offers, preamble
from tesseract_async.nat.demux import PreambleDemultiplexer
from tesseract_async.nat.offers import Candidate, Description, GuardSettings, RelayBody, ReverseBody
from tesseract_async.nat.relay import Relay, RelaySettings
from tesseract_async.nat.ways import MAX_TRIED, NatSettings, NatTransport, plausible
from tesseract_async.transport import tcp
from tesseract_async.transport.address_scope import AddressScope
from tesseract_async.transport.base import DialPath, PeerAddress, Pipe
from tests.transport.pipes import Receiver, bound_socket

RELAY_ID = Identity.from_seed(b"relay" + bytes(27)).peer_id


class Place:
    """A node without endpoint and network: its surroundings, and signalling to the other places by a dictionary."""

    def __init__(self, places: dict[PeerID, Place], *, settings: NatSettings | None = None) -> None:
        self.identity = Identity.generate()
        self.peer_id = self.identity.peer_id
        self.metrics = Metrics()
        self.public_addresses: tuple[str, ...] = ()
        self.rendezvous: tuple[PeerAddress, ...] = ()
        self.symmetric = False
        self.can_punch = True
        self.behind_nat = True
        self.accepted: asyncio.Queue[Pipe] = asyncio.Queue()
        self.relay = Relay(settings=RelaySettings(), metrics=self.metrics)
        self.spoil: Callable[[bytes], bytes] = lambda answer: answer
        self.num_offers = 0
        self.origin = "127.0.0.1"
        self._places = places
        places[self.peer_id] = self
        sock = bound_socket()
        self.address = f"127.0.0.1:{sock.getsockname()[1]}"
        self.demultiplexer = PreambleDemultiplexer(tcp.TcpTransport(sock), special=self.special, metrics=self.metrics)
        self.nat = NatTransport(
            identity=self.identity, signalling=self, surroundings=self, metrics=self.metrics, settings=settings
        )

    def special(self, kind: int, token: bytes, pipe: Pipe) -> None:
        if kind == preamble.RELAY:
            self.relay.pipe_arrived(token, pipe)
        else:
            self.nat.pipe_arrived(token, pipe)

    # Surroundings

    async def stun_server(self) -> tuple[str, int] | None:
        return None

    def channel_addresses(self) -> list[str]:
        return ["127.0.0.1"]

    # Signalling

    async def send_offer(self, via: PeerAddress, recipient: PeerID, offer: bytes, *, timeout: float) -> bytes:
        self.num_offers += 1
        answer = await self._places[recipient].nat.answer_offer(offer, origin=self.origin)
        return self.spoil(answer)

    async def reserve_relay(self, via: PeerAddress, *, timeout: float) -> tuple[bytes, bytes]:
        assert via.peer_id is not None
        return self._places[via.peer_id].relay.reserve(self.peer_id)

    # the test's hands

    @property
    def peer(self) -> PeerAddress:
        return PeerAddress(self.peer_id, (), tuple(map(str, self.rendezvous)))

    def refused(self, reason: str) -> float:
        return self.metrics.snapshot().get(f"nat_offers_refused{{reason={reason}}}", 0)

    def offer(self, recipient: PeerID, kind: str, body: dict[str, Any], *, age: float = 0.0) -> bytes:
        now = time.time() - age
        return offers.encode_offer(self.identity, recipient, kind=kind, body=body, nonce=os.urandom(16), now=now)

    async def aclose(self) -> None:
        await self.demultiplexer.aclose()
        await self.nat.aclose()
        await self.relay.aclose()


@contextlib.asynccontextmanager
async def town(count: int, *, settings: NatSettings | None = None) -> AsyncIterator[list[Place]]:
    """The last place is everybody's rendezvous and relay."""
    places: dict[PeerID, Place] = {}
    made = [Place(places, settings=settings) for _ in range(count)]
    relay = made[-1]
    for place in made:
        place.rendezvous = (PeerAddress(relay.peer_id, (relay.address,)),)
        await place.demultiplexer.listen(place.accepted.put_nowait)
        await place.nat.listen(place.accepted.put_nowait)
    yield made
    for place in made:
        await place.aclose()


def path(place: Place, peer: PeerAddress, kind: str) -> DialPath:
    [found] = [one for one in place.nat.paths(peer, bulk=False) if one.name == kind]
    return found


async def check(one: Pipe, other: Pipe) -> None:
    """Bytes flow both ways; then both are gone."""
    here, there = Receiver(), Receiver()
    one.start(here)
    other.start(there)
    one.write(b"ping")
    await there.until_bytes(4)
    other.write(b"pong")
    await here.until_bytes(4)
    one.abort()
    await here.until_lost()
    await there.until_lost()


async def end(pipe: Pipe) -> None:
    receiver = Receiver()
    pipe.start(receiver)
    pipe.abort()
    await receiver.until_lost()


@pytest.mark.both_loops
@pytest.mark.parametrize("kind", ["reverse", "datachannel", "relay"])
async def test_every_way_leads_there(kind: str) -> None:
    async with town(3) as (asker, asked, _):
        if kind == "reverse":
            asker.public_addresses = (asker.address,)
        pipe = await path(asker, asked.peer, kind).open()
        assert pipe.description.startswith(kind)
        await check(pipe, await asked.accepted.get())
        asker.nat.path_finished(asked.peer, DialPath(kind, 0.0, lambda: None), None, 0.1)  # type: ignore[arg-type, return-value]


@pytest.mark.both_loops
@pytest.mark.parametrize("kind", ["reverse", "datachannel", "relay"])
async def test_cancelled_it_leaves_nothing(kind: str) -> None:
    async with town(3) as (asker, asked, _):
        asked.nat._accept = None  # refuses; so the asker is cancelled while it waits for a silent peer
        asker.public_addresses = (asker.address,) if kind == "reverse" else ()
        opening = asyncio.ensure_future(path(asker, asked.peer, kind).open())
        for _ in range(3):
            await asyncio.sleep(0)
        opening.cancel()
        await asyncio.wait([opening])
        assert not asker.nat._expected


def names(paths: Sequence[DialPath]) -> list[str]:
    return [one.name for one in sorted(paths, key=lambda one: one.delay)]


def delay(paths: Sequence[DialPath], name: str) -> float:
    [found] = [one.delay for one in paths if one.name == name]
    return found


async def test_which_ways_are_tried_and_when() -> None:
    async with town(3) as (asker, asked, _):
        nat, peer = asker.nat, asked.peer
        assert names(nat.paths(peer, bulk=False)) == ["datachannel", "relay"]
        assert nat.paths(PeerAddress(asked.peer_id, ("127.0.0.1:1",)), bulk=False) == []
        assert nat.paths(PeerAddress(None, (), peer.rendezvous), bulk=False) == []
        assert nat.paths(replace(peer, peer_id=asker.peer_id), bulk=False) == []
        patient = delay(nat.paths(peer, bulk=False), "relay")
        asker.symmetric = True
        assert delay(nat.paths(peer, bulk=False), "relay") < patient
        # direct addresses get a head start
        assert delay(nat.paths(replace(peer, addresses=("127.0.0.1:1",)), bulk=False), "datachannel") > 0
        # what worked comes first
        for won, expected in (("relay", ["relay"]), ("datachannel", ["datachannel", "relay"])):
            nat.path_finished(peer, DialPath(won, 0.0, lambda: None), None, 0.1)  # type: ignore[arg-type, return-value]
            assert names(nat.paths(peer, bulk=True)) == expected
        assert delay(nat.paths(peer, bulk=False), "relay") == patient
        nat.path_finished(peer, DialPath("datachannel", 0.0, lambda: None), OSError(), 0.1)  # type: ignore[arg-type, return-value]
        assert delay(nat.paths(peer, bulk=False), "relay") < patient
        asker.can_punch = False
        assert names(nat.paths(peer, bulk=False)) == ["relay"]
        asker.public_addresses = (asker.address,)
        assert names(nat.paths(peer, bulk=False)) == ["reverse", "relay"]
        asker.can_punch = True  # dialled by those who have IPv6 only: others may need a hole
        assert names(nat.paths(peer, bulk=False)) == ["reverse", "datachannel", "relay"]
        asker.behind_nat = False
        assert names(nat.paths(peer, bulk=False)) == ["reverse", "relay"]


async def test_forged_stale_and_repeated_offers_are_refused_and_counted() -> None:
    async with town(3) as (eve, asked, other):
        body = ReverseBody((eve.address,), bytes(16)).pack()
        good = eve.offer(asked.peer_id, offers.REVERSE, body)
        answer = asked.nat.answer_offer
        for data in (b"", b"x" * 200, good[:-1], good[:70] + bytes([good[70] ^ 1]) + good[71:]):
            with pytest.raises(ProtocolError):
                await answer(data, origin="127.0.0.1")
        with pytest.raises(InvalidRecord):
            await answer(eve.offer(other.peer_id, offers.REVERSE, body), origin="127.0.0.1")
        for kind in (offers.REVERSE, offers.RELAY, offers.CHANNEL):  # signed as it should be, and empty
            with pytest.raises(ProtocolError):
                await answer(eve.offer(asked.peer_id, kind, {}), origin="127.0.0.1")
        assert asked.refused("malformed") == 8
        with pytest.raises(NotAllowed):
            await answer(eve.offer(asked.peer_id, offers.REVERSE, body, age=3600), origin="127.0.0.1")
        assert asked.refused("stale") == 1
        await answer(good, origin="127.0.0.1")
        with pytest.raises(NotAllowed):
            await answer(good, origin="127.0.0.1")
        assert asked.refused("replayed") == 1
        await end(await asked.accepted.get())


async def test_nobody_is_dialled_at_a_strangers_wish() -> None:
    async with town(3) as (eve, asked, _):
        body = ReverseBody(("203.0.113.9:80",), bytes(16)).pack()
        data = eve.offer(asked.peer_id, offers.REVERSE, body)
        answer = await asked.nat.answer_offer(data, origin="127.0.0.1")
        read = offers.decode_answer(answer, data, sender=asked.peer_id, recipient=eve.peer_id)
        assert not read.accepted and "elsewhere" in read.reason
        data = eve.offer(asked.peer_id, offers.RELAY, RelayBody(eve.peer_id, bytes(16)).pack())
        answer = await asked.nat.answer_offer(data, origin="127.0.0.1")
        read = offers.decode_answer(answer, data, sender=asked.peer_id, recipient=eve.peer_id)
        assert not read.accepted and "rendezvous" in read.reason
        assert asked.refused("declined") == 2
        assert not asked.nat._tasks


async def test_a_flood_of_offers_meets_a_bound() -> None:
    settings = NatSettings(guard=GuardSettings(per_sender=5, total=8))
    async with town(4, settings=settings) as (eve, mallory, asked, _):
        accepted, refused = 0, 0
        for sender in (eve, mallory):
            for _ in range(20):
                body = ReverseBody(("203.0.113.9:80",), bytes(16)).pack()
                try:
                    await asked.nat.answer_offer(sender.offer(asked.peer_id, offers.REVERSE, body), origin="127.0.0.1")
                    accepted += 1
                except Overloaded:
                    refused += 1
        assert (accepted, refused) == (8, 32)
        assert asked.refused("too_many") == 32


async def test_few_data_channels_are_negotiated_at_once() -> None:
    settings = NatSettings(max_negotiations=0)
    async with town(3, settings=settings) as (asker, asked, _):
        with pytest.raises(NotAllowed, match="too many"):
            await path(asker, asked.peer, "datachannel").open()


@pytest.mark.parametrize("kind", ["reverse", "datachannel", "relay"])
async def test_a_carrier_that_forges_answers_gets_nowhere(kind: str) -> None:
    async with town(3) as (asker, asked, carrier):
        asker.public_addresses = (asker.address,) if kind == "reverse" else ()

        def by_another(answer: bytes) -> bytes:
            payload = carrier.identity.public_key + answer[96:]
            return carrier.identity.sign(offers._CONTEXT + payload) + payload

        for spoil in (by_another, lambda answer: answer[:-1] + b"\0", lambda answer: b""):
            asker.spoil = spoil
            with pytest.raises(PeerUnreachable) as caught:
                await path(asker, asked.peer, kind).open()
            assert "ProtocolError" in str(caught.value) or "InvalidRecord" in str(caught.value)


async def test_a_token_that_nobody_expects_is_sent_away() -> None:
    async with town(2) as (asked, _):
        pipe, receiver = await tcp.connect(asked.address), Receiver()
        pipe.start(receiver)
        pipe.write(preamble.encode_preamble(preamble.REVERSE, bytes(16)))
        await receiver.until_lost()
        assert asked.metrics.snapshot()["nat_refused{reason=unknown_token}"] == 1


async def test_a_relayed_connection_looks_for_a_better_way() -> None:
    settings = NatSettings(improve_after=(0.0, 0.0))
    async with town(3, settings=settings) as (asker, asked, _):
        tried: list[str] = []
        improved = asyncio.Event()

        async def upgrade(peer: PeerAddress, paths: Sequence[DialPath]) -> None:
            tried.append(paths[0].name)
            if len(tried) < 3:
                raise PeerUnreachable("the peer", {})
            nonlocal kind
            kind = "tcp"
            improved.set()

        asker.nat.upgrade = upgrade
        kind = "relay"
        asker.nat.path_kind = lambda peer_id: kind if peer_id == asked.peer_id else ""
        won = DialPath("relay", 0.0, lambda: None)  # type: ignore[arg-type, return-value]
        asker.nat.path_finished(asked.peer, won, None, 0.1)
        asker.nat.path_finished(asked.peer, won, None, 0.1)
        await improved.wait()
        await asyncio.sleep(0)
        assert tried == ["datachannel"] * 3
        asker.nat.path_finished(asked.peer, won, None, 0.1)
        while asker.nat._tasks:
            await asyncio.wait(asker.nat._tasks)
        assert len(tried) == 3


@pytest.mark.parametrize("kind", ["relay", "datachannel"])
async def test_a_peer_that_can_be_dialled_now_is_dialled(kind: str) -> None:
    """Its records name addresses now, or we can be dialled ourselves: at once, not at the next attempt."""
    settings = NatSettings(improve_after=(3600.0,))
    async with town(3, settings=settings) as (asker, asked, _):
        tried: list[list[str]] = []
        attempted = asyncio.Event()

        async def upgrade(peer: PeerAddress, paths: Sequence[DialPath]) -> None:
            tried.append(names(paths))
            attempted.set()
            raise PeerUnreachable("the peer", {})

        def direct(peer: PeerAddress) -> list[DialPath]:
            return [DialPath(f"tcp {address}", 0.0, lambda: None) for address in peer.addresses]  # type: ignore[arg-type, return-value]

        nat = asker.nat
        nat.upgrade, nat.path_kind, nat.direct_paths = upgrade, lambda peer_id: kind, direct
        nat.path_finished(asked.peer, DialPath(kind, 0.0, lambda: None), None, 0.1)  # type: ignore[arg-type, return-value]
        punch = ["datachannel"] if kind == "relay" else []
        nat.peer_known(replace(asked.peer, addresses=("127.0.0.1:9",)))
        nat.peer_known(replace(asked.peer, addresses=("127.0.0.1:9",)))  # no news
        await attempted.wait()
        attempted.clear()
        nat.peer_known(asked.peer)  # it is gone from there: no reason to try
        asker.public_addresses = (asker.address,)
        nat.surroundings_changed()
        await attempted.wait()
        assert tried == [["tcp 127.0.0.1:9", *punch], ["reverse", *punch]]


async def test_who_needs_no_better_way_looks_for_none() -> None:
    async with town(3) as (asker, asked, _):
        asker.nat.path_kind = lambda peer_id: ""

        async def upgrade(peer: PeerAddress, paths: Sequence[DialPath]) -> None:
            raise AssertionError("there is no connection any more")

        asker.nat.upgrade = upgrade
        asker.nat.path_finished(asked.peer, DialPath("datachannel", 0.0, lambda: None), None, 0.1)  # type: ignore[arg-type, return-value]
        asker.nat.surroundings_changed()
        while asker.nat._tasks:
            await asyncio.wait(asker.nat._tasks)
        assert not asker.nat._improving
        asker.nat.path_finished(asked.peer, DialPath("reverse", 0.0, lambda: None), None, 0.1)  # type: ignore[arg-type, return-value]
        assert not asker.nat._tasks


# ---- whom a data channel's checks are sent to


def description(*hosts: str) -> Description:
    """Candidates at these hosts: ``host`` in private networks, else ``srflx``."""
    kinds = ["host" if host.startswith(("192.168.", "10.", "127.")) else "srflx" for host in hosts]
    return Description(
        "user",
        "password" * 3,
        bytes(32),
        tuple(
            Candidate(kind, host, 1000 + number, 2**31 - number, str(number))
            for number, (kind, host) in enumerate(zip(kinds, hosts, strict=True))
        ),
    )


def hosts_of(offered: Description, *, origin: str | None, own: Description, scope: AddressScope) -> list[str]:
    return sorted(one.host for one in plausible(offered, own, origin=origin, allows=scope.allows).candidates)


HOME = AddressScope(["192.168.1.2"])
OWN = description("192.168.1.2", "8.8.8.8")


def test_an_offer_leads_to_where_it_came_from_only() -> None:
    third = [f"9.9.9.{number}" for number in range(10)] + ["169.254.169.254", "192.168.1.1"]
    assert hosts_of(description("9.9.0.1", *third[:11]), origin="9.9.0.1", own=OWN, scope=HOME) == ["9.9.0.1"]
    assert hosts_of(description(*third), origin="9.9.0.1", own=OWN, scope=HOME) == []
    assert hosts_of(description(*["9.9.0.1"] * 12), origin="9.9.0.1", own=OWN, scope=HOME) == ["9.9.0.1"] * MAX_TRIED
    v6 = description("2a00::1", "2a00::2", "2a00:0:0:1::1")
    assert hosts_of(v6, origin="2a00::9", own=OWN, scope=HOME) == ["2a00::1", "2a00::2"]


def test_private_addresses_are_tried_behind_the_same_nat_only() -> None:
    peer = description("192.168.1.7", "8.8.8.8")
    assert hosts_of(peer, origin="8.8.8.8", own=OWN, scope=HOME) == ["192.168.1.7", "8.8.8.8"]
    assert hosts_of(peer, origin="8.8.4.4", own=OWN, scope=HOME) == []
    assert hosts_of(description("10.0.0.1", "8.8.8.8"), origin="8.8.8.8", own=OWN, scope=HOME) == ["8.8.8.8"]
    public = AddressScope(["8.8.8.8"])
    assert hosts_of(peer, origin="8.8.8.8", own=OWN, scope=public) == ["8.8.8.8"]
    assert hosts_of(description("127.0.0.1"), origin="127.0.0.1", own=OWN, scope=HOME) == []


def test_an_answer_leads_to_one_public_host_of_each_kind() -> None:
    many = description("9.9.0.1", "9.9.1.1", "9.9.2.1", "2a00::1", "2a01::1", "192.168.1.7")
    assert hosts_of(many, origin=None, own=OWN, scope=HOME) == ["2a00::1", "9.9.0.1"]
    same = description("192.168.1.7", "8.8.8.8")
    assert hosts_of(same, origin=None, own=OWN, scope=HOME) == ["192.168.1.7", "8.8.8.8"]
    assert hosts_of(description("192.168.1.7"), origin=None, own=description("192.168.1.2"), scope=HOME) == [
        "192.168.1.7"
    ]


async def test_offers_that_name_third_parties_are_declined() -> None:
    async with town(3) as (asking, asked, _):
        body = description("9.9.9.9", "9.9.8.8").pack()
        offer = offers.encode_offer(
            asking.identity, asked.peer_id, kind=offers.CHANNEL, body=body, nonce=os.urandom(16), now=time.time()
        )
        reply = await asked.nat.answer_offer(offer, origin="127.0.0.1")
        answer = offers.decode_answer(reply, offer, sender=asked.peer_id, recipient=asking.peer_id)
        assert not answer.accepted and "name no address" in answer.reason
        assert asked.nat._num_negotiations == 0
