"""Manifests stay in the network while their server does, and leave with it."""

import asyncio

import pytest

from tesseract_async.errors import ConnectionLost
from tesseract_async.experts.manifest import decode_manifest, grid_key, shard_key
from tesseract_async.experts.publisher import ExpertPublisher, PublisherSettings
from tests.client.virtual_time import in_made_up_time
from tests.experts.fake_network import FakeNetwork, FakeSwarm, peer

UIDS = {"ffn.3.7": True, "ffn.3.8": False, "attention.1": True}


def publisher(swarm: FakeSwarm, network: FakeNetwork | None = None) -> ExpertPublisher:
    network = network or FakeNetwork(swarm, peer(1))
    return ExpertPublisher(network, addresses=["127.0.0.1:4000"], clock=swarm.clock)


async def test_a_manifest_lies_under_its_grid_and_under_every_uids_shard() -> None:
    swarm = FakeSwarm()
    subject = publisher(swarm)
    assert await subject.declare(UIDS) == 3
    keys = {key for key, _, _ in swarm.entries}
    assert keys == {grid_key("ffn"), grid_key("attention"), *map(shard_key, UIDS)}
    for key, subkey, owner in swarm.entries:
        manifest = decode_manifest(swarm.entries[(key, subkey, owner)].value)
        assert manifest.coords.tolist() == ([[1]] if "attention" in key else [[3, 7], [3, 8]])
        assert manifest.primary.tolist() == ([True] if "attention" in key else [True, False])
    await subject.aclose()
    assert not swarm.entries


async def test_declaring_again_replaces_what_was_declared() -> None:
    swarm = FakeSwarm()
    subject = publisher(swarm)
    await subject.declare({f"ffn.{x}.{y}": True for x in range(40) for y in range(40)})
    assert {subkey for _, subkey, _ in swarm.entries} == {"0", "1", "2", "3"}
    await subject.declare({"ffn.1.1": True})
    assert swarm.entries.keys() == {(grid_key("ffn"), "0", peer(1)), (shard_key("ffn.1.1"), "0", peer(1))}
    assert subject.uids == {"ffn.1.1": True}
    await subject.declare({})
    assert not swarm.entries
    await subject.aclose()


async def test_several_servers_on_one_node_stand_side_by_side() -> None:
    swarm = FakeSwarm()
    network = FakeNetwork(swarm, peer(1))
    places: set[int] = set()
    first, second = (
        ExpertPublisher(network, addresses=["127.0.0.1:4000"], places=places, clock=swarm.clock) for _ in range(2)
    )
    await first.declare({"ffn.1": True})
    await second.declare({"ffn.2": True})

    def known() -> set[int]:
        entries = [entry for (key, _, _), entry in swarm.entries.items() if key == grid_key("ffn")]
        return {coords for entry in entries for coords in decode_manifest(entry.value).coords[:, 0].tolist()}

    assert known() == {1, 2}
    await first.aclose()
    await first.aclose()
    assert known() == {2}
    third = ExpertPublisher(network, addresses=["127.0.0.1:4000"], places=places, clock=swarm.clock)
    await third.declare({"ffn.3": True})
    assert known() == {2, 3}, "in the place that became free"
    await second.aclose()
    await third.aclose()
    assert not swarm.entries


@in_made_up_time
async def test_declare_looks_for_more_holders_until_there_are_enough() -> None:
    swarm = FakeSwarm()
    network = FakeNetwork(swarm, peer(1))
    subject = publisher(swarm, network)
    network.holders = [1, 2, 2, 3]
    assert await subject.declare({"ffn.1": True}) == 3
    assert swarm.stores[grid_key("ffn")] == 3
    await subject.aclose()


async def test_a_lonely_node_is_satisfied_with_itself() -> None:
    swarm = FakeSwarm()
    network = FakeNetwork(swarm, peer(1))
    subject = publisher(swarm, network)
    network.num_contacts, network.holders = 0, [1]
    assert await subject.declare({"ffn.1": True}) == 1
    await subject.aclose()


@in_made_up_time
async def test_declare_ends_with_what_was_achieved_and_goes_on_in_the_background() -> None:
    swarm = FakeSwarm()
    network = FakeNetwork(swarm, peer(1))
    subject = publisher(swarm, network)
    network.failure = ConnectionLost("peer", "gone")
    assert await subject.declare({"ffn.1": True}) == 0
    assert subject.metrics.total("manifest_stores_failed") > 0
    network.failure = None
    await swarm.until(lambda: bool(swarm.entries))
    await subject.aclose()
    assert not swarm.entries


@in_made_up_time
async def test_manifests_are_renewed_before_they_expire() -> None:
    swarm = FakeSwarm()
    subject = publisher(swarm)
    await subject.declare({"ffn.1": True})
    at = (grid_key("ffn"), "0", peer(1))
    for _ in range(3):
        before = decode_manifest(swarm.entries[at].value).sequence
        swarm.clock.now += 15.0
        await swarm.until(lambda before=before: decode_manifest(swarm.entries[at].value).sequence > before)  # type: ignore[misc]
    await subject.aclose()


async def test_a_server_that_lost_its_memory_goes_on_upwards() -> None:
    swarm = FakeSwarm()
    first = publisher(swarm)
    await first.declare({"ffn.1": True})
    at = (grid_key("ffn"), "0", peer(1))
    before = decode_manifest(swarm.entries[at].value).sequence
    swarm.clock.now += 1
    second = publisher(swarm)
    await second.declare({"ffn.1": True})
    assert decode_manifest(swarm.entries[at].value).sequence > before
    await second.aclose()
    await first.aclose()


@in_made_up_time
async def test_cancelling_declare_leaves_nothing_after_closing() -> None:
    swarm = FakeSwarm()
    network = FakeNetwork(swarm, peer(1))
    subject = publisher(swarm, network)
    network.holders = [0]
    declaring = asyncio.create_task(subject.declare({"ffn.1": True}))
    await swarm.until(lambda: swarm.stores[grid_key("ffn")] > 1)
    declaring.cancel()
    with pytest.raises(asyncio.CancelledError):
        await declaring
    await subject.aclose()
    assert (grid_key("ffn"), "0") in network.withdrawn


async def test_a_server_may_move() -> None:
    swarm = FakeSwarm()
    subject = publisher(swarm)
    assert await subject.update_addresses(["127.0.0.1:4001"]) == 0, "nothing is declared yet"
    await subject.declare({"ffn.1": True})
    at = (grid_key("ffn"), "0", peer(1))
    assert decode_manifest(swarm.entries[at].value).addresses == ("127.0.0.1:4001",)
    node = f"10.0.0.1:1/{peer(2)}"
    assert await subject.update_addresses([], [node]) == 3
    assert decode_manifest(swarm.entries[at].value).rendezvous == (node,)
    with pytest.raises(ValueError):
        await subject.update_addresses([])
    await subject.declare({"ffn.2": True})
    assert decode_manifest(swarm.entries[at].value).rendezvous == (node,)
    await subject.aclose()


async def test_nothing_is_sent_for_a_malformed_uid_or_after_closing() -> None:
    swarm = FakeSwarm()
    subject = publisher(swarm)
    with pytest.raises(ValueError, match="ffn"):
        await subject.declare({"ffn": True})
    await subject.aclose()
    await subject.aclose()
    with pytest.raises(RuntimeError, match="closed"):
        await subject.declare({"ffn.1": True})
    assert not swarm.stores


async def test_a_farewell_that_fails_is_only_logged() -> None:
    swarm = FakeSwarm()
    network = FakeNetwork(swarm, peer(1))
    subject = publisher(swarm, network)
    await subject.declare({"ffn.1": True})
    network.failure = ConnectionLost("peer", "gone")
    await subject.aclose()


def test_a_manifest_is_renewed_while_it_holds() -> None:
    for ttl in (1.0, 45.0):
        settings = PublisherSettings(ttl=ttl)
        assert 2 * settings.refresh_period + settings.retry_period < ttl
    with pytest.raises(ValueError, match="ttl"):
        PublisherSettings(ttl=0.0)
