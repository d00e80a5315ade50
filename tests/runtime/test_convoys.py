"""Many training steps in flight over delays, in made-up time: what the order and size of batches make of throughput.

A closed circle: each step's forward travels, waits, is computed and travels back; then its backward does; then the next
step begins at once. The trainer's loop does one thing after another, too. Delays are equal, as in a crowd from one
place: random ones would spread crowds by themselves.
"""

import heapq
import itertools
import math
import random
from collections.abc import Callable
from typing import Any

import pytest

from tesseract_async.runtime.batcher import FIXED_SHARE, Batch, Batcher, QueuedRequest
from tesseract_async.runtime.queues import FORWARD_HEAD_START

ROWS = 64
SECONDS = 5.0
LOOP_SECONDS = 0.4e-3

Cost = tuple[float, float]
"""Seconds of a batch, and of each row."""
ROWS_COST = ((0.15e-3, 28e-6), (0.4e-3, 62e-6))
"""Forward and backward where rows cost nearly everything."""
BATCHES_COST = ((1.0e-3, 22e-6), (2.6e-3, 47e-6))
"""... and where a batch costs as much as fifty rows."""


class Circle:
    """So many steps going round; `rate` and `busy` are of the time after two rounds."""

    def __init__(
        self, in_flight: int, delay: float, costs: tuple[Cost, Cost], fixed_share: float, head_start: float
    ) -> None:
        self.delay, self.costs, self.chance = delay, costs, random.Random(in_flight)
        self.batcher = Batcher(fixed_share=fixed_share)
        self.pools = [
            self.batcher.add_queue(name, max_batch_size=8192, head_start=start)
            for name, start in ((0, head_start), (1, 0.0))
        ]
        self.events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self.sequence = itertools.count()
        self.now = self.loop_free_at = 0.0
        self.computing = False
        self.busy = 0.0
        self.num_ended = 0
        for _ in range(in_flight):
            self.on_loop(self.send, 0)
        self.run_until(lambda: self.num_ended >= 2 * in_flight)
        ended, begun = self.num_ended, self.now
        self.busy = 0.0
        self.run_until(lambda: self.now > begun + SECONDS)
        self.rate = (self.num_ended - ended) / SECONDS
        self.busy /= SECONDS

    def at(self, when: float, what: Callable[..., None], *args: Any) -> None:
        heapq.heappush(self.events, (when, next(self.sequence), what, args))

    def run_until(self, done: Callable[[], bool]) -> None:
        while not done():
            self.now, _, what, args = heapq.heappop(self.events)
            what(*args)

    def on_loop(self, what: Callable[..., None], *args: Any) -> None:
        """One thing after another, each for about `LOOP_SECONDS`."""
        self.loop_free_at = max(self.now, self.loop_free_at) + LOOP_SECONDS * self.chance.uniform(0.5, 1.5)
        self.at(self.loop_free_at, what, *args)

    def send(self, kind: int) -> None:
        self.at(self.now + self.delay, self.arrive, kind)

    def arrive(self, kind: int) -> None:
        self.batcher.add(QueuedRequest(self.pools[kind], ROWS, num_bytes=ROWS), self.now)
        self.compute()

    def compute(self) -> None:
        if self.computing or (batch := self.batcher.pop_ready(self.now)) is None:
            return
        each, per_row = self.costs[batch.queue.name]
        seconds = (each + per_row * batch.num_rows) * self.chance.uniform(0.7, 1.3)
        self.computing, self.busy = True, self.busy + seconds
        self.at(self.now + seconds, self.answer, batch)

    def answer(self, batch: Batch) -> None:
        self.computing = False
        self.batcher.finish([batch], self.now)
        for _ in batch.slices:
            self.on_loop(self.on_loop, *((self.send, 1) if batch.queue.name == 0 else (self.end,)))
        self.compute()

    def end(self) -> None:
        self.num_ended += 1
        self.send(0)


def shares(costs: tuple[Cost, Cost], fixed_share: float, head_start: float) -> list[float]:
    """Throughput at 100 and at 200 ms per call over that without delay, with the steps that Little's law asks for."""
    base = Circle(4, 0.0, costs, fixed_share, head_start).rate
    return [
        Circle(4 + math.ceil(base * 2 * delay), delay, costs, fixed_share, head_start).rate / base
        for delay in (0.1, 0.2)
    ]


@pytest.mark.parametrize("costs", [ROWS_COST, BATCHES_COST], ids=["rows", "batches"])
def test_delays_cost_hardly_any_throughput(costs: tuple[Cost, Cost]) -> None:
    at_100_ms, at_200_ms = shares(costs, FIXED_SHARE, FORWARD_HEAD_START)
    assert at_100_ms >= 0.95
    assert at_200_ms >= 0.9


def test_without_either_measure_there_are_convoys() -> None:
    for fixed_share, head_start in ((0.0, 0.0), (0.0, FORWARD_HEAD_START), (FIXED_SHARE, 0.0)):
        assert max(shares(ROWS_COST, fixed_share, head_start)) < 0.93


def test_a_device_that_is_behind_computes_as_many_rows_as_ever() -> None:
    kept_up = Circle(64, 0.0, BATCHES_COST, FIXED_SHARE, FORWARD_HEAD_START)
    assert kept_up.busy == pytest.approx(1.0, abs=0.03)
    assert kept_up.rate >= 0.97 * Circle(64, 0.0, BATCHES_COST, 0.0, 0.0).rate
