"""The demo's control, in one process: experts that learn reach 0.97, frozen ones do not reach 0.6."""

from __future__ import annotations

import os
from typing import Any

import torch

import tesseract_async as ta
from tesseract_async.cli.demo import plan
from tesseract_async.cli.demo.trainer import train
from tesseract_async.server.registry import make_backend

SETTINGS = plan.DemoSettings()
LEARNING_RATE = 5e-3
"""Of the experts. With this and larger batches a sixth of the demo's steps is enough."""
SIZES = {
    "in_features": plan.NUM_PIXELS,
    "hidden_features": SETTINGS.hidden_features,
    "out_features": plan.NUM_CLASSES,
}


async def accuracy_after_training(optimizer: str | None, steps: int) -> float:
    torch.manual_seed(0)
    experts = {
        uid: make_backend("ffn", optimizer=optimizer, learning_rate=LEARNING_RATE, sizes=SIZES)
        for uid in plan.all_uids()
    }
    reports: list[dict[str, Any]] = []
    async with ta.TesseractNode() as host, ta.TesseractServer(host, experts):
        task = plan.TrainerTask(
            initial_peers=[host.address],
            number=0,
            seed=0,
            steps=steps,
            rows=256,  # larger steps, and fewer: two processes less to share them with
            noise=SETTINGS.noise,
            k_best=SETTINGS.k_best,
            gate_learning_rate=SETTINGS.gate_learning_rate,
            wait_at=1,
            go_on=os.devnull,
            validate_every=steps,
            refresh_period=SETTINGS.refresh_period,
        )
        await train(task, report=lambda event, **facts: reports.append({"event": event, **facts}))
    assert [report["event"] for report in (reports[0], reports[-1])] == ["ready", "done"]
    assert not any("error" in report for report in reports)
    accuracy = reports[-2]["accuracy"]
    assert isinstance(accuracy, float)
    return accuracy


async def test_experts_that_learn_carry_the_accuracy() -> None:
    assert await accuracy_after_training("adam", 90) >= 0.97


async def test_with_frozen_experts_the_gate_alone_learns_little() -> None:
    assert await accuracy_after_training(None, 40) < 0.6
