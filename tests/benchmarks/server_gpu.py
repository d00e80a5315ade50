"""Rows/s of a wide expert through the runtime, against a plain loop on the same GPU. Prints one JSON line.

python -m tests.benchmarks.server_gpu
"""

import asyncio
import statistics
import sys
import time

import torch
from torch import nn

from tesseract_async.runtime.backend import ExpertBackend
from tesseract_async.runtime.runtime import TesseractRuntime
from tesseract_async.wire.tensors import TensorSpec
from tests.benchmarks.figures import emit
from tests.computed import computed

WIDTH, ROWS, ROUNDS = 4096, 2048, 40
NAME = f"rows/s against a plain loop on the same GPU, ffn {WIDTH} wide, batches of {ROWS}, transfers included"


def plain(module: nn.Module, rows: torch.Tensor) -> float:
    """Seconds per batch of a loop that copies up, computes and copies back."""
    for timed in (False, True):
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(ROUNDS if timed else 5):
            with torch.no_grad():
                module(rows.to("cuda")).cpu()
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / ROUNDS


async def ours(backend: ExpertBackend, rows: torch.Tensor) -> float:
    runtime = TesseractRuntime(device="cuda")
    await runtime.start()
    try:

        async def client(rounds: int) -> None:
            for _ in range(rounds):
                await computed(runtime, backend, [rows])

        await client(5)
        started = time.perf_counter()
        await asyncio.gather(*(client(ROUNDS // 4) for _ in range(4)))
        return (time.perf_counter() - started) / ROUNDS
    finally:
        await runtime.aclose()


def main() -> None:
    if not torch.cuda.is_available():
        sys.stderr.write("skipped: this machine has no CUDA device\n")
        return
    module = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)).cuda()
    backend = ExpertBackend(module, args_schema=(TensorSpec((WIDTH,)),), max_batch_size=ROWS)
    rows = torch.randn(ROWS, WIDTH)
    shares = [plain(module, rows) / asyncio.run(ours(backend, rows)) for _ in range(5)]
    emit(NAME, statistics.median(shares), "share", ">= 0.9")


if __name__ == "__main__":
    main()
