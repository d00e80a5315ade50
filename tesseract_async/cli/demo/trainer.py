"""One trainer of the demo, a process of its own: ``python -m tesseract_async.cli.demo.trainer '{"seed": 0, ...}'``.

It holds nothing that learns but its gate, which it shares with the other trainers: pixels go into the mixture, and
logits come out. So any accuracy beyond that of a gate over random experts is what the experts learned. The accuracy is
that of the gate that all trainers made together.

It reports in lines of JSON on standard output: ``ready``, one ``step`` after the other, ``done``.
"""

import asyncio
import contextlib
import hashlib
import json
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import torch
from torch.nn import functional as F

import tesseract_async as ta
from tesseract_async.cli.demo import plan
from tesseract_async.cli.running import run_command, say, set_up_logging, until_told_to_leave
from tesseract_async.client.progress import ProgressOf
from tesseract_async.errors import TesseractError
from tesseract_async.monitoring import publish_progress

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
"""Seconds that a trainer waits at most for the killed server, and at the end for the others' last steps."""


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
    num_trainers: int = plan.NUM_TRAINERS,
    stay: Callable[[], Awaitable[object]] = until_told_to_leave,
) -> int:
    """Join the swarm, train, and report until all steps are taken. Returns the exit status.

    `number`: which trainer it is: each draws its own batches. `go_on`: at `WAIT_AT`, the trainer waits until all
    experts live and this file exists. `stay`: awaited at the end, while others may need what is hosted here.
    """
    wait_at = max(1, round(plan.WAIT_AT * steps))
    x_train, y_train, x_val, y_val = load_digits()
    torch.manual_seed(seed * 1000 + number)
    node = ta.TesseractNode(initial_peers=initial_peers, refresh_period=plan.REFRESH_PERIOD)
    async with node, contextlib.AsyncExitStack() as stack:
        gate = ta.GatingFunction(
            node, uid_prefix=plan.PREFIX, grid_size=plan.GRID_SIZE, in_features=plan.NUM_PIXELS, k_best=plan.K_BEST
        )
        progress = ProgressOf(gate, trainer=f"trainer {number + 1}", period=PUBLISH_PERIOD)
        await stack.enter_async_context(contextlib.aclosing(progress))
        optimizer = torch.optim.Adam(gate.parameters(), lr=plan.GATE_LEARNING_RATE)
        node.directory.watch(plan.PREFIX, plan.GRID_SIZE)
        await node.directory.wait_warm(plan.PREFIX)
        # the first trainer begins the run, and hosts what is shared
        sharing = ta.SharedParameters(node, gate, run=plan.PREFIX, every=plan.SHARE_EVERY, host=number == 0)
        shared = await stack.enter_async_context(sharing)
        report("ready")

        async def accuracy() -> float:
            with torch.no_grad():
                logits = await shared.merged()(x_val)
            if number == 0:
                loss = F.cross_entropy(logits, y_val).item()
                with contextlib.suppress(TesseractError, TimeoutError):  # it is for onlookers only
                    await publish_progress(node, plan.PREFIX, step=shared.steps, loss=loss, trainer="merged")
            return float((logits.argmax(1) == y_val).float().mean())

        for step in range(1, steps + 1):
            if step == wait_at:
                await wait_for_everybody(node, Path(go_on).exists)
            batch = torch.randint(0, len(x_train), (rows,))
            x, y = x_train[batch], y_train[batch]
            x = x + plan.NOISE * torch.randn_like(x)
            facts: plan.Facts = {"step": step}
            try:
                loss = F.cross_entropy(await gate(x), y)
                optimizer.zero_grad()
                await ta.backward(loss)
                optimizer.step()
                facts["loss"] = loss.item()
                progress.add(step, facts["loss"], {"samples": step * rows})
                if step % validate_every == 0:
                    facts["accuracy"] = await accuracy()
            except (TesseractError, TimeoutError) as error:
                # too many experts vanished at once: the next step finds others
                facts["error"] = f"{type(error).__name__}: {error}"
            await shared.step()  # also after a lost one: so all know how many there will be
            facts["num_calls"] = int(node.metrics.total("expert_calls"))
            view = node.directory.live(plan.PREFIX)
            facts["live"] = [] if view is None else [view.uid(row) for row in range(len(view))]
            report("step", **facts)
        await flush_all(shared, num_trainers * steps)
        model = b"".join(one.numpy().tobytes() for one in shared.merged().state_dict().values())
        report("done", accuracy=await accuracy(), model=hashlib.sha256(model).hexdigest())
        await stay()
    return 0


async def flush_all(shared: ta.SharedParameters[ta.GatingFunction], num_steps: int) -> None:
    """Return once all steps of all trainers count and are here, or after `WAIT_FOR_EVERYBODY` seconds."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(WAIT_FOR_EVERYBODY):
            await shared.flush()
            while shared.steps < num_steps:
                await asyncio.sleep(0.1)
                await shared.flush()


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
    run_command(lambda: train(**given), leave_with_parent=True)
