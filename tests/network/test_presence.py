"""One identity on two nodes: both say so, and the one that started later withdraws."""

import asyncio
import logging
from typing import Any

import pytest

from tesseract_async.identity import Identity, PeerID
from tesseract_async.network.presence import Presence
from tests.experts.fake_network import FakeEntry, FakeNetwork, FakeSwarm

PEER = Identity.from_seed(bytes(32)).peer_id
KEY = f"node/{PEER}"


class Twin:
    """One of the nodes that have the identity, and what it does about it."""

    def __init__(self, swarm: FakeSwarm) -> None:
        self.swarm = swarm
        self.withdrawn = False
        network: Any = FakeNetwork(swarm, PEER)
        self.presence = Presence(network, on_older_twin=self.withdraw, period=QUICK)

    def withdraw(self) -> None:
        self.withdrawn = True

    async def look(self) -> str:
        tick()
        return await self.presence.look()


QUICK = 1e-3
_now = [1_700_000_000.0]


def now() -> float:
    return _now[0]


def tick() -> None:
    _now[0] += 1.0


@pytest.fixture(autouse=True)
def virtual_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", now)


async def test_of_two_twins_the_younger_withdraws_and_both_say_so(caplog: pytest.LogCaptureFixture) -> None:
    swarm = FakeSwarm()
    older = Twin(swarm)
    assert await older.look() == "" == await older.look()
    tick()
    younger = Twin(swarm)
    assert await younger.look() == "before", "it may be the same node before a restart"
    assert await older.look() == "younger" and not older.withdrawn
    assert await younger.look() == "older" and younger.withdrawn
    assert await older.look() == "", "nobody overwrites it any more"
    levels = [(record.levelno, record.message[:45]) for record in caplog.records]
    assert levels == [
        (logging.ERROR, "another node was started with the identity of"),
        (logging.ERROR, "another node, started earlier, has the identi"),
    ]


async def test_a_restart_is_no_twin() -> None:
    swarm = FakeSwarm()
    before = Twin(swarm)
    for _ in range(3):
        await before.look()
    tick()
    after = Twin(swarm)  # killed, and started again while the entry lives
    assert await after.look() == "before"
    assert [await after.look() for _ in range(5)] == [""] * 5 and not after.withdrawn


async def test_strangers_and_garbage_are_passed_over() -> None:
    swarm = FakeSwarm()
    node = Twin(swarm)
    await node.look()
    for owner, value in (
        (PeerID(bytes(32)), [b"12345678", 0.0]),
        *((PEER, value) for value in (None, 5, [], [1, 2], ["x", "y"], [b"12345678", "z"], [b"1", [2]])),
    ):
        swarm.sequence += 10**9
        swarm.entries[KEY, None, owner] = FakeEntry(KEY, None, owner, swarm.sequence, swarm.clock.now + 60.0, value)
        assert await node.look() in ("", "before") and not node.withdrawn


async def test_it_ends_once_it_has_withdrawn(caplog: pytest.LogCaptureFixture) -> None:
    swarm = FakeSwarm()
    older, younger = Twin(swarm), None
    tick()
    younger = Twin(swarm)
    running = [asyncio.create_task(node.presence.run()) for node in (older, younger)]
    async with asyncio.timeout(30):
        done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
    assert younger.withdrawn and not older.withdrawn and done == {running[1]}
    running[0].cancel()
    await asyncio.gather(*running, return_exceptions=True)
