"""The heads of requests and replies, and the hello: the msgpack side of `wire.frames`.

Everything that decodes takes untrusted values and raises only `ProtocolError`.
"""

import struct
from dataclasses import dataclass
from typing import Final, NamedTuple

from tesseract_async.errors import (
    ExpertFailed,
    ExpertNotFound,
    InputsForgotten,
    NotAllowed,
    NotPrimary,
    Overloaded,
    ProtocolError,
    RemoteError,
    SchemaMismatch,
    TooStale,
    UnknownMethod,
    UnsupportedVersion,
    printable,
    text_of,
)
from tesseract_async.wire import frames
from tesseract_async.wire.packed import Value

MAX_METHOD_LENGTH: Final = 128
MAX_SENTENCE_LENGTH: Final = 2000
MAX_GRANTS: Final = 4
"""Grants in one hello, at most."""
MAX_GRANT_BYTES: Final = 480
MAX_FEATURES: Final = 64
MAX_FEATURE_LENGTH: Final = 32
REPLY_PARTS: Final = "reply_parts"
"""The feature of nodes that take replies in parts."""
FEATURES: Final = frozenset({REPLY_PARTS})
"""The features of this version."""
MAX_TIMEOUT: Final = 7 * 24 * 3600.0
"""The most seconds that a call may take: the header's value is bounded so that a deadline is always a valid time."""

_ERRORS: dict[str, type[RemoteError]] = {
    kind.code: kind
    for kind in (
        *(ExpertNotFound, SchemaMismatch, Overloaded, ExpertFailed),
        *(InputsForgotten, NotPrimary, NotAllowed, UnknownMethod, TooStale, RemoteError),
    )
}


class RequestHead(NamedTuple):  # not a dataclass: one is made for every call, and a frozen one takes 2 us
    method: str
    time_left: float
    """Seconds until the caller stops waiting."""
    priority: int
    reply_room: int
    """Bytes that the caller has reserved for the reply; 0: none, a large reply asks first."""
    max_reply: int
    """Bytes that the reply may have at most."""
    body: Value


def encode_request(head: RequestHead, time_left: float | None = None) -> bytes:
    """`time_left`: what is left by now. Raises: TypeError or ValueError if the body is not what msgpack can hold."""
    method, seconds, priority, reply_room, max_reply, body = head
    milliseconds = int((seconds if time_left is None else time_left) * 1000) + 1
    return frames.pack((method, milliseconds, priority, reply_room, max_reply, body))


def decode_request(value: Value) -> RequestHead:
    """Read a request's unpacked head. Untrusted. Raises: ProtocolError."""
    if type(value) is not list or len(value) != 6:
        raise ProtocolError("a request's head is not a list of six")
    method, milliseconds, priority, reply_room, max_reply, body = value
    if type(method) is not str or not 0 < len(method) <= MAX_METHOD_LENGTH:
        raise ProtocolError("malformed method name")
    if type(milliseconds) is not int or not 0 < milliseconds <= MAX_TIMEOUT * 1000 + 1:
        raise ProtocolError("malformed timeout")
    if type(priority) is not int or not -128 <= priority <= 127:
        raise ProtocolError("malformed priority")
    if type(reply_room) is not int or type(max_reply) is not int or not 0 <= reply_room <= max_reply < 2**63:
        raise ProtocolError("malformed reply limits")
    # its own way of making one takes a Python call more
    return tuple.__new__(RequestHead, (method, milliseconds / 1000, priority, reply_room, max_reply, body))


def encode_result(body: Value) -> bytes:
    """The head of a reply that holds a result. Raises: TypeError or ValueError, as `encode_request`."""
    return frames.pack((0, body))


def encode_error(error: RemoteError) -> bytes:
    """The head of a reply that holds an error. Never raises: its caller waits for an answer.

    Details that do not fit are left out; what UTF-8 cannot hold is escaped.
    """
    code, sentence = (text_of(lambda: error.code), text_of(lambda: str(error))[:MAX_SENTENCE_LENGTH])
    try:
        packed = frames.pack((1, code, sentence, error.details))
    except Exception:  # details are the handler's: they may hold anything
        packed = b""
    return packed if 0 < len(packed) <= frames.MAX_SMALL // 2 else frames.pack((1, code, sentence, {}))


def decode_reply(value: Value) -> tuple[Value, RemoteError | None]:
    """Read a reply's unpacked head: a body, or an error in its class by `code`. Untrusted. Raises: ProtocolError."""
    if type(value) is list and len(value) == 2 and value[0] == 0:
        return value[1], None
    if type(value) is not list or len(value) != 4 or value[0] != 1:
        raise ProtocolError("a reply's head is neither a result nor an error")
    return None, decode_error(*value[1:])


def decode_error(code: Value, sentence: Value, details: Value) -> RemoteError:
    """Return an error in its class by `code`. Untrusted. Raises: ProtocolError."""
    if type(code) is not str or type(sentence) is not str or type(details) is not dict:
        raise ProtocolError("a reply holds a malformed error")
    kind, sentence = _ERRORS.get(code, RemoteError), printable(sentence[:MAX_SENTENCE_LENGTH])
    if kind is Overloaded or kind is NotPrimary:
        after = details.get("retry_after", 0.0)
        after = float(after) if type(after) in (int, float) and 0 <= after <= 3600 else 0.0
        if kind is Overloaded:
            return Overloaded(sentence, retry_after=after)
        primary = details.get("primary")
        known = type(primary) is bytes and len(primary) == 32
        return NotPrimary(sentence, primary=primary if known else None, retry_after=after)
    error = kind(sentence)
    error.details = {key: item for key, item in details.items() if type(key) is str}
    return error


_HELLO = struct.Struct(">4sH")
_MAGIC: Final = b"TSRA"
_HELLO_FIELDS: Final = ("session", "bulk", "peer_id", "max_calls", "max_small", "max_message")


@dataclass(frozen=True, slots=True)
class Hello:
    session: bytes
    """16 random bytes of the dialer's choice; the channels of one connection share them."""
    bulk: bool
    """True if this channel carries large messages of an existing connection."""
    peer_id: bytes
    """The speaker's id. TLS has proven it already; on a plain channel it is a mere claim."""
    max_calls: int
    """Calls that the receiver of this hello may have under way at once."""
    max_small: int
    """Bytes of small requests that it may have under way at once."""
    max_message: int
    """Bytes of the largest message that it may send."""
    grants: tuple[bytes, ...] = ()
    """Grants that say what the speaker may do in runs: records signed by the runs' owners, at most `MAX_GRANTS`."""
    features: frozenset[str] = frozenset()
    """Names of the features that the speaker understands beyond version 2. Others must not be sent to it."""


def encode_hello(hello: Hello) -> bytes:
    """The payload of a HELLO frame: magic and wire version, readable for ever, then a map."""
    values: dict[str, Value] = {name: getattr(hello, name) for name in _HELLO_FIELDS}
    if hello.grants:
        values["grants"] = hello.grants
    if hello.features:
        values["features"] = sorted(hello.features)
    return _HELLO.pack(_MAGIC, frames.VERSION) + frames.pack(values)


def decode_hello(payload: memoryview) -> Hello:
    """Untrusted. Unknown fields are ignored. Raises: UnsupportedVersion, ProtocolError."""
    if len(payload) < _HELLO.size:
        raise ProtocolError("malformed hello")
    magic, version = _HELLO.unpack_from(payload)
    if magic != _MAGIC:
        raise ProtocolError("the peer does not speak this protocol")
    if version != frames.VERSION:
        raise UnsupportedVersion(version, frames.VERSION)
    values = frames.unpack(payload[_HELLO.size :])
    if type(values) is not dict:
        raise ProtocolError("malformed hello")
    fields: list[Value] = [values.get(name) for name in _HELLO_FIELDS]
    session, bulk, peer_id, max_calls, max_small, max_message = fields
    grants, features = values.get("grants", []), values.get("features", [])
    is_valid = (
        (type(session) is bytes and len(session) == 16 and type(bulk) is bool)
        and (type(peer_id) is bytes and len(peer_id) == 32)
        and all(type(limit) is int and 0 < limit < 2**63 for limit in fields[3:])
        and (type(grants) is list and len(grants) <= MAX_GRANTS)
        and all(type(grant) is bytes and len(grant) <= MAX_GRANT_BYTES for grant in grants)
        and (type(features) is list and len(features) <= MAX_FEATURES)
        and all(type(name) is str and 0 < len(name) <= MAX_FEATURE_LENGTH for name in features)
    )
    if not is_valid:
        raise ProtocolError("malformed hello")
    known = FEATURES.intersection(features)
    return Hello(session, bulk, peer_id, max_calls, max_small, max_message, tuple(grants), known)
