"""Copies of single values on the way to their holders: few, short-lived, never of what may be stale."""

import random
from typing import Any

import pytest

from tesseract_async.identity import Identity, SignedRecord
from tesseract_async.metrics import Metrics
from tesseract_async.network import datagrams as wire
from tesseract_async.network.contacts import Contact
from tesseract_async.network.events import ReadFinished
from tesseract_async.network.holding import COPY_SECONDS, MAX_COPIES, RecordCheck
from tesseract_async.network.protocol import NetworkProtocol
from tesseract_async.network.settings import NetworkSettings
from tesseract_async.network.storage import StoreOutcome
from tesseract_async.testing import SimulatedNetwork, SimulatedNode

WALL = 1_700_000_000.0
ASKER = ("10.0.0.9", 4000)
OWNER = Identity.from_seed(bytes(32))
KEY = bytes(32)


def record(
    *, sequence: int = 1, ttl: float = 600.0, key: bytes = KEY, value: bytes = b"\x01", **more: Any
) -> SignedRecord:
    return SignedRecord.sign(OWNER, key, sequence=sequence, expiration=WALL + ttl, value=value, **more)


def contact(number: int) -> Contact:
    return Contact(number.to_bytes(32, "big"), ("10.0.0.1", 4000))


def far_node(*checks: RecordCheck) -> NetworkProtocol:
    """A node that knows 20 others nearer to the key than itself."""
    node = NetworkProtocol(
        identity=Identity.from_seed(bytes([1] * 32)),
        settings=NetworkSettings(),
        random=random.Random(1),
        metrics=Metrics(),
        now=0.0,
        wall_offset=WALL,
        public=True,
        checks=checks,
    )
    for index in range(20):
        near = contact((node.core.table.own_number >> 1) + index)
        near.proven = True
        node.core.table.add(near, 0.0)
    return node


def send(node: NetworkProtocol, kind: int, *arguments: Any, token: bytes = b"") -> list[wire.Datagram]:
    data = wire.encode_request(
        kind, wire.FLAG_CLIENT, bytes(8), bytes([7] * 32), token=token, challenge=b"", arguments=arguments
    )
    node.receive_datagram(data, ASKER, 0.0)
    return [wire.decode(data) for data, _ in node.datagrams_to_send()]


def test_a_copy_is_served_as_such_and_only_what_may_be_copied_is_kept() -> None:
    node = far_node()
    token = wire.read_reply(send(node, wire.PING)[0]).token
    forged = bytearray(record().body)
    forged[0] ^= 1
    for body, what in (
        (record(subkey="a").body, "an entry of a dictionary"),
        (record(tombstone=True).body, "a withdrawal"),
        (record(ttl=-1.0).body, "an expired one"),
        (bytes(forged), "a forged one"),
    ):
        send(node, wire.COPY, KEY + body, token=token)
        assert len(node.holder.copies) == 0, what
    send(node, wire.COPY, KEY + record().body)
    assert len(node.holder.copies) == 0, "without a token"
    send(node, wire.COPY, KEY + record().body, token=token)
    assert len(node.holder.copies) == 1 and node.core.storage.num_entries == 0
    (answer,) = send(node, wire.GET, KEY, token=token)
    results = wire.read_reply(answer).results
    assert wire.read_value(results)[1] == [record().body] and wire.is_copy(results)
    send(node, wire.COPY, KEY + record(sequence=0).body, token=token)
    assert node.holder.copies[KEY][1] == record(), "an older one"
    node.holder.expire_copies(WALL + COPY_SECONDS - 1.0)
    assert len(node.holder.copies) == 1
    node.holder.expire_copies(WALL + COPY_SECONDS)
    assert len(node.holder.copies) == 0
    for index in range(2 * MAX_COPIES):
        node.holder.copies[index.to_bytes(32, "big")] = (WALL, record())
    assert len(node.holder.copies) == MAX_COPIES
    send(node, wire.STORE, [KEY + record(sequence=2).body], token=token)
    assert KEY not in node.holder.copies, "a holder keeps no copy"
    (answer,) = send(node, wire.GET, KEY, token=token)
    results = wire.read_reply(answer).results
    assert wire.read_value(results)[1] == [record(sequence=2).body] and not wire.is_copy(results)


def test_a_check_that_the_node_was_given_stands_before_copies_and_records_alike() -> None:
    node = far_node(lambda record: record.value != b"odd", lambda record: True)
    token = wire.read_reply(send(node, wire.PING)[0]).token
    odd = record(value=b"odd")
    send(node, wire.COPY, KEY + odd.body, token=token)
    (answer,) = send(node, wire.STORE, [KEY + odd.body, KEY + record(subkey="a").body], token=token)
    assert wire.read_outcomes(wire.read_reply(answer).results, 2) == [StoreOutcome.INVALID, StoreOutcome.STORED]
    assert len(node.holder.copies) == 0 and node.core.storage.num_entries == 1
    assert node.core.metrics.snapshot()["network_datagrams_dropped{reason=invalid_record}"] == 2


@pytest.fixture(scope="module")
def swarm() -> tuple[SimulatedNetwork, list[SimulatedNode]]:
    network = SimulatedNetwork(seed=31, latency=0.02)
    return network, network.add_settled_swarm(400)


def read(network: SimulatedNetwork, node: SimulatedNode, key: str) -> ReadFinished:
    finished: list[ReadFinished] = []
    node.read(key, finished.append)
    assert network.clock.run_until(lambda: bool(finished), timeout=60.0)
    return finished[0]


def copies(nodes: list[SimulatedNode]) -> int:
    return sum(len(node.protocol.holder.copies) for node in nodes)


def served(nodes: list[SimulatedNode]) -> float:
    return sum(node.protocol.core.metrics.total("network_copies_served") for node in nodes)


def test_what_many_read_is_answered_on_the_way_and_a_replaced_value_never(
    swarm: tuple[SimulatedNetwork, list[SimulatedNode]],
) -> None:
    network, nodes = swarm
    network.store(nodes[3], "hot", 1, ttl=600.0)
    readers = network.random.sample(nodes, 40)
    for node in readers:
        assert network.get(node, "hot") == 1
    assert copies(nodes) >= 3 and served(nodes) >= 3
    network.store(nodes[3], "hot", 2, ttl=600.0)
    for node in readers:
        assert network.get(node, "hot") == 2, "a copy that was left behind is not believed"
    network.run(31.0)
    assert read(network, readers[0], "hot").num_holders >= 3
    network.run(45.0)
    assert not copies(nodes)


def test_dictionaries_are_never_copied(swarm: tuple[SimulatedNetwork, list[SimulatedNode]]) -> None:
    network, nodes = swarm
    network.run(60.0)
    network.store(nodes[5], "dictionary", 1, ttl=600.0, subkey="a")
    before = copies(nodes)
    for node in network.random.sample(nodes, 10):
        assert network.get(node, "dictionary") == {"a": 1}
    assert copies(nodes) <= before


def test_a_node_with_a_copy_still_gets_the_record_once_it_is_a_holder(
    swarm: tuple[SimulatedNetwork, list[SimulatedNode]],
) -> None:
    network, nodes = swarm
    network.store(nodes[7], "moving", 1, ttl=3600.0)
    key = nodes[7].sign("moving", 1, ttl=1.0).key
    number = int.from_bytes(key, "big")
    in_order = sorted(nodes, key=lambda node: node.protocol.core.table.own_number ^ number)
    # the 21st holds a copy; then a holder vanishes, and it belongs among the k nearest
    heir = next(node for node in in_order if not node.protocol.core.storage.records(key))
    kept = in_order[0].protocol.core.storage.records(key)[0]
    heir.protocol.holder.copies[key] = (heir.protocol.core.wall(network.clock.now) + 3000.0, kept)
    network.kill(in_order[5:8])
    network.run(2 * network.settings.republish_period)
    assert heir.protocol.core.storage.records(key) == [kept]
