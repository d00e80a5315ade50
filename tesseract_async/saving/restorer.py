"""Takes a swarm's experts back to a save point: their files are sent to every server that hosts them."""

import asyncio
from collections.abc import Mapping
from functools import partial
from typing import Final

from tesseract_async.client.experience import experience_of
from tesseract_async.errors import CheckpointError, ExpertNotFound, TesseractError, describe
from tesseract_async.experts.grid import ExpertReplica
from tesseract_async.experts.manifest import split_uid
from tesseract_async.experts.ownership import RunOwner
from tesseract_async.experts.pattern import ExpertPattern
from tesseract_async.experts.pieces import PIECE_BYTES
from tesseract_async.experts.run_directory import enter_run
from tesseract_async.experts.trust import SHARED
from tesseract_async.files import mapped
from tesseract_async.identity import Identity
from tesseract_async.node import TesseractNode
from tesseract_async.saving.folder import SavedModel
from tesseract_async.saving.saver import PIECE_TIMEOUT, patiently
from tesseract_async.wire import messages

MAX_TOLD: Final = 3
NUM_AT_ONCE: Final = 4


async def enter_owned(node: TesseractNode, saved: SavedModel, identity: Identity) -> dict[str, RunOwner]:
    """Return the owner, or a delegate, of the runs in a folder, by prefix. Raises: as `enter_run`; ValueError for a
    peer that is neither."""
    owners: dict[str, RunOwner] = {}
    for prefix, run in saved.runs.items():
        keeper = await enter_run(node.network, node.trust, run.full_name, identity=identity)
        owners |= dict.fromkeys((prefix, prefix + SHARED), RunOwner(node.network, identity, keeper))
    return owners


async def restore_experts(
    node: TesseractNode,
    saved: SavedModel,
    *,
    owners: Mapping[str, RunOwner] | None = None,
) -> dict[str, int]:
    """Have every server go on from the states in a folder. Returns their versions by uid.

    Experts outside of runs change at once. In a run the servers keep the states aside, and their primaries go on from
    them when its owner says so: `owners`, by prefix. They stay the primaries until they are appointed ``free``.

    Raises: CheckpointError, after all others are sent, for experts that no server took or that were saved without
    optimizers.
    """
    gate, failed = asyncio.Semaphore(NUM_AT_ONCE), dict[str, BaseException]()
    versions: dict[str, int] = {}

    async def restore(uid: str) -> None:
        try:
            async with gate:
                if not saved.experts[uid].is_whole:
                    raise CheckpointError(f"{uid} was saved without its optimizer")
                await _restore(node, saved, uid, (owners or {}).get(split_uid(uid)[0]))
                versions[uid] = saved.experts[uid].version
                experience_of(node).lineages.forget(uid)
        except (TesseractError, TimeoutError, OSError) as error:
            failed[uid] = error

    for prefix in {split_uid(uid)[0] for uid in saved.experts}:
        node.directory.forget(prefix)
    async with asyncio.TaskGroup() as group:
        for uid in saved.experts:
            group.create_task(restore(uid))
    if failed:
        told = ", ".join(f"{uid} ({describe(failed[uid])})" for uid in sorted(failed)[:MAX_TOLD])
        raise CheckpointError(f"{len(failed)} of {len(saved.experts)} experts were not restored: {told}")
    return versions


async def _restore(node: TesseractNode, saved: SavedModel, uid: str, owner: RunOwner | None) -> None:
    replicas = await node.directory.find(uid, even_failed=True)
    if not replicas:
        raise ExpertNotFound(f"nobody hosts {uid}")
    entry, prefix = saved.experts[uid], split_uid(uid)[0]
    if (authority := node.trust.authority(prefix)) is None:
        # the primary last: its followers must not fetch from it what it is about to leave
        for replica in sorted(replicas, key=lambda one: one.primary):
            await _send(node, replica, saved)
        return
    if owner is None:
        raise CheckpointError(f"{uid} belongs to {authority.run.full_name}: its owner may restore it")
    await _send(node, replicas[0], saved)
    await owner.appoint(ExpertPattern.parse(uid), replicas[0].peer.peer_id, root=bytes.fromhex(entry.root))


async def _send(node: TesseractNode, replica: ExpertReplica, saved: SavedModel) -> None:
    entry = saved.experts[replica.uid]
    data = mapped(saved.path / entry.file)
    for start in range(0, len(data), PIECE_BYTES):
        request = messages.RestoreRequest(replica.uid, bytes.fromhex(entry.root), len(data), start)
        part = memoryview(bytes(data[start : start + PIECE_BYTES]))
        send = partial(
            node.call_expert,
            *(replica.peer, messages.RESTORE, messages.encode(request), [part]),
            timeout=PIECE_TIMEOUT,
            idempotent=True,
        )
        await patiently(send)
