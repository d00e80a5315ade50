"""One node as a holder of others' records: takes what is brought, and serves it. Pure.

Everything that is brought is untrusted. Cheap objections come first: a flood of old records costs no signature checks.
"""

from collections.abc import Callable, Sequence

from tesseract_async.errors import InvalidRecord
from tesseract_async.identity import SignedRecord
from tesseract_async.lru import LRU
from tesseract_async.network import datagrams as wire
from tesseract_async.network.contacts import Address, address_range, source_of
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
COPY_SECONDS = 30.0
"""Seconds for which a copy lives."""


class Holder:
    """The records of others that one node keeps and serves, and copies of single values on the way to their holders.

    A node that has read a single value leaves a copy with the node nearest to the key that answered and had none
    (Kademlia, section 2.3): many nodes answer for what everybody reads. A copy is not a holding: it is never counted as
    one nor copied on, and readers believe it only together with a holder that says the same.
    """

    def __init__(self, core: Core, checks: Sequence[RecordCheck]) -> None:
        self._core = core
        self.copies: LRU[bytes, tuple[float, SignedRecord]] = LRU(MAX_COPIES)
        """By key: until when each lives (wall-clock seconds), and the record."""
        self._checks = tuple(checks)

    def get(self, key: bytes, asker: bytes, room: int, now: float) -> Sequence[object]:
        """Answer GET in `room` bytes: records, or their digests, or a copy; and contacts near the key."""
        core = self._core
        count, digests, bodies = 0, b"", core.storage.bodies_if_fit(key, room - 10)
        copy = self._copy(key, core.wall(now)) if bodies == [] else None
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
        self.copies.pop(key, None)
        return core.storage.put(record, source)

    def _is_near(self, key: bytes) -> bool:
        """Return True if a record may belong here: fewer than k known nodes are nearer to its key, or it is near."""
        distance = self._core.table.own_number ^ int.from_bytes(key, "big")
        return self._is_among_closest(key) or distance < 3 * self._core.density.radius()

    def _is_among_closest(self, key: bytes) -> bool:
        table, target = self._core.table, int.from_bytes(key, "big")
        closest = table.closest(target, K)
        return len(closest) < K or table.own_number ^ target < closest[-1].number ^ target

    def keep_copy(self, arguments: list[object], address: Address, now: float) -> None:
        """Keep an untrusted single value for a while, where this node lies on the way to its holders.

        Raises: ProtocolError.
        """
        core = self._core
        key, body = wire.read_item(arguments)
        wall = core.wall(now)
        record = SignedRecord.decode_unverified(key, body)
        if not core.public or core.storage.summary(key) is not None or self._is_among_closest(key):
            return
        kept = self._copy(key, wall)
        if record.subkey is not None or record.tombstone or record.expiration <= wall:
            return
        if (kept is None or record.sequence > kept.sequence) and core.policy.allows(record.owner, "host"):
            if not core.limiter.allows(source_of(address), CHECK_COST, now):
                core.outbox.drop("rate")
                return
            self._check(record)
            self.copies[key] = (min(wall + COPY_SECONDS, record.expiration), record)

    def expire_copies(self, wall: float) -> None:
        for key in [key for key, (until, _) in self.copies.items() if until <= wall]:
            del self.copies[key]

    def _copy(self, key: bytes, wall: float) -> SignedRecord | None:
        until, record = self.copies.get(key, (0.0, None))
        return record if until > wall else None

    def _check(self, record: SignedRecord) -> None:
        """Check everything that a holder can know about a record. Raises: InvalidRecord."""
        record.check(verify=self._core.verify)
        if not all(check(record) for check in self._checks):
            raise InvalidRecord("a record that does not belong under its key")
