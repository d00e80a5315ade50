"""`PathUpgrader`: relayed connections look for better paths, and stop when there can be none."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import pytest

from tesseract_async.endpoint.endpoint import Endpoint
from tesseract_async.errors import PeerUnreachable
from tesseract_async.identity import Identity, PeerID
from tesseract_async.metrics import Metrics
from tesseract_async.nat.traversal import UPGRADE_AFTER, PathUpgrader
from tesseract_async.transport.base import DialPath, PeerAddress, Pipe

PEER_ID = Identity.from_seed(bytes(32)).peer_id
PEER = PeerAddress(PEER_ID, (), (f"203.0.113.1:1/{PEER_ID}",))


async def no_pipe() -> Pipe:
    raise AssertionError("the endpoint opens paths")


class Town:
    """An endpoint whose connection to the peer goes by `kind`, and the better paths to it."""

    def __init__(self, kind: str, *, upgrade_after: Sequence[float] = UPGRADE_AFTER, fails: int = 0) -> None:
        self.kind = kind
        self.fails = fails
        self.tried: list[list[str]] = []
        self.attempted = asyncio.Event()
        self.can_dial_back = False
        self.metrics = Metrics()
        self.upgrader = PathUpgrader(cast(Endpoint, self), better_paths=self.better_paths, upgrade_after=upgrade_after)

    def better_paths(self, peer: PeerAddress, peer_id: PeerID, kind: str) -> list[DialPath]:
        names = [f"tcp {address}" for address in peer.addresses]
        names += ["reverse"] if self.can_dial_back else []
        names += ["datachannel"] if kind == "relay" else []
        return [DialPath(name, 0.0, no_pipe) for name in names]

    def path_kind(self, peer_id: PeerID) -> str:
        return self.kind if peer_id == PEER_ID else ""

    async def upgrade(self, peer: PeerAddress, paths: Sequence[DialPath]) -> None:
        self.tried.append([path.name for path in paths])
        self.attempted.set()
        if len(self.tried) <= self.fails:
            raise PeerUnreachable("the peer", {})
        self.kind = "tcp"

    async def until_attempted(self) -> None:
        await self.attempted.wait()
        self.attempted.clear()


async def test_a_relayed_connection_looks_for_a_better_path() -> None:
    town = Town("relay", upgrade_after=(0.0, 0.0), fails=2)
    town.upgrader.watch(PEER, PEER_ID)
    town.upgrader.watch(PEER, PEER_ID)
    await town.upgrader.tasks.wait_done()
    assert town.tried == [["datachannel"]] * 3
    town.upgrader.watch(PEER, PEER_ID)
    await town.upgrader.tasks.wait_done()
    assert len(town.tried) == 3


@pytest.mark.parametrize("kind", ["relay", "datachannel"])
async def test_a_peer_that_can_be_dialed_now_is_dialed(kind: str) -> None:
    """Its records name addresses now, or we can be dialed ourselves: at once, not at the next attempt."""
    town = Town(kind, upgrade_after=(3600.0,), fails=99)
    town.upgrader.watch(PEER, PEER_ID)
    punch = ["datachannel"] if kind == "relay" else []
    town.upgrader.peer_known(replace(PEER, addresses=("127.0.0.1:9",)))
    town.upgrader.peer_known(replace(PEER, addresses=("127.0.0.1:9",)))  # no news
    await town.until_attempted()
    town.upgrader.peer_known(PEER)  # it is gone from there: no reason to try
    town.can_dial_back = True
    town.upgrader.place_changed()
    await town.until_attempted()
    assert town.tried == [["tcp 127.0.0.1:9", *punch], ["reverse", *punch]]
    await town.upgrader.tasks.aclose()


async def test_nothing_is_looked_for_where_there_is_no_connection() -> None:
    town = Town("")
    town.upgrader.watch(PEER, PEER_ID)
    town.upgrader.place_changed()
    await town.upgrader.tasks.wait_done()
    assert not town.tried
