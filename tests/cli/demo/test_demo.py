"""The demo, whole: its promise, its control, and what Ctrl-C leaves behind (nothing)."""

from __future__ import annotations

import asyncio
import re
import signal
import sys
from pathlib import Path

import psutil
import pytest

from tests.cli.processes import family_of, finish, tesseract

pytestmark = pytest.mark.timeout(150)


def accuracies(shown: str) -> list[float]:
    return [float(found) for found in re.findall(r"validation accuracy\W+([\d.]+)", shown)]


async def test_experts_learn_although_a_server_is_killed(tmp_path: Path) -> None:
    picture = tmp_path / "demo.png"
    status, shown, err = await finish("demo", "--plot", str(picture))
    assert status == 0, shown + err
    assert len(accuracies(shown)) == 2 and min(accuracies(shown)) >= 0.97
    assert re.search(r"steps that trainers lost\W+0\b", shown)
    assert re.search(r"killed at [\d.]+ s, back at", shown)
    kept, since = map(int, next(re.finditer(r"(\d+) kept, (\d+) since its return", shown)).groups())
    assert kept > 0 and since > 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert err == ""


async def test_with_frozen_experts_gates_alone_learn_little(tmp_path: Path) -> None:
    status, shown, err = await finish("demo", "--freeze-experts", "--no-plot", "--steps", "200", "--servers", "1")
    assert status == 1, shown + err
    assert len(accuracies(shown)) == 2 and max(accuracies(shown)) < 0.6
    assert "frozen" in shown


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize(
    ("how", "moment"),
    [
        (signal.SIGINT, "starting 3 servers"),
        (signal.SIGTERM, "starting 3 servers"),
        (signal.SIGKILL, "starting 3 servers"),
        (signal.SIGINT, "training"),
    ],
)
async def test_nobody_is_left_behind(how: signal.Signals, moment: str, tmp_path: Path) -> None:
    async with tesseract("demo", "--no-plot", "--logs", str(tmp_path)) as demo:
        assert demo.stdout is not None
        async for line in demo.stdout:
            if moment in line.decode():
                break
        family = family_of(demo.pid)
        assert family
        demo.send_signal(how)
        status = await demo.wait()
        assert status == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -signal.SIGKILL}[how]
        _, left = await asyncio.to_thread(psutil.wait_procs, family, timeout=20)
        assert not left
