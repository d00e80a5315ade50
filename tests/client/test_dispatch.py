"""The dispatch machines, driven through made-up time by Hypothesis, against a reference that goes row by row."""

import math
import statistics
from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from tesseract_async.client.dispatch import BackwardDispatch, ExpertCall, ForwardDispatch
from tesseract_async.client.latency import Patience
from tesseract_async.client.routing import Candidates, LiveGrid
from tesseract_async.client.settings import MixtureSettings
from tesseract_async.errors import ConnectionLost, ExpertFailed, Overloaded

GRID = 8


def candidates_of(num_live: int) -> Candidates:
    coords = np.arange(num_live, dtype=np.int64).reshape(-1, 1)
    return Candidates("f", LiveGrid(coords, (GRID,)), {})


@dataclass(eq=False)
class Told:
    """A call as the reference knows it."""

    expert: int
    rows: tuple[int, ...]
    sent: float
    expected: float | None = None
    grace: float = 0.0
    slow: bool = False
    seconds: float | None = None
    answered: bool = False


class Reference:
    """What should happen, worked out from scratch at every step, one row after the other."""

    def __init__(
        self, scores: list[list[float]], num_live: int, k_best: int, k_min: int, chosen: MixtureSettings, alone: float
    ):
        self.scores, self.num_live, self.k_best, self.k_min, self.settings = scores, num_live, k_best, k_min, chosen
        self.patience = Patience(alone, chosen.patience or 0.0)
        self.rows = range(len(scores))
        self.fates: list[dict[int, str]] = [{} for _ in self.rows]
        """By row, its experts: open, answered, failed or full (of rows with better scores)."""
        self.calls: list[Told] = []
        self.failed: set[int] = set()
        self.in_error: set[int] = set()
        """Experts that failed, without those that answered since."""
        self.excluded: set[int] = set()
        self.free_at: dict[int, float] = {}
        self.may_come = chosen.refill and k_min > 0 and chosen.capacity_factor is None
        self.room = math.inf
        if chosen.capacity_factor is not None and num_live:
            self.room = max(1, math.ceil(chosen.capacity_factor * len(scores) * min(k_best, num_live) / num_live))
        self.num_first = 0
        self.over = self.lost = self.all_enough = False
        self.stalled = 0.0

    def load(self, expert: int) -> int:
        return sum(len(call.rows) for call in self.calls if call.expert == expert)

    def open_calls(self, row: int | None = None) -> list[Told]:
        return [c for c in self.calls if c.seconds is None and (row is None or row in c.rows)]

    def num_answers(self, row: int) -> int:
        return sum(fate == "answered" for fate in self.fates[row].values())

    def is_satisfied(self, row: int) -> bool:
        return self.num_answers(row) >= max(1, self.k_min)

    def left_for(self, row: int) -> list[int]:
        """Experts that it may still be sent to, best first."""
        if not self.settings.refill:
            return []
        usable = [e for e in range(self.num_live) if e not in self.fates[row] and e not in self.excluded]
        return sorted(usable, key=lambda expert: -self.scores[row][expert])

    def start(self, now: float) -> None:
        self.started, self.deadline = now, now + self.settings.forward_timeout
        best = [sorted(range(self.num_live), key=lambda e, row=row: -self.scores[row][e]) for row in self.rows]
        self.send([(row, expert) for row in self.rows for expert in best[row][: self.k_best]], now)
        self.refill(now)
        self.num_first = len(self.calls)

    def send(self, pairs: list[tuple[int, int]], now: float) -> None:
        for expert in sorted({expert for _, expert in pairs}):
            wanted = sorted((row for row, e in pairs if e == expert), key=lambda row: -self.scores[row][expert])
            num_fitting = min(len(wanted), self.room - self.load(expert))
            kept = wanted[: int(num_fitting)]
            for row in wanted:
                self.fates[row][expert] = "open" if row in kept else "full"
            if kept:
                self.calls.append(Told(expert, tuple(sorted(kept)), now))
            if self.load(expert) >= self.room:
                self.excluded.add(expert)

    def refill(self, now: float) -> None:
        target = min(max(1, self.k_min) + self.settings.spare, self.k_best)
        while True:
            pairs = []
            for row in self.rows:
                to_come = self.num_answers(row) + sum(not call.slow for call in self.open_calls(row))
                if not self.is_satisfied(row):
                    pairs += [(row, expert) for expert in self.left_for(row)[: max(0, target - to_come)]]
            if not pairs:
                return
            self.send(pairs, now)

    def have_answered(self) -> bool:
        num = sum(call.answered for call in self.calls)
        return num > 0 and 2 * num >= self.num_first - len(self.failed)

    def usual(self, call: Told) -> float | None:
        if not self.have_answered():
            return call.expected
        ended = [c for c in self.calls if c.answered]
        share = len(call.rows) / statistics.median(len(c.rows) for c in ended)
        of_others = statistics.median(c.seconds or 0.0 for c in ended) * min(4.0, max(1.0, share))
        return max(of_others, call.expected or 0.0)

    def late_at(self, call: Told) -> float:
        usual, patience = self.usual(call), self.patience.beside_others if self.have_answered() else self.patience.alone
        return math.inf if usual is None else call.sent + usual + max(0.02, patience * usual) + self.stalled

    def give_up_at(self) -> float:
        needed = [call for call in self.open_calls() if not self.is_unneeded(call)]
        return max((self.late_at(call) + call.grace for call in needed), default=-math.inf)

    def is_unneeded(self, call: Told) -> bool:
        """It stood in for others that have answered after all."""
        is_first = call in self.calls[: self.num_first] or not self.num_first
        return not (is_first or call.slow) and all(self.num_answers(row) >= self.k_best for row in call.rows)

    def stuck(self) -> list[int]:
        rows = [row for row in self.rows if not self.is_satisfied(row) and not self.open_calls(row)]
        return [row for row in rows if not self.left_for(row)]

    def admit(self, experts: set[int]) -> None:
        for expert in experts:
            self.excluded.discard(expert)
            self.free_at.pop(expert, None)
            for fates in self.fates:
                if fates.get(expert) == "failed":
                    del fates[expert]

    def decide(self, now: float, stalled: float) -> list[Told]:
        """The calls to send."""
        self.stalled = stalled
        for call in self.open_calls():
            call.slow = call.slow or now >= self.late_at(call)
        self.refill(now)
        if self.may_come and self.stuck():
            self.admit({expert for expert, at in self.free_at.items() if at <= now})
            self.refill(now)
        stuck = self.stuck()
        if stuck and not self.may_come and self.k_min and self.settings.on_missing == "raise":
            self.over = self.lost = True
        self.all_enough = all(self.is_satisfied(r) or (r in stuck and not self.may_come) for r in self.rows)
        if self.all_enough and self.settings.timeout_after_k_min is not None:
            self.deadline = min(self.deadline, now + self.settings.timeout_after_k_min)
        self.over = self.over or now >= self.deadline or (self.all_enough and now >= self.give_up_at())
        if self.over:
            return []
        fresh, self.num_told = self.calls[self.num_told :], len(self.calls)
        return fresh

    num_told = 0

    def timer_at(self) -> float:
        times = [self.deadline, *(self.late_at(call) for call in self.open_calls() if not call.slow)]
        if self.all_enough:
            times.append(self.give_up_at())
        if self.may_come and self.stuck():
            times += self.free_at.values()
        return min(times)


class ForwardMachine(RuleBasedStateMachine):
    """Whatever happens when, and in whatever order: the machine asks as the reference does, and ends when it does."""

    @initialize(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        num_rows = data.draw(st.sampled_from([2, 1, 3, 6] * 5 + [0]))
        self.num_live = data.draw(st.sampled_from([3, 4, 2, 5, 1] * 3 + [0]))
        k_best = data.draw(st.sampled_from([2, 3, 1, 4]))
        k_min = min(k_best, data.draw(st.sampled_from([1, 2, 0, 4])))
        chosen = MixtureSettings(
            spare=data.draw(st.sampled_from([1, 0, 2])),
            forward_timeout=8.0,
            timeout_after_k_min=data.draw(st.sampled_from([None, 0.0, 1.0])),
            patience=data.draw(st.sampled_from([0.0, 0.5, 3.0])),
            refill=data.draw(st.integers(0, 5)) > 0,
            on_missing=data.draw(st.sampled_from(["raise", "zero"])),
            capacity_factor=data.draw(st.sampled_from([None, None, None, 0.5, 1.0, 2.0])),
        )
        alone = data.draw(st.sampled_from([0.0, 0.5, 3.0]))
        order = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1))).permutation(num_rows * GRID)
        scores = order.reshape(num_rows, GRID).astype(np.float32)
        if data.draw(st.booleans()):  # all rows want the same experts, those further down more
            scores = np.sort(order)[::-1].reshape(GRID, num_rows).T.astype(np.float32)
        self.reference = Reference(scores.tolist(), self.num_live, k_best, k_min, chosen, alone)
        self.machine = ForwardDispatch(
            candidates_of(self.num_live),
            torch.from_numpy(scores),
            k_best=k_best,
            k_min=k_min,
            settings=chosen,
            patience=self.reference.patience,
        )
        self.now, self.stalled = 100.0, 0.0
        self.pairs: list[tuple[Told, ExpertCall]] = []
        self.searches = False
        self.machine.start(self.now)
        self.reference.start(self.now)
        self.expected = {e: data.draw(st.sampled_from([None, 0.1, 1.0])) for e in range(GRID)}
        self.look()

    def look(self) -> None:
        told, sent = (
            self.reference.decide(self.now, self.stalled),
            self.machine.calls_to_send(self.now, stalled=self.stalled),
        )
        if not self.machine.is_over:
            assert [(c.expert, c.rows) for c in told] == [(c.expert, tuple(c.rows.tolist())) for c in sent]
        for one, other in zip(told, sent, strict=True):
            one.expected = other.expected = self.expected[one.expert]
            one.grace = other.grace = 0.25
        self.pairs += zip(told, sent, strict=True)
        assert self.machine.is_over == self.reference.over
        if self.machine.is_over:
            self.check_the_end()
            return
        assert self.machine.timer_at() == pytest.approx(self.reference.timer_at())
        need = self.reference.stuck() if self.reference.may_come else []
        rows = self.machine.rows_in_need
        assert need == ([] if rows is None else rows.nonzero().flatten().tolist())

    def check_the_end(self) -> None:
        machine, reference = self.machine, self.reference
        assert machine.num_answers_R.tolist() == [reference.num_answers(row) for row in reference.rows]
        lines = [(row, call.expert) for call in machine.answers for row in call.rows.tolist()]
        assert len(set(lines)) == len(lines), "no row counts an expert twice"
        answered = {(r, e) for r in reference.rows for e, fate in reference.fates[r].items() if fate == "answered"}
        assert set(lines) == answered, "every answer counts, and nothing else"
        assert self.now <= reference.started + 8.0 or not self.on_time
        at_last = self.now >= reference.started + 8.0
        needed = [(told, call) for told, call in self.under_way if not reference.is_unneeded(told)]
        late = [call for told, call in needed if told.slow or at_last]
        given_up = late if reference.lost else [call for _, call in needed]
        assert len(machine.answers) == sum(told.answered for told, _ in self.pairs), "each counts once"
        assert set(machine.given_up) == set(given_up) and len(machine.given_up) == len(given_up)
        assert set(machine.late) == set(late)
        assert set(machine.errors) == {f"f.{e}" for e in reference.in_error} | {call.uid for call in given_up}
        assert set(machine.left_out) == {f"f.{e}" for e in reference.failed} | {call.uid for call in late}

    on_time = True

    @property
    def under_way(self) -> list[tuple[Told, ExpertCall]]:
        return [(told, call) for told, call in self.pairs if told.seconds is None]

    def runs(self) -> bool:
        return not self.machine.is_over

    def pick(self, data: st.DataObject) -> tuple[Told, ExpertCall]:
        told, call = self.under_way[data.draw(st.integers(0, len(self.under_way) - 1))]
        told.seconds = self.now - told.sent
        return told, call

    @precondition(lambda self: self.runs() and self.under_way)
    @rule(data=st.data())
    def one_answers(self, data: st.DataObject) -> None:
        told, call = self.pick(data)
        told.answered = True
        self.reference.in_error.discard(told.expert)
        for row in told.rows:
            self.reference.fates[row][told.expert] = "answered"
        self.machine.answered([call], self.now)
        self.look()

    @precondition(lambda self: self.runs() and self.under_way)
    @rule(data=st.data(), at_once=st.sampled_from([1, 1, 5]), retry_after=st.sampled_from([None, None, 0.0, 0.5]))
    def some_fail(self, data: st.DataObject, at_once: int, retry_after: float | None) -> None:
        for _ in range(min(at_once, len(self.under_way))):
            told, call = self.pick(data)
            error: Any = ConnectionLost("peer", "script")
            if retry_after is not None:
                error = Overloaded("full", retry_after=retry_after)
                free_at = self.now + max(retry_after, 0.1)
                self.reference.free_at[told.expert] = max(free_at, self.reference.free_at.get(told.expert, 0.0))
            self.reference.failed.add(told.expert)
            self.reference.in_error.add(told.expert)
            self.reference.excluded.add(told.expert)
            for row in told.rows:
                self.reference.fates[row][told.expert] = "failed"
            self.machine.failed(call, self.now, error)
        self.look()

    @precondition(lambda self: self.runs())
    @rule(seconds=st.sampled_from([0.01, 0.1, 0.3, 1.0]))
    def time_passes(self, seconds: float) -> None:
        until = self.now + seconds
        while self.runs() and self.machine.timer_at() <= until:
            self.now = max(self.now, self.machine.timer_at())
            before = self.machine.timer_at()
            self.look()
            assert not self.runs() or self.machine.timer_at() > before, "a timer that is due changes something"
        if self.runs():
            self.now = until

    @precondition(lambda self: self.runs())
    @rule(seconds=st.sampled_from([0.1, 1.0]))
    def the_loop_stands_still(self, seconds: float) -> None:
        self.now, self.stalled = self.now + seconds, self.stalled + seconds
        self.on_time = False
        self.look()

    @precondition(lambda self: self.runs() and self.machine.rows_in_need is not None)
    @rule(num_new=st.integers(0, 2), data=st.data())
    def experts_come(self, num_new: int, data: st.DataObject) -> None:
        old = sorted(self.reference.failed)
        back = data.draw(st.sets(st.sampled_from(old))) if old else set()
        num_new = min(num_new, GRID - self.num_live)
        came = back | set(range(self.num_live, self.num_live + num_new))
        self.num_live = self.reference.num_live = self.num_live + num_new
        self.reference.may_come = bool(came)
        self.reference.admit(came)
        self.machine.came(candidates_of(self.num_live), came)
        self.look()

    @precondition(lambda self: not self.runs())
    @rule()
    def nothing_follows_the_end(self) -> None:
        assert not self.machine.calls_to_send(self.now + 1.0)

    def teardown(self) -> None:
        """Nothing happens any more: it ends by itself, in time."""
        if hasattr(self, "machine"):
            for _ in range(1000):
                if not self.runs():
                    break
                self.now = max(self.now, self.machine.timer_at())
                self.look()
            assert not self.runs()


ForwardMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=20, deadline=None)
TestForward = ForwardMachine.TestCase


@settings(max_examples=150, deadline=None)
@given(
    needed=st.integers(0, 2),
    delays=st.lists(st.one_of(st.none(), st.floats(0.01, 12.0)), min_size=1, max_size=4),
    failing=st.sets(st.integers(0, 3)),
    expected=st.sampled_from([None, 0.1, 1.0]),
)
def test_backward_ends_when_all_have_answered_or_enough_have_and_the_rest_is_late(
    needed: int, delays: list[float | None], failing: set[int], expected: float | None
) -> None:
    chosen = MixtureSettings(backward_timeout=8.0, backward_k_min=needed, patience=0.5)
    scores = torch.arange(GRID, dtype=torch.float32).repeat(2, 1)
    forward = ForwardDispatch(
        candidates_of(len(delays)), scores, k_best=4, k_min=0, settings=chosen, patience=Patience(0.5, 0.5)
    )
    forward.start(0.0)
    for call in forward.calls_to_send(0.0):
        forward.answered([call], 0.0)
    machine = BackwardDispatch(forward, settings=chosen, patience=Patience(0.5, 0.5))
    machine.start(10.0)
    calls = machine.calls_to_send(10.0)
    assert [machine.forward_calls[call] for call in calls] == forward.answers
    for call, answer in zip(calls, forward.answers, strict=True):
        assert (call.expert, call.rows.tolist()) == (answer.expert, answer.rows.tolist())
    for call in calls:
        call.expected, call.grace = expected, 0.25
    events = sorted((10.0 + d, i) for i, d in enumerate(delays) if d is not None)
    assume(len({at for at, _ in events}) == len(events))
    took: list[float] = []
    num_failed = 0
    waiting = set(range(len(delays)))
    now = 10.0
    while not machine.is_over:
        at, number = events[0] if events else (math.inf, -1)
        usual = expected
        if took and 2 * len(took) >= len(delays) - num_failed:
            usual = max(statistics.median(took), expected or 0.0)
        enough = len(took) >= min(needed, len(delays))
        give_up_at = math.inf if usual is None else 10.0 + usual + max(0.02, 0.5 * usual) + 0.25
        ends_at = min(18.5, give_up_at) if enough else 18.5
        assert machine.timer_at() == pytest.approx(ends_at)
        if at < ends_at and not math.isclose(at, ends_at):
            now = max(now, at)
            events.pop(0)
            waiting.discard(number)
            if number in failing:
                num_failed += 1
                machine.failed(calls[number], now, ExpertFailed("no"))
            else:
                took.append(now - 10.0)
                machine.answered([calls[number]], now)
        else:
            now = max(now, machine.timer_at())
        assert not machine.calls_to_send(now)
    assert not waiting or now >= min(machine.timer_at(), 18.5)
    assert {call for call in machine.late} == {calls[number] for number in waiting}
    shortage = machine.shortage()
    assert (0 if shortage is None else shortage.num_rows) == (2 if len(took) < min(needed, len(delays)) else 0)
    heard = set(range(len(delays))) - waiting
    assert set(machine.errors) == {f"f.{number}" for number in waiting | heard & failing}


def test_an_expert_that_answered_on_its_second_chance_is_not_asked_again() -> None:
    chosen = MixtureSettings(spare=0, patience=1.0)
    scores = -torch.arange(GRID, dtype=torch.float32).reshape(1, GRID)  # expert 0 is the better one
    machine = ForwardDispatch(candidates_of(2), scores, k_best=2, k_min=2, settings=chosen, patience=Patience(1.0, 1.0))
    machine.start(0.0)
    for call in machine.calls_to_send(0.0):
        machine.failed(call, 0.0, ConnectionLost("peer", "script"))
    assert not machine.calls_to_send(0.0) and machine.rows_in_need is not None
    machine.came(candidates_of(2), [0])
    [call] = machine.calls_to_send(1.0)
    machine.answered([call], 1.0)
    assert not machine.calls_to_send(1.0)
    machine.came(candidates_of(2), [0, 1])
    assert [call.expert for call in machine.calls_to_send(2.0)] == [1]


def demanding(num_live: int, *first: int, **options: Any) -> ForwardDispatch:
    """A machine with a row for each number in `first`: the expert that it wants first, before those with low numbers.
    One answer is enough for each."""
    scores = torch.arange(GRID, 0, -1, dtype=torch.float32).repeat(len(first), 1)
    scores[range(len(first)), first] = GRID + 1.0
    settings = MixtureSettings(spare=0, patience=1.0, **options)
    machine = ForwardDispatch(
        candidates_of(num_live), scores, k_best=1, k_min=1, settings=settings, patience=Patience(1.0, 1.0)
    )
    machine.start(0.0)
    return machine


def test_a_call_ends_once() -> None:
    machine = demanding(2, 0)
    [call] = machine.calls_to_send(0.0)
    machine.failed(call, 1.0, ExpertFailed("no"))
    [other] = machine.calls_to_send(1.0)
    machine.answered([other], 2.0)
    for one in (call, other):
        with pytest.raises(KeyError):
            machine.answered([one], 3.0)
        with pytest.raises(KeyError):
            machine.failed(one, 3.0, ExpertFailed("no"))
    assert machine.num_answers_R.tolist() == [1] and machine.answers == [other]


def test_an_overloaded_expert_has_one_more_chance_not_two() -> None:
    machine = demanding(1, 0)
    [call] = machine.calls_to_send(0.0)
    machine.failed(call, 0.0, Overloaded("full", retry_after=1.0))
    assert not machine.calls_to_send(0.0) and machine.timer_at() == 1.0
    [call] = machine.calls_to_send(1.0)
    machine.failed(call, 1.0, ConnectionLost("peer", "script"))
    assert not machine.calls_to_send(1.0) and machine.timer_at() == 15.0
    assert machine.rows_in_need is not None, "only others can help"


def test_of_two_refusals_of_an_expert_the_longer_pause_counts() -> None:
    machine = demanding(2, 0, 1)
    first, other = machine.calls_to_send(0.0)
    machine.failed(other, 0.0, ConnectionLost("peer", "script"))
    [second] = machine.calls_to_send(0.0)
    assert (first.expert, second.expert) == (0, 0) and second.rows.tolist() == [1]
    machine.failed(first, 0.0, Overloaded("full", retry_after=2.0))
    machine.failed(second, 0.0, Overloaded("full", retry_after=1.0))
    assert not machine.calls_to_send(0.0) and machine.timer_at() == 2.0
    [again] = machine.calls_to_send(2.0)
    assert again.expert == 0 and again.rows.tolist() == [0, 1]


def test_where_a_row_is_lost_only_the_slow_are_given_up() -> None:
    machine = demanding(3, 0, 1, 2, refill=False)
    first, slow, open_ = machine.calls_to_send(0.0)
    slow.expected = 0.1
    assert not machine.calls_to_send(machine.timer_at()) and slow.is_slow and not open_.is_slow
    machine.failed(first, 1.0, ExpertFailed("no"))
    assert not machine.calls_to_send(1.0) and machine.is_over
    assert machine.given_up == machine.late == [slow]
    assert set(machine.errors) == set(machine.left_out) == {"f.0", "f.1"}


def test_a_stand_in_is_not_waited_for_once_the_slow_have_answered() -> None:
    """Two experts of a row are slow, and two others are asked; then the first two answer after all."""
    scores = -torch.arange(GRID, dtype=torch.float32).reshape(1, GRID)
    settings = MixtureSettings(patience=1.0)
    machine = ForwardDispatch(
        candidates_of(4), scores, k_best=2, k_min=1, settings=settings, patience=Patience(1.0, 1.0)
    )
    machine.start(0.0)
    first = machine.calls_to_send(0.0)
    for call in first:
        call.expected = 1.0
    stand_ins = machine.calls_to_send(2.0)
    assert [call.is_slow for call in first] == [True, True] and [call.expert for call in stand_ins] == [2, 3]
    machine.answered(first[:1], 2.1)
    assert not machine.calls_to_send(2.1) and not machine.is_over
    machine.answered(first[1:], 2.2)
    assert not machine.calls_to_send(2.2) and machine.is_over
    assert machine.answers == first and not machine.given_up and not machine.errors, "nobody is to blame"


def test_a_slow_start_tells_less_than_being_left_behind() -> None:
    """Of three calls, none has answered: they wait in one queue, it seems. Once two have, the third one is late."""
    scores = -torch.arange(GRID, dtype=torch.float32).reshape(1, GRID)
    settings = MixtureSettings(refill=False)
    machine = ForwardDispatch(
        candidates_of(3), scores, k_best=3, k_min=1, settings=settings, patience=Patience(4.0, 0.5)
    )
    machine.start(0.0)
    calls = machine.calls_to_send(0.0)
    for call in calls:
        call.expected = 1.0
    assert not machine.calls_to_send(3.0) and not any(call.is_slow for call in calls) and machine.timer_at() == 5.0
    machine.answered(calls[:2], 3.0)
    assert not machine.calls_to_send(3.0) and machine.timer_at() == 4.5
    assert not machine.calls_to_send(4.5) and machine.is_over and machine.late == calls[2:]


def test_an_expert_that_answers_after_all_is_in_no_error() -> None:
    machine = demanding(1, 0)
    [call] = machine.calls_to_send(0.0)
    machine.failed(call, 0.0, Overloaded("full", retry_after=1.0))
    assert not machine.calls_to_send(0.0)
    [again] = machine.calls_to_send(1.0)
    machine.answered([again], 1.0)
    assert not machine.calls_to_send(1.0) and machine.is_over
    assert not machine.errors and set(machine.left_out) == {"f.0"}


def test_a_call_of_many_rows_gets_four_times_the_usual_time_at_most() -> None:
    machine = demanding(2, 0, *[1] * 10)
    small, large = machine.calls_to_send(0.0)
    machine.answered([small], 1.0)
    assert not machine.calls_to_send(1.0)
    assert machine.usual_seconds([large]) == [4.0] and machine.timer_at() == 8.0
