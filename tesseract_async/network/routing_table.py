"""The routing table: buckets of contacts that split around this node's id (Maymounkov & Mazieres 2002). Pure.

Bucket i holds contacts whose ids share exactly i leading bits with this node's; the last bucket, the only one that
splits, holds all that share more. The table never sends anything: where a ping decides who stays, `add` says whom to
ping, and the caller reports what came of it (`seen` or `failed`).

Ids cost nothing: with some tens of thousands of them, anybody has the k nodes nearest to a key, and could hide what is
stored there. But ids that were made for a key lie much nearer to it than k nodes of the network do on average:
`Density` tells such keys.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from tesseract_async.lru import LRU
from tesseract_async.network.contacts import Contact

ID_BITS = 256
K = 20
"""Contacts per bucket, and holders per record (section 2.2). The same at all nodes of a network."""
QUESTIONABLE_AFTER = 300.0
"""Seconds of silence after which a contact is pinged before it keeps its place against a newcomer."""
MAX_RANGE_PER_BUCKET = 2
"""Contacts of one address range (/24, /48) in a bucket; loopback and private addresses are exempt from ranges."""
MAX_RANGE_PER_TABLE = 10
CAPTURED = 0.5
"""k nodes within this share of the radius in which they are expected: by chance for one key of some hundred."""
MAX_SAMPLES = 15


def common_prefix(one: int, other: int) -> int:
    return ID_BITS - (one ^ other).bit_length()


@dataclass(slots=True, eq=False)
class Bucket:
    """At most k contacts, and as many that wait for a place."""

    last_lookup: float
    contacts: dict[bytes, Contact] = field(default_factory=dict)
    """The contacts by peer id, least recently seen first."""
    replacements: dict[bytes, Contact] = field(default_factory=dict)
    """Proven contacts that found the bucket full; the most recently seen last."""


class RoutingTable:
    """Proven contacts of public nodes, by distance from this node's id."""

    def __init__(self, own_id: bytes, *, now: float, k: int = K) -> None:
        self.own_number = int.from_bytes(own_id, "big")
        self.k = k
        self.buckets = [Bucket(now)]
        self.num_contacts = 0
        self._ranges: dict[bytes, int] = {}

    def __len__(self) -> int:
        return self.num_contacts

    def __contains__(self, peer_id: object) -> bool:
        return isinstance(peer_id, bytes) and peer_id in self._bucket_of(int.from_bytes(peer_id, "big")).contacts

    def contacts(self) -> list[Contact]:
        return [contact for bucket in self.buckets for contact in bucket.contacts.values()]

    def get(self, peer_id: bytes) -> Contact | None:
        return self._bucket_of(int.from_bytes(peer_id, "big")).contacts.get(peer_id)

    def wants(self, peer_id: bytes) -> bool:
        """Return True if a newcomer with that id would find a place at once: only then is it worth a ping."""
        number = int.from_bytes(peer_id, "big")
        bucket = self._bucket_of(number)
        if peer_id in bucket.contacts or number == self.own_number:
            return False
        return (
            len(bucket.contacts) < self.k or bucket is self.buckets[-1] or self._displaced(bucket, number) is not None
        )

    def add(self, contact: Contact, now: float) -> Contact | None:
        """Enter a proven contact that has just been heard from, or mark it as seen.

        In a full bucket it waits among the replacements; then the least recently seen contact is returned if it has
        been silent for long enough that the caller should ping it.
        """
        assert contact.proven
        if contact.number == self.own_number:
            return None
        while True:
            bucket = self._bucket_of(contact.number)
            old = bucket.contacts.pop(contact.peer_id, None)
            if old is contact:
                bucket.contacts[contact.peer_id] = contact
                return None
            if old is not None:
                self._count(old, -1)
            if not self._range_allows(bucket, contact):
                return None
            if len(bucket.contacts) < self.k:
                bucket.contacts[contact.peer_id] = contact
                bucket.replacements.pop(contact.peer_id, None)
                self._count(contact, 1)
                return None
            if bucket is not self.buckets[-1] or len(self.buckets) == ID_BITS:
                break
            self._split()
        bucket.replacements.pop(contact.peer_id, None)
        displaced = self._displaced(bucket, contact.number)
        if displaced is not None:
            del bucket.contacts[displaced.peer_id]
            self._count(displaced, -1)
            bucket.contacts[contact.peer_id] = contact
            self._count(contact, 1)
            contact = displaced
        bucket.replacements[contact.peer_id] = contact
        if len(bucket.replacements) > self.k:
            del bucket.replacements[next(iter(bucket.replacements))]
        oldest = next(iter(bucket.contacts.values()))
        return oldest if now - oldest.last_seen >= QUESTIONABLE_AFTER else None

    def remove(self, contact: Contact) -> Contact | None:
        """Drop a contact that failed or left. Return the most recently seen replacement, which takes its place."""
        bucket = self._bucket_of(contact.number)
        if bucket.replacements.get(contact.peer_id) is contact:
            del bucket.replacements[contact.peer_id]
        if bucket.contacts.get(contact.peer_id) is not contact:
            return None
        del bucket.contacts[contact.peer_id]
        self._count(contact, -1)
        while bucket.replacements:
            _, successor = bucket.replacements.popitem()
            if self._range_allows(bucket, successor):
                bucket.contacts[successor.peer_id] = successor
                self._count(successor, 1)
                return successor
        return None

    def closest(self, target: int, count: int, *, without: bytes = b"") -> list[Contact]:
        """Return the `count` contacts nearest to `target` by XOR, nearest first, but not the one with id `without`."""
        first = min(common_prefix(target, self.own_number), len(self.buckets) - 1)
        # contacts of bucket `first` share the most bits with the target; all deeper buckets share exactly `first` bits
        # with it, and each shallower one fewer: whole groups follow one another, so only groups need sorting
        found = _nearest(self.buckets[first].contacts.values(), target, count, without)
        if len(found) < count:
            deeper = [contact for bucket in self.buckets[first + 1 :] for contact in bucket.contacts.values()]
            found += _nearest(deeper, target, count - len(found), without)
        for index in range(first - 1, -1, -1):
            if len(found) >= count:
                break
            found += _nearest(self.buckets[index].contacts.values(), target, count - len(found), without)
        return found

    def touch(self, target: int, now: float) -> None:
        """Note that a lookup went through the bucket of `target`."""
        self._bucket_of(target).last_lookup = now

    def number_in_bucket(self, index: int, random_bits: int) -> int:
        """Return an id of bucket `index`: this node's prefix, one bit flipped, the rest from `random_bits`."""
        low = ID_BITS - 1 - index
        return ((self.own_number >> low) ^ 1) << low | random_bits & ((1 << low) - 1)

    def _bucket_of(self, number: int) -> Bucket:
        shared = ID_BITS - (number ^ self.own_number).bit_length()
        return self.buckets[shared] if shared < len(self.buckets) else self.buckets[-1]

    def _range_allows(self, bucket: Bucket, contact: Contact) -> bool:
        if contact.range is None:
            return True
        in_bucket = sum(1 for item in bucket.contacts.values() if item.range == contact.range)
        return in_bucket < MAX_RANGE_PER_BUCKET and self._ranges.get(contact.range, 0) < MAX_RANGE_PER_TABLE

    def _count(self, contact: Contact, change: int) -> None:
        self.num_contacts += change
        if contact.range is not None:
            self._ranges[contact.range] = self._ranges.get(contact.range, 0) + change
            if not self._ranges[contact.range]:
                del self._ranges[contact.range]

    def _displaced(self, bucket: Bucket, number: int) -> Contact | None:
        """Return the contact that leaves a full bucket for one among the k nearest to this node (section 2.4)."""
        if sum(len(item.contacts) for item in self.buckets[self.buckets.index(bucket) + 1 :]) >= self.k:
            return None
        farthest = max(bucket.contacts.values(), key=lambda contact: contact.number ^ self.own_number)
        return farthest if number ^ self.own_number < farthest.number ^ self.own_number else None

    def _split(self) -> None:
        index = len(self.buckets) - 1
        upper = self.buckets[index]
        lower = Bucket(upper.last_lookup)
        self.buckets.append(lower)
        for group, into in ((upper.contacts, lower.contacts), (upper.replacements, lower.replacements)):
            for peer_id in [key for key, item in group.items() if common_prefix(item.number, self.own_number) > index]:
                into[peer_id] = group.pop(peer_id)


class Density:
    """Estimates the distance from a key within which its k nearest nodes lie."""

    def __init__(self, table: RoutingTable) -> None:
        self._table = table
        self._samples: LRU[int, int] = LRU(MAX_SAMPLES)

    @property
    def was_sampled(self) -> bool:
        return bool(self._samples)

    def note(self, target: int, closest: Sequence[Contact]) -> None:
        """Learn from a lookup that ended: these answered, nearest first."""
        if len(closest) >= self._table.k:
            self._samples[target] = closest[-1].number ^ target

    def radius(self) -> int:
        """Return the distance within which k nodes live; 0 while fewer than k are known: all are neighbors then."""
        table = self._table
        if len(table) < table.k:
            return 0
        own = table.closest(table.own_number, table.k)[-1].number ^ table.own_number
        samples = sorted([own, *self._samples.values()])
        return samples[len(samples) // 2]

    def is_captured(self, target: int, contacts: Sequence[Contact]) -> bool:
        """Return True if at least k of these are nearer to `target` than k nodes would be by chance."""
        limit = int(CAPTURED * self.radius())
        return sum(contact.number ^ target < limit for contact in contacts) >= self._table.k


def _nearest(contacts: Iterable[Contact], target: int, count: int, without: bytes) -> list[Contact]:
    # the table's ids are distinct; every request comes through here, and calling a key function costs more than this
    by_distance = {contact.number ^ target: contact for contact in contacts}
    found = [by_distance[distance] for distance in sorted(by_distance)[: count + bool(without)]]
    if without:
        found = [contact for contact in found if contact.peer_id != without]
        del found[count:]
    return found
