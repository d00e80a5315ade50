"""`tesseract serve --max-memory`: the process keeps to it while every expert trains with its largest batch."""

import asyncio

import psutil
import pytest
import torch

import tesseract_async as ta
from tests.cli.processes import event, tesseract
from tests.stem import Stem

LIMIT = 1100 << 20
WIDTH, ROWS = 256, 2048


@pytest.mark.slow
async def test_a_server_keeps_to_its_memory_limit(stem: Stem) -> None:
    arguments = ("--experts", "ffn.[0:500]", "--num-experts", "500", "--max-memory", f"{LIMIT}")
    sizes = ("--size", f"in_features={WIDTH}", "--max-batch-size", str(ROWS))
    async with tesseract(stem, "serve", *arguments, *sizes, fresh=True) as server:
        ready = await event(server, "ready")
        uids = ready["uids"]
        assert 0 < len(uids) < 500
        process = psutil.Process(server.pid)
        most = process.memory_info().rss

        async def watch() -> None:
            nonlocal most
            while True:
                most = max(most, process.memory_info().rss)
                await asyncio.sleep(0.01)

        watching = asyncio.create_task(watch())
        async with ta.TesseractNode(initial_peers=[ready["address"]]) as node:

            async def train(some: list[str]) -> None:
                for uid in some:
                    expert = await node.get_expert(uid)
                    for _ in range(2):
                        x = torch.randn(ROWS, WIDTH, requires_grad=True)
                        await ta.backward((await expert(x)).square().mean())

            await asyncio.gather(*(train(uids[number::4]) for number in range(4)))
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        print(f"{len(uids)} experts, at most {most >> 20} of {LIMIT >> 20} MiB")
        assert most <= LIMIT
        assert most >= 0.5 * LIMIT, "and it makes use of it"
