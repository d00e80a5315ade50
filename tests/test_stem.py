"""Killing a test run leaves nothing behind."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.stem import ROOT, Stem

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")

STARTS = """
import asyncio, os, sys
from pathlib import Path
from tests.stem import Stem

async def main():
    stem = Stem(loaded=())
    for fresh in (False, True):
        process = await stem.start(sys.argv[1], folder=Path(), environment={**os.environ}, fresh=fresh)
        print(process.pid, (await process.stdout.readline()).decode(), flush=True)
    process.send_signal(9)
    print(await process.wait(), flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


def test_what_was_started_ends_with_who_started_it(tmp_path: Path) -> None:
    """However that one dies; also what ignores every signal that it can."""
    stubborn = tmp_path / "stubborn.py"
    stubborn.write_text(
        "import signal, sys\n"
        "for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP): signal.signal(one, signal.SIG_IGN)\n"
        "print('lives', flush=True)\n"
        "signal.pause()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", STARTS, str(stubborn)]
    with subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        said = [parent.stdout.readline().split() for _ in range(5)]
        assert [said[0][1], said[2][1], said[4]] == ["lives", "lives", ["-9"]]
        family = psutil.Process(parent.pid).children(recursive=True)
        assert int(said[0][0]) in {one.pid for one in family}
        parent.send_signal(signal.SIGKILL)
        _, left = psutil.wait_procs(family, timeout=20)
        assert not left


async def test_outputs_and_the_exit_status_are_told_apart(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import sys, warnings\n"
        "print(sys.argv[1:], __name__, sys.stdin.readline() == '')\n"
        "print('an error', file=sys.stderr)\n"
        "warnings.warn('odd')\n"
        "sys.exit(3)\n"
    )
    stem = Stem(loaded=())
    for strict, status in ((False, 3), (True, 1)):
        process = await stem.start(str(program), "a", "b c", folder=tmp_path, environment={**os.environ}, strict=strict)
        process.stdin.close()
        out, err = await process.communicate()
        assert process.returncode == status
        assert out == b"['a', 'b c'] __main__ True\n" and err.startswith(b"an error\n") and b"odd" in err
    stem.close()
