"""Holders keep their dictionaries equal: with newcomers that are closer to a key, and among each other. Pure.

Only owners renew: holders copy records verbatim, to nodes that have become close to the key. Of the k holders of a
key the three nearest do the work, so that it is done about three times, not k times, and still done when one is gone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING

from tesseract_async.errors import ProtocolError
from tesseract_async.identity import SignedRecord
from tesseract_async.network import datagrams as wire
from tesseract_async.network.calls import Call, Unwatched
from tesseract_async.network.contacts import Contact
from tesseract_async.network.datagrams import Reply
from tesseract_async.network.storage import RANGE_SIZE

if TYPE_CHECKING:
    from tesseract_async.network.protocol import NetworkProtocol

NUM_REPLICATORS = 3
"""Holders of a key that copy it to others."""
KEYS_PER_SLICE = 32
"""Keys looked at in one go; a longer list is worked off over several turns of the loop."""
SLICE_PAUSE = 0.02
MAX_NEWCOMERS = 256
PING_TIME = 5.0
"""Seconds within which silent neighbours have answered or are known to be gone."""


class Replicator:
    """Decides what this node copies to whom, in slices that never hold up the loop."""

    def __init__(self, network: NetworkProtocol, *, now: float) -> None:
        self.network = network
        self.period_at = now + network.settings.republish_period * (0.5 + network.random.random())
        self._newcomers: deque[Contact] = deque(maxlen=MAX_NEWCOMERS)
        self._work: Iterator[float] | None = None
        """A round under way; each step gives the seconds until the next."""
        self._work_at = float("inf")

    def timer_at(self) -> float:
        """When `handle_timer` has something to do."""
        return min(self.period_at, self._work_at)

    def newcomer(self, contact: Contact, now: float) -> None:
        """A contact entered the routing table. It may be nearer to some keys than their holders so far."""
        if not self.network.storage.num_entries:
            return
        table = self.network.table
        neighbours = table.closest(table.own_number, 2 * table.k)
        # whoever is far from this node is far from the keys that this node holds
        if (
            len(neighbours) < 2 * table.k
            or contact.number ^ table.own_number <= neighbours[-1].number ^ table.own_number
        ):
            self._newcomers.append(contact)
            if self._work is None:
                self._begin(now)

    def handle_timer(self, now: float) -> None:
        """Works off a slice, or begins the periodic round."""
        if self.period_at <= now:
            period = self.network.settings.republish_period
            self.period_at = now + period * (0.75 + 0.5 * self.network.random.random())
            if self.network.storage.num_entries:
                self._begin(now, everybody=True)
        if self._work is not None and self._work_at <= now:
            self._now = now
            pause = next(self._work, None)
            if pause is None:
                self._work = None
                self._work_at = float("inf")
                if self._newcomers:
                    self._begin(now)
            else:
                self._work_at = now + pause

    def _begin(self, now: float, *, everybody: bool = False) -> None:
        newcomers = None if everybody else list(self._newcomers)
        self._newcomers.clear()
        self._work = self._round(newcomers)
        self._work_at = now

    def _ping_silent_neighbours(self) -> Iterator[float]:
        """The dead must be known as such: else the three who should copy a key may all be among them.

        Who is farther than these three is not asked: not counted as alive, it only makes another one copy too.
        """
        network, table = self.network, self.network.table
        for index, key in enumerate(network.storage.keys()):
            if index % KEYS_PER_SLICE == KEYS_PER_SLICE - 1:
                yield SLICE_PAUSE
            for contact in table.closest(int.from_bytes(key, "big"), NUM_REPLICATORS):
                if contact.last_seen < self._now - network.settings.republish_period / 2:
                    network.ping(contact, self._now)
        yield PING_TIME

    def _round(self, newcomers: list[Contact] | None) -> Iterator[float]:
        """Looks at every key: is this node one of those who copy it, and to whom? Yields between slices."""
        network, table = self.network, self.network.table
        k = table.k
        if newcomers is None:
            yield from self._ping_silent_neighbours()
        for index, key in enumerate(network.storage.keys()):
            if index % KEYS_PER_SLICE == KEYS_PER_SLICE - 1:
                yield SLICE_PAUSE
            target = int.from_bytes(key, "big")
            closest = table.closest(target, k)
            own_distance = table.own_number ^ target
            fresh = self._now - network.settings.republish_period / 2 - 2 * PING_TIME
            rank = sum(
                1
                for contact in closest
                if contact.number ^ target < own_distance
                and contact.last_seen > fresh
                and (newcomers is None or contact not in newcomers)
            )
            if rank >= NUM_REPLICATORS:
                continue
            for contact in closest if newcomers is None else newcomers:
                if newcomers is None or contact in closest:
                    Sync(network, key, contact, self._now)

    _now = 0.0


class Sync:
    """Brings one contact's dictionary up to this node's: asks for its digests, sends what differs."""

    def __init__(self, network: NetworkProtocol, key: bytes, contact: Contact, now: float) -> None:
        self.network = network
        self.key = key
        network.call(self, wire.GET, (key,), contact, now)

    def call_answered(self, call: Call, reply: Reply, now: float) -> None:
        network = self.network
        assert call.contact is not None
        if reply.flags & wire.FLAG_CLIENT:
            return
        try:
            summary, bodies = wire.read_value(reply.results)
            if wire.is_copy(reply.results):
                summary, bodies = None, []
        except ProtocolError:
            network.drop("malformed")
            return
        own = network.storage.summary(self.key)
        if own is None:
            return
        theirs = set(bodies)
        missing: list[SignedRecord] = []
        for record in network.storage.records(self.key):
            index = record.slot // RANGE_SIZE
            if bodies or summary is None:
                if record.body not in theirs:
                    missing.append(record)
            elif summary.digests[index] != own.digests[index]:
                missing.append(record)
        for items in wire.store_items(missing):
            network.metrics.count("network_records_copied", len(items))
            network.call(Unwatched(), wire.STORE, (items,), call.contact, now)

    def call_stalled(self, call: Call, now: float) -> None:
        pass

    def call_failed(self, call: Call, now: float) -> None:
        pass
