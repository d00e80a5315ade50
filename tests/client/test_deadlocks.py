"""Backward ends, whatever happens around it: nested, in any pool, cancelled at every await, while the node closes."""

import asyncio
import concurrent.futures
import gc
import threading
from typing import Any

import pytest
import torch
from torch import nn

from tesseract_async.client.autograd import backward
from tesseract_async.client.gating_function import GatingFunction
from tesseract_async.client.gradient_requests import num_steps
from tesseract_async.client.remote_expert import RemoteExpert
from tesseract_async.errors import ConnectionLost
from tesseract_async.wire.messages import BACKWARD
from tests.client.fake_node import FakeNode, gate_with, until


async def make(node: FakeNode, **settings: Any) -> tuple[nn.Linear, GatingFunction, RemoteExpert]:
    torch.manual_seed(0)
    for i in range(4):
        node.host(f"ffn.{i}", nn.Linear(8, 8))
    gate = gate_with(node, "ffn", grid_size=(4,), in_features=8, k_best=2, **settings)
    return nn.Linear(8, 8), gate, RemoteExpert(node, "ffn.0")


@pytest.mark.both_loops
@pytest.mark.parametrize("num_threads", [1, 2, 7])
async def test_from_a_pool_of_any_size(node: FakeNode, num_threads: int) -> None:
    """With one thread for eight backwards they queue, but none waits for another."""
    linear, gate, _ = await make(node)
    node.delay = 0.01
    losses = [(await gate(linear(torch.randn(2, 8)))).sum() for _ in range(8)]
    loop = asyncio.get_running_loop()
    with concurrent.futures.ThreadPoolExecutor(num_threads) as pool:
        await asyncio.gather(*(loop.run_in_executor(pool, loss.backward) for loss in losses))
    assert linear.weight.grad is not None


async def test_64_at_once_take_as_long_as_one(node: FakeNode) -> None:
    linear, gate, _ = await make(node)
    losses = [(await gate(linear(torch.randn(2, 8)))).sum() for _ in range(64)]
    released = asyncio.Event()

    async def fault(method: str, uid: str, number: int) -> None:
        await released.wait()

    node.fault = fault
    tasks = [asyncio.create_task(backward(loss)) for loss in losses]
    await until(lambda: len({id(c) for c in node.calls if c.method == BACKWARD}) >= 64)  # all went out together
    released.set()
    await asyncio.gather(*tasks)


class Nested(torch.autograd.Function):
    """A node whose backward runs a backward of its own, through a remote expert."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, inner: list[torch.Tensor]) -> torch.Tensor:
        ctx.inner, ctx.leaf = inner  # in a list: not part of this graph
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (inner,) = torch.autograd.grad(ctx.inner, ctx.leaf, retain_graph=True)
        return grads[0] + inner, None


@pytest.mark.both_loops
async def test_nested_backward(node: FakeNode) -> None:
    _, _, expert = await make(node)
    leaf = torch.ones(2, 8, requires_grad=True)
    inner = (await expert(leaf)).sum()
    x = torch.ones(2, 8, requires_grad=True)
    y = Nested.apply(await expert(x), [inner, leaf])  # type: ignore[no-untyped-call]
    await backward((await expert(y)).sum())
    assert x.grad is not None
    node.delay = 60.0
    z = Nested.apply(torch.ones(2, 8, requires_grad=True) * 1, [inner, leaf])  # type: ignore[no-untyped-call]
    task = asyncio.create_task(backward(z.sum()))
    await until(lambda: node.num_open == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert node.num_open == 0


@pytest.mark.both_loops
async def test_while_the_node_closes(node: FakeNode) -> None:
    """Calls under way fail, as an endpoint's do that closes; so do those that come later."""
    linear, _, expert = await make(node)
    losses = [(await expert(torch.tanh(await expert(linear(torch.randn(2, 8)))))).sum() for _ in range(4)]
    closing = asyncio.Event()

    async def fault(method: str, uid: str, number: int) -> None:
        await closing.wait()
        raise ConnectionLost("peer", "this node is closing")

    node.fault = fault
    tasks = [asyncio.create_task(backward(loss)) for loss in losses]
    await until(lambda: node.num_open == 4)
    closing.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(result, ConnectionLost) for result in results)
    assert linear.weight.grad is None


def test_the_loop_ends_during_backward() -> None:
    """As when a program is left by Ctrl-C: asyncio.run cancels everything, and nothing stays behind."""
    node = FakeNode()

    async def main() -> None:
        linear, gate, _ = await make(node)
        loss = (await gate(linear(torch.randn(2, 8)))).sum()
        node.delay = 60.0
        task = asyncio.create_task(backward(loss))
        await until(lambda: node.num_open > 0)
        del task  # the end of main finds it still running

    asyncio.run(main())
    assert node.num_open == 0 and not num_steps()


class Slow(torch.autograd.Function):
    """Its backward takes until `go` is set."""

    go: threading.Event

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        Slow.go.wait(60)
        return grads[0]


async def test_cancelled_before_a_request_went_out_none_goes_out(node: FakeNode) -> None:
    linear, _, expert = await make(node)
    y = await expert(linear(torch.ones(2, 8)))
    Slow.go = threading.Event()
    task = asyncio.create_task(backward(Slow.apply(y).sum()))  # type: ignore[no-untyped-call]
    await until(lambda: num_steps() > 0)
    task.cancel()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    Slow.go.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert node.count(BACKWARD) == 0 and linear.weight.grad is None


async def step(node: FakeNode, linear: nn.Linear, gate: GatingFunction, expert: RemoteExpert) -> None:
    y = await gate(linear(torch.ones(2, 8)))
    await backward((await expert(y)).sum())


@pytest.mark.both_loops
async def test_cancelled_at_every_await(node: FakeNode, caplog: pytest.LogCaptureFixture) -> None:
    """A step is cancelled after one more turn of the loop each time, until it ends by itself. Nothing is logged: no
    error is left that nobody looked at."""
    linear, gate, expert = await make(node)
    await step(node, linear, gate, expert)
    num_cancelled = 0
    for turns in range(400):
        linear.zero_grad()
        task = asyncio.create_task(step(node, linear, gate, expert))
        for _ in range(turns):
            if task.done():
                break
            await asyncio.sleep(0)
        if not task.cancel():
            await task
            break
        try:
            await task
        except asyncio.CancelledError:
            num_cancelled += 1
            assert linear.weight.grad is None
        assert node.num_open == 0 and not num_steps()
    assert num_cancelled > 10
    gc.collect()  # what nobody looked at is logged when it is collected
    assert not caplog.records
    node.directory.forgive()
    await step(node, linear, gate, expert)


@pytest.mark.both_loops
async def test_what_a_cancelled_backward_had_under_way_has_ended_with_it(node: FakeNode) -> None:
    """A connection tells the other end, and so on: a call takes some turns of the loop to end."""
    linear, gate, expert = await make(node)
    losses = [(await layer(linear(torch.ones(2, 8)))).sum() for layer in (gate, expert)]

    async def fault(method: str, uid: str, number: int) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await until(lambda: not num_steps())  # the engine's thread has left
            for _ in range(5):
                await asyncio.sleep(0)

    node.fault = fault
    for loss in losses:
        task = asyncio.create_task(backward(loss))
        await until(lambda: node.num_open > 0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert node.num_open == 0 and linear.weight.grad is None
