"""The demo as a live picture in the terminal; plain lines where there is no terminal."""

import asyncio
import contextlib
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tesseract_async.cli.demo import plan
from tesseract_async.cli.demo.progress import DemoProgress

SERVER_COLORS = ("cyan", "magenta", "yellow", "green", "blue", "red")
FRAMES_PER_SECOND = 4
PLAIN_PERIOD = 5.0


async def show(progress: DemoProgress, now: Callable[[], float], console: Console) -> None:
    """Draw until cancelled: a live picture, or plain lines where there is no terminal."""
    shown, last, told = 0, 0.0, False

    def plainly() -> None:
        nonlocal shown
        for at, sentence in progress.log[shown:]:
            console.print(f"{at:6.1f} s  {sentence}", highlight=False)
        shown = len(progress.log)

    with contextlib.ExitStack() as stack:
        live = None
        if console.is_terminal:
            live = stack.enter_context(Live(console=console, auto_refresh=False, transient=True))
            stack.callback(lambda: live.update(draw(progress, now()), refresh=True))
        else:
            stack.callback(plainly)
        while True:
            told = told or _tell_how_to_join(progress, console)
            if live is not None:
                live.update(draw(progress, now()), refresh=True)
            else:
                plainly()
                if now() - last >= PLAIN_PERIOD:
                    last = now()
                    console.print(f"{last:6.1f} s  {describe(progress)}", highlight=False)
            await asyncio.sleep(1 / FRAMES_PER_SECOND)


def _tell_how_to_join(progress: DemoProgress, console: Console) -> bool:
    """Print the commands for a second terminal once there is an address, outside the picture, so that they can be
    copied. Returns True if it did."""
    if progress.address is None:
        return False
    console.print("Meanwhile, in a second terminal: watch, or lend a hand", highlight=False)
    for line in plan.commands_to_join(progress.options, progress.address, program_name()):
        console.print(f"    {line}", highlight=False, markup=False, soft_wrap=True)
    return True


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
    parts = [
        f"{name}: step {one.step}, loss {_number(one.loss)}, accuracy {_number(one.accuracy)}"
        for name, one in progress.trainers.items()
    ]
    return "; ".join([*parts, f"{len(progress.live)} of {len(plan.UIDS)} experts alive"])


def draw(progress: DemoProgress, now: float) -> RenderableType:
    share = progress.share
    bar = Table.grid(padding=(0, 1))
    bar.add_row("training", ProgressBar(total=1.0, completed=share, width=40), f"{share:4.0%}", f"{now:5.1f} s")

    trainers = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("", "step", "loss", "validation accuracy", "calls/s"):
        trainers.add_column(column, justify="left" if not column else "right", style="bold" if not column else "")
    for name, trainer in progress.trainers.items():
        trainers.add_row(
            name,
            f"{trainer.step}/{progress.options.steps}",
            _number(trainer.loss),
            _number(trainer.accuracy),
            f"{trainer.calls_per_second:.0f}",
        )

    log = Text("\n".join(f"{at:5.1f} s  {sentence}" for at, sentence in progress.log[-8:]), style="dim")
    parts = Group(bar, Text(), trainers, Text(), draw_grid(progress), Text(), log)
    return Panel(parts, title="tesseract demo", subtitle="Ctrl-C leaves cleanly", width=78)


def draw_grid(progress: DemoProgress) -> RenderableType:
    """Draw each expert on its grid in its server's color, filled while the trainers see it."""
    color: dict[str, str] = {}
    for number, server in enumerate(progress.servers.values()):
        color |= dict.fromkeys(server.uids, SERVER_COLORS[number % len(SERVER_COLORS)])
    live = progress.live
    grid = Text()
    uids = plan.UIDS
    for start in range(0, len(uids), plan.GRID_SIZE[-1]):
        for uid in uids[start : start + plan.GRID_SIZE[-1]]:
            # different signs, not colors alone: terminals and eyes differ
            grid.append("● " if uid in live else "· ", style=color[uid] if uid in live else "dim")
        grid.append("\n")
    grid.rstrip()

    servers = Table.grid(padding=(0, 2, 0, 0))
    for number, (name, server) in enumerate(progress.servers.items()):
        state = Text("alive", style="green") if server.alive else Text("gone", style="bold red")
        style = SERVER_COLORS[number % len(SERVER_COLORS)]
        servers.add_row(Text(name, style=style), state, f"{len(server.uids)} experts", f"{server.num_steps} steps")
    both = Table.grid(padding=(0, 4, 0, 0))
    both.add_row(grid, servers)
    return both


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
