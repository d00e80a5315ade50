"""What a benchmark prints: figures, one JSON object a line. Standard library only, so that every environment has it."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

_ASKED = re.compile(r"\s*(>=|<=|>|<)\s*([0-9][0-9_,]*(?:\.[0-9]+)?)")


@dataclass(frozen=True)
class Figure:
    """One measured number.

    - `name`: unique within a run, for example ``"nop 1x1024, 8 clients, tls"``.
    - `unit`: what `value` counts (``"calls/s"``, ``"MB/s"``, ``"ms"``); ``""`` for a bare ratio.
    - `asked`: the goal, written ``">= 20"`` or ``"< 10"`` and judged by `met`; other text is shown unjudged; None asks
      for nothing.
    - `details`: whatever helps to read the number again later; saved, not shown.
    """

    name: str
    value: float
    unit: str
    asked: str | None = None
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def met(self) -> bool | None:
        """Whether `value` reaches `asked`; None where nothing that can be judged is asked."""
        found = _ASKED.match(self.asked) if self.asked else None
        if found is None:
            return None
        sign, limit = found[1], float(found[2].replace(",", "").replace("_", ""))
        if sign.startswith(">"):
            return self.value > limit or (sign == ">=" and self.value == limit)
        return self.value < limit or (sign == "<=" and self.value == limit)

    def emit(self) -> Figure:
        """Prints the figure as one JSON line at once and returns it."""
        sys.stdout.write(json.dumps(asdict(self)) + "\n")
        sys.stdout.flush()
        return self


def emit(name: str, value: float, unit: str, asked: str | None = None, **details: Any) -> Figure:
    """`Figure(...).emit()` with the details as keywords."""
    return Figure(name, value, unit, asked, details).emit()


def read_figure(line: str) -> Figure | None:
    """The figure in a line that a benchmark printed, or None if the line holds something else."""
    if not line.lstrip().startswith("{"):
        return None
    try:
        data = json.loads(line)
        asked = data.get("asked")
        return Figure(
            name=str(data["name"]),
            value=float(data["value"]),
            unit=str(data.get("unit") or ""),
            asked=None if asked in (None, "") else _as_goal(asked, data.get("unit")),
            details=dict(data.get("details") or {}),
        )
    except (KeyError, TypeError, ValueError):
        return None


def _as_goal(asked: Any, unit: Any) -> str:
    """A bare number means "at least", except for what should be small: times and sizes."""
    if isinstance(asked, bool) or not isinstance(asked, int | float):
        return str(asked)
    small = str(unit).split(" ")[0] in {"s", "ms", "us", "µs", "B", "KB", "MB", "GB", "bytes", "rounds"}
    return f"{'<=' if small else '>='} {asked:g}"


def table(rows: Iterable[Figure]) -> str:
    """The figures as a Markdown table: measured, asked, met."""
    lines = ["| what | measured | asked | met |", "|---|---:|---:|---|"]
    for figure in rows:
        verdict = {True: "yes", False: "**no**", None: ""}[figure.met]
        measured = f"{number(figure.value)} {figure.unit}".strip()
        lines.append(f"| {figure.name} | {measured} | {figure.asked or ''} | {verdict} |")
    return "\n".join(lines)


def number(value: float) -> str:
    """A number for people: three or four digits that mean something."""
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}" if size < 1 else f"{value:.3g}" if size < 100 else f"{value:.0f}"


def percentile(values: Iterable[float], share: float) -> float:
    """The value below which `share` (0 to 1) of the values lie, by the nearest rank. Raises: ValueError if empty."""
    ordered = sorted(values)
    if not ordered:
        raise ValueError("no values")
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
