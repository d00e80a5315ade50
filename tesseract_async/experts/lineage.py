"""Who leads an expert of a run, as signed records, and which of several branches holds. No I/O.

- A `Term` begins when somebody becomes an expert's primary. It names the `Seal` that it goes on from, and holds the
  evidence that its signer may: the last primary's signature, or the votes of that Seal's members.
- A `Seal` is a state that others can go on from: the hash of the primary's file, and the members: the primary and its
  successors.
- A `Vote` is given by a member for a candidate, once per epoch.

Times and epochs are whole seconds since `EPOCH_ZERO`. Rank is by epoch, never by version, so that nobody gains
anything by naming a large one. `Lineage` keeps what was seen of one expert and says which Term holds; all who have seen
the same records say the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Final, Protocol

import msgpack

from tesseract_async.errors import InvalidRecord, ProtocolError
from tesseract_async.experts.authority import EPOCH_ZERO
from tesseract_async.experts.grants import Appointment, Role
from tesseract_async.experts.signed import HEAD_BYTES, Signed, read_signed, sign_body
from tesseract_async.identity import Identity, PeerID, verify

MAX_BYTES: Final = 900
"""Of one record: so much fits an entry of the network."""
MAX_SUCCESSORS: Final = 3
SKEW: Final = 60
"""Seconds by which clocks may differ: a record from further in the future is refused."""
HANDOVER_SECONDS: Final = 300
"""For which a primary's signature over its last Seal is good: who had an expert once does not get it back by that."""
MAX_TERMS: Final = 64
"""Terms of one expert that are remembered."""
MAX_TERMS_OF_ONE: Final = 8
"""Terms of one signer among them, besides those that lead to the one that holds."""


class Kind(IntEnum):
    """How a Term came about."""

    GENESIS = 0
    """Nobody knew of any Seal: the state is as the run says."""
    HANDOVER = 1
    """The last primary signed it over."""
    TAKEOVER = 2
    """A member of the parent Seal, with the votes of a majority of its members (of two, its own)."""
    ADOPTION = 3
    """Somebody who holds the parent Seal's file, after all its members fell silent."""
    APPOINTED = 4
    """The run's owner said so."""


class Authority(Protocol):
    """What this room's lineages need of `experts.authority.Authority`."""

    @property
    def run_id(self) -> bytes: ...
    @property
    def lease(self) -> float: ...
    @property
    def founder(self) -> PeerID | None: ...
    def may(self, peer_id: PeerID, role: Role, uid: str | None = None, *, now: float | None) -> bool: ...
    def appointment(self, uid: str) -> Appointment | None: ...


@dataclass(frozen=True, slots=True, eq=False)
class Seal:
    """A state of an expert that others may go on from, as its primary signed it."""

    uid: str
    epoch: int
    number: int
    """Counts up within one Term, from 1."""
    serial: int
    """Of the appointment that the branch stands on; 0 for none."""
    version: int
    """Optimizer steps in that state: for people, and never compared."""
    root: bytes
    """`merkle.root_of` the file."""
    size: int
    """Bytes of the file."""
    time: int
    successors: tuple[PeerID, ...]
    term: bytes
    """The digest of the Term that it belongs to."""
    primary: PeerID
    digest: bytes
    blob: bytes

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
    """A member's word that `candidate` may lead in this epoch. `seal` is the age of the newest that the voter holds."""

    uid: str
    epoch: int
    candidate: PeerID
    seal: tuple[int, int]
    voter: PeerID
    blob: bytes


@dataclass(frozen=True, slots=True, eq=False)
class Term:
    """The beginning of a primary's time, with the evidence that it may lead."""

    uid: str
    epoch: int
    boot: bytes
    """8 bytes that the process drew when it started: two processes with one key are told apart by it."""
    kind: Kind
    serial: int
    seal: Seal | None
    """The parent: the state that it goes on from."""
    voters: tuple[PeerID, ...]
    """Who voted for it, besides itself."""
    primary: PeerID
    digest: bytes
    blob: bytes
    is_weak: bool = field(init=False)
    """No majority stands behind it: it gives way to a line that went on beside it (`Lineage`)."""

    def __post_init__(self) -> None:
        lone = self.kind is Kind.ADOPTION
        if self.kind is Kind.TAKEOVER and self.seal is not None:  # also one who led once and says so again
            lone = 1 + len(self.voters) < max(2, majority(len(self.seal.members), strict=True))
        object.__setattr__(self, "is_weak", lone)


def majority(num_members: int, *, strict: bool = False) -> int:
    """How many of so many members decide. Of two, one does unless `strict`: a pair survives either's death."""
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
    """A Seal of the Term that `identity` signed."""
    uid, epoch, serial = term.uid, term.epoch, term.serial
    body = [uid, epoch, number, serial, version, root, size, time, list(map(bytes, successors)), term.digest]
    return _seal(sign_body(identity, _domain("seal", run), body, max_bytes=MAX_BYTES))


def read_seal(blob: Any, run: bytes) -> Seal:
    """Reads and verifies. Untrusted. Raises: ProtocolError (InvalidRecord if the signature does not hold)."""
    return _seal(read_signed(blob, _domain("seal", run), max_bytes=MAX_BYTES))


def sign_vote(
    identity: Identity, run: bytes, *, uid: str, epoch: int, candidate: PeerID, seal: tuple[int, int]
) -> Vote:
    """`identity`'s vote; `seal` is the age of the newest Seal that it holds."""
    body = [uid, epoch, bytes(candidate), *seal]
    return _vote(sign_body(identity, _domain("vote", run), body, max_bytes=MAX_BYTES))


def read_vote(blob: Any, run: bytes) -> Vote:
    """Reads and verifies. Untrusted. Raises: ProtocolError (InvalidRecord if the signature does not hold)."""
    return _vote(read_signed(blob, _domain("vote", run), max_bytes=MAX_BYTES))


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
    kind: Kind,
    serial: int = 0,
    seal: Seal | None = None,
    votes: Sequence[Vote] = (),
    handover: bytes = b"",
) -> Term:
    """A Term of `identity`'s. Raises: ProtocolError if the evidence does not carry it."""
    # of a vote, only what does not follow from the Term
    evidence: Any = handover or [[vote.blob[:HEAD_BYTES], *vote.seal] for vote in votes]
    body = [uid, epoch, boot, int(kind), serial, None if seal is None else seal.blob, evidence]
    return _term(sign_body(identity, _domain("term", run), body, max_bytes=MAX_BYTES), run)


def read_term(blob: Any, run: bytes) -> Term:
    """Reads and verifies, with the Seal and the votes in it. Untrusted.

    Raises: ProtocolError (InvalidRecord if a signature does not hold or the evidence does not carry it).
    """
    return _term(read_signed(blob, _domain("term", run), max_bytes=MAX_BYTES), run)


# -- the form of records -----------------------------------------------------------------------------------------------


def _domain(kind: str, run: bytes) -> bytes:
    return f"tesseract {kind} 1 {run.hex()}\0".encode()


def _seal(signed: Signed) -> Seal:
    uid, epoch, number, serial, version, root, size, time, successors, term = _fields(signed, 10)
    _check_numbers(epoch, number, serial, version, size, time)
    if type(successors) is not list or len(successors) > MAX_SUCCESSORS or number == 0:
        raise ProtocolError("a malformed Seal")
    peers = tuple(PeerID(_bytes(one, 32)) for one in successors)
    if len({signed.signer, *peers}) != len(peers) + 1:
        raise ProtocolError("a Seal that names a member twice")
    rest = (_bytes(root, 32), size, time, peers, _bytes(term, 32))
    return Seal(_uid(uid), epoch, number, serial, version, *rest, signed.signer, signed.digest, signed.blob)


def _vote(signed: Signed) -> Vote:
    uid, epoch, candidate, seal_epoch, seal_number = _fields(signed, 5)
    _check_numbers(epoch, seal_epoch, seal_number)
    peer = PeerID(_bytes(candidate, 32))
    return Vote(_uid(uid), epoch, peer, (seal_epoch, seal_number), signed.signer, signed.blob)


def _term(signed: Signed, run: bytes) -> Term:
    uid, epoch, boot, kind, serial, blob, evidence = _fields(signed, 7)
    _check_numbers(epoch, serial, kind)
    if kind >= len(Kind):
        raise ProtocolError("a Term of an unknown kind")
    kind = Kind(kind)
    seal = None if blob is None else read_seal(blob, run)
    voters: tuple[PeerID, ...] = ()
    if kind is Kind.HANDOVER:
        if seal is not None and epoch > max(seal.time, seal.epoch) + HANDOVER_SECONDS:
            raise InvalidRecord("a handover that was taken long ago")
        _check_handover(_bytes(evidence, 64), run, seal, signed.signer)
    elif kind is Kind.TAKEOVER:
        voters = _check_votes(evidence, run, uid, epoch, signed.signer, seal)
    elif evidence != []:
        raise ProtocolError("a Term with evidence that it does not need")
    if (seal is None) != (kind is Kind.GENESIS) and kind is not Kind.APPOINTED:
        raise InvalidRecord("a Term without the Seal that it goes on from")
    if seal is not None and (seal.uid != uid or seal.epoch >= epoch):
        raise InvalidRecord("a Term that does not follow its Seal")
    if kind is not Kind.APPOINTED and serial != (0 if seal is None else seal.serial):
        raise InvalidRecord("a Term that changes the appointment")
    return Term(
        _uid(uid), epoch, _bytes(boot, 8), kind, serial, seal, voters, signed.signer, signed.digest, signed.blob
    )


def _check_handover(signature: bytes, run: bytes, seal: Seal | None, successor: PeerID) -> None:
    if seal is None or not verify(seal.blob[:32], signature, _handover(run, seal, successor)):
        raise InvalidRecord("a handover that the last primary did not sign")


def _handover(run: bytes, seal: Seal, successor: PeerID) -> bytes:
    return _domain("handover", run) + seal.digest + successor


def _check_votes(
    evidence: Any, run: bytes, uid: str, epoch: int, candidate: PeerID, seal: Seal | None
) -> tuple[PeerID, ...]:
    if seal is None or candidate not in seal.members:
        raise InvalidRecord("a takeover by somebody who is no member")
    if type(evidence) is not list or len(evidence) > MAX_SUCCESSORS:
        raise ProtocolError("a Term with malformed votes")
    voters: list[PeerID] = []
    for part in evidence:
        if type(part) is not list or len(part) != 3:
            raise ProtocolError("a Term with a malformed vote")
        head, *age = part
        vote = read_vote(_bytes(head, HEAD_BYTES) + msgpack.packb([uid, epoch, bytes(candidate), *age]), run)
        if vote.voter == candidate or vote.voter in voters or vote.voter not in seal.members:
            raise InvalidRecord("a vote of somebody who has none")
        if vote.seal > seal.age:
            raise InvalidRecord("a vote of somebody who holds a newer Seal")
        voters.append(vote.voter)
    # a primary that starts again alone needs nobody
    if 1 + len(voters) < majority(len(seal.members)):
        raise InvalidRecord("a takeover without a majority")
    return tuple(voters)


def _fields(signed: Signed, num: int) -> Sequence[Any]:
    if type(signed.body) is not list or len(signed.body) != num:
        raise ProtocolError("a record with too few or too many fields")
    fields: list[Any] = signed.body
    return fields


def _check_numbers(*values: Any) -> None:
    if any(type(value) is not int or not 0 <= value < 2**63 for value in values):
        raise ProtocolError("a record with a malformed number")


def _bytes(value: Any, length: int) -> bytes:
    if type(value) is not bytes or len(value) != length:
        raise ProtocolError("a record with malformed bytes")
    return value


def _uid(value: Any) -> str:
    if type(value) is not str or not 0 < len(value) <= 256:
        raise ProtocolError("a record without a uid")
    return value


# -- which branch holds ------------------------------------------------------------------------------------------------


class Lineage:
    """What was seen of one expert's Terms and Seals, and which Term holds.

    Only records of those who may host it are kept, so strangers change nothing. The Term that holds is the largest by

    1. the serial of the owner's appointment that it stands on,
    2. the number of hosts that say they follow its tree, where trees of Terms share no known beginning,
    3. whether that is the tree that this server has gone by for long (`stay`),
    4. its epoch, the number of its newest Seal, its hash.

    A Term that no majority stands behind (an adoption, one half of a pair) does not count once a Seal shows that those
    whom it thought dead went on (`refutes`). A primary that signed two Seals of one number is exposed: its
    Term still counts as the one that others go on from, but nobody listens to it.
    """

    def __init__(self, uid: str, authority: Authority) -> None:
        self.uid = uid
        self.num_forks = 0
        """Terms that lost to a Term which does not descend from them."""
        self._authority = authority
        self._terms: dict[bytes, Term] = {}
        self._seals: dict[bytes, Seal] = {}  # by Term: the newest
        self._early: dict[bytes, Seal] = {}  # by Term: whose Term was not seen yet
        self._exposed: dict[bytes, tuple[Seal, Seal]] = {}
        self._hosts: Mapping[PeerID, int] = {}
        self._home: bytes | None = None
        self._is_home_old = False
        self._best: Term | None = None
        self._is_stale = False

    def add(self, record: Term | Seal, *, now: float, leads: bool = False) -> bool:
        """Takes a record that was read. `now`: wall-clock seconds. Whether it was new and may count.

        A weak Term from the future counts once its time has come: until then the primary that it thinks dead, which
        sees it at once (`leads`), could not show the contrary.
        """
        if record.uid != self.uid or not self._may(record):
            return False
        appointment = self._authority.appointment(self.uid)
        if record.serial > (0 if appointment is None else appointment.serial):
            return False
        horizon = now - EPOCH_ZERO + SKEW
        if isinstance(record, Seal):
            return max(record.time, record.epoch) <= horizon and self._add_seal(record)
        if record.is_weak and record.seal is not None and not leads:
            horizon = max(horizon - SKEW, record.seal.epoch + 1)
        if record.epoch > horizon or record.digest in self._terms or not self._is_founded(record):
            return False
        self._terms[record.digest] = record
        self._is_stale = True
        if record.seal is not None and self._may(record.seal):
            self._add_seal(record.seal)
        if (early := self._early.pop(record.digest, None)) is not None:
            self._add_seal(early)
        self._prune()
        return record.digest in self._terms

    def _is_founded(self, term: Term) -> bool:
        """Whether the appointment that it names is its signer's, or the run lets its signer begin. What once was stays,
        also when another follows."""
        if term.kind is Kind.GENESIS:
            return self._authority.founder in (None, term.primary)
        appointment = self._authority.appointment(self.uid)
        if term.kind is not Kind.APPOINTED:
            return True
        return appointment is not None and (appointment.serial, appointment.peer) == (term.serial, term.primary)

    def _add_seal(self, seal: Seal) -> bool:
        term = self._terms.get(seal.term)
        if term is None:
            # strangers to the run never come here; a host's unknown Terms take one place each
            if len(self._early) < MAX_TERMS:
                known = self._early.get(seal.term)
                if known is None or known.number < seal.number:
                    self._early[seal.term] = seal
            return False
        if (seal.primary, seal.epoch, seal.serial) != (term.primary, term.epoch, term.serial):
            return False
        known = self._seals.get(seal.term)
        if known is not None and known.number == seal.number and known.digest != seal.digest:
            new = seal.term not in self._exposed
            self._exposed.setdefault(seal.term, (known, seal))
            return new
        if known is not None and known.number >= seal.number:
            return False
        self._seals[seal.term] = seal
        self._is_stale = True
        return True

    def set_hosts(self, hosts: Mapping[PeerID, int]) -> None:
        """Of everybody whose manifest names this expert: the epoch that it says it follows."""
        if hosts != self._hosts:
            self._hosts = dict(hosts)
            self._is_stale = True

    def stay(self, term: Term, *, is_old: bool) -> None:
        """This server goes by the tree of that Term, for long if `is_old`: then no single host's word moves it."""
        if (term.digest, is_old) != (self._home, self._is_home_old):
            self._home, self._is_home_old, self._is_stale = term.digest, is_old, True

    def is_home(self, term: Term) -> bool:
        """Whether it is of the tree that this server goes by."""
        home = None if self._home is None else self._terms.get(self._home)
        return home is not None and self._root(home) == self._root(term)

    def authority_changed(self) -> None:
        """Grants, revocations or appointments may be others now."""
        self._is_stale = True

    @property
    def best(self) -> Term | None:
        """The Term that holds; None while none was seen."""
        if self._is_stale:
            self._is_stale = False
            before, self._best = self._best, self._find_best()
            if before is not None and self._best is not None and before.digest not in self._ancestors(self._best):
                self.num_forks += 1
        return self._best

    def refutes(self, time: float, term: Term) -> bool:
        """Whether a Seal of that time, of the line that a weak Term thought silent for a lease or two, proves it wrong.

        Where clocks differ by more than that, a last Seal may do so in error: whoever stands waits until it is past.
        """
        return time > term.epoch

    def seal_of(self, term: Term) -> Seal | None:
        """The newest Seal of a Term, or its parent where it has none yet: the state that others have of it.

        Of an exposed primary, the one before the two.
        """
        if term.digest in self._exposed:
            return term.seal
        return self._seals.get(term.digest, term.seal)

    def term_of(self, seal: Seal) -> Term | None:
        """The Term that a Seal belongs to, if that was seen."""
        return self._terms.get(seal.term)

    def is_in_line(self, seal: Seal, term: Term) -> bool:
        """Whether the Term goes on from this Seal, or has it."""
        return seal.term in self._ancestors(term)

    def line(self, term: Term) -> list[bytes]:
        """The records that show where a Term comes from, as far as they are known, the oldest first; with its Seal."""
        line: list[bytes] = []
        step: Term | None = term
        while step is not None and len(line) < MAX_TERMS_OF_ONE:
            line.insert(0, step.blob)
            step = None if step.seal is None else self._terms.get(step.seal.term)
        seal = self._seals.get(term.digest)
        return line if seal is None else [*line, seal.blob]

    def is_exposed(self, term: Term) -> bool:
        """Whether its primary signed two Seals of one number."""
        return term.digest in self._exposed

    def evidence(self, term: Term) -> tuple[Seal, Seal] | None:
        """The two Seals that expose its primary."""
        return self._exposed.get(term.digest)

    def _may(self, record: Term | Seal) -> bool:
        # a Term by the grants of its time: expiry ends what may begin, not what goes on
        now = EPOCH_ZERO + record.epoch if isinstance(record, Term) else None
        return self._authority.may(record.primary, "host", self.uid, now=now)

    def _find_best(self) -> Term | None:
        standing = [term for term in self._terms.values() if self._may(term)]
        if not standing:
            return None
        lines = {term.digest: self._ancestors(term) for term in standing}
        refuted = {term.digest for term in standing if term.is_weak and self._is_refuted(term, lines)}
        standing = [term for term in standing if not refuted & lines[term.digest]] or standing
        # lines end in their beginning, known or not: those that share it are one tree
        roots = {term.digest: self._root(term) for term in standing}
        weights = self._weigh(standing, roots)
        home = None if self._home is None or not self._is_home_old else roots.get(self._home)

        def rank(term: Term) -> tuple[int, int, bool, int, int, bytes]:
            seal = self._seals.get(term.digest)
            number = 0 if seal is None or term.digest in self._exposed else seal.number
            root = roots[term.digest]
            return term.serial, weights[root], root == home, term.epoch, number, term.digest

        return max(standing, key=rank)

    def _weigh(self, standing: Sequence[Term], roots: Mapping[bytes, bytes]) -> Counter[bytes]:
        """How many hosts follow each tree, by the epochs that they name.

        Anybody may begin a tree with an epoch that stands in another. Then it is that of who names it for the Term that
        it signed itself, and else of the tree that this server goes by.
        """
        home = None if self._home is None else roots.get(self._home)
        weights: Counter[bytes] = Counter()
        for peer, epoch in self._hosts.items():
            if not self._authority.may(peer, "host", self.uid, now=None):
                continue
            named = [term for term in standing if term.epoch == epoch]
            trees = {roots[term.digest] for term in named}
            if len(trees) > 1:
                trees = {roots[term.digest] for term in named if term.primary == peer} or trees & {home} or trees
            weights.update(trees)
        return weights

    def _is_refuted(self, term: Term, lines: Mapping[bytes, set[bytes]]) -> bool:
        """Whether the line that it thought dead went on after it, by the word of those who lead it.

        No adoption comes within a lease of a member's Term: members have the expert before others may adopt it.
        """
        assert term.seal is not None
        adopts = term.kind is Kind.ADOPTION
        for digest, line in lines.items():
            if term.seal.term not in line or term.digest in line:
                continue
            seal, one = self._seals.get(digest), self._terms[digest]
            took = one.kind in (Kind.TAKEOVER, Kind.HANDOVER) and adopts and digest != term.seal.term
            lives = seal is not None and self.refutes(seal.time, term)
            if not lives and not (took and one.epoch > term.epoch - self._authority.lease):
                continue
            between = [self._terms[d] for d in line - lines.get(term.seal.term, {term.seal.term}) if d in self._terms]
            if not any(d.kind is Kind.ADOPTION or (d.is_weak and not adopts) for d in between):
                return True
        return False

    def _ancestors(self, term: Term) -> set[bytes]:
        """The digests of a Term and of those that it descends from, as far as they are known, and one beyond."""
        line = {term.digest}
        step: Term | None = term
        while step is not None and step.seal is not None and step.seal.term not in line:
            line.add(step.seal.term)
            step = self._terms.get(step.seal.term)
        return line

    def _root(self, term: Term) -> bytes:
        step, root, seen = term, term.digest, {term.digest}
        while step.seal is not None and step.seal.term not in seen:
            root = step.seal.term
            seen.add(root)
            if root not in self._terms:
                break
            step = self._terms[root]
        return root

    def _prune(self) -> None:
        best = self._best
        if len(self._terms) > MAX_TERMS // 2 and self._is_stale:
            best = self._find_best()
        line = set() if best is None else self._ancestors(best)
        others: dict[PeerID, list[Term]] = {}
        for term in sorted(self._terms.values(), key=lambda term: term.epoch):
            if term.digest not in line:
                others.setdefault(term.primary, []).append(term)
        for some in others.values():
            for old in some[: max(0, len(some) - MAX_TERMS_OF_ONE)]:
                self._forget(old)
        while len(self._terms) > MAX_TERMS:
            unrelated = [term for term in self._terms.values() if term.digest not in line]
            self._forget(min(unrelated or self._terms.values(), key=lambda term: term.epoch))

    def _forget(self, term: Term) -> None:
        del self._terms[term.digest]
        self._seals.pop(term.digest, None)
        self._exposed.pop(term.digest, None)
