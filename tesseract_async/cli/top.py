"""`tesseract top`: the swarm in the terminal."""

from __future__ import annotations

import asyncio
import json
import time
from typing import TYPE_CHECKING, Any

import click

from tesseract_async.cli.options import join, joining_options, patterns_argument, peers
from tesseract_async.cli.running import run, set_up_logging, until_told_to_leave
from tesseract_async.cli.waiting import sign

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

MAX_COLUMNS = 64
MAX_LOOKS = 4
"""That `--once` takes until it has met a server."""
COLOURS = ("cyan", "magenta", "yellow", "green", "blue", "red", "white")


@click.command("top")
@patterns_argument
@joining_options
@click.option("--period", default=2.0, show_default=True, type=click.FloatRange(0.1), help="Seconds between two looks.")
@click.option("--once", is_flag=True, help="Look twice (rates need two looks), print, and end.")
@click.option("--json", "as_json", is_flag=True, help="With --once: print everything as one line of JSON.")
def command(
    patterns: tuple[str, ...],
    initial_peers: tuple[str, ...],
    verbose: bool,
    period: float,
    once: bool,
    as_json: bool,
) -> None:
    """Show the swarm live in the terminal: experts on their grids, versions, load, servers and paths, what happened.

    PATTERNS say which grids to show, such as 'ffn.[0:16].[0:16]'; without any, what the servers nearby host is shown.
    """
    if as_json and not once:
        raise click.UsageError("--json goes with --once")
    set_up_logging(verbose=verbose)

    async def main() -> int:
        from rich.console import Console
        from rich.live import Live

        from tesseract_async.experts import ExpertPattern
        from tesseract_async.monitoring import SwarmObserver
        from tesseract_async.node import TesseractNode

        node = TesseractNode(initial_peers=peers(initial_peers), refresh_period=period)
        chosen = [ExpertPattern.parse(text) for text in patterns]
        console = Console()
        async with node:
            observer = SwarmObserver(node, patterns=chosen, period=period)
            if once:
                await join(node)
                with sign("looking"):
                    for _ in range(MAX_LOOKS):  # who just joined may not know everybody yet
                        await observer.look()
                        if observer.peers:
                            break
                        await asyncio.sleep(0.2)
                    # a second look shows how they are, a third one how fast
                    for pause in (min(period, 1.0), 0.0):
                        await observer.look()
                        await asyncio.sleep(pause)
                if as_json:
                    click.echo(json.dumps(observer.state()))
                else:
                    console.print(draw(observer.state()))
                return 0
            async with observer:
                with Live(
                    draw(observer.state()), console=console, screen=console.is_terminal, auto_refresh=False
                ) as live:
                    leaving = asyncio.create_task(until_told_to_leave())
                    while not leaving.done():
                        changed = asyncio.create_task(observer.wait_changed())
                        await asyncio.wait({leaving, changed}, return_when=asyncio.FIRST_COMPLETED)
                        changed.cancel()
                        live.update(draw(observer.state()), refresh=True)
        return 0

    run(main)


def draw(state: dict[str, Any]) -> RenderableType:
    """One frame of what `SwarmObserver.state` says."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    totals = state["totals"]
    head = Text.assemble(
        ("tesseract top", "bold"),
        f"   {totals.get('experts', 0):.0f} experts on {totals.get('servers', 0):.0f} servers"
        f"   {totals.get('calls_per_second', 0):,.1f} calls/s   {totals.get('rows_per_second', 0):,.0f} rows/s"
        f"   {totals.get('steps_per_second', 0):,.1f} steps/s",
        f"   loss {totals['loss']:.4f}" if "loss" in totals else "",
    )
    parts: list[RenderableType] = [head]
    for grid in state["grids"]:
        parts += [Text(), _describe_grid(grid), _draw_grid(grid, state["peers"])]
    if not state["grids"]:
        parts += [
            Text(),
            Text("No server is known yet. Start one:"),
            Text(f"tesseract serve --experts 'ffn.[0:4].[0:4]' --initial-peers {state['node']['join']}"),
        ]
        return Group(*parts)
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in (
        "peer",
        "path",
        "round trip",
        "experts",
        "calls/s",
        "rows/s",
        "steps/s",
        "load",
        "waiting",
        "answered",
    ):
        left = column in ("peer", "path")
        table.add_column(column, justify="left" if left else "right", no_wrap=column != "path", overflow="fold")
    for peer in state["peers"]:
        waiting = peer["waiting_rows"]
        table.add_row(
            Text(peer["short"], style=_colour(peer)),
            Text(peer["error"] or peer["path"] or "-"),
            "-" if peer["rtt"] is None else f"{1000 * peer['rtt']:.1f} ms",
            str(peer["num_experts"]),
            f"{peer['calls_per_second']:,.1f}",
            f"{peer['rows_per_second']:,.0f}",
            f"{peer['steps_per_second']:,.1f}",
            f"{peer['busy']:.0%}",
            "-" if waiting is None else str(waiting),
            "never" if peer["answered_ago"] is None else f"{peer['answered_ago']:.0f} s ago",
            style="red" if peer["error"] else None,
        )
    parts += [Text(), table]
    trainers = [f"{name}: step {step}, loss {loss:.4f}" for name, (step, loss) in state["losses"].items()]
    if trainers:
        parts += [Text(), Text("\n".join(trainers[:8]))]
    lines = [f"{_clock(when)}  {sentence}" for when, sentence, _ in state["log"][-8:]]
    return Group(*parts, Text(), Text("\n".join(lines), style="dim"))


def _clock(when: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(when))


def _colour(peer: dict[str, Any]) -> str:
    return COLOURS[peer["number"] % len(COLOURS)]


def _describe_grid(grid: dict[str, Any]) -> Text:
    """``ffn  4x4  16 alive, versions 10 to 12, ...``: what the signs below do not say."""
    from rich.text import Text

    facts = [f"{len(grid['experts'])} alive"]
    facts += [f"{len(grid['lost'])} lost"] if grid["lost"] else []
    versions = [version for _, _, _, version, *_ in grid["experts"] if version is not None]
    if versions:
        low, high = min(versions), max(versions)
        facts.append(f"version {low}" if low == high else f"versions {low} to {high}")
    replicas = [number for _, _, number, *_ in grid["experts"]]
    if max(replicas, default=1) > 1:
        facts.append(f"{sum(replicas)} replicas, the slowest {max(cell[5] for cell in grid['experts'])} steps behind")
    size = "x".join(map(str, grid["size"]))
    return Text.assemble((f"{grid['prefix']}  {size}", "bold"), f"  {', '.join(facts)}")


def _draw_grid(grid: dict[str, Any], peers: list[dict[str, Any]]) -> RenderableType:
    from rich.text import Text

    size = grid["size"]
    rows, columns = (size[0], 1) if len(size) > 1 else (1, size[0])
    for one in size[1:]:
        columns *= one

    def place(coords: list[int]) -> tuple[int, int]:
        row, column = (coords[0], 0) if len(size) > 1 else (0, coords[0])
        for dimension, at in list(enumerate(coords))[1:]:
            column = column * size[dimension] + at
        return row, column

    # different signs, not colours alone: terminals and eyes differ
    signs: dict[tuple[int, int], tuple[str, str]] = {place(coords): ("x", "red") for coords in grid["lost"]}
    for coords, host, *_ in grid["experts"]:
        peer = peers[host] if 0 <= host < len(peers) else None
        silent = peer is not None and peer["error"]
        signs[place(coords)] = ("○", "red") if silent else ("●", "white" if peer is None else _colour(peer))
    sheet = Text()
    # large grids: as many experts as fit, and a word about the rest
    for row in range(min(rows, MAX_COLUMNS)):
        for column in range(min(columns, MAX_COLUMNS)):
            sign, style = signs.get((row, column), ("·", "dim"))
            sheet.append(sign, style=style)
            sheet.append(" " if columns <= MAX_COLUMNS // 2 else "")
        sheet.append("\n")
    if rows > MAX_COLUMNS or columns > MAX_COLUMNS:
        sheet.append(f"(the first {MAX_COLUMNS} of each direction; {len(grid['experts'])} live in all)\n", style="dim")
    sheet.append("● alive  ○ its server does not answer  x lost  · nobody yet", style="dim")
    return sheet
