"""What the how-to promises of a mesh under torchrun whose processes are killed, stopped, and told to leave."""

import asyncio
import sys
from pathlib import Path

import pytest

from tests.faults.killed_mesh import STALL_TIMEOUT, trial_of


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_mesh_comes_back(tmp_path: Path) -> None:
    found = asyncio.run(trial_of(tmp_path))
    for what in ("follower killed", "idle follower killed"):
        assert found[what]["noticed"] < 1.0
    assert found["follower stopped"]["noticed"] < STALL_TIMEOUT + 5.0 + 1.0
    for what in ("follower killed", "idle follower killed", "leader killed", "follower stopped"):
        assert found[what]["went_on"] < 5.0 and found[what]["restarted"] == 1
    # torchrun itself says that it was ended by a signal
    assert found["told to leave"]["left"] == 1 and found["told to leave"]["seconds"] < 30.0
    assert int(found["saved"]) == int(found["version"][0])
