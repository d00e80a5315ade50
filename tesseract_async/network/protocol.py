"""One node of the DHT as a machine without I/O: datagrams and the time in; datagrams, events and a timer out.

The driver (`network.driver`) repeats one cycle: feed (`receive_datagram`, `handle_timer`, or a request such as `read`),
hand out `events`, send `datagrams_to_send`, wake up at `timer_at`. A datagram that breaks a rule is dropped and counted
by its reason in ``network_datagrams_dropped``; it raises nothing and changes nothing.
"""

import hashlib
import random as random_module
from collections.abc import Sequence
from dataclasses import InitVar, dataclass

from tesseract_async.errors import InvalidRecord, ProtocolError, UnsupportedVersion
from tesseract_async.identity import SignedRecord
from tesseract_async.network import datagrams as wire
from tesseract_async.network.contacts import (
    Address,
    Contact,
    pack_address,
    source_of,
    unpack_address,
)
from tesseract_async.network.core import Core
from tesseract_async.network.datagrams import AMPLIFICATION, MAX_DATAGRAM_BYTES, MIN_REQUEST_BYTES
from tesseract_async.network.dial_back import DatagramDialBack, Probation, ThirdNodes
from tesseract_async.network.events import NetworkEvent, ReadFinished, WriteFinished
from tesseract_async.network.holding import Holder, RecordCheck
from tesseract_async.network.joining import NetworkMembership
from tesseract_async.network.operations import probe_density, refresh
from tesseract_async.network.reading import Read
from tesseract_async.network.replication import Replicator
from tesseract_async.network.routing_table import K
from tesseract_async.network.storage import StoreOutcome
from tesseract_async.network.writing import Write

HOUSEKEEPING_PERIOD = 10.0
REFRESH_PERIOD = 1800.0
"""Seconds after which a bucket that no lookup touched is refreshed (section 2.3)."""


class Tokens:
    """The tokens that one node gives out: keyed hashes of addresses, so that nothing has to be remembered."""

    def __init__(self, random: random_module.Random, *, now: float) -> None:
        self._random = random
        self._secrets = (random.randbytes(16), random.randbytes(16))
        self._until = now + wire.TOKEN_LIFETIME

    def give(self, packed_address: bytes) -> bytes:
        return _token(self._secrets[0], packed_address)

    def holds(self, token: bytes, packed_address: bytes) -> bool:
        """Return True if `token` was given to the address under this secret or the one before."""
        return any(token == _token(secret, packed_address) for secret in self._secrets)

    def rotate(self, now: float) -> None:
        if now >= self._until:
            self._secrets = (self._random.randbytes(16), self._secrets[0])
            self._until = now + wire.TOKEN_LIFETIME


@dataclass(kw_only=True, eq=False)
class NetworkProtocol(Core):
    """One node of the DHT: the parts that use its core, and the news that they have for one another."""

    checks: InitVar[Sequence[RecordCheck]] = ()

    def __post_init__(self, now: float, is_declared_public: bool, checks: Sequence[RecordCheck]) -> None:
        super().__post_init__(now, is_declared_public)
        self.holder = Holder(self, checks)
        thirds = ThirdNodes(self)
        self.dial_back = DatagramDialBack(self, thirds, now)
        self.probation = Probation(self, thirds)
        self.membership = NetworkMembership(self)
        self._replicator = Replicator(self, now)
        self.timers.start(now + HOUSEKEEPING_PERIOD * self.random.random(), self._keep_house)
        self.tokens = Tokens(self.random, now=now)
        self._operations: dict[int, Read | Write] = {}
        self._num_operations = 0

    @property
    def role(self) -> str:
        """``public`` if others can dial this node, ``client`` if they cannot, ``unknown`` until that is clear."""
        return self.outbox.role

    def read(self, key: bytes, now: float) -> int:
        """Look up `key`; `ReadFinished` will carry the number returned."""
        return self._start(Read(self, key), now)

    def write(self, records: Sequence[SignedRecord], now: float) -> int:
        """Store this node's records, each on the k nodes closest to its key; `WriteFinished` will carry the number."""
        return self._start(Write(self, records), now)

    def cancel(self, operation: int) -> None:
        started = self._operations.pop(operation, None)
        if started is not None:
            started.cancelled = True

    def leave(self, now: float) -> None:
        """Say farewell to all nodes that may list this one. Afterwards only `datagrams_to_send` is of use."""
        for contact in self.table.contacts():
            if contact.token_until > now:
                self.outbox.send_one_way(wire.LEAVE, (), contact.address, contact.token, now)

    def receive_datagram(self, data: bytes, address: Address, now: float) -> None:
        """Take one datagram as it came from the network, from a numeric `address`."""
        try:
            if not address[1]:
                raise ProtocolError("a datagram from port 0, where nobody can be answered")
            datagram = wire.decode(data)
            if datagram.sender == self.own_id:
                self.outbox.drop("own_id")
            elif not datagram.kind & wire.REPLY:
                self._receive_request(datagram, len(data), address, now)
            elif self.receive_reply(datagram, address, now) and not self.joined and len(self.table):
                self.membership.look_up_neighborhood((), now)
        except UnsupportedVersion:
            self.outbox.drop("version")
        except InvalidRecord:
            self.outbox.drop("invalid_record")
        except ProtocolError:
            self.outbox.drop("malformed")
        self.metrics.count("network_datagrams_received")
        self.metrics.count("network_bytes_received", len(data))

    def handle_timer(self, now: float) -> None:
        self.timers.run(now)

    def datagrams_to_send(self) -> list[tuple[bytes, Address]]:
        """Return the datagrams to send, in order; each is handed out once."""
        datagrams, self.outbox.datagrams = self.outbox.datagrams, []
        return datagrams

    def events(self) -> list[NetworkEvent]:
        events, self.outbox.events = self.outbox.events, []
        for event in events:
            if isinstance(event, ReadFinished | WriteFinished):
                self._operations.pop(event.operation, None)
        return events

    def timer_at(self) -> float:
        """Return the loop time at which `handle_timer` has something to do. It may change with every input."""
        return self.timers.next_at()

    # news from one part for another

    def contact_proved(self, contact: Contact, now: float) -> None:
        if not self.probation.holds(contact, now):
            self.enter(contact, now)

    def contact_listed(self, contact: Contact, now: float) -> None:
        self._replicator.newcomer(contact, now)

    def contact_left(self, contact: Contact, *, ask_again: bool) -> None:
        self.membership.contact_left(contact, ask_again=ask_again)

    def first_contact_found(self, now: float) -> None:
        self.dial_back.ask(now)

    def found_public(self, now: float) -> None:
        self.membership.end_dial_wait()
        # those nearest hear from this node without the client flag, and list it
        self.membership.look_up_neighborhood((), now)

    def _receive_request(self, datagram: wire.Datagram, length: int, address: Address, now: float) -> None:
        request = wire.read_request(datagram)
        packed_address = pack_address(address)
        address_proven = bool(request.token) and self.tokens.holds(request.token, packed_address)
        if not self.limiter.allows(source_of(address), 5.0 if request.challenge else 1.0, now):
            self.outbox.drop("rate")
            return
        if datagram.kind == wire.DIALED:
            # the only short one without a token: nobody replies to it
            if not self.probation.confirmed(wire.read_nonce(request.arguments), address, now):
                self.dial_back.dialed(request.arguments, address, now)
            return
        if not address_proven and length < MIN_REQUEST_BYTES:
            if request.token and datagram.kind not in wire.ONE_WAY:
                self._reply(datagram, wire.FLAG_AGAIN, b"", (), address, now)
            self.outbox.drop("token" if request.token else "unpadded")
            return
        if datagram.kind in wire.ONE_WAY:
            self._heard_from(datagram, address, address_proven, now)
            if not address_proven:
                self.outbox.drop("token")
            elif datagram.kind == wire.LEAVE:
                self.farewell(datagram.sender, address)
            else:
                asker = self.table.get(datagram.sender)
                # nodes that start together list one another within seconds
                trusted = asker is not None and asker.address == address
                trusted = trusted or datagram.sender + packed_address in self.probation.pending
                self.dial_back.dial(request.arguments, address, now, trusted=trusted)
            return
        # what the head, the observed address, token, proof and time take of the reply, with a few bytes to spare
        room = MAX_DATAGRAM_BYTES if address_proven else min(MAX_DATAGRAM_BYTES, AMPLIFICATION * length)
        room -= 96 + (wire.PROOF_BYTES + 18 if request.challenge else 18)
        results = self.answer(datagram, request, address=address, address_proven=address_proven, room=room, now=now)
        proof = b""
        if request.challenge:
            statement = wire.proof_statement(
                request.challenge, datagram.sender, self.own_id, unpack_address(packed_address)
            )
            proof = self.identity.public_key + self.identity.sign(statement)
        if not self.public:
            self.outbox.note_reply_sent(address, now)
        self._reply(datagram, 0, proof, results, address, now)
        # only now: a ping before the reply would look as if this node had written first (see `dial_back`)
        self._heard_from(datagram, address, address_proven, now)

    def answer(
        self,
        datagram: wire.Datagram,
        request: wire.RpcRequest,
        *,
        address: Address,
        address_proven: bool,
        room: int,
        now: float,
    ) -> Sequence[object]:
        """Return the results of a request, in `room` bytes. Raises: ProtocolError."""
        kind, sender = datagram.kind, datagram.sender
        if kind == wire.PING:
            return ()
        if kind == wire.FIND:
            return self.closest_for(wire.read_key(request.arguments), sender, room)
        if kind == wire.GET:
            return self.holder.get(wire.read_key(request.arguments), sender, room)
        if kind == wire.PAGE:
            key = wire.read_key(request.arguments)
            start, last = wire.read_range(request.arguments)
            bodies, cursor = self.storage.page(key, start, last + 1, room)
            return (cursor, bodies)
        if kind == wire.STORE:
            items = wire.read_items(request.arguments)
            if not address_proven:
                return (bytes([StoreOutcome.BAD_TOKEN] * len(items)),)
            return (bytes(self.holder.store(key, body, sender, address, now) for key, body in items),)
        if kind == wire.DIAL:
            return (address_proven and self.dial_back.pass_on(address, request.arguments, now),)
        raise ProtocolError(f"an unknown kind of request: {kind}")

    def _reply(
        self,
        datagram: wire.Datagram,
        flags: int,
        proof: bytes,
        results: Sequence[object],
        address: Address,
        now: float,
    ) -> None:
        packed = pack_address(address)
        body = (packed, self.tokens.give(packed), proof, self.wall(now), *results)
        flags |= self.outbox.flags()
        kind = datagram.kind | wire.REPLY
        self.outbox.send(wire.encode(kind, flags, datagram.transaction, self.own_id, body), address)

    def _heard_from(self, datagram: wire.Datagram, address: Address, address_proven: bool, now: float) -> None:
        if datagram.flags & wire.FLAG_CLIENT:
            if address_proven:
                self.dial_back.note_client(address)
            return
        raw = datagram.sender + pack_address(address)
        contact = self.table.get(datagram.sender)
        if contact is not None and contact.raw == raw:
            if address_proven:
                contact.last_seen = now
                self.table.add(contact, now)
            return
        if not self.scope.answers(address[0]) or not self.admits(datagram.sender, address):
            return
        self.probation.wrote(address, now)
        if contact is None and not self.table.wants(datagram.sender):
            return
        if address_proven:
            self.heard_from(raw)
        elif self.is_unreachable(raw, now):
            return
        self.ping(self.contact_at(raw), now)

    def _keep_house(self, now: float) -> None:
        self.timers.start(now + HOUSEKEEPING_PERIOD * self.jitter(), self._keep_house)
        self.keep_house(now)
        self.tokens.rotate(now)
        if len(self.table) >= K and not self.density.was_sampled:
            probe_density(self, now)
        if self.joined:
            last_lookups = [bucket.last_lookup for bucket in self.table.buckets]
            for index, last_lookup in enumerate(last_lookups):
                if last_lookup <= now - REFRESH_PERIOD:
                    refresh(self, index, now)

    def _start(self, operation: Read | Write, now: float) -> int:
        self._num_operations += 1
        self._operations[self._num_operations] = operation
        operation.start(self._num_operations, now)
        return self._num_operations


def _token(secret: bytes, packed_address: bytes) -> bytes:
    return hashlib.blake2b(packed_address, key=secret, digest_size=wire.TOKEN_BYTES).digest()
