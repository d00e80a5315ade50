"""The node's side of the DHT as a machine without I/O: datagrams and the time in; datagrams, events and a timer out.

The driver (`network.network`) repeats one cycle: feed (`receive_datagram`, `handle_timer`, or a request such as
`read`), hand out `events`, send `datagrams_to_send`, wake up at `timer_at`. The machine never awaits, sleeps or
reads a clock; it is given `now`, a loop time in seconds that never goes back, and is told `wall_offset`, what to add to
it for the wall-clock time that records live by.

Whatever comes from the network is untrusted. A datagram that breaks a rule is dropped and counted by its reason in
``network_datagrams_dropped``; it raises nothing and changes nothing.
"""

from __future__ import annotations

import hashlib
import random as random_module
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

from tesseract_async.admission import Policy
from tesseract_async.errors import InvalidRecord, ProtocolError, UnsupportedVersion
from tesseract_async.identity import Identity, PeerID, SignedRecord, Verifier, verify
from tesseract_async.metrics import Metrics
from tesseract_async.network import datagrams as wire
from tesseract_async.network.caching import PathCache
from tesseract_async.network.calls import Call, Caller, Calls
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
from tesseract_async.network.dialback import DialBack
from tesseract_async.network.events import ClockSkewed, Event, ReadFinished, WriteFinished, WrongPeer
from tesseract_async.network.holding import Holder, RecordCheck
from tesseract_async.network.joining import Membership, Seed
from tesseract_async.network.limits import RateLimiter
from tesseract_async.network.operations import Ping, Refresh
from tesseract_async.network.probation import Probation
from tesseract_async.network.reading import Read
from tesseract_async.network.region import Density
from tesseract_async.network.replication import Replicator
from tesseract_async.network.routing import RoutingTable
from tesseract_async.network.settings import (
    AMPLIFICATION,
    CLOCK_SKEW,
    MAX_DATAGRAM_BYTES,
    MIN_REQUEST_BYTES,
    NetworkSettings,
)
from tesseract_async.network.storage import Outcome, Storage
from tesseract_async.network.timers import Timers
from tesseract_async.network.tokens import Tokens
from tesseract_async.network.writing import Write
from tesseract_async.transport.address_scope import PUBLIC, AddressScope, kind_of

MAX_KNOWN = 2048
"""Contacts remembered outside the routing table: those of lookups under way, and their proofs and tokens."""
MAX_OBSERVED = 16
"""Opinions kept on what this node's address is."""
MAX_VERIFICATIONS = 64
"""Newcomers pinged at a time to see whether they belong into the table."""
HOUSEKEEPING_PERIOD = 10.0


class NetworkProtocol:
    """One node of the DHT."""

    def __init__(
        self,
        *,
        identity: Identity,
        settings: NetworkSettings,
        random: random_module.Random,
        metrics: Metrics,
        now: float,
        wall_offset: float,
        public: bool,
        verify: Verifier = verify,
        policy: Policy = Policy(),  # noqa: B008 (frozen)
        checks: Sequence[RecordCheck] = (),
        scope: AddressScope | None = None,
    ) -> None:
        """`scope`: where this node may send on a stranger's word; to public addresses only by default."""
        self.identity = identity
        self.own_id = bytes(identity.peer_id)
        self.settings = settings
        self.random = random
        self.metrics = metrics
        self.verify = verify
        self.scope = scope if scope is not None else AddressScope()
        self.wall_offset = wall_offset
        """Wall-clock time minus loop time. The driver keeps it true."""
        self.table = RoutingTable(
            self.own_id,
            k=settings.k,
            questionable_after=settings.questionable_after,
            now=now,
            max_range_per_bucket=settings.max_range_per_bucket,
            max_range_per_table=settings.max_range_per_table,
        )
        self.storage = Storage(settings, own_number=int.from_bytes(self.own_id, "big"))
        self.copies = PathCache()
        self.holder = Holder(self, policy=policy, checks=checks)
        self.dialback = DialBack(self, public=public, now=now)
        self.probation = Probation(self)
        self.address_bytes: tuple[int, ...] = (V4_BYTES, V6_BYTES)
        """Lengths of the packed addresses that this node can send to."""
        self.observed: dict[PeerID, Address] = {}
        """The address at which the latest contacts see this node."""
        self.membership = Membership(self, public=public)
        self.density = Density(self)
        self._replicator = Replicator(self, now=now)
        self.limiter = RateLimiter(rate=settings.max_request_rate, burst=2 * settings.max_request_rate)
        self._skews: deque[float] = deque(maxlen=15)
        self._skew_reported = False
        self._calls = Calls(self)
        self._known: dict[bytes, Contact] = {}
        self._unreachable: dict[bytes, float] = {}
        self._verifying: set[bytes] = set()
        self._operations: dict[int, Read | Write] = {}
        self._num_operations = 0
        self._housekeeping_at = now + HOUSEKEEPING_PERIOD * random.random()
        self.tokens = Tokens(random, lifetime=settings.token_lifetime, now=now)
        self.timers = Timers()
        self._datagrams: deque[tuple[bytes, Address]] = deque()
        self._events: deque[Event] = deque()

    @property
    def public(self) -> bool:
        """Whether others may list this node in their routing tables, and store records here."""
        return self.dialback.is_public

    @property
    def joined(self) -> bool:
        """Whether this node knows others and has looked up its own neighbourhood."""
        return self.membership.joined

    # What the driver asks for

    def set_seeds(self, seeds: Iterable[Seed], now: float, *, remembered: Iterable[Seed] = ()) -> None:
        """See `Membership.set_seeds`."""
        self.membership.set_seeds(seeds, now, remembered=remembered)

    def read(self, key: bytes, now: float) -> int:
        """Looks up `key`; `ReadFinished` will carry the number returned."""
        return self._start(Read(self, key), now)

    def write(self, records: Sequence[SignedRecord], now: float) -> int:
        """Stores own records, each on the k nodes closest to its key; `WriteFinished` will carry the number."""
        return self._start(Write(self, records), now)

    def cancel(self, operation: int) -> None:
        """Nobody waits for that read or write any longer. Stores that were sent already may take effect."""
        started = self._operations.pop(operation, None)
        if started is not None:
            started.cancelled = True

    def leave(self, now: float) -> None:
        """Says farewell to everybody who may list this node. Afterwards only `datagrams_to_send` is of use."""
        for contact in self.table.contacts():
            if contact.token_until > now:
                self._send_request(wire.LEAVE, self.new_transaction(), contact.token, b"", (), contact.address)

    # What comes in

    def receive_datagram(self, data: bytes, address: Address, now: float) -> None:
        """Takes one datagram as it came from the network, from a numeric `address`."""
        try:
            datagram = wire.decode(data)
            if datagram.sender == self.own_id:
                self.drop("own_id")
            elif datagram.kind & wire.REPLY:
                self._receive_reply(datagram, address, now)
            else:
                self._receive_request(datagram, len(data), address, now)
        except UnsupportedVersion:
            self.drop("version")
        except InvalidRecord:
            self.drop("invalid_record")
        except ProtocolError:
            self.drop("malformed")
        self.metrics.count("network_datagrams_received")
        self.metrics.count("network_bytes_received", len(data))

    def handle_timer(self, now: float) -> None:
        """Does what is due. Calling it early or late is harmless."""
        self.timers.run(now)
        if self.membership.timer_at <= now:
            self.membership.handle_timer(now)
        if self.dialback.ask_at <= now:
            self.dialback.handle_timer(now)
        if self._replicator.timer_at() <= now:
            self._replicator.handle_timer(now)
        if self._housekeeping_at <= now:
            self._keep_house(now)

    # What goes out

    def datagrams_to_send(self) -> list[tuple[bytes, Address]]:
        """Datagrams in order of sending; each is handed out once."""
        out = list(self._datagrams)
        self._datagrams.clear()
        return out

    def events(self) -> list[Event]:
        """What happened since the last call, in order."""
        out = list(self._events)
        self._events.clear()
        return out

    def timer_at(self) -> float:
        """The loop time at which `handle_timer` has something to do. It may change with every input."""
        own = (self.membership.timer_at, self._housekeeping_at, self.dialback.ask_at, self._replicator.timer_at())
        return min(*own, self.timers.next_at())

    # For operations: the house's own callers

    def wall(self, now: float) -> float:
        """The wall-clock time at loop time `now`."""
        return now + self.wall_offset

    def call(self, caller: Caller, kind: int, arguments: Sequence[Any], contact: Contact, now: float) -> None:
        """Sends a request to a contact; `caller` hears how it ends, never before this returns."""
        self._calls.start(Call(caller, kind, arguments, contact=contact, address=contact.address), now)

    def call_address(
        self,
        caller: Caller,
        kind: int,
        arguments: Sequence[Any],
        address: Address,
        now: float,
        *,
        expected: frozenset[PeerID] | None = None,
    ) -> None:
        """The same to whoever lives at an address, or to one of those `expected` there."""
        self._calls.start(Call(caller, kind, arguments, contact=None, address=address, expected=expected), now)

    def contacts_from(self, teller: Contact, v4: object, v6: object, now: float) -> list[Contact]:
        """The contacts that a reply names, without this node and those that were unreachable a moment ago.

        Left out are also addresses that this node must not send to on a stranger's word, or of a kind that it does not
        speak; and those of private networks and loopback, unless the teller wrote from the same: it knows no others.

        Raises: ProtocolError.
        """
        contacts: list[Contact] = []
        known, unreachable, own_id = self._known, self._unreachable, self.own_id
        tellers_kind = kind_of(teller.address[0])
        for raw in split_contacts(v4, v6, self.settings.k):
            if len(raw) - ID_BYTES not in self.address_bytes:
                continue
            if raw[:32] != own_id and (raw not in unreachable or unreachable[raw] <= now):
                contact = known.get(raw)
                if contact is None:
                    contact = self._learn(raw)
                    known = self._known
                kind = kind_of(contact.address[0])
                if kind == PUBLIC or (kind == tellers_kind and self.scope.allows(contact.address[0])):
                    if self.membership.admits(contact.peer_id, contact.address):
                        contacts.append(contact)
        return contacts

    def finish(self, operation: Read | Write, event: ReadFinished | WriteFinished) -> None:
        """An operation ended: its number is free, its event goes out."""
        if self._operations.pop(event.operation, None) is not None:
            self._events.append(event)

    # Requests

    def _receive_request(self, datagram: wire.Datagram, length: int, address: Address, now: float) -> None:
        request = wire.read_request(datagram)
        address_proven = bool(request.token) and self.tokens.holds(request.token, pack_address(address))
        if not self.limiter.allows(address, 5.0 if request.challenge else 1.0, now):
            self.drop("rate")
            return
        if datagram.kind == wire.DIALED:
            # the only short one without a token: nobody replies to it
            self.dialback.dialled(request.arguments, address, now)
            return
        packed_address = pack_address(address)
        if not address_proven and length < MIN_REQUEST_BYTES:
            if request.token and datagram.kind not in wire.ONE_WAY:
                body = (packed_address, self.tokens.give(packed_address), b"", self.wall(now))
                flags = self.flags() | wire.FLAG_AGAIN
                kind = datagram.kind | wire.REPLY
                self.send(wire.encode(kind, flags, datagram.transaction, self.own_id, body), address)
            self.drop("token" if request.token else "unpadded")
            return
        if datagram.kind in wire.ONE_WAY:
            self._heard_from(datagram, address, address_proven, now)
            if not address_proven:
                self.drop("token")
            elif datagram.kind == wire.LEAVE:
                self._farewell(datagram.sender, address)
            elif datagram.kind == wire.COPY:
                self.holder.keep_copy(request.arguments, address, now)
            else:
                self.dialback.dial(request.arguments, datagram.sender, address, now)
            return
        # what the head, the observed address, token, proof and time take of the reply, with a few bytes to spare
        room = MAX_DATAGRAM_BYTES if address_proven else min(MAX_DATAGRAM_BYTES, AMPLIFICATION * length)
        room -= 96 + (wire.PROOF_BYTES + 18 if request.challenge else 18)
        results = self._answer(datagram, request, address, address_proven, room, now)
        proof = b""
        if request.challenge:
            statement = wire.proof_statement(
                request.challenge, datagram.sender, self.own_id, unpack_address(packed_address)
            )
            proof = self.identity.public_key + self.identity.sign(statement)
        if not self.public:
            self.dialback.note_reply(address, now)
        body = (packed_address, self.tokens.give(packed_address), proof, self.wall(now), *results)
        kind = datagram.kind | wire.REPLY
        self.send(wire.encode(kind, self.flags(), datagram.transaction, self.own_id, body), address)
        # only now: a ping before the reply would look as if this node had written first (see `probation`)
        self._heard_from(datagram, address, address_proven, now)

    def _answer(
        self,
        datagram: wire.Datagram,
        request: wire.Request,
        address: Address,
        address_proven: bool,
        room: int,
        now: float,
    ) -> Sequence[Any]:
        kind = datagram.kind
        if kind == wire.PING:
            return ()
        if kind == wire.FIND:
            return self.closest_for(wire.read_key(request.arguments), datagram.sender, room)
        if kind == wire.GET:
            return self.holder.get(wire.read_key(request.arguments), datagram.sender, room, now)
        if kind == wire.PAGE:
            key = wire.read_key(request.arguments)
            start, last = wire.read_range(request.arguments)
            bodies, cursor = self.storage.page(key, start, last + 1, room)
            return (cursor, bodies)
        if kind == wire.STORE:
            items = wire.read_items(request.arguments)
            sender = datagram.sender
            if not address_proven:
                return (bytes([Outcome.BAD_TOKEN] * len(items)),)
            return (bytes(self.holder.store(key, body, sender, address, now) for key, body in items),)
        if kind == wire.DIAL:
            return (address_proven and self.dialback.pass_on(address, request.arguments, now),)
        raise ProtocolError(f"an unknown kind of request: {kind}")

    def closest_for(self, target: bytes, asker: bytes, room: int) -> tuple[bytes, bytes]:
        """The contacts that this node names when asked for a target, packed into `room` bytes."""
        closest = self.table.closest(int.from_bytes(target, "big"), self.settings.k, without=asker)
        return pack_contacts(closest, room - 10)

    def _heard_from(self, datagram: wire.Datagram, address: Address, address_proven: bool, now: float) -> None:
        """A request came from an id that claims to live at an address."""
        if datagram.flags & wire.FLAG_CLIENT:
            if address_proven:
                self.dialback.note_client(address)
            return
        raw = datagram.sender + pack_address(address)
        contact = self.table.get(datagram.sender)
        if contact is not None and contact.raw == raw:
            if address_proven:
                contact.last_seen = now
                self.table.add(contact, now)
            return
        if not self.scope.answers(address[0]) or not self.membership.admits(datagram.sender, address):
            return
        self.probation.wrote(address, now)
        if contact is None and not self.table.wants(datagram.sender):
            return
        if address_proven:
            self._unreachable.pop(raw, None)
        elif self._unreachable.get(raw, now) > now:
            return
        known = self._known.get(raw)
        self.ping(known if known is not None else self._learn(raw), now)

    def ping(self, contact: Contact, now: float) -> None:
        """Sees whether a contact is there and itself, unless that or too much of the kind is under way."""
        if contact.raw not in self._verifying and len(self._verifying) < MAX_VERIFICATIONS:
            self._verifying.add(contact.raw)
            Ping(self, contact, now)

    def verified(self, contact: Contact) -> None:
        """The ping to a newcomer ended, either way."""
        self._verifying.discard(contact.raw)

    def _farewell(self, peer_id: bytes, address: Address) -> None:
        contact = self.table.get(peer_id)
        if contact is not None and contact.address == address:
            self.table.remove(contact)
            contact.proven = False
            self.metrics.count("network_contacts_dropped", reason="farewell")
            self.membership.contact_left()

    # Replies

    def _receive_reply(self, datagram: wire.Datagram, address: Address, now: float) -> None:
        call = self._calls.by_transaction.get(datagram.transaction)
        if call is None:
            self.drop("unasked")
            return
        if address != call.address or datagram.kind != call.kind | wire.REPLY:
            self.drop("spoofed")
            return
        reply = wire.read_reply(datagram)
        contact = call.contact
        if contact is None:
            raw = datagram.sender + pack_address(address)
            known = self._known.get(raw)
            contact = known if known is not None else self._learn(raw)
        elif datagram.flags & wire.FLAG_AGAIN:
            if not call.repeated and contact.peer_id == datagram.sender:
                call.repeated = True
                contact.token, contact.token_until = reply.token, now + self.settings.token_lifetime
                self._calls.repeat(call, now)
            return
        elif contact.peer_id != datagram.sender:
            self.drop("wrong_id")
            self.lost(contact, now)
            self._calls.end(call, None, now)
            return
        if not contact.proven and not self._proof_holds(call, datagram.sender, reply):
            self.drop("proof")
            self._calls.end(call, None, now)
            return
        expected_here = call.expected is None or datagram.sender in call.expected
        if not expected_here or not self.membership.admits(datagram.sender, address):
            self.drop("wrong_id")
            self.metrics.count("network_seeds_with_another_id")
            self._events.append(WrongPeer(address, PeerID(datagram.sender)))
            self._calls.end(call, None, now)
            return
        contact.proven = True
        contact.late = False
        contact.last_seen = now
        contact.token, contact.token_until = reply.token, now + self.settings.token_lifetime
        self._observe(contact, reply, call, now)
        call.contact = contact
        self._calls.observe_round_trip(call, now)
        self._unreachable.pop(contact.raw, None)
        if not datagram.flags & wire.FLAG_CLIENT:
            if self.table.get(contact.peer_id) is contact or not self.probation.holds(contact, now):
                self.enter(contact, now)
        self._calls.end(call, reply, now)
        if not self.joined and len(self.table):
            self.membership.learn_neighbourhood((), now)

    def _proof_holds(self, call: Call, sender: bytes, reply: wire.Reply) -> bool:
        public_key, signature = reply.proof[:32], reply.proof[32:]
        if not call.challenge or hashlib.sha256(public_key).digest() != sender:
            return False
        statement = wire.proof_statement(call.challenge, self.own_id, sender, reply.observed)
        return self.verify(public_key, signature, statement)

    def _observe(self, contact: Contact, reply: wire.Reply, call: Call, now: float) -> None:
        """Learns how others see this node: its address, and its clock."""
        peer_id = PeerID(contact.peer_id)
        self.observed.pop(peer_id, None)
        self.observed[peer_id] = reply.observed
        if len(self.observed) > MAX_OBSERVED:
            del self.observed[next(iter(self.observed))]
        self._skews.append(reply.wall - self.wall((call.sent_at + now) / 2))

    def enter(self, contact: Contact, now: float) -> None:
        """Lists a contact that has proven its id, or notes that it was seen."""
        known = self.table.get(contact.peer_id)
        doubtful = self.table.add(contact, now)
        if known is not contact and self.table.get(contact.peer_id) is contact:
            self._replicator.newcomer(contact, now)
        if doubtful is not None:
            self.ping(doubtful, now)

    def lost(self, contact: Contact, now: float) -> None:
        """A contact did not answer three requests."""
        self._unreachable[contact.raw] = now + self.settings.unreachable_for
        contact.proven = False
        if self.table.get(contact.peer_id) is contact:
            self.membership.remember(contact)
            self.metrics.count("network_contacts_dropped", reason="no_reply")
        self.table.remove(contact)
        self.membership.contact_left()

    # Upkeep

    def _keep_house(self, now: float) -> None:
        self._housekeeping_at = now + HOUSEKEEPING_PERIOD * (0.75 + 0.5 * self.random.random())
        self.storage.expire(self.wall(now))
        self.copies.expire(self.wall(now))
        self.tokens.rotate(now)
        for raw in [raw for raw, until in self._unreachable.items() if until <= now]:
            del self._unreachable[raw]
        self._check_clock()
        if len(self.table) >= self.settings.k and not self.density.was_sampled:
            self.density.probe(now)
        if self.joined:
            for index in self.table.stale_prefixes(now - self.settings.refresh_period):
                self.refresh_bucket(index, now)
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
            self._events.append(ClockSkewed(skew))
        self._skew_reported = skewed

    def refresh_bucket(self, index: int, now: float) -> None:
        """Looks up a random id of a bucket."""
        target = self.table.number_in_bucket(index, self.random.getrandbits(256))
        Refresh(self, target, now)

    # Small parts

    def _start(self, operation: Read | Write, now: float) -> int:
        self._num_operations += 1
        number = self._num_operations
        self._operations[number] = operation
        operation.start(number, now)
        return number

    def _learn(self, raw: bytes) -> Contact:
        contact = self._known[raw] = Contact(raw[:32], unpack_address(raw[32:]))
        if len(self._known) > MAX_KNOWN:
            in_table = {item.raw for item in self.table.contacts()}
            kept = list(self._known.values())[MAX_KNOWN // 2 :]
            kept += [item for item in self.table.contacts() if item.raw in self._known]
            self._known = {item.raw: item for item in kept if item.proven or item.raw in in_table}
            self._known[raw] = contact
        return contact

    def new_transaction(self) -> bytes:
        """64 random bits, which only who received the request can repeat."""
        return self.random.randbytes(wire.TRANSACTION_BYTES)

    def flags(self) -> int:
        """What the head of a datagram says of this node."""
        return 0 if self.public else wire.FLAG_CLIENT

    def _send_request(
        self, kind: int, transaction: bytes, token: bytes, challenge: bytes, arguments: Sequence[Any], address: Address
    ) -> None:
        self.send(
            wire.encode_request(
                kind, self.flags(), transaction, self.own_id, token=token, challenge=challenge, arguments=arguments
            ),
            address,
        )

    def send_oneway(
        self, kind: int, arguments: Sequence[Any], address: Address, token: bytes, now: float, *, padded: bool = True
    ) -> None:
        """Sends what nobody replies to."""
        if not self.public:
            # it opens this node's gateway, if there is one
            self.dialback.note_sent(address, now)
        if padded:
            self._send_request(kind, self.new_transaction(), token, b"", arguments, address)
        else:
            body = (token, b"", *arguments)
            self.send(wire.encode(kind, self.flags(), self.new_transaction(), self.own_id, body), address)

    def emit(self, event: Event) -> None:
        """Adds to `events`."""
        self._events.append(event)

    def send(self, data: bytes, address: Address) -> None:
        """Queues one datagram."""
        assert len(data) <= MAX_DATAGRAM_BYTES, f"a datagram of {len(data)} bytes"
        self._datagrams.append((data, address))
        self.metrics.count("network_bytes_sent", len(data))

    def drop(self, reason: str) -> None:
        """Counts something that was dropped."""
        self.metrics.count("network_datagrams_dropped", reason=reason)
