"""What each expert of a pass costs: at the caller, on its server's loop, and on the device's thread."""

import collections
import contextlib
import sys
import time

import pytest
import torch
from torch import nn

import tesseract_async as ta
from tesseract_async.runtime.costs import GroupChoice
from tests.costs.counting import Calls, ServerThread, least
from tests.costs.limits import check

NUM_EXPERTS, WIDTH, ROWS, K = 32, 16, 64, 4


def make_backend() -> ta.ExpertBackend:
    module = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
    optimizer = torch.optim.Adam(module.parameters())
    return ta.ExpertBackend(module, optimizer=optimizer, args_schema=(ta.TensorSpec((WIDTH,)),))


@pytest.mark.slow
async def test_python_calls_per_expert_of_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward, computed in one pass of all experts."""
    monkeypatch.setattr(GroupChoice, "is_together", lambda *_: True)
    monkeypatch.setattr(time, "thread_time", lambda: 0.0)  # by which no group takes too long
    thread, ending = ServerThread(), contextlib.AsyncExitStack()

    async def start() -> tuple[ta.TesseractNode, ta.TesseractServer]:
        node = await ending.enter_async_context(ta.TesseractNode(security="plain"))
        backends = {f"m.{number}": make_backend() for number in range(NUM_EXPERTS)}
        return node, await ending.enter_async_context(ta.TesseractServer(node, backends))

    with thread.running():
        node, server = await thread.run(start())
        runtime, on_device, mine = server.runtimes[0], Calls(), Calls()
        try:
            async with ta.TesseractNode(security="plain", initial_peers=[str(node.peer_address)]) as client:
                pool = ta.ExpertPool(client, "m", num_experts=NUM_EXPERTS)
                torch.manual_seed(0)
                x, index = torch.randn(ROWS, WIDTH), torch.arange(ROWS * K).reshape(ROWS, K) % NUM_EXPERTS
                weights = torch.rand(ROWS, K)

                async def passes(count: int) -> None:
                    for _ in range(count):
                        y = await pool(x, index, weights)
                        await ta.backward(y.square().mean())

                async def of_caller() -> collections.Counter[str]:
                    return mine.snapshot()

                async def of_device() -> collections.Counter[str]:
                    return on_device.snapshot()

                await passes(10)  # until every group was checked, and the usual norms are known
                await thread.profile(True)
                on_loop = await least(passes, thread.snapshot, size=1, num_blocks=3)
                await thread.profile(False)
                await thread.run(runtime.call(lambda: sys.setprofile(on_device)))
                device = await least(passes, of_device, size=1, num_blocks=3)
                await thread.run(runtime.call(lambda: sys.setprofile(None)))
                sys.setprofile(mine)
                try:
                    caller = await least(passes, of_caller, size=1, num_blocks=3)
                finally:
                    sys.setprofile(None)
        finally:
            await thread.run(ending.aclose())
    check("caller: Python calls per expert of a pass, both ways", caller["python"] / NUM_EXPERTS)
    check("server: Python calls per expert of a pass, both ways", on_loop["python"] / NUM_EXPERTS)
    check("device: Python calls per expert of a pass, both ways", device["python"] / NUM_EXPERTS)
