"""`Authority`: a node's view of one run, and of what each peer may do in it. No I/O.

Records may come from anybody, in any order, and any number of times: a record that is older than what is known, belongs
to another run, or is signed by somebody without authority in this one changes nothing.
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Final

from tesseract_async.errors import InvalidRecord, ProtocolError
from tesseract_async.experts.grants import (
    APPOINTMENTS,
    GRANTS,
    REVOCATIONS,
    ROLES,
    Appointment,
    Grant,
    Revocations,
    Role,
    is_within,
)
from tesseract_async.experts.run import RUNS, SignedRun
from tesseract_async.experts.signed import read_signer
from tesseract_async.experts.terms import EPOCH_ZERO, RECORDS_SECONDS
from tesseract_async.identity import PeerID

MAX_GRANTS: Final = 16384
"""The most grants that are remembered. Those that an invite's key signed are forgotten first: that key may have
leaked."""
MAX_RECORDS: Final = 1024
"""The most revocations, and the most appointments, of one signer that are kept and spread."""

_GRANT, _REVOCATIONS, _APPOINTMENT, _MANIFEST = b"g", b"r", b"a", b"m"
"""The first byte of each kind of record where kinds lie side by side: in the network, on disk."""


class Authority:
    """A node's knowledge of one run: its manifest, grants, revocations and appointments."""

    def __init__(self, run: SignedRun, *, max_grants: int = MAX_GRANTS) -> None:
        self.run = run
        """The newest manifest that is known."""
        self._max_grants = max_grants
        self.tag = run.tag
        self.owner = run.signer
        self.prefix = run.manifest.prefix
        self.run_id = run.tag.run_id(self.prefix)
        """16 bytes; see `RunTag.run_id`."""
        self.is_open = run.tag.mode == "open"
        self.delegates: dict[PeerID, Grant] = {}
        """The peers that may grant, revoke and appoint besides the owner, each with its grant."""
        self._grants: dict[PeerID, Grant] = {}
        self._since: dict[PeerID, int] = {}
        self._invites: set[PeerID] = set()
        self._revocations: dict[bytes, Revocations] = {}
        self._appointments: dict[tuple[PeerID, str], Appointment] = {}
        self._appointed: dict[str, Appointment | None] = {}
        self._weigh()

    @property
    def lease(self) -> float:
        """Seconds of silence after which another server may become an expert's primary."""
        return self.run.manifest.lease

    @property
    def founder(self) -> PeerID | None:
        """The only peer that may begin experts of which nobody has a state; None: any host may."""
        kind, _, peer = self.run.manifest.genesis.partition(":")
        return PeerID.parse(peer) if kind == "founder" else None

    @property
    def may_restart(self) -> bool:
        """True if an expert whose state nobody has may begin anew."""
        return self.run.manifest.may_restart

    def may_be_forgotten(self, now: float) -> bool:
        """Return whether the run is older than the network's memory of its experts. If it is, nobody may know of a
        state that there was. A manifest that does not say when it was signed counts as new."""
        created = self.run.manifest.created / 1000
        return EPOCH_ZERO < created < now - RECORDS_SECONDS

    def may(self, peer_id: PeerID, role: Role, uid: str | None = None, *, now: float | None) -> bool:
        """Return whether `peer_id` may act as `role`, for `uid` or (None) at all.

        `now` (seconds since 1970) asks for something new: a claim, a Term, a call. With None, the question is about
        something that is already going on, for which a grant that has expired meanwhile is good enough: an absent owner
        stops nobody.

        A grant's pattern says which experts it is for. The parameters that all trainers share are one model's, so its
        role ``share`` is for all of them.
        """
        grant = self._grants.get(peer_id)
        if grant is None or self.is_open:
            return peer_id == self.owner or (self.is_open and role != "admit" and not self.is_revoked(peer_id))
        if not grant.roles & ROLES[role] or (now is not None and now >= grant.not_after):
            return False
        return uid is None or role == "share" or grant.pattern is None or uid in grant.pattern

    def is_member(self, peer_id: PeerID) -> bool:
        """Return whether it has any role but ``admit``, or had until that ended: enough for forward calls."""
        return any(self.may(peer_id, role, now=None) for role in ("host", "train", "share"))

    def grant_of(self, peer_id: PeerID) -> Grant | None:
        return self._grants.get(peer_id)

    def grants(self) -> list[Grant]:
        return list(self._grants.values())

    def revoked(self) -> list[PeerID]:
        """Every peer that was revoked and has no newer grant, invites' keys included."""
        return sorted({peer for peer in self._since if peer not in self._grants} | self._invites)

    def appointments(self) -> list[Appointment]:
        """Every appointment that counts, the latest last."""
        some = (one for one in self._appointments.values() if self._counts(one))
        return sorted(some, key=lambda one: (one.serial, one.digest))

    def is_revoked(self, peer_id: PeerID) -> bool:
        return peer_id in self._since and peer_id not in self._grants

    def appointment(self, uid: str) -> Appointment | None:
        if uid not in self._appointed:
            some = (one for one in reversed(self.appointments()) if uid in one.pattern)
            self._appointed[uid] = next(some, None)
        return self._appointed[uid]

    def epoch(self, now: float) -> int:
        """The lowest epoch of a Term that begins now (seconds since 1970)."""
        return max(0, int(now) - EPOCH_ZERO)

    def learn_grant(self, blob: object, peer_id: PeerID | None = None) -> bool:
        """Take in a grant, which must be `peer_id`'s if that is given. Return whether it, or a newer one, holds."""
        known = None if peer_id is None else self._grants.get(peer_id)
        if known is not None and known.blob == blob:
            return True
        try:
            grant = GRANTS.read(blob) if type(blob) is bytes else None
        except ProtocolError:
            return False
        if grant is None or (peer_id is not None and grant.peer != peer_id) or not self._holds(grant):
            return False
        known = self._grants.get(grant.peer)
        if known is None or self._rank(grant) > self._rank(known):
            self._grants.pop(grant.peer, None)
            self._grants[grant.peer] = grant
            self._forget_some()
        return True

    def learn(self, record: object) -> bool:
        """Take in a record that another node's `records` gave. Return whether it told anything new (for a grant,
        whether it holds).

        Untrusted. Records that this run's owner and delegates have not signed are dropped before their signatures are
        checked. Raises: ProtocolError for a record that is malformed or does not belong here.
        """
        if type(record) is not bytes or not record:
            raise ProtocolError("a record of a run consists of bytes")
        kind, blob = record[:1], record[1:]
        if kind == _GRANT:
            return self.learn_grant(blob)
        if not self.rules(read_signer(blob)):
            raise InvalidRecord("a record of somebody without authority over this run")
        if kind == _REVOCATIONS:
            return self.learn_revocations(REVOCATIONS.read(blob))
        if kind == _APPOINTMENT:
            return self.learn_appointment(APPOINTMENTS.read(blob))
        if kind == _MANIFEST:
            return self.learn_run(RUNS.read(blob))
        raise ProtocolError("a record of a run of an unknown kind")

    def learn_run(self, run: SignedRun) -> bool:
        """Switch to a newer manifest of the same run. (The make-up of experts does not change during a run.)"""
        same = run.signer == self.owner and run.tag == self.tag and run.manifest.prefix == self.prefix
        if not same or (run.manifest.created, run.blob) <= (self.run.manifest.created, self.run.blob):
            return False
        self.run = run
        self._weigh()
        return True

    def records(self) -> Iterator[bytes]:
        """The records that every member spreads and keeps: revocations and appointments."""
        yield from (_REVOCATIONS + one.blob for one in self._revocations.values() if self.rules(one.signer))
        yield from (_APPOINTMENT + one.blob for one in self.appointments())

    def kept(self, peer_id: PeerID) -> list[bytes]:
        """The records that a node keeps on disk: the manifest first (`from_kept`), `records`, and its own grant; those
        who may grant keep every one."""
        grants = self.grants() if self.rules(peer_id) else [one for one in self.grants() if one.peer == peer_id]
        return [_MANIFEST + self.run.blob, *self.records(), *(_GRANT + one.blob for one in grants)]

    @classmethod
    def from_kept(cls, records: Iterable[object]) -> "Authority":
        """The inverse of `kept`; records that do not hold are left out. Raises: ProtocolError without a manifest
        first."""
        rest = iter(records)
        first = next(rest, None)
        if type(first) is not bytes or first[:1] != _MANIFEST:
            raise ProtocolError("these are not the records of a run")
        authority = cls(RUNS.read(first[1:]))
        for record in rest:
            with contextlib.suppress(ProtocolError):
                authority.learn(record)
        return authority

    def next_number(self, signer: PeerID) -> int:
        return max((one.number + 1 for one in self._revocations.values() if one.signer == signer), default=0)

    def next_serial(self, peer_id: PeerID, now: float) -> int:
        """The serial of a new grant for this peer, later than the one that it has and than its revocation."""
        known = self._grants.get(peer_id)
        return max(int(now), self._since.get(peer_id, 0), 0 if known is None else known.serial + 1)

    def learn_revocations(self, new: Revocations) -> bool:
        """Take in revocations by the owner or a delegate. Return whether they are new. Raises: InvalidRecord."""
        if new.run_id != self.run_id:
            raise InvalidRecord("revocations of another run")
        of_signer = sum(one.signer == new.signer for one in self._revocations.values())
        if new.blob in self._revocations or of_signer >= MAX_RECORDS:
            return False
        self._revocations[new.blob] = new
        self._weigh()
        return True

    def learn_appointment(self, new: Appointment) -> bool:
        """Take in an appointment by the owner or a delegate. Return whether it is new. Raises: InvalidRecord."""
        if new.run_id != self.run_id:
            raise InvalidRecord("an appointment of another run")
        at = (new.signer, str(new.pattern))
        known = self._appointments.get(at)
        if known is not None and (new.serial, new.digest) <= (known.serial, known.digest):
            return False
        if known is None and sum(signer == new.signer for signer, _ in self._appointments) >= MAX_RECORDS:
            return False
        self._appointments[at] = new
        self._appointed.clear()
        return True

    def _weigh(self) -> None:
        """Settle who is revoked and who is a delegate, from all that is known. The result does not depend on the order
        in which records came, or how often."""
        self._since, self._invites, self.delegates = {}, set(), {}
        self._appointed.clear()
        self._count(by_owner=True)
        for blob in self.run.manifest.delegates:
            try:
                grant = GRANTS.read(blob)
            except ProtocolError:
                continue
            if grant.via is None and grant.roles & ROLES["admit"] and self._holds(grant):
                self.delegates[grant.peer] = grant
        self._count(by_owner=False)
        self._grants = {peer: grant for peer, grant in self._grants.items() if self._holds(grant)}
        for grant in self.delegates.values():
            self.learn_grant(grant.blob)

    def _count(self, *, by_owner: bool) -> None:
        """Adds up the owner's revocations, or the delegates', who revoke neither the owner nor each other."""
        for one in self._revocations.values():
            if one.signer == self.owner if by_owner else one.signer in self.delegates:
                safe = () if by_owner else self.delegates
                for peer in one.peers:
                    if peer not in safe:
                        self._since[peer] = max(one.since, self._since.get(peer, 0))
                self._invites.update(peer for peer in one.invites if peer not in safe)

    def rules(self, signer: PeerID) -> bool:
        return signer == self.owner or signer in self.delegates

    def _counts(self, one: Appointment) -> bool:
        delegate = self.delegates.get(one.signer)
        return one.signer == self.owner or (delegate is not None and is_within(one.pattern, delegate.pattern))

    def _holds(self, grant: Grant) -> bool:
        """Return whether a verified grant is of this run, and neither it nor the one behind it was revoked."""
        if grant.run_id != self.run_id or grant.root != self.owner or grant.peer == self.owner:
            return False
        if grant.peer in self._invites or grant.serial < self._since.get(grant.peer, 0):
            return False
        if grant.via is not None and grant.peer in self._since and grant.signer not in self.delegates:
            return False  # an invite lets nobody in again: a revoked peer may have it still
        return grant.via is None or self._holds(grant.via)

    def _forget_some(self) -> None:
        if len(self._grants) > self._max_grants:
            invited = (peer for peer, grant in self._grants.items() if grant.via is not None)
            del self._grants[next(invited, next(iter(self._grants)))]

    def _rank(self, grant: Grant) -> tuple[bool, int, bytes]:
        """The rank of a peer's grants: the owner's and delegates' before those of invites, then the latest."""
        return self.rules(grant.signer), grant.serial, grant.digest
