"""Thanks: counted by the hour, published in parts, and believed of trainers alone."""

import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tesseract_async.admission import Policy
from tesseract_async.experts.authority import Authority
from tesseract_async.experts.grants import sign_grant
from tesseract_async.experts.progress import HOUR, MAX_PARTS, SERVERS_PER_PART, Thanks, publish_thanks, read_thanks
from tesseract_async.experts.run import RunManifest, sign_run
from tesseract_async.identity import Identity, PeerID
from tesseract_async.network.values import encode_value
from tests.experts.fake_network import FakeNetwork, FakeSwarm, peer

SERVERS = [PeerID(bytes([number]) * 32) for number in range(40)]
TRAINER = peer(1)


async def test_what_a_trainer_received_is_told_by_server_and_hour() -> None:
    swarm, now = FakeSwarm(), [HOUR * 10 + 5.0]
    network: Any = FakeNetwork(swarm, TRAINER)
    thanks = Thanks(lambda: now[0])
    for server in SERVERS:
        thanks.add("ffn", server, 64, 0)
        thanks.add("ffn", server, 0, 2)
    thanks.add("other", SERVERS[0], 7, 0)
    assert thanks.is_due("ffn") and not thanks.is_due("ffn") and thanks.is_due("other")
    now[0] += HOUR
    thanks.add("ffn", SERVERS[0], 1, 0)
    await publish_thanks(network, "ffn", thanks)
    found = await read_thanks(network, "ffn", 10, Policy.only([TRAINER]))
    assert {(one.server, one.rows, one.steps) for one in found} == {(server, 64, 2) for server in SERVERS}
    (last,) = await read_thanks(network, "ffn", 11, Policy())
    assert (last.trainer, last.server, last.rows, last.steps) == (TRAINER, SERVERS[0], 1, 0)
    assert await read_thanks(network, "ffn", 10, Policy.only([])) == [], "who may not train thanks nobody"
    assert await read_thanks(network, "ffn", 12, Policy()) == []
    now[0] += 3 * HOUR
    thanks.add("ffn", SERVERS[1], 1, 0)
    assert {hour for hour, _, _ in thanks.parts("ffn")} == {14}, "older hours are told already"


async def test_in_a_run_the_grant_comes_along() -> None:
    """An onlooker has never met the trainer, and does not know that it may train."""
    owner, trainer, stranger = (Identity.from_seed(bytes([number]) * 32) for number in (1, 2, 3))
    run = sign_run(owner, RunManifest("digits", "ffn", (4, 4), "ffn", created=1))
    swarm, now = FakeSwarm(), int(time.time())
    for identity, signer in ((trainer, owner), (stranger, stranger)):
        authority = Authority(run)
        grant = sign_grant(signer, authority.run_id, identity.peer_id, ["train"], serial=now, not_after=now + 999)
        assert authority.learn_grant(grant.blob) == (identity is trainer)
        network: Any = FakeNetwork(swarm, identity.peer_id)
        thanks = Thanks(lambda: HOUR * 10.0)
        thanks.add("ffn", SERVERS[0], 5, 1)
        await publish_thanks(network, "ffn", thanks, authority=authority)
        await network.store("thanks/ffn/10", grant.blob, ttl=60.0, subkey="grant")
    onlooker = Authority(run)
    (one,) = await read_thanks(network, "ffn", 10, Policy(), authority=onlooker)
    assert (one.trainer, one.rows) == (trainer.peer_id, 5)


async def test_nobody_thanks_itself_and_malformed_lines_count_nothing() -> None:
    swarm = FakeSwarm()
    network: Any = FakeNetwork(swarm, TRAINER)
    me, other = bytes(TRAINER), bytes(SERVERS[3])
    bad: list[Any] = [[me, 10, 1], [other, -1, 0], [other, 1], [b"short", 1, 1], [other, 2**60, 0], [other, True, 0], 7]
    await network.store("thanks/ffn/10", [*bad, [other, 5, 6]], ttl=60.0, subkey="0")
    await network.store("thanks/ffn/10", "nonsense", ttl=60.0, subkey="1")
    (one,) = await read_thanks(network, "ffn", 10, Policy())
    assert (one.server, one.rows, one.steps) == (SERVERS[3], 5, 6)


@given(st.lists(st.tuples(st.integers(0, 2**50), st.integers(0, 2**50)), min_size=1, max_size=30))
def test_every_part_fits_an_entry(counts: list[tuple[int, int]]) -> None:
    thanks = Thanks(lambda: 0.0)
    for number, (rows, steps) in enumerate(counts):
        thanks.add("ffn", PeerID(number.to_bytes(32, "big")), rows, steps)
    parts = list(thanks.parts("ffn"))
    assert sum(len(lines) for _, _, lines in parts) == len(counts)
    for _, _, lines in parts:
        encode_value(lines)  # raises for too long a one


def test_a_node_counts_so_many_servers_and_no_more() -> None:
    thanks = Thanks(lambda: 0.0)
    for number in range(1000):
        thanks.add("ffn", PeerID(number.to_bytes(32, "big")), 1, 1)
    thanks.add("ffn", None, 1, 1)
    assert len(list(thanks.parts("ffn"))) == MAX_PARTS
    assert sum(len(lines) for _, _, lines in thanks.parts("ffn")) == MAX_PARTS * SERVERS_PER_PART


@pytest.mark.parametrize("now", [0.0, 1e10])
def test_a_clock_that_is_set_back_does_not_silence_it(now: float) -> None:
    times = [1e9]
    thanks = Thanks(lambda: times[0])
    assert thanks.is_due("ffn")
    times[0] = now
    assert thanks.is_due("ffn")
