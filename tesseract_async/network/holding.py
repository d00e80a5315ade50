"""One node as a holder of others' records: takes the records that are brought, and serves them. Pure.

Everything that is brought is untrusted. Cheap objections come first: a flood of old records costs no signature checks.
"""

from collections.abc import Callable, Sequence

from tesseract_async.errors import InvalidRecord
from tesseract_async.identity import SignedRecord
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


class Holder:
    """The records of others that one node keeps and serves."""

    def __init__(self, core: Core, checks: Sequence[RecordCheck]) -> None:
        self._core = core
        self._checks = tuple(checks)

    def get(self, key: bytes, asker: bytes, room: int) -> Sequence[object]:
        """Answer GET in `room` bytes: records or their digests, and contacts near the key."""
        core = self._core
        bodies = core.storage.bodies_if_fit(key, room - 10)
        if bodies is not None:
            room -= sum(len(body) + 3 for body in bodies)
            return (len(bodies), b"", bodies, *core.closest_for(key, asker, room))
        summary = core.storage.summary(key)
        assert summary is not None
        count, digests = wire.write_summary(summary)
        return (count, digests, [], *core.closest_for(key, asker, room - len(digests)))

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
            record.check(verify=core.verify)
            if not all(check(record) for check in self._checks):
                raise InvalidRecord("a record that does not belong under its key")
        except InvalidRecord:
            core.outbox.drop("invalid_record")
            return StoreOutcome.INVALID
        return core.storage.put(record, source)

    def _is_near(self, key: bytes) -> bool:
        """Return True if a record may belong here: fewer than k known nodes are nearer to its key, or it is near."""
        table, target = self._core.table, int.from_bytes(key, "big")
        closest, distance = table.closest(target, K), table.own_number ^ target
        is_among_closest = len(closest) < K or distance < closest[-1].number ^ target
        return is_among_closest or distance < 3 * self._core.density.radius()
