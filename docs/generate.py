"""Writes the pages that follow from the code; MkDocs runs it before each build, so that they stay true."""

from __future__ import annotations

import ast
from pathlib import Path

import click

from tesseract_async.cli.main import COMMANDS, CONTEXT, main

DOCS = Path(__file__).parent
PACKAGE = DOCS.parent / "tesseract_async"


def commands() -> str:
    """docs/reference/commands.md: what ``--help`` says, command by command."""
    top = click.Context(main, info_name="tesseract", terminal_width=96, **CONTEXT)
    parts = ["# Commands\n", "What `tesseract --help` says.\n", _block(main.get_help(top))]
    for name in sorted(COMMANDS):
        command = main.get_command(top, name)
        assert command is not None
        context = click.Context(command, info_name=name, parent=top, terminal_width=96)
        parts += [f"## tesseract {name}\n", _block(command.get_help(context))]
    parts += [
        "## Completion\n",
        "For bash, put this into `~/.bashrc` (zsh and fish likewise, with `zsh_source` and `fish_source`):\n",
        '    eval "$(_TESSERACT_COMPLETE=bash_source tesseract)"\n',
    ]
    return "\n".join(parts)


def metrics() -> str:
    """docs/reference/metrics.md: every metric that the package counts, sets or observes, by name and labels."""
    kinds = {"count": "counter", "set": "gauge", "observe": "histogram"}
    found: dict[str, tuple[str, set[str], set[str]]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in kinds):
                continue
            owner = node.func.value
            name = owner.attr if isinstance(owner, ast.Attribute) else owner.id if isinstance(owner, ast.Name) else ""
            if name.strip("_") != "metrics" or not node.args:
                continue
            if isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str):
                labels = {word.arg for word in node.keywords if word.arg not in (None, "bounds", "amount")}
                kind, known, places = found.setdefault(node.args[0].value, (kinds[node.func.attr], set(), set()))
                known.update(label for label in labels if label)
                places.add(str(path.relative_to(PACKAGE).with_suffix("")))
    lines = [
        "# Metrics",
        "",
        "What a node counts, in `node.metrics.snapshot()`, and for Prometheus with the prefix `tesseract_` and, for",
        "counters, the suffix `_total`.",
        "",
        "| name | kind | labels | counted in |",
        "|---|---|---|---|",
    ]
    for name, (kind, labels, places) in sorted(found.items()):
        lines.append(f"| `{name}` | {kind} | {', '.join(sorted(labels))} | {', '.join(sorted(places))} |")
    return "\n".join(lines) + "\n"


def _block(text: str) -> str:
    return f"```text\n{text.rstrip()}\n```\n"


PAGES = {"reference/commands.md": commands, "reference/metrics.md": metrics}


def on_pre_build(config: object) -> None:
    """MkDocs' hook. Writes only what changed: `mkdocs serve` watches the folder."""
    for name, write in PAGES.items():
        text = write()
        if not (DOCS / name).exists() or (DOCS / name).read_text() != text:
            (DOCS / name).write_text(text)
