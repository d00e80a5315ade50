"""Copies of single values on the way to their holders: many nodes answer for what everybody reads. Pure.

A node that has read a single value leaves a copy with the node nearest to the key that answered and had none (Kademlia,
section 2.3). A copy is not a holding: it is never counted as one, never copied on, and lives the shorter the more nodes
lie between its node and the key (section 4.1), at most `LONGEST`.

Dictionaries are never kept, as a copy of one would be stale at every change of any entry. A replaced single value
is not shown from a copy: a reader believes copies only together with a holder that says the same.
"""

from __future__ import annotations

from collections.abc import Sequence

from tesseract_async.identity import SignedRecord
from tesseract_async.lru import LRU
from tesseract_async.network.contacts import Contact

MAX_COPIES = 256
"""Copies that one node keeps; the oldest make room."""
LONGEST = 30.0
"""Seconds for which a copy lives next to its holders."""
SHORTEST = 1.0
"""Seconds below which a copy is not worth a signature check."""


class PathCache:
    """The copies of one node. Times are wall-clock seconds. Records must have been verified before `put`."""

    def __init__(self) -> None:
        self._copies: LRU[bytes, tuple[float, SignedRecord]] = LRU(MAX_COPIES)

    def __len__(self) -> int:
        return len(self._copies)

    def get(self, key: bytes, wall: float) -> SignedRecord | None:
        """Return the copy under `key`, unless its time is over."""
        until, record = self._copies.get(key, (0.0, None))
        if record is not None and until <= wall:
            del self._copies[key]
            return None
        return record

    def wants(self, record: SignedRecord, wall: float) -> bool:
        """Return True if it is a live single value, and newer than what is kept: else spare checking its signature."""
        if record.subkey is not None or record.tombstone or record.expiration <= wall:
            return False
        kept = self.get(record.key, wall)
        return kept is None or record.sequence > kept.sequence

    def put(self, record: SignedRecord, until: float) -> None:
        """Keep a verified record until then, or until it expires."""
        self._copies[record.key] = (min(until, record.expiration), record)

    def drop(self, key: bytes) -> None:
        """Forget the copy under `key`, if there is one."""
        self._copies.pop(key, None)

    def expire(self, wall: float) -> None:
        """Drop copies whose time is over."""
        for key in [key for key, (until, _) in self._copies.items() if until <= wall]:
            del self._copies[key]


def lifetime(own_number: int, target: int, closest: Sequence[Contact], *, k: int) -> float:
    """Return the seconds for which a node may keep a copy: half as long with every doubling of the nodes between.

    `closest` are the k contacts nearest to the key that the node knows. 0 where it is one of the k nearest itself (then
    it is a holder, or soon will be).
    """
    own_distance = own_number ^ target
    if len(closest) < k or own_distance < closest[-1].number ^ target:
        return 0.0
    # k nodes lie within the farthest of these, twice as many within one more bit of distance
    doublings = own_distance.bit_length() - (closest[-1].number ^ target).bit_length()
    seconds = LONGEST / 2**doublings
    return seconds if seconds >= SHORTEST else 0.0
