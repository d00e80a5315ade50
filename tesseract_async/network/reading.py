"""Reading a dictionary from its holders: digests first, then what differs, once. Pure."""

from collections import deque
from dataclasses import dataclass

from tesseract_async.errors import InvalidRecord, ProtocolError
from tesseract_async.identity import SignedRecord
from tesseract_async.network import datagrams as wire
from tesseract_async.network.contacts import Contact
from tesseract_async.network.core import Core
from tesseract_async.network.datagrams import RpcReply
from tesseract_async.network.events import ReadFinished
from tesseract_async.network.lookup import Lookup
from tesseract_async.network.operations import ALPHA, Region, Search
from tesseract_async.network.routing_table import K
from tesseract_async.network.rpcs import Call, Caller
from tesseract_async.network.storage import MAX_ENTRIES_PER_KEY, NUM_RANGES, RANGE_SIZE, EntryID, Summary, summary_of
from tesseract_async.network.timers import Timer

NUM_EQUAL_HOLDERS = 3
"""A read ends when this many holders report the same digests."""
NARROW_FOR = 0.02
"""Seconds for which a read has only as many requests in progress as it needs equal answers, and one to spare; then
`ALPHA`. Where round trips are short, a question costs more than the wait for its answer."""
PAGES_IN_PROGRESS = 64
"""Pages of one large dictionary asked for at a time."""
MAX_REPAIRS = 32
"""Entries that one read sends to each holder that was found stale."""
TYPICAL_RECORD_BYTES = 180
PAGE_BYTES = 1000
"""Bytes of a page, by which (with the above) a dictionary is cut into parts."""
RECORDS_PER_SLICE = 24
"""Signatures of pages checked in one go: about 3 ms."""
SLICE_PAUSE = 1e-6
"""The next slice comes at the next turn of the loop."""
MAX_PARTS = 64
"""Parts into which one of the `NUM_RANGES` ranges is cut, each read by itself."""


@dataclass(slots=True, eq=False)
class Holding:
    contact: Contact | None
    """None for this node's own storage."""
    summary: Summary
    records: dict[EntryID, SignedRecord] | None
    """The records known to be there; None while none has been fetched."""


class Read:
    """A read: it finds holders, compares their digests, fetches what differs once, merges, and repairs.

    It ends when `NUM_EQUAL_HOLDERS` report equal digests, else when the k nodes closest to the key have answered. At
    first it asks as many at a time as it needs, and one to spare: nearly all know a holder once one is found.
    """

    def __init__(self, core: Core, key: bytes) -> None:
        self.core = core
        self.key = key
        self.cancelled = False
        self._holdings: list[Holding] = []
        self._verified: dict[bytes, SignedRecord] = {}
        self._summaries: dict[frozenset[bytes], tuple[Summary, dict[EntryID, SignedRecord]]] = {}
        self._merged: dict[EntryID, SignedRecord] = {}
        self._unchecked: deque[tuple[_Fetch, int, int, list[bytes]]] = deque()
        self._fetches: deque[_Fetch] = deque()
        self._num_fetching = 0
        self._settled = False
        self.complete = True
        """False once some part that holders reported could be had from none of them."""
        self._number = 0
        self._widens: Timer | None = None
        self._in_region = False
        self._num_answers = 0
        """Answers of the nodes that were asked before the region was."""

    def start(self, number: int, now: float) -> None:
        self._number = number
        own = {_entry_id(record): record for record in self.core.storage.records(self.key)}
        if own:
            for record in own.values():
                self._believe(record)
            summary = self.core.storage.summary(self.key)
            assert summary is not None
            self._holdings.append(Holding(None, summary, own))
        start = self.core.table.closest(int.from_bytes(self.key, "big"), K)
        self._search = Search(self.core, self.key, start, now, on_answer=self._hear, on_end=self._searched)
        self._search.lookup.max_in_progress = NUM_EQUAL_HOLDERS + 1 - bool(own)
        if not own:
            self._widens = self.core.timers.start(now + NARROW_FOR, self._widen)
        self._search.advance(now)

    def _hear(self, contact: Contact, reply: RpcReply, now: float) -> None:
        if self.cancelled:
            self._search.stop()
            return
        summary, bodies = wire.read_value(reply.results)
        if summary is None:
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
                known = self._summaries[same] = summary_of(list(records.values())), records
            summary, records = known
        self._holdings.append(Holding(contact, summary, records))
        equal = [item for item in self._holdings if item.summary == summary]
        missing = NUM_EQUAL_HOLDERS - _num_counted(equal)
        if missing <= 0 and not self._may_be_captured:
            self._search.stop()
            self._settle(now, equal)
        elif missing > 0 and self._search.lookup.max_in_progress < ALPHA:
            self._search.lookup.max_in_progress = missing + 1

    @property
    def _may_be_captured(self) -> bool:
        """True if three that say the same may be one party: then everybody in the region is asked."""
        lookup = self._search.lookup
        return self._in_region or self.core.density.is_captured(lookup.target, lookup.heard_of())

    def _searched(self, lookup: Lookup, now: float) -> None:
        """The k closest have answered. Where they are too near to be there by chance, their region is asked too."""
        closest = lookup.closest()
        if self.core.density.is_captured(lookup.target, closest):
            Region(self.core, lookup, now, self._ask_region)
        else:
            self.core.density.note(lookup.target, closest)
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
            self.core,
            self.key,
            others,
            now,
            on_answer=self._hear,
            on_end=lambda lookup, now: self._settle(now),
            k=len(others),
            num_paths=4,
            follow=False,
        )
        search.lookup.num_rounds = asked.num_rounds
        self._search = search
        search.advance(now)

    def _widen(self, now: float) -> None:
        if self.cancelled:
            self._search.stop()
        else:
            self._search.lookup.max_in_progress = ALPHA
            self._search.advance(now)

    def _verify(self, body: bytes) -> SignedRecord:
        """Decode a record of the key; the same bytes are checked once. Raises: InvalidRecord."""
        record = self._verified.get(body)
        if record is None:
            record = SignedRecord.decode(self.key, body, verify=self.core.verify)
            self._believe(record)
        return record

    def _believe(self, record: SignedRecord) -> None:
        self._verified[record.body] = record
        core = self.core
        if record.owner != core.identity.peer_id and not core.policy.allows(record.owner, "host"):
            return  # a node does not hear owners whose records it would not hold, wherever those keep them
        identity = _entry_id(record)
        held = self._merged.get(identity)
        if held is None or record.supersedes(held):
            self._merged[identity] = record

    def _settle(self, now: float, considered: list[Holding] | None = None) -> None:
        """Ask nobody else for digests; fetch what the considered holders hold and is not known yet."""
        if self._settled or self.cancelled:
            return
        self._settled = True
        self.core.timers.cancel(self._widens)
        for index in range(NUM_RANGES):
            groups: dict[int, list[Holding]] = {}
            for holding in considered if considered is not None else self._holdings:
                groups.setdefault(holding.summary.digests[index], []).append(holding)
            for digest, group in groups.items():
                if digest and not any(item.records is not None for item in group):
                    # about a page each, so that all may be in progress at once
                    count = max(item.summary.count for item in group)
                    num_parts = min(-(-count * TYPICAL_RECORD_BYTES // (NUM_RANGES * PAGE_BYTES)), MAX_PARTS)
                    step = RANGE_SIZE // num_parts
                    for part in range(num_parts):
                        start = index * RANGE_SIZE + part * step
                        end = (index + 1) * RANGE_SIZE if part == num_parts - 1 else start + step
                        sources = [item.contact for item in group if item.contact is not None]
                        self.core.random.shuffle(sources)
                        self._fetches.append(_Fetch(self, start, end - 1, sources))
        self._go_on(now)

    def _go_on(self, now: float) -> None:
        while self._fetches and self._num_fetching < PAGES_IN_PROGRESS:
            self._num_fetching += 1
            self._fetches.popleft().ask(now)
        if not self._num_fetching and not self._fetches and not self._unchecked and not self.cancelled:
            self._finish(now)

    def page(self, fetch: "_Fetch", start: int, last: int, bodies: list[bytes], now: float) -> None:
        """Take a page of slots from `start` to `last`. Its signatures are checked in slices that yield the loop."""
        self._unchecked.append((fetch, start, last, bodies))
        if len(self._unchecked) == 1:
            self.core.timers.start(now + SLICE_PAUSE, self._check_slice)

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
                self.core.outbox.drop(reason)
                self._fetches.append(fetch.elsewhere(start, last))
            self._unchecked.popleft()
        if self._unchecked and not self.cancelled:
            self.core.timers.start(now + SLICE_PAUSE, self._check_slice)
        else:
            self._go_on(now)

    def fetched(self, fetch: "_Fetch", now: float) -> None:
        self._num_fetching -= 1
        self._go_on(now)

    def _finish(self, now: float) -> None:
        self._repair(self._merged, now)
        lookup = self._search.lookup
        event = ReadFinished(
            self._number,
            list(self._merged.values()),
            lookup.num_rounds,
            num_answers=self._num_answers + lookup.num_answered,
            complete=self.complete,
        )
        self.core.outbox.emit(event)

    def _repair(self, merged: dict[EntryID, SignedRecord], now: float) -> None:
        for holding in self._holdings:
            if holding.records is None:
                continue
            missing = [
                record
                for identity, record in merged.items()
                if identity not in holding.records or record.supersedes(holding.records[identity])
            ][:MAX_REPAIRS]
            if not missing:
                continue
            self.core.metrics.count("network_repairs", len(missing))
            if holding.contact is None:
                for record in missing:
                    self.core.storage.add(record, self.core.wall(now))
                continue
            for items in wire.store_items(missing):
                self.core.call(Caller(), wire.STORE, (items,), holding.contact, now)


@dataclass(slots=True, eq=False)
class _Fetch(Caller):
    """A part of a dictionary that is read page by page from holders that report the same digest of it."""

    read: Read
    cursor: int
    last: int
    sources: list[Contact]
    """Holders to ask, the last one first."""
    num_records: int = 0

    def elsewhere(self, start: int, last: int) -> "_Fetch":
        """Return a fetch of slots that this one's present source could not give, from the other sources."""
        return _Fetch(self.read, start, last, self.sources[:-1])

    def ask(self, now: float) -> None:
        if not self.sources or self.read.cancelled:
            self.read.complete = False
            self.read.fetched(self, now)
            return
        self.read.core.call(self, wire.PAGE, (self.read.key, self.cursor, self.last), self.sources[-1], now)

    def call_answered(self, call: Call, reply: RpcReply, now: float) -> None:
        cursor, bodies = wire.read_page(reply.results)
        self.num_records += len(bodies)
        if cursor is not None and not (self.cursor < cursor <= self.last and bodies):
            raise ProtocolError("a page that does not advance")
        if self.num_records > MAX_ENTRIES_PER_KEY:
            raise ProtocolError("a dictionary without end")
        if bodies:
            self.read.page(self, self.cursor, self.last if cursor is None else cursor - 1, bodies, now)
        if cursor is None:
            self.read.fetched(self, now)
        else:
            self.cursor = cursor
            self.ask(now)

    def call_failed(self, call: Call, now: float) -> None:
        self.sources.pop()
        self.ask(now)


def _num_counted(holdings: list[Holding]) -> int:
    """Return how many of these count as independent: of one address range only one does."""
    ranges = [item.contact.range for item in holdings if item.contact is not None]
    return len({item for item in ranges if item is not None}) + ranges.count(None) + (len(holdings) - len(ranges))


def _entry_id(record: SignedRecord) -> EntryID:
    return record.subkey, record.owner
