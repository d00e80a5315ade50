"""Reads msgpack of strangers within bounds: bytes, items and depth are counted before an object is made.

An empty list is one byte of msgpack and 64 bytes of Python, and a megabyte of them holds up a loop for 200 ms.
"""

from typing import Any, Final

import msgpack

from tesseract_async.errors import MessageTooLarge, ProtocolError

Value = Any
"""A value that msgpack holds: None, a bool, number, text, bytes, or a list or map of such. Unchecked where received."""

MAX_ITEMS: Final = 8192
"""Values in one piece of msgpack, containers and keys included: counting and making so many takes less than 5 ms."""
MAX_DEPTH: Final = 32
"""Containers within one another."""
UNCOUNTED_BYTES: Final = 1024
"""Up to this many bytes, nothing is counted: they cannot hold much. The heads of nearly all calls are shorter."""
BYTES_PER_ITEM: Final = 64
"""The most memory that an item takes, approximately; hence also that of each byte of a piece of msgpack."""

_SCALAR, _ARRAY, _MAP, _TEXT, _LONG = range(5)


def _first_byte(code: int) -> tuple[int, int] | None:
    """Return the kind of value that begins with this byte; bytes of it or of its length, or how many values it holds.
    None for extensions, and for the byte that is never used."""
    if code < 0x80 or code >= 0xE0 or code in (0xC0, 0xC2, 0xC3):
        return _SCALAR, 0
    if code < 0x90:
        return _MAP, 2 * (code & 15)
    if code < 0xA0:
        return _ARRAY, code & 15
    if code < 0xC0:
        return _SCALAR, code & 31
    if code in (0xC4, 0xC5, 0xC6, 0xD9, 0xDA, 0xDB):  # bin and str
        return _TEXT, (1, 2, 4)[(code - 0xC4) if code < 0xC7 else (code - 0xD9)]
    if code in (0xCA, 0xCB):
        return _SCALAR, 4 if code == 0xCA else 8
    if 0xCC <= code <= 0xD3:  # integers
        return _SCALAR, 1 << ((code - 0xCC) & 3)
    if code >= 0xDC:  # array and map
        return _LONG, {0xDC: 2, 0xDD: 4, 0xDE: -2, 0xDF: -4}[code]
    return None


_FIRST: Final = [_first_byte(code) for code in range(256)]


def unpack(data: bytes | bytearray | memoryview, *, max_bytes: int, any_keys: bool = True) -> Value:
    """The value that `data` holds. `any_keys`: maps may have keys that are neither text nor bytes.

    Untrusted. Raises: ProtocolError (MessageTooLarge for more than `max_bytes`).
    """
    if len(data) > max_bytes:
        raise MessageTooLarge(len(data), max_bytes)
    if len(data) > UNCOUNTED_BYTES:
        count_items(data)
    try:
        return msgpack.unpackb(data, strict_map_key=not any_keys, max_ext_len=0, ext_hook=_refuse)
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException) as error:
        raise ProtocolError(f"malformed msgpack: {type(error).__name__}") from None


def _refuse(code: int, data: bytes) -> None:
    raise ValueError("no extensions")


def count_items(data: bytes | bytearray | memoryview) -> int:
    """Return the number of values in it, without making them.

    Raises: ProtocolError beyond `MAX_ITEMS` or `MAX_DEPTH`, for what is cut short, and for extension types.
    """
    position, count, size = 0, 0, len(data)
    left = 1  # values to come in this container ...
    outer: list[int] = []  # ... and in those around it
    while True:
        while not left:
            if not outer:
                return count
            left = outer.pop()
        if position >= size:
            raise ProtocolError("malformed msgpack: cut short")
        left -= 1
        count += 1
        first = _FIRST[data[position]]
        position += 1
        if first is None:
            raise ProtocolError("malformed msgpack: an extension")
        kind, number = first
        if kind == _SCALAR:
            position += number
            continue
        if kind == _TEXT:
            position += number + int.from_bytes(data[position : position + number], "big")
            continue
        if kind == _LONG:
            width = abs(number)
            length = int.from_bytes(data[position : position + width], "big")
            position += width
            number = length if number > 0 else 2 * length
        if count + number > MAX_ITEMS:
            raise ProtocolError(f"malformed msgpack: more than {MAX_ITEMS} values")
        if number:
            outer.append(left)
            left = number
            if len(outer) > MAX_DEPTH:
                raise ProtocolError(f"malformed msgpack: nested more than {MAX_DEPTH} times")
