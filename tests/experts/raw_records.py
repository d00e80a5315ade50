"""Signed records of any body, as nobody in the package makes them."""

from typing import Any, NamedTuple

from tesseract_async.experts.signed import MAX_SIGNED_BYTES, Format
from tesseract_async.identity import Identity, PeerID


class RawRecord(NamedTuple):
    """A record whose body is taken as it is."""

    body: Any
    signer: PeerID
    blob: bytes
    digest: bytes


def sign_body(identity: Identity, domain: bytes, body: Any, *, max_bytes: int = MAX_SIGNED_BYTES) -> RawRecord:
    return Format(domain, RawRecord, max_bytes=max_bytes).sign(identity, body)


def read_signed(blob: object, domain: bytes, *, max_bytes: int = MAX_SIGNED_BYTES) -> RawRecord:
    return Format(domain, RawRecord, max_bytes=max_bytes).read(blob)
