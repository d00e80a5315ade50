"""Many training steps in flight over delayed experts: throughput by Little's law, and memory that stays flat.

A share is the median of three: each time the rate without delay is measured, then that with delays, with as many steps
in flight as the first of the two asks for, so that a machine whose speed drifts does less harm. The collector is spared
as every program with many steps in flight should (docs/design/performance.md): one full collection is 0.2 s.
"""

import asyncio
import contextlib
import ctypes
import gc
import itertools
import math
import resource
import statistics
import sys
import time
from dataclasses import asdict, dataclass

import psutil
import torch

import tesseract_async as ta
from tesseract_async.cli.running import spare_the_collector
from tests.benchmarks.faulty import FaultyNode, hosting
from tests.benchmarks.figures import emit
from tests.benchmarks.swarm import run_on

WIDTH, ROWS = 256, 64
SECONDS = 3.0
ROUNDS = 3
ROUNDS_TO_SPREAD = 4
CALLS_PER_STEP = 2  # one forward and one backward, one after the other
BASE_IN_FLIGHT = 4


class Model(torch.nn.Module):
    """A local layer, an expert somewhere, and a head."""

    def __init__(self, expert: ta.RemoteExpert) -> None:
        super().__init__()
        self.first, self.last = torch.nn.Linear(WIDTH, WIDTH), torch.nn.Linear(WIDTH, 1)
        self.expert = expert

    async def loss(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(await self.expert(torch.relu(self.first(x)))).square().mean()


@dataclass(frozen=True)
class Pace:
    """How an AsyncTrainer went once it was up to speed; the costs are the whole process's, experts included."""

    steps_per_second: float
    cpu_us_per_step: float
    system_us_per_step: float
    """The system's share of it: page faults, switches between threads."""
    page_faults_per_step: float
    switches_per_step: float


async def pace(node: FaultyNode, model: Model, delay: float, in_flight: int) -> Pace:
    """Of so many steps in flight over experts that are `delay` away."""
    node.fate = lambda method, uid: delay
    trainer = ta.AsyncTrainer(model, torch.optim.SGD(model.parameters(), lr=1e-4), in_flight=in_flight)
    batch = torch.randn(ROWS, WIDTH)
    num_warm = ROUNDS_TO_SPREAD * in_flight  # all steps begin at once: it takes rounds to spread them
    count, begin = 0, math.inf
    before = resource.getrusage(resource.RUSAGE_SELF)
    reports = trainer.run(lambda copy, x: copy.loss(x), itertools.repeat(batch))
    async for _ in reports:
        count += 1
        if count == num_warm:
            begin, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
        if time.perf_counter() - begin > SECONDS:
            break
    seconds, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_SELF)
    await reports.aclose()
    num_steps = count - num_warm
    system = after.ru_stime - before.ru_stime
    return Pace(
        num_steps / seconds,
        (after.ru_utime - before.ru_utime + system) / num_steps * 1e6,
        system / num_steps * 1e6,
        (after.ru_minflt - before.ru_minflt) / num_steps,
        (after.ru_nvcsw + after.ru_nivcsw - before.ru_nvcsw - before.ru_nivcsw) / num_steps,
    )


async def delays(node: FaultyNode, model: Model) -> None:
    """As many steps in flight as the rate without delays, times the delay, asks for."""
    await pace(node, model, 0.0, BASE_IN_FLIGHT)  # everything was used once
    for delay, goal in ((0.1, 0.95), (0.2, 0.9)):
        pairs: list[tuple[Pace, int, Pace]] = []
        for _ in range(ROUNDS):
            base = await pace(node, model, 0.0, BASE_IN_FLIGHT)
            in_flight = BASE_IN_FLIGHT + math.ceil(base.steps_per_second * CALLS_PER_STEP * delay)
            pairs.append((base, in_flight, await pace(node, model, delay, in_flight)))
        pairs.sort(key=lambda pair: pair[2].steps_per_second / pair[0].steps_per_second)
        shares = [delayed.steps_per_second / base.steps_per_second for base, _, delayed in pairs]
        base, in_flight, delayed = pairs[ROUNDS // 2]
        emit("steps/s without delay", base.steps_per_second, "steps/s", in_flight=BASE_IN_FLIGHT, **asdict(base))
        name = f"steps/s with {delay * 1e3:.0f} ms per call / without ({in_flight} in flight)"
        details = {"in_flight": in_flight, "shares": shares, **asdict(delayed)}
        emit(name, statistics.median(shares), "", f">= {goal:g}", **details)


async def memory(node: FaultyNode, model: Model) -> None:
    """Resident memory over 1,000 steps, after as many as it takes to fill every cache (a server keeps 64 MiB).

    What the allocator holds back is given to the system before each look, where glibc can be told to: it depends on
    the threads' timing. Without that, see `untrimmed_percent`.
    """
    node.fate = lambda method, uid: 0.0
    process = psutil.Process()
    trainer = ta.AsyncTrainer(model, torch.optim.SGD(model.parameters(), lr=1e-4), in_flight=8)
    batch = torch.randn(ROWS, WIDTH)

    async def run(num_steps: int) -> tuple[int, int]:
        async for _ in trainer.run(lambda copy, x: copy.loss(x), itertools.repeat(batch, num_steps)):
            pass
        await asyncio.sleep(0)
        gc.collect()
        untrimmed = process.memory_info().rss
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        return process.memory_info().rss, untrimmed

    before, before_untrimmed = await run(1500)
    after, after_untrimmed = await run(1000)
    growth = (after - before) / before * 100
    untrimmed = (after_untrimmed - before_untrimmed) / before_untrimmed * 100
    details = {"before_bytes": before, "after_bytes": after, "untrimmed_percent": untrimmed}
    emit("memory: growth over 1,000 steps", growth, "%", "<= 2", **details)


async def measure() -> None:
    async with hosting(["ffn.0"], kind="ffn", width=WIDTH, train=True) as node:
        model = Model(await node.get_expert("ffn.0"))
        await delays(node, model)
        if "delays" not in sys.argv:
            await memory(node, model)


def main() -> None:
    torch.set_num_threads(1)
    spare_the_collector()
    run_on("uvloop", measure())


if __name__ == "__main__":
    main()
