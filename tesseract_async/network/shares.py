"""What each source has brought to a holder: nobody fills it alone, and a full one has room for others. Pure."""

from __future__ import annotations

from itertools import islice
from typing import NamedTuple

from tesseract_async.identity import PeerID

RANGE_SHARE = 32
"""One address range may fill a 32nd of a holder."""
BLOCK_SHARE = 8
"""All ranges of a block (/16 of IPv4, /32 of IPv6: what a provider has) an eighth, as one that copies others' may."""

Name = tuple[bytes, tuple[str | None, PeerID]]
"""An entry: its key, subkey and owner."""


class Source(NamedTuple):
    """Who sent a record, as far as that is proven."""

    range: bytes
    """An address range (`contacts.address_range`)."""
    copied: bool
    """Whether it was a holder that copied another's record: such a one brings those of many owners."""

    @property
    def block(self) -> Source:
        """The wider range: 2 of the 3 bytes of a /24, 4 of the 6 of a /48."""
        return Source(self.range[: 2 * len(self.range) // 3], self.copied)


class Shares:
    """The entries of all sources that are counted."""

    def __init__(self) -> None:
        self._sizes: dict[Source, dict[Name, int]] = {}
        self._bytes: dict[Source, int] = {}
        """Of ranges, and of blocks."""

    def move(self, name: Name, size: int, before: Source | None, source: Source | None) -> None:
        """An entry of `size` bytes is `source`'s now (nobody's, if None), and was `before`'s."""
        if before is not None:
            old = self._sizes[before].pop(name)
            if not self._sizes[before]:
                del self._sizes[before]
            self._count(before, -old)
        if source is not None:
            self._sizes.setdefault(source, {})[name] = size
            self._count(source, size)

    def allow(self, source: Source | None, size: int, total: int) -> bool:
        """Whether a source's share of `total` bytes has room for so many more."""
        if source is None:
            return True
        most = total // (BLOCK_SHARE if source.copied else RANGE_SHARE)
        of_block = self._bytes.get(source.block, 0)
        return self._bytes.get(source, 0) + size <= most and of_block + size <= total // BLOCK_SHARE

    def crowding(self, source: Source | None, size: int) -> Source | None:
        """The source with most bytes, where that is more than `source` would have with `size` more: it has to yield."""
        if source is None:
            return None
        most = max(self._sizes, key=self._bytes.__getitem__, default=None)
        if most is None or self._bytes[most] <= self._bytes.get(source, 0) + size:
            return None
        return most

    def some_of(self, source: Source, count: int) -> list[Name]:
        """The oldest entries of a source."""
        return list(islice(self._sizes[source], count))

    def _count(self, source: Source, change: int) -> None:
        for one in (source, source.block):
            self._bytes[one] = self._bytes.get(one, 0) + change
            if not self._bytes[one]:
                del self._bytes[one]
