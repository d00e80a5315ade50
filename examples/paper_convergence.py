"""The paper's convergence experiment (Ryabinin & Gusev 2020, section 4.2) on the real stack.

Four mixture layers of 64 experts classify MNIST. Many steps are in flight at once, each delayed at random, and one
call in ten fails, forwards and backwards; the experts live in another process. There are two controls: the same
model with frozen experts, and a dense model of equal active size.

    python examples/paper_convergence.py --images t10k-images-idx3-ubyte.gz --labels t10k-labels-idx1-ubyte.gz

Everything is kept under --out: curves (CSV), settings (JSON), checkpoints, a plot (PNG; needs matplotlib). Ctrl-C
stops it; the same command resumes it. `--out FOLDER --summarize DOCS` only writes table, curves and plot of existing
results: for the documentation, with `--summarize docs/data/paper_convergence --page docs/paper-experiment.md`.

The paper's own curve had no failures, untrained gates and experts of 6.3 million parameters; these have about 17
thousand each.
"""

import argparse
import asyncio
import contextlib
import contextvars
import copy
import csv
import gc
import gzip
import hashlib
import itertools
import json
import os
import random
import sys
import time
import urllib.request
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import tesseract_async as ta
from tesseract_async.endpoint.endpoint import Message
from tesseract_async.errors import ExpertFailed
from tesseract_async.wire.apply import ApplyPart, decode_part, decode_request, encode_part, encode_request

VARIANTS = ("trained", "frozen", "dense")
PUBLISHED = {5_120: 0.894, 10_240: 0.931, 20_480: 0.943}
"""Validation accuracy of the original implementation after so many updates; the full data set."""


def read_idx(source: str) -> np.ndarray:
    """Read an array from a gzipped IDX file: a path, or a URL that ends in ``#sha256=...``."""
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
    """Return training images and labels, validation images and labels; the split is the same for all seeds."""
    images = torch.from_numpy(read_idx(args.images).reshape(-1, 784).astype(np.float32))
    labels = torch.from_numpy(read_idx(args.labels).astype(np.int64))
    images = (images / 255 - 0.1307) / 0.3081
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, valid = order[: args.num_train], order[args.num_train : args.num_train + args.num_valid]
    return images[train], labels[train], images[valid], labels[valid]


def batches(num_rows: int, batch_size: int, seed: int, skip: int) -> Iterator[torch.Tensor]:
    """Yield row numbers, epoch after epoch, without the first `skip` batches."""
    generator = torch.Generator().manual_seed(seed)
    number = 0
    while True:
        order = torch.randperm(num_rows, generator=generator)
        for start in range(0, num_rows - batch_size + 1, batch_size):
            if number >= skip:
                yield order[start : start + batch_size]
            number += 1


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
    """A gate that scores normalized inputs; the experts get the input itself."""

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
            settings=ta.MixtureSettings(
                forward_timeout=60.0,
                backward_timeout=60.0,
                patience=100.0,  # the only experts that fail here say so
            ),
        )
        gate.proj = NormedLinear(args.width, 2 * args.grid)
        layers.append(gate)
    model = Model(layers, args.width)
    gates = [p for layer in layers if isinstance(layer, ta.GatingFunction) for p in layer.parameters()]
    trunk = [p for p in model.parameters() if all(p is not other for other in gates)]
    groups = [{"params": trunk, "lr": args.lr_trunk if node is not None else args.lr_dense}]
    groups += [{"params": gates, "lr": args.lr_gate}] if gates else []
    return model, torch.optim.Adam(groups, betas=(0.0, 0.999), amsgrad=True, foreach=False)


# The experts' process


async def serve(args: argparse.Namespace) -> None:
    """Host all experts and print the address; end when standard input does."""
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
        spare_the_collector()
        print(node.address, flush=True)
        stdin = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(stdin), sys.stdin)
        await stdin.read()


@contextlib.asynccontextmanager
async def experts_process(args: argparse.Namespace, variant: str, seed: int, run: Path) -> AsyncIterator[str]:
    """Enter with the address of a process that hosts the experts."""
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


# The trainer's process

in_training = contextvars.ContextVar("in_training", default=False)


class UnreliableNode(ta.TesseractNode):
    """Lose a share of the calls that training makes, forwards and backwards, before they are sent."""

    failure_rate = 0.0
    dice = random.Random(0)
    num_calls = 0

    async def apply_experts(
        self, peer: Any, uids: Sequence[str], body: Any, buffers: Sequence[Any], **options: Any
    ) -> AsyncGenerator[Message, None]:
        """As if each expert were asked by itself: those that are lost are left out of the message."""
        request, tensors = decode_request(body, [memoryview(buffer) for buffer in buffers])
        is_sent = np.ones(len(uids), dtype=bool)
        if in_training.get():
            self.num_calls += len(uids)
            is_sent[:] = [self.dice.random() >= self.failure_rate for _ in uids]
        places, lost = np.flatnonzero(is_sent), np.flatnonzero(~is_sent)
        if len(lost):
            none, failures = np.empty(0, dtype=np.int64), [(int(at), ExpertFailed("lost on purpose")) for at in lost]
            part = ApplyPart(none, none, none, failures, [], none.astype(np.float32))
            yield Message(*encode_part(part, backward=request.backward))
        if not len(places):
            return
        pairs, lengths = request.pairs(places), np.diff(request.offsets)[places]
        sent = request._replace(
            experts=request.experts[places],
            ids=[request.ids[at] for at in places],
            versions=request.versions[places],
            offsets=np.concatenate([[0], np.cumsum(lengths)]),
            rows=request.rows[pairs],
            weights=request.weights[pairs],
        )
        body, numbers = encode_request(sent)
        parts = super().apply_experts(peer, [uids[at] for at in places], body, (*numbers, *tensors), **options)
        async with contextlib.aclosing(parts):
            async for message in parts:
                part, sums = decode_part(message.body, message.buffers, sent)
                failures = [(int(places[at]), error) for at, error in part.failures]
                body, numbers = encode_part(
                    part._replace(experts=places[part.experts], failures=failures), backward=request.backward
                )
                yield Message(body, (*numbers, *sums))


NO_SETTINGS = ("images", "labels", "out", "seeds", "variants", "no_plot", "summarize", "page", "serve", "run")


class Run:
    """One variant and seed: the curve so far, and all that is needed to go on."""

    def __init__(self, args: argparse.Namespace, variant: str, seed: int) -> None:
        self.variant, self.seed = variant, seed
        self.folder = Path(args.out) / f"{variant}-{seed}"
        self.curve: list[tuple[int, float, float, float]] = []
        """Number of updates, validation accuracy, mean training loss since the last point, seconds."""
        self.num_updates = 0
        self.num_calls = 0
        """Calls to experts during training, failed ones included."""
        self.num_updates_uncounted = 0
        """Updates before the calls were counted."""
        self.snapshots: dict[int, Any] = {}
        """By number of updates: the states of models still to be evaluated."""
        self.settings: dict[str, Any] = {k: v for k, v in vars(args).items() if k not in NO_SETTINGS}
        self.state: dict[str, Any] | None = None
        if (self.folder / "trainer.pt").exists():
            self.state = torch.load(self.folder / "trainer.pt", weights_only=True)
            self.curve = [tuple(point) for point in self.state["curve"]]
            self.num_updates = self.state["num_updates"]
            self.num_updates_uncounted = self.num_updates
            for name in ("num_calls", "num_updates_uncounted", "snapshots", "settings"):
                setattr(self, name, self.state.get(name, getattr(self, name)))

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Restore the model and its optimizer to where the run stopped, if it had begun."""
        if self.state is not None:
            model.load_state_dict(self.state["model"])
            optimizer.load_state_dict(self.state["optimizer"])

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        names = ("curve", "num_updates", "num_calls", "num_updates_uncounted", "snapshots", "settings")
        state |= {name: getattr(self, name) for name in names}
        torch.save(state, self.folder / "trainer.new")
        (self.folder / "trainer.new").replace(self.folder / "trainer.pt")
        write_csv(self.folder / "curve.csv", ["updates", "validation_accuracy", "training_loss", "seconds"], self.curve)

    def accuracy_at(self, updates: int) -> float | None:
        """Return the mean of the last four evaluations up to that point; None while one of them is missing."""
        every = self.settings["evaluate_every"]
        found = {at: accuracy for at, accuracy, _, _ in self.curve}
        wanted = [updates - i * every for i in range(4) if updates - i * every > 0]
        return sum(found[at] for at in wanted) / len(wanted) if all(at in found for at in wanted) else None


async def train(args: argparse.Namespace, run: Run, data: Any, address: str | None) -> None:
    """Train to the end, evaluating and saving on the way."""
    train_x, train_y, valid_x, valid_y = data
    dice = random.Random(f"delays {run.seed} from {run.num_updates}")
    async with contextlib.AsyncExitStack() as stack:
        node = None
        if address is not None:
            node = await stack.enter_async_context(UnreliableNode(initial_peers=[address]))
            node.failure_rate = args.failure_rate
            node.dice = random.Random(f"failures {run.seed} from {run.num_updates}")
        model, optimizer = make_model(args, node, run.seed)
        run.restore(model, optimizer)
        trainer = ta.AsyncTrainer(model, optimizer, in_flight=args.in_flight if node is not None else 1)

        async def loss_of(replica: Model, rows: torch.Tensor) -> torch.Tensor:
            in_training.set(True)
            loss = F.cross_entropy(await replica(train_x[rows]), train_y[rows])
            if node is not None:
                await asyncio.sleep(dice.expovariate(1.0) * args.delay * args.time_scale)
            return loss

        first, calls_before = run.num_updates, run.num_calls

        async def evaluate() -> None:
            num_updates = min(run.snapshots)
            snapshot = copy.deepcopy(model)
            snapshot.load_state_dict(run.snapshots[num_updates])
            with torch.no_grad():
                accuracy = float(((await snapshot(valid_x)).argmax(1) == valid_y).float().mean())
            del run.snapshots[num_updates]
            loss = sum(losses) / max(1, len(losses))
            losses.clear()
            seconds = before + time.perf_counter() - started
            run.curve.append((num_updates, accuracy, loss, round(seconds, 1)))
            print(
                f"{run.variant} seed {run.seed}: {num_updates} updates, accuracy {accuracy:.4f}, "
                f"loss {loss:.4f}, staleness {staleness}, {seconds:.0f} s",
                flush=True,
            )

        def note() -> None:
            run.num_updates = first + trainer.version
            run.num_calls = calls_before + (node.num_calls if node is not None else 0)
            run.save(model, optimizer)

        def keep(*_: object) -> None:
            # Many steps end while one evaluation runs: what is to be evaluated is kept when it is there.
            if (num_updates := first + trainer.version + 1) % args.evaluate_every == 0:
                run.snapshots[num_updates] = {name: value.clone() for name, value in model.state_dict().items()}

        optimizer.register_step_post_hook(keep)
        started, losses, staleness = time.perf_counter(), list[float](), 0
        before = run.curve[-1][3] if run.curve else 0.0
        rows = batches(len(train_x), args.batch_size, run.seed, first)
        spare_the_collector()
        try:
            while run.snapshots:  # Ctrl-C came before them
                await evaluate()
            while (num_left := args.updates - first - trainer.version) > 0:  # more than once if steps failed
                steps = trainer.run(loss_of, itertools.islice(rows, num_left), max_failures=args.in_flight)
                async with contextlib.aclosing(steps) as reports:
                    async for report in reports:
                        if report.error is not None:
                            print(f"a step failed: {report.error}", file=sys.stderr)
                            continue
                        losses.append(report.loss.item())
                        staleness = report.staleness
                        if (first + report.version) % args.evaluate_every == 0:
                            await evaluate()
                            note()
        finally:
            note()


def write_csv(path: Path, head: list[Any], rows: Iterable[Any]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([head, *rows])


def summarize(runs: list[Run], folder: Path, *, plot: bool = False, page: Path | None = None) -> None:
    """Print the table, save it with the curves, the settings and the plot, and put them into `page`."""
    runs = [run for run in runs if run.curve]
    if not runs:
        return
    folder.mkdir(parents=True, exist_ok=True)
    updates = max(run.settings["updates"] for run in runs)
    marks = [mark for mark in PUBLISHED if mark <= updates] or [updates]
    table: list[list[Any]] = []
    for variant in [variant for variant in VARIANTS if any(run.variant == variant for run in runs)]:
        of_variant = [run for run in runs if run.variant == variant]
        for run in of_variant:
            table.append([variant, run.seed, *(run.accuracy_at(mark) for mark in marks), *effort([run])])
        if len(of_variant) > 1:
            means = [mean([run.accuracy_at(mark) for run in of_variant]) for mark in marks]
            table.append([variant, "mean", *means, *effort(of_variant)])
    table.append(["published (full data, no failures)", "", *(PUBLISHED.get(mark) for mark in marks), "", ""])
    head = ["variant", "seed", *marks, "calls_per_update", "minutes"]
    rounded = [[round(cell, 4) if isinstance(cell, float) else cell for cell in row] for row in table]
    write_csv(folder / "summary.csv", head, rounded)
    points = [
        (run.variant, run.seed, at, round(a, 4), round(loss, 4), s) for run in runs for at, a, loss, s in run.curve
    ]
    columns = ["variant", "seed", "updates", "validation_accuracy", "training_loss", "seconds"]
    write_csv(folder / "curves.csv", columns, points)
    settings = {f"{run.variant}-{run.seed}": run.settings for run in runs}
    (folder / "settings.json").write_text(json.dumps(settings, indent=2) + "\n")
    for row in [head, *rounded]:
        print("  ".join(str("-" if cell is None else cell).ljust(9) for cell in row))
    if plot:
        draw(runs, updates, folder / "curve.png")
    if page is not None:
        text = [f"| {' | '.join(str('-' if cell is None else cell) for cell in row)} |" for row in [head, *rounded]]
        text.insert(1, "|---|" + "---:|" * (len(head) - 1))
        where = Path(os.path.relpath(folder, page.parent)).as_posix()
        text += ["", f"![Validation accuracy over the number of updates]({where}/curve.png)", ""]
        text += [f"[{name}]({where}/{name})" for name in ("summary.csv", "curves.csv", "settings.json")]
        start, end = "<!-- results -->", "<!-- end of results -->"
        before, _, rest = page.read_text().partition(start)
        after = rest.partition(end)[2]
        page.write_text(before + "\n".join([start, *text, end]) + after)


def mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def effort(runs: list[Run]) -> tuple[float, float]:
    """Return calls per update, and minutes in all."""
    num_updates = sum(run.num_updates - run.num_updates_uncounted for run in runs)
    return round(sum(run.num_calls for run in runs) / max(1, num_updates), 1), round(
        sum(run.curve[-1][3] for run in runs) / 60, 1
    )


def draw(runs: list[Run], updates: int, path: Path) -> None:
    """Plot each run's evaluations (pale), the mean over seeds of the last four, and the published figures."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt
    except ImportError:
        print("no plot: matplotlib is missing")
        return
    figure, axes = plt.subplots(figsize=(8, 5))
    for color, variant in enumerate(VARIANTS):
        of_variant = [run for run in runs if run.variant == variant]
        for run in of_variant:
            axes.plot(
                [p[0] for p in run.curve], [p[1] for p in run.curve], color=f"C{color}", alpha=0.25, linewidth=0.8
            )
        means = (
            [(at, mean([run.accuracy_at(at) for run in of_variant])) for at, *_ in of_variant[0].curve]
            if of_variant
            else []
        )
        means = [(at, value) for at, value in means if value is not None]
        label = f"{variant} (mean of {len(of_variant)} seeds)" if len(of_variant) > 1 else variant
        axes.plot([at for at, _ in means], [value for _, value in means], color=f"C{color}", label=label)
    axes.plot(list(PUBLISHED), list(PUBLISHED.values()), "k*", label="published: full data, no failures")
    axes.set(xlabel="updates", ylabel="validation accuracy", ylim=(0.5, 1.0), xlim=(0, updates))
    axes.legend(loc="lower right")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def all_runs(args: argparse.Namespace) -> list[Run]:
    """Return all runs under --out, and those to be trained now."""
    wanted = {(variant, seed) for seed in args.seeds for variant in args.variants} if args.summarize is None else set()
    for folder in Path(args.out).glob("*-*"):
        variant, _, seed = folder.name.rpartition("-")
        if variant in VARIANTS and seed.isdigit():
            wanted.add((variant, int(seed)))
    return [
        Run(args, variant, seed)
        for variant, seed in sorted(wanted, key=lambda pair: (pair[1], VARIANTS.index(pair[0])))
    ]


async def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)  # batches are small: a second thread costs more than it gives
    runs = all_runs(args)
    if args.summarize is not None:
        summarize(runs, Path(args.summarize), plot=not args.no_plot, page=Path(args.page) if args.page else None)
        return
    data = load_data(args)
    try:
        for run in runs:
            wanted = run.variant in args.variants and run.seed in args.seeds
            if not wanted or (run.num_updates >= args.updates and not run.snapshots):
                continue
            run.settings["updates"] = args.updates
            if run.variant == "dense":
                await train(args, run, data, None)
                continue
            async with experts_process(args, run.variant, run.seed, run.folder) as address:
                await train(args, run, data, address)
    finally:
        summarize(runs, Path(args.out), plot=not args.no_plot)


def spare_the_collector() -> None:
    """Spare the garbage collector, which would take a third of the time: it looks through PyTorch's 350,000 objects
    again and again, although a step leaves no cycles behind."""
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)


def loop_factory() -> Any:
    """Return uvloop's loop where it is installed: it costs less for each call."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
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
    add("--summarize", metavar="FOLDER", help="train nothing: write table, curves and plot of what --out holds here")
    add("--page", metavar="FILE", help="with --summarize: a Markdown page whose results are replaced")
    add("--serve", choices=VARIANTS, help=argparse.SUPPRESS)
    add("--run", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.serve is None and args.summarize is None and not (args.images and args.labels):
        parser.error("--images and --labels are needed")
    return args


if __name__ == "__main__":
    arguments = parse()
    try:
        ta.run(serve(arguments) if arguments.serve else main(arguments), loop_factory=loop_factory())
    except (OSError, ValueError, ta.errors.TesseractError) as error:  # no such file, say: a sentence is enough
        raise SystemExit(f"paper_convergence.py: {error}") from None
