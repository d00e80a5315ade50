"""STUN binding (RFC 8489): who asks learns the address from which the question seemed to come. No I/O.

A public node answers such questions on the UDP port of its DHT, so that hole punching needs no outside service. STUN
messages and the DHT's share the socket; `is_stun` tells them apart by the first byte and the magic cookie.
"""

from __future__ import annotations

import ipaddress
import struct
from typing import Final

from tesseract_async.errors import ProtocolError

MAGIC_COOKIE: Final = 0x2112A442
REQUEST: Final = 0x0001
RESPONSE: Final = 0x0101
XOR_MAPPED_ADDRESS: Final = 0x0020
MAX_MESSAGE: Final = 548
"""Bytes of the largest message that is read: what fits every path's smallest datagram (RFC 8489, 6.1)."""

_HEADER: Final = struct.Struct(">HHI12s")
_FAMILIES: Final = {4: 1, 6: 2}


def is_stun(data: bytes | memoryview) -> bool:
    """Return whether this datagram claims to be STUN: two zero bits first, and the magic cookie in its place."""
    return len(data) >= 20 and data[0] < 0x40 and data[4:8] == b"\x21\x12\xa4\x42"


def encode_request(transaction_id: bytes) -> bytes:
    """A binding request without attributes. `transaction_id`: 12 random bytes."""
    return _HEADER.pack(REQUEST, 0, MAGIC_COOKIE, transaction_id)


def decode_request(data: bytes) -> bytes:
    """The transaction id of a binding request. Untrusted. Raises: ProtocolError for anything else."""
    kind, transaction_id = _decode_header(data)
    if kind != REQUEST:
        raise ProtocolError("not a STUN binding request")
    for attribute, _ in _attributes(data):
        # RFC 8489, 5: what is below 0x8000 must be understood. Credentials are pointless here, so nothing is.
        if attribute < 0x8000:
            raise ProtocolError("a STUN request asks for more than its address")
    return transaction_id


def encode_response(transaction_id: bytes, host: str, port: int) -> bytes:
    """The answer to a request that came from `host` (an IP address) and `port`."""
    ip = ipaddress.ip_address(host)
    value = struct.pack(">xBH", _FAMILIES[ip.version], port ^ (MAGIC_COOKIE >> 16))
    value += _masked(ip.packed, transaction_id)
    attribute = struct.pack(">HH", XOR_MAPPED_ADDRESS, len(value)) + value
    return _HEADER.pack(RESPONSE, len(attribute), MAGIC_COOKIE, transaction_id) + attribute


def decode_response(data: bytes) -> tuple[bytes, str, int]:
    """Transaction id, host and port of a binding response. Untrusted. Raises: ProtocolError."""
    kind, transaction_id = _decode_header(data)
    if kind != RESPONSE:
        raise ProtocolError("not a STUN binding response")
    for attribute, value in _attributes(data):
        if attribute == XOR_MAPPED_ADDRESS:
            if len(value) not in (8, 20) or value[1] != (1 if len(value) == 8 else 2):
                raise ProtocolError("a malformed address in a STUN response")
            port = int.from_bytes(value[2:4], "big") ^ (MAGIC_COOKIE >> 16)
            return transaction_id, str(ipaddress.ip_address(_masked(value[4:], transaction_id))), port
    raise ProtocolError("a STUN response without an address")


def answer(data: bytes, source: tuple[str, int]) -> bytes | None:
    """Return the answer to `source` for this datagram; None if it deserves none (count it as dropped).

    The answer is at most 2.2 times as long as the question (1.6 times over IPv4), as RFC 8489 wants it.
    """
    try:
        transaction_id = decode_request(data)
    except ProtocolError:
        return None
    host = source[0].partition("%")[0]  # a link-local address may carry its interface
    return encode_response(transaction_id, host, source[1])


def _decode_header(data: bytes) -> tuple[int, bytes]:
    if not is_stun(data) or len(data) > MAX_MESSAGE:
        raise ProtocolError("not a STUN message")
    kind, length, _, transaction_id = _HEADER.unpack_from(data)
    if length % 4 or length != len(data) - _HEADER.size:
        raise ProtocolError("a STUN message of the wrong length")
    return kind, transaction_id


def _attributes(data: bytes) -> list[tuple[int, bytes]]:
    found = []
    position = _HEADER.size
    while position < len(data):
        attribute, length = struct.unpack_from(">HH", data, position)  # lengths are multiples of 4: 4 bytes are there
        start, position = position + 4, position + 4 + length + -length % 4
        if position > len(data):
            raise ProtocolError("a STUN attribute is longer than its message")
        found.append((attribute, data[start : start + length]))
    return found


def _masked(address: bytes, transaction_id: bytes) -> bytes:
    mask = MAGIC_COOKIE.to_bytes(4, "big") + transaction_id
    return bytes(one ^ other for one, other in zip(address, mask, strict=False))
