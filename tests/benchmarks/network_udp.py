"""The network's figures on real UDP, loopback: joining and reading among 1,000 nodes, and reading a large grid.

    python -m tests.benchmarks.network_udp [number of nodes]

Everything runs in one process on one loop, signatures on; no verification result is shared between nodes.
"""

import asyncio
import json
import random
import socket
import sys
import time

from tesseract_async.identity import Identity, SignedRecord
from tesseract_async.metrics import Metrics
from tesseract_async.network.entries import key_digest
from tesseract_async.network.network import TesseractNetwork
from tesseract_async.transport.base import PeerAddress

NUM_READS = 300
MANIFEST_BYTES = 50
"""The bytes of one server's manifest with 8 experts."""


def show(name: str, value: float, unit: str, asked: str) -> None:
    print(json.dumps({"name": f"network_{name}", "value": round(value, 5), "unit": unit, "asked": asked}), flush=True)


async def start(seed: str | None) -> tuple[TesseractNetwork, str]:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setblocking(False)
    sock.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{sock.getsockname()[1]}"
    network = TesseractNetwork(identity=Identity.generate(), metrics=Metrics())
    await network.start(sock, initial_peers=[PeerAddress.parse(seed)] if seed else [])
    return network, address


async def many_nodes(count: int) -> None:
    rng = random.Random(1)
    begin, begin_cpu = time.perf_counter(), time.thread_time()
    network, seed = await start(None)
    networks, addresses = [network], [seed]
    while len(networks) < count:
        fresh = [await start(rng.choice(addresses)) for _ in range(min(10, count - len(networks)))]
        assert all([await network.wait_joined(30.0) for network, _ in fresh])
        networks += [network for network, _ in fresh]
        addresses += [address for _, address in fresh]
    show("join_all_seconds", time.perf_counter() - begin, "s", "< 60")
    show("join_all_cpu_seconds", time.thread_time() - begin_cpu, "s", "")
    for index in range(NUM_READS):
        assert await rng.choice(networks).store(f"key {index}", index, ttl=3600.0)
    seconds = []
    begin_cpu = time.thread_time()
    for index in range(NUM_READS):
        reader = rng.choice(networks)
        begin = time.perf_counter()
        assert await reader.get(f"key {index}") == index
        seconds.append(time.perf_counter() - begin)
    show("get_milliseconds", 1000 * sum(seconds) / len(seconds), "ms", "< 5")
    show("get_cpu_milliseconds", 1000 * (time.thread_time() - begin_cpu) / len(seconds), "ms", "")
    for network in networks:
        await network.aclose()


class Watch:
    """The longest that the loop's thread worked between two turns, without what other processes took of its core."""

    def __init__(self) -> None:
        self.longest = 0.0
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        last = time.thread_time()
        while True:
            await asyncio.sleep(0)
            now = time.thread_time()
            self.longest = max(self.longest, now - last)
            last = now

    async def stop(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


async def grid(num_servers: int, max_seconds: float) -> None:
    """Reads one manifest for each of `num_servers` from five holders, as a client that holds nothing."""
    first, seed = await start(None)
    holders = [first, *[(await start(seed))[0] for _ in range(4)]]
    client, _ = await start(seed)
    client.set_client(True)
    assert all([await network.wait_joined(10.0) for network in [*holders[1:], client]])
    wall = time.time()
    for _ in range(num_servers):
        record = SignedRecord.sign(
            Identity.generate(),
            key_digest("grid"),
            sequence=int(wall * 1e6),
            expiration=wall + 3600.0,
            value=b"\xc4" + bytes([MANIFEST_BYTES]) + bytes(MANIFEST_BYTES),
        )
        for holder in holders:
            assert holder._protocol is not None
            holder._protocol.storage.put(record)
    before = client.metrics.total("network_bytes_received")
    watch = Watch()
    await asyncio.sleep(0)
    begin, begin_cpu = time.perf_counter(), time.thread_time()
    entries = await client.get_entries("grid")
    seconds, cpu = time.perf_counter() - begin, time.thread_time() - begin_cpu
    await watch.stop()
    assert len(entries) == num_servers
    show(f"grid_of_{num_servers}_servers_seconds", seconds, "s", f"< {max_seconds}")
    show(f"grid_of_{num_servers}_servers_cpu_seconds", cpu, "s", "")
    show(
        f"grid_of_{num_servers}_servers_kilobytes",
        (client.metrics.total("network_bytes_received") - before) / 1000,
        "KB",
        "< 100" if num_servers == 512 else "",
    )
    show(f"grid_of_{num_servers}_servers_loop_blocked", 1000 * watch.longest, "ms", "< 20")
    for network in [*holders, client]:
        await network.aclose()


async def run(count: int) -> None:
    await grid(512, 0.1)
    await grid(4096, 1.0)
    await many_nodes(count)


def main() -> None:
    """Prints a JSON line for each figure."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    if sys.platform == "win32":
        asyncio.run(run(count))
    else:
        import uvloop

        uvloop.run(run(count))


if __name__ == "__main__":
    main()
