import asyncio
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from tesseract_async.client.autograd import backward
from tesseract_async.client.remote_expert import RemoteExpert
from tesseract_async.client.trainer import AsyncTrainer
from tesseract_async.wire.messages import BACKWARD
from tests.client.fake_node import FakeNode, seeded, until

THREAD = r"await asyncio\.to_thread\(loss\.backward\)"


@pytest.fixture
def expert(node: FakeNode) -> RemoteExpert:
    node.host("ffn.0", nn.Linear(8, 8))
    return RemoteExpert(node, "ffn.0")


@pytest.fixture
def ranks() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def accumulator(leaf: torch.Tensor) -> Any:
    """The node that adds to the leaf's ``.grad``; it lives as long as it is held."""
    view = leaf.view_as(leaf)
    assert view.grad_fn is not None
    return view.grad_fn.next_functions[0][0]


async def plain(loss: torch.Tensor) -> None:
    await asyncio.to_thread(loss.backward)


@pytest.mark.parametrize("go_back", [backward, plain])
async def test_hooks_after_accumulation_see_the_whole_gradient(expert: RemoteExpert, go_back: Any) -> None:
    """As in "optimizer step in backward": the hook drops the gradient. Frozen and unused leaves have no part."""
    with seeded(0):
        layer, unused = nn.Linear(8, 8), nn.Linear(8, 8)
    layer.bias.requires_grad_(False)
    seen: list[torch.Tensor] = []

    def step(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None and not torch.is_grad_enabled()
        seen.append(parameter.grad.clone())
        parameter.grad = None

    for parameter in (layer.weight, unused.weight):
        parameter.register_post_accumulate_grad_hook(step)
    x = torch.ones(2, 8)
    h = layer(x)
    await go_back((await expert(h)).sum() + h.sum())
    assert len(seen) == 1 and layer.weight.grad is None and layer.bias.grad is None and seen[0].abs().sum() > 0
    layer.weight.grad = torch.ones(8, 8)
    await go_back(layer(x).sum())
    torch.testing.assert_close(seen[1], torch.full((8, 8), 3.0))


@pytest.mark.parametrize("kind", ["register_hook", "register_prehook"])
async def test_hooks_on_the_node_that_accumulates(expert: RemoteExpert, kind: str) -> None:
    layer, fired = nn.Linear(8, 8), []
    node = accumulator(layer.weight)
    handle = getattr(node, kind)(lambda *grads: fired.append(len(grads)))
    layer.weight.grad = torch.zeros(8, 8)
    for count in (1, 2):
        await backward((await expert(layer(torch.ones(2, 8)))).sum())
        assert len(fired) == count
    assert layer.bias.grad is not None and layer.weight.grad.abs().sum() > 0
    handle.remove()
    await backward((await expert(layer(torch.ones(2, 8)))).sum())
    assert len(fired) == 2


async def test_an_error_in_a_hook_is_raised(expert: RemoteExpert) -> None:
    def fails(*_: Any) -> None:
        raise ZeroDivisionError

    layer = nn.Linear(8, 8)
    layer.weight.register_post_accumulate_grad_hook(fails)
    with pytest.raises(ZeroDivisionError):
        await backward((await expert(layer(torch.ones(2, 8)))).sum())
    other = nn.Linear(8, 8)
    node = accumulator(other.weight)
    node.register_hook(fails)
    with pytest.raises(ZeroDivisionError):
        await backward((await expert(other(torch.ones(2, 8)))).sum())


async def test_cancelled_in_time_hooks_do_not_fire(node: FakeNode, expert: RemoteExpert) -> None:
    layer, fired = nn.Linear(8, 8), []
    accumulates = accumulator(layer.weight)
    accumulates.register_hook(lambda *_: fired.append("node"))
    layer.bias.register_post_accumulate_grad_hook(lambda _: fired.append("leaf"))
    loss = (await expert(layer(torch.ones(2, 8)))).sum()
    node.delay = 60.0
    task = asyncio.create_task(backward(loss))
    await until(lambda: node.count(BACKWARD) == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not fired and layer.weight.grad is None


async def test_cancelled_after_the_last_answer_hooks_do_not_fire() -> None:
    """The engine is still busy with what is local."""
    layer, fired = nn.Linear(8, 8), []
    accumulates = accumulator(layer.weight)
    accumulates.register_hook(lambda *_: fired.append("node"))
    begun, may_go = threading.Event(), threading.Event()
    h = layer(torch.ones(2, 8))

    def holds(gradient: torch.Tensor) -> None:
        begun.set()
        may_go.wait(60)

    h.register_hook(holds)
    task = asyncio.create_task(backward(h.sum()))
    await asyncio.to_thread(begun.wait, 60)
    task.cancel()
    for _ in range(3):
        await asyncio.sleep(0)  # it hears of it
    may_go.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not fired and layer.weight.grad is None


async def test_a_leafs_own_hook_fires_once(expert: RemoteExpert) -> None:
    layer, fired = nn.Linear(8, 8), []
    layer.weight.register_hook(lambda grad: fired.append("gradient"))
    layer.weight.register_post_accumulate_grad_hook(lambda leaf: fired.append("accumulated"))
    await backward((await expert(layer(torch.ones(2, 8)))).sum())
    assert sorted(fired) == ["accumulated", "gradient"]
    node = accumulator(layer.weight)
    node.register_hook(print)
    with pytest.raises(RuntimeError, match=THREAD):  # one of both would fire twice
        await backward((await expert(layer(torch.ones(2, 8)))).sum())


@pytest.mark.parametrize("mode", ["all", "any"])
async def test_hooks_on_several_gradients(expert: RemoteExpert, mode: Any) -> None:
    """Torch can't tell when it has seen all of some leaves while they are only read."""
    layer, fired = nn.Linear(8, 8), []
    leaves = list(layer.parameters())
    torch.autograd.graph.register_multi_grad_hook(leaves, lambda grads: fired.append(grads), mode=mode)
    if mode == "all":
        with pytest.raises(RuntimeError, match=THREAD):
            await backward((await expert(layer(torch.ones(2, 8)))).sum())
    else:
        await backward((await expert(layer(torch.ones(2, 8)))).sum())
        assert len(fired) == 1


async def test_ddp_brings_its_ranks_together(node: FakeNode, expert: RemoteExpert, ranks: None) -> None:
    """Its reducer waits for hooks in C++; here it doubles what it sees, as another rank's gradients would."""

    def doubles(state: Any, bucket: Any) -> Any:
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer() * 2)
        return future

    with seeded(0):
        module = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    layers = nn.parallel.DistributedDataParallel(module)
    layers.register_comm_hook(None, lambda state, bucket: doubles(state, bucket))  # it compares annotations
    hosted, x = node.hosted["ffn.0"].module, torch.ones(2, 8)
    for _ in range(3):  # from the second pass on its buckets are other ones
        module.zero_grad()
        expected = torch.autograd.grad(hosted(module(x)).square().sum(), list(module.parameters()))
        await backward((await expert(layers(x))).square().sum())
        for parameter, grad in zip(module.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, grad * 2)
    with layers.no_sync():
        await backward((await expert(layers(x))).square().sum())
    torch.testing.assert_close(module[0].weight.grad, expected[0] * 3)
    with pytest.raises(ValueError, match="DistributedDataParallel"):
        AsyncTrainer(layers, torch.optim.SGD(layers.parameters(), 0.1))


async def test_what_needs_torchs_own_backward_is_refused(node: FakeNode, expert: RemoteExpert, ranks: None) -> None:
    """Before anything is sent; with the sentence's advice it works."""
    from torch.distributed.fsdp import fully_shard

    x = torch.ones(2, 8)
    unused = nn.parallel.DistributedDataParallel(nn.Linear(8, 8), find_unused_parameters=True)
    still = nn.parallel.DistributedDataParallel(nn.Linear(8, 8), static_graph=True)
    sharded = nn.Linear(8, 8)
    layers: dict[str, tuple[nn.Module, Callable[[torch.Tensor], torch.Tensor]]] = {
        "checkpoint": (reentrant := nn.Linear(8, 8), functools.partial(checkpoint, reentrant, use_reentrant=True)),
        "unused": (unused, unused),
        "still": (still, still),
        "sharded": (sharded, sharded),
        "sharded data": (sharded, lambda x: sharded(x.detach())),
    }
    for name, (module, layer) in layers.items():
        if name == "sharded":  # from now on all are refused
            fully_shard(sharded, mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))
        given = x.clone().requires_grad_()
        with pytest.raises(RuntimeError, match=THREAD):
            await backward((await expert(layer(given))).sum())
        assert node.count(BACKWARD) == 0
        await asyncio.to_thread((await expert(layer(given))).sum().backward)
        assert all(parameter.grad is not None for parameter in module.parameters()), name
        node.calls.clear()


async def test_checkpoints_without_reentrance_work(expert: RemoteExpert) -> None:
    layer, x = nn.Linear(8, 8), torch.ones(2, 8, requires_grad=True)
    await backward((await expert(checkpoint(layer, x, use_reentrant=False))).sum())
    assert layer.weight.grad is not None and x.grad is not None


async def test_hooks_of_a_trainers_module_fire(node: FakeNode) -> None:
    """Its copies have none."""
    with seeded(0):
        module = nn.Linear(8, 1)
    before, fired = module.weight.detach().clone(), []
    module.weight.register_hook(lambda grad: grad * 0)
    module.bias.register_post_accumulate_grad_hook(lambda leaf: fired.append(leaf.grad.clone()))
    trainer = AsyncTrainer(module, torch.optim.SGD(module.parameters(), 0.1), in_flight=2)

    async def loss_of(replica: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = replica(batch).sum()
        return loss

    await asyncio.gather(*(trainer.step(loss_of, torch.ones(2, 8)) for _ in range(2)))
    assert torch.equal(module.weight, before)
    torch.testing.assert_close(fired, [torch.full((1,), 2.0)] * 2)
    module.bias.register_post_accumulate_grad_hook(lambda leaf: fired[99])
    with pytest.raises(IndexError):
        await trainer.step(loss_of, torch.ones(2, 8))
    assert module.weight.grad is None and module.bias.grad is None and trainer.version == 2
    node_of_the_weight = accumulator(module.weight)
    node_of_the_weight.register_hook(print)
    with pytest.raises(ValueError, match="register_post_accumulate_grad_hook"):
        AsyncTrainer(module, torch.optim.SGD(module.parameters(), 0.1))


@pytest.mark.parametrize("sparse_first", [True, False])
async def test_dense_and_sparse_gradients_of_one_leaf_add_up(sparse_first: bool) -> None:
    words = torch.ones(5, 3, requires_grad=True)
    ids = torch.tensor([1, 1, 4])
    expected = torch.ones(5, 3).index_add(0, ids, torch.ones(3, 3))
    for is_sparse in (sparse_first, not sparse_first):
        loss = nn.functional.embedding(ids, words, sparse=True).sum() if is_sparse else words.sum()
        await backward(loss)
    assert words.grad is not None
    torch.testing.assert_close(words.grad.to_dense(), expected)
