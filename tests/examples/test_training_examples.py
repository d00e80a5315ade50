"""The two training examples, small: they learn, equal their controls where they should, and go on after Ctrl-C."""

import asyncio
import csv
import gzip
import importlib.util
import re
import signal
import struct
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from tests.stem import Process, Stem

EXAMPLES = Path(__file__).parents[2] / "examples"


async def start(stem: Stem, name: str, *arguments: object, fresh: bool = False) -> Process:
    """An example as a user starts it, but that a warning is an error."""
    environment = {"PYTHONPATH": str(EXAMPLES.parent), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    return await stem.start(
        str(EXAMPLES / name),
        *map(str, arguments),
        folder=EXAMPLES.parent,
        environment=environment,
        strict=True,
        fresh=fresh,
    )


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


async def finish(process: Process) -> str:
    out, err = await process.communicate()
    assert process.returncode == 0 and b"Traceback" not in err, err.decode()
    return out.decode()


SMALL_LM = ("--layers", 1, "--grid", 2, "--width", 16, "--length", 16, "--batch-size", 4, "--eval-batches", 4)


def perplexity(text: str, steps: int) -> float:
    found = re.search(rf"perplexity after {steps} steps: ([\d.]+)", text)
    assert found, text
    return float(found[1])


async def test_several_language_models_are_one(stem: Stem, tmp_path: Path) -> None:
    small = (*SMALL_LM, "--steps", 60, "--every", 4)
    first = await start(stem, "train_lm.py", "--out", tmp_path, *small, "--port", 0)
    assert first.stdout is not None
    found = re.search(r"--initial-peers (\S+)", (await first.stdout.readline()).decode())
    assert found
    second = await start(stem, "train_lm.py", *small, "--initial-peers", found[1])
    reached = []
    for text in await asyncio.gather(finish(first), finish(second)):
        ended = re.search(r"perplexity after (\d+) steps: ([\d.]+)", text)
        assert ended and int(ended[1]) >= 60 and float(ended[2]) < 200, text
        reached.append((int(ended[1]), float(ended[2])))
    assert reached[0] == pytest.approx(reached[1], rel=2e-3)  # of one model; sums may be rounded differently


@pytest.mark.slow
async def test_the_language_model_goes_on_after_ctrl_c(stem: Stem, tmp_path: Path) -> None:
    small = (*SMALL_LM, "--steps", 60, "--report-every", 1, "--port", 0, "--out", tmp_path)
    cut = await start(stem, "train_lm.py", *small)
    assert cut.stdout is not None
    while b"step 5:" not in (line := await cut.stdout.readline()):
        assert line
    cut.send_signal(signal.SIGINT)
    first = re.search(r"perplexity after (\d+) steps", await finish(cut))
    assert first and 5 <= int(first[1]) < 60
    second = await finish(await start(stem, "train_lm.py", *small))
    assert f"goes on after step {first[1]};" in second
    assert perplexity(second, 60) < 200


def write_idx(path: Path, array: np.ndarray) -> None:
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}i", *array.shape)
    path.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))


def blobs(folder: Path) -> tuple[str, ...]:
    """Images that a model can tell apart, in the format of MNIST."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, 600)
    images = np.clip(rng.normal(size=(10, 784))[labels] * 60 + 100 + rng.normal(size=(600, 784)) * 40, 0, 255)
    write_idx(folder / "images.gz", images.reshape(-1, 28, 28))
    write_idx(folder / "labels.gz", labels)
    return ("--images", str(folder / "images.gz"), "--labels", str(folder / "labels.gz"))


def small_experiment(folder: Path) -> tuple[object, ...]:
    sizes = ("--num-train", 500, "--num-valid", 100, "--grid", 2, "--layers", 2, "--seeds", 0, "--in-flight", 8)
    return (*blobs(folder), *sizes, "--time-scale", 0.01, "--evaluate-every", 4, "--no-plot", "--out", folder / "out")


def summary(out: Path, updates: str) -> dict[str, float]:
    """Accuracy by variant."""
    rows = list(csv.DictReader((out / "summary.csv").read_text().splitlines()))
    return {row["variant"]: float(row[updates]) for row in rows if row["seed"]}


def evaluations(out: Path) -> list[str]:
    with (out / "trained-0" / "curve.csv").open() as file:
        return [row["updates"] for row in csv.DictReader(file)]


@pytest.mark.slow
async def test_the_papers_experiment_small(stem: Stem, tmp_path: Path) -> None:
    """With eight steps in flight that end close together, none of the points where it is evaluated is missed."""
    small = small_experiment(tmp_path)
    text = await finish(
        await start(stem, "paper_convergence.py", *small, "--updates", 32, "--variants", "trained", fresh=True)
    )
    assert evaluations(tmp_path / "out") == ["4", "8", "12", "16", "20", "24", "28", "32"]
    docs, example = tmp_path / "docs", load("paper_convergence")
    example.summarize(example.all_runs(example.parse(["--out", str(tmp_path / "out"), "--summarize", str(docs)])), docs)
    assert "trained" in text
    assert sorted(path.name for path in docs.iterdir()) == ["curves.csv", "settings.json", "summary.csv"]
    assert str(tmp_path) not in (docs / "settings.json").read_text()
    row = next(iter(csv.DictReader((docs / "summary.csv").read_text().splitlines())))
    # two layers, three or four experts for four rows of each, both ways; some calls come to naught
    assert 8 < float(row["calls_per_update"]) <= 16


@pytest.mark.slow
async def test_the_papers_experiment_goes_on_where_it_was(stem: Stem, tmp_path: Path) -> None:
    small = small_experiment(tmp_path)
    await finish(
        await start(stem, "paper_convergence.py", *small, "--updates", 32, "--variants", "trained", fresh=True)
    )
    text = await finish(
        await start(
            stem,
            "paper_convergence.py",
            *small,
            "--updates",
            48,
            "--variants",
            "trained",
            "frozen",
            "dense",
            fresh=True,
        )
    )
    assert "trained seed 0: 48 updates" in text and "trained seed 0: 32 updates" not in text
    accuracy = summary(tmp_path / "out", "48")
    assert accuracy["trained"] > 0.2 and accuracy["dense"] > 0.2 and accuracy["frozen"] > 0


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_the_papers_experiment_512_updates(stem: Stem, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("--updates", 512, "--evaluate-every", 64, "--seeds", 0, "--variants", "trained", "--time-scale", 0.1)
    sizes = ("--num-train", 500, "--num-valid", 100)
    await finish(
        await start(stem, "paper_convergence.py", *blobs(tmp_path), *sizes, *options, "--out", out, fresh=True)
    )
    assert summary(out, "512")["trained"] > 0.8
    assert evaluations(out) == [str(at) for at in range(64, 513, 64)]


async def test_accelerates_plain_loop_trains_remote_experts(stem: Stem) -> None:
    """Unchanged, with gradients accumulated, clipped, and computed in bfloat16 where torch chooses to."""
    pytest.importorskip("accelerate")
    options = ("--epochs", 12, "--grad-steps", 2, "--mixed-precision", "bf16")
    text = await finish(await start(stem, "accelerate_loop.py", *options))
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", text)]
    assert len(losses) == 12 and losses[-1] < losses[0]
    found = re.search(r"accuracy: ([\d.]+)", text)
    assert found and float(found[1]) > 0.9  # a line tells 0.87 of them apart
