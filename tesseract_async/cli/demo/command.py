"""`tesseract demo`."""

import asyncio
import contextlib
import importlib.util
import tempfile
import time
from pathlib import Path

import click

from tesseract_async.cli.demo import plan
from tesseract_async.cli.flags import grouped
from tesseract_async.cli.options import check_folder
from tesseract_async.cli.running import asynchronous
from tesseract_async.cli.types import FILE, FOLDER

PICTURES = (".png", ".pdf", ".svg", ".jpg", ".jpeg")


@click.command("demo")
@grouped("options", plan.DemoOptions)
@click.option("--plot", "plot_path", default="demo.png", type=FILE, help="Draw the accuracy into this file.")
@click.option("--no-plot", is_flag=True, help="Draw no picture.")
@click.option("--logs", type=FOLDER, help="Keep logs and checkpoints in this folder.")
@asynchronous
async def command(*, options: plan.DemoOptions, plot_path: Path, no_plot: bool, logs: Path | None) -> int:
    """Train a small mixture of experts with separate processes, on this machine.

    A bootstrap node, three expert servers and two trainers are started on loopback; they learn to read handwritten
    digits (part of scikit-learn: nothing is downloaded). A third of the way in, one server is killed; it returns later
    with its weights. Nothing in the trainers learns but their gate, which they share: it is the experts that learn the
    digits.

    The exit status is 0 if both trainers end with one model, whose validation accuracy is 0.97 or more.
    """
    missing = [
        name for name in ("sklearn", *(() if no_plot else ("matplotlib",))) if not importlib.util.find_spec(name)
    ]
    if missing:
        raise click.ClickException(f"the demo needs {' and '.join(missing)}: pip install -e '.[demo]' in the clone")

    from rich.console import Console

    from tesseract_async.cli.demo import report
    from tesseract_async.cli.demo.children import ChildFailed
    from tesseract_async.cli.demo.script import Script
    from tesseract_async.cli.demo.view import show

    if logs is not None:
        check_folder(logs, "--logs")
    if not no_plot:  # reported now, not after the training
        if plot_path.suffix.lower() not in PICTURES:
            raise click.BadParameter(f"{plot_path} does not end with one of {', '.join(PICTURES)}", param_hint="--plot")
        check_folder(plot_path.parent, "--plot", make=False)
    console, started_at = Console(), time.monotonic()
    with contextlib.ExitStack() as stack:
        folder = logs or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tesseract-demo-")))
        script = Script(options, folder)
        drawing = asyncio.create_task(show(script.progress, script.now, console))
        try:
            await script.run()
        except ChildFailed as error:
            raise click.ClickException(str(error)) from None
        finally:
            drawing.cancel()
            await asyncio.gather(drawing, return_exceptions=True)
    console.print(report.summary(script.progress))
    if not no_plot:
        report.plot(script.progress, plot_path)
        console.print(f"The picture is in [bold]{plot_path}[/bold].")
    console.print(f"{report.verdict(script.progress)} It took {time.monotonic() - started_at:.0f} s in all.")
    return 0 if script.progress.passed else 1
