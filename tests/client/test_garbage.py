"""Calls, also failing ones, leave no reference cycles: what they held is free when they end, without the collector."""

import asyncio
import contextlib
import gc
import itertools
from collections.abc import Iterator
from types import FrameType, TracebackType

import pytest
import torch
from torch import nn

from tesseract_async.client.autograd import backward
from tesseract_async.client.gating_function import GatingFunction
from tesseract_async.client.remote_expert import RemoteExpert
from tesseract_async.errors import ExpertFailed, NotEnoughExperts
from tesseract_async.wire.messages import BACKWARD
from tests.client.fake_node import FakeNode
from tests.client.virtual_time import run_in_virtual_time

WIDTH = 8


@pytest.fixture
def left() -> Iterator[list[object]]:
    """What only the collector would have freed; it rests meanwhile."""
    gc.collect()
    gc.disable()
    try:
        yield gc.garbage
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


def look(left: list[object]) -> list[object]:
    gc.set_debug(gc.DEBUG_SAVEALL)
    gc.collect()
    gc.set_debug(0)
    return list(left)


@pytest.mark.parametrize("fails", ["nobody", "some", "all"])
def test_a_step_through_a_mixture_leaves_nothing_for_the_collector(fails: str, left: list[object]) -> None:
    async def main() -> list[object]:
        torch.manual_seed(0)
        node = FakeNode()
        for i, j in itertools.product(range(3), range(3)):
            node.host(f"ffn.{i}.{j}", nn.Identity())
        gate = GatingFunction(node, uid_prefix="ffn", grid_size=(3, 3), in_features=WIDTH, k_best=4)

        num_faults = 0
        failing = {"nobody": (), "some": ("ffn.0.0", "ffn.1.1", "ffn.2.2"), "all": node.hosted}[fails]

        async def fault(method: str, uid: str, number: int) -> None:
            nonlocal num_faults
            if uid in failing:
                num_faults += 1
                raise ExpertFailed("the script says so")

        async def step() -> None:
            with contextlib.suppress(NotEnoughExperts):
                await backward((await gate(torch.randn(16, WIDTH))).square().mean())
            node.directory.forgive()

        await step()  # whatever the first one sets up stays
        await asyncio.sleep(0)
        node.fault = fault
        await step()
        await asyncio.sleep(0)
        gc.collect()
        for _ in range(3):
            await step()
            await asyncio.sleep(0)
        assert (num_faults > 0) == (fails != "nobody")
        return look(left)

    found = run_in_virtual_time(main())
    heavy = [x for x in found if isinstance(x, torch.Tensor | FrameType | TracebackType | BaseException)]
    assert not heavy, heavy
    assert len(found) == 0, [type(x) for x in found]


@pytest.mark.parametrize("num_experts", [1, 2])
def test_a_backward_that_fails_leaves_nothing_for_the_collector(num_experts: int, left: list[object]) -> None:
    async def main() -> list[object]:
        node = FakeNode()
        for i in range(num_experts):
            node.host(f"ffn.{i}", nn.Identity())
        experts = [RemoteExpert(node, uid) for uid in node.hosted]

        async def fault(method: str, uid: str, number: int) -> None:
            if method == BACKWARD:
                raise ExpertFailed("the script says so")

        async def step() -> None:
            x = torch.randn(16, WIDTH, requires_grad=True)
            with contextlib.suppress(ExpertFailed):
                await backward(torch.stack([await expert(x) for expert in experts]).sum())

        node.fault = fault
        await step()  # whatever the first one sets up stays
        await asyncio.sleep(0)
        gc.collect()
        for _ in range(3):
            await step()
            await asyncio.sleep(0)
        assert node.count(BACKWARD) == 4 * num_experts
        return look(left)

    found = run_in_virtual_time(main())
    heavy = [x for x in found if isinstance(x, torch.Tensor | FrameType | TracebackType | BaseException)]
    assert not heavy, heavy
