"""What a user may expect of every command: sentences for mistakes that say what to do, options from three places,
nothing drawn where there is no terminal, and Ctrl-C."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from tesseract_async.cli import options
from tesseract_async.cli.main import COMMANDS, main
from tesseract_async.cli.waiting import bar, sign
from tests.cli.processes import ENVIRONMENT, ROOT

NOBODY = "127.0.0.1:1"


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody answers after 0.3 s as well as after 10."""
    patient = options.join
    for module in ("call", "export", "records", "top"):
        monkeypatch.setattr(f"tesseract_async.cli.{module}.join", lambda node: patient(node, timeout=0.3))


@pytest.mark.parametrize(
    ("arguments", "status", "sentence"),
    [
        (("call", "ffn.0", "-p", NOBODY), 1, "no answer from 127.0.0.1:1. Does a node run there"),
        (("get", "x", "-p", NOBODY), 1, "`tesseract doctor -p ADDRESS` looks closer"),
        (("put", "x", "1", "-p", NOBODY), 1, "no answer from 127.0.0.1:1"),
        (("top", "--once", "-p", NOBODY), 1, "no answer from 127.0.0.1:1"),
        (("export", "--run", "x", "-p", NOBODY, "--out", "x"), 1, "no answer from 127.0.0.1:1"),
        (("call", "nonsense", "-p", NOBODY), 1, "not an expert's uid, such as 'ffn.3.7'"),
        (("put", "x", "1", "-p", "nonsense"), 1, "not an address (host:port, or [v6]:port): 'nonsense'"),
        (("top",), 2, "Missing option '--initial-peers'"),
        (("top", "-p", NOBODY, "--json"), 2, "--json goes with --once"),
        (("serv",), 2, "did you mean 'serve'?"),
        (("swarm-status",), 2, "there are bench, call, dashboard"),
        (("serve", "--experts", "ffn.0", "--hots", "x"), 2, "Did you mean"),
        (("serve", "--experts", "ffn.0", "--log-format", "xml"), 2, "'text', 'json'"),
        (("serve", "--experts", "ffn.0", "--checkpoint-dir", "/dev/null/x"), 2, "choose another folder"),
        (("dht", "--config", "none.toml"), 2, "does not exist"),
        (("dht", "--host", "192.0.2.1"), 1, "it is no address of this machine"),
        (
            ("dht", "--identity", str(ROOT / "README.md")),
            1,
            "holds no Ed25519 key: move it away",
        ),
        (("dashboard", "-p", NOBODY, "--bind", "192.0.2.1"), 1, "is it an address of this machine?"),
        (("keygen", "/proc/x"), 1, "choose another folder"),
        (("bench", "--expert-class", "os:path"), 1, "that is no function that builds one, but a module"),
    ],
)
def test_a_mistake_is_a_sentence_that_says_what_to_do(
    arguments: tuple[str, ...], status: int, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, list(arguments), prog_name="tesseract")
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == status
    assert sentence in " ".join(result.output.split()), result.output
    assert "Traceback" not in result.output and not result.output.startswith("Usage: main")


def test_the_dashboards_port_may_be_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        result = CliRunner().invoke(main, ["dashboard", "-p", NOBODY, "--bind-port", port])
    assert result.exit_code == 1 and f"port {port}: choose another port" in result.output


def test_flags_go_before_the_environment_which_goes_before_the_file(tmp_path: Path) -> None:
    """For every option of every command the variable is named after the flag."""
    for name in COMMANDS:
        command = main.get_command(click.Context(main), name)
        assert command is not None
        for option in command.params:
            if isinstance(option, click.Option):
                flag = max(option.opts, key=len).removeprefix("--")
                assert option.envvar == f"TESSERACT_{name}_{flag}".replace("-", "_").upper()
    file = tmp_path / "serve.toml"
    file.write_text("experts = ['file']\n")
    arguments = ["serve", "--config", str(file)]
    for variables, flags, expected in (
        ({}, [], "'file'"),
        ({"TESSERACT_SERVE_EXPERTS": "variable"}, [], "'variable'"),
        ({"TESSERACT_SERVE_EXPERTS": "variable"}, ["--experts", "flag"], "'flag'"),
    ):
        result = CliRunner().invoke(main, [*arguments, *flags], env=variables)
        assert (
            result.exit_code == 2
            and f"not an expert's uid, such as 'ffn.3.7' (a prefix, then 1 to 8 numbers): {expected}"
            in " ".join(result.output.split())
        )
    result = CliRunner().invoke(main, [], env={"TESSERACT_SERVE_CONFIG": str(tmp_path / "none")})
    assert result.exit_code in (0, 2), "a variable of one command is nothing to another"


def test_nothing_moves_where_there_is_no_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    with bar("experts", total=2) as advance, sign("looking"):
        advance(1)
    assert capfd.readouterr() == ("", "")


def test_bars_are_drawn_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    with bar("building experts", total=2) as advance:
        advance(2)
    with sign("joining the network"):
        pass
    out, err = capsys.readouterr()
    assert "building experts" in err and "100%" in err and "joining the network" in err
    assert out == "", "standard output is for programs"


def test_ones_own_expert_lies_where_one_stands(tmp_path: Path) -> None:
    """Also for the installed command, whose path does not begin with the present folder."""
    (tmp_path / "my_own_expert.py").write_text("def build(): raise ValueError('it was found')\n")
    code = "import sys; sys.path.remove(''); from tesseract_async.cli.main import main; main(prog_name='tesseract')"
    result = subprocess.run(
        [sys.executable, "-c", code, "serve", "--experts", "ffn.0", "--expert-class", "my_own_expert:build"],
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1 and "it was found" in result.stderr, result.stderr
