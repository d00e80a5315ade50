"""hivemind's side of the expert calls: the loads of `loads.COMPARED`, through its public API.

Runs in hivemind's own environment (see `peers/requirements_hivemind.txt`):

    .venv-hivemind/bin/python -m tests.benchmarks.peers.hivemind_calls [LOAD ...]
"""

import argparse
import threading
import time
from multiprocessing.connection import Connection
from typing import Any

import hivemind
import torch
from hivemind.utils.tensor_descr import BatchTensorDescriptor

from tests.benchmarks.figures import emit, percentile
from tests.benchmarks.loads import COMPARED, Load
from tests.benchmarks.modules import KINDS
from tests.benchmarks.processes import (
    ClientResult,
    Gate,
    all_latencies,
    child,
    rate,
    run_clients,
    timed,
    wait_for_stop,
)

NUM_HANDLERS = 2  # one connection handler process per core


def serve(pipe: Connection, load: Load, uids: list[str]) -> None:
    """One server process with every expert of the load; sends its addresses once it is ready."""
    torch.set_num_threads(1)
    dht = hivemind.DHT(start=True)
    backends = {}
    for uid in uids:
        module = KINDS[load.kind](load.width)
        backends[uid] = hivemind.ModuleBackend(
            name=uid,
            module=module,
            optimizer=torch.optim.Adam(module.parameters()) if load.kind != "nop" else None,
            args_schema=(BatchTensorDescriptor(load.width),),
            outputs_schema=BatchTensorDescriptor(load.width),
            max_batch_size=load.max_batch_size,
        )
    server = hivemind.Server(dht, backends, num_connection_handlers=NUM_HANDLERS, device="cpu")
    server.run_in_background(await_ready=True)
    pipe.send(("value", [str(address) for address in dht.get_visible_maddrs()]))
    wait_for_stop(pipe)
    server.shutdown()


def find_experts(dht: hivemind.DHT, uids: list[str], timeout: float = 30.0) -> list[Any]:
    """The experts, once the server's declaration has arrived. Raises: TimeoutError."""
    give_up = time.monotonic() + timeout
    while time.monotonic() < give_up:
        experts = hivemind.moe.get_experts(dht, uids)
        if all(expert is not None for expert in experts):
            return experts
        time.sleep(0.2)
    raise TimeoutError(f"not all of {uids} were declared")


def client(index: int, gate: Gate, load: Load, uids: list[str], addresses: list[str]) -> ClientResult:
    """One client process: finds the experts, makes two calls to warm up, then calls until the gate's time is over."""
    torch.set_num_threads(1)
    dht = hivemind.DHT(initial_peers=addresses, client_mode=True, start=True)
    try:
        expert = find_experts(dht, uids)[index % len(uids)]

        batch = torch.randn(load.rows, load.width)

        def call() -> None:
            torch.set_grad_enabled(load.backward)  # the mode is each thread's own
            output = expert(batch.detach().requires_grad_(load.backward))
            if load.backward:
                output.sum().backward()

        for _ in range(2):
            call()
        stop_at = gate.wait()
        if load.num_callers == 1:
            return timed(call, stop_at)
        results: list[ClientResult] = []
        threads = [
            threading.Thread(target=lambda: results.append(timed(call, stop_at))) for _ in range(load.num_callers)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        num_calls = sum(result.num_calls for result in results)
        seconds = max(result.seconds for result in results)
        return ClientResult(num_calls, seconds, tuple(all_latencies(results)))
    finally:
        dht.shutdown()


def measure(load: Load) -> None:
    """Runs one load and prints its figure: calls/s where a call is small, rows/s where it is not."""
    uids = [f"{load.kind}.{index}" for index in range(load.num_experts)]
    with child(serve, (load, uids)) as server:
        addresses = server.receive(60)
        results = run_clients(client, load.num_clients, seconds=load.seconds, args=(load, uids, addresses))
    calls = rate(results)
    latencies = all_latencies(results)
    value, unit = (calls, "calls/s") if load.rows == 1 else (calls * load.rows, "rows/s")
    emit(
        load.name,
        value,
        unit,
        num_calls=sum(result.num_calls for result in results),
        median_ms=percentile(latencies, 0.5) * 1e3,
        p99_ms=percentile(latencies, 0.99) * 1e3,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("loads", nargs="*", help="names of loads; all by default", metavar="LOAD")
    chosen = parser.parse_args().loads
    for load in COMPARED:
        if not chosen or load.name in chosen:
            measure(load)


if __name__ == "__main__":
    main()
