"""A stranger who asks for much, urgently and with high priority, next to an honest trainer: real nodes, one server."""

import asyncio
import contextlib
import threading

import pytest
import torch
from torch import nn

import tesseract_async as ta
from tesseract_async.errors import TesseractError

ROWS = 64
NUM_HONEST = 10


class Slow(nn.Module):
    """Takes 5 ms a batch, and notes whose rows it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[set[float]] = []
        self.pause = threading.Event()
        self.saw_greed = threading.Event()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.pause.wait(0.005)
        if x[0, 0] == 2.0:
            self.saw_greed.set()
        self.batches.append(set(x[:, 0].tolist()))
        return x * 1.0


async def ask_often(expert: ta.RemoteExpert, x: torch.Tensor) -> None:
    for _ in range(NUM_HONEST):
        await expert(x)


GREED = [
    {},
    {"timeout": 0.19, "priority": 1},
    pytest.param({"priority": 1}, marks=pytest.mark.slow),
    pytest.param({"timeout": 0.19}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("greed", GREED, ids=str)
async def test_an_honest_trainer_gets_its_share(greed: dict[str, float]) -> None:
    module = Slow()
    backend = ta.ExpertBackend(module, args_schema=(ta.TensorSpec((4,)),), max_batch_size=ROWS)
    async with ta.TesseractNode() as host, ta.TesseractServer(host, {"slow.0": backend}):
        async with ta.TesseractNode(initial_peers=[host.address]) as honest:
            async with ta.TesseractNode(initial_peers=[host.address]) as greedy:
                mine, theirs = await honest.get_expert("slow.0"), await greedy.get_expert("slow.0")
                if greed:
                    theirs = theirs.with_options(**greed)  # type: ignore[arg-type]
                much = torch.full((ROWS, 4), 2.0)

                async def ask() -> None:
                    while True:
                        with contextlib.suppress(TesseractError, TimeoutError):
                            await theirs(much)

                asking = [asyncio.create_task(ask()) for _ in range(24)]
                await asyncio.to_thread(module.saw_greed.wait)
                start = len(module.batches)
                own = torch.full((ROWS, 4), 1.0)
                async with asyncio.TaskGroup() as group:
                    for _ in range(8):
                        group.create_task(ask_often(mine, own))
                seen = module.batches[start:]
                for task in asking:
                    task.cancel()
                await asyncio.gather(*asking, return_exceptions=True)
    num_honest = sum(1.0 in batch for batch in seen)
    assert len(seen) - num_honest <= 1.5 * num_honest + 20, "others took the device"
