"""How an endpoint behaves, and the bounds that it keeps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tesseract_async.endpoint.protocol import ProtocolSettings


@dataclass(frozen=True, slots=True)
class EndpointSettings:
    """How an `Endpoint` behaves."""

    security: Literal["tls", "plain"] = "tls"
    """``plain`` proves and encrypts nothing: for a trusted local network only. Both ends must agree."""
    protocol: ProtocolSettings = field(default_factory=ProtocolSettings)
    """Bounds of each connection."""
    max_receive_bytes: int = 2**30
    """Bytes of large messages that all connections together may have reserved, half received or being answered."""
    handshake_timeout: float = 5.0
    """Seconds for TLS and hello together."""
    max_half_open: int = 512
    """Accepted channels in the middle of their handshake."""
    max_half_open_per_host: int = 64
    """... of one remote address."""
    max_connections: int = 4096
    """Connections in all; more are refused."""
    max_connections_per_peer: int = 16
    """Connections that one peer may have opened to this node."""
    idle_timeout: float = 300.0
    """Seconds without a call after which a connection that was dialled here is closed."""
    backoff_base: float = 0.1
    """Seconds before a failed dial is repeated, doubled by each failure."""
    backoff_max: float = 5.0
