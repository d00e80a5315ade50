"""Values of the network as bytes. One that would not come back equal is refused before anything is sent. Pure."""

import math

import msgpack

from tesseract_async.wire.packed import Value

MAX_DEPTH = 64
"""Lists and dictionaries within one another."""


def encode_value(value: Value) -> bytes:
    """Return msgpack of `value` that `decode_value` turns into an equal value.

    That holds for None, booleans, integers of 64 bits, floats (not-a-number comes back as itself), text, bytes, and
    lists and dictionaries of these. Subclasses come back as the plain type that they equal, `bytearray` as bytes.

    Raises: TypeError for other types: tuples (they would come back as lists), sets, arrays, and keys of dictionaries
    other than text, bytes or numbers; ValueError for a value that does not fit: integers beyond 64 bits, text with
    lone surrogates, not-a-number as a key, and what is nested more than 64 deep, or in itself.
    """
    _check(value, MAX_DEPTH)
    try:
        packed: bytes = msgpack.packb(value)
        same = _equal(decode_value(packed), value)
    except BufferError:
        raise TypeError("a memoryview whose bytes do not lie side by side: turn it into bytes") from None
    except UnicodeEncodeError:
        raise ValueError("text with lone surrogates cannot be stored: encode it to bytes") from None
    except (ValueError, OverflowError, msgpack.UnpackException) as error:
        raise ValueError(f"a value that cannot be stored: {error}") from None
    if not same:
        raise ValueError("a value that would not come back equal cannot be stored")
    return packed


def decode_value(packed: bytes) -> Value:
    """Return the value of untrusted bytes: only what `encode_value` takes.

    Raises: ValueError, TypeError, RecursionError, msgpack.UnpackException.
    """
    value = msgpack.unpackb(packed, strict_map_key=False, max_ext_len=0)
    _check(value, MAX_DEPTH)
    return value


def _check(value: object, depth: int) -> None:
    if value is None or isinstance(value, bool | float | str | bytes | bytearray | memoryview):
        return
    if isinstance(value, int):
        if not -(2**63) <= value < 2**64:
            raise ValueError(f"an integer of {value.bit_length()} bits cannot be stored: at most 64 can be")
    elif isinstance(value, list | dict):
        if not depth:
            raise ValueError(f"a value may be nested {MAX_DEPTH} deep, and not in itself")
        for item in value:
            if isinstance(value, dict):
                if not isinstance(item, bool | int | float | str | bytes):
                    raise TypeError(f"a dictionary's keys are text, bytes or numbers, not {type(item).__name__}")
                _check(value[item], depth - 1)
            _check(item, depth - 1)
    elif isinstance(value, tuple):
        raise TypeError("a tuple would come back as a list: store a list")
    else:
        raise TypeError(f"a value of type {type(value).__name__} cannot be stored: turn it into bytes, or numbers")


def _equal(one: Value, other: Value) -> bool:
    if isinstance(one, list):
        return len(one) == len(other) and all(map(_equal, one, other))
    if isinstance(one, dict):
        return len(one) == len(other) and all(key in other and _equal(one[key], other[key]) for key in one)
    return bool(one == other) or (isinstance(one, float) and math.isnan(one))
