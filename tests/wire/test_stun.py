import os

import aioice.stun
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tesseract_async.errors import ProtocolError
from tesseract_async.wire import stun

TRANSACTION = b"abcdefghijkl"


@pytest.mark.parametrize("source", [("203.0.113.9", 40001), ("2001:db8::17", 1), ("0.0.0.0", 65535)])
def test_who_asks_learns_its_address(source: tuple[str, int]) -> None:
    reply = stun.answer(stun.encode_request(TRANSACTION), source)
    assert reply is not None
    assert stun.decode_response(reply) == (TRANSACTION, *source)


def test_aioice_understands_the_answer_and_is_understood() -> None:
    request = aioice.stun.Message(aioice.stun.Method.BINDING, aioice.stun.Class.REQUEST)
    reply = stun.answer(bytes(request), ("203.0.113.9", 40001))
    assert reply is not None
    message = aioice.stun.parse_message(reply)
    assert message.transaction_id == request.transaction_id
    assert message.attributes["XOR-MAPPED-ADDRESS"] == ("203.0.113.9", 40001)
    assert aioice.stun.parse_message(stun.encode_request(TRANSACTION)).message_method is aioice.stun.Method.BINDING


def test_the_vector_of_rfc_5769() -> None:
    """Section 2.2: a response with SOFTWARE before the address, and integrity and fingerprint behind it."""
    data = bytes.fromhex(
        "0101003c2112a442b7e7a701bc34d686fa87dfae"
        "8022000b7465737420766563746f7220"
        "002000080001a147e112a643"
        "000800142b91f599fd9e90c38c7489f92af9ba53f06be7d7"
        "80280004c07d4c96"
    )
    assert stun.decode_response(data) == (bytes.fromhex("b7e7a701bc34d686fa87dfae"), "192.0.2.1", 32853)


def test_a_link_local_source_may_carry_its_interface() -> None:
    reply = stun.answer(stun.encode_request(TRANSACTION), ("fe80::1%eth0", 5))
    assert reply is not None
    assert stun.decode_response(reply)[1:] == ("fe80::1", 5)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        bytes(20),
        stun.encode_request(TRANSACTION)[:19],
        stun.encode_request(TRANSACTION) + b"\0",
        stun.answer(
            stun.encode_request(TRANSACTION), ("203.0.113.9", 4)
        ),  # never answered: two nodes would play ping-pong
        b"\0\1\0\x08" + stun.encode_request(TRANSACTION)[4:] + b"\0\x06\0\x04user",  # wants to log in
    ],
)
def test_anything_else_gets_no_answer(data: bytes) -> None:
    assert stun.answer(data, ("203.0.113.9", 4)) is None


def test_optional_attributes_are_ignored() -> None:
    data = b"\0\1\0\x08" + stun.encode_request(TRANSACTION)[4:] + b"\x80\x22\0\x03abc\0"
    assert stun.answer(data, ("203.0.113.9", 4)) is not None


@given(st.binary(max_size=80) | st.binary(max_size=40).map(lambda tail: b"\1\1\0" + tail))
def test_untrusted_bytes_raise_protocol_errors_only(data: bytes) -> None:
    for attempt in (data, data[:4] + b"\x21\x12\xa4\x42" + data[8:]):
        stun.answer(attempt, ("203.0.113.9", 4))
        try:
            stun.decode_response(attempt)
        except ProtocolError:
            pass


def test_told_apart_from_other_traffic() -> None:
    assert stun.is_stun(stun.encode_request(os.urandom(12)))
    assert not stun.is_stun(b"\x85" + stun.encode_request(TRANSACTION)[1:])
    assert not stun.is_stun(b"\0\1\0\0" + bytes(16))
