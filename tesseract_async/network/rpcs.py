"""Remote procedure calls in progress: retransmission, adaptive timeouts, a bound on their number. Pure.

A call is sent up to three times under the same transaction before it fails; requests are idempotent, so a repeated
one does no harm.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from tesseract_async.errors import ProtocolError
from tesseract_async.identity import PeerID
from tesseract_async.network import datagrams as wire
from tesseract_async.network.contacts import Address, Contact, source_of
from tesseract_async.network.datagrams import RpcReply
from tesseract_async.network.outbox import Outbox
from tesseract_async.network.timers import Timer, Timers
from tesseract_async.transport.token_bucket import RateLimiter

MAX_CALLS = 512
"""Calls in progress at one node; more wait for their turn."""
NUM_RETRANSMISSIONS = 2
FIRST_TIMEOUT = 0.5
"""Seconds to wait for a reply where no round trip has been measured yet."""
MAX_TIMEOUT = 2.0
"""Longest wait for a reply before the request is sent again, unless `NetworkSettings.min_timeout` is longer."""
STALL = 0.05
"""A timer this late means that this node's own loop stood still, and says nothing about others."""
MAX_GRACES = 3
"""Times that one call is given longer for that reason."""
STRANGERS_PER_RANGE = 1.0
"""First requests per second to contacts of one address range that have not proven to live there."""


class Caller:
    """Base of objects that make calls and are told how each ends: `call_answered` or `call_failed`, once."""

    def call_answered(self, call: "Call", reply: RpcReply, now: float) -> None:
        """The contact replied, and its id is proven. `call.contact` is set, also where only an address was given.

        May raise ProtocolError: then the reply is dropped as malformed, and `call_failed` follows.
        """

    def call_stalled(self, call: "Call", now: float) -> None:
        """A wait passed without a reply, and the request was sent again. Heard once for each retransmission."""

    def call_failed(self, call: "Call", now: float) -> None:
        """No reply came, or one that proves that another node is there, or a malformed one."""


@dataclass(slots=True, eq=False)
class Call:
    caller: Caller
    kind: int
    arguments: Sequence[object]
    address: Address
    contact: Contact | None
    """The node that must answer; None while only the address is known (a seed)."""
    expected: frozenset[PeerID] | None = None
    """The ids that may answer where only the address is known; None: any."""
    transaction: bytes = b""
    challenge: bytes = b""
    data: bytes = b""
    attempts: int = 0
    sent_at: float = 0.0
    timer: Timer | None = None
    """Rings when this attempt is late."""
    num_graces: int = 0
    """Times that its timeout was put off because this node's own loop had stalled."""
    repeated: bool = False
    """True once it was sent anew because its token was out of date."""


class Rpcs:
    """The calls of one node by transaction, and those that wait because too many are in progress."""

    def __init__(
        self, outbox: Outbox, timers: Timers, *, min_timeout: float, on_silent: Callable[[Contact, float], None]
    ) -> None:
        """`on_silent` is called with each contact that answered no attempt of a call, before that call fails."""
        self._outbox = outbox
        self._timers = timers
        self._min_timeout = min_timeout
        self._on_silent = on_silent
        self.by_transaction: dict[bytes, Call] = {}
        self._waiting: deque[Call] = deque()
        self._rtt: float | None = None
        self._strangers = RateLimiter(rate=STRANGERS_PER_RANGE, burst=12 * STRANGERS_PER_RANGE)

    def start(self, call: Call, now: float) -> None:
        """Send a call, now or as soon as there is room. Its caller hears nothing before this returns."""
        if len(self.by_transaction) >= MAX_CALLS:
            self._waiting.append(call)
            return
        if (
            call.contact is not None
            and not call.contact.proven
            and not self._strangers.allows(source_of(call.address), 1.0, now)
        ):
            # that they live there is only hearsay: a third party must not be flooded for that
            self._outbox.drop("hearsay")
            self._timers.start(now, partial(call.caller.call_failed, call))
            return
        call.transaction = self._outbox.new_transaction()
        if call.contact is None or not call.contact.proven:
            call.challenge = self._outbox.random.randbytes(wire.CHALLENGE_BYTES)
        self.by_transaction[call.transaction] = call
        self.repeat(call, now)

    def repeat(self, call: Call, now: float) -> None:
        contact = call.contact
        flags = self._outbox.flags()
        if call.expected is not None:
            flags |= wire.FLAG_CLIENT  # another node at that address shall not list this one, nor tell others of it
        call.data = wire.encode_request(
            call.kind,
            flags,
            call.transaction,
            self._outbox.own_id,
            token=contact.token if contact is not None and contact.token_until > now else b"",
            challenge=call.challenge,
            arguments=call.arguments,
        )
        self._attempt(call, now)

    def end(self, call: Call, reply: RpcReply | None, now: float) -> None:
        """End a call as answered, or as failed (None): the next one's turn comes, then the caller hears of it."""
        self._timers.cancel(call.timer)
        del self.by_transaction[call.transaction]
        while self._waiting and len(self.by_transaction) < MAX_CALLS:
            self.start(self._waiting.popleft(), now)
        if reply is not None:
            try:
                call.caller.call_answered(call, reply, now)
            except ProtocolError:
                self._outbox.drop("malformed")
                call.caller.call_failed(call, now)
        else:
            self._outbox.metrics.count("network_calls_failed")
            call.caller.call_failed(call, now)

    def observe_round_trip(self, call: Call, now: float) -> None:
        """Learn from a call that was answered at its first attempt (a later one says not which it answers)."""
        if call.attempts != 1:
            return
        seconds = now - call.sent_at
        self._rtt = seconds if self._rtt is None else self._rtt + (seconds - self._rtt) / 16
        if call.contact is not None:
            call.contact.observe_round_trip(seconds)

    def _timeout(self, call: Call) -> float:
        """Return the seconds to wait for this attempt's reply: from its round trips, else all peers', else a guess."""
        contact = call.contact
        if contact is not None and contact.rtt is not None:
            base = contact.rtt + 4 * contact.rtt_variation
        elif self._rtt is not None:
            # a stranger may live on another continent than everybody so far
            base = 3 * self._rtt + self._min_timeout
        else:
            base = FIRST_TIMEOUT
        return max(min(base, MAX_TIMEOUT), self._min_timeout) * (1, 1.5, 2)[min(call.attempts - 1, 2)]

    def _attempt(self, call: Call, now: float) -> None:
        call.attempts += 1
        call.sent_at = now
        self._outbox.note_sent(call.address, now)
        self._outbox.send(call.data, call.address)
        self._wait(call, now + self._timeout(call))

    def _wait(self, call: Call, due: float) -> None:
        self._timers.cancel(call.timer)
        call.timer = self._timers.start(due, partial(self._is_late, call, due))

    def _is_late(self, call: Call, due: float, now: float) -> None:
        if now - due > STALL and call.num_graces < MAX_GRACES:
            # this loop stood still meanwhile: the reply may lie in the socket, which is read first
            call.num_graces += 1
            self._wait(call, now + self._min_timeout)
            return
        if call.attempts > NUM_RETRANSMISSIONS:
            if call.contact is not None:
                self._on_silent(call.contact, now)
            self.end(call, None, now)
            return
        self._outbox.metrics.count("network_retransmissions")
        if call.contact is not None:
            call.contact.late = True
        self._attempt(call, now)
        call.caller.call_stalled(call, now)
