"""A store of signed records by key, with digests and pages in hash order. Pure.

A key's records form a dictionary whose entries are told apart by (subkey, owner). Every entry has a *slot*, 64 bits of
a hash of that identity; pages and range digests follow the order of slots, so that they mean the same at every holder.
"""

import enum
import heapq
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

from tesseract_async.identity import PeerID, SignedRecord
from tesseract_async.network.shares import Shares, Source

CLOCK_SKEW = 30.0
"""Seconds by which the clocks of two nodes may differ without harm."""
MAX_TTL = 86400.0
"""Seconds; records that live longer are refused."""
MAX_STORAGE_BYTES = 256 * 2**20
"""Bytes of records held for others; beyond them new entries are refused."""
MAX_ENTRIES_PER_KEY = 16384
MAX_ENTRIES_PER_OWNER = 1024
"""Entries of one dictionary by the same owner."""
MAX_ENTRIES_PER_RANGE = 1024
"""Entries of one dictionary that came from one address range."""
MAX_COPIES_PER_RANGE = 4096
"""Entries of one dictionary that holders of one range copied here: these are others', and in good faith many."""
NUM_RANGES = 16
"""Parts of a dictionary that have digests of their own."""
RANGE_SIZE = 2**64 // NUM_RANGES
ENTRY_OVERHEAD = 1000
"""Bytes of memory that an entry costs besides its record."""
SMALL = 32
"""Entries up to which a dictionary does without an index."""
NUM_WEIGHED = 32
"""Entries of one source among which the one that goes is chosen."""

EntryID = tuple[str | None, PeerID]


class StoreOutcome(enum.IntEnum):
    """The result of a STORE for one record. Only the first two mean that the node holds it."""

    STORED = 0
    ALREADY_HELD = 1
    OUTDATED = 2
    """The holder has a newer one."""
    EXPIRED = 3
    TOO_LONG = 4
    """The record would live longer than the holder allows, or its owner's clock is wrong."""
    FULL = 5
    """A quota (bytes, entries of the key, of the range, of the owner) is exhausted."""
    BAD_TOKEN = 6
    """The sender has not proven its address."""
    INVALID = 7
    """The record is malformed or its signature does not hold."""
    REFUSED = 8
    """The node holds nothing for others (it is a client), or nothing of this owner."""

    @property
    def held(self) -> bool:
        return self <= StoreOutcome.ALREADY_HELD


@dataclass(frozen=True, slots=True)
class Summary:
    """A dictionary in 132 bytes: how many entries, and a digest for each range of slots."""

    count: int
    digests: tuple[int, ...]
    """`NUM_RANGES` sums of the digests of the records in the range, modulo 2**64; 0 where it is empty."""


class _Index:
    __slots__ = ("digests", "order", "owners")

    def __init__(self, entries: dict[EntryID, SignedRecord]) -> None:
        self.order = sorted(((record.slot, identity) for identity, record in entries.items()), key=_slot_of)
        self.digests = list(summary_of(list(entries.values())).digests)
        self.owners = Counter(owner for _, owner in entries)

    def add(self, identity: EntryID, record: SignedRecord, old: SignedRecord | None) -> None:
        slot = record.slot
        if old is None:
            insort(self.order, (slot, identity), key=_slot_of)
            self.owners[record.owner] += 1
        self._mix(slot, record.digest - (old.digest if old is not None else 0))

    def remove(self, identity: EntryID, record: SignedRecord) -> None:
        slot = record.slot
        position = bisect_left(self.order, slot, key=_slot_of)
        while self.order[position][1] != identity:
            position += 1
        del self.order[position]
        self._mix(slot, -record.digest)
        self.owners[record.owner] -= 1
        if not self.owners[record.owner]:
            del self.owners[record.owner]

    def _mix(self, slot: int, change: int) -> None:
        index = slot // RANGE_SIZE
        self.digests[index] = (self.digests[index] + change) % 2**64


@dataclass(slots=True, eq=False)
class _Dictionary:
    """The entries of one key. Most keys have one, so the index is made when it is needed."""

    entries: dict[EntryID, SignedRecord] = field(default_factory=dict)
    index: _Index | None = None

    def count_of_owner(self, owner: PeerID) -> int:
        if self.index is not None:
            return self.index.owners[owner]
        return sum(1 for _, other in self.entries if other == owner)

    def summary(self) -> Summary:
        if self.index is not None:
            return Summary(len(self.entries), tuple(self.index.digests))
        return summary_of(list(self.entries.values()))

    def in_order(self, start: int) -> Iterator[tuple[int, SignedRecord]]:
        if self.index is not None:
            order = self.index.order
            for position in range(bisect_left(order, start, key=_slot_of), len(order)):
                slot, identity = order[position]
                yield slot, self.entries[identity]
        else:
            pairs = ((record.slot, record) for record in self.entries.values())
            yield from sorted((pair for pair in pairs if pair[0] >= start), key=lambda pair: pair[0])


class Storage:
    """The records of one node. Times are wall-clock seconds. Records must have been verified before `add`."""

    def __init__(self, max_bytes: int, *, own_number: int = 0, max_entries_per_key: int = MAX_ENTRIES_PER_KEY) -> None:
        """`own_number`: the node's id; to make room, records far from it go first."""
        self._max_bytes = max_bytes
        self._max_entries_per_key = max_entries_per_key
        self._own_number = own_number
        self.shares = Shares()
        self._keys: dict[bytes, _Dictionary] = {}
        self._expirations: list[tuple[float, int, SignedRecord]] = []
        """A heap of (removal time, number, record). Replaced records stay in it until it is rebuilt or they expire."""
        self._num_pushed = 0
        self.num_entries = 0
        self.num_bytes = 0

    def keys(self) -> list[bytes]:
        return list(self._keys)

    def check(self, record: SignedRecord, wall: float, source: Source | None = None) -> StoreOutcome | None:
        """Return what `add` would, but None where it would store, and change nothing. It spares a verification.

        `source`: where the record came from, None where ranges are not counted.
        """
        if record.expiration + CLOCK_SKEW <= wall:
            return StoreOutcome.EXPIRED
        # a tombstone outlives what it hides by the skew
        if record.expiration > wall + MAX_TTL + CLOCK_SKEW * (1 + record.tombstone):
            return StoreOutcome.TOO_LONG
        if record.sequence > (wall + CLOCK_SKEW + MAX_TTL) * 1e6:
            return StoreOutcome.TOO_LONG
        dictionary = self._keys.get(record.key)
        held = dictionary.entries.get((record.subkey, record.owner)) if dictionary else None
        if held is not None:
            if held.body == record.body:
                return StoreOutcome.ALREADY_HELD
            if not record.supersedes(held):
                return StoreOutcome.OUTDATED
            grows = len(record.body) - len(held.body)
            return StoreOutcome.FULL if 0 < grows > self._max_bytes - self.num_bytes else None
        size = len(record.body) + ENTRY_OVERHEAD
        if not self.shares.allow(source, size, self._max_bytes):
            return StoreOutcome.FULL
        if self.num_bytes + size > self._max_bytes and not self.shares.crowding(source, size):
            return StoreOutcome.FULL
        if dictionary is not None:
            if len(dictionary.entries) >= self._max_entries_per_key and not self.shares.crowding_in(record.key, source):
                return StoreOutcome.FULL
            if dictionary.count_of_owner(record.owner) >= MAX_ENTRIES_PER_OWNER:
                return StoreOutcome.FULL
            if source is not None:
                limit = MAX_COPIES_PER_RANGE if source.copied else MAX_ENTRIES_PER_RANGE
                if self.shares.sources(record.key).get(source, 0) >= limit:
                    return StoreOutcome.FULL
        return None

    def add(self, record: SignedRecord, wall: float, source: Source | None = None) -> StoreOutcome:
        outcome = self.check(record, wall, source)
        return self.put(record, source) if outcome is None else outcome

    def put(self, record: SignedRecord, source: Source | None = None) -> StoreOutcome:
        """Keep a verified record to which `check` did not object: STORED, or FULL where no room can be made for it."""
        identity = (record.subkey, record.owner)
        dictionary = self._keys.get(record.key)
        old = dictionary.entries.get(identity) if dictionary is not None else None
        if old is None:
            if not self._make_room(record, source):
                return StoreOutcome.FULL
            dictionary = self._keys.get(record.key)  # it may have gone with its last entry
        if dictionary is None:
            dictionary = self._keys[record.key] = _Dictionary()
        dictionary.entries[identity] = record
        if old is None:
            self.num_entries += 1
            self.num_bytes += len(record.body) + ENTRY_OVERHEAD
        else:
            self.num_bytes += len(record.body) - len(old.body)
        if source is None or source.copied:
            # an owner that renews its entry says where it comes from; a copier does not
            source = self.shares.source_of((record.key, identity)) or source
        self.shares.move((record.key, identity), len(record.body) + ENTRY_OVERHEAD, source)
        if dictionary.index is not None:
            dictionary.index.add(identity, record, old)
        elif len(dictionary.entries) > SMALL:
            dictionary.index = _Index(dictionary.entries)
        self._num_pushed += 1
        heapq.heappush(self._expirations, (record.expiration + CLOCK_SKEW, self._num_pushed, record))
        if len(self._expirations) > 2 * self.num_entries + 64:
            # an owner that replaces its entry again and again must not fill the heap
            live = [(item.expiration + CLOCK_SKEW, number, item) for number, item in enumerate(self)]
            heapq.heapify(live)
            self._expirations, self._num_pushed = live, len(live)
        return StoreOutcome.STORED

    def records(self, key: bytes) -> list[SignedRecord]:
        """Return all records under `key`, tombstones included, in no order."""
        dictionary = self._keys.get(key)
        return list(dictionary.entries.values()) if dictionary else []

    def summary(self, key: bytes) -> Summary | None:
        dictionary = self._keys.get(key)
        return dictionary.summary() if dictionary else None

    def bodies_if_fit(self, key: bytes, room: int) -> list[bytes] | None:
        """Return the bodies of all records of `key` if they fit into `room` bytes of msgpack, else None."""
        dictionary = self._keys.get(key)
        if dictionary is None:
            return []
        if len(dictionary.entries) * 116 > room:
            return None
        bodies = [record.body for record in dictionary.entries.values()]
        return bodies if sum(len(body) + 3 for body in bodies) <= room else None

    def page(self, key: bytes, start: int, end: int, room: int) -> tuple[list[bytes], int | None]:
        """Return bodies with ``start <= slot < end`` in order of slots, as many as fit into `room` bytes of msgpack.

        The second value is the slot to go on from, None at the end of the range. A page always advances: an entry that
        shares its slot with one on this page is on this page, or skipped (two SHA-256 hashes share 64 bits by chance
        never).
        """
        dictionary = self._keys.get(key)
        bodies: list[bytes] = []
        if dictionary is None:
            return bodies, None
        for slot, record in dictionary.in_order(start):
            if slot >= end:
                break
            room -= len(record.body) + 3
            if room < 0 and bodies:
                return bodies, slot
            bodies.append(record.body)
        return bodies, None

    def expire(self, wall: float) -> int:
        """Drop what has expired (by more than the tolerated clock skew); return how many entries."""
        num_dropped = 0
        while self._expirations and self._expirations[0][0] <= wall:
            _, _, record = heapq.heappop(self._expirations)
            dictionary = self._keys.get(record.key)
            if dictionary is None or dictionary.entries.get((record.subkey, record.owner)) is not record:
                continue
            self._remove(dictionary, record)
            num_dropped += 1
        return num_dropped

    def __iter__(self) -> Iterator[SignedRecord]:
        for dictionary in list(self._keys.values()):
            yield from list(dictionary.entries.values())

    def _make_room(self, record: SignedRecord, source: Source | None) -> bool:
        """Drop entries of the largest source until the newcomer fits: far ones, of keys with one source, first."""
        dictionary = self._keys.get(record.key)
        if dictionary is not None and len(dictionary.entries) >= self._max_entries_per_key:
            crowding = self.shares.crowding_in(record.key, source)
            if crowding is not None:
                names = ((record.key, identity) for identity in dictionary.entries)
                some = (name for name in names if self.shares.source_of(name) == crowding)
                self._drop_one(list(islice(some, NUM_WEIGHED)))
        size = len(record.body) + ENTRY_OVERHEAD
        while self.num_bytes + size > self._max_bytes:
            crowding = self.shares.crowding(source, size)
            if crowding is None:
                return False
            self._drop_one(self.shares.some_of(crowding, NUM_WEIGHED))
        return True

    def _drop_one(self, weighed: list[tuple[bytes, EntryID]]) -> None:
        def weight(name: tuple[bytes, EntryID]) -> tuple[bool, int, float]:
            dictionary = self._keys[name[0]]
            far = (int.from_bytes(name[0], "big") ^ self._own_number).bit_length()
            return len(self.shares.sources(name[0])) == 1, far, dictionary.entries[name[1]].expiration

        key, identity = max(weighed, key=weight)
        self._remove(self._keys[key], self._keys[key].entries[identity])

    def _remove(self, dictionary: _Dictionary, record: SignedRecord) -> None:
        identity = (record.subkey, record.owner)
        del dictionary.entries[identity]
        if dictionary.index is not None:
            dictionary.index.remove(identity, record)
        self.shares.move((record.key, identity), 0, None)
        self.num_entries -= 1
        self.num_bytes -= len(record.body) + ENTRY_OVERHEAD
        if not dictionary.entries:
            del self._keys[record.key]


def summary_of(records: Iterator[SignedRecord] | list[SignedRecord]) -> Summary:
    digests = [0] * NUM_RANGES
    count = 0
    for record in records:
        index = record.slot // RANGE_SIZE
        digests[index] = (digests[index] + record.digest) % 2**64
        count += 1
    return Summary(count, tuple(digests))


def _slot_of(item: tuple[int, EntryID]) -> int:
    return item[0]
