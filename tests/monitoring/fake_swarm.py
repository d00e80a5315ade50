"""A swarm that is only told of: what a dashboard's page needs of an observer, without nodes, sockets and torch."""

import asyncio
import math
from types import SimpleNamespace
from typing import Any

from tesseract_async.identity import PeerID
from tesseract_async.metrics import Metrics
from tesseract_async.monitoring.history import History

NOW = 1_700_000_000.0
VERSION = "0.2.0"


class FakeObserver:
    """Has the attributes of a `SwarmObserver` that `Dashboard` reads."""

    def __init__(
        self, *, size: tuple[int, int] = (4, 4), num_servers: int = 0, num_points: int = 0, prefix: str = "ffn"
    ) -> None:
        """Experts are dealt out to the servers like cards; nobody hosts anything where there is no server."""
        self.node = SimpleNamespace(metrics=Metrics())
        self.num_looks = self.num_log_lines = self.num_points = 0
        self.peers = [self._peer(number, size) for number in range(num_servers)]
        cells = [[row, column] for row in range(size[0]) for column in range(size[1])]
        self.grids: list[dict[str, Any]] = []
        if num_servers:
            experts = [[at, n % num_servers, 1 + n % 2, 10 * n, 0.25, n % 3] for n, at in enumerate(cells)]
            self.grids = [{"prefix": prefix, "size": list(size), "experts": experts, "lost": []}]
        self.history = History()
        self.run: dict[str, Any] | None = None
        self.thanks: list[dict[str, Any]] = []
        self.log: list[list[Any]] = []
        self.losses: dict[str, list[Any]] = {}
        self.seen: dict[str, int] = {}
        for peer in self.peers:
            self.note(f"{peer['short']} joined with {peer['num_experts']} experts", "joined")
        for _ in range(num_points):
            self.add_point()
        self._changed = asyncio.Event()

    @staticmethod
    def _peer(number: int, size: tuple[int, int]) -> dict[str, Any]:
        name = f"{number + 10:08x}"
        return {
            "peer_id": name * 8,
            "short": name,
            "number": number,
            "addresses": [f"192.0.2.{number % 250 + 1}:31337"],
            "path": "direct" if number % 3 else "relay through 0a1b2c3d",
            "rtt": 0.0123 * (1 + number % 5),
            "num_experts": math.prod(size),
            "calls_per_second": 12.5,
            "rows_per_second": 800.0,
            "steps_per_second": 6.2,
            "busy": 0.41,
            "waiting_rows": 3,
            "uptime": 4321.0,
            "answered_ago": 0.4,
            "software": VERSION,
            "error": None,
            "name": f"machine {number}",
            "hardware": "8 cores, 16 GiB",
            "memory": 2**30,
            "failures": number,
            "median": 0.01,
            "slow": 0.05,
            "left_ago": None,
        }

    def add_point(self) -> None:
        """One more look at throughput and loss."""
        n = self.num_points
        self.num_points += 1
        self.history.add(
            {
                "time": NOW + 2.0 * n,
                "experts": float(sum(len(grid["experts"]) for grid in self.grids)),
                "servers": float(len(self.peers)),
                "calls_per_second": round(30 + 4 * math.sin(n / 9), 4),
                "rows_per_second": round(2000 + 300 * math.sin(n / 7), 4),
                "steps_per_second": round(15 + 3 * math.sin(n / 5), 4),
                "loss": round(2.3 * math.exp(-n / 80) + 0.05, 4),
            }
        )
        self.num_looks += 1

    def note(self, sentence: str, kind: str) -> None:
        self.log.append([NOW + 2.0 * self.num_points, sentence, kind])
        self.num_log_lines += 1

    def changed(self) -> None:
        """Wakes the pages."""
        self.num_looks += 1
        self._changed.set()
        self._changed = asyncio.Event()

    async def wait_changed(self) -> None:
        await self._changed.wait()

    def contributors(self) -> list[dict[str, Any]]:
        return self.thanks

    def expert(self, uid: str) -> dict[str, Any]:
        facts = {"version": 70, "num_calls": 400, "num_rows": 3200, "num_failures": 2}
        facts |= {"median_seconds": 0.004, "slow_seconds": 0.09}
        servers = [
            {key: peer[key] for key in ("peer_id", "short", "name")} | facts | {"primary": not number}
            for number, peer in enumerate(self.peers[:2])
        ]
        standing = [[0, 1], "0000000a", ["0000000b"], ["0000000c"], 70, 2, "safe"]
        versions = [[int(NOW) + 60 * minute, 10 * minute] for minute in range(8)]
        return {"uid": uid, "servers": servers, "standing": standing, "versions": versions}

    def server(self, peer_id: PeerID) -> dict[str, Any]:
        if not any(peer["peer_id"] == str(peer_id) for peer in self.peers):
            raise KeyError(peer_id)
        facts = {"version": 70, "primary": True, "num_calls": 400, "num_rows": 3200, "num_failures": 2}
        experts = [{"uid": f"ffn.0.{n}", **facts, "median_seconds": 0.004, "slow_seconds": 0.09} for n in range(4)]
        return {"peer_id": str(peer_id), "experts": experts}

    def state(self) -> dict[str, Any]:
        return {
            "time": NOW,
            "node": {"peer_id": "ab" * 32, "address": "127.0.0.1:4", "role": "public", "join": "127.0.0.1:31337"},
            "run": self.run,
            "totals": self.history.last,
            "grids": self.grids,
            "peers": self.peers,
            "history": self.history.since({}),
            "contributors": self.thanks,
            "losses": self.losses,
            "seen": self.seen,
            "log": self.log[-200:],
        }
