"""What a node does over several RPCs: searching, reading, writing, joining. Pure: each step is an answer coming in.

Operations hold their own state and talk to one `NetworkProtocol`, which sends their calls and tells them how these
ended.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from tesseract_async.errors import InvalidRecord, ProtocolError
from tesseract_async.identity import PeerID, SignedRecord
from tesseract_async.network import datagrams as wire
from tesseract_async.network.calls import Call, Unwatched
from tesseract_async.network.contacts import ID_BYTES, Address, Contact
from tesseract_async.network.datagrams import Reply
from tesseract_async.network.events import ReadFinished, WriteFinished
from tesseract_async.network.lookup import Lookup
from tesseract_async.network.storage import NUM_RANGES, RANGE_SIZE, EntryID, Outcome, Summary, summarise

if TYPE_CHECKING:
    from tesseract_async.network.protocol import NetworkProtocol


PATIENCE = 4.0
REFRESH_K = 8
"""How many of the nearest a lookup for a bucket's refresh asks."""
TYPICAL_RECORD_BYTES = 180
PAGE_BYTES = 1000
RECORDS_PER_SLICE = 24
"""Signatures of pages checked in one go: about 3 ms."""
SLICE_PAUSE = 1e-6
"""The next slice comes at the next turn of the loop."""
MAX_PARTS = 64
"""Parts of one of the `NUM_RANGES` ranges, each read by itself."""


class Search:
    """Drives a `Lookup` with FIND or GET requests, and calls back when it ends."""

    def __init__(
        self,
        network: NetworkProtocol,
        target: bytes,
        start: Sequence[Contact],
        *,
        on_answer: Callable[[Contact, Reply, float], None] | None = None,
        on_end: Callable[[float], None],
        alpha: int | None = None,
        k: int | None = None,
    ) -> None:
        settings = network.settings
        self.network = network
        self.target = target
        self.lookup = Lookup(
            int.from_bytes(target, "big"),
            start,
            k=settings.k if k is None else k,
            num_paths=settings.num_paths,
            alpha=settings.alpha if alpha is None else alpha,
            max_per_range=settings.max_range_per_shortlist,
        )
        self.ended = False
        self._on_answer = on_answer
        self._on_end = on_end

    def advance(self, now: float) -> None:
        """Asks whom the lookup wants asked; ends when it is finished."""
        if self.ended:
            return
        kind = wire.GET if self._on_answer is not None else wire.FIND
        for contact in self.lookup.to_ask():
            self.network.call(self, kind, (self.target,), contact, now)
        if self.lookup.finished:
            self.stop()
            self._on_end(now)

    def stop(self) -> None:
        """Takes no further answers."""
        if not self.ended:
            self.ended = True
            self.network.metrics.observe("network_lookup_rounds", self.lookup.num_rounds, bounds=range(1, 10))

    def call_answered(self, call: Call, reply: Reply, now: float) -> None:
        if self.ended:
            return
        assert call.contact is not None
        try:
            offset = 3 if self._on_answer is not None else 0
            if len(reply.results) < offset + 2:
                raise ProtocolError("a reply without contacts")
            found = self.network.contacts_from(call.contact, reply.results[offset], reply.results[offset + 1], now)
            if self._on_answer is not None:
                self._on_answer(call.contact, reply, now)
        except ProtocolError:
            self.network.drop_from(call.contact, "malformed")
            self.lookup.failed(call.contact)
        else:
            self.lookup.answered(call.contact, found)
        self.advance(now)

    def call_stalled(self, call: Call, now: float) -> None:
        if not self.ended and call.contact is not None:
            self.lookup.stalled(call.contact)
            self.advance(now)

    def call_failed(self, call: Call, now: float) -> None:
        if not self.ended and call.contact is not None:
            self.lookup.failed(call.contact)
            self.advance(now)


class Ping:
    """Asks a contact whether it is there and itself: a newcomer, or the oldest of a full bucket."""

    def __init__(self, network: NetworkProtocol, contact: Contact, now: float) -> None:
        self.network = network
        self.contact = contact
        network.call(self, wire.PING, (), contact, now)

    def call_answered(self, call: Call, reply: Reply, now: float) -> None:
        self.network.verified(self.contact)

    def call_stalled(self, call: Call, now: float) -> None:
        pass

    def call_failed(self, call: Call, now: float) -> None:
        self.network.verified(self.contact)


class Refresh:
    """A lookup for its side effect: the table learns contacts near `target`."""

    def __init__(self, network: NetworkProtocol, target: bytes | int, now: float) -> None:
        key = target if isinstance(target, bytes) else target.to_bytes(ID_BYTES, "big")
        start = network.table.closest(int.from_bytes(key, "big"), network.settings.k)
        # the bucket wants a few good contacts, not the complete neighbourhood of a random id
        self.search = Search(network, key, start, on_end=lambda now: None, k=REFRESH_K)
        self.search.advance(now)


class Neighbourhood:
    """Looks up the own id, so that this node and those closest to it know each other; then fills far buckets."""

    def __init__(self, network: NetworkProtocol, start: Iterable[Contact], now: float) -> None:
        self.network = network
        contacts = {contact.raw: contact for contact in start}
        closest = network.table.closest(network.table.own_number, network.settings.k)
        contacts.update((contact.raw, contact) for contact in closest)
        self.search = Search(network, network.own_id, list(contacts.values()), on_end=self._end)

    def start(self, now: float) -> None:
        """Sends the first requests."""
        self.search.advance(now)

    def _end(self, now: float) -> None:
        table = self.network.table
        self.network.neighbourhood_known(now)
        # section 2.3: refresh the buckets farther away than the closest neighbour, as far as they have room
        for index, bucket in enumerate(table.buckets[:-1]):
            if len(bucket.contacts) < table.k:
                self.network.refresh_bucket(index, now)


class Join:
    """Asks seeds for the own neighbourhood. A seed that knows nobody new costs one RPC: asking again and again is how
    two halves of a network find each other.
    """

    def __init__(self, network: NetworkProtocol, addresses: Mapping[Address, PeerID | None], now: float) -> None:
        self.network = network
        self.ids = addresses
        for address in addresses:
            network.call_address(self, wire.FIND, (network.own_id,), address, now)

    def call_answered(self, call: Call, reply: Reply, now: float) -> None:
        assert call.contact is not None
        network = self.network
        expected = self.ids[call.address]
        if expected is not None and call.contact.peer_id != expected:
            network.drop_from(call.contact, "wrong_id")
            network.metrics.count("network_seeds_with_another_id")
            return
        try:
            if len(reply.results) < 2:
                raise ProtocolError("a reply without contacts")
            found = network.contacts_from(call.contact, reply.results[0], reply.results[1], now)
        except ProtocolError:
            network.drop_from(call.contact, "malformed")
            return
        if not network.joined or any(contact.peer_id not in network.table for contact in found):
            network.learn_neighbourhood([call.contact, *found], now)

    def call_stalled(self, call: Call, now: float) -> None:
        pass

    def call_failed(self, call: Call, now: float) -> None:
        self.network.metrics.count("network_seeds_silent")


class Write:
    """Stores records, each on the k nodes closest to its key. Records that share a holder share datagrams.

    It ends when every holder has answered. Holders that are late are not waited for once half of them have answered
    and `PATIENCE` times as long as these needed has passed: a dead one would cost every writer a second.
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
            if network.joined and len(start) < settings.k and all(item.token_until > now for item in start):
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
        if is_holder:
            holders = holders[: network.settings.k - 1]
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
            if self._num_waiting > self._num_late or 2 * answered < self._num_sent:
                return
            give_up_at = self._sent_at + PATIENCE * (self._answered_at - self._sent_at)
            if now < give_up_at:
                self.network.schedule(give_up_at, self._end_if_done)
                return
        self.cancelled = True
        self.network.finish(self, self._event)


class _HolderSearch:
    """Finds the nodes closest to one key of a write."""

    def __init__(self, write: Write, key: bytes, start: Sequence[Contact], now: float) -> None:
        self.write = write
        self.key = key
        self.search = Search(write.network, key, start, on_end=self._end)
        self.search.advance(now)

    def _end(self, now: float) -> None:
        self.write._found(self.key, self.search.lookup.closest(), now)


class _Store:
    """One STORE to one holder; repeated once if its token was out of date."""

    def __init__(self, write: Write, contact: Contact, indices: list[int], now: float) -> None:
        self.write = write
        self.indices = indices
        self.late = False
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
            self.write.network.drop_from(call.contact, "malformed")
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


class Holding:
    """What one holder says that it holds of a dictionary."""

    __slots__ = ("contact", "records", "summary")

    def __init__(self, contact: Contact | None, summary: Summary, records: dict[EntryID, SignedRecord] | None) -> None:
        self.contact = contact
        """None for the own storage."""
        self.summary = summary
        self.records = records
        """What is known to be there; None while no record has been fetched."""


class Read:
    """Reads a dictionary: finds holders, compares their digests, fetches what differs once, merges, repairs.

    It ends when `num_equal_holders` report equal digests, else when the k nodes closest to the key have answered.
    """

    def __init__(self, network: NetworkProtocol, key: bytes) -> None:
        self.network = network
        self.key = key
        self.cancelled = False
        self._holdings: list[Holding] = []
        self._verified: dict[bytes, SignedRecord] = {}
        self._merged: dict[EntryID, SignedRecord] = {}
        self._unchecked: deque[tuple[_Fetch, int, int, list[bytes]]] = deque()
        self._fetches: deque[_Fetch] = deque()
        self._num_fetching = 0
        self._settled = False
        self.complete = True
        """False once some part that holders reported could be had from none of them."""
        self._number = 0

    def start(self, number: int, now: float) -> None:
        self._number = number
        own = {_entry_id(record): record for record in self.network.storage.records(self.key)}
        if own:
            for record in own.values():
                self._believe(record)
            summary = self.network.storage.summary(self.key)
            assert summary is not None
            self._holdings.append(Holding(None, summary, own))
        start = self.network.table.closest(int.from_bytes(self.key, "big"), self.network.settings.k)
        # a holder is among the other holders already: a few answers will do
        alpha = self.network.settings.num_paths if own else None
        self._search = Search(self.network, self.key, start, on_answer=self._hear, on_end=self._settle, alpha=alpha)
        self._search.advance(now)

    def _hear(self, contact: Contact, reply: Reply, now: float) -> None:
        if self.cancelled:
            self._search.stop()
            return
        summary, bodies = wire.read_value(reply.results)
        if summary is None:
            return
        records: dict[EntryID, SignedRecord] | None = None
        if bodies:
            records = {}
            for body in bodies:
                record = self._verify(body)
                records[_entry_id(record)] = record
            summary = summarise(list(records.values()))
        self._holdings.append(Holding(contact, summary, records))
        equal = [item for item in self._holdings if item.summary == summary]
        if len(equal) >= self.network.settings.num_equal_holders:
            self._search.stop()
            self._settle(now, equal)

    def _verify(self, body: bytes) -> SignedRecord:
        """Raises: InvalidRecord. Copies of the same bytes are checked once."""
        record = self._verified.get(body)
        if record is None:
            record = SignedRecord.decode(self.key, body, verify=self.network.verify)
            self._believe(record)
        return record

    def _believe(self, record: SignedRecord) -> None:
        self._verified[record.body] = record
        identity = _entry_id(record)
        held = self._merged.get(identity)
        if held is None or record.supersedes(held):
            self._merged[identity] = record

    def _settle(self, now: float, considered: list[Holding] | None = None) -> None:
        """Nobody else is asked for digests; what the considered holders hold is fetched where it is not known yet."""
        if self._settled or self.cancelled:
            return
        self._settled = True
        for index in range(NUM_RANGES):
            groups: dict[int, list[Holding]] = {}
            for holding in considered if considered is not None else self._holdings:
                groups.setdefault(holding.summary.digests[index], []).append(holding)
            for digest, group in groups.items():
                if digest and not any(item.records is not None for item in group):
                    # about a page each, so that all may be under way at once
                    count = max(item.summary.count for item in group)
                    num_parts = min(-(-count * TYPICAL_RECORD_BYTES // (NUM_RANGES * PAGE_BYTES)), MAX_PARTS)
                    step = RANGE_SIZE // num_parts
                    for part in range(num_parts):
                        start = index * RANGE_SIZE + part * step
                        end = (index + 1) * RANGE_SIZE if part == num_parts - 1 else start + step
                        sources = [item.contact for item in group if item.contact is not None]
                        self.network.random.shuffle(sources)
                        self._fetches.append(_Fetch(self, start, end - 1, sources))
        self._go_on(now)

    def _go_on(self, now: float) -> None:
        while self._fetches and self._num_fetching < self.network.settings.pages_in_flight:
            self._num_fetching += 1
            self._fetches.popleft().ask(now)
        if not self._num_fetching and not self._fetches and not self._unchecked and not self.cancelled:
            self._finish(now)

    def page(self, fetch: _Fetch, start: int, last: int, bodies: list[bytes], now: float) -> None:
        """A page of slots from `start` to `last` came. Its signatures are checked in slices that yield the loop."""
        self._unchecked.append((fetch, start, last, bodies))
        if len(self._unchecked) == 1:
            self.network.schedule(now + SLICE_PAUSE, self._check_slice)

    def _check_slice(self, now: float) -> None:
        num_checked = 0
        while self._unchecked and num_checked < RECORDS_PER_SLICE and not self.cancelled:
            fetch, start, last, bodies = self._unchecked[0]
            num_checked += len(bodies)
            try:
                for body in bodies:
                    if not start <= self._verify(body).slot <= last:
                        raise ProtocolError("a record outside the page that was asked for")
            except ProtocolError as error:
                reason = "invalid_record" if isinstance(error, InvalidRecord) else "malformed"
                self.network.drop_from(None, reason)
                self._fetches.append(fetch.elsewhere(start, last))
            self._unchecked.popleft()
        if self._unchecked and not self.cancelled:
            self.network.schedule(now + SLICE_PAUSE, self._check_slice)
        else:
            self._go_on(now)

    def fetched(self, fetch: _Fetch, now: float) -> None:
        """A range is complete, or all its holders failed."""
        self._num_fetching -= 1
        self._go_on(now)

    def _finish(self, now: float) -> None:
        self._repair(self._merged, now)
        rounds = self._search.lookup.num_rounds
        records = list(self._merged.values())
        self.network.finish(self, ReadFinished(self._number, records, rounds, len(self._holdings), self.complete))

    def _repair(self, merged: dict[EntryID, SignedRecord], now: float) -> None:
        """Sends holders the entries that they lack, verbatim, as far as what they hold is known."""
        for holding in self._holdings:
            if holding.records is None:
                continue
            missing = [
                record
                for identity, record in merged.items()
                if identity not in holding.records or record.supersedes(holding.records[identity])
            ][: self.network.settings.max_repairs]
            if not missing:
                continue
            self.network.metrics.count("network_repairs", len(missing))
            if holding.contact is None:
                for record in missing:
                    self.network.storage.add(record, self.network.wall(now))
                continue
            for items in wire.store_items(missing):
                self.network.call(Unwatched(), wire.STORE, (items,), holding.contact, now)


class _Fetch:
    """Reads one part of a dictionary, page by page, from holders that report the same digest of it."""

    def __init__(self, read: Read, start: int, last: int, sources: list[Contact]) -> None:
        self.read = read
        self.sources = sources
        """Holders to ask, the last one first."""
        self.cursor = start
        self.last = last
        self.num_records = 0

    def elsewhere(self, start: int, last: int) -> _Fetch:
        """A fetch of slots that this one's present source could not give, from the other sources."""
        return _Fetch(self.read, start, last, self.sources[:-1])

    def ask(self, now: float) -> None:
        """Asks for the next page."""
        if not self.sources or self.read.cancelled:
            self.read.complete = False
            self.read.fetched(self, now)
            return
        self.read.network.call(self, wire.PAGE, (self.read.key, self.cursor, self.last), self.sources[-1], now)

    def call_answered(self, call: Call, reply: Reply, now: float) -> None:
        network = self.read.network
        try:
            cursor, bodies = wire.read_page(reply.results)
            self.num_records += len(bodies)
            if cursor is not None and not (self.cursor < cursor <= self.last and bodies):
                raise ProtocolError("a page that does not advance")
            if self.num_records > network.settings.max_entries_per_key:
                raise ProtocolError("a dictionary without end")
        except ProtocolError:
            network.drop_from(call.contact, "malformed")
            self.sources.pop()
            self.ask(now)
            return
        if bodies:
            self.read.page(self, self.cursor, self.last if cursor is None else cursor - 1, bodies, now)
        if cursor is None:
            self.read.fetched(self, now)
        else:
            self.cursor = cursor
            self.ask(now)

    def call_stalled(self, call: Call, now: float) -> None:
        pass

    def call_failed(self, call: Call, now: float) -> None:
        self.sources.pop()
        self.ask(now)


def _entry_id(record: SignedRecord) -> EntryID:
    return record.subkey, record.owner
