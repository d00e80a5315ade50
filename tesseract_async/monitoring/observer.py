"""SwarmObserver: servers and their experts, what they compute, and who joined, left and failed."""

import asyncio
import logging
import math
import time
from collections import Counter, deque
from collections.abc import Sequence

from tesseract_async.errors import (
    ConnectionLost,
    RemoteError,
    TesseractError,
    UnknownMethod,
    describe,
    printable,
    shortened,
)
from tesseract_async.experts.manifest import join_uid, split_uid
from tesseract_async.experts.pattern import ExpertPattern
from tesseract_async.experts.place_directory import fetch_places
from tesseract_async.experts.places import Survey
from tesseract_async.experts.progress import (
    HOUR,
    MERGED,
    NUM_HOURS,
    Progress,
    progress_key,
    read_progress,
    read_thanks,
)
from tesseract_async.identity import PeerID
from tesseract_async.monitoring.picture import RATES, Peer, SwarmPicture
from tesseract_async.monitoring.status import ask_status
from tesseract_async.node import TesseractNode
from tesseract_async.tasks import end, in_time
from tesseract_async.transport.base import PeerAddress

log = logging.getLogger(__name__)

NUM_CONTACTS_ASKED = 32
NUM_ASKED_AT_ONCE = 16
FIRST_READ_TIMEOUT = 2.0
"""Seconds that `look` waits for a grid that was not read yet."""
MAX_CELLS = 2**16
"""The largest size of a discovered grid, which depends on claims of strangers."""
MAX_GRIDS = 16
"""The most grids that are discovered and shown."""
MAX_TRAINERS = 64
MAX_MET = 1024
"""The most trainers whose samples are counted, those that left included."""
MAX_CURVES = 8
"""The most trainers whose loss is kept over time."""
MAX_SENTENCE = 240
"""The most characters of a line of the log, which may contain strangers' errors."""
MAX_EXPERTS = 2**14
"""The most experts whose version is kept over time."""
MAX_VERSIONS = 120
"""Points of an expert's version over time, one a minute."""
HOURS_PER_LOOK = 4
THANKS_EVERY = 10.0
"""Seconds between two reads of the trainers' thanks of this hour and the one before."""
SHOW_DEAD_FOR = 3600.0
"""Seconds that a server which left without a farewell is shown, greyed, after its manifests have expired."""


class SwarmObserver(SwarmPicture):
    """Watches grids through a node, and asks their servers for their status. Use it as an async context manager.

    Without `patterns` it shows all grids of the servers among the node's contacts: enough for small swarms.
    """

    def __init__(self, node: TesseractNode, *, patterns: Sequence[ExpertPattern] = (), period: float = 2.0) -> None:
        """`period`: seconds between two looks. Raises: ValueError if it is not positive."""
        if period <= 0:
            raise ValueError(f"the period is positive, not {period}")
        super().__init__(node)
        self.period = period
        self._thanks_read_at = -math.inf
        self._seen: dict[str, set[tuple[int, ...]]] = {}
        self._missed: set[PeerID | None] = set()
        self._num_met = 0
        for pattern in patterns:
            if self.grids.setdefault(pattern.prefix, pattern.grid_size) == pattern.grid_size:
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
        for prefix, size in self.grids.items():
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
            known = self.grids.get(prefix, size)
            if len(known) == len(size) and (prefix in self.grids or len(self.grids) < MAX_GRIDS):
                size = tuple(map(max, known, size))  # it may have grown, and a server may tell less than before
                self.grids[prefix] = size if math.prod(size) <= MAX_CELLS else known

    def _note_members(self) -> None:
        hosted: dict[PeerID, tuple[PeerAddress, set[str]]] = {}
        for prefix in self.grids:
            view = self.node.directory.live(prefix, self.grids[prefix])
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
                self._note(f"{self.called(peer_id)} {' and '.join(done)}: {len(uids)} now", "changed")
            peer.address, peer.uids = address, uids
        now = asyncio.get_running_loop().time()
        for peer_id, peer in list(self.peers.items()):
            if peer_id in hosted:
                peer.left_at = None
            elif peer.left_at is None:
                why = f": it did not answer any more ({peer.error})" if peer.error else ", and had said so"
                self._note(f"{self.called(peer_id)} left with {_experts(peer.uids)}{why}", "left")
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
            self._note(f"{self.called(peer_id)} {sentence}", kind)

    async def _read_losses(self) -> None:
        node, found, merged = self.node, dict[str, Progress](), list[Progress]()
        for prefix in self.grids:
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
        self.met |= {name: one for name, one in found.items() if name in self.met or len(self.met) < MAX_MET}

    async def _read_places(self) -> None:
        node = self.node
        for prefix in self.grids:
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
            for prefix in self.grids:
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


def _reason(error: BaseException) -> str:
    """Return in plain words why a server did not answer; the node's log has the rest."""
    if isinstance(error, RemoteError):
        return shortened(str(error))
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return "the connection was lost" if isinstance(error, ConnectionLost) else "it cannot be reached"


def _experts(uids: set[str]) -> str:
    return "1 expert" if len(uids) == 1 else f"{len(uids)} experts"
