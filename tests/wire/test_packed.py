"""Bounds on msgpack: counted before anything is made of it, and equal to what is then made."""

import struct
import tracemalloc
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tesseract_async.errors import MessageTooLarge, ProtocolError
from tesseract_async.wire import frames, packed

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=300)
    | st.binary(max_size=300),
    lambda inner: st.lists(inner, max_size=40) | st.dictionaries(st.text(max_size=40), inner, max_size=20),
    max_leaves=60,
)


def number_of(value: Any) -> int:
    if isinstance(value, list):
        return 1 + sum(map(number_of, value))
    if isinstance(value, dict):
        return 1 + sum(1 + number_of(item) for item in value.values())
    return 1


@given(VALUES)
def test_every_value_is_counted_and_comes_back(value: Any) -> None:
    data = msgpack.packb(value)
    assert packed.count_items(data) == number_of(value)
    assert packed.unpack(data, max_bytes=len(data)) == value


def test_long_texts_and_containers_are_counted_too() -> None:
    for value in ("x" * 70_000, bytes(300), bytes(70_000), [0] * 20, [None] * 8000, {n: n for n in range(4000)}):
        data = msgpack.packb(value)
        assert packed.count_items(data) == number_of(value)
        assert packed.unpack(data, max_bytes=len(data)) == value


BOMBS = {
    "empty lists": b"\xdd" + struct.pack(">I", 2**20 - 64) + b"\x90" * (2**20 - 64),
    "empty maps": b"\xdd" + struct.pack(">I", 2**20 - 64) + b"\x80" * (2**20 - 64),
    "lists of lists": (b"\xdc\x10\x00" + b"\x9f" * 4096) + b"\x90" * 15 * 4096,
    "small lists in short ones": b"\xdc\x03\xe8" + (b"\x9f" + b"\x90" * 15) * 1000,
    "a list in a list": b"\x91" * 60_000 + b"\xc0",
    "a list in a list, just above the limit": b"\x91" * 2000 + b"\xc0",
    "40 lists in one another, and a text": b"\x92" + b"\x91" * 40 + b"\xc0" + msgpack.packb("x" * 2000),
    "a map in a map": b"\x81\xa0" * 30_000 + b"\xc0",
    "a list said to be long": b"\xdd\xff\xff\xff\xff" + bytes(2000),
    "a map said to be long": b"\xdf\xff\xff\xff\xff" + bytes(2000),
    "a text said to be long": b"\xdb\xff\xff\xff\xff" + bytes(2000),
    "an extension": b"\xd4\x05\x00",
    "an empty extension": b"\xc7\x00\x05",
    "a time": b"\xd6\xff" + bytes(4),
    "a long extension": b"\xc9\x00\x00\x10\x00\x05" + bytes(4096),
    "cut short": b"\x92" + b"\xda\x10\x00" + bytes(4096),
    "the byte that means nothing": b"\xc1" * 2000,
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_before_memory_is_taken(name: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError):
            frames.unpack(BOMBS[name])
        assert tracemalloc.get_traced_memory()[1] < 2**20, "at most the objects of the largest head that is allowed"
    finally:
        tracemalloc.stop()


def test_the_largest_head_that_is_allowed_makes_little() -> None:
    most = b"\xdc" + struct.pack(">H", packed.MAX_ITEMS - 1) + b"\x90" * (packed.MAX_ITEMS - 1)
    tracemalloc.start()
    try:
        value = frames.unpack(most)
        assert tracemalloc.get_traced_memory()[0] <= packed.BYTES_PER_ITEM * packed.MAX_ITEMS + 8 * packed.MAX_ITEMS
        assert len(value) == packed.MAX_ITEMS - 1
    finally:
        tracemalloc.stop()


def test_more_bytes_than_expected_are_refused() -> None:
    with pytest.raises(MessageTooLarge):
        packed.unpack(msgpack.packb("four"), max_bytes=4)
    with pytest.raises(ProtocolError):
        packed.unpack(msgpack.packb({1: 2}), max_bytes=10, any_keys=False)


def test_what_receivers_refuse_is_the_senders_mistake() -> None:
    with pytest.raises(ValueError, match="send data as buffers"):
        frames.pack([0] * (packed.MAX_ITEMS + 1))
    frames.pack("x" * 100_000)
