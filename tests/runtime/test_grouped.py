"""Experts that are computed in one pass come out as if each was computed alone: numbers, versions and errors."""

import asyncio
import copy
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tesseract_async.runtime.attempts import Outcomes
from tesseract_async.runtime.backend import BackendSettings, ExpertBackend
from tesseract_async.runtime.batcher import Batcher, BatchQueue, RowSlice
from tesseract_async.runtime.costs import GroupChoice
from tesseract_async.runtime.grouped import Group
from tesseract_async.runtime.passes import DevicePass
from tesseract_async.runtime.runtime import RuntimeSettings, TesseractRuntime
from tesseract_async.runtime.together import GroupExecutor
from tesseract_async.runtime.work import Work, WorkResult
from tesseract_async.wire.tensors import TensorSpec

QUEUE: BatchQueue = Batcher().add_queue("test", max_batch_size=64)
WIDTH = 8


class FeedForward(nn.Module):
    """Layers that rows of several experts go through at once, a plain parameter, a buffer, and dropout."""

    def __init__(self, shift: float = 0.5, *, fails_above: float = 1e6) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH, bias=False), nn.LayerNorm(WIDTH)
        self.drop = nn.Dropout(0.5)
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("offset", torch.randn(WIDTH))
        self.shift, self.fails_above = shift, fails_above

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = nn.functional.gelu(self.up(x) + self.shift)
        y: torch.Tensor = self.norm(x + self.drop(self.down(hidden)) * self.scale + self.offset)
        return y


class Fragile(FeedForward):
    """Raises for rows that are too large."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if bool((x.detach() > self.fails_above).any()):
            raise ValueError("too large")
        return super().forward(x)


class Product(nn.Module):
    """Multiplies by a parameter of its own, which only `vmap` takes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / 3)
        self.last = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.RMSNorm(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.last(torch.tanh(x @ self.weight))
        return y


def ready_made() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, WIDTH))


KINDS: list[Callable[[], nn.Module]] = [ready_made, FeedForward, Fragile, Product]
OPTIMIZERS: list[Callable[[nn.Module], torch.optim.Optimizer]] = [
    lambda module: torch.optim.SGD(module.parameters(), lr=0.1),
    lambda module: torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    lambda module: torch.optim.Adam(module.parameters(), lr=0.001, eps=1e-4),
    lambda module: torch.optim.AdamW(module.parameters(), lr=0.001, eps=1e-4, weight_decay=0.5),
    lambda module: torch.optim.AdamW(module.parameters(), lr=0.001, eps=1e-4, amsgrad=True),
    lambda module: torch.optim.RMSprop(module.parameters(), lr=0.001, eps=1e-4),
]


def backends(
    num: int,
    make: Callable[[], nn.Module] = ready_made,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = OPTIMIZERS[0],
    **rest: object,
) -> list[ExpertBackend]:
    found = []
    for number in range(num):
        torch.manual_seed(number)
        module = make()
        found.append(
            ExpertBackend(
                module,
                optimizer=optimizer(module),
                args_schema=(TensorSpec((WIDTH,)),),
                settings=BackendSettings(**rest),  # type: ignore[arg-type]
            )
        )
    return found


def work_of(
    backend: ExpertBackend,
    x: torch.Tensor,
    gradient: torch.Tensor | None,
    number: int,
    *,
    training: bool = False,
    weights: torch.Tensor | None = None,
    forward_version: int | None = None,
) -> Work:
    return Work(
        QUEUE,
        len(x),
        0,
        number % 3,
        backend=backend,
        inputs=[x],
        rows=None,
        weights=weights,
        output_gradients=None if gradient is None else [gradient],
        training=training,
        seed=0,
        call_id=number.to_bytes(16, "big"),
        forward_version=forward_version,
        answer=None,  # type: ignore[arg-type]
    )


def whole(works: Sequence[Work]) -> list[RowSlice]:
    return [RowSlice(work, 0, work.num_rows) for work in works]


def one_by_one(executor: GroupExecutor, batches: Sequence[Sequence[Work]]) -> Outcomes:
    outcomes: Outcomes = {}
    for works in batches:
        attempt = executor.stage(whole(works))
        executor.launch(attempt)
        executor.complete(attempt)
        outcomes |= executor.outcomes(attempt)
    return outcomes


def in_one_pass(executor: GroupExecutor, group: Group, batches: Sequence[Sequence[Work]]) -> tuple[Outcomes, bool]:
    together = executor.stage_together(group, [whole(works) for works in batches])
    executor.launch_together(together)
    executor.complete_together(together)
    return executor.outcomes_together(together), not together.is_each_alone


def group_of(executor: GroupExecutor, experts: Sequence[ExpertBackend], mode: object = 0) -> Group | None:
    """The one group of all of them, once each was called."""
    for one in experts:
        one.forward([torch.zeros(1, WIDTH)])
    found = [executor.groups.group_of(one, training=False, mode=mode) for one in experts]
    return found[0] if all(one is found[0] for one in found) else None


def checked_group(executor: GroupExecutor, experts: Sequence[ExpertBackend], mode: object, gradients: bool) -> Group:
    """Their group, after passes of no consequence have found a way that computes what each does alone."""
    group = group_of(executor, experts, mode)
    assert group is not None
    for _ in range(3):
        works = [work_of(one, torch.randn(2, WIDTH), torch.randn(2, WIDTH), 0) for one in experts]
        for work in works:
            work.call_id = None
            work.output_gradients = work.output_gradients if gradients else None
        in_one_pass(executor, group, [[work] for work in works])
    assert group.is_checked
    return group


def same(left: object, right: object) -> None:
    if isinstance(left, WorkResult) and isinstance(right, WorkResult):
        assert left.version == right.version
        torch.testing.assert_close(left.tensors, right.tensors, atol=2e-6, rtol=2e-5, equal_nan=True)
    else:
        assert type(left) is type(right) and str(left) == str(right), (left, right)


FAULTS = ("none", "none", "none", "nan gradient", "nan row", "large row", "huge gradient", "stale")


@settings(max_examples=6, deadline=None)
@given(st.data())
def test_a_pass_equals_one_by_one(data: st.DataObject) -> None:
    check_a_pass(data)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(st.data())
def test_many_passes_equal_one_by_one(data: st.DataObject) -> None:
    check_a_pass(data)


def check_a_pass(data: st.DataObject) -> None:
    make, optimizer = data.draw(st.sampled_from(KINDS)), data.draw(st.sampled_from(OPTIMIZERS))
    options: dict[str, object] = data.draw(
        st.sampled_from(
            [
                {},
                {"clip_gradient_norm": 0.5},
                {"staleness_damping": 1.0, "max_staleness": 3},
                {"step_every": 2},
                {"max_gradient_norm": 50.0},
            ]
        )
    )
    num = data.draw(st.integers(2, 5))
    mine, theirs = (backends(num, make, optimizer, **options) for _ in range(2))
    executor, alone = (GroupExecutor(clock=lambda: 0.0) for _ in range(2))
    weighted = data.draw(st.booleans())
    forwards, steps = (checked_group(executor, mine, mode, mode == "steps") for mode in ("forwards", "steps"))
    for one in theirs:
        one.forward([torch.zeros(1, WIDTH)])
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    number = 1
    for _ in range(data.draw(st.integers(1, 4))):
        due = data.draw(st.lists(st.integers(0, num - 1), min_size=2, unique=True))
        batches: tuple[list[list[Work]], list[list[Work]]] = ([], [])
        is_backward = data.draw(st.booleans())
        for index in due:
            for batch in batches:
                batch.append([])
            for _ in range(data.draw(st.integers(1, 2))):
                rows = data.draw(st.integers(1, 5))
                x, gradient = (torch.randn(rows, WIDTH, generator=generator) for _ in range(2))
                weights = torch.randn(rows, generator=generator) if weighted and is_backward else None
                fault, version = data.draw(st.sampled_from(FAULTS)), mine[index].version
                if fault == "nan gradient":
                    gradient[0, 0] = torch.nan
                elif fault == "nan row":
                    x[0, 0] = torch.nan
                elif fault == "large row":
                    x[0, 0] = 1e7
                elif fault == "huge gradient":
                    gradient *= 1e25
                elif fault == "stale":
                    version -= 5
                number += 1
                for batch, experts in zip(batches, (mine, theirs), strict=True):
                    work = work_of(
                        experts[index],
                        x,
                        gradient if is_backward else None,
                        number,
                        weights=weights,
                        forward_version=version,
                    )
                    batch[-1].append(work)
        outcomes, _ = in_one_pass(executor, steps if is_backward else forwards, batches[0])
        expected = one_by_one(alone, batches[1])
        for own, other in zip(sum(batches[0], []), sum(batches[1], []), strict=True):
            same(outcomes.get(own), expected.get(other))
    for one, other in zip(mine, theirs, strict=True):
        assert one.version == other.version and list(one.applied.items()) == list(other.applied.items())
        assert one.norms.values() == pytest.approx(other.norms.values(), rel=1e-4)
        torch.testing.assert_close(one.module.state_dict(), other.module.state_dict(), atol=1.5e-6, rtol=1e-5)
        assert all(x.grad is None for x in one.module.parameters())


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_one_row_each_through_wide_experts(biases: bool, transposed: bool) -> None:
    """Such weights are read row by row where they lie so."""
    wide, executor, experts = 384, GroupExecutor(clock=lambda: 0.0), []
    for number in range(3):
        torch.manual_seed(number)
        module = nn.Sequential(nn.Linear(wide, wide, bias=biases), nn.Tanh(), nn.Linear(wide, wide, bias=biases))
        if transposed:
            module[2].weight = nn.Parameter(torch.randn(wide, wide).t() / 20)
        experts.append(ExpertBackend(module, args_schema=(TensorSpec((wide,)),)))
        experts[-1].forward([torch.zeros(1, wide)])
    group = executor.groups.group_of(experts[0], training=False, mode=0)
    assert group is not None
    for turn in range(4):
        x = torch.randn(3, 1, wide)
        if turn == 3:
            x[1, 0, 5] = torch.inf
        works = [work_of(one, row, None, 0) for one, row in zip(experts, x, strict=True)]
        found, was_together = in_one_pass(executor, group, [[work] for work in works])
        assert was_together == (turn > 0) and group.kind.is_ragged
        for work, one, row in zip(works, experts, x, strict=True):
            same(found[work], WorkResult(list(one.forward([row])), 0))


def test_a_check_holds_for_the_way_that_was_checked_alone() -> None:
    """A pass in another direction may find that way unfit for all of the kind."""
    executor, experts = GroupExecutor(clock=lambda: 0.0), backends(2)
    group = checked_group(executor, experts, "forwards", False)
    group.kind.misfits(None)
    assert not group.is_checked
    assert checked_group(executor, experts, "forwards", False) is group
    group.kind.misfits(None)
    assert not group.is_checked and not group.kind.may_fit


class Mean(nn.Module):
    """Rows influence one another: an expert must not be so, but some are."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear(x) - x.mean(0)
        return y


class Counts(nn.Module):
    """Changes an attribute with each call, and its outputs with it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.calls = nn.Linear(WIDTH, WIDTH), 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        y: torch.Tensor = self.linear(x) / self.calls
        return y


class Remembers(nn.Module):
    """Changes a buffer with each call."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("last", torch.zeros(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.last = x[-1].detach().clone()
        y: torch.Tensor = self.linear(x)
        return y


class Writes(nn.Module):
    """Writes its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear(x.detach().mul_(2.0))
        return y


class Branches(nn.Module):
    """Takes another way for some values."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight if float(self.weight.detach().sum()) > 0 else -(x @ self.weight)


def hooked() -> nn.Module:
    module = ready_made()
    module[1].register_forward_hook(lambda part, args, y: y * 2)  # type: ignore[index]
    return module


def with_tensor() -> nn.Module:
    module = ready_made()
    module.extra = torch.randn(())  # type: ignore[assignment]
    return module


def with_batch_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH))


def large() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 1 << 18), nn.Linear(1 << 18, WIDTH))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [hooked, with_tensor, with_batch_norm, Remembers, Writes, large])
def test_modules_that_do_more_than_compute_are_left_out(make: Callable[[], nn.Module]) -> None:
    assert group_of(GroupExecutor(), backends(2, make, allow_batch_statistics=True)) is None


@pytest.mark.parametrize("make", [Mean, Counts, Branches])
def test_what_a_pass_would_compute_otherwise_is_found_by_comparing(make: Callable[[], nn.Module]) -> None:
    mine, theirs = backends(3, make), backends(3, make)
    executor, alone = (GroupExecutor(clock=lambda: 0.0) for _ in range(2))
    group_of(alone, theirs)
    group_of(executor, mine)
    for number in range(6):
        xs = [torch.randn(2 + number % 2, WIDTH) for _ in mine]
        batches = [[[work_of(one, x, None, 1)] for one, x in zip(side, xs, strict=True)] for side in (mine, theirs)]
        groups = [executor.groups.group_of(one, training=False, mode=0) for one in mine]
        if groups[0] is not None and groups.count(groups[0]) == 3:
            outcomes, was_pass = in_one_pass(executor, groups[0], batches[0])
            assert not was_pass
        else:
            outcomes = one_by_one(executor, batches[0])
        expected = one_by_one(alone, batches[1])
        for (own,), (other,) in zip(*batches, strict=True):
            same(outcomes[own], expected[other])
    assert groups[0] is None or groups.count(groups[0]) < 3


class NormalizedMean(Mean):
    """The same of rows that are normalized before."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(nn.functional.layer_norm(x, (WIDTH,)))


@pytest.mark.parametrize("makes_gradients", [True, False])
@pytest.mark.parametrize("make", [Mean, NormalizedMean])
def test_equal_rows_do_not_hide_that_rows_influence_one_another(
    make: Callable[[], nn.Module], makes_gradients: bool
) -> None:
    """As when one token is sent to several experts: its row is the mean of all rows."""
    executor, experts, x = GroupExecutor(clock=lambda: 0.0), backends(3, make), torch.randn(1, WIDTH)
    group_of(executor, experts)
    for _ in range(4):
        groups = [executor.groups.group_of(one, training=False, mode=makes_gradients) for one in experts]
        if groups[0] is not None and groups.count(groups[0]) == 3:
            works = [work_of(one, x, torch.randn(1, WIDTH) if makes_gradients else None, 0) for one in experts]
            for work in works:
                work.call_id = None
            _, was_pass = in_one_pass(executor, groups[0], [[work] for work in works])
            assert not was_pass
    assert groups[0] is None or groups.count(groups[0]) < 3


def test_random_modules_share_a_pass_only_where_they_draw_nothing() -> None:
    executor, experts = GroupExecutor(), backends(2, FeedForward)
    assert group_of(executor, experts) is not None
    for one in experts:
        one.forward([torch.zeros(1, WIDTH)], training=True, seed=1)
    assert executor.groups.group_of(experts[0], training=True, mode=0) is None


def test_experts_that_differ_in_more_than_numbers_are_of_other_kinds() -> None:
    executor = GroupExecutor()
    for other in (
        backends(1, lambda: FeedForward(shift=0.25)),
        backends(1, Fragile),
        backends(1, FeedForward, clip_gradient_norm=1.0),
    ):
        assert group_of(executor, [*backends(1, FeedForward), *other]) is None
    frozen = backends(2, FeedForward)
    next(frozen[0].module.parameters()).requires_grad_(False)
    assert group_of(executor, frozen) is None


def test_objects_that_modules_hold_are_shared_and_not_copied() -> None:
    class Settings:
        def __deepcopy__(self, memo: object) -> object:
            raise AssertionError("it was copied")

    def holding(settings: object) -> Callable[[], nn.Module]:
        def make() -> nn.Module:
            module = FeedForward()
            module.settings = settings  # type: ignore[assignment]
            return module

        return make

    executor, settings = GroupExecutor(), Settings()
    for same in (settings, [settings], {"all": (settings,)}):
        assert group_of(executor, backends(2, holding(same))) is not None
    others = [*backends(1, holding(settings)), *backends(1, holding(Settings()))]
    assert group_of(executor, others) is None


def test_a_hook_or_another_attribute_takes_an_expert_out_of_its_kind_at_once() -> None:
    for change in (
        lambda module: module.up.register_forward_hook(lambda part, args, y: y * 2),
        lambda module: setattr(module, "shift", 2.0),
        lambda module: module.scale.register_hook(lambda gradient: gradient * 2),
    ):
        executor, experts = GroupExecutor(), backends(2, FeedForward)
        group = checked_group(executor, experts, 0, False)
        change(experts[1].module)
        x = torch.randn(2, WIDTH)
        works = [work_of(one, x, None, 1) for one in experts]
        outcomes, was_pass = in_one_pass(executor, group, [[work] for work in works])
        assert not was_pass
        same(outcomes[works[1]], WorkResult(experts[1].forward([x]), 0))


def test_an_optimizer_that_raises_in_the_common_step_costs_no_other_expert_anything(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mine, theirs = (backends(3, optimizer=OPTIMIZERS[2]) for _ in range(2))
    executor, alone = (GroupExecutor(clock=lambda: 0.0) for _ in range(2))
    group = checked_group(executor, mine, 0, True)
    group_of(alone, theirs)
    step = torch.optim.Adam.step

    def fails(self: torch.optim.Adam) -> object:
        if sum(len(one["params"]) for one in self.param_groups) > 4:
            raise RuntimeError("no memory for so many")
        return step(self)

    monkeypatch.setattr(torch.optim.Adam, "step", fails)
    xs = [torch.randn(2, WIDTH) for _ in mine]
    batches = [[[work_of(one, x, x, 1)] for one, x in zip(side, xs, strict=True)] for side in (mine, theirs)]
    outcomes, was_pass = in_one_pass(executor, group, batches[0])
    expected = one_by_one(alone, batches[1])
    assert was_pass
    for (own,), (other,) in zip(*batches, strict=True):
        same(outcomes[own], expected[other])
    assert [one.version for one in mine] == [1, 1, 1]


def test_each_keeps_its_own_rate_schedule_and_number_of_steps() -> None:
    sides: list[list[ExpertBackend]] = []
    for _ in range(2):
        experts = backends(4, optimizer=OPTIMIZERS[2])
        for one in experts:
            assert one.optimizer is not None
            one.scheduler = torch.optim.lr_scheduler.StepLR(one.optimizer, step_size=2, gamma=0.1)
        sides.append(experts)
    executor, alone = (GroupExecutor(clock=lambda: 0.0) for _ in range(2))
    group = checked_group(executor, sides[0], 0, True)
    group_of(alone, sides[1])
    for number in range(1, 8):
        due = [index for index in range(4) if (number + index) % (index + 1) == 0 or index == 0]
        xs = [torch.randn(2, WIDTH) for _ in due]
        batches = [[[work_of(side[index], x, x, number)] for index, x in zip(due, xs, strict=True)] for side in sides]
        in_one_pass(executor, group, batches[0])
        one_by_one(alone, batches[1])
    for one, other in zip(*sides, strict=True):
        assert one.version == other.version
        torch.testing.assert_close(one.state()["optimizer"], other.state()["optimizer"], atol=1.5e-6, rtol=1e-5)
        assert one.state()["scheduler"] == other.state()["scheduler"]


def test_an_expert_joins_its_kind_again_after_its_state_was_loaded() -> None:
    executor, experts = GroupExecutor(), backends(2)
    group = checked_group(executor, experts, 0, False)
    state = copy.deepcopy(experts[1].state())
    experts[0].load_state(state)
    x = torch.randn(3, WIDTH)
    works = [work_of(one, x, None, 1) for one in experts]
    outcomes, was_pass = in_one_pass(executor, group, [[work] for work in works])
    assert was_pass
    same(outcomes[works[0]], outcomes[works[1]])


def test_the_faster_way_is_taken_and_the_other_looked_at_for_a_small_share_of_the_time() -> None:
    for seconds, faster in (((1.0, 0.5), True), ((1.0, 1.2), False), ((1.0, 0.99), False)):
        choice = GroupChoice()
        assert choice.gathers()
        for _ in range(100):  # in turns, until one is chosen
            way = choice.is_together(8, 32)
            choice.add(8, 32, way, seconds[way])
        total = wasted = 0.0
        for _ in range(1000):
            if choice.gathers():
                way = choice.is_together(8, 32)
                choice.add(8, 32, way, seconds[way])
                total += seconds[way]
                wasted += seconds[way] - min(seconds) if way is not faster else 0.0
            else:
                assert not faster
                choice.spent += 1.0
                total += 1.0
        assert wasted < 0.02 * total
        # what pays may change
        for _ in range(2000):
            if choice.gathers():
                way = choice.is_together(8, 32)
                choice.add(8, 32, way, 1.0 if way is faster else 0.2)
            else:
                choice.spent += 1.0
        ways = []
        for _ in range(50):
            way = choice.gathers() and choice.is_together(8, 32)
            choice.add(8, 32, way, 1.0 if way is faster else 0.2)
            ways.append(way)
        assert ways.count(not faster) > 40


async def test_a_runtime_with_groups_answers_as_one_without() -> None:
    answers: list[list[WorkResult]] = []
    grouped = []
    for groups in (True, False):
        runtime = TesseractRuntime(settings=RuntimeSettings(groups_experts=groups))
        await runtime.start()
        try:
            experts, found = backends(6, optimizer=OPTIMIZERS[2]), []
            torch.manual_seed(1)
            for number in range(20):
                block = torch.randn(8, WIDTH)
                with runtime.gathering():
                    works = []
                    for index, one in enumerate(experts):
                        rows = torch.randperm(8)[: 1 + (index + number) % 4]
                        call_id = bytes([number, index]) * 8
                        works.append(runtime.submit(one, [block], [block], rows=rows, call_id=call_id))
                found += [await work.answer for work in works]
        finally:
            await runtime.aclose()
        answers.append(found)
        grouped.append(runtime.metrics.total("runtime_grouped_batches"))
    for left, right in zip(*answers, strict=True):
        same(left, right)
    assert grouped[0] > 0 == grouped[1]


@pytest.mark.parametrize("faster", [True, False])
async def test_the_way_is_chosen_by_the_processors_time(monkeypatch: pytest.MonkeyPatch, faster: bool) -> None:
    """Other processes keep the thread waiting now and then, which says nothing about either way."""
    spent, clock = {True: 0.002 if faster else 0.02, False: 0.001}, [0.0]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(time, "thread_time", lambda: clock[0])
    finish = DevicePass.spent

    def spends(one: DevicePass, executor: GroupExecutor) -> float | None:
        clock[0] += spent[one.together is not None]
        return finish(one, executor)

    monkeypatch.setattr(DevicePass, "spent", spends)
    runtime = TesseractRuntime()
    await runtime.start()
    try:
        experts, x = backends(4), torch.randn(4, WIDTH)
        for number in range(60):
            before = runtime.metrics.total("runtime_grouped_batches")
            with runtime.gathering():
                works = [runtime.submit(one, [x], [x], call_id=bytes([number, 1]) * 8) for one in experts]
            for work in works:
                await work.answer
        assert runtime.metrics.total("runtime_grouped_batches") - before == (4 if faster else 0)
    finally:
        await runtime.aclose()


async def test_experts_alike_share_passes_before_each_was_asked_alone() -> None:
    """What one was found to be holds for those that differ in numbers only, until a pass finds that it does not."""

    def module() -> nn.Module:
        return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())

    runtime = TesseractRuntime()
    await runtime.start()
    first = ExpertBackend(module(), args_schema=(TensorSpec((WIDTH,)),))
    deadline, x = asyncio.get_running_loop().time() + 60, torch.randn(4, WIDTH)

    async def ask(experts: Sequence[ExpertBackend]) -> None:
        with runtime.gathering():
            works = [runtime.submit(one, [x]) for one in experts]
        for work, one in zip(works, experts, strict=True):
            torch.testing.assert_close((await work.answer).tensors[0], one.module(x).detach())

    def joint(*experts: ExpertBackend) -> Work | None:
        size = len(experts)
        shape: dict[str, Any] = {"rows": torch.arange(size), "counts": [1] * size, "weights": torch.ones(size)}
        return runtime.submit_joint(experts, [x[:size]], **shape, deadline=deadline, priority=0, peer=None, num_bytes=1)

    try:
        known = [first, *(first.another(module()) for _ in range(3))]
        for _ in range(100):  # until a pass of this kind was compared with each alone
            await ask(known)
            if joint(*known) is not None:
                break
        *others, hooked = (first.another(module()) for _ in range(4))
        marked = [first.another(module()) for _ in range(2)]
        assert (work := joint(*others)) is not None, "nobody has asked for them yet"
        answers = (await work.answer).tensors[0]
        for number, one in enumerate(others):
            torch.testing.assert_close(answers[number], one.module(x[number]).detach())
        before = runtime.metrics.total("runtime_grouped_batches")
        for _ in range(4):
            await ask([first.another(module()) for _ in range(4)])
        assert runtime.metrics.total("runtime_grouped_batches") > before

        trained = first.another(module(), optimizer=lambda: torch.optim.SGD(trained.module.parameters(), lr=0.1))
        stranger = ExpertBackend(module(), args_schema=(TensorSpec((WIDTH,)),))
        assert joint(others[0], trained) is None and joint(others[0], stranger) is None

        hooked.module.register_forward_hook(lambda _module, _args, y: y + 1)
        for one in marked:  # of one kind, which was compared with nothing
            one.module.mark = 1.0
        for experts in ([others[0], hooked], marked):
            assert (work := joint(*experts)) is not None
            await asyncio.wait([work.answer])
            assert work.answer.exception() is not None, "its caller asks each"
            await ask(experts)
        assert joint(others[0], hooked) is None
    finally:
        await runtime.aclose()
