"""What torch allows around a module: gradients are right there too, or a sentence says what to do instead."""

import asyncio
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import tesseract_async as ta
from tesseract_async.client import engine_threads
from tesseract_async.client.autograd import backward
from tesseract_async.client.beam_search import best_cells
from tesseract_async.client.gating_function import GatingFunction
from tesseract_async.client.remote_expert import RemoteExpert
from tesseract_async.client.routing import LiveGrid
from tesseract_async.errors import SchemaMismatch
from tesseract_async.wire.messages import BACKWARD
from tesseract_async.wire.tensors import TensorSpec, pack_tensors, unpack_tensors
from tests.client.fake_node import FakeNode, gate_with, seeded
from tests.client.forked import told_by_a_child
from tests.client.made import Made


def expert_at(node: FakeNode) -> tuple[RemoteExpert, nn.Module]:
    with seeded(0):
        module = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
    node.host("ffn.0.0", module)
    return RemoteExpert(node, "ffn.0.0"), module


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(8, 3).t(),
        lambda: torch.randn(8).expand(3, 8),
        lambda: torch.randn(6, 8)[::2],
        lambda: torch.randn(3, 8),
    ],
    ids=["transposed", "expanded", "strided", "plain"],
)
async def test_inputs_and_gradients_of_any_strides(node: FakeNode, make: Callable[[], torch.Tensor]) -> None:
    expert, module = expert_at(node)
    x, upstream = make().requires_grad_(), make()
    await backward(await expert(x), upstream)
    (expected,) = torch.autograd.grad(module(x), x, upstream)
    torch.testing.assert_close(x.grad, expected)


async def test_the_outcome_of_inference_mode_as_input(node: FakeNode) -> None:
    expert, _ = expert_at(node)
    with torch.inference_mode():
        x = torch.randn(2, 8)
    await backward((await expert(x)).sum())
    assert node.count(BACKWARD) == 1


async def test_what_is_frozen_between_forward_and_backward_gets_no_gradient(node: FakeNode) -> None:
    expert, _ = expert_at(node)
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    y = await expert(second(first(torch.randn(2, 8))))
    second.requires_grad_(False)
    await backward(y.sum())
    assert first.weight.grad is not None and second.weight.grad is None


async def test_sparse_and_dense_gradients_add_up_in_any_order(node: FakeNode) -> None:
    expert, _ = expert_at(node)
    embedding = nn.Embedding(5, 8, sparse=True)
    rows = torch.tensor([1, 2])
    for lookups in ((True, False), (False, True), (True, True)):
        embedding.zero_grad()
        for lookup in lookups:
            await backward((await expert(embedding(rows) if lookup else embedding.weight)).sum())
        theirs = embedding.weight.grad
        assert theirs is not None and theirs.is_sparse == all(lookups)
        embedding.zero_grad()
        for lookup in lookups:
            y = await expert(embedding(rows) if lookup else embedding.weight)
            await asyncio.to_thread(y.sum().backward)
        assert embedding.weight.grad is not None
        torch.testing.assert_close(theirs.to_dense(), embedding.weight.grad.to_dense())


async def test_hooks_and_retained_gradients(node: FakeNode) -> None:
    expert, module = expert_at(node)
    x = torch.randn(2, 8, requires_grad=True)
    x.register_hook(lambda grad: grad * 2)
    y = await expert(x)
    y.register_hook(lambda grad: grad * 3)
    y.retain_grad()
    with torch.autograd.set_detect_anomaly(True):
        await backward(y.sum())
    same = x.detach().requires_grad_()
    module(same).sum().backward()
    assert same.grad is not None and y.grad is not None
    torch.testing.assert_close(x.grad, same.grad * 6)
    torch.testing.assert_close(y.grad, torch.full((2, 8), 3.0))


async def test_another_default_device_changes_nothing(node: FakeNode) -> None:
    """As after ``torch.set_default_device("cuda")``: what the machinery makes for itself lies on the CPU."""
    for i in range(4):
        node.host(f"ffn.{i}.{i}", nn.Linear(8, 8))
    expert = RemoteExpert(node, "ffn.0.0")
    gate = gate_with(node, "ffn", grid_size=(4, 4), in_features=8, k_best=2, latency_weight=0.1, rescale_backward=True)
    x = torch.randn(2, 8, requires_grad=True)
    full = np.stack(np.divmod(np.arange(64 * 64), 64), 1)  # so many that they are chosen by prefix
    scores = torch.randn(3, 128)
    with torch.device("meta"), Made() as made:
        assert LiveGrid(full, (64, 64)).top_k(scores, 2).shape == best_cells(scores, (64, 64), 2).shape[:2] == (3, 2)
        for codec in ("uint8", "uint8_blockwise", "bf16"):
            (decoded,) = unpack_tensors(*pack_tensors([scores], codec))
            assert decoded is not None and decoded.device.type == "cpu"
        y = await expert(x) + await gate(x)
        loss = y.sum()
        await backward(loss, retain_graph=True)
        assert len((await gate.choose(x))[0]) == 2
    assert y.device.type == "cpu" and made.devices == {"cpu"}
    assert x.grad is not None and gate.proj.weight.grad is not None

    def plain() -> None:
        with torch.device("meta"):
            loss.backward()

    await asyncio.to_thread(plain)


async def test_transforms_of_torch_func_are_refused(node: FakeNode) -> None:
    expert, _ = expert_at(node)
    gate = GatingFunction(node, uid_prefix="ffn", grid_size=(1, 1), in_features=8)
    x = torch.randn(2, 8)
    for module in (expert, gate):
        for transform in (torch.func.grad, torch.func.vmap, torch.func.jacrev):
            with pytest.raises(RuntimeError, match=r"torch\.func"):
                transform(module)(x)


async def test_a_mixture_of_whole_numbers_is_refused(node: FakeNode) -> None:
    """Weights between 0 and 1 would all become 0."""
    for i in range(2):
        node.host(f"ffn.{i}", nn.Identity(), outputs_schema=TensorSpec((8,), torch.int64))
    gate = GatingFunction(node, uid_prefix="ffn", grid_size=(2,), in_features=8, k_best=2)
    with pytest.raises(SchemaMismatch, match=r"int64\[rows, 8\].*choose"):
        await gate(torch.randn(2, 8))


async def test_pickling_says_what_to_save(node: FakeNode) -> None:
    expert, _ = expert_at(node)
    gate = GatingFunction(node, uid_prefix="ffn", grid_size=(1, 1), in_features=8)
    for module in (expert, nn.Sequential(gate)):
        with pytest.raises(TypeError, match="state_dict"):
            torch.save(module, io.BytesIO())


async def test_on_another_event_loop_a_node_says_where_it_is_awaited() -> None:
    backend = ta.ExpertBackend(nn.Linear(8, 8), args_schema=(ta.TensorSpec((8,)),))
    async with ta.TesseractNode() as node, ta.TesseractServer(node, {"ffn.0": backend}):
        expert, x = await node.get_expert("ffn.0"), torch.randn(2, 8)
        gate = GatingFunction(node, uid_prefix="ffn", grid_size=(1,), in_features=8)
        with torch.no_grad():
            await gate(x)
            await expert(x)
            for use in (lambda: expert(x), lambda: gate(x), lambda: node.get_expert("ffn.0")):
                with pytest.raises(RuntimeError, match="another event loop"):
                    await asyncio.to_thread(lambda use=use: asyncio.run(use()))  # type: ignore[misc]


async def test_in_a_forked_process_backward_says_so_and_threads_are_new(node: FakeNode) -> None:
    expert, _ = expert_at(node)
    y = await expert(torch.randn(2, 8))
    await backward(y.sum(), retain_graph=True)  # its thread is idle now, and gone in the child

    def child(say: Callable[[str], None]) -> None:
        ran: asyncio.Future[Any] = asyncio.Future(loop=asyncio.new_event_loop())
        engine_threads.run_in_engine_thread(lambda: say("ran, "), ran)
        engine_threads._threads.wait_idle(5.0)
        y.sum().backward()

    said = told_by_a_child(child)
    assert said.startswith("ran, ") and "in the process that made the call" in said
