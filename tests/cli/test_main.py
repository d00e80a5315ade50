"""The command as a user meets it: quick help, sentences for mistakes."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
from click.testing import CliRunner

from tesseract_async import __version__
from tesseract_async.cli.main import COMMANDS, main


def test_help_names_every_command() -> None:
    result = CliRunner().invoke(main, ["--help"])
    assert result.exit_code == 0
    assert all(name in result.output for name in COMMANDS)
    assert __version__ in CliRunner().invoke(main, ["--version"]).output


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_explains_itself(name: str) -> None:
    result = CliRunner().invoke(main, [name, "--help"])
    assert result.exit_code == 0
    assert "Usage:" in result.output


def test_help_is_quick_and_loads_nothing_heavy() -> None:
    heavy = ("torch", "numpy", "aiortc", "rich", "cryptography", "matplotlib", "sklearn")
    code = (
        "import sys\n"
        "from tesseract_async.cli.main import main\n"
        "try: main(['--help'], prog_name='tesseract')\n"
        "except SystemExit: pass\n"
        f"loaded = set(sys.modules) & set({heavy!r})\n"
        "assert not loaded, loaded\n"
    )
    times = []
    for _ in range(3):  # the best of three: other tests may hold the cores
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - started)
    assert min(times) < 0.3


def test_an_unknown_command_is_a_sentence() -> None:
    result = CliRunner().invoke(main, ["sreve"])
    assert result.exit_code == 2
    assert "No such command" in result.output


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["serve"], "--experts"),
        (["serve", "--experts", "ffn"], "not an expert's uid"),
        (["serve", "--experts", "ffn.[0:9999]"], "at most 4096"),
        (["serve", "--experts", "ffn.0", "--size", "wide"], "in_features=1024"),
        (["serve", "--experts", "ffn.0", "--port", "70000"], "65535"),
        (["demo", "--servers", "0"], "--servers"),
        (["demo", "--steps", "0"], "--steps"),
    ],
)
def test_a_users_mistake_is_a_sentence(arguments: list[str], sentence: str) -> None:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert sentence in result.output
    assert "Traceback" not in result.output
