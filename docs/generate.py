"""Writes the pages that follow from the code; MkDocs runs it before each build, so that they stay true.

After the build it looks through the site: nothing in it may be fetched from elsewhere when the pages are read.
"""

import ast
import re
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
ROOT = DOCS.parent
PACKAGE = ROOT / "tesseract_async"
sys.path.insert(0, str(ROOT))  # the clone that the documents describe, wherever MkDocs is started

import click  # noqa: E402

from tesseract_async.cli.main import COMMANDS, CONTEXT, main  # noqa: E402
from tesseract_async.monitoring.catalogue import METRICS, SWARM_COUNTERS, SWARM_METRICS  # noqa: E402

PREFIX = "tesseract_"
KINDS = {"count": "counter", "set": "gauge", "observe": "histogram", "histogram": "histogram"}
FETCHED = re.compile(r"""(?:<(?:script|img|iframe|source)\b[^>]*\bsrc|<link\b[^>]*\bhref)=["']?(?:https?:)?//[^"'>]*""")


def all_commands() -> list[tuple[str, click.Command, click.Context]]:
    """Every subcommand by name, with a context in which its help and its options' names can be asked for."""
    top = click.Context(main, info_name="tesseract", terminal_width=96, **CONTEXT)
    found = []
    for name in sorted(COMMANDS):
        command = main.get_command(top, name)
        assert command is not None
        context = click.Context(command, info_name=name, parent=top, terminal_width=96)
        found.append((name, command, context))
        for part, inner in command.commands.items() if isinstance(command, click.Group) else ():
            found.append((f"{name} {part}", inner, click.Context(inner, info_name=part, parent=context)))
    return found


def commands() -> str:
    """docs/reference/commands.md: what ``--help`` says, command by command."""
    top = click.Context(main, info_name="tesseract", terminal_width=96, **CONTEXT)
    parts = ["# Commands\n", "What `tesseract --help` says.\n", _block(main.get_help(top))]
    for name, command, context in all_commands():
        parts += [f"## tesseract {name}\n", _block(command.get_help(context))]
    parts += [
        "## Exit status\n",
        "| status | meaning |",
        "|---|---|",
        "| 0 | done |",
        "| 1 | it did not work; a sentence on standard error says why |",
        "| 2 | the command line is wrong; a sentence says where |",
        "| 130 | interrupted by Ctrl-C in the middle of its work |",
        "| 143 | ended by SIGTERM in the middle of its work |",
        "",
        "`serve`, `dht` and `dashboard` leave cleanly on Ctrl-C and SIGTERM, and then end with 0.\n",
        "## Completion\n",
        "For bash, put this into `~/.bashrc` (zsh and fish likewise, with `zsh_source` and `fish_source`):\n",
        '    eval "$(_TESSERACT_COMPLETE=bash_source tesseract)"\n',
    ]
    return "\n".join(parts)


def configuration() -> str:
    """docs/reference/configuration.md: each option's flag, environment variable and name in a TOML file."""
    parts = [
        "# Configuration\n",
        "An option may be given in three places. The first that has it counts:\n",
        "1. the command line,",
        "2. the environment,",
        "3. a TOML file named by `--config`, for the commands that have that flag.\n",
        "In a TOML file an option stands under its own name (`num-experts` or `num_experts`), at the top or in any",
        "table: tables are for the reader's eye. An option that may be given several times takes a list there.",
        "A switch takes `true`. In the environment, write several values with spaces between them, and `1` for a",
        "switch.",
        "`examples/volunteer.toml` of the repository shows a whole file.\n",
        "```toml",
        'host = "0.0.0.0"',
        'initial-peers = ["198.51.100.7:31337"]',
        "num-experts = 4",
        "```\n",
    ]
    for name, command, context in all_commands():
        options = [
            option
            for option in command.params
            if isinstance(option, click.Option) and not (option.hidden or option.is_eager)
        ]
        if not options:
            continue
        from_file = any(option.name == "config" for option in command.params)
        head, line = ["flag", "environment", "default"], ["---", "---", "---"]
        if from_file:
            head.insert(2, "TOML")
            line.append("---")
        parts += [f"## tesseract {name}\n", f"| {' | '.join(head)} |", f"|{'|'.join(line)}|"]
        for option in options:
            flag = max(option.opts, key=len)
            cells = [
                " ".join(f"`{one}`" for one in sorted(option.opts, key=len, reverse=True)),
                f"`{_variable(option, context)}`",
            ]
            if from_file:
                cells.append(f"`{flag.removeprefix('--')}`")
            cells.append(_default(option))
            parts.append(f"| {' | '.join(cells)} |")
        parts.append("")
    return "\n".join(parts)


def _variable(option: click.Option, context: click.Context) -> str:
    if option.envvar is not None:
        return option.envvar if isinstance(option.envvar, str) else option.envvar[0]
    return f"{context.auto_envvar_prefix}_{str(option.name).upper()}"


def _default(option: click.Option) -> str:
    if option.required:
        return "required"
    if option.is_flag or option.multiple or option.default is None or callable(option.default):
        return ""
    text = str(option.default)
    return f"`{text}`" if text and not text.startswith("Sentinel") else ""


def counted() -> dict[str, tuple[str, set[str], set[str]]]:
    """Every metric that the package counts, sets or observes: name -> kind, labels, files."""
    found: dict[str, tuple[str, set[str], set[str]]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in KINDS):
                continue
            owner = node.func.value
            name = owner.attr if isinstance(owner, ast.Attribute) else owner.id if isinstance(owner, ast.Name) else ""
            if name.strip("_") != "metrics" or not node.args:
                continue
            if isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str):
                labels = {word.arg for word in node.keywords if word.arg not in (None, "bounds", "amount")}
                kind, known, places = found.setdefault(node.args[0].value, (KINDS[node.func.attr], set(), set()))
                known.update(label for label in labels if label)
                places.add(str(path.relative_to(PACKAGE).with_suffix("")))
    return found


def metrics() -> str:
    """docs/reference/metrics.md: what every metric means, with its unit and labels."""
    lines = [
        "# Metrics",
        "",
        "What a node counts. Prometheus sees these names, served by `tesseract dashboard` under `/metrics` (see",
        "[Watch a swarm](../how-to/watch.md)). In a program, `node.metrics.snapshot()` gives the same figures under",
        "names without `tesseract_` and `_total`.",
        "",
        "A counter only rises, from 0 at the node's start. A gauge is a value of this moment. A histogram is three",
        "series, `_bucket`, `_sum` and `_count`. A metric appears once there is something to say.",
        "",
        "| name | kind | unit | labels | meaning |",
        "|---|---|---|---|---|",
    ]
    found = counted()
    for name, (unit, sentence) in METRICS.items():
        kind, labels, _ = found[name]
        shown = f"{PREFIX}{name}{'_total' if kind == 'counter' else ''}"
        lines.append(
            f"| `{shown}` | {kind} | {unit} | {', '.join(f'`{one}`' for one in sorted(labels))} | {sentence} |"
        )
    lines += [
        "",
        "## The swarm",
        "",
        "`tesseract dashboard` adds the swarm as it sees it. Servers are named by their peer id and by their `--name`.",
        "",
        "| name | kind | unit | meaning |",
        "|---|---|---|---|",
    ]
    for name, (unit, sentence) in SWARM_METRICS.items():
        is_counter = name in SWARM_COUNTERS
        shown, kind = f"{PREFIX}{name}{'_total' if is_counter else ''}", "counter" if is_counter else "gauge"
        lines.append(f"| `{shown}` | {kind} | {unit} | {sentence} |")
    return "\n".join(lines) + "\n"


SETTINGS_OF = {
    "client": "Calling experts",
    "server": "Hosting experts",
    "runtime": "Computing",
    "experts": "Experts in the network",
    "network": "The distributed hash table",
    "nat": "Ways through NATs",
    "endpoint": "Calls between nodes",
}


def settings_classes() -> dict[str, list[str]]:
    """Room -> the settings dataclasses that it defines, as dotted paths."""
    found: dict[str, list[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        module = path.relative_to(PACKAGE).with_suffix("")
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and node.name.endswith("Settings") and module.parts[0] != "cli":
                dotted = ".".join(("tesseract_async", *module.parts, node.name))
                found.setdefault(module.parts[0], []).append(dotted)
    return found


def settings() -> str:
    """docs/reference/settings.md: every settings dataclass, by room."""
    lines = [
        "# Settings",
        "",
        "Numbers that may be chosen stand in frozen dataclasses, one for each part. The part takes them as",
        "`settings=`, unless its description says otherwise. The defaults are meant to be right; times are seconds.",
        "",
    ]
    found = settings_classes()
    for room, title in SETTINGS_OF.items():
        dotted_names = found.pop(room, [])
        lines += [f"## {title}", ""] * bool(dotted_names)
        for dotted in dotted_names:
            lines += [f"::: {dotted}", ""]
    assert not found, f"SETTINGS_OF lacks {sorted(found)}"
    return "\n".join(lines)


def _block(text: str) -> str:
    return f"```text\n{text.rstrip()}\n```\n"


PAGES = {
    "reference/commands.md": commands,
    "reference/configuration.md": configuration,
    "reference/metrics.md": metrics,
    "reference/settings.md": settings,
}


def write_pages() -> None:
    """Writes only what changed: `mkdocs serve` watches the folder."""
    for name, write in PAGES.items():
        text = write()
        if not (DOCS / name).exists() or (DOCS / name).read_text(encoding="utf-8") != text:
            (DOCS / name).write_text(text, encoding="utf-8")


def on_config(config: Any) -> None:
    """MkDocs' hook: where the repository is known, each page links to its source there."""
    if config["repo_url"]:
        config["edit_uri"] = "edit/main/docs/"


def on_pre_build(config: object) -> None:
    """MkDocs' hook."""
    write_pages()


def on_pre_page(page: Any, *, config: object, files: object) -> Any:
    """MkDocs' hook: a page that is written here has no source to edit."""
    if page.file.src_uri in PAGES:
        page.edit_url = None
    return page


def on_post_build(config: Any) -> None:
    """MkDocs' hook. Raises: PluginError if a page would fetch something from elsewhere."""
    from mkdocs.exceptions import PluginError

    site = Path(config["site_dir"])
    for page in [*site.rglob("*.html"), *site.rglob("*.css")]:
        text = page.read_text(encoding="utf-8")
        found = FETCHED.findall(text) if page.suffix == ".html" else re.findall(r"url\(['\"]?(?:https?:)?//[^)]*", text)
        if found:
            raise PluginError(f"{page.relative_to(site)} fetches from elsewhere: {found[0]}")


if __name__ == "__main__":
    write_pages()
