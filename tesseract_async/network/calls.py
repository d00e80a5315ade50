"""RPCs under way: retransmission, adaptive time-outs, a bound on their number. Pure.

A call is sent up to three times under the same transaction before it counts as failed; handlers are idempotent, so a
repeated request does no harm.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from tesseract_async.identity import PeerID
from tesseract_async.network import datagrams as wire
from tesseract_async.network.contacts import Address, Contact
from tesseract_async.network.datagrams import Reply
from tesseract_async.network.limits import RateLimiter
from tesseract_async.network.timers import Timer

if TYPE_CHECKING:
    from tesseract_async.network.protocol import NetworkProtocol

STALL = 0.05
"""A timer this late means that the own loop stood still, and says nothing about others."""
MAX_GRACES = 3
"""How often one call is spared for that."""


STRANGERS_PER_RANGE = 1.0
"""In a second: who has not proven to live in an address range, and is asked for the first time."""


class Caller(Protocol):
    """Who made a call and hears how it ends: one of `call_answered` and `call_failed`, once."""

    def call_answered(self, call: Call, reply: Reply, now: float) -> None:
        """The contact, whose id is proven by now, replied. `call.contact` is set, also where only an address was."""

    def call_stalled(self, call: Call, now: float) -> None:
        """A wait passed without a reply, the request is sent again. Heard once for each retransmission."""

    def call_failed(self, call: Call, now: float) -> None:
        """No reply came, or one that proves that somebody else is there."""


class Call:
    """One request and its retransmissions."""

    __slots__ = (
        "address",
        "arguments",
        "attempts",
        "caller",
        "challenge",
        "contact",
        "data",
        "expected",
        "kind",
        "num_graces",
        "repeated",
        "sent_at",
        "timer",
        "transaction",
    )

    def __init__(
        self,
        caller: Caller,
        kind: int,
        arguments: Sequence[Any],
        *,
        contact: Contact | None,
        address: Address,
        expected: frozenset[PeerID] | None = None,
    ) -> None:
        self.caller = caller
        self.kind = kind
        self.arguments = arguments
        self.contact = contact
        """Who must answer; None while only the address is known (a seed)."""
        self.address = address
        self.expected = expected
        """Those who may answer where only the address is known; None: whoever lives there."""
        self.transaction = b""
        self.challenge = b""
        self.data = b""
        self.attempts = 0
        self.sent_at = 0.0
        self.timer: Timer | None = None
        """When this attempt is late."""
        self.num_graces = 0
        """How often its time-out was put off because the own loop had stalled."""
        self.repeated = False
        """Whether it was sent anew because its token was out of date."""


class Unwatched:
    """Makes calls whose end nobody waits for."""

    def call_answered(self, call: Call, reply: Reply, now: float) -> None:
        pass

    def call_stalled(self, call: Call, now: float) -> None:
        pass

    def call_failed(self, call: Call, now: float) -> None:
        pass


class Calls:
    """The calls of one node by transaction, and those that wait because too many are under way."""

    def __init__(self, network: NetworkProtocol) -> None:
        self._network = network
        self._settings = network.settings
        self.by_transaction: dict[bytes, Call] = {}
        self.waiting: deque[Call] = deque()
        self._rtt: float | None = None
        self._strangers = RateLimiter(rate=STRANGERS_PER_RANGE, burst=12 * STRANGERS_PER_RANGE)

    @property
    def full(self) -> bool:
        """Whether another call has to wait."""
        return len(self.by_transaction) >= self._settings.max_calls

    def start(self, call: Call, now: float) -> None:
        """Sends a call, now or as soon as there is room."""
        if self.full:
            self.waiting.append(call)
            return
        if call.contact is not None and not call.contact.proven and not self._strangers.allows(call.address, 1.0, now):
            # somebody only said that they live there: a third party must not be flooded for that
            self._network.drop("hearsay")
            self._network.timers.start(now, partial(call.caller.call_failed, call))
            return
        call.transaction = self._network.new_transaction()
        if call.contact is None or not call.contact.proven:
            call.challenge = self._network.random.randbytes(wire.CHALLENGE_BYTES)
        self.by_transaction[call.transaction] = call
        self.repeat(call, now)

    def repeat(self, call: Call, now: float) -> None:
        """Writes the request with the contact's present token and sends it."""
        contact = call.contact
        flags = self._network.flags()
        if call.expected is not None:
            flags |= wire.FLAG_CLIENT  # whoever is there instead shall not list this node, and tell others of it
        call.data = wire.encode_request(
            call.kind,
            flags,
            call.transaction,
            self._network.own_id,
            token=contact.token if contact is not None and contact.token_until > now else b"",
            challenge=call.challenge,
            arguments=call.arguments,
        )
        self._attempt(call, now)

    def end(self, call: Call, reply: Reply | None, now: float) -> None:
        """A call was answered, or failed (None). Its caller hears of it; the next one's turn comes."""
        if call.timer is not None:
            self._network.timers.cancel(call.timer)
        del self.by_transaction[call.transaction]
        while self.waiting and not self.full:
            self.start(self.waiting.popleft(), now)
        if reply is None:
            self._network.metrics.count("network_calls_failed")
            call.caller.call_failed(call, now)
        else:
            call.caller.call_answered(call, reply, now)

    def timeout(self, call: Call) -> float:
        """Seconds to wait for this attempt's reply: the peer's own round trips, else all peers', else a first guess."""
        contact = call.contact
        if contact is not None and contact.rtt is not None:
            base = contact.rtt + 4 * contact.rtt_variation
        elif self._rtt is not None:
            # a stranger may live on another continent than everybody so far
            base = 3 * self._rtt + self._settings.min_timeout
        else:
            base = self._settings.first_timeout
        base = min(max(base, self._settings.min_timeout), self._settings.max_timeout)
        return base * (1, 1.5, 2)[min(call.attempts - 1, 2)]

    def observe_round_trip(self, call: Call, now: float) -> None:
        """Learns from a call that was answered at its first attempt (a later one says not which it answers)."""
        if call.attempts != 1:
            return
        seconds = now - call.sent_at
        self._rtt = seconds if self._rtt is None else self._rtt + (seconds - self._rtt) / 16
        if call.contact is not None:
            call.contact.observe_round_trip(seconds)

    def _attempt(self, call: Call, now: float) -> None:
        call.attempts += 1
        call.sent_at = now
        network = self._network
        network.dialback.note_sent(call.address, now)
        network.send(call.data, call.address)
        self._wait(call, now + self.timeout(call))

    def _wait(self, call: Call, due: float) -> None:
        timers = self._network.timers
        if call.timer is not None:
            timers.cancel(call.timer)
        call.timer = timers.start(due, partial(self._is_late, call, due))

    def _is_late(self, call: Call, due: float, now: float) -> None:
        if now - due > STALL and call.num_graces < MAX_GRACES:
            # this loop stood still meanwhile: the reply may lie in the socket, which is read first
            call.num_graces += 1
            self._wait(call, now + self._settings.min_timeout)
            return
        if call.attempts > self._settings.num_retransmissions:
            if call.contact is not None:
                self._network.lost(call.contact, now)
            self.end(call, None, now)
            return
        self._network.metrics.count("network_retransmissions")
        if call.contact is not None:
            call.contact.late = True
        self._attempt(call, now)
        call.caller.call_stalled(call, now)
