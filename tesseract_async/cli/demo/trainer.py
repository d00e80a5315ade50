"""One trainer of the demo, a process of its own: ``python -m tesseract_async.cli.demo.trainer '{"seed": 0, ...}'``.

It holds nothing that learns but its gate: pixels go into the mixture, and what comes out are the logits. So whatever
accuracy it reaches beyond what a gate over random experts does, the experts learned.

It reports in lines of JSON on standard output: ``ready``, one ``step`` after the other, ``done``.
"""

import asyncio
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

import tesseract_async as ta
from tesseract_async.cli.demo import plan
from tesseract_async.cli.running import run, say, set_up_logging
from tesseract_async.errors import TesseractError, describe
from tesseract_async.monitoring import publish_progress

logger = logging.getLogger(__name__)

PUBLISH_PERIOD = 1.0
"""Seconds between two publications of the loss."""

Digits = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def load_digits() -> Digits:
    """Return scikit-learn's 1,797 handwritten digits, shuffled: pixels and labels to train (80 %) and validate on."""
    from sklearn.datasets import load_digits as load

    pixels, labels = load(return_X_y=True)
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(pixels, dtype=torch.float32)[order]
    x = (x - x.mean()) / x.std()
    y = torch.tensor(labels, dtype=torch.int64)[order]
    cut = int(0.8 * len(x))
    return x[:cut], y[:cut], x[cut:], y[cut:]


WAIT_FOR_EVERYBODY = 30.0
"""Seconds that a trainer waits at most for the killed server."""


async def train(
    *,
    initial_peers: list[str],
    number: int,
    seed: int,
    steps: int,
    go_on: str,
    report: Callable[..., None] = say,
    rows: int = plan.ROWS,
    validate_every: int = plan.VALIDATE_EVERY,
) -> int:
    """Join the swarm, train, and report until all steps are taken. Returns the exit status.

    `number`: which trainer it is: each draws its own batches. `go_on`: at `WAIT_AT`, the trainer waits until all
    experts live and this file exists.
    """
    wait_at = max(1, round(plan.WAIT_AT * steps))
    x_train, y_train, x_val, y_val = load_digits()
    torch.manual_seed(seed * 1000 + number)
    node = ta.TesseractNode(initial_peers=initial_peers, refresh_period=plan.REFRESH_PERIOD)
    losses: list[tuple[int, float]] = []
    async with node, asyncio.TaskGroup() as group:
        publishing = group.create_task(publish_losses(node, f"trainer {number + 1}", losses))
        gate = ta.GatingFunction(
            node, uid_prefix=plan.PREFIX, grid_size=plan.GRID_SIZE, in_features=plan.NUM_PIXELS, k_best=plan.K_BEST
        )
        optimizer = torch.optim.Adam(gate.parameters(), lr=plan.GATE_LEARNING_RATE)
        node.directory.watch(plan.PREFIX, plan.GRID_SIZE)
        await node.directory.wait_warm(plan.PREFIX)
        report("ready")

        for step in range(1, steps + 1):
            if step == wait_at:
                await wait_for_everybody(node, Path(go_on).exists)
            batch = torch.randint(0, len(x_train), (rows,))
            x, y = x_train[batch], y_train[batch]
            x = x + plan.NOISE * torch.randn_like(x)
            facts: dict[str, Any] = {"step": step}
            try:
                loss = F.cross_entropy(await gate(x), y)
                optimizer.zero_grad()
                await ta.backward(loss)
                optimizer.step()
                facts["loss"] = loss.item()
                losses.append((step, facts["loss"]))
                if step % validate_every == 0 or step == steps:
                    with torch.no_grad():
                        logits = await gate(x_val)
                    facts["accuracy"] = (logits.argmax(1) == y_val).float().mean().item()
            except (TesseractError, TimeoutError) as error:
                # too many experts vanished at once: the next step finds others
                facts["error"] = f"{type(error).__name__}: {error}"
            facts["num_calls"] = int(node.metrics.total("expert_calls"))
            view = node.directory.live(plan.PREFIX)
            facts["live"] = [] if view is None else [view.uid(row) for row in range(len(view))]
            report("step", **facts)
        publishing.cancel()
        report("done")
    return 0


async def publish_losses(node: ta.TesseractNode, trainer: str, losses: list[tuple[int, float]]) -> None:
    """Let `tesseract top` and the dashboard show the mean loss since the last time, until cancelled."""
    while True:
        await asyncio.sleep(PUBLISH_PERIOD)
        if not losses:
            continue
        step, mean = losses[-1][0], sum(loss for _, loss in losses) / len(losses)
        losses.clear()
        try:
            await publish_progress(node, plan.PREFIX, step=step, loss=mean, trainer=trainer)
        except (TesseractError, TimeoutError) as error:
            logger.info("the loss could not be published: %s", describe(error))


async def wait_for_everybody(node: ta.TesseractNode, may_go_on: Callable[[], bool]) -> None:
    """Return once all experts live and `may_go_on` says so, or after `WAIT_FOR_EVERYBODY` seconds.

    On a fast machine the steps are taken before Python has started again on the server that was killed; but that it
    takes part again is what the demo shows. The directory alone can't tell: it shows a killed server's experts as
    living until their manifest expires.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + WAIT_FOR_EVERYBODY
    while loop.time() < deadline:
        view = node.directory.live(plan.PREFIX)
        if view is not None and len(view) == len(plan.UIDS) and may_go_on():
            return
        await asyncio.sleep(0.1)


if __name__ == "__main__":
    set_up_logging()
    given = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    run(lambda: train(**given), leave_with_parent=True)
