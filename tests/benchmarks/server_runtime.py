"""What the batcher and the device's thread cost. Prints one JSON line per figure; run alone on the machine.

python -m tests.benchmarks.server_runtime
"""

import asyncio
import contextlib
import random
import statistics
import time
from collections.abc import Callable, Coroutine
from typing import Any

import torch
from torch import nn

from tesseract_async.runtime.backend import ExpertBackend
from tesseract_async.runtime.batcher import Batcher, QueuedRequest
from tesseract_async.runtime.runtime import RuntimeSettings, TesseractRuntime
from tesseract_async.wire.tensors import TensorSpec
from tests.benchmarks.figures import emit
from tests.computed import computed


def batcher_rate(num_requests: int = 100_000) -> float:
    """Requests/s through add, pop_ready and finish, for 64 experts, 20 peers, 100 requests at a time."""
    batcher = Batcher(max_queue_bytes=1 << 60)
    pools = [batcher.add_queue(index, max_batch_size=64) for index in range(64)]
    started = time.perf_counter()
    for first in range(0, num_requests, 100):
        now = first * 1e-5
        for index in range(first, first + 100):
            batcher.add(QueuedRequest(pools[index % 7 * 9], 4, 4096, peer=index % 20, deadline=now + 30.0), now)
        while (batch := batcher.pop_ready(now)) is not None:
            batcher.finish([batch], now)
    return num_requests / (time.perf_counter() - started)


def nop(width: int = 1024) -> ExpertBackend:
    return ExpertBackend(nn.Identity(), args_schema=(TensorSpec((width,)),))


def ffn(width: int = 256, inner: int = 1024, *, max_batch_size: int = 512) -> ExpertBackend:
    module = nn.Sequential(
        nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, inner), nn.GELU(), nn.Linear(inner, width)
    )
    return ExpertBackend(
        module,
        optimizer=torch.optim.Adam(module.parameters(), lr=1e-4),
        args_schema=(TensorSpec((width,)),),
        max_batch_size=max_batch_size,
    )


@contextlib.asynccontextmanager
async def running(**settings: Any) -> Any:
    runtime = TesseractRuntime(**settings)
    await runtime.start()
    try:
        yield runtime
    finally:
        await runtime.aclose()


async def idle_latency(num_calls: int = 3000) -> float:
    """Median microseconds that an idle runtime adds to one row through `nop`."""
    backend, x = nop(), torch.randn(1, 1024)
    direct = []
    for _ in range(num_calls):
        started = time.perf_counter()
        backend.forward([x])
        direct.append(time.perf_counter() - started)
    async with running() as runtime:
        through = []
        for _ in range(num_calls):
            started = time.perf_counter()
            await computed(runtime, backend, [x])
            through.append(time.perf_counter() - started)
    return (statistics.median(through) - statistics.median(direct)) * 1e6


async def throughput_share(*, backward: bool, seconds: float = 4.0) -> tuple[float, float]:
    """Rows/s through the runtime as a share of a plain loop's, batches of 512 rows; and a batch's milliseconds.

    Both compute on one core, and take turns, so that what else the machine does falls on both.
    """
    torch.set_num_threads(1)
    backend = ffn()
    x, gradient = torch.randn(512, 256), torch.randn(512, 256)

    def plain(rounds: int) -> float:
        optimizer: Any = backend.optimizer
        started = time.perf_counter()
        for _ in range(rounds):
            if backward:
                leaf = x.clone().requires_grad_()
                backend.module(leaf).backward(gradient)
                optimizer.step()
                optimizer.zero_grad()
            else:
                with torch.no_grad():
                    backend.module(x)
        return (time.perf_counter() - started) / rounds

    async def ours(runtime: TesseractRuntime, rounds: int) -> float:
        # 8 clients of 128 rows each, always one request in flight each: batches of 512 gather while one runs
        rows, number = 128, iter(range(10**9))
        quarter, quarter_gradient = x[:rows], gradient[:rows]

        async def client() -> None:
            for _ in range(rounds * 512 // rows // 8):
                if backward:
                    call_id = next(number).to_bytes(16, "big")
                    await computed(runtime, backend, [quarter], [quarter_gradient], call_id=call_id)
                else:
                    await computed(runtime, backend, [quarter])

        started = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(8)))
        return (time.perf_counter() - started) / rounds

    plain(3)
    once = plain(10)
    rounds = max(4, int(seconds / 18 / once) // 4 * 4)
    async with running(settings=RuntimeSettings(num_threads=1)) as runtime:
        await ours(runtime, 8)
        shares = []
        for _ in range(9):
            local = plain(rounds)
            shares.append(local / await ours(runtime, rounds))
    return statistics.median(shares), once * 1e3


async def fairness(num_experts: int = 64, num_requests: int = 1000, seconds: float = 4.0) -> tuple[float, float]:
    """p99 of the waits over their mean, and the busy share, with 1,000 small requests always under way."""
    module = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256))
    backends = [
        ExpertBackend(module, args_schema=(TensorSpec((256,)),), max_batch_size=256) for _ in range(num_experts)
    ]
    x = torch.randn(4, 256)
    waits: list[float] = []
    async with running(settings=RuntimeSettings(num_threads=1)) as runtime:
        stop = time.perf_counter() + seconds

        async def client(index: int) -> None:
            choice = random.Random(index)
            while (started := time.perf_counter()) < stop:
                await computed(runtime, choice.choice(backends), [x], peer=index)
                waits.append(time.perf_counter() - started)

        before, began = runtime.busy_seconds, time.perf_counter()
        await asyncio.gather(*(client(index) for index in range(num_requests)))
        busy = (runtime.busy_seconds - before) / (time.perf_counter() - began)
    steady = waits[num_requests:]
    return statistics.quantiles(steady, n=100)[98] / statistics.mean(steady), busy


def timed(function: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    return asyncio.run(function())


def main() -> None:
    emit("batcher alone", max(batcher_rate() for _ in range(3)), "requests/s", ">= 100000")
    emit("latency added by an idle runtime, 1 row, nop", timed(idle_latency), "us median", "< 150")
    for backward in (False, True):
        share, milliseconds = timed(lambda backward=backward: throughput_share(backward=backward))  # type: ignore[misc]
        kind = "backward" if backward else "forward"
        emit(f"rows/s against a plain loop, {kind}, batches of {milliseconds:.0f} ms", share, "share", ">= 0.95")
    ratio, busy = timed(fairness)
    emit("p99 wait over mean, 64 experts, 1000 requests", ratio, "ratio", "<= 2.2")
    emit("device busy, 64 experts, 1000 requests", busy, "share", ">= 0.9")


if __name__ == "__main__":
    main()
