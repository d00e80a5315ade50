"""The region around a key whose nearest nodes are nearer than chance would have it (see `density`). Pure.

There, records go to everybody in the region where k nodes are expected, and are looked for there: nodes that live in it
by chance cannot be driven out, however many ids lie nearer.
"""

from __future__ import annotations

from collections.abc import Callable

from tesseract_async.network.contacts import ID_BYTES, Contact
from tesseract_async.network.core import Core
from tesseract_async.network.lookup import Lookup
from tesseract_async.network.operations import Search
from tesseract_async.network.routing import K

REACH = 1.5
"""How far the region reaches, in radii within which k nodes are expected."""
NUM_LOOKUPS = 6
"""Lookups of random ids in the region."""
MAX_MEMBERS = 160
"""Nodes of a region that are asked, or given a record."""
MAX_RANGE_PER_HOLDER_SET = 2
"""Holders of one address range among those of a record. In a read, those of one range count as one."""


class Region:
    """Looks up random ids around a key, and reports the nodes that answered: nearest first, `MAX_MEMBERS` at most."""

    def __init__(
        self,
        core: Core,
        lookup: Lookup,
        now: float,
        on_end: Callable[[list[Contact], float], None],
    ) -> None:
        """`lookup` is the one that found the key's neighborhood captured."""
        core.metrics.count("network_regions_searched")
        self._core = core
        self._number = lookup.target
        self._radius = core.density.radius()
        self._found = {contact.raw: contact for contact in lookup.answered_within(int(REACH * self._radius))}
        self._on_end = on_end
        self._num_searching = NUM_LOOKUPS
        searches: list[Search] = []
        for _ in range(NUM_LOOKUPS):
            number = self._number ^ core.random.randrange(self._radius)
            start = {contact.raw: contact for contact in (*core.table.closest(number, K), *lookup.closest())}
            target = number.to_bytes(ID_BYTES, "big")
            searches.append(Search(core, target, list(start.values()), now, on_end=self._ended, num_paths=2))
        for search in searches:
            search.advance(now)

    def _ended(self, lookup: Lookup, now: float) -> None:
        reach = int(REACH * self._radius)
        for contact in lookup.closest():
            if contact.number ^ self._number < reach:
                self._found.setdefault(contact.raw, contact)
        self._num_searching -= 1
        if not self._num_searching:
            self._on_end(self._members(), now)

    def _members(self) -> list[Contact]:
        """Return a few of each address range; of too many any, as the nearest may have chosen to be nearest."""
        core = self._core
        ranges: dict[bytes, int] = {}
        members: list[Contact] = []
        for contact in sorted(self._found.values(), key=lambda contact: contact.number ^ self._number):
            if contact.range is not None:
                ranges[contact.range] = ranges.get(contact.range, 0) + 1
                if ranges[contact.range] > MAX_RANGE_PER_HOLDER_SET:
                    continue
            members.append(contact)
        if len(members) > MAX_MEMBERS:
            members = core.random.sample(members, MAX_MEMBERS)
            members.sort(key=lambda contact: contact.number ^ self._number)
        return members
