"""A network in memory: what publishers and directories need of `TesseractNetwork`, without any other node."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tesseract_async.errors import TesseractError
from tesseract_async.identity import PeerID


@dataclass(frozen=True)
class FakeEntry:
    key: str
    subkey: str | None
    owner: PeerID
    sequence: int
    expiration: float
    value: Any


class Clock:
    """Wall-clock time that moves when told."""

    def __init__(self) -> None:
        self.now = time.time()

    def __call__(self) -> float:
        return self.now


class FakeSwarm:
    """What all nodes together hold."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.entries: dict[tuple[str, str | None, PeerID], FakeEntry] = {}
        self.reads: Counter[str] = Counter()
        self.stores: Counter[str] = Counter()
        self.sequence = 0
        self._changed = asyncio.Event()

    def touch(self) -> None:
        """Something happened: all that wait in `until` look again."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def until(self, predicate: Callable[[], bool]) -> None:
        """Returns once `predicate()` holds, looking after every store, read and withdrawal."""
        while not predicate():
            await self._changed.wait()


class FakeEntries(list[FakeEntry]):
    """Entries, and whether they are all."""

    complete = True


class FakeNetwork:
    """One node of a `FakeSwarm`."""

    def __init__(self, swarm: FakeSwarm, peer_id: PeerID, *, num_contacts: int = 5) -> None:
        self.swarm = swarm
        self.peer_id = peer_id
        self.num_contacts = num_contacts
        self.joined = True
        self.holders = [3]
        """What `store` answers, one after the other; the last one from then on."""
        self.failure: TesseractError | TimeoutError | None = None
        self.unreadable: set[PeerID] = set()
        """Whose entries cannot be had from any holder."""
        self.withdrawn: list[tuple[str, str | None]] = []
        self.sequences: dict[tuple[str, str | None], int] = {}
        """Of this node's own entries."""
        self.silent = False
        """Withdrawals are never answered."""
        self.num_unanswered = 0

    async def wait_joined(self, timeout: float | None = None) -> bool:
        self.swarm.touch()
        return self.joined

    async def store(self, key: str, value: Any, *, ttl: float, subkey: str | None = None) -> int:
        self.swarm.stores[key] += 1
        self.swarm.touch()
        if self.failure is not None:
            raise self.failure
        self.swarm.sequence += 1
        self.sequences[key, subkey] = self.swarm.sequence
        entry = FakeEntry(key, subkey, self.peer_id, self.swarm.sequence, self.swarm.clock.now + ttl, value)
        holders = self.holders.pop(0) if len(self.holders) > 1 else self.holders[0]
        if holders:
            self.swarm.entries[(key, subkey, self.peer_id)] = entry
        return holders

    def last_sequence(self, key: str, *, subkey: str | None = None) -> int:
        return self.sequences.get((key, subkey), 0)

    async def get_entries(self, key: str) -> list[FakeEntry]:
        self.swarm.reads[key] += 1
        self.swarm.touch()
        if self.failure is not None:
            raise self.failure
        now = self.swarm.clock.now
        entries = (entry for entry in self.swarm.entries.values() if entry.key == key and entry.expiration > now)
        found = FakeEntries(entry for entry in entries if entry.owner not in self.unreadable)
        found.complete = not self.unreadable
        return found

    async def withdraw(self, key: str, *, subkey: str | None = None) -> int:
        self.withdrawn.append((key, subkey))
        self.swarm.touch()
        if self.silent:
            self.num_unanswered += 1
            self.swarm.touch()
            await asyncio.Event().wait()
        if self.failure is not None:
            raise self.failure
        return self.swarm.entries.pop((key, subkey, self.peer_id), None) is not None


def peer(number: int) -> PeerID:
    return PeerID(number.to_bytes(32, "big"))
