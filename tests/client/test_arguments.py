import asyncio
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tesseract_async.client.arguments import Arguments, Versions
from tesseract_async.client.autograd import backward
from tesseract_async.client.gating_function import GatingFunction
from tesseract_async.client.remote_expert import RemoteExpert
from tesseract_async.wire.messages import BACKWARD
from tesseract_async.wire.tensors import TensorSpec
from tests.client.fake_node import FakeNode, until

SPEC = TensorSpec((8,))
Pair = namedtuple("Pair", "first second")


class Sums(nn.Module):
    """Takes a tensor and a dictionary of lists."""

    def forward(self, x: torch.Tensor, rest: dict[str, list[torch.Tensor]]) -> torch.Tensor:
        return x + rest["more"][0]


def layers(node: FakeNode) -> dict[str, Callable[[torch.Tensor], Any]]:
    """Ways in which a tensor gets into a call."""
    node.host("ffn.0", nn.Identity())
    node.host("sum.0", Sums(), SPEC, {"more": [SPEC]}, outputs_schema=SPEC)
    expert, sums = RemoteExpert(node, "ffn.0"), RemoteExpert(node, "sum.0")
    gates = {p: GatingFunction(node, uid_prefix=p, grid_size=(1,), in_features=8, k_best=1) for p in ("ffn", "sum")}
    zeros = torch.zeros(2, 8)
    return {
        "expert": expert,
        "nested": lambda x: sums(zeros, {"more": [x]}),
        "gate": gates["ffn"],
        "beside": lambda x: gates["sum"](zeros, {"more": [x]}),
        "mix": lambda x: gates["ffn"].mix(x),
    }


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", ["expert", "nested", "gate", "beside", "mix"])
async def test_a_buffer_filled_anew_is_noticed_or_was_copied(node: FakeNode, mode: Any, name: str) -> None:
    """Before the first task has run at all, in any grad mode; a call that is answered is answered for its own value."""
    layer = layers(node)[name]
    with mode():
        buffer, tasks = torch.zeros(2, 8), []
        for i in range(3):
            buffer.fill_(i)
            tasks.append(asyncio.create_task(layer(buffer)))
        ends = await asyncio.gather(*tasks, return_exceptions=True)
    for i, end in enumerate(ends):
        if isinstance(end, BaseException):
            assert i < 2 and isinstance(end, RuntimeError) and "clone" in str(end)
        else:
            assert torch.equal(getattr(end, "output", end), torch.full((2, 8), float(i)))
    assert not isinstance(ends[-1], BaseException)


def of_numpy() -> tuple[torch.Tensor, Any]:
    array = np.zeros((2, 8), dtype=np.float32)
    return torch.from_numpy(array), array


def seen_by_numpy() -> tuple[torch.Tensor, Any]:
    tensor = torch.zeros(2, 8)
    return tensor, tensor.numpy()


def of_bytes() -> tuple[torch.Tensor, Any]:
    memory = bytearray(64)
    return torch.frombuffer(memory, dtype=torch.float32).view(2, 8), np.frombuffer(memory, dtype=np.float32)


def between_processes() -> tuple[torch.Tensor, Any]:
    tensor = torch.zeros(2, 8).share_memory_()
    return tensor, tensor.data  # changes of `data` are counted elsewhere


@pytest.mark.parametrize("make", [of_numpy, seen_by_numpy, of_bytes, between_processes])
@pytest.mark.parametrize("name", ["expert", "nested", "gate", "beside"])
async def test_shared_memory_is_copied(node: FakeNode, make: Any, name: str) -> None:
    """Nobody counts who writes into it."""
    layer = layers(node)[name]
    tensor, writer = make()
    tasks = []
    for i in range(3):
        writer[...] = i
        tasks.append(asyncio.create_task(layer(tensor)))
    for i, task in enumerate(tasks):
        assert torch.equal(await task, torch.full((2, 8), float(i)))


async def test_the_gradient_finds_the_tensor_that_was_copied(node: FakeNode) -> None:
    layer = layers(node)["expert"]
    x = torch.from_numpy(np.ones((2, 8), dtype=np.float32)).requires_grad_()
    await backward((await layer(x)).sum())
    assert x.grad is not None and torch.equal(x.grad, torch.ones(2, 8))


async def test_parts_of_a_buffer_may_be_filled_one_after_the_other(node: FakeNode) -> None:
    """They share one count of changes."""
    layer = layers(node)["expert"]
    buffer, tasks = torch.zeros(3, 2, 8), []
    for i in range(3):
        buffer[i] = i
        tasks.append(asyncio.create_task(layer(buffer[i])))
    results = [await task for task in tasks]
    buffer.zero_()
    await backward(torch.stack(results).sum())
    assert [result.flatten()[0].item() for result in results] == [0, 1, 2]


async def test_a_container_changed_after_the_call_changes_nothing(node: FakeNode) -> None:
    node.host("sum.0", Sums(), SPEC, {"more": [SPEC]}, outputs_schema=SPEC)
    rest = {"more": [torch.ones(2, 8)]}
    task = asyncio.create_task(RemoteExpert(node, "sum.0")(torch.zeros(2, 8), rest))
    rest["more"][0] = torch.zeros(2, 8)
    assert torch.equal(await task, torch.ones(2, 8))


async def test_gradients_and_inputs_changed_while_backward_is_under_way(node: FakeNode) -> None:
    layer = layers(node)["expert"]
    x, gradient = torch.zeros(2, 8, requires_grad=True), torch.ones(2, 8)
    y = await layer(x)
    task = asyncio.create_task(backward(y, gradient))
    gradient.fill_(5)  # it was copied
    await task
    assert x.grad is not None and torch.equal(x.grad, torch.ones(2, 8))
    data = torch.zeros(2, 8)
    loss = (await layer(data)).sum()
    may_go = asyncio.Event()

    async def fault(method: str, uid: str, number: int) -> None:
        await may_go.wait()

    node.fault = fault
    task = asyncio.create_task(backward(loss))
    await until(lambda: node.count(BACKWARD) == 2)
    data.fill_(1)
    may_go.set()
    with pytest.raises(RuntimeError, match="in place"):
        await task


async def test_a_large_tensor_is_not_copied_for_having_been_sent(node: FakeNode) -> None:
    for codec in ("none", "bf16"):
        wide = TensorSpec((4096,))
        node.host("wide.0", nn.Identity(), wide)
        x = torch.zeros(8, 4096)
        with torch.no_grad():
            await RemoteExpert(node, "wide.0").with_options(codec=codec)(x)
        assert Arguments.now((x,), {}, training=False).args[0] is x


def test_what_is_not_copied_stays_the_same_object() -> None:
    x, p = torch.ones(4, 4), nn.Parameter(torch.ones(2))
    in_graph = (p * 2)[:1]
    given = Pair([x, x.t(), in_graph], {"p": p, "n": 3})
    held = Arguments.now((given,), {}, training=False)
    taken, versions = held.args[0], held.versions
    assert type(taken) is tuple and taken[0][0] is x and taken[0][2] is in_graph and taken[1] == {"p": p, "n": 3}
    assert taken[0] is not given.first and taken[0][1]._base is x
    versions.check()
    with torch.no_grad():
        p.add_(1)
    with pytest.raises(RuntimeError, match="clone"):
        versions.check()
    with torch.inference_mode():
        Versions([torch.ones(2)]).check()  # nobody counts: nothing to check
