"""Joins a node to the others and keeps it there: seeds, its own neighborhood, and the way back. Pure.

Seeds are asked forever: this is how two halves of a network find each other. An unknown node in this node's own
neighborhood starts a lookup of this node's own id.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from tesseract_async.identity import PeerID
from tesseract_async.lru import LRU
from tesseract_async.network import datagrams as wire
from tesseract_async.network.contacts import ID_BYTES, Address, Contact
from tesseract_async.network.core import AnyOf, Core
from tesseract_async.network.datagrams import RpcReply
from tesseract_async.network.events import Isolated, Joined
from tesseract_async.network.lookup import Lookup
from tesseract_async.network.operations import Search, probe_density, read_contacts, refresh
from tesseract_async.network.routing_table import K
from tesseract_async.network.rpcs import FIRST_TIMEOUT, Call, Caller
from tesseract_async.network.timers import Timer

SEED_PERIOD = 60.0
"""Seconds until seeds are asked again."""
MAX_SEED_PERIODS = 5
"""With others at hand, the wait until seeds are asked again doubles up to this many times `SEED_PERIOD`."""
MIN_SEED_BACKOFF = 0.5
"""First wait before seeds are asked again while nobody answers; doubles up to `SEED_PERIOD`."""
MAX_REMEMBERED = 64
"""Addresses of lost contacts that are asked again once nobody else is left."""
SECOND_LOOKS = (1.0, 2.0, 4.0, 8.0)
"""Seconds (on average) after which a newcomer that found fewer than k looks again. Nodes that start together find
little but the seed, which has not yet made sure of anybody when they ask."""

Seed = tuple[Address, PeerID | None]


class NetworkMembership:
    """One node's way into the network, and back."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._timer: Timer | None = None
        """Rings when the seeds are to be asked."""
        self._backoff = MIN_SEED_BACKOFF
        self._remembered: LRU[Address, None] = LRU(MAX_REMEMBERED)
        self._is_looking = False
        self._num_second_looks = 0
        self._dial_wait_until = float("-inf") if core.public else None

    def set_seeds(self, seeds: Iterable[Seed], now: float, *, remembered: Iterable[Seed] = ()) -> None:
        """Set the seeds, which are asked for the network now and again forever. An id is checked where one is given.

        Where a seed has an id, nobody else is spoken to at its address. `remembered` are asked too, but may have gone.
        """
        core = self._core
        core.expected_at = _by_address(remembered) | _by_address(seeds)
        for contact in core.table.contacts():
            if not core.admits(contact.peer_id, contact.address):
                core.lost(contact, now)
        self._backoff = MIN_SEED_BACKOFF
        self._ask_at(now)

    def ask_seeds(self, now: float) -> None:
        core = self._core
        num_contacts = len(core.table)
        addresses: dict[Address, AnyOf] = dict.fromkeys(self._remembered) if not num_contacts else {}
        addresses |= core.expected_at
        if not addresses:
            self._core.timers.cancel(self._timer)
            return
        for address, ids in addresses.items():
            core.call(_Walk(self, core), wire.FIND, (core.own_id,), address, now, expected=ids)
        self._ask_at(now + self._backoff * core.jitter())
        # with others at hand ever more rarely, until something happens: all nodes ask the same few seeds
        longest = SEED_PERIOD * (MAX_SEED_PERIODS if num_contacts else 1)
        self._backoff = min(2 * self._backoff, longest)

    def look_up_neighborhood(self, start: Iterable[Contact], now: float) -> None:
        """Look up this node's own id, unless that is in progress, so that it and those closest know each other."""
        core = self._core
        if self._dial_wait_until is None:
            # the first contact is asked to have this node dialed before it writes to anybody else (see `dial_back`)
            self._dial_wait_until = now + FIRST_TIMEOUT
            core.first_contact_found(now)
            core.timers.start(self._dial_wait_until, self._look_again)
        elif not self._is_looking and now >= self._dial_wait_until:
            self._is_looking = True
            contacts = {contact.raw: contact for contact in start}
            contacts.update((contact.raw, contact) for contact in core.table.closest(core.table.own_number, K))
            Search(core, core.own_id, list(contacts.values()), now, on_end=self._looked_up).advance(now)

    def end_dial_wait(self) -> None:
        self._dial_wait_until = float("-inf")

    def contact_left(self, contact: Contact, *, ask_again: bool) -> None:
        """A contact was lost or said farewell. `ask_again`: ask it once nobody else is left."""
        core = self._core
        if ask_again:
            self._remembered[contact.address] = None
        if core.joined and not len(core.table):
            core.joined = False
            core.outbox.emit(Isolated())
            self._ask_at(float("-inf"))
            self._backoff = MIN_SEED_BACKOFF

    def _looked_up(self, lookup: Lookup, now: float) -> None:
        core, table = self._core, self._core.table
        is_newcomer = not core.joined
        self._is_looking = False
        if len(table):  # else nobody is left to know: the seeds are asked as before
            self._neighborhood_known(now)
        if not is_newcomer:
            return
        if len(table) >= K:
            probe_density(core, now)
        # section 2.3: refresh the buckets farther away than the closest neighbor, as far as they have room
        for index, bucket in enumerate(table.buckets[:-1]):
            if len(bucket.contacts) < K:
                refresh(core, index, now)

    def _neighborhood_known(self, now: float) -> None:
        core = self._core
        if not core.joined:
            core.joined = True
            self._num_second_looks = 0
            core.outbox.emit(Joined(len(core.table)))
        self._backoff = SEED_PERIOD
        if core.expected_at:
            self._ask_at(now + self._backoff * core.jitter())
            if len(core.table) < K and self._num_second_looks < len(SECOND_LOOKS):
                core.timers.start(now + SECOND_LOOKS[self._num_second_looks] * core.jitter(), self._look_again)
                self._num_second_looks += 1

    def _look_again(self, now: float) -> None:
        self.look_up_neighborhood((), now)

    def _ask_at(self, at: float) -> None:
        self._core.timers.cancel(self._timer)
        self._timer = self._core.timers.start(at, self.ask_seeds)


@dataclass(slots=True, eq=False)
class _Walk(Caller):
    """A walk from a seed to the unknown contact nearest to this node, then to the nearest that it names, and so on."""

    membership: NetworkMembership
    core: Core
    nearest: int = 1 << (8 * ID_BYTES)
    is_neighbor: bool = False

    def call_answered(self, call: Call, reply: RpcReply, now: float) -> None:
        core, table = self.core, self.core.table
        assert call.contact is not None
        found = read_contacts(core, call.contact, reply, now)
        if self.is_neighbor or not core.joined:
            self.membership.look_up_neighborhood([call.contact, *found], now)
            return
        own = table.own_number
        unknown = (item for item in found if item.peer_id not in table)
        contact = min(unknown, key=lambda item: item.number ^ own, default=None)
        if contact is not None and contact.number ^ own < self.nearest:
            self.nearest = contact.number ^ own
            neighbors = table.closest(own, K)
            self.is_neighbor = len(neighbors) < K or self.nearest < neighbors[-1].number ^ own
            core.call(self, wire.FIND, (core.own_id,), contact, now)

    def call_failed(self, call: Call, now: float) -> None:
        if call.contact is None:
            self.core.metrics.count("network_seeds_silent")


def _by_address(seeds: Iterable[Seed]) -> dict[Address, AnyOf]:
    """Return the ids that were named at each address. An id counts even if the address was also given without one."""
    found: dict[Address, AnyOf] = {}
    for address, peer_id in seeds:
        known = found.get(address)
        found[address] = known if peer_id is None else (known or frozenset()) | {peer_id}
    return found
