"""Collects experts' states from a swarm at one save point: all servers write them down at once, then they are fetched.

A server takes the state between two batches after it is asked (`StateRequest.point`), so it holds every step that was
answered before. The server keeps that state on disk until it is fetched, whatever is learned meanwhile.

An expert without a primary is taken as its last primary sealed it, from all servers that have that file. No other
server's claim counts.
"""

import asyncio
import logging
import math
import os
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median_low
from typing import Final, NamedTuple, Self, TypeVar

import torch

from tesseract_async.client.experience import experience_of
from tesseract_async.errors import (
    CheckpointError,
    ExpertNotFound,
    Overloaded,
    ProtocolError,
    TesseractError,
    TooStale,
    describe,
)
from tesseract_async.experts.authority import Authority
from tesseract_async.experts.grid import ExpertReplica
from tesseract_async.experts.lineage import Lineage
from tesseract_async.experts.manifest import split_uid
from tesseract_async.experts.pattern import ExpertPattern
from tesseract_async.experts.pieces import LIST, root_of
from tesseract_async.experts.place_directory import fetch_places
from tesseract_async.experts.places import MemberRole
from tesseract_async.experts.terms import Seal
from tesseract_async.node import TesseractNode
from tesseract_async.saving.folder import SavedModel
from tesseract_async.server.checkpoint import check_state, encode_state
from tesseract_async.server.fetching import ask_piece, ask_records, fetch_sealed, fetch_state, seconds_for
from tesseract_async.server.fragments import read_fragment, read_manifest
from tesseract_async.server.other_replicas import read_replicas
from tesseract_async.shared_pieces import SharedPieces
from tesseract_async.sharing.layout import MAX_FRAGMENTS
from tesseract_async.tasks import end
from tesseract_async.transport.base import PeerAddress
from tesseract_async.wire import messages

logger = logging.getLogger(__name__)

T = TypeVar("T")

ROLES: Final = {MemberRole.PRIMARY: "primary", MemberRole.FOLLOWER: "follower", MemberRole.HOLDER: "holder"}
NUM_MARKED_AT_ONCE: Final = 64
NUM_FETCHED_AT_ONCE: Final = 4
PIECE_TIMEOUT: Final = seconds_for(2 * NUM_FETCHED_AT_ONCE)
"""Seconds that a server has for each piece of a state: it may be asked for two pieces of each of `NUM_FETCHED_AT_ONCE`
experts at the same time."""
ANSWER_TIMEOUT: Final = 60.0
"""Seconds that a server has to say which state it has."""
MAX_ASKED: Final = 64
"""Members that are asked for an expert's Seal."""
PATIENCE: Final = 600.0
"""Seconds for which overloaded servers are asked again."""
MAX_HELD_BYTES: Final = 64 << 20
"""Bytes of small states that came with the answer; beyond, they are asked for again."""
MAX_SIZE_RATIO: Final = 4
"""A state that is this many times larger than most of its grid's is not fetched: Adam's are three times the weights'.
"""
SLACK_BYTES: Final = 16 << 20
"""Bytes by which a state may be larger still, since journals count, too."""


class Origin(NamedTuple):
    """A server that says it has an expert's state."""

    peer: PeerAddress
    role: str
    """``primary``, ``follower``, or ``holder``, which has only the sealed file."""
    age: tuple[int, int] = (0, 0)
    """The epoch and number of its Seal, as far as they are known."""


@dataclass(slots=True)
class SaveReport:
    """The outcome of saving experts."""

    taken: dict[str, int] = field(default_factory=dict)
    """uid -> version of the experts that were written now."""
    kept: dict[str, int] = field(default_factory=dict)
    """uid -> version of the experts that the folder already held in this state."""
    origins: dict[str, str] = field(default_factory=dict)
    """uid -> the role of the server that gave it, for the experts that were written now."""
    failed: dict[str, BaseException] = field(default_factory=dict)
    """uid -> the last error, for the experts that no server gave. An older file stays, if there is one."""
    late: set[str] = field(default_factory=set)
    """Uids of experts whose servers had not answered when the pause ended: their states may hold later steps."""


async def find_origins(node: TesseractNode, prefix: str, grid_size: tuple[int, ...]) -> dict[str, list[Origin]]:
    """Return who has the state of each expert of a grid: primaries first, then the newest Seal, followers first.

    Raises: what the network raises.
    """
    pattern = ExpertPattern(prefix, tuple(map(range, grid_size)))
    return await _origins(node, pattern, await node.directory.read_grid(prefix, grid_size))


async def _origins(
    node: TesseractNode, pattern: ExpertPattern, hosting: Mapping[str, Sequence[ExpertReplica]]
) -> dict[str, list[Origin]]:
    """Return these servers, and in a run those that follow or hold what is in the pattern."""
    found = defaultdict[str, dict[PeerAddress, Origin]](dict)
    authority = node.trust.authority(pattern.prefix)
    for uid, replicas in hosting.items():
        for one in replicas:
            found[uid][one.peer] = Origin(one.peer, "primary" if one.primary else "follower", (one.epoch, 0))
    if authority is not None:
        places, addresses = await fetch_places(node.network, node.trust, authority, node.scope, pattern=pattern)
        for peer_id, place in places.items():
            for uid, part in place.parts.items():
                if part.has_file:
                    peer = next((one for one in found[uid] if one.peer_id == peer_id), addresses[peer_id])
                    known = found[uid].get(peer)
                    role = ROLES[part.role] if known is None else known.role
                    found[uid][peer] = Origin(peer, role, (part.epoch, part.number))

    def rank(one: Origin) -> tuple[bool, tuple[int, int], bool]:
        return one.role == "primary", one.age, one.role == "follower"

    return {uid: sorted(some.values(), key=rank, reverse=True) for uid, some in found.items() if some}


async def find_pieces(node: TesseractNode, pieces: SharedPieces, num: int | None = None) -> dict[str, list[Origin]]:
    """Return who has each of the `num` pieces of shared parameters, in their order, and each as `find_origins` does.

    `num`: by default as the first piece says. Raises: ExpertNotFound if nobody has one, outside of runs; of the first
    piece also in a run; what the network and the calls raise.
    """
    authority = node.trust.authority(pieces.prefix)
    pattern = ExpertPattern(pieces.prefix, (range(MAX_FRAGMENTS),))
    hosting = dict[str, Sequence[ExpertReplica]]()
    if num is None:
        try:
            tensors, _ = await pieces.fetch_state(0)
        except (TesseractError, TimeoutError):
            first = pieces.uid(0)
            holders = (await _origins(node, pattern, {})).get(first, [])
            if authority is None or not holders:
                raise
            seal, some = await find_seal(node, first, authority, holders)
            data = await fetch_sealed(node, first, seal, [one.peer for one in some], timeout=PIECE_TIMEOUT)
            tensors = check_state(first, data)["module"]
        num = len(read_manifest(tensors).layout.cuts)
    for uid in map(pieces.uid, range(num)):
        try:
            hosting[uid] = await pieces.find(uid)
        except ExpertNotFound:
            if authority is None:
                raise
            hosting[uid] = ()
    found = await _origins(node, pattern, hosting)
    return {uid: found.get(uid, []) for uid in hosting}


async def find_seal(
    node: TesseractNode, uid: str, authority: Authority, origins: Sequence[Origin]
) -> tuple[Seal, list[Origin]]:
    """Return the newest Seal of the line that holds, as these show it, and those that show it.

    Raises: ProtocolError if none does; what the network raises.
    """
    lineage, found = Lineage(uid, authority), list[tuple[Seal, Origin]]()
    records: dict[str, list[bytes]] = {uid: []}
    await read_replicas(node, [uid], by_shard=True, records=records)

    async def ask(origin: Origin) -> None:
        try:
            shown = await ask_records(node, uid, origin.peer, timeout=ANSWER_TIMEOUT)
        except (TesseractError, TimeoutError) as error:
            logger.info("the Seal of %s at %s: %s", uid, origin.peer.short, describe(error))
            return
        records[uid] += [blob for blob in shown if type(blob) is bytes]
        found.extend((one, origin) for one in map(lineage.read, shown) if isinstance(one, Seal))

    await asyncio.gather(*map(ask, origins[:MAX_ASKED]))
    for record in map(lineage.read, records[uid]):
        if record is not None:
            lineage.add(record, now=time.time())
    lineage.set_hosts({one.peer.peer_id: one.age[0] for one in origins if one.peer.peer_id is not None})
    seals = [(seal, origin) for seal, origin in found if lineage.is_sealed(seal)]
    if not seals:
        raise ProtocolError(f"nobody shows a state of {uid} that its last primary sealed")
    newest = max((seal for seal, _ in seals), key=lambda seal: seal.age)
    return newest, [origin for seal, origin in seals if seal.root == newest.root]


async def patiently(ask: Callable[[], Awaitable[T]]) -> T:
    """Return what `ask` gives, asking again where servers are overloaded."""
    loop = asyncio.get_running_loop()
    end = loop.time() + PATIENCE
    while True:
        try:
            return await ask()
        except Overloaded as error:
            if loop.time() + error.retry_after > end:
                raise
            await asyncio.sleep(max(0.1, error.retry_after))


def take_trunk(
    store: SavedModel,
    uids: Sequence[str],
    report: SaveReport,
    *,
    keeps: bool,
    known: Mapping[str, tuple[int, torch.Tensor]] | None = None,
) -> dict[str, torch.Tensor]:
    """Return the shared parameters by name, from the pieces that a save point has just written.

    - `uids`: all pieces, in their order. `keeps`: leave their files, from which their hosts can go on, in the folder.
    - `known`: versions and values of pieces, as they were known before. A state that is older, a follower's say, does
      not count.

    Raises: CheckpointError for pieces that nobody gave, or that do not fit together.
    """
    if failed := [f"{uid} ({describe(report.failed[uid])})" for uid in uids if uid in report.failed]:
        raise CheckpointError(f"the shared parameters could not be saved: {', '.join(failed[:3])}")
    states = [store.state(uid) for uid in uids]
    try:
        manifest = read_manifest(states[0]["module"])
        if len(manifest.layout.cuts) != len(uids):
            raise ProtocolError("the shared parameters have another number of pieces now")
        pieces = [
            read_fragment(manifest.part(number), state["module"], state["version"])[0]
            for number, state in enumerate(states)
        ]
    except ProtocolError as error:
        raise CheckpointError(f"the shared parameters could not be saved: {describe(error)}") from error
    values = list[torch.Tensor]()
    for uid, piece in zip(uids, pieces, strict=True):
        version, value = (known or {}).get(uid, (-1, piece.anchor))
        values.append(value if version > piece.version else piece.merged())
        if not keeps:
            store.experts.pop(uid)
            report.taken.pop(uid, None)
            report.kept.pop(uid, None)
            report.origins.pop(uid, None)
    return manifest.layout.tensors(values)


class SavePoint:
    """The states of some experts at one moment."""

    def __init__(self, node: TesseractNode, origins: Mapping[str, Sequence[Origin]], *, is_whole: bool = False) -> None:
        """`origins`: uid -> who has it, the preferred one first. `is_whole`: with optimizers and journals, which takes
        the role ``host`` in a run."""
        self._node, self._origins = node, origins
        self._is_whole, self._point = is_whole, os.urandom(16)
        self._marked: dict[str, tuple[Origin, messages.StateReply, bytes | memoryview | None]] = {}
        self._sealed: dict[str, tuple[Seal, list[Origin]]] = {}
        self._failed: dict[str, BaseException] = {}
        self._late: set[str] = set()
        self._num_held = 0
        self._marking: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await end(*self._marking)

    async def mark(self, *, within: float = math.inf) -> None:
        """Have every server write down its experts' states now. Training that pauses meanwhile pauses for `within`
        seconds at most: those that have not answered by then are `SaveReport.late`."""
        gate, lineages = asyncio.Semaphore(NUM_MARKED_AT_ONCE), experience_of(self._node).lineages
        num_asked = Counter(origin.peer for origins in self._origins.values() for origin in origins)

        async def mark(uid: str) -> None:
            async with gate:
                error: BaseException = ProtocolError(f"nobody has a state of {uid}")
                authority = self._node.trust.authority(split_uid(uid)[0])
                for origin in self._origins[uid]:
                    if authority is not None and origin.role != "primary":
                        continue
                    # small states come with the answers, and share the server's line
                    timeout = seconds_for(min(NUM_MARKED_AT_ONCE, num_asked[origin.peer]))
                    try:
                        head, data = await patiently(partial(self._ask, uid, origin, timeout))
                        epoch, version = lineages.newest(uid)
                        if origin.age[0] <= epoch and head.version < version:
                            raise TooStale(f"{uid}: a state of version {head.version}, after {version} was answered")
                        is_all = len(data) == head.size
                        if is_all and root_of(data) != head.root:
                            raise ProtocolError(f"{uid}: another state than was named")
                        is_held = is_all and self._num_held < MAX_HELD_BYTES
                        self._num_held += len(data) if is_held else 0
                        self._marked[uid] = origin, head, data if is_held else None
                        return
                    except (TesseractError, TimeoutError) as caught:
                        logger.warning("%s at %s: %s", uid, origin.peer.short, describe(caught))
                        error = caught
                others = [one for one in self._origins[uid] if one.role != "primary"]
                if authority is not None and others:
                    try:
                        self._sealed[uid] = await find_seal(self._node, uid, authority, others)
                        return
                    except (TesseractError, TimeoutError) as caught:
                        error = caught
                self._failed[uid] = error

        self._marking = [asyncio.create_task(mark(uid), name="saving: mark") for uid in sorted(self._origins)]
        if self._marking:
            await asyncio.wait(self._marking, timeout=None if within == math.inf else within)
        self._late = {uid for uid, task in zip(sorted(self._origins), self._marking, strict=True) if not task.done()}

    async def _ask(self, uid: str, origin: Origin, timeout: float) -> tuple[messages.StateReply, memoryview]:
        request = messages.StateRequest(uid, not self._is_whole, 0, messages.NO_ROOT, LIST, self._point)
        head, data = await ask_piece(self._node, origin.peer, request, timeout=timeout)
        if head.size == 0:
            raise ProtocolError(f"{origin.peer.short} does not have the state of {uid}")
        return head, data

    async def fetch(self, store: SavedModel, *, progress: Callable[[str], None] = lambda uid: None) -> SaveReport:
        """Write what was marked into the folder; the index is the caller's to write.

        `progress` is called with each uid that is done or failed. Raises: OSError if the folder can't be written.
        """
        await asyncio.gather(*self._marking)
        report = SaveReport(failed=dict(self._failed), late=self._late - self._failed.keys())
        gate, limits = asyncio.Semaphore(NUM_FETCHED_AT_ONCE), self._limits()

        async def take(uid: str) -> None:
            if uid in self._sealed:
                seal, origins = self._sealed.pop(uid)
                data, origin = await patiently(lambda: self._fetch_sealed(uid, seal, origins)), origins[0]
                root = root_of(data)
            else:
                origin, head, marked = self._marked.pop(uid)
                data, root = marked if marked is not None else b"", head.root
                if head.size > limits[split_uid(uid)[0]]:
                    raise ProtocolError(f"{uid}: a state of {head.size} bytes, many times larger than most others")
            known = store.experts.get(uid)
            if known is not None and known.root == root.hex() and (store.path / known.file).exists():
                report.kept[uid] = known.version
                return
            if not data:
                fetched = await patiently(lambda: self._fetch(uid, origin))
                if fetched is None or root_of(fetched) != root:
                    raise ProtocolError(f"{origin.peer.short} does not have {uid} as at the save point any more")
                data = fetched
            store.put_expert(uid, data, root, origin.role, is_whole=self._is_whole)
            report.taken[uid], report.origins[uid] = store.experts[uid].version, origin.role

        async def one(uid: str) -> None:
            async with gate:
                if uid not in self._failed:
                    try:
                        await take(uid)
                    except (TesseractError, TimeoutError) as caught:
                        logger.warning("%s: %s", uid, describe(caught))
                        report.failed[uid] = caught
            progress(uid)

        async with asyncio.TaskGroup() as group:
            for uid in sorted(self._origins):
                group.create_task(one(uid))
        return report

    def _limits(self) -> dict[str, int]:
        """The most bytes of a state, by prefix: a server that lies costs little, whatever it says."""
        sizes = defaultdict[str, list[int]](list)
        for uid, (_, head, _) in self._marked.items():
            sizes[split_uid(uid)[0]].append(head.size)
        return {prefix: MAX_SIZE_RATIO * median_low(some) + SLACK_BYTES for prefix, some in sizes.items()}

    async def _fetch(self, uid: str, origin: Origin) -> bytes | memoryview | None:
        return await fetch_state(
            self._node, origin.peer, uid, weights_only=not self._is_whole, point=self._point, timeout=PIECE_TIMEOUT
        )

    async def _fetch_sealed(self, uid: str, seal: Seal, origins: Sequence[Origin]) -> bytes | memoryview:
        peers = [one.peer for one in origins]
        data = await fetch_sealed(self._node, uid, seal, peers, timeout=PIECE_TIMEOUT)
        if self._is_whole:
            return data
        state = check_state(uid, data)
        return b"".join(encode_state({"module": state["module"], "version": state["version"]}))
