"""`killed_server` over two processes of which either is killed: ``killed_mesh_server.py FOLDER NUM_KILLS SEED``.

The store outlives them all, as torchrun's does.
"""

import asyncio
import os
import random
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tesseract_async.errors import Overloaded
from tesseract_async.runtime.backend import BackendSettings, ExpertBackend
from tesseract_async.runtime.mesh import MeshBackend
from tesseract_async.runtime.mesh_job import join_job
from tesseract_async.server.registry import Built
from tesseract_async.wire.tensors import TensorSpec
from tests.faults import killed_server
from tests.runtime import mesh_jobs

STORE = mesh_jobs.make_store()
CHOICE = random.Random(7)


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))  # FSDP takes no scalars
        self.ballast = nn.Parameter(torch.zeros(20_000), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


def build() -> Built:
    return Scale(), (TensorSpec((1,)),)


def make_backend() -> MeshBackend:
    return MeshBackend(
        build,
        mesh=mesh_jobs.whole_mesh(),
        optimizer=lambda module: torch.optim.SGD([module.weight], lr=1.0),  # type: ignore[list-item]
        settings=BackendSettings(max_gradient_norm=None),
    )


def weight_of(backend: ExpertBackend) -> float:
    return float(mesh_jobs.whole(backend.state()["module"]["weight"]))


def live(directory: str, writer: int, numbers: list[int], last: bool) -> None:
    """One process's life."""
    join_job(20.0)
    backend = make_backend()
    if dist.get_rank():
        backend.follow()
        return

    async def lead() -> None:
        async def watch() -> None:
            await backend.wait_lost()
            os._exit(75)

        watching = asyncio.create_task(watch())
        await killed_server.live(directory, writer, numbers, last)
        await asyncio.to_thread(backend.leave)
        watching.cancel()

    killed_server.make_backend = lambda: backend  # type: ignore[assignment]
    try:
        asyncio.run(lead())
    except Overloaded:  # what a client is told: the watcher ends the process
        time.sleep(30.0)


def run_life(directory: str, numbers: list[int], *, kill_after: float | None) -> list[str]:
    """Two processes, of which one is killed `kill_after` seconds after the expert is up."""
    reader, writer = os.pipe()
    work: Callable[[], Any] = lambda: (os.close(reader), live(directory, writer, numbers, kill_after is None))  # noqa: E731
    pids = mesh_jobs.launch([0, 1], 2, work, STORE)
    os.close(writer)
    said = b""
    with os.fdopen(reader, "rb", buffering=0) as lines:
        while b"restored" not in said and (piece := lines.read(65536)):
            said += piece
        if kill_after is not None:
            time.sleep(15 * kill_after)  # a spread expert's step takes longer
            os.kill(CHOICE.choice(pids), signal.SIGKILL)
        while piece := lines.read(65536):
            said += piece
    statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    expected = {0} if kill_after is None else {-9, 75}
    assert set(statuses) <= expected, f"the processes ended with {statuses}: {said[-2000:]!r}"
    return said.decode().splitlines()[: None if said.endswith(b"\n") else -1]


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    try:
        # loads what PyTorch loads on first use, and ends before anything is patched
        one = killed_server.make_backend()
        one.step(one.gradients([torch.ones(1, 1)], [torch.ones(1, 1)])[1])
        killed_server.run_life, killed_server.weight_of = run_life, weight_of
        killed_server.main()
    except BaseException:
        traceback.print_exc()
        sys.exit(1)
