"""Finding out whether others can dial this node: a third node, to which nothing was ever sent, tries. Pure.

::

    A  --DIAL-->  B           B answers whether it passed the question on
                  B --DIAL_FOR(address of A, nonce)-->  C
    A  <------------------------DIALED(nonce)--------  C

A gateway that lets in only those who were written to drops the last datagram. So it counts only if it comes from an
address that A has not written to for a while (RFC 4787: mappings and filters live for minutes).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tesseract_async.errors import ProtocolError
from tesseract_async.network import datagrams as wire
from tesseract_async.network.calls import Call
from tesseract_async.network.contacts import Address, Contact, pack_address, unpack_address
from tesseract_async.network.datagrams import Reply
from tesseract_async.network.events import RoleChanged
from tesseract_async.network.limits import RateLimiter

if TYPE_CHECKING:
    from tesseract_async.network.protocol import NetworkProtocol

FILTER_LIFETIME = 600.0
"""Seconds after which a gateway has surely forgotten that something was sent to an address."""
MIN_BACKOFF = 2.0
MAX_BACKOFF = 120.0
CONFIRM_PERIOD = 1800.0
"""A node that was found public asks again after so long."""
MAX_HELPERS = 64
MAX_WRITTEN_TO = 8192
DIALS_PER_ASKER = 4.0
"""In a second, for contacts of one address range."""
DIALS_PER_HOST = 1.0
"""In a second, to one address range or private host."""
MAX_ERRANDS = 32
"""Third nodes that are being pinged for their token."""


class DialBack:
    """The role of one node, and its part in finding out that of others."""

    def __init__(self, network: NetworkProtocol, *, public: bool, now: float) -> None:
        self.network = network
        self.declared = public
        """Whether it was told that it is public: then it never asks."""
        self.role = "public" if public else "unknown"
        self.forced_client = False
        self.ask_at = float("inf") if public else now
        self.helpers: dict[Address, None] = {}
        """Clients heard from with a proven address: they too can dial."""
        self.num_errands = 0
        self._backoff = MIN_BACKOFF
        self._nonce = b""
        self._written_to: dict[Address, float] = {}
        self._num_unanswered = 0
        self._asked = RateLimiter(rate=DIALS_PER_ASKER, burst=16 * DIALS_PER_ASKER)
        self._dialled = RateLimiter(rate=DIALS_PER_HOST, burst=16 * DIALS_PER_HOST)

    @property
    def is_public(self) -> bool:
        return self.role == "public" and not self.forced_client

    def note_sent(self, address: Address, now: float) -> None:
        """Every request that is sent passes here; of a node that is not public, also what nobody replies to."""
        self._written_to.pop(address, None)
        self._written_to[address] = now
        if len(self._written_to) > MAX_WRITTEN_TO:
            del self._written_to[next(iter(self._written_to))]

    def has_written_to(self, address: Address, now: float) -> bool:
        """Whether this node sent it a request within what gateways remember."""
        return now - self._written_to.get(address, float("-inf")) < FILTER_LIFETIME

    def note_reply(self, address: Address, now: float) -> None:
        """A reply keeps a gateway open where it is; whoever was never written to had found it open."""
        if address in self._written_to:
            self.note_sent(address, now)

    def note_client(self, address: Address) -> None:
        """A client with a proven address asked something: a helper for others."""
        self.helpers.pop(address, None)
        self.helpers[address] = None
        if len(self.helpers) > MAX_HELPERS:
            del self.helpers[next(iter(self.helpers))]

    def handle_timer(self, now: float) -> None:
        """Asks a random contact to have this node dialled."""
        contacts = self.network.table.contacts()
        if not contacts:
            self.ask_at = now + 1.0
            return
        self.ask(self.network.random.choice(contacts), now)

    def ask(self, contact: Contact, now: float) -> None:
        """Asks `contact`, and arranges to ask another one later."""
        if self.role == "unknown" and self._num_unanswered >= 3:
            self._become("client", now)
        self._num_unanswered += 1
        self._nonce = self.network.random.randbytes(wire.TRANSACTION_BYTES)
        self.ask_at = now + self._backoff
        self._backoff = min(2 * self._backoff, MAX_BACKOFF)
        if self.role == "public" and self._num_unanswered >= 3:
            self._become("client", now)
        self.network.call(self, wire.DIAL, (self._nonce,), contact, now)

    def call_answered(self, call: Call, reply: Reply, now: float) -> None:
        """It was passed on, or could not be: either way only DIALED counts."""

    def call_stalled(self, call: Call, now: float) -> None:
        pass

    def call_failed(self, call: Call, now: float) -> None:
        pass

    def pass_on(self, asker: Address, arguments: list[object], now: float) -> bool:
        """Answers DIAL: asks a third node to dial `asker`. Returns whether there was one. Raises: ProtocolError."""
        nonce = _nonce(arguments)
        network = self.network
        # neighbours list one another: who is not listed is not dialled for
        table = network.table
        contacts = {item.address: item for item in table.closest(table.own_number, table.k)}
        candidates = [*contacts, *(address for address in self.helpers if address not in contacts)]
        candidates = [address for address in candidates if address[0] != asker[0]] or [
            address for address in candidates if address != asker
        ]
        # who is known by the other kind of IP may have that alone
        size = len(pack_address(asker))
        candidates = [address for address in candidates if len(pack_address(address)) == size] or candidates
        if not candidates:
            return False
        third = network.random.choice(candidates)
        contact = contacts.get(third)
        token = contact.token if contact is not None and contact.token_until > now else b""
        return self.send_third((pack_address(asker), nonce), third, token, now)

    def send_third(self, arguments: tuple[object, ...], third: Address, token: bytes, now: float) -> bool:
        """Has a third node dial somebody. Who gave no token, or none lately (a helper never did), is pinged for one.

        False where too many were pinged for that already.
        """
        if token:
            self.network.send_oneway(wire.DIAL_FOR, arguments, third, token, now)
        elif self.num_errands < MAX_ERRANDS:
            self.num_errands += 1
            self.network.call_address(_Errand(self, arguments), wire.PING, (), third, now)
        else:
            return False
        return True

    def dial(self, arguments: list[object], sender: bytes, source: Address, now: float) -> None:
        """Answers DIAL_FOR of a listed contact: one short datagram, so many a second for each who asks, to each host.

        With a third argument, true, the dialled node shall tell `source` of it (`probation`). Raises: ProtocolError.
        """
        nonce = _nonce(arguments[1:])
        report = (pack_address(source),) if arguments[2:3] == [True] else ()
        packed = arguments[0]
        if type(packed) is not bytes:
            raise ProtocolError("a dial-back without an address")
        target = unpack_address(packed)
        asker = self.network.table.get(sender)
        listed = asker is not None and asker.address == source
        # those who start together list one another within seconds
        listed = listed or self.network.probation.is_dialling(sender + pack_address(source))
        if not listed or not self.network.scope.allows(target[0]):
            self.network.drop("dial")
        elif self._asked.allows(source, 1.0, now) and self._dialled.allows((target[0], 1), 1.0, now):
            self.network.send_oneway(wire.DIALED, (nonce, *report), target, b"", now, padded=False)
        else:
            self.network.drop("rate")

    def dialled(self, arguments: list[object], address: Address, now: float) -> None:
        """Handles DIALED. Raises: ProtocolError."""
        nonce = _nonce(arguments)
        if self.network.probation.confirmed(nonce, address, now):
            return
        if len(arguments) > 1 and type(arguments[1]) is bytes:
            asker = unpack_address(arguments[1])
            if self.has_written_to(asker, now):
                self.network.send_oneway(wire.DIALED, (nonce,), asker, b"", now, padded=False)
            return
        if not self._nonce or nonce != self._nonce:
            raise ProtocolError("a dial-back that was not asked for")
        if self.has_written_to(address, now):
            return
        self._num_unanswered = 0
        self._backoff = MIN_BACKOFF
        self.ask_at = now + CONFIRM_PERIOD
        self._become("public", now)

    def _become(self, role: str, now: float) -> None:
        if self.role == role:
            return
        self.role = role
        self.network.emit(RoleChanged(role))
        if role == "public":
            self.network.membership.end_dial_wait()
            # those nearest hear from this node without the client flag, and list it
            self.network.membership.learn_neighbourhood((), now)


class _Errand:
    """Asks a third node to dial somebody as soon as it has given its token."""

    def __init__(self, dialback: DialBack, arguments: tuple[object, ...]) -> None:
        self.dialback = dialback
        self.arguments = arguments

    def call_answered(self, call: Call, reply: Reply, now: float) -> None:
        self.dialback.num_errands -= 1
        self.dialback.network.send_oneway(wire.DIAL_FOR, self.arguments, call.address, reply.token, now)

    def call_stalled(self, call: Call, now: float) -> None:
        pass

    def call_failed(self, call: Call, now: float) -> None:
        self.dialback.num_errands -= 1


def _nonce(arguments: list[object]) -> bytes:
    nonce = arguments[0] if arguments else None
    if type(nonce) is not bytes or len(nonce) != wire.TRANSACTION_BYTES:
        raise ProtocolError("a dial-back without its nonce")
    return nonce
