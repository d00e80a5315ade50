"""Datagrams and events on their way out of one node. Pure."""

import random as random_module
from collections.abc import Sequence
from dataclasses import dataclass, field

from tesseract_async.lru import LRU
from tesseract_async.metrics import Metrics
from tesseract_async.network import datagrams as wire
from tesseract_async.network.contacts import Address
from tesseract_async.network.events import NetworkEvent

MAX_WRITTEN_TO = 8192
FILTER_LIFETIME = 600.0
"""Seconds after which a gateway has certainly forgotten that something was sent to an address (RFC 4787: mappings and
filters live for minutes)."""


@dataclass(kw_only=True, eq=False)
class Outbox:
    """Queues of datagrams and events, and what the head of each datagram says about this node."""

    own_id: bytes
    random: random_module.Random
    metrics: Metrics
    role: str
    """``public`` if others can dial this node, ``client`` if they cannot, ``unknown`` until that is clear."""
    forced_client: bool = False
    """True where the node must be a client whatever its role."""
    datagrams: list[tuple[bytes, Address]] = field(default_factory=list)
    events: list[NetworkEvent] = field(default_factory=list)
    _written_to: LRU[Address, float] = field(default_factory=lambda: LRU(MAX_WRITTEN_TO))

    @property
    def public(self) -> bool:
        """True if others may list this node in their routing tables and store records here."""
        return self.role == "public" and not self.forced_client

    def flags(self) -> int:
        return 0 if self.public else wire.FLAG_CLIENT

    def send(self, data: bytes, address: Address) -> None:
        assert len(data) <= wire.MAX_DATAGRAM_BYTES, f"a datagram of {len(data)} bytes"
        self.datagrams.append((data, address))
        self.metrics.count("network_bytes_sent", len(data))

    def send_one_way(
        self, kind: int, arguments: Sequence[object], address: Address, token: bytes, now: float, *, padded: bool = True
    ) -> None:
        """Queue a request that nobody replies to. `padded`: bring it to the length of a request without a token."""
        if not self.public:
            self.note_sent(address, now)  # it opens this node's gateway, if there is one
        data = wire.encode_request(
            kind,
            self.flags(),
            self.new_transaction(),
            self.own_id,
            token=token,
            challenge=b"",
            arguments=arguments,
            padded=padded,
        )
        self.send(data, address)

    def new_transaction(self) -> bytes:
        return self.random.randbytes(wire.TRANSACTION_BYTES)

    def emit(self, event: NetworkEvent) -> None:
        self.events.append(event)

    def drop(self, reason: str) -> None:
        self.metrics.count("network_datagrams_dropped", reason=reason)

    def note_sent(self, address: Address, now: float) -> None:
        """Remember that a request went there; from a node that is not public, also a one-way datagram."""
        self._written_to[address] = now

    def note_reply_sent(self, address: Address, now: float) -> None:
        """Remember a reply only where a request was sent before: it keeps a gateway open, but did not open it."""
        if address in self._written_to:
            self._written_to[address] = now

    def has_written_to(self, address: Address, now: float) -> bool:
        """Return True if this node sent something there within what gateways remember."""
        return now - self._written_to.get(address, float("-inf")) < FILTER_LIFETIME
