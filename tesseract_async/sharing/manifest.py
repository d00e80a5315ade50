"""SharedManifest: the facts on which all trainers that share a model must agree; the founder decides them. Pure."""

import hashlib
from dataclasses import dataclass, field

import msgpack

from tesseract_async.errors import ProtocolError
from tesseract_async.sharing.fragment import Outer
from tesseract_async.sharing.layout import MAX_ELEMENTS, MAX_LAYOUT_BYTES, Cut, Layout, MergeKind
from tesseract_async.wire.packed import Value


@dataclass(frozen=True, slots=True)
class SharedManifest:
    """The tensors, how they are cut, and the outer optimizer. It travels in the state of fragment 0."""

    layout: Layout
    outer: Outer
    data: bytes = field(init=False)
    """The whole manifest in bytes; equal manifests have equal bytes."""
    digest: bytes = field(init=False)

    def __post_init__(self) -> None:
        data = msgpack.packb([*_packed(self.outer), self.layout.encode()])
        object.__setattr__(self, "data", data)
        object.__setattr__(self, "digest", hashlib.sha256(data).digest())

    @classmethod
    def decode(cls, data: bytes) -> "SharedManifest":
        """Read `data`. Untrusted. Raises: ProtocolError."""
        rate, momentum, codec, layout = _unpacked(data, float, float, str, bytes)
        return cls(Layout.decode(layout), _outer(rate, momentum, codec))

    def part(self, number: int) -> "FragmentPart":
        """Return what the state of a fragment holds of the manifest: the whole in the first fragment, else its
        digest."""
        cut, data = self.layout.cuts[number], self.data
        if number > 0:
            data = msgpack.packb([*_packed(self.outer), cut.kind.value, cut.start, cut.stop, self.digest])
        return FragmentPart(number, cut, self.outer, data)


@dataclass(frozen=True, slots=True)
class FragmentPart:
    """The part of the manifest that the state of one fragment holds: a server that has only that can host it."""

    number: int
    cut: Cut
    outer: Outer
    data: bytes
    """This part in the form in which it stands in the state."""

    @classmethod
    def read(cls, number: int, data: bytes) -> "FragmentPart":
        """Read `data` of fragment `number`. Untrusted. Raises: ProtocolError."""
        if number == 0:
            return SharedManifest.decode(data).part(0)
        rate, momentum, codec, kind, start, stop, digest = _unpacked(data, float, float, str, str, int, int, bytes)
        if kind not in {*MergeKind} or not 0 <= start < stop <= start + MAX_ELEMENTS or len(digest) != 32:
            raise ProtocolError("malformed part of shared parameters")
        return cls(number, Cut(MergeKind(kind), start, stop), _outer(rate, momentum, codec), data)


def _packed(outer: Outer) -> list[float | str]:
    return [outer.learning_rate, outer.momentum, outer.codec]


def _unpacked(data: bytes, *kinds: type) -> list[Value]:
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
