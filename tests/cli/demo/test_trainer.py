"""The demo's control, in one process: experts that learn reach 0.97, frozen ones do not reach 0.6."""

import asyncio
import os
from typing import Any

import pytest
import torch

import tesseract_async as ta
from tesseract_async.cli.demo import plan
from tesseract_async.cli.demo.trainer import train
from tesseract_async.server.registry import make_backend

LEARNING_RATE = 5e-3
"""Of the experts. With this and larger batches a ninth of the demo's steps is enough."""


async def accuracy_after_training(optimizer: str | None, steps: int) -> float:
    torch.manual_seed(0)
    experts = {
        uid: make_backend("ffn", optimizer=optimizer, learning_rate=LEARNING_RATE, sizes=plan.SIZES)
        for uid in plan.UIDS
    }
    reports: list[dict[str, Any]] = []
    async with ta.TesseractNode() as host, ta.TesseractServer(host, experts):

        def report(event: str, **facts: Any) -> None:
            reports.append({"event": event, **facts})

        # larger steps, and fewer: two processes less to share them with
        task = {
            "initial_peers": [host.address],
            "number": 0,
            "seed": 0,
            "steps": steps,
            "go_on": os.devnull,
            "num_trainers": 1,
        }
        await train(**task, report=report, rows=256, validate_every=steps, stay=lambda: asyncio.sleep(0))
    assert [one["event"] for one in (reports[0], reports[-1])] == ["ready", "done"]
    assert not any("error" in one for one in reports)
    accuracy = reports[-1]["accuracy"]
    assert isinstance(accuracy, float)
    return accuracy


@pytest.mark.slow
async def test_experts_that_learn_carry_the_accuracy() -> None:
    assert await accuracy_after_training("adam", 80) >= 0.97


@pytest.mark.slow
async def test_with_frozen_experts_the_gate_alone_learns_little() -> None:
    assert await accuracy_after_training(None, 40) < 0.6
