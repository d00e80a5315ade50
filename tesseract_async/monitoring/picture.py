"""SwarmPicture: the known state of a swarm, and its form in JSON. `SwarmObserver` fills it."""

import asyncio
import dataclasses
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from statistics import median_high
from typing import Any

from tesseract_async.experts.grid import GridView
from tesseract_async.experts.manifest import split_uid
from tesseract_async.experts.places import Survey
from tesseract_async.experts.progress import Progress, Thank
from tesseract_async.identity import PeerID
from tesseract_async.monitoring.history import History
from tesseract_async.monitoring.status import NodeStatus
from tesseract_async.node import TesseractNode
from tesseract_async.transport.base import PeerAddress

Picture = dict[str, Any]
"""A swarm, or a part of it, as JSON holds it."""

RATES = ("calls_per_second", "rows_per_second", "steps_per_second")
LOG_LENGTH = 200
MAX_CONTRIBUTORS = 100


@dataclass(slots=True)
class Peer:
    """A node that hosts experts, or another one that was met."""

    address: PeerAddress
    number: int = 0
    """A number in the order of meeting, never given twice: it decides the color."""
    uids: set[str] = field(default_factory=set)
    """The experts that it hosts, by its manifests."""
    status: NodeStatus | None = None
    """Its latest answer; None before the first."""
    seen_at: float = 0.0
    """Loop time of its latest answer; 0 before the first."""
    rates: dict[str, float] = field(default_factory=lambda: dict.fromkeys(RATES, 0.0))
    busy: float = 0.0
    """Share of the time that its devices compute, summed over them: 2.0 if two are always busy."""
    error: str | None = None
    """The reason why it did not answer the last time."""
    is_gone: bool = False
    """True if it could not be reached the last time: its experts then do not count."""
    left_at: float | None = None
    """Loop time at which its manifests were found expired."""
    is_new: bool = False
    """True until the log has said that it joined: before that, it is asked for its name."""


class SwarmPicture:
    """Servers and their experts, trainers, and who contributed, as they were seen last."""

    def __init__(self, node: TesseractNode) -> None:
        self.node = node
        self.grids: dict[str, tuple[int, ...]] = {}
        """prefix -> size of the grids that are shown."""
        self.peers: dict[PeerID, Peer] = {}
        self.log: deque[tuple[float, str, str]] = deque(maxlen=LOG_LENGTH)
        """(wall-clock time, sentence, kind): kinds are joined, left, failed and changed."""
        self.num_log_lines = 0
        """Lines ever written; `log` holds the last of them."""
        self.history = History()
        self.losses: dict[str, Progress] = {}
        """Trainers' progress (`publish_progress`)."""
        self.merged: Progress | None = None
        """The progress of the parameters that trainers share, if one of the trainers publishes it."""
        self.lost: dict[str, set[tuple[int, ...]]] = {}
        """prefix -> coordinates of experts that were seen before and are not hosted now."""
        self.surveys: dict[str, Survey] = {}
        """prefix -> who leads, follows and holds its experts, as all members say; for grids in a run."""
        self.thanks: dict[tuple[str, int], list[Thank]] = {}
        """(prefix, hour) -> what trainers received."""
        self.met: dict[str, Progress] = {}
        """The latest progress of every trainer, also of those that left."""
        self.versions: dict[str, deque[tuple[int, int]]] = {}
        """uid -> (wall-clock time, version), a minute apart."""

    def state(self) -> Picture:
        """Return the picture for JSON; the dashboard's page and `tesseract top` draw it."""
        hosts = {peer_id: place for place, peer_id in enumerate(self.peers)}
        return {
            "time": time.time(),
            "node": {
                "peer_id": str(self.node.peer_id),
                "address": self.node.address,
                "role": self.node.network.role,
                "join": str(next(iter(self.node.initial_peers), self.node.peer_address)),
            },
            "run": self._run_state(),
            "totals": self.history.last,
            "grids": [self._grid_state(prefix, size, hosts) for prefix, size in self.grids.items()],
            "peers": [self._peer_state(peer_id, peer) for peer_id, peer in self.peers.items()],
            "history": self.history.since({}),
            "contributors": self.contributors(),
            "losses": {name: list(value) for name, value in self.losses.items()},
            "seen": self._seen_by_trainers(),
            "log": [list(line) for line in self.log],
        }

    def _seen_by_trainers(self) -> dict[str, int]:
        """Return how many samples, or tokens, the trainers that were met have seen."""
        seen: Counter[str] = Counter()
        for one in self.met.values():
            seen[one.unit] += one.seen
        return dict(seen)

    def contributors(self) -> list[Picture]:
        """Return the largest contributors of the last day, and how much each gave, by what trainers have signed."""
        found: dict[PeerID, Picture] = {}
        for lines in self.thanks.values():
            for line in lines:
                one = found.setdefault(line.server, {"rows": 0, "steps": 0, "hours": set(), "trainers": set()})
                one["rows"], one["steps"] = one["rows"] + line.rows, one["steps"] + line.steps
                one["hours"].add(line.hour)
                one["trainers"].add(line.trainer)
        counts = [
            {
                "peer_id": str(peer_id),
                "short": peer_id.short,
                "name": self._name(peer_id),
                **one,
                "hours": len(one["hours"]),
                "trainers": len(one["trainers"]),
            }
            for peer_id, one in found.items()
        ]
        return sorted(counts, key=lambda one: (-one["rows"], one["peer_id"]))[:MAX_CONTRIBUTORS]

    def expert(self, uid: str) -> Picture:
        """Return what an expert's page shows: who serves it, how well, and its version over time."""
        servers: list[Picture] = []
        for peer_id, peer in self.peers.items():
            status = None if peer.status is None else peer.status.experts.get(uid)
            if uid in peer.uids or status is not None:
                figures = {} if status is None else dataclasses.asdict(status)
                servers.append(
                    {"peer_id": str(peer_id), **figures, "short": peer_id.short, "name": self._name(peer_id)}
                )
        prefix, coords = split_uid(uid)
        standing = next((one for one in self._standings(prefix) if one[0] == list(coords)), None)
        return {
            "uid": uid,
            "servers": sorted(servers, key=lambda one: not one.get("primary")),
            "standing": standing,
            "versions": [list(point) for point in self.versions.get(uid, ())],
        }

    def server(self, peer_id: PeerID) -> Picture:
        """Return what a server's page shows beyond `state`: its experts. Raises: KeyError if it is not known."""
        peer = self.peers[peer_id]
        status = {} if peer.status is None else peer.status.experts
        uids = sorted({*peer.uids, *status}, key=split_uid)
        experts = [{"uid": uid, **(dataclasses.asdict(status[uid]) if uid in status else {})} for uid in uids]
        return {"peer_id": str(peer_id), "experts": experts}

    def called(self, peer_id: PeerID) -> str:
        """Return how people know it: by its name, if it has told one, and the beginning of its id."""
        name = self._name(peer_id)
        return f"{name} ({peer_id.short})" if name else peer_id.short

    def _name(self, peer_id: PeerID) -> str:
        peer = self.peers.get(peer_id)
        return "" if peer is None or peer.status is None else peer.status.name

    def _run_state(self) -> Picture | None:
        for prefix in self.grids:
            if (authority := self.node.trust.authority(prefix)) is None:
                continue
            manifest, survey = authority.run.manifest, self.surveys.get(prefix)
            standings = [] if survey is None else [survey.standing(uid) for uid in survey.named]
            return {
                "name": authority.run.full_name,
                "mode": authority.tag.mode,
                "num_experts": len(manifest.pattern),
                "parameters": len(manifest.pattern) * self._parameters(),
                "expert": manifest.expert,
                "sizes": dict(manifest.sizes),
                "losses": min((one.losses for one in standings), default=None),
                "at_risk": sum(one.word != "safe" for one in standings),
            }
        return None

    def _parameters(self) -> int:
        """Return the number of parameters of the largest expert, as servers state it."""
        return max((one.status.num_parameters for one in self.peers.values() if one.status is not None), default=0)

    def _grid_state(self, prefix: str, size: tuple[int, ...], hosts: dict[PeerID, int]) -> Picture:
        view = self.node.directory.live(prefix, self.grids[prefix])
        return {
            "prefix": prefix,
            "size": list(size),
            "experts": [] if view is None else self._cells(view, hosts),
            "lost": sorted(map(list, self.lost.get(prefix, ()))),
            "standings": self._standings(prefix),
        }

    def _standings(self, prefix: str) -> list[list[object]]:
        """Return per expert of a run: coordinates, led by, followed by, held by, version certified, how many more
        members may be lost with the expert surviving, and that as a word."""
        survey = self.surveys.get(prefix)
        found: list[list[object]] = []
        for uid in [] if survey is None else sorted(survey.named, key=split_uid):
            assert survey is not None
            one = survey.standing(uid)
            primary = None if one.primary is None else one.primary.short
            others = [[peer.short for peer in some] for some in (one.followers, one.holders)]
            found.append([list(split_uid(uid)[1]), primary, *others, one.version, one.losses, one.word])
        return found

    def _cells(self, view: GridView, hosts: dict[PeerID, int]) -> list[list[object]]:
        """Return per live expert: coordinates, place of its first host among the peers, replicas, version, busy, lag.

        The version is the highest of its replicas; the lag is the number of steps that the last of them is behind it.
        """
        cells = []
        for row, coords in enumerate(view.coords.tolist()):
            replicas = view.replicas_at(row)
            met = [self.peers.get(one.peer.peer_id) for one in replicas if one.peer.peer_id is not None]
            statuses = [peer.status for peer in met if peer is not None and peer.status is not None]
            uid = replicas[0].uid
            versions = [status.experts[uid].version for status in statuses if uid in status.experts]
            answering = [one for one in met if one is not None and not one.is_gone]
            first = answering[0].address if answering else replicas[0].peer
            peer_id = first.peer_id
            cells.append(
                [
                    coords,
                    hosts.get(peer_id, -1) if peer_id is not None else -1,
                    len(replicas),
                    max(versions, default=None),
                    round(met[0].busy, 3) if met and met[0] is not None else 0.0,
                    max(versions, default=0) - min(versions, default=0),
                ]
            )
        return cells

    def _peer_state(self, peer_id: PeerID, peer: Peer) -> Picture:
        connections = [one for one in self.node.endpoint.connections() if one.peer_id == peer_id]
        rtts = [one.rtt for one in connections if one.rtt is not None]
        status = peer.status
        experts = [] if status is None else list(status.experts.values())
        return {
            "peer_id": str(peer_id),
            "short": peer_id.short,
            "number": peer.number,
            "addresses": list(peer.address.addresses),
            "path": connections[0].path if connections else None,
            "rtt": round(min(rtts), 6) if rtts else None,
            "num_experts": len(peer.uids),
            **{name: round(rate, 1) for name, rate in peer.rates.items()},
            "busy": round(peer.busy, 3),
            "waiting_rows": None if status is None else status.num_waiting_rows,
            "uptime": None if status is None else status.uptime,
            "answered_ago": None if not peer.seen_at else round(asyncio.get_running_loop().time() - peer.seen_at, 1),
            "software": None if status is None else status.software,
            "name": "" if status is None else status.name,
            "hardware": "" if status is None else status.hardware,
            "memory": None if status is None else status.memory_bytes,
            "sync": None if status is None else status.sync_seconds or None,
            "failures": sum(one.num_failures for one in experts),
            "median": None if status is None else median_high([one.median_seconds for one in experts] or [0.0]),
            "slow": None if status is None else max((one.slow_seconds for one in experts), default=0.0),
            "left_ago": None if peer.left_at is None else round(asyncio.get_running_loop().time() - peer.left_at),
            "error": peer.error,
            "gone": peer.is_gone,
        }
