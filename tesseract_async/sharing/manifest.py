"""SharedManifest: what all who share a model must agree on; its founder decides. Pure."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import msgpack

from tesseract_async.errors import ProtocolError
from tesseract_async.sharing.fragment import Outer
from tesseract_async.sharing.layout import MAX_LAYOUT_BYTES, Layout


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
        if len(data) > MAX_LAYOUT_BYTES:
            raise ProtocolError("a manifest of shared parameters is too large")
        try:
            rate, momentum, codec, layout = msgpack.unpackb(data)
            if type(rate) is not float or type(momentum) is not float or type(codec) is not str:
                raise ProtocolError("malformed manifest of shared parameters")
            outer = Outer(learning_rate=rate, momentum=momentum, codec=codec)
        except ProtocolError:
            raise
        except Exception:  # msgpack raises many kinds
            raise ProtocolError("malformed manifest of shared parameters") from None
        if type(layout) is not bytes:
            raise ProtocolError("malformed manifest of shared parameters")
        return cls(Layout.decode(layout), outer)

    def part(self, number: int) -> bytes:
        """Return what the state of a fragment says of it: the whole in the first, else its digest."""
        return self.encode() if number == 0 else hashlib.sha256(self.encode()).digest()
