"""``--config FILE``: a command's options from a TOML file.

Each option stands under its own name, without the dashes in front (``num-experts`` or ``num_experts``), in any table or
at the top: tables are for the reader's eye. A flag on the command line wins over the file.
"""

import difflib
import tomllib
from pathlib import Path

import click

from tesseract_async.cli.types import EXISTING_FILE


def read_config(path: Path, command: click.Command) -> dict[str, object]:
    """Return the file's values by the parameter names of `command`.

    Raises: ValueError with a sentence for a file that is not TOML, an unknown option, or one that is given twice.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not TOML: {error}") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    options = {
        flag[2:].replace("-", "_"): option
        for option in command.params
        if isinstance(option, click.Option) and not option.is_eager
        for flag in (*option.opts, *option.secondary_opts)
        if flag.startswith("--")
    }
    found: dict[str, object] = {}
    for key, value in data.items():
        for name, one in value.items() if isinstance(value, dict) else [(key, value)]:
            option = options.get(name.replace("-", "_"))
            if option is None or option.name is None:
                close = difflib.get_close_matches(name.replace("-", "_"), options, n=1)
                hint = f"; did you mean {close[0]}?" if close else ""
                raise ValueError(f"{path}: {name} is not an option of this command{hint}")
            if option.name in found:
                raise ValueError(f"{path}: {name} is given twice")
            if isinstance(one, list) and not option.multiple:
                raise ValueError(f"{path}: {name} takes one value, not a list")
            found[option.name] = [one] if option.multiple and not isinstance(one, list) else one
    return found


def _apply(ctx: click.Context, param: click.Parameter, path: Path | None) -> None:
    if path is None:
        return
    try:
        ctx.default_map = {**(ctx.default_map or {}), **read_config(path, ctx.command)}
    except ValueError as error:
        raise click.BadParameter(str(error), ctx=ctx, param=param) from None


config_option = click.option(
    "--config",
    type=EXISTING_FILE,
    is_eager=True,
    expose_value=False,
    callback=_apply,
    help="Take options from this TOML file; flags override it.",
)
