"""Experts that are spread over processes: equal to whole ones, and indifferent to strangers."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks")

TOLERANCE = 1e-5


def run(job: str, size: int, *arguments: str, timeout: float = 100.0) -> list[dict[str, Any]]:
    """What the leader of a job of so many processes found, line by line."""
    command = [sys.executable, "-m", "tests.runtime.mesh_jobs", job, str(size), *arguments]
    # large blocks are the system's again as soon as they are free: what is measured is what is held
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def check_equal(size: int, *cases: str) -> None:
    found = run("equality", size, *cases)
    assert [one.pop("case") for one in found] == list(cases)
    for case, one in zip(cases, found, strict=True):
        assert one.pop("sound")
        assert max(one.values()) <= TOLERANCE, (case, one)


def test_two_processes_equal_one() -> None:
    check_equal(
        2,
        "fsdp ffn sgd",
        "tp block sgd",
        "fsdp ffn sgd step_every=4 trim_peers=0.25",
        "tp ffn adam clip_gradient_norm=0.5",
        "some ffn sgd clip_gradient_norm=0.1",
    )


def test_strangers_poison_idleness_and_the_end_of_a_process() -> None:
    timeout = 1.0
    (found,) = run("faults", 2, str(timeout))
    # a row that raises in either process, between parts that are gathered or at the end, fails its own request
    for name in ("good", "poisoned", "good again", "after idling"):
        spread, whole = ([one.rpartition(": ")[2] for one in said] for said in found[name])
        assert spread == whole
    said = found["poisoned"][0]
    assert [one.rpartition(": ")[2] for one in said] == ["poison", "version 2", "poison", "late poison", "late poison"]
    assert found["difference"] <= TOLERANCE
    assert found["busy"] < 0.01
    # a process that stopped is noticed within the time-out and the grace, one that is gone at once; calls are refused
    assert found["noticed"] < timeout + 0.5 + 1.0
    assert "does not answer" in found["stopped"][0] and "does not answer" in found["lost"]
    assert found["lost again"] == "process 1 of the mesh is gone"
    assert "comes back from its last checkpoint" in found["refused"][0]


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3, 4])
def test_fsdp_equals_one_device(size: int) -> None:
    check_equal(size, "fsdp ffn sgd", "fsdp block sgd", "fsdp transformer sgd", "fsdp ffn sgd clip_gradient_norm=0.1")


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_tensor_parallelism_equals_one_device(size: int) -> None:
    check_equal(size, "tp ffn sgd", "tp block sgd", "tp block sgd clip_gradient_norm=0.1")


@pytest.mark.slow
def test_both_at_once_equal_one_device() -> None:
    check_equal(4, "both ffn sgd", "both block sgd", "both ffn sgd clip_gradient_norm=0.1 step_every=2")


WIDTH, NUM_LAYERS = 1024, 12
UNIT = (WIDTH + 1) * WIDTH * 4
"""Bytes of one part that is gathered at once."""
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@LINUX
@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_each_process_has_its_share_of_the_memory(size: int) -> None:
    (found,) = run("memory", size, str(WIDTH), str(NUM_LAYERS))
    weights = NUM_LAYERS * UNIT
    slack = 4 << 20
    # weights, gradients, and Adam's two moments; a part that is gathered has its gradient beside it
    assert max(found["built"]) <= weights / size + 2 * 2 * UNIT + slack
    assert max(found["trained"]) <= 4 * weights / size + 2 * UNIT + slack
    assert max(found["written"]) <= 7 * weights / size + 2 * 2 * UNIT + slack  # with a copy of the state
    assert found["file"] > 3 * weights  # which went through process 0 in pieces


@LINUX
@pytest.mark.slow
def test_two_processes_train_what_is_twice_too_large_for_one() -> None:
    allowed = 4 * NUM_LAYERS * UNIT + 6 * UNIT + (16 << 20)

    def trains(size: int, num_layers: int) -> bool:
        return bool(run("limit", size, str(allowed), str(WIDTH), str(num_layers))[0]["trained"])

    assert trains(1, NUM_LAYERS)
    assert not trains(1, NUM_LAYERS + 4)
    assert trains(2, 2 * NUM_LAYERS)


@pytest.mark.slow
def test_a_command_costs_little_more_than_a_round_trip() -> None:
    (found,) = run("overhead", 2)
    assert found["least"] <= 50e-6


@pytest.mark.slow
def test_replicas_of_a_spread_expert_are_replicas_like_any_other() -> None:
    (found,) = run("replicas", 2)
    for name in ("spread leads", "spread follows"):
        assert found[name] == [3, 3, True]
        assert found[f"{name}, and hands over"] == [1, True, 4, True]
