"""The core that all parts of a node build on: contacts, records, timers, calls and the outbox. Pure.

The core imports none of the parts that use it (`joining`, `dial_back`, `holding`, `reading`, `writing`, `replication`).
They hold the core; what one of them must hear from the core or from another goes through the core's abstract methods.
"""

import hashlib
import random as random_module
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from dataclasses import InitVar, dataclass, field

from tesseract_async.admission import Policy
from tesseract_async.identity import Identity, PeerID, Verifier, verify
from tesseract_async.metrics import Metrics
from tesseract_async.network import datagrams as wire
from tesseract_async.network.address_scope import PUBLIC, AddressScope, kind_of
from tesseract_async.network.contacts import (
    ID_BYTES,
    V4_BYTES,
    V6_BYTES,
    Address,
    Contact,
    pack_address,
    pack_contacts,
    split_contacts,
    unpack_address,
)
from tesseract_async.network.datagrams import RpcReply
from tesseract_async.network.events import ClockSkewed, WrongPeer
from tesseract_async.network.outbox import Outbox
from tesseract_async.network.routing_table import Density, K, RoutingTable
from tesseract_async.network.rpcs import Call, Caller, Rpcs
from tesseract_async.network.settings import NetworkSettings
from tesseract_async.network.storage import CLOCK_SKEW, MAX_STORAGE_BYTES, Storage
from tesseract_async.network.timers import Timers
from tesseract_async.transport.token_bucket import RateLimiter

MAX_KNOWN = 2048
"""Contacts remembered outside the routing table: those of lookups in progress, with their proofs and tokens."""
MAX_PINGS = 64
"""Contacts pinged at a time."""
UNREACHABLE_FOR = 60.0
"""Seconds for which a contact that failed is not asked again, unless it is heard from."""
MAX_REQUEST_RATE = 4000.0
"""Budget of one range (or address and port) per second: a request costs 1, a signature made or checked 4."""

AnyOf = frozenset[PeerID] | None
"""The ids that may answer at an address; None: any."""


@dataclass(kw_only=True, eq=False)
class Core(ABC):
    """The state of one node that all its parts share. `now` is loop time in seconds."""

    identity: Identity
    settings: NetworkSettings
    random: random_module.Random
    metrics: Metrics
    wall_offset: float
    """Wall-clock time minus loop time. The driver keeps it true."""
    verify: Verifier = verify
    policy: Policy = Policy()  # noqa: RUF009 (frozen)
    """The policy on whose records this node holds and hears (action ``host``)."""
    scope: AddressScope = field(default_factory=AddressScope)
    """The addresses to which this node may send on a stranger's word: only public ones by default."""
    address_bytes: tuple[int, ...] = (V4_BYTES, V6_BYTES)
    """Lengths of the packed addresses that this node can send to."""
    now: InitVar[float]
    is_declared_public: InitVar[bool]

    def __post_init__(self, now: float, is_declared_public: bool) -> None:
        self.own_id = bytes(self.identity.peer_id)
        self.joined = False
        """True while others are known and this node's own neighborhood was looked up."""
        self.expected_at: dict[Address, AnyOf] = {}
        """By a seed's address, the ids that may be contacts there."""
        self.table = RoutingTable(self.own_id, now=now)
        self.density = Density(self.table)
        self.storage = Storage(MAX_STORAGE_BYTES, own_number=self.table.own_number)
        self.timers = Timers()
        self.limiter = RateLimiter(rate=MAX_REQUEST_RATE, burst=2 * MAX_REQUEST_RATE)
        role = "public" if is_declared_public else "unknown"
        self.outbox = Outbox(own_id=self.own_id, random=self.random, metrics=self.metrics, role=role)
        self._rpcs = Rpcs(self.outbox, self.timers, min_timeout=self.settings.min_timeout, on_silent=self.lost)
        self.pings = _Pings()
        self.known: dict[bytes, Contact] = {}
        self._unreachable: dict[bytes, float] = {}
        self._skews: deque[float] = deque(maxlen=15)
        self._skew_reported = False

    # the news that parts of a node must hear at once, from the core or from one another

    @abstractmethod
    def contact_proved(self, contact: Contact, now: float) -> None:
        """A public contact that is not listed has proven its id: `Core.enter` lists it."""

    @abstractmethod
    def contact_listed(self, contact: Contact, now: float) -> None:
        """A contact entered the routing table."""

    @abstractmethod
    def contact_left(self, contact: Contact, *, ask_again: bool) -> None:
        """A contact is gone. `ask_again`: it was listed, and fell silent without a farewell."""

    @abstractmethod
    def first_contact_found(self, now: float) -> None:
        """A contact can have this node dialed, which is asked for before anything else is sent."""

    @abstractmethod
    def found_public(self, now: float) -> None:
        """A third node has dialed this one."""

    @property
    def public(self) -> bool:
        """True if others may list this node in their routing tables and store records here."""
        return self.outbox.public

    def wall(self, now: float) -> float:
        return now + self.wall_offset

    def jitter(self) -> float:
        """Return a random factor around 1, so that nodes do not do the same at the same time."""
        return 0.75 + 0.5 * self.random.random()

    def call(
        self,
        caller: Caller,
        kind: int,
        arguments: Sequence[object],
        to: Contact | Address,
        now: float,
        *,
        expected: AnyOf = None,
    ) -> None:
        """Send a request to a contact, or to the node at an address, whose id must be among those `expected`."""
        contact, address = (to, to.address) if isinstance(to, Contact) else (None, to)
        self._rpcs.start(Call(caller, kind, arguments, address, contact, expected), now)

    def ping(self, contact: Contact, now: float) -> None:
        """Ping a contact, to see whether it is there and proves its id, unless that ping or too many others are in
        progress."""
        if contact.raw not in self.pings.in_progress and len(self.pings.in_progress) < MAX_PINGS:
            self.pings.in_progress.add(contact.raw)
            self.call(self.pings, wire.PING, (), contact, now)

    def receive_reply(self, datagram: wire.Datagram, address: Address, now: float) -> bool:
        """Take an untrusted reply; return True if it answered a call. Raises: ProtocolError."""
        call = self._rpcs.by_transaction.get(datagram.transaction)
        if call is None:
            self.outbox.drop("unasked")
            return False
        if address != call.address or datagram.kind != call.kind | wire.REPLY:
            self.outbox.drop("spoofed")
            return False
        reply = wire.read_reply(datagram)
        contact = call.contact
        if contact is None:
            contact = self.contact_at(datagram.sender + pack_address(address))
        elif datagram.flags & wire.FLAG_AGAIN:
            if not call.repeated and contact.peer_id == datagram.sender:
                call.repeated = True
                contact.token, contact.token_until = reply.token, now + wire.TOKEN_LIFETIME
                self._rpcs.repeat(call, now)
            return False
        elif contact.peer_id != datagram.sender:
            self.lost(contact, now)
            return self._refuse(call, "wrong_id", now)
        if not contact.proven and not self._proof_holds(call, datagram.sender, reply):
            return self._refuse(call, "proof", now)
        expected_here = call.expected is None or datagram.sender in call.expected
        if not expected_here or not self.admits(datagram.sender, address):
            self.metrics.count("network_seeds_with_another_id")
            self.outbox.emit(WrongPeer(address, PeerID(datagram.sender)))
            return self._refuse(call, "wrong_id", now)
        contact.proven = True
        contact.late = False
        contact.last_seen = now
        contact.token, contact.token_until = reply.token, now + wire.TOKEN_LIFETIME
        self._skews.append(reply.wall - self.wall((call.sent_at + now) / 2))
        if len(self._skews) == 3:  # a newcomer is told at once: nobody would see what it stores
            self._check_clock()
        call.contact = contact
        self._rpcs.observe_round_trip(call, now)
        self._unreachable.pop(contact.raw, None)
        if not datagram.flags & wire.FLAG_CLIENT:
            if self.table.get(contact.peer_id) is contact:
                self.enter(contact, now)
            else:
                self.contact_proved(contact, now)
        self._rpcs.end(call, reply, now)
        return True

    def _refuse(self, call: Call, reason: str, now: float) -> bool:
        self.outbox.drop(reason)
        self._rpcs.end(call, None, now)
        return False

    def _proof_holds(self, call: Call, sender: bytes, reply: RpcReply) -> bool:
        public_key, signature = reply.proof[:32], reply.proof[32:]
        if not call.challenge or hashlib.sha256(public_key).digest() != sender:
            return False
        statement = wire.proof_statement(call.challenge, self.own_id, sender, reply.observed)
        return self.verify(public_key, signature, statement)

    def admits(self, peer_id: bytes, address: Address) -> bool:
        """Return True if that id may be a contact at that address: at a seed's, only the one that was named."""
        expected = self.expected_at.get(address)
        return expected is None or peer_id in expected

    def contacts_from(self, teller: Contact, v4: object, v6: object, now: float) -> list[Contact]:
        """Return the contacts that a reply names, without this node and those that were unreachable a moment ago.

        Left out are also addresses that this node must not send to on a stranger's word, or of a kind that it does not
        speak; and those of private networks and loopback, unless the teller wrote from the same: it knows no others.

        Raises: ProtocolError.
        """
        contacts: list[Contact] = []
        own_id, tellers_kind = self.own_id, kind_of(teller.address[0])
        for raw in split_contacts(v4, v6, K):
            if len(raw) - ID_BYTES not in self.address_bytes or raw[:ID_BYTES] == own_id:
                continue
            if not self.is_unreachable(raw, now):
                contact = self.contact_at(raw)
                kind = kind_of(contact.address[0])
                if kind == PUBLIC or (kind == tellers_kind and self.scope.allows(contact.address[0])):
                    if self.admits(contact.peer_id, contact.address):
                        contacts.append(contact)
        return contacts

    def closest_for(self, target: bytes, asker: bytes, room: int) -> tuple[bytes, bytes]:
        """Return the contacts that this node names when asked for a target, packed into `room` bytes."""
        return pack_contacts(self.table.closest(int.from_bytes(target, "big"), K, without=asker), room - 10)

    def contact_at(self, raw: bytes) -> Contact:
        """Return the one contact with that `raw`, known before or not. Raises: ProtocolError for a broken address."""
        contact = self.known.get(raw)
        if contact is None:
            contact = self.known[raw] = Contact(raw[:ID_BYTES], unpack_address(raw[ID_BYTES:]))
            if len(self.known) > MAX_KNOWN:
                in_table = {item.raw for item in self.table.contacts()}
                kept = list(self.known.values())[MAX_KNOWN // 2 :]
                kept += [item for item in self.table.contacts() if item.raw in self.known]
                self.known = {item.raw: item for item in kept if item.proven or item.raw in in_table}
                self.known[raw] = contact
        return contact

    def is_unreachable(self, raw: bytes, now: float) -> bool:
        """Return True if that contact failed within `UNREACHABLE_FOR` seconds, and was not heard from since."""
        return self._unreachable.get(raw, now) > now

    def heard_from(self, raw: bytes) -> None:
        self._unreachable.pop(raw, None)

    def enter(self, contact: Contact, now: float) -> None:
        known = self.table.get(contact.peer_id)
        doubtful = self.table.add(contact, now)
        if known is not contact and self.table.get(contact.peer_id) is contact:
            self.contact_listed(contact, now)
        if doubtful is not None:
            self.ping(doubtful, now)

    def lost(self, contact: Contact, now: float) -> None:
        self._unreachable[contact.raw] = now + UNREACHABLE_FOR
        self._drop(contact, "no_reply", ask_again=self.table.get(contact.peer_id) is contact)

    def farewell(self, peer_id: bytes, address: Address) -> None:
        contact = self.table.get(peer_id)
        if contact is not None and contact.address == address:
            self._drop(contact, "farewell", ask_again=False)

    def _drop(self, contact: Contact, reason: str, *, ask_again: bool) -> None:
        if self.table.get(contact.peer_id) is contact:
            self.metrics.count("network_contacts_dropped", reason=reason)
        contact.proven = False
        self.table.remove(contact)
        self.contact_left(contact, ask_again=ask_again)

    def keep_house(self, now: float) -> None:
        """Forget what is over, and check the clock. Due every few seconds."""
        self.storage.expire(self.wall(now))
        for raw in [raw for raw, until in self._unreachable.items() if until <= now]:
            del self._unreachable[raw]
        self._check_clock()
        self.metrics.set("network_contacts", len(self.table))
        self.metrics.set("network_records", self.storage.num_entries)
        self.metrics.set("network_record_bytes", self.storage.num_bytes)

    def _check_clock(self) -> None:
        if len(self._skews) < 3:
            return
        skew = sorted(self._skews)[len(self._skews) // 2]
        self.metrics.set("network_clock_skew_seconds", skew)
        skewed = abs(skew) > CLOCK_SKEW
        if skewed and not self._skew_reported:
            self.outbox.emit(ClockSkewed(skew))
        self._skew_reported = skewed


@dataclass(eq=False)
class _Pings(Caller):
    in_progress: set[bytes] = field(default_factory=set)

    def call_answered(self, call: Call, reply: RpcReply, now: float) -> None:
        self.call_failed(call, now)

    def call_failed(self, call: Call, now: float) -> None:
        assert call.contact is not None
        self.in_progress.discard(call.contact.raw)
