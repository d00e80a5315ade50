"""Seeded garbage against a working machine: every input is dropped and counted, and the machine goes on."""

import random
from collections.abc import Iterator

import msgpack
import pytest

from tesseract_async.identity import SignedRecord
from tesseract_async.network import datagrams as wire
from tesseract_async.network.contacts import Address
from tesseract_async.testing import SimulatedNetwork, SimulatedNode

HEAD = 44


def genuine(network: SimulatedNetwork, nodes: list[SimulatedNode]) -> list[bytes]:
    """Datagrams of every kind, as they were really sent."""
    caught: list[bytes] = []
    transmit = network.transmit

    def tap(data: bytes, source: Address, target: Address) -> None:
        caught.append(data)
        transmit(data, source, target)

    network.transmit = tap  # type: ignore[method-assign]
    for index in range(40):
        network.store(nodes[1], "key", bytes(60), ttl=600.0, subkey=str(index))
    network.get(nodes[2], "key")
    network.get(network.add_node([nodes[0]]), "nothing")
    client = network.add_node([nodes[0]], public=False, gateway=True)
    network.run(10.0)
    network.get(client, "key")
    network.leave(client)
    network.run(10.0)
    network.transmit = transmit  # type: ignore[method-assign]
    kinds = {data[2] & 0x7F for data in caught}
    assert kinds >= {wire.PING, wire.FIND, wire.GET, wire.PAGE, wire.STORE, wire.LEAVE, wire.DIAL}
    return caught


def value(rng: random.Random, depth: int = 0) -> object:
    kind = rng.randrange(9 if depth < 4 else 6)
    if kind == 0:
        return rng.randbytes(rng.choice([0, 1, 8, 16, 32, 38, 50, 96, 113, 200]))
    if kind == 1:
        return rng.choice([0, 1, -1, 2**31, 2**63, 2**64 - 1, -(2**63)])
    if kind == 2:
        return rng.choice([None, True, False])
    if kind == 3:
        return rng.choice([0.0, float("nan"), float("inf"), -1.5])
    if kind == 4:
        return "x" * rng.randrange(40)
    if kind == 5:
        return msgpack.ExtType(rng.randrange(128), rng.randbytes(3))
    if kind == 6:
        return {str(index): value(rng, depth + 1) for index in range(rng.randrange(3))}
    return [value(rng, depth + 1) for _ in range(rng.randrange(5))]


def inputs(rng: random.Random, corpus: list[bytes], count: int) -> Iterator[bytes]:
    for _ in range(count):
        data = bytearray(rng.choice(corpus))
        how = rng.randrange(8)
        if how == 0:
            yield rng.randbytes(rng.randrange(1400))
        elif how == 1:
            yield bytes(data[: rng.randrange(len(data))])
        elif how == 2:
            for _ in range(rng.randint(1, 8)):
                data[rng.randrange(len(data))] = rng.randrange(256)
            yield bytes(data)
        elif how == 3:
            yield bytes(data) + rng.randbytes(rng.randrange(1, 300))
        elif how == 4:
            body = msgpack.packb([value(rng) for _ in range(rng.randrange(9))])
            yield bytes(data[:HEAD]) + body[: 1200 - HEAD]
        elif how == 5:
            other = rng.choice(corpus)
            yield bytes(data[:HEAD]) + other[HEAD:]
        elif how == 6:
            # a request without a token, and without the padding that pays for a reply
            yield bytes(data[:HEAD]) + msgpack.packb([b"", b"", *(value(rng) for _ in range(rng.randrange(4)))])[:300]
        else:
            # announces far more than there is
            yield bytes(data[:HEAD]) + rng.choice([b"\xdd\xff\xff\xff\xff", b"\xdf\x7f\xff\xff\xff", b"\x91" * 600])


def bombard(seed: int, count: int) -> None:
    network = SimulatedNetwork(seed=seed)
    nodes = network.add_swarm(6)
    corpus = genuine(network, nodes)
    rng = random.Random(seed)
    victim = nodes[3].protocol
    before = {item.body for item in victim.storage}
    sources = [node.address for node in nodes] + [(f"9.8.{index}.7", 1000 + index) for index in range(40)]
    for number, data in enumerate(inputs(rng, corpus, count)):
        if number % 50 == 0:
            # while it has questions of its own in progress
            victim.read(rng.randbytes(32), network.clock.now)
            network.clock.now += 0.5
            victim.handle_timer(network.clock.now)
        victim.receive_datagram(data, rng.choice(sources), network.clock.now)
        for sent, _ in victim.datagrams_to_send():
            assert len(sent) <= 1200
        victim.events()
    assert victim.metrics.total("network_datagrams_dropped") > count / 2
    assert len(victim.known) <= 2048 and len(victim.pings.in_progress) <= 64
    # nothing got in that its owner had not signed
    for record in victim.storage:
        assert record.body in before or SignedRecord.decode(record.key, record.body, verify=network.verify)
    reasons = {dict(labels)["reason"] for (name, labels) in victim.metrics.counters if name.endswith("_dropped")}
    assert reasons >= {"malformed", "unasked", "unpadded", "token"}, reasons


@pytest.mark.parametrize("seed", [1, 2])
def test_garbage_is_dropped_and_counted(seed: int) -> None:
    bombard(seed, 4_000)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_million_inputs() -> None:
    for seed in range(20):
        bombard(seed, 50_000)
