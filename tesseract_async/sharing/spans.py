"""Spans: sets of whole numbers, such as an epoch's samples, and how they travel. Pure."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from operator import itemgetter
from typing import Final

from tesseract_async.errors import ProtocolError

MAX_SPANS: Final = 512
"""Spans of a trainer, of a message, and of an epoch's free samples where trainers name what they hold."""

Span = tuple[int, int]
"""The first number, and the number after the last."""
Piece = tuple[int, int, int]
"""An epoch's number, and a span of it."""


class Spans:
    """A set of whole numbers, as spans in ascending order that do not touch one another."""

    __slots__ = ("_spans",)

    def __init__(self, spans: Iterable[Span] = ()) -> None:
        self._spans: list[Span] = []
        for start, stop in spans:
            self.add(start, stop)

    def __iter__(self) -> Iterator[Span]:
        return iter(self._spans)

    def __len__(self) -> int:
        return len(self._spans)

    @property
    def num(self) -> int:
        """The count of numbers."""
        return sum(stop - start for start, stop in self._spans)

    def add(self, start: int, stop: int) -> None:
        """Add these numbers."""
        if start >= stop:
            return
        first = last = bisect_left(self._spans, start, key=itemgetter(1))
        while last < len(self._spans) and self._spans[last][0] <= stop:
            start, stop = min(start, self._spans[last][0]), max(stop, self._spans[last][1])
            last += 1
        self._spans[first:last] = [(start, stop)]

    def cut(self, start: int, stop: int) -> list[Span]:
        """Remove these numbers, as far as they are in the set. Returns those that were."""
        if start >= stop:
            return []
        first = last = bisect_right(self._spans, start, key=itemgetter(1))
        found, left = list[Span](), list[Span]()
        while last < len(self._spans) and self._spans[last][0] < stop:
            low, high = self._spans[last]
            found.append((max(low, start), min(high, stop)))
            left += [one for one in ((low, start), (stop, high)) if one[0] < one[1]]
            last += 1
        self._spans[first:last] = left
        return found

    def take(self, num: int, *, most: int) -> list[Span]:
        """Remove the first `num` numbers, in at most this many spans, and return them."""
        found = list[Span]()
        while num > 0 and self._spans and len(found) < most:
            start, stop = self._spans[0]
            found += self.cut(start, min(stop, start + num))
            num -= found[-1][1] - found[-1][0]
        return found


def encode_pieces(pieces: Iterable[Piece]) -> list[int]:
    """Return the pieces one after the other, as they travel."""
    return [number for piece in pieces for number in piece]


def decode_pieces(flat: object) -> list[Piece]:
    """Read what `encode_pieces` made. Untrusted. Raises: ProtocolError."""
    if type(flat) is not list or len(flat) > 3 * MAX_SPANS or len(flat) % 3:
        raise ProtocolError("malformed samples")
    if any(type(number) is not int or not 0 <= number < 2**48 for number in flat):
        raise ProtocolError("malformed samples")
    pieces = list(zip(flat[::3], flat[1::3], flat[2::3], strict=True))
    if any(start >= stop for _, start, stop in pieces):
        raise ProtocolError("malformed samples")
    return pieces


def fewest_pieces(pieces: Iterable[Piece]) -> list[Piece]:
    """Return the same samples in as few pieces as can be."""
    epochs: dict[int, Spans] = {}
    for epoch, start, stop in pieces:
        epochs.setdefault(epoch, Spans()).add(start, stop)
    return [(epoch, *span) for epoch, spans in epochs.items() for span in spans]
