"""A remote expert is the same function as its module run here: outputs, gradients and the step that it takes."""

import asyncio
import copy
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import torch
from torch import nn

import tesseract_async as ta
from tesseract_async import errors
from tesseract_async.experts.node_calls import EXPERT_METHODS
from tesseract_async.runtime.backend import BackendSettings
from tesseract_async.server.server import ServerSettings
from tesseract_async.wire import messages
from tesseract_async.wire.apply import APPLY
from tesseract_async.wire.codecs import CodecPolicy
from tesseract_async.wire.compression import BLOCK

WIDTH = 16
# a leaving server waits for the backwards of what it answered: here, some never come
BRIEF = ServerSettings(drain_timeout=0.1)


class Block(nn.Module):
    """Positional and keyword arguments, and a nested result."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, WIDTH))

    def forward(self, x: torch.Tensor, *, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.inner(x) * scale
        return {"sum": x + y, "square": y.square()}


def block_backend(module: nn.Module, **options: Any) -> ta.ExpertBackend:
    return ta.ExpertBackend(
        module,
        optimizer=torch.optim.Adam(module.parameters(), lr=1e-2),
        args_schema=(ta.TensorSpec((WIDTH,)),),
        kwargs_schema={"scale": ta.TensorSpec((1,))},
        max_batch_size=options.pop("max_batch_size", 64),
        **options,
    )


def linear_backend(module: nn.Module) -> ta.ExpertBackend:
    return ta.ExpertBackend(
        module,
        optimizer=torch.optim.SGD(module.parameters(), lr=1e-2),
        args_schema=(ta.TensorSpec((WIDTH,)),),
        max_batch_size=64,
    )


@asynccontextmanager
async def swarm(experts: dict[str, ta.ExpertBackend], node: type[ta.TesseractNode] = ta.TesseractNode) -> AsyncIterator:
    """A host with `experts` and a guest that knows it: two nodes, one process, real sockets."""
    async with (
        ta.TesseractNode() as host,
        ta.TesseractServer(host, experts, settings=BRIEF),
        node(initial_peers=[host.address]) as guest,
    ):
        yield host, guest


@pytest.mark.both_loops
@pytest.mark.parametrize("where", ["remote", "own node"])
async def test_outputs_input_gradients_and_the_step_are_equal(where: str) -> None:
    torch.manual_seed(0)
    module = Block()
    local = copy.deepcopy(module)
    optimizer = torch.optim.Adam(local.parameters(), lr=1e-2)
    async with swarm({"block.0": block_backend(module)}) as (host, guest):
        expert = await (guest if where == "remote" else host).get_expert("block.0")
        for _ in range(3):
            x, scale = torch.randn(7, WIDTH, requires_grad=True), torch.rand(7, 1, requires_grad=True)
            x2, scale2 = x.detach().clone().requires_grad_(), scale.detach().clone().requires_grad_()
            y = await expert(x, scale=scale)
            y2 = local(x2, scale=scale2)
            assert y.keys() == y2.keys()
            for key in y2:
                torch.testing.assert_close(y[key], y2[key], rtol=0, atol=1e-6)
            await ta.backward(y["sum"].square().mean() + y["square"].mean())
            (y2["sum"].square().mean() + y2["square"].mean()).backward()
            optimizer.step()
            optimizer.zero_grad()
            torch.testing.assert_close(x.grad, x2.grad, rtol=0, atol=1e-6)
            torch.testing.assert_close(scale.grad, scale2.grad, rtol=0, atol=1e-6)
    for ours, theirs in zip(module.parameters(), local.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


KINDS: dict[str, tuple[Any, Any]] = {
    messages.FORWARD: (messages.ForwardRequest, messages.ForwardReply),
    messages.BACKWARD: (messages.BackwardRequest, messages.BackwardReply),
}


class Recorder(ta.TesseractNode):
    """Remembers the codecs of what travelled, by method: of the request's tensors, and the reply's."""

    async def call_expert(self, peer: Any, method: str, body: Any = None, *args: Any, **kwargs: Any) -> Any:
        reply = await super().call_expert(peer, method, body, *args, **kwargs)
        if (kinds := KINDS.get(method)) is not None:
            sides = [messages.decode(kind, side) for kind, side in zip(kinds, (body, reply.body), strict=True)]
            codecs = [[meta[2] for meta in side.tensors if meta] for side in sides]
            self.seen = {**getattr(self, "seen", {}), method: codecs}
        return reply


async def test_codecs_are_settled_with_the_expert_for_each_direction() -> None:
    codecs = CodecPolicy(inputs=("bf16",), outputs=("none", "fp16"), gradients=("uint8_blockwise", "bf16"))
    module = nn.Linear(WIDTH, WIDTH)
    backend = ta.ExpertBackend(
        module, args_schema=(ta.TensorSpec((WIDTH,)),), settings=BackendSettings(codecs=codecs), max_batch_size=64
    )
    async with swarm({"block.0": backend}, Recorder) as (_, guest):
        expert = await guest.get_expert("block.0")
        await expert.info()  # what it accepts is asked once

        async def travelled(codec: Any) -> Any:
            x = torch.randn(70_000 // WIDTH, WIDTH, requires_grad=True)
            y = await expert.with_options(codec=codec)(x)
            torch.testing.assert_close(y, module(x), rtol=0.02, atol=0.02)
            await ta.backward(y.square().mean())
            return guest.seen["expert.forward"], guest.seen["expert.backward"]

        # without a preference: none where it is accepted, else what the expert names first; cached inputs do not travel
        assert await travelled("auto") == ([["bf16"], ["none"]], [["uint8_blockwise"], ["uint8_blockwise"]])
        assert await travelled({"gradients": "bf16"}) == ([["bf16"], ["none"]], [["bf16"], ["bf16"]])
        preference = {"outputs": "uint8", "gradients": "uint8"}  # what is not accepted gives way to what loses no more
        assert await travelled(preference) == ([["bf16"], ["none"]], [["uint8_blockwise"], ["uint8_blockwise"]])
        num_calls = guest.metrics.total("expert_calls")
        with pytest.raises(errors.SchemaMismatch, match="inputs travel in bf16, not in fp16"):
            await travelled("fp16")
        assert guest.metrics.total("expert_calls") == num_calls, "said before anything was sent"


async def test_a_request_larger_than_a_batch_is_split_and_steps_once() -> None:
    torch.manual_seed(0)
    module = Block()
    local = copy.deepcopy(module)
    optimizer = torch.optim.Adam(local.parameters(), lr=1e-2)
    seen: list[int] = []
    module.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    async with swarm({"block.0": block_backend(module, max_batch_size=10)}) as (_, guest):
        expert = await guest.get_expert("block.0")
        x, scale = torch.randn(37, WIDTH, requires_grad=True), torch.rand(37, 1)
        x2 = x.detach().clone().requires_grad_()
        y, y2 = await expert(x, scale=scale), local(x2, scale=scale)
        torch.testing.assert_close(y["sum"], y2["sum"], rtol=0, atol=1e-6)
        await ta.backward(y["sum"].square().sum())
        y2["sum"].square().sum().backward()
        optimizer.step()
    assert max(seen) <= 10
    torch.testing.assert_close(x.grad, x2.grad, rtol=0, atol=1e-5)
    for ours, theirs in zip(module.parameters(), local.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


async def test_many_small_requests_never_exceed_the_batch() -> None:
    seen: list[int] = []
    module = nn.Linear(WIDTH, WIDTH)
    module.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    backend = ta.ExpertBackend(module, args_schema=(ta.TensorSpec((WIDTH,)),), max_batch_size=16)
    async with swarm({"e.0": backend}) as (_, guest):
        expert = await guest.get_expert("e.0")
        xs = [torch.randn(1 + i % 13, WIDTH) for i in range(60)]
        ys = await asyncio.gather(*(expert(x) for x in xs))
    with torch.no_grad():
        for x, y in zip(xs, ys, strict=True):
            torch.testing.assert_close(y.detach(), module(x), rtol=0, atol=1e-6)
    assert max(seen) <= 16


def loss_of_codec(values: torch.Tensor, codec: str) -> torch.Tensor:
    """What each element loses at most when `values` travel once; see docs/design/wire.md."""
    if codec == "bf16":
        return values.abs() * 2**-8
    if codec == "fp16":
        return values.abs() * 2**-11 + 2**-25
    blocks = values.flatten().split(values.numel() if codec == "uint8" else BLOCK)
    # half a step, and what float32 rounds away on the way
    lost = [(b.amax() - b.amin()) / 510 * (1 + 1e-3) + b.abs().amax() * 1e-6 for b in blocks]
    return torch.cat([loss.expand_as(b) for loss, b in zip(lost, blocks, strict=True)]).view_as(values)


@pytest.mark.parametrize("codec", ["bf16", "fp16", "uint8", "uint8_blockwise"])
async def test_lossy_codecs_lose_no_more_than_they_say(codec: str) -> None:
    """Bounds carried through a linear expert by hand: outputs, input gradients, and the step that its weights take."""
    torch.manual_seed(0)
    module = nn.Linear(WIDTH, WIDTH)
    weight, bias = module.weight.detach().clone(), module.bias.detach().clone()
    x = torch.randn(300, WIDTH) * torch.logspace(-2, 1, 300)[:, None]  # more than one block, of unlike sizes
    g = torch.randn(300, WIDTH) * torch.logspace(1, -2, 300)[:, None]
    async with swarm({"e.0": linear_backend(module)}) as (_, guest):
        expert = (await guest.get_expert("e.0")).with_options(codec=codec)
        leaf = x.clone().requires_grad_()
        y = await expert(leaf)
        await ta.backward(y, g)
    with torch.no_grad():
        exact = x @ weight.T + bias
        lost_x, lost_g = loss_of_codec(x, codec), loss_of_codec(g, codec)
        on_arrival = lost_x @ weight.abs().T
        # what is rounded on the way back is what was computed from inputs that had lost something already
        outputs = on_arrival + loss_of_codec(y, codec) + 1e-5
        gradients = lost_g @ weight.abs() + loss_of_codec(leaf.grad, codec) + 1e-5
        steps = 1e-2 * (lost_g.T @ (x.abs() + lost_x) + g.abs().T @ lost_x) + 1e-4
        stepped = weight - 1e-2 * g.T @ x
        assert ((y - exact).abs() <= outputs * 1.01).all() and not torch.equal(y, exact)
        assert ((leaf.grad - g @ weight).abs() <= gradients * 1.01).all()
        assert ((module.weight - stepped).abs() <= steps * 1.01).all()


class MeetingNode(ta.TesseractNode):
    """Calls to experts wait until `together` of them are under way: calls made one after another would never end."""

    together = 1

    async def call_expert(self, *args: Any, **kwargs: Any) -> Any:
        if self.together > 1:
            if getattr(self, "barrier", None) is None or self.barrier.parties != self.together:
                self.barrier = asyncio.Barrier(self.together)
            await self.barrier.wait()
        return await super().call_expert(*args, **kwargs)


async def test_calls_that_went_out_together_come_back_together_in_backward() -> None:
    experts = {f"far.{i}": linear_backend(nn.Linear(WIDTH, WIDTH)) for i in range(16)}
    async with swarm(experts, MeetingNode) as (_, guest):
        remote = [await guest.get_expert(uid) for uid in experts]
        await asyncio.gather(*(expert(torch.zeros(1, WIDTH)) for expert in remote))  # schemas, connection
        guest.together = 8
        h = torch.randn(4, WIDTH, requires_grad=True)
        for layer in (remote[:8], remote[8:]):
            h = torch.stack(await asyncio.gather(*(expert(h) for expert in layer))).mean(0)
        await asyncio.wait_for(ta.backward(h.square().sum()), 60)


async def test_evaluating_under_no_grad_beside_training_changes_neither() -> None:
    torch.manual_seed(0)
    module = nn.Linear(WIDTH, WIDTH)
    async with swarm({"e.0": linear_backend(module)}, MeetingNode) as (_, guest):
        expert = await guest.get_expert("e.0")
        await expert(torch.zeros(1, WIDTH))
        guest.together = 3
        head = nn.Linear(WIDTH, 1)

        async def train() -> bool:
            y = head(await expert(torch.randn(4, WIDTH)))
            guest.together = 1
            await ta.backward(y.sum())
            return head.weight.grad is not None

        async def evaluate() -> bool:
            with torch.no_grad():
                y = await expert(torch.randn(4, WIDTH))
                return (y * head.weight).requires_grad

        assert await asyncio.gather(train(), ta.isolated(evaluate()), train()) == [True, False, True]
        assert torch.is_grad_enabled()


async def test_the_gate_reaches_every_expert_and_trains() -> None:
    torch.manual_seed(0)
    modules = {f"ffn.{i}.{j}": nn.Linear(WIDTH, WIDTH) for i in range(2) for j in range(2)}
    before = copy.deepcopy(modules)
    async with swarm({uid: linear_backend(module) for uid, module in modules.items()}) as (_, guest):
        # k_min: on a busy machine a slow expert would be left out, as it should
        gate = ta.GatingFunction(
            guest,
            uid_prefix="ffn",
            grid_size=(2, 2),
            in_features=WIDTH,
            k_best=4,
            k_min=4,
            settings=ta.MixtureSettings(backward_k_min=4),
        )
        x = torch.randn(5, WIDTH, requires_grad=True)
        chosen = await gate.choose(x)
        assert len(chosen) == 5
        y = await gate(x)
        scores = gate.proj(x)
        grid = scores[:, :2, None] + scores[:, None, 2:]
        weights = grid.flatten(1).softmax(1)
        expected = sum(weights[:, i, None] * before[uid](x) for i, uid in enumerate(before))
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-6)
        gradients = torch.autograd.grad(expected.square().mean(), [x, *gate.proj.parameters()])
        await ta.backward(y.square().mean())
        for ours, theirs in zip([x, *gate.proj.parameters()], gradients, strict=True):
            torch.testing.assert_close(ours.grad, theirs, rtol=0, atol=1e-6)
    for uid, module in modules.items():
        assert not torch.equal(module.weight, before[uid].weight)


async def test_gradcheck_in_float64() -> None:
    """Numerically, over real connections: of an expert's inputs, and of a gate's input and parameters."""
    torch.manual_seed(0)
    spec = ta.TensorSpec((3,), torch.float64)
    experts = {
        f"g.{i}": ta.ExpertBackend(
            nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double(), args_schema=(spec,)
        )
        for i in range(2)
    }
    async with swarm(experts) as (_, guest):
        expert = await guest.get_expert("g.0")
        # on a busy machine a slow expert would be left out, as it should
        gate = ta.GatingFunction(
            guest,
            uid_prefix="g",
            grid_size=(2,),
            in_features=3,
            k_best=2,
            k_min=2,
            settings=ta.MixtureSettings(backward_k_min=2),
        )
        gate.double()
        loop = asyncio.get_running_loop()
        x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
        # a gate's weights travel in float32: a difference of 1e-6 would drown in their rounding
        for layer, eps, atol in ((expert, 1e-6, 1e-5), (gate, 1e-3, 1e-3)):

            def function(*_: torch.Tensor, layer: Any = layer) -> torch.Tensor:
                return asyncio.run_coroutine_threadsafe(layer(x), loop).result()

            # gradcheck changes them in place
            varied = (x, *layer.parameters())
            assert await asyncio.to_thread(
                torch.autograd.gradcheck, function, varied, eps=eps, atol=atol, nondet_tol=1e-12
            )


async def test_wrong_input_is_refused_before_anything_is_sent() -> None:
    async with swarm({"e.0": linear_backend(nn.Linear(WIDTH, WIDTH))}) as (_, guest):
        expert = await guest.get_expert("e.0")
        await expert(torch.zeros(1, WIDTH))
        both = r"float32\[rows, 16\].*got.*"
        with pytest.raises(errors.SchemaMismatch, match=both + r"float32\[2, 3\]"):
            await expert(torch.zeros(2, 3))
        with pytest.raises(errors.SchemaMismatch, match=both + r"float64\[2, 16\]"):
            await expert(torch.zeros(2, WIDTH, dtype=torch.float64))
        with pytest.raises(errors.SchemaMismatch, match=both):
            await expert(torch.zeros(2, WIDTH), torch.zeros(2, WIDTH))
        with pytest.raises(TypeError, match="list|str"):
            await expert("text")
        forwards = guest.metrics.counters["expert_calls", (("method", "expert.forward"),)]
        assert forwards == 1, "no more tensors were sent; what the expert takes may have been asked again"


class Stubborn(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.abs().sum() > 0:
            raise ArithmeticError("I do not like these numbers")
        return x


async def test_an_experts_own_exception_reaches_its_caller_with_its_message() -> None:
    backend = ta.ExpertBackend(Stubborn(), args_schema=(ta.TensorSpec((WIDTH,)),), max_batch_size=16)
    async with swarm({"e.0": backend}) as (_, guest):
        expert = await guest.get_expert("e.0")
        good, bad = await asyncio.gather(
            expert(torch.zeros(1, WIDTH)), expert(torch.ones(1, WIDTH)), return_exceptions=True
        )
        assert isinstance(bad, errors.ExpertFailed) and "I do not like these numbers" in str(bad)
        assert isinstance(good, torch.Tensor)


async def test_backward_on_the_loops_own_thread_says_what_to_do() -> None:
    async with swarm({"e.0": linear_backend(nn.Linear(WIDTH, WIDTH))}) as (_, guest):
        y = await (await guest.get_expert("e.0"))(torch.randn(1, WIDTH))
        with pytest.raises(RuntimeError, match=r"await tesseract_async\.backward"):
            y.sum().backward()


@pytest.mark.both_loops
async def test_a_peer_that_stops_answering_costs_a_timeout_and_one_that_dies_an_error() -> None:
    async with ta.TesseractNode() as guest:
        async with ta.TesseractNode(initial_peers=[guest.address]) as host:
            async with ta.TesseractServer(host, {"e.0": linear_backend(nn.Linear(WIDTH, WIDTH))}, settings=BRIEF):
                expert = await guest.get_expert("e.0")
                await expert(torch.zeros(1, WIDTH))
                host.unhost_expert("e.0")
                silent = asyncio.Event()

                async def never(call: object) -> Any:
                    await silent.wait()

                host.host_expert("e.0", dict.fromkeys(EXPERT_METHODS, never))
                with pytest.raises((TimeoutError, errors.TesseractError)):
                    await expert.with_options(timeout=0.1)(torch.zeros(1, WIDTH))
        began = time.perf_counter()
        with pytest.raises((TimeoutError, errors.TesseractError)):
            await expert.with_options(timeout=1.0)(torch.zeros(1, WIDTH))
        assert time.perf_counter() - began < 10, "not what calls have by themselves"


async def test_a_server_that_came_back_elsewhere_is_found_by_the_call_that_misses_it() -> None:
    identity = ta.Identity.generate()
    async with ta.TesseractNode() as guest:
        for _ in range(2):  # the second time on another port, while the directory remembers the first
            async with ta.TesseractNode(initial_peers=[guest.address], identity=identity) as host:
                async with ta.TesseractServer(host, {"e.0": linear_backend(nn.Linear(WIDTH, WIDTH))}, settings=BRIEF):
                    expert = await guest.get_expert("e.0")
                    assert (await expert(torch.zeros(1, WIDTH))).shape == (1, WIDTH)


async def test_what_a_closed_node_made_says_that_it_is_closed() -> None:
    fresh = ta.TesseractNode()
    with pytest.raises(RuntimeError, match="not started.*async with"):
        await fresh.get_expert("e.0")
    async with ta.TesseractNode() as host:
        async with ta.TesseractServer(host, {"e.0": linear_backend(nn.Linear(WIDTH, WIDTH))}, settings=BRIEF):
            async with ta.TesseractNode(initial_peers=[host.address]) as guest:
                expert = await guest.get_expert("e.0")
                gate = ta.GatingFunction(guest, uid_prefix="e", grid_size=(1,), in_features=WIDTH, k_best=1)
                x = torch.randn(1, WIDTH)
                losses = [(await expert(x)).sum(), (await gate(x)).sum()]
            for late in (lambda: expert(x), lambda: gate(x), lambda: gate.choose(x), lambda: guest.get_expert("e.0")):
                with pytest.raises(RuntimeError, match="this node is closed"):
                    await late()
            for loss in losses:
                with pytest.raises(RuntimeError, match="this node is closed"):
                    await ta.backward(loss)


@pytest.mark.both_loops
@pytest.mark.parametrize("what", ["expert", "gate"])
async def test_backward_ends_when_its_node_closes(what: str) -> None:
    async with ta.TesseractNode() as host:
        async with ta.TesseractServer(host, {"e.0": linear_backend(nn.Linear(WIDTH, WIDTH))}, settings=BRIEF):
            guest = ta.TesseractNode(initial_peers=[host.address])
            await guest.start()
            gate = ta.GatingFunction(
                guest,
                uid_prefix="e",
                grid_size=(1,),
                in_features=WIDTH,
                k_best=1,
                settings=ta.MixtureSettings(backward_k_min=1),
            )
            layer = gate if what == "gate" else await guest.get_expert("e.0")
            x = torch.randn(1, WIDTH, requires_grad=True)
            y = await layer(x)
            host.unhost_expert("e.0")
            asked, silent = asyncio.Event(), asyncio.Event()

            async def never(call: object) -> Any:
                asked.set()
                await silent.wait()

            host.host_expert("e.0", dict.fromkeys(EXPERT_METHODS, never))
            host.endpoint.unhandle(APPLY)
            host.endpoint.handle(APPLY, never)
            backward = asyncio.create_task(ta.backward(y.sum()))
            await asyncio.wait_for(asked.wait(), 60)
            await guest.aclose()
            with pytest.raises((errors.TesseractError, RuntimeError)):
                await asyncio.wait_for(backward, 60)
            assert x.grad is None


@pytest.mark.parametrize("codec", ["bf16", "fp16"])
async def test_an_expert_that_stands_in_for_a_far_better_one_is_not_rounded_off(codec: str) -> None:
    class Fails(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.detach().any():  # not when its schema is found out
                raise ValueError("no")
            return super().forward(x)

    good = nn.Linear(WIDTH, WIDTH)
    experts = {"ffn.0": linear_backend(Fails(WIDTH, WIDTH)), "ffn.1": linear_backend(copy.deepcopy(good))}
    async with swarm(experts) as (_, guest):
        settings = ta.MixtureSettings(calls=ta.CallOptions(codec=codec))
        gate = ta.GatingFunction(
            guest, uid_prefix="ffn", grid_size=(2,), in_features=WIDTH, k_best=2, settings=settings
        )
        with torch.no_grad():
            gate.proj.weight.zero_()
            gate.proj.bias.copy_(torch.tensor([20.0, 0.0]))
        x = torch.randn(4, WIDTH, requires_grad=True)
        y = await gate(x)
        torch.testing.assert_close(y, good(x), atol=0.03, rtol=0.03)
        await ta.backward(y.sum())
        torch.testing.assert_close(x.grad, good.weight.sum(0).expand(4, -1), atol=0.03, rtol=0.03)
