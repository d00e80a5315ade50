"""One node as a holder of others' records: takes what is brought, and serves it. Pure.

Everything that is brought is untrusted. Cheap objections come first: a flood of old records costs no signature checks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tesseract_async.errors import InvalidRecord
from tesseract_async.identity import SignedRecord
from tesseract_async.lru import LRU
from tesseract_async.network import datagrams as wire
from tesseract_async.network.contacts import Address, Contact, address_range, source_of
from tesseract_async.network.core import Core
from tesseract_async.network.routing_table import K
from tesseract_async.network.shares import Source
from tesseract_async.network.storage import StoreOutcome

CHECK_COST = 4.0
"""The part of a source's budget that checking a signature takes."""

RecordCheck = Callable[[SignedRecord], bool]
"""Returns False for a record that is not to be held although its signature holds; True for kinds it does not know."""

MAX_COPIES = 256
"""Copies that one node keeps; the oldest make room."""
LONGEST = 30.0
"""Seconds for which a copy lives next to its holders."""
SHORTEST = 1.0
"""Seconds below which a copy is not worth a signature check."""


class Holder:
    """The records of others, and the copies of single values, that one node keeps and serves."""

    def __init__(self, core: Core, checks: Sequence[RecordCheck]) -> None:
        self._core = core
        self.copies = PathCache()
        self._checks = tuple(checks)

    def get(self, key: bytes, asker: bytes, room: int, now: float) -> Sequence[object]:
        """Answer GET in `room` bytes: records, or their digests, or a copy; and contacts near the key."""
        core = self._core
        count, digests, bodies = 0, b"", core.storage.bodies_if_fit(key, room - 10)
        copy = self.copies.get(key, core.wall(now)) if bodies == [] else None
        if copy is not None and len(copy.body) + 13 <= room:
            room -= len(copy.body) + 3
            core.metrics.count("network_copies_served")
            return (1, b"", [copy.body], *core.closest_for(key, asker, room), True)
        if bodies is None:
            summary = core.storage.summary(key)
            assert summary is not None
            count, digests = wire.write_summary(summary)
            room -= len(digests)
        else:
            count = len(bodies)
            room -= sum(len(body) + 3 for body in bodies)
        return (count, digests, bodies or [], *core.closest_for(key, asker, room))

    def store(self, key: bytes, body: bytes, sender: bytes, address: Address, now: float) -> StoreOutcome:
        """Verify an untrusted record and keep it. `address` is proven, `sender` is only what the node there says."""
        core = self._core
        if not core.public or not self._is_near(key):
            return StoreOutcome.REFUSED
        range_ = address_range(address)
        try:
            record = SignedRecord.decode_unverified(key, body)
            # the owner counts, not who sent it: holders copy what others own
            if not core.policy.allows(record.owner, "host"):
                return StoreOutcome.REFUSED
            source = None
            if range_ is not None:
                # a listed node has proven its id and may copy others' records; any other counts as their owner
                holder = core.table.get(sender) if sender != record.owner else None
                source = Source(range_, copied=holder is not None and holder.address == address)
            outcome = core.storage.check(record, core.wall(now), source)
            if outcome is not None:
                return outcome
            if not core.limiter.allows(source_of(address), CHECK_COST, now):
                return StoreOutcome.FULL
            self._check(record)
        except InvalidRecord:
            core.outbox.drop("invalid_record")
            return StoreOutcome.INVALID
        self.copies.drop(key)
        return core.storage.put(record, source)

    def _is_near(self, key: bytes) -> bool:
        """Return True if a record may belong here: fewer than k known nodes are nearer to its key, or it is near.

        That is three times as far as holders live: tables name the dead, and where ids were made to lie next to a key,
        records go to the whole region.
        """
        core, target = self._core, int.from_bytes(key, "big")
        own_distance = core.table.own_number ^ target
        closest = core.table.closest(target, K)
        if len(closest) < K or own_distance < closest[-1].number ^ target:
            return True
        return own_distance < 3 * core.density.radius()

    def keep_copy(self, arguments: list[object], address: Address, now: float) -> None:
        """Keep an untrusted single value for a while, where this node lies on the way to its holders.

        Raises: ProtocolError.
        """
        core = self._core
        key, body = wire.read_item(arguments)
        wall = core.wall(now)
        record = SignedRecord.decode_unverified(key, body)
        target = int.from_bytes(key, "big")
        seconds = lifetime(core.table.own_number, target, core.table.closest(target, K), k=K)
        if not seconds or not core.public or core.storage.summary(key) is not None:
            return
        if self.copies.wants(record, wall) and core.policy.allows(record.owner, "host"):
            if not core.limiter.allows(source_of(address), CHECK_COST, now):
                core.outbox.drop("rate")
                return
            self._check(record)
            self.copies.put(record, wall + seconds)

    def _check(self, record: SignedRecord) -> None:
        """Check everything that a holder can know about a record. Raises: InvalidRecord."""
        record.check(verify=self._core.verify)
        if not all(check(record) for check in self._checks):
            raise InvalidRecord("a record that does not belong under its key")


class PathCache:
    """Copies of single values on the way to their holders: many nodes answer for what everybody reads.

    A node that has read a single value leaves a copy with the node nearest to the key that answered and had none
    (Kademlia, section 2.3). A copy is not a holding: it is never counted as one, never copied on, and lives the shorter
    the more nodes lie between its node and the key (section 4.1), at most `LONGEST`. Dictionaries are never kept, as a
    copy of one would be stale at every change of any entry. A replaced single value is not shown from a copy: a reader
    believes copies only together with a holder that says the same.

    Times are wall-clock seconds. Records must have been verified before `put`.
    """

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
        self._copies[record.key] = (min(until, record.expiration), record)

    def drop(self, key: bytes) -> None:
        """Forget the copy under `key`, if there is one."""
        self._copies.pop(key, None)

    def expire(self, wall: float) -> None:
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
