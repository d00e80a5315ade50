"""How much an association may have under way: a pure machine.

aiortc's own rule is TCP Reno's: half of the window goes with every loss, one packet per round trip comes back. On a
long way that loses a few packets by chance, that leaves a small part of what it carries. Here the delay says what a
loss means, after TCP Illinois (Liu, Başar, Srikant 2006): the share that goes, and the speed at which it comes back,
follow from the queue that packets stood in, measured by the longest one seen so far. Without a queue nothing goes as
long as at most 2 % are lost (as in BBR's third version), at a full one a half. A slow start ends when a queue
begins to grow (HyStart++, RFC 9406), or at losses that are more than chance.

Packets are numbered as they are sent, those sent again anew.
"""

from __future__ import annotations

from typing import Final

INITIAL_PACKETS: Final = 10
"""RFC 6928."""
MINIMUM_PACKETS: Final = 4
MAX_GROWTH: Final = 10.0
MIN_GROWTH: Final = 0.3
"""Packets per round trip."""
MAX_CUT: Final = 0.5
"""Share of the window."""
LEAST_QUEUE: Final = 0.02
"""Seconds that the longest queue counts at least: a busy processor's delays are none."""
CHANCE: Final = 0.02
CHANCE_PACKETS: Final = 3
"""Losses within a round trip that may be chance: this share of the window, and so many in any case."""
LOOKS: Final = 8
"""Measured round trips after which a slow start may end for their length."""


class CongestionWindow:
    """`packet`: bytes of a full one. Times in seconds. Raises nothing.

    After each step `size` is the number of bytes that may be under way.
    """

    def __init__(self, packet: int) -> None:
        self._packet = packet
        self._window = float(INITIAL_PACKETS * packet)
        self._threshold = float("inf")
        """Below it the window doubles with every round trip."""
        self._num_sent = 0
        self._judged = 0
        """Losses of packets up to this one were answered."""
        self._queue = 0.0
        """That of the last round trip, as a share of the longest one."""
        self._shortest = float("inf")
        self._longest_queue = LEAST_QUEUE
        self._previous_shortest = self._round_shortest = float("inf")
        self._begin_round()

    @property
    def size(self) -> int:
        return int(self._window)

    @property
    def starting(self) -> bool:
        """Return whether the window still doubles."""
        return self._window < self._threshold

    def sent(self) -> int:
        """Return the number of the packet that is sent now."""
        self._num_sent += 1
        return self._num_sent

    def acknowledged(self, number: int, count: int, *, round_trip: float | None, full: bool) -> None:
        """Learn that a packet of `count` bytes arrived. `round_trip`: None where it is not known, because it was sent
        twice. `full`: the window was used up, so that it is what limits the sender."""
        if number > self._round_end:
            self._end_round()
        if round_trip is not None:
            self._measure(round_trip)
        if not full:
            return
        if self.starting:
            self._window = min(self._window + count, self._threshold)
        elif number > self._judged:  # not while what was lost is sent again
            self._window += growth(self._queue) * self._packet * count / self._window

    def lost(self, number: int) -> None:
        """Count the packet as lost."""
        if number <= self._judged:
            return
        self._round_lost += 1
        chance = self._round_lost <= max(CHANCE_PACKETS, CHANCE * self._window / self._packet)
        share = cut(self._queue) if chance else MAX_CUT
        if share > 0 and not (chance and self.starting):
            self._judged = self._num_sent
            self._window = self._threshold = max(self._window * (1 - share), float(MINIMUM_PACKETS * self._packet))

    def timed_out(self) -> None:
        """Nothing was heard for too long: what is under way counts as lost."""
        self._judged = self._num_sent
        self._threshold = max(self._window * (1 - MAX_CUT), float(MINIMUM_PACKETS * self._packet))
        self._window = float(self._packet)

    def _measure(self, round_trip: float) -> None:
        self._shortest = min(self._shortest, round_trip)
        self._round_shortest = min(self._round_shortest, round_trip)
        self._round_sum += round_trip
        self._round_count += 1
        before = self._previous_shortest
        if self.starting and self._round_count >= LOOKS and before < float("inf"):
            # a queue grows: doubling once more would overfill it
            if self._round_shortest > before + min(0.016, max(0.004, before / 8)):
                self._threshold = self._window

    def _begin_round(self) -> None:
        self._round_end = self._num_sent
        self._round_lost = 0
        self._round_sum, self._round_count = 0.0, 0
        self._round_shortest = float("inf")

    def _end_round(self) -> None:
        if self._round_count:
            queue = self._round_sum / self._round_count - self._shortest
            self._longest_queue = max(self._longest_queue, queue)
            self._queue = queue / self._longest_queue
            self._previous_shortest = self._round_shortest
        self._begin_round()


def growth(queue: float) -> float:
    """Return packets per round trip: a hyperbola from `MAX_GROWTH` without a queue to `MIN_GROWTH` at the longest one.

    `queue`: as a share of the longest one, 0 to 1.
    """
    none = 0.01
    if queue <= none:
        return MAX_GROWTH
    slope = (1 - none) / (MAX_GROWTH - MIN_GROWTH)
    return slope * MAX_GROWTH * MIN_GROWTH / (slope * MIN_GROWTH - none + queue)


def cut(queue: float) -> float:
    """Share of the window that a loss costs: none up to a tenth of the longest queue, `MAX_CUT` from eight tenths."""
    none, much = 0.1, 0.8
    return MAX_CUT * min(max((queue - none) / (much - none), 0.0), 1.0)
