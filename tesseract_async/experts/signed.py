"""Signed records: how the owner of a run, or the primary of an expert, says something that everybody can check. No I/O.

On the wire: the signer's public key (32 bytes), the signature (64) over a domain and the body, and the body, which is
canonical msgpack: packing what it unpacks to gives the same bytes, so one meaning has one form. The domain says what
kind of record it is (``b"tesseract grant 1\\0"``): nobody can show a record of one kind as one of another.

Most bodies are lists of fields, which a `Format` declares.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Final, Generic, NamedTuple, TypeVar

import msgpack

from tesseract_async.errors import InvalidRecord, ProtocolError
from tesseract_async.identity import Identity, PeerID, verify
from tesseract_async.wire import packed

HEAD_BYTES: Final = 96
"""The public key and the signature, before the body."""
MAX_SIGNED_BYTES: Final = 16 * 1024


class Signed(NamedTuple):
    """A record whose signature holds; its body has not been looked at yet."""

    signer: PeerID
    body: object
    blob: bytes
    """The whole record on the wire."""
    digest: bytes
    """32 bytes that name it: a hash of domain, signer and body. Signing the same again gives the same digest."""


def sign_body(identity: Identity, domain: bytes, body: object, *, max_bytes: int = MAX_SIGNED_BYTES) -> Signed:
    """Sign `body`: lists, dicts with text keys, text, bytes, numbers, truth values and None.

    Raises: ValueError if the record is too large or the body would not come back as it is; TypeError for what msgpack
    cannot hold.
    """
    _check_domain(domain)
    data = msgpack.packb(body)
    blob = identity.public_key + identity.sign(domain + data) + data
    if len(blob) > max_bytes:
        raise ValueError(f"a signed record has at most {max_bytes} bytes; this one has {len(blob)}")
    try:
        body = _unpack(data)
    except ProtocolError as error:
        raise ValueError(str(error)) from None
    return Signed(identity.peer_id, body, blob, _digest(domain, blob))


def read_signer(blob: object, *, max_bytes: int = MAX_SIGNED_BYTES) -> PeerID:
    """Return who claims to have signed, at the cost of one hash: enough to drop what cannot matter unverified.

    Untrusted. Raises: ProtocolError unless it has the size of a record.
    """
    return PeerID.from_public_key(_check_size(blob, max_bytes)[:32])


def read_signed(blob: object, domain: bytes, *, max_bytes: int = MAX_SIGNED_BYTES) -> Signed:
    """Read and verify a record of this domain. Untrusted.

    Raises: ProtocolError (InvalidRecord if the signature does not hold).
    """
    _check_domain(domain)
    data = _check_size(blob, max_bytes)
    if not verify(data[:32], data[32:HEAD_BYTES], domain + data[HEAD_BYTES:]):
        raise InvalidRecord("the signature of a signed record does not hold")
    return Signed(PeerID.from_public_key(data[:32]), _unpack(data[HEAD_BYTES:]), data, _digest(domain, data))


R = TypeVar("R")


class Format(Generic[R]):
    """The form of one kind of record: its domain, and the fields of its body in order."""

    def __init__(
        self, domain: bytes, fields: Sequence[Callable[[object], object]], make: Callable[..., R], *, max_bytes: int
    ) -> None:
        """`fields` read one value each, and raise ProtocolError for what does not fit. `make` is called with these
        values, the signer, the bytes and the digest; it may raise ProtocolError, too."""
        self.domain = domain
        self._fields = tuple(fields)
        self._make = make
        self._max_bytes = max_bytes

    def sign(self, identity: Identity, *body: object) -> R:
        """Sign these fields, in the form that they have on the wire.

        Raises: ValueError if the record is too large; ProtocolError for one that nobody would believe.
        """
        return self._read(sign_body(identity, self.domain, list(body), max_bytes=self._max_bytes))

    def read(self, blob: object) -> R:
        """Read and verify. Untrusted. Raises: ProtocolError (InvalidRecord if the signature does not hold)."""
        return self._read(read_signed(blob, self.domain, max_bytes=self._max_bytes))

    def _read(self, signed: Signed) -> R:
        body = signed.body
        if type(body) is not list or len(body) != len(self._fields):
            raise ProtocolError("a record with too few or too many fields")
        values = [read(value) for read, value in zip(self._fields, body, strict=True)]
        return self._make(*values, signed.signer, signed.blob, signed.digest)


def number(below: int = 2**63) -> Callable[[object], int]:
    """A field that is a whole number from 0 on."""

    def read(value: object) -> int:
        if type(value) is not int or not 0 <= value < below:
            raise ProtocolError("a record with a number out of range")
        return value

    return read


def octets(length: int) -> Callable[[object], bytes]:
    """A field of so many bytes."""

    def read(value: object) -> bytes:
        if type(value) is not bytes or len(value) != length:
            raise ProtocolError("a record with malformed bytes")
        return value

    return read


def peer(value: object) -> PeerID:
    """A field that is a peer id."""
    return PeerID(octets(32)(value))


def peers(value: object) -> tuple[PeerID, ...]:
    """A field that is a list of peer ids."""
    if type(value) is not list:
        raise ProtocolError("a record with a malformed list of peers")
    return tuple(map(peer, value))


def optional(field: Callable[[object], R]) -> Callable[[object], R | None]:
    """A field that may be None instead."""
    return lambda value: None if value is None else field(value)


def _check_size(blob: object, max_bytes: int) -> bytes:
    if type(blob) is not bytes or not HEAD_BYTES < len(blob) <= max_bytes:
        raise ProtocolError(f"a signed record consists of {HEAD_BYTES + 1} to {max_bytes} bytes")
    return blob


def _unpack(data: bytes) -> object:
    body: object = packed.unpack(data, max_bytes=MAX_SIGNED_BYTES, any_keys=False)
    if msgpack.packb(body) != data:
        raise ProtocolError("a signed record that is not canonical: a map names a key twice, or a number is too wide")
    return body


def _digest(domain: bytes, blob: bytes) -> bytes:
    return hashlib.sha256(domain + blob[:32] + blob[HEAD_BYTES:]).digest()


def _check_domain(domain: bytes) -> None:
    # one \0, at the end: so no domain begins another, and where the body begins is never in doubt
    assert domain.endswith(b"\0") and domain.count(b"\0") == 1, "a domain is a name that ends with a zero byte"
