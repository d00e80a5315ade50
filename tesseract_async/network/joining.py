"""How a node comes among the others and stays there: seeds, its own neighbourhood, and the way back. Pure.

Seeds are asked for ever: this is how two halves of a network find each other. Whoever turns up in the own neighbourhood
starts a lookup of the own id.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from tesseract_async.errors import ProtocolError
from tesseract_async.identity import PeerID
from tesseract_async.network import datagrams as wire
from tesseract_async.network.calls import Call
from tesseract_async.network.contacts import ID_BYTES, Address, Contact
from tesseract_async.network.datagrams import Reply
from tesseract_async.network.events import Isolated, Joined
from tesseract_async.network.operations import Search, read_contacts

if TYPE_CHECKING:
    from tesseract_async.network.protocol import NetworkProtocol

MAX_REMEMBERED = 64
"""Addresses of lost contacts that are asked again once nobody else is left."""
MAX_SEED_PERIODS = 5
"""With others at hand, the wait until seeds are asked again doubles up to so many of `seed_period`."""
SECOND_LOOKS = (1.0, 2.0, 4.0, 8.0)
"""Seconds, but for some chance, after which a newcomer that found fewer than k looks again. Those who start together
find little but the seed: it has not yet made sure of anybody when they ask."""


Seed = tuple[Address, PeerID | None]
Ids = frozenset[PeerID] | None
"""Who may answer at an address; None: whoever does."""


class Membership:
    """Whether and how one node belongs to the network."""

    def __init__(self, network: NetworkProtocol, *, public: bool) -> None:
        self._network = network
        self.joined = False
        """Whether others are known, and the own neighbourhood was looked up."""
        self.ever_joined = False
        self.timer_at = float("inf")
        """When `handle_timer` asks the seeds."""
        self._seeds: dict[Address, Ids] = {}
        self._asked_too: dict[Address, Ids] = {}
        self._backoff = network.settings.min_seed_backoff
        self._remembered: dict[Address, None] = {}
        self._neighbourhood: Neighbourhood | None = None
        self._num_second_looks = 0
        self._dial_wait_until: float | None = float("-inf") if public else None

    def set_seeds(self, seeds: Iterable[Seed], now: float, *, remembered: Iterable[Seed] = ()) -> None:
        """Whom to ask for the network, now and again for ever. An id is checked where given, else taken on trust.

        Where a seed has an id, nobody else is spoken to at its address. `remembered` are asked too, but may have gone.
        """
        self._seeds = _by_address(seeds)
        self._asked_too = {
            address: ids for address, ids in _by_address(remembered).items() if address not in self._seeds
        }
        for contact in self._network.table.contacts():
            if not self.admits(contact.peer_id, contact.address):
                self._network.lost(contact, now)
        self._backoff = self._network.settings.min_seed_backoff
        self.timer_at = now

    def handle_timer(self, now: float) -> None:
        """Asks the seeds, and those that were lost if nobody else is left."""
        network = self._network
        num_contacts = len(network.table)
        addresses: dict[Address, Ids] = dict.fromkeys(self._remembered) if not num_contacts else {}
        addresses |= self._asked_too | self._seeds
        if not addresses:
            self.timer_at = float("inf")
            return
        Join(network, addresses, now)
        self.timer_at = now + self._backoff * self._jitter()
        # with others at hand ever more rarely, until something happens: all nodes ask the same few seeds
        longest = network.settings.seed_period * (MAX_SEED_PERIODS if num_contacts else 1)
        self._backoff = min(2 * self._backoff, longest)

    def admits(self, peer_id: bytes, address: Address) -> bool:
        """Whether somebody with that id may be a contact at that address: at a seed's, only who was named."""
        ids = self._seeds.get(address) or self._asked_too.get(address)
        return ids is None or peer_id in ids

    def learn_neighbourhood(self, start: Iterable[Contact], now: float) -> None:
        """Looks up the own id, unless that is under way."""
        network = self._network
        if self._dial_wait_until is None:
            # the first contact is asked to have this node dialled before it writes to anybody else (see `dialback`)
            self._dial_wait_until = now + network.settings.first_timeout
            network.dialback.handle_timer(now)
            network.timers.start(self._dial_wait_until, self._look_again)
        elif self._neighbourhood is None and now >= self._dial_wait_until:
            self._neighbourhood = Neighbourhood(network, start, now)
            self._neighbourhood.start(now)

    def end_dial_wait(self) -> None:
        """The first dial-back came: there is nothing to wait for any longer."""
        self._dial_wait_until = float("-inf")

    def neighbourhood_known(self, now: float) -> None:
        """A lookup of the own id ended."""
        network = self._network
        self._neighbourhood = None
        if not len(network.table):
            return  # nobody is left to know: the seeds are asked as before
        if not self.joined:
            self.joined = self.ever_joined = True
            self._num_second_looks = 0
            network.emit(Joined(len(network.table)))
        self._backoff = network.settings.seed_period
        if self._seeds or self._asked_too:
            self.timer_at = now + self._backoff * self._jitter()
            if len(network.table) < network.settings.k and self._num_second_looks < len(SECOND_LOOKS):
                network.timers.start(now + SECOND_LOOKS[self._num_second_looks] * self._jitter(), self._look_again)
                self._num_second_looks += 1

    def remember(self, contact: Contact) -> None:
        """A listed contact was lost: once nobody else is left, it is asked again."""
        self._remembered[contact.address] = None
        if len(self._remembered) > MAX_REMEMBERED:
            del self._remembered[next(iter(self._remembered))]

    def contact_left(self) -> None:
        """A contact was lost or said farewell: was it the last?"""
        if self.joined and not len(self._network.table):
            self.joined = False
            self._network.emit(Isolated())
            self.timer_at = float("-inf")
            self._backoff = self._network.settings.min_seed_backoff

    def _look_again(self, now: float) -> None:
        self.learn_neighbourhood((), now)

    def _jitter(self) -> float:
        return 0.75 + 0.5 * self._network.random.random()


class Neighbourhood:
    """Looks up the own id, so that this node and those closest to it know each other; then fills far buckets."""

    def __init__(self, network: NetworkProtocol, start: Iterable[Contact], now: float) -> None:
        self.network = network
        contacts = {contact.raw: contact for contact in start}
        closest = network.table.closest(network.table.own_number, network.settings.k)
        contacts.update((contact.raw, contact) for contact in closest)
        self.search = Search(network, network.own_id, list(contacts.values()), now, on_end=self._end)

    def start(self, now: float) -> None:
        """Sends the first requests."""
        self.search.advance(now)

    def _end(self, now: float) -> None:
        table = self.network.table
        is_newcomer = not self.network.joined
        self.network.membership.neighbourhood_known(now)
        if not is_newcomer:
            return
        if len(table) >= table.k:
            self.network.density.probe(now)
        # section 2.3: refresh the buckets farther away than the closest neighbour, as far as they have room
        for index, bucket in enumerate(table.buckets[:-1]):
            if len(bucket.contacts) < table.k:
                self.network.refresh_bucket(index, now)


class Join:
    """Asks seeds for the own neighbourhood, again and again: this is how two halves of a network find each other.

    A seed always names somebody unknown. To look up the own id each time would be most of what a large network sends;
    a walk that ends at the first step that leads no nearer (`Walk`) tells as much.
    """

    def __init__(self, network: NetworkProtocol, addresses: Mapping[Address, Ids], now: float) -> None:
        self.network = network
        for address, ids in addresses.items():
            network.call_address(self, wire.FIND, (network.own_id,), address, now, expected=ids)

    def call_answered(self, call: Call, reply: Reply, now: float) -> None:
        assert call.contact is not None
        network = self.network
        try:
            found = read_contacts(network, call.contact, reply, now)
        except ProtocolError:
            network.drop("malformed")
            return
        if not network.joined:
            network.membership.learn_neighbourhood([call.contact, *found], now)
        else:
            Walk(network).go_on(found, now)

    def call_stalled(self, call: Call, now: float) -> None:
        pass

    def call_failed(self, call: Call, now: float) -> None:
        self.network.metrics.count("network_seeds_silent")


class Walk:
    """Asks the unknown contact nearest to the own id for nearer ones, one after the other.

    If it comes to somebody who belongs to the own neighbourhood and was not known there, the own id is looked up anew.
    """

    def __init__(self, network: NetworkProtocol) -> None:
        self.network = network
        self._nearest = 1 << (8 * ID_BYTES)
        self._is_neighbour = False

    def go_on(self, found: Iterable[Contact], now: float) -> None:
        """Takes the next step, if there is one."""
        table = self.network.table
        own = table.own_number
        contact = min(
            (item for item in found if item.peer_id not in table), key=lambda item: item.number ^ own, default=None
        )
        if contact is None or contact.number ^ own >= self._nearest:
            return
        self._nearest = contact.number ^ own
        neighbours = table.closest(own, table.k)
        self._is_neighbour = len(neighbours) < table.k or self._nearest < neighbours[-1].number ^ own
        self.network.call(self, wire.FIND, (self.network.own_id,), contact, now)

    def call_answered(self, call: Call, reply: Reply, now: float) -> None:
        assert call.contact is not None
        try:
            found = read_contacts(self.network, call.contact, reply, now)
        except ProtocolError:
            self.network.drop("malformed")
            return
        if self._is_neighbour:
            self.network.membership.learn_neighbourhood([call.contact, *found], now)
        else:
            self.go_on(found, now)

    def call_stalled(self, call: Call, now: float) -> None:
        pass

    def call_failed(self, call: Call, now: float) -> None:
        pass


def _by_address(seeds: Iterable[Seed]) -> dict[Address, Ids]:
    """Those that were named at each address. A name counts, also where the address was given without one too."""
    found: dict[Address, Ids] = {}
    for address, peer_id in seeds:
        known = found.get(address)
        found[address] = known if peer_id is None else (known or frozenset()) | {peer_id}
    return found
