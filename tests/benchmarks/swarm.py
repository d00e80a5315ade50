"""Our side of the loads: one server process with the experts, client processes that call them, all on loopback."""

import asyncio
import contextlib
import itertools
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from typing import Any, Literal

import torch

import tesseract_async as ta
from tests.benchmarks.ceilings import cpu_seconds
from tests.benchmarks.loads import Load
from tests.benchmarks.modules import KINDS
from tests.benchmarks.processes import Child, ClientResult, Gate, child, in_thread, run_clients, wait_for_stop

Security = Literal["tls", "plain"]

# The package loads its parts on first use: here, once, instead of in each forked process.
for _name in ta.__all__:
    getattr(ta, _name)


def run_on(loop: str, main: Coroutine[Any, Any, Any]) -> Any:
    """``asyncio.run`` on ``"uvloop"`` (where there is one) or ``"asyncio"``."""
    if loop == "uvloop" and sys.platform != "win32":
        import uvloop

        return uvloop.run(main)
    return asyncio.run(main)


def make_backend(load: Load) -> ta.ExpertBackend:
    """One expert of the load."""
    module = KINDS[load.kind](load.width)
    return ta.ExpertBackend(
        module,
        optimizer=torch.optim.Adam(module.parameters()) if load.kind != "nop" else None,
        args_schema=(ta.TensorSpec((load.width,)),),
        max_batch_size=load.max_batch_size,
    )


async def stop_asked(pipe: Connection) -> None:
    """Waits, while a loop runs, until the parent process says stop."""
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()

    def watch() -> None:
        wait_for_stop(pipe)
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(stopped.set)

    in_thread(watch)
    await stopped.wait()


@dataclass(frozen=True)
class Served:
    """What a server process says about its run when it is stopped."""

    mean_batch_rows: float
    """Rows of the batches that its device computed, on average."""
    busy_share: float
    """Of the time until it was stopped, the clients' start included, in which the device computed."""
    cpu_seconds: float
    """Of the server's process in that time."""
    details: dict[str, Any]


def serve(pipe: Connection, load: Load, uids: list[str], security: Security, loop: str, num_threads: int) -> None:
    """The server process: sends ``"host:port/PEER_ID"`` once the experts can be found, and `Served` at the end."""
    torch.set_num_threads(num_threads)

    async def main() -> None:
        backends = {uid: make_backend(load) for uid in uids}
        async with ta.TesseractNode(security=security) as node, ta.TesseractServer(node, backends) as server:
            pipe.send(("value", str(node.peer_address)))
            begin, cpu = time.monotonic(), time.process_time()
            await stop_asked(pipe)
            seconds, cpu = time.monotonic() - begin, time.process_time() - cpu
            statistics = server.runtimes[0].statistics()
            rows = statistics.num_rows / max(1, statistics.num_batches)
            pipe.send(("value", Served(rows, server.runtimes[0].busy_seconds / seconds, cpu, asdict(statistics))))

    run_on(loop, main())


@contextlib.contextmanager
def serving(
    load: Load, uids: list[str], *, security: Security = "tls", loop: str = "uvloop", num_threads: int = 1
) -> Iterator[tuple[Child, str]]:
    """A server process for the load, and its address."""
    with child(serve, (load, uids, security, loop, num_threads)) as server:
        yield server, server.receive(60)


@contextlib.asynccontextmanager
async def joined(address: str, security: Security) -> AsyncIterator[ta.TesseractNode]:
    """A node in this process that has joined the server's network."""
    async with ta.TesseractNode(security=security, initial_peers=[address]) as node:
        yield node


def make_call(expert: ta.RemoteExpert, load: Load) -> Callable[[], Awaitable[None]]:
    """One call of the load as a coroutine function: forward, and backward where the load has one."""
    batch = torch.randn(load.rows, load.width)

    async def forward() -> None:
        with torch.no_grad():
            await expert(batch)

    async def forward_and_backward() -> None:
        output = await expert(batch.detach().requires_grad_())
        await ta.backward(output.sum())

    return forward_and_backward if load.backward else forward


def client(
    index: int,
    gate: Gate,
    load: Load,
    uids: list[str],
    address: str,
    security: Security,
    loop: str,
    num_batches: int | None,
    server_pid: int,
) -> ClientResult:
    """One client process. It calls until the gate's time is over, or `num_batches` times with each of its callers."""
    torch.set_num_threads(1)

    async def main() -> ClientResult:
        async with joined(address, security) as node:
            mine = itertools.islice(itertools.cycle(uids), index, index + len(uids))
            calls = [make_call(await node.get_expert(uid), load) for uid in mine]
            for call in calls[: 2 if num_batches is None else 1] * (2 if len(calls) == 1 else 1):
                await call()
            stop_at = await asyncio.to_thread(gate.wait)
            latencies: list[float] = []

            async def caller(offset: int) -> None:
                before = time.perf_counter()
                for number in itertools.count():
                    if before >= stop_at if num_batches is None else number >= num_batches:
                        return
                    await calls[(offset + number) % len(calls)]()
                    now = time.perf_counter()
                    latencies.append(now - before)
                    before = now

            begin, cpu, server_cpu = time.perf_counter(), time.process_time(), cpu_seconds(server_pid)
            await asyncio.gather(*(caller(offset) for offset in range(load.num_callers)))
            seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
            server_cpu = cpu_seconds(server_pid) - server_cpu
            return ClientResult(len(latencies), seconds, tuple(latencies), cpu, server_cpu)

    return run_on(loop, main())


def run_load(
    load: Load,
    *,
    security: Security = "tls",
    loop: str = "uvloop",
    num_threads: int = 1,
    num_batches: int | None = None,
) -> tuple[list[ClientResult], Served]:
    """One load from beginning to end: what each client did, and what the server saw."""
    uids = [f"{load.kind}.{index}" for index in range(load.num_experts)]
    with serving(load, uids, security=security, loop=loop, num_threads=num_threads) as (server, address):
        args = (load, uids, address, security, loop, num_batches, server.process.pid)
        results = run_clients(client, load.num_clients, seconds=load.seconds, args=args)
        server.stop()
        return results, server.receive(30)
