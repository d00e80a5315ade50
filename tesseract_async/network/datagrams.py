"""The datagrams that nodes exchange, as bytes and as values. Pure.

::

    offset 0   magic (0x54), version, kind, flags          one byte each
           4   transaction                                 8 random bytes; a reply repeats its request's
          12   sender's peer id                            32 bytes
          44   body                                        a msgpack array

    request    [token, challenge, *arguments, padding?]
    reply      [observed address, token, proof, wall time, *results]

    PING       ()                        -> ()
    FIND       (target)                  -> (v4 contacts, v6 contacts)
    GET        (key)                     -> (count, digests, records, v4 contacts, v6 contacts)
    PAGE       (key, start, end)         -> (next or nil, records)
    STORE      ([key + record, ...])     -> (outcomes: a byte for each)
    LEAVE      ()                        no reply
    DIAL       (nonce)                   -> (whether it was passed on)
    DIAL_FOR   (address, nonce)          no reply; see `network.dial_back`
    DIALED     (nonce)                   no reply

The *token* in a request is one that its receiver gave to that address before (BEP 5): it proves the address. A request
without one is padded, and its reply kept within three times its length. The *challenge* asks the receiver to sign it,
once for each pair of nodes; the *proof* is its public key and signature over `proof_statement`.
"""

import math
import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import msgpack

from tesseract_async.errors import ProtocolError, UnsupportedVersion
from tesseract_async.identity import MAX_RECORD_BYTES, SignedRecord
from tesseract_async.network.contacts import ID_BYTES, V4_BYTES, V6_BYTES, Address, pack_address, unpack_address
from tesseract_async.network.storage import NUM_RANGES, StoreOutcome, Summary

MAGIC = 0x54
VERSION = 2
MAX_DATAGRAM_BYTES = 1200
"""No datagram is longer: it fits every path of the internet without fragments (RFC 9000, section 14)."""
MIN_REQUEST_BYTES = 400
"""A request without a token is padded to this, so that a full reply is never more than 3 x what was sent."""
AMPLIFICATION = 3
"""Reply bytes per request byte towards an address that has proven nothing."""

PING, FIND, GET, PAGE, STORE, LEAVE, DIAL, DIAL_FOR, DIALED = range(1, 10)
ONE_WAY = (LEAVE, DIAL_FOR)
"""Requests without a reply. A sender without a token would not learn one from them, so that they are dropped."""
REPLY = 0x80
"""Added to a request's kind in its reply."""

FLAG_CLIENT = 1
"""The sender cannot be dialed: serve it, but never list it."""

FLAG_AGAIN = 2
"""In a reply without results: the token is out of date (its giver restarted, say); ask again with this one."""

TOKEN_BYTES = 8
TOKEN_LIFETIME = 300.0
"""Seconds for which a token is good at least; at most twice as long."""
CHALLENGE_BYTES = 16
TRANSACTION_BYTES = 8
PROOF_BYTES = 96
PROOF_DOMAIN = b"tesseract contact proof 1\0"

_HEAD = struct.Struct(">BBBB8s32s")
_DIGESTS = struct.Struct(f">{NUM_RANGES}Q")
_pack = msgpack.Packer(use_bin_type=True).pack

MAX_ITEMS = 16
"""Records in one STORE or one page: what fits, with room to spare."""
STORE_ROOM = 1080
"""Bytes of records, their keys and msgpack heads that fit into one STORE."""


class Datagram(NamedTuple):
    """A datagram whose head is well-formed. `body` is any msgpack array: the `read_*` functions check it."""

    kind: int
    flags: int
    transaction: bytes
    sender: bytes
    body: list[object]


class RpcRequest(NamedTuple):
    token: bytes
    challenge: bytes
    arguments: list[object]


class RpcReply(NamedTuple):
    observed: Address
    """The address that the request came from."""
    token: bytes
    """The token for the next request to this node."""
    proof: bytes
    wall: float
    results: list[object]
    flags: int


def encode(kind: int, flags: int, transaction: bytes, sender: bytes, body: Sequence[object]) -> bytes:
    return _HEAD.pack(MAGIC, VERSION, kind, flags, transaction, sender) + bytes(_pack(body))


def encode_request(
    kind: int,
    flags: int,
    transaction: bytes,
    sender: bytes,
    *,
    token: bytes,
    challenge: bytes,
    arguments: Sequence[object],
    padded: bool = True,
) -> bytes:
    """Encode a request, padded if it holds no token, unless `padded` is False."""
    data = encode(kind, flags, transaction, sender, (token, challenge, *arguments))
    missing = MIN_REQUEST_BYTES - len(data)
    if padded and not token and missing > 0:
        # msgpack puts at least 2 bytes before the padding itself
        padding = bytes(max(0, missing - 2))
        data = encode(kind, flags, transaction, sender, (token, challenge, *arguments, padding))
    return data


def decode(data: bytes) -> Datagram:
    """Read an untrusted datagram. Raises: ProtocolError."""
    if len(data) > MAX_DATAGRAM_BYTES:
        raise ProtocolError("a datagram over 1,200 bytes")
    if len(data) <= _HEAD.size or data[0] != MAGIC:
        raise ProtocolError("not a datagram of this protocol")
    magic, version, kind, flags, transaction, sender = _HEAD.unpack_from(data)
    if version != VERSION:
        raise UnsupportedVersion(version, VERSION)
    try:
        body = msgpack.unpackb(data[_HEAD.size :], raw=False, strict_map_key=True)
    except (ValueError, TypeError, RecursionError, OverflowError, msgpack.UnpackException) as error:
        raise ProtocolError("a datagram whose body is not msgpack") from error
    if type(body) is not list:
        raise ProtocolError("a datagram whose body is not an array")
    return Datagram(kind, flags, transaction, sender, body)


def read_request(datagram: Datagram) -> RpcRequest:
    """Read the body of a request. Raises: ProtocolError."""
    token = _bytes_at(datagram.body, 0, "token", 0, TOKEN_BYTES)
    challenge = _bytes_at(datagram.body, 1, "challenge", 0, CHALLENGE_BYTES)
    return RpcRequest(token, challenge, datagram.body[2:])


def read_reply(datagram: Datagram) -> RpcReply:
    """Read the body of a reply. Raises: ProtocolError."""
    body = datagram.body
    observed = _bytes_at(body, 0, "address", V4_BYTES, V6_BYTES)
    token = _bytes_at(body, 1, "token", TOKEN_BYTES)
    proof = _bytes_at(body, 2, "proof", 0, PROOF_BYTES)
    wall = body[3] if len(body) > 3 else None
    if type(wall) is not float or not math.isfinite(wall):
        raise ProtocolError("a malformed time")
    return RpcReply(unpack_address(observed), token, proof, wall, body[4:], datagram.flags)


def proof_statement(challenge: bytes, asker: bytes, prover: bytes, observed: Address) -> bytes:
    """Return what a node signs to prove its id: the asker's nonce, both ids, and where it sees the asker."""
    return PROOF_DOMAIN + challenge + asker + prover + pack_address(observed)


def read_key(arguments: list[object]) -> bytes:
    """Read the 32-byte target of FIND and key of GET and PAGE. Raises: ProtocolError."""
    return _bytes_at(arguments, 0, "key", ID_BYTES)


def read_range(arguments: list[object]) -> tuple[int, int]:
    """Read start and end of a PAGE request. Raises: ProtocolError."""
    if len(arguments) < 3 or type(arguments[1]) is not int or type(arguments[2]) is not int:
        raise ProtocolError("a page without its range")
    start, end = arguments[1], arguments[2]
    # the end of the last range does not fit into msgpack's 64 bits: ends are sent inclusive
    if not 0 <= start <= end < 2**64:
        raise ProtocolError("a page whose range is empty")
    return start, end


def read_items(arguments: list[object]) -> list[tuple[bytes, bytes]]:
    """Read (key, record) of each item of a STORE. Raises: ProtocolError."""
    items = _byte_strings(arguments[0] if arguments else None)
    if any(len(item) <= ID_BYTES for item in items):
        raise ProtocolError("a record without its key")
    return [(item[:ID_BYTES], item[ID_BYTES:]) for item in items]


def read_nonce(arguments: list[object]) -> bytes:
    """Read the nonce of DIAL, DIAL_FOR (from its second argument on) and DIALED. Raises: ProtocolError."""
    return _bytes_at(arguments, 0, "nonce", TRANSACTION_BYTES)


def read_outcomes(results: list[object], count: int) -> list[StoreOutcome]:
    """Read the outcomes of `count` stored records. Raises: ProtocolError."""
    try:
        return [StoreOutcome(code) for code in _bytes_at(results, 0, "list of outcomes", count)]
    except ValueError:
        raise ProtocolError("an outcome that does not exist") from None


def write_summary(summary: Summary) -> tuple[int, bytes]:
    return summary.count, _DIGESTS.pack(*summary.digests)


def read_value(results: list[object]) -> tuple[Summary | None, list[bytes]]:
    """Read what a GET reply says of the key: its summary (None where nothing is held), and all records, if they fit.

    Raises: ProtocolError.
    """
    if len(results) < 5 or type(results[0]) is not int or type(results[1]) is not bytes:
        raise ProtocolError("a reply to GET cut short")
    count, packed = results[0], results[1]
    if count == 0:
        return None, []
    if not 0 < count < 2**32:
        raise ProtocolError("a dictionary of impossible size")
    if not packed:
        bodies = _byte_strings(results[2])
        if len(bodies) != count:
            raise ProtocolError("a dictionary without digests or records")
        return Summary(count, (0,) * NUM_RANGES), bodies
    if len(packed) != _DIGESTS.size:
        raise ProtocolError("range digests of the wrong length")
    return Summary(count, _DIGESTS.unpack(packed)), []


def read_page(results: list[object]) -> tuple[int | None, list[bytes]]:
    """Read where to go on (None at the end of the range), and the records. Raises: ProtocolError."""
    if len(results) < 2 or not (results[0] is None or (type(results[0]) is int and 0 <= results[0] < 2**64)):
        raise ProtocolError("a page without its cursor")
    return results[0], _byte_strings(results[1])


def store_parts(records: Sequence[SignedRecord]) -> Iterator[range]:
    """Yield slices of `records` that fit into one STORE each."""
    start, room = 0, STORE_ROOM
    for index, record in enumerate(records):
        size = ID_BYTES + len(record.body) + 3
        if index > start and (size > room or index - start == MAX_ITEMS):
            yield range(start, index)
            start, room = index, STORE_ROOM
        room -= size
    if len(records) > start:
        yield range(start, len(records))


def store_items(records: Sequence[SignedRecord]) -> Iterator[list[bytes]]:
    for part in store_parts(records):
        yield [records[index].key + records[index].body for index in part]


def _bytes_at(values: list[object], index: int, name: str, *lengths: int) -> bytes:
    value = values[index] if index < len(values) else None
    if type(value) is not bytes or len(value) not in lengths:
        raise ProtocolError(f"a malformed {name}")
    return value


def _byte_strings(value: object) -> list[bytes]:
    if type(value) is not list or len(value) > MAX_ITEMS:
        raise ProtocolError("records are a short list")
    for item in value:
        if type(item) is not bytes or len(item) > MAX_RECORD_BYTES + ID_BYTES:
            raise ProtocolError("records are byte strings")
    return value
