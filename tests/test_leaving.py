"""How programs are told to leave: every way of it lets them save, and only a second Ctrl-C is impatience."""

import asyncio
import contextlib
import json
import os
import pty
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import tesseract_async as ta
from tests.cli.processes import ENVIRONMENT, ROOT
from tests.stem import Process, Stem

PROGRAM = """
import asyncio, json, signal, sys
from pathlib import Path

def say(*words):
    print(json.dumps(words), flush=True)

async def leave():
    say("leaving")
    while not Path("save").exists():
        await asyncio.sleep(0.01)
    print("saving", file=sys.stderr, flush=True)  # an error, where this is a terminal that is gone
    Path("saved").touch()

async def command():
    from tesseract_async.cli.running import until_told_to_leave
    await until_told_to_leave(tell_ready=lambda: say("ready"))
    await leave()
    return 0

async def cancelled():
    try:
        say("ready")
        await asyncio.Event().wait()
    finally:
        await leave()

for number in sys.argv[2:]:
    signal.signal(int(number), signal.SIG_IGN)
if sys.argv[1] == "command":
    from tesseract_async.cli.running import run_command
    run_command(command)
if sys.argv[1] == "starting":
    from tesseract_async.cli.running import run_command
    run_command(cancelled)
from tesseract_async.leaving import run
run(cancelled())
"""
KINDS = ("command", pytest.param("starting", marks=pytest.mark.slow), "library")


@contextlib.asynccontextmanager
async def program(stem: Stem, folder: Path, *arguments: str) -> AsyncIterator[Process]:
    """A program that is ready, and saves once the file ``save`` is there."""
    (folder / "program.py").write_text(PROGRAM)
    process = await stem.start(
        str(folder / "program.py"), *arguments, folder=folder, environment=ENVIRONMENT, path=(str(ROOT),)
    )
    try:
        assert json.loads(await process.stdout.readline()) == ["ready"]
        yield process
    finally:
        process.kill()
        await process.communicate()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "signals",
    [
        *((number,) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)),
        (signal.SIGTERM, signal.SIGTERM),
        (signal.SIGHUP, signal.SIGTERM, signal.SIGHUP),
        (signal.SIGTERM, signal.SIGINT),  # a first Ctrl-C
    ],
    ids=lambda numbers: "-".join(number.name for number in numbers),
)
async def test_however_it_is_told_it_saves(
    stem: Stem, tmp_path: Path, kind: str, signals: tuple[signal.Signals, ...]
) -> None:
    async with program(stem, tmp_path, kind) as process:
        process.send_signal(signals[0])
        assert json.loads(await process.stdout.readline()) == ["leaving"]
        for number in signals[1:]:
            process.send_signal(number)
        (tmp_path / "save").touch()
        _, err = await process.communicate()
        assert process.returncode == (0 if kind == "command" else 128 + signals[0])
        assert (tmp_path / "saved").exists() and err == b"saving\n"


@pytest.mark.parametrize("kind", KINDS)
async def test_gnu_timeout_sends_each_signal_twice(stem: Stem, tmp_path: Path, kind: str) -> None:
    async with program(stem, tmp_path, kind) as process:
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGINT)
        assert json.loads(await process.stdout.readline()) == ["leaving"]
        (tmp_path / "save").touch()
        await process.communicate()
        assert (tmp_path / "saved").exists()


@pytest.mark.parametrize("kind", KINDS)
async def test_a_second_ctrl_c_ends_it_at_once(stem: Stem, tmp_path: Path, kind: str) -> None:
    async with program(stem, tmp_path, kind) as process:
        process.send_signal(signal.SIGINT)
        assert json.loads(await process.stdout.readline()) == ["leaving"]
        while process.returncode is None:  # those right after the first one count as the same
            process.send_signal(signal.SIGINT)
            await asyncio.wait([asyncio.ensure_future(process.wait())], timeout=0.1)
        _, err = await process.communicate()
        assert process.returncode == -signal.SIGINT and b"Traceback" not in err
        assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("kind", KINDS)
async def test_under_nohup_a_closed_terminal_is_nothing(stem: Stem, tmp_path: Path, kind: str) -> None:
    async with program(stem, tmp_path, kind, str(int(signal.SIGHUP)), str(int(signal.SIGINT))) as process:
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGINT)  # ignored from birth in the background of a script; but somebody means it
        assert json.loads(await process.stdout.readline()) == ["leaving"]
        (tmp_path / "save").touch()
        await process.communicate()
        assert process.returncode == (0 if kind == "command" else 130), "it was told by Ctrl-C, not by the terminal"


@pytest.mark.parametrize("kind", KINDS)
async def test_a_terminal_that_is_gone_keeps_nobody_from_saving(tmp_path: Path, kind: str) -> None:
    """A lost ssh session: SIGHUP, and every write to the terminal fails."""
    (tmp_path / "program.py").write_text(PROGRAM)
    ours, theirs = pty.openpty()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(tmp_path / "program.py"), kind),
        cwd=tmp_path,
        env=ENVIRONMENT,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        # ignored from birth where the tests run under nohup
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )
    os.close(theirs)
    try:
        while b"ready" not in await asyncio.to_thread(os.read, ours, 1000):
            pass
        (tmp_path / "save").touch()
        os.close(ours)
        process.send_signal(signal.SIGHUP)  # what the kernel sends to the leader of the terminal's session
        status = await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert (tmp_path / "saved").exists()
    assert status == (0 if kind == "command" else 128 + signal.SIGHUP)


def test_run_gives_the_result_and_lets_errors_through() -> None:
    async def give() -> int:
        return 5

    async def fail() -> None:
        raise asyncio.CancelledError

    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert ta.run(give()) == 5
    with pytest.raises(asyncio.CancelledError):
        ta.run(fail())
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
