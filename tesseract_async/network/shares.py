"""Accounts of what each source has brought to a holder, so that none fills it alone. Pure."""

from itertools import islice
from typing import NamedTuple

from tesseract_async.identity import PeerID

RANGE_SHARE = 32
"""One address range may fill a 32nd of a holder."""
BLOCK_SHARE = 8
"""All ranges of a block (/16 of IPv4, /32 of IPv6: what a provider has) an eighth, and so may a source that copies
others' records."""

EntryName = tuple[bytes, tuple[str | None, PeerID]]
"""An entry: its key, subkey and owner."""


class Source(NamedTuple):
    range: bytes
    """An address range (`contacts.address_range`)."""
    copied: bool
    """True if it was a holder that copied another's record: such a one brings those of many owners."""

    @property
    def block(self) -> "Source":
        """The wider range: 2 of the 3 bytes of a /24, 4 of the 6 of a /48."""
        return Source(self.range[: 2 * len(self.range) // 3], self.copied)


class Shares:
    def __init__(self) -> None:
        self._source_of: dict[EntryName, Source] = {}
        self._sizes: dict[Source, dict[EntryName, int]] = {}
        self._bytes: dict[Source, int] = {}
        """Sums of ranges, and of blocks."""
        self._in_key: dict[bytes, dict[Source, int]] = {}
        """Entries of each source under a key."""

    def __len__(self) -> int:
        return len(self._source_of)

    def sources(self, key: bytes) -> dict[Source, int]:
        return self._in_key.get(key, {})

    def source_of(self, name: EntryName) -> Source | None:
        return self._source_of.get(name)

    def move(self, name: EntryName, size: int, source: Source | None) -> None:
        """Note that an entry of `size` bytes is `source`'s now; None: it is gone, or came from a source that is not
        counted."""
        before = self._source_of.pop(name, None)
        if before is not None:
            self._count(name, before, -1, -self._sizes[before].pop(name))
            if not self._sizes[before]:
                del self._sizes[before]
        if source is not None:
            self._source_of[name] = source
            self._sizes.setdefault(source, {})[name] = size
            self._count(name, source, 1, size)

    def allow(self, source: Source | None, size: int, total: int) -> bool:
        """Return True if a source's share of `total` bytes has room for this many more."""
        if source is None:
            return True
        most = total // (BLOCK_SHARE if source.copied else RANGE_SHARE)
        of_block = self._bytes.get(source.block, 0)
        return self._bytes.get(source, 0) + size <= most and of_block + size <= total // BLOCK_SHARE

    def crowding(self, source: Source | None, size: int) -> Source | None:
        """Return the source with most bytes if it has to yield: it has more than `source` with `size` more."""
        most = max(self._sizes, key=self._bytes.__getitem__, default=None)
        if source is None or most is None or self._bytes[most] <= self._bytes.get(source, 0) + size:
            return None
        return most

    def crowding_in(self, key: bytes, source: Source | None) -> Source | None:
        """Return the source with most entries of a key if it has to yield: it has more than `source` with one more."""
        counts = self.sources(key)
        most = max(counts, key=counts.__getitem__, default=None)
        if source is None or most is None or counts[most] <= counts.get(source, 0) + 1:
            return None
        return most

    def some_of(self, source: Source, count: int) -> list[EntryName]:
        return list(islice(self._sizes[source], count))

    def _count(self, name: EntryName, source: Source, entries: int, size: int) -> None:
        in_key = self._in_key.setdefault(name[0], {})
        _add(in_key, source, entries)
        if not in_key:
            del self._in_key[name[0]]
        _add(self._bytes, source, size)
        _add(self._bytes, source.block, size)


def _add(sums: dict[Source, int], source: Source, change: int) -> None:
    total = sums.get(source, 0) + change
    if total:
        sums[source] = total
    else:
        sums.pop(source, None)
