"""What a user may expect of every command: sentences for mistakes that say what to do, options from three places,
nothing drawn where there is no terminal, and Ctrl-C."""

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
from click.testing import CliRunner

import tesseract_async as ta
from tesseract_async.cli import hosting, options, running
from tesseract_async.cli.main import COMMANDS, main
from tesseract_async.cli.running import progress_bar, say, spinner
from tests.cli.processes import ENVIRONMENT, ROOT

NOBODY = "127.0.0.1:1"


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody answers after 0.3 s as well as after 10."""
    monkeypatch.setattr(options, "JOIN_TIMEOUT", 0.3)


@pytest.mark.parametrize(
    ("arguments", "status", "sentence"),
    [
        (("call", "ffn.0", "-p", NOBODY), 1, "no answer from 127.0.0.1:1. Does a node run there"),
        (("get", "x", "-p", NOBODY), 1, "`tesseract doctor -p ADDRESS` looks closer"),
        (("put", "x", "1", "-p", NOBODY), 1, "no answer from 127.0.0.1:1"),
        (("top", "--once", "-p", NOBODY), 1, "no answer from 127.0.0.1:1"),
        (("save", "--run", "x", "-p", NOBODY, "--out", "x"), 1, "no answer from 127.0.0.1:1"),
        (("call", "nonsense", "-p", NOBODY), 1, "not an expert's uid, such as 'ffn.3.7'"),
        (("put", "x", "1", "-p", "nonsense"), 1, "not an address (host:port, or [v6]:port): 'nonsense'"),
        (("doctor", "-p", "\x1b]0;x\x07:1"), 1, r"not an address (host:port, or [v6]:port): '\x1b]0;x\x07:1'"),
        (("serve", "--experts", "ffn.0", "--name", "\u202eevil"), 2, "a machine's name is one line of at most 64"),
        (("serve", "--experts", "ffn.0", "--name", "x" * 10_000), 2, "a machine's name is one line of at most 64"),
        (("top",), 2, "Missing option '--initial-peers'"),
        (("top", "-p", NOBODY, "--json"), 2, "--json needs --once"),
        (("serve", "--experts", "ffn.0", "--shard", "fsdp", "--step", "lockstep"), 2, "--shard takes one --device"),
        (
            ("serve", "--experts", "m.0.0", "--hf-checkpoint", str(ROOT), "--expert-class", "ffn"),
            2,
            "--hf-checkpoint cannot be combined with --expert-class",
        ),
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
        (("dashboard", "-p", NOBODY), 1, "no answer from 127.0.0.1:1"),
        (("keygen", "/proc/x"), 1, "choose another folder"),
        (("serve", "--experts", "ffn.0", "--size", "in_features=0"), 1, "a whole number of 1 or more, not 0"),
        (("serve", "--experts", "ffn.0", "--size", "in_features=-4"), 1, "a whole number of 1 or more, not -4"),
        (("serve", "--experts", "ffn.0", "--size", f"in_features={10**30}"), 1, "in_features is too large a number"),
        (("serve", "--experts", "ffn.0", "--size", "in_features=100000000"), 1, "here it may take"),
        (
            ("serve", "--experts", "ffn.0", "--size", "wide=8"),
            1,
            "it takes in_features, hidden_features",
        ),
        (("serve", "--experts", "ffn.0", "--learning-rate", "nan"), 2, "nan is not a finite number"),
        (("serve", "--experts", "ffn.0", "--learning-rate", "-1"), 2, "not in the range x>=0"),
        (("serve", "--experts", "ffn.0", "--checkpoint-period", "0"), 2, "0 is not between 0.001 and"),
        (("serve", "--experts", "ffn.0", "--ttl", "nan"), 2, "not a time, such as 90 s or 10 min: 'nan'"),
        (("serve", "--experts", "ffn.0", "--report-period", "-1"), 2, "not a time, such as 90 s"),
        (("serve", "--experts", "ffn.0", "--sync-every", "0"), 2, "0 is not between 0.001 and"),
        (("serve", "--experts", "ffn.0", "--threads", "99999999"), 2, "not in the range"),
        (("serve", "--experts", "ffn.0", "--max-memory", "9" * 400), 2, "not a size, such as 4 GiB"),
        (("serve", "--experts", "ffn.0", "--identity", "/proc/x/node.pem"), 1, "/proc/x/node.pem: "),
        (
            ("run", "create", "x", "--grid", "2", "--identity", "x.pem", "--size", "in_features=0"),
            1,
            "1 or more, not 0",
        ),
        (
            ("run", "create", "x", "--grid", "2", "--identity", "x.pem", "--learning-rate", "inf"),
            2,
            "inf is not a finite number",
        ),
        (
            ("run", "create", "x", "--grid", "2", "--identity", "x.pem", "--expert-class", "os:system"),
            1,
            "@ta.expert_builder",
        ),
        (("demo", "--plot", "/nosuch/a.png"), 2, "/nosuch cannot be written (No such file or directory)"),
        (("demo", "--plot", "a.txt"), 2, "a.txt does not end with one of .png"),
        (("demo", "--logs", "/proc/x", "--no-plot"), 2, "/proc/x cannot be written"),
        (("bench", "--seconds", "nan"), 2, "nan is not a finite number"),
        (("bench", "--rows", "99999999999"), 2, "not in the range"),
        (("bench", "--expert-class", "os:path"), 1, "that is no function that builds one, but a module"),
    ],
)
def test_a_mistake_is_a_sentence_that_says_what_to_do(
    arguments: tuple[str, ...], status: int, sentence: str, tmp_path: Path
) -> None:
    with contextlib.chdir(tmp_path):
        result = CliRunner().invoke(main, list(arguments), prog_name="tesseract")
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == status
    assert sentence in " ".join(result.output.split()), result.output
    assert "Traceback" not in result.output and not result.output.startswith("Usage: main")


async def test_where_the_dashboard_cannot_listen() -> None:
    async with ta.TesseractNode() as seed:
        ask = ["dashboard", "-p", seed.address]
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = str(taken.getsockname()[1])
            result = await asyncio.to_thread(CliRunner().invoke, main, [*ask, "--bind-port", port])
        assert result.exit_code == 1 and f"port {port}: choose another port" in result.output
        result = await asyncio.to_thread(CliRunner().invoke, main, [*ask, "--bind", "192.0.2.1"])
        assert result.exit_code == 1 and "is it an address of this machine?" in result.output


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
    with progress_bar("experts", total=2) as advance, spinner("looking"):
        advance(1)
    assert capfd.readouterr() == ("", "")


def test_bars_are_drawn_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    with progress_bar("building experts", total=2) as advance:
        advance(2)
    with spinner("asking [fe80::1]:4000[/b]"):
        pass
    out, err = capsys.readouterr()
    assert "building experts" in err and "100%" in err and "asking [fe80::1]:4000[/b]" in err
    assert out == "", "standard output is for programs"


@pytest.mark.parametrize(
    "arguments",
    [
        ("serve", "--experts", "ffn.0", "--expert-class", "my_own_expert:build"),
        ("run", "create", "x", "--grid", "2", "--identity", "x.pem", "--expert-class", "my_own_expert:build"),
        ("bench", "--expert-class", "my_own_expert:build"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_ones_own_expert_lies_where_one_stands(
    tmp_path: Path, arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also for the installed command, whose path does not begin with the present folder."""
    (tmp_path / "my_own_expert.py").write_text("raise ValueError('it was found')\n")
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1 and "it was found" in result.stderr, result.stderr


def test_a_volunteer_finds_an_allowed_module_where_he_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    for allowed, found in ((), False), (("--allow-module", "mine"), True):
        CliRunner().invoke(main, ["serve", "--run", "a/b", *allowed])
        assert ("" in sys.path) is found


@pytest.mark.parametrize("closed", [(0, 1), (0, 1, 2)])
def test_standard_files_may_be_closed(closed: tuple[int, ...], tmp_path: Path) -> None:
    """``<&-``: no socket may take their numbers, for libuv would end the process."""
    code = (
        f"import os\nfor number in {closed}: os.close(number)\n"
        "os.execv(os.sys.executable, [os.sys.executable, '-m', 'tesseract_async.cli', *os.sys.argv[1:]])"
    )
    words = [sys.executable, "-c", code, "dht", "--host", "192.0.2.1"]
    done = subprocess.run(words, env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, "the address is not this machine's: a sentence, not an abort"
    assert ("it is no address" in done.stderr) is (2 not in closed)


def test_what_goes_wrong_is_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    async def fail() -> int:
        raise ExceptionGroup("many", [ExceptionGroup("inside", [RuntimeError("x" * 2000)])])

    with pytest.raises(SystemExit) as ended:
        running.run_command(fail)
    err = capsys.readouterr().err
    assert ended.value.code == 1 and err.startswith("Error: xxx") and len(err) < 450


def test_a_program_that_does_not_read_yet_holds_up_nobody() -> None:
    ours, theirs = os.pipe()
    num_lines = 300  # of a thousand bytes: several times what a pipe takes

    async def talk() -> bytes:
        for number in range(num_lines):
            say("report", number=number, text="x" * 1000)
        text = b""
        while text.count(b"\n") < num_lines:
            text += await asyncio.to_thread(os.read, ours, 1 << 20)
        return text

    with open(theirs, "w") as out, contextlib.redirect_stdout(out):
        text = asyncio.run(talk())
    os.close(ours)
    assert [json.loads(line)["number"] for line in text.splitlines()] == [*range(num_lines)]


def test_a_line_names_so_many_experts_and_no_more() -> None:
    server: Any = SimpleNamespace(experts={f"ffn.{number}": SimpleNamespace(version=number) for number in range(6144)})
    assert len(versions := hosting._versions(server)) == hosting.MAX_NAMED and versions["ffn.1"] == 1
