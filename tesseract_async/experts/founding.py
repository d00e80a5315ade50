"""What the owner of a run signs at its start: grants of delegates, and of the servers that it takes over."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence

from tesseract_async.experts.authority import Authority
from tesseract_async.experts.grants import GRANT_SECONDS, Role, sign_appointment, sign_grant
from tesseract_async.experts.grid import ExpertReplica
from tesseract_async.experts.manifest import RunTag
from tesseract_async.experts.pattern import ExpertPattern
from tesseract_async.experts.run import RunManifest
from tesseract_async.experts.run_directory import publish_grant, publish_record
from tesseract_async.identity import Identity, PeerID
from tesseract_async.network.network import TesseractNetwork

MEMBER: tuple[Role, ...] = ("host", "train", "share")
DELEGATE_SECONDS = 40 * GRANT_SECONDS
"""A delegate's grant holds as long as the manifest stands, which is signed anew to be rid of it."""


def with_delegates(manifest: RunManifest, owner: Identity, delegates: Sequence[PeerID]) -> RunManifest:
    """Return the manifest with a grant for each delegate, by which it may grant, revoke and appoint."""
    run_id = RunTag(owner.peer_id, manifest.name, manifest.mode).run_id(manifest.prefix)
    now = int(time.time())
    grants = [
        sign_grant(owner, run_id, peer_id, (*MEMBER, "admit"), serial=now, not_after=now + DELEGATE_SECONDS)
        for peer_id in delegates
    ]
    return dataclasses.replace(manifest, delegates=[one.blob for one in grants])


async def adopt_servers(
    network: TesseractNetwork, owner: Identity, authority: Authority, hosting: Mapping[str, Sequence[ExpertReplica]]
) -> list[PeerID]:
    """Take servers of experts outside of runs into the run: grant each its part, and keep the primaries by appointment.

    `hosting`: the servers of each uid, the primary first. Returns the servers' ids. Raises: what the network raises.
    """
    now = int(time.time())
    servers = sorted(
        {one.peer.peer_id for replicas in hosting.values() for one in replicas if one.peer.peer_id is not None}
    )
    for peer_id in servers:
        grant = sign_grant(owner, authority.run_id, peer_id, MEMBER, serial=now, not_after=now + GRANT_SECONDS)
        authority.learn_grant(grant.blob)
        await publish_grant(network, grant)
    for uid, replicas in hosting.items():
        if len(replicas) > 1:
            primary, pattern = replicas[0].peer.peer_id, ExpertPattern.parse(uid)
            authority.learn_appointment(sign_appointment(owner, authority.run_id, pattern, serial=now, peer=primary))
    for record in authority.records():
        await publish_record(network, authority, record)
    return servers
