import asyncio
import random
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import nn

from tesseract_async.client import halves, remote_call
from tesseract_async.client.autograd import backward
from tesseract_async.client.gradient_requests import num_steps
from tesseract_async.client.remote_expert import RemoteExpert
from tesseract_async.errors import ConnectionLost, ExpertFailed
from tesseract_async.wire.messages import BACKWARD, INFO
from tests.client.fake_node import FakeNode, until
from tests.client.virtual_time import in_made_up_time


async def expert_at(node: FakeNode, uid: str = "ffn.0.0") -> RemoteExpert:
    node.host(uid, nn.Linear(8, 8))
    expert = RemoteExpert(node, uid)
    await expert.info()
    return expert


async def delays(method: str, uid: str, number: int) -> None:
    """Calls take as many virtual milliseconds as their uid says: ``ffn.120``."""
    if method != INFO:
        await asyncio.sleep(int(uid.split(".")[-1]) / 1000)


async def seconds(loss: torch.Tensor) -> float:
    loop = asyncio.get_running_loop()
    start = loop.time()
    await backward(loss)
    return loop.time() - start


async def timed_expert(node: FakeNode, delay: float) -> RemoteExpert:
    uid = f"ffn.{round(delay * 1000)}"
    if uid not in node.hosted:
        await expert_at(node, uid)
    return RemoteExpert(node, uid)


@in_made_up_time
async def test_two_layers_of_calls_awaited_separately_overlap(node: FakeNode) -> None:
    expert = await timed_expert(node, 0.2)
    node.fault = delays
    h = torch.randn(4, 8, requires_grad=True)
    for _ in range(2):
        tasks = [asyncio.create_task(expert(h)) for _ in range(8)]
        h = sum([await task for task in tasks])  # type: ignore[assignment]
    assert await seconds(h.sum()) == pytest.approx(0.4)


CHAINS = {
    "unequal": [[0.02, 0.12, 0.06], [0.1, 0.04, 0.06], [0.06, 0.06, 0.08], [0.15, 0.02, 0.03]],
    "staggered": [[0.1, 0.1, 0.1, 0.1], [0.05, 0.1, 0.1, 0.1], [0.15, 0.1, 0.1], [0.2, 0.1]],
    **{
        f"random {seed}": [random.Random(seed * 9 + i).choices([0.02, 0.04, 0.06, 0.12], k=4) for i in range(6)]
        for seed in range(5)
    },
}


@pytest.mark.parametrize("kind", CHAINS)
@in_made_up_time
async def test_chains_of_unequal_latency_take_as_long_as_the_longest(node: FakeNode, kind: str) -> None:
    node.fault = delays

    async def chain(x: torch.Tensor, path: list[float]) -> torch.Tensor:
        for delay in path:
            x = torch.tanh(await (await timed_expert(node, delay))(x) * 1.01)
        return x

    x = torch.randn(4, 8, requires_grad=True)
    loss = sum(await asyncio.gather(*(chain(x, path) for path in CHAINS[kind]))).sum()  # type: ignore
    assert await seconds(loss) <= 1.001 * max(sum(path) for path in CHAINS[kind])


@in_made_up_time
async def test_calls_awaited_one_after_another_overlap_in_backward(node: FakeNode) -> None:
    expert = await timed_expert(node, 0.1)
    node.fault = delays
    x = torch.randn(4, 8, requires_grad=True)
    h = sum([await expert(x) for _ in range(4)])
    assert await seconds(h.sum()) == pytest.approx(0.1)  # type: ignore[attr-defined]


async def gradients(loss: torch.Tensor, *leaves: torch.Tensor) -> tuple[list[torch.Tensor | None], bool]:
    """The leaves' gradients, and whether a thread of the engine took part."""
    threads: list[bool] = []

    def note(gradient: torch.Tensor) -> None:
        threads.append(threading.current_thread() is not threading.main_thread())

    hook = loss.register_hook(note)
    await backward(loss, retain_graph=True)
    hook.remove()
    found = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    (started,) = threads
    return found, started


@pytest.mark.both_loops
async def test_what_is_local_and_small_needs_no_other_thread(node: FakeNode, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradients are those that the engine's thread finds, which is there where the graph cannot be cut."""
    first, second = await expert_at(node, "ffn.0.0"), await expert_at(node, "ffn.0.1")
    trunk, head = nn.Linear(8, 8), nn.Linear(8, 1)
    x = torch.randn(4, 8, requires_grad=True)
    h = torch.tanh(trunk(x))
    y, z = await asyncio.gather(first(h), second(h))
    leaves = [x, *trunk.parameters(), *head.parameters()]
    loss = head(y * z).square().sum()
    here, started = await gradients(loss, *leaves)
    assert not started and node.count(BACKWARD) == 2
    long = loss
    for _ in range(halves.MAX_NODES_HERE):
        long = long * 1.0
    there, started = await gradients(long, *leaves)
    assert started and node.count(BACKWARD) == 4
    assert all(one is not None for one in here)
    torch.testing.assert_close(here, there)
    _, started = await gradients(loss + head(h).sum(), *leaves)
    assert started, "h is reached besides the experts, too"
    _, started = await gradients((await first(y)).sum(), *leaves)
    assert started, "one expert follows another"
    monkeypatch.setattr(halves, "MAX_SECONDS_HERE", 0.0)
    _, started = await gradients(loss, *leaves)
    assert started, "it took longer than it may"


async def test_a_failure_here_and_a_backward_within_one(node: FakeNode) -> None:
    expert = await expert_at(node)
    x = torch.randn(4, 8, requires_grad=True)
    loss = (await expert(x)).sum()
    inner = (await expert(torch.randn(4, 8, requires_grad=True))).sum()
    hook = loss.register_hook(lambda gradient: inner.backward(retain_graph=True))
    with pytest.raises(RuntimeError, match="event loop's own thread"):
        await backward(loss, retain_graph=True)
    hook.remove()

    async def fault(method: str, uid: str, number: int) -> None:
        if method == BACKWARD:
            raise ExpertFailed("no")

    node.fault = fault
    with pytest.raises(ExpertFailed, match="no"):
        await backward(loss, retain_graph=True)
    assert x.grad is None and not node.num_open
    node.fault = None
    await backward(loss)
    assert x.grad is not None and num_steps() == 0


async def test_a_hook_may_go_back_through_an_expert_of_another_loop(node: FakeNode) -> None:
    """As with a BackgroundNode next to one's own: that loop is free to carry the gradients."""
    x = torch.randn(4, 8, requires_grad=True)
    inner = (await (await expert_at(node))(x)).sum()

    async def main() -> None:
        other = FakeNode()
        h = torch.randn(4, 8, requires_grad=True)
        loss = (await (await expert_at(other))(h)).sum()
        loss.register_hook(lambda gradient: inner.backward())
        await backward(loss)
        assert h.grad is not None and other.count(BACKWARD) == 1

    thread = threading.Thread(target=asyncio.run, args=(main(),), daemon=True)
    thread.start()
    await asyncio.to_thread(thread.join, 30.0)
    assert not thread.is_alive() and x.grad is not None and node.count(BACKWARD) == 1


@pytest.mark.parametrize("num_experts", [1, 2])
async def test_what_a_server_cancels_is_no_cancellation_of_the_caller(node: FakeNode, num_experts: int) -> None:
    experts = [await expert_at(node, f"ffn.0.{i}") for i in range(num_experts)]
    x = torch.randn(4, 8, requires_grad=True)
    loss = sum([await expert(x) for expert in experts]).sum()  # type: ignore[attr-defined]

    async def fault(method: str, uid: str, number: int) -> None:
        raise asyncio.CancelledError

    node.fault = fault
    with pytest.raises(RuntimeError, match="not by its backward"):
        await backward(loss)
    assert x.grad is None


@pytest.mark.both_loops
async def test_all_of_a_layer_are_under_way_at_once_in_backward(node: FakeNode) -> None:
    """Each is answered only once the other seven have come as well."""
    layers = [[await expert_at(node, f"ffn.{i}.{j}") for j in range(8)] for i in range(2)]
    barriers = {str(i): asyncio.Barrier(8) for i in range(2)}

    async def fault(method: str, uid: str, number: int) -> None:
        if method == BACKWARD:
            await barriers[uid.split(".")[1]].wait()

    node.fault = fault
    h = torch.randn(4, 8, requires_grad=True)
    for layer in layers:
        tasks = [asyncio.create_task(expert(h)) for expert in layer]
        h = sum([await task for task in tasks])  # type: ignore[assignment]
    await backward(h.sum())
    assert node.count(BACKWARD) == 16


async def test_torch_still_lets_issue_go_first(node: FakeNode) -> None:
    y = await (await expert_at(node))(torch.randn(1, 8))
    assert y.grad_fn._sequence_nr() == remote_call._ISSUE_FIRST


async def test_it_accumulates_like_torch(node: FakeNode) -> None:
    linear = nn.Linear(8, 8)
    twin = nn.Linear(8, 8)
    twin.load_state_dict(linear.state_dict())
    for _ in range(2):
        await backward((linear(torch.ones(3, 8)).sum() + linear.bias.sum()) * 2)
        ((twin(torch.ones(3, 8)).sum() + twin.bias.sum()) * 2).backward()
    for ours, theirs in zip(linear.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
        assert ours.grad.is_contiguous() and not ours.grad.requires_grad
    leaf = torch.ones((), requires_grad=True)
    await backward(leaf)
    assert leaf.grad == 1
    a, b = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    await backward(a + b, torch.ones(2))
    assert a.grad.data_ptr() != b.grad.data_ptr()  # type: ignore[union-attr]


async def test_one_expert_several_times_and_the_graph_twice(node: FakeNode) -> None:
    expert = await expert_at(node)
    module = node.hosted["ffn.0.0"].module
    x = torch.randn(2, 8, requires_grad=True)
    y = await expert(torch.tanh(await expert(x)) + await expert(x))
    z = module(torch.tanh(module(x)) + module(x))
    (expected,) = torch.autograd.grad(z.sum(), x)
    await backward(y.sum(), retain_graph=True)
    torch.testing.assert_close(x.grad, expected)
    await asyncio.gather(backward(y.sum(), retain_graph=True), backward(y.sum(), retain_graph=True))
    torch.testing.assert_close(x.grad, 3 * expected)
    await backward(y.sum())
    with pytest.raises(RuntimeError, match="second time"):
        await backward(y.sum())
    torch.testing.assert_close(x.grad, 4 * expected)


async def test_a_failed_gradient_request_leaves_grad_untouched(node: FakeNode) -> None:
    expert = await expert_at(node)
    linear = nn.Linear(8, 8)
    loss = (await expert(linear(torch.ones(1, 8)))).sum() + linear.bias.sum()
    node.directory.report_failure = lambda replica, **_: None  # type: ignore[method-assign]

    async def fault(method: str, uid: str, number: int) -> None:
        raise ConnectionLost("peer", "test")

    node.fault = fault
    with pytest.raises(ConnectionLost):
        await backward(loss)
    assert all(p.grad is None for p in linear.parameters())
    assert not num_steps()


@pytest.mark.both_loops
async def test_cancelling_leaves_grad_untouched_and_ends_the_calls(node: FakeNode) -> None:
    expert = await expert_at(node)
    linear = nn.Linear(8, 8)
    loss = sum([await expert(linear(torch.ones(1, 8))) for _ in range(3)]).sum()  # type: ignore[attr-defined]
    node.delay = 60.0
    task = asyncio.create_task(backward(loss))
    await until(lambda: node.count(BACKWARD) == 3)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert node.num_open == 0 and node.num_cancelled == 3
    assert linear.weight.grad is None and not num_steps()


async def test_a_timeout_around_backward(node: FakeNode) -> None:
    loss = (await (await expert_at(node))(torch.ones(1, 8))).sum()
    node.delay = 60.0
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await backward(loss)


async def test_backward_on_the_loops_thread_says_what_to_do(node: FakeNode) -> None:
    y = await (await expert_at(node))(torch.ones(1, 8, requires_grad=True))
    with pytest.raises(RuntimeError, match="await tesseract_async.backward"):
        y.sum().backward()
    assert node.count(BACKWARD) == 0


async def test_plain_backward_in_another_thread(node: FakeNode) -> None:
    x = torch.ones(1, 8, requires_grad=True)
    y = await (await expert_at(node))(x)
    await asyncio.to_thread(y.sum().backward)
    assert x.grad is not None


async def test_double_backward_is_refused(node: FakeNode) -> None:
    x = torch.ones(1, 8, requires_grad=True)
    y = await (await expert_at(node))(x)
    with pytest.raises(RuntimeError, match="create_graph"):
        await asyncio.to_thread(lambda: torch.autograd.grad(y.sum(), x, create_graph=True))


@pytest.mark.parametrize("reentrant", [True, False])
async def test_checkpointing_is_refused(node: FakeNode, reentrant: bool) -> None:
    expert = await expert_at(node)
    with pytest.raises(RuntimeError, match="torch.utils.checkpoint"):
        torch.utils.checkpoint.checkpoint(expert, torch.ones(1, 8, requires_grad=True), use_reentrant=reentrant)


async def test_losses_without_a_gradient_are_refused(node: FakeNode) -> None:
    for loss, kind in ((torch.ones(()), RuntimeError), (torch.ones(2, requires_grad=True), RuntimeError)):
        with pytest.raises(kind):
            await backward(loss)
    with pytest.raises(TypeError):
        await backward(3.0)  # type: ignore[arg-type]


async def test_changing_an_input_in_place_is_noticed(node: FakeNode) -> None:
    expert = await expert_at(node)
    x = torch.ones(1, 8)
    y = await expert(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="inplace"):
        await backward(y.sum())
    node.delay = 0.05
    x = torch.ones(1, 8)
    task = asyncio.create_task(expert(x))
    await until(lambda: node.num_open == 1)
    x.add_(1)
    with pytest.raises(RuntimeError, match="in place"):
        await task


async def test_outputs_without_gradient_send_nothing(node: FakeNode) -> None:
    y = await (await expert_at(node))(torch.ones(1, 8))
    x = torch.ones((), requires_grad=True)
    await backward(x + y.detach().sum())
    assert node.count(BACKWARD) == 0


async def test_the_loop_stays_free(node: FakeNode) -> None:
    expert = await expert_at(node)
    y = await expert(torch.ones(1, 8, requires_grad=True))
    turns = 0

    async def tick() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def fault(method: str, uid: str, number: int) -> None:
        before = turns
        await until(lambda: turns > before + 50)  # the engine's thread waits all the while

    node.fault = fault
    ticking = asyncio.create_task(tick())
    await backward(y.sum())
    ticking.cancel()
    assert node.count(BACKWARD) == 1


def test_a_loop_that_ended_does_not_hang_backward() -> None:
    node_and_loss: list[Any] = []

    async def main() -> None:
        node = FakeNode()
        node_and_loss.append((await (await expert_at(node))(torch.ones(1, 8))).sum())

    asyncio.run(main())
    with pytest.raises(RuntimeError, match="no longer runs"):
        node_and_loss[0].backward()


async def test_engine_threads_are_used_again_and_end(node: FakeNode) -> None:
    expert = await expert_at(node)
    before = threading.active_count()
    node.delay = 0.02
    losses = [(await expert(torch.ones(1, 8))).sum() for _ in range(4)]
    await asyncio.gather(*(backward(loss) for loss in losses[:3]))
    assert threading.active_count() <= before + 3
    await backward(losses[3])
    assert threading.active_count() <= before + 3
    await until(lambda: threading.active_count() == before)


class Remembers(torch.autograd.Function):
    """A node that looks like a leaf's to who only asks whether it has a `variable`."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.variable = x.detach()
        return x * 2

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0] * 2


async def test_what_a_node_of_ones_own_remembers_is_no_leaf() -> None:
    x = torch.ones(2, requires_grad=True)
    await backward(Remembers.apply(x).sum())  # type: ignore[no-untyped-call]
    torch.testing.assert_close(x.grad, torch.full((2,), 2.0))


LEAVES_IN_THE_MIDST = """
import asyncio, threading, time, torch
from tesseract_async.client.engine_threads import run_in_engine_thread

class Slow(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, gradient):
        begun.set()
        time.sleep(0.3)
        return gradient

begun = threading.Event()
x = torch.ones(3, requires_grad=True)
y = Slow.apply(x).sum()
run_in_engine_thread(lambda: torch.autograd.grad(y, x), asyncio.new_event_loop().create_future())
begun.wait()
"""


def test_a_program_that_ends_during_a_backward_ends_well() -> None:
    ended = subprocess.run([sys.executable, "-c", LEAVES_IN_THE_MIDST], capture_output=True, text=True)
    assert ended.returncode == 0 and not ended.stderr


FIRST_USE = """
import asyncio, sys, torch

class Off:
    def __enter__(self):
        torch.set_grad_enabled(False)
    def __exit__(self, *error):
        torch.set_grad_enabled(True)

for block in (torch.inference_mode, torch.no_grad, Off, lambda: torch.device("meta")):
    for name in [name for name in sys.modules if name.startswith("tesseract_async")]:
        del sys.modules[name]
    with block():
        import tesseract_async as ta
        for name in ta.__all__ if block is torch.inference_mode else ("RemoteExpert", "AsyncTrainer"):
            getattr(ta, name)
        from tests.client.fake_node import FakeNode
        gate = ta.GatingFunction(FakeNode(), uid_prefix="ffn", grid_size=(2,), in_features=4)
    leaves = sys.modules["tesseract_async.client.leaves"]
    needed = leaves.always_needed
    assert needed.requires_grad and not needed.is_inference() and needed.device.type == "cpu", block
    assert leaves.AccumulateGrad.__name__ == "AccumulateGrad"
    assert not gate.proj.weight.is_inference() and gate.proj.weight.requires_grad

node = FakeNode()
node.host("ffn.0", torch.nn.Identity())
asyncio.run(ta.RemoteExpert(node, "ffn.0")(torch.ones(1, 8)))
assert "torch._dynamo" not in sys.modules  # the compiler takes a second to import, for those who use it
"""


@pytest.mark.slow
def test_the_first_use_may_come_in_any_mode() -> None:
    """The package loads on first use, wherever that is."""
    ended = subprocess.run([sys.executable, "-c", FIRST_USE], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
