"""DHT load on real UDP: 16 nodes in two processes, 4 workers x 16 rounds x (8 stores, 8 gets), 10 % of nodes killed.

Signatures are on, and no verification result is shared between nodes. Half of the nodes and workers live in each
process; two nodes (one in each) are killed without farewell after a third of the rounds. Prints a JSON line.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import subprocess
import sys
import time

from tesseract_async.identity import Identity
from tesseract_async.network.network import StoreItem, TesseractNetwork
from tesseract_async.transport.base import PeerAddress

NUM_NODES, NUM_PROCESSES, NUM_WORKERS, NUM_ROUNDS, BATCH = 16, 2, 4, 16, 8
HIVEMIND_OPERATIONS = 45.0
SETTLE = 2.0


async def start_node(seed: str | None) -> tuple[TesseractNetwork, str]:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setblocking(False)
    sock.bind(("127.0.0.1", 0))
    network = TesseractNetwork(identity=Identity.generate())
    await network.start(sock, initial_peers=[PeerAddress.parse(seed)] if seed else [])
    return network, f"127.0.0.1:{sock.getsockname()[1]}"


async def work(networks: list[TesseractNetwork], name: str, kill: bool) -> tuple[int, int]:
    """One worker: returns operations done and gets that found nothing."""
    rng = random.Random(name)
    num_done = num_missing = 0
    for number in range(NUM_ROUNDS):
        if kill and number == NUM_ROUNDS // 3:
            victim = networks.pop()
            assert victim._driver is not None and victim._driver._transport is not None
            victim._driver._transport.abort()
        keys = [f"{name}/{number}/{index}" for index in range(BATCH)]
        network = rng.choice(networks)
        counts = await network.store_many([StoreItem(key, os.urandom(64), 300.0) for key in keys])
        assert all(counts)
        found = await rng.choice(networks).get_many(keys)
        num_missing += sum(value is None for value in found)
        num_done += 2 * BATCH
    return num_done, num_missing


async def run_process(seed: str | None, pipe_out: object = sys.stdout) -> None:
    networks: list[TesseractNetwork] = []
    for _ in range(NUM_NODES // NUM_PROCESSES):
        network, address = await start_node(seed)
        if seed is None:
            print(address, flush=True)
            seed = address
        networks.append(network)
    loop = asyncio.get_running_loop()
    joined = [await network.wait_joined(20) for network in networks]
    assert all(joined)
    await asyncio.sleep(SETTLE)
    print("ready", flush=True)
    await loop.run_in_executor(None, sys.stdin.readline)
    begin = time.perf_counter()
    everybody = list(networks)
    results = await asyncio.gather(
        *(work(networks, f"{os.getpid()}-{index}", kill=index == 0) for index in range(NUM_WORKERS // NUM_PROCESSES))
    )
    seconds = time.perf_counter() - begin
    print(json.dumps({"done": sum(r[0] for r in results), "missing": sum(r[1] for r in results), "seconds": seconds}))
    sys.stdout.flush()
    await loop.run_in_executor(None, sys.stdin.readline)
    for network in everybody:
        await network.aclose()


def main() -> None:
    """Runs the load and prints operations per second."""
    processes: list[subprocess.Popen[str]] = []
    seed = ""
    for _ in range(NUM_PROCESSES):
        command = [sys.executable, __file__, "node", *([seed] if seed else [])]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        if not seed:
            seed = process.stdout.readline().strip()
        processes.append(process)
    for process in processes:
        assert process.stdout is not None and process.stdout.readline().strip() == "ready"
    for process in processes:
        assert process.stdin is not None
        print(file=process.stdin, flush=True)
    results = []
    for process in processes:
        assert process.stdout is not None
        results.append(json.loads(process.stdout.readline()))
    for process in processes:
        process.communicate("\n")
    rate = sum(result["done"] for result in results) / max(result["seconds"] for result in results)
    missing = sum(result["missing"] for result in results)
    print(
        json.dumps(
            {
                "name": "network_load_operations",
                "value": round(rate, 1),
                "unit": "operations/s",
                "asked": f">= {10 * HIVEMIND_OPERATIONS:.0f}",
                "gets_without_value": missing,
            }
        )
    )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        runner = asyncio.run
        if sys.platform != "win32":
            import uvloop

            runner = uvloop.run
        runner(run_process(sys.argv[2] if len(sys.argv) > 2 else None))
    else:
        main()
