"""What a node does over several RPCs: searching, refreshing, joining. Pure: each step is an answer coming in.

Operations (those of `reading` and `writing` too) hold their own state and talk to one `NetworkProtocol`, which sends
their calls and tells them how these ended.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from tesseract_async.errors import ProtocolError
from tesseract_async.identity import PeerID
from tesseract_async.network import datagrams as wire
from tesseract_async.network.calls import Call
from tesseract_async.network.contacts import ID_BYTES, Address, Contact
from tesseract_async.network.datagrams import Reply
from tesseract_async.network.lookup import Lookup

if TYPE_CHECKING:
    from tesseract_async.network.protocol import NetworkProtocol


REFRESH_K = 6
"""How many of the nearest a lookup for a bucket's refresh asks, on one path: nothing is believed that it finds before
it has answered by itself, and over four paths the upkeep of a node would be four times what it is."""


class Search:
    """Drives a `Lookup` with FIND or GET requests, and calls back when it ends."""

    def __init__(
        self,
        network: NetworkProtocol,
        target: bytes,
        start: Sequence[Contact],
        now: float,
        *,
        on_answer: Callable[[Contact, Reply, float], None] | None = None,
        on_end: Callable[[float], None],
        alpha: int | None = None,
        k: int | None = None,
        num_paths: int | None = None,
    ) -> None:
        settings = network.settings
        self.network = network
        self.target = target
        number = int.from_bytes(target, "big")
        # whatever is looked up, the bucket that it goes through needs no refresh of its own (section 2.3)
        network.table.touch(number, now)
        self.lookup = Lookup(
            number,
            start,
            k=settings.k if k is None else k,
            num_paths=settings.num_paths if num_paths is None else num_paths,
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
        while asked := self.lookup.to_ask():
            for contact in asked:
                self.network.call(self, kind, (self.target,), contact, now)
                if contact.late:
                    # with something else already: others are asked beside it at once
                    self.lookup.stalled(contact)
        if self.lookup.finished:
            on_end = self._on_end
            self.stop()
            on_end(now)

    def stop(self) -> None:
        """Takes no further answers."""
        if not self.ended:
            self.ended = True
            # these lead back here: let go, all of it is freed now and not some day by the garbage collector
            self._on_answer, self._on_end = None, _nothing
            self.network.metrics.observe("network_lookup_rounds", self.lookup.num_rounds, bounds=range(1, 10))

    def call_answered(self, call: Call, reply: Reply, now: float) -> None:
        if self.ended:
            return
        assert call.contact is not None
        try:
            found = read_contacts(self.network, call.contact, reply, now, 3 if self._on_answer is not None else 0)
            if self._on_answer is not None:
                self._on_answer(call.contact, reply, now)
        except ProtocolError:
            self.network.drop("malformed")
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


def _nothing(now: float) -> None:
    """What is left to do at the end of a lookup that was for its side effects."""


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
        self.search = Search(network, key, start, now, on_end=_nothing, alpha=3, k=REFRESH_K, num_paths=1)
        self.search.advance(now)


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
        self.network.neighbourhood_known(now)
        if not is_newcomer:
            return
        # section 2.3: refresh the buckets farther away than the closest neighbour, as far as they have room
        for index, bucket in enumerate(table.buckets[:-1]):
            if len(bucket.contacts) < table.k:
                self.network.refresh_bucket(index, now)


class Join:
    """Asks seeds for the own neighbourhood, again and again: this is how two halves of a network find each other.

    A seed always names somebody unknown. To look up the own id each time would be most of what a large network sends;
    a walk that ends at the first step that leads no nearer (`Walk`) tells as much.
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
            network.drop("wrong_id")
            network.metrics.count("network_seeds_with_another_id")
            return
        try:
            found = read_contacts(network, call.contact, reply, now)
        except ProtocolError:
            network.drop("malformed")
            return
        if not network.joined:
            network.learn_neighbourhood([call.contact, *found], now)
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
            self.network.learn_neighbourhood([call.contact, *found], now)
        else:
            self.go_on(found, now)

    def call_stalled(self, call: Call, now: float) -> None:
        pass

    def call_failed(self, call: Call, now: float) -> None:
        pass


def read_contacts(
    network: NetworkProtocol, teller: Contact, reply: Reply, now: float, offset: int = 0
) -> list[Contact]:
    """The contacts that a reply names, from the result number `offset` on. Raises: ProtocolError."""
    if len(reply.results) < offset + 2:
        raise ProtocolError("a reply without contacts")
    return network.contacts_from(teller, reply.results[offset], reply.results[offset + 1], now)
