"""torch.distributed.rpc's side of the small calls (`loads.SMALL`), with its autograd where they have a backward. It
knows no encryption.

    .venv-rpc/bin/python -m tests.benchmarks.peers.rpc_torch [LOAD ...]
"""

import os
import socket
import threading
from multiprocessing.connection import Connection

import torch
from torch.distributed import autograd, rpc

from tests.benchmarks.loads import Load
from tests.benchmarks.modules import KINDS
from tests.benchmarks.peers.small_calls import main, report
from tests.benchmarks.processes import ClientResult, Gate, all_latencies, child, run_clients, timed, wait_for_stop

_modules: dict[tuple[str, int], torch.nn.Module] = {}


def apply(kind: str, width: int, x: torch.Tensor) -> torch.Tensor:
    """Called at the server."""
    module = _modules.get((kind, width)) or _modules.setdefault((kind, width), KINDS[kind](width))
    with torch.set_grad_enabled(x.requires_grad):
        return module(x)


def join(name: str, rank: int, load: Load, port: int) -> None:
    """Return once the server and all clients are there."""
    torch.set_num_threads(1)
    options = rpc.TensorPipeRpcBackendOptions(num_worker_threads=16, init_method=f"tcp://127.0.0.1:{port}")
    rpc.init_rpc(name, rank=rank, world_size=load.num_clients + 1, rpc_backend_options=options)


def serve(pipe: Connection, load: Load, port: int) -> None:
    join("server", 0, load, port)
    wait_for_stop(pipe)
    rpc.shutdown(graceful=False)


def client(index: int, gate: Gate, load: Load, port: int) -> ClientResult:
    join(f"client{index}", index + 1, load, port)
    row = torch.randn(load.rows, load.width)

    def forward() -> None:
        rpc.rpc_sync("server", apply, args=(load.kind, load.width, row))

    def forward_and_backward() -> None:
        with autograd.context() as context:
            y = rpc.rpc_sync("server", apply, args=(load.kind, load.width, row.detach().requires_grad_()))
            autograd.backward(context, [y.sum()])

    call = forward_and_backward if load.backward else forward
    for _ in range(10):
        call()
    stop_at = gate.wait()
    results: list[ClientResult] = []
    threads = [threading.Thread(target=lambda: results.append(timed(call, stop_at))) for _ in range(load.num_callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = max(result.seconds for result in results)
    return ClientResult(sum(result.num_calls for result in results), seconds, tuple(all_latencies(results)))


def run(load: Load) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    with child(serve, (load, port)):
        report(load, run_clients(client, load.num_clients, seconds=load.seconds, args=(load, port)))


if __name__ == "__main__":
    os.environ |= {"TP_SOCKET_IFNAME": "lo", "GLOO_SOCKET_IFNAME": "lo"}
    main(run, backward=True)
