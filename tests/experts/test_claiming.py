"""Newcomers that arrive together, over a network in memory."""

import asyncio
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tesseract_async.errors import ProtocolError
from tesseract_async.experts.claiming import (
    claim_experts,
    claims_key,
    decode_reservation,
    encode_reservation,
)
from tesseract_async.experts.manifest import encode_manifest, grid_key
from tesseract_async.experts.pattern import ExpertPattern
from tests.client.virtual_time import in_made_up_time
from tests.experts.fake_network import FakeEntry, FakeNetwork, FakeSwarm, peer


async def host(swarm: FakeSwarm, number: int, experts: dict[tuple[int, ...], bool]) -> None:
    network = FakeNetwork(swarm, peer(number))
    for index, (part, _) in enumerate(encode_manifest(["10.0.0.1:4000"], experts, prefix="ffn", sequence=1)):
        await network.store(grid_key("ffn"), part, ttl=30.0, subkey=str(index))


@in_made_up_time
async def test_a_newcomer_takes_free_experts_and_says_so() -> None:
    swarm = FakeSwarm()
    await host(swarm, 1, {(0, 0): True, (0, 1): True})
    network = FakeNetwork(swarm, peer(2))
    pattern = ExpertPattern.parse("ffn.0.[0:4]")
    claim = await claim_experts(network, pattern, 2, random=Random(0), clock=swarm.clock)
    assert claim.uids == {"ffn.0.2": True, "ffn.0.3": True}
    (entry,) = await network.get_entries(claims_key("ffn"))
    assert sorted(decode_reservation(entry.value)) == [(0, 2), (0, 3)]
    await claim.release()
    assert await network.get_entries(claims_key("ffn")) == []


@in_made_up_time
async def test_beyond_the_free_ones_it_follows_the_least_replicated() -> None:
    swarm = FakeSwarm()
    await host(swarm, 1, {(0, 0): True, (0, 1): True})
    await host(swarm, 2, {(0, 0): False})
    network = FakeNetwork(swarm, peer(3))
    claim = await claim_experts(network, ExpertPattern.parse("ffn.0.[0:3]"), 2, random=Random(0), clock=swarm.clock)
    assert claim.uids == {"ffn.0.1": False, "ffn.0.2": True}


@in_made_up_time
async def test_what_expired_what_is_its_own_and_garbage_do_not_count() -> None:
    swarm = FakeSwarm()
    await host(swarm, 1, {(0,): True})
    swarm.clock.now += 31.0
    await host(swarm, 5, {(1,): True})  # this node's own, from before a restart
    stranger = FakeNetwork(swarm, peer(9))
    await stranger.store(grid_key("ffn"), b"garbage", ttl=30.0, subkey="0")
    await stranger.store(claims_key("ffn"), b"garbage", ttl=30.0, subkey="0")
    network = FakeNetwork(swarm, peer(5))
    claim = await claim_experts(network, ExpertPattern.parse("ffn.[0:2]"), 9, random=Random(0), clock=swarm.clock)
    assert claim.uids == {"ffn.0": True, "ffn.1": True}


class SlowNetwork(FakeNetwork):
    """Others come in between."""

    async def get_entries(self, key: str) -> list[FakeEntry]:
        entries = await super().get_entries(key)
        await asyncio.sleep(0)
        return entries


@in_made_up_time
async def test_newcomers_of_one_moment_share_the_free_ones_out() -> None:
    """Eight at once take 4 each of 64. By chance alone 6.6 experts would be taken twice; here none is."""
    swarm = FakeSwarm()
    pattern = ExpertPattern.parse("ffn.[0:8].[0:8]")
    total = 0
    for seed in range(10):
        swarm.entries.clear()
        claims = await asyncio.gather(
            *(
                claim_experts(
                    SlowNetwork(swarm, peer(number)),
                    pattern,
                    4,
                    random=Random(100 * seed + number),
                    clock=swarm.clock,
                )
                for number in range(8)
            )
        )
        taken = [uid for claim in claims for uid in claim.uids]
        assert len(taken) == 32
        total += len(taken) - len(set(taken))
    assert total <= 1


@in_made_up_time
async def test_when_there_is_no_choice_they_meet_and_do_not_draw_for_ever() -> None:
    swarm = FakeSwarm()
    claims = await asyncio.gather(
        *(
            claim_experts(
                FakeNetwork(swarm, peer(number)),
                ExpertPattern.parse("ffn.[0:2]"),
                2,
                random=Random(number),
                clock=swarm.clock,
            )
            for number in range(3)
        )
    )
    assert all(set(claim.uids) == {"ffn.0", "ffn.1"} for claim in claims)


@given(
    st.integers(1, 8).flatmap(
        lambda dims: st.lists(st.tuples(*[st.integers(0, 2**32 - 1)] * dims), min_size=1, max_size=300)
    )
)
def test_reservations_survive_the_wire(coords: list[tuple[int, ...]]) -> None:
    parts = encode_reservation(coords)
    assert all(len(part) <= 800 for part in parts)
    assert [one for part in parts for one in decode_reservation(part)] == coords


@given(st.binary(max_size=1000) | st.integers() | st.none() | st.lists(st.integers()))
def test_any_reservation_is_read_or_refused(value: object) -> None:
    try:
        assert all(len(coords) == value[0] for coords in decode_reservation(value))  # type: ignore[index]
    except ProtocolError:
        pass


@pytest.mark.parametrize("value", [b"", b"\x02", b"\x00\x00\x00\x00\x00", b"\x09" + bytes(36), b"\x02" + bytes(4), "x"])
def test_malformed_reservations(value: object) -> None:
    with pytest.raises(ProtocolError):
        decode_reservation(value)
