"""Experts that are spread over processes: equal to whole ones, and indifferent to strangers."""

import asyncio
import contextlib
import json
import os
import signal
import sys
from typing import Any

import pytest

from tests.stem import ROOT, Stem

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks")

TOLERANCE = 1e-5


async def run(
    stem: Stem, job: str, size: int, *arguments: str, timeout: float = 250.0, measures: bool = False
) -> list[dict[str, Any]]:
    """What the leader of a job of so many processes found, line by line. `measures`: memory."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if measures:  # large blocks are the system's again as soon as they are free: what is measured is what is held
        environment["MALLOC_MMAP_THRESHOLD_"] = "131072"
    words = ("tests.runtime.mesh_jobs", job, str(size), *arguments)
    process = await stem.start(*words, module=True, folder=ROOT, environment=environment, fresh=measures)
    try:
        out, err = await asyncio.wait_for(process.communicate(), timeout)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # all that it started, too
    assert process.returncode == 0, err.decode()[-4000:]
    return [json.loads(line) for line in out.splitlines() if line.startswith(b"{")]


async def check_equal(stem: Stem, size: int, *cases: str) -> None:
    found = await run(stem, "equality", size, *cases)
    assert [one.pop("case") for one in found] == list(cases)
    for case, one in zip(cases, found, strict=True):
        assert one.pop("sound")
        assert max(one.values()) <= TOLERANCE, (case, one)


async def test_two_processes_equal_one(stem: Stem) -> None:
    await check_equal(
        stem,
        2,
        "fsdp ffn sgd",
        "tp block sgd",
        "fsdp ffn sgd step_every=4 trim_peers=0.25",
        "tp ffn adam clip_gradient_norm=0.5",
        "some ffn sgd clip_gradient_norm=0.1",
    )


async def test_strangers_poison_idleness_and_the_end_of_a_process(stem: Stem) -> None:
    timeout = 1.0
    (found,) = await run(stem, "faults", 2, str(timeout))
    # a row that raises in either process, within parts that are gathered or between them, fails its own request
    for name in ("good", "poisoned", "on the way back", "good again", "after idling"):
        spread, whole = ([one.rpartition(": ")[2] for one in said] for said in found[name])
        assert spread == whole
    said = found["poisoned"][0]
    assert [one.rpartition(": ")[2] for one in said] == ["poison", "version 2", "poison", "late poison", "late poison"]
    said = found["on the way back"][0]
    assert [one.rpartition(": ")[2] for one in said] == [
        "poison on the way back",
        "version 3",
        "poison on the way back",
    ]
    # so does a row that takes another way through the layers than those of other processes
    assert ["cannot be divided" in one for one in found["other ways"]] == [True, True]
    assert found["difference"] <= TOLERANCE
    assert found["busy"] < 0.01
    # a process that stopped is noticed within the time-out and the grace, one that is gone at once; calls are refused
    assert found["noticed"] < timeout + 0.5 + 1.0
    assert "does not answer" in found["stopped"][0] and "does not answer" in found["lost"]
    assert found["lost again"] == "process 1 of the mesh is gone"
    assert "comes back from its last checkpoint" in found["refused"][0]


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3, 4])
async def test_fsdp_equals_one_device(stem: Stem, size: int) -> None:
    await check_equal(
        stem, size, "fsdp ffn sgd", "fsdp block sgd", "fsdp transformer sgd", "fsdp ffn sgd clip_gradient_norm=0.1"
    )


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
async def test_tensor_parallelism_equals_one_device(stem: Stem, size: int) -> None:
    await check_equal(stem, size, "tp ffn sgd", "tp block sgd", "tp block sgd clip_gradient_norm=0.1")


@pytest.mark.slow
async def test_both_at_once_equal_one_device(stem: Stem) -> None:
    await check_equal(stem, 4, "both ffn sgd clip_gradient_norm=0.1 step_every=2", "both block sgd", "hybrid ffn sgd")


WIDTH, NUM_LAYERS = 1024, 12
UNIT = (WIDTH + 1) * WIDTH * 4
"""Bytes of one part that is gathered at once."""
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@LINUX
@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
async def test_each_process_has_its_share_of_the_memory(stem: Stem, size: int) -> None:
    (found,) = await run(stem, "memory", size, str(WIDTH), str(NUM_LAYERS), measures=True)
    weights = NUM_LAYERS * UNIT
    slack = 4 << 20
    # weights, gradients, and Adam's two moments; a part that is gathered has its gradient next to it
    assert max(found["built"]) <= weights / size + 2 * 2 * UNIT + slack
    assert max(found["trained"]) <= 4 * weights / size + 2 * UNIT + slack
    assert max(found["written"]) <= 7 * weights / size + 2 * 2 * UNIT + slack  # with a copy of the state
    assert found["file"] > 3 * weights  # which went through process 0 in pieces


@LINUX
@pytest.mark.slow
async def test_two_processes_train_what_is_twice_too_large_for_one(stem: Stem) -> None:
    allowed = 4 * NUM_LAYERS * UNIT + 6 * UNIT + (16 << 20)

    async def trains(size: int, num_layers: int) -> bool:
        (found,) = await run(stem, "limit", size, str(allowed), str(WIDTH), str(num_layers), measures=True)
        return bool(found["trained"])

    assert await trains(1, NUM_LAYERS)
    assert not await trains(1, NUM_LAYERS + 4)
    assert await trains(2, 2 * NUM_LAYERS)


@pytest.mark.slow
async def test_a_command_costs_little_more_than_a_round_trip(stem: Stem) -> None:
    (found,) = await run(stem, "overhead", 2)
    assert found["least"] <= 50e-6


@pytest.mark.slow
async def test_replicas_of_a_spread_expert_are_replicas_like_any_other(stem: Stem) -> None:
    (found,) = await run(stem, "replicas", 2)
    for name in ("spread leads", "spread follows"):
        assert found[name] == [3, 3, True]
        assert found[f"{name}, and hands over"] == [1, True, 4, True]


@pytest.mark.slow
async def test_processes_end_with_their_leader_whatever_they_wait_for(stem: Stem) -> None:
    (found,) = await run(stem, "orphans", 4)
    assert found["statuses"] == [-9, 75, 75, 75]
    assert found["seconds"] < 5.0
