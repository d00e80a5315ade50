"""STUN binding (RFC 8489): tells a node that asks from which address its question seemed to come. No I/O.

A public node answers such questions on the UDP port of its DHT, so that hole punching needs no outside service. STUN
messages and the DHT's share the socket; `is_stun` tells them apart. aioice, which reads and writes the messages, is
imported with the first one.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from tesseract_async.errors import ProtocolError

if TYPE_CHECKING:
    from aioice.stun import Message

MAX_MESSAGE: Final = 548
"""Bytes of the largest message that is read: what fits every path's smallest datagram (RFC 8489, 6.1)."""


def is_stun(data: bytes | memoryview) -> bool:
    """Return whether this datagram claims to be STUN: two zero bits first, and the magic cookie in its place."""
    return len(data) >= 20 and data[0] < 0x40 and data[4:8] == b"\x21\x12\xa4\x42"


def encode_request(transaction_id: bytes) -> bytes:
    """A binding request without attributes. `transaction_id`: 12 random bytes."""
    return struct.pack(">HHI12s", 1, 0, 0x2112A442, transaction_id)


def decode_response(data: bytes) -> tuple[bytes, str, int]:
    """Transaction id, host and port of a binding response. Untrusted. Raises: ProtocolError."""
    message = _decode(data, "RESPONSE")
    address = message.attributes.get("XOR-MAPPED-ADDRESS")
    if address is None:
        raise ProtocolError("a STUN response without an address")
    return message.transaction_id, *address


def answer(data: bytes, source: tuple[str, int]) -> bytes | None:
    """Return the answer to `source` for this datagram; None if it deserves no answer (count it as dropped).

    The answer is at most 2.2 times as long as the question (1.6 times over IPv4), as RFC 8489 wants it.
    """
    from aioice.stun import ATTRIBUTES_BY_NAME, Class, Message, Method

    try:
        request = _decode(data, "REQUEST")
    except ProtocolError:
        return None
    # RFC 8489, 5: what is below 0x8000 must be understood. Credentials are pointless here, so nothing is.
    if any(ATTRIBUTES_BY_NAME[name][0] < 0x8000 for name in request.attributes):
        return None
    seen = source[0].partition("%")[0], source[1]  # a link-local address may carry its interface
    return bytes(Message(Method.BINDING, Class.RESPONSE, request.transaction_id, {"XOR-MAPPED-ADDRESS": seen}))


def _decode(data: bytes, kind: str) -> Message:
    from aioice.stun import Class, Method, parse_message

    try:
        message = parse_message(data) if is_stun(data) and len(data) <= MAX_MESSAGE else None
    except (ValueError, struct.error):
        message = None
    if message is None or (message.message_method, message.message_class) != (Method.BINDING, Class[kind]):
        raise ProtocolError(f"not a STUN binding {kind.lower()}")
    return message
