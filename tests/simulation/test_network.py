"""Whole swarms in virtual time: they come together, stay together, and lose nothing."""

import random

import pytest

from tesseract_async.network.contacts import Address, Contact
from tesseract_async.network.events import ClockSkewed
from tesseract_async.network.protocol import NetworkProtocol
from tesseract_async.network.settings import NetworkSettings
from tesseract_async.testing import (
    FaultScript,
    Heal,
    Join,
    Kill,
    Leave,
    LyingProtocol,
    Partition,
    SetLoss,
    SimulatedNetwork,
    SimulatedNode,
    VirtualClock,
    log_normal_latency,
)
from tesseract_async.testing.simulation import Latency

QUICK = NetworkSettings(republish_period=30.0)


def together(nodes: list[SimulatedNode]) -> bool:
    """Return True if every node can reach every other by following contacts."""
    by_id = {node.protocol.own_id: node for node in nodes}
    reached = {nodes[0].protocol.own_id}
    border = [nodes[0]]
    while border:
        for contact in border.pop().protocol.table.contacts():
            if contact.peer_id in by_id and contact.peer_id not in reached:
                reached.add(contact.peer_id)
                border.append(by_id[contact.peer_id])
    return len(reached) == len(nodes)


def test_virtual_time_keeps_order_and_never_waits() -> None:
    clock = VirtualClock()
    seen: list[str] = []
    clock.call_at(2.0, seen.append, "second")
    clock.call_at(1.0, seen.append, "first")
    clock.call_at(2.0, seen.append, "third")
    assert clock.run_until(lambda: len(seen) == 3, timeout=10.0)
    assert seen == ["first", "second", "third"] and clock.now == 2.0
    assert not clock.run_until(lambda: False, timeout=1.0) and clock.now == 3.0


@pytest.mark.parametrize("seed", [1, 2])
def test_the_same_seed_gives_the_same_bytes(seed: int) -> None:
    traces = []
    for _ in range(2):
        network = SimulatedNetwork(
            seed=seed, latency=log_normal_latency(median_rtt=0.08, sigma=0.5), loss=0.1, duplication=0.05
        )
        nodes = network.add_swarm(8)
        network.store(nodes[1], "key", 1, ttl=600.0)
        network.run(20.0)
        traces.append(network.trace.hexdigest())
    assert traces[0] == traces[1]
    other = SimulatedNetwork(seed=seed + 100)
    other.add_swarm(8)
    assert other.trace.hexdigest() != traces[0]


def four_peers(seed: int) -> None:
    """Four peers on one machine, of which each knows one or two others, in any order of starting."""
    rng = random.Random(seed)
    network = SimulatedNetwork(seed=seed, latency=0.0005)
    addresses = [("127.0.0.1", 4000 + index) for index in range(4)]
    order = rng.sample(range(4), 4)
    for position, index in enumerate(order):
        # every one but the first was given seeds; they need not be running yet
        seeds = [addresses[other] for other in rng.sample(order[:position], min(position, rng.randint(1, 2)))]
        if position and rng.random() < 0.5:
            seeds.append(addresses[rng.choice([other for other in range(4) if other != index])])
        network.add_node(seeds, address=addresses[index])
        network.run(rng.choice([0.0, 0.0, 0.0005, 0.01, 1.0]))
    nodes = network.alive()
    assert network.clock.run_until(lambda: all(len(node.protocol.table) == 3 for node in nodes), timeout=60.0), seed
    writer, reader = rng.sample(nodes, 2)
    assert network.store(writer, "key", seed, ttl=60.0) == 4
    assert network.get(reader, "key") == seed


def test_four_peers_on_one_machine_never_split() -> None:
    for seed in range(60):
        four_peers(seed)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_four_peers_on_one_machine_never_split_in_a_thousand_orders() -> None:
    for seed in range(1000):
        four_peers(seed)


def test_two_halves_that_shared_no_contact_find_each_other_through_the_seeds() -> None:
    network = SimulatedNetwork(seed=3, settings=QUICK)
    seeds = [network.add_node(), network.add_node()]
    halves = [[seed, *(network.add_node([seed]) for _ in range(6))] for seed in seeds]
    network.run(5.0)
    everybody = [*halves[0], *halves[1]]
    assert not together(everybody)
    # one node is told of both: from then on nobody has to be restarted
    network.add_node(seeds)
    assert network.clock.run_until(lambda: together(network.alive()), timeout=60.0)
    network.store(halves[0][2], "key", 1, ttl=600.0)
    assert network.get(halves[1][3], "key") == 1


def test_a_partition_heals_by_itself() -> None:
    network = SimulatedNetwork(seed=4, settings=QUICK)
    nodes = [network.add_node()]
    nodes += [network.add_node([nodes[0]]) for _ in range(11)]
    network.run(5.0)
    FaultScript([(0.0, Partition(0.4)), (300.0, Heal())]).apply(network)
    network.run(299.0)
    assert any(len(node.protocol.table) < 11 for node in nodes)
    network.run(1.0)
    assert network.clock.run_until(lambda: all(len(node.protocol.table) == 11 for node in nodes), timeout=300.0)


def test_a_node_that_lost_everybody_comes_back_by_itself() -> None:
    network = SimulatedNetwork(seed=5, settings=QUICK)
    nodes = [network.add_node()]
    nodes += [network.add_node([nodes[0]]) for _ in range(5)]
    network.run(5.0)
    network.partition([nodes[3]])
    network.run(1000.0)
    assert len(nodes[3].protocol.table) == 0
    network.heal()
    assert network.clock.run_until(lambda: nodes[3].protocol.joined, timeout=60.0)


def test_loss_duplication_and_reordering_lose_no_record() -> None:
    network = SimulatedNetwork(
        seed=6, latency=log_normal_latency(median_rtt=0.08, sigma=0.5, jitter=1.0), loss=0.1, duplication=0.1
    )
    nodes = network.add_swarm(30)
    for index in range(20):
        assert network.store(nodes[index], f"key {index}", index, ttl=600.0) >= 15
    for index in range(20):
        assert network.get(nodes[29 - index], f"key {index}") == index


def test_records_outlive_a_third_of_the_nodes_and_their_copies_come_back() -> None:
    network = SimulatedNetwork(seed=7, settings=QUICK, latency=0.02)
    nodes = network.add_swarm(30, interval=0.1)
    for index in range(10):
        network.store(nodes[index], f"key {index}", index, ttl=3600.0)
    FaultScript([(1.0, Kill(0.3))]).apply(network)
    network.run(2.0)
    living = network.alive()
    assert [network.get(living[3], f"key {index}") for index in range(10)] == list(range(10))
    network.run(90.0)
    for index in range(10):
        key = living[0].sign(f"key {index}", 0, ttl=1.0).key
        assert sum(bool(node.protocol.storage.records(key)) for node in living) >= 18


@pytest.mark.parametrize("count, rounds", [(15, 8), pytest.param(60, 40, marks=pytest.mark.slow)])
def test_churn_loses_no_live_record(count: int, rounds: int) -> None:
    network = SimulatedNetwork(seed=8, settings=QUICK, latency=0.02)
    nodes = network.add_swarm(count, interval=0.1)
    writer = nodes[0]
    for index in range(10):
        network.store(writer, f"key {index}", index, ttl=36000.0)
    # twice a minute a tenth of all goes, with or without a word, and others come
    faults = [
        (30.0 * number, fault) for number in range(1, rounds) for fault in (Kill(0.1), Leave(0.1), Join(count // 5))
    ]
    FaultScript(faults).apply(network)
    network.run(rounds * 30.0)
    assert sum(node.alive for node in nodes) < count / 2
    reader = network.alive()[-1]
    assert [network.get(reader, f"key {index}") for index in range(10)] == list(range(10))


def test_withdrawn_and_replaced_entries_do_not_come_back() -> None:
    network = SimulatedNetwork(seed=9, settings=QUICK, latency=0.02)
    nodes = network.add_swarm(30)
    owner, other = nodes[3], nodes[4]
    network.store(owner, "key", 1, ttl=600.0, subkey="a")
    network.store(other, "key", 2, ttl=600.0, subkey="b")
    # three holders miss the withdrawal
    key = owner.sign("key", 0, ttl=1.0).key
    deaf = [node for node in nodes if node.protocol.storage.records(key) and node not in (owner, other)][:3]
    network.partition([node for node in nodes if node not in deaf], deaf)
    network.withdraw(owner, "key", ttl=630.0, subkey="a")
    network.heal()
    for node in network.alive():
        assert network.get(node, "key") == {"b": 2}
    network.run(90.0)
    for node in deaf:
        assert network.get(node, "key") == {"b": 2}


def test_clients_behind_gateways_are_served_and_listed_by_nobody() -> None:
    network = SimulatedNetwork(seed=10, settings=QUICK, latency=0.02)
    nodes = network.add_swarm(12)
    clients = [network.add_node([nodes[1]], public=False, gateway=True) for _ in range(6)]
    reachable = network.add_node([nodes[2]], public=False)
    network.run(60.0)
    assert reachable.protocol.role == "public"
    assert {node.protocol.role for node in clients} == {"client"}
    listed = {contact.peer_id for node in network.alive() for contact in node.protocol.table.contacts()}
    assert reachable.protocol.own_id in listed
    assert not listed & {node.protocol.own_id for node in clients}
    assert network.store(clients[0], "key", 1, ttl=600.0) >= 12
    assert network.get(clients[1], "key") == 1
    assert not any(node.protocol.storage.num_entries for node in clients)


@pytest.mark.parametrize("public_addresses", [False, True])
def test_behind_one_declared_node_all_others_find_out_what_they_are(public_addresses: bool) -> None:
    """The first node of a swarm is the only one that says so itself: clients dial for it until there are others."""
    network = SimulatedNetwork(seed=21, latency=0.02, public_addresses=public_addresses)
    first = network.add_node()
    dialable = [network.add_node([first], public=False) for _ in range(5)]
    hidden = [network.add_node([first], public=False, gateway=True) for _ in range(3)]
    network.run(60.0)
    assert {node.protocol.role for node in dialable} == {"public"}
    assert {node.protocol.role for node in hidden} == {"client"}
    assert network.store(hidden[0], "key", 1, ttl=600.0) == 6


@pytest.mark.parametrize("public_addresses, seed", [(False, 1), (True, 1), (True, 2)])
def test_nodes_that_start_together_know_each_other_after_seconds(public_addresses: bool, seed: int) -> None:
    latency = log_normal_latency(median_rtt=0.08, sigma=0.5)
    network = SimulatedNetwork(seed=seed, latency=latency, public_addresses=public_addresses)
    first = network.add_node()
    nodes = [network.add_node([first]) for _ in range(15)]
    network.run(5.0)
    assert min(len(node.protocol.table) for node in nodes) == 15
    network.run(55.0)
    before = network.num_datagrams
    network.run(600.0)
    # in the long run seeds alone are asked, at most every 5 minutes, and everybody's copies compared
    assert network.num_datagrams - before <= 15 * 12


@pytest.mark.parametrize("latency", [0.02, log_normal_latency(median_rtt=0.08, sigma=0.5)])
def test_a_newcomer_lists_many_although_its_seed_has_no_place_for_it(latency: float | Latency) -> None:
    network = SimulatedNetwork(seed=3, latency=latency, loss=0.01, public_addresses=True)
    swarm = network.add_settled_swarm(100)
    for _ in range(3):
        newcomer = network.add_node([network.random.choice(swarm)])
        network.run(10.0)
        assert len(newcomer.protocol.table) >= 40
        assert not newcomer.protocol.metrics.total("network_contacts_dropped")


def test_a_node_that_is_cut_off_while_it_would_look_again_comes_back_as_soon() -> None:
    network = SimulatedNetwork(seed=4, latency=0.02)
    first = network.add_node()
    node = network.add_node([first])
    assert network.clock.run_until(lambda: node.protocol.joined, timeout=5.0)
    network.partition([node])
    node.protocol.lost(node.protocol.table.contacts()[0], network.clock.now)
    network.run(20.0)
    assert not node.protocol.joined
    network.heal()
    assert network.clock.run_until(lambda: node.protocol.joined, timeout=40.0)


def test_a_read_on_a_quick_network_asks_hardly_more_than_it_needs() -> None:
    counts = {}
    for latency in (0.0005, 0.04):
        network = SimulatedNetwork(seed=5, latency=latency)
        nodes = network.add_settled_swarm(300)
        for index in range(20):
            network.store(nodes[index], f"key {index}", index, ttl=600.0)
        network.run(5.0)
        before = network.num_datagrams
        for index in range(20):
            assert network.get(nodes[-index - 1], f"key {index}") == index
        counts[latency] = (network.num_datagrams - before) / 2 / 20
    # a hop or two on each of some paths, and three holders; who waits for distant answers asks twice as many at a time
    assert counts[0.0005] < 8 < counts[0.04] < 16


def test_clocks_half_a_minute_apart_do_no_harm() -> None:
    network = SimulatedNetwork(seed=11, latency=0.02)
    nodes = [network.add_node(clock_skew=-14.0)]
    nodes += [network.add_node([nodes[0]], clock_skew=14.0 if index % 2 else -14.0) for index in range(9)]
    network.run(5.0)
    for index, node in enumerate(nodes):
        assert network.store(node, f"key {index}", index, ttl=40.0) == 10
    for index in range(10):
        assert network.get(nodes[9 - index], f"key {index}") == index
    network.run(15.0)
    assert all("network_clock_skew_seconds" in node.protocol.metrics.snapshot() for node in nodes)
    assert not any(isinstance(event, ClockSkewed) for node in nodes for event in node.events), "nobody is bothered"


def test_over_ipv6_nothing_is_lost_and_no_datagram_is_longer() -> None:
    lengths: list[int] = []

    class Measured(SimulatedNetwork):
        def transmit(self, data: bytes, source: Address, target: Address) -> None:
            assert ":" in source[0] and ":" in target[0]
            lengths.append(len(data))
            super().transmit(data, source, target)

    network = Measured(seed=16, latency=0.02)
    # each in a network of its own, as limits count them
    nodes = [network.add_node(address=("2400:1::1", 4000))]
    nodes += [network.add_node([nodes[0]], address=(f"2400:{number:x}::1", 4000)) for number in range(2, 28)]
    network.run(10.0)
    for number, node in enumerate(nodes):
        value = bytes(100 + 25 * number)
        assert network.store(node, "key", value, ttl=600.0, subkey="s" * 100 + str(number)) >= 19
    assert len(network.get(nodes[5], "key")) == 27
    assert 1100 < max(lengths) <= 1200, "full, and no longer"


@pytest.mark.parametrize("latency", [0.02, 0.0005])
def test_liars_do_not_hide_records(latency: float) -> None:
    """Nor where round trips are short, so that a read asks one node of each path at a time."""
    network = SimulatedNetwork(seed=12, latency=latency, public_addresses=True)

    class Conspiracy(LyingProtocol):
        accomplices: list[Contact] = []

    def protocol_of(index: int) -> type[NetworkProtocol]:
        return Conspiracy if index % 5 == 0 else NetworkProtocol

    nodes = network.add_settled_swarm(150, protocol_of=protocol_of)
    Conspiracy.accomplices += [Contact(node.protocol.own_id, node.address) for node in nodes[::5]]
    honest = [node for index, node in enumerate(nodes) if index % 5]
    rng = network.random
    for index in range(50):
        network.store(rng.choice(honest), f"key {index}", index, ttl=600.0)
    found = sum(network.get(rng.choice(honest), f"key {index}") == index for index in range(50))
    assert found == 50


def test_an_attacker_s_ids_around_a_key_from_one_range_do_not_hide_it() -> None:
    network = SimulatedNetwork(seed=13, latency=0.02, public_addresses=True)
    nodes = network.add_settled_swarm(100)
    key = nodes[0].sign("key", 0, ttl=1.0).key
    # 40 ids nearer to the key than anybody's, all in one /24, as grinding would give them
    fakes = []
    for index in range(40):
        contact = Contact(key[:31] + bytes([index]), ("90.0.0.7", 5000 + index))
        contact.proven = True
        fakes.append(contact)
    for node in nodes:
        for fake in fakes:
            node.protocol.table.add(fake, 0.0)
        assert sum(fake.peer_id in node.protocol.table for fake in fakes) <= 2
    network.store(nodes[5], "key", 1, ttl=600.0)
    assert network.get(nodes[77], "key") == 1


def test_a_settled_swarm_is_what_joining_leads_to() -> None:
    network = SimulatedNetwork(seed=14)
    nodes = network.add_settled_swarm(200)
    for node in network.random.sample(nodes, 10):
        table = node.protocol.table
        near = sorted((item.protocol.table.own_number for item in nodes), key=lambda n: n ^ table.own_number)[1:21]
        assert {contact.number for contact in table.closest(table.own_number, 20)} == set(near)


def test_heavy_loss_is_survived() -> None:
    network = SimulatedNetwork(seed=15, latency=0.02)
    nodes = network.add_swarm(20)
    network.store(nodes[0], "key", 1, ttl=600.0)
    FaultScript([(0.0, SetLoss(0.3))]).apply(network)
    network.run(0.1)
    assert sum(network.get(node, "key") == 1 for node in nodes) >= 19
