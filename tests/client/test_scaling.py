import asyncio
import copy
import warnings
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import torch
from torch import nn

import tesseract_async as ta
from tesseract_async.client import scaling
from tesseract_async.client.autograd import backward
from tesseract_async.client.gating_function import GatingFunction
from tesseract_async.client.remote_expert import RemoteExpert
from tesseract_async.client.trainer import AsyncTrainer
from tesseract_async.errors import ExpertFailed
from tesseract_async.wire.messages import BACKWARD
from tesseract_async.wire.tensors import TensorSpec
from tests.client.fake_node import FakeNode, seeded


def scaler_of(scale: float = 65536.0, **options: Any) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=scale, **options)


class OwnScaler(torch.amp.GradScaler):
    """One that multiplies in its own way, as that of FSDP does."""

    def scale(self, outputs: Any) -> Any:
        super().scale(torch.ones(()))
        return outputs * self.get_scale()


class Model(nn.Module):
    """A local layer below an expert and a gate, and one above."""

    def __init__(self, node: FakeNode) -> None:
        super().__init__()
        with seeded(0):
            self.before, self.after = nn.Linear(8, 8), nn.Linear(8, 1)
            self.gate = GatingFunction(node, uid_prefix="ffn", grid_size=(2,), in_features=8, k_best=2, k_min=2)
        self.expert = RemoteExpert(node, "ffn.0")

    async def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = await self.expert(torch.tanh(self.before(x)))
        y: torch.Tensor = self.after(await self.gate(h))
        return y.square().mean()


def swarm() -> FakeNode:
    node = FakeNode()
    with seeded(1):
        for i in range(2):
            node.host(f"ffn.{i}", nn.Linear(8, 8), lr=0.1)
    return node


def state(node: FakeNode, model: nn.Module) -> list[torch.Tensor]:
    experts = [p for i in range(2) for p in node.hosted[f"ffn.{i}"].module.parameters()]
    return [p.detach().clone() for p in (*experts, *model.parameters())]


async def trained(step: Callable[[Model, torch.optim.Optimizer, torch.Tensor], Awaitable[None]]) -> list[torch.Tensor]:
    node = swarm()
    model = Model(node)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for seed in range(3):
        optimizer.zero_grad()
        await step(model, optimizer, torch.randn(4, 8, generator=torch.Generator().manual_seed(seed)))
    assert node.count(BACKWARD) == 9
    return state(node, model)


async def unscaled(model: Model, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> None:
    await backward(await model(x))
    optimizer.step()


def scaled(
    scaler: torch.amp.GradScaler, go_back: Callable[[torch.Tensor], Awaitable[None]]
) -> Callable[[Model, torch.optim.Optimizer, torch.Tensor], Awaitable[None]]:
    async def step(model: Model, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> None:
        await go_back(await model(x))
        scaler.step(optimizer)
        scaler.update()

    return step


@pytest.mark.parametrize("scale", [65536.0, 1000.0, 1.0])
@pytest.mark.parametrize(
    "way",
    ["told", "plain", "divided", "sum", "list", "gradient", "disabled", "growing", "own", "checked"],
)
async def test_a_scaled_run_equals_the_unscaled_one(way: str, scale: float) -> None:
    """Several steps of the trainer's layers and the experts', however the loss gets scaled."""
    scaler = scaler_of(scale, enabled=way != "disabled", growth_interval=1 if way == "growing" else 2000)
    if way == "own":
        scaler = OwnScaler("cpu", init_scale=scale)

    async def go_back(loss: torch.Tensor) -> None:
        half = loss / 2
        if way == "plain":
            await asyncio.to_thread(scaler.scale(loss).backward)
        elif way == "divided":
            await backward(scaler.scale(loss * 4) / 4, scaler=scaler)
        elif way == "sum":
            await backward(scaler.scale(half) + scaler.scale(half), scaler=scaler)
        elif way == "list":
            await backward(sum(scaler.scale([half, half])), scaler=scaler)  # type: ignore[arg-type]
        elif way == "gradient":
            await backward(loss, scaler.scale(torch.ones(())), scaler=scaler)
        elif way == "checked":
            with torch.autograd.set_detect_anomaly(True):
                await backward(scaler.scale(loss), scaler=scaler)
        else:
            await backward(scaler.scale(loss), scaler=scaler)

    torch.testing.assert_close(await trained(scaled(scaler, go_back)), await trained(unscaled), rtol=1e-5, atol=1e-6)


async def test_several_losses_one_after_the_other() -> None:
    async def both(model: Model, x: torch.Tensor, go_back: Callable[..., Awaitable[None]]) -> None:
        loss = await model(x)
        await go_back(loss, retain_graph=True)
        await go_back(loss * 2)

    results = []
    for scaler in (None, scaler_of()):
        node = swarm()
        model = Model(node)

        async def go_back(
            loss: torch.Tensor, retain_graph: bool = False, scaler: torch.amp.GradScaler | None = scaler
        ) -> None:
            loss = loss if scaler is None else scaler.scale(loss)
            await backward(loss, retain_graph=retain_graph, scaler=scaler)

        await both(model, torch.ones(2, 8), go_back)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        optimizer.step() if scaler is None else scaler.step(optimizer)
        results.append(state(node, model))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("way", ["told", "plain"])
async def test_where_scaled_gradients_overflow_nobody_steps(way: str) -> None:
    """The loss is fine; its scale is too much for what lies between it and the experts."""
    node = swarm()
    model = Model(node)
    scaler = scaler_of(2.0**120)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = state(node, model)

    async def step() -> None:
        optimizer.zero_grad()
        loss = scaler.scale(await model(torch.ones(2, 8)) * 1e6)
        await (backward(loss, scaler=scaler) if way == "told" else asyncio.to_thread(loss.backward))
        scaler.step(optimizer)
        scaler.update()

    await step()
    assert node.count(BACKWARD) == 0 and scaler.get_scale() == 2.0**119
    for parameter in (model.before.weight, model.gate.proj.weight):
        assert parameter.grad is not None and not parameter.grad.isfinite().all()
    torch.testing.assert_close(state(node, model), before, rtol=0, atol=0)
    while scaler.get_scale() > 2.0**60:  # backing off until it fits
        scaler.update(2.0**60)
    await step()
    assert node.count(BACKWARD) == 3


async def test_half_precision_is_unscaled_before_it_travels() -> None:
    node = FakeNode()
    half = TensorSpec((8,), torch.float16)
    node.host("ffn.0", nn.Identity(), half, outputs_schema=half)
    x = torch.ones(1, 8, dtype=torch.float16, requires_grad=True)
    y = await RemoteExpert(node, "ffn.0")(x)
    scaler = scaler_of(1024.0)
    await backward(scaler.scale(y.float().sum() * 1e-3), scaler=scaler)
    torch.testing.assert_close(x.grad, torch.full((1, 8), 1.024, dtype=torch.float16))


async def test_a_scaler_not_given_is_warned_of_and_heeded() -> None:
    scaler = scaler_of()

    async def untold(loss: torch.Tensor) -> None:
        with pytest.warns(RuntimeWarning, match="scaler=scaler"):
            await backward(scaler.scale(loss))

    torch.testing.assert_close(await trained(scaled(scaler, untold)), await trained(unscaled), rtol=1e-5, atol=1e-6)


class Nested(torch.autograd.Function):
    """Goes back through a graph of its own in the midst of another's, as reversible layers do."""

    @staticmethod
    def forward(ctx: Any, leaf: torch.Tensor, inner: list[torch.Tensor]) -> torch.Tensor:
        (ctx.y,) = inner  # hidden from this graph
        return ctx.y.detach().sum() + leaf

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        torch.autograd.backward(ctx.y, grads[0].expand_as(ctx.y))
        return grads[0], None


async def test_a_backward_in_the_midst_of_another_has_its_scale() -> None:
    node = FakeNode()
    expert = node.host("ffn.0", nn.Linear(8, 8), lr=0.1)
    before = expert.module.weight.detach().clone()  # type: ignore[union-attr, operator]
    y, scaler = await RemoteExpert(node, "ffn.0")(torch.ones(1, 8)), scaler_of()
    loss = Nested.apply(torch.zeros((), requires_grad=True), [y])  # type: ignore[no-untyped-call]
    await backward(scaler.scale(loss), scaler=scaler)
    torch.testing.assert_close(expert.module.weight, before - 0.1)


async def test_what_is_no_scaler_is_refused() -> None:
    loss = await Model(swarm())(torch.ones(2, 8))
    with pytest.raises(TypeError, match="GradScaler.*float"):
        await backward(loss, scaler=65536.0)  # type: ignore[arg-type]


async def test_a_scaler_given_for_a_loss_that_it_did_not_scale_is_warned_of() -> None:
    loss = await Model(swarm())(torch.ones(2, 8))
    with pytest.warns(RuntimeWarning, match=r"scaler\.scale\(loss\)"):
        await backward(loss, scaler=scaler_of())


async def test_a_warning_that_is_an_error_stops_before_anything_travels() -> None:
    node = swarm()
    model = Model(node)
    loss = scaler_of().scale(await model(torch.ones(2, 8)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeWarning):
            await backward(loss)
    assert node.count(BACKWARD) == 0 and model.before.weight.grad is None


@pytest.mark.parametrize("number", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("plain", [False, True])
async def test_an_infinite_loss_is_an_error_and_leaves_no_gradient(number: float, plain: bool) -> None:
    node = swarm()
    model = Model(node)
    for part in (model, model.gate, model.expert):
        loss = (await part(torch.ones(2, 8))).sum() * number
        with pytest.raises(ExpertFailed, match="not finite"):
            await (asyncio.to_thread(loss.backward) if plain else backward(loss))
        if not plain:
            assert all(parameter.grad is None for parameter in model.parameters())
    assert node.count(BACKWARD) == 0


async def test_a_trainer_with_a_scaler_equals_one_without() -> None:
    """Many steps in flight, while the scale grows at every step."""
    results = []
    for scaler in (None, scaler_of(1024.0, growth_interval=1), scaler_of(enabled=False)):
        node = swarm()
        model = Model(node)
        trainer = AsyncTrainer(model, torch.optim.SGD(model.parameters(), 0.01), in_flight=3, scaler=scaler)
        batches = [torch.randn(4, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(9)]

        async def loss_of(replica: Model, batch: torch.Tensor) -> torch.Tensor:
            loss: torch.Tensor = await replica(batch)
            return loss

        for i in range(0, 9, 3):
            # all three look at the parameters before any of them steps, and step in turn
            order = [trainer.step(loss_of, batch) for batch in batches[i : i + 3]]
            reports = await asyncio.gather(*order)
            assert all(report.loss < 100 for report in reports)
        results.append(state(node, model))
        if scaler is not None and scaler.is_enabled():
            assert scaler.get_scale() == 1024.0 * 2**9
    torch.testing.assert_close(results[0], results[1], rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(results[0], results[2], rtol=1e-2, atol=1e-3)


async def test_a_trainers_step_that_overflows_is_skipped() -> None:
    node = swarm()
    model = Model(node)
    scaler = scaler_of(2.0**120)
    trainer = AsyncTrainer(model, torch.optim.SGD(model.parameters(), 0.01), scaler=scaler)
    before = state(node, model)

    async def loss_of(replica: Model, batch: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = await replica(batch) * 1e6
        return loss

    report = await trainer.step(loss_of, torch.ones(2, 8))
    assert report.loss.isfinite() and scaler.get_scale() == 2.0**119
    torch.testing.assert_close(state(node, model), before, rtol=0, atol=0)


def test_plain_calls_are_unscaled_too() -> None:
    with seeded(0):
        module = nn.Linear(4, 4)
    twin = copy.deepcopy(module)
    backend = ta.ExpertBackend(
        module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1), args_schema=(ta.TensorSpec((4,)),)
    )
    scaler = scaler_of()
    with ta.BackgroundNode() as node, node.entered(ta.TesseractServer(node.node, {"f.0": backend})):
        x = torch.ones(1, 4, requires_grad=True)
        scaler.scale(node.get_expert("f.0")(x).sum()).backward()
    twin(torch.ones(1, 4)).sum().backward()
    assert twin.weight.grad is not None and x.grad is not None
    with torch.no_grad():
        torch.testing.assert_close(module.weight, twin.weight - 0.1 * twin.weight.grad)
        torch.testing.assert_close(x.grad, 65536 * twin.weight.sum(0, keepdim=True))


def test_scaling_itself_is_as_torch_does_it() -> None:
    """Its results, whatever it is given, and nothing noted that is not gone back through."""
    scaler, leaf = scaler_of(2.0), torch.ones(2, requires_grad=True)
    for given in ([leaf.sum()], (leaf.sum(), torch.ones(())), iter([leaf.sum()])):
        for one in scaler.scale(given):
            assert one in (2.0, 4.0)
    with pytest.raises(ValueError):
        scaler.scale(3)  # type: ignore[call-overload]
    (gradient,) = torch.autograd.grad(scaler.scale(leaf.square().sum()), leaf, create_graph=True)
    gradient.sum().backward()
    torch.testing.assert_close(leaf.grad, torch.full((2,), 4.0))
    torch.testing.assert_close(torch.func.grad(lambda x: scaler.scale(x.sum()))(torch.ones(2)), torch.full((2,), 2.0))


def test_scales_of_passes_that_are_long_over_are_not_kept() -> None:
    scaler, leaf, passes = scaler_of(2.0), torch.ones((), requires_grad=True), list[int]()
    leaf.register_hook(lambda _: passes.append(torch._C._current_graph_task_id()))
    for _ in range(5000):
        scaler.scale(leaf * 2.0).backward()
    assert scaling.noted_scale(passes[-1]) == 2.0 and scaling.noted_scale(passes[0]) is None


@pytest.mark.parametrize("kind", [list, tuple, iter])
def test_losses_that_are_scaled_together_are_noted_one_by_one(kind: Callable[..., Any]) -> None:
    leaf = torch.ones((), requires_grad=True)
    seen: list[float | None] = []
    losses = []
    for _ in range(2):
        loss = leaf * 2
        loss.register_hook(lambda _: seen.append(scaling.noted_scale(torch._C._current_graph_task_id())))
        losses.append(loss)
    together = scaler_of(4.0).scale(kind(losses))
    assert kind is iter or type(together) is kind
    for scaled in together:
        scaled.backward()
    assert seen == [4.0, 4.0]
