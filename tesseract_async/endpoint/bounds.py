"""Bounds that an endpoint keeps. Users have no reason to change them; tests of the machines do."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Bounds:
    """Bounds of an endpoint, and of each of its connections."""

    max_calls: int = 1024
    """Calls that the peer may have under way at once; it queues more on its own side."""
    max_small: int = 8 * 2**20
    """Bytes of small requests that the peer may have under way at once."""
    max_message: int = 2**30
    """Bytes of the largest message that is accepted."""
    window_bytes: int = 16 * 2**20
    """Room of the flow-control window at first: large messages within it need not ask."""
    max_backlog: int = 32 * 2**20
    """Bytes of unsent replies beyond which further calls of the peer wait before they are handled."""
    max_replies: int = 256 * 2**20
    """Bytes of large replies that may wait for the peer to take them (one reply always may); calls beyond that get
    Overloaded."""
    max_unsent: int = 96 * 2**20
    """Bytes of small frames waiting for a peer that does not read, beyond which it is closed."""
    bulk_retry: float = 30.0
    """Seconds between attempts to open a bulk lane."""
    ping_after: float = 3.0
    """Seconds without a received byte after which the peer is pinged."""
    dead_after: float = 9.0
    """Seconds without a received byte after which it counts as dead."""
    stall_after: float = 15.0
    """Seconds without progress (4 KiB) after which a half-received message is given up, and after which a bulk lane
    that is in use and does not answer a ping counts as dead, and its connection with it."""
    handshake_timeout: float = 5.0
    """Seconds for TLS and hello together."""
    max_half_open: int = 512
    """Accepted channels in the middle of their handshake."""
    max_half_open_per_host: int = 64
    """Such channels of one address range (IPv4 /24, IPv6 /64)."""
    max_connections: int = 4096
    """Connections in all, fewer if the process may not open that many files; idle ones make room for new ones."""
    max_connections_per_range: int = 128
    """Connections that one address range may have opened to this node. (Loopback does not count as a range.)"""
    max_connections_per_peer: int = 16
    """Connections that one peer may have opened to this node."""
    backoff_base: float = 0.1
    """Seconds before a failed dial is repeated, doubled by each failure."""
    backoff_max: float = 5.0
    """The most seconds before a failed dial is repeated."""


@dataclass(frozen=True, slots=True)
class EndpointSettings:
    """Settings of an `Endpoint`."""

    security: Literal["tls", "plain"] = "tls"
    """``plain`` proves and encrypts nothing: for a trusted local network only. Both ends must agree."""
    max_receive_bytes: int = 3 * 2**29
    """Memory for messages, to be lowered on small machines: bytes of large ones, half received or being answered, of
    all connections together; one peer may announce an eighth, or one message. Replies that wait to be taken may hold
    half as many (one peer's a quarter of these, or one), small calls under way a quarter (one peer's a third)."""
    bounds: Bounds = Bounds()
    """Bounds that tests of an endpoint make smaller."""
