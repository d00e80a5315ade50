"""Storing records on the nodes closest to their keys. Pure."""

from collections.abc import Sequence
from functools import partial

from tesseract_async.identity import SignedRecord
from tesseract_async.network import datagrams as wire
from tesseract_async.network.contacts import Contact
from tesseract_async.network.core import Core
from tesseract_async.network.datagrams import RpcReply
from tesseract_async.network.events import WriteFinished
from tesseract_async.network.lookup import Lookup
from tesseract_async.network.operations import MAX_RANGE_PER_HOLDER_SET, Region, Search
from tesseract_async.network.routing_table import K
from tesseract_async.network.rpcs import STALL, Call, Caller
from tesseract_async.network.storage import StoreOutcome

PATIENCE = 4.0
"""Late holders are waited for this many times as long as the others needed."""
SHORTEST_WAIT = 0.15
"""Seconds for which all are waited for in any case: event loops pause."""


class Write:
    """A write of records, each to the k nodes closest to its key. Records that share a holder share datagrams."""

    def __init__(self, core: Core, records: Sequence[SignedRecord]) -> None:
        assert records
        self.core = core
        self.records = records
        self.num_holders = [0] * len(records)
        self.num_outdated = [0] * len(records)
        self.cancelled = False
        self._indices: dict[bytes, list[int]] = {}
        for index, record in enumerate(records):
            self._indices.setdefault(record.key, []).append(index)
        self._num_searching = len(self._indices)
        self._to_send: dict[bytes, tuple[Contact, list[int]]] = {}
        self._num_sent = 0
        self._num_waiting = 0
        self._sent_at = 0.0
        self._answered_at = 0.0

    def start(self, number: int, now: float) -> None:
        self._event = WriteFinished(number, self.num_holders, self.num_outdated)
        core = self.core
        for key in self._indices:
            start = core.table.closest(int.from_bytes(key, "big"), K)
            if core.joined and len(start) < K and all(one.token_until > now and one.range is None for one in start):
                # fewer nodes than a record has holders, of which each takes it at once: nobody needs to be searched;
                # beyond this place newcomers wait to be dialed by a third node (`dial_back`), and these may not be all
                self._found(key, start, now)
            else:
                Search(core, key, start, now, on_end=partial(self._searched, key)).advance(now)

    def _searched(self, key: bytes, lookup: Lookup, now: float) -> None:
        core = self.core
        closest = lookup.closest(max_per_range=MAX_RANGE_PER_HOLDER_SET)
        if core.density.is_captured(lookup.target, lookup.closest()):
            Region(core, lookup, now, partial(self._found, key))
        else:
            core.density.note(lookup.target, closest)
            self._found(key, closest, now)

    def _found(self, key: bytes, holders: list[Contact], now: float) -> None:
        """Note the nodes closest to one key; once those of all keys are known, send the records."""
        if self.cancelled:
            return
        core = self.core
        target = int.from_bytes(key, "big")
        own_distance = core.table.own_number ^ target
        is_holder = core.public and (len(holders) < K or own_distance < holders[-1].number ^ target)
        if is_holder and len(holders) == K:
            del holders[-1]
        if is_holder or not holders:
            for index in self._indices[key]:
                self.num_holders[index] += core.storage.add(self.records[index], core.wall(now)).held
        for contact in holders:
            self._to_send.setdefault(contact.raw, (contact, []))[1].extend(self._indices[key])
        self._num_searching -= 1
        if not self._num_searching:
            self._sent_at = now
            for contact, indices in self._to_send.values():
                for part in wire.store_parts([self.records[index] for index in indices]):
                    self._num_sent += 1
                    self._num_waiting += 1
                    _Store(self, contact, [indices[position] for position in part], now)
            self._end_if_done(now)

    def _stored(self, indices: list[int], outcomes: list[StoreOutcome], now: float) -> None:
        for index, outcome in zip(indices, outcomes, strict=False):
            self.num_holders[index] += outcome.held
            self.num_outdated[index] += outcome is StoreOutcome.OUTDATED
            self.core.metrics.count("network_stores", outcome=outcome.name.lower())
        self._num_waiting -= 1
        if outcomes:
            self._answered_at = now
        self._end_if_done(now)

    def _end_if_done(self, now: float) -> None:
        if self.cancelled:
            return
        if self._num_waiting:
            if 2 * self._num_waiting > self._num_sent:
                return
            give_up_at = self._sent_at + max(SHORTEST_WAIT, PATIENCE * (self._answered_at - self._sent_at))
            if now < give_up_at:
                self.core.timers.start(give_up_at, lambda now: self._give_up(give_up_at, now))
                return
        self.cancelled = True
        self.core.outbox.emit(self._event)

    def _give_up(self, due: float, now: float) -> None:
        if now - due > STALL:
            # this loop stood still meanwhile: the replies may lie in the socket, which is read first
            self.core.timers.start(now + SHORTEST_WAIT, self._end_if_done)
        else:
            self._end_if_done(now)


class _Store(Caller):
    def __init__(self, write: Write, contact: Contact, indices: list[int], now: float) -> None:
        self.write = write
        self.indices = indices
        self.repeated = False
        self._send(contact, now)

    def _send(self, contact: Contact, now: float) -> None:
        records = self.write.records
        items = [records[index].key + records[index].body for index in self.indices]
        self.write.core.call(self, wire.STORE, (items,), contact, now)

    def call_answered(self, call: Call, reply: RpcReply, now: float) -> None:
        assert call.contact is not None
        outcomes = wire.read_outcomes(reply.results, len(self.indices))
        if StoreOutcome.BAD_TOKEN in outcomes and not self.repeated:
            # the holder changed its secret since: its reply brought a new token
            self.repeated = True
            self._send(call.contact, now)
        else:
            self.write._stored(self.indices, outcomes, now)

    def call_failed(self, call: Call, now: float) -> None:
        self.write._stored(self.indices, [], now)
