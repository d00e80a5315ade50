"""Copying among the holders of a key, and to newcomers that are closer to it. Pure.

Only owners renew: holders copy records verbatim, to nodes that have become close to the key. Of the k holders of a
key the three nearest do the work, so that it is done about three times, not k times, and still done when one is gone.
"""

from collections import deque
from collections.abc import Iterator

from tesseract_async.identity import SignedRecord
from tesseract_async.network import datagrams as wire
from tesseract_async.network.contacts import Contact
from tesseract_async.network.core import Core
from tesseract_async.network.datagrams import RpcReply
from tesseract_async.network.routing_table import K
from tesseract_async.network.rpcs import Call, Caller
from tesseract_async.network.storage import RANGE_SIZE
from tesseract_async.network.timers import Timer

NUM_REPLICATORS = 3
"""Holders of a key that copy it to others."""
KEYS_PER_SLICE = 32
"""Keys looked at in one go; a longer list is worked off over several turns of the loop."""
SLICE_PAUSE = 0.02
MAX_NEWCOMERS = 256
PING_TIME = 5.0
"""Seconds within which silent neighbors have answered or are known to be gone."""


class Replicator:
    """The choice of what this node copies to which others, made in slices that never hold up the loop."""

    def __init__(self, core: Core, now: float) -> None:
        self._core = core
        self._now = now
        self._newcomers: deque[Contact] = deque(maxlen=MAX_NEWCOMERS)
        self._work: Iterator[float] | None = None
        """A round in progress; each step gives the seconds until the next."""
        self._timer: Timer | None = None
        """Rings when its next step is due."""
        core.timers.start(now + core.settings.republish_period * (0.5 + core.random.random()), self._begin_period)

    def newcomer(self, contact: Contact, now: float) -> None:
        """A contact entered the routing table. It may be nearer to some keys than their holders so far."""
        if not self._core.storage.num_entries:
            return
        table = self._core.table
        neighbors = table.closest(table.own_number, 2 * K)
        # a node far from this one is far from the keys that this node holds
        if len(neighbors) < 2 * K or contact.number ^ table.own_number <= neighbors[-1].number ^ table.own_number:
            self._newcomers.append(contact)
            if self._work is None:
                self._begin(now)

    def _begin_period(self, now: float) -> None:
        core = self._core
        core.timers.start(now + core.settings.republish_period * core.jitter(), self._begin_period)
        if core.storage.num_entries:
            self._begin(now, everybody=True)

    def _begin(self, now: float, *, everybody: bool = False) -> None:
        newcomers = None if everybody else list(self._newcomers)
        self._newcomers.clear()
        self._work = self._round(newcomers)
        self._core.timers.cancel(self._timer)
        self._timer = self._core.timers.start(now, self._step)

    def _step(self, now: float) -> None:
        assert self._work is not None
        self._now = now
        pause = next(self._work, None)
        if pause is not None:
            self._timer = self._core.timers.start(now + pause, self._step)
        else:
            self._work = None
            if self._newcomers:
                self._begin(now)

    def _ping_silent_neighbors(self) -> Iterator[float]:
        """Find out which neighbors are dead: else the three that should copy a key may all be among them."""
        core, table = self._core, self._core.table
        for index, key in enumerate(core.storage.keys()):
            if index % KEYS_PER_SLICE == KEYS_PER_SLICE - 1:
                yield SLICE_PAUSE
            for contact in table.closest(int.from_bytes(key, "big"), NUM_REPLICATORS):
                if contact.last_seen < self._now - core.settings.republish_period / 2:
                    core.ping(contact, self._now)
        yield PING_TIME

    def _round(self, newcomers: list[Contact] | None) -> Iterator[float]:
        """Look at every key: is this node one of those that copy it, and to which? Yield between slices."""
        core, table = self._core, self._core.table
        if newcomers is None:
            yield from self._ping_silent_neighbors()
        for index, key in enumerate(core.storage.keys()):
            if index % KEYS_PER_SLICE == KEYS_PER_SLICE - 1:
                yield SLICE_PAUSE
            target = int.from_bytes(key, "big")
            closest = table.closest(target, K)
            own_distance = table.own_number ^ target
            fresh = self._now - core.settings.republish_period / 2 - 2 * PING_TIME
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
                    _Sync(core, key, contact, self._now)


class _Sync(Caller):
    """A comparison of one contact's dictionary with this node's: it asks for its digests, and sends what differs."""

    def __init__(self, core: Core, key: bytes, contact: Contact, now: float) -> None:
        self._core = core
        self._key = key
        core.call(self, wire.GET, (key,), contact, now)

    def call_answered(self, call: Call, reply: RpcReply, now: float) -> None:
        core = self._core
        assert call.contact is not None
        if reply.flags & wire.FLAG_CLIENT:
            return
        summary, bodies = wire.read_value(reply.results)
        own = core.storage.summary(self._key)
        if own is None:
            return
        theirs = set(bodies)
        missing: list[SignedRecord] = []
        for record in core.storage.records(self._key):
            index = record.slot // RANGE_SIZE
            if bodies or summary is None:
                if record.body not in theirs:
                    missing.append(record)
            elif summary.digests[index] != own.digests[index]:
                missing.append(record)
        for items in wire.store_items(missing):
            core.metrics.count("network_records_copied", len(items))
            core.call(Caller(), wire.STORE, (items,), call.contact, now)
