"""One node as a holder of others' records: takes what is brought, and serves it. Pure.

Everything that is brought is untrusted. Cheap objections come first: a flood of old records costs no signature checks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tesseract_async.errors import InvalidRecord
from tesseract_async.identity import SignedRecord
from tesseract_async.network import datagrams as wire
from tesseract_async.network.caching import PathCache, lifetime
from tesseract_async.network.contacts import Address, address_range
from tesseract_async.network.core import Core
from tesseract_async.network.routing import K
from tesseract_async.network.shares import Source
from tesseract_async.network.storage import StoreOutcome

CHECK_COST = 4.0
"""What a signature that is checked takes of a source's budget."""

RecordCheck = Callable[[SignedRecord], bool]
"""Returns False for a record that is not to be held although its signature holds; True for kinds it does not know."""


class Holder:
    """Keeps others' records, and copies of single values, and answers requests for them."""

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
            if not core.limiter.allows(address, CHECK_COST, now):
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
            if not core.limiter.allows(address, CHECK_COST, now):
                core.outbox.drop("rate")
                return
            self._check(record)
            self.copies.put(record, wall + seconds)

    def _check(self, record: SignedRecord) -> None:
        """Check everything that a holder can know about a record. Raises: InvalidRecord."""
        record.check(verify=self._core.verify)
        if not all(check(record) for check in self._checks):
            raise InvalidRecord("a record that does not belong under its key")
