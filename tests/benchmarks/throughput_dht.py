"""Our side of the DHT load (`loads.DhtLoad`): real UDP on loopback, signatures on, the nodes in two processes.

Each process runs half of the nodes and of the workers; a worker's stores and gets go through the nodes of its own
process. The nodes that are killed live in a third process, which gets SIGKILL after a third of the rounds.
"""

import asyncio
import contextlib
import random
import socket
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.connection import Connection

import tesseract_async as ta
from tesseract_async.transport.base import PeerAddress
from tests.benchmarks.figures import emit, percentile
from tests.benchmarks.loads import DhtLoad
from tests.benchmarks.processes import child
from tests.benchmarks.swarm import run_on, stop_asked

NUM_PROCESSES = 2


@dataclass(frozen=True)
class WorkResult:
    """What the workers of one process did."""

    num_stored: int
    """Stores that reached another node."""
    num_complete: int
    """Gets that found every subkey of their round."""
    begin: float
    end: float
    operation_seconds: tuple[float, ...]


@contextlib.asynccontextmanager
async def running(num_nodes: int, seeds: Sequence[str]) -> AsyncIterator[tuple[list[ta.TesseractNetwork], list[str]]]:
    """Nodes of the DHT on one loop, and their addresses; the first is a seed of the others unless seeds are given."""
    async with contextlib.AsyncExitStack() as stack:
        networks: list[ta.TesseractNetwork] = []
        addresses: list[str] = []
        for _ in range(num_nodes):
            sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            sock.setblocking(False)
            sock.bind(("127.0.0.1", 0))
            network = ta.TesseractNetwork(identity=ta.Identity.generate())
            known = [PeerAddress.parse(address) for address in seeds or addresses[:1]]
            await network.start(sock, initial_peers=known)
            stack.push_async_callback(network.aclose)
            networks.append(network)
            addresses.append("{}:{}".format(*sock.getsockname()))
        if seeds:
            for network in networks:
                await network.wait_joined(30)
        yield networks, addresses


def nodes(pipe: Connection, num_nodes: int, seeds: Sequence[str], load: DhtLoad | None) -> None:
    """A process of nodes: sends their addresses; told to go, runs its workers and sends a `WorkResult`."""

    async def main() -> None:
        async with running(num_nodes, seeds) as (networks, addresses):
            pipe.send(("value", addresses))
            if load is None:
                await stop_asked(pipe)
                return
            await asyncio.to_thread(pipe.recv)
            for network in networks:
                await network.wait_joined(30)
            pipe.send(("value", "joined"))
            await asyncio.to_thread(pipe.recv)
            pipe.send(("value", await work(networks, load)))
            await stop_asked(pipe)

    run_on("uvloop", main())


async def work(networks: list[ta.TesseractNetwork], load: DhtLoad) -> WorkResult:
    """This process's share of the workers, all rounds."""
    rng = random.Random(str(uuid.uuid4()))
    num_stored = num_complete = 0
    latencies: list[float] = []

    def some(count: int) -> list[ta.TesseractNetwork]:
        shuffled = rng.sample(networks, len(networks))
        return [shuffled[index % len(shuffled)] for index in range(count)]

    async def store(network: ta.TesseractNetwork, key: str, subkey: str, value: str) -> None:
        nonlocal num_stored
        begin = time.perf_counter()
        num_holders = await network.store(key, value, ttl=load.ttl, subkey=subkey)
        num_stored += num_holders > 0
        latencies.append(time.perf_counter() - begin)

    async def get(network: ta.TesseractNetwork, key: str, values: dict[str, str]) -> None:
        nonlocal num_complete
        begin = time.perf_counter()
        found = await network.get(key)
        num_complete += found == values
        latencies.append(time.perf_counter() - begin)

    async def worker() -> None:
        for _ in range(load.num_rounds):
            key = uuid.uuid4().hex
            values = {uuid.uuid4().hex: uuid.uuid4().hex for _ in range(load.num_stores)}
            stores = zip(some(load.num_stores), values.items(), strict=True)
            await asyncio.gather(*(store(network, key, subkey, value) for network, (subkey, value) in stores))
            await asyncio.gather(*(get(network, key, values) for network in some(load.num_gets)))

    begin = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(load.num_workers // NUM_PROCESSES)))
    return WorkResult(num_stored, num_complete, begin, time.perf_counter(), tuple(latencies))


def main() -> None:
    load = DhtLoad()
    num_used = (load.num_nodes - load.num_killed) // NUM_PROCESSES
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(child(nodes, (num_used, (), load)))
        seeds = first.receive(30)[: load.num_seeds]
        doomed = stack.enter_context(child(nodes, (load.num_killed, seeds, None)))
        workers = [
            first,
            *(stack.enter_context(child(nodes, (num_used, seeds, load))) for _ in range(1, NUM_PROCESSES)),
        ]
        for each in (doomed, *workers[1:]):
            each.receive(30)
        for step in ("join", "go"):
            for each in workers:
                each.pipe.send(step)
            if step == "join":
                for each in workers:
                    each.receive(60)
        # a third of the rounds: by the first figures a run takes a second or two
        connection.wait([each.pipe for each in workers], timeout=0.2)
        doomed.process.kill()
        results: list[WorkResult] = [each.receive(120) for each in workers]
    seconds = max(result.end for result in results) - min(result.begin for result in results)
    latencies = [each for result in results for each in result.operation_seconds]
    emit(
        "dht 16 nodes",
        load.num_operations / seconds,
        "operations/s",
        stored_share=sum(result.num_stored for result in results) * 2 / load.num_operations,
        complete_share=sum(result.num_complete for result in results) * 2 / load.num_operations,
        median_ms=percentile(latencies, 0.5) * 1e3,
        p99_ms=percentile(latencies, 0.99) * 1e3,
        seconds=seconds,
    )


if __name__ == "__main__":
    main()
