"""The command as a user meets it: quick help, sentences for mistakes."""

import inspect
import re
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from tesseract_async import __version__
from tesseract_async.cli.main import COMMANDS, main
from tesseract_async.cli.serve import SIZES


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


@pytest.mark.skipif(sys.platform == "win32", reason="no resource module")
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

    def cpu_seconds(code: str) -> float:
        import resource

        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    # the clock would tell what else the machine does, and how fast it is
    rounds = [(cpu_seconds(code), cpu_seconds("import click")) for _ in range(5)]
    ours, least = map(min, zip(*rounds, strict=True))
    assert ours < 2.5 * least


def test_an_unknown_command_is_a_sentence() -> None:
    result = CliRunner().invoke(main, ["sreve"])
    assert result.exit_code == 2
    assert "No such command" in result.output


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["serve"], "--experts"),
        (["serve", "--experts", "ffn"], "not an expert's uid"),
        (["serve", "--experts", "ffn.[0:99999]"], "at most 16384"),
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


def test_help_of_serve_lists_each_option_once_the_ten_that_matter_first() -> None:
    text = CliRunner().invoke(main, ["serve", "--help"]).output
    titles = ["What matters first:", "Experts:", "Run:", "Limits:", "Network:", "Advanced:"]
    places = [text.index(f"\n{title}\n") for title in titles]
    assert places == sorted(places)
    assert places[3] < text.index("  --hours") < places[4] and text.index("  --autocast") > places[5]
    command = main.get_command(click.Context(main), "serve")
    assert command is not None
    shown = re.findall(r"^  (?:-\w, )?(--[\w-]+)", text, flags=re.M)
    flags = [max(one.opts, key=len) for one in command.params if isinstance(one, click.Option) and not one.hidden]
    assert sorted(shown) == sorted([*flags, "--help"])
    assert len(re.findall(r"^  (?:-\w, )?--", text[places[0] : places[1]], flags=re.M)) == 10


def test_help_of_serve_names_the_sizes_of_every_ready_made_class() -> None:
    from tesseract_async.server.registry import EXPERTS

    assert SIZES.keys() == EXPERTS.keys()
    for name, builder in EXPERTS.items():
        given = dict(part.split("=") for part in SIZES[name].split(", "))
        sizes = {one.name: one.default for one in inspect.signature(builder).parameters.values() if one.name != "seed"}
        assert given.keys() == sizes.keys()
        for size, default in sizes.items():
            assert given[size] == f"{default:g}" if default is not None else not given[size].isdigit()


def test_the_package_itself_is_the_command() -> None:
    ran = subprocess.run([sys.executable, "-m", "tesseract_async", "--version"], capture_output=True, text=True)
    assert __version__ in ran.stdout
