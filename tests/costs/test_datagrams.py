"""What the hash table sends for a look-up and for renewing an entry, in a simulated swarm."""

import statistics
from typing import Any

from tesseract_async.testing import SimulatedNetwork
from tests.costs.limits import check

NUM_NODES, NUM_KEYS = 200, 8
TTL = 600.0


def test_datagrams_of_look_ups_and_renewals() -> None:
    network = SimulatedNetwork(seed=3)
    nodes = network.add_settled_swarm(NUM_NODES)
    clock = network.clock

    def cost_of(begin: Any) -> int:
        """Datagrams from `begin` until it is done, beyond those that the swarm sends anyway in that time."""
        done: list[Any] = []
        before, since = network.num_datagrams, clock.now
        begin(done.append)
        assert clock.run_until(lambda: bool(done), timeout=60.0)
        with_it, seconds = network.num_datagrams - before, clock.now - since
        before = network.num_datagrams
        clock.run(seconds)
        return with_it - (network.num_datagrams - before)

    look_ups, renewals = [], []
    for index in range(NUM_KEYS):
        owner, reader, key = nodes[index], nodes[-1 - index], f"key {index}"
        for is_new in (True, False):
            record = owner.sign(key, index, ttl=TTL)
            cost = cost_of(lambda done, owner=owner, record=record: owner.write([record], done))
            if not is_new:
                renewals.append(cost)
        look_ups.append(cost_of(lambda done, reader=reader, key=key: reader.read(key, done)))
    check("datagrams per look-up", statistics.mean(look_ups))
    check("datagrams per renewal", statistics.mean(renewals))
