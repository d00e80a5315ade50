"""What people see of the demo: lines while it runs, a table at the end, and a picture."""

import asyncio
import contextlib
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from tesseract_async.cli.demo import plan
from tesseract_async.cli.demo.progress import DemoProgress
from tesseract_async.cli.types import counted

LOOK_SECONDS = 0.25
LINE_SECONDS = 5.0
"""Seconds between two lines about the training, where there is no terminal for a bar."""


async def show(progress: DemoProgress, now: Callable[[], float], console: Console) -> None:
    """Print what happens, and how far the training is, until cancelled. `tesseract top` draws the rest."""
    shown, last, told = 0, 0.0, False

    def tell() -> None:
        nonlocal shown
        for at, sentence in progress.log[shown:]:
            console.print(f"{at:6.1f} s  {sentence}", highlight=False)
        shown = len(progress.log)

    with Live(console=console, auto_refresh=False, transient=True) as live, contextlib.ExitStack() as stack:
        stack.callback(tell)
        while True:
            tell()
            if progress.address is not None and not told:
                told = True
                console.print("Meanwhile, in a second terminal: watch, or lend a hand", highlight=False)
                for line in plan.commands_to_join(progress.options, progress.address, program_name()):
                    console.print(f"    {line}", highlight=False, markup=False, soft_wrap=True)
            if console.is_terminal:
                live.update(Group(ProgressBar(1.0, progress.share, width=40), describe(progress)), refresh=True)
            elif now() - last >= LINE_SECONDS:
                last = now()
                console.print(f"{last:6.1f} s  {describe(progress)}", highlight=False)
            await asyncio.sleep(LOOK_SECONDS)


def program_name() -> str:
    """Return how this command is called from the working directory, such as ``.venv/bin/tesseract``."""
    path = Path(sys.argv[0])
    if not path.name.startswith("tesseract"):
        return "python -m tesseract_async"
    found = shutil.which(path.name)
    if found is not None and Path(found).resolve() == path.resolve():
        return path.name
    return os.path.relpath(path)


def describe(progress: DemoProgress) -> str:
    def figure(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    parts = [
        f"{name}: step {one.step}, loss {figure(one.loss)}, accuracy {figure(one.accuracy)}"
        for name, one in progress.trainers.items()
    ]
    return "; ".join([*parts, f"{len(progress.live)} of {len(plan.UIDS)} experts alive"])


def summary(progress: DemoProgress) -> Table:
    table = Table(title="What happened", title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column()
    duration = max(trainer.seconds for trainer in progress.trainers.values())
    calls = sum(trainer.num_calls for trainer in progress.trainers.values())
    table.add_row("processes", f"{progress.num_processes} started")
    table.add_row("training", f"{duration:.1f} s, {progress.options.steps} steps per trainer")
    table.add_row("calls to experts", f"{calls} ({calls / max(duration, 1e-9):.0f} per second)")
    for name, trainer in progress.trainers.items():
        if trainer.accuracy is not None:
            table.add_row(f"{name}, validation accuracy", f"{trainer.accuracy:.3f}")
    if progress.is_done:
        num = len(progress.models)
        table.add_row("models at the end", "one, of all trainers" if num == 1 else f"{num}: not all steps were shared")
    steps = "none: they are frozen" if progress.options.freeze_experts else str(sum(progress.steps.values()))
    table.add_row("experts' optimizer steps", steps)
    table.add_row("steps that trainers lost", str(sum(trainer.num_lost for trainer in progress.trainers.values())))
    if progress.killed_at is not None:
        back = f"back at {progress.returned_at:.1f} s" if progress.returned_at is not None else "was not back"
        table.add_row(plan.VICTIM, f"killed at {progress.killed_at:.1f} s, {back}")
    if progress.returned_at is not None:
        since = progress.steps[plan.VICTIM] - progress.steps_kept
        table.add_row(f"{plan.VICTIM}, its experts' steps", f"{progress.steps_kept} kept, {since} since its return")
    return table


def verdict(progress: DemoProgress) -> str:
    if progress.accuracy is None:
        return "No trainer validated: the demo shows nothing."
    reached = f"{progress.accuracy:.3f}"
    if progress.options.freeze_experts:
        return f"With frozen experts the gates alone reach {reached}; the experts carry the rest."
    if len(progress.models) > 1:
        return f"Validation accuracy {reached}, but the trainers ended with different models."
    if progress.passed:
        return f"Validation accuracy {reached}, the goal was {plan.REQUIRED_ACCURACY}."
    return f"Validation accuracy {reached} is less than the goal of {plan.REQUIRED_ACCURACY}."


def plot(progress: DemoProgress, path: Path) -> None:
    """Draw accuracy over time into a file, with the kill and the return marked. Raises: OSError."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, trainer in progress.trainers.items():
        times, values = [at for at, _ in trainer.accuracies], [value for _, value in trainer.accuracies]
        axes.plot(times, values, label=f"the model of all trainers, at {name}")
    axes.axhline(plan.REQUIRED_ACCURACY, color="grey", linewidth=0.8, linestyle=":")
    for at, text in ((progress.killed_at, "one server killed"), (progress.returned_at, "back with its weights")):
        if at is not None:
            axes.axvline(at, color="black", linewidth=0.8, linestyle="--")
            axes.annotate(text, (at, 0.03), xytext=(4, 0), textcoords="offset points", fontsize=9)
    kind = "frozen experts" if progress.options.freeze_experts else "experts on three servers"
    if progress.options.num_servers != 3 and not progress.options.freeze_experts:
        kind = f"experts on {counted(progress.options.num_servers, 'server')}"
    axes.set(
        xlabel="seconds of training",
        ylabel="validation accuracy",
        ylim=(0, 1.02),
        title=f"Handwritten digits: {plan.NUM_TRAINERS} trainers make one model, {kind}",
    )
    axes.set_xlim(left=0)
    axes.legend(loc="center right")
    figure.savefig(path)
