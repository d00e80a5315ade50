import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tesseract_async.errors import ProtocolError
from tesseract_async.nat.webrtc.message_stream import INITIAL_CREDIT, MESSAGE_BYTES, MessageStream


def make(window_bytes: int = INITIAL_CREDIT) -> MessageStream:
    return MessageStream(window_bytes=window_bytes)


def carry(sender: MessageStream, receiver: MessageStream, room: int = 2**30) -> int:
    messages = sender.messages_to_send(room)
    for message in messages:
        receiver.receive(message)
    return len(messages)


def read(stream: MessageStream, size: int = 1000) -> bytes:
    buffer = memoryview(bytearray(size))
    return bytes(buffer[: stream.read_into(buffer)])


@given(st.lists(st.integers(0, 60_000), max_size=30), st.integers(0, 2**32))
def test_the_bytes_arrive_in_order_whatever_the_sizes(sizes: list[int], seed: int) -> None:
    rng = random.Random(seed)
    one, other = make(), make()
    sent = bytearray()
    received = bytearray()
    for size in sizes:
        data = rng.randbytes(size)
        one.write(data)
        sent += data
        carry(one, other, rng.randrange(1, 100_000))
        received += read(other, rng.randrange(1, 100_000))
        carry(other, one)
    one.finish()
    while not (other.ended and not other.held):
        carry(one, other)
        received += read(other, 70_000)
        carry(other, one)
    assert received == sent
    assert one.unsent == 0 and other.ended


def test_a_reader_that_stops_stops_the_writer() -> None:
    one, other = make(), make()
    one.write(bytes(10 * INITIAL_CREDIT))
    assert one.paused
    while carry(one, other):
        carry(other, one)
    assert INITIAL_CREDIT - MESSAGE_BYTES <= other.held <= INITIAL_CREDIT
    read(other, INITIAL_CREDIT)
    carry(other, one)
    assert carry(one, other)


def test_a_larger_window_is_granted_at_the_start() -> None:
    one, other = make(), make(4 * INITIAL_CREDIT)
    one.write(bytes(10 * INITIAL_CREDIT))
    carry(other, one)
    carry(one, other)
    assert other.held == 4 * INITIAL_CREDIT


def test_a_sender_that_ignores_the_window_breaks_the_rules() -> None:
    stream = make()
    for _ in range(INITIAL_CREDIT // MESSAGE_BYTES):
        stream.receive(bytes(MESSAGE_BYTES))
    with pytest.raises(ProtocolError):
        stream.receive(b"x")


@pytest.mark.parametrize("message", ["", "x", "w", "w-1", "w1" + "0" * 20, "ww", "w²", "ff"])
def test_malformed_control_messages(message: str) -> None:
    with pytest.raises(ProtocolError):
        make().receive(message)


def test_data_after_the_end() -> None:
    stream = make()
    stream.receive("f")
    with pytest.raises(ProtocolError):
        stream.receive(b"x")


@given(st.lists(st.binary(max_size=300) | st.text(max_size=20), max_size=20))
def test_untrusted_messages_raise_protocol_errors_only(messages: list[bytes | str]) -> None:
    stream = make()
    try:
        for message in messages:
            stream.receive(message)
    except ProtocolError:
        pass
    assert stream.held <= INITIAL_CREDIT
