"""How densely ids lie: keys whose nearest nodes are nearer than chance would have it stand out. Pure.

Ids cost nothing: with some tens of thousands of them, anybody has the k nodes nearest to a key, and could hide what is
stored there. But ids that were made for a key lie much nearer to it than k nodes of the network do on average.
"""

from __future__ import annotations

from collections.abc import Sequence

from tesseract_async.lru import LRU
from tesseract_async.network.contacts import Contact
from tesseract_async.network.routing import RoutingTable

CAPTURED = 0.5
"""k nodes within this share of the radius in which they are expected: by chance for one key of some hundred."""
MAX_SAMPLES = 15


class Density:
    """How far from a key its k nearest nodes are to be expected."""

    def __init__(self, table: RoutingTable) -> None:
        self._table = table
        self._samples: LRU[int, int] = LRU(MAX_SAMPLES)

    @property
    def was_sampled(self) -> bool:
        """True if anything but this node's own neighborhood is known."""
        return bool(self._samples)

    def note(self, target: int, closest: Sequence[Contact]) -> None:
        """Learn from a lookup that ended: these answered, nearest first."""
        if len(closest) >= self._table.k:
            self._samples[target] = closest[-1].number ^ target

    def radius(self) -> int:
        """Return the distance within which k nodes live; 0 while fewer than k are known: all are neighbors then.

        It is the median of what lookups found, each key counted once, and of this node's own neighborhood.
        """
        table = self._table
        if len(table) < table.k:
            return 0
        own = table.closest(table.own_number, table.k)[-1].number ^ table.own_number
        samples = sorted([own, *self._samples.values()])
        return samples[len(samples) // 2]

    def is_captured(self, target: int, contacts: Sequence[Contact]) -> bool:
        """Return True if so many of these are nearer to `target` than k nodes would be by chance."""
        limit = int(CAPTURED * self.radius())
        return sum(contact.number ^ target < limit for contact in contacts) >= self._table.k
