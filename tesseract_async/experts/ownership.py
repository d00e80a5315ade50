"""The records that a run's owner and its delegates sign: grants, invites, revocations, appointments."""

import dataclasses
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Final

from tesseract_async.experts.authority import Authority
from tesseract_async.experts.grants import (
    GRANT_SECONDS,
    Appointment,
    Grant,
    Role,
    grant_text,
    sign_appointment,
    sign_grant,
    sign_revocations,
)
from tesseract_async.experts.grid import ExpertReplica
from tesseract_async.experts.manifest import RunTag
from tesseract_async.experts.pattern import ExpertPattern
from tesseract_async.experts.run import RunManifest
from tesseract_async.experts.run_directory import RunKeeper, publish_grant, publish_record
from tesseract_async.identity import Identity, PeerID
from tesseract_async.network.network import TesseractNetwork

MEMBER: Final[tuple[Role, ...]] = ("host", "train", "share")
DELEGATE_SECONDS: Final = 40 * GRANT_SECONDS
"""Seconds that a delegate's grant holds: as long as the manifest. To remove a delegate, the owner signs the manifest
anew."""


class RunOwner:
    """The owner of a run, or a delegate, at work: what it signs is kept by `keeper` and published in `network`."""

    def __init__(
        self,
        network: TesseractNetwork,
        identity: Identity,
        keeper: RunKeeper,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`clock` gives seconds since 1970. Raises: ValueError if the identity has no say in the run."""
        self.authority = keeper.authority
        self._network = network
        self._identity = identity
        self._keeper = keeper
        self._clock = clock
        if not self.authority.rules(identity.peer_id):
            name = self.authority.run.full_name
            raise ValueError(f"{identity.peer_id} has no say in {name}: only its owner and the delegates have")

    async def grant(
        self, peers: Sequence[PeerID], roles: Sequence[Role], *, seconds: float, pattern: ExpertPattern | None = None
    ) -> list[Grant]:
        """Let each peer act in these roles for this long, for the uids of `pattern` or for all; return the grants.

        Raises: ValueError for a grant that nobody would believe; what the network raises.
        """
        grants = [self._grant(peer_id, roles, seconds, pattern) for peer_id in peers]
        for one in grants:
            await publish_grant(self._network, one)
        self._keeper.save()
        return grants

    def invite(
        self, roles: Sequence[Role], *, seconds: float, pattern: ExpertPattern | None = None
    ) -> tuple[Grant, str]:
        """Return a grant, and its text with the key by which everybody may use it.

        Raises: ValueError if the signer is a delegate.
        """
        if self._identity.peer_id in self.authority.delegates:
            raise ValueError("only the run's owner makes invites: a delegate grants one by one")
        key = Identity.generate()
        grant = self._grant(key.peer_id, [*roles, "admit"], seconds, pattern)
        self._keeper.save()
        return grant, grant_text(grant, invite=key)

    def _grant(self, peer_id: PeerID, roles: Sequence[Role], seconds: float, pattern: ExpertPattern | None) -> Grant:
        now = self._clock()
        via = self.authority.delegates.get(self._identity.peer_id)
        last = int(now + seconds)
        grant = sign_grant(
            self._identity,
            self.authority.run_id,
            peer_id,
            roles,
            serial=self.authority.next_serial(peer_id, now),
            not_after=last if via is None else min(last, via.not_after),
            pattern=pattern,
            via=via,
        )
        self.authority.learn_grant(grant.blob)
        return grant

    async def renew(self) -> list[Grant]:
        """Renew every grant that ends soon; return the new ones. Raises: what the network raises."""
        renewed = await self._keeper.renew_grants()
        self._keeper.save()
        return renewed

    async def revoke(self, peers: Collection[PeerID], invites: Collection[PeerID] = ()) -> None:
        """Take away the grants of `peers`, and of all peers that came by `invites`.

        Raises: ValueError for the owner, and for delegates unless the owner revokes them; what the network raises.
        """
        authority, me, now = self.authority, self._identity.peer_id, self._clock()
        safe = {authority.owner} if me == authority.owner else {authority.owner, *authority.delegates}
        if kept := safe & set(peers):
            raise ValueError(f"{kept.pop()} stays: nobody revokes the owner, and only the owner revokes delegates")
        for part in sign_revocations(
            self._identity,
            authority.run_id,
            number=authority.next_number(me),
            since=max(authority.next_serial(peer_id, now) for peer_id in (*peers, *invites)),
            peers=peers,
            invites=invites,
        ):
            authority.learn_revocations(part)
        await self._keeper.learn_once()  # which spreads what is known

    async def appoint(
        self, pattern: ExpertPattern, peer_id: PeerID | None, *, root: bytes | None = None
    ) -> Appointment:
        """Make a peer the primary of the uids of `pattern`; None leaves the choice to their servers.

        `root`: that of the state to go on from, which the peer keeps, sealed or aside; None: the latest that it has.

        Raises: ValueError if these are more than the identity may appoint for; what the network raises.
        """
        authority = self.authority
        serial = max([int(self._clock()), *(one.serial + 1 for one in authority.appointments())])
        signed = sign_appointment(self._identity, authority.run_id, pattern, serial=serial, peer=peer_id, root=root)
        if not authority.learn_appointment(signed) or authority.appointment(next(iter(pattern))) != signed:
            raise ValueError(f"{pattern} is more than this identity may appoint for")
        await self._keeper.learn_once()
        return signed


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
