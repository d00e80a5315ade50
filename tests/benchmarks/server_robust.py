"""Trimmed means over trainers: what one in four who negates its gradients costs, and what honest ones pay for it.

The demo's task (digits, a 4 x 4 grid of small experts, a gate for each trainer) with four trainers in one process, each
a node of its own. Compared is the honest trainers' validation loss at the end, over three seeds. Then, alone, the time
of one step of an expert that gathers four peers' gradients, with trimming and without.
"""

import asyncio
import contextlib
import dataclasses
import statistics
import time

import torch
from torch.nn import functional as F

import tesseract_async as ta
from tesseract_async.cli.demo import plan
from tesseract_async.cli.demo.trainer import load_digits
from tesseract_async.errors import TesseractError
from tesseract_async.runtime.backend import BackendSettings
from tests.benchmarks.figures import emit
from tests.benchmarks.modules import FeedForward
from tests.benchmarks.swarm import run_on

STEPS = 250
TRAINERS = 4
SEEDS = (0, 1, 2)
PLAIN = BackendSettings(step_every=TRAINERS)
TRIMMED = dataclasses.replace(PLAIN, trim_peers=1 / TRAINERS)


def make_backend(seed: int, settings: BackendSettings) -> ta.ExpertBackend:
    """One expert of the demo."""
    torch.manual_seed(seed)
    sizes = plan.SIZES
    module = torch.nn.Sequential(
        torch.nn.Linear(sizes["in_features"], sizes["hidden_features"]),
        torch.nn.GELU(),
        torch.nn.Linear(sizes["hidden_features"], sizes["out_features"]),
    )
    return ta.ExpertBackend(
        module,
        optimizer=torch.optim.Adam(module.parameters(), lr=plan.EXPERT_LEARNING_RATE),
        args_schema=(ta.TensorSpec((plan.NUM_PIXELS,)),),
        settings=settings,
    )


async def loss_of(seed: int, settings: BackendSettings, *, honest: int, flipping: int) -> float:
    """The honest trainers' mean validation loss after `STEPS` steps of each."""
    x_train, y_train, x_val, y_val = load_digits()
    backends = {uid: make_backend(seed * 100 + n, settings) for n, uid in enumerate(plan.all_uids())}
    async with contextlib.AsyncExitStack() as stack:
        host = await stack.enter_async_context(ta.TesseractNode())
        await stack.enter_async_context(ta.TesseractServer(host, backends))

        async def train(number: int, sign: float) -> float:
            node = await stack.enter_async_context(ta.TesseractNode(initial_peers=[host.address]))
            random = torch.Generator().manual_seed(seed * 1000 + number)
            gate = ta.GatingFunction(
                node,
                uid_prefix=plan.PREFIX,
                grid_size=plan.GRID_SIZE,
                in_features=plan.NUM_PIXELS,
                k_best=plan.K_BEST,
            )
            optimizer = torch.optim.Adam(gate.parameters(), lr=plan.GATE_LEARNING_RATE)
            for _ in range(STEPS):
                batch = torch.randint(0, len(x_train), (plan.ROWS,), generator=random)
                x = x_train[batch] + plan.NOISE * torch.randn(plan.ROWS, plan.NUM_PIXELS, generator=random)
                with contextlib.suppress(TesseractError, TimeoutError):
                    optimizer.zero_grad()
                    await ta.backward(sign * F.cross_entropy(await gate(x), y_train[batch]))
                    optimizer.step()
            with torch.no_grad():
                return F.cross_entropy(await gate(x_val), y_val).item()

        signs = [1.0] * honest + [-1.0] * flipping
        losses = await asyncio.gather(*(train(number, sign) for number, sign in enumerate(signs)))
    return statistics.mean(losses[:honest])


def step_seconds(settings: BackendSettings, *, repeats: int = 15) -> list[float]:
    """A step of one expert: four peers' backwards of 64 rows, the merging, and Adam."""
    torch.manual_seed(0)
    module = FeedForward(1024)
    backend = ta.ExpertBackend(
        module,
        optimizer=torch.optim.Adam(module.parameters()),
        args_schema=(ta.TensorSpec((1024,)),),
        settings=settings,
    )
    x, gradient = torch.randn(64, 1024), torch.randn(64, 1024)
    found = []
    for _ in range(repeats):
        begun = time.perf_counter()
        for peer in range(TRAINERS):
            backend.step(backend.gradients([x], [gradient])[1], peer=peer)
        found.append(time.perf_counter() - begun)
    assert backend.version == repeats
    return found


async def measure() -> None:
    losses: dict[str, list[float]] = {}
    for seed in SEEDS:
        for name, settings, honest, flipping in (
            ("honest, plain", PLAIN, TRAINERS, 0),
            ("honest, trimmed", TRIMMED, TRAINERS, 0),
            ("one flips, trimmed", TRIMMED, TRAINERS - 1, 1),
            ("one flips, plain", PLAIN, TRAINERS - 1, 1),
        ):
            losses.setdefault(name, []).append(await loss_of(seed, settings, honest=honest, flipping=flipping))
    mean = {name: statistics.mean(some) for name, some in losses.items()}
    base = mean["honest, plain"]
    for name, asked in (("honest, trimmed", None), ("one flips, trimmed", "<= 1.08"), ("one flips, plain", None)):
        emit(f"validation loss, {name} / honest, plain", mean[name] / base, "", asked, losses=losses)
    pairs = [(step_seconds(TRIMMED, repeats=3), step_seconds(PLAIN, repeats=3)) for _ in range(10)]
    ratio = statistics.median(min(trimmed) / min(plain) for trimmed, plain in pairs)
    emit("a step of four peers' gradients, trimmed / plain", ratio, "", "<= 1.1")


def main() -> None:
    run_on("uvloop", measure())


if __name__ == "__main__":
    main()
