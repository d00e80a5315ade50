"""Lookups as a node does them: a `Lookup` driven by calls. Pure: each step is a reply coming in.

Operations (those of `reading`, `writing` and `joining` too) hold their own state and one `Core`, which sends their
calls and tells them how these ended.
"""

from collections.abc import Callable, Sequence

from tesseract_async.errors import ProtocolError
from tesseract_async.network import datagrams as wire
from tesseract_async.network.contacts import ID_BYTES, Contact, few_per_range
from tesseract_async.network.core import Core
from tesseract_async.network.datagrams import RpcReply
from tesseract_async.network.lookup import Lookup
from tesseract_async.network.routing_table import K
from tesseract_async.network.rpcs import Call, Caller

NUM_PATHS = 4
"""Disjoint paths of a lookup (Baumgart & Mies 2007, section 4.4)."""
ALPHA = 8
"""Requests that one lookup has in progress, over all its paths."""
REFRESH_K = 6
"""Nodes nearest to its target that a bucket's refresh asks, on one path: a node that it finds is believed only once it
has answered itself, and over four paths the upkeep of a node would be four times what it is."""
NUM_PROBES = 3
"""Random ids that are looked up to learn the density of ids: the neighborhood alone could be one attacker's."""

REACH = 1.5
"""The region's radius, in radii within which k nodes are expected."""
NUM_LOOKUPS = 6
"""Lookups of random ids in the region."""
MAX_MEMBERS = 160
"""Nodes of a region that are asked, or given a record."""
MAX_RANGE_PER_HOLDER_SET = 2
"""Holders of one address range among those of a record. In a read, those of one range count as one."""


class Search(Caller):
    def __init__(
        self,
        core: Core,
        target: bytes,
        start: Sequence[Contact],
        now: float,
        *,
        on_answer: Callable[[Contact, RpcReply, float], None] | None = None,
        on_end: Callable[[Lookup, float], None] | None = None,
        alpha: int = ALPHA,
        k: int = K,
        num_paths: int = NUM_PATHS,
        follow: bool = True,
    ) -> None:
        """`on_end` is called with the finished lookup.

        `on_answer` is called with each reply to GET, and may raise ProtocolError; without it, FIND is asked. `follow`:
        ask the contacts that are named too, or only those of the start.
        """
        self.core = core
        self.target = target
        number = int.from_bytes(target, "big")
        # the bucket that a lookup goes through needs no other refresh (section 2.3)
        core.table.touch(number, now)
        self.lookup = Lookup(
            number, start, k=k, num_paths=num_paths, alpha=alpha, radius=core.density.radius(), random=core.random
        )
        self.ended = False
        self._follow = follow
        self._on_answer = on_answer
        self._on_end = on_end

    def advance(self, now: float) -> None:
        if self.ended:
            return
        kind = wire.GET if self._on_answer is not None else wire.FIND
        while asked := self.lookup.to_ask():
            for contact in asked:
                self.core.call(self, kind, (self.target,), contact, now)
                if contact.late:
                    # late with another request already: others are asked at once, too
                    self.lookup.stalled(contact)
        if self.lookup.finished:
            on_end = self._on_end
            self.stop()
            if on_end is not None:
                on_end(self.lookup, now)

    def stop(self) -> None:
        if not self.ended:
            self.ended = True
            # these lead back here: without them all is freed now, not some day by the garbage collector
            self._on_answer = self._on_end = None
            self.core.metrics.observe("network_lookup_rounds", self.lookup.num_rounds, bounds=range(1, 10))

    def call_answered(self, call: Call, reply: RpcReply, now: float) -> None:
        if self.ended:
            return
        assert call.contact is not None
        found = read_contacts(self.core, call.contact, reply, now, 3 if self._on_answer is not None else 0)
        if self._on_answer is not None:
            self._on_answer(call.contact, reply, now)
        self.lookup.answered(call.contact, found if self._follow else ())
        self.advance(now)

    def call_stalled(self, call: Call, now: float) -> None:
        if not self.ended and call.contact is not None:
            self.lookup.stalled(call.contact)
            self.advance(now)

    def call_failed(self, call: Call, now: float) -> None:
        if not self.ended and call.contact is not None:
            self.lookup.failed(call.contact)
            self.advance(now)


class Region:
    """A search for the nodes around a key, by lookups of random ids there."""

    def __init__(self, core: Core, lookup: Lookup, now: float, on_end: Callable[[list[Contact], float], None]) -> None:
        """`lookup` found the key's neighborhood captured. `on_end` gets up to `MAX_MEMBERS`, nearest first."""
        core.metrics.count("network_regions_searched")
        self._core = core
        self._number = lookup.target
        self._radius = core.density.radius()
        self._found = {contact.raw: contact for contact in lookup.answered_within(int(REACH * self._radius))}
        self._on_end = on_end
        self._num_searching = NUM_LOOKUPS
        searches: list[Search] = []
        for _ in range(NUM_LOOKUPS):
            number = self._number ^ core.random.randrange(self._radius)
            start = {contact.raw: contact for contact in (*core.table.closest(number, K), *lookup.closest())}
            target = number.to_bytes(ID_BYTES, "big")
            searches.append(Search(core, target, list(start.values()), now, on_end=self._ended, num_paths=2))
        for search in searches:
            search.advance(now)

    def _ended(self, lookup: Lookup, now: float) -> None:
        reach = int(REACH * self._radius)
        for contact in lookup.closest():
            if contact.number ^ self._number < reach:
                self._found.setdefault(contact.raw, contact)
        self._num_searching -= 1
        if not self._num_searching:
            self._on_end(self._members(), now)

    def _members(self) -> list[Contact]:
        """Return a few of each address range; if there are too many, random ones, since the nearest may have chosen to
        be nearest."""
        nearest_first = sorted(self._found.values(), key=lambda contact: contact.number ^ self._number)
        members = few_per_range(nearest_first, MAX_RANGE_PER_HOLDER_SET)
        if len(members) > MAX_MEMBERS:
            members = self._core.random.sample(members, MAX_MEMBERS)
            members.sort(key=lambda contact: contact.number ^ self._number)
        return members


def refresh(core: Core, index: int, now: float) -> None:
    """Look up a random id of a bucket, so that the table learns contacts there."""
    target = core.table.number_in_bucket(index, core.random.getrandbits(256))
    # the bucket wants a few good contacts, not the complete neighborhood of a random id
    Search(
        core, target.to_bytes(ID_BYTES, "big"), core.table.closest(target, K), now, alpha=3, k=REFRESH_K, num_paths=1
    ).advance(now)


def probe_density(core: Core, now: float) -> None:

    def ended(lookup: Lookup, now: float) -> None:
        core.density.note(lookup.target, lookup.closest())

    for _ in range(NUM_PROBES):
        target = core.random.randbytes(ID_BYTES)
        start = core.table.closest(int.from_bytes(target, "big"), K)
        Search(core, target, start, now, on_end=ended, num_paths=1).advance(now)


def read_contacts(core: Core, teller: Contact, reply: RpcReply, now: float, offset: int = 0) -> list[Contact]:
    """Return the contacts that a reply names, from the result number `offset` on. Raises: ProtocolError."""
    if len(reply.results) < offset + 2:
        raise ProtocolError("a reply without contacts")
    return core.contacts_from(teller, reply.results[offset], reply.results[offset + 1], now)
