"""The demo's processes are heard, and none is left behind."""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tesseract_async.cli.demo.children import LEAVE_TIMEOUT, Child, ChildFailed, children
from tests.faults.serving import let_pass

READY = "import json, sys; print('chatter'); print(json.dumps({'event': 'ready', 'pid': 1}), flush=True); "
STAYS = READY + "sys.stdin.read()"
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + READY + "signal.pause()"


async def start(family: list[Child], tmp_path: Path, code: str, heard: list[dict[str, Any]] | None = None) -> Child:
    lines = [] if heard is None else heard
    words = ["-c", code]
    made = await Child.start(
        "some process", words, log=tmp_path / "log", on_event=lambda name, facts: lines.append(facts)
    )
    family.append(made)
    return made


def lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.both_loops
async def test_a_process_is_heard_and_leaves_when_told(tmp_path: Path) -> None:
    async with children() as family:
        heard: list[dict[str, Any]] = []
        subject = await start(family, tmp_path, STAYS, heard)
        assert (await subject.ready(timeout=30))["pid"] == 1
        assert heard == [{"event": "ready", "pid": 1}]
    assert not lives(subject.process.pid)
    await subject.aclose()


async def test_a_process_that_fails_is_an_error_with_its_last_words(tmp_path: Path) -> None:
    async with children() as family:
        subject = await start(family, tmp_path, "raise SystemExit('the disk is full')")
        with pytest.raises(ChildFailed, match="(?s)some process ended before it was ready.*the disk is full"):
            await subject.ready(timeout=30)
        with pytest.raises(ChildFailed, match="status 1"):
            await subject.wait()


async def test_a_process_that_takes_too_long_is_an_error(tmp_path: Path) -> None:
    async with children() as family:
        subject = await start(family, tmp_path, "import sys; sys.stdin.read()")
        with pytest.raises(ChildFailed, match="not ready after"):
            await subject.ready(timeout=0.05)


async def test_a_killed_process_is_no_failure(tmp_path: Path) -> None:
    async with children() as family:
        subject = await start(family, tmp_path, STAYS)
        await subject.ready(timeout=30)
        waiting = asyncio.create_task(subject.wait())
        await subject.kill()
        assert not lives(subject.process.pid)
        await waiting


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
async def test_who_does_not_listen_is_killed(tmp_path: Path) -> None:
    async with children() as family:
        subject = await start(family, tmp_path, STUBBORN)
        await subject.ready(timeout=30)
        leaving = asyncio.create_task(subject.aclose())
        await asyncio.sleep(0)  # it was told
        let_pass(LEAVE_TIMEOUT)
        await leaving
    assert not lives(subject.process.pid)


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
async def test_told_twice_nobody_is_left_either(tmp_path: Path) -> None:
    entered = asyncio.Event()
    started: list[Child] = []

    async def hold() -> None:
        async with children() as family:
            started.append(await start(family, tmp_path, STUBBORN))
            await started[0].ready(timeout=30)
            entered.set()
            await asyncio.Event().wait()

    holding = asyncio.create_task(hold())
    await entered.wait()
    holding.cancel()
    for _ in range(10):
        await asyncio.sleep(0)
    holding.cancel()
    with pytest.raises(asyncio.CancelledError):
        await holding
    assert not lives(started[0].process.pid)


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_processes_end_with_the_one_that_started_them() -> None:
    grandchild = "import sys; sys.stdin.read(); print('noticed', flush=True)"
    code = (
        "import subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, '-c', {grandchild!r}], stdin=subprocess.PIPE)\n"
        "print('started', flush=True)\n"
        "child.wait()\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "started\n"
        parent.send_signal(signal.SIGKILL)
        assert parent.stdout.readline() == "noticed\n"
