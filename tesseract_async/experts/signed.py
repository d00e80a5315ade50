"""Signed records: how whoever has authority over a run, or leads an expert of it, says so. No I/O.

On the wire: the signer's public key (32 bytes), the signature (64) over a domain and the body, and the body, which is
canonical msgpack: packing what it unpacks to gives the same bytes, so one meaning has one form. The domain says what
kind of record it is (``b"tesseract grant 1\\0"``): nobody can show a record of one kind as one of another.
"""

from __future__ import annotations

import hashlib
from typing import Any, Final, NamedTuple

import msgpack

from tesseract_async.errors import InvalidRecord, ProtocolError
from tesseract_async.identity import Identity, PeerID, verify
from tesseract_async.wire import packed

HEAD_BYTES: Final = 96
"""The public key and the signature, before the body."""
MAX_SIGNED_BYTES: Final = 16 * 1024


class Signed(NamedTuple):
    """A record whose signature holds, and nothing else is known of: the body is still anybody's."""

    signer: PeerID
    body: Any
    blob: bytes
    """The whole on the wire."""
    digest: bytes
    """32 bytes that name it: a hash of domain, signer and body. Signing the same again gives the same digest."""


def sign_body(identity: Identity, domain: bytes, body: Any, *, max_bytes: int = MAX_SIGNED_BYTES) -> Signed:
    """Signs `body`: lists, dicts with text keys, text, bytes, numbers, truth values and None.

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


def read_signer(blob: Any, *, max_bytes: int = MAX_SIGNED_BYTES) -> PeerID:
    """Who claims to have signed, for the price of one hash: to drop what cannot matter before its signature is checked.

    Untrusted. Raises: ProtocolError unless it has the size of a record.
    """
    if type(blob) is not bytes or not HEAD_BYTES < len(blob) <= max_bytes:
        raise ProtocolError(f"a signed record consists of {HEAD_BYTES + 1} to {max_bytes} bytes")
    return PeerID.from_public_key(blob[:32])


def read_signed(blob: Any, domain: bytes, *, max_bytes: int = MAX_SIGNED_BYTES) -> Signed:
    """Reads and verifies a record of this domain. Untrusted.

    Raises: ProtocolError (InvalidRecord if the signature does not hold).
    """
    _check_domain(domain)
    signer = read_signer(blob, max_bytes=max_bytes)
    if not verify(blob[:32], blob[32:HEAD_BYTES], domain + blob[HEAD_BYTES:]):
        raise InvalidRecord("the signature of a signed record does not hold")
    return Signed(signer, _unpack(blob[HEAD_BYTES:]), blob, _digest(domain, blob))


def _unpack(data: bytes) -> Any:
    body = packed.unpack(data, max_bytes=MAX_SIGNED_BYTES, any_keys=False)
    if msgpack.packb(body) != data:
        raise ProtocolError("a signed record that is not canonical: a map names a key twice, or a number is too wide")
    return body


def _digest(domain: bytes, blob: bytes) -> bytes:
    return hashlib.sha256(domain + blob[:32] + blob[HEAD_BYTES:]).digest()


def _check_domain(domain: bytes) -> None:
    # one \0, at the end: so no domain begins another, and where the body begins is never in doubt
    assert domain.endswith(b"\0") and domain.count(b"\0") == 1, "a domain is a name that ends with a zero byte"
