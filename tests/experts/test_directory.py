"""Experts are found while they live, and not a moment longer than somebody knows that they don't."""

import asyncio
import random
import time

import numpy as np
import pytest

from tesseract_async.errors import ConnectionLost
from tesseract_async.experts.directory import LEAST_AGE, RETRY_PERIOD, ExpertDirectory
from tesseract_async.experts.grid import MAX_REPLICAS
from tesseract_async.experts.manifest import encode_manifest, grid_key, join_uid, shard_key, split_uid
from tesseract_async.experts.publisher import ExpertPublisher
from tests.client.virtual_time import in_made_up_time
from tests.experts.fake_network import FakeEntry, FakeNetwork, FakeSwarm, peer

QUICK = 0.01
SLOW = 1000.0


def directory(swarm: FakeSwarm, refresh_period: float = SLOW) -> ExpertDirectory:
    return ExpertDirectory(FakeNetwork(swarm, peer(0)), refresh_period=refresh_period, clock=swarm.clock)


async def declare(swarm: FakeSwarm, number: int, *uids: str, primary: bool = True) -> ExpertPublisher:
    network = FakeNetwork(swarm, peer(number))
    publisher = ExpertPublisher(network, addresses=[f"10.0.0.{number}:4000"], clock=swarm.clock)
    await publisher.declare(dict.fromkeys(uids, primary))
    return publisher


async def test_find_tells_who_hosts_an_expert() -> None:
    swarm = FakeSwarm()
    servers = [
        await declare(swarm, 1, "ffn.3.7", "ffn.0.0", primary=False),
        await declare(swarm, 2, "ffn.3.7"),
        await declare(swarm, 3, "ffn.1.1", primary=False),
    ]
    subject = directory(swarm)
    first, second = await subject.find("ffn.3.7")
    assert (first.peer.peer_id, first.peer.addresses, first.primary) == (peer(2), ("10.0.0.2:4000",), True)
    assert (second.peer.peer_id, second.uid, second.primary) == (peer(1), "ffn.3.7", False)
    await subject.find("ffn.3.7")
    assert swarm.reads[shard_key("ffn.3.7")] == 1, "what was found is kept"
    with pytest.raises(ValueError):
        await subject.find("ffn")
    for server in servers:
        await server.aclose()


async def test_that_nobody_hosts_it_is_not_remembered() -> None:
    swarm = FakeSwarm()
    subject = directory(swarm)
    assert await subject.find("ffn.3.7") == []
    server = await declare(swarm, 1, "ffn.3.7")
    assert len(await subject.find("ffn.3.7")) == 1
    await server.aclose()


async def test_an_answer_is_not_kept_beyond_its_expiration() -> None:
    swarm = FakeSwarm()
    subject = directory(swarm)
    server = await declare(swarm, 1, "ffn.3.7")
    assert await subject.find("ffn.3.7")
    swarm.clock.now += server.settings.ttl + 1
    assert await subject.find("ffn.3.7") == []
    await server.aclose()


async def test_a_server_that_calls_an_answer_outdated_each_time_does_not_have_it_read_each_time() -> None:
    swarm = FakeSwarm()
    subject = directory(swarm)
    server = await declare(swarm, 1, "ffn.3.7")
    for _ in range(10):
        assert await subject.find("ffn.3.7")
        subject.report_outdated("ffn.3.7")
    assert swarm.reads[shard_key("ffn.3.7")] == 1
    swarm.clock.now += LEAST_AGE
    assert await subject.find("ffn.3.7")
    assert swarm.reads[shard_key("ffn.3.7")] == 2, "but soon"
    await server.aclose()


async def test_a_failed_replica_is_hidden_until_its_next_manifest() -> None:
    swarm = FakeSwarm()
    subject = directory(swarm)
    servers = [await declare(swarm, 1, "ffn.3.7", "ffn.3.6"), await declare(swarm, 2, "ffn.3.7", primary=False)]
    subject.watch("ffn", (8, 8))
    await subject.wait_warm("ffn")
    for other in (subject, directory(swarm)):
        first, second = await other.find("ffn.3.7")
        other.report_failure(first)
        assert await other.find("ffn.3.7") == [second]
        other.report_failure(second)
        assert await other.find("ffn.3.7") == []
        assert await other.find("ffn.3.7", even_failed=True) == [first, second], "rather than nobody"
        assert await other.find("ffn.3.7") == [], "which changes nothing for others"
        assert await other.find("ffn.9.9", even_failed=True) == []
        assert len(await other.find("ffn.3.6")) == 1, "only what failed is hidden"
        if other is subject:
            view = other.live("ffn")
            assert view is not None and view.coords.tolist() == [[3, 6]]
            await subject.refresh("ffn")
            assert await other.find("ffn.3.7") == [], "an old manifest, read again, is no news"
        swarm.clock.now += 1
        await servers[1].declare(servers[1].uids)
        await subject.refresh("ffn")
        assert [replica.peer.peer_id for replica in await other.find("ffn.3.7")] == [peer(2)]
    for server in servers:
        await server.aclose()
    await subject.aclose()


async def test_who_has_no_other_choice_is_told_of_a_replica_that_failed() -> None:
    swarm = FakeSwarm()
    subject = directory(swarm)
    server = await declare(swarm, 1, "ffn.3.7")
    subject.watch("ffn", (8, 8))
    await subject.wait_warm("ffn")
    [failed] = await subject.find("ffn.3.7")
    subject.report_failure(failed)
    assert await subject.find("ffn.3.7") == []
    assert await subject.find("ffn.3.7", even_failed=True) == [failed]
    assert await subject.find("ffn.3.7") == [], "naming it did not forgive it"
    assert await subject.find("ffn.3.6", even_failed=True) == [], "nobody ever hosted this one"
    other = await declare(swarm, 2, "ffn.3.7", primary=False)
    assert [one.peer.peer_id for one in await subject.find("ffn.3.7", even_failed=True)] == [peer(2)]
    await server.aclose()
    await other.aclose()
    await subject.aclose()


@in_made_up_time
async def test_a_read_that_nobody_answered_empties_no_grid() -> None:
    swarm = FakeSwarm()
    server = await declare(swarm, 1, "ffn.3.7")
    network = FakeNetwork(swarm, peer(0))
    subject = ExpertDirectory(network, refresh_period=QUICK, clock=swarm.clock)
    subject.watch("ffn", (8, 8))
    await subject.wait_warm("ffn")
    network.failure = TimeoutError("no node of the network answered within 5.0 s")
    before = swarm.reads[grid_key("ffn")]
    await swarm.until(lambda: swarm.reads[grid_key("ffn")] > before + 2)
    view = subject.live("ffn")
    assert view is not None and view.coords.tolist() == [[3, 7]], "what was read before lives until it expires"
    assert subject.metrics.total("directory_reads_failed") >= 2
    swarm.clock.now += server.settings.ttl + 1
    view = subject.live("ffn")
    assert view is not None and len(view) == 0
    network.failure = None
    await server.aclose()
    await subject.aclose()


@in_made_up_time
async def test_a_grid_that_was_never_read_completely_is_read_again_soon() -> None:
    swarm = FakeSwarm()
    server = await declare(swarm, 1, "ffn.1.1")
    network = FakeNetwork(swarm, peer(0))
    network.unreadable = {peer(1)}
    subject = ExpertDirectory(network, refresh_period=SLOW, clock=swarm.clock)
    subject.watch("ffn", (8, 8))
    await swarm.until(lambda: swarm.reads[grid_key("ffn")] > 0)
    network.unreadable = set()
    async with asyncio.timeout(2 * RETRY_PERIOD):
        await subject.wait_warm("ffn")
    before = swarm.reads[grid_key("ffn")]
    await asyncio.sleep(SLOW / 2)
    assert swarm.reads[grid_key("ffn")] == before, "from now on as usual"
    await server.aclose()
    await subject.aclose()


@in_made_up_time
async def test_a_stranger_that_gives_nobody_what_it_claims_to_hold_does_not_keep_a_grid_from_being_used() -> None:
    swarm = FakeSwarm()
    server = await declare(swarm, 1, "ffn.1.1")
    network = FakeNetwork(swarm, peer(0))
    network.unreadable = {peer(9)}
    subject = ExpertDirectory(network, refresh_period=SLOW, clock=swarm.clock)
    subject.watch("ffn", (8, 8))
    for _ in range(2):
        async with asyncio.timeout(10 * RETRY_PERIOD):
            await subject.wait_warm("ffn")
        view, before = subject.live("ffn"), swarm.reads[grid_key("ffn")]
        assert view is not None and view.coords.tolist() == [[1, 1]]
        await asyncio.sleep(SLOW / 2)
        assert swarm.reads[grid_key("ffn")] == before, "nor have it read every second"
        subject.forget("ffn")
        assert subject.live("ffn") is None
    await server.aclose()
    await subject.aclose()


@in_made_up_time
async def test_a_read_that_is_not_complete_forgets_nobody_and_warms_no_grid() -> None:
    swarm = FakeSwarm()
    servers = [await declare(swarm, 1, "ffn.1.1"), await declare(swarm, 2, "ffn.2.2")]
    network = FakeNetwork(swarm, peer(0))
    network.unreadable = {peer(2)}
    subject = ExpertDirectory(network, refresh_period=QUICK, clock=swarm.clock)
    subject.watch("ffn", (8, 8))
    await swarm.until(lambda: swarm.reads[grid_key("ffn")] > 3)
    assert subject.live("ffn") is None, "what is known is not all"
    snapshot = subject.metrics.snapshot
    assert snapshot()["directory_complete{prefix=ffn}"] == 0.0
    network.unreadable = set()
    await subject.wait_warm("ffn")
    assert snapshot()["directory_complete{prefix=ffn}"] == 1.0
    swarm.clock.now += 7.0
    network.unreadable = {peer(2)}
    before = swarm.reads[grid_key("ffn")]
    await swarm.until(lambda: swarm.reads[grid_key("ffn")] > before + 2)
    view = subject.live("ffn")
    assert view is not None and view.coords.tolist() == [[1, 1], [2, 2]]
    assert snapshot()["directory_age_seconds{prefix=ffn}"] >= 7.0
    for server in servers:
        await server.aclose()
    await subject.aclose()


@in_made_up_time
async def test_a_watched_grid_follows_the_swarm() -> None:
    swarm = FakeSwarm()
    subject = directory(swarm, QUICK)
    with pytest.raises(ValueError, match="watch"):
        await subject.wait_warm("ffn")
    assert subject.live("ffn") is None
    subject.watch("ffn", (8, 8))
    subject.watch("ffn", (8, 8))
    with pytest.raises(ValueError, match="not a grid"):
        subject.watch("ffn", (0, 9))
    assert subject.live("ffn") is None, "cold"
    await subject.wait_warm("ffn")
    view = subject.live("ffn")
    assert view is not None and len(view) == 0 and view.coords.shape == (0, 2) and not view.replicas

    def coords() -> list[list[int]]:
        view = subject.live("ffn")
        assert view is not None
        return view.coords.tolist()

    first = await declare(swarm, 1, "ffn.3.7", "ffn.0.1")
    await swarm.until(lambda: coords() == [[0, 1], [3, 7]])
    second = await declare(swarm, 2, "ffn.3.7", "ffn.7.7")
    await swarm.until(lambda: coords() == [[0, 1], [3, 7], [7, 7]])
    later = subject.live("ffn")
    assert later is not None and later.version > view.version
    assert len(later.replicas[(3, 7)]) == 2
    for number in range(9):
        under = {coords[1]: found for coords, found in later.replicas.items() if coords[0] == number}
        assert later.replicas_under((number,)) == under
    assert later.replicas_under(()) == {} and later.replicas_under((3, 7)) == {}
    await first.aclose()
    await swarm.until(lambda: coords() == [[3, 7], [7, 7]])
    await second.aclose()
    await subject.aclose()
    await subject.aclose()
    with pytest.raises(RuntimeError, match="closed"):
        subject.watch("other", (3,))


async def test_the_dead_leave_the_view_without_another_read() -> None:
    swarm = FakeSwarm()
    subject = directory(swarm)
    early = await declare(swarm, 1, "ffn.1")
    swarm.clock.now += 10
    late = await declare(swarm, 2, "ffn.2")
    subject.watch("ffn", (8,))
    await subject.wait_warm("ffn")
    view = subject.live("ffn")
    assert view is not None and len(view) == 2 and subject.live("ffn") is view
    swarm.clock.now += early.settings.ttl - 5
    view = subject.live("ffn")
    assert view is not None and view.coords.tolist() == [[2]]
    assert swarm.reads[grid_key("ffn")] == 3, "one here, two by the declaring servers"
    for server in (early, late):
        await server.aclose()
    await subject.aclose()


@in_made_up_time
async def test_a_grid_is_not_warm_before_the_network_is_joined() -> None:
    swarm = FakeSwarm()
    network = FakeNetwork(swarm, peer(0))
    subject = ExpertDirectory(network, refresh_period=QUICK, clock=swarm.clock)
    network.joined = False
    asked = 0

    def asked_twice() -> bool:
        nonlocal asked
        asked += 1
        return asked > 3

    subject.watch("ffn", (8,))
    await swarm.until(asked_twice)
    assert subject.live("ffn") is None and not swarm.reads
    network.joined, network.failure = True, ConnectionLost("somebody", "gone")
    await swarm.until(lambda: subject.metrics.total("directory_reads_failed") > 0)
    assert subject.live("ffn") is None
    network.failure = None
    await subject.wait_warm("ffn")
    await subject.aclose()


async def test_what_strangers_store_is_dropped_and_counted() -> None:
    swarm = FakeSwarm()
    stranger = FakeNetwork(swarm, peer(9))
    far = encode_manifest(["10.0.0.9:1"], {(9, 9): True, (1, 1): True}, prefix="ffn", sequence=1)[0][0]
    elsewhere = encode_manifest(["10.0.0.9:1"], {(3, 7): True}, prefix="attention", sequence=1)[0][0]
    other_dims = encode_manifest(["10.0.0.9:1"], {(1,): True}, prefix="ffn", sequence=1)[0][0]
    values = [None, 3, b"", b"garbage", "text", [1, 2], {"a": 1}, far[:-1], elsewhere, far, other_dims]
    for number, value in enumerate(values):
        await stranger.store(grid_key("ffn"), value, ttl=60, subkey=str(number))
        await stranger.store(shard_key("ffn.3.7"), value, ttl=60, subkey=str(number))
    server = await declare(swarm, 1, "ffn.3.7")
    subject = directory(swarm)
    assert [replica.peer.peer_id for replica in await subject.find("ffn.3.7")] == [peer(1)]
    assert subject.metrics.total("manifests_dropped") == 9
    subject.watch("ffn", (8, 8))
    await subject.wait_warm("ffn")
    view = subject.live("ffn")
    assert view is not None and view.coords.tolist() == [[1, 1], [3, 7]]
    assert subject.metrics.total("manifests_dropped") == 18
    assert subject.metrics.total("experts_off_grid") == 2
    await server.aclose()
    await subject.aclose()


async def test_a_stale_part_does_not_beat_a_newer_one() -> None:
    swarm = FakeSwarm()
    network = FakeNetwork(swarm, peer(1))
    for subkey, sequence, address, primary in (("0", 5, "10.0.0.1:5", False), ("1", 4, "10.0.0.1:4", True)):
        part = encode_manifest([address], {(1,): primary}, prefix="ffn", sequence=sequence)[0][0]
        await network.store(grid_key("ffn"), part, ttl=60, subkey=subkey)
    subject = directory(swarm)
    subject.watch("ffn", (8,))
    await subject.wait_warm("ffn")
    view = subject.live("ffn")
    assert view is not None
    [replica] = view.replicas_at(0)
    assert (replica.sequence, replica.primary, replica.peer.addresses) == (5, False, ("10.0.0.1:5",))
    await subject.aclose()


async def test_a_large_swarm_is_read_as_it_was_declared() -> None:
    """512 servers with 8 experts each: the view against a plain dictionary, and the bytes that were read."""
    swarm = FakeSwarm()
    rng = random.Random(1)
    expected: dict[tuple[int, ...], set[int]] = {}
    servers = []
    for number in range(512):
        coords = {(rng.randrange(64), rng.randrange(64)) for _ in range(8)}
        for at in coords:
            expected.setdefault(at, set()).add(number)
        servers.append(await declare(swarm, number, *(join_uid("ffn", at) for at in coords)))
    num_bytes = sum(len(entry.value) for entry in swarm.entries.values() if entry.key == grid_key("ffn"))
    # each travels in a signed entry of about 110 bytes besides its value
    assert num_bytes + 512 * 110 < 87_000
    subject = directory(swarm)
    subject.watch("ffn", (64, 64))
    await subject.wait_warm("ffn")
    view = subject.live("ffn")
    assert view is not None
    assert view.coords.dtype == np.int64 and view.coords.tolist() == sorted(map(list, expected))
    for row in range(len(view)):
        owners = {replica.peer.peer_id for replica in view.replicas_at(row)}
        assert owners == {peer(number) for number in expected[split_uid(view.uid(row))[1]]}
    assert view.replicas.keys() == expected.keys()
    for server in servers:
        await server.aclose()
    await subject.aclose()


async def test_the_refresh_period_is_checked() -> None:
    with pytest.raises(ValueError, match="refresh_period"):
        directory(FakeSwarm(), 0.0)


@in_made_up_time
async def test_waiting_for_somebody_alive_reads_the_grid_again_at_once() -> None:
    """The period is a thousand seconds, but who waits for experts is told of the first that comes."""
    swarm = FakeSwarm()
    subject = directory(swarm)
    with pytest.raises(ValueError, match="not watched"):
        await subject.wait_read("ffn")
    subject.watch("ffn", (8, 8))

    async def until_somebody_lives() -> None:
        while not subject.live("ffn"):
            await subject.wait_read("ffn")

    waiting = [asyncio.create_task(until_somebody_lives()) for _ in range(2)]
    await subject.wait_warm("ffn")
    assert not any(task.done() for task in waiting)
    server = await declare(swarm, 1, "ffn.3.7")
    async with asyncio.timeout(30):
        await asyncio.gather(*waiting)
    view = subject.live("ffn")
    assert view is not None and len(view) == 1
    await subject.aclose()
    await server.aclose()


async def test_each_size_of_one_prefix_has_views_of_its_own() -> None:
    """A notebook's cell, run again with another grid: nobody is shown the other's experts, or misses one."""
    swarm = FakeSwarm()
    servers = [await declare(swarm, 1, "ffn.0.1", "ffn.3.7"), await declare(swarm, 2, "ffn.2", "ffn.5")]
    subject = directory(swarm)
    subject.watch("ffn", (2, 2))
    await subject.wait_warm("ffn")
    for size in ((8, 8), (6,), (4, 4, 4)):
        assert subject.live("ffn", size) is None, "not watched yet"
        subject.watch("ffn", size)
    views = {size: subject.live("ffn", size) for size in ((2, 2), (8, 8), (6,), (4, 4, 4))}
    assert {size: view.coords.tolist() for size, view in views.items() if view is not None} == {
        (2, 2): [[0, 1]],
        (8, 8): [[0, 1], [3, 7]],
        (6,): [[2], [5]],
        (4, 4, 4): [],
    }
    assert subject.live("ffn", (8, 8)) is views[(8, 8)] and subject.live("ffn") is views[(2, 2)]
    [replica] = await subject.find("ffn.3.7")
    subject.report_failure(replica)
    view = subject.live("ffn", (8, 8))
    assert view is not None and view.coords.tolist() == [[0, 1]] and view.version > views[(8, 8)].version  # type: ignore[union-attr]
    for server in servers:
        await server.aclose()
    await subject.aclose()


def bomb(owner: int, num_parts: int, coords: list[tuple[int, int]], *, sequence: int = 2**47) -> list[FakeEntry]:
    """Manifests of one identity, each of which claims these coordinates as primary."""
    parts = [
        encode_manifest(["10.0.0.9:1"], dict.fromkeys(coords, True), prefix="ffn", sequence=sequence + n)[0][0]
        for n in range(num_parts)
    ]
    expiration = time.time() + 600
    return [FakeEntry(grid_key("ffn"), f"x{n}", peer(owner), n, expiration, part) for n, part in enumerate(parts)]


async def test_a_grid_bomb_takes_no_room_from_others_and_no_time_from_the_loop() -> None:
    """Megabytes of claims, by one identity or by a hundred, on few cells or on all: honest experts stay, in order."""
    swarm = FakeSwarm()
    server = await declare(swarm, 1, "ffn.0.0", "ffn.0.1")
    subject = directory(swarm)
    block = [(i // 32, i % 32) for i in range(380)]
    entries = bomb(9, 1_000, block) + [entry for n in range(200) for entry in bomb(1_000 + n, 1, block)]
    for entry in entries:
        swarm.entries[(entry.key, entry.subkey, entry.owner)] = entry
    turns = 0

    async def count_turns() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    counting = asyncio.create_task(count_turns())
    subject.watch("ffn", (32, 32))
    await subject.wait_warm("ffn")
    counting.cancel()
    await asyncio.wait([counting])
    assert turns > 50, "others had their turns meanwhile"
    view = subject.live("ffn", (32, 32))
    assert view is not None and len(view) == 380
    for row in range(len(view)):
        owners = [replica.peer.peer_id for replica in view.replicas_at(row)]
        assert len(owners) <= MAX_REPLICAS and (peer(1) in owners) == (row < 2)
    assert subject.metrics.total("experts_crowded_out") > 0
    await server.aclose()
    await subject.aclose()


async def test_who_was_there_before_is_not_crowded_out() -> None:
    """A server with many experts, known from earlier reads, against newcomers that claim one of its experts each."""
    swarm = FakeSwarm()
    server = await declare(swarm, 1, *(f"ffn.{i // 16}.{i % 16}" for i in range(256)))
    subject = directory(swarm)
    subject.watch("ffn", (16, 16))
    await subject.wait_warm("ffn")
    for n in range(100):
        [entry] = bomb(1_000 + n, 1, [(3, 3)])
        swarm.entries[(entry.key, entry.subkey, entry.owner)] = entry
    await subject.refresh("ffn")
    owners = [replica.peer.peer_id for replica in await subject.find("ffn.3.3")]
    assert len(owners) == MAX_REPLICAS and peer(1) in owners
    await server.aclose()
    await subject.aclose()


async def test_failures_are_remembered_of_the_replica_whatever_it_publishes_then() -> None:
    """A claimer that never answers, and says something new every second: it is believed once more, then for longer and
    longer not; where it is named, it comes last. An answer forgives all."""
    swarm = FakeSwarm()
    subject = directory(swarm)
    honest, ghost = await declare(swarm, 1, "ffn.3.7"), await declare(swarm, 2, "ffn.3.7")
    subject.watch("ffn", (8, 8))
    await subject.wait_warm("ffn")
    asked = []
    for second in range(120):
        swarm.clock.now += 1
        await ghost.declare(ghost.uids)
        if second % 15 == 0:
            await honest.declare(honest.uids)
        await subject.refresh("ffn")
        named = await subject.find("ffn.3.7")
        assert named[0].peer.peer_id == peer(1) or not asked, "never before the one that answers"
        if named[-1].peer.peer_id == peer(2):
            asked.append(second)
            subject.report_failure(named[-1])
        subject.report_answer(next(replica for replica in named if replica.peer.peer_id == peer(1)))
    assert asked == [0, 1, 16, 46, 106]
    view = subject.live("ffn")
    assert view is not None
    [replica] = view.replicas_at(0)
    swarm.clock.now += 1000
    for server in (ghost, honest):
        await server.declare(server.uids)
    await subject.refresh("ffn")
    doubted = (await subject.find("ffn.3.7"))[1]
    assert doubted.peer.peer_id == peer(2) and doubted.doubt == 5
    subject.report_answer(doubted)
    assert (await subject.find("ffn.3.7"))[1].doubt == 0
    for server in (ghost, honest):
        await server.aclose()
    await subject.aclose()
