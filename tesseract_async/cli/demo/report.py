"""The results of the demo: a table for the terminal, and a picture."""

from pathlib import Path

from rich.table import Table

from tesseract_async.cli.demo import plan
from tesseract_async.cli.demo.progress import DemoProgress
from tesseract_async.cli.types import counted


def summary(progress: DemoProgress) -> Table:
    table = Table(title="What happened", title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column()
    duration = max((trainer.losses[-1][0] for trainer in progress.trainers.values() if trainer.losses), default=0.0)
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
    steps = sum(server.num_steps for server in progress.servers.values())
    table.add_row(
        "experts' optimizer steps", "none: they are frozen" if progress.options.freeze_experts else str(steps)
    )
    table.add_row("steps that trainers lost", str(sum(len(trainer.errors) for trainer in progress.trainers.values())))
    for name, server in progress.servers.items():
        if progress.killed_at is not None and not server.alive:
            table.add_row(f"{name}", f"killed at {progress.killed_at:.1f} s, was not back before the end")
        if server.versions_at_return is not None:
            assert progress.killed_at is not None and progress.returned_at is not None
            before = sum(server.versions_at_return.values())
            table.add_row(name, f"killed at {progress.killed_at:.1f} s, back at {progress.returned_at:.1f} s")
            table.add_row(f"{name}, its experts' steps", f"{before} kept, {server.num_steps - before} since its return")
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
