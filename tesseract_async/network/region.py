"""Keys whose nearest nodes are nearer than chance would have it, and how to find who else lives around them. Pure.

Ids cost nothing: whoever makes some tens of thousands has the k nodes nearest to a key, and could hide what is stored
there. But ids that were made for a key lie much nearer to it than k nodes of the network do on average. Where that is
seen, records go to everybody in the region where k nodes are expected, and are looked for there: those who live in it
by chance cannot be driven out, however many ids lie nearer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from tesseract_async.network.contacts import ID_BYTES, Contact
from tesseract_async.network.lookup import Lookup
from tesseract_async.network.operations import Search

if TYPE_CHECKING:
    from tesseract_async.network.protocol import NetworkProtocol

CAPTURED = 0.5
"""k nodes within this share of the radius in which they are expected: by chance for one key of some hundred."""
REACH = 1.5
"""How far beyond that radius the region goes."""
NUM_LOOKUPS = 6
"""Of random ids in the region."""
MAX_MEMBERS = 160
"""Nodes of a region that are asked, or given a record."""
MAX_SAMPLES = 15
NUM_PROBES = 3
"""Random ids that a newcomer looks up: the own neighbourhood alone could be somebody's, too."""


class Density:
    """How far from a key its k nearest nodes are to be expected."""

    def __init__(self, network: NetworkProtocol) -> None:
        self._network = network
        self._samples: dict[bytes, int] = {}

    @property
    def was_sampled(self) -> bool:
        """Whether anything but the own neighbourhood is known."""
        return bool(self._samples)

    def note(self, target: bytes, closest: Sequence[Contact]) -> None:
        """A lookup ended: these answered, nearest first."""
        if len(closest) >= self._network.settings.k:
            self._samples.pop(target, None)
            self._samples[target] = closest[-1].number ^ int.from_bytes(target, "big")
            if len(self._samples) > MAX_SAMPLES:
                del self._samples[next(iter(self._samples))]

    def probe(self, now: float) -> None:
        """Takes samples at places that nobody could choose."""
        network = self._network
        for _ in range(NUM_PROBES):
            target = network.random.randbytes(ID_BYTES)
            start = network.table.closest(int.from_bytes(target, "big"), network.settings.k)
            found: list[Search] = []
            ended = partial(self._probed, target, found)
            found.append(Search(network, target, start, now, on_end=ended, num_paths=1))
            found[0].advance(now)

    def _probed(self, target: bytes, found: list[Search], now: float) -> None:
        self.note(target, found.pop().lookup.closest())

    def radius(self) -> int:
        """The distance within which k nodes live: the median of what lookups found, each key counted once, and of the
        own neighbourhood. 0 while fewer than k are known: everybody is a neighbour."""
        table, k = self._network.table, self._network.settings.k
        if len(table) < k:
            return 0
        own = table.closest(table.own_number, k)[-1].number ^ table.own_number
        samples = sorted([own, *self._samples.values()])
        return samples[len(samples) // 2]

    def is_captured(self, target: int, contacts: Sequence[Contact]) -> bool:
        """Whether so many of these are nearer to `target` than k nodes would be by chance."""
        limit = int(CAPTURED * self.radius())
        return sum(contact.number ^ target < limit for contact in contacts) >= self._network.settings.k


class Region:
    """Looks up random ids around a key, and tells who answered there: nearest first, `MAX_MEMBERS` at most."""

    def __init__(
        self,
        network: NetworkProtocol,
        key: bytes,
        lookup: Lookup,
        now: float,
        on_end: Callable[[list[Contact], float], None],
    ) -> None:
        """`lookup` is the one that found the key's neighbourhood captured."""
        network.metrics.count("network_regions_searched")
        self._network = network
        self._number = int.from_bytes(key, "big")
        self._radius = network.density.radius()
        self._found = {contact.raw: contact for contact in lookup.answered_within(int(REACH * self._radius))}
        self._on_end = on_end
        self._searches: list[Search] = []
        self._num_searching = NUM_LOOKUPS
        k = network.settings.k
        for index in range(NUM_LOOKUPS):
            number = self._number ^ network.random.randrange(self._radius)
            start = {contact.raw: contact for contact in (*network.table.closest(number, k), *lookup.closest())}
            target = number.to_bytes(ID_BYTES, "big")
            ended = partial(self._ended, index)
            self._searches.append(Search(network, target, list(start.values()), now, on_end=ended, num_paths=2))
        for search in list(self._searches):
            search.advance(now)

    def _ended(self, index: int, now: float) -> None:
        reach = int(REACH * self._radius)
        for contact in self._searches[index].lookup.closest():
            if contact.number ^ self._number < reach:
                self._found.setdefault(contact.raw, contact)
        self._num_searching -= 1
        if not self._num_searching:
            self._searches.clear()
            self._on_end(self._members(), now)

    def _members(self) -> list[Contact]:
        """Of one address range a few; where they are too many, any of them: who is nearest chose to be."""
        network = self._network
        ranges: dict[bytes, int] = {}
        members: list[Contact] = []
        for contact in sorted(self._found.values(), key=lambda contact: contact.number ^ self._number):
            if contact.range is not None:
                ranges[contact.range] = ranges.get(contact.range, 0) + 1
                if ranges[contact.range] > network.settings.max_range_per_holder_set:
                    continue
            members.append(contact)
        if len(members) > MAX_MEMBERS:
            members = network.random.sample(members, MAX_MEMBERS)
            members.sort(key=lambda contact: contact.number ^ self._number)
        return members
