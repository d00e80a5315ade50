"""Storing records on the nodes closest to their keys. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from tesseract_async.errors import ProtocolError
from tesseract_async.identity import SignedRecord
from tesseract_async.network import datagrams as wire
from tesseract_async.network.calls import STALL, Call
from tesseract_async.network.contacts import Contact, address_range
from tesseract_async.network.datagrams import Reply
from tesseract_async.network.events import WriteFinished
from tesseract_async.network.operations import Search
from tesseract_async.network.region import Region
from tesseract_async.network.storage import Outcome

if TYPE_CHECKING:
    from tesseract_async.network.protocol import NetworkProtocol

PATIENCE = 4.0
"""How many times as long as the others needed a late holder is waited for."""
SHORTEST_WAIT = 0.05
"""Seconds for which the last few are waited for in any case: event loops pause."""


class Write:
    """Stores records, each on the k nodes closest to its key. Records that share a holder share datagrams.

    It ends when every holder has answered. Once half of them have, those that are late are not waited for beyond
    `PATIENCE` times as long as these needed: a dead one would cost every writer a second. Once three quarters have,
    nobody is: on a quick network the first time-out of a dead one is thirty times what the others take.
    """

    def __init__(self, network: NetworkProtocol, records: Sequence[SignedRecord]) -> None:
        assert records
        self.network = network
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
        self._num_late = 0
        self._sent_at = 0.0
        self._answered_at = 0.0

    def start(self, number: int, now: float) -> None:
        self._event = WriteFinished(number, self.num_holders, self.num_outdated)
        network, settings = self.network, self.network.settings
        for key in self._indices:
            start = network.table.closest(int.from_bytes(key, "big"), settings.k)
            if network.joined and len(start) < settings.k and all(_at_hand(item, now) for item in start):
                # fewer nodes than a record has holders: everybody is one, and nobody needs to be searched
                self._found(key, start, now)
            else:
                _HolderSearch(self, key, start, now)

    def _found(self, key: bytes, holders: list[Contact], now: float) -> None:
        """The nodes closest to one key are known."""
        if self.cancelled:
            return
        network = self.network
        target = int.from_bytes(key, "big")
        own_distance = network.table.own_number ^ target
        is_holder = network.public and (len(holders) < network.settings.k or own_distance < holders[-1].number ^ target)
        if is_holder and len(holders) == network.settings.k:
            del holders[-1]
        if is_holder or not holders:
            for index in self._indices[key]:
                self.num_holders[index] += network.storage.add(self.records[index], network.wall(now)).held
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

    def _stored(self, indices: list[int], outcomes: list[Outcome], now: float) -> None:
        """One STORE ended; without outcomes if there was no answer."""
        for index, outcome in zip(indices, outcomes, strict=False):
            self.num_holders[index] += outcome.held
            self.num_outdated[index] += outcome is Outcome.OUTDATED
            self.network.metrics.count("network_stores", outcome=outcome.name.lower())
        self._num_waiting -= 1
        if outcomes:
            self._answered_at = now
        self._end_if_done(now)

    def _late(self, change: int, now: float) -> None:
        self._num_late += change
        self._end_if_done(now)

    def _end_if_done(self, now: float) -> None:
        if self.cancelled:
            return
        if self._num_waiting:
            answered = self._num_sent - self._num_waiting
            num_missed = 0 if 4 * answered >= 3 * self._num_sent else self._num_waiting - self._num_late
            if num_missed > 0 or 2 * answered < self._num_sent:
                return
            give_up_at = self._sent_at + PATIENCE * (self._answered_at - self._sent_at)
            if self._num_waiting > self._num_late:
                give_up_at = max(give_up_at, self._sent_at + SHORTEST_WAIT)
            if now < give_up_at:
                self.network.timers.start(give_up_at, lambda now: self._give_up(give_up_at, now))
                return
        self.cancelled = True
        self.network.finish(self, self._event)

    def _give_up(self, due: float, now: float) -> None:
        if now - due > STALL:
            # this loop stood still meanwhile: the replies may lie in the socket, which is read first
            self.network.timers.start(now + SHORTEST_WAIT, self._end_if_done)
        else:
            self._end_if_done(now)


def _at_hand(contact: Contact, now: float) -> bool:
    """Whether it takes a record without further ado, and lives where whoever writes is listed at once.

    Elsewhere newcomers wait to be dialled by a third node (`probation`), and a short table may not be everybody.
    """
    return contact.token_until > now and address_range(contact.address) is None


class _HolderSearch:
    """Finds the nodes closest to one key of a write."""

    def __init__(self, write: Write, key: bytes, start: Sequence[Contact], now: float) -> None:
        self.write = write
        self.key = key
        self.search = Search(write.network, key, start, now, on_end=self._end)
        self.search.advance(now)

    def _end(self, now: float) -> None:
        network, lookup = self.write.network, self.search.lookup
        closest = lookup.closest(max_per_range=network.settings.max_range_per_holder_set)
        if network.density.is_captured(lookup.target, lookup.closest()):
            Region(network, self.key, lookup, now, partial(self.write._found, self.key))
        else:
            network.density.note(self.key, closest)
            self.write._found(self.key, closest, now)


class _Store:
    """One STORE to one holder; repeated once if its token was out of date."""

    def __init__(self, write: Write, contact: Contact, indices: list[int], now: float) -> None:
        self.write = write
        self.indices = indices
        # whoever is late with something else already will not be waited for again
        self.late = contact.late
        write._num_late += contact.late
        self.repeated = False
        self._send(contact, now)

    def _send(self, contact: Contact, now: float) -> None:
        records = self.write.records
        items = [records[index].key + records[index].body for index in self.indices]
        self.write.network.call(self, wire.STORE, (items,), contact, now)

    def call_answered(self, call: Call, reply: Reply, now: float) -> None:
        assert call.contact is not None
        if self.late:
            self.late = False
            self.write._late(-1, now)
        try:
            outcomes = wire.read_outcomes(reply.results, len(self.indices))
        except ProtocolError:
            self.write.network.drop("malformed")
            outcomes = []
        if Outcome.BAD_TOKEN in outcomes and not self.repeated:
            # the holder changed its secret since: its reply brought a new token
            self.repeated = True
            self._send(call.contact, now)
        else:
            self.write._stored(self.indices, outcomes, now)

    def call_stalled(self, call: Call, now: float) -> None:
        if not self.late:
            self.late = True
            self.write._late(1, now)

    def call_failed(self, call: Call, now: float) -> None:
        if self.late:
            self.late = False
            self.write._num_late -= 1
        self.write._stored(self.indices, [], now)
