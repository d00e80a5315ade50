"""SwarmObserver: servers and their experts, what they compute, and who joined, left and failed."""

import asyncio
import dataclasses
import logging
import math
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median_high
from typing import Any

from tesseract_async.errors import (
    ConnectionLost,
    RemoteError,
    TesseractError,
    UnknownMethod,
    describe,
    printable,
    shortened,
)
from tesseract_async.experts.grid import GridView
from tesseract_async.experts.manifest import join_uid, split_uid
from tesseract_async.experts.pattern import ExpertPattern
from tesseract_async.experts.place_directory import fetch_places
from tesseract_async.experts.places import Survey
from tesseract_async.experts.progress import (
    HOUR,
    MERGED,
    NUM_HOURS,
    Progress,
    Thank,
    progress_key,
    read_progress,
    read_thanks,
)
from tesseract_async.identity import PeerID
from tesseract_async.monitoring.history import History
from tesseract_async.monitoring.status import NodeStatus, ask_status
from tesseract_async.node import TesseractNode
from tesseract_async.tasks import end, in_time
from tesseract_async.transport.base import PeerAddress

log = logging.getLogger(__name__)

Picture = dict[str, Any]
"""A swarm, or a part of it, as JSON holds it."""

RATES = ("calls_per_second", "rows_per_second", "steps_per_second")
NUM_CONTACTS_ASKED = 32
NUM_ASKED_AT_ONCE = 16
LOG_LENGTH = 200
FIRST_READ_TIMEOUT = 2.0
"""Seconds that `look` waits for a grid that was not read yet."""
MAX_CELLS = 2**16
"""Largest size of a discovered grid, which follows from claims of strangers."""
MAX_GRIDS = 16
"""Grids that are discovered and shown, at most."""
MAX_TRAINERS = 64
MAX_MET = 1024
"""Trainers whose samples are counted, those that left included."""
MAX_CONTRIBUTORS = 100
MAX_CURVES = 8
"""Trainers whose loss is kept over time."""
MAX_SENTENCE = 240
"""Characters of a line of the log, which may contain strangers' errors."""
MAX_EXPERTS = 2**14
"""Experts whose version is kept over time."""
MAX_VERSIONS = 120
"""Points of an expert's version over time, one a minute."""
HOURS_PER_LOOK = 4
THANKS_EVERY = 10.0
"""Seconds between two reads of what trainers thank for in this hour and the one before."""
SHOW_DEAD_FOR = 3600.0
"""Seconds that a server which left without a farewell is shown, greyed, after its manifests have expired."""


@dataclass(slots=True)
class Peer:
    """A node that hosts experts, or another one that was met."""

    address: PeerAddress
    number: int = 0
    """In the order of meeting, never given twice: it chooses the color."""
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
    """True until the log has said that it joined: it is asked before, for its name."""


class SwarmObserver:
    """Watches grids through a node, and asks their servers for their status. Use it as an async context manager.

    Without `patterns` it shows all grids of the servers among the node's contacts: enough for small swarms.
    """

    def __init__(self, node: TesseractNode, *, patterns: Sequence[ExpertPattern] = (), period: float = 2.0) -> None:
        """`period`: seconds between two looks. Raises: ValueError if it is not positive."""
        if period <= 0:
            raise ValueError(f"the period is positive, not {period}")
        self.node = node
        self.period = period
        self.peers: dict[PeerID, Peer] = {}
        self.log: deque[tuple[float, str, str]] = deque(maxlen=LOG_LENGTH)
        """(wall-clock time, sentence, kind): kinds are joined, left, failed and changed."""
        self.num_log_lines = 0
        """Lines ever written; `log` holds the last of them."""
        self.history = History()
        self.losses: dict[str, Progress] = {}
        """Trainers' progress (`publish_progress`)."""
        self.merged: Progress | None = None
        """The progress of the parameters that trainers share, where one of them tells it."""
        self.lost: dict[str, set[tuple[int, ...]]] = {}
        """prefix -> coordinates of experts that were seen before and are not hosted now."""
        self.surveys: dict[str, Survey] = {}
        """prefix -> who leads, follows and holds its experts, by the words of all members; of grids in a run."""
        self.thanks: dict[tuple[str, int], list[Thank]] = {}
        """(prefix, hour) -> what trainers received."""
        self._met: dict[str, Progress] = {}  # the latest word of every trainer, also of those that left
        self.versions: dict[str, deque[tuple[int, int]]] = {}
        """uid -> (wall-clock time, version), a minute apart."""
        self._thanks_read_at = -math.inf
        self._seen: dict[str, set[tuple[int, ...]]] = {}
        self._missed: set[PeerID | None] = set()
        self._num_met = 0
        self._grids: dict[str, tuple[int, ...]] = {}
        for pattern in patterns:
            if self._grids.setdefault(pattern.prefix, pattern.grid_size) == pattern.grid_size:
                node.directory.watch(pattern.prefix, pattern.grid_size)
        self._discover = not patterns
        self._task: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self.num_looks = 0

    async def __aenter__(self) -> "SwarmObserver":
        self._task = asyncio.create_task(self._run(), name="monitoring: observe")
        return self

    async def __aexit__(self, *_: object) -> None:
        await end(self._task)

    async def wait_changed(self) -> None:
        await self._changed.wait()

    async def look(self) -> None:
        """Look once, in addition to the periodic looks. Takes a period at most, and some seconds for a new grid."""
        if self._discover:
            await self._meet_contacts()
        for prefix, size in self._grids.items():
            if self.node.directory.live(prefix, size) is None:
                self.node.directory.watch(prefix, size)
                await in_time(self.node.directory.wait_warm(prefix), max(self.period, FIRST_READ_TIMEOUT))
            else:
                await self.node.directory.refresh(prefix)
        self._note_members()
        limit = asyncio.Semaphore(NUM_ASKED_AT_ONCE)
        async with asyncio.TaskGroup() as group:
            for peer in self.peers.values():
                if peer.uids:
                    group.create_task(self._ask(peer, limit))
            group.create_task(self._read_losses())
            group.create_task(self._read_places())
            # what a period has time for: the rest follows at later looks, where dead nodes make reads slow
            group.create_task(in_time(self.read_thanks(), self.period))
        self._remember()
        self.num_looks += 1
        self._changed.set()
        self._changed = asyncio.Event()

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
            "grids": [self._grid_state(prefix, size, hosts) for prefix, size in self._grids.items()],
            "peers": [self._peer_state(peer_id, peer) for peer_id, peer in self.peers.items()],
            "history": self.history.since({}),
            "contributors": self.contributors(),
            "losses": {name: list(value) for name, value in self.losses.items()},
            "seen": self._seen_by_trainers(),
            "log": [list(line) for line in self.log],
        }

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            started = loop.time()
            try:
                await self.look()
            except* (TesseractError, TimeoutError, OSError) as errors:
                log.warning("could not look at the swarm: %s", describe(errors.exceptions[0]))
            await asyncio.sleep(max(0.05, started + self.period - loop.time()))

    async def _meet_contacts(self) -> None:
        limit = asyncio.Semaphore(NUM_ASKED_AT_ONCE)
        contacts = self.node.network.public_contacts(NUM_CONTACTS_ASKED)
        strangers = [Peer(one) for one in contacts if one.peer_id and self.node.trust.may_be_read(one.peer_id)]
        async with asyncio.TaskGroup() as group:
            for stranger in strangers:
                group.create_task(self._ask(stranger, limit))
        sizes: dict[str, tuple[int, ...]] = {}
        for stranger in strangers:
            for uid in stranger.status.experts if stranger.status is not None else ():
                prefix, coords = split_uid(uid)
                known = sizes.get(prefix, (0,) * len(coords))
                if len(known) == len(coords):
                    size = tuple(max(a, b + 1) for a, b in zip(known, coords, strict=True))
                    if math.prod(size) <= MAX_CELLS:
                        sizes[prefix] = size
        for prefix, size in sizes.items():
            known = self._grids.get(prefix, size)
            if len(known) == len(size) and (prefix in self._grids or len(self._grids) < MAX_GRIDS):
                size = tuple(map(max, known, size))  # it may have grown, and a server may tell less than before
                self._grids[prefix] = size if math.prod(size) <= MAX_CELLS else known

    def _note_members(self) -> None:
        hosted: dict[PeerID, tuple[PeerAddress, set[str]]] = {}
        for prefix in self._grids:
            view = self.node.directory.live(prefix, self._grids[prefix])
            if view is None:
                continue
            live = set(map(tuple, view.coords.tolist()))
            seen = self._seen.setdefault(prefix, set())
            seen |= live
            self.lost[prefix] = seen - live
            for row in range(len(view)):
                for replica in view.replicas_at(row):
                    if replica.peer.peer_id is not None:
                        hosted.setdefault(replica.peer.peer_id, (replica.peer, set()))[1].add(replica.uid)
        for peer_id, (address, uids) in hosted.items():
            peer = self.peers.get(peer_id)
            if peer is None:
                peer = self.peers[peer_id] = Peer(address, number=self._num_met)
                self._num_met += 1
            if not peer.uids:
                peer.is_new = True
            elif uids != peer.uids:
                taken, given = uids - peer.uids, peer.uids - uids
                done = [f"took {_experts(taken)}"] if taken else []
                done += [f"gave {_experts(given)} up"] if given else []
                self._note(f"{self._called(peer_id)} {' and '.join(done)}: {len(uids)} now", "changed")
            peer.address, peer.uids = address, uids
        now = asyncio.get_running_loop().time()
        for peer_id, peer in list(self.peers.items()):
            if peer_id in hosted:
                peer.left_at = None
            elif peer.left_at is None:
                why = f": it did not answer any more ({peer.error})" if peer.error else ", and had said so"
                self._note(f"{self._called(peer_id)} left with {_experts(peer.uids)}{why}", "left")
                peer.left_at, peer.uids = now, set()
                if not peer.error:
                    del self.peers[peer_id]
            elif now - peer.left_at > SHOW_DEAD_FOR:
                del self.peers[peer_id]

    async def _ask(self, peer: Peer, limit: asyncio.Semaphore) -> None:
        loop = asyncio.get_running_loop()
        try:
            async with limit:
                status = await ask_status(self.node, peer.address, timeout=max(0.5, self.period))
        except UnknownMethod:  # a program's own node, without a StatusService
            self._answered(peer)
            return
        except (TesseractError, TimeoutError) as error:
            sentence = _reason(error)
            log.info("%s did not tell its status: %s", peer.address, describe(error))
            peer.is_gone = not isinstance(error, RemoteError)
            if peer.is_new:
                self._tell(peer, f"joined with {_experts(peer.uids)}, and does not answer: {sentence}", "failed")
            elif peer.error is None:
                self._tell(peer, f"does not answer: {sentence}", "failed")
            peer.error, peer.is_new = sentence, False
            peer.rates, peer.busy = dict.fromkeys(RATES, 0.0), 0.0
            return
        now, before = loop.time(), peer.status
        if before is not None and now > peer.seen_at and status.uptime >= before.uptime:
            seconds = now - peer.seen_at
            both = status.experts.keys() & before.experts.keys()
            steps = sum(status.experts[uid].version - before.experts[uid].version for uid in both)
            done = (status.num_calls - before.num_calls, status.num_rows - before.num_rows, steps)
            peer.rates = {name: max(0, amount) / seconds for name, amount in zip(RATES, done, strict=True)}
            peer.busy = max(0.0, status.busy_seconds - before.busy_seconds) / seconds
        peer.status = status
        self._answered(peer)

    def _answered(self, peer: Peer) -> None:
        if peer.is_new:
            self._tell(peer, f"joined with {_experts(peer.uids)}", "joined")
        elif peer.error is not None:
            self._tell(peer, "answers again", "joined")
        peer.seen_at, peer.error = asyncio.get_running_loop().time(), None
        peer.is_gone = peer.is_new = False

    def _tell(self, peer: Peer, sentence: str, kind: str) -> None:
        """Note it of a server, which nodes that host nothing are not."""
        if peer.uids and (peer_id := peer.address.peer_id) is not None:
            self._note(f"{self._called(peer_id)} {sentence}", kind)

    async def _read_losses(self) -> None:
        node, found, merged = self.node, dict[str, Progress](), list[Progress]()
        for prefix in self._grids:
            authority = node.trust.authority(prefix)
            for entry in await node.network.get_entries(progress_key(prefix)):
                # a trainer of a run shows its grant where it thanks: it is shown once that was read
                may = authority is None or authority.may(entry.owner, "train", now=None)
                may = may and node.policy.allows(entry.owner, "train")
                if (progress := read_progress(entry.value) if may else None) is None or len(found) >= MAX_TRAINERS:
                    node.metrics.count("progress_dropped")
                elif entry.subkey == MERGED:
                    merged.append(progress)
                else:
                    found[f"{entry.owner.short} {shortened(printable(entry.subkey or ''), 48)}".strip()] = progress
        self.losses, self.merged = found, max(merged, default=None)
        self._met |= {name: one for name, one in found.items() if name in self._met or len(self._met) < MAX_MET}

    def _seen_by_trainers(self) -> dict[str, int]:
        """Return how many samples, or tokens, the trainers that were met have seen."""
        seen: Counter[str] = Counter()
        for one in self._met.values():
            seen[one.unit] += one.seen
        return dict(seen)

    async def _read_places(self) -> None:
        node = self.node
        for prefix in self._grids:
            if (authority := node.trust.authority(prefix)) is not None:
                places, _ = await fetch_places(node.network, node.trust, authority, node.scope)
                self.surveys[prefix] = survey = Survey(places)
                # nor does any member name those that are lost for good
                lost = {join_uid(prefix, coords) for coords in self.lost.get(prefix, ())}
                survey.named |= {uid for uid in lost if uid in authority.run.manifest.pattern}
                primaries = Counter(survey.standing(uid).primary for uid in survey.named)
                for peer_id, number in primaries.items():
                    if peer_id is not None and peer_id not in self.peers and peer_id not in self._missed:
                        self._missed.add(peer_id)
                        count = "an expert" if number == 1 else f"{number} experts"
                        self._note(
                            f"{peer_id.short} should lead {count}, and is not found: it died, or begins", "failed"
                        )
                self._missed &= primaries.keys()

    async def read_thanks(self) -> None:
        """Read this hour's and the last one's now and then, and some of the hours before until all are known."""
        loop, hour = asyncio.get_running_loop(), int(time.time()) // HOUR
        if is_due := loop.time() - self._thanks_read_at >= THANKS_EVERY:
            self._thanks_read_at = loop.time()
        async with asyncio.TaskGroup() as group:
            for prefix in self._grids:
                missing = [one for one in range(hour, hour - NUM_HOURS, -1) if (prefix, one) not in self.thanks]
                for one in {*missing[:HOURS_PER_LOOK], *((hour, hour - 1) if is_due else ())}:
                    group.create_task(self._read_hour(prefix, one))
        for key in [key for key in self.thanks if key[1] <= hour - NUM_HOURS]:
            del self.thanks[key]

    async def _read_hour(self, prefix: str, hour: int) -> None:
        node, authority = self.node, self.node.trust.authority(prefix)
        self.thanks[prefix, hour] = await read_thanks(node.network, prefix, hour, node.policy, authority=authority)

    def _remember(self) -> None:
        peers = [peer for peer in self.peers.values() if peer.uids and not peer.is_gone]
        losses = [one.loss for one in self.losses.values()]
        point = {
            "time": time.time(),
            "experts": float(len(set().union(*(peer.uids for peer in peers)))),
            "servers": float(len(peers)),
            **{name: sum(peer.rates[name] for peer in peers) for name in RATES},
        }
        if losses:
            point["loss"] = sum(losses) / len(losses)
            point |= {f"loss {name}": one.loss for name, one in list(self.losses.items())[:MAX_CURVES]}
        if self.merged is not None:
            point["merged"] = self.merged.loss
        self.history.add({name: round(value, 4) for name, value in point.items()})
        now = int(time.time())
        for peer in peers:
            for uid, one in peer.status.experts.items() if peer.status is not None else ():
                if uid not in peer.uids or not one.primary:
                    continue
                if uid not in self.versions and len(self.versions) >= MAX_EXPERTS:
                    continue
                known = self.versions.setdefault(uid, deque(maxlen=MAX_VERSIONS))
                if not known or now - known[-1][0] >= 60:
                    known.append((now, one.version))

    def _note(self, sentence: str, kind: str) -> None:
        sentence = sentence if len(sentence) <= MAX_SENTENCE else sentence[: MAX_SENTENCE - 1] + "…"
        self.log.append((round(time.time(), 3), sentence, kind))
        self.num_log_lines += 1
        log.info("%s", sentence)

    def contributors(self) -> list[Picture]:
        """Return who gave how much in the last day, by the signed words of trainers: the first of them."""
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
        """Return what its page shows: who serves it, how well, and its version over time."""
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
        """Return what its page shows beyond `state`: its experts. Raises: KeyError if it is not known."""
        peer = self.peers[peer_id]
        status = {} if peer.status is None else peer.status.experts
        uids = sorted({*peer.uids, *status}, key=split_uid)
        experts = [{"uid": uid, **(dataclasses.asdict(status[uid]) if uid in status else {})} for uid in uids]
        return {"peer_id": str(peer_id), "experts": experts}

    def _called(self, peer_id: PeerID) -> str:
        """Return how people know it: by its name, if it has told one, and the beginning of its id."""
        name = self._name(peer_id)
        return f"{name} ({peer_id.short})" if name else peer_id.short

    def _name(self, peer_id: PeerID) -> str:
        peer = self.peers.get(peer_id)
        return "" if peer is None or peer.status is None else peer.status.name

    def _run_state(self) -> Picture | None:
        for prefix in self._grids:
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
        """Return the parameters of the largest expert, by the words of servers."""
        return max((one.status.num_parameters for one in self.peers.values() if one.status is not None), default=0)

    def _grid_state(self, prefix: str, size: tuple[int, ...], hosts: dict[PeerID, int]) -> Picture:
        view = self.node.directory.live(prefix, self._grids[prefix])
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


def _reason(error: BaseException) -> str:
    """Return in plain words why a server did not answer; the node's log has the rest."""
    if isinstance(error, RemoteError):
        return shortened(str(error))
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return "the connection was lost" if isinstance(error, ConnectionLost) else "it cannot be reached"


def _experts(uids: set[str]) -> str:
    return "1 expert" if len(uids) == 1 else f"{len(uids)} experts"
