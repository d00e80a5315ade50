"""What one layer costs where a model generates: one row, eight of its experts, on two servers."""

import contextlib
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import tesseract_async as ta
from tests.costs.counting import Calls, ServerThread
from tests.costs.limits import check

NUM_EXPERTS, TOP_K, WIDTH, NUM_PASSES = 32, 8, 64, 10


class Gated(nn.Module):
    """As the experts of most checkpoints are."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.randn(2 * WIDTH, WIDTH))
        self.down = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = nn.functional.linear(x, self.gate_up).chunk(2, dim=-1)
        return nn.functional.linear(nn.functional.silu(gate) * up, self.down)


def backend() -> ta.ExpertBackend:
    return ta.ExpertBackend(Gated(), args_schema=(ta.TensorSpec((WIDTH,)),))


@contextlib.contextmanager
def swarm() -> Iterator[tuple[ServerThread, list[ta.TesseractServer], ta.BackgroundNode]]:
    """Two servers on one loop, each with every second expert, and a node for plain calls."""
    thread, ending = ServerThread(), contextlib.AsyncExitStack()
    backends = [{f"m.0.{number}": backend() for number in range(half, NUM_EXPERTS, 2)} for half in (0, 1)]

    async def start() -> list[ta.TesseractServer]:
        servers: list[ta.TesseractServer] = []
        for one in backends:
            peers = [str(server.node.peer_address) for server in servers]
            node = await ending.enter_async_context(ta.TesseractNode(initial_peers=peers))
            servers.append(await ending.enter_async_context(ta.TesseractServer(node, one)))
        return servers

    with thread.running():
        servers = thread.run_plainly(start())
        try:
            peers = [str(server.node.peer_address) for server in servers]
            with ta.BackgroundNode(initial_peers=peers) as node:
                yield thread, servers, node
        finally:
            thread.run_plainly(ending.aclose())


def profile(calls: Calls | None) -> None:
    sys.setprofile(calls)


async def profiled(calls: Calls | None) -> None:
    sys.setprofile(calls)


@pytest.mark.slow
def test_python_calls_of_a_layer_for_one_token() -> None:
    torch.manual_seed(0)
    with swarm() as (thread, servers, node):
        pool = ta.ExpertPool(node, "m.0", num_experts=NUM_EXPERTS).eval()
        x = torch.randn(1, WIDTH)
        index, weights = torch.arange(TOP_K)[None], torch.rand(1, TOP_K)

        def passes(count: int) -> None:
            with torch.no_grad():
                for _ in range(count):
                    pool.answer(x, index, weights)

        passes(20)  # until every group was checked
        # of the servers and their devices: both together
        counted = {who: Calls() for who in ("caller", "caller's loop", "servers", "devices")}
        caller, at_loop, on_loop, on_device = counted.values()
        node.run(profiled(at_loop))
        thread.run_plainly(profiled(on_loop))
        for server in servers:
            thread.run_plainly(server.runtimes[0].call(lambda: profile(on_device)))
        sys.setprofile(caller)
        try:
            passes(NUM_PASSES)
        finally:
            sys.setprofile(None)
        node.run(profiled(None))
        thread.run_plainly(profiled(None))
        for server in servers:
            thread.run_plainly(server.runtimes[0].call(lambda: profile(None)))
    print({who: sum(one.python.values()) / NUM_PASSES for who, one in counted.items()})
    for who, one in counted.items():
        check(f"{who}: Python calls per layer and token", sum(one.python.values()) / NUM_PASSES)
