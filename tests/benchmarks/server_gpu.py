"""Rows/s of a wide expert through the runtime, against a plain loop on the same GPU. Prints one JSON line.

python -m tests.benchmarks.server_gpu
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from typing import Any

import torch
from torch import nn

from tesseract_async.runtime.backend import ExpertBackend
from tesseract_async.runtime.runtime import TesseractRuntime
from tesseract_async.wire.tensors import TensorSpec

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
                await runtime.forward(backend, [rows])

        await client(5)
        started = time.perf_counter()
        await asyncio.gather(*(client(ROUNDS // 4) for _ in range(4)))
        return (time.perf_counter() - started) / ROUNDS
    finally:
        await runtime.aclose()


def main() -> None:
    asked = ">= 0.9"
    if not torch.cuda.is_available():
        line: dict[str, Any] = {
            "name": NAME,
            "value": None,
            "unit": "share",
            "asked": asked,
            "skipped": "no CUDA device",
        }
        print(json.dumps(line))
        return
    module = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)).cuda()
    backend = ExpertBackend(module, args_schema=(TensorSpec((WIDTH,)),), max_batch_size=ROWS)
    rows = torch.randn(ROWS, WIDTH)
    shares = [plain(module, rows) / asyncio.run(ours(backend, rows)) for _ in range(5)]
    print(json.dumps({"name": NAME, "value": round(statistics.median(shares), 4), "unit": "share", "asked": asked}))


if __name__ == "__main__":
    main()
