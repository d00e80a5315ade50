"""Dial-back: finding out which nodes can be dialed, by having a third node try (`docs/design/network.md`). Pure.

A node that does not know its own role has a contact ask a third node to dial it (`DatagramDialBack`). A newcomer that
says it is public and wrote first, perhaps through a gateway, is dialed by a third node before it is listed, and
confirms that (`Probation`).
"""

from dataclasses import dataclass
from functools import partial

from tesseract_async.errors import ProtocolError
from tesseract_async.lru import LRU
from tesseract_async.network import datagrams as wire
from tesseract_async.network.contacts import Address, Contact, pack_address, source_of, unpack_address
from tesseract_async.network.core import Core
from tesseract_async.network.datagrams import RpcReply
from tesseract_async.network.events import NodeRoleChanged
from tesseract_async.network.outbox import FILTER_LIFETIME
from tesseract_async.network.routing_table import K
from tesseract_async.network.rpcs import Call, Caller
from tesseract_async.transport.token_bucket import RateLimiter

MIN_BACKOFF = 2.0
MAX_BACKOFF = 120.0
CONFIRM_PERIOD = 1800.0
"""Seconds after which a node that was found public asks again."""
MAX_UNANSWERED = {"unknown": 3, "public": 2}
"""The number of questions in vain after which a node of that role takes itself for a client."""
MAX_HELPERS = 64
DIALS_PER_ASKER = 4.0
"""Dials per second for contacts of one address range."""
DIALS_PER_HOST = 1.0
"""Dials per second to one address range or private host."""
MAX_ERRANDS = 32
"""Third nodes that are being pinged for their token."""
PATIENCE = 2.0
"""Seconds in which a third node's dial must have had its effect on a newcomer."""
NUM_THIRDS = 3
"""Third nodes that are asked to dial a newcomer, one after another."""
MAX_PENDING = 256
MAX_REMEMBERED = 8192


@dataclass(slots=True, eq=False)
class ThirdNodes:
    """Requests to third nodes that they dial another."""

    core: Core
    num_errands: int = 0

    def ask(self, arguments: tuple[object, ...], third: Address, token: bytes, now: float) -> bool:
        """Send DIAL_FOR to a third node. One without a token (a helper never gave one) is pinged for it first.

        Return False where too many are being pinged for that already.
        """
        if token:
            self.core.outbox.send_one_way(wire.DIAL_FOR, arguments, third, token, now)
        elif self.num_errands < MAX_ERRANDS:
            self.num_errands += 1
            self.core.call(_Errand(self, arguments), wire.PING, (), third, now)
        else:
            return False
        return True


@dataclass(slots=True, eq=False)
class _Errand(Caller):
    """A DIAL_FOR that is sent to a third node as soon as it has given its token."""

    thirds: ThirdNodes
    arguments: tuple[object, ...]

    def call_answered(self, call: Call, reply: RpcReply, now: float) -> None:
        self.thirds.num_errands -= 1
        self.thirds.core.outbox.send_one_way(wire.DIAL_FOR, self.arguments, call.address, reply.token, now)

    def call_failed(self, call: Call, now: float) -> None:
        self.thirds.num_errands -= 1


class DatagramDialBack(Caller):
    """One node's part in finding out its own role and that of others."""

    def __init__(self, core: Core, thirds: ThirdNodes, now: float) -> None:
        self._core = core
        self.thirds = thirds
        self._timer = None if core.public else core.timers.start(now, self.ask)
        self._helpers: LRU[Address, None] = LRU(MAX_HELPERS)
        """Clients heard from at a proven address: they too can dial."""
        self._backoff = MIN_BACKOFF
        self._nonce = b""
        self._num_unanswered = 0
        self._asked = RateLimiter(rate=DIALS_PER_ASKER, burst=16 * DIALS_PER_ASKER)
        self._dialed = RateLimiter(rate=DIALS_PER_HOST, burst=16 * DIALS_PER_HOST)

    def note_client(self, address: Address) -> None:
        self._helpers[address] = None

    def ask(self, now: float) -> None:
        """Ask a random contact to have this node dialed, and arrange to ask another one later."""
        core = self._core
        contacts = core.table.contacts()
        if not contacts:
            self._ask_at(now + 1.0)
            return
        contact = core.random.choice(contacts)
        if self._num_unanswered >= MAX_UNANSWERED.get(core.outbox.role, float("inf")):
            self._become("client", now)
        self._num_unanswered += 1
        self._nonce = core.random.randbytes(wire.TRANSACTION_BYTES)
        self._ask_at(now + self._backoff)
        self._backoff = min(2 * self._backoff, MAX_BACKOFF)
        core.call(self, wire.DIAL, (self._nonce,), contact, now)  # whatever it replies, only DIALED counts

    def pass_on(self, asker: Address, arguments: list[object], now: float) -> bool:
        """Handle DIAL: ask a third node to dial `asker`; return whether there was one. Raises: ProtocolError."""
        nonce = wire.read_nonce(arguments)
        table = self._core.table
        # neighbors list one another: a node that is not listed is not dialed for
        contacts = {item.address: item for item in table.closest(table.own_number, K)}
        candidates = [*contacts, *(address for address in self._helpers if address not in contacts)]
        candidates = [address for address in candidates if address[0] != asker[0]] or [
            address for address in candidates if address != asker
        ]
        # a node known by the other kind of IP may speak no other
        size = len(pack_address(asker))
        candidates = [address for address in candidates if len(pack_address(address)) == size] or candidates
        if not candidates:
            return False
        third = self._core.random.choice(candidates)
        contact = contacts.get(third)
        token = contact.token if contact is not None and contact.token_until > now else b""
        return self.thirds.ask((pack_address(asker), nonce), third, token, now)

    def dial(self, arguments: list[object], source: Address, now: float, *, trusted: bool) -> None:
        """Handle DIAL_FOR: send one short datagram, within limits per second for each asker and each host.

        With a third argument, true, the dialed node shall tell `source` of it (`Probation`). `trusted`: the asker is
        listed, or about to be. Raises: ProtocolError.
        """
        nonce = wire.read_nonce(arguments[1:])
        report = (pack_address(source),) if arguments[2:3] == [True] else ()
        packed = arguments[0]
        if type(packed) is not bytes:
            raise ProtocolError("a dial-back without an address")
        target = unpack_address(packed)
        if not trusted or not self._core.scope.allows(target[0]):
            self._core.outbox.drop("dial")
        elif self._asked.allows(source_of(source), 1, now) and self._dialed.allows(source_of((target[0], 1)), 1, now):
            self._core.outbox.send_one_way(wire.DIALED, (nonce, *report), target, b"", now, padded=False)
        else:
            self._core.outbox.drop("rate")

    def dialed(self, arguments: list[object], address: Address, now: float) -> None:
        """Handle DIALED from a node at `address`. Raises: ProtocolError."""
        nonce = wire.read_nonce(arguments)
        outbox = self._core.outbox
        if len(arguments) > 1 and type(arguments[1]) is bytes:
            asker = unpack_address(arguments[1])
            if outbox.has_written_to(asker, now):
                outbox.send_one_way(wire.DIALED, (nonce,), asker, b"", now, padded=False)
            return
        if not self._nonce or nonce != self._nonce:
            raise ProtocolError("a dial-back that was not asked for")
        if outbox.has_written_to(address, now):
            return
        self._num_unanswered = 0
        self._backoff = MIN_BACKOFF
        self._ask_at(now + CONFIRM_PERIOD)
        self._become("public", now)

    def _ask_at(self, at: float) -> None:
        self._core.timers.cancel(self._timer)
        self._timer = self._core.timers.start(at, self.ask)

    def _become(self, role: str, now: float) -> None:
        if self._core.outbox.role != role:
            self._core.outbox.role = role
            self._core.outbox.emit(NodeRoleChanged(role))
            if role == "public":
                self._core.found_public(now)


class Probation:
    """The newcomers of one node that have yet to be dialed by a third one."""

    def __init__(self, core: Core, thirds: ThirdNodes) -> None:
        self._core = core
        self._thirds = thirds
        self.wrote_first: LRU[Address, float] = LRU(MAX_REMEMBERED)
        self._verdicts: LRU[bytes, tuple[bool, float]] = LRU(MAX_REMEMBERED)
        self.pending: dict[bytes, tuple[Contact, int]] = {}
        """Contacts that are being dialed just now, by their `raw`, with how many thirds were asked."""
        self.nonces: dict[bytes, bytes] = {}

    def wrote(self, address: Address, now: float) -> None:
        """Note a request of a node that is not listed, and claims to be public."""
        if address in self.wrote_first or not self._core.outbox.has_written_to(address, now):
            self.wrote_first[address] = now

    def holds(self, contact: Contact, now: float) -> bool:
        """Return True if this proven contact must not be listed (yet): it is being dialed, or was in vain."""
        wrote_at = self.wrote_first.get(contact.address)
        if contact.range is None or wrote_at is None or wrote_at <= now - FILTER_LIFETIME:
            return False
        dialed, until = self._verdicts.get(contact.raw, (False, 0.0))
        if until > now:
            return not dialed
        return contact.raw in self.pending or len(self.pending) >= MAX_PENDING or self._ask(contact, 1, now)

    def confirmed(self, nonce: bytes, address: Address, now: float) -> bool:
        """Handle DIALED; return True if it answered a question that was asked here."""
        raw = self.nonces.get(nonce)
        if raw is None or self.pending[raw][0].address != address:
            return False
        contact = self._end(raw, dialed=True, now=now)
        if contact.proven:  # else it fell silent meanwhile: it is listed when it proves itself again
            self._core.enter(contact, now)
        return True

    def _ask(self, contact: Contact, attempt: int, now: float) -> bool:
        core, table = self._core, self._core.table
        size = len(pack_address(contact.address))
        thirds = [
            one
            for one in table.closest(table.own_number, K)
            if one.range != contact.range and len(pack_address(one.address)) == size
        ]
        if not thirds:
            return False
        third = core.random.choice(thirds)
        nonce = core.random.randbytes(wire.TRANSACTION_BYTES)
        self.pending[contact.raw] = (contact, attempt)
        self.nonces[nonce] = contact.raw
        token = third.token if third.token_until > now else b""
        self._thirds.ask((pack_address(contact.address), nonce, True), third.address, token, now)
        core.timers.start(now + PATIENCE, partial(self._waited, nonce))
        return True

    def _waited(self, nonce: bytes, now: float) -> None:
        raw = self.nonces.pop(nonce, None)
        if raw is None:
            return
        contact, attempt = self.pending[raw]
        if attempt >= NUM_THIRDS or not self._ask(contact, attempt + 1, now):
            self._end(raw, dialed=False, now=now)
            self._core.metrics.count("network_contacts_dropped", reason="not_dialed")

    def _end(self, raw: bytes, *, dialed: bool, now: float) -> Contact:
        self.nonces = {nonce: other for nonce, other in self.nonces.items() if other != raw}
        self._verdicts[raw] = (dialed, now + FILTER_LIFETIME)
        return self.pending.pop(raw)[0]
