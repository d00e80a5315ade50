"""Public nodes help the others to find together: they carry offers to nodes that keep a connection with them.

- ``nat.register`` {} -> {"relay": bool, "addresses": [...]}: the caller wants offers for it to be brought over this
  connection; where others find this node, who may have another kind of IP than the caller
- ``nat.offer`` {"to": peer id, "offer": bytes} -> {"answer": bytes}: brings an offer to a registered node
- ``nat.deliver`` {"offer": bytes, "origin": host} -> {"answer": bytes}: what the rendezvous calls there
- ``nat.relay`` {} -> {"mine": token, "theirs": token}: room for one relayed connection

`RendezvousServer` is the public node's side, `RendezvousClient` everybody else's.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple, Protocol
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
from tesseract_async.transport.address_scope import AddressScope
from tesseract_async.transport.base import PeerAddress, ip_version, range_of

logger = logging.getLogger(__name__)

REGISTER: Final = "nat.register"
OFFER: Final = "nat.offer"
DELIVER: Final = "nat.deliver"
RELAY: Final = "nat.relay"

MAX_ADDRESSES: Final = 4
MAX_OFFER_BYTES: Final = 4096
MAX_REPLY_BYTES: Final = 16 * 1024


@dataclass(frozen=True, slots=True)
class RendezvousSettings:
    """Bounds of the public side, and habits of the other."""

    max_clients: int = 1024
    """Nodes that may be registered at one public node."""
    max_clients_per_range: int = 64
    """... from one address range. (Loopback is none.)"""
    registration_ttl: float = 120.0
    """Seconds after which a registration that was not renewed ends."""
    max_offers: int = 256
    """Offers that a public node carries at once ..."""
    max_offers_per_sender: int = 32
    """... for one sender ..."""
    max_offers_per_client: int = 32
    """... to one registered node."""
    offer_timeout: float = 10.0
    """Seconds that a public node waits for an answer."""
    max_own_offers: int = 16
    """Offers that this node sends through one public node at once; more wait for their turn."""
    num_rendezvous: int = 3
    """Public nodes with which a client node keeps a connection."""
    renew_period: float = 30.0
    """Seconds between renewals of a registration."""
    check_period: float = 2.0
    """Seconds between looks at whether the connections are still there."""
    register_timeout: float = 5.0


class RelayRoom(Protocol):
    """What `RendezvousServer` wants of a relay."""

    def reserve(self, owner: PeerID, *, origin: str) -> tuple[bytes, bytes]:
        """Two tokens. Raises: Overloaded."""


class _Client(NamedTuple):
    until: float
    group: str | None


class RendezvousServer:
    """Carries offers to nodes that registered here. `relay` is None where this node does not relay."""

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        relay: RelayRoom | None,
        own_addresses: Callable[[], Sequence[str]] = lambda: (),
        settings: RendezvousSettings,
    ) -> None:
        self._endpoint = endpoint
        self._relay = relay
        self._own_addresses = own_addresses
        self._settings = settings
        self._clients: OrderedDict[PeerID, _Client] = OrderedDict()  # in the order of renewal
        self._senders = FairCount(settings.max_offers)
        self._sending: Counter[PeerID] = Counter()
        self._recipients: Counter[PeerID] = Counter()
        self._running = False

    @property
    def num_clients(self) -> int:
        """Registered nodes."""
        return len(self._clients)

    def start(self) -> None:
        """Answers the methods from now on. Repeating it does nothing."""
        if not self._running:
            self._running = True
            self._endpoint.handle(REGISTER, self._register)
            self._endpoint.handle(OFFER, self._carry)
            self._endpoint.handle(RELAY, self._reserve)

    def stop(self) -> None:
        """Ends `start`."""
        if self._running:
            self._running = False
            for method in (REGISTER, OFFER, RELAY):
                self._endpoint.unhandle(method)
            self._clients.clear()

    async def _register(self, call: IncomingCall) -> Message:
        now = asyncio.get_running_loop().time()
        while self._clients and next(iter(self._clients.values())).until <= now:
            self._clients.popitem(last=False)
        group = range_of(call.origin)
        if call.peer_id not in self._clients and not self._has_place(group):
            # who is not connected cannot be told of offers, either
            for peer_id in [one for one in self._clients if not self._endpoint.is_connected(one)]:
                del self._clients[peer_id]
            if not self._has_place(group):
                raise self._refused("full", Overloaded("this rendezvous node is full", retry_after=60.0))
        self._clients[call.peer_id] = _Client(now + self._settings.registration_ttl, group)
        self._clients.move_to_end(call.peer_id)
        self._endpoint.metrics.set("rendezvous_clients", len(self._clients))
        return Message({"relay": self._relay is not None, "addresses": list(self._own_addresses()[:MAX_ADDRESSES])})

    def _has_place(self, group: str | None) -> bool:
        if len(self._clients) >= self._settings.max_clients:
            return False
        neighbours = sum(client.group == group for client in self._clients.values()) if group else 0
        return neighbours < self._settings.max_clients_per_range

    async def _carry(self, call: IncomingCall) -> Message:
        settings, sender = self._settings, call.peer_id
        try:
            recipient = PeerID(_field(call.body, "to", bytes))
            offer = _field(call.body, "offer", bytes)
        except ProtocolError as error:
            raise self._refused("malformed", NotAllowed(str(error))) from None
        if len(offer) > MAX_OFFER_BYTES:
            raise self._refused("too_large", NotAllowed(f"an offer has at most {MAX_OFFER_BYTES} bytes"))
        client = self._clients.get(recipient)
        if client is None or client.until <= asyncio.get_running_loop().time():
            raise self._refused("unknown_client", NotAllowed(f"{recipient.short} is not registered here"))
        owner = Owner(range_of(call.origin) or sender, sender)
        if (
            self._sending[sender] >= settings.max_offers_per_sender
            or self._recipients[recipient] >= settings.max_offers_per_client
            or not self._senders.take(owner, 1)
        ):
            raise self._refused("too_many", Overloaded("too many offers are under way", retry_after=1.0))
        self._sending[sender] += 1
        self._recipients[recipient] += 1
        try:
            body = {"offer": offer, "origin": call.origin}
            answer = await _deliver(self._endpoint, recipient, body, timeout=settings.offer_timeout)
        except (PeerUnreachable, ConnectionLost, TimeoutError, ProtocolError) as error:
            self._endpoint.metrics.count("rendezvous_offers_lost")
            raise RemoteError(f"{recipient.short} did not answer: {describe(error)}") from None
        finally:
            self._senders.give_back(owner, 1)
            _decrement(self._sending, sender)
            _decrement(self._recipients, recipient)
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


Answerer = Callable[..., Awaitable[bytes]]
"""``(offer, *, origin) -> answer``, as `transport.nat.NatTransport.answer_offer`."""


class RendezvousClient:
    """Sends offers (`transport.nat.Signalling`), and while `start`ed keeps registered with a few public nodes.

    `contacts` gives public nodes to choose from; `answer` answers the offers that they bring; `changed` is called when
    `rendezvous` has changed.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        contacts: Callable[[], Sequence[PeerAddress]],
        answer: Answerer,
        changed: Callable[[], None],
        own_origin: Callable[[], str],
        settings: RendezvousSettings,
        scope: AddressScope | None = None,
    ) -> None:
        """`scope`: where this node may send on a stranger's word; None: anywhere."""
        self._endpoint = endpoint
        self._scope = scope
        self._contacts = contacts
        self._answer = answer
        self._changed = changed
        self._own_origin = own_origin
        self._settings = settings
        self._registered: dict[PeerID, tuple[PeerAddress, float, bool]] = {}  # until when to renew; whether it relays
        self._failed: dict[PeerID, float] = {}
        self._turns: WeakValueDictionary[PeerAddress, asyncio.Semaphore] = WeakValueDictionary()
        self._keeper: asyncio.Task[None] | None = None
        self._look_now = asyncio.Event()
        self._rng = random.Random()
        endpoint.handle(DELIVER, self._delivered)

    @property
    def rendezvous(self) -> tuple[PeerAddress, ...]:
        """Where this node is registered now; those that relay first."""
        ordered = sorted(self._registered.values(), key=lambda entry: not entry[2])
        return tuple(peer for peer, _, _ in ordered)

    # ---- transport.nat.Signalling

    async def send_offer(self, via: PeerAddress, recipient: PeerID, offer: bytes, *, timeout: float) -> bytes:
        """See `transport.nat.Signalling`."""
        if via.peer_id == self._endpoint.peer_id:  # the peer is registered with this very node
            body = {"offer": offer, "origin": self._own_origin()}
            return await _deliver(self._endpoint, recipient, body, timeout=timeout)
        body = {"to": bytes(recipient), "offer": offer}
        turn = self._turns.get(via)
        if turn is None:
            turn = self._turns[via] = asyncio.Semaphore(self._settings.max_own_offers)
        async with asyncio.timeout(timeout), turn:
            reply = await self._endpoint.call(via, OFFER, body, timeout=timeout, max_reply_bytes=MAX_REPLY_BYTES)
        return bytes(_field(reply.body, "answer", bytes))

    async def reserve_relay(self, via: PeerAddress, *, timeout: float) -> tuple[bytes, bytes]:
        """See `transport.nat.Signalling`."""
        reply = await self._endpoint.call(via, RELAY, {}, timeout=timeout, max_reply_bytes=MAX_REPLY_BYTES)
        mine, theirs = (_field(reply.body, name, bytes) for name in ("mine", "theirs"))
        if len(mine) != 16 or len(theirs) != 16:
            raise ProtocolError("a relay's token has 16 bytes")
        return mine, theirs

    async def _delivered(self, call: IncomingCall) -> Message:
        if call.peer_id not in self._registered:
            raise NotAllowed("this node did not register there")
        try:
            offer, origin = _field(call.body, "offer", bytes), _field(call.body, "origin", str)
            return Message({"answer": await self._answer(offer, origin=origin)})
        except ProtocolError as error:  # already counted; the sender's fault, nothing to log here
            raise NotAllowed(describe(error)) from None

    # ---- registrations

    def start(self) -> None:
        """Keeps registered from now on. Repeating it does nothing."""
        if self._keeper is None:
            self._keeper = asyncio.get_running_loop().create_task(self._keep())

    def look(self) -> None:
        """There may be new contacts: what is missing is looked for now, not after `check_period`."""
        self._look_now.set()

    async def stop(self) -> None:
        """Ends `start`; registrations end by themselves."""
        keeper, self._keeper = self._keeper, None
        if keeper is not None:
            keeper.cancel()
            await asyncio.wait([keeper])
        for peer_id in list(self._registered):
            self._forget(peer_id)

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
            try:
                async with asyncio.timeout(self._settings.check_period):
                    await self._look_now.wait()
            except TimeoutError:
                pass

    async def _renew(self) -> None:
        """One round: renews what is due or has lost its connection, and fills up from the contacts."""
        loop, settings = asyncio.get_running_loop(), self._settings
        connected = {info.peer_id for info in self._endpoint.connections()}
        due = [
            peer
            for peer_id, (peer, renew_at, _) in self._registered.items()
            if renew_at <= loop.time() or peer_id not in connected
        ]
        await asyncio.gather(*map(self._register, due))
        missing = settings.num_rendezvous - len(self._registered)
        if missing > 0:
            self._failed = {peer_id: until for peer_id, until in self._failed.items() if until > loop.time()}
            known = self._registered.keys() | self._failed.keys() | {self._endpoint.peer_id}
            fresh = [peer for peer in self._contacts() if peer.peer_id is not None and peer.peer_id not in known]
            await asyncio.gather(*map(self._register, self._rng.sample(fresh, min(missing, len(fresh)))))

    async def _register(self, peer: PeerAddress) -> None:
        assert peer.peer_id is not None
        loop, settings = asyncio.get_running_loop(), self._settings
        try:
            reply = await self._endpoint.call(
                peer, REGISTER, {}, timeout=settings.register_timeout, max_reply_bytes=MAX_REPLY_BYTES
            )
            relays = _field(reply.body, "relay", bool)
        except (TesseractError, TimeoutError) as error:
            logger.info("%s is no rendezvous for this node: %s", peer.short, describe(error))
            self._forget(peer.peer_id)
            # an unreachable node may come back soon, one that refuses will not
            gone = isinstance(error, PeerUnreachable | TimeoutError)
            self._failed[peer.peer_id] = loop.time() + (10.0 if gone else 60.0)
        else:
            known = _with_other_kind(peer, reply.body.get("addresses"), self._scope)
            self._registered[peer.peer_id] = (known, loop.time() + settings.renew_period, relays)
            self._endpoint.keep(peer.peer_id)

    def _forget(self, peer_id: PeerID) -> None:
        if self._registered.pop(peer_id, None) is not None:
            self._endpoint.unkeep(peer_id)


async def _deliver(endpoint: Endpoint, recipient: PeerID, body: dict[str, Any], *, timeout: float) -> bytes:
    reply = await endpoint.call(
        PeerAddress(recipient, ()), DELIVER, body, timeout=timeout, max_reply_bytes=MAX_REPLY_BYTES
    )
    answer = _field(reply.body, "answer", bytes)
    if len(answer) > MAX_OFFER_BYTES:
        raise ProtocolError("an answer is too long")
    return bytes(answer)


def _with_other_kind(peer: PeerAddress, told: object, scope: AddressScope | None) -> PeerAddress:
    """`peer` with one more address, of the other kind of IP than the known one, which others may lack. Untrusted."""
    known = ip_version(peer.addresses[0])
    if type(told) is list and known is not None and len(told) <= MAX_ADDRESSES:
        for text in told:
            if type(text) is not str or ip_version(text) in (None, known):
                continue
            if scope is None or scope.allowed([text]):
                return replace(peer, addresses=(peer.addresses[0], text))
    return peer


def _field(body: Any, name: str, kind: type[Any]) -> Any:
    value = body.get(name) if type(body) is dict else None
    if type(value) is not kind:
        raise ProtocolError(f"{name} is missing or malformed")
    return value


def _decrement(counter: Counter[PeerID], key: PeerID) -> None:
    counter[key] -= 1
    if not counter[key]:
        del counter[key]
