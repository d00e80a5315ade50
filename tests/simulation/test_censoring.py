"""Ids that were made to lie next to a key: what is stored there is found all the same."""

import hashlib
import random
from typing import Any

import pytest

from tesseract_async.network import datagrams as wire
from tesseract_async.network.contacts import Contact
from tesseract_async.network.routing_table import common_prefix
from tesseract_async.testing import LyingProtocol, SimulatedNetwork, SimulatedNode
from tesseract_async.testing.simulation import SimulatedIdentity

KEY = "experts/ffn"
TARGET = int.from_bytes(hashlib.sha256(KEY.encode()).digest(), "big")


class Siege:
    """Honest nodes, and liars that come to lie nearer to the key than any of them."""

    def __init__(self, *, num_honest: int, seed: int) -> None:
        self.network = network = SimulatedNetwork(seed=seed, latency=0.02, public_addresses=True)
        self.honest = network.add_settled_swarm(num_honest)
        self.random = random.Random(seed)
        self.num_hashes = 0

        class Conspiracy(LyingProtocol):
            accomplices: list[Contact] = []

            def answer(self, datagram: wire.Datagram, request: wire.RpcRequest, **how: Any) -> Any:
                liar: Any = super(LyingProtocol, self) if datagram.kind == wire.PAGE else super()
                return liar.answer(datagram, request, **how)

        self.liar = Conspiracy

    def store(self, subkey: str, value: object, *, by: int) -> int:
        return self.network.store(self.honest[by], KEY, value, ttl=3000.0, subkey=subkey)

    def surround(self, num_ranges: int) -> list[SimulatedNode]:
        """Liars join, two of each address range (more would be no holders), and name one another from then on."""
        network = self.network
        nearest = max(common_prefix(node.protocol.table.own_number, TARGET) for node in self.honest)
        liars: list[SimulatedNode] = []
        while len(liars) < 2 * num_ranges:
            self.num_hashes += 1
            identity = SimulatedIdentity(b"liar %d" % self.num_hashes)
            if common_prefix(int.from_bytes(identity.peer_id, "big"), TARGET) <= nearest:
                continue
            network.know(identity)
            address = (f"{90 + len(liars) // 400}.{len(liars) // 2 % 200}.7.{1 + len(liars) % 2}", 4000)
            seed = self.random.choice(self.honest)
            liars.append(network.add_node([seed], identity=identity, address=address, protocol=self.liar))
            network.run(0.2)
        self.liar.accomplices += [Contact(node.protocol.own_id, node.address) for node in liars]
        network.run(60.0)
        return liars

    def seen(self, subkey: str) -> list[object]:
        """Return what ten honest nodes read."""
        readers = self.random.sample(self.honest, 10)
        return [(self.network.get(reader, KEY) or {}).get(subkey) for reader in readers]

    def newcomer(self, *, near: bool) -> SimulatedNode:
        """One that joined seconds ago, by chance or `near` the key, with liars as its neighbors."""
        while True:
            self.num_hashes += 1
            identity = SimulatedIdentity(b"newcomer %d" % self.num_hashes)
            if (common_prefix(int.from_bytes(identity.peer_id, "big"), TARGET) >= 8) == near:
                break
        self.network.know(identity)
        node = self.network.add_node([self.random.choice(self.honest)], identity=identity)
        self.network.run(10.0)
        return node

    def honest_holders(self, subkey: str, *, owner: SimulatedNode) -> int:
        peer_id, key = owner.protocol.identity.peer_id, hashlib.sha256(KEY.encode()).digest()
        held = [node.protocol.storage.records(key) for node in self.honest]
        return sum(any((one.subkey, one.owner) == (subkey, peer_id) for one in records) for records in held)


def besiege(num_honest: int, num_ranges: int, *, copying: bool) -> None:
    siege = Siege(num_honest=num_honest, seed=3)
    siege.store("before", 1, by=5)
    siege.store("renewed", "old", by=7)
    early = [node for node in siege.honest if node.protocol.storage.records(hashlib.sha256(KEY.encode()).digest())]
    liars = siege.surround(num_ranges)
    # the liars hold what was there before, and say so: all of them the same
    for liar in liars:
        for record in early[0].protocol.storage.records(hashlib.sha256(KEY.encode()).digest()):
            liar.protocol.storage.put(record)
    siege.store("during", 2, by=9)
    siege.store("renewed", "new", by=7)
    assert siege.honest_holders("during", owner=siege.honest[9]) >= 10
    assert siege.seen("before") == [1] * 10
    assert siege.seen("during") == [2] * 10
    assert siege.seen("renewed") == ["new"] * 10
    for near in (False, True):
        newcomer = siege.newcomer(near=near)
        assert siege.network.get(newcomer, KEY).items() >= {"before": 1, "during": 2, "renewed": "new"}.items()
        siege.network.store(newcomer, KEY, 3, ttl=3000.0, subkey="of a newcomer")
        assert siege.honest_holders("of a newcomer", owner=newcomer) >= 10
    if copying:
        siege.network.run(1300.0)
    assert siege.seen("during") == [2] * 10, "after two rounds of copying"


@pytest.mark.slow
def test_twelve_ranges_around_a_key_censor_nothing() -> None:
    """Ten were enough to have all of its k holders."""
    besiege(num_honest=100, num_ranges=12, copying=False)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_hundred_ranges_around_a_key_censor_nothing() -> None:
    besiege(num_honest=200, num_ranges=100, copying=True)


def test_no_region_is_searched_where_ids_are_chance() -> None:
    network = SimulatedNetwork(seed=4, latency=0.02, public_addresses=True)
    nodes = network.add_settled_swarm(400)
    for index in range(100):
        writer, reader = network.random.sample(nodes, 2)
        assert network.store(writer, f"key {index}", index, ttl=600.0) == 20
        assert network.get(reader, f"key {index}") == index
        assert network.get(reader, f"absent {index}") is None
    searched = sum(node.protocol.metrics.total("network_regions_searched") for node in nodes)
    assert searched <= 3, "of 300 lookups"


def test_the_first_nodes_sample_the_network_once_it_has_grown() -> None:
    network = SimulatedNetwork(seed=1, latency=0.02, public_addresses=True)
    nodes = network.add_swarm(60)
    network.run(60.0)
    assert all(node.protocol.density.was_sampled for node in nodes)
