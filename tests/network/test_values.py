"""Values that may be stored come back equal; others are refused with a sentence."""

import collections
import enum
import math
import struct
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tesseract_async.network.values import MAX_DEPTH, decode_value, encode_value


class Colour(enum.StrEnum):
    RED = "red"


class Number(enum.IntEnum):
    ONE = 1


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth - 1):
        value = [value]
    return value


ITSELF: list[Any] = []
ITSELF.append(ITSELF)
POINT = collections.namedtuple("POINT", "x y")


@pytest.mark.parametrize(
    "value",
    [
        *(None, True, 0, -1, 2**64 - 1, -(2**63), 1.5, -0.0, math.inf, "", "x", "\0ü", b"", b"x", [], {}),
        *({1: 2, "1": 3, b"1": 4, 1.5: 5}, {True: 1}, [[], [1, "a", None]], {"a": {"b": [1.0]}}),
        *(Colour.RED, Number.ONE, np.float64(0.5), bytearray(b"x"), memoryview(b"x"), nested(MAX_DEPTH)),
        collections.OrderedDict(a=1),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_stored_comes_back_equal(value: Any) -> None:
    assert decode_value(encode_value(value)) == value


def test_signs_and_not_a_number_stay() -> None:
    for value in (-0.0, math.nan):
        assert struct.pack(">d", decode_value(encode_value([value]))[0]) == struct.pack(">d", value)


@pytest.mark.parametrize(
    ("value", "error", "sentence"),
    [
        ((1, 2), TypeError, "come back as a list"),
        ([[(1,)]], TypeError, "come back as a list"),
        (POINT(1, 2), TypeError, "come back as a list"),
        ({(1, 2): 3}, TypeError, "keys are text, bytes or numbers, not tuple"),
        ({None: 3}, TypeError, "keys are text, bytes or numbers, not NoneType"),
        ({1}, TypeError, "of type set"),
        (object(), TypeError, "of type object"),
        (1j, TypeError, "of type complex"),
        (np.int64(3), TypeError, "of type int64"),
        (np.zeros(2), TypeError, "of type ndarray"),
        (msgpack.Timestamp(1), TypeError, "of type Timestamp"),
        ([memoryview(b"abcd")[::2]], TypeError, "side by side"),
        (2**64, ValueError, "65 bits"),
        ({"a": [-(2**63) - 1]}, ValueError, "bits cannot be stored: at most 64"),
        ("\ud800", ValueError, "lone surrogates"),
        ({"\ud800": 1}, ValueError, "lone surrogates"),
        ({math.nan: 1}, ValueError, "come back equal"),
        (ITSELF, ValueError, "not in itself"),
        (nested(MAX_DEPTH + 1), ValueError, "64 deep"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_would_not_is_refused(value: Any, error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        encode_value(value)


@pytest.mark.parametrize(
    "packed",
    [
        msgpack.packb(msgpack.Timestamp(1)),
        msgpack.packb(msgpack.ExtType(1, b"")),
        msgpack.packb({None: 1}, strict_types=True),
        msgpack.packb(nested(MAX_DEPTH + 1)),
        b"\x91" * 900 + b"\xc0",
    ],
    ids=repr,
)
def test_what_strangers_store_otherwise_is_no_value(packed: bytes) -> None:
    with pytest.raises((TypeError, ValueError)):
        decode_value(packed)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(st.text() | st.integers() | st.floats() | st.binary(), inner)
        | st.tuples(inner)
    ),
    max_leaves=20,
)


@given(VALUES)
def test_anything_comes_back_equal_or_is_refused(value: Any) -> None:
    try:
        packed = encode_value(value)
    except (TypeError, ValueError):
        return
    assert repr(decode_value(packed)) == repr(value)
