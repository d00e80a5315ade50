"""What it costs to spread an expert over processes: memory of each, the leader's overhead per command, idleness.

An expert of 12 layers of 1024 x 1024 with Adam, over 1, 2 and 4 processes (gloo): the most that a process had at once
while it was built, trained, and trained while its state was copied. An empty command next to a round trip over a bare
socket.
"""

import json
import os
import subprocess
import sys
from typing import Any

from tests.benchmarks.figures import emit
from tests.stem import ROOT

WIDTH, NUM_LAYERS = 1024, 12
UNIT = (WIDTH + 1) * WIDTH * 4
MIB = 2**20


def run(job: str, *arguments: object) -> dict[str, Any]:
    """What a job of `tests.runtime.mesh_jobs` found."""
    command = [sys.executable, "-m", "tests.runtime.mesh_jobs", job, *map(str, arguments)]
    # large blocks are the system's again as soon as they are free
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])
    return found


def main() -> None:
    weights = NUM_LAYERS * UNIT
    for size in (1, 2, 4):
        found = run("memory", size, WIDTH, NUM_LAYERS)
        for what, copies in (("built", 1), ("trained", 4), ("copied", 7)):
            most = (copies * weights / size + 4 * UNIT) / MIB
            emit(f"memory of a process of {size}, {what}", max(found[what]) / MIB, "MiB", f"<= {most:.1f}")
    found = run("overhead", 2)
    emit("round trip over a bare socket", found["echo"] * 1e6, "us")
    emit("command over that", found["least"] * 1e6, "us", "<= 50")
    found = run("faults", 2, 1.0)
    emit("idle leader", found["busy"] * 100, "%", "< 1")
    emit("process that stopped, time-out 1 s, grace 0.5 s: noticed after", found["noticed"], "s", "< 1.6")


if __name__ == "__main__":
    main()
