"""Samples are handed out once, whatever the network and the trainers do."""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Callable
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tesseract_async.errors import Overloaded, ProtocolError
from tesseract_async.identity import Identity
from tesseract_async.sharing.samples import (
    GRACE_SECONDS,
    LEASE_SECONDS,
    MAX_TRAINERS_OF_PEER,
    STALL_SECONDS,
    STATE_BYTES,
    Allotment,
    Ledger,
    Report,
    TrainerName,
)
from tesseract_async.sharing.share import Share
from tesseract_async.sharing.spans import Piece, Spans, decode_pieces, encode_pieces

PEERS = [Identity.from_seed(bytes([n]) * 32).peer_id for n in range(1, 7)]
NAMES: list[TrainerName] = [(peer, bytes(16)) for peer in PEERS]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 30), st.integers(0, 30))), st.integers(0, 40))
def test_spans_are_a_set(changes: list[tuple[bool, int, int]], num: int) -> None:
    spans, numbers = Spans(), set[int]()
    for adds, start, stop in changes:
        if adds:
            spans.add(start, stop)
            numbers |= set(range(start, stop))
        else:
            cut = spans.cut(start, stop)
            assert {n for one in cut for n in range(*one)} == numbers & set(range(start, stop))
            numbers -= set(range(start, stop))
        assert [n for one in spans for n in range(*one)] == sorted(numbers)
        assert spans.num == len(numbers)
        assert all(a[1] < b[0] for a, b in itertools.pairwise(spans))
    taken = spans.take(num, most=100)
    assert [n for one in taken for n in range(*one)] == sorted(numbers)[:num]


class Reference:
    """One epoch, sample by sample."""

    def __init__(self, num: int) -> None:
        self.state: dict[int, TrainerName | str] = dict.fromkeys(range(num), "free")

    def report(self, name: TrainerName, wanted: int, held: set[int], done: set[int], *, believes: bool) -> set[int]:
        for n in held | (done if believes else set()):
            if self.state.get(n) == "free":
                self.state[n] = name
        for n, who in self.state.items():
            if who == name and n in done:
                self.state[n] = "done"
            elif who == name and n not in held:
                self.state[n] = "free"
        granted = {n for n in [n for n, who in sorted(self.state.items()) if who == "free"][:wanted]}
        self.state |= dict.fromkeys(granted, name)
        return granted

    def forget(self, name: TrainerName) -> None:
        self.state |= {n: "free" for n, who in self.state.items() if who == name}


NUM = 20
SETS = st.sets(st.integers(0, NUM + 2), max_size=8)


def pieces(numbers: set[int], epoch: int = 0) -> list[Piece]:
    return [(epoch, n, n + 1) for n in sorted(numbers)]


def numbers(some: object) -> set[int]:
    return {n for _, start, stop in some for n in range(start, stop)}  # type: ignore[attr-defined]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 6), SETS, SETS, SETS, st.integers(0, 25))))
def test_the_ledger_does_as_sample_by_sample(steps: list[tuple[int, int, set[int], set[int], set[int], int]]) -> None:
    ledger, reference, now = Ledger(free_at=0.0), Reference(NUM), 0.0  # others may have handed out some before
    ledger.report(NAMES[5], 1, Report(0, NUM, 0, (), (), ()), now)  # opens the epoch
    heard: dict[TrainerName, float] = {}
    for turn, (who, wanted, held, done, returned, seconds) in enumerate(steps):
        if all(one == "done" for one in reference.state.values()):
            break
        now += seconds
        for gone in [one for one, at in heard.items() if at < now - LEASE_SECONDS]:
            del heard[gone]
            reference.forget(gone)
        name, held = NAMES[who], held - done
        heard[name] = now
        grant = ledger.report(name, turn, Report(0, NUM, wanted, pieces(held), pieces(done), pieces(returned)), now)
        inside = set(range(NUM))
        is_over = all(one in ("done",) for one in reference.state.values())
        believes = now < LEASE_SECONDS - GRACE_SECONDS
        expected = reference.report(name, wanted, held & inside, done & inside, believes=believes)
        assert numbers(grant.pieces) == expected or is_over
        mine = {n for n, one in reference.state.items() if one == name}
        assert numbers(grant.gone) & inside == (held & inside) - mine
        is_over = all(one == "done" for one in reference.state.values())
        assert grant.first == (1 if is_over else 0)
    # another primary goes on with what is done
    again = Ledger(ledger.encode())
    if not all(one == "done" for one in reference.state.values()):
        grant = again.report(NAMES[0], 1, Report(0, NUM, NUM, (), (), ()), now)
        assert numbers(grant.pieces) == {n for n, one in reference.state.items() if one != "done"}


class Trainer:
    """A program that trains on what it is given, and dies, or leaves."""

    def __init__(self, world: World, name: TrainerName) -> None:
        self.world, self.name = world, name
        self.share = Share(world.num_samples, batch_size=3, ahead=2)
        self.share.begin(world.epoch_now, gives_back=True)
        self.is_alive, self.is_asking = True, False
        self.batch: list[Piece] = []
        self.began: set[tuple[int, int]] = set()
        """All that it was given to train on."""
        world.after(0.0, self.ask_always)
        world.after(0.1, self.train)

    def ask_always(self) -> None:
        self.world.after(self.world.random.uniform(0.5, 1.5), self.ask_always)
        self.ask()

    def ask(self) -> None:
        if not self.is_alive:
            return
        turn, report = self.share.report()

        def arrive(session: bytes, grant: Allotment) -> None:
            if self.is_alive and self.turn == turn:
                self.turn = 0
                self.share.granted(session, report, grant)
                if self.share.has_news:
                    self.ask()

        self.turn = turn
        self.world.send(lambda: self.world.answer(self.name, turn, report, arrive))

    turn = 0

    def train(self) -> None:
        share, world = self.share, self.world
        if not self.is_alive:
            return
        world.after(world.random.expovariate(2.0), self.train)
        if not share.has_begun and share.is_over:
            share.begin(share.epoch + 1, gives_back=True)
        if not share.has_begun or share.is_filling:
            while (sample := share.take()) is not None:
                self.began.add(sample)
                if not share.is_filling:
                    return
            if not (share.is_filling and (share.is_dry or share.is_over)):
                return
            share.end_batch()
        failed = world.random.random() < 0.05
        for epoch, start, stop in next(iter(share.begun.values())):
            for n in range(start, stop):
                if failed:
                    self.began.discard((epoch, n))
                else:
                    world.trained[epoch, n] += 1
        share.ended(failed=failed)


class World:
    """Messages are lost, doubled and overtake one another; trainers come and die; primaries are replaced."""

    def __init__(self, seed: int, *, num_samples: int, num_trainers: int, takeovers: bool) -> None:
        self.random, self.now, self.num_samples = Random(seed), 0.0, num_samples
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.order = itertools.count()
        self.trained: Counter[tuple[int, int]] = Counter()
        self.at_deaths: set[tuple[int, int]] = set()
        self.has_takeovers = takeovers
        self.ledger, self.session, self.state = Ledger(), b"0", b""
        self.names = iter((PEERS[n % 6], n.to_bytes(16, "big")) for n in itertools.count())
        self.trainers = [Trainer(self, next(self.names)) for _ in range(num_trainers)]
        self.after(5.0, self.change)
        self.after(2.0, self.close_round)
        if takeovers:
            self.after(self.random.uniform(10, 30), self.take_over)

    @property
    def epoch_now(self) -> int:
        return max([one.share.epoch for one in getattr(self, "trainers", [])], default=0)

    def after(self, seconds: float, act: Callable[[], None]) -> None:
        heapq.heappush(self.events, (self.now + seconds, next(self.order), act))

    def send(self, act: Callable[[], None]) -> None:
        for _ in range(self.random.choice([0, 1, 1, 1, 1, 1, 1, 1, 1, 2])):
            self.after(self.random.expovariate(10.0), act)

    def run(self, until: float) -> None:
        while self.events and self.events[0][0] <= until:
            self.now, _, act = heapq.heappop(self.events)
            act()

    def change(self) -> None:
        """One comes, and one dies."""
        self.after(self.random.uniform(5, 20), self.change)
        self.trainers.append(Trainer(self, next(self.names)))
        one = self.random.choice([one for one in self.trainers if one.is_alive])
        one.is_alive = False
        known = self.state if self.has_takeovers else self.ledger.encode()
        open_now = Ledger(known).epochs
        done = {at: Spans(open_now[at].done()) for at in open_now}
        over = Ledger(known).first_epoch
        self.at_deaths |= {
            (at, n)
            for at, n in one.began
            if at >= over and not (at in done and any(start <= n < stop for start, stop in done[at]))
        }
        self.at_deaths |= {(at, n) for at, start, stop in one.share.queue for n in range(start, stop)}

    def close_round(self) -> None:
        self.state = self.ledger.encode()
        self.after(self.random.uniform(1, 6), self.close_round)

    def take_over(self) -> None:
        self.session = self.random.randbytes(8)
        self.ledger = Ledger(self.state, free_at=self.now + GRACE_SECONDS)
        self.after(self.random.uniform(10, 40), self.take_over)

    def answer(self, name: TrainerName, turn: int, report: Report, arrive: Callable[[bytes, Allotment], None]) -> None:
        report = report._replace(
            **{one: decode_pieces(encode_pieces(getattr(report, one))) for one in ("held", "done", "returned")}
        )
        try:
            grant = self.ledger.report(name, turn, report, self.now)
        except (ValueError, Overloaded):
            return
        session = self.session
        self.send(lambda: arrive(session, grant))


@pytest.mark.parametrize("takeovers", [False, True])
@pytest.mark.parametrize(("seeds", "num"), [(range(2), 6), pytest.param(range(2, 12), 16, marks=pytest.mark.slow)])
def test_trainers_that_come_and_go_see_every_sample_of_an_epoch_once(takeovers: bool, seeds: range, num: int) -> None:
    for seed in seeds:
        world = World(seed, num_samples=100, num_trainers=num, takeovers=takeovers)
        world.run(300.0)
        over = world.ledger.first_epoch
        assert over >= 2
        for epoch in range(over):
            for n in range(100):
                times = world.trained[epoch, n]
                assert times >= 1, (seed, epoch, n)
                if (epoch, n) not in world.at_deaths:
                    assert times == 1, (seed, epoch, n, times)


def test_a_new_primary_goes_on_where_the_trainers_are_however_many_epochs_that_is() -> None:
    """A small dataset is gone through several times between two rounds, of which the last leaves the state."""
    shares = {name: Share(10, batch_size=2, ahead=1) for name in NAMES[:3]}
    trained: Counter[tuple[int, int]] = Counter()
    ledger, session, state, now = Ledger(), b"first", b"", 0.0
    for epoch in range(10):
        for share in shares.values():
            share.begin(epoch, gives_back=True)
        for turn in itertools.count():
            assert turn < 100
            if epoch == 8 and turn == 1:  # two trainers have gone on to an epoch, and one has not yet
                ledger, session = Ledger(state, free_at=now + GRACE_SECONDS), b"second"
            for number, (name, share) in enumerate(shares.items()):
                if epoch == 8 and turn == 0 and number == 2:
                    continue
                message, report = share.report()
                share.granted(session, report, ledger.report(name, message, report, now))
                while (sample := share.take()) is not None:
                    trained[sample] += 1
                share.end_batch()
                while share.begun and turn % 2:
                    share.ended()
            now += 1.0
            if (epoch, turn) == (1, 1):
                state = ledger.encode()
            if all(share.is_over and not share.begun for share in shares.values()):
                break
    assert trained == {(epoch, n): 1 for epoch in range(10) for n in range(10)}


def test_strangers_cannot_fill_the_ledger() -> None:
    ledger = Ledger()
    for turn in range(20):
        claimed = [(0, 4 * (256 * turn + n), 4 * (256 * turn + n) + 1) for n in range(256)]
        ledger.report(NAMES[0], turn, Report(0, 10**9, 0, (), claimed, ()), 0.0)
    assert len(ledger.epochs[0].free) <= 512 + 256
    assert len(ledger.encode()) <= STATE_BYTES
    for n in range(1, MAX_TRAINERS_OF_PEER + 1):
        name = PEERS[1], n.to_bytes(16, "big")
        ledger.report(name, 1, Report(0, 10**9, 2**40, (), (), ()), 10.0)
    assert ledger.epochs[0].held[name].num == 1 << 20
    with pytest.raises(Overloaded):
        ledger.report((PEERS[1], bytes(16)), 1, Report(0, 10**9, 1, (), (), ()), 10.0)
    with pytest.raises(ValueError, match="1000000000 samples here, not 5"):
        ledger.report(NAMES[2], 1, Report(0, 5, 1, (), (), ()), 10.0)
    with pytest.raises(ValueError, match="epoch 7 does not follow epoch 0"):
        ledger.report(NAMES[2], 2, Report(7, 5, 1, (), (), ()), 10.0)


def test_a_trainer_ends_only_what_was_handed_out_to_it() -> None:
    ledger, (honest, liar) = Ledger(), NAMES[:2]
    (given,) = ledger.report(honest, 1, Report(0, 100, 10, (), (), ()), 0.0).pieces
    for turn, kind in enumerate(("done", "returned")):
        claims = Report(0, 100, 5, (), (), ())._replace(**{kind: [(0, 0, 100)]})
        grant = ledger.report(liar, turn, claims, 1.0)
        assert grant.pieces == [(0, 10, 15)]  # its own, again and again
    ledger.report(liar, 2, Report(0, 100, 0, (), (), ()), 1.0)
    grant = ledger.report(honest, 2, Report(0, 100, 100, [given], (), ()), 2.0)
    assert [given, *grant.pieces] == [(0, 0, 10), (0, 10, 100)] and not grant.gone
    ledger.report(honest, 3, Report(0, 100, 0, (), [(0, 0, 100)], ()), 3.0)
    assert ledger.report(honest, 4, Report(1, 100, 0, (), (), ()), 4.0).first == 1


def test_a_trainer_whose_loop_hangs_does_not_hold_up_the_others() -> None:
    ledger, (stuck, other), turn = Ledger(), NAMES[:2], itertools.count()
    held = list(ledger.report(stuck, next(turn), Report(0, 10, 10, (), (), ()), 0.0).pieces)
    assert not ledger.report(other, next(turn), Report(0, 10, 10, (), (), ()), 0.0).pieces
    gone: list[Piece] = []
    for second in range(1, int(STALL_SECONDS) + 1):
        wanted = 10 if gone else 0
        grant = ledger.report(stuck, next(turn), Report(0, 10, wanted, held, (), ()), float(second))
        gone += grant.gone
        assert not grant.pieces
    assert gone == held
    grant = ledger.report(stuck, next(turn), Report(0, 10, 10, (), (), ()), STALL_SECONDS + 1.0)
    assert not grant.pieces and grant.waits
    grant = ledger.report(other, next(turn), Report(0, 10, 10, (), (), ()), STALL_SECONDS + 1.0)
    assert grant.pieces == [(0, 0, 10)] and grant.again == 10
    # after that it is a trainer like any other
    ledger.report(other, next(turn), Report(0, 10, 0, (), (), [(0, 0, 10)]), STALL_SECONDS + 2.0)
    assert ledger.report(stuck, next(turn), Report(0, 10, 10, (), (), ()), STALL_SECONDS + 3.0).pieces == [(0, 0, 10)]


@pytest.mark.parametrize(("epoch", "num"), [(2**62, 5), (2**48 - 1, 5), (0, 0), (0, 2**62)])
def test_what_the_next_primary_could_not_read_is_refused(epoch: int, num: int) -> None:
    ledger = Ledger()
    claimed = [(epoch, 0, 1)] if epoch < 2**48 else []
    for some in ([], claimed):
        with pytest.raises(ValueError, match="epochs have at least one sample"):
            ledger.report(NAMES[0], 1, Report(epoch, num, 1, some, (), ()), 0.0)
    Ledger(ledger.encode())


@pytest.mark.parametrize(
    "state", [b"\xff", b"\x93", b"\x92\x00\x91\x93\x00\x05\x91\x06", b"\x92\x05\x91\x93\x00\x05\x90"]
)
def test_states_that_lie_are_refused(state: bytes) -> None:
    with pytest.raises(ProtocolError):
        Ledger(state)


@pytest.mark.parametrize(
    "flat", [None, [1], [0, 2, 2], [0, 3, 2], [0, -1, 2], [0, 0, 2.0], [0, 0, 2**50], [0, 0, 1] * 1025]
)
def test_pieces_that_lie_are_refused(flat: object) -> None:
    with pytest.raises(ProtocolError):
        decode_pieces(flat)
