"""Public nodes help the others to find each other: they carry offers to nodes that keep a connection with them.

- ``nat.register`` {} -> {"relay": bool, "addresses": [...]}: the caller wants offers for it to be brought over this
  connection; the reply has the addresses at which others find this node, since they may use another version of IP than
  the caller
- ``nat.offer`` {"to": peer id, "offer": bytes} -> {"answer": bytes}: brings an offer to a registered node
- ``nat.deliver`` {"offer": bytes, "origin": host} -> {"answer": bytes}: what the rendezvous calls there
- ``nat.relay`` {} -> {"mine": token, "theirs": token}: room for one relayed connection

`RendezvousServer` is the public node's side, `RendezvousClient` everybody else's.
"""

import asyncio
import logging
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Final, NamedTuple
from weakref import WeakValueDictionary

from tesseract_async.endpoint.budget import FairCount, Owner
from tesseract_async.endpoint.endpoint import Endpoint, IncomingCall, Message
from tesseract_async.errors import (
    ConnectionLost,
    NotAllowed,
    Overloaded,
    PeerUnreachable,
    ProtocolError,
    RemoteError,
    TesseractError,
    describe,
)
from tesseract_async.identity import PeerID
from tesseract_async.lru import LRU
from tesseract_async.nat.offers import field
from tesseract_async.nat.relay import Relay
from tesseract_async.network.address_scope import AddressScope
from tesseract_async.tasks import end, in_time
from tesseract_async.transport.base import PeerAddress, ip_version, range_of

logger = logging.getLogger(__name__)

REGISTER: Final = "nat.register"
OFFER: Final = "nat.offer"
DELIVER: Final = "nat.deliver"
RELAY: Final = "nat.relay"

MAX_ADDRESSES: Final = 4
MAX_OFFER_BYTES: Final = 4096
MAX_REPLY_BYTES: Final = 16 * 1024

MAX_CLIENTS: Final = 1024
"""Nodes that may be registered at one public node."""
MAX_CLIENTS_PER_RANGE: Final = 64
"""Nodes of one address range that may be registered there. (Loopback does not count as a range.)"""
REGISTRATION_TTL: Final = 120.0
"""Seconds after which a registration that was not renewed ends."""
MAX_OFFERS: Final = 256
"""The most offers that a public node carries at once."""
MAX_OFFERS_PER_CLIENT: Final = 32
"""The most offers to one registered node that it carries at once."""
CARRY_TIMEOUT: Final = 10.0
"""Seconds that a public node waits for an answer."""
MAX_OWN_OFFERS: Final = 16
"""The most offers that this node sends through one public node at once; more wait for their turn."""
NUM_RENDEZVOUS: Final = 3
"""Public nodes with which a client node keeps a connection."""
RENEW_PERIOD: Final = 30.0
"""Seconds between renewals of a registration, which also keep its connection from being idle."""
CHECK_PERIOD: Final = 2.0
"""Seconds between looks at whether the connections are still there."""
REGISTER_TIMEOUT: Final = 5.0
"""Seconds for one registration."""
RETRY_UNREACHABLE: Final = 10.0
"""Seconds after which a node that was not reached is asked again: it may come back soon."""
RETRY_REFUSED: Final = 60.0
"""Seconds after which one that refused is asked again."""


class _Registration(NamedTuple):
    until: float
    group: str | None


class RendezvousLedger:
    """The nodes that are registered at a public node, and the offers under way. The caller gives the time."""

    def __init__(self) -> None:
        self._clients = LRU[PeerID, _Registration](MAX_CLIENTS)  # in the order of renewal
        self._shares = FairCount(MAX_OFFERS)
        self._recipients: Counter[PeerID] = Counter()

    def __len__(self) -> int:
        return len(self._clients)

    @property
    def num_offers(self) -> int:
        return self._shares.used

    def register(self, peer_id: PeerID, origin: str, *, is_connected: Callable[[PeerID], bool], now: float) -> bool:
        """Register `peer_id`, which calls from the host `origin`, or renew that; return whether there was room. Where
        there is none, nodes that are not connected lose their place: they cannot be told of offers either."""
        while self._clients and next(iter(self._clients.values())).until <= now:
            self._clients.popitem(last=False)
        group = range_of(origin)
        if peer_id not in self._clients and not self._has_room(group):
            for other in [one for one in self._clients if not is_connected(one)]:
                del self._clients[other]
            if not self._has_room(group):
                return False
        self._clients[peer_id] = _Registration(now + REGISTRATION_TTL, group)
        return True

    def _has_room(self, group: str | None) -> bool:
        if len(self._clients) >= MAX_CLIENTS:
            return False
        neighbors = sum(client.group == group for client in self._clients.values()) if group else 0
        return neighbors < MAX_CLIENTS_PER_RANGE

    def is_registered(self, peer_id: PeerID, *, now: float) -> bool:
        client = self._clients.get(peer_id)
        return client is not None and client.until > now

    def begin_offer(self, sender: PeerID, origin: str, recipient: PeerID) -> bool:
        """Count an offer from `sender`, which calls from `origin`, unless there are too many. `end_offer` follows."""
        share = Owner(range_of(origin) or sender, sender)
        if self._recipients[recipient] >= MAX_OFFERS_PER_CLIENT or not self._shares.take(share, 1):
            return False
        self._recipients[recipient] += 1
        return True

    def end_offer(self, sender: PeerID, origin: str, recipient: PeerID) -> None:
        self._shares.give_back(Owner(range_of(origin) or sender, sender), 1)
        self._recipients -= Counter((recipient,))

    def clear(self) -> None:
        self._clients.clear()


class RendezvousServer:
    """Carries offers to nodes that registered here. `relay` is None where this node does not relay."""

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        relay: Relay | None,
        own_addresses: Callable[[], Sequence[str]] = lambda: (),
        carry_timeout: float = CARRY_TIMEOUT,
    ) -> None:
        self._endpoint = endpoint
        self._relay = relay
        self._own_addresses = own_addresses
        self._carry_timeout = carry_timeout
        self.ledger = RendezvousLedger()
        self._is_running = False

    def start(self) -> None:
        """Answer the methods from now on. Repeating it does nothing."""
        if not self._is_running:
            self._is_running = True
            self._endpoint.handle(REGISTER, self._register)
            self._endpoint.handle(OFFER, self._carry)
            self._endpoint.handle(RELAY, self._reserve)

    def stop(self) -> None:
        if self._is_running:
            self._is_running = False
            for method in (REGISTER, OFFER, RELAY):
                self._endpoint.unhandle(method)
            self.ledger.clear()

    async def _register(self, call: IncomingCall) -> Message:
        now = asyncio.get_running_loop().time()
        if not self.ledger.register(call.peer_id, call.origin, is_connected=self._endpoint.is_connected, now=now):
            raise self._refused("full", Overloaded("this rendezvous node is full", retry_after=60.0))
        self._endpoint.metrics.set("rendezvous_clients", len(self.ledger))
        return Message({"relay": self._relay is not None, "addresses": list(self._own_addresses()[:MAX_ADDRESSES])})

    async def _carry(self, call: IncomingCall) -> Message:
        try:
            recipient = PeerID(field(call.body, "to", bytes))
            offer = field(call.body, "offer", bytes)
        except ProtocolError as error:
            raise self._refused("malformed", NotAllowed(str(error))) from None
        if len(offer) > MAX_OFFER_BYTES:
            raise self._refused("too_large", NotAllowed(f"an offer has at most {MAX_OFFER_BYTES} bytes"))
        if not self.ledger.is_registered(recipient, now=asyncio.get_running_loop().time()):
            raise self._refused("unknown_client", NotAllowed(f"{recipient.short} is not registered here"))
        if not self.ledger.begin_offer(call.peer_id, call.origin, recipient):
            raise self._refused("too_many", Overloaded("too many offers are under way", retry_after=1.0))
        try:
            answer = await _deliver(self._endpoint, recipient, offer, origin=call.origin, timeout=self._carry_timeout)
        except (PeerUnreachable, ConnectionLost, TimeoutError, ProtocolError) as error:
            self._endpoint.metrics.count("rendezvous_offers_lost")
            raise RemoteError(f"{recipient.short} did not answer: {describe(error)}") from None
        finally:
            self.ledger.end_offer(call.peer_id, call.origin, recipient)
        self._endpoint.metrics.count("rendezvous_offers_carried")
        return Message({"answer": answer})

    async def _reserve(self, call: IncomingCall) -> Message:
        if self._relay is None:
            raise self._refused("no_relay", NotAllowed("this node does not relay"))
        mine, theirs = self._relay.reserve(call.peer_id, origin=call.origin)
        return Message({"mine": mine, "theirs": theirs})

    def _refused(self, reason: str, error: TesseractError) -> TesseractError:
        self._endpoint.metrics.count("rendezvous_refused", reason=reason)
        return error


class _Rendezvous(NamedTuple):
    peer: PeerAddress
    renew_at: float
    relays: bool


class RendezvousClient:
    """Sends offers, and while `start`ed keeps registered with a few public nodes.

    `contacts` returns public nodes to choose from; `answer` answers an offer that came from a host; `changed` is called
    when `rendezvous` has changed. `own_origin` returns the host from which others hear this node.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        contacts: Callable[[], Sequence[PeerAddress]],
        answer: Callable[[bytes, str], Awaitable[bytes]],
        changed: Callable[[], None],
        own_origin: Callable[[], str],
        scope: AddressScope,
        num_rendezvous: int = NUM_RENDEZVOUS,
        check_period: float = CHECK_PERIOD,
    ) -> None:
        """`scope`: where this node may send on a stranger's word."""
        self._endpoint = endpoint
        self._scope = scope
        self._contacts = contacts
        self._answer = answer
        self._changed = changed
        self._own_origin = own_origin
        self._num_rendezvous = num_rendezvous
        self._check_period = check_period
        self._registered: dict[PeerID, _Rendezvous] = {}
        self._failed: dict[PeerID, float] = {}
        self._turns: WeakValueDictionary[PeerAddress, asyncio.Semaphore] = WeakValueDictionary()
        self._keeper: asyncio.Task[None] | None = None
        self._look_now = asyncio.Event()
        self._rng = random.Random()
        endpoint.handle(DELIVER, self._delivered)

    @property
    def rendezvous(self) -> tuple[PeerAddress, ...]:
        """The nodes at which this one is registered now; those that relay first."""
        return tuple(one.peer for one in sorted(self._registered.values(), key=lambda one: not one.relays))

    async def send_offer(self, via: PeerAddress, recipient: PeerID, offer: bytes, *, timeout: float) -> bytes:
        """Send an encoded offer through the node `via`; return the encoded answer.

        Raises: any TesseractError, OSError or TimeoutError.
        """
        if via.peer_id == self._endpoint.peer_id:  # the peer is registered with this very node
            return await _deliver(self._endpoint, recipient, offer, origin=self._own_origin(), timeout=timeout)
        body = {"to": bytes(recipient), "offer": offer}
        turn = self._turns.get(via)
        if turn is None:
            turn = self._turns[via] = asyncio.Semaphore(MAX_OWN_OFFERS)
        async with asyncio.timeout(timeout), turn:
            reply = await self._endpoint.call(via, OFFER, body, timeout=timeout, max_reply_bytes=MAX_REPLY_BYTES)
        return field(reply.body, "answer", bytes)

    async def reserve_relay(self, via: PeerAddress, *, timeout: float) -> tuple[bytes, bytes]:
        """Have the node `via` reserve a relayed pair; return the token for this node and the one for its peer.

        Raises: as `send_offer`.
        """
        reply = await self._endpoint.call(via, RELAY, {}, timeout=timeout, max_reply_bytes=MAX_REPLY_BYTES)
        mine, theirs = (field(reply.body, name, bytes) for name in ("mine", "theirs"))
        if len(mine) != 16 or len(theirs) != 16:
            raise ProtocolError("a relay's token has 16 bytes")
        return mine, theirs

    async def _delivered(self, call: IncomingCall) -> Message:
        if call.peer_id not in self._registered:
            raise NotAllowed("this node did not register there")
        try:
            offer, origin = field(call.body, "offer", bytes), field(call.body, "origin", str)
            return Message({"answer": await self._answer(offer, origin)})
        except ProtocolError as error:  # already counted; the sender's fault, nothing to log here
            raise NotAllowed(describe(error)) from None

    def start(self) -> None:
        """Keep registered from now on. Repeating it does nothing."""
        if self._keeper is None:
            self._keeper = asyncio.get_running_loop().create_task(self._keep())

    def look(self) -> None:
        """Look for missing rendezvous nodes now, not after `check_period`: there may be new contacts."""
        self._look_now.set()

    async def stop(self) -> None:
        """End `start`; registrations end by themselves."""
        keeper, self._keeper = self._keeper, None
        await end(keeper)
        self._registered.clear()

    async def _keep(self) -> None:
        while True:
            before = self.rendezvous
            self._look_now.clear()
            await self._renew()
            if self.rendezvous != before:
                names = ", ".join(peer.short for peer in self.rendezvous) or "no node"
                logger.info("offers for this node travel through %s", names)
                self._endpoint.metrics.set("rendezvous_nodes", len(self._registered))
                self._changed()
            await in_time(self._look_now.wait(), self._check_period)

    async def _renew(self) -> None:
        loop = asyncio.get_running_loop()
        connected = {info.peer_id for info in self._endpoint.connections()}
        due = [
            one.peer
            for peer_id, one in self._registered.items()
            if one.renew_at <= loop.time() or peer_id not in connected
        ]
        await asyncio.gather(*map(self._register, due))
        missing = self._num_rendezvous - len(self._registered)
        if missing > 0:
            self._failed = {peer_id: until for peer_id, until in self._failed.items() if until > loop.time()}
            known = self._registered.keys() | self._failed.keys() | {self._endpoint.peer_id}
            fresh = [peer for peer in self._contacts() if peer.peer_id is not None and peer.peer_id not in known]
            await asyncio.gather(*map(self._register, self._rng.sample(fresh, min(missing, len(fresh)))))

    async def _register(self, peer: PeerAddress) -> None:
        assert peer.peer_id is not None
        loop = asyncio.get_running_loop()
        try:
            reply = await self._endpoint.call(
                peer, REGISTER, {}, timeout=REGISTER_TIMEOUT, max_reply_bytes=MAX_REPLY_BYTES
            )
            relays = field(reply.body, "relay", bool)
        except (TesseractError, TimeoutError) as error:
            logger.info("%s is not a rendezvous for this node: %s", peer.short, describe(error))
            self._registered.pop(peer.peer_id, None)
            is_gone = isinstance(error, PeerUnreachable | TimeoutError)
            self._failed[peer.peer_id] = loop.time() + (RETRY_UNREACHABLE if is_gone else RETRY_REFUSED)
        else:
            known = _with_other_version(peer, reply.body.get("addresses"), self._scope)
            self._registered[peer.peer_id] = _Rendezvous(known, loop.time() + RENEW_PERIOD, relays)


async def _deliver(endpoint: Endpoint, recipient: PeerID, offer: bytes, *, origin: str, timeout: float) -> bytes:
    peer, body = PeerAddress(recipient, ()), {"offer": offer, "origin": origin}
    reply = await endpoint.call(peer, DELIVER, body, timeout=timeout, max_reply_bytes=MAX_REPLY_BYTES)
    answer = field(reply.body, "answer", bytes)
    if len(answer) > MAX_OFFER_BYTES:
        raise ProtocolError("an answer is too long")
    return answer


def _with_other_version(peer: PeerAddress, told: object, scope: AddressScope) -> PeerAddress:
    """Return `peer` with one more address, of the other version of IP than its known one, for nodes that need that.
    Untrusted."""
    known = ip_version(peer.addresses[0])
    if type(told) is list and known is not None and len(told) <= MAX_ADDRESSES:
        for text in told:
            if type(text) is str and ip_version(text) not in (None, known) and scope.allowed([text]):
                return replace(peer, addresses=(peer.addresses[0], text))
    return peer
