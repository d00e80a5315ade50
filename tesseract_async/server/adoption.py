"""Who else hosts a server's experts, whether it takes their word, and their states: what it asks before it starts.

Where names are bare. Experts of a run go by records (`server.tenures`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from tesseract_async.errors import (
    NotAllowed,
    PeerUnreachable,
    ProtocolError,
    TesseractError,
    describe,
)
from tesseract_async.experts.directory import read_claims
from tesseract_async.experts.grid import ExpertReplica, rank_replicas
from tesseract_async.experts.manifest import split_uid
from tesseract_async.identity import PeerID
from tesseract_async.server.checkpoint import check_state, difference, largest_state
from tesseract_async.server.state_transfer import MAX_COPIES_BYTES, MAX_STATE_BYTES, fetch_file
from tesseract_async.transport.address_scope import is_near
from tesseract_async.transport.base import split_host_port
from tesseract_async.wire import messages
from tesseract_async.wire import tensors as wire

if TYPE_CHECKING:
    from tesseract_async.node import TesseractNode
    from tesseract_async.runtime.backend import ExpertBackend

logger = logging.getLogger(__name__)

MAX_SOURCES: Final = 4
"""Of whom a newcomer asks for an expert's state, one after the other."""
MAX_SHARDS_READ: Final = 16
"""For more uids than lie in so many shards, the whole grid is read instead."""


@dataclass(frozen=True, slots=True)
class ReplicaSettings:
    """How closely replicas keep together. Times are seconds."""

    sync_every: float = 30.0
    """A follower pulls the primary's state so often."""
    check_every: float = 5.0
    """Roles are looked at so often."""
    lease: float = 30.0
    """A primary that answers nobody for so long is replaced; one that stood still for so long asks who leads now."""
    call_timeout: float = 10.0
    """For a question to another replica, for each piece of a state, and for asking the network who hosts what; a fifth
    of it for the question whether a replica is there. Slow links need more."""
    max_copies_bytes: int = MAX_COPIES_BYTES
    """Copies of states that are kept for transfers under way: less where memory is scarce."""

    def __post_init__(self) -> None:
        if min(self.sync_every, self.check_every, self.lease) <= 0:
            raise ValueError("sync_every, check_every and lease are more than 0")


DEFAULT_SETTINGS: Final = ReplicaSettings()
NUM_AT_ONCE: Final = 4
"""Experts that are looked after at the same time."""


async def read_replicas(
    node: TesseractNode, uids: Iterable[str], *, clock: Callable[[], float] = time.time
) -> dict[str, list[ExpertReplica]]:
    """Who else hosts these, by what the network says now: uid -> replicas at other nodes, the primary first."""
    by_key: defaultdict[str, list[str]] = defaultdict(list)
    by_prefix: defaultdict[str, list[str]] = defaultdict(list)
    for uid in uids:
        by_key[node.trust.shard_key(uid)].append(uid)
        by_prefix[split_uid(uid)[0]].append(uid)
    if len(by_key) > MAX_SHARDS_READ:
        by_key = defaultdict(list, {node.trust.grid_key(prefix): some for prefix, some in by_prefix.items()})
    found: dict[str, list[ExpertReplica]] = {}

    async def read(key: str, some: list[str]) -> None:
        entries = [entry for entry in await node.network.get_entries(key) if entry.owner != node.peer_id]
        prefix, _ = split_uid(some[0])  # a key is of one grid
        claims = await read_claims(
            entries, prefix=prefix, now=clock(), dropped=_dropped, trust=node.trust, scope=node.scope
        )
        for uid in some:
            prefix, coords = split_uid(uid)
            found[uid] = rank_replicas(claim.replica(prefix, row) for claim in claims for row in claim.rows_of(coords))

    # at once: where nobody answers, each takes as long as the network waits
    tasks = [asyncio.create_task(read(key, some)) for key, some in by_key.items()]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return found


def _dropped(entry: Any, error: ProtocolError) -> None:
    logger.debug("dropped a manifest of %s: %s", entry.owner.short, error)


class ReplicaMismatch(ValueError):
    """An expert that this server would host is trained elsewhere as something else; the sentence names both."""


def may_follow(node: TesseractNode, replica: ExpertReplica) -> bool:
    """Whether this node takes states from that replica, and gives way to it, where names are bare.

    Those on its allow-list, if it has one; else machines on its own network only: on public addresses anybody may claim
    a bare name.
    """
    if node.policy.storers is not None:
        return True  # others' manifests are not even read
    return bool(replica.peer.addresses) and all(
        is_near(split_host_port(address)[0]) for address in replica.peer.addresses
    )


def _check_path(node: TesseractNode, replica: ExpertReplica) -> None:
    """Whatever addresses it names, one that came in from elsewhere would answer over that connection, or a relay.

    Raises: PeerUnreachable.
    """
    paths = [one.path for one in node.endpoint.connections() if one.peer_id == replica.peer.peer_id]
    for path in paths if node.policy.storers is None else []:
        kind, _, address = path.partition(" ")
        if kind != "tcp" or not address or not is_near(split_host_port(address)[0]):
            raise PeerUnreachable(replica.peer.short, {path: NotAllowed("not on this node's own network")})


async def adopt_states(
    node: TesseractNode, backends: dict[str, ExpertBackend], *, settings: ReplicaSettings = DEFAULT_SETTINGS
) -> set[str]:
    """Loads the state of each expert that another server trains already; returns those, which this one will follow.

    For backends that no server has been given yet. Where nobody gives the state, this server begins by itself: the
    others may be gone (or be this very server, before it was killed).

    Raises: ReplicaMismatch if the expert is something else there.
    """
    # experts of a run are followed by their records (`server.tenures`)
    followed = {uid for uid in backends if node.trust.authority(split_uid(uid)[0]) is not None}
    gate = asyncio.Semaphore(NUM_AT_ONCE)

    async def adopt(uid: str, replicas: list[ExpertReplica]) -> None:
        async with gate:
            infos = await asyncio.gather(*(ask_info(node, uid, one, settings.call_timeout) for one in replicas))
            # the silent ones cost one time-out together; of the others the primary comes first
            for replica, info in [(r, i) for r, i in zip(replicas, infos, strict=True) if i is not None][:MAX_SOURCES]:
                if replica.primary:
                    _check_schemas(uid, backends[uid], info, replica)
                try:
                    file = await fetch_bounded(node, uid, replica, backends[uid], settings)
                    if file is None:
                        continue
                    state = check_state(uid, file)
                    if (wrong := difference(uid, backends[uid], state)) is not None:
                        if replica.primary:
                            raise ReplicaMismatch(f"{wrong}: {_SAME} as its primary {replica.peer.peer_id}")
                        continue
                    backends[uid].name = uid
                    backends[uid].load_state(state)
                    followed.add(uid)
                    return
                except ReplicaMismatch:
                    raise
                except (TesseractError, TimeoutError, RuntimeError, ValueError, LookupError, TypeError) as error:
                    logger.warning("the state of %s at %s: %s", uid, replica.peer.short, describe(error))

    replicas = await read_replicas(node, backends.keys() - followed)
    try:
        async with asyncio.TaskGroup() as group:
            for uid, some in replicas.items():
                if some := [one for one in some if may_follow(node, one)]:
                    group.create_task(adopt(uid, some))
    except* ReplicaMismatch as errors:
        raise errors.exceptions[0] from None
    return followed


_SAME: Final = "start this server with the same --expert-class and --size"


def _check_schemas(uid: str, backend: ExpertBackend, info: messages.ExpertInfo, primary: ExpertReplica) -> None:
    try:
        theirs = [wire.decode_schema(one) for one in (info.args_schema, info.kwargs_schema, info.outputs_schema)]
    except ProtocolError:
        return
    mine = [backend.args_schema, backend.kwargs_schema, backend.outputs_schema]
    for there, here in zip(theirs, mine, strict=True):
        if there != here:
            said = [wire.describe_schema(one)[:100] for one in (there, here)]
            at = owner_of(primary).short
            raise ReplicaMismatch(f"{uid} is {said[0]} at {at}, which trains it, and {said[1]} here: {_SAME}")


async def ask_info(node: TesseractNode, uid: str, replica: ExpertReplica, timeout: float) -> messages.ExpertInfo | None:
    """What the replica says of itself; None if it does not answer."""
    try:
        async with asyncio.timeout(timeout):
            body = messages.encode(messages.InfoRequest(uid))
            reply = await node.call_expert(replica.peer, messages.INFO, body, timeout=timeout, idempotent=True)
        _check_path(node, replica)
        return messages.decode(messages.ExpertInfo, reply.body)
    except (TesseractError, TimeoutError) as error:
        logger.info("%s at %s does not answer: %s", uid, replica.peer.short, describe(error))
        return None


async def fetch_bounded(
    node: TesseractNode,
    uid: str,
    replica: ExpertReplica,
    backend: ExpertBackend,
    settings: ReplicaSettings,
    *,
    min_version: int = 0,
) -> bytes | None:
    """Return the file of its state, which is no longer than one of this expert can be."""
    limit = min(MAX_STATE_BYTES, largest_state(backend))
    _check_path(node, replica)
    return await fetch_file(
        node, replica.peer, uid, min_version=min_version, max_bytes=limit, timeout=settings.call_timeout
    )


def owner_of(replica: ExpertReplica) -> PeerID:
    """Whose it is."""
    assert replica.peer.peer_id is not None, "manifests are read with their owners"
    return replica.peer.peer_id
