"""Signed records: one meaning has one form, kinds are never mixed up, and strangers' bytes raise ProtocolError only."""

import struct
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tesseract_async.errors import InvalidRecord, ProtocolError
from tesseract_async.experts.signed import HEAD_BYTES, MAX_SIGNED_BYTES, read_signer
from tesseract_async.identity import Identity
from tests.experts.raw_records import read_signed, sign_body

ALICE = Identity.from_seed(bytes(32))
BOB = Identity.from_seed(b"b" * 32)
DOMAIN = b"tesseract test 1\0"

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=20)
    | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner, max_size=5),
    max_leaves=20,
)


def signed_raw(packed: bytes, *, identity: Identity = ALICE, domain: bytes = DOMAIN) -> bytes:
    """A record whose signature holds, over any bytes."""
    return identity.public_key + identity.sign(domain + packed) + packed


@given(values)
def test_what_was_signed_comes_back(body: Any) -> None:
    signed = sign_body(ALICE, DOMAIN, body)
    again = read_signed(signed.blob, DOMAIN)
    assert msgpack.packb(again.body) == msgpack.packb(body)  # a NaN equals nothing
    assert (again.signer, again.digest) == (ALICE.peer_id, signed.digest)
    assert read_signer(signed.blob) == ALICE.peer_id


def test_a_digest_names_domain_signer_and_body() -> None:
    digest = sign_body(ALICE, DOMAIN, [1]).digest
    assert sign_body(ALICE, DOMAIN, [1]).digest == digest
    others = (
        sign_body(ALICE, DOMAIN, [2]),
        sign_body(BOB, DOMAIN, [1]),
        sign_body(ALICE, b"tesseract other 1\0", [1]),
    )
    assert digest not in {other.digest for other in others}


def test_any_changed_byte_and_another_domain_are_noticed() -> None:
    blob = sign_body(ALICE, DOMAIN, ["ffn.3.7", 1, b"x"]).blob
    for at in range(len(blob)):
        changed = bytearray(blob)
        changed[at] ^= 1
        with pytest.raises(InvalidRecord):
            read_signed(bytes(changed), DOMAIN)
    with pytest.raises(InvalidRecord):
        read_signed(blob, b"tesseract other 1\0")


@pytest.mark.parametrize(
    "packed",
    [
        b"\xcc\x01",  # 1 in two bytes
        b"\xd9\x01a",  # a text with a longer head than it needs
        b"\xc5\x00\x01a",  # bytes, the same
        b"\xdc\x00\x00",  # an empty list, the same
        b"\xde\x00\x01\xa1a\x01",  # a map, the same
        b"\x82\xa1a\x01\xa1a\x02",  # a key twice
        b"\xca" + struct.pack(">f", 1.0),  # a narrow float
        b"\x81\x01\x02",  # a key that is no text
        b"\x81\xc4\x01a\xa1b\xc1",  # nothing that msgpack knows
        b"\xd6\xff\x00\x00\x00\x01",  # a timestamp
        b"\xd4\x05\x00",  # an extension
        b"\xc7\x00\x05",  # an empty one
        b"\xa1\xff",  # no UTF-8
        b"\x01\x01",  # more than one value
        b"\x91" * 5000 + b"\x01",  # deep
        b"\xdd\xff\xff\xff\xff",  # a list longer than the record
    ],
)
def test_a_signed_body_has_one_form_only(packed: bytes) -> None:
    with pytest.raises(ProtocolError):
        read_signed(signed_raw(packed), DOMAIN)


@given(st.binary(max_size=200))
def test_any_body_is_canonical_or_refused(packed: bytes) -> None:
    try:
        signed = read_signed(signed_raw(packed), DOMAIN)
    except ProtocolError:
        return
    assert msgpack.packb(signed.body) == packed


@given(st.none() | st.integers() | st.text() | st.binary(max_size=300))
def test_garbage_is_refused(blob: Any) -> None:
    with pytest.raises(ProtocolError):
        read_signed(blob, DOMAIN)


def test_sizes_are_checked_before_anything_else() -> None:
    with pytest.raises(ValueError, match="at most"):
        sign_body(ALICE, DOMAIN, bytes(MAX_SIGNED_BYTES))
    with pytest.raises(ValueError, match="at most 200 bytes"):
        sign_body(ALICE, DOMAIN, bytes(200), max_bytes=200)
    with pytest.raises(ProtocolError, match="97 to 200 bytes"):
        read_signed(sign_body(ALICE, DOMAIN, bytes(200)).blob, DOMAIN, max_bytes=200)
    with pytest.raises(ProtocolError):
        read_signed(bytes(HEAD_BYTES), DOMAIN)
    with pytest.raises(ValueError, match="msgpack"):
        sign_body(ALICE, DOMAIN, {7: "a number is no key"})
