"""Reading a dictionary from its holders: digests first, then what differs, once. Pure."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from tesseract_async.errors import InvalidRecord, ProtocolError
from tesseract_async.identity import SignedRecord
from tesseract_async.network import datagrams as wire
from tesseract_async.network.calls import Call, Unwatched
from tesseract_async.network.contacts import Contact
from tesseract_async.network.datagrams import Reply
from tesseract_async.network.events import ReadFinished
from tesseract_async.network.operations import Search
from tesseract_async.network.region import Region
from tesseract_async.network.storage import NUM_RANGES, RANGE_SIZE, EntryID, Summary, summarise
from tesseract_async.network.timers import Timer

if TYPE_CHECKING:
    from tesseract_async.network.protocol import NetworkProtocol

TYPICAL_RECORD_BYTES = 180
PAGE_BYTES = 1000
"""By these two a dictionary is cut into parts of about a page."""
RECORDS_PER_SLICE = 24
"""Signatures of pages checked in one go: about 3 ms."""
SLICE_PAUSE = 1e-6
"""The next slice comes at the next turn of the loop."""
MAX_PARTS = 64
"""Parts of one of the `NUM_RANGES` ranges, each read by itself."""


class Holding:
    """What one holder says that it holds of a dictionary."""

    __slots__ = ("contact", "is_copy", "records", "summary")

    def __init__(
        self,
        contact: Contact | None,
        summary: Summary,
        records: dict[EntryID, SignedRecord] | None,
        *,
        is_copy: bool = False,
    ) -> None:
        self.contact = contact
        """None for the own storage."""
        self.is_copy = is_copy
        """Whether it only keeps a copy for a while, and is no holder."""
        self.summary = summary
        self.records = records
        """What is known to be there; None while no record has been fetched."""


class Read:
    """Reads a dictionary: finds holders, compares their digests, fetches what differs once, merges, repairs.

    It ends when `num_equal_holders` report equal digests, else when the k nodes closest to the key have answered. At
    first it asks as many at a time as it still needs, and one to spare: nearly every question meets a holder once one
    is found. A read that takes longer than `narrow_for` asks more; a holder does where
    an answer differs from its own.
    """

    def __init__(self, network: NetworkProtocol, key: bytes) -> None:
        self.network = network
        self.key = key
        self.cancelled = False
        self._holdings: list[Holding] = []
        self._verified: dict[bytes, SignedRecord] = {}
        self._without: list[Contact] = []
        """Those that answered and hold nothing."""
        self._summaries: dict[frozenset[bytes], tuple[Summary, dict[EntryID, SignedRecord]]] = {}
        self._merged: dict[EntryID, SignedRecord] = {}
        self._unchecked: deque[tuple[_Fetch, int, int, list[bytes]]] = deque()
        self._fetches: deque[_Fetch] = deque()
        self._num_fetching = 0
        self._settled = False
        self.complete = True
        """False once some part that holders reported could be had from none of them."""
        self._number = 0
        self._narrow = True
        self._hurries: Timer | None = None
        self._in_region = False
        self._num_answers = 0
        """Of those that were asked before the region was."""

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
        self._search = Search(self.network, self.key, start, now, on_answer=self._hear, on_end=self._searched)
        # whoever holds the key is among the other holders already
        self._expect(self.network.settings.num_equal_holders - bool(own))
        if not own:
            self._hurries = self.network.timers.start(now + self.network.settings.narrow_for, self._hurry)
        self._search.advance(now)

    def _hear(self, contact: Contact, reply: Reply, now: float) -> None:
        if self.cancelled:
            self._search.stop()
            return
        summary, bodies = wire.read_value(reply.results)
        if summary is None:
            if self._is_holder:
                self._widen()
            self._without.append(contact)
            return
        records: dict[EntryID, SignedRecord] | None = None
        if bodies:
            # holders mostly send the same
            same = frozenset(bodies)
            known = self._summaries.get(same)
            if known is None:
                records = {}
                for body in bodies:
                    record = self._verify(body)
                    records[_entry_id(record)] = record
                known = self._summaries[same] = summarise(list(records.values())), records
            summary, records = known
        self._holdings.append(Holding(contact, summary, records, is_copy=wire.is_copy(reply.results)))
        equal = [item for item in self._holdings if item.summary == summary]
        missing = self.network.settings.num_equal_holders - _num_counted(equal)
        if missing <= 0 and not all(item.is_copy for item in equal) and not self._may_be_captured:
            self._search.stop()
            self._settle(now, equal)
        elif self._is_holder and equal[0] is not self._holdings[0]:
            self._widen()
        elif missing > 0:
            self._expect(missing)

    @property
    def _is_holder(self) -> bool:
        return bool(self._holdings) and self._holdings[0].contact is None

    @property
    def _may_be_captured(self) -> bool:
        """Whether three that say the same may be one party: then everybody in the region is asked."""
        lookup = self._search.lookup
        return self._in_region or self.network.density.is_captured(lookup.target, lookup.heard_of())

    def _searched(self, now: float) -> None:
        """The k closest have answered. Where they are too near to be there by chance, their region is asked too."""
        lookup = self._search.lookup
        closest = lookup.closest()
        if self.network.density.is_captured(lookup.target, closest):
            Region(self.network, self.key, lookup, now, self._ask_region)
        else:
            self.network.density.note(self.key, closest)
            self._settle(now)

    def _ask_region(self, members: list[Contact], now: float) -> None:
        asked = self._search.lookup
        others = [contact for contact in members if not asked.knows(contact.raw)]
        if self.cancelled or not others:
            self._settle(now)
            return
        self._in_region = True
        self._num_answers = asked.num_answered
        search = Search(
            self.network,
            self.key,
            others,
            now,
            on_answer=self._hear,
            on_end=self._settle,
            k=len(others),
            num_paths=4,
            follow=False,
        )
        search.lookup.num_rounds = asked.num_rounds
        self._search = search
        search.advance(now)

    def _expect(self, num_answers: int) -> None:
        if self._narrow:
            self._search.lookup.max_under_way = min(num_answers + 1, self.network.settings.alpha)

    def _widen(self) -> None:
        self._narrow = False
        self._search.lookup.max_under_way = self.network.settings.alpha

    def _hurry(self, now: float) -> None:
        if self.cancelled:
            self._search.stop()
        else:
            self._widen()
            self._search.advance(now)

    def _verify(self, body: bytes) -> SignedRecord:
        """Raises: InvalidRecord. Copies of the same bytes are checked once."""
        record = self._verified.get(body)
        if record is None:
            record = SignedRecord.decode(self.key, body, verify=self.network.verify)
            self._believe(record)
        return record

    def _believe(self, record: SignedRecord) -> None:
        self._verified[record.body] = record
        network = self.network
        if record.owner != network.identity.peer_id and not network.holder.policy.allows(record.owner, "store"):
            return  # whom this node would not hold it does not hear either, wherever they keep it themselves
        identity = _entry_id(record)
        held = self._merged.get(identity)
        if held is None or record.supersedes(held):
            self._merged[identity] = record

    def _settle(self, now: float, considered: list[Holding] | None = None) -> None:
        """Nobody else is asked for digests; what the considered holders hold is fetched where it is not known yet."""
        if self._settled or self.cancelled:
            return
        self._settled = True
        if self._hurries is not None:
            self.network.timers.cancel(self._hurries)
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
            self.network.timers.start(now + SLICE_PAUSE, self._check_slice)

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
                self.network.drop(reason)
                self._fetches.append(fetch.elsewhere(start, last))
            self._unchecked.popleft()
        if self._unchecked and not self.cancelled:
            self.network.timers.start(now + SLICE_PAUSE, self._check_slice)
        else:
            self._go_on(now)

    def fetched(self, fetch: _Fetch, now: float) -> None:
        """A range is complete, or all its holders failed."""
        self._num_fetching -= 1
        self._go_on(now)

    def _finish(self, now: float) -> None:
        self._repair(self._merged, now)
        self._leave_copy(now)
        lookup = self._search.lookup
        event = ReadFinished(
            self._number,
            list(self._merged.values()),
            lookup.num_rounds,
            num_holders=len(self._holdings),
            num_answers=self._num_answers + lookup.num_answered,
            complete=self.complete,
        )
        self.network.finish(self, event)

    def _repair(self, merged: dict[EntryID, SignedRecord], now: float) -> None:
        """Sends holders the entries that they lack, verbatim, as far as what they hold is known."""
        for holding in self._holdings:
            if holding.records is None or holding.is_copy:
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

    def _leave_copy(self, now: float) -> None:
        """Leaves a single value with the nearest contact that had none (see `caching`)."""
        if len(self._merged) != 1 or not self._without or not self.network.settings.path_cache_lifetime:
            return
        (record,) = self._merged.values()
        if record.subkey is not None or record.tombstone or not self.complete:
            return
        target = int.from_bytes(self.key, "big")
        nearest = min(self._without, key=lambda contact: contact.number ^ target)
        if nearest.token_until > now:
            self.network.send_oneway(wire.COPY, (self.key + record.body,), nearest.address, nearest.token, now)


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
            network.drop("malformed")
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


def _num_counted(holdings: list[Holding]) -> int:
    """How many of these count as independent: of one address range only one does."""
    ranges = [item.contact.range for item in holdings if item.contact is not None]
    return len({item for item in ranges if item is not None}) + ranges.count(None) + (len(holdings) - len(ranges))


def _entry_id(record: SignedRecord) -> EntryID:
    return record.subkey, record.owner
