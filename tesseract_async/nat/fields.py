"""Reads the fields of untrusted bodies."""

from __future__ import annotations

from typing import TypeVar

from tesseract_async.errors import ProtocolError

T = TypeVar("T")


def field(body: object, name: str, kind: type[T]) -> T:
    """Return `body[name]`, of exactly this type. Untrusted. Raises: ProtocolError."""
    value = body.get(name) if type(body) is dict else None
    if type(value) is not kind:
        raise ProtocolError(f"{name} is missing or malformed")
    return value
