"""Contacts (an id at an address), how they are packed, and which addresses count as one range. Pure."""

import ipaddress
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from tesseract_async.errors import ProtocolError
from tesseract_async.network.address_scope import PUBLIC, kind_of

Address = tuple[str, int]
"""A numeric IPv4 or IPv6 host, and a UDP port."""

V4_BYTES = 6
V6_BYTES = 18
ID_BYTES = 32


@lru_cache(maxsize=4096)
def pack_address(address: Address) -> bytes:
    """Return 6 bytes for IPv4, 18 for IPv6: the address, then the port, in network order.

    An IPv4 address that a dual-stack socket shows as ``::ffff:a.b.c.d`` is packed as IPv4.

    Raises: ValueError for a host that is not numeric or a port out of range.
    """
    host, port = address
    ip = ipaddress.ip_address(host.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped
    if not 0 < port < 65536:
        raise ValueError(f"not a port: {port}")
    return ip.packed + port.to_bytes(2, "big")


@lru_cache(maxsize=4096)
def unpack_address(raw: bytes) -> Address:
    """Return the address that `pack_address` packed. Takes untrusted bytes.

    Raises: ProtocolError for another length, port 0, or an address where nobody can be dialed.
    """
    if len(raw) not in (V4_BYTES, V6_BYTES):
        raise ProtocolError("a packed address has 6 or 18 bytes")
    ip = ipaddress.ip_address(raw[:-2])
    port = int.from_bytes(raw[-2:], "big")
    if port == 0 or ip.is_multicast or ip.is_unspecified or raw[:-2] == b"\xff\xff\xff\xff":
        raise ProtocolError("an address that cannot be dialed")
    return str(ip), port


@lru_cache(maxsize=4096)
def address_range(address: Address) -> bytes | None:
    """Return the range by which limits count: the /24 of an IPv4 address, the /48 of an IPv6 one.

    None for loopback and private addresses, where one range says nothing about who is who.
    """
    if kind_of(address[0].partition("%")[0]) != PUBLIC:
        return None
    packed = pack_address(address)
    return packed[:3] if len(packed) == V4_BYTES else packed[:6]


def source_of(address: Address) -> bytes:
    """Return what counts as one source: an address range, or an address and port where ranges say nothing."""
    return address_range(address) or pack_address(address)


@dataclass(slots=True, eq=False)
class Contact:
    peer_id: bytes
    address: Address
    raw: bytes = field(init=False)
    number: int = field(init=False)
    range: bytes | None = field(init=False)
    proven: bool = False
    """True once it has shown, by a signed nonce from this address, that the id is its own."""
    last_seen: float = float("-inf")
    """Loop time of its last message that can't have been forged from off the path."""
    token: bytes = b""
    """The token that it gave this node, as proof of this node's address."""
    token_until: float = float("-inf")
    late: bool = False
    """True if a request to it has passed its timeout and nothing was heard since."""
    rtt: float | None = None
    """Smoothed round trip in seconds (RFC 6298)."""
    rtt_variation: float = 0.0

    def __post_init__(self) -> None:
        self.raw = self.peer_id + pack_address(self.address)
        self.number = int.from_bytes(self.peer_id, "big")
        self.range = address_range(self.address)

    def observe_round_trip(self, seconds: float) -> None:
        """Feed the estimate with a round trip that had no retransmission (Karn's rule)."""
        if self.rtt is None:
            self.rtt, self.rtt_variation = seconds, seconds / 2
        else:
            self.rtt_variation += (abs(self.rtt - seconds) - self.rtt_variation) / 4
            self.rtt += (seconds - self.rtt) / 8

    def __repr__(self) -> str:
        return f"Contact({self.peer_id.hex()[:8]}… at {self.address[0]}:{self.address[1]})"


def few_per_range(contacts: Iterable[Contact], most: int) -> list[Contact]:
    """Return the first `most` contacts of each address range, and all that have none, in order."""
    ranges: Counter[bytes] = Counter()
    few: list[Contact] = []
    for contact in contacts:
        if contact.range is not None:
            ranges[contact.range] += 1
            if ranges[contact.range] > most:
                continue
        few.append(contact)
    return few


def pack_contacts(contacts: Sequence[Contact], room: int) -> tuple[bytes, bytes]:
    """Return the first contacts that fit into `room` bytes: those with IPv4 addresses, those with IPv6."""
    raws = [contact.raw for contact in contacts]
    packed = b"".join(raws)
    if len(packed) == len(raws) * (ID_BYTES + V4_BYTES) <= room:
        return packed, b""
    v4: list[bytes] = []
    v6: list[bytes] = []
    for raw in raws:
        room -= len(raw)
        if room < 0:
            break
        (v4 if len(raw) == ID_BYTES + V4_BYTES else v6).append(raw)
    return b"".join(v4), b"".join(v6)


def split_contacts(v4: object, v6: object, limit: int) -> list[bytes]:
    """Return the `Contact.raw` of each packed contact. Takes untrusted values.

    Raises: ProtocolError for another type, a broken length, or more than `limit` contacts.
    """
    if type(v4) is not bytes or type(v6) is not bytes:
        raise ProtocolError("contacts are packed in bytes")
    raws: list[bytes] = []
    for packed, size in ((v4, ID_BYTES + V4_BYTES), (v6, ID_BYTES + V6_BYTES)):
        if len(packed) % size:
            raise ProtocolError("packed contacts are cut short")
        if len(raws) + len(packed) // size > limit:
            raise ProtocolError("more contacts than anybody asked for")
        raws += [packed[start : start + size] for start in range(0, len(packed), size)]
    return raws
