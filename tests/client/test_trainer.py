import asyncio
import contextlib
import copy
import gc
import random
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import nn

from tesseract_async.client.remote_expert import RemoteExpert
from tesseract_async.client.tensorboard import TensorBoard
from tesseract_async.client.trainer import AsyncTrainer, StepReport
from tesseract_async.errors import NotEnoughExperts, SchemaMismatch
from tests.client.fake_node import FakeNode


class Model(nn.Module):
    def __init__(self, expert: RemoteExpert) -> None:
        super().__init__()
        self.before, self.expert, self.after = nn.Linear(8, 8), expert, nn.Linear(8, 1)

    async def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.after(await self.expert(self.before(x)))
        return y


async def loss_of(model: Model, batch: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = (await model(batch) - batch.sum(1, keepdim=True)).square().mean()
    return loss


@pytest.fixture
def model(node: FakeNode) -> Model:
    torch.manual_seed(0)
    node.host("ffn.0.0", nn.Linear(8, 8))
    return Model(RemoteExpert(node, "ffn.0.0"))


async def test_several_may_pause_a_trainer_at_a_time_and_wait_for_no_more_than_a_step() -> None:
    module = nn.Linear(2, 1)
    trainer = AsyncTrainer(module, torch.optim.SGD(module.parameters(), 0.1), in_flight=8, max_staleness=3)
    open_, begun = asyncio.Event(), 0

    async def loss_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        nonlocal begun
        begun += 1
        await open_.wait()
        loss: torch.Tensor = model(x).sum()
        return loss

    async def pause() -> int:
        async with trainer.paused():
            before = trainer.version
            await asyncio.sleep(0)
            assert trainer.version == before
            return before

    steps = [asyncio.create_task(trainer.step(loss_of, torch.ones(1, 2))) for _ in range(20)]
    await asyncio.sleep(0)
    pauses = [asyncio.create_task(pause()) for _ in range(2)]
    await asyncio.sleep(0)
    assert begun == 4 and not any(one.done() for one in pauses)
    open_.set()
    assert await asyncio.gather(*pauses) == [4, 4]
    await asyncio.gather(*steps)
    assert trainer.version == 20


async def test_one_in_flight_equals_a_plain_loop(node: FakeNode, model: Model) -> None:
    local = nn.Sequential(copy.deepcopy(model.before), node.hosted["ffn.0.0"].module, copy.deepcopy(model.after))
    own = [*local[0].parameters(), *local[2].parameters()]
    optimizer = torch.optim.Adam(own, 1e-2)
    trainer = AsyncTrainer(model, torch.optim.Adam(model.parameters(), 1e-2))
    for seed in range(5):
        batch = torch.randn(4, 8, generator=torch.Generator().manual_seed(seed))
        report = await trainer.step(loss_of, batch)
        assert report.staleness == 0 and report.version == seed + 1
        loss = (local(batch) - batch.sum(1, keepdim=True)).square().mean()
        torch.testing.assert_close(report.loss, loss.detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    mine = [*model.before.parameters(), *model.after.parameters()]
    for a, b in zip(mine, own, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.both_loops
async def test_64_in_flight_lose_no_gradient(node: FakeNode, model: Model) -> None:
    node.delay = lambda uid: float(torch.rand(())) * 0.02
    trainer = AsyncTrainer(model, torch.optim.Adam(model.parameters(), 1e-3, betas=(0.0, 0.999)), in_flight=64)
    before = torch.get_num_threads()
    losses, staleness = [], []
    async for report in trainer.run(loss_of, (torch.ones(4, 8) for _ in range(256))):
        losses.append(report.loss.item())
        staleness.append(report.staleness)
    assert len(losses) == trainer.version == node.count("expert.backward") == 256
    assert trainer.optimizer.state[model.before.weight]["step"] == 256
    assert max(staleness) >= 30 and sum(losses[-32:]) < sum(losses[:32])
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.get_num_threads() == before


async def test_staleness_is_bounded(node: FakeNode, model: Model) -> None:
    node.delay = lambda uid: float(torch.rand(())) * 0.02
    trainer = AsyncTrainer(model, torch.optim.SGD(model.parameters(), 1e-3), in_flight=16, max_staleness=5)
    reports = [report async for report in trainer.run(loss_of, (torch.randn(4, 8) for _ in range(64)))]
    assert len(reports) == 64
    assert max(report.staleness for report in reports) <= 5


async def test_the_gradients_of_a_step_are_those_of_its_parameters(node: FakeNode, model: Model) -> None:
    """Two steps at once from the same parameters: SGD ends where the sum of both gradients leads."""
    batches = [torch.randn(4, 8), torch.randn(4, 8)]
    twin = copy.deepcopy(model)
    module = node.hosted["ffn.0.0"].module
    for batch in batches:
        y = twin.after(module(twin.before(batch)))
        (y - batch.sum(1, keepdim=True)).square().mean().backward()
    node.delay = 0.02
    trainer = AsyncTrainer(model, torch.optim.SGD(model.parameters(), 0.1), in_flight=2)
    await asyncio.gather(*(trainer.step(loss_of, batch) for batch in batches))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter -= 0.1 * parameter.grad  # type: ignore[operator]
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


async def test_an_error_ends_the_run_and_leaves_the_trainer_usable(node: FakeNode, model: Model) -> None:
    trainer = AsyncTrainer(model, torch.optim.SGD(model.parameters(), 0.1), in_flight=4)

    async def failing(replica: Model, batch: torch.Tensor) -> torch.Tensor:
        if batch[0, 0] == 7:
            raise ZeroDivisionError
        await asyncio.Event().wait()
        raise AssertionError

    batches = [torch.full((1, 8), float(i)) for i in (1, 2, 3, 7)]
    with pytest.raises(ZeroDivisionError):
        async with contextlib.aclosing(trainer.run(failing, batches)) as reports:
            async for _ in reports:
                pass
    assert trainer.version == 0
    assert (await trainer.step(loss_of, torch.randn(2, 8))).staleness == 0


@pytest.mark.parametrize("max_failures", [0, 1, 2])
async def test_failed_steps_are_reported_up_to_so_many_on_end(node: FakeNode, model: Model, max_failures: int) -> None:
    """Two failures on end, one success, one failure."""
    trainer = AsyncTrainer(model, torch.optim.SGD(model.parameters(), 0.1))
    await trainer.step(loss_of, torch.randn(2, 8))
    fates = iter([True, False, False, True, False])

    async def unlucky(replica: Model, batch: torch.Tensor) -> torch.Tensor:
        if not next(fates):
            raise NotEnoughExperts(1, 2, {})
        return await loss_of(replica, batch)

    before = model.before.weight.detach().clone()
    reports = []
    steps = trainer.run(unlucky, (torch.randn(2, 8) for _ in range(5)), max_failures=max_failures)
    if max_failures == 2:
        reports = [report async for report in steps]
        assert [report.error is None for report in reports] == [True, False, False, True, False]
        assert [bool(report.loss.isnan()) for report in reports] == [False, True, True, False, True]
    else:
        with pytest.raises(NotEnoughExperts):
            async for report in steps:
                reports.append(report)
        assert len(reports) == 1 + max_failures
    assert trainer.version == 1 + sum(report.error is None for report in reports)
    assert not torch.equal(model.before.weight, before)


async def test_a_mistake_ends_the_run_whatever_may_fail(model: Model) -> None:
    trainer = AsyncTrainer(model, torch.optim.SGD(model.parameters(), 0.1))

    async def mistaken(replica: Model, batch: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = await replica.expert(batch)
        return y.sum()

    with pytest.raises(SchemaMismatch):
        async for _ in trainer.run(mistaken, [torch.randn(2, 7)], max_failures=100):
            pass
    with pytest.raises(RuntimeError, match="shapes"):
        async for _ in trainer.run(loss_of, [torch.randn(2, 7)], max_failures=100):
            pass


async def test_buffers_follow(node: FakeNode) -> None:
    module = nn.BatchNorm1d(4)
    trainer = AsyncTrainer(module, torch.optim.SGD(module.parameters(), 0.1))

    async def loss_of(replica: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = replica(batch).square().sum()
        return loss

    await trainer.step(loss_of, torch.randn(8, 4))
    assert module.num_batches_tracked == 1


async def test_copies_follow_what_trains_and_what_is_frozen(model: Model) -> None:
    """A submodule in eval mode, and a parameter frozen or set free, also after the first copies were made."""
    seen: list[tuple[bool, bool, bool, bool]] = []

    async def looked_at(copied: Model, batch: torch.Tensor) -> torch.Tensor:
        parts = copied.before, copied.after
        seen.append((*(part.training for part in parts), *(part.weight.requires_grad for part in parts)))
        return await loss_of(copied, batch)

    trainer, batch = AsyncTrainer(model, torch.optim.SGD(model.parameters(), 1e-2)), torch.ones(4, 8)
    model.before.eval()
    model.after.weight.requires_grad_(False)
    frozen = model.after.weight.detach().clone()
    await trainer.step(looked_at, batch)
    torch.testing.assert_close(model.after.weight, frozen, rtol=0, atol=0)
    model.before.train()
    model.after.eval()
    model.before.weight.requires_grad_(False)
    model.after.weight.requires_grad_(True)
    await trainer.step(looked_at, batch)
    assert seen == [(False, True, True, False), (True, False, False, True)]
    assert not torch.equal(model.after.weight, frozen)


async def test_an_error_leaves_the_masters_gradients(model: Model) -> None:
    trainer = AsyncTrainer(model, torch.optim.SGD(model.parameters(), 1e-2))
    model.before.weight.grad = torch.ones_like(model.before.weight)

    async def fails(copied: Model, batch: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        await trainer.step(fails, torch.ones(4, 8))
    torch.testing.assert_close(model.before.weight.grad, torch.ones_like(model.before.weight))


async def test_a_module_may_exchange_its_buffers(node: FakeNode) -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 1)
            self.register_buffer("num_calls", torch.zeros(()))
            self.register_buffer("nothing", None)

    async def counted(copied: Counts, batch: torch.Tensor) -> torch.Tensor:
        copied.num_calls = copied.num_calls + 1  # a new tensor
        loss: torch.Tensor = copied.layer(batch).mean()
        return loss

    module = Counts()
    trainer = AsyncTrainer(module, torch.optim.SGD(module.parameters(), 1e-2))
    for _ in range(3):
        await trainer.step(counted, torch.ones(4, 8))
    assert module.num_calls.item() == 3


async def test_mistakes(model: Model) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ValueError):
        AsyncTrainer(model, optimizer, in_flight=0)
    with pytest.raises(ValueError):
        AsyncTrainer(model, optimizer, max_staleness=-1)
    with pytest.raises(ValueError, match="max_norm"):
        AsyncTrainer(model, optimizer, max_norm=0.0)
    other = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ValueError, match="another optimizer's"):
        AsyncTrainer(model, optimizer, scheduler=torch.optim.lr_scheduler.ExponentialLR(other, 0.9))
    with pytest.raises(ValueError, match="not the module's"):
        AsyncTrainer(model.before, optimizer)


async def test_a_bug_in_several_steps_is_raised_once_and_says_where(
    model: Model, caplog: pytest.LogCaptureFixture
) -> None:
    """Steps that fail in one turn of the loop: none is left for asyncio to complain of."""
    trainer = AsyncTrainer(model, torch.optim.SGD(model.parameters(), 0.1), in_flight=4)

    async def buggy(replica: Model, batch: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as told:
        async for _ in trainer.run(buggy, [torch.ones(1, 8)] * 9):
            pass
    (note,) = told.value.__notes__
    assert "batch 0 " in note and all(f"batch {i}: ZeroDivisionError" in note for i in (1, 2, 3))
    del told
    gc.collect()
    assert not caplog.records


async def test_reports_name_their_batch(node: FakeNode, model: Model) -> None:
    """They come as steps end; the first one is the last to."""
    trainer = AsyncTrainer(model, torch.optim.SGD(model.parameters(), 0.1), in_flight=3)
    others_ended = asyncio.Event()

    async def first_last(replica: Model, batch: torch.Tensor) -> torch.Tensor:
        if batch[0, 0] == 0:
            await others_ended.wait()
        elif batch[0, 0] == 1:
            raise NotEnoughExperts(1, 1, {})
        return await loss_of(replica, batch)

    batches = []
    async for report in trainer.run(first_last, [torch.full((1, 8), float(i)) for i in range(3)], max_failures=1):
        batches.append((report.batch, report.error is None))
        if len(batches) == 2:
            others_ended.set()
    assert sorted(batches[:2]) == [(1, False), (2, True)] and batches[2] == (0, True)
    assert (await trainer.step(loss_of, torch.ones(1, 8))).batch is None


@pytest.mark.parametrize(
    ("name", "value"),
    [("entropy", random.SystemRandom()), ("graph", torch.ones(1, requires_grad=True) * 2), ("stream", open)],
    ids=["entropy", "graph", "copiable"],
)
async def test_what_cannot_be_copied_is_named(model: Model, name: str, value: Any) -> None:
    setattr(model.before, name, value)
    trainer = AsyncTrainer(model, torch.optim.SGD(model.parameters(), 0.1))
    if name == "stream":
        await trainer.step(loss_of, torch.ones(1, 8))
    else:
        with pytest.raises(TypeError, match=rf"before\.{name} .*{type(value).__name__}.*__deepcopy__"):
            await trainer.step(loss_of, torch.ones(1, 8))


async def test_a_saved_and_loaded_trainer_goes_on_as_if_it_had_never_stopped(node: FakeNode, model: Model) -> None:
    """Optimizer, schedule, clipping and the sampler's position; the model's own state is saved next to it."""

    class Numbers:
        def __init__(self) -> None:
            self.at = 0

        def __iter__(self) -> Iterator[torch.Tensor]:
            while self.at < 12:
                self.at += 1
                yield torch.randn(4, 8, generator=torch.Generator().manual_seed(self.at))

        def state_dict(self) -> dict[str, int]:
            return {"at": self.at}

        def load_state_dict(self, state: Mapping[str, int]) -> None:
            self.at = state["at"]

    def made(module: Model) -> tuple[AsyncTrainer[Model], Numbers]:
        optimizer = torch.optim.Adam(module.parameters(), 1e-2)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        numbers = Numbers()
        return AsyncTrainer(module, optimizer, scheduler=schedule, max_norm=0.1, sampler=numbers), numbers

    node.hosted["ffn.0.0"].module.requires_grad_(False)
    twin = copy.deepcopy(model)
    whole, numbers = made(model)
    reports = [report async for report in whole.run(loss_of, numbers)]
    first, numbers = made(twin)
    async with contextlib.aclosing(first.run(loss_of, numbers)) as steps:
        async for report in steps:
            if report.version == 5:
                break
    state, weights = copy.deepcopy(first.state_dict()), copy.deepcopy(twin.state_dict())
    assert state["version"] == 5 and state["sampler"] == {"at": 5} and state["seen"] == {"samples": 20, "tokens": 0}
    later = Model(model.expert)
    second, numbers = made(later)
    later.load_state_dict(weights)
    second.load_state_dict(state)
    rest = [report async for report in second.run(loss_of, numbers)]
    assert [report.version for report in rest] == list(range(6, 13)) and second.seen["samples"] == 48
    torch.testing.assert_close([one.loss for one in rest], [one.loss for one in reports[5:]], rtol=0, atol=0)
    with pytest.raises(ValueError, match="the state has a scheduler, but this trainer has none"):
        AsyncTrainer(later, torch.optim.Adam(later.parameters())).load_state_dict(state)


async def test_gradients_are_clipped_to_the_norm_over_all_parameters(node: FakeNode, model: Model) -> None:
    trainer = AsyncTrainer(model, torch.optim.SGD(model.parameters(), 1.0), max_norm=0.5)
    before = copy.deepcopy(model)
    await trainer.step(loss_of, 100 * torch.ones(4, 8))
    change = [a - b for a, b in zip(model.parameters(), before.parameters(), strict=True)]
    assert float(torch.stack([x.detach().norm() for x in change]).norm()) == pytest.approx(0.5, rel=1e-3)


async def test_figures_and_callbacks_come_with_each_step_failed_ones_included(node: FakeNode, model: Model) -> None:
    written: list[tuple[str, float, int]] = []

    class Writer:
        def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
            written.append((tag, scalar_value, global_step))

    async def with_figures(copied: Model, batch: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        if batch[0, 0] == 1:
            raise NotEnoughExperts(1, 1, {})
        return await loss_of(copied, batch), {"mean": batch.mean(), "tokens": batch.numel()}

    seen: list[StepReport] = []
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=1e9)
    callbacks = [seen.append, TensorBoard(Writer())]
    trainer = AsyncTrainer(model, optimizer, scheduler=plateau, callbacks=callbacks)
    batches = [torch.full((2, 8), float(i)) for i in range(3)]
    reports = [report async for report in trainer.run(with_figures, batches, max_failures=1)]
    assert seen == reports and [dict(one.metrics) for one in reports] == [
        {"mean": 0.0, "tokens": 16},
        {},
        {"mean": 2.0, "tokens": 16},
    ]
    assert trainer.seen == {"samples": 4, "tokens": 32}, "a batch that was given up counts nothing"
    assert ("mean", 2.0, 2) in written and ("failures", 1, 1) in written
    assert [step for tag, _, step in written if tag == "loss"] == [1, 2]
    assert plateau.last_epoch == 2

    def breaks(report: StepReport) -> None:
        raise ZeroDivisionError

    trainer = AsyncTrainer(model, optimizer, callbacks=[breaks])
    with pytest.raises(ZeroDivisionError):
        await trainer.step(loss_of, batches[0])
    assert trainer.version == 1


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda loss: (loss, {"words": "many"}), "could not convert string to float"),
        (lambda loss: (loss, {"words": torch.ones(3)}), "only one element"),
        (lambda loss: (loss, {"tokens": torch.nan}), "cannot convert float NaN"),
        (lambda loss: (loss,), r"a loss and a dict of figures, not \(Tensor\)"),
        (lambda loss: (loss, None), r"not \(Tensor, NoneType\)"),
        (lambda loss: None, "not NoneType"),
    ],
)
async def test_what_is_no_figure_is_an_error_before_the_step(
    node: FakeNode, model: Model, returned: Any, message: str
) -> None:
    trainer = AsyncTrainer(model, torch.optim.SGD(model.parameters(), 0.1))
    before = [one.clone() for one in model.parameters()]

    async def of(copied: Model, batch: torch.Tensor) -> Any:
        return returned(await loss_of(copied, batch))

    with pytest.raises((TypeError, ValueError, RuntimeError), match=message):
        await trainer.step(of, torch.ones(4, 8))
    assert trainer.version == 0 and all(map(torch.equal, model.parameters(), before))


async def test_a_state_is_not_loaded_under_steps(node: FakeNode, model: Model) -> None:
    trainer = AsyncTrainer(model, torch.optim.SGD(model.parameters(), 0.1))
    state = trainer.state_dict()

    async def loads(copied: Model, batch: torch.Tensor) -> torch.Tensor:
        trainer.load_state_dict(state)
        raise AssertionError

    with pytest.raises(RuntimeError, match="under way"):
        await trainer.step(loads, torch.ones(1, 8))
