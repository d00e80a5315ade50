"""What a node does over several RPCs: searching, pinging, refreshing. Pure: each step is an answer coming in.

Operations (those of `reading`, `writing` and `joining` too) hold their own state and talk to one `NetworkProtocol`,
which sends their calls and tells them how these ended.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from tesseract_async.errors import ProtocolError
from tesseract_async.network import datagrams as wire
from tesseract_async.network.calls import Call
from tesseract_async.network.contacts import ID_BYTES, Contact
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
        follow: bool = True,
    ) -> None:
        """`follow`: whether contacts that are named are asked too, or only those at the start."""
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
            radius=network.density.radius(),
            random=network.random,
        )
        self._follow = follow
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


def read_contacts(
    network: NetworkProtocol, teller: Contact, reply: Reply, now: float, offset: int = 0
) -> list[Contact]:
    """The contacts that a reply names, from the result number `offset` on. Raises: ProtocolError."""
    if len(reply.results) < offset + 2:
        raise ProtocolError("a reply without contacts")
    return network.contacts_from(teller, reply.results[offset], reply.results[offset + 1], now)
