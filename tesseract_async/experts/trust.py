"""`Trust`: decides whom a node believes about experts, and what others may do with its experts. Every reader asks
it."""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Final

import msgpack
import numpy as np

from tesseract_async.admission import Policy
from tesseract_async.errors import ProtocolError
from tesseract_async.experts import places
from tesseract_async.experts.authority import Authority
from tesseract_async.experts.grants import GRANTS, ROLES, Role
from tesseract_async.experts.lineage import SKEW
from tesseract_async.experts.manifest import MAGIC, Manifest, RunTag, decode_manifest, grid_key, shard_key, split_uid
from tesseract_async.experts.places import PlacePart
from tesseract_async.identity import PeerID, SignedRecord
from tesseract_async.network.entries import key_digest
from tesseract_async.wire.heads import MAX_GRANTS

SHARED: Final = "-shared"
"""The ending that turns a run's prefix into the prefix of the fragments of its shared parameters."""
_BEGINNINGS = {0xC4: 2, 0xC5: 3}
"""Bytes of msgpack before those of a byte string: of up to 255, and of more."""
_READ: Final[Mapping[bytes, Callable[[object], Manifest | PlacePart]]] = {
    MAGIC: decode_manifest,
    places.MAGIC: places.decode_place,
}


def belongs_under_its_key(record: SignedRecord) -> bool:
    """Return whether a record is a whole manifest of experts that its key is for, or no manifest at all; the same for
    places.

    A `RecordCheck` of every node, whatever runs it takes part in. Keys are hashes, but a manifest says by its first
    bytes that it is one, and names its grid and coordinates, from which the keys follow under which it may stand; one
    of a run shows by its grant that its server may host there. So a server fills neither the shards of experts that it
    does not claim to host, nor any key of a granted run without a grant, and readers do not pay for strangers.

    Untrusted; raises nothing. A manifest of 400 experts costs up to 400 hashes, half a millisecond; a grant its
    signature checks, once.
    """
    value = record.value
    start = _BEGINNINGS.get(value[0], 0) if value else 0
    read = next((one for magic, one in _READ.items() if start and value.startswith(magic, start)), None)
    if read is None:
        return True
    try:
        manifest = read(msgpack.unpackb(value))
        if not any(key_digest(key) == record.key for key in manifest.keys()):
            return False
        tag = manifest.tag
        if tag is None or tag.mode == "open" or tag.owner == record.owner:
            return True
        grant = GRANTS.read(manifest.grant)
    except (ProtocolError, ValueError, msgpack.UnpackException):
        return False
    prefixes = {manifest.prefix, manifest.prefix.removesuffix(SHARED)}
    of_run = grant.run_id in map(tag.run_id, prefixes) and grant.root == tag.owner
    return of_run and grant.peer == record.owner and bool(grant.roles & ROLES["host"])


class Trust:
    """A node's policy, and the runs that it takes part in: to them belong the uids of their prefixes."""

    def __init__(
        self, peer_id: PeerID | None = None, policy: Policy | None = None, *, clock: Callable[[], float] = time.time
    ) -> None:
        """`peer_id` is the node's own, which it believes; `clock` gives wall-clock seconds."""
        self.policy = Policy() if policy is None else policy
        self.clock = clock
        self._peer_id = peer_id
        self._runs: dict[str, Authority] = {}
        self.distrusted: dict[PeerID, str] = {}
        """Peers that this node caught answering wrongly, and how; nothing that they say is believed."""

    def add(self, authority: Authority) -> None:
        """Take part in this run from now on. Raises: ValueError if another run has the prefix already."""
        prefixes = (authority.prefix, authority.prefix + SHARED)
        for prefix in prefixes:
            known = self._runs.get(prefix, authority)
            if known.run_id != authority.run_id:
                raise ValueError(f"uids of {prefix!r} are those of the run {known.run.full_name} at this node")
        self._runs |= dict.fromkeys(prefixes, authority)

    def authority(self, prefix: str) -> Authority | None:
        """The run whose uids begin with this prefix; None where they are bare."""
        return self._runs.get(prefix)

    def tag(self, prefix: str) -> RunTag | None:
        authority = self._runs.get(prefix)
        return None if authority is None else authority.tag

    def grid_key(self, prefix: str) -> str:
        return grid_key(prefix, self.tag(prefix))

    def shard_key(self, uid: str) -> str:
        return shard_key(uid, self.tag(split_uid(uid)[0]))

    def own_grant(self, prefix: str) -> bytes:
        authority = self._runs.get(prefix)
        grant = None if authority is None or self._peer_id is None else authority.grant_of(self._peer_id)
        return b"" if grant is None else grant.blob

    def shown(self) -> list[bytes]:
        """The grants that the node shows to every peer that it connects to."""
        return [blob for blob in dict.fromkeys(map(self.own_grant, self._runs)) if blob][:MAX_GRANTS]

    def introduced(self, peer_id: PeerID, grants: Sequence[bytes]) -> None:
        """Learn the grants that `peer_id`, which has proved its identity, shows."""
        for blob in grants[:MAX_GRANTS]:
            for authority in self._runs.values():
                authority.learn_grant(blob, peer_id)

    def may_be_read(self, owner: PeerID) -> bool:
        """Return whether the policy lets this peer say anything at all: a check before its messages are decoded."""
        return owner == self._peer_id or (owner not in self.distrusted and self.policy.allows(owner, "host"))

    def believed(self, owner: PeerID, manifest: Manifest) -> Manifest:
        """Return what `owner` says about experts, as far as it may host them, and learn the grant that it shows.

        Raises: ProtocolError where nothing is left.
        """
        authority = self._runs.get(manifest.prefix)
        if not self.may_be_read(owner) or manifest.tag != self.tag(manifest.prefix):
            raise ProtocolError("a manifest of somebody who may not host here, or of another run")
        if authority is None:
            return manifest
        if manifest.grant:
            authority.learn_grant(manifest.grant, owner)
        if not authority.may(owner, "host", now=None):
            raise ProtocolError("a manifest of somebody who may not host in this run")
        if manifest.epochs is not None:  # from the future: of a liar, or by a clock that was wrong; both rank last
            late = manifest.epochs > authority.epoch(self.clock()) + SKEW
            manifest = replace(manifest, epochs=np.where(late, 0, manifest.epochs)) if late.any() else manifest
        grant = authority.grant_of(owner)
        if grant is None or grant.pattern is None or authority.is_open:
            return manifest
        if grant.pattern.prefix != manifest.prefix or len(grant.pattern.ranges) != manifest.num_dims:
            raise ProtocolError("a manifest of experts that its server may not host")
        low, high = np.array([(one.start, one.stop) for one in grant.pattern.ranges]).T
        inside = (manifest.coords >= low) & (manifest.coords < high)
        return manifest.only(inside.all(axis=1))

    @property
    def has_runs(self) -> bool:
        """True if what a peer may do depends on the expert."""
        return bool(self._runs)

    def may_host(self, peer_id: PeerID | None, uid: str, *, anew: bool = False) -> bool:
        """Return whether this peer may host `uid`, so that calls for it may go there; `anew`: whether it may begin to.

        None stands for a peer whose id is not known.
        """
        if peer_id is not None and peer_id == self._peer_id:
            return True
        authority = self._runs.get(split_uid(uid)[0]) if self._runs else None
        if peer_id is None:
            return authority is None and self.policy.hosts is None
        hosts = self.policy.hosts
        if peer_id in self.distrusted or (hosts is not None and peer_id not in hosts):
            return False
        return authority is None or authority.may(peer_id, "host", uid, now=self.clock() if anew else None)

    def knows(self, peer_id: PeerID) -> bool:
        """Return whether a list of the policy names this peer, or a run grants it something."""
        policy = self.policy
        for some in (policy.quotas, policy.callers, policy.trainers):
            if some and peer_id in some:
                return True
        return bool(self._runs) and any(one.grant_of(peer_id) is not None for one in self._runs.values())

    def may_ask(self, peer_id: PeerID, role: Role | None, uid: str) -> bool:
        """Return whether this peer may make calls that take `role` in the run of `uid`; None: any member's."""
        authority = self._runs.get(split_uid(uid)[0]) if self._runs else None
        if authority is None or peer_id == self._peer_id:
            return True
        if role is None:
            return authority.is_member(peer_id)
        return authority.may(peer_id, role, uid, now=None if role == "host" else self.clock())

    def admits(self, peer_id: PeerID, uids: Collection[str]) -> bool:
        """Return whether this peer may call any of these experts, or there are none: others must not take memory."""
        runs = (self._runs.get(split_uid(uid)[0]) for uid in uids)
        return not uids or any(run is None or run.is_member(peer_id) for run in runs)
