"""Options made of the fields of a class."""

import importlib.util
import py_compile
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from tesseract_async.cli.flags import grouped
from tesseract_async.cli.main import COMMANDS, main

SOURCE = '''
from dataclasses import dataclass
from typing import Annotated

from tesseract_async.cli.flags import NO_FLAG

@dataclass
class Options:
    name: Annotated[str, NO_FLAG] = "anna"
    num_rows: tuple[int, ...] = ()
    """Compute this many rows. More take longer."""
'''


@pytest.mark.parametrize("has_source", [True, False])
def test_flags_are_there_where_their_source_is_not(
    tmp_path: Path, has_source: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Programs that are packed hold compiled modules alone."""
    source = tmp_path / "packed.py"
    source.write_text(SOURCE)
    compiled = py_compile.compile(str(source), cfile=str(tmp_path / "packed.pyc"), doraise=True)
    assert compiled is not None
    if not has_source:
        source.unlink()
    spec = importlib.util.spec_from_file_location("packed", source if has_source else compiled)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "packed", module)
    spec.loader.exec_module(module)

    @click.command()
    @grouped("options", module.Options)
    def command(options: object) -> None:
        click.echo(options)

    given = CliRunner().invoke(command, ["--num-rows", "3"])
    assert given.output == "Options(name='anna', num_rows=(3,))\n"
    told = CliRunner().invoke(command, ["--help"]).output
    assert ("Compute this many rows; may be given several times." in told) == has_source
    assert "--name" not in told


def test_every_flag_says_what_it_does() -> None:
    for name in COMMANDS:
        command = main.get_command(click.Context(main), name)
        for one in command.commands.values() if isinstance(command, click.Group) else [command]:
            assert one is not None
            for option in one.params:
                assert not isinstance(option, click.Option) or option.help, f"{name} {option.name}"
