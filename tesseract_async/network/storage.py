"""What a node holds for others: signed records by key, with digests and pages in hash order. Pure.

A key's records form a dictionary whose entries are told apart by (subkey, owner). Every entry has a *slot*, 64 bits of
a hash of that identity; pages and range digests follow the order of slots, so that they mean the same at every holder.
"""

from __future__ import annotations

import enum
import heapq
from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass, field

from tesseract_async.identity import PeerID, SignedRecord
from tesseract_async.network.settings import CLOCK_SKEW, NetworkSettings

NUM_RANGES = 16
"""Parts of a dictionary that have digests of their own."""
RANGE_SIZE = 2**64 // NUM_RANGES
ENTRY_OVERHEAD = 600
"""Bytes of memory that an entry costs beside its record."""

EntryID = tuple[str | None, PeerID]


class Outcome(enum.IntEnum):
    """What a holder made of a record. Only the first two mean that it holds it."""

    STORED = 0
    ALREADY_HELD = 1
    OUTDATED = 2
    """The holder has a newer one."""
    EXPIRED = 3
    TOO_LONG = 4
    """It would live longer than the holder allows, or its owner's clock is wrong."""
    FULL = 5
    """A quota (bytes, entries of the key, entries of the owner) is exhausted."""
    BAD_TOKEN = 6
    """The sender has not proven its address."""
    INVALID = 7
    """The record is malformed or its signature does not hold."""
    REFUSED = 8
    """The node holds nothing for others (it is a client), or nothing of this owner."""

    @property
    def held(self) -> bool:
        return self <= Outcome.ALREADY_HELD


@dataclass(frozen=True, slots=True)
class Summary:
    """A dictionary in 132 bytes: how many entries, and a digest for each range of slots."""

    count: int
    digests: tuple[int, ...]
    """`NUM_RANGES` sums of the digests of the records in the range, modulo 2**64; 0 where it is empty."""


@dataclass(slots=True)
class _Dictionary:
    entries: dict[EntryID, SignedRecord] = field(default_factory=dict)
    order: list[tuple[int, EntryID]] = field(default_factory=list)
    """(slot, identity) of each entry, sorted."""
    digests: list[int] = field(default_factory=lambda: [0] * NUM_RANGES)
    owners: dict[PeerID, int] = field(default_factory=dict)
    sources: dict[bytes, int] = field(default_factory=dict)
    """Entries by the address range that first sent them."""
    source_of: dict[EntryID, bytes] = field(default_factory=dict)


class Storage:
    """The records of one node. Times are wall-clock seconds. Records must have been verified before `add`."""

    def __init__(self, settings: NetworkSettings) -> None:
        self._settings = settings
        self._keys: dict[bytes, _Dictionary] = {}
        self._expirations: list[tuple[float, bytes, bytes, int]] = []
        """A heap of (removal time, key, digest of the identity, sequence)."""
        self._by_heap: dict[tuple[bytes, bytes], EntryID] = {}
        self.num_entries = 0
        self.num_bytes = 0

    def keys(self) -> list[bytes]:
        """Every key that has entries."""
        return list(self._keys)

    def check(self, record: SignedRecord, wall: float, source: bytes | None = None) -> Outcome | None:
        """What `add` would answer without changing anything, or None where it would store: spares a verification.

        `source` is the address range that sent the record, None where ranges are not counted.
        """
        if record.expiration + CLOCK_SKEW <= wall:
            return Outcome.EXPIRED
        # a tombstone outlives what it hides by the skew
        if record.expiration > wall + self._settings.max_ttl + CLOCK_SKEW * (1 + record.tombstone):
            return Outcome.TOO_LONG
        if record.sequence > (wall + CLOCK_SKEW + self._settings.max_ttl) * 1e6:
            return Outcome.TOO_LONG
        dictionary = self._keys.get(record.key)
        held = dictionary.entries.get((record.subkey, record.owner)) if dictionary else None
        if held is not None:
            if held.body == record.body:
                return Outcome.ALREADY_HELD
            return None if record.supersedes(held) else Outcome.OUTDATED
        if self.num_bytes + len(record.body) + ENTRY_OVERHEAD > self._settings.max_storage_bytes:
            return Outcome.FULL
        if dictionary is not None:
            if len(dictionary.entries) >= self._settings.max_entries_per_key:
                return Outcome.FULL
            if dictionary.owners.get(record.owner, 0) >= self._settings.max_entries_per_owner:
                return Outcome.FULL
            if source is not None and dictionary.sources.get(source, 0) >= self._settings.max_entries_per_range:
                return Outcome.FULL
        return None

    def add(self, record: SignedRecord, wall: float, source: bytes | None = None) -> Outcome:
        """Keeps a verified record unless `check` objects."""
        outcome = self.check(record, wall, source)
        if outcome is None:
            self.put(record, source)
            return Outcome.STORED
        return outcome

    def put(self, record: SignedRecord, source: bytes | None = None) -> None:
        """Keeps a verified record to which `check` did not object."""
        identity = (record.subkey, record.owner)
        dictionary = self._keys.setdefault(record.key, _Dictionary())
        slot = record.slot
        old = dictionary.entries.get(identity)
        if old is None:
            insort(dictionary.order, (slot, identity), key=_slot_of)
            dictionary.owners[record.owner] = dictionary.owners.get(record.owner, 0) + 1
            if source is not None:
                dictionary.sources[source] = dictionary.sources.get(source, 0) + 1
                dictionary.source_of[identity] = source
            self.num_entries += 1
            self.num_bytes += len(record.body) + ENTRY_OVERHEAD
        else:
            self._mix(dictionary, slot, -old.digest)
            self.num_bytes += len(record.body) - len(old.body)
        dictionary.entries[identity] = record
        self._mix(dictionary, slot, record.digest)
        handle = slot.to_bytes(8, "big") + record.owner
        self._by_heap[(record.key, handle)] = identity
        heapq.heappush(self._expirations, (record.expiration + CLOCK_SKEW, record.key, handle, record.sequence))

    def records(self, key: bytes) -> list[SignedRecord]:
        """All records under `key`, tombstones included, in no order."""
        dictionary = self._keys.get(key)
        return list(dictionary.entries.values()) if dictionary else []

    def get(self, key: bytes, subkey: str | None, owner: PeerID) -> SignedRecord | None:
        """One entry."""
        dictionary = self._keys.get(key)
        return dictionary.entries.get((subkey, owner)) if dictionary else None

    def summary(self, key: bytes) -> Summary | None:
        """Count and range digests of `key`, or None where nothing is held."""
        dictionary = self._keys.get(key)
        return Summary(len(dictionary.entries), tuple(dictionary.digests)) if dictionary else None

    def bodies_if_fit(self, key: bytes, room: int) -> list[bytes] | None:
        """The bodies of all records of `key` if they fit into `room` bytes of msgpack, else None."""
        dictionary = self._keys.get(key)
        if dictionary is None:
            return []
        if len(dictionary.entries) * 116 > room:
            return None
        bodies = [record.body for record in dictionary.entries.values()]
        return bodies if sum(len(body) + 3 for body in bodies) <= room else None

    def page(self, key: bytes, start: int, end: int, room: int) -> tuple[list[bytes], int | None]:
        """Bodies with ``start <= slot < end`` in order of slots, as many as fit into `room` bytes of msgpack.

        The second value is the slot to go on from, None at the end of the range. A page always advances: an entry that
        shares its slot with one on this page is on this page, or skipped (two SHA-256 hashes share 64 bits by chance
        never).
        """
        dictionary = self._keys.get(key)
        bodies: list[bytes] = []
        if dictionary is None:
            return bodies, None
        for position in range(bisect_left(dictionary.order, start, key=_slot_of), len(dictionary.order)):
            slot, identity = dictionary.order[position]
            if slot >= end:
                break
            body = dictionary.entries[identity].body
            room -= len(body) + 3
            if room < 0 and bodies:
                return bodies, slot
            bodies.append(body)
        return bodies, None

    def expire(self, wall: float) -> int:
        """Drops what has expired (by more than the tolerated clock skew). Returns how many entries."""
        num_dropped = 0
        while self._expirations and self._expirations[0][0] <= wall:
            _, key, handle, sequence = heapq.heappop(self._expirations)
            identity = self._by_heap.get((key, handle))
            if identity is None or self._keys[key].entries[identity].sequence != sequence:
                continue
            record = self._keys[key].entries[identity]
            if record.expiration + CLOCK_SKEW > wall:
                continue
            del self._by_heap[(key, handle)]
            self._remove(record)
            num_dropped += 1
        return num_dropped

    def timer_at(self) -> float | None:
        """The wall-clock time at which `expire` next has something to look at."""
        return self._expirations[0][0] if self._expirations else None

    def __iter__(self) -> Iterator[SignedRecord]:
        for dictionary in list(self._keys.values()):
            yield from list(dictionary.entries.values())

    def _remove(self, record: SignedRecord) -> None:
        identity = (record.subkey, record.owner)
        dictionary = self._keys[record.key]
        slot = record.slot
        del dictionary.entries[identity]
        position = bisect_left(dictionary.order, slot, key=_slot_of)
        while dictionary.order[position][1] != identity:
            position += 1
        del dictionary.order[position]
        self._mix(dictionary, slot, -record.digest)
        dictionary.owners[record.owner] -= 1
        if not dictionary.owners[record.owner]:
            del dictionary.owners[record.owner]
        source = dictionary.source_of.pop(identity, None)
        if source is not None:
            dictionary.sources[source] -= 1
            if not dictionary.sources[source]:
                del dictionary.sources[source]
        self.num_entries -= 1
        self.num_bytes -= len(record.body) + ENTRY_OVERHEAD
        if not dictionary.entries:
            del self._keys[record.key]

    @staticmethod
    def _mix(dictionary: _Dictionary, slot: int, digest: int) -> None:
        index = slot // RANGE_SIZE
        dictionary.digests[index] = (dictionary.digests[index] + digest) % 2**64


def summarise(records: Iterator[SignedRecord] | list[SignedRecord]) -> Summary:
    """What a holder of exactly these records would report."""
    digests = [0] * NUM_RANGES
    count = 0
    for record in records:
        index = record.slot // RANGE_SIZE
        digests[index] = (digests[index] + record.digest) % 2**64
        count += 1
    return Summary(count, tuple(digests))


def _slot_of(item: tuple[int, EntryID]) -> int:
    return item[0]
