"""Brings the figures of a saved benchmark run into the documents: tables and plots of docs/benchmarks.md, and README's.

    make bench                      measures, and saves bench.json
    python docs/plots.py            brings it in (`python docs/plots.py OTHER.json` another one)

Rewrites everything between ``<!-- figures: begin -->`` and ``<!-- figures: end -->``, and the plots next to it.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.benchmarks.comparisons import COMPARISONS, comparison_table  # noqa: E402
from tests.benchmarks.figures import Figure, table  # noqa: E402

IMAGES: Final = ROOT / "docs/images"
OURS, THEIRS, GREY = "#2f6fd0", "#d9822b", "#7d8797"


def read_run(path: Path) -> dict[str, Any]:
    """A run as `python -m tests.benchmarks` saved it."""
    saved: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return saved


def _figure(data: dict[str, Any]) -> Figure:
    return Figure(data["name"], data["value"], data["unit"], data.get("asked"), data.get("details") or {})


def figures_of(run: dict[str, Any]) -> list[Figure]:
    """Everything that was measured, hivemind's last and named so."""
    found = []
    for side in ("ours", "hivemind"):
        for benchmark in run["benchmarks"]:
            for data in benchmark["figures"] if benchmark["side"] == side else ():
                one = _figure(data)
                name = one.name if side == "ours" else f"hivemind: {one.name}"
                found.append(Figure(name, one.value, one.unit, one.asked, one.details))
    return found


def ratios_of(run: dict[str, Any]) -> list[tuple[Any, Figure]]:
    """The comparisons that the run holds, each with its definition."""
    saved = {data["name"]: _figure(data) for data in run["comparisons"]}
    return [
        (each, saved[f"{each.ours} / {each.against}"])
        for each in COMPARISONS
        if f"{each.ours} / {each.against}" in saved
    ]


def machine_of(run: dict[str, Any]) -> str:
    """One sentence about where and when."""
    machine = dict(run["machine"])
    date, cpu, system = (machine.pop(key) for key in ("date", "cpu", "system"))
    versions = ", ".join(f"{name} {version}" for name, version in machine.items())
    return f"{date}, {cpu}, {system}, {versions}."


def results(run: dict[str, Any]) -> str:
    """The part of docs/benchmarks.md that a run decides."""
    failed = [f"`{one['name']}` {one['error']}" for one in run["benchmarks"] if one["error"]]
    parts = [f"Measured on {machine_of(run)}\n"]
    if failed:
        parts.append(f"Not measured: {'; '.join(failed)}.\n")
    if run["comparisons"]:
        parts += [
            "![Rates as multiples of hivemind's](images/benchmarks-hivemind.svg)\n",
            f"{comparison_table(ratios_of(run))}\n",
        ]
    figures = figures_of(run)
    asked = [figure for figure in figures if figure.met is not None]
    met = sum(bool(figure.met) for figure in asked)
    parts += [
        f"Everything that was measured; of the {len(asked)} figures below of which something was asked, {met} "
        "reach it:\n",
        "![Figures as shares of what was asked of them](images/benchmarks-asked.svg)\n",
        table(figures),
    ]
    return "\n".join(parts) + "\n"


def summary(run: dict[str, Any]) -> str:
    """The few lines of README."""
    rows = [(each, figure) for each, figure in ratios_of(run) if each.against == "hivemind"]
    lines = ["| load | ours | hivemind 1.1.12 | ratio |", "|---|---:|---:|---:|"]
    for each, figure in rows:
        ours, theirs, unit = figure.details["ours"], figure.details["hivemind"], figure.details["unit"]
        lines.append(f"| {each.ours} | {ours:,.0f} {unit} | {theirs:,.0f} | {figure.value:.1f} |")
    about = (
        f"Both on one machine, one after another: {machine_of(run)}\n"
        "All on loopback, so without any distance. The machine is small and shared: the same figure differs by a\n"
        "third from one quarter of an hour to the next."
    )
    return "\n".join([*lines, "", about]) + "\n"


def plot_ratios(run: dict[str, Any], path: Path) -> None:
    """Bars: our rate as a multiple of hivemind's, with what was asked as a mark."""
    from matplotlib.figure import Figure as Canvas

    rows = [(each, figure) for each, figure in ratios_of(run) if each.against == "hivemind"][::-1]
    canvas = Canvas(figsize=(7.6, 0.5 + 0.42 * len(rows)), layout="constrained")
    axes = canvas.subplots()
    axes.barh([each.ours for each, _ in rows], [figure.value for _, figure in rows], color=OURS, height=0.6)
    for at, (each, figure) in enumerate(rows):
        axes.text(figure.value * 1.06, at, f"{figure.value:.1f} x", va="center", color=GREY)
        goal = re.search(r"[\d.]+", each.asked or "")
        if goal is not None:
            axes.plot([float(goal[0])], [at], marker="|", markersize=17, markeredgewidth=2.5, color=THEIRS)
    axes.set_xscale("log")
    axes.set_xlim(0.8, max(figure.value for _, figure in rows) * 2.2)
    axes.axvline(1, color=GREY, linewidth=1)
    axes.set_xlabel("times hivemind 1.1.12 (orange: what was asked)")
    _save(canvas, [axes], path)


def plot_asked(run: dict[str, Any], path: Path) -> None:
    """Dots: how far each figure is from what was asked of it; right of the line it is met."""
    from matplotlib.figure import Figure as Canvas

    rows = []
    for figure in [*figures_of(run), *(figure for _, figure in ratios_of(run))]:
        goal = re.match(r"\s*(>=|<=|>|<)\s*([\d.,]+)", figure.asked or "")
        if goal is None or float(goal[2].replace(",", "")) == 0 or figure.value <= 0:
            continue  # "none at all" has no share
        share = figure.value / float(goal[2].replace(",", ""))
        rows.append((figure.name, share if goal[1].startswith(">") else 1 / share, bool(figure.met)))
    rows.sort(key=lambda row: row[1])
    canvas = Canvas(figsize=(7.6, 0.6 + 0.22 * len(rows)), layout="constrained")
    axes = canvas.subplots()
    for met, colour in ((True, OURS), (False, THEIRS)):
        places = [at for at, row in enumerate(rows) if row[2] is met]
        axes.scatter([rows[at][1] for at in places], places, color=colour, s=24)
    axes.set_yticks(range(len(rows)), [name for name, _, _ in rows], fontsize=7)
    axes.axvline(1, color=GREY, linewidth=1)
    axes.set_xscale("log")
    axes.set_xlabel("times better than asked (blue: met, orange: missed)")
    _save(canvas, [axes], path)


def _save(canvas: Any, all_axes: list[Any], path: Path) -> None:
    """Readable on light and dark pages: no background, middling greys."""
    import matplotlib

    for axes in all_axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(GREY)
        axes.tick_params(colors=GREY, which="both")
        axes.xaxis.label.set_color(GREY)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "tesseract", "font.family": "sans-serif"}):
        canvas.savefig(path, transparent=True, metadata={"Date": None})


def put(page: Path, text: str) -> None:
    """Writes `text` between the page's marks. Raises: ValueError if it has none."""
    shown, num_found = re.subn(
        r"(<!-- figures: begin -->\n).*?(<!-- figures: end -->)",
        lambda match: f"{match[1]}\n{text}\n{match[2]}",
        page.read_text(encoding="utf-8"),
        flags=re.S,
    )
    if num_found != 1:
        raise ValueError(f"{page} has no place for figures")
    page.write_text(shown, encoding="utf-8")


def main() -> None:
    run = read_run(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "bench.json")
    put(ROOT / "docs/benchmarks.md", results(run))
    if run["comparisons"]:
        put(ROOT / "README.md", summary(run))
        plot_ratios(run, IMAGES / "benchmarks-hivemind.svg")
    plot_asked(run, IMAGES / "benchmarks-asked.svg")


if __name__ == "__main__":
    main()
