"""Runs found by name, and kept known, over a network in memory."""

from __future__ import annotations

import dataclasses

import pytest

from tesseract_async.errors import ConnectionLost
from tesseract_async.experts.run import RunManifest, SignedRun, run_key, sign_run, split_run
from tesseract_async.experts.run_directory import (
    RunKeeper,
    RunNotFound,
    RunSettings,
    find_run,
    find_runs,
    publish_run,
)
from tesseract_async.identity import Identity
from tests.experts.fake_network import FakeNetwork, FakeSwarm, peer

ALICE = Identity.from_seed(bytes(32))
BOB = Identity.from_seed(b"b" * 32)


def a_run(signer: Identity = ALICE, created: int = 1, name: str = "digits") -> SignedRun:
    sizes = {f"size_{n}": "x" * 100 for n in range(20)}  # long enough for several parts
    return sign_run(signer, RunManifest(name, "ffn", (4,), "ffn", sizes=sizes, created=created))


async def test_a_run_is_found_by_its_name() -> None:
    swarm = FakeSwarm()
    run = a_run()
    assert await publish_run(FakeNetwork(swarm, ALICE.peer_id), run) == 3
    network = FakeNetwork(swarm, peer(1))
    assert await find_run(network, "digits", clock=swarm.clock) == run
    assert await find_run(network, f"digits@{ALICE.peer_id}", clock=swarm.clock) == run
    with pytest.raises(RunNotFound, match="right swarm"):
        await find_run(network, "letters", clock=swarm.clock)
    with pytest.raises(RunNotFound, match=f"signed by {BOB.peer_id}"):
        await find_run(network, f"digits@{BOB.peer_id}", clock=swarm.clock)
    swarm.clock.now += 3601
    with pytest.raises(RunNotFound):
        await find_run(network, "digits", clock=swarm.clock)


async def test_a_bare_name_that_two_signers_use_is_refused_with_both() -> None:
    swarm = FakeSwarm()
    network = FakeNetwork(swarm, peer(1))
    await publish_run(network, a_run(ALICE))
    await publish_run(network, a_run(BOB))  # one node may keep both
    with pytest.raises(RunNotFound) as caught:
        await find_run(network, "digits", clock=swarm.clock)
    assert f"digits@{ALICE.peer_id}" in str(caught.value) and f"digits@{BOB.peer_id}" in str(caught.value)
    assert (await find_run(network, f"digits@{BOB.peer_id}", clock=swarm.clock)).signer == BOB.peer_id


async def test_strangers_can_neither_spoil_nor_forge() -> None:
    swarm = FakeSwarm()
    run = a_run()
    await publish_run(FakeNetwork(swarm, ALICE.peer_id), run)
    stranger = FakeNetwork(swarm, peer(66))
    parts = split_run(run.blob)
    await stranger.store(run_key("digits"), parts[0][:-1] + b"?", ttl=60.0, subkey="0")
    await stranger.store(run_key("digits"), b"", ttl=60.0, subkey="1")
    forged = run.blob[:-1] + bytes([run.blob[-1] ^ 1])
    for number, part in enumerate(split_run(forged)):
        await stranger.store(run_key("digits"), part, ttl=60.0, subkey=f"forged{number}")
    found = await find_runs(FakeNetwork(swarm, peer(1)), "digits", clock=swarm.clock)
    assert found == {ALICE.peer_id: (run, {ALICE.peer_id})}


async def test_a_later_manifest_of_the_same_signer_holds() -> None:
    swarm = FakeSwarm()
    await publish_run(FakeNetwork(swarm, peer(1)), a_run(created=1))
    await publish_run(FakeNetwork(swarm, peer(2)), a_run(created=2))
    assert (await find_run(FakeNetwork(swarm, peer(3)), "digits", clock=swarm.clock)).manifest.created == 2


async def test_servers_keep_the_run_known_without_its_signer_and_no_more_copies_than_needed() -> None:
    swarm = FakeSwarm()
    run = a_run()
    keepers = [
        RunKeeper(FakeNetwork(swarm, peer(n)), run, settings=RunSettings(num_copies=2), clock=swarm.clock)
        for n in range(4)
    ]
    assert [await keeper.keep_once() for keeper in keepers] == [True, True, False, False]
    assert [keeper.num_copies for keeper in keepers] == [1, 2, 2, 2]
    swarm.clock.now += 1800
    # both renew theirs; a keeper always renews while its own copy is needed
    assert [await keeper.keep_once() for keeper in keepers] == [True, True, False, False]
    swarm.clock.now += 3601
    assert await keepers[3].keep_once()


async def test_an_older_copy_does_not_count_and_a_newer_one_is_not_overwritten() -> None:
    swarm = FakeSwarm()
    await publish_run(FakeNetwork(swarm, peer(9)), a_run(created=1))
    new = RunKeeper(
        FakeNetwork(swarm, peer(1)), a_run(created=2), settings=RunSettings(num_copies=1), clock=swarm.clock
    )
    assert await new.keep_once()
    old = RunKeeper(
        FakeNetwork(swarm, peer(9)), a_run(created=1), settings=RunSettings(num_copies=9), clock=swarm.clock
    )
    assert not await old.keep_once()


async def test_the_keeper_survives_a_network_that_fails() -> None:
    swarm = FakeSwarm()
    network = FakeNetwork(swarm, peer(1))
    network.failure = ConnectionLost("nobody", "for the test")
    keeper = RunKeeper(network, a_run(), settings=RunSettings(retry_period=0.01), clock=swarm.clock)
    keeper.start()
    await swarm.until(lambda: swarm.reads[run_key("digits")] >= 2)
    network.failure = None
    await swarm.until(lambda: keeper.num_copies == 1 or bool(swarm.entries))
    await keeper.aclose()
    await keeper.aclose()
    assert dataclasses.is_dataclass(await find_run(network, "digits", clock=swarm.clock))
