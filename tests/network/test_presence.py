"""One identity on two nodes: both say so, and the one that started later withdraws."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest

from tesseract_async.identity import Identity, PeerID
from tesseract_async.network.entries import Entry
from tesseract_async.network.presence import Presence


class Board:
    """The network, as far as one identity's entry goes: the newest stays."""

    def __init__(self) -> None:
        self.sequence = 0
        self.entry: Entry | None = None


class Node:
    """The network as a node's presence sees it."""

    def __init__(self, board: Board, peer_id: PeerID) -> None:
        self.board = board
        self.peer_id = peer_id
        self.sequence = 0
        self.withdrawn = False
        self.presence = Presence(self, on_older_twin=self.withdraw, period=0.0)

    def withdraw(self) -> None:
        self.withdrawn = True

    async def wait_joined(self, timeout: float | None = None) -> bool:
        return True

    async def get_entries(self, key: str) -> list[Entry]:
        return [] if self.board.entry is None else [self.board.entry]

    async def store(self, key: str, value: Any, *, ttl: float, subkey: str | None = None) -> int:
        self.sequence = self.board.sequence = sequence = max(self.board.sequence + 1, int(now() * 1e6))
        self.board.entry = Entry(key, subkey, self.peer_id, sequence, now() + ttl, value)
        return 1

    def last_sequence(self, key: str) -> int:
        return self.sequence

    async def look(self) -> str:
        tick()
        return await self.presence.look()


_now = [1_700_000_000.0]


def now() -> float:
    return _now[0]


def tick() -> None:
    _now[0] += 1.0


@pytest.fixture(autouse=True)
def virtual_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", now)


PEER = Identity.from_seed(bytes(32)).peer_id


async def test_of_two_twins_the_younger_withdraws_and_both_say_so(caplog: pytest.LogCaptureFixture) -> None:
    board = Board()
    older = Node(board, PEER)
    assert await older.look() == "" == await older.look()
    tick()
    younger = Node(board, PEER)
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
    board = Board()
    before = Node(board, PEER)
    for _ in range(3):
        await before.look()
    tick()
    after = Node(board, PEER)  # killed, and started again while the entry lives
    assert await after.look() == "before"
    assert [await after.look() for _ in range(5)] == [""] * 5 and not after.withdrawn


async def test_strangers_and_garbage_are_passed_over() -> None:
    board = Board()
    node = Node(board, PEER)
    await node.look()
    for owner, value in (
        (PeerID(bytes(32)), [b"12345678", 0.0]),
        *((PEER, value) for value in (None, 5, [], [1, 2], ["x", "y"], [b"12345678", "z"], [b"1", [2]])),
    ):
        board.entry = Entry("", None, owner, board.sequence + 10**9, now() + 60.0, value)
        assert await node.look() in ("", "before") and not node.withdrawn


async def test_it_ends_once_it_has_withdrawn(caplog: pytest.LogCaptureFixture) -> None:
    board = Board()
    older, younger = Node(board, PEER), None
    tick()
    younger = Node(board, PEER)
    running = [asyncio.create_task(node.presence.run()) for node in (older, younger)]
    async with asyncio.timeout(30):
        done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
    assert younger.withdrawn and not older.withdrawn and done == {running[1]}
    running[0].cancel()
    await asyncio.gather(*running, return_exceptions=True)
