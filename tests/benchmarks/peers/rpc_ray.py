"""Ray's side of the small calls (`loads.SMALL`): an async actor. It knows no encryption by default, and no backward.

.venv-rpc/bin/python -m tests.benchmarks.peers.rpc_ray [LOAD ...]
"""

import asyncio
import os
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from tests.benchmarks.loads import Load
from tests.benchmarks.peers.small_calls import callers_on_loop, main, measure
from tests.benchmarks.processes import ClientResult, Gate, wait_for_stop

NAMESPACE = "bench"


class Expert:
    """The actor."""

    def __init__(self, kind: str, width: int) -> None:
        from tests.benchmarks.modules import KINDS

        torch.set_num_threads(1)
        self._module = KINDS[kind](width)

    async def apply(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return self._module(x)


def serve(pipe: Connection, load: Load) -> None:
    """Starts Ray with one actor; sends Ray's address."""
    import ray  # in each process for itself: its connections do not survive a fork

    context = ray.init(num_cpus=2, include_dashboard=False, namespace=NAMESPACE, log_to_driver=False)
    actor = ray.remote(Expert).options(name="expert", max_concurrency=64).remote(load.kind, load.width)
    ray.get(actor.apply.remote(torch.zeros(1, load.width)))
    pipe.send(("value", context.address_info["gcs_address"]))
    wait_for_stop(pipe)
    ray.shutdown()


def client(index: int, gate: Gate, load: Load, address: str) -> ClientResult:
    import ray

    torch.set_num_threads(1)
    ray.init(address=address, namespace=NAMESPACE, log_to_driver=False)
    actor = ray.get_actor("expert")
    row = torch.randn(load.rows, load.width)

    async def call() -> None:
        await actor.apply.remote(row)

    async def run() -> ClientResult:
        return await callers_on_loop(call, gate, load.num_callers)

    try:
        return asyncio.run(run())
    finally:
        ray.shutdown()


def run(load: Load) -> None:
    measure(load, serve, client)


if __name__ == "__main__":
    os.environ["RAY_AUTH_MODE"] = "disabled"  # else the clients would need the server's token
    paths = (str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH"))  # for the actor's process
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    main(run, backward=False)
