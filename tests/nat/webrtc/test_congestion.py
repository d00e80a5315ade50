"""How much may be under way: the machine alone, on made-up ways."""

from __future__ import annotations

import heapq
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tesseract_async.nat.webrtc.congestion import (
    INITIAL_PACKETS,
    MAX_CUT,
    MAX_GROWTH,
    MIN_GROWTH,
    MINIMUM_PACKETS,
    CongestionWindow,
    cut,
    growth,
)

PACKET = 1000


class Way:
    """A bottleneck of `rate` packets per second with room for `room` of them, and `delay` seconds there and back.

    Losses are known at once when a later packet is acknowledged. Several senders may share it.
    """

    def __init__(self, *, rate: float, delay: float, room: int, loss: float = 0.0, seed: int = 0) -> None:
        self.rate, self.delay, self.room, self.loss = rate, delay, room, loss
        self.free_at = 0.0
        self.rng = random.Random(seed)

    def arrives(self, now: float) -> float | None:
        start = max(now, self.free_at)
        if start - now > self.room / self.rate or self.rng.random() < self.loss:
            return None
        self.free_at = start + 1 / self.rate
        return self.free_at + self.delay


class Reno:
    """What aiortc does, behind the same methods."""

    def __init__(self, packet: int) -> None:
        self._window, self._threshold = 3.0, float("inf")
        self._sent = self._judged = 0

    @property
    def size(self) -> int:
        return int(self._window * PACKET)

    def sent(self) -> int:
        self._sent += 1
        return self._sent

    def acknowledged(self, number: int, count: int, *, round_trip: float | None, full: bool) -> None:
        if full and number > self._judged:
            self._window += 1 if self._window < self._threshold else 1 / self._window

    def lost(self, number: int) -> None:
        if number > self._judged:
            self._judged = self._sent
            self._window = self._threshold = max(self._window / 2, 4.0)


def drive(windows: list[CongestionWindow | Reno], way: Way, *, seconds: float, begin: float = 0.0) -> list[int]:
    """Keeps the windows full; how many packets of each arrived after `begin`."""
    arrived = [0] * len(windows)
    under_way = [0] * len(windows)
    missing: list[list[int]] = [[] for _ in windows]
    events: list[tuple[float, int, int, float, list[int]]] = []
    now = 0.0

    def fill(index: int) -> None:
        while (under_way[index] + 1) * PACKET <= windows[index].size:
            number = windows[index].sent()
            under_way[index] += 1
            at = way.arrives(now)
            if at is None:
                missing[index].append(number)
            else:
                heapq.heappush(events, (at, number, index, now, missing[index]))
                missing[index] = []

    for index in range(len(windows)):
        fill(index)
    while events and now < seconds:
        now, number, index, sent_at, lost_before = heapq.heappop(events)
        window = windows[index]
        full = (under_way[index] + 1) * PACKET >= window.size
        for one in lost_before:
            under_way[index] -= 1
            window.lost(one)
        under_way[index] -= 1
        window.acknowledged(number, PACKET, round_trip=now - sent_at, full=full)
        arrived[index] += now >= begin
        fill(index)
    return arrived


def share(windows: list[CongestionWindow | Reno], way: Way, *, seconds: float = 40.0) -> list[float]:
    arrived = drive(windows, way, seconds=seconds, begin=seconds / 4)
    return [count / (way.rate * seconds * 3 / 4) for count in arrived]


@pytest.mark.parametrize("loss", [0.0, 0.001, 0.005, 0.01])
@pytest.mark.parametrize("delay", [0.02, 0.08, 0.2])
def test_it_fills_a_long_way_that_loses_packets_by_chance(delay: float, loss: float) -> None:
    way = {"rate": 1000.0, "delay": delay, "room": 100}
    [mine] = share([CongestionWindow(PACKET)], Way(loss=loss, **way))
    assert mine > 0.85
    if delay >= 0.08 and loss >= 0.005:
        [renos] = share([Reno(PACKET)], Way(loss=loss, **way))
        assert mine > 2.5 * renos


def test_a_slow_start_ends_before_the_queue_overflows() -> None:
    way = Way(rate=3000.0, delay=0.08, room=300)
    window = CongestionWindow(PACKET)
    drive([window], way, seconds=1.0)
    assert not window.starting
    assert 0.5 * 240 * PACKET < window.size < (240 + 300) * PACKET


def test_two_of_them_share_alike() -> None:
    way = Way(rate=1000.0, delay=0.05, room=100)
    first, second = share([CongestionWindow(PACKET), CongestionWindow(PACKET)], way, seconds=120.0)
    assert first + second > 0.95
    assert 0.5 < first / second < 2.0


@pytest.mark.parametrize("room", [20, 50, 100, 200])
def test_another_sender_of_the_usual_kind_is_left_its_part(room: int) -> None:
    """Not less than beside four associations of its own kind, which would be the other way of being as fast."""
    way = Way(rate=1000.0, delay=0.05, room=room)
    _, reno = share([CongestionWindow(PACKET), Reno(PACKET)], way, seconds=120.0)
    assert reno > 0.2


def test_more_losses_than_chance_cost_a_half_without_any_queue() -> None:
    window = CongestionWindow(PACKET)
    numbers = [window.sent() for _ in range(INITIAL_PACKETS)]
    for number in numbers[:3]:
        window.lost(number)
    assert window.size == INITIAL_PACKETS * PACKET and window.starting
    window.lost(numbers[3])
    assert window.size == INITIAL_PACKETS * PACKET * (1 - MAX_CUT) and not window.starting
    for number in numbers[4:]:
        window.lost(number)  # sent before the answer to the first ones
    assert window.size == INITIAL_PACKETS * PACKET * (1 - MAX_CUT)


def test_a_window_that_is_not_used_does_not_grow() -> None:
    window = CongestionWindow(PACKET)
    for _ in range(1000):
        window.acknowledged(window.sent(), PACKET, round_trip=0.05, full=False)
    assert window.size == INITIAL_PACKETS * PACKET


def test_silence_leaves_one_packet_and_a_new_start_to_half() -> None:
    window = CongestionWindow(PACKET)
    number = window.sent()
    window.timed_out()
    assert window.size == PACKET and window.starting
    window.lost(number)  # is what timed out
    assert window.size == PACKET
    for _ in range(100):
        if not window.starting:
            break
        window.acknowledged(window.sent(), PACKET, round_trip=None, full=True)
    assert window.size == INITIAL_PACKETS * PACKET * (1 - MAX_CUT)


@given(st.floats(0, 1), st.floats(0, 1))
def test_a_longer_queue_never_costs_less_nor_grows_more(first: float, second: float) -> None:
    low, high = sorted((first, second))
    assert growth(low) >= growth(high)
    assert MIN_GROWTH - 1e-9 <= growth(high) <= growth(low) <= MAX_GROWTH
    assert 0 <= cut(low) <= cut(high) <= MAX_CUT
    assert growth(1.0) == pytest.approx(MIN_GROWTH) and cut(1.0) == MAX_CUT


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["sent", "acknowledged", "lost", "timed_out"]),
            st.integers(-3, 30),
            st.integers(0, PACKET),
            st.none() | st.floats(allow_nan=False, allow_infinity=False, min_value=-1, max_value=1e9),
            st.booleans(),
        ),
        max_size=200,
    )
)
def test_whatever_comes_it_stays_within_what_was_acknowledged(
    steps: list[tuple[str, int, int, float | None, bool]],
) -> None:
    window = CongestionWindow(PACKET)
    total = INITIAL_PACKETS * PACKET
    for kind, number, count, round_trip, full in steps:
        before = window.size
        if kind == "sent":
            window.sent()
        elif kind == "acknowledged":
            window.acknowledged(number, count, round_trip=round_trip, full=full)
            total += int(MAX_GROWTH) * count + 1
            assert window.size >= before
        elif kind == "lost":
            window.lost(number)
            assert max(before // 2, min(before, MINIMUM_PACKETS * PACKET)) - 1 <= window.size
        else:
            window.timed_out()
            assert window.size == PACKET
        assert PACKET <= window.size <= total
