"""Nodes without endpoint and network: transports and answerers that signal to one another by a dictionary."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import cast

from tesseract_async.endpoint.endpoint import Endpoint
from tesseract_async.identity import Identity, PeerID
from tesseract_async.metrics import Metrics
from tesseract_async.nat import offers, preamble
from tesseract_async.nat.demux import PreambleDemultiplexer
from tesseract_async.nat.hole_punching import HolePuncher
from tesseract_async.nat.offer_answerer import MAX_NEGOTIATIONS, OfferAnswerer
from tesseract_async.nat.relay import Relay, RelaySettings
from tesseract_async.nat.rendezvous import RendezvousClient
from tesseract_async.nat.role import RoleMachine
from tesseract_async.nat.traversal import NatTransport
from tesseract_async.network.address_scope import AddressScope
from tesseract_async.transport.base import DialPath, PeerAddress, Pipe
from tests.transport.pipes import bound_socket


class Place:
    """One node: where it is in the network, and signalling to the others."""

    def __init__(self, places: dict[PeerID, Place], *, max_negotiations: int, puncher: HolePuncher | None) -> None:
        self.identity = Identity.generate()
        self.peer_id = self.identity.peer_id
        self.metrics = Metrics()
        self.public_addresses: tuple[str, ...] = ()
        self.rendezvous: tuple[PeerAddress, ...] = ()
        self.symmetric = False
        self.behind_nat = True
        self.is_silent = False
        """Offers to this node are never answered."""
        self.accepted: asyncio.Queue[Pipe] = asyncio.Queue()
        self.relay = Relay(settings=RelaySettings(), metrics=self.metrics)
        self.spoil: Callable[[bytes], bytes] = lambda answer: answer
        self.num_offers = 0
        self._places = places
        places[self.peer_id] = self
        sock = bound_socket()
        self.address = f"127.0.0.1:{sock.getsockname()[1]}"
        self.puncher = puncher or HolePuncher(own_hosts=lambda: ["127.0.0.1"], stun_server=self.no_stun_server)
        scope = AddressScope(["127.0.0.1"])
        self.answerer = OfferAnswerer(
            cast(Endpoint, self),
            puncher=self.puncher,
            scope=scope,
            max_negotiations=max_negotiations,
        )
        self.nat = NatTransport(
            cast(Endpoint, self),
            signalling=cast(RendezvousClient, self),
            role=cast(RoleMachine, self),
            puncher=self.puncher,
            direct_paths=lambda peer: (),
            scope=scope,
        )
        handlers = {preamble.RELAY: self.relay.pipe_arrived, preamble.REVERSE: self.nat.pipe_arrived}
        self.demultiplexer = PreambleDemultiplexer(sock, handlers=handlers, metrics=self.metrics)

    async def no_stun_server(self) -> tuple[str, int] | None:
        return None

    # an endpoint

    def path_kind(self, peer_id: PeerID) -> str:
        return ""

    def accept(self, pipe: Pipe) -> None:
        self.accepted.put_nowait(pipe)

    async def upgrade(self, peer: PeerAddress, paths: Sequence[DialPath]) -> None:
        raise AssertionError("there is no connection")

    # signalling

    async def send_offer(self, via: PeerAddress, recipient: PeerID, offer: bytes, *, timeout: float) -> bytes:
        self.num_offers += 1
        other = self._places[recipient]
        if other.is_silent:
            await asyncio.Event().wait()
        answer = await other.answerer.answer(offer, origin="127.0.0.1", relays=other.rendezvous)
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

    def offer(self, recipient: PeerID, kind: str, body: Mapping[str, object], *, age: float = 0.0) -> bytes:
        now = time.time() - age
        return offers.encode_offer(self.identity, recipient, kind=kind, body=body, nonce=os.urandom(16), now=now)

    async def answer(self, offer: bytes) -> bytes:
        return await self.answerer.answer(offer, origin="127.0.0.1", relays=self.rendezvous)

    async def aclose(self) -> None:
        await self.demultiplexer.aclose()
        await self.nat.aclose()
        await self.answerer.tasks.aclose()
        await self.relay.aclose()


@contextlib.asynccontextmanager
async def town(
    count: int, *, max_negotiations: int = MAX_NEGOTIATIONS, puncher: HolePuncher | None = None
) -> AsyncIterator[list[Place]]:
    """The last place is everybody's rendezvous and relay."""
    places: dict[PeerID, Place] = {}
    made = [Place(places, max_negotiations=max_negotiations, puncher=puncher) for _ in range(count)]
    relay = made[-1]
    for place in made:
        place.rendezvous = (PeerAddress(relay.peer_id, (relay.address,)),)
        await place.demultiplexer.listen(place.accepted.put_nowait)
    yield made
    for place in made:
        await place.aclose()


def path(place: Place, peer: PeerAddress, kind: str) -> DialPath:
    [found] = [one for one in place.nat.paths(peer) if one.name == kind]
    return found
