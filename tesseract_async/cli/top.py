"""`tesseract top`: the swarm in the terminal."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import click

from tesseract_async.cli.options import joining_options, patterns_argument, peers
from tesseract_async.cli.running import run, set_up_logging, until_told_to_leave

if TYPE_CHECKING:
    from rich.console import RenderableType

MAX_COLUMNS = 64
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
    """Show the swarm live in the terminal: experts on their grids, their servers, load, steps, what happened.

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
                await node.network.wait_joined(10.0)
                # the first look learns who is there, the second one how they are, the third how fast
                for pause in (0.2, min(period, 1.0), 0.0):
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
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    totals = state["totals"]
    head = Text.assemble(
        ("tesseract top", "bold"),
        f"   {totals.get('experts', 0):.0f} experts on {totals.get('servers', 0):.0f} servers"
        f"   {totals.get('rows_per_second', 0):,.0f} rows/s   {totals.get('steps_per_second', 0):,.1f} steps/s",
        f"   loss {totals['loss']:.4f}" if "loss" in totals else "",
    )
    parts: list[RenderableType] = [head]
    for grid in state["grids"]:
        parts += [Text(), Text(f"{grid['prefix']}  {'x'.join(map(str, grid['size']))}", style="bold"), _draw_grid(grid)]
    if not state["grids"]:
        parts += [Text(), Text("No server is known yet.", style="dim")]
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("peer", "path", "round trip", "experts", "rows/s", "steps/s", "load", "waiting"):
        table.add_column(column, justify="left" if column in ("peer", "path") else "right", style=None)
    for number, peer in enumerate(state["peers"]):
        waiting = peer["waiting_rows"]
        table.add_row(
            f"[{COLOURS[number % len(COLOURS)]}]{peer['short']}[/]",
            escape(peer["error"] or peer["path"] or "-"),
            "-" if peer["rtt"] is None else f"{1000 * peer['rtt']:.1f} ms",
            str(peer["num_experts"]),
            f"{peer['rows_per_second']:,.0f}",
            f"{peer['steps_per_second']:,.1f}",
            f"{peer['busy']:.0%}",
            "-" if waiting is None else str(waiting),
            style="red" if peer["error"] else None,
        )
    log = Text("\n".join(sentence for _, sentence in state["log"][-8:]), style="dim")
    return Group(*parts, Text(), table, Text(), log)


def _draw_grid(grid: dict[str, Any]) -> RenderableType:
    from rich.text import Text

    size = grid["size"]
    rows, columns = (size[0], 1) if len(size) > 1 else (1, size[0])
    for one in size[1:]:
        columns *= one
    cells: dict[tuple[int, int], int] = {}
    for coords, host, *_ in grid["experts"]:
        row, column = (coords[0], 0) if len(size) > 1 else (0, coords[0])
        for dimension, at in list(enumerate(coords))[1:]:
            column = column * size[dimension] + at
        cells[(row, column)] = host
    sheet = Text()
    # large grids: as many experts as fit, and a word about the rest
    for row in range(min(rows, MAX_COLUMNS)):
        for column in range(min(columns, MAX_COLUMNS)):
            host = cells.get((row, column))
            sheet.append("·" if host is None else "●", style="dim" if host is None else COLOURS[host % len(COLOURS)])
            sheet.append(" " if columns <= MAX_COLUMNS // 2 else "")
        sheet.append("\n")
    if rows > MAX_COLUMNS or columns > MAX_COLUMNS:
        sheet.append(f"(the first {MAX_COLUMNS} of each direction; {len(cells)} live in all)\n", style="dim")
    sheet.rstrip()
    return sheet
