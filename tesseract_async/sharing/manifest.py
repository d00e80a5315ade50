"""SharedManifest: what all who share a model must agree on; its founder decides. Pure."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import msgpack

from tesseract_async.errors import ProtocolError
from tesseract_async.sharing.fragment import Outer
from tesseract_async.sharing.layout import MAX_ELEMENTS, MAX_LAYOUT_BYTES, Cut, Kind, Layout


@dataclass(frozen=True, slots=True)
class SharedManifest:
    """The tensors, how they are cut, and the outer optimizer. It travels in the state of fragment 0."""

    layout: Layout
    outer: Outer

    def encode(self) -> bytes:
        """Return its bytes; equal ones for equal manifests."""
        outer = self.outer
        packed: bytes = msgpack.packb([outer.learning_rate, outer.momentum, outer.codec, self.layout.encode()])
        return packed

    @classmethod
    def decode(cls, data: bytes) -> SharedManifest:
        """Read what `encode` made. Untrusted. Raises: ProtocolError."""
        rate, momentum, codec, layout = _unpacked(data, float, float, str, bytes)
        return cls(Layout.decode(layout), _outer(rate, momentum, codec))

    def part(self, number: int) -> FragmentPart:
        """Return what the state of a fragment says of it: the whole in the first, else its digest."""
        cut, outer, data = self.layout.cuts[number], self.outer, self.encode()
        if number > 0:
            row = [cut.kind.value, cut.start, cut.stop, hashlib.sha256(data).digest()]
            data = msgpack.packb([outer.learning_rate, outer.momentum, outer.codec, *row])
        return FragmentPart(number, cut, outer, data)


@dataclass(frozen=True, slots=True)
class FragmentPart:
    """What the state of one fragment says of it: a server that has only that can host it."""

    number: int
    cut: Cut
    outer: Outer
    data: bytes
    """The same as it stands in the state."""

    @classmethod
    def read(cls, number: int, data: bytes) -> FragmentPart:
        """Read `data` of fragment `number`. Untrusted. Raises: ProtocolError."""
        if number == 0:
            return SharedManifest.decode(data).part(0)
        rate, momentum, codec, kind, start, stop, digest = _unpacked(data, float, float, str, str, int, int, bytes)
        if kind not in {*Kind} or not 0 <= start < stop <= start + MAX_ELEMENTS or len(digest) != 32:
            raise ProtocolError("malformed part of shared parameters")
        return cls(number, Cut(Kind(kind), start, stop), _outer(rate, momentum, codec), data)


def _unpacked(data: bytes, *kinds: type) -> list[Any]:
    """Raises: ProtocolError unless these are values of these types."""
    try:
        values = msgpack.unpackb(data) if len(data) <= MAX_LAYOUT_BYTES else None
    except Exception:  # msgpack raises many kinds
        values = None
    if type(values) is not list or [type(value) for value in values] != [*kinds]:
        raise ProtocolError("malformed manifest of shared parameters")
    return values


def _outer(rate: float, momentum: float, codec: str) -> Outer:
    """Raises: ProtocolError."""
    try:
        return Outer(learning_rate=rate, momentum=momentum, codec=codec)
    except ValueError as error:
        raise ProtocolError(str(error)) from None
