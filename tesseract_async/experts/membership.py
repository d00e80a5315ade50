"""`Membership`: one server's knowledge of an expert's primary, its votes, what it may do, and the records that it
signs. No I/O."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Final

import msgpack

from tesseract_async.errors import ProtocolError
from tesseract_async.experts.authority import Authority
from tesseract_async.experts.grants import Appointment
from tesseract_async.experts.lineage import SKEW, Lineage
from tesseract_async.experts.own_term import NEVER, NUM_SUCCESSORS, Age
from tesseract_async.experts.tenure_words import Question, Send, State
from tesseract_async.experts.terms import (
    EPOCH_ZERO,
    Seal,
    Term,
    TermKind,
    Vote,
    majority,
    next_epoch,
    read_vote,
    sign_term,
)
from tesseract_async.identity import Identity, PeerID

MAX_OTHER_SOURCES: Final = 4
"""The most hosts that are asked for a file besides the Seal's members, which may all be gone."""
POLL_SECONDS: Final = 2.0
"""Seconds to wait for the answers to questions of one kind."""
LATE: Final = 0.5
"""A poll that ends this many seconds late shows that this server stood still: then it says nothing about the others."""
ASKING: Final = 3.0
"""Seconds that asking all members takes, with reading the network before or meanwhile."""


@dataclass(slots=True)
class Poll:
    """Questions of one kind under way, of which all answers are waited for."""

    kind: str
    epoch: int
    deadline: float
    waiting: set[PeerID]
    silent: set[PeerID] = field(default_factory=set)
    votes: dict[PeerID, Vote] = field(default_factory=dict)
    given: dict[PeerID, tuple[float, Age]] = field(default_factory=dict)
    """For each voter, the time at which its vote was asked for, and the age of the file that it holds."""
    is_second: bool = False
    """True if these members were asked before, and this server stood still meanwhile."""
    has_primary: bool = False
    """True if an answer said that there is a primary."""
    newest: Age = (0, 0)
    """The age of the newest file named by a server that could lead the expert."""

    def is_late(self, now: float) -> bool:
        """Return whether this server stood still while it waited, for the first time."""
        return now >= self.deadline + LATE and not self.is_second

    def settles(self, peer: PeerID, question: Question) -> bool:
        if peer not in self.waiting or (question.kind, question.epoch) != (self.kind, self.epoch):
            return False
        self.waiting.discard(peer)
        return True


@dataclass(slots=True)
class Permissions:
    """The things that this server's own placement lets it do with the expert (`experts.placement`)."""

    primary: bool = True
    """True if it may become the primary: it has room to compute the expert. Otherwise it votes and holds the file, but
    does not stand for election."""
    begin: bool = True
    """True if it may begin the expert where nobody has a state."""
    anew: bool = False
    """True if it may begin the expert even though a state is known, which nobody can show any more."""
    write: bool = True
    """True if its disk takes its promises. If not, it sends nothing and does not stand for election."""
    passive: frozenset[PeerID] = frozenset()
    """Peers that could not become its primary, and so are no successors."""


class Membership:
    def __init__(
        self, identity: Identity, uid: str, authority: Authority, *, boot: bytes, now: float, wall: float
    ) -> None:
        self.uid = uid
        self.me = identity.peer_id
        self.lineage = Lineage(uid, authority)
        self.lease = authority.lease
        self.leave = Permissions()
        self.held: Seal | None = None
        """The Seal whose file is here."""
        self.hosts: Mapping[PeerID, int] = {}
        """The peers whose manifests name the expert, and the epoch in each."""
        self.heard = now
        """The time at which it last heard of the primary that it follows, from that one or from others."""
        self.beaten = -math.inf
        """The time at which the last beat of that primary came."""
        self.agreed_at = now
        """The time at which it last agreed with a beat: for a lease, it gives no vote."""
        self.vote_from = now
        self.looked_at = NEVER
        """The time at which all that the network holds of the expert was read."""
        self.first_look = math.inf
        """The time at which that was done for the first time."""
        self.retry_at = 0.0
        """The time before which it does not stand again."""
        self.promised = 0
        """The highest epoch voted in. For a lease after that, no beat of a lower one is agreed with."""
        self.handed_over = 0
        """The epoch of the newest Term that it signed over to another."""
        self.unsettled = b""
        """The digest of its own newest Seal, while no majority of the members before it holds that Seal."""
        self._voted_for = b""
        self._promised_at = NEVER
        self._agreed_with: Term | None = None
        self.signer = identity, authority.run_id
        """The first arguments of `sign_vote`, `sign_seal` and the like."""
        self._authority = authority
        self._boot = boot
        self._boots = {boot}
        self._started = wall - EPOCH_ZERO

    # -- what is seen --------------------------------------------------------------------------------------------------

    def is_disproved(self, record: Term | Seal, state: State, now: float) -> bool:
        """Return whether it is an adoption that claims two leases of silence of all members, and this one spoke."""
        if not isinstance(record, Term) or record.kind is not TermKind.ADOPTION or record.seal is None:
            return False
        best, held = self.lineage.best, self.held
        if best is not None and self.hosts.get(best.primary, best.epoch) > best.epoch:
            return False  # its primary goes by another Term itself
        if state not in (State.FOLLOWING, State.CANDIDATE) or held is None or now > self.beaten + 2 * self.lease:
            return False
        return self.me in held.members and record.primary != self.me and record.seal.age <= held.age

    def is_of_twin(self, record: Term | Seal) -> bool:
        """Return whether another process signed this with the same key, and not before this one started."""
        if record.primary != self.me:
            return False
        if isinstance(record, Term):
            return record.boot not in self._boots and record.epoch > self._started
        term = self.lineage.term_of(record)
        return term is not None and term.boot != self._boot and record.time > self._started

    def is_beat(self, peer: PeerID, question: Question, now: float) -> bool:
        """Return whether this question comes from the primary, and this server is not bound by a vote for another."""
        best = self.lineage.best
        if best is None or self.lineage.is_exposed(best) or self.is_bound(best, now) or self._is_sworn(best, now):
            return False
        # not from the other of two processes with one key: nobody agrees with it
        return (peer, question.epoch, question.boot) == (best.primary, best.epoch, best.boot) and peer != self.me

    def agree(self, now: float) -> None:
        """Agree with the primary that it knows: for a lease, it neither votes for another nor agrees with one."""
        self.agreed_at, self._agreed_with = now, self.lineage.best

    def _is_sworn(self, term: Term, now: float) -> bool:
        """Return whether another primary may still rely on this server's promise. Then the primary of this Term is
        late, with votes that no longer bind anybody, and would be a second primary."""
        before = self._agreed_with
        if before is None or now >= self.agreed_at + self.lease or self.lineage.is_exposed(before):
            return False
        if term.is_weak or term.kind not in (TermKind.TAKEOVER, TermKind.HANDOVER):
            return False  # it counts on nobody's word
        is_same = (term.primary, term.boot) == (before.primary, before.boot)
        return not is_same and not self.lineage.is_handed_over(before, term)

    def is_free(self, now: float) -> bool:
        """Return whether nothing that the primary said binds this server any more: it may vote for another."""
        best = self.lineage.best
        exposed = best is not None and self.lineage.is_exposed(best)
        return exposed or now >= max(self.heard, self.agreed_at) + self.lease

    def silence_at(self, state: State) -> float:
        """Return the time from which the primary's silence is long enough for this server to stand for election."""
        best = self.lineage.best
        exposed = best is not None and self.lineage.is_exposed(best)
        step = self._step
        if state is State.HOLDING:  # the members come first
            wait = max(self.lease + NUM_SUCCESSORS * step, self._adopt_after)
        else:
            members = () if self.held is None else self.held.successors
            rank = members.index(self.me) if self.me in members else 0
            # half a step: the last beat reached some a little later, and they are to be free for another vote
            wait = step * (rank + 0.5) + (0.0 if exposed else self.lease)
        return max(self.heard + wait, self.agreed_at + self.lease, self.vote_from, self.retry_at)

    def ask_at(self, state: State) -> float:
        """Return the time to ask the primary for a sign of life: it has, or has not, answered by `silence_at`."""
        silence = self.silence_at(state)
        return min(silence, max(silence - POLL_SECONDS, self.heard + self.lease / 2))

    def is_unsealed(self, now: float) -> bool:
        """Return whether nobody knows of a Seal, and nobody has lately said that it is about to make one."""
        best = self.lineage.best
        if best is None or self.leave.anew:
            return True
        gone = best.primary == self.me or now - self.heard > 2 * self.lease
        return gone and self.lineage.seal_of(best) is None

    def may_begin(self, now: float, wall: float) -> bool:
        if not self.is_unsealed(now):
            return False
        forgotten = self._authority.may_be_forgotten(wall)
        others = (epoch for peer, epoch in self.hosts.items() if peer != self.me and self.may_host(peer))
        if not forgotten and max(others, default=0) <= self.lineage.epoch:
            return True
        return now >= self.first_look + 10 * self.lease and (self._authority.may_restart or not forgotten)

    @property
    def patience(self) -> float:
        """Seconds for which an elected candidate waits until most follow it, and its voters for it."""
        return max(self.lease / 3, POLL_SECONDS + 1.0)

    @property
    def _step(self) -> float:
        """Seconds by which each member lets the one before it stand first."""
        return min(2.0, self.lease / 6)

    @property
    def _settle(self) -> float:
        # the members have their turn first; for the rest of two leases the Term lies in the network, and all are asked
        left = self.lease - NUM_SUCCESSORS * self._step - ASKING
        return max(self.lease / 6, min(0.6 * self.lease, left))

    @property
    def _adopt_after(self) -> float:
        return max(self.lease, 2 * self.lease - ASKING - self._settle)

    def settled_at(self, now: float) -> float:
        """Return the time at which a Term that adopts the expert, and goes out now, is read back.

        By then a primary that this server alone does not reach has read it, and answered.
        """
        if self.held is None or self.held.primary != self.me:
            return now + self._settle
        # it was the primary itself, and fenced until now: who was elected meanwhile has shown that
        return max(now + min(5.0, self.lease / 6), min(now + self._settle, self.heard + 2 * self.lease - ASKING))

    @property
    def adopt_at(self) -> float:
        """Return the time at which the expert may be adopted, if all of its members are silent until then."""
        return self.heard + self._adopt_after

    def may_adopt(self, now: float, wall: float) -> bool:
        """Return whether the silence is long enough and means something: the network answers this server, and would
        believe the adoption."""
        if now < self.adopt_at:
            return False
        best = self.lineage.best
        seal = None if best is None else self.lineage.seal_of(best)
        past = seal is None or wall - EPOCH_ZERO > seal.time + 1
        return past and self.has_looked(now)

    def has_looked(self, now: float) -> bool:
        """Return whether all that the network holds of the expert was read lately."""
        return now - self.looked_at < max(self.lease / 2, 5.0)

    def ask(self, kind: str, others: set[PeerID], epoch: int, now: float) -> tuple[Poll, list[Send]]:
        best, held = self.lineage.best, self.held
        term = b"" if best is None or kind == "vote" else best.blob
        question = Question(kind, epoch, self._boot, term, b"" if held is None else held.blob)
        return Poll(kind, epoch, now + POLL_SECONDS, set(others)), [Send(peer, question) for peer in sorted(others)]

    def primaries(self, best: Term, members: Iterable[PeerID]) -> set[PeerID]:
        """Return peers to ask, too, whether the expert has a primary: while one is alive whose file could not be had,
        nobody stands against it in its own tree."""
        unshown = self.lineage.unshown
        found = {best.primary, *members}
        if unshown is not None and self.lineage.is_home(unshown):
            found.add(unshown.primary)
        return found - {self.me}

    def note_silence(self, poll: Poll, now: float) -> None:
        """Treat an adoption whose signer does not answer as one without a state: otherwise it could be repeated
        forever."""
        best = self.lineage.best
        if best is not None and best.kind is TermKind.ADOPTION and best.primary in poll.silent:
            self.lineage.missed(best, now)

    def sources(self, term: Term, seal: Seal, random: Random) -> tuple[PeerID, ...]:
        """Return the peers to fetch a Seal of that Term's line from: its members, then some hosts of the expert."""
        hosts = [peer for peer in sorted(self.hosts) if self.may_host(peer)]
        some = random.sample(hosts, min(MAX_OTHER_SOURCES, len(hosts)))
        return tuple(dict.fromkeys(peer for peer in (term.primary, *seal.members, *some) if peer != self.me))

    # -- votes ---------------------------------------------------------------------------------------------------------

    def promise(self, epoch: int, candidate: PeerID, now: float) -> None:
        self.promised, self._voted_for, self._promised_at = epoch, bytes(candidate), now

    def take_back_own_vote(self) -> None:
        """Take back this server's own vote, and agree with the present primary again: nobody else can use that vote."""
        if self._voted_for == self.me:
            self._promised_at = NEVER

    def voted_for(self, term: Term) -> bool:
        """Return whether this server voted for its signer: then it waits for the signer, and does not stand against
        it."""
        return (self.promised, self._voted_for) == (term.epoch, term.primary)

    def is_bound(self, term: Term, now: float) -> bool:
        """Return whether it voted for a successor of this Term, which comes forward within a lease, or never."""
        return self.promised > term.epoch and now < self._promised_at + self.lease

    def may_vote(self, peer: PeerID, epoch: int, seal: Seal, now: float, wall: float) -> bool:
        """Return whether `peer`, which holds this Seal, may have its vote: one per epoch, and no older file; none in an
        epoch that nobody would believe yet."""
        best, held = self.lineage.best, self.held
        if epoch > wall - EPOCH_ZERO + SKEW:
            return False
        if best is None or held is None or epoch <= best.epoch or now < self.vote_from or seal.age < held.age:
            return False
        if self.me not in seal.members or peer not in seal.members or peer == self.me:
            return False
        if self.lineage.is_forged(seal) or (self.lineage.term_of(seal) is None and seal.primary not in held.members):
            return False  # anybody may sign that they are members of something
        return epoch > self.promised or (epoch == self.promised and self._voted_for == peer)

    @property
    def num_needed(self) -> int:
        """The number of members, the candidate included, whose votes a takeover from the held Seal needs.

        Its own does not suffice for a half of a pair that was made while no majority of the members before knew of it:
        those may have elected another primary. Nor where a later Seal, whose file is not here, names other members."""
        assert self.held is not None
        members, term = set(self.held.members), self.lineage.term_of(self.held)
        newest = None if term is None or self.lineage.is_exposed(term) else self.lineage.own_seal_of(term)
        is_past = newest is not None and len(members) == 2 and members != set(newest.members)
        return (
            max(2, majority(len(members))) if is_past or self.held.digest == self.unsettled else majority(len(members))
        )

    def read_vote(self, peer: PeerID, blob: bytes, epoch: int) -> Vote | None:
        try:
            vote = read_vote(blob, self._authority.run_id)
        except ProtocolError:
            return None
        assert self.held is not None
        fits = (vote.voter, vote.uid, vote.epoch, vote.candidate) == (peer, self.uid, epoch, self.me)
        return vote if fits and vote.seal <= self.held.age and peer in self.held.members else None

    # -- what it may do, and signs -------------------------------------------------------------------------------------

    def may_host(self, peer: PeerID) -> bool:
        return self._authority.may(peer, "host", self.uid, now=None)

    def may_look(self, peer: PeerID) -> bool:
        """Return whether this peer may know who leads the expert, and from which state others can go on."""
        return self._authority.is_member(peer)

    def may_succeed(self, peer: PeerID) -> bool:
        return self.may_host(peer) and peer not in self.leave.passive

    def may_stand(self, kind: TermKind, seal: Seal | None, wall: float) -> bool:
        """Return whether this server may begin a Term from this Seal, and nobody was appointed instead."""
        if not (self.leave.primary and self.leave.write) or (kind is TermKind.GENESIS and not self.leave.begin):
            return False
        appointment = self._authority.appointment(self.uid)
        serial = 0 if seal is None else seal.serial
        if appointment is not None and appointment.peer is not None and appointment.serial > serial:
            return False
        may_found = kind is not TermKind.GENESIS or self._authority.founder in (None, self.me)
        return may_found and self._authority.may(self.me, "host", self.uid, now=wall)

    def appointment(self) -> Appointment | None:
        """Return the owner's appointment that gives the expert to this server, which has not taken it yet."""
        appointment, best = self._authority.appointment(self.uid), self.lineage.best
        if appointment is None or appointment.peer != self.me or (best and best.serial >= appointment.serial):
            return None
        return appointment

    def next_epoch(self, parent: Seal | None, wall: float) -> int:
        """The epoch of a Term that begins now, above all that is known here."""
        known = (one.epoch for one in (self.lineage.best, parent) if one is not None)
        own = 0 if parent is None or parent.primary != self.me else parent.time  # its clock may have been set back
        return next_epoch(max(self.promised, own, *known, 0), wall - EPOCH_ZERO)

    def sign_term(self, kind: TermKind, seal: Seal | None, epoch: int, evidence: Poll | bytes) -> Term | None:
        """Sign a Term; None if the evidence (votes, or the signature of a handover) is not enough."""
        serial = 0 if seal is None else seal.serial
        appointment = self._authority.appointment(self.uid)
        if kind is TermKind.APPOINTED and appointment is not None:
            serial = appointment.serial
        votes = list(evidence.votes.values()) if isinstance(evidence, Poll) and kind is TermKind.TAKEOVER else []
        try:
            return sign_term(
                *self.signer,
                uid=self.uid,
                epoch=epoch,
                boot=self._boot,
                kind=kind,
                serial=serial,
                seal=seal,
                votes=votes,
                handover=evidence if isinstance(evidence, bytes) else b"",
            )
        except ValueError:
            return None

    # -- what survives the process -------------------------------------------------------------------------------------

    def stored(self, term: Term | None) -> bytes:
        """Encode for `restore`. `term`: the one that this server stands on, if that is its own."""
        best = term or self.lineage.best
        stored = {
            "promised": self.promised,
            "voted_for": self._voted_for,
            "handed_over": self.handed_over,
            "unsettled": self.unsettled,
            "boot": self._boot,
            "terms": [] if best is None else self.lineage.line(best),
            "held": b"" if self.held is None else self.held.blob,
        }
        packed: bytes = msgpack.packb(stored)
        return packed

    def restore(self, stored: bytes, *, has_file: bool, now: float, wall: float) -> None:
        """Go on from what a former process stored. A lease passes first, because that process may have answered a beat
        just before."""
        try:
            data = msgpack.unpackb(stored)
            self.promised, self._voted_for = int(data["promised"]), bytes(data["voted_for"])
            self.handed_over = int(data["handed_over"])
            self.unsettled = bytes(data.get("unsettled", b""))
            self._boots.add(bytes(data["boot"]))
            records = [self.lineage.read(blob) for blob in (*data["terms"], data["held"])]
        except (ValueError, LookupError, TypeError, msgpack.UnpackException):
            return  # as if nothing had been stored: it may not vote or be primary before it has read the network
        for record in records:
            if record is not None:
                # it counted then; by the present clock it may lie in the future
                seal = record if isinstance(record, Seal) else record.seal
                last = max(record.epoch, 0 if seal is None else seal.time)
                self.lineage.add(record, now=max(wall, EPOCH_ZERO + last))
                if isinstance(record, Term) and record.primary == self.me:
                    self._boots.add(record.boot)
        self.vote_from = self.heard = now + self.lease
        self._promised_at = now
        held = records[-1]
        if has_file and isinstance(held, Seal):
            self.held = held
