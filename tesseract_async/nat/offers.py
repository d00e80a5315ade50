"""Offers and answers, by which two nodes get a pipe between them through a third one that they need not trust. Pure.

Both are signed, name their recipient and are fresh; an answer holds its offer's hash. So their carrier can lose them,
but do nothing else with them. `docs/design/nat.md` has the layout.
"""

import hashlib
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, TypeVar

import msgpack

from tesseract_async.errors import InvalidRecord, MessageTooLarge, ProtocolError
from tesseract_async.identity import Identity, PeerID, verify
from tesseract_async.lru import LRU
from tesseract_async.transport.base import join_host_port, split_host_port
from tesseract_async.transport.token_bucket import RateLimiter, TokenBucket
from tesseract_async.wire import packed

REVERSE: Final = "reverse"
"""Body: addresses and a token. Please dial me, I am reachable; the pipe is mine to open TLS on."""
CHANNEL: Final = "channel"
"""Body: `Description`, in the answer too. Let us punch a hole, at once and together."""
RELAY: Final = "relay"
"""Body: a relay and a token. Please meet me there."""
KINDS: Final = (REVERSE, CHANNEL, RELAY)

MAX_BYTES: Final = 4096
MAX_CANDIDATES: Final = 12
MAX_ADDRESSES: Final = 8
MAX_REASON: Final = 200
TOKEN_BYTES: Final = 16

CONTEXT: Final = b"tesseract offer 1\0"

T = TypeVar("T")


def field(body: object, name: str, kind: type[T]) -> T:
    """Return `body[name]`, of exactly this type. Untrusted. Raises: ProtocolError."""
    value = body.get(name) if type(body) is dict else None
    if type(value) is not kind:
        raise ProtocolError(f"{name} is missing or malformed")
    return value


@dataclass(frozen=True, slots=True)
class Candidate:
    """One address under which a side of a future data channel may be reached by UDP (RFC 8445)."""

    kind: str
    """``host``, ``srflx`` (as a STUN server saw it) or ``relay`` (RFC 8656)."""
    host: str
    port: int
    priority: int
    foundation: str


@dataclass(frozen=True, slots=True)
class Description:
    """One side of a data channel under negotiation: what SDP would say, without SDP."""

    username: str
    password: str
    fingerprint: bytes
    """SHA-256 of the DTLS certificate."""
    candidates: tuple[Candidate, ...]

    def pack(self) -> dict[str, object]:
        return {
            "username": self.username,
            "password": self.password,
            "fingerprint": self.fingerprint,
            "candidates": [[one.kind, one.host, one.port, one.priority, one.foundation] for one in self.candidates],
        }

    @classmethod
    def unpack(cls, body: object) -> "Description":
        """Untrusted. Addresses are literal and could belong to a peer. Raises: ProtocolError."""
        username, password = _ice_text(body, "username", 4), _ice_text(body, "password", 22)
        fingerprint, raw = field(body, "fingerprint", bytes), field(body, "candidates", list)
        if len(fingerprint) != 32:
            raise ProtocolError("a fingerprint has 32 bytes")
        if len(raw) > MAX_CANDIDATES:
            raise ProtocolError(f"a description has at most {MAX_CANDIDATES} candidates")
        return cls(username, password, fingerprint, tuple(_candidate(one) for one in raw))


def read_reverse(body: object) -> tuple[tuple[str, ...], bytes]:
    """Return the addresses to dial, and the token to begin with (see `preamble`). Untrusted. Raises: ProtocolError."""
    addresses = field(body, "addresses", list)
    if not 0 < len(addresses) <= MAX_ADDRESSES:
        raise ProtocolError(f"1 to {MAX_ADDRESSES} addresses are given, not {len(addresses)}")
    return tuple(_address(one) for one in addresses), _token(body)


def read_relay(body: object) -> tuple[PeerID, bytes]:
    """Return the relay to meet at, and the token to begin with there. Untrusted. Raises: ProtocolError."""
    return PeerID(field(body, "relay", bytes)), _token(body)


def _token(body: object) -> bytes:
    token = field(body, "token", bytes)
    if len(token) != TOKEN_BYTES:
        raise ProtocolError(f"a token has {TOKEN_BYTES} bytes")
    return token


def _ice_text(body: object, name: str, least: int) -> str:
    text = field(body, name, str)
    if not least <= len(text) <= 256 or not text.isascii() or not all(one.isalnum() or one in "+/" for one in text):
        raise ProtocolError(f"an offer's {name} does not follow RFC 8445")
    return text


def _candidate(raw: object) -> Candidate:
    if type(raw) is not list or [type(value) for value in raw] != [str, str, int, int, str]:
        raise ProtocolError("a malformed candidate")
    kind, host, port, priority, foundation = raw
    numbers_fit = 0 < port < 65536 and 0 <= priority < 2**32
    text_fits = 0 < len(foundation) <= 32 and foundation.isascii() and foundation.isprintable()
    if kind not in ("host", "srflx", "relay") or not numbers_fit or not text_fits:
        raise ProtocolError("a malformed candidate")
    return Candidate(kind, _ip(host), port, priority, foundation)


def _ip(text: str) -> str:
    try:
        ip = ipaddress.ip_address(text)
    except ValueError:
        raise ProtocolError("an offer's address is not an IP address") from None
    if ip.is_multicast or ip.is_unspecified or "%" in text or text == "255.255.255.255":
        raise ProtocolError("an offer's address cannot be a peer's")
    return str(ip)


def _address(raw: object) -> str:
    try:
        host, port = split_host_port(raw) if type(raw) is str and len(raw) <= 64 else ("", 0)
    except ValueError:
        port = 0
    if port == 0:
        raise ProtocolError("a malformed address in an offer")
    return join_host_port(_ip(host), port)


@dataclass(frozen=True, slots=True)
class Offer:
    """An offer whose signature holds. `body` is still untrusted: unpack it by `kind`."""

    sender: PeerID
    recipient: PeerID
    kind: str
    nonce: bytes
    time: float
    """Wall-clock seconds at the sender."""
    body: object
    hash: bytes
    """SHA-256 of the whole offer: what the answer refers to."""


@dataclass(frozen=True, slots=True)
class OfferAnswer:
    """An answer whose signature holds and which belongs to the offer that it was checked against."""

    accepted: bool
    reason: str
    """The reason why it was declined, for people."""
    body: object


def encode_offer(
    identity: Identity, recipient: PeerID, *, kind: str, body: Mapping[str, object], nonce: bytes, now: float
) -> bytes:
    """Sign an offer. `nonce`: 16 random bytes; `now`: wall-clock seconds. Raises: ValueError if it gets too long."""
    return _seal(identity, ["offer", bytes(recipient), nonce, int(now * 1000), kind, dict(body)])


def decode_offer(data: bytes, recipient: PeerID) -> Offer:
    """Read an offer. Untrusted; whether it is fresh and new, `OfferGuard` says.

    Raises: ProtocolError for malformed bytes; InvalidRecord for a wrong signature or another recipient.
    """
    sender, milliseconds, (nonce, kind, body) = _open(data, "offer", recipient)
    if type(nonce) is not bytes or len(nonce) != 16 or kind not in KINDS:
        raise ProtocolError("a malformed offer")
    return Offer(sender, recipient, kind, nonce, milliseconds / 1000, body, hashlib.sha256(data).digest())


def encode_answer(
    identity: Identity, offer: Offer, *, body: Mapping[str, object] | None, reason: str = "", now: float
) -> bytes:
    """Accept `offer` with `body`, or decline it (None) and say why."""
    kind, packed = ("yes", dict(body)) if body is not None else ("no", {"reason": reason[:MAX_REASON]})
    return _seal(identity, ["answer", bytes(offer.sender), offer.hash, int(now * 1000), kind, packed])


def decode_answer(data: bytes, offer: bytes, *, sender: PeerID, recipient: PeerID) -> OfferAnswer:
    """Read `sender`'s answer to the encoded `offer` that `recipient` made. Untrusted.

    Raises: ProtocolError for malformed bytes; InvalidRecord for a wrong signature, sender, recipient or offer.
    """
    signer, _, (offer_hash, kind, body) = _open(data, "answer", recipient)
    if signer != sender:
        raise InvalidRecord("an answer that somebody else signed")
    if offer_hash != hashlib.sha256(offer).digest():
        raise InvalidRecord("an answer to another offer")
    if kind == "yes":
        return OfferAnswer(True, "", body)
    if kind != "no":
        raise ProtocolError("a malformed answer")
    return OfferAnswer(False, field(body, "reason", str)[:MAX_REASON], None)


def _seal(identity: Identity, values: list[object]) -> bytes:
    payload: bytes = identity.public_key + msgpack.packb(values)
    data = identity.sign(CONTEXT + payload) + payload
    if len(data) > MAX_BYTES:
        raise ValueError(f"an offer has at most {MAX_BYTES} bytes, not {len(data)}")
    return data


def _open(data: bytes, what: str, recipient: PeerID) -> tuple[PeerID, int, tuple[object, str, object]]:
    if type(data) is not bytes or len(data) < 96:
        raise ProtocolError(f"a malformed {what}")
    if len(data) > MAX_BYTES:
        raise MessageTooLarge(len(data), MAX_BYTES)
    values = packed.unpack(data[96:], max_bytes=MAX_BYTES, any_keys=False)
    if type(values) is not list or len(values) != 6 or values[0] != what:
        raise ProtocolError(f"a malformed {what}")
    if type(values[3]) is not int or not 0 <= values[3] < 2**50 or type(values[4]) is not str:
        raise ProtocolError(f"a malformed {what}")
    if values[1] != bytes(recipient):
        raise InvalidRecord(f"an {what} for another peer")
    if not verify(data[64:96], data[:64], CONTEXT + data[64:]):
        raise InvalidRecord(f"an {what} whose signature does not hold")
    return PeerID.from_public_key(data[64:96]), values[3], (values[2], values[4], values[5])


MAX_SKEW: Final = 120.0
"""Seconds by which the sender's clock and travel time may differ from ours."""
MAX_PER_SENDER: Final = 20
"""The most offers of one peer per minute."""
MAX_PER_TARGET: Final = 12
"""The most offers per minute that make this node send to one host, all senders together."""
MAX_PER_MINUTE: Final = 300
"""The most offers of all peers per minute."""


class OfferGuard:
    """Decides which offers are worth work: fresh, never seen, and not too many. Bounded by `MAX_PER_MINUTE`."""

    def __init__(self) -> None:
        # as many as can have been accepted while the oldest of them was fresh
        self._seen: LRU[bytes, None] = LRU(int(MAX_PER_MINUTE * (1 + 2 * MAX_SKEW / 60)))
        self._all = TokenBucket(MAX_PER_MINUTE / 60, burst=MAX_PER_MINUTE)
        self._senders = RateLimiter(rate=MAX_PER_SENDER / 60, burst=MAX_PER_SENDER)
        self._targets = RateLimiter(rate=MAX_PER_TARGET / 60, burst=MAX_PER_TARGET)

    def refuse(self, offer: Offer, *, now: float, wall: float, target: str = "") -> str | None:
        """Return why not (a label for counters), or None: then the offer counts. `wall`: wall-clock seconds. `target`:
        the host that this node would send to.
        """
        if abs(offer.time - wall) > MAX_SKEW:
            return "stale"
        if offer.hash in self._seen:
            return "replayed"
        if not self._senders.allows(offer.sender, 1, now) or (target and not self._targets.allows(target, 1, now)):
            return "too_many"
        if not self._all.spend(1, now):
            return "too_many"
        self._seen[offer.hash] = None
        return None
