import asyncio
import copy
from typing import Any

import pytest
import torch
from torch import nn

from tesseract_async.client.autograd import backward
from tesseract_async.client.gating_function import GatingFunction, SwitchGatingFunction
from tesseract_async.client.remote_expert import RemoteExpert
from tesseract_async.client.settings import CallOptions
from tesseract_async.errors import ConnectionLost, ExpertFailed, NotEnoughExperts, SchemaMismatch
from tesseract_async.wire.messages import BACKWARD, FORWARD, INFO
from tests.client.fake_node import FakeNode, gate_with, until
from tests.client.virtual_time import in_made_up_time

GRID = (4, 4)


def make_grid(node: FakeNode, coords: list[tuple[int, int]] | None = None, lr: float | None = None) -> None:
    for i, j in coords or [(i, j) for i in range(4) for j in range(4)]:
        node.host(f"ffn.{i}.{j}", nn.Linear(8, 8), lr=lr)


def make_gate(node: FakeNode, **settings: object) -> GatingFunction:
    return gate_with(node, "ffn", grid_size=GRID, in_features=8, **{"k_best": 3, **settings})  # type: ignore[arg-type]


def reference(
    node: FakeNode, gate: GatingFunction, x: torch.Tensor, dead: tuple[str, ...] = (), k: int = 3
) -> torch.Tensor:
    """The mixture, computed row by row with the modules at hand."""
    scores = gate.proj(x)
    rows = []
    for r in range(len(x)):
        by_uid = {}
        for uid in node.hosted:
            _, i, j = uid.split(".")
            by_uid[uid] = scores[r, int(i)] + scores[r, GRID[0] + int(j)]
        best = sorted(by_uid, key=lambda uid: -by_uid[uid].item())[:k]
        best = [uid for uid in best if uid not in dead]
        weights = torch.softmax(torch.stack([by_uid[uid] for uid in best]), 0)
        rows.append(sum(w * node.hosted[uid].module(x[r]) for w, uid in zip(weights, best, strict=True)))
    return torch.stack(rows)  # type: ignore[arg-type]


async def kill(node: FakeNode, *uids: str, method: str = FORWARD) -> None:
    async def fault(called: str, uid: str, number: int) -> None:
        if uid in uids and called == method:
            raise ConnectionLost("peer", "killed")

    node.fault = fault


async def test_choose_gives_the_best_that_live(node: FakeNode) -> None:
    make_grid(node, [(0, 0), (1, 3), (2, 2), (3, 1)])
    gate = make_gate(node, k_best=2)
    x = torch.randn(6, 8)
    chosen = await gate.choose(x)
    scores = gate.proj(x)
    for r, experts in enumerate(chosen):
        by_uid = {f"ffn.{i}.{j}": scores[r, i] + scores[r, 4 + j] for i, j in [(0, 0), (1, 3), (2, 2), (3, 1)]}
        assert [expert.uid for expert in experts] == sorted(by_uid, key=lambda uid: -by_uid[uid].item())[:2]
    assert (await chosen[0][0](x)).shape == (6, 8)


async def test_it_equals_the_local_mixture(node: FakeNode) -> None:
    make_grid(node)
    gate = make_gate(node)
    x = torch.randn(7, 8, requires_grad=True)
    y = await gate(x)
    expected = reference(node, gate, x)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-6)
    params = [x, *gate.parameters()]
    grads = torch.autograd.grad(expected.square().sum(), params)
    await backward(y.square().sum())
    for parameter, grad in zip(params, grads, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=0, atol=1e-5)


async def test_one_call_per_chosen_expert(node: FakeNode) -> None:
    make_grid(node, [(0, 0), (1, 3)])
    await (y := make_gate(node)(torch.randn(64, 8)))
    del y
    assert node.count(FORWARD) == 2


async def test_a_dead_expert_is_left_out_and_weights_renormalize(node: FakeNode) -> None:
    make_grid(node)
    gate = make_gate(node)
    x = torch.randn(7, 8, requires_grad=True)
    dead = (await gate.choose(x))[0][0].uid
    await kill(node, dead)
    y = await gate(x)
    torch.testing.assert_close(y, reference(node, gate, x, (dead,)), rtol=0, atol=1e-6)
    await backward(y.sum())


async def test_rows_short_of_answers_are_refilled(node: FakeNode) -> None:
    make_grid(node)
    gate = make_gate(node, k_best=1)
    x = torch.randn(1, 8)
    best, second = [e.uid for e in (await make_gate_like(node, gate, 2).choose(x))[0]]
    await kill(node, best)
    torch.testing.assert_close(await gate(x), node.hosted[second].module(x), rtol=0, atol=1e-6)


def make_gate_like(node: FakeNode, gate: GatingFunction, k_best: int) -> GatingFunction:
    other = GatingFunction(node, uid_prefix="ffn", grid_size=GRID, in_features=8, k_best=k_best)
    other.load_state_dict(gate.state_dict())
    return other


@in_made_up_time
async def test_nobody_answers(node: FakeNode) -> None:
    make_grid(node, [(0, 0), (1, 1)])
    await kill(node, "ffn.0.0", "ffn.1.1")
    with pytest.raises(
        NotEnoughExperts, match=r"2 rows have fewer than k_min=1 answers: ffn\.0\.0, ffn\.1\.1: ConnectionLost"
    ):
        await make_gate(node, forward_timeout=0.05)(torch.randn(2, 8))
    node.directory.forgive()
    y = await make_gate(node, forward_timeout=0.05, on_missing="zero")(torch.randn(2, 8))
    assert not y.any()
    await backward(y.sum())


@pytest.mark.parametrize("search", ["exact", "beam"])
@in_made_up_time
async def test_nobody_lives(node: FakeNode, search: str) -> None:
    gate = make_gate(node, forward_timeout=3.0, search=search)
    for call in (gate, gate.choose):
        with pytest.raises(NotEnoughExperts, match="no expert is alive"):
            await call(torch.randn(2, 8))
    zeros = make_gate(node, forward_timeout=3.0, search=search, on_missing="zero")
    with pytest.raises(NotEnoughExperts):  # nobody ever said what the experts give
        await zeros(torch.randn(2, 8))
    make_grid(node)
    x = torch.randn(2, 8)
    assert (await zeros(x)).any() and (await gate(x)).any()
    for replicas in list(node.directory.replicas.values()):
        node.directory.report_failure(replicas[0])
    y = await zeros(x)
    assert y.shape == (2, 8) and not y.any()
    with pytest.raises(NotEnoughExperts, match="no expert is alive"):
        await gate(x)


@pytest.mark.parametrize("search", ["exact", "beam"])
@in_made_up_time
async def test_while_nobody_lives_somebody_is_waited_for(node: FakeNode, search: str) -> None:
    make_grid(node)
    gate, x = make_gate(node, search=search, k_min=3), torch.randn(2, 8)  # a busy machine leaves nobody out
    await gate(x)
    for replicas in list(node.directory.replicas.values()):
        node.directory.report_failure(replicas[0])
    task = asyncio.create_task(gate(x))
    for _ in range(50):  # the first search has ended by then, and found nobody: none sees half of them come back
        await asyncio.sleep(0)
    assert not task.done()
    node.directory.forgive()
    torch.testing.assert_close(await task, reference(node, gate, x), rtol=0, atol=1e-6)


@in_made_up_time
async def test_silence_ends_with_the_timeout(node: FakeNode) -> None:
    make_grid(node)
    gate = make_gate(node, forward_timeout=0.2)
    await gate(torch.randn(2, 8))
    node.delay = 60.0
    with pytest.raises(NotEnoughExperts, match="Timeout"):
        await gate(torch.randn(2, 8))
    assert node.num_open == 0


@in_made_up_time
async def test_a_slow_expert_is_not_waited_for(node: FakeNode) -> None:
    make_grid(node)
    gate = make_gate(node, timeout_after_k_min=0.05)
    x = torch.randn(3, 8)
    slow = (await gate.choose(x))[0][0].uid
    node.delay = lambda uid: 60.0 if uid == slow else 0.0
    async with asyncio.timeout(30):
        y = await gate(x)
    torch.testing.assert_close(y, reference(node, gate, x, (slow,)), rtol=0, atol=1e-6)


@in_made_up_time
async def test_backward_goes_on_without_those_that_died(node: FakeNode) -> None:
    make_grid(node)
    gate = make_gate(node, backward_timeout=0.2)
    x = torch.randn(7, 8, requires_grad=True)
    y = await gate(x)
    uids = sorted({asked.uid for asked in node.calls if asked.method == FORWARD})

    async def fault(method: str, uid: str, number: int) -> None:
        if method == BACKWARD and uid == uids[0]:
            raise ConnectionLost("peer", "killed")
        if method == BACKWARD and uid == uids[1]:
            await asyncio.Event().wait()

    node.fault = fault
    await backward(y.sum())
    assert x.grad is not None and gate.proj.weight.grad is not None
    assert node.num_open == 0


async def test_backward_k_min(node: FakeNode) -> None:
    make_grid(node)
    gate = make_gate(node, backward_k_min=1)
    x = torch.randn(2, 8, requires_grad=True)
    y = await gate(x)
    await kill(node, *node.hosted, method=BACKWARD)
    with pytest.raises(NotEnoughExperts, match="killed"):
        await backward(y.sum())
    assert x.grad is None and gate.proj.weight.grad is None


async def test_poison_is_dropped_like_a_failure(node: FakeNode) -> None:
    make_grid(node)
    gate = make_gate(node)
    x = torch.randn(3, 8)
    bad = (await gate.choose(x))[0][0].uid
    with torch.no_grad():
        node.hosted[bad].module.bias.fill_(torch.nan)  # type: ignore[union-attr, operator]
    assert torch.isfinite(await gate(x)).all()
    with pytest.raises(NotEnoughExperts) as caught:
        for hosted in node.hosted.values():
            with torch.no_grad():
                hosted.module.bias.fill_(torch.nan)  # type: ignore[union-attr, operator]
        await gate(x)
    assert isinstance(caught.value.errors[bad], ExpertFailed)


async def test_what_does_not_fit_is_refused(node: FakeNode) -> None:
    make_grid(node)
    gate = make_gate(node)
    with pytest.raises(SchemaMismatch, match=r"rows, 8.*got.*3, 7"):
        await gate(torch.zeros(3, 7))
    with pytest.raises(SchemaMismatch):
        await gate(torch.zeros(3, 8), torch.zeros(3, 8))
    with pytest.raises(TypeError):
        await gate("x")
    assert node.count(FORWARD) == 0


@pytest.mark.parametrize(
    "name",
    ["forward_timeout", "backward_timeout", "timeout_after_k_min", "patience", "latency_weight", "capacity_factor"],
)
@pytest.mark.parametrize("value", [float("nan"), -1.0])
def test_settings_that_are_no_amount_are_refused(node: FakeNode, name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        make_gate(node, **{name: value})


@pytest.mark.parametrize(
    "bad",
    [
        {"k_best": 0},
        {"k_best": 2.5},
        {"k_best": True},
        {"k_min": 9},
        {"spare": 1.5},
        {"spare": -1},
        {"on_missing": "?"},
        {"forward_timeout": 0.0},
        {"jitter": float("nan")},
        {"in_features": 0},
        {"in_features": -4},
        {"grid_size": ()},
        {"grid_size": (4, 0)},
        {"grid_size": (4.7, 4)},
        {"grid_size": "44"},
        {"uid_prefix": ""},
        {"uid_prefix": "ffn."},
        {"uid_prefix": "ffn.1"},
    ],
    ids=str,
)
def test_a_gate_that_makes_no_sense_is_refused(node: FakeNode, bad: dict[str, Any]) -> None:
    good = {"uid_prefix": "ffn", "grid_size": (4, 4), "in_features": 8}
    assert GatingFunction(node, **good).grid_size == (4, 4)  # type: ignore[arg-type]
    with pytest.raises((ValueError, TypeError)):
        GatingFunction(node, **good | bad)  # type: ignore[arg-type]


async def test_no_rows(node: FakeNode) -> None:
    make_grid(node)
    assert (await make_gate(node)(torch.zeros(0, 8))).shape == (0, 8)


@in_made_up_time
async def test_a_cold_directory_is_waited_for(node: FakeNode) -> None:
    make_grid(node)
    node.directory.cold = node.directory.mute = True
    with pytest.raises(NotEnoughExperts, match="could not be read"):
        await make_gate(node, forward_timeout=0.05)(torch.zeros(1, 8))
    task = asyncio.create_task(make_gate(node)(torch.zeros(1, 8)))
    await asyncio.sleep(0)
    node.directory.cold = node.directory.mute = False
    node.directory.warm.set()
    assert (await task).shape == (1, 8)


async def test_meanwhile_a_beam_search_finds_the_same_experts(node: FakeNode) -> None:
    make_grid(node, [(0, 0), (1, 3), (2, 2), (3, 1), (3, 3)])
    gate, x = make_gate(node), torch.randn(5, 8)
    warm = [[expert.uid for expert in row] for row in await gate.choose(x)]
    node.directory.cold = True
    assert [[expert.uid for expert in row] for row in await gate.choose(x)] == warm
    assert node.directory.num_finds > 0


async def test_training_moves_gate_and_experts(node: FakeNode) -> None:
    make_grid(node, lr=0.1)
    gate = make_gate(node)
    optimizer = torch.optim.SGD(gate.parameters(), 0.1)
    x = torch.randn(32, 8)
    losses = []
    for _ in range(20):
        loss = (await gate(x) - x).square().mean()
        optimizer.zero_grad()
        await backward(loss)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def move_experts(node: FakeNode) -> None:
    with torch.no_grad():
        for hosted in node.hosted.values():
            for parameter in hosted.module.parameters():
                parameter += torch.randn_like(parameter)


@in_made_up_time
async def test_experts_that_learned_meanwhile_do_not_look_better_than_all_others(node: FakeNode) -> None:
    """Scores would rise of all that are chosen, with each step of other trainers, until they are always the same."""
    make_grid(node)
    gate = make_gate(node)
    x, direction = torch.randn(32, 8), torch.randn(32, 8)
    y = await gate(x)
    move_experts(node)
    await backward((y * direction).sum())
    assert gate.proj.bias.grad is not None
    for part in gate.proj.bias.grad.split(GRID):
        assert part.abs().max() > 0.1 and part.sum().abs() < 1e-4
    found = gate.proj.weight.grad
    (asked,) = torch.autograd.grad((reference(node, gate, x) * direction).sum(), gate.proj.weight)
    torch.testing.assert_close(found, asked, msg="that of the experts as they are now")


@in_made_up_time
async def test_nor_does_a_switch_layers_one_expert(node: FakeNode) -> None:
    """Its probability's derivative is a softmax's, which sums up to zero, however far its expert has moved."""
    make_grid(node)
    gate = gate_with(node, "ffn", grid_size=GRID, in_features=8, kind=SwitchGatingFunction, jitter=0.0)
    x, direction = torch.randn(32, 8), torch.randn(32, 8)
    y = await gate(x)
    first, second = (part.softmax(1) for part in gate.proj(x).split(GRID, dim=1))
    probability = (first[:, :, None] * second[:, None, :]).flatten(1).amax(1)
    of_probability = (y.detach() / probability.detach()[:, None] * direction).sum(1)
    (asked,) = torch.autograd.grad((probability * of_probability).sum(), gate.proj.bias)
    move_experts(node)
    await backward((y * direction).sum())
    assert asked.abs().max() > 0.1
    torch.testing.assert_close(gate.proj.bias.grad, asked, msg="that of the probabilities, and of what was answered")


@in_made_up_time
async def test_no_grad_and_copies(node: FakeNode) -> None:
    make_grid(node)
    gate = make_gate(node)
    with torch.no_grad():
        assert not (await gate(torch.randn(2, 8))).requires_grad
    twin = copy.deepcopy(gate)
    x = torch.randn(2, 8)
    asked = node.count(INFO)
    torch.testing.assert_close(await twin(x), await gate(x))
    assert asked and node.count(INFO) == asked, "they share what was learned"
    assert set(gate.state_dict()) == {"proj.weight", "proj.bias"}


async def test_cancelled_it_leaves_no_call(node: FakeNode) -> None:
    make_grid(node)
    gate = make_gate(node)
    await gate(torch.randn(2, 8))
    node.delay = 60.0
    task = asyncio.create_task(gate(torch.randn(2, 8)))
    await until(lambda: node.num_open > 0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert node.num_open == 0


async def test_under_autocast_inputs_take_the_experts_dtype(node: FakeNode) -> None:
    make_grid(node)
    gate, before = make_gate(node), nn.Linear(8, 8)
    x = torch.randn(4, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = await gate(before(x))
    assert y.dtype == torch.float32
    await backward(y.sum())
    assert before.weight.grad is not None and gate.proj.weight.grad is not None


@pytest.mark.parametrize("kind", [GatingFunction, SwitchGatingFunction])
async def test_chosen_experts_are_in_the_gates_mode_and_have_its_options(node: FakeNode, kind: Any) -> None:
    torch.manual_seed(0)  # a Switch layer shakes its scores in training: two near ones could change places
    make_grid(node)
    gate = gate_with(
        node,
        "ffn",
        kind=kind,
        grid_size=GRID,
        in_features=8,
        forward_timeout=3.0,
        backward_timeout=4.0,
        codec={"outputs": "none"},
        priority=1,
        max_staleness=7,
    )
    model = nn.Sequential(nn.Linear(8, 8), gate)
    x = torch.randn(2, 8)
    wanted = CallOptions(codec={"outputs": "none"}, priority=1, max_staleness=7)
    [before] = {expert for row in await gate.choose(x[:1]) for expert in row[:1]}
    assert before.training and before.options == wanted
    assert (before.timeout, before.backward_timeout) == (3.0, 4.0)
    model.eval()
    for row in await gate.choose(x):
        assert all(not expert.training and expert.options == wanted for expert in row)
    [[chosen, *_]] = await gate.choose(x[:1])
    assert before.training and chosen.uid == before.uid, "those chosen before stay as they were"
    await chosen(x)
    assert node.calls[-1].body.training is False and node.calls[-1].priority == 1
    assert (await gate.choose(x[:1]))[0][0] is chosen, "in one mode, a uid is one object"
    assert not chosen.with_options(timeout=1.0).training
    chosen.train()
    assert not (await gate.choose(x[:1]))[0][0].training, "whatever was done to those chosen before"
    model.train()
    assert (await gate.choose(x[:1]))[0][0] is before
    gate.eval(max_staleness=0)
    [[exact, *_]] = await gate.choose(x[:1])
    assert exact.options.max_staleness == 0 and not exact.training


async def test_a_second_gate_of_another_grid_on_the_same_prefix_has_its_own(node: FakeNode) -> None:
    """As a notebook's cell that is run again with another size, other settings, another way of routing."""
    make_grid(node)
    node.host("ffn.0", nn.Linear(8, 8))
    seen = {}
    for size in ((2, 2), GRID, (1,), (2, 2)):
        for route in ("sample", "token"):
            gate = GatingFunction(node, uid_prefix="ffn", grid_size=size, in_features=8, k_best=16, route=route)  # type: ignore[arg-type]
            [chosen] = await gate.choose(torch.randn(1, 8))
            seen[size] = {expert.uid for expert in chosen}
            assert (await gate(torch.randn(3, 8))).shape == (3, 8)
    assert seen == {
        (2, 2): {f"ffn.{i}.{j}" for i in range(2) for j in range(2)},
        GRID: {f"ffn.{i}.{j}" for i in range(4) for j in range(4)},
        (1,): {"ffn.0"},
    }
    assert (await RemoteExpert(node, "ffn.3.3")(torch.randn(1, 8))).shape == (1, 8)
