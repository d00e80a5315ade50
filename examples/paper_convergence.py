"""The paper's convergence experiment (Ryabinin & Gusev 2020, section 4.2) on the real stack.

Four mixture layers of 64 experts classify MNIST. Many steps are in flight at once, each delayed at random, and one
call in ten fails, forwards and backwards; the experts live in another process. Two controls train beside: the same
model with frozen experts, and a dense model of equal active size.

    python examples/paper_convergence.py --images t10k-images-idx3-ubyte.gz --labels t10k-labels-idx1-ubyte.gz

Everything is kept under --out: curves (CSV), settings (JSON), checkpoints, a plot (PNG; needs matplotlib). Ctrl-C
stops; the same command goes on where it was. The paper's own curve had no failures, untrained gates and experts of 6.3
million parameters; these have about 17 thousand each.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import contextvars
import csv
import gzip
import hashlib
import json
import random
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import tesseract_async as ta
from tesseract_async.errors import ExpertFailed

VARIANTS = ("trained", "frozen", "dense")
PUBLISHED = {5_120: 0.894, 10_240: 0.931, 20_480: 0.943}
"""Validation accuracy of the original implementation after so many updates; the full data set."""


# ------------------------------------------------------------------------------------------------ data


def read_idx(source: str) -> np.ndarray:
    """An array from a gzipped IDX file: a path, or a URL that ends in ``#sha256=...``."""
    if source.startswith(("http://", "https://")):
        url, _, wanted = source.partition("#sha256=")
        if not wanted:
            raise SystemExit(f"say what to expect: {url}#sha256=<64 hexadecimal digits>")
        packed = urllib.request.urlopen(url).read()
        if hashlib.sha256(packed).hexdigest() != wanted.lower():
            raise SystemExit(f"{url} is not what it should be: its SHA-256 is {hashlib.sha256(packed).hexdigest()}")
    else:
        packed = Path(source).read_bytes()
    raw = gzip.decompress(packed)
    num_dims = raw[3]
    shape = np.frombuffer(raw, ">i4", num_dims, offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * num_dims).reshape(shape)


def load_data(args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Training images and labels, validation images and labels; the split is the same for all seeds."""
    images = torch.from_numpy(read_idx(args.images).reshape(-1, 784).astype(np.float32))
    labels = torch.from_numpy(read_idx(args.labels).astype(np.int64))
    images = (images / 255 - 0.1307) / 0.3081
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, valid = order[: args.num_train], order[args.num_train : args.num_train + args.num_valid]
    return images[train], labels[train], images[valid], labels[valid]


def batches(num_rows: int, batch_size: int, seed: int, skip: int) -> Iterator[torch.Tensor]:
    """Row numbers, epoch after epoch; the first `skip` batches are left out."""
    generator = torch.Generator().manual_seed(seed)
    number = 0
    while True:
        order = torch.randperm(num_rows, generator=generator)
        for start in range(0, num_rows - batch_size + 1, batch_size):
            if number >= skip:
                yield order[start : start + batch_size]
            number += 1


# ------------------------------------------------------------------------------------------------ model


class Expert(nn.Module):
    """x + W2 relu(norm(W1 x)), nearly the identity at first."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.into, self.norm, self.out = nn.Linear(width, hidden), nn.LayerNorm(hidden), nn.Linear(hidden, width)
        with torch.no_grad():
            self.out.weight *= 0.01
            self.out.bias *= 0.01

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = x + self.out(F.relu(self.norm(self.into(x))))
        return result


class NormedLinear(nn.Linear):
    """Scores normalised inputs: the experts get the input itself."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.norm = nn.LayerNorm(in_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(self.norm(x))


class Model(nn.Module):
    """Pixels, mixture layers (or dense ones), classes."""

    def __init__(self, layers: list[nn.Module], width: int) -> None:
        super().__init__()
        self.into, self.layers = nn.Linear(784, width), nn.ModuleList(layers)
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, 10)

    async def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.into(x)
        for layer in self.layers:
            h = layer(h)
            if not isinstance(h, torch.Tensor):
                h = await h
        result: torch.Tensor = self.out(self.norm(h))
        return result


def make_model(args: argparse.Namespace, node: ta.TesseractNode | None, seed: int) -> tuple[Model, Any]:
    """The model and its optimizer; without a node, the dense one."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for i in range(args.layers):
        if node is None:
            layers.append(Expert(args.width, args.k_best * args.hidden))
            continue
        gate = ta.GatingFunction(
            node,
            uid_prefix=f"layer{i}",
            grid_size=(args.grid, args.grid),
            in_features=args.width,
            k_best=args.k_best,
            forward_timeout=60.0,
            backward_timeout=60.0,
            patience=100.0,  # the only experts that fail here say so
        )
        gate.proj = NormedLinear(args.width, 2 * args.grid)
        layers.append(gate)
    model = Model(layers, args.width)
    gates = [p for layer in layers if isinstance(layer, ta.GatingFunction) for p in layer.parameters()]
    trunk = [p for p in model.parameters() if all(p is not other for other in gates)]
    groups = [{"params": trunk, "lr": args.lr_trunk if node is not None else args.lr_dense}]
    groups += [{"params": gates, "lr": args.lr_gate}] if gates else []
    return model, torch.optim.Adam(groups, betas=(0.0, 0.999), amsgrad=True, foreach=False)


# ------------------------------------------------------------------------------------------------ the experts' process


async def serve(args: argparse.Namespace) -> None:
    """Hosts all experts and prints the address; ends when standard input does."""
    torch.set_num_threads(1)
    torch.manual_seed(1000 + args.seeds[0])
    experts = {}
    for uid in (f"layer{i}.{a}.{b}" for i in range(args.layers) for a in range(args.grid) for b in range(args.grid)):
        module = Expert(args.width, args.hidden)
        adam = None
        if args.serve == "trained":
            adam = torch.optim.Adam(module.parameters(), args.lr_expert, betas=(0.0, 0.999), amsgrad=True, fused=True)
        spec = ta.TensorSpec((args.width,))
        experts[uid] = ta.ExpertBackend(module, optimizer=adam, args_schema=(spec,), max_batch_size=args.num_valid)
    async with (
        ta.TesseractNode() as node,
        ta.TesseractServer(node, experts, checkpoint_dir=Path(args.run) / "experts", checkpoint_period=60.0),
    ):
        print(node.address, flush=True)
        await asyncio.to_thread(sys.stdin.read)


@contextlib.asynccontextmanager
async def experts_process(args: argparse.Namespace, variant: str, seed: int, run: Path) -> AsyncIterator[str]:
    """The address of a process that hosts the experts."""
    options = [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in SERVER_OPTIONS]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, __file__, "--serve", variant, "--run", str(run), "--seeds", str(seed), *options),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is for the trainer, which then tells the experts to save and leave
    )
    assert process.stdout is not None and process.stdin is not None
    try:
        address = (await process.stdout.readline()).decode().strip()
        if not address:
            raise SystemExit("the experts' process did not start")
        yield address
    finally:
        process.stdin.close()
        await process.wait()


SERVER_OPTIONS = ("layers", "grid", "width", "hidden", "num_valid", "lr_expert")


# ------------------------------------------------------------------------------------------------ the trainer's process

in_training = contextvars.ContextVar("in_training", default=False)


class UnreliableNode(ta.TesseractNode):
    """Loses a share of the calls that training makes, forwards and backwards, before they are sent."""

    failure_rate = 0.0
    dice = random.Random(0)

    async def call_expert(self, peer: Any, method: str, *args: Any, **kwargs: Any) -> Any:
        if in_training.get() and method != "expert.info" and self.dice.random() < self.failure_rate:
            raise ExpertFailed("lost on purpose")
        return await super().call_expert(peer, method, *args, **kwargs)


class Run:
    """One variant and seed: the curve so far, and all that is needed to go on."""

    def __init__(self, args: argparse.Namespace, variant: str, seed: int) -> None:
        self.args, self.variant, self.seed = args, variant, seed
        self.folder = Path(args.out) / f"{variant}-{seed}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.curve: list[tuple[int, float, float, float]] = []
        self.num_updates = 0

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        state |= {"curve": self.curve, "num_updates": self.num_updates}
        torch.save(state, self.folder / "trainer.new")
        (self.folder / "trainer.new").replace(self.folder / "trainer.pt")
        with (self.folder / "curve.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["updates", "validation_accuracy", "training_loss", "seconds"])
            writer.writerows(self.curve)

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        path = self.folder / "trainer.pt"
        if path.exists():
            state = torch.load(path, weights_only=True)
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            self.curve = [tuple(point) for point in state["curve"]]
            self.num_updates = state["num_updates"]

    def accuracy_at(self, updates: int) -> float | None:
        """The mean of the last four evaluations up to that point."""
        points = [accuracy for at, accuracy, _, _ in self.curve if at <= updates]
        done = bool(self.curve) and self.curve[-1][0] >= updates
        return sum(points[-4:]) / len(points[-4:]) if done else None


async def train(args: argparse.Namespace, run: Run, data: Any, address: str | None) -> None:
    """Trains to the end, evaluating and saving on the way."""
    train_x, train_y, valid_x, valid_y = data
    dice = random.Random(run.seed)
    async with contextlib.AsyncExitStack() as stack:
        node = None
        if address is not None:
            node = await stack.enter_async_context(UnreliableNode(initial_peers=[address]))
            node.failure_rate, node.dice = args.failure_rate, random.Random(run.seed + 1)
        model, optimizer = make_model(args, node, run.seed)
        run.load(model, optimizer)
        trainer = ta.AsyncTrainer(model, optimizer, in_flight=args.in_flight if node is not None else 1)

        async def loss_of(replica: Model, rows: torch.Tensor) -> torch.Tensor:
            in_training.set(True)
            loss = F.cross_entropy(await replica(train_x[rows]), train_y[rows])
            if node is not None:
                await asyncio.sleep(dice.expovariate(1.0) * args.delay * args.time_scale)
            return loss

        async def evaluate() -> float:
            with torch.no_grad():
                logits = await model(valid_x)
                return float((logits.argmax(1) == valid_y).float().mean())

        started, losses = time.perf_counter(), []
        before = run.curve[-1][3] if run.curve else 0.0
        rows = batches(len(train_x), args.batch_size, run.seed, run.num_updates)
        first = run.num_updates
        wanted = (next(rows) for _ in range(args.updates - first))
        try:
            async with contextlib.aclosing(trainer.run(loss_of, wanted)) as reports:
                async for report in reports:
                    run.num_updates = first + report.version
                    losses.append(report.loss.item())
                    if report.version == trainer.version and run.num_updates % args.evaluate_every == 0:
                        seconds = before + time.perf_counter() - started
                        point = (run.num_updates, await evaluate(), sum(losses) / len(losses), round(seconds, 1))
                        losses.clear()
                        run.curve.append(point)
                        run.save(model, optimizer)
                        print(
                            f"{run.variant} seed {run.seed}: {point[0]} updates, accuracy {point[1]:.4f}, "
                            f"loss {point[2]:.4f}, staleness {report.staleness}, {point[3]:.0f} s",
                            flush=True,
                        )
        finally:
            run.num_updates = first + trainer.version
            run.save(model, optimizer)


# ------------------------------------------------------------------------------------------------ what it came to


def summarize(args: argparse.Namespace, runs: list[Run]) -> None:
    """Prints the table, and saves it with the settings and the plot."""
    marks = [mark for mark in PUBLISHED if mark <= args.updates] or [args.updates]
    rows = []
    for variant in args.variants:
        row: list[Any] = [variant]
        for mark in marks:
            values = [run.accuracy_at(mark) for run in runs if run.variant == variant]
            row.append(None if None in values else round(sum(values) / len(values), 4))  # type: ignore[arg-type]
        rows.append(row)
    rows.append(["published (full data, no failures)", *(PUBLISHED.get(mark) for mark in marks)])
    out = Path(args.out)
    with (out / "summary.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["variant", *marks], *rows])
    (out / "settings.json").write_text(json.dumps(vars(args), indent=2, default=str))
    for row in [["variant", *marks], *rows]:
        print("  ".join(str(cell if cell is not None else "-").ljust(12) for cell in row))
    if args.no_plot:
        return
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt
    except ImportError:
        return
    figure, axes = plt.subplots(figsize=(8, 5))
    for run in runs:
        if run.curve:
            color = f"C{VARIANTS.index(run.variant)}"
            label = run.variant if run.seed == args.seeds[0] else None
            axes.plot([p[0] for p in run.curve], [p[1] for p in run.curve], color=color, alpha=0.7, label=label)
    axes.plot(list(PUBLISHED), list(PUBLISHED.values()), "k*", label="published: full data, no failures")
    axes.set(xlabel="updates", ylabel="validation accuracy", ylim=(0.5, 1.0), xlim=(0, args.updates))
    axes.legend(loc="lower right")
    axes.grid(alpha=0.3)
    figure.savefig(out / "curve.png", dpi=120)
    plt.close(figure)


async def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)  # batches are small: a second thread costs more than it gives
    data = load_data(args)
    runs = [Run(args, variant, seed) for seed in args.seeds for variant in args.variants]
    try:
        for run in runs:
            if run.variant == "dense":
                await train(args, run, data, None)
                continue
            async with experts_process(args, run.variant, run.seed, run.folder) as address:
                await train(args, run, data, address)
    finally:
        summarize(args, runs)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--images", help="gzipped IDX file of images: a path, or a URL ending in #sha256=...")
    add("--labels", help="the same for labels")
    add("--num-train", type=int, default=8_000)
    add("--num-valid", type=int, default=2_000)
    add("--out", default="paper_convergence", help="folder for curves, settings, checkpoints and the plot")
    add("--updates", type=int, default=20_480)
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    add("--in-flight", type=int, default=64)
    add("--batch-size", type=int, default=4)
    add("--delay", type=float, default=1.0, help="mean seconds of each step's exponential delay")
    add("--time-scale", type=float, default=1.0, help="multiplies the delay: 0.1 makes it ten times shorter")
    add("--failure-rate", type=float, default=0.1)
    add("--evaluate-every", type=int, default=256)
    add("--layers", type=int, default=4)
    add("--grid", type=int, default=8)
    add("--k-best", type=int, default=4)
    add("--width", type=int, default=64)
    add("--hidden", type=int, default=128)
    add("--lr-expert", type=float, default=1e-3)
    add("--lr-trunk", type=float, default=2e-4)
    add("--lr-gate", type=float, default=1e-4)
    add("--lr-dense", type=float, default=1e-3)
    add("--no-plot", action="store_true")
    add("--serve", choices=VARIANTS, help=argparse.SUPPRESS)
    add("--run", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve is None and not (args.images and args.labels):
        parser.error("--images and --labels are needed")
    return args


if __name__ == "__main__":
    arguments = parse()
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve(arguments) if arguments.serve else main(arguments))
