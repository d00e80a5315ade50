"""Which figures of a run are divided by which, and what is asked of the ratio."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tests.benchmarks.figures import Figure, number
from tests.benchmarks.loads import SMALL


@dataclass(frozen=True)
class Comparison:
    """`ours` over `theirs`, after `scale` brings our unit to theirs."""

    ours: str
    theirs: str
    against: str
    """A peer: the figure of that name on its side. ``"ceiling"``: of the bare sockets'."""
    asked: str | None
    scale: float = 1.0


_MEGABYTES_PER_ROW = 1024 * 4 / 1e6
_ECHO = "ceiling: echo 4 KiB, 8 at once, tls: processor time"

COMPARISONS = (
    Comparison("nop 1x1024, 8 clients, tls", "nop 1x1024, 8 clients", "hivemind", ">= 20"),
    Comparison("nop 1x1024, 1 client with 8 callers, tls", "nop 1x1024, 1 client with 8 callers", "hivemind", ">= 30"),
    Comparison("nop 2048x1024, 4 clients, tls", "nop 2048x1024, 4 clients", "hivemind", ">= 5"),
    Comparison(
        "nop 2048x1024, 4 clients, tls", "ceiling: echo 8 MiB, tls", "ceiling", ">= 0.6", scale=_MEGABYTES_PER_ROW
    ),
    Comparison("nop 2048x1024, 4 clients, plain", "nop 2048x1024, 4 clients", "hivemind", ">= 10"),
    Comparison(
        "nop 2048x1024, 4 clients, plain", "ceiling: echo 8 MiB, plain", "ceiling", ">= 0.6", scale=_MEGABYTES_PER_ROW
    ),
    Comparison("ffn 256x256, 8 clients, tls", "ffn 256x256, 8 clients", "hivemind", None),
    Comparison("ffn 4x256, 16 clients, tls", "ffn 4x256, 16 clients", "hivemind", ">= 15"),
    Comparison("dht 16 nodes", "dht 16 nodes", "hivemind", ">= 10"),
    Comparison("mixture 2048x1024, 64x64 grid, tls", "mixture 2048x1024, 64x64 grid", "hivemind", ">= 20"),
    *(
        Comparison(f"{load.name}, tls", load.name, peer, "> 1")
        for load in SMALL
        for peer in ("grpc.aio", "torch.distributed.rpc", "ray")
    ),
    Comparison("nop 1x1024, 1 client with 8 callers, tls: processor time", _ECHO, "ceiling", "<= 5"),
)


def compare(sides: Mapping[str, Mapping[str, Figure]]) -> list[tuple[Comparison, Figure]]:
    """The ratio of every comparison whose two figures were measured, by side and name; ceilings are among "ours"."""
    found = []
    for each in COMPARISONS:
        theirs = sides.get("ours" if each.against == "ceiling" else each.against, {})
        left, right = sides["ours"].get(each.ours), theirs.get(each.theirs)
        if left is not None and right is not None and right.value > 0:
            ratio = left.value * each.scale / right.value
            details = {"ours": left.value, each.against: right.value, "unit": left.unit}
            found.append((each, Figure(f"{each.ours} / {each.against}", ratio, "", each.asked, details)))
    return found


def comparison_table(ratios: Iterable[tuple[Comparison, Figure]]) -> str:
    """Ours, theirs, the ratio and what was asked, as a Markdown table."""
    lines = ["| what | ours | against | theirs | ratio | asked | met |", "|---|---:|---|---:|---:|---|---|"]
    for each, figure in ratios:
        ours, theirs, unit = figure.details["ours"] * each.scale, figure.details[each.against], figure.details["unit"]
        if each.scale != 1.0:
            unit = "MB/s"
        verdict = {True: "yes", False: "**no**", None: ""}[figure.met]
        lines.append(
            f"| {each.ours} | {number(ours)} {unit} | {each.against} | {number(theirs)} | {number(figure.value)} "
            f"| {figure.asked or ''} | {verdict} |"
        )
    return "\n".join(lines)
