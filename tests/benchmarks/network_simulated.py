"""The network's figures in virtual time: rounds, loss, mass failure, liars, cold reads. Seeded; no sockets, no waiting.

    python -m tests.benchmarks.network_simulated [number of nodes] [number of records]

Round trips are log-normal with a median of 80 ms (sigma 0.5). Tables are filled as after long use.
"""

import json
import sys

from tesseract_async.network.contacts import Contact
from tesseract_async.network.events import ReadFinished
from tesseract_async.network.protocol import NetworkProtocol
from tesseract_async.testing import LyingProtocol, SimulatedNetwork, SimulatedNode, log_normal_latency

LATENCY = log_normal_latency(median_rtt=0.08, sigma=0.5)


def show(name: str, value: float, unit: str, asked: str) -> None:
    print(json.dumps({"name": f"network_{name}", "value": round(value, 5), "unit": unit, "asked": asked}), flush=True)


def stored(network: SimulatedNetwork, nodes: list[SimulatedNode], count: int, ttl: float = 36000.0) -> None:
    for index in range(count):
        network.store(network.random.choice(nodes), f"key {index}", index, ttl=ttl)


def reads(network: SimulatedNetwork, nodes: list[SimulatedNode], count: int) -> tuple[float, float, float]:
    """Share of records found, mean rounds, mean seconds; each record is read once by a random node."""
    found, rounds, seconds = 0, 0, 0.0
    for index in range(count):
        finished: list[ReadFinished] = []
        reader = network.random.choice(nodes)
        begin = network.clock.now
        reader.read(f"key {index}", finished.append)
        network.clock.run_until(lambda finished=finished: bool(finished), timeout=60.0)  # type: ignore[misc]
        if finished:
            found += network.value_of(reader, finished[0]) == index
            rounds += finished[0].num_rounds
            seconds += network.clock.now - begin
    return found / count, rounds / count, seconds / count


def lookups_under_loss(size: int, count: int) -> None:
    network = SimulatedNetwork(seed=1, latency=LATENCY)
    nodes = network.add_settled_swarm(size)
    stored(network, nodes, count)
    _, rounds, seconds = reads(network, nodes, count)
    show("lookup_rounds", rounds, "rounds", "<= 3")
    show("read_seconds", seconds, "s", "<= 0.4")
    network.loss = 0.1
    found, _, _ = reads(network, nodes, count)
    show("found_under_10_percent_loss", found, "share", ">= 0.999")


def cold_grid(size: int, num_servers: int = 512) -> None:
    """The read that a cold client needs before it can choose among 64 x 64 experts: complete and merged."""
    network = SimulatedNetwork(seed=2, latency=LATENCY)
    nodes = network.add_settled_swarm(size)
    for node in network.random.sample(nodes, min(num_servers, size)):
        node.write([node.sign("grid", bytes(50), ttl=36000.0)], lambda finished: None)
        network.run(0.01)
    network.run(30.0)
    seconds = []
    for _ in range(10):
        reader = network.random.choice(nodes)
        finished: list[ReadFinished] = []
        begin = network.clock.now
        reader.read("grid", finished.append)
        network.clock.run_until(lambda finished=finished: bool(finished), timeout=60.0)  # type: ignore[misc]
        assert len(finished[0].records) == min(num_servers, size)
        seconds.append(network.clock.now - begin)
    show("cold_grid_read_seconds", sum(seconds) / len(seconds), "s", "<= 0.6")


def mass_failure(size: int, count: int) -> None:
    network = SimulatedNetwork(seed=3, latency=LATENCY)
    nodes = network.add_settled_swarm(size)
    stored(network, nodes, count)
    network.kill(network.random.sample(nodes, round(0.3 * size)))
    found, _, _ = reads(network, network.alive(), count)
    show("found_after_30_percent_vanished", found, "share", ">= 0.999")
    network.run(1.25 * network.settings.republish_period + 60.0)
    found, _, _ = reads(network, network.alive(), count)
    show("found_after_one_republish_period", found, "share", ">= 1.0")


def liars(size: int, count: int) -> None:
    network = SimulatedNetwork(seed=4, latency=LATENCY, public_addresses=True)

    class Conspiracy(LyingProtocol):
        accomplices: list[Contact] = []

    def protocol_of(index: int) -> type[NetworkProtocol]:
        return Conspiracy if index % 5 == 0 else NetworkProtocol

    nodes = network.add_settled_swarm(size, protocol_of=protocol_of)
    Conspiracy.accomplices += [Contact(node.protocol.own_id, node.address) for node in nodes[::5]]
    honest = [node for index, node in enumerate(nodes) if index % 5]
    stored(network, honest, count)
    found, _, _ = reads(network, honest, count)
    show("found_among_20_percent_liars", found, "share", ">= 0.99")


def main() -> None:
    """Prints a JSON line for each figure."""
    size = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    count = int(sys.argv[2]) if len(sys.argv) > 2 else 1_000
    lookups_under_loss(size, count)
    cold_grid(size)
    liars(size, count)
    mass_failure(size, min(count, 300))


if __name__ == "__main__":
    main()
