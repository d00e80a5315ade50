"""Whether the gradients of calls that were awaited one by one overlap in backward, and whether the loop stays free."""

import asyncio
import time

import torch

import tesseract_async as ta
from tests.benchmarks.faulty import FaultyNode, hosting
from tests.benchmarks.figures import emit, percentile
from tests.benchmarks.swarm import run_on

WIDTH = 16
DELAY = 0.2
LEEWAY = 1.25
CHAINS = (0.04, 0.08, 0.12, 0.16)  # seconds per call of each chain
CHAIN_LENGTH = 3


async def backward_seconds(loss: torch.Tensor) -> float:
    begin = time.perf_counter()
    await ta.backward(loss)
    return time.perf_counter() - begin


async def two_layers(node: FaultyNode, experts: list[ta.RemoteExpert]) -> None:
    """Two layers of eight experts, each call 200 ms late."""
    node.fate = lambda method, uid: DELAY
    first = torch.nn.Linear(WIDTH, WIDTH)
    begin = time.perf_counter()
    x = first(torch.randn(4, WIDTH))
    for _ in range(2):
        x = torch.stack(await asyncio.gather(*(expert(x) for expert in experts))).sum(0)
    emit("two layers x 8 experts, 200 ms: forward", time.perf_counter() - begin, "s", f"<= {2 * DELAY * LEEWAY:g}")
    emit("two layers x 8 experts, 200 ms: backward", await backward_seconds(x.sum()), "s", f"<= {2 * DELAY * LEEWAY:g}")


async def chains(node: FaultyNode, experts: list[ta.RemoteExpert]) -> None:
    """Four chains of unequal latency next to each other: the longest is the critical path."""
    delays = {expert.uid: delay for expert, delay in zip(experts, CHAINS, strict=False)}
    node.fate = lambda method, uid: delays[uid]
    first = torch.nn.Linear(WIDTH, WIDTH)

    async def chain(expert: ta.RemoteExpert, x: torch.Tensor) -> torch.Tensor:
        for _ in range(CHAIN_LENGTH):
            x = await expert(x)
        return x

    x = first(torch.randn(4, WIDTH))
    ends = await asyncio.gather(*(chain(expert, x) for expert in experts[: len(CHAINS)]))
    critical = CHAIN_LENGTH * max(CHAINS)
    seconds = await backward_seconds(torch.stack(ends).sum())
    emit("four chains of unequal latency: backward / critical path", seconds / critical, "", f"<= {LEEWAY:g}")


async def one_after_another(node: FaultyNode, experts: list[ta.RemoteExpert]) -> None:
    """Four independent calls, awaited one after the other: backward could take as long as one."""
    node.fate = lambda method, uid: DELAY
    x = torch.nn.Linear(WIDTH, WIDTH)(torch.randn(4, WIDTH))
    ends = [await expert(x) for expert in experts[:4]]
    seconds = await backward_seconds(torch.stack(ends).sum())
    emit("four calls one after another: backward / critical path", seconds / DELAY, "", f"<= {LEEWAY:g}")


async def free_loop() -> None:
    """How late the loop's timers are while a backward computes for about a second."""
    torch.set_num_threads(1)
    weight = torch.randn(512, 512, requires_grad=True)

    def graph(num_layers: int) -> torch.Tensor:
        x = torch.randn(512, 512)
        for _ in range(num_layers):
            x = torch.tanh(x @ weight)
        return x.sum()

    await ta.backward(graph(10))  # the first one of a process loads things
    probe = await backward_seconds(graph(50))
    x = graph(round(50 / probe))
    late: list[float] = []

    async def tick() -> None:
        while True:
            before = time.perf_counter()
            await asyncio.sleep(0.001)
            late.append(time.perf_counter() - before - 0.001)

    ticking = asyncio.create_task(tick())
    seconds = await backward_seconds(x)
    ticking.cancel()
    await asyncio.gather(ticking, return_exceptions=True)
    name = "loop latency (p99) during a backward of about 1 s"
    emit(name, percentile(late, 0.99) * 1e3, "ms", "< 10", seconds=seconds, worst_ms=max(late) * 1e3)


async def measure() -> None:
    uids = [f"nop.{index}" for index in range(8)]
    async with hosting(uids, kind="nop", width=WIDTH) as node:
        experts = [await node.get_expert(uid) for uid in uids]
        warm = [await expert(torch.randn(4, WIDTH, requires_grad=True)) for expert in experts]
        await ta.backward(torch.stack(warm).sum())
        for part in (two_layers, chains, one_after_another):
            await part(node, experts)
    await free_loop()


def main() -> None:
    run_on("uvloop", measure())


if __name__ == "__main__":
    main()
