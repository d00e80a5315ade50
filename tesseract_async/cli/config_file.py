"""``--config FILE``: a command's options from a TOML file. What stands on the command line goes before the file.

Each option may stand under its own name, without the dashes in front (``num-experts`` or ``num_experts``), in a table
or at the top: tables are for the reader's eye.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])


def config_option(command: Command) -> Command:
    """Adds ``--config`` to a command."""
    return click.option(
        "--config",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        is_eager=True,
        expose_value=False,
        callback=_apply,
        help="Take options from this TOML file; flags go before it.",
    )(command)


def _apply(ctx: click.Context, param: click.Parameter, path: Path | None) -> None:
    if path is None:
        return
    try:
        ctx.default_map = {**(ctx.default_map or {}), **read_config(path, ctx.command)}
    except ValueError as error:
        raise click.BadParameter(str(error), ctx=ctx, param=param) from None


def read_config(path: Path, command: click.Command) -> dict[str, Any]:
    """The file's values by the parameter names of `command`.

    Raises: ValueError with a sentence for a file that is no TOML, a key that is no option, or one that stands twice.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not TOML: {error}") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    options: dict[str, click.Option] = {}
    for option in command.params:
        if isinstance(option, click.Option) and not option.is_eager:
            for flag in (*option.opts, *option.secondary_opts):
                if flag.startswith("--"):
                    options[flag[2:].replace("-", "_")] = option
    found: dict[str, Any] = {}
    for key, value in _flatten(data):
        known = options.get(key.replace("-", "_"))
        if known is None or known.name is None:
            close = difflib.get_close_matches(key.replace("-", "_"), options, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ValueError(f"{path}: {key} is no option of this command{hint}")
        if known.name in found:
            raise ValueError(f"{path}: {key} stands twice")
        if isinstance(value, list) and not known.multiple:
            raise ValueError(f"{path}: {key} takes one value, not a list")
        if known.multiple and not isinstance(value, list):
            value = [value]
        found[known.name] = value
    return found


def _flatten(data: dict[str, Any]) -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, value in data.items():
        pairs += value.items() if isinstance(value, dict) else [(key, value)]
    return pairs
