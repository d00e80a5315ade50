"""The formulas of *Assumptions and recommendations* against simulations in virtual time, and the codecs' bytes."""

import random
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "docs"))  # last: no file there may stand for a package
import needs

from tesseract_async.server.registry import make_backend
from tesseract_async.testing import VirtualClock
from tesseract_async.wire.compression import encoded_bytes


def test_the_page_shows_what_the_formulas_give() -> None:
    text = needs.PAGE.read_text(encoding="utf-8")
    assert needs.with_tables(text) == text, "python docs/needs.py"


class Server:
    """A line there, a device and a line back, each of which does one thing after another."""

    def __init__(self, *, way: float, forward: float, round_trip: float) -> None:
        self.clock = VirtualClock()
        self.num_done = 0
        self._way, self._forward, self._half = way, forward, round_trip / 2
        self._free = dict.fromkeys(("there", "device", "back"), 0.0)

    def _take(self, what: str, at: float, seconds: float) -> float:
        self._free[what] = max(at, self._free[what]) + seconds
        return self._free[what]

    def exchange(self, is_backward: bool) -> None:
        """A forward or a backward; each takes half of a call's bytes, the backward two thirds of its computing."""
        # in the order of arrival, stage by stage
        arrives = self._take("there", self.clock.now, self._way / 2) + self._half
        self.clock.call_at(arrives, self._compute, is_backward)

    def _compute(self, is_backward: bool) -> None:
        computed = self._take("device", self.clock.now, self._forward * (2 if is_backward else 1))
        self.clock.call_at(computed, self._answer, is_backward)

    def _answer(self, is_backward: bool) -> None:
        self.clock.call_at(self._take("back", self.clock.now, self._way / 2) + self._half, self._came, is_backward)

    def _came(self, is_backward: bool) -> None:
        self.num_done += is_backward
        self.exchange(not is_backward)


@pytest.mark.parametrize("width", [256, 1024, 4096])
@pytest.mark.parametrize("megabits", [20, 1000])
@pytest.mark.parametrize("in_flight", [1, 4, 64])
def test_rows_per_second_are_those_of_a_simulation(width: int, megabits: int, in_flight: int) -> None:
    at = {"device": 5e10, "bandwidth": megabits * 1e6 / 8, "round_trip": 0.1}
    server = Server(
        way=needs.ROWS * needs.bytes_per_row(width) / at["bandwidth"],
        forward=needs.ROWS * needs.operations_per_row(width) / at["device"] / 3,
        round_trip=at["round_trip"],
    )
    for _ in range(in_flight):
        server.exchange(False)
    turn = needs.ROWS * in_flight / needs.rows_per_second(width, **at, in_flight=in_flight)
    server.clock.run(3 * turn)
    before, since = server.num_done, server.clock.now
    server.clock.run(40 * turn)
    measured = needs.ROWS * (server.num_done - before) / (server.clock.now - since)
    expected = needs.rows_per_second(width, **at, in_flight=in_flight)
    assert 0.85 * expected <= measured <= 1.05 * expected
    enough = needs.needed_in_flight(width, **at)
    assert in_flight < enough or measured > 0.85 * needs.rows_per_second(width, **at, in_flight=10_000)


@pytest.mark.parametrize(("num_copies", "stay"), [(1, 3600.0), (2, 3600.0), (3, 900.0)])
def test_experts_lost_are_those_of_a_simulation(num_copies: int, stay: float) -> None:
    repair, rng, num_lost, days = 180.0, random.Random(1), 0, 0.0
    while num_lost < 300:
        # from a full set: until all are gone at once, or a day is over; a copy is made anew `repair` after one is gone
        now, alive = 0.0, [rng.expovariate(1 / stay) for _ in range(num_copies)]
        repairs: list[float] = []
        while now < 86400.0:
            dies, made = min(alive), min(repairs, default=float("inf"))
            if made < dies:
                now = made
                repairs.remove(made)
                alive.append(now + rng.expovariate(1 / stay))
                continue
            now = dies
            alive.remove(dies)
            repairs.append(now + repair)
            if not alive:
                num_lost += 1
                break
        days += min(now, 86400.0) / 86400.0
    expected = needs.experts_lost(num_copies, stay=stay, repair=repair, num_experts=1)
    assert num_lost / days == pytest.approx(expected, rel=0.2)


@pytest.mark.parametrize("width", [256, 512])
def test_sizes_are_those_of_the_class_and_of_the_codecs(width: int) -> None:
    backend = make_backend("ffn", sizes={"in_features": width})
    assert sum(one.numel() for one in backend.module.parameters()) == needs.num_parameters(width)
    for codec, size in needs.CODECS.items():
        num_bytes = encoded_bytes(64 * width, torch.float32, codec)
        assert num_bytes == pytest.approx(64 * width * size, rel=0.05)
