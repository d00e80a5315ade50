"""Life under churn in virtual time: sessions of exponential length (median 1 h), half of them ended without a word.

    python -m tests.benchmarks.network_churn [number of nodes] [hours]

Asked for are 2,000 nodes and 24 hours, which take hours of computing; smaller swarms have fewer nodes between a record
and its loss, not more. Once an hour every record is read by a random node.
"""

import gc
import json
import sys
import time

from tesseract_async.testing import SimulatedNetwork, SimulatedNode, log_normal_latency

MEAN_SESSION = 3600.0 / 0.6931
NUM_RECORDS = 100


def main() -> None:
    """Prints how many reads in each hour found their record, then the sum."""
    size = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    hours = int(sys.argv[2]) if len(sys.argv) > 2 else 24
    network = SimulatedNetwork(seed=1, latency=log_normal_latency(median_rtt=0.08, sigma=0.5))
    rng = network.random
    nodes = network.add_settled_swarm(size)
    num_ended = 0

    def end(node: SimulatedNode) -> None:
        nonlocal num_ended
        num_ended += 1
        if rng.random() < 0.5:
            network.kill(node)
        else:
            network.leave(node)
        living = network.alive()
        fresh = network.add_node([rng.choice(living), rng.choice(living)])
        network.clock.call_later(rng.expovariate(1 / MEAN_SESSION), end, fresh)
        del network.nodes[node.address]

    for node in nodes:
        network.clock.call_later(rng.expovariate(1 / MEAN_SESSION), end, node)
    found = asked = 0
    gc.disable()  # it would go through all living nodes time and again: a quarter of the run
    for hour in range(hours):
        if hour % 20 == 0:  # a record may live for a day at most, and reading takes time of its own
            for index in range(NUM_RECORDS):
                network.store(rng.choice(network.alive()), f"key {index}", index, ttl=86_000.0)
        network.run(3600.0)
        gc.collect()
        for index in range(NUM_RECORDS):
            asked += 1
            found += network.get(rng.choice(network.alive()), f"key {index}") == index
        progress = {
            "hour": round(network.clock.now / 3600, 2),
            "sessions_ended": num_ended,
            "lost": asked - found,
            "datagrams": network.num_datagrams,
            "cpu_seconds": round(time.process_time()),
        }
        print(json.dumps(progress), flush=True)
    lost = {"name": "network_churn_lost_reads", "value": asked - found, "unit": f"of {asked}", "asked": "<= 0"}
    print(json.dumps({**lost, "nodes": size, "hours": hours, "sessions_ended": num_ended}))


if __name__ == "__main__":
    main()
