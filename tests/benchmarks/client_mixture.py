"""Choosing among many live experts, and what failing and hanging experts cost a mixture."""

import contextlib
import itertools
import random
import time

import torch

import tesseract_async as ta
from tesseract_async.experts.publisher import ExpertPublisher
from tests.benchmarks.faulty import hosting
from tests.benchmarks.figures import emit, percentile
from tests.benchmarks.swarm import run_on

ROWS, WIDTH, K_BEST = 2048, 256, 4
GRID = (64, 64)
NUM_STEPS = 150
"""In 30 steps, the one second for which the first hanging expert is waited for would be a sixth of the mean."""
LATENCY = 0.05


async def choosing(num_live: int, limit: float) -> None:
    """The exact best 4 of the live experts for 2,048 rows, with a warm directory."""
    cells = list(itertools.product(*map(range, GRID)))
    random.Random(5).shuffle(cells)
    async with ta.TesseractNode() as node:
        publisher = ExpertPublisher(node.network, addresses=node.peer_address.addresses)
        await publisher.declare({f"ffn.{row}.{column}": True for row, column in cells[:num_live]})
        gate = ta.GatingFunction(
            node,
            uid_prefix="ffn",
            grid_size=GRID,
            in_features=WIDTH,
            k_best=K_BEST,
            settings=ta.MixtureSettings(forward_timeout=30.0),
        )
        batch = torch.randn(ROWS, WIDTH)
        seconds = []
        for _ in range(12):
            begin = time.perf_counter()
            chosen = await gate.choose(batch)
            seconds.append(time.perf_counter() - begin)
        assert all(len(row) == K_BEST for row in chosen)
        await publisher.aclose()
    name = f"choosing for {ROWS} rows among {num_live} live, 64x64 grid"
    emit(name, percentile(seconds[2:], 0.5) * 1e3, "ms", f"< {limit:g}", best_ms=min(seconds) * 1e3)


async def failures() -> None:
    """Training steps through a gate while 10 % of calls fail and 5 % hang, against clean ones. Calls take 50 ms."""
    grid = (4, 4)
    uids = [f"ffn.{row}.{column}" for row, column in itertools.product(*map(range, grid))]
    torch.manual_seed(3)
    async with hosting(uids, kind="nop", width=WIDTH) as node:
        rng = random.Random(3)
        gate = ta.GatingFunction(node, uid_prefix="ffn", grid_size=grid, in_features=WIDTH, k_best=K_BEST)
        times: dict[str, float] = {}
        num_lost = 0

        def script(method: str, uid: str) -> float | None:
            draw = rng.random()
            return None if draw < 0.1 else float("inf") if draw < 0.15 else LATENCY

        async def step() -> None:
            await ta.backward((await gate(torch.randn(64, WIDTH))).square().mean())

        for name, fate in (("clean", lambda method, uid: LATENCY), ("faulty", script)):
            node.fate = lambda method, uid: LATENCY
            for _ in range(5):
                await step()
            node.fate = fate
            for _ in range(5):  # the first that hang after a time in which all was well are waited for a second
                with contextlib.suppress(ta.errors.TesseractError):
                    await step()
            seconds = []
            for _ in range(NUM_STEPS):
                begin = time.perf_counter()
                try:
                    await step()
                except ta.errors.TesseractError:
                    num_lost += 1
                seconds.append(time.perf_counter() - begin)
            times[name] = sum(seconds) / len(seconds)
            times[f"{name}_worst"] = max(seconds)
        ratio = times["faulty"] / times["clean"]
        emit("10 % of calls fail, 5 % hang: step time / clean", ratio, "", "<= 1.5", **times, steps=NUM_STEPS)
        emit("10 % of calls fail, 5 % hang: steps lost", num_lost, "steps", "<= 0")


async def measure() -> None:
    await choosing(64, 10)
    await choosing(4096, 15)
    await failures()


def main() -> None:
    torch.set_num_threads(1)
    run_on("uvloop", measure())


if __name__ == "__main__":
    main()
