"""What batches cost, learned from made-up ones."""

import math
import random
from types import SimpleNamespace
from typing import Any

import pytest

from tesseract_async.runtime.batcher import Batcher
from tesseract_async.runtime.costs import TRIED_SHARE, BatchCost, GroupChoice
from tesseract_async.runtime.grouped import Group
from tesseract_async.runtime.queues import ExpertQueues


def fed(sizes: list[int], *, each: float, per_row: float, noise: float = 0.0) -> BatchCost:
    cost, chance = BatchCost(), random.Random(1)
    for size in sizes:
        cost.add(size, (each + per_row * size) * chance.uniform(1 - noise, 1 + noise))
    return cost


MIXED = [1, 2, 3, 4, 8, 16, 32] * 10


def test_the_line_is_found() -> None:
    cost = fed(MIXED, each=3.0, per_row=0.5)
    assert cost.rows_until(0.5) == pytest.approx(6.0), "where 3 is half of 3 + 0.5 rows"
    assert cost.rows_until(0.25) == pytest.approx(18.0)
    assert cost.rows_until(0.0) == math.inf


def test_noise_does_not_mislead_it() -> None:
    assert 3.0 < fed(MIXED, each=3.0, per_row=0.5, noise=0.3).rows_until(0.5) < 12.0


def test_rows_that_cost_all_and_rows_that_cost_nothing() -> None:
    assert fed(MIXED, each=0.0, per_row=0.5).rows_until(0.25) == pytest.approx(0.0, abs=1e-9)
    assert fed(MIXED, each=3.0, per_row=0.0).rows_until(0.25) > 1e6
    assert fed(MIXED, each=0.0, per_row=0.0).rows_until(0.25) == math.inf


def test_nothing_is_claimed_of_few_batches_or_of_equal_ones() -> None:
    assert fed([1, 2, 3], each=3.0, per_row=0.5).rows_until(0.5) == math.inf
    assert fed([16] * 100, each=3.0, per_row=0.5).rows_until(0.5) == math.inf


def test_what_a_batch_will_take_counts_what_its_rows_share() -> None:
    assert fed(MIXED, each=3.0, per_row=0.5).seconds(10) == pytest.approx(8.0)
    assert fed([1] * 100, each=3.0, per_row=0.5).seconds(10) == pytest.approx(35.0), "nothing is known of it"


def test_equal_batches_leave_what_was_known() -> None:
    cost = fed(MIXED, each=3.0, per_row=0.5)
    for _ in range(500):
        cost.add(16, 11.0)
    assert cost.rows_until(0.5) == pytest.approx(6.0, rel=0.3)


def test_one_stall_changes_little() -> None:
    cost = fed(MIXED, each=3.0, per_row=0.5)
    cost.add(4, 500.0)
    assert cost.rows_until(0.5) < 12.0


def test_a_lasting_change_is_learned() -> None:
    cost = fed(MIXED, each=3.0, per_row=0.5)
    for size in MIXED * 5:
        cost.add(size, 300.0 + 50.0 * size)
    assert cost.rows_until(0.5) == pytest.approx(6.0, rel=0.1)
    for size in MIXED * 5:
        cost.add(size, 30.0 + 0.5 * size)
    assert cost.rows_until(0.5) == pytest.approx(60.0, rel=0.1)


class Alike:
    """An expert, as far as its queues look at it."""

    alike, varies, max_batch_size, settings = None, False, 64, SimpleNamespace(preferred_sizes=())


def test_a_joint_forward_is_expected_to_take_what_each_expert_takes_for_its_rows() -> None:
    queues, experts = ExpertQueues(Batcher(), groups_experts=True), [Alike() for _ in range(4)]
    kind: Any = SimpleNamespace(way="ragged", is_ragged=True, is_light=False)
    group = Group(kind, training=False)
    group.checked = kind.way
    for one in experts:
        queues.add((one, False, False, False, False, None)).group = group  # type: ignore[arg-type]
    for size in MIXED:
        group.cost.add(size, 1e-3 + 1e-5 * size)
    counts = [8] * len(experts)  # 1.08 ms for each, and seen one by one each row took 0.3 ms on average
    assert queues.of_joint(experts, counts, 4.4e-3) is not None  # type: ignore[arg-type]
    assert queues.of_joint(experts, counts, 4.2e-3) is None  # type: ignore[arg-type]
    for is_faster in (True, False):
        for _ in range(60):
            group.choice.add(4, 32, True, 1.0 if is_faster else 3.0)
            group.choice.add(4, 32, False, 2.0)
        assert (queues.of_joint(experts, counts, 4.4e-3) is not None) is is_faster  # type: ignore[arg-type]


@pytest.mark.parametrize("expected", [True, False])
@pytest.mark.parametrize("is_faster", [True, False])
@pytest.mark.parametrize("times", [1.2, 2.0, 3.0])
def test_the_first_passes_lose_little_to_trials(times: float, is_faster: bool, expected: bool) -> None:
    seconds, choice, ways = {is_faster: 1.0, not is_faster: times}, GroupChoice(expected=expected), []
    for _ in range(60):
        ways.append(choice.is_together(16, 512))
        choice.add(16, 512, ways[-1], seconds[ways[-1]])
    assert ways[0] is expected and ways[1] is not expected, "both are looked at soon"
    num_slow = sum(way is not is_faster for way in ways)
    assert num_slow * (times - 1.0) <= TRIED_SHARE * 60 + 3 * (times - 1.0)


@pytest.mark.parametrize("expected", [True, False])
@pytest.mark.parametrize("times", [1.05, 1.12, 1.2, 1.4])
def test_few_passes_go_the_slower_way_where_it_is_hardly_slower(times: float, expected: bool) -> None:
    """Half of them did: then the median pass took half as much longer as that way does."""
    num_slow = 0
    for seed in range(20):
        chance, choice = random.Random(seed), GroupChoice(expected=expected)
        for number in range(55):
            way = choice.is_together(4, 256)
            choice.add(4, 256, way, (times if way else 1.0) * chance.gauss(1.0, 0.05))
            num_slow += way and number >= 25
    assert num_slow < 0.35 * 20 * 30


@pytest.mark.parametrize("expected", [True, False])
def test_a_first_trial_that_took_long_by_chance_delays_the_choice_by_a_few_passes(expected: bool) -> None:
    choice, ways = GroupChoice(expected=expected), []
    for number in range(5):
        ways.append(choice.is_together(16, 512))
        seconds = 1.0 if ways[-1] is expected else 0.5
        choice.add(16, 512, ways[-1], 10.0 if number == 1 else seconds)
    assert ways == [expected, not expected, expected, not expected, expected]
    assert choice.is_together(16, 512) is not expected


@pytest.mark.slow
@pytest.mark.parametrize("expected", [True, False])
@pytest.mark.parametrize("is_faster", [True, False])
@pytest.mark.parametrize("times", [1.15, 3.0])
def test_chance_does_not_choose_whether_experts_share_a_pass(times: float, is_faster: bool, expected: bool) -> None:
    """As on a busy machine: half of the passes take over 1.2 times as long as they could, one in 50 up to ten times."""
    seconds = {is_faster: 1.0, not is_faster: times}
    num_right, lost, spent = 0, 0.0, 0.0
    for seed in range(100):
        chance, choice = random.Random(seed), GroupChoice(expected=expected)
        for _ in range(1500):
            factor = chance.expovariate(3.0) + (chance.uniform(1.0, 10.0) if chance.random() < 0.02 else 1.0)
            if choice.gathers():
                way = choice.is_together(8, 32)
                choice.add(8, 32, way, seconds[way] * factor)
            else:
                way = False
                choice.spent += seconds[way] * factor
            lost += (seconds[way] - 1.0) * factor
            spent += seconds[way] * factor
        num_right += choice.loses(8, 32) is not is_faster
    assert num_right >= 99
    assert lost < 0.02 * spent
