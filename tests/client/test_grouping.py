"""Which server hears of which expert: the grouping machine against a reference that goes expert by expert."""

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tesseract_async.client.dispatch import CallsUnderWay, Direction, ExpertCall
from tesseract_async.client.grouping import GONE_SECONDS, MAX_LOOKUPS, Grouping, Request
from tesseract_async.client.latency import Patience
from tesseract_async.client.routing import Candidates, LiveGrid
from tesseract_async.errors import (
    ConnectionLost,
    ExpertFailed,
    InputsForgotten,
    NotEnoughExperts,
    NotPrimary,
    Overloaded,
    ProtocolError,
    SchemaMismatch,
)
from tests.client.fake_node import FakeReplica

NUM_EXPERTS, HEDGE = 5, 0.5
CANDIDATES = Candidates("f", LiveGrid(np.arange(NUM_EXPERTS, dtype=np.int64)[:, None], (NUM_EXPERTS,)), {})


class AllAtOnce(CallsUnderWay):
    """These calls, and no others; it is over with the last of them."""

    def __init__(self, direction: Direction, experts: list[int]) -> None:
        super().__init__(CANDIDATES, 1, timeout=100.0, patience=Patience(0.0, 0.0))
        self.direction = direction  # type: ignore[misc]
        self._experts = experts

    def start(self, now: float) -> None:
        super().start(now)
        for expert in self._experts:
            self._send(ExpertCall(expert, f"f.{expert}", np.array([0]), now))

    def timer_at(self) -> float:
        return math.inf

    def shortage(self) -> NotEnoughExperts | None:
        return None

    def _decide(self, now: float) -> None:
        if not self._under_way:
            self._end(now)


@dataclass
class Told:
    """What should become of one call."""

    known: list[str]
    left: list[str]
    open: list[Request] = field(default_factory=list)
    strange: list[str] = field(default_factory=list)
    lookups: int = 0
    gone_at: float = math.inf
    silent: bool = False
    look_up_at: float = -math.inf
    waits_until: float | None = None
    """When it is looked up."""
    redirected: bool = False
    forgotten: bool = False
    fate: str = ""


ERRORS = {
    "lost": ConnectionLost("peer", "script"),
    "nonsense": ProtocolError("script"),
    "final": ExpertFailed("script"),
    "schema": SchemaMismatch("script"),
    "full": Overloaded("script", retry_after=0.3),
    "at 1": NotPrimary("script", primary="1", retry_after=0.2),  # type: ignore[arg-type]
    "at 2": NotPrimary("script", primary="2", retry_after=0.2),  # type: ignore[arg-type]
    "forgotten": InputsForgotten("script"),
}


class GroupingMachine(RuleBasedStateMachine):
    """Whatever comes when: each expert is asked where it should be; what goes to one server at once goes together."""

    @initialize(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        self.direction: Direction = data.draw(st.sampled_from(["forward", "backward"]))
        self.is_strict = data.draw(st.booleans())
        self.looks_up = self.is_strict or self.direction == "backward"
        experts = data.draw(st.lists(st.integers(0, NUM_EXPERTS - 1), min_size=1, max_size=6))
        servers = st.lists(st.sampled_from("0123"), max_size=3, unique=True)
        hosts = {expert: data.draw(servers) for expert in sorted(set(experts))}

        def rank(call: ExpertCall, found: Any, now: float) -> list[Any]:
            names = hosts[call.expert] if found is None else [str(replica.peer) for replica in found]
            return [FakeReplica(call.uid, name, primary=i == 0) for i, name in enumerate(names)]

        self.calls = AllAtOnce(self.direction, experts)
        self.machine = Grouping(
            self.calls,
            rank=rank,  # type: ignore[arg-type]
            key=lambda call, replica: replica.peer,
            hedge_after=lambda replica: HEDGE,
            is_strict=self.is_strict,
        )
        self.now = 10.0
        self.calls.start(self.now)
        self.told = {call: self.fresh(Told([], []), hosts[call.expert]) for call in self.calls._under_way}
        self.due = list(self.told)
        self.looking: list[ExpertCall] = []
        """Those that are being looked up."""
        self.said: dict[Request, set[ExpertCall]] = {}
        self.look()

    def fresh(self, told: Told, names: list[str]) -> Told:
        told.known, told.left = names, [name for name in names if name not in told.strange]
        if self.direction == "backward":
            del told.left[1:]
        return told

    def look(self) -> None:
        """One step: the reference says what it brings."""
        for request in self.said:
            if self.now >= request.hedge_at:
                self.due += [call for call in request.asked if request in self.told[call].open and self.told[call].left]
        asked: list[tuple[str, int]] = []
        failing = []
        for call in dict.fromkeys(self.due):
            told = self.told[call]
            if told.fate:
                continue
            if told.left:
                asked.append((told.left.pop(0), id(call)))
            elif not told.open and told.waits_until is None:
                told.gone_at = min(told.gone_at, self.now + GONE_SECONDS) if told.silent else math.inf
                at = max(self.now + (0.1 * 2**told.lookups if told.lookups else 0.0), told.look_up_at)
                if self.looks_up and told.lookups < MAX_LOOKUPS and at < told.gone_at:
                    told.waits_until = at
                else:
                    failing.append(call)
        self.due = []
        for call in failing:
            self.fail(call)
        step = self.machine.step(self.now)
        if self.calls.is_over:
            assert all(told.fate for told in self.told.values())
            return
        sent = [(str(replica.peer), id(call)) for request in step.send for call, replica in request.asked.items()]
        assert sorted(sent) == sorted(asked), "each where it should be"
        for name in {name for name, _ in sent}:
            there = [request for request in step.send if request.peer == name]
            most = max(Counter(call.expert for request in there for call in request.asked).values())
            assert len(there) == most, "what goes to one server goes together, but no expert twice in one message"
        for request in step.send:
            assert len({call.expert for call in request.asked}) == len(request.asked)
            self.said[request] = set()
            may_hedge = self.direction == "forward" and any(self.told[call].left for call in request.asked)
            assert request.hedge_at == (self.now + HEDGE if may_hedge else math.inf)
            for call in request.asked:
                self.told[call].open.append(request)
        nobody_waits = {r for r in self.said if not any(r in told.open for told in self.told.values())}
        assert set(step.cancel) <= nobody_waits
        waiting = [
            call
            for call, told in self.told.items()
            if told.waits_until is not None and not told.fate and call not in self.looking
        ]
        assert set(step.look_up) == {call for call in waiting if self.told[call].waits_until <= self.now}  # type: ignore[operator]
        self.looking += step.look_up
        times = [self.told[call].waits_until for call in waiting if call not in self.looking]
        times += [r.hedge_at for r in self.said if r.hedge_at != math.inf and self.is_under_way(r)]
        assert self.machine.timer_at() == min([math.inf, *times])

    def is_under_way(self, request: Request) -> bool:
        return request in self.machine._open

    def fail(self, call: ExpertCall) -> None:
        self.told[call].fate, self.told[call].open = "failed", []

    def failed(self, call: ExpertCall, request: Request, kind: str) -> None:
        """What a failure of an open call should lead to."""
        told, name = self.told[call], str(request.asked[call].peer)
        told.open.remove(request)
        told.silent = True
        if kind == "schema":
            told.strange.append(name)
        elif kind == "forgotten" and not told.forgotten:
            told.forgotten = True
            told.left.insert(0, name)
        elif kind == "final":
            self.fail(call)
            return
        elif kind.startswith("at") and kind[3:] in told.known and name != kind[3:] and not told.redirected:
            told.redirected, told.left = True, [kind[3:]]
        elif kind == "full" or kind.startswith("at"):
            told.redirected, told.silent = False, False
            told.look_up_at = self.now + (0.3 if kind == "full" else 0.2)
        self.due.append(call)

    def runs(self) -> bool:
        return not self.calls.is_over

    def pick(self, data: st.DataObject) -> Request | None:
        requests = [request for request in self.said if self.is_under_way(request)]
        return data.draw(st.sampled_from(requests)) if requests else None

    @precondition(runs)
    @rule(data=st.data(), kinds=st.lists(st.sampled_from(sorted(ERRORS)), max_size=2))
    def a_part_comes(self, data: st.DataObject, kinds: list[str]) -> None:
        """Servers know nothing of what others have answered."""
        if (request := self.pick(data)) is None:
            return
        unsaid = [call for call in request.asked if call not in self.said[request]]
        if not unsaid:
            return
        spoken = data.draw(st.lists(st.sampled_from(unsaid), min_size=1, unique=True))
        self.said[request] |= set(spoken)
        failing = dict(zip(spoken, kinds, strict=False))
        settled = spoken[len(failing) :]
        if failing and data.draw(st.integers(0, 3)) == 0:
            settled = spoken  # the caller found that one of the answers in the sum must not count
        is_open = [request in self.told[call].open for call in settled]
        counts = all(is_open) and not set(settled) & set(failing)
        for call, was_open in zip(settled, is_open, strict=True):
            told = self.told[call]
            if call in failing or not was_open:
                continue
            if counts:
                told.fate, told.open = "answered", []
            else:
                told.open.remove(request)
                told.left.insert(0, str(request.asked[call].peer))
                self.due.append(call)
        errors = {call: ERRORS[kind] for call, kind in failing.items()}
        for call, kind in failing.items():
            if request in self.told[call].open:
                self.failed(call, request, kind)
        assert self.machine.part(request, settled, errors, self.now) == counts
        self.look()

    @precondition(runs)
    @rule(data=st.data(), kind=st.sampled_from([None, "lost", "full", "final"]))
    def a_message_ends(self, data: st.DataObject, kind: str | None) -> None:
        if (request := self.pick(data)) is None:
            return
        for call in request.asked:
            if request in self.told[call].open:
                self.failed(call, request, kind or "nonsense")
        self.machine.ended(request, None if kind is None else ERRORS[kind], self.now)
        self.look()

    @precondition(runs)
    @rule(seconds=st.sampled_from([0.1, 0.5, 2.0]))
    def time_passes(self, seconds: float) -> None:
        until = self.now + seconds
        while self.runs() and self.machine.timer_at() <= until:
            self.now = max(self.now, self.machine.timer_at())
            self.look()
        if self.runs():
            self.now = until

    @precondition(lambda self: self.runs() and self.looking)
    @rule(names=st.lists(st.sampled_from("0123"), max_size=2, unique=True))
    def it_was_looked_up(self, names: list[str]) -> None:
        call = self.looking.pop()
        if not self.told[call].fate:
            told = self.fresh(self.told[call], names)
            told.lookups, told.waits_until = (told.lookups + 1 if names else MAX_LOOKUPS), None
            self.due.append(call)
        self.machine.found(call, [FakeReplica(call.uid, name) for name in names], self.now)  # type: ignore[misc]
        self.look()

    @precondition(lambda self: not self.runs())
    @rule()
    def nothing_follows_the_end(self) -> None:
        assert not any(self.machine.step(self.now + 1.0))

    @invariant()
    def the_policy_knows(self) -> None:
        if hasattr(self, "calls"):
            for fate, ended in (("answered", self.calls.answers), ("failed", None)):
                expected = [call for call, told in self.told.items() if told.fate == fate]
                if ended is not None:
                    assert Counter(map(id, ended)) == Counter(map(id, expected)), "each answer counts once"
            assert set(self.calls._under_way) >= {call for call, told in self.told.items() if not told.fate}


GroupingMachine.TestCase.settings = settings(max_examples=120, stateful_step_count=20, deadline=None)
TestGrouping = GroupingMachine.TestCase


def test_more_experts_than_a_message_may_name_go_in_several() -> None:
    calls = AllAtOnce("forward", list(range(3000)))
    machine = Grouping(
        calls,
        rank=lambda call, found, now: [FakeReplica(call.uid, "0")],  # type: ignore[list-item]
        key=lambda call, replica: replica.peer,
        hedge_after=lambda replica: HEDGE,
    )
    calls.candidates = Candidates("f", LiveGrid(np.arange(3000, dtype=np.int64)[:, None], (3000,)), {})
    calls.start(0.0)
    assert [len(request.asked) for request in machine.step(0.0).send] == [1024, 1024, 952]


@pytest.mark.parametrize("names", [["0", "1"], ["1", "0"]])
def test_of_what_others_answered_meanwhile_a_sum_does_not_count_and_the_rest_is_asked_again(names: list[str]) -> None:
    calls = AllAtOnce("forward", [0, 1])
    machine = Grouping(
        calls,
        rank=lambda call, found, now: [FakeReplica(call.uid, name) for name in names],  # type: ignore[misc]
        key=lambda call, replica: replica.peer,
        hedge_after=lambda replica: HEDGE,
    )
    calls.start(0.0)
    [first] = machine.step(0.0).send
    [second] = machine.step(HEDGE).send
    one, other = first.asked
    assert machine.part(second, [one], {}, 1.0) and not machine.part(first, [one, other], {}, 1.0)
    [again] = machine.step(1.0).send
    assert list(again.asked) == [other] and again.peer == first.peer
    assert machine.part(again, [other], {}, 2.0)
    assert not machine.step(2.0).send and calls.is_over and calls.answers == [one, other]


def test_others_are_asked_too_once_the_slowest_of_a_message_is_due() -> None:
    calls = AllAtOnce("forward", [0, 1])
    grouping = Grouping(
        calls,
        rank=lambda call, found, now: [FakeReplica(call.uid, peer) for peer in "ab"],  # type: ignore[misc]
        key=lambda call, replica: replica.peer,
        hedge_after=lambda replica: {"f.0": 1.0, "f.1": 3.0}[replica.uid],
    )
    calls.start(0.0)
    (request,) = grouping.step(0.0).send
    assert grouping.timer_at() == 3.0 and not grouping.step(2.0).send
    (hedge,) = grouping.step(3.0).send
    assert str(hedge.peer) == "b" and list(hedge.asked) == list(request.asked)
