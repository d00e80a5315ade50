"""Trainers' shares together: each sample is trained on once, whatever the network and the trainers do."""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Callable
from random import Random

import pytest

from tesseract_async.errors import Overloaded
from tesseract_async.identity import Identity
from tesseract_async.sharing.samples import (
    GRACE_SECONDS,
    Allotment,
    Ledger,
    Report,
    TrainerName,
)
from tesseract_async.sharing.share import Share
from tesseract_async.sharing.spans import Piece, Spans, decode_pieces, encode_pieces

PEERS = [Identity.from_seed(bytes([n]) * 32).peer_id for n in range(1, 7)]
NAMES: list[TrainerName] = [(peer, bytes(16)) for peer in PEERS]


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
