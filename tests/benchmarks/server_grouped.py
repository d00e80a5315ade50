"""Many small experts through the runtime in one pass, against the same one by one. Prints one JSON line per figure.

    python -m tests.benchmarks.server_grouped [--device cuda]

Both sides serve the same experts in one process and take turns, so that what else the machine does falls on both: one
side chooses its way by what it measured, the other never computes experts together. Beside them, how long one
expert's own call takes, at the 99th percentile, while others keep the device busy.
"""

import argparse
import asyncio
import contextlib
import statistics
import sys
import time
from collections.abc import AsyncIterator

import torch
from torch import nn

from tesseract_async.runtime.backend import ExpertBackend
from tesseract_async.runtime.runtime import RuntimeSettings, TesseractRuntime
from tesseract_async.wire.tensors import TensorSpec
from tests.benchmarks.figures import emit
from tests.computed import computed

NUM_PAIRS = 30
SIZES = [(64, 4, 64, 128), (64, 32, 64, 128), (16, 4, 64, 128), (64, 4, 256, 1024), (4, 64, 256, 1024)]
"""Experts, rows of each, width, inner width."""


class Side:
    """One runtime with its experts."""

    def __init__(self, num: int, width: int, inner: int, device: str, *, groups: bool) -> None:
        torch.manual_seed(0)
        self.runtime = TesseractRuntime(device=device, settings=RuntimeSettings(groups_experts=groups))
        self.experts: list[ExpertBackend] = []
        for _ in range(num):
            module = nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width)).to(device)
            optimizer = torch.optim.Adam(module.parameters(), lr=1e-4)
            self.experts.append(ExpertBackend(module, optimizer=optimizer, args_schema=(TensorSpec((width,)),)))
        self._number = 0

    async def once(self, x: torch.Tensor, *, trains: bool, peer: int = 0) -> None:
        """Let every expert compute these rows."""
        works = []
        with self.runtime.gathering():
            for one in self.experts:
                self._number += 1
                call_id = self._number.to_bytes(16, "big") if trains else None
                works.append(self.runtime.submit(one, [x], [x] if trains else None, call_id=call_id, peer=peer))
        for work in works:
            await work.answer


@contextlib.asynccontextmanager
async def sides(num: int, width: int, inner: int, device: str) -> AsyncIterator[list[Side]]:
    both = [Side(num, width, inner, device, groups=groups) for groups in (True, False)]
    for side in both:
        await side.runtime.start()
    try:
        yield both
    finally:
        for side in both:
            await side.runtime.aclose()


async def ratio(num: int, rows: int, width: int, inner: int, device: str, *, trains: bool) -> tuple[float, float, bool]:
    """How much faster the chosen way is; the other side's seconds; both in the median; and if it is together."""
    x = torch.randn(rows, width)
    async with sides(num, width, inner, device) as (chosen, alone):
        for _ in range(25):
            await chosen.once(x, trains=trains)
            await alone.once(x, trains=trains)
        pairs = []
        before = chosen.runtime.metrics.total("runtime_grouped_batches")
        for number in range(NUM_PAIRS):
            pair = [0.0, 0.0]
            for index in (0, 1) if number % 2 else (1, 0):
                started = time.perf_counter()
                await (chosen, alone)[index].once(x, trains=trains)
                pair[index] = time.perf_counter() - started
            pairs.append(pair)
        together = chosen.runtime.metrics.total("runtime_grouped_batches") - before
    ratios = [other / own for own, other in pairs]
    return statistics.median(ratios), statistics.median(other for _, other in pairs), together > num * NUM_PAIRS / 2


async def single_calls(device: str, *, seconds: float = 8.0) -> list[float]:
    """The 99th percentile of one expert's forwards, with company and without, while another peer trains 64 experts."""
    num, rows, width, inner = SIZES[0][0], SIZES[0][1], SIZES[0][2], SIZES[0][3]
    x = torch.randn(rows, width)
    waits: tuple[list[float], list[float]] = ([], [])
    async with sides(num, width, inner, device) as both:
        for _ in range(25):
            for side in both:
                await side.once(x, trains=True)
        until = time.perf_counter() + seconds
        turn = 0
        while time.perf_counter() < until:
            turn += 1
            side, own = both[turn % 2], waits[turn % 2]
            load = asyncio.create_task(side.once(x, trains=True, peer=1))
            while not load.done():
                started = time.perf_counter()
                await computed(side.runtime, side.experts[0], [x], peer=2)
                own.append(time.perf_counter() - started)
            await load
    return [statistics.quantiles(own, n=100)[98] for own in waits]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    device = parser.parse_args().device
    if device != "cpu" and not torch.cuda.is_available():
        sys.stderr.write("skipped: this machine has no CUDA device\n")
        return
    for num, rows, width, inner in SIZES:
        for trains in (False, True):
            found, seconds, together = asyncio.run(ratio(num, rows, width, inner, device, trains=trains))
            wanted = 1.0
            if (num, rows) == (64, 4) and width == 64:
                wanted = (8.0 if trains else 5.0) if device != "cpu" else 1.4 if trains else 1.0
            name = f"{num} experts x {rows} rows, {width} -> {inner}, {'training' if trains else 'forward'}, {device}"
            emit(f"{name}: one by one / chosen way", found, "", f">= {wanted:g}", ms=seconds * 1e3, together=together)
    own, other = asyncio.run(single_calls(device))
    emit(f"p99 of one expert's call beside a peer that trains 64, {device}", own * 1e3, "ms", alone=other * 1e3)


if __name__ == "__main__":
    main()
