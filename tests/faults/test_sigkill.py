"""A server that is killed at random moments, under load and while it saves, never contradicts itself."""

import json
import sys
from pathlib import Path

import pytest

from tests.stem import ROOT, Stem


async def run(stem: Stem, directory: Path, num_kills: int, seed: int) -> dict[str, int]:
    words = (str(Path(__file__).with_name("killed_server.py")), str(directory), str(num_kills), str(seed))
    process = await stem.start(*words, folder=ROOT, environment={"PYTHONPATH": str(ROOT)})
    out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    return dict(json.loads(out))


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
async def test_a_few_kills(stem: Stem, tmp_path: Path) -> None:
    assert (await run(stem, tmp_path, num_kills=5, seed=1))["applied"] > 0


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(sys.platform == "win32", reason="forks")
async def test_two_hundred_kills(stem: Stem, tmp_path: Path) -> None:
    result = await run(stem, tmp_path, num_kills=200, seed=2)
    # every life did something; how much is a matter of what else the machine does in its 0 to 60 ms
    assert result["applied"] > result["kills"] == 200
