"""The demo, whole: its promise, its control, and what Ctrl-C leaves behind (nothing)."""

import asyncio
import re
import signal
import sys
from pathlib import Path

import psutil
import pytest

from tests.cli.processes import ENVIRONMENT, ROOT, family_of, finish, tesseract
from tests.stem import Stem


def accuracies(shown: str) -> list[float]:
    return [float(found) for found in re.findall(r"validation accuracy\W+([\d.]+)", shown)]


async def test_a_server_is_killed_and_returns_while_training_goes_on(stem: Stem, tmp_path: Path) -> None:
    """With forks: `test_nobody_is_left_behind` and longer runs see that the command starts processes by itself."""
    picture = tmp_path / "demo.png"
    script, words = str(Path(__file__).with_name("forked_demo.py")), ("--steps", "20", "--servers", "2")
    demo = await stem.start(script, *words, "--plot", str(picture), folder=ROOT, environment=ENVIRONMENT)
    shown, err = (text.decode() for text in await demo.communicate())
    status = demo.returncode
    assert status == 1, "20 steps are too few for the accuracy: the status says so"
    assert err == "" and len(accuracies(shown)) == 2, shown + err
    assert re.search(r"steps that trainers lost\W+0\b", shown) and "one, of all trainers" in shown, shown
    assert re.search(r"killed at [\d.]+ s, back at", shown), shown
    kept, since = map(int, next(re.finditer(r"(\d+) kept, (\d+) since its return", shown)).groups())
    assert since > 0
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize("seed", ["0", "1"])
async def test_the_whole_demo_keeps_its_promise(stem: Stem, seed: str, tmp_path: Path) -> None:
    status, shown, err = await finish(stem, "demo", "--plot", str(tmp_path / "demo.png"), "--seed", seed, fresh=True)
    assert status == 0 and err == "", shown + err
    assert min(accuracies(shown)) >= 0.97
    kept, since = map(int, next(re.finditer(r"(\d+) kept, (\d+) since its return", shown)).groups())
    assert kept > 0 and since > 0


@pytest.mark.slow
async def test_the_whole_control_shows_that_experts_carry_the_learning(stem: Stem) -> None:
    status, shown, err = await finish(stem, "demo", "--freeze-experts", "--no-plot", fresh=True)
    assert status == 1 and err == "", shown + err
    assert max(accuracies(shown)) < 0.6
    assert "frozen" in shown


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize("how", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGKILL])
async def test_nobody_is_left_behind(stem: Stem, how: signal.Signals, tmp_path: Path) -> None:
    async with tesseract(stem, "demo", "--no-plot", "--servers", "1", "--logs", str(tmp_path), fresh=True) as demo:
        assert demo.stdout is not None
        async for line in demo.stdout:
            if "starting 1 server " in line.decode():
                break
        family = family_of(demo.pid)
        assert family
        demo.send_signal(how)
        status = await demo.wait()
        assert status == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -signal.SIGKILL}[how]
        _, left = await asyncio.to_thread(psutil.wait_procs, family, timeout=40)
        assert not left
