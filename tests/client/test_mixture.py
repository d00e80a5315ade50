"""Every pattern of failing experts and rows against a reference that goes row by row; and the options of the gates."""

import asyncio
import copy
import gc
import itertools
from typing import Any

import pytest
import torch
from torch import nn

from tesseract_async.client.autograd import backward
from tesseract_async.client.gating_function import GatingFunction, SwitchGatingFunction
from tesseract_async.client.local_mixture import LocalMixture
from tesseract_async.client.remote_expert import RemoteExpert
from tesseract_async.errors import ConnectionLost, ExpertFailed, NotEnoughExperts, SchemaMismatch
from tesseract_async.wire.codecs import CodecPolicy
from tesseract_async.wire.messages import BACKWARD, FORWARD, INFO
from tesseract_async.wire.tensors import TensorSpec
from tests.client.fake_node import FakeNode, FakeReplica, Slope, gate_with
from tests.client.virtual_time import in_made_up_time, run_in_virtual_time

UIDS = [f"ffn.{i}" for i in range(4)]


def make_gate(node: FakeNode, **settings: object) -> GatingFunction:
    for i, uid in enumerate(UIDS):
        node.host(uid, Slope(float(i + 1)), TensorSpec((2,)))
    gate = gate_with(node, "ffn", grid_size=(4,), in_features=2, **settings)  # type: ignore[arg-type]
    gate.proj.requires_grad_(False)
    torch.manual_seed(1)
    nn.init.normal_(gate.proj.weight)
    return gate


def fail(node: FakeNode, forward: tuple[str, ...] = (), backward: tuple[str, ...] = (), hang: bool = False) -> None:
    async def fault(method: str, uid: str, number: int) -> None:
        if uid in {FORWARD: forward, BACKWARD: backward}.get(method, ()):
            if hang:
                await asyncio.Event().wait()
            raise ConnectionLost("peer", "test")

    node.fault = fault


PATTERNS = [p for n in range(5) for p in itertools.combinations(range(4), n)]


@pytest.mark.parametrize("k_best,k_min,spare", [(1, 1, 0), (2, 1, 0), (2, 2, 0), (3, 1, 1), (4, 2, 0)])
def test_every_failure_pattern_in_forward(k_best: int, k_min: int, spare: int) -> None:
    run_in_virtual_time(forward_patterns(FakeNode(), k_best, k_min, spare))  # where nobody is late


async def forward_patterns(node: FakeNode, k_best: int, k_min: int, spare: int) -> None:
    gate = make_gate(node, k_best=k_best, k_min=k_min, spare=spare, on_missing="zero")
    x = torch.randn(6, 2)
    await gate(x)
    scores = gate.proj(x)
    for pattern in PATTERNS:
        node.directory.forgive()
        fail(node, forward=tuple(UIDS[i] for i in pattern))
        expected = []
        for row, row_scores in zip(x, scores, strict=True):
            order = row_scores.argsort(descending=True).tolist()
            target = min(k_min + spare, k_best)
            asked = order[:k_best]
            answered = [i for i in asked if i not in pattern]
            # refilled one by one from the next best, as long as too few can still answer
            rest = iter(i for i in order[k_best:])
            while len(answered) < target and len(answered) < k_best and (i := next(rest, None)) is not None:
                answered += [i] if i not in pattern else []
            if len(answered) < k_min:
                expected.append((torch.zeros(2), len(answered)))
                continue
            weights = row_scores[answered].softmax(0)
            expected.append((sum(w * row * (i + 1) for w, i in zip(weights, answered, strict=True)), len(answered)))
        mixed = await gate.mix(x)
        for r, (value, count) in enumerate(expected):
            if spare == 0:
                assert mixed.num_answers[r] == count
            if spare == 0 or mixed.num_answers[r] == count:
                torch.testing.assert_close(mixed.output[r], value, rtol=0, atol=1e-5)
        assert set(mixed.errors) <= {UIDS[i] for i in pattern}
        if any(count < k_min for _, count in expected):
            gate.settings = make_settings(gate, on_missing="raise")
            node.directory.forgive()
            with pytest.raises(NotEnoughExperts):
                await gate(x)
            gate.settings = make_settings(gate, on_missing="zero")
    assert node.num_open == 0


def make_settings(gate: GatingFunction, **changes: object) -> object:
    import dataclasses

    return dataclasses.replace(gate.settings, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("backward_k_min", [0, 1, 2])
def test_every_failure_pattern_in_backward(rescale: bool, backward_k_min: int) -> None:
    run_in_virtual_time(backward_patterns(FakeNode(), rescale, backward_k_min))


async def backward_patterns(node: FakeNode, rescale: bool, backward_k_min: int) -> None:
    gate = make_gate(node, k_best=3, backward_k_min=backward_k_min, rescale_backward=rescale)
    data = torch.randn(5, 2)
    for pattern in PATTERNS:
        node.directory.forgive()
        node.fault = None
        x = data.clone().requires_grad_()
        y = await gate(x)
        fail(node, backward=tuple(UIDS[i] for i in pattern))
        twin = data.clone().requires_grad_()
        total = torch.zeros(())
        enough = True
        for row, row_scores in zip(twin, gate.proj(twin), strict=True):
            asked = row_scores.topk(3).indices.tolist()
            alive = [i not in pattern for i in asked]
            weights, came = row_scores[asked].softmax(0).detach().clone(), torch.tensor(alive)
            # a gradient that is left out tells the gate nothing about that expert: the others' are compared
            weights[came] = row_scores[asked][came].softmax(0) * weights[came].sum()
            enough &= sum(alive) >= backward_k_min
            share = max(0.05, float(weights.detach()[torch.tensor(alive)].sum())) if rescale else 1.0
            for w, i, survives in zip(weights, asked, alive, strict=True):
                kept = row / share + (row - row / share).detach() if survives else row.detach()
                total = total + (w * (i + 1) * kept).sum()
        if not enough:
            with pytest.raises(NotEnoughExperts):
                await backward(y.sum())
            assert x.grad is None
            continue
        await backward(y.sum())
        (expected,) = torch.autograd.grad(total, twin)
        torch.testing.assert_close(x.grad, expected, rtol=0, atol=1e-5)


@in_made_up_time
async def test_an_expert_asked_twice_in_one_pass_is_rescaled_row_by_row(node: FakeNode) -> None:
    gate = make_gate(node, k_best=2, rescale_backward=True)
    with torch.no_grad():
        gate.proj.weight.zero_()
        gate.proj.bias.fill_(-9.0)
        gate.proj.bias[:3] = torch.tensor([0.0, 0.0, 1.0])
        gate.proj.weight[0, 0], gate.proj.weight[1, 1] = 0.5, 2.0
    x = torch.eye(2).requires_grad_()  # the first row goes to experts 0 and 2, the second to 1 and 2
    node.delay = 0.05
    fail(node, forward=(UIDS[1],), backward=(UIDS[2],))
    mixed = await gate.mix(x)
    assert mixed.num_answers.tolist() == [2, 2] and sum(asked.uid == UIDS[0] for asked in node.calls[1:]) >= 2
    await backward(mixed.output.sum())
    torch.testing.assert_close(x.grad, torch.ones(2, 2))  # expert 0 stands for all that arrived: its slope is 1


@in_made_up_time
async def test_a_row_whose_experts_all_hang_is_refilled(node: FakeNode) -> None:
    gate = make_gate(node, k_best=1)
    x = torch.randn(16, 2)
    best = (await gate.choose(x))[0][0].uid
    await gate(x)
    fail(node, forward=(best,), hang=True)
    async with asyncio.timeout(30):
        mixed = await gate.mix(x)
    assert (mixed.num_answers == 1).all() and best in mixed.errors
    assert node.num_open == 0


@pytest.mark.parametrize("method", [FORWARD, BACKWARD])
@in_made_up_time
async def test_most_experts_hang_and_the_others_fail(node: FakeNode, method: str) -> None:
    """Nothing of this batch says how long an answer takes; what was seen before does."""
    gate = make_gate(node, k_best=2, spare=0)
    for _ in range(2):
        await backward((await gate(torch.randn(8, 2, requires_grad=True))).sum())

    async def fault(called: str, uid: str, number: int) -> None:
        if called == method and uid == UIDS[0]:
            raise ConnectionLost("peer", "test")
        if called == method and uid != UIDS[1]:
            await asyncio.Event().wait()

    node.fault = fault
    async with asyncio.timeout(30):
        x = torch.randn(8, 2, requires_grad=True)
        await backward((await gate(x)).sum() + x.sum())
    assert node.num_open == 0


@in_made_up_time
async def test_an_expert_that_never_answers_is_masked_in_the_end(node: FakeNode) -> None:
    gate = make_gate(node, k_best=2)
    x = torch.randn(16, 2)
    await gate(x)
    fail(node, forward=(UIDS[0],), hang=True)
    async with asyncio.timeout(30):
        while not node.directory.failed:
            await gate(x)
    assert {replica.uid for replica in node.directory.failed} == {UIDS[0]}
    assert all(expert.uid != UIDS[0] for row in await gate.choose(x) for expert in row)


@in_made_up_time
async def test_backward_goes_on_without_one_that_hangs(node: FakeNode) -> None:
    gate = make_gate(node, k_best=4)
    x = torch.randn(8, 2, requires_grad=True)
    y = await gate(x)
    fail(node, backward=(UIDS[2],), hang=True)
    async with asyncio.timeout(30):
        await backward(y.sum())
    assert x.grad is not None and node.num_open == 0


async def test_capacity_bounds_rows_and_sends_the_others_on(node: FakeNode) -> None:
    gate = make_gate(node, k_best=1, capacity_factor=1.0)
    with torch.no_grad():
        gate.proj.weight.zero_()
        gate.proj.bias.copy_(torch.tensor([3.0, 2.0, 1.0, 0.0]))  # all rows want the first expert
    mixed = await gate.mix(torch.randn(8, 2))
    rows = {asked.uid: asked.num_rows for asked in node.calls if asked.method == FORWARD}
    assert rows == dict.fromkeys(UIDS, 2) and (mixed.num_answers == 1).all()
    gate = make_gate(node, k_best=1, capacity_factor=1.0, refill=False, on_missing="zero")
    with torch.no_grad():
        gate.proj.weight.zero_()
        gate.proj.bias.copy_(torch.tensor([3.0, 2.0, 1.0, 0.0]))
    assert (await gate.mix(torch.randn(8, 2))).num_answers.sum() == 2


@in_made_up_time
async def test_latency_aware_scores_prefer_the_fast(node: FakeNode) -> None:
    gate = make_gate(node, k_best=4, latency_weight=1000.0)
    x = torch.randn(8, 2)
    node.delay = lambda uid: 0.05 if uid == UIDS[0] else 0.0
    await gate(x)
    gate.k_best = 3
    assert all(expert.uid != UIDS[0] for row in await gate.choose(x) for expert in row)


@in_made_up_time
async def test_latency_aware_scores_count_the_way_there(node: FakeNode) -> None:
    """Of experts that answer equally fast, the one behind a slow relay loses; once its path is better, it does not."""
    gate = make_gate(node, k_best=3, latency_weight=1000.0)
    for number, uid in enumerate(UIDS):
        node.directory.replicas[uid] = [FakeReplica(uid, f"peer {number}")]
    x = torch.randn(8, 2)
    await gate(torch.randn(100_000, 2))  # calls are large, as it learns
    relayed, direct = (0.05, 1e6), (0.01, 1e7)
    node.paths = {f"peer {number}": direct for number in range(len(UIDS))} | {"peer 0": relayed}
    assert all(expert.uid != UIDS[0] for row in await gate.choose(x) for expert in row)
    node.paths["peer 0"] = (0.0, 1e9)
    assert all(UIDS[0] in {expert.uid for expert in row} for row in await gate.choose(x))


async def test_jitter_changes_scores_in_training_only(node: FakeNode) -> None:
    gate = make_gate(node, jitter=0.5, k_best=2)  # each expert has its own slope: other scores are another answer
    x = torch.randn(8, 2)
    assert not torch.equal(await gate(x), await gate(x))
    gate.eval()
    assert torch.equal(await gate(x), await gate(x))


async def test_jitter_stays_within_its_bounds(node: FakeNode) -> None:
    gate = make_gate(node, jitter=0.1)
    with torch.no_grad():
        gate.proj.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [0.0, 0.0]]))
        gate.proj.bias.zero_()
    x = torch.rand(1000, 2) + 1
    factors = gate._scores(x)[:, :2] / x
    assert 0.9 <= factors.min() < 0.91 and 1.09 < factors.max() <= 1.1 + 1e-6
    assert 0.99 < factors.mean() < 1.01


async def test_a_grid_of_three_dimensions(node: FakeNode) -> None:
    cells = [cell for cell in itertools.product(range(2), range(3), range(2)) if sum(cell) % 3]
    for n, cell in enumerate(cells):
        node.host("cube." + ".".join(map(str, cell)), Slope(float(n + 1)), TensorSpec((2,)))
    gate = GatingFunction(node, uid_prefix="cube", grid_size=(2, 3, 2), in_features=2, k_best=3, k_min=3)
    x = torch.randn(6, 2)
    scores = gate.proj(x)
    joint = torch.stack([scores[:, i] + scores[:, 2 + j] + scores[:, 5 + k] for i, j, k in cells], dim=1)
    best = joint.topk(3, dim=1)
    slopes = (best.values.softmax(1) * (best.indices + 1)).sum(1, keepdim=True)
    torch.testing.assert_close(await gate(x), x * slopes)


async def test_a_gates_state_is_its_projection(node: FakeNode) -> None:
    gate, other = make_gate(node, k_best=2, k_min=2), make_gate(node, k_best=2, k_min=2)
    nn.init.ones_(other.proj.weight)
    x = torch.randn(5, 2)
    y = await gate(x)
    assert not torch.equal(await other(x), y)
    state = gate.state_dict()
    assert set(state) == {"proj.weight", "proj.bias"}
    other.load_state_dict(state)
    torch.testing.assert_close(await other(x), y)


async def test_load_balancing_loss(node: FakeNode) -> None:
    gate = make_gate(node, k_best=1, load_balancing=True)
    gate.proj.requires_grad_(True)
    x = torch.randn(64, 2)
    mixed = await gate.mix(x)
    probability = gate.proj(x).softmax(1)
    share = torch.bincount(probability.argmax(1), minlength=4) / 64
    torch.testing.assert_close(mixed.load_balancing_loss, 4 * (share * probability.mean(0)).sum())
    assert gate.load_balancing_loss is mixed.load_balancing_loss
    await backward(mixed.load_balancing_loss)
    assert gate.proj.weight.grad is not None
    twin = copy.deepcopy(gate)  # as `AsyncTrainer` makes them: torch copies no tensor that has a graph
    assert twin.load_balancing_loss is None and gate.load_balancing_loss is not None


async def test_sequences_by_sample_and_by_token(node: FakeNode) -> None:
    x = torch.randn(3, 5, 2, requires_grad=True)
    gate = make_gate(node, k_best=2, k_min=2, route="token")  # a slow machine drops nobody
    y = await gate(x)
    assert y.shape == x.shape
    torch.testing.assert_close(y[1], await gate(x[1]))
    await backward(y.sum())
    with pytest.raises(SchemaMismatch, match="token"):
        await gate(x, torch.zeros(3, 2))
    for i in range(4):
        node.host(f"seq.{i}", Slope(float(i + 1)), TensorSpec((5, 2)))
    gate = GatingFunction(node, uid_prefix="seq", grid_size=(4,), in_features=2, k_best=1)
    y = await gate(x)
    best = gate.proj(x.mean(1)).argmax(1)
    torch.testing.assert_close(y, x * (best + 1)[:, None, None])


async def test_further_arguments_go_along(node: FakeNode) -> None:
    class Scaled(nn.Module):
        def forward(
            self, x: torch.Tensor, by: torch.Tensor, *, plus: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            return x * by, x + plus

    vector = TensorSpec((2,))
    for i in range(2):
        node.host(f"s.{i}", Scaled(), vector, vector, kwargs_schema={"plus": vector}, outputs_schema=(vector, vector))
    gate = GatingFunction(node, uid_prefix="s", grid_size=(2,), in_features=2, k_best=2)
    x, by, plus = (torch.randn(4, 2, requires_grad=True) for _ in range(3))
    product, total = await gate(x, by, plus=plus)
    torch.testing.assert_close(product, x * by)
    torch.testing.assert_close(total, x + plus)
    await backward((product + total).sum())
    torch.testing.assert_close(by.grad, x.detach())
    torch.testing.assert_close(plus.grad, torch.ones(4, 2))


async def test_a_codec_and_whole_numbers_between_the_arguments(node: FakeNode) -> None:
    """These have no gradient, and those behind them have theirs, however that travels."""

    class Repeated(nn.Module):
        def forward(self, x: torch.Tensor, times: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
            return x * times[:, None] * by

    vector = TensorSpec((2,))
    node.host("r.0", Repeated(), vector, TensorSpec((), torch.int64), vector, outputs_schema=vector)
    gate = gate_with(node, "r", grid_size=(1,), in_features=2, k_best=1, codec={"gradients": "bf16"})
    x, by, times = torch.ones(3, 2), torch.ones(3, 2, requires_grad=True), torch.arange(3)
    await backward((await gate(x, times, by)).sum())
    torch.testing.assert_close(by.grad, x * times[:, None])


async def test_switch_multiplies_by_the_probability(node: FakeNode) -> None:
    for i, j in itertools.product(range(2), range(2)):
        node.host(f"sw.{i}.{j}", Slope(float(1 + i + 2 * j)), TensorSpec((2,)))
    gate = SwitchGatingFunction(node, uid_prefix="sw", grid_size=(2, 2), in_features=2)
    gate.eval()
    x = torch.randn(6, 2)
    scores = gate.proj(x)
    joint = (scores[:, :2, None] + scores[:, None, 2:]).flatten(1).softmax(1)
    best = joint.argmax(1)
    slopes = torch.tensor([1.0, 3.0, 2.0, 4.0])[best]
    y = await gate(x)
    torch.testing.assert_close(y, x * (slopes * joint.amax(1))[:, None])
    await backward(y.sum() + 0.01 * gate.load_balancing_loss)  # type: ignore[operator]
    assert gate.proj.weight.grad is not None and gate.proj.weight.grad.any()


async def test_switch_drops_what_does_not_fit_as_the_paper_does(node: FakeNode) -> None:
    for i in range(2):
        node.host(f"sw.{i}", Slope(1.0), TensorSpec((2,)))
    gate = gate_with(
        node, "sw", grid_size=(2,), in_features=2, capacity_factor=1.0, refill=False, kind=SwitchGatingFunction
    )
    assert gate.settings.jitter > 0 and gate.settings.load_balancing and gate.route == "token"
    with torch.no_grad():
        gate.proj.weight.zero_()
        gate.proj.bias.copy_(torch.tensor([1.0, 0.0]))  # all eight want the first, which takes four
    x = torch.ones(8, 2)
    y = await gate(x)
    probability = torch.tensor([1.0, 0.0]).softmax(0)[0]
    assert (y.any(1).sum() == 4) and torch.allclose(y[y.any(1)], x[:4] * probability)
    # everything at one expert of two: 2 x (1 x its mean probability)
    torch.testing.assert_close(gate.load_balancing_loss, 2 * probability)


async def test_beam_gate_never_reads_the_grid(node: FakeNode) -> None:
    for i, j in [(0, 0), (1, 700), (999, 3), (500, 500)]:
        node.host(f"big.{i}.{j}", Slope(1.0), TensorSpec((2,)))
    gate = gate_with(node, "big", grid_size=(1000, 1000), in_features=2, k_best=1, search="beam", on_missing="zero")
    with torch.no_grad():
        gate.proj.weight.zero_()
        gate.proj.bias.zero_()
        gate.proj.bias[1] = gate.proj.bias[1000 + 700] = 5.0
    x = torch.randn(4, 2)
    torch.testing.assert_close(await gate(x), x)
    assert node.directory.watched == {}


async def test_a_liar_about_the_schema_is_outvoted(node: FakeNode) -> None:
    gate = make_gate(node, k_best=4)
    x = torch.randn(1, 2)
    liar = (await gate.choose(x))[0][0].uid
    hosted = node.hosted[liar]
    hosted.args_schema = (TensorSpec((9,)),)
    assert (await gate(x)).shape == (1, 2)
    assert node.count(INFO) == 3

    def lie(method: str, reply: Any, buffers: list[memoryview]) -> tuple[Any, list[memoryview]]:
        if method == INFO and reply.uid == liar:
            reply = reply._replace(codecs=CodecPolicy(inputs=("int4_blockwise",)).encode())
        return reply, buffers

    hosted.args_schema, node.tamper = (TensorSpec((2,)),), lie
    copied = gate_with(node, "ffn", grid_size=(4,), in_features=2, k_best=4)
    copied.load_state_dict(gate.state_dict())
    assert (await copied(x)).shape == (1, 2) and node.count(INFO) == 6
    assert {codec for _, asked in node.messages for _, _, codec in asked.tensors} == {"none"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
async def test_what_half_and_double_change(node: FakeNode, dtype: torch.dtype) -> None:
    """The page on mixed precision says it: a gate's own weights, and what it gives; experts keep theirs."""
    modules: dict[str, nn.Module] = {f"g.{i}": nn.Linear(3, 3) for i in range(2)}
    for uid, module in modules.items():
        node.host(uid, module, TensorSpec((3,)))
    gate = gate_with(node, "g", grid_size=(2,), in_features=3, k_best=2)
    x = torch.randn(4, 3)
    with torch.no_grad():
        expected = await gate(x)
    gate.to(dtype)
    assert {one.dtype for one in gate.parameters()} == {dtype}
    own = x.to(dtype).requires_grad_()
    y = await gate(own)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), expected, rtol=0, atol=3e-2)
    await backward(y.sum())
    assert own.grad is not None and own.grad.dtype == dtype
    with torch.no_grad():
        assert (await gate(x)).dtype == torch.float32  # as it came
    assert {one.dtype for module in modules.values() for one in module.parameters()} == {torch.float32}

    expert = RemoteExpert(node, "g.0").to(dtype)
    assert (await expert(x)).dtype == torch.float32
    with pytest.raises(SchemaMismatch):
        await expert(x.to(dtype))

    local = LocalMixture(copy.deepcopy(modules), uid_prefix="g", grid_size=(2,), in_features=3, k_best=2).to(dtype)
    assert {one.dtype for one in local.parameters()} == {dtype} and local(x.to(dtype)).dtype == dtype
    with pytest.raises(RuntimeError, match="dtype"):
        local(x)


async def test_float64_gradcheck(node: FakeNode) -> None:
    torch.manual_seed(0)
    for i, j in itertools.product(range(2), range(2)):
        module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
        node.host(f"g.{i}.{j}", module, TensorSpec((3,), torch.float64))
    gate = GatingFunction(node, uid_prefix="g", grid_size=(2, 2), in_features=3, k_best=4).double()
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    loop = asyncio.get_running_loop()
    weight, bias = gate.proj.weight, gate.proj.bias

    def mixture(*_: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = asyncio.run_coroutine_threadsafe(gate(x), loop).result()
        return result

    assert await asyncio.to_thread(torch.autograd.gradcheck, mixture, (x, weight, bias), nondet_tol=1e-12)


def test_answers_that_came_too_late_to_count_are_not_kept_for_the_backward() -> None:
    async def num_kept(num_turns: int) -> int:
        node = FakeNode()
        gate = make_gate(node, k_best=4, spare=0, timeout_after_k_min=0.0)
        await gate(torch.zeros(1, 2))

        async def fault(method: str, uid: str, number: int) -> None:
            await asyncio.sleep(1.0)
            for _ in range(num_turns if uid != UIDS[0] else 0):  # the others end while the pass does
                await asyncio.sleep(0)

        node.fault = fault
        mixed = await gate.mix(torch.randn(1237, 2, requires_grad=True))
        assert (mixed.num_answers == 1).all()
        gc.collect()
        return sum(isinstance(one, torch.Tensor) and one.shape == (1237, 2) for one in gc.get_objects())

    async def main() -> None:
        assert await num_kept(2) == await num_kept(5)

    run_in_virtual_time(main())


@pytest.mark.parametrize("gap", [20.0, 50.0, 200.0])
async def test_an_expert_that_stands_in_for_a_far_better_one_gets_all_of_the_gradient(gap: float) -> None:
    node = FakeNode()
    for i in range(2):  # at one server: both weights travel in one message
        node.host(UIDS[i], Slope(i + 1.0), TensorSpec((2,)), peers=["peer"])
    gate = gate_with(node, "ffn", grid_size=(2,), in_features=2, k_best=2)
    with torch.no_grad():
        gate.proj.weight.zero_()
        gate.proj.bias.copy_(torch.tensor([gap, 0.0]))

    async def fault(method: str, uid: str, number: int) -> None:
        if uid == UIDS[0]:
            raise ExpertFailed("no")

    node.fault = fault
    x = torch.randn(3, 2, requires_grad=True)
    y = await gate(x)
    torch.testing.assert_close(y, 2 * x)
    await backward(y.sum())
    torch.testing.assert_close(x.grad, torch.full((3, 2), 2.0))
