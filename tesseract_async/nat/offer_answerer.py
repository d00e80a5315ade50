"""Answers the offers of peers that cannot dial this node: dials them, meets them at a relay, or punches a hole.

Offers come through a rendezvous, and neither it nor their senders are trusted: this node sends only to the host that an
offer's sender speaks from and to its own rendezvous nodes, and not often. On the pipe that results, the sender opens
TLS, and the ordinary handshake decides who is at the other end.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

from tesseract_async.endpoint.endpoint import Endpoint
from tesseract_async.errors import ConnectionLost, NotAllowed, Overloaded, ProtocolError, TesseractError, describe
from tesseract_async.metrics import Metrics
from tesseract_async.nat import offers, preamble
from tesseract_async.nat.hole_punching import HolePuncher, plausible
from tesseract_async.nat.offers import Description, Offer, OfferGuard
from tesseract_async.nat.relay import meet_at_relay
from tesseract_async.network.address_scope import AddressScope
from tesseract_async.tasks import TaskSet
from tesseract_async.transport import tcp
from tesseract_async.transport.base import PeerAddress, split_host_port

if TYPE_CHECKING:
    from tesseract_async.nat.webrtc.pipe import Negotiation

logger = logging.getLogger(__name__)

MAX_NEGOTIATIONS: Final = 16
"""Data channels that may be under negotiation because others asked for them."""

REASONS: Final = {TimeoutError: "timeout", ConnectionLost: "lost", OSError: "io", TesseractError: "protocol"}


def offer_tasks(metrics: Metrics) -> TaskSet:
    """Return a set of tasks that may raise TesseractError or OSError, counted as ``nat_offers_failed``."""

    def failed(error: BaseException) -> None:
        reason = next((name for kind, name in REASONS.items() if isinstance(error, kind)), None)
        if reason is None:
            raise error
        logger.debug("a peer's offer came to nothing: %s", describe(error))
        metrics.count("nat_offers_failed", reason=reason)

    return TaskSet("nat: offer", on_error=failed)


class OfferAnswerer:
    def __init__(
        self,
        endpoint: Endpoint,
        *,
        puncher: HolePuncher,
        scope: AddressScope,
        max_negotiations: int = MAX_NEGOTIATIONS,
    ) -> None:
        """`scope`: where this node may send on a stranger's word."""
        self._identity = endpoint.identity
        self._accept = endpoint.accept
        self._puncher = puncher
        self._metrics = endpoint.metrics
        self._scope = scope
        self._max_negotiations = max_negotiations
        self._guard = OfferGuard()
        self.num_negotiations = 0
        """Data channels under negotiation."""
        self.tasks = offer_tasks(endpoint.metrics)
        """The negotiations that accepted offers have begun."""

    async def answer(self, data: bytes, *, origin: str, relays: Sequence[PeerAddress]) -> bytes:
        """Return the encoded answer to an offer that came through a rendezvous, and do what it asks. Untrusted.

        `origin`: the host from which the rendezvous heard the offer's sender. `relays`: this node's rendezvous nodes.

        Raises: ProtocolError for an offer that is malformed, forged or for another peer; Overloaded, NotAllowed.
        """
        try:
            offer = offers.decode_offer(data, self._identity.peer_id)
        except ProtocolError:
            self._metrics.count("nat_offers_refused", reason="malformed")
            raise
        target = "" if offer.kind == offers.RELAY else origin
        reason = self._guard.refuse(offer, now=asyncio.get_running_loop().time(), wall=time.time(), target=target)
        if reason is None and self.tasks.is_closed:
            reason = "closing"
        if reason is not None:
            self._metrics.count("nat_offers_refused", reason=reason)
            if reason == "too_many":
                raise Overloaded("too many offers", retry_after=10.0)
            raise NotAllowed(f"the offer is {reason}")
        self._metrics.count("nat_offers_accepted", kind=offer.kind)
        try:
            body = await self._act(offer, origin, relays)
        except ProtocolError:
            self._metrics.count("nat_offers_refused", reason="malformed")
            raise
        except NotAllowed as error:
            self._metrics.count("nat_offers_refused", reason="declined")
            return offers.encode_answer(self._identity, offer, body=None, reason=str(error), now=time.time())
        return offers.encode_answer(self._identity, offer, body=body, now=time.time())

    async def _act(self, offer: Offer, origin: str, relays: Sequence[PeerAddress]) -> Mapping[str, object]:
        """Return the body of the answer. Raises: NotAllowed, ProtocolError."""
        if offer.kind == offers.REVERSE:
            named, token = offers.read_reverse(offer.body)
            # never dial a third party because a stranger wants it
            addresses = [address for address in named if split_host_port(address)[0] == origin]
            if not addresses or not self._scope.allows(origin):
                raise NotAllowed(f"you speak from {origin}, and want to be dialed elsewhere")
            self.tasks.spawn(self._dial(addresses[0], token))
            return {}
        if offer.kind == offers.RELAY:
            meeting_point, token = offers.read_relay(offer.body)
            for relay in relays:
                if relay.peer_id == meeting_point:
                    self.tasks.spawn(self._meet(relay, token))
                    return {}
            raise NotAllowed("that relay is not one of this node's rendezvous nodes")
        return await self._negotiate(Description.unpack(offer.body), origin)

    async def _negotiate(self, remote: Description, origin: str) -> Mapping[str, object]:
        if not self._puncher.enabled:
            raise NotAllowed("this node makes no data channels")
        if self.num_negotiations >= self._max_negotiations:
            raise NotAllowed("too many data channels are under negotiation")
        self.num_negotiations += 1
        negotiation = None
        try:
            negotiation = await self._puncher.negotiation(controlling=False)
            own = await negotiation.gather()
            remote = plausible(remote, own, origin=origin, allows=self._scope.allows)
            if not remote.candidates:
                raise NotAllowed(f"you speak from {origin}, and name no address there")
            if self.tasks.is_closed:
                raise NotAllowed("this node is closing")
        except BaseException:  # cancelled, too: the place is free again, sockets are closed
            self.num_negotiations -= 1
            if negotiation is not None:
                await negotiation.aclose()
            raise
        self.tasks.spawn(self._connect(negotiation, remote))
        return own.pack()

    async def _connect(self, negotiation: Negotiation, remote: Description) -> None:
        try:
            self._accept(await negotiation.connect(remote))
        finally:
            self.num_negotiations -= 1

    async def _dial(self, address: str, token: bytes) -> None:
        pipe = await tcp.connect(address)
        pipe.write(preamble.encode_preamble(preamble.REVERSE, token))
        pipe.description = f"reverse {address}"
        self._accept(pipe)

    async def _meet(self, relay: PeerAddress, token: bytes) -> None:
        self._accept(await meet_at_relay(relay, token, scope=self._scope))
