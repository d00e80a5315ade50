"""Our side of the mixture load (`loads.MixtureLoad`): one batch through a gate over a grid of live `nop` experts."""

import argparse
import time
from collections.abc import AsyncGenerator
from typing import Any

import torch

import tesseract_async as ta
from tesseract_async.endpoint.endpoint import Message
from tests.benchmarks.figures import emit, percentile
from tests.benchmarks.loads import Load, MixtureLoad
from tests.benchmarks.swarm import Security, run_on, serving

NUM_REPEATS = 5


class CountingNode(ta.TesseractNode):
    """Counts the messages to experts' servers that leave it."""

    num_messages = 0

    def apply_experts(self, *args: Any, **options: Any) -> AsyncGenerator[Message, None]:
        self.num_messages += 1
        return super().apply_experts(*args, **options)


async def measure(load: MixtureLoad, address: str, security: Security) -> None:
    async with CountingNode(security=security, initial_peers=[address]) as node:
        torch.manual_seed(load.seed)
        gate = ta.GatingFunction(
            node,
            uid_prefix="ffn",
            grid_size=load.grid_size,
            in_features=load.width,
            k_best=load.k_best,
            settings=ta.MixtureSettings(forward_timeout=30.0),
        )
        batch = torch.randn(load.rows, load.width)
        with torch.no_grad():
            await gate(batch[:8])  # connections, and the directory
            choosing = []
            for _ in range(NUM_REPEATS):
                begin = time.perf_counter()
                await gate.choose(batch)
                choosing.append(time.perf_counter() - begin)
            seconds = []
            for _ in range(NUM_REPEATS):
                node.num_messages = 0
                begin = time.perf_counter()
                await gate(batch)
                seconds.append(time.perf_counter() - begin)
        name = f"mixture {load.rows}x{load.width}, 64x64 grid"
        median = percentile(seconds, 0.5)
        emit(f"{name}, {security}", load.rows / median, "rows/s", seconds=median, all_seconds=seconds)
        emit(f"{name}: messages to its server", node.num_messages, "messages", asked="<= 1")
        emit(f"{name}: choosing among {load.num_live}", percentile(choosing, 0.5) * 1e3, "ms", asked="< 10")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--security", choices=("tls", "plain"), default="tls")
    parser.add_argument("--loop", choices=("uvloop", "asyncio"), default="uvloop")
    args = parser.parse_args()
    load = MixtureLoad()
    torch.set_num_threads(1)
    # no torch operation may run in this process before it forks the server: torch's threads don't survive that
    served = Load("mixture", "nop", load.rows, load.width, 1)
    with serving(served, load.uids(), security=args.security, loop=args.loop) as (_, address):
        run_on(args.loop, measure(load, address, args.security))


if __name__ == "__main__":
    main()
