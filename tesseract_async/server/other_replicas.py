"""The replicas of a server's experts at other servers: who hosts them, their records, whether their claims count, and
their states."""

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Final

from tesseract_async.errors import (
    CheckpointError,
    NotAllowed,
    PeerUnreachable,
    ProtocolError,
    TesseractError,
    describe,
)
from tesseract_async.experts.claiming import GRANT_SUBKEY
from tesseract_async.experts.directory import read_claims
from tesseract_async.experts.grid import ExpertReplica, rank_replicas
from tesseract_async.experts.manifest import MAGIC, split_uid
from tesseract_async.experts.tenure_words import MAX_PAST
from tesseract_async.identity import PeerID
from tesseract_async.network.address_scope import is_near
from tesseract_async.network.entries import Entries, Entry
from tesseract_async.node import TesseractNode
from tesseract_async.runtime.backend import ExpertBackend
from tesseract_async.runtime.states import StateDict
from tesseract_async.server.checkpoint import check_state, difference, largest_state
from tesseract_async.server.fetching import fetch_state
from tesseract_async.server.state_transfer import MAX_COPIES_BYTES
from tesseract_async.tasks import end
from tesseract_async.transport.base import PeerAddress, split_host_port
from tesseract_async.wire import messages
from tesseract_async.wire import tensors as wire

logger = logging.getLogger(__name__)

MAX_SOURCES: Final = 4
"""Servers that a newcomer asks for an expert's state, one after the other."""
MAX_SHARDS_READ: Final = 16
"""Shards of a grid that are read one by one; for more, the whole grid is read instead."""
NUM_AT_ONCE: Final = 4
"""The number of experts that are dealt with at the same time."""
LONGEST_SUBKEY: Final = 120
wall_clock: Final = time.time
"""Seconds since 1970, which may jump: for the times in manifests and records, and for nothing else."""
SAME_KIND: Final = "start this server with the same --expert-class and --size"


@dataclass(frozen=True, slots=True)
class ReplicaSettings:
    """Settings that say how the replicas of one expert keep in step. Times are seconds."""

    sync_every: float = 30.0
    """Period at which a follower pulls the primary's state: shorter loses fewer steps, and moves more bytes."""
    check_every: float = 5.0
    """Period at which roles are looked at: shorter notices a dead primary sooner, and asks more."""
    lease: float = 30.0
    """A primary that answers nobody for this long is replaced; one that stood still for this long asks who is primary
    now."""
    call_timeout: float = 10.0
    """Limit for a question to another replica, for each piece of a state, and for asking the network who hosts what; a
    fifth of it for the question whether a replica is there. Slow links need more."""
    max_copies_bytes: int = MAX_COPIES_BYTES
    """Copies of states that are kept for transfers under way: less where memory is scarce."""

    def __post_init__(self) -> None:
        if min(self.sync_every, self.check_every, self.lease) <= 0:
            raise ValueError("sync_every, check_every and lease are more than 0")


DEFAULT_SETTINGS: Final = ReplicaSettings()


class ReplicaMismatch(ValueError):
    """An expert that this server would host is trained elsewhere as another kind of expert; the message names both."""


def owner_of(replica: ExpertReplica) -> PeerID:
    assert replica.peer.peer_id is not None, "manifests are read with their owners"
    return replica.peer.peer_id


async def read_replicas(
    node: TesseractNode,
    uids: Iterable[str],
    *,
    by_shard: bool = False,
    records: Mapping[str, list[bytes]] | None = None,
) -> dict[str, list[ExpertReplica]]:
    """Return who else hosts these, by what the network says now: uid -> replicas, the primary first.

    Unless `by_shard`, more than lie in `MAX_SHARDS_READ` shards are read from their grid. To the lists in `records` are
    added the experts' Terms and Seals, unchecked, of servers that may host them.
    """
    by_key: defaultdict[str, list[str]] = defaultdict(list)
    by_prefix: defaultdict[str, list[str]] = defaultdict(list)
    for uid in uids:
        by_key[node.trust.shard_key(uid)].append(uid)
        by_prefix[split_uid(uid)[0]].append(uid)
    if len(by_key) > MAX_SHARDS_READ and not by_shard:
        by_key = defaultdict(list, {node.trust.grid_key(prefix): some for prefix, some in by_prefix.items()})
    subkeys = {record_subkey(uid, number): uid for uid in records or () for number in range(2 + MAX_PAST)}
    found: dict[str, list[ExpertReplica]] = {}

    def dropped(entry: Entry, error: ProtocolError) -> None:
        logger.debug("dropped a manifest of %s: %s", entry.owner.short, error)

    async def read(key: str, some: list[str]) -> None:
        entries = await node.network.get_entries(key)
        if records is not None:
            _take_records(node, entries, subkeys, records)
        others = (entry for entry in entries if entry.owner != node.peer_id)
        manifests = [one for one in others if type(one.value) is bytes and one.value.startswith(MAGIC)]
        prefix, _ = split_uid(some[0])  # a key is of one grid
        claims = await read_claims(
            manifests, prefix=prefix, now=wall_clock(), dropped=dropped, trust=node.trust, scope=node.scope
        )
        for uid in some:
            _, coords = split_uid(uid)
            found[uid] = rank_replicas(claim.replica(prefix, row) for claim in claims for row in claim.rows_of(coords))

    # at once: where nobody answers, each takes as long as the network waits
    tasks = [asyncio.create_task(read(key, some)) for key, some in by_key.items()]
    try:
        await asyncio.gather(*tasks)
    finally:
        await end(*tasks)
    return found


def _take_records(
    node: TesseractNode, entries: Entries, subkeys: Mapping[str, str], records: Mapping[str, list[bytes]]
) -> None:
    for entry in entries:
        if entry.subkey == GRANT_SUBKEY and type(entry.value) is bytes:
            node.trust.introduced(entry.owner, [entry.value])
    for entry in entries:
        uid = subkeys.get(entry.subkey or "")
        if uid is None or entry.expiration <= wall_clock() or type(entry.value) is not bytes:
            continue
        # what others store costs no signature check
        if not entry.value.startswith(MAGIC) and node.trust.may_host(entry.owner, uid):
            records[uid].append(entry.value)


def record_subkey(uid: str, number: int) -> str:
    """Return the subkey of an expert's Term (0), Seal (1), or of what led there (2 and more)."""
    return f"{'tsabcd'[number]}.{uid}"[:LONGEST_SUBKEY]


def may_follow(node: TesseractNode, replica: ExpertReplica) -> bool:
    """Return whether this node takes states from that replica, and gives way to it, where names are bare.

    It does for those on its allow-list, if it has one; else for machines on its own network only: on public addresses
    anybody may claim a bare name.
    """
    if node.policy.hosts is not None:
        return True  # others' manifests are not even read
    return bool(replica.peer.addresses) and all(
        is_near(split_host_port(address)[0]) for address in replica.peer.addresses
    )


def check_path(node: TesseractNode, replica: ExpertReplica) -> None:
    """Refuse a peer that names near addresses, but is connected from elsewhere, or by a relay.

    Raises: PeerUnreachable.
    """
    peer = replica.peer
    paths = [one.path for one in node.endpoint.connections() if one.peer_id == peer.peer_id]
    if node.policy.hosts is None and (far := [path for path in paths if not is_near_path(path)]):
        raise PeerUnreachable(peer.short, {far[0]: NotAllowed("not on this node's own network")})


def is_near_path(path: str) -> bool:
    """Return whether a connection comes directly from a machine on this node's own network."""
    kind, _, address = path.partition(" ")
    return kind == "tcp" and bool(address) and is_near(split_host_port(address)[0])


async def ask_info(node: TesseractNode, replica: ExpertReplica, timeout: float) -> messages.ExpertInfo | None:
    try:
        async with asyncio.timeout(timeout):
            body = messages.encode(messages.InfoRequest(replica.uid))
            reply = await node.call_expert(replica.peer, messages.INFO, body, timeout=timeout, idempotent=True)
        check_path(node, replica)
        return messages.decode(messages.ExpertInfo, reply.body)
    except (TesseractError, TimeoutError) as error:
        logger.info("%s at %s does not answer: %s", replica.uid, replica.peer.short, describe(error))
        return None


async def fetch_fitting(
    node: TesseractNode,
    peer: PeerAddress,
    uid: str,
    backend: ExpertBackend,
    *,
    min_version: int = 0,
    timeout: float,
    aside: Callable[[Callable[[], StateDict]], Awaitable[StateDict]] | None = None,
) -> tuple[bytes | memoryview, StateDict] | None:
    """Return the file of an expert's newest state at a server, and the state in it; None before `min_version`.

    `aside` runs the checks, here by default. Raises: as `check_fitting`, and what the call raises.
    """
    limit = largest_state(backend)
    file = await fetch_state(node, peer, uid, min_version=min_version, max_bytes=limit, timeout=timeout)
    if file is None:
        return None
    check = partial(check_fitting, uid, backend, file)
    return file, check() if aside is None else await aside(check)


def check_fitting(uid: str, backend: ExpertBackend, file: bytes | memoryview) -> StateDict:
    """Return the state in a stranger's file.

    Raises: CheckpointError if the weights are not this expert's; ProtocolError for what is no state.
    """
    state = check_state(uid, file)
    if (wrong := difference(uid, backend, state)) is not None:
        raise CheckpointError(wrong)
    return state


async def adopt_states(
    node: TesseractNode, backends: dict[str, ExpertBackend], *, settings: ReplicaSettings = DEFAULT_SETTINGS
) -> dict[str, PeerID | None]:
    """Load the state of each expert that another server trains already; return those, which this one will follow, each
    with the server whose state it has now (None in a run, where that comes later).

    For backends that no server has been given yet. Where nobody gives the state, this server begins by itself: the
    others may be gone (or be this very server, before it was killed).

    Raises: ReplicaMismatch if the expert is something else there.
    """
    # experts of a run are followed by their records (`server.tenures`)
    followed: dict[str, PeerID | None]
    followed = {uid: None for uid in backends if node.trust.authority(split_uid(uid)[0]) is not None}
    gate = asyncio.Semaphore(NUM_AT_ONCE)

    async def take(uid: str, replica: ExpertReplica) -> bool:
        backend = backends[uid]
        check_path(node, replica)
        try:
            found = await fetch_fitting(node, replica.peer, uid, backend, timeout=settings.call_timeout)
        except CheckpointError as wrong:
            if replica.primary:
                raise ReplicaMismatch(f"{wrong}: {SAME_KIND} as its primary {replica.peer.peer_id}") from None
            return False
        if found is not None:
            backend.name = uid
            backend.load_state(found[1])
        return found is not None

    async def adopt(uid: str, replicas: list[ExpertReplica]) -> None:
        async with gate:
            infos = await asyncio.gather(*(ask_info(node, one, settings.call_timeout) for one in replicas))
            # the silent ones cost one timeout together; of the others the primary comes first
            for replica, info in [(r, i) for r, i in zip(replicas, infos, strict=True) if i is not None][:MAX_SOURCES]:
                if replica.primary:
                    _check_schemas(uid, backends[uid], info, replica)
                try:
                    if await take(uid, replica):
                        followed[uid] = owner_of(replica)
                        return
                except ReplicaMismatch:
                    raise
                except (TesseractError, TimeoutError, RuntimeError, ValueError, LookupError, TypeError) as error:
                    logger.warning("the state of %s at %s: %s", uid, replica.peer.short, describe(error))

    replicas = await read_replicas(node, backends.keys() - followed.keys())
    try:
        async with asyncio.TaskGroup() as group:
            for uid, some in replicas.items():
                if some := [one for one in some if may_follow(node, one)]:
                    group.create_task(adopt(uid, some))
    except* ReplicaMismatch as errors:
        raise errors.exceptions[0] from None
    return followed


def _check_schemas(uid: str, backend: ExpertBackend, info: messages.ExpertInfo, primary: ExpertReplica) -> None:
    try:
        theirs = [wire.decode_schema(one) for one in (info.args_schema, info.kwargs_schema, info.outputs_schema)]
    except ProtocolError:
        return
    for there, here in zip(theirs, (backend.args_schema, backend.kwargs_schema, backend.outputs_schema), strict=True):
        if there != here:
            said = [wire.describe_schema(one)[:100] for one in (there, here)]
            at = owner_of(primary).short
            raise ReplicaMismatch(f"{uid} is {said[0]} at {at}, which trains it, and {said[1]} here: {SAME_KIND}")
