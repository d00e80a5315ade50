"""What a node does with records that others bring, and for those who ask. Pure.

Everything that is brought is untrusted. Cheap objections come first: a flood of old records costs no signature checks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from tesseract_async.admission import Policy
from tesseract_async.errors import InvalidRecord
from tesseract_async.identity import SignedRecord
from tesseract_async.network import datagrams as wire
from tesseract_async.network.caching import lifetime
from tesseract_async.network.contacts import Address, address_range
from tesseract_async.network.shares import Source
from tesseract_async.network.storage import Outcome

if TYPE_CHECKING:
    from tesseract_async.network.protocol import NetworkProtocol

CHECK_COST = 4.0
"""Of a source's budget, for a signature that is checked."""

RecordCheck = Callable[[SignedRecord], bool]
"""Whether a holder keeps a record whose signature holds: what a higher room knows about records of its kind."""


class Holder:
    """One node as a holder of others' records."""

    def __init__(self, network: NetworkProtocol, *, policy: Policy, checks: Sequence[RecordCheck]) -> None:
        self._network = network
        self.policy = policy
        self._checks = tuple(checks)

    def get(self, key: bytes, asker: bytes, room: int, now: float) -> Sequence[Any]:
        """The results of a GET, in `room` bytes: records, or their digests, or a copy; and contacts near the key."""
        network = self._network
        count, digests, bodies = 0, b"", network.storage.bodies_if_fit(key, room - 10)
        copy = network.copies.get(key, network.wall(now)) if bodies == [] else None
        if copy is not None and len(copy.body) + 13 <= room:
            room -= len(copy.body) + 3
            network.metrics.count("network_copies_served")
            return (1, b"", [copy.body], *network.closest_for(key, asker, room), True)
        if bodies is None:
            summary = network.storage.summary(key)
            assert summary is not None
            count, digests = wire.write_summary(summary)
            room -= len(digests)
        else:
            count = len(bodies)
            room -= sum(len(body) + 3 for body in bodies)
        return (count, digests, bodies or [], *network.closest_for(key, asker, room))

    def store(self, key: bytes, body: bytes, sender: bytes, address: Address, now: float) -> Outcome:
        """Verifies an untrusted record and keeps it. `address` is proven, `sender` is what somebody there says."""
        network = self._network
        if not network.public or not self._is_near(key):
            return Outcome.REFUSED
        range_ = address_range(address)
        try:
            record = SignedRecord.decode_unverified(key, body)
            # the owner counts, not who sent it: holders copy what others own
            if not self.policy.allows(record.owner, "store"):
                return Outcome.REFUSED
            source = None
            if range_ is not None:
                # who proved its id and is listed may copy others' records; whoever else says so counts as their owner
                holder = network.table.get(sender) if sender != record.owner else None
                source = Source(range_, copied=holder is not None and holder.address == address)
            outcome = network.storage.check(record, network.wall(now), source)
            if outcome is not None:
                return outcome
            if not network.limiter.allows(address, CHECK_COST, now):
                return Outcome.FULL
            self._check(record)
        except InvalidRecord:
            network.drop("invalid_record")
            return Outcome.INVALID
        network.storage.put(record, source)
        network.copies.drop(key)
        return Outcome.STORED

    def _is_near(self, key: bytes) -> bool:
        """Whether a record may belong here: fewer than k are known that are nearer to its key, or it is near enough.

        That is three times as far as holders live: tables name the dead, and where ids were made to lie next to a key,
        records go to the whole region.
        """
        network, target = self._network, int.from_bytes(key, "big")
        own_distance = network.table.own_number ^ target
        closest = network.table.closest(target, network.settings.k)
        if len(closest) < network.settings.k or own_distance < closest[-1].number ^ target:
            return True
        return own_distance < 3 * network.density.radius()

    def keep_copy(self, arguments: list[Any], address: Address, now: float) -> None:
        """Keeps an untrusted single value for a while, where this node lies on the way to its holders.

        Raises: ProtocolError.
        """
        network = self._network
        key, body = wire.read_item(arguments)
        wall = network.wall(now)
        record = SignedRecord.decode_unverified(key, body)
        target = int.from_bytes(key, "big")
        settings = network.settings
        closest = network.table.closest(target, settings.k)
        longest = settings.path_cache_lifetime
        seconds = lifetime(network.table.own_number, target, closest, k=settings.k, longest=longest)
        if not seconds or not network.public or network.storage.summary(key) is not None:
            return
        if network.copies.wants(record, wall) and self.policy.allows(record.owner, "store"):
            if not network.limiter.allows(address, CHECK_COST, now):
                network.drop("rate")
                return
            self._check(record)
            network.copies.put(record, wall + seconds)

    def _check(self, record: SignedRecord) -> None:
        """Looks at everything that a holder can know about a record. Raises: InvalidRecord."""
        record.check(verify=self._network.verify)
        if not all(check(record) for check in self._checks):
            raise InvalidRecord("a record that does not belong under its key")
