"""Sources of one file in virtual time, and a fetch from them: what `PieceFetch` is tested and measured in."""

import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

from tesseract_async.experts.pieces import LIST, MAX_UNDER_WAY, Ask, PieceFetch, num_leaves, piece_size

MBIT = 1e6 / 8
SILENCE = 42.0
ROUND_TRIP = 0.05


@dataclass
class Place:
    """A source: its bytes per second, and what it does besides."""

    rate: float
    freezes_at: float = float("inf")
    """It sends nothing from then on..."""
    thaws_at: float = float("inf")
    """... until it goes on."""
    lies: frozenset[int] = frozenset()
    leaves_at: float = float("inf")
    """Every question fails from then on."""
    queue: list[int] = field(default_factory=list)
    sending: int | None = None


class Simulation:
    """One fetch from these places, each of which sends one piece after the other."""

    def __init__(self, size: int, places: Sequence[Place]) -> None:
        self.size, self.places = size, places
        self.fetch: PieceFetch[int] = PieceFetch(bytes(32), size, silence=SILENCE)
        for number in range(len(places)):
            self.fetch.add(number)
        self.now = 0.0
        self.num_sent = 0
        self.under_way: set[Ask[int]] = set()
        self.taken: list[int] = []
        self._events: list[tuple[float, int, str, int, int]] = []
        self._order = itertools.count()

    def run(self) -> float:
        """How long it took."""
        fetch = self.fetch
        while not fetch.is_done and not fetch.is_hopeless:
            for source in fetch.leave_silent(self.now):
                self.under_way = {ask for ask in self.under_way if ask.source != source}
            for ask in fetch.asks(self.now):
                assert ask not in self.under_way, "one source is not asked twice"
                assert ask.source not in fetch.dropped
                assert ask.piece not in self.taken, "what is here is not asked for"
                self.under_way.add(ask)
                self.after(ROUND_TRIP, "ask", *ask)
            assert len(self.under_way) <= MAX_UNDER_WAY
            wake = fetch.wake_at(self.now)
            if self._events and self._events[0][0] <= wake:
                self.now, _, kind, source, piece = heapq.heappop(self._events)
                self.happen(kind, source, piece)
            else:
                assert wake > self.now, "it would turn in a circle"
                assert wake < float("inf"), "it would wait forever"
                self.now = wake
        return self.now

    def after(self, seconds: float, kind: str, source: int, piece: int) -> None:
        heapq.heappush(self._events, (self.now + seconds, next(self._order), kind, source, piece))

    def happen(self, kind: str, source: int, piece: int) -> None:
        place, fetch = self.places[source], self.fetch
        if kind == "ask":
            if self.now >= place.leaves_at:
                self.under_way.discard(Ask(source, piece))
                fetch.failed(source, piece, "gone", self.now)
                return
            place.queue.append(piece)
        else:
            place.sending = None
            self.num_sent += 1
            if Ask(source, piece) in self.under_way:
                self.under_way.discard(Ask(source, piece))
                if piece in place.lies:
                    fetch.drop(source, "it lied")
                    self.under_way = {ask for ask in self.under_way if ask.source != source}
                else:
                    self.arrive(source, piece)
        while place.sending is None and place.queue:
            if Ask(source, next_one := place.queue.pop(0)) in self.under_way:
                place.sending = next_one
                end = self.now + piece_size(next_one, self.size) / place.rate
                if self.now <= place.freezes_at < end:
                    end += place.thaws_at - place.freezes_at
                if end < float("inf"):
                    self.after(end - self.now, "sent", source, next_one)

    def arrive(self, source: int, piece: int) -> None:
        self.taken.append(piece)
        for other in self.fetch.arrived(source, piece, self.now):
            self.under_way.discard(other)
        if piece == LIST and num_leaves(self.size) > 1:
            self.fetch.take_list([bytes(32)] * num_leaves(self.size))


def throttled(num: int, *, size: int = 400_000_000, frozen: int = 0, at: float = 0.0) -> float:
    """Seconds for a file from so many sources of 25 Mbit/s, of which some freeze."""
    places = [Place(25 * MBIT, freezes_at=at if number < frozen else float("inf")) for number in range(num)]
    return Simulation(size, places).run()
