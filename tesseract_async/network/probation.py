"""Whoever writes first may do so through a gateway that lets nobody in: before it is listed, a third dials it. Pure.

::

    X  --any request-->  A                                 X says that it is public; A has pinged it since
                         A  --DIAL_FOR(X, nonce, A?)-->  C
    X  <------------------------DIALED(nonce, A)-------  C    dropped, where X can't be dialled
    X  --DIALED(nonce)-->  A                               so now A lists X

X answers only to those it has written to: nobody is made to send anything to third parties.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from tesseract_async.network import datagrams as wire
from tesseract_async.network.contacts import Address, Contact, pack_address

if TYPE_CHECKING:
    from tesseract_async.network.protocol import NetworkProtocol

PATIENCE = 2.0
"""Seconds in which the dial of a third must have had its effect."""
NUM_THIRDS = 3
"""That are asked, one after another."""
MAX_PENDING = 256
MAX_REMEMBERED = 8192
MEMORY = 600.0
"""Seconds for which a gateway may let in whoever was written to, and a verdict stands."""


class Probation:
    """The newcomers of one node."""

    def __init__(self, network: NetworkProtocol) -> None:
        self.network = network
        self._wrote_first: OrderedDict[Address, float] = OrderedDict()
        self._verdicts: OrderedDict[bytes, tuple[bool, float]] = OrderedDict()
        self._pending: dict[bytes, tuple[Contact, int]] = {}
        self._nonces: dict[bytes, bytes] = {}

    def wrote(self, address: Address, now: float) -> None:
        """Somebody who is not listed, and claims to be public, has sent a request.

        Not the first to write is whom this node has written to before: those that a newcomer finds ping it at once.
        """
        if address not in self._wrote_first and self.network.dialback.has_written_to(address, now):
            return
        self._wrote_first[address] = now
        self._wrote_first.move_to_end(address)
        if len(self._wrote_first) > MAX_REMEMBERED:
            self._wrote_first.popitem(last=False)

    def holds(self, contact: Contact, now: float) -> bool:
        """Whether this proven contact must not be listed (yet): it is being dialled, or was in vain.

        Whoever this node found by itself has answered to a stranger. Private addresses say nothing, and where nobody
        else is known nobody can be asked.
        """
        wrote_at = self._wrote_first.get(contact.address)
        if contact.range is None or wrote_at is None or wrote_at <= now - MEMORY:
            return False
        dialled, until = self._verdicts.get(contact.raw, (False, 0.0))
        if until > now:
            return not dialled
        return contact.raw in self._pending or len(self._pending) >= MAX_PENDING or self._ask(contact, 1, now)

    def is_dialling(self, raw: bytes) -> bool:
        """Whether a proven contact is being dialled just now, and listed if that gets through."""
        return raw in self._pending

    def confirmed(self, nonce: bytes, address: Address, now: float) -> bool:
        """Handles DIALED; whether it was the answer to a question asked here."""
        raw = self._nonces.get(nonce)
        if raw is None or self._pending[raw][0].address != address:
            return False
        contact, _ = self._end(raw, dialled=True, now=now)
        if contact.proven:
            self.network.enter(contact, now)
        # else it fell silent meanwhile: it is listed when it proves itself again
        return True

    def _ask(self, contact: Contact, attempt: int, now: float) -> bool:
        """Has a third node dial it; whether there is one."""
        network = self.network
        size = len(pack_address(contact.address))
        table = network.table
        thirds = [
            one
            for one in table.closest(table.own_number, table.k)
            if one.range != contact.range and len(pack_address(one.address)) == size
        ]
        if not thirds:
            return False
        third = network.random.choice(thirds)
        nonce = network.random.randbytes(wire.TRANSACTION_BYTES)
        self._pending[contact.raw] = (contact, attempt)
        self._nonces[nonce] = contact.raw
        token = third.token if third.token_until > now else b""
        network.dialback.send_third((pack_address(contact.address), nonce, True), third.address, token, now)
        network.timers.start(now + PATIENCE, lambda now: self._waited(nonce, now))
        return True

    def _waited(self, nonce: bytes, now: float) -> None:
        raw = self._nonces.pop(nonce, None)
        if raw is None:
            return
        contact, attempt = self._pending[raw]
        if attempt >= NUM_THIRDS or not self._ask(contact, attempt + 1, now):
            self._end(raw, dialled=False, now=now)
            self.network.metrics.count("network_contacts_dropped", reason="not_dialled")

    def _end(self, raw: bytes, *, dialled: bool, now: float) -> tuple[Contact, int]:
        self._nonces = {nonce: other for nonce, other in self._nonces.items() if other != raw}
        self._verdicts[raw] = (dialled, now + MEMORY)
        self._verdicts.move_to_end(raw)
        if len(self._verdicts) > MAX_REMEMBERED:
            self._verdicts.popitem(last=False)
        return self._pending.pop(raw)
