"""What the peers of small calls (`rpc_*.py`) have in common: their loads, and how their figures are taken."""

import argparse
import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

from tests.benchmarks.figures import emit, percentile
from tests.benchmarks.loads import SMALL, Load
from tests.benchmarks.processes import ClientResult, Gate, all_latencies, child, rate, run_clients


def measure(
    load: Load, serve: Callable[..., None], client: Callable[..., ClientResult], args: tuple[Any, ...] = ()
) -> None:
    """One server process ``serve(pipe, load, *args)`` that sends where it is, and clients
    ``client(index, gate, load, where, *args)``. Prints their calls/s."""
    with child(serve, (load, *args)) as server:
        where = server.receive(120)
        results = run_clients(client, load.num_clients, seconds=load.seconds, args=(load, where, *args))
    report(load, results)


def report(load: Load, results: list[ClientResult]) -> None:
    """Print the figure of a load."""
    latencies = all_latencies(results)
    emit(
        load.name,
        rate(results),
        "calls/s",
        num_calls=sum(result.num_calls for result in results),
        median_ms=percentile(latencies, 0.5) * 1e3,
        p99_ms=percentile(latencies, 0.99) * 1e3,
    )


async def callers_on_loop(call: Callable[[], Awaitable[object]], gate: Gate, num_callers: int) -> ClientResult:
    """`num_callers` tasks that call one after another until the gate's time is over."""
    for _ in range(10):
        await call()
    stop_at = await asyncio.to_thread(gate.wait)
    latencies: list[float] = []

    async def caller() -> None:
        before = time.perf_counter()
        while before < stop_at:
            await call()
            now = time.perf_counter()
            latencies.append(now - before)
            before = now

    begin = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(num_callers)))
    return ClientResult(len(latencies), time.perf_counter() - begin, tuple(latencies))


def main(run: Callable[[Load], None], *, backward: bool) -> None:
    """Run the loads that are named, or all. `backward`: whether this peer has a backward."""
    parser = argparse.ArgumentParser()
    parser.add_argument("loads", nargs="*", help="names of loads; all by default", metavar="LOAD")
    chosen = parser.parse_args().loads
    for load in SMALL:
        if (backward or not load.backward) and (not chosen or load.name in chosen):
            run(load)
