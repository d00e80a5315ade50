"""Signed records: statements of the owner of a run, or the primary of an expert, that everybody can check. No I/O.

On the wire: the signer's public key (32 bytes), the signature (64) over a domain and the body, and the body, which is
canonical msgpack: packing what it unpacks to gives the same bytes, so one meaning has one form. The domain says what
kind of record it is (``b"tesseract grant 1\\0"``): nobody can show a record of one kind as one of another.

A `Format` declares one kind of record; most bodies are lists of fields (`listed`).
"""

import hashlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Final, Generic, TypeVar

import msgpack

from tesseract_async.errors import InvalidRecord, ProtocolError
from tesseract_async.identity import Identity, PeerID, verify
from tesseract_async.wire import packed

HEAD_BYTES: Final = 96
"""The public key and the signature, before the body."""
MAX_SIGNED_BYTES: Final = 16 * 1024
R = TypeVar("R")


def read_signer(blob: object) -> PeerID:
    """Return who claims to have signed, at the cost of one hash: enough to drop records that cannot matter, without
    verifying them.

    Untrusted. Raises: ProtocolError unless it has the size of a record.
    """
    return PeerID.from_public_key(_check_size(blob, MAX_SIGNED_BYTES)[:32])


class Format(Generic[R]):
    """One kind of signed record: its domain, its size, and how a body is read."""

    def __init__(
        self,
        domain: bytes,
        make: Callable[[object, PeerID, bytes, bytes], R],
        *,
        max_bytes: int,
        remembered: int = 0,
    ) -> None:
        """`make` gets a body whose signature holds, the signer, the whole record's bytes and its digest, and raises
        ProtocolError where the body does not fit; see `listed`.

        The digest names a record: a hash of domain, signer and body, the same when the same is signed again.
        `remembered`: the latest ones, of which the signature is checked once.
        """
        # one \0, at the end: so no domain begins another, and where the body begins is never in doubt
        assert domain.endswith(b"\0") and domain.count(b"\0") == 1, "a domain is a name that ends with a zero byte"
        self.domain = domain
        self._make = make
        self._max_bytes = max_bytes
        self._verified = lru_cache(maxsize=remembered)(self._verify)

    def sign(self, identity: Identity, body: object) -> R:
        """Sign `body`: lists, dicts with text keys, text, bytes, numbers, truth values and None.

        Raises: ValueError if the record is too large, or the body would not come back as it is or be refused by
        readers; TypeError for what msgpack cannot hold.
        """
        data = msgpack.packb(body)
        blob = identity.public_key + identity.sign(self.domain + data) + data
        if len(blob) > self._max_bytes:
            raise ValueError(f"a signed record has at most {self._max_bytes} bytes; this one has {len(blob)}")
        try:
            return self._read(identity.peer_id, blob)
        except ProtocolError as error:
            raise ValueError(str(error)) from error

    def read(self, blob: object) -> R:
        """Read and verify. Untrusted. Raises: ProtocolError (InvalidRecord if the signature does not hold)."""
        return self._verified(_check_size(blob, self._max_bytes))

    def _verify(self, data: bytes) -> R:
        if not verify(data[:32], data[32:HEAD_BYTES], self.domain + data[HEAD_BYTES:]):
            raise InvalidRecord("the signature of a signed record does not hold")
        return self._read(PeerID.from_public_key(data[:32]), data)

    def _read(self, signer: PeerID, blob: bytes) -> R:
        data = blob[HEAD_BYTES:]
        body: object = packed.unpack(data, max_bytes=MAX_SIGNED_BYTES, any_keys=False)
        if msgpack.packb(body) != data:
            raise ProtocolError("a signed record that is not canonical: a key is given twice, or a number is too wide")
        return self._make(body, signer, blob, hashlib.sha256(self.domain + blob[:32] + data).digest())


def listed(
    fields: Sequence[Callable[[object], object]], make: Callable[..., R]
) -> Callable[[object, PeerID, bytes, bytes], R]:
    """For `Format`: a body that is a list. `fields` read one value each, and `make` is called with all of them."""

    def read(body: object, signer: PeerID, blob: bytes, digest: bytes) -> R:
        if type(body) is not list or len(body) != len(fields):
            raise ProtocolError("a record with too few or too many fields")
        return make(*(field(value) for field, value in zip(fields, body, strict=True)), signer, blob, digest)

    return read


def number(below: int = 2**63) -> Callable[[object], int]:
    def read(value: object) -> int:
        if type(value) is not int or not 0 <= value < below:
            raise ProtocolError("a record with a number out of range")
        return value

    return read


def octets(length: int) -> Callable[[object], bytes]:
    def read(value: object) -> bytes:
        if type(value) is not bytes or len(value) != length:
            raise ProtocolError("a record with malformed bytes")
        return value

    return read


def peer(value: object) -> PeerID:
    return PeerID(octets(32)(value))


def peers(value: object) -> tuple[PeerID, ...]:
    if type(value) is not list:
        raise ProtocolError("a record with a malformed list of peers")
    return tuple(map(peer, value))


def optional(field: Callable[[object], R]) -> Callable[[object], R | None]:
    return lambda value: None if value is None else field(value)


def _check_size(blob: object, max_bytes: int) -> bytes:
    if type(blob) is not bytes or not HEAD_BYTES < len(blob) <= max_bytes:
        raise ProtocolError(f"a signed record consists of {HEAD_BYTES + 1} to {max_bytes} bytes")
    return blob
