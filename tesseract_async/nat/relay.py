"""Joins the connections of two nodes that cannot reach one another. The relay reads nothing: TLS runs end to end.

`RelayLedger` decides who may join whom, and how much. `Relay` moves the bytes. A token is good for one connection: the
peer that reserves a splice gets one token for itself and one for the other peer. Both go there by `meet_at_relay`.
"""

import asyncio
import secrets
from dataclasses import dataclass
from typing import Final

from tesseract_async.endpoint.budget import FairCount, Owner
from tesseract_async.endpoint.connection_limits import descriptor_limit, room_for
from tesseract_async.errors import Overloaded, PeerUnreachable
from tesseract_async.identity import PeerID
from tesseract_async.metrics import Metrics
from tesseract_async.nat import preamble
from tesseract_async.network.address_scope import AddressScope
from tesseract_async.transport import tcp
from tesseract_async.transport.base import PeerAddress, Pipe, range_of, split_host_port
from tesseract_async.transport.throttle import Throttle
from tesseract_async.transport.token_bucket import TokenBucket

SCRATCH_BYTES: Final = 256 * 1024
WAITING_TIMEOUT: Final = 10.0
"""Seconds within which both ends must arrive."""
SILENT_TIMEOUT: Final = 60.0
"""Seconds without a byte after which a pair is parted; endpoints exchange pings every few seconds."""


@dataclass(frozen=True, slots=True)
class RelaySettings:
    """The traffic that a public node carries for others: as much as its owner wants to pay for."""

    max_splices: int = 256
    """Joined pairs, waiting ones included; fewer if the process may not open that many files."""
    max_bytes: int = 64 * 2**30
    """Bytes that one pair may exchange."""
    max_rate: float | None = 25e6
    """Bytes per second that all pairs together may exchange, or None for no limit."""


@dataclass(slots=True, eq=False)
class Splice:
    owner: Owner
    tokens: tuple[bytes, bytes]
    expires_at: float
    num_arrived: int = 0
    num_bytes: int = 0
    last_active: float = 0.0


class RelayLedger:
    """The reserved pairs and their limits. The caller gives the time, and must `remove` every splice that ends."""

    def __init__(
        self, settings: RelaySettings, *, max_splices: int | None = None, waiting_timeout: float = WAITING_TIMEOUT
    ) -> None:
        """`max_splices`: what the process's limit on open files leaves."""
        self.settings = settings
        # a range may hold as many as it leaves free, a peer half as many: so the next one always finds room
        self._shares = FairCount(min(settings.max_splices, max_splices or settings.max_splices) + 2)
        self._waiting_timeout = waiting_timeout
        self._by_token: dict[bytes, Splice] = {}
        self._splices: set[Splice] = set()
        self._rate = TokenBucket(settings.max_rate, burst=settings.max_rate) if settings.max_rate is not None else None

    def __len__(self) -> int:
        return len(self._splices)

    def __contains__(self, splice: Splice) -> bool:
        return splice in self._splices

    def reserve(self, owner: PeerID, tokens: tuple[bytes, bytes], *, now: float, origin: str = "") -> Splice:
        """Make room for a pair. `tokens`: two times 16 random bytes; `origin`: the host that the owner calls from.

        Raises: Overloaded.
        """
        share = Owner(range_of(origin) or owner, owner)
        if not self._shares.take(share, 1):
            raise Overloaded("this relay serves others: too many pairs, in all or of this peer", retry_after=5.0)
        splice = Splice(share, tokens, now + self._waiting_timeout)
        self._splices.add(splice)
        for token in tokens:
            self._by_token[token] = splice
        return splice

    def arrive(self, token: bytes, *, now: float) -> Splice | None:
        """Use up a token. Returns its splice, or None if it is unknown or has expired."""
        splice = self._by_token.pop(token, None)
        if splice is None or splice.expires_at <= now:
            return None
        splice.num_arrived += 1
        splice.last_active = now
        return splice

    def remove(self, splice: Splice) -> None:
        """Forget a splice that has ended. Repeating it does nothing."""
        if splice in self._splices:
            self._splices.remove(splice)
            self._shares.give_back(splice.owner, 1)
        for token in splice.tokens:
            self._by_token.pop(token, None)

    def expired(self, *, now: float) -> list[Splice]:
        silent_before = now - SILENT_TIMEOUT
        return [
            splice
            for splice in self._splices
            if (splice.expires_at <= now if splice.num_arrived < 2 else splice.last_active <= silent_before)
        ]

    def account(self, splice: Splice, count: int, *, now: float) -> float | None:
        """Count bytes that passed. Returns for how many seconds not to read this end, or None: part the pair."""
        splice.num_bytes += count
        splice.last_active = now
        if splice.num_bytes > self.settings.max_bytes:
            return None
        # a second's worth may pass at once; what has been received already may overdraw it
        return self._rate.take(count, now) if self._rate is not None else 0.0


class Relay:
    """Give it every accepted pipe that began with a relay's preamble."""

    def __init__(
        self,
        *,
        settings: RelaySettings,
        metrics: Metrics,
        throttle: Throttle | None = None,
        waiting_timeout: float = WAITING_TIMEOUT,
    ) -> None:
        most = room_for(descriptor_limit()).splices
        self.ledger = RelayLedger(settings, max_splices=most, waiting_timeout=waiting_timeout)
        self.metrics = metrics
        self.throttle = throttle
        # received bytes are copied within the call that tells of them, so one block serves all halves
        self.scratch = memoryview(bytearray(SCRATCH_BYTES))
        self._halves: dict[Splice, list[_Half]] = {}
        self._sweep: asyncio.TimerHandle | None = None
        self._sweep_every = min(1.0, waiting_timeout)
        self._closed = False

    def reserve(self, owner: PeerID, *, origin: str = "") -> tuple[bytes, bytes]:
        """Return two tokens: one for `owner`, who calls from `origin`, one for its peer. Raises: Overloaded."""
        tokens = secrets.token_bytes(16), secrets.token_bytes(16)
        loop = asyncio.get_running_loop()
        try:
            self.ledger.reserve(owner, tokens, now=loop.time(), origin=origin)
        except Overloaded:
            self.metrics.count("relay_refused", reason="full")
            raise
        self.metrics.set("relay_splices", len(self.ledger))
        if self._sweep is None and not self._closed:
            self._sweep = loop.call_later(self._sweep_every, self._sweep_now)
        return tokens

    def pipe_arrived(self, token: bytes, pipe: Pipe) -> None:
        """Take one end that has come, and join it with the other one, if that came before."""
        splice = self.ledger.arrive(token, now=asyncio.get_running_loop().time())
        if splice is None or self._closed:
            self.metrics.count("relay_refused", reason="unknown_token")
            pipe.abort()
            return
        half = _Half(self, splice, pipe)
        halves = self._halves.setdefault(splice, [])
        halves.append(half)
        pipe.start(half)
        if len(halves) == 1:
            pipe.pause_reading()  # its bytes wait in the kernel
            return
        first, second = halves
        first.other, second.other = second, first
        for one in halves:
            one.pipe.resume_reading()
        self.metrics.count("relay_joined")

    async def aclose(self) -> None:
        """Part all pairs; what they have not sent is lost."""
        self._closed = True
        if self._sweep is not None:
            self._sweep.cancel()
        for splice, halves in list(self._halves.items()):
            self._part(splice, "closing")
            for half in halves:
                half.pipe.abort()
        await asyncio.sleep(0)

    def _sweep_now(self) -> None:
        loop = asyncio.get_running_loop()
        for splice in self.ledger.expired(now=loop.time()):
            self._part(splice, "silent" if splice.num_arrived == 2 else "not_completed")
        self._sweep = loop.call_later(self._sweep_every, self._sweep_now) if len(self.ledger) else None

    def _part(self, splice: Splice, reason: str) -> None:
        if splice not in self.ledger:
            return
        self.ledger.remove(splice)
        self.metrics.count("relay_parted", reason=reason)
        self.metrics.set("relay_splices", len(self.ledger))
        for half in self._halves.pop(splice, []):
            half.end()


class _Half:
    """One end of a splice: what it receives, the other end sends. While that is slow, it is not read."""

    def __init__(self, relay: Relay, splice: Splice, pipe: Pipe) -> None:
        self.pipe = pipe
        self.other: _Half | None = None
        self._relay = relay
        self._splice = splice
        self._time = asyncio.get_running_loop().time
        self._resume: asyncio.TimerHandle | None = None

    def get_buffer(self, sizehint: int = -1, /) -> memoryview:
        return self._relay.scratch

    def buffer_updated(self, count: int) -> None:
        other = self.other
        assert other is not None
        relay = self._relay
        wait = relay.ledger.account(self._splice, count, now=self._time())
        if wait is None:
            relay._part(self._splice, "max_bytes")
            return
        if relay.throttle is not None:
            now = self._time()
            wait = max(wait, relay.throttle.received(count, now), relay.throttle.sent(count, now))
        relay.metrics.count("relay_bytes", count)
        other.pipe.write(bytes(relay.scratch[:count]))
        if other.pipe.paused:
            self.pipe.pause_reading()
        if wait > 0.01:
            self.pipe.pause_reading()
            if self._resume is None:
                self._resume = asyncio.get_running_loop().call_later(wait, self._resume_now)

    def _resume_now(self) -> None:
        self._resume = None
        if self.other is not None and not self.other.pipe.paused:
            self.pipe.resume_reading()

    def pipe_drained(self) -> None:
        if self.other is not None and self.other._resume is None:
            self.other.pipe.resume_reading()

    def pipe_lost(self, error: Exception | None) -> None:
        self._relay._part(self._splice, "ended")
        self.end()

    def end(self) -> None:
        if self._resume is not None:
            self._resume.cancel()
        self.pipe.close()


async def meet_at_relay(relay: PeerAddress, token: bytes, *, scope: AddressScope) -> Pipe:
    """Return a pipe to the holder of the other token of this pair. Raises: PeerUnreachable, OSError."""
    errors: dict[str, BaseException] = {}
    for address in (one for one in relay.addresses if scope.allows(split_host_port(one)[0])):
        try:
            pipe = await tcp.connect(address)
        except OSError as error:
            errors[address] = error
            continue
        pipe.write(preamble.encode_preamble(preamble.RELAY, token))
        pipe.description = f"relay {address}"
        return pipe
    raise PeerUnreachable(relay.short, errors)
