"""Experts that are spread over processes: equal to whole ones, and indifferent to strangers."""

from __future__ import annotations

import json
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
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
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
    )


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
