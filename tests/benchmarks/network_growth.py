"""How the network grows: rounds, bytes and seconds of a lookup, upkeep and memory of a node, from 100 to 10,000 nodes.

    python -m tests.benchmarks.network_growth [--plot FILE.png] [number of nodes ...]

Upkeep is what refreshing all buckets of one node costs everybody, while nobody stores or reads; each is due twice an
hour then. Memory is measured on one node with a full table and 1,000 records.
"""

import json
import random
import sys
import tracemalloc
from pathlib import Path

from tesseract_async.identity import Identity, SignedRecord
from tesseract_async.metrics import Metrics
from tesseract_async.network.contacts import Contact
from tesseract_async.network.events import ReadFinished
from tesseract_async.network.operations import refresh
from tesseract_async.network.protocol import REFRESH_PERIOD, NetworkProtocol
from tesseract_async.network.settings import NetworkSettings
from tesseract_async.testing import SimulatedNetwork, log_normal_latency

NUM_LOOKUPS = 200
NUM_REFRESHED = 20
SIZES = (100, 300, 1000, 3000, 10_000)


def lookups(size: int) -> dict[str, float]:
    """Means over reads of keys that nobody stored: each runs until the k closest have answered."""
    network = SimulatedNetwork(seed=size, latency=log_normal_latency(median_rtt=0.08, sigma=0.5))
    nodes = network.add_settled_swarm(size)
    for node in nodes:
        node.num_bytes_sent = 0
    network.num_datagrams = 0
    rounds, seconds = 0, 0.0
    for index in range(NUM_LOOKUPS):
        finished: list[ReadFinished] = []
        begin = network.clock.now
        network.random.choice(nodes).read(f"absent {index}", finished.append)
        network.clock.run_until(lambda finished=finished: bool(finished), timeout=60.0)  # type: ignore[misc]
        rounds += finished[0].num_rounds
        seconds += network.clock.now - begin
    sent = sum(node.num_bytes_sent for node in nodes) / NUM_LOOKUPS
    num_datagrams = network.num_datagrams / NUM_LOOKUPS
    # upkeep: what one round of refreshing all buckets costs everybody, for one node
    before = sum(node.num_bytes_sent for node in nodes)
    for node in network.random.sample(nodes, NUM_REFRESHED):
        for index in range(len(node.protocol.table.buckets)):
            refresh(node.protocol, index, network.clock.now)
        node.cycle()
        network.run(0.1)
    network.run(2.0)
    refreshed = (sum(node.num_bytes_sent for node in nodes) - before) / NUM_REFRESHED
    return {
        "nodes": size,
        "rounds": rounds / NUM_LOOKUPS,
        "seconds": seconds / NUM_LOOKUPS,
        "datagrams": num_datagrams,
        "bytes_per_lookup": sent,
        "contacts": sum(len(node.protocol.table) for node in nodes) / size,
        "upkeep_bytes_per_second": refreshed / REFRESH_PERIOD,
    }


def memory(num_contacts_seen: int, num_records: int) -> tuple[float, int]:
    """Bytes of one node whose table heard of so many contacts and that holds so many records; and its contacts."""
    rng = random.Random(1)
    owners = [Identity.generate() for _ in range(20)]
    wall = 1_700_000_000.0
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    machine = NetworkProtocol(
        identity=owners[0],
        settings=NetworkSettings(),
        random=rng,
        metrics=Metrics(),
        now=0.0,
        wall_offset=wall,
        is_declared_public=True,
    )
    for index in range(num_contacts_seen):
        peer_id = rng.randbytes(32)
        if machine.table.wants(peer_id):
            contact = Contact(peer_id, (f"10.{index >> 16}.{index >> 8 & 255}.{index & 255}", 4000))
            contact.proven = True
            machine.table.add(contact, 0.0)
    for index in range(num_records):
        record = SignedRecord.sign(
            owners[index % 20], rng.randbytes(32), sequence=1, expiration=wall + 600, value=bytes(60)
        )
        machine.storage.add(record, wall)
    used = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    return used, len(machine.table)


def plot(rows: list[dict[str, float]], path: Path) -> None:
    """Six panels over the number of nodes, extrapolated to a million by a line over its logarithm."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    figure, axes = plt.subplots(2, 3, figsize=(13, 6), constrained_layout=True)
    sizes = np.array([row["nodes"] for row in rows])
    panels = (
        ("rounds", "rounds of a lookup", 1.0),
        ("seconds", "seconds of a lookup (median round trip 80 ms)", 1.0),
        ("bytes_per_lookup", "KB sent by everybody for one lookup", 1e-3),
        ("upkeep_bytes_per_second", "upkeep of one node, bytes/s", 1.0),
        ("contacts", "contacts in the table", 1.0),
        ("memory_bytes", "memory of a node with 1,000 records, MB", 1e-6),
    )
    for axis, (name, title, scale) in zip(axes.flat, panels, strict=True):
        values = np.array([row[name] for row in rows]) * scale
        slope, intercept = np.polyfit(np.log2(sizes), values, 1)
        beyond = np.array([sizes[0], 1e6])
        axis.semilogx(beyond, intercept + slope * np.log2(beyond), "--", color="0.6", label="extrapolated")
        axis.semilogx(sizes, values, "o-", label="simulated")
        axis.plot([1e6], [intercept + slope * np.log2(1e6)], "x", color="0.3")
        axis.annotate(f"{intercept + slope * np.log2(1e6):.3g}", (1e6, intercept + slope * np.log2(1e6)), ha="right")
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("nodes")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes.flat[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Prints a JSON line for each size, then memory."""
    arguments = sys.argv[1:]
    path = None
    if arguments[:1] == ["--plot"]:
        path = Path(arguments[1])
        arguments = arguments[2:]
    rows = []
    for size in map(int, arguments or SIZES):
        rows.append(lookups(size))
        rows[-1]["memory_bytes"] = memory(size, 1_000)[0]
        row = {key: round(value, 3) for key, value in rows[-1].items()}
        print(
            json.dumps({"name": f"network_growth_{size}", "value": row["rounds"], "unit": "rounds", **row}), flush=True
        )
    used, num_contacts = memory(2_000, 1_000)
    figure = {"name": "network_memory_per_node", "value": round(used / 1e6, 3), "unit": "MB", "asked": "< 2"}
    print(json.dumps({**figure, "contacts": num_contacts}), flush=True)
    if path is not None:
        plot(rows, path)


if __name__ == "__main__":
    main()
