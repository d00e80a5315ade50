from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tesseract_async.errors import ConnectionLost, ProtocolError
from tesseract_async.nat.webrtc.message_stream import DEAD_AFTER, INITIAL_CREDIT, MESSAGE_BYTES, MessageStream


def make(window_bytes: int = INITIAL_CREDIT) -> MessageStream:
    return MessageStream(now=0.0, window_bytes=window_bytes)


def carry(sender: MessageStream, receiver: MessageStream, room: int = 2**30, now: float = 0.0) -> int:
    messages = sender.messages_to_send(room)
    for message in messages:
        receiver.receive(message, now)
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


def test_whoever_ignores_the_window_breaks_the_rules() -> None:
    stream = make()
    for _ in range(INITIAL_CREDIT // MESSAGE_BYTES):
        stream.receive(bytes(MESSAGE_BYTES), 0.0)
    with pytest.raises(ProtocolError):
        stream.receive(b"x", 0.0)


@pytest.mark.parametrize("message", ["", "x", "w", "w-1", "w1" + "0" * 20, "ww", "w²", "ff"])
def test_malformed_control_messages(message: str) -> None:
    with pytest.raises(ProtocolError):
        make().receive(message, 0.0)


def test_data_after_the_end() -> None:
    stream = make()
    stream.receive("f", 0.0)
    with pytest.raises(ProtocolError):
        stream.receive(b"x", 0.0)


@given(st.lists(st.binary(max_size=300) | st.text(max_size=20), max_size=20))
def test_untrusted_messages_raise_protocol_errors_only(messages: list[bytes | str]) -> None:
    stream = make()
    try:
        for message in messages:
            stream.receive(message, 0.0)
    except ProtocolError:
        pass
    assert stream.held <= INITIAL_CREDIT


def test_a_flood_of_pings_is_answered_once_per_turn() -> None:
    stream = make()
    stream.messages_to_send(1)
    for _ in range(1000):
        stream.receive("p", 0.0)
    assert stream.messages_to_send(1) == ["q"]


def test_a_silent_peer_is_asked_and_then_given_up() -> None:
    one, other = make(), make()
    carry(one, other), carry(other, one)
    one.handle_timer(one.timer_at)
    assert carry(one, other, now=2.0) == 1
    for message in other.messages_to_send(1):
        one.receive(message, 2.25)
    now = 2.25
    with pytest.raises(ConnectionLost):
        for _ in range(10):
            now = one.timer_at
            one.handle_timer(now)
    assert now == pytest.approx(2.25 + DEAD_AFTER)


def test_a_loop_that_stalled_judges_nobody() -> None:
    stream = make()
    stream.handle_timer(60.0, late=58.0)
    assert "p" in stream.messages_to_send(1)
    stream.handle_timer(stream.timer_at)
