"""Timers against a plain list, and what cancelling leaves behind."""

import weakref

from hypothesis import given
from hypothesis import strategies as st

from tesseract_async.network.timers import Timers

STEP = st.tuples(st.sampled_from(["start", "cancel", "run"]), st.integers(0, 20))


@given(st.lists(STEP, max_size=200))
def test_against_a_list(steps: list[tuple[str, int]]) -> None:
    timers, ran, now = Timers(), [], 0.0
    started, waiting, expected = [], [], []
    for step, number in steps:
        if step == "start":
            index = len(started)
            started.append(timers.start(now + number, lambda at, index=index: ran.append((index, at))))
            waiting.append((now + number, index))
        elif step == "cancel" and started:
            timers.cancel(started[number % len(started)])
            waiting = [item for item in waiting if item[1] != number % len(started)]
        elif step == "run":
            now += number
            expected += [(index, now) for at, index in sorted(waiting) if at <= now]
            waiting = [item for item in waiting if item[0] > now]
            timers.run(now)
        assert ran == expected
        assert len(timers) == len(waiting)
        assert timers.next_at() == min((at for at, _ in waiting), default=float("inf"))


def test_what_an_action_starts_for_now_is_done_now() -> None:
    timers, ran = Timers(), []
    timers.start(1.0, lambda now: timers.start(now, ran.append) and None)
    timers.run(1.0)
    assert ran == [1.0] and timers.next_at() == float("inf")


class Something:
    def act(self, now: float) -> None:
        """A bound method holds on to its object."""


def test_a_cancelled_timer_lets_go_of_its_action() -> None:
    timers = Timers()
    timers.start(1e9, Something().act)
    for _ in range(10):
        something = Something()
        gone = weakref.ref(something)
        timers.cancel(timers.start(1e6, something.act))
        del something
        assert gone() is None
    assert len(timers) == 1
