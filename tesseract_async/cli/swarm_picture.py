"""One frame of `tesseract top`: a swarm's state drawn for a terminal. No I/O."""

import math
from collections import Counter
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tesseract_async.cli.types import counted

SwarmState = dict[str, Any]
"""A part of `monitoring.SwarmObserver.state`."""

MAX_ROWS = 64
"""Lines of a grid where the output has no height, such as a file."""
MAX_EVENTS = 8
SIGNS = {"alive": "●", "some": "◐", "silent": "○", "lost": "x", "nobody": "·"}
ASCII_SIGNS = {"alive": "o", "some": "-", "silent": "?", "lost": "x", "nobody": "."}
COLUMNS = {
    **{
        "peer": 8,
        "name": 12,
        "path": 20,
        "round trip": 10,
        "experts": 7,
        "calls/s": 8,
        "rows/s": 9,
        "steps/s": 8,
        "load": 4,
    },
    **{"waiting": 7, "answered": 9},
}
"""Columns of the table of servers, with the width that each wants."""
LEFT_OUT = ("waiting", "rows/s", "steps/s", "answered", "load", "experts", "name", "calls/s", "round trip")
"""Columns that a narrow terminal does without, in this order; the peer and its path always stay."""
ONCE = (
    "This is one look: a server that died so long before it that its entry has expired (after 45 s, unless served with "
    "another --ttl) is not seen, and its experts are among those that nobody hosts. Without --once, `tesseract top` "
    "keeps it in sight for an hour."
)
COLORS = ("cyan", "magenta", "yellow", "green", "blue", "red", "white")


def signs_for(encoding: str) -> dict[str, str]:
    """Return the signs for experts that a terminal with this encoding can show."""
    try:
        "".join(SIGNS.values()).encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return ASCII_SIGNS
    return SIGNS


@dataclass(frozen=True, slots=True)
class _Room:
    """Lines for each part of a frame, or how many of its things are shown."""

    grids: int
    grid_lines: int
    standings: int
    peers: int
    trainers: int
    events: int

    @classmethod
    def divide(cls, state: SwarmState, height: int | None) -> "_Room":
        num_grids, num_peers, num_trainers = len(state["grids"]), len(state["peers"]), len(state["losses"])
        num_standings = sum(len(grid.get("standings", [])) for grid in state["grids"])
        if height is None:
            return cls(num_grids, MAX_ROWS, min(MAX_ROWS, num_standings), num_peers, min(8, num_trainers), MAX_EVENTS)
        # the head, and a blank line, a head and a word about the rest of each part
        # and in a run its line, and who contributed
        left = height - 5 - (num_trainers > 0) - (height > 20 and state.get("run") is not None)
        left -= height > 30 and bool(state.get("contributors"))
        trainers = min(num_trainers, max(1, left // 8))
        events = max(1, min(MAX_EVENTS, left // 5))
        peers = max(1, min(num_peers, left // 5))
        left -= trainers + events + peers + (peers < num_peers)
        standings = min(num_standings, left // 3) if height > 20 else 0
        left -= standings and standings + 2 + (standings < num_standings)
        grids = max(1, min(num_grids, left // 5))
        left -= grids < num_grids
        return cls(grids, max(1, left // grids - 3), standings, peers, trainers, events)


def draw(
    state: SwarmState,
    width: int = 120,
    height: int | None = None,
    *,
    first: int = 0,
    signs: dict[str, str] = SIGNS,
    is_once: bool = False,
) -> RenderableType:
    """Return one frame of `SwarmObserver.state` for this many columns and lines (None: as many lines as it takes).

    `first`: the server, trainer and event that the lists begin with, scrolled down so far. `is_once`: it is the only
    look, before which servers may have died.
    """
    totals, room = state["totals"], _Room.divide(state, height)
    experts, servers = (counted(round(totals.get(f"{noun}s", 0)), noun) for noun in ("expert", "server"))
    head = Text.assemble(
        ("tesseract top", "bold"),
        f"   {experts} on {servers}"
        f"   {totals.get('calls_per_second', 0):,.1f} calls/s   {totals.get('rows_per_second', 0):,.0f} rows/s"
        f"   {totals.get('steps_per_second', 0):,.1f} steps/s",
        f"   loss {_figure(totals['loss'], 4)}" if "loss" in totals else "",
        f" (merged {_figure(totals['merged'], 4)})" if "merged" in totals else "",
        *(f"   {number:,} {unit} seen" for unit, number in state["seen"].items() if number),
        no_wrap=height is not None,
        overflow="ellipsis",
    )
    parts: list[RenderableType] = [head]
    if (run := state.get("run")) is not None and (height is None or height > 20):
        parts.append(Text(_describe_run(run), style="dim", no_wrap=height is not None, overflow="ellipsis"))
    for grid in state["grids"][: room.grids]:
        parts += [Text(), _describe_grid(grid), _draw_grid(grid, state["peers"], width, room.grid_lines, signs)]
    parts += _and_more(len(state["grids"]) - room.grids, "grid")
    if not state["grids"]:
        parts += [
            Text(),
            Text("No public node nearby hosts experts. Servers behind routers are found by the name of their grid:"),
            Text(f"tesseract top 'ffn.[0:4].[0:4]' --initial-peers {state['node']['join']}"),
            Text("No server runs yet? Start one (on another computer with --host 0.0.0.0):"),
            Text(f"tesseract serve --experts 'ffn.[0:4].[0:4]' --initial-peers {state['node']['join']}"),
        ]
        return Group(*parts, *([Text(), Text(ONCE, style="dim")] if is_once else []))
    parts += _draw_standings(state["grids"], room.standings, first, is_cut=height is not None)
    table = Table(box=None, padding=(0, 2, 0, 0))
    longest = max((cell_len(peer.get("name", "")) for peer in state["peers"]), default=0)
    widths, left_out = COLUMNS | {"name": min(longest, COLUMNS["name"])}, set() if longest else {"name"}
    for column in LEFT_OUT:
        if 2 * (len(widths) - len(left_out)) + sum(widths[one] for one in widths.keys() - left_out) <= width:
            break
        left_out.add(column)
    shown = [column for column in COLUMNS if column not in left_out]
    for column in shown:
        left = column in ("peer", "name", "path")
        fold = column == "path" and height is None
        table.add_column(
            column,
            justify="left" if left else "right",
            no_wrap=not fold,
            overflow="fold" if fold else "ellipsis",
            max_width=COLUMNS["name"] if column == "name" else None,
        )
    begin = max(0, min(first, len(state["peers"]) - room.peers))
    for peer in sorted(state["peers"], key=_has_left)[begin : begin + room.peers]:
        waiting = peer["waiting_rows"]
        cells: dict[str, str | Text] = {
            "peer": Text(peer["short"], style="" if _has_left(peer) else _color(peer)),
            "name": Text(peer.get("name", "")),
            "path": Text(_where(peer)),
            "round trip": "-" if peer["rtt"] is None else f"{1000 * peer['rtt']:.1f} ms",
            "experts": str(peer["num_experts"]),
            "calls/s": _figure(peer["calls_per_second"], 1),
            "rows/s": _figure(peer["rows_per_second"]),
            "steps/s": _figure(peer["steps_per_second"], 1),
            "load": f"{min(peer['busy'], 99.0):.0%}",
            "waiting": "-" if waiting is None else _figure(waiting),
            "answered": "never" if peer["answered_ago"] is None else f"{peer['answered_ago']:.0f} s ago",
        }
        style = "dim" if _has_left(peer) else "red" if peer["error"] else None
        table.add_row(*(cells[column] for column in shown), style=style)
    parts += [Text(), table, *_and_more(len(state["peers"]) - room.peers, "server")]
    thanks = state.get("contributors", [])[: 3 if height is None or height > 30 else 0]
    if thanks:
        names = ", ".join(f"{one['name'] or one['short']} ({one['rows']:,} rows)" for one in thanks)
        parts.append(Text(f"thanks, last 24 h: {names}", no_wrap=height is not None, overflow="ellipsis"))
    trainers = [
        f"{name}: step {step}, loss {_figure(loss, 4)}"
        + (f", {counted(left_out, 'answer')} left out" if left_out else "")
        for name, (step, loss, left_out, *_) in state["losses"].items()
    ]
    if trainers:
        begin = max(0, min(first, len(trainers) - room.trainers))
        said = "\n".join(trainers[begin : begin + room.trainers])
        parts += [Text(), Text(said, no_wrap=height is not None, overflow="ellipsis")]
    lines = "\n".join(
        f"{datetime.fromtimestamp(when):%H:%M:%S}  {sentence}"
        for when, sentence, _ in _latest(state["log"], room.events, first)
    )
    parts += [Text(), Text(lines, style="dim", no_wrap=height is not None, overflow="ellipsis")]
    if is_once and any(len(grid["experts"]) < math.prod(grid["size"]) for grid in state["grids"]):
        parts += [Text(), Text(ONCE, style="dim")]
    return Group(*parts)


def _figure(value: float, digits: int = 0) -> str:
    """Return it in few letters, whatever a stranger says."""
    return f"{value:,.{digits}f}" if abs(value) < 1e6 else f"{value:.2g}"


def _latest(log: list[Any], number: int, back: int) -> list[Any]:
    """Return the latest lines; with `back`, lines that are that far before them."""
    end = max(min(number, len(log)), len(log) - back)
    return log[max(0, end - number) : end]


def _has_left(peer: SwarmState) -> bool:
    return peer.get("left_ago") is not None


def _where(peer: SwarmState) -> str:
    """Return its path, or why it does not answer."""
    if _has_left(peer):
        return f"left {peer['left_ago'] // 60:.0f} min ago"
    return str(peer["error"] or peer["path"] or "-")


def _describe_run(run: SwarmState) -> str:
    name, _, owner = run["name"].partition("@")
    size = f"{counted(run['num_experts'], 'expert')} ({run['expert']}), {counted(run['parameters'], 'parameter')}"
    return f"{name}@{owner[:8]}, {run['mode']}: {size}; {safety(run['losses'])}"


def safety(losses: int | None) -> str:
    """Return in words how many more members a run may lose and still survive."""
    if losses is None:
        return "how safe it is, is not known yet"
    if losses < 0:
        return "has lost experts"
    if losses == 0:
        return "may lose experts with the next member that goes"
    return f"survives the loss of any {'member' if losses == 1 else f'{losses:,} members'}"


def _and_more(number: int, noun: str) -> list[RenderableType]:
    return [Text(f"and {counted(number, noun)} more", style="dim")] if number > 0 else []


def _color(peer: SwarmState) -> str:
    return COLORS[peer["number"] % len(COLORS)]


def _describe_grid(grid: SwarmState) -> Text:
    """Return ``ffn  4x4  16 alive, versions 10 to 12, ...``: what the signs do not show."""
    facts = [f"{len(grid['experts'])} alive"]
    held = {tuple(coords) for coords, _, followers, holders, *_ in grid.get("standings", []) if followers or holders}
    waiting = sum(tuple(coords) in held for coords in grid["lost"])
    facts += [f"{lost} lost"] if (lost := len(grid["lost"]) - waiting) else []
    facts += [f"{waiting} waiting for another server"] if waiting else []
    versions = [version for _, _, _, version, *_ in grid["experts"] if version is not None]
    if versions:
        low, high = min(versions), max(versions)
        facts.append(f"version {low}" if low == high else f"versions {low} to {high}")
    replicas = [number for _, _, number, *_ in grid["experts"]]
    if max(replicas, default=1) > 1:
        facts.append(f"{sum(replicas)} replicas, the slowest {max(cell[5] for cell in grid['experts'])} steps behind")
    facts += _describe_standings(grid.get("standings", []))
    size = "x".join(map(str, grid["size"]))
    return Text.assemble((f"{grid['prefix'][:40]}  {size}", "bold"), f"  {', '.join(facts)}")


def _describe_standings(standings: list[list[Any]]) -> list[str]:
    """Return how safe a run's experts are: how many losses all of them survive, and what is worse than that."""
    if not standings:
        return []
    counts = Counter(word for *_, word in standings)
    losses = min(losses for *_, losses, _ in standings)
    facts = [f"{counts[word]} {word}" for word in ("lost", "at risk", "not led") if counts[word]]
    return [*facts, f"each {safety(losses)}"] if losses > 0 else facts


def _draw_standings(grids: list[SwarmState], number: int, first: int, *, is_cut: bool) -> list[RenderableType]:
    """Return a table of this many of a run's experts, those in danger first: who has each, and how safe it is."""
    experts = [(grid["prefix"], *one) for grid in grids for one in grid.get("standings", [])]
    experts.sort(key=lambda one: (one[6], one[2] is not None))
    if not number:
        return []
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("expert", "led by", "followed by", "held by", "certified", "state"):
        table.add_column(column, no_wrap=is_cut, overflow="ellipsis" if is_cut else "fold")
    begin = max(0, min(first, len(experts) - number))
    for prefix, coords, primary, followers, holders, version, losses, word in experts[begin : begin + number]:
        table.add_row(
            Text(".".join((prefix, *map(str, coords)))),
            primary or "nobody",
            ", ".join(followers) or "nobody",
            ", ".join(holders) or "nobody",
            f"version {version:,}",
            f"{word}, survives {losses}" if losses > 0 else word,
            style="red" if losses < 0 else None if word == "safe" else "yellow",
        )
    return [Text(), table, *_and_more(len(experts) - number, "expert")]


def _draw_grid(
    grid: SwarmState, peers: list[SwarmState], width: int, height: int, signs: dict[str, str]
) -> RenderableType:
    size = grid["size"]
    rows, columns = (size[0], math.prod(size[1:])) if len(size) > 1 else (1, size[0])
    down, across = math.ceil(rows / height), math.ceil(columns / width)

    def place(coords: list[int]) -> tuple[int, int]:
        row, column = (coords[0], 0) if len(size) > 1 else (0, coords[0])
        for dimension, at in list(enumerate(coords))[1:]:
            column = column * size[dimension] + at
        return row // down, column // across

    # different signs, not colors alone: terminals and eyes differ
    blocks: dict[tuple[int, int], list[tuple[str, str]]] = {}
    for coords in grid["lost"]:
        blocks.setdefault(place(coords), []).append(("lost", "red"))
    for coords, host, *_ in grid["experts"]:
        peer = peers[host] if 0 <= host < len(peers) else None
        silent = peer is not None and peer["error"]
        cell = ("silent", "red") if silent else ("alive", "white" if peer is None else _color(peer))
        blocks.setdefault(place(coords), []).append(cell)
    sheet = Text()
    for row in range(math.ceil(rows / down)):
        for column in range(math.ceil(columns / across)):
            full = min(down, rows - row * down) * min(across, columns - column * across)
            kind, style = sign_of(blocks.get((row, column), []), full)
            sheet.append(signs[kind], style=style)
            sheet.append(" " if 2 * columns <= min(width, MAX_ROWS) else "")
        sheet.append("\n")
    if down * across == 1:
        legend = "{alive} alive  {silent} its server does not answer  {lost} lost  {nobody} nobody yet"
    else:
        legend = "each {size}: {alive} alive  {some} some  {silent} silent  {lost} lost  {nobody} nobody"
    sheet.append(legend.format(size=f"{down}x{across}", **signs), style="dim")
    return sheet


def sign_of(cells: list[tuple[str, str]], full: int) -> tuple[str, str]:
    """Return the kind of a block of `full` places, and its color."""
    if not cells:
        return "nobody", "dim"
    kinds, styles = {kind for kind, _ in cells}, {style for _, style in cells}
    style = "red" if "red" in styles and kinds != {"alive"} else styles.pop() if len(styles) == 1 else "white"
    if kinds == {"alive"} and len(cells) == full:
        return "alive", style
    if "alive" in kinds:
        return "some", style
    return ("silent" if "silent" in kinds else "lost"), style
