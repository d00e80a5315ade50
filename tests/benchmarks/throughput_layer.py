"""A layer of many small experts on four server processes: rows/s forward and backward, and messages in a pass.

Against the same mixture in a local loop: each expert in turn, its rows, its step.
"""

import argparse
import contextlib
import cProfile
import pstats
import time
from collections import Counter
from collections.abc import AsyncGenerator
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import nn

import tesseract_async as ta
from tesseract_async.endpoint.endpoint import Message
from tests.benchmarks.figures import emit, percentile
from tests.benchmarks.processes import child
from tests.benchmarks.swarm import Security, run_on, stop_asked

NUM_EXPERTS, NUM_SERVERS, ROWS, K_BEST = 64, 4, 512, 4
GRID = (8, 8)


def make_module(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))


def serve(pipe: Connection, width: int, uids: list[str], seeds: list[str], security: Security, loop: str) -> None:
    """A server process: sends its address, and ends when it is told to."""
    torch.set_num_threads(1)

    async def main() -> None:
        backends = {}
        for uid in uids:
            module = make_module(width)
            backends[uid] = ta.ExpertBackend(
                module, optimizer=torch.optim.Adam(module.parameters()), args_schema=(ta.TensorSpec((width,)),)
            )
        async with ta.TesseractNode(security=security, initial_peers=seeds) as node, ta.TesseractServer(node, backends):
            pipe.send(("value", str(node.peer_address)))
            await stop_asked(pipe)

    run_on(loop, main())


class CountingNode(ta.TesseractNode):
    """Counts the messages to experts' servers that leave it, by whether they are backwards."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.num_messages: Counter[Any] = Counter()

    def apply_experts(
        self, peer: Any, uids: Any, body: Any, *args: Any, **options: Any
    ) -> AsyncGenerator[Message, None]:
        self.num_messages[peer.peer_id] += 1
        return super().apply_experts(peer, uids, body, *args, **options)


def local_step(
    modules: list[nn.Module], optimizers: list[torch.optim.Optimizer], router: nn.Module, width: int
) -> None:
    """The same mixture, one expert after the other."""
    x = torch.randn(ROWS, width, requires_grad=True)
    scores, index = router(x).topk(K_BEST)
    weights, y = scores.softmax(1), torch.zeros(ROWS, width)
    for expert, module in enumerate(modules):
        rows, at = (index == expert).nonzero(as_tuple=True)
        if len(rows):
            y = y.index_add(0, rows, module(x[rows]) * weights[rows, at, None])
    torch.autograd.backward(y.square().mean())
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def measure_local(width: int, num_steps: int) -> float:
    modules = [make_module(width) for _ in range(NUM_EXPERTS)]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.Adam(module.parameters()) for module in modules]
    router, seconds = nn.Linear(width, NUM_EXPERTS), []
    for _ in range(num_steps + 2):
        begin = time.perf_counter()
        local_step(modules, optimizers, router, width)
        seconds.append(time.perf_counter() - begin)
    return percentile(seconds[2:], 0.5)


async def measure(width: int, num_steps: int, seeds: list[str], security: Security, profiled: bool) -> None:
    async with CountingNode(security=security, initial_peers=seeds) as node:
        torch.manual_seed(3)
        gate = ta.GatingFunction(node, uid_prefix="ffn", grid_size=GRID, in_features=width, k_best=K_BEST)
        await node.directory.read_grid("ffn", GRID)

        async def step() -> None:
            x = torch.randn(ROWS, width, requires_grad=True)
            await ta.backward((await gate(x)).square().mean())

        for _ in range(3):
            await step()
        seconds, messages = [], []
        for _ in range(num_steps):
            node.num_messages.clear()
            begin = time.perf_counter()
            await step()
            seconds.append(time.perf_counter() - begin)
            messages.append(node.num_messages.total() / 2)
        if profiled:
            profile = cProfile.Profile()
            with profile:
                await step()
            stats = pstats.Stats(profile)
            stats.sort_stats("tottime").print_stats(45)
        left_out = node.metrics.total("answers_left_out")
    remote, local = percentile(seconds, 0.5), measure_local(width, num_steps)
    shape = f"{width}-{2 * width}-{width}"
    name = f"{NUM_EXPERTS} experts {shape} on {NUM_SERVERS} servers, {ROWS} rows, k={K_BEST}, {security}"
    emit(f"{name}: forward + backward", ROWS / remote, "rows/s", seconds=remote, local=local, left_out=left_out)
    emit(f"{name}: share of a local loop", local / remote, "", asked=">= 0.7" if width >= 256 else None)
    # those with refills or hedges have more
    emit(f"{name}: messages each way", percentile(messages, 0.5), "messages", f"<= {NUM_SERVERS}", all=messages)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--security", choices=("tls", "plain"), default="tls")
    parser.add_argument("--loop", choices=("uvloop", "asyncio"), default="uvloop")
    parser.add_argument("--width", type=int, action="append")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--profile", action="store_true", help="Print the functions of one pass at the client.")
    args = parser.parse_args()
    torch.set_num_threads(1)
    uids = [f"ffn.{row}.{column}" for row in range(GRID[0]) for column in range(GRID[1])]
    for width in args.width or (64, 256):
        with contextlib.ExitStack() as stack:
            seeds: list[str] = []
            for number in range(NUM_SERVERS):
                share = uids[number::NUM_SERVERS]
                server = stack.enter_context(child(serve, (width, share, seeds[:1], args.security, args.loop)))
                seeds.append(server.receive(60))
            run_on(args.loop, measure(width, args.steps, seeds[:1], args.security, args.profile))


if __name__ == "__main__":
    main()
