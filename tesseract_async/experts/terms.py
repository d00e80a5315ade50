"""Terms, Seals and Votes: the signed records that say who is the primary of an expert of a run. No I/O.

`docs/design/authority.md` says what each means. Times and epochs are whole seconds since `EPOCH_ZERO`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import partial
from typing import Final

import msgpack

from tesseract_async.errors import InvalidRecord, ProtocolError
from tesseract_async.experts.signed import HEAD_BYTES, Format, listed, number, octets, optional, peer, peers
from tesseract_async.identity import Identity, PeerID, verify

EPOCH_ZERO: Final = 1_735_689_600
"""The start of 2025: epochs are seconds since then. A run's own beginning would move when its owner signs the manifest
anew."""
RECORDS_SECONDS: Final = 24 * 3600.0
"""Seconds for which the network keeps Terms and Seals after they were stored."""
MAX_BYTES: Final = 900
"""Most bytes of one record: as much as fits an entry of the network."""
MAX_SUCCESSORS: Final = 3
HANDOVER_SECONDS: Final = 300
"""Seconds for which a primary's signature over its last Seal holds: an old one gives no expert back."""


class TermKind(IntEnum):
    """The ways in which a Term comes about."""

    GENESIS = 0
    """Nobody knew of any Seal: the state is the one that the run's manifest describes."""
    HANDOVER = 1
    """The last primary signed the expert over."""
    TAKEOVER = 2
    """A member of the parent Seal, with the votes of a majority of its members (of two, its own)."""
    ADOPTION = 3
    """A server that holds the parent Seal's file, after all its members fell silent."""
    APPOINTED = 4
    """The run's owner appointed the server."""


@dataclass(frozen=True, slots=True, eq=False)
class Seal:
    """A state of an expert that others may go on from, as its primary signed it."""

    uid: str
    epoch: int
    number: int
    """Counts up within one Term, from 1."""
    serial: int
    """The serial of the appointment that the branch stands on; 0 for none."""
    version: int
    """Optimizer steps in that state: for people, and never compared."""
    root: bytes
    """`pieces.root_of` the file."""
    size: int
    """Bytes of the file."""
    time: int
    successors: tuple[PeerID, ...]
    term: bytes
    """The digest of the Term that it belongs to."""
    primary: PeerID
    blob: bytes
    digest: bytes

    def __post_init__(self) -> None:
        if len(self.successors) > MAX_SUCCESSORS or self.number == 0:
            raise ProtocolError("a malformed Seal")
        if len(set(self.members)) != len(self.members):
            raise ProtocolError("a Seal that names a member twice")

    @property
    def members(self) -> tuple[PeerID, ...]:
        """The primary and its successors, in the order in which they take over."""
        return (self.primary, *self.successors)

    @property
    def age(self) -> tuple[int, int]:
        """(epoch, number): of two Seals of one branch the later one has the larger."""
        return self.epoch, self.number


@dataclass(frozen=True, slots=True, eq=False)
class Vote:
    """A member's signed consent that `candidate` may be the primary in this epoch. `seal`: the age of the newest Seal
    that the voter holds."""

    uid: str
    epoch: int
    candidate: PeerID
    seal_epoch: int
    seal_number: int
    voter: PeerID
    blob: bytes
    digest: bytes

    @property
    def seal(self) -> tuple[int, int]:
        return self.seal_epoch, self.seal_number


@dataclass(frozen=True, slots=True, eq=False)
class Term:
    """The beginning of a primary's time, with the evidence that it may be the primary."""

    uid: str
    epoch: int
    boot: bytes
    """8 bytes that the process drew when it started: they tell two processes with one key apart."""
    kind: TermKind
    serial: int
    seal: Seal | None
    """The parent: the state that it goes on from."""
    voters: tuple[PeerID, ...]
    """The others that voted for it."""
    primary: PeerID
    blob: bytes
    digest: bytes
    is_weak: bool = field(init=False)
    """True if no majority stands behind it: it gives way to a line that went on without it (`Lineage`)."""

    def __post_init__(self) -> None:
        lone = self.kind is TermKind.ADOPTION
        if self.kind is TermKind.TAKEOVER and self.seal is not None:  # also a former primary that says so again
            lone = 1 + len(self.voters) < max(2, majority(len(self.seal.members), strict=True))
        object.__setattr__(self, "is_weak", lone)


def majority(num_members: int, *, strict: bool = False) -> int:
    """Return the number of members that decide. Of two, one does unless `strict`: a pair survives either's death."""
    return 1 if num_members == 2 and not strict else num_members // 2 + 1


def next_epoch(parent: int, now: float) -> int:
    """The epoch of a Term after `parent` that begins at `now`, seconds since `EPOCH_ZERO`."""
    return max(parent + 1, int(now))


def sign_seal(
    identity: Identity,
    run: bytes,
    *,
    term: Term,
    number: int,
    version: int,
    root: bytes,
    size: int,
    time: int,
    successors: Sequence[PeerID],
) -> Seal:
    state = [number, term.serial, version, root, size, time, list(successors)]
    return _seals(run).sign(identity, [term.uid, term.epoch, *state, term.digest])


def read_seal(blob: object, run: bytes) -> Seal:
    """Read and verify. Untrusted. Raises: ProtocolError (InvalidRecord if the signature does not hold)."""
    return _seals(run).read(blob)


def sign_vote(
    identity: Identity, run: bytes, *, uid: str, epoch: int, candidate: PeerID, seal: tuple[int, int]
) -> Vote:
    """Sign `identity`'s vote; `seal` is the age of the newest Seal that it holds."""
    return _votes(run).sign(identity, [uid, epoch, candidate, *seal])


def read_vote(blob: object, run: bytes) -> Vote:
    """Read and verify. Untrusted. Raises: ProtocolError (InvalidRecord if the signature does not hold)."""
    return _votes(run).read(blob)


def sign_handover(identity: Identity, run: bytes, seal: Seal, successor: PeerID) -> bytes:
    """The 64 bytes with which a primary gives the expert, in the state of `seal`, to `successor`."""
    return identity.sign(_handover(run, seal, successor))


def sign_term(
    identity: Identity,
    run: bytes,
    *,
    uid: str,
    epoch: int,
    boot: bytes,
    kind: TermKind,
    serial: int = 0,
    seal: Seal | None = None,
    votes: Sequence[Vote] = (),
    handover: bytes = b"",
) -> Term:
    """Sign a Term of `identity`'s. Raises: ValueError if the evidence is not enough."""
    # of a vote, only what does not follow from the Term
    evidence = handover or [[vote.blob[:HEAD_BYTES], *vote.seal] for vote in votes]
    parent = None if seal is None else seal.blob
    return _terms(run).sign(identity, [uid, epoch, boot, int(kind), serial, parent, evidence])


def read_term(blob: object, run: bytes) -> Term:
    """Read and verify, with the Seal and the votes in it. Untrusted.

    Raises: ProtocolError (InvalidRecord if a signature does not hold or the evidence is not enough).
    """
    return _terms(run).read(blob)


# -- the form of records -----------------------------------------------------------------------------------------------


def _uid(value: object) -> str:
    if type(value) is not str or not 0 < len(value) <= 256:
        raise ProtocolError("a record without a uid")
    return value


def _kind(value: object) -> TermKind:
    return TermKind(number(below=len(TermKind))(value))


def _domain(kind: str, run: bytes) -> bytes:
    return f"tesseract {kind} 1 {run.hex()}\0".encode()


def _seals(run: bytes) -> Format[Seal]:
    state = (number(), number(), number(), octets(32), number(), number(), peers)
    return Format(_domain("seal", run), listed((_uid, number(), *state, octets(32)), Seal), max_bytes=MAX_BYTES)


def _votes(run: bytes) -> Format[Vote]:
    fields = (_uid, number(), peer, number(), number())
    return Format(_domain("vote", run), listed(fields, Vote), max_bytes=MAX_BYTES)


def _terms(run: bytes) -> Format[Term]:
    fields = (_uid, number(), octets(8), _kind, number(), optional(_seals(run).read), lambda evidence: evidence)
    return Format(_domain("term", run), listed(fields, partial(_term, run)), max_bytes=MAX_BYTES)


def _term(
    run: bytes,
    uid: str,
    epoch: int,
    boot: bytes,
    kind: TermKind,
    serial: int,
    seal: Seal | None,
    evidence: object,
    signer: PeerID,
    blob: bytes,
    digest: bytes,
) -> Term:
    voters: tuple[PeerID, ...] = ()
    if kind is TermKind.HANDOVER:
        if seal is not None and epoch > max(seal.time, seal.epoch) + HANDOVER_SECONDS:
            raise InvalidRecord("a handover that was taken long ago")
        signature = octets(64)(evidence)
        if seal is None or not verify(seal.blob[:32], signature, _handover(run, seal, signer)):
            raise InvalidRecord("a handover that the last primary did not sign")
    elif kind is TermKind.TAKEOVER:
        voters = _check_votes(evidence, run, uid, epoch, signer, seal)
    elif evidence != []:
        raise ProtocolError("a Term with evidence that it does not need")
    if (seal is None) != (kind is TermKind.GENESIS) and kind is not TermKind.APPOINTED:
        raise InvalidRecord("a Term without the Seal that it goes on from")
    if seal is not None and (seal.uid != uid or seal.epoch >= epoch):
        raise InvalidRecord("a Term that does not follow its Seal")
    if kind is not TermKind.APPOINTED and serial != (0 if seal is None else seal.serial):
        raise InvalidRecord("a Term that changes the appointment")
    return Term(uid, epoch, boot, kind, serial, seal, voters, signer, blob, digest)


def _handover(run: bytes, seal: Seal, successor: PeerID) -> bytes:
    return _domain("handover", run) + seal.digest + successor


def _check_votes(
    evidence: object, run: bytes, uid: str, epoch: int, candidate: PeerID, seal: Seal | None
) -> tuple[PeerID, ...]:
    if seal is None or candidate not in seal.members:
        raise InvalidRecord("a takeover by a server that is not a member")
    if type(evidence) is not list or len(evidence) > MAX_SUCCESSORS:
        raise ProtocolError("a Term with malformed votes")
    voters: list[PeerID] = []
    for one in evidence:
        if type(one) is not list or len(one) != 3:
            raise ProtocolError("a Term with a malformed vote")
        head, *age = one
        vote = read_vote(octets(HEAD_BYTES)(head) + msgpack.packb([uid, epoch, bytes(candidate), *age]), run)
        if vote.voter == candidate or vote.voter in voters or vote.voter not in seal.members:
            raise InvalidRecord("a vote of a server that has none")
        if vote.seal > seal.age:
            raise InvalidRecord("a vote of a server that holds a newer Seal")
        voters.append(vote.voter)
    # a primary that starts again alone needs nobody
    if 1 + len(voters) < majority(len(seal.members)):
        raise InvalidRecord("a takeover without a majority")
    return tuple(voters)
