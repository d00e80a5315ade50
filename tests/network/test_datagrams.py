"""Datagrams: what is written can be read, nothing is over 1,200 bytes, and garbage raises ProtocolError only."""

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tesseract_async.errors import InvalidRecord, ProtocolError, UnsupportedVersion
from tesseract_async.identity import MAX_RECORD_BYTES, Identity, SignedRecord
from tesseract_async.network import datagrams as wire
from tesseract_async.network.contacts import Contact, address_range, pack_address, pack_contacts, split_contacts
from tesseract_async.network.contacts import unpack_address as unpack

ME = bytes(range(32))
READERS = [wire.read_key, wire.read_range, wire.read_items, wire.read_value, wire.read_page]
MSGPACK_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.binary(max_size=70) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=12,
)


def test_a_request_without_a_token_is_padded_and_one_with_a_token_is_not() -> None:
    for size in range(0, 420):
        arguments = [bytes(size)]
        bare = wire.encode_request(1, 0, bytes(8), ME, token=b"", challenge=b"", arguments=arguments)
        assert 400 <= len(bare) <= max(402, 52 + size)
        assert wire.read_request(wire.decode(bare)).arguments[0] == arguments[0]
    short = wire.encode_request(1, 0, bytes(8), ME, token=bytes(8), challenge=b"", arguments=[])
    assert len(short) < 70


@settings(deadline=None)
@given(st.binary(max_size=1300))
def test_garbage_raises_protocol_errors_only(data: bytes) -> None:
    for prefix in (b"", b"\x54\x01\x02\x00" + bytes(40)):
        try:
            datagram = wire.decode(prefix + data)
            wire.read_request(datagram)
            wire.read_reply(datagram)
        except ProtocolError:
            pass


@settings(deadline=None)
@given(st.lists(MSGPACK_VALUES, max_size=6))
def test_well_formed_msgpack_of_the_wrong_shape_raises_protocol_errors_only(body: list[object]) -> None:
    datagram = wire.Datagram(1, 0, bytes(8), ME, body)
    for reader in READERS:
        try:
            reader(body)
        except ProtocolError:
            pass
    for read in (wire.read_request, wire.read_reply, lambda item: wire.read_outcomes(item.body, 3)):
        try:
            read(datagram)
        except ProtocolError:
            pass
    try:
        list(split_contacts(body[0] if body else None, body[1:], 20))
    except ProtocolError:
        pass


@pytest.mark.parametrize("wall", [math.nan, math.inf, -math.inf, 1, None])
def test_a_time_that_is_none_is_malformed(wall: object) -> None:
    address = pack_address(("203.0.113.9", 4001))
    assert wire.read_reply(wire.Datagram(129, 0, bytes(8), ME, [address, bytes(8), b"", 1.5])).wall == 1.5
    with pytest.raises(ProtocolError, match="time"):
        wire.read_reply(wire.Datagram(129, 0, bytes(8), ME, [address, bytes(8), b"", wall]))


def test_another_version_is_told_apart_from_garbage() -> None:
    data = bytearray(wire.encode(1, 0, bytes(8), ME, []))
    data[1] = 9
    with pytest.raises(UnsupportedVersion, match="upgrade this node"):
        wire.decode(bytes(data))


@pytest.mark.parametrize("host", ["127.0.0.1", "203.0.113.9", "2001:db8::7", "::1"])
def test_addresses_survive_packing(host: str) -> None:
    assert unpack(pack_address((host, 4001))) == (host, 4001)


def test_a_dual_stack_socket_s_notation_is_the_same_address() -> None:
    assert pack_address(("::ffff:10.0.0.1", 5)) == pack_address(("10.0.0.1", 5))


@pytest.mark.parametrize(
    "raw", [b"", bytes(6), b"\x7f\0\0\x01\0\0", b"\xe0\0\0\x01\0\x05", b"\xff" * 6, bytes(18), bytes(7)]
)
def test_addresses_where_nobody_can_be_dialed_are_malformed(raw: bytes) -> None:
    with pytest.raises(ProtocolError):
        unpack(raw)


def test_ranges_are_counted_for_public_addresses_only() -> None:
    assert address_range(("8.8.8.8", 1)) == address_range(("8.8.8.200", 2)) != address_range(("8.8.9.8", 1))
    assert address_range(("2a00:1:2:3::1", 1)) == address_range(("2a00:1:2:ff::9", 1)) is not None
    assert address_range(("192.168.1.1", 1)) is address_range(("127.0.0.1", 1)) is address_range(("::1", 1)) is None


def test_packed_contacts_fit_and_come_back_nearest_first() -> None:
    rng = random.Random(0)
    contacts = [Contact(rng.randbytes(32), ("2001:db8::1" if i % 2 else "10.0.0.1", 1 + i)) for i in range(20)]
    v4, v6 = pack_contacts(contacts, 10_000)
    assert sorted(split_contacts(v4, v6, 20)) == sorted(item.raw for item in contacts)
    v4, v6 = pack_contacts(contacts, 200)
    assert len(v4) + len(v6) <= 200
    assert set(split_contacts(v4, v6, 20)) == {item.raw for item in contacts[:4]}
    with pytest.raises(ProtocolError):
        list(split_contacts(v4 + b"x", v6, 20))
    with pytest.raises(ProtocolError):
        list(split_contacts(v4, v6, 3))


OWNER = Identity.from_seed(bytes(32))


@settings(deadline=None)
@given(st.binary(max_size=300), st.none() | st.text(max_size=20), st.booleans(), st.integers(0, 2**53))
def test_records_survive(value: bytes, subkey: str | None, tombstone: bool, sequence: int) -> None:
    record = SignedRecord.sign(
        OWNER, ME, sequence=sequence, expiration=1.5, value=value, subkey=subkey, tombstone=tombstone
    )
    assert SignedRecord.decode(ME, record.body) == record
    assert record.owner == OWNER.peer_id


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 255))
def test_no_bit_of_a_record_can_be_changed(position: int, flip: int) -> None:
    body = bytearray(SignedRecord.sign(OWNER, ME, sequence=1, expiration=2.0, value=b"v", subkey="s").body)
    body[position % len(body)] ^= flip
    with pytest.raises(InvalidRecord):
        SignedRecord.decode(ME, bytes(body))


def test_a_record_belongs_to_one_key() -> None:
    body = SignedRecord.sign(OWNER, ME, sequence=1, expiration=2.0).body
    with pytest.raises(InvalidRecord):
        SignedRecord.decode(bytes(32), body)


@settings(deadline=None)
@given(st.binary(max_size=1200))
def test_garbage_is_no_record(body: bytes) -> None:
    with pytest.raises(InvalidRecord):
        SignedRecord.decode(ME, body)


def test_a_record_that_fits_no_datagram_is_the_caller_s_mistake() -> None:
    room = MAX_RECORD_BYTES - 113
    assert len(SignedRecord.sign(OWNER, ME, sequence=1, expiration=2.0, value=bytes(room)).body) == MAX_RECORD_BYTES
    with pytest.raises(ValueError, match=f"has room for {room}"):
        SignedRecord.sign(OWNER, ME, sequence=1, expiration=2.0, value=bytes(room + 1))
    with pytest.raises(ValueError, match="subkey"):
        SignedRecord.sign(OWNER, ME, sequence=1, expiration=2.0, subkey="s" * 129)
