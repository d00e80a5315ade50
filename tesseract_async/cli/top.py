"""`tesseract top`: the swarm in the terminal."""

import asyncio
import contextlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator

import click
from rich.console import Console, RenderableType
from rich.live import Live

from tesseract_async.cli.options import Visit, enter, patterns_argument, run_option, visit_options
from tesseract_async.cli.running import asynchronous, spinner, until_told_to_leave
from tesseract_async.cli.swarm_picture import draw, signs_for
from tesseract_async.cli.types import seconds
from tesseract_async.experts.pattern import ExpertPattern
from tesseract_async.monitoring import SwarmObserver

try:
    import termios
    import tty
except ImportError:  # Windows
    termios = None  # type: ignore[assignment]

SCROLLS = {"j": 1, "k": -1, "\x1b[b": 1, "\x1b[a": -1, "\x1b[6~": 10, "\x1b[5~": -10}
"""The number of lines that each key scrolls: j and k, the arrows, page down and up."""
_KEY = re.compile(r"\x1b\[[0-9]*[A-Za-z~]|.", re.DOTALL)
MAX_LOOKS = 4
"""The most looks that `--once` takes until it has met a server."""


@click.command("top")
@patterns_argument
@visit_options
@run_option
@click.option("--period", default=2.0, type=seconds(0.1, 86400), help="Look at the swarm this often.")
@click.option("--once", is_flag=True, help="Print one picture and end: servers that died before are not in it.")
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON, for programs; needs --once.")
@asynchronous
async def command(
    *,
    patterns: tuple[ExpertPattern, ...],
    visit: Visit,
    run_name: str | None,
    period: float,
    once: bool,
    as_json: bool,
) -> int:
    """Show the swarm live in the terminal: experts on their grids, servers, load, and recent events.

    PATTERNS name the grids to show, such as 'ffn.[0:16].[0:16]'; without any, the picture shows what nearby servers
    host. Grids that are larger than the terminal are drawn in blocks. The arrow keys, or j and k, scroll the lists of
    servers, trainers and events; Ctrl-C or q ends it.

    Of each server: `path` is how this computer reaches it, or why it does not, `round trip` the time that takes, `load`
    the share of the time in which its devices compute, `waiting` the rows that wait for that, and `answered` when it
    answered last. A server that died stays in the list for an hour, dimmed.
    """
    if as_json and not once:
        raise click.UsageError("--json needs --once")

    console = Console()
    signs, is_dumb = signs_for(console.encoding), console.is_terminal and console.is_dumb_terminal
    async with visit.node(refresh_period=period) as node:
        grid = await enter(node, run_name)
        observer = SwarmObserver(node, patterns=list(patterns) or grid, period=period)
        if once:
            with spinner("looking"):
                for _ in range(MAX_LOOKS):  # a node that just joined may not know everybody yet
                    await observer.look()
                    if observer.peers:
                        break
                    await asyncio.sleep(0.2)
                # the second look shows how they are, the third one how fast
                for pause in (min(period, 1.0), 0.0):
                    await observer.look()
                    await asyncio.sleep(pause)
            if as_json:
                click.echo(json.dumps(observer.state()))
            else:
                console.print(draw(observer.state(), console.width, signs=signs, is_once=True))
            return 0
        async with observer:
            first, scrolled = 0, asyncio.Event()

            def frame() -> RenderableType:
                height = console.height if console.is_terminal else None
                return draw(observer.state(), console.width, height, first=first, signs=signs)

            def pressed(key: str) -> None:
                nonlocal first
                if key == "q":
                    leaving.cancel()
                elif key in SCROLLS:
                    num_lines = len(observer.peers) + len(observer.log)
                    num_lines = max(num_lines, *(len(one.named) for one in observer.surveys.values()), 0)
                    first = max(0, min(first + SCROLLS[key], num_lines))
                    scrolled.set()

            leaving = asyncio.create_task(until_told_to_leave())
            await asyncio.sleep(0)  # it must listen before anything is shown
            with (
                _keys(pressed),
                Live(
                    None if is_dumb else frame(),
                    console=console,
                    screen=console.is_terminal and not is_dumb,
                    auto_refresh=False,
                ) as live,
            ):
                while not leaving.done():
                    waits = {asyncio.create_task(one) for one in (observer.wait_changed(), scrolled.wait())}
                    await asyncio.wait({leaving, *waits}, return_when=asyncio.FIRST_COMPLETED)
                    for wait in waits:
                        wait.cancel()
                    scrolled.clear()
                    if is_dumb:  # it cannot go back
                        console.print(frame())
                    else:
                        live.update(frame(), refresh=True)
    return 0


@contextlib.contextmanager
def _keys(pressed: Callable[[str], object]) -> Iterator[None]:
    if termios is None or not sys.stdin.isatty() or os.tcgetpgrp(number := sys.stdin.fileno()) != os.getpgrp():
        yield
        return
    loop, before = asyncio.get_running_loop(), termios.tcgetattr(number)

    def read() -> None:
        keys = os.read(number, 64)
        if not keys:  # the terminal is gone
            loop.remove_reader(number)
        for key in _KEY.findall(keys.decode(errors="replace")):
            pressed(key.lower())

    tty.setcbreak(number, termios.TCSANOW)  # keeps a key that was pressed already
    loop.add_reader(number, read)
    try:
        yield
    finally:
        loop.remove_reader(number)
        with contextlib.suppress(termios.error):
            termios.tcsetattr(number, termios.TCSADRAIN, before)
