"""`Tenure`: who one server is to one expert of a run, as a pure machine: it leads it, follows it, or stands aside.

Time goes in twice: `now` is a clock that nobody sets and that runs through suspend, for durations; `wall` is seconds
since 1970, for records. Answers of others and what the network holds go in; commands come out, to be carried out in
their order, each before the next: what is to be on disk is there before anything that depends on it is said. A leader
counts its lease from sending, its successors from receipt, so that its lease has ended before theirs begins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from tesseract_async.errors import ProtocolError
from tesseract_async.experts.members import Members
from tesseract_async.experts.tenure_base import Poll, TenureBase
from tesseract_async.experts.tenure_words import (
    Answer,
    Ask,
    Fetch,
    Look,
    Publish,
    Send,
    State,
)
from tesseract_async.experts.terms import (
    EPOCH_ZERO,
    Kind,
    Seal,
    Term,
    Vote,
    majority,
    next_epoch,
    read_vote,
    sign_handover,
    sign_seal,
    sign_term,
    sign_vote,
)
from tesseract_async.identity import PeerID

MAX_BEATS: Final = 6
"""Hosts of an expert that hear from its primary at least: members, and those who may become one."""
PUBLISH_EVERY: Final = 600.0
"""Seconds between Seals in the network, where nothing but the state changed; its members hear of each at once."""


class Tenure(TenureBase):
    """One expert on one server. Untrusted: whatever comes with `sight`, `ask` and `answered`; it raises nothing."""

    # -- what is seen --------------------------------------------------------------------------------------------------

    def sight(self, blob: Any, now: float, wall: float) -> bool:
        """A Term or Seal that somebody showed, or that lies in the network. Whether it is new, and counts."""
        record = self._read(blob)
        if record is None or self._is_alive(record, now):
            return False
        if not self.lineage.add(record, now=wall, leads=self.term is not None):
            return False
        if record.primary == self.me and self._is_of_twin(record):
            self._find_twin(now, wall)
        if isinstance(record, Seal) and record.primary == self.primary and record.primary != self.me:
            self._heard = max(self._heard, now) if self.state is State.HOLDING else self._heard
        self._review(now, wall)
        return True

    def set_hosts(self, hosts: Mapping[PeerID, int], now: float, wall: float) -> None:
        """Whose manifests name the expert now, and the epoch in each."""
        self._hosts = dict(hosts)
        self.lineage.set_hosts(hosts)
        self._review(now, wall)

    def authority_changed(self, now: float, wall: float) -> None:
        """Grants, revocations or appointments may be others now."""
        self.lineage.authority_changed()
        self._review(now, wall)
        self._appoint(now, wall)

    def looked(self, now: float, wall: float) -> None:
        """Everything that the network holds of the expert was sighted, and it takes what this server publishes."""
        self._looked_at = self._renewed = now
        self._review(now, wall)
        self._was_alone &= self.state is State.FOLLOWING
        if self.state is State.CANDIDATE and self._poll is None and self._settle_at is None:
            self._read_back(now)
        elif self.state is State.FENCED:
            self._recover(now)
        elif self._was_alone and self.state is State.FOLLOWING and self.primary == self.me:
            self._heard = self._vote_from = self._agreed_at = now - 2 * self._lease
        elif self.state is State.ABSENT and self._is_unsealed(now):
            self._stand(Kind.GENESIS, None, now, wall)
        self._appoint(now, wall)

    def _is_unsealed(self, now: float) -> bool:
        """Whether nobody knows of a Seal, nor has lately said that it is about to make one."""
        best = self.lineage.best
        if best is None:
            return True
        gone = best.primary == self.me or now - self._heard > 2 * self._lease
        return gone and self.lineage.seal_of(best) is None

    # -- questions -----------------------------------------------------------------------------------------------------

    def ask(self, peer: PeerID, ask: Ask, now: float, wall: float) -> Answer:
        """Answers `peer`. Carry out `commands` before the answer goes out."""
        if not self._may_host(peer):
            return Answer(False, (0, 0), b"", b"")
        self.sight(ask.term, now, wall)
        self.sight(ask.seal, now, wall)
        best = self.lineage.best
        agrees, vote = False, b""
        if ask.kind in ("beat", "rise") and best is not None and self._is_beat_of(peer, ask, best, now):
            # for a lease, a primary that lost touch may come back; then others stand
            agrees = ask.kind == "beat" or now < self._heard + self._lease
            if ask.kind == "beat":
                self._heard = self._beaten = now
            self._agreed_at = now if agrees else self._agreed_at
            self._review(now, wall)  # a file that could not be had is asked for again
        elif ask.kind == "probe":
            agrees = self.leads(now)
        elif ask.kind == "vote":
            agrees = self.state is State.FOLLOWING and now < self._heard + self._lease / 2
            vote = self._vote(peer, ask, now)
        known = b"" if best is None or agrees or best.blob == ask.term else best.blob
        return Answer(agrees, (0, 0) if self.held is None else self.held.age, known, vote)

    def answered(self, peer: PeerID, ask: Ask, answer: Answer, sent: float, now: float, wall: float) -> None:
        """`peer`'s answer to what was sent to it at `sent`."""
        if answer.term:
            self.sight(answer.term, now, wall)
        if ask.kind in ("beat", "rise"):
            if answer.agrees and self.term is not None and ask.epoch == self.term.epoch:
                self._members.agreed(peer, sent, answer.held)
                if self.state is State.FENCED:
                    self._recover(now)
            elif not answer.agrees:
                self._members.disagreed(peer)
            return
        poll = self._poll
        if poll is None or peer not in poll.waiting or poll.kind != ask.kind or poll.epoch != ask.epoch:
            return
        poll.waiting.discard(peer)
        if ask.kind == "probe":
            poll.alive |= answer.agrees or self.state is State.HOLDING
        elif answer.vote and (vote := self._check_vote(peer, answer.vote, poll.epoch)) is not None:
            poll.votes[peer] = vote
            self._members.agreed(peer, sent, answer.held)
        else:
            poll.alive |= answer.agrees
        self._count(now, wall)

    def silent(self, peer: PeerID, ask: Ask, now: float, wall: float) -> None:
        """`peer` did not answer within the time for it."""
        poll = self._poll
        if poll is not None and peer in poll.waiting and poll.kind == ask.kind and poll.epoch == ask.epoch:
            poll.waiting.discard(peer)
            poll.silent.add(peer)
            self._count(now, wall)

    def _vote(self, peer: PeerID, ask: Ask, now: float) -> bytes:
        seal = self._read(ask.seal)
        best = self.lineage.best
        if not isinstance(seal, Seal) or best is None or ask.epoch <= best.epoch or now < self._vote_from:
            return b""
        if self.me not in seal.members or peer not in seal.members or peer == self.me or self.held is None:
            return b""
        if self.state not in (State.FOLLOWING, State.CANDIDATE, State.FENCED) or seal.age < self.held.age:
            return b""
        if self.state is State.FENCED and (now < self._lease_until() or seal.age < (best.epoch, self._number)):
            return b""
        if now < max(self._heard, self._agreed_at) + self._lease and not self.lineage.is_exposed(best):
            if self.state is State.FOLLOWING:
                return b""
        if ask.epoch < self._promised or (ask.epoch == self._promised and self._voted_for != peer):
            return b""
        if self.state is State.CANDIDATE:  # it stands itself, in a lower epoch: its own vote there is not taken back
            self._give_up(now)
        if self._promised != ask.epoch:
            self._promise(ask.epoch, peer, now)
            self._persist()
        age = self.held.age
        return sign_vote(self._identity, self._run, uid=self.uid, epoch=ask.epoch, candidate=peer, seal=age).blob

    def _check_vote(self, peer: PeerID, blob: bytes, epoch: int) -> Vote | None:
        try:
            vote = read_vote(blob, self._run)
        except ProtocolError:
            return None
        assert self.held is not None
        fits = (vote.voter, vote.uid, vote.epoch, vote.candidate) == (peer, self.uid, epoch, self.me)
        return vote if fits and vote.seal <= self.held.age and peer in self.held.members else None

    # -- leading -------------------------------------------------------------------------------------------------------

    def seal(self, root: bytes, size: int, version: int, now: float, wall: float) -> Seal | None:
        """A Seal of the state that was just written to a file, for the members; None while this server does not lead.

        The file stays as it is until the next Seal: others fetch it by its root.
        """
        if self.term is None or not (self.leads(now) or self.state is State.YIELDING):
            return None
        self._number += 1
        before, members = self._members.named, self._members.named
        if self.state is State.LEADING:
            first = (0, 1) if self.term.seal is None else self.term.seal.age
            members = self._members.choose(now, self._lease, first, self._may_host)
        seal = sign_seal(
            self._identity,
            self._run,
            term=self.term,
            number=self._number,
            version=version,
            root=root,
            size=size,
            time=max(0, int(wall - EPOCH_ZERO)),
            successors=members,
        )
        self.held = seal
        self._known[seal.blob] = seal
        self.lineage.add(seal, now=wall)
        self._members.name(members, seal.age)
        self._persist()
        if (
            members != before
            or self._number == 1
            or self.state is State.YIELDING
            or now >= self._published_at + PUBLISH_EVERY
        ):
            self._publish(now)
        self._beat_at = now
        return seal

    def leave(self) -> bool:
        """Takes no more steps, in order to give the expert away. Then `seal` its last state, and `hand_over`."""
        if self.state is not State.LEADING:
            return False
        self.state = State.YIELDING
        self._say_role()
        return True

    def heirs(self, now: float) -> list[PeerID]:
        """To whom it may be given: hosts that answered within a lease, members first, those with the newest file; then
        the others."""
        best = [peer for peer in self._members.best(now, self._lease) if peer in self._hosts]
        return best + [peer for peer in sorted(self._hosts) if peer not in best and peer != self.me]

    def hand_over(self, heir: PeerID) -> bytes:
        """The signature that gives the expert to `heir`, which proved that it has the last Seal's file.

        Carry out `commands` before it goes out. This server does not lead in this epoch again, whatever comes of it.
        """
        assert self.state is State.YIELDING and self.term is not None and self.held is not None
        self._handed_over = self.term.epoch
        self.state = State.FOLLOWING
        self._heard = self._looked_at
        self._persist()
        return sign_handover(self._identity, self._run, self.held, heir)

    def keep(self, now: float) -> None:
        """Nobody took it: goes on, once a majority answers."""
        if self.state is State.YIELDING:
            self._fence(now)

    def take(self, signature: bytes, now: float, wall: float) -> bool:
        """Leads by the last primary's signature over the Seal whose file is here. Whether it holds."""
        if self.held is None or self.state in (State.LEADING, State.YIELDING) or self.is_twin:
            return False
        return self._stand(Kind.HANDOVER, self.held, now, wall, handover=signature)

    # -- the file ------------------------------------------------------------------------------------------------------

    def fetched(self, seal: Seal, now: float, wall: float) -> None:
        """The file of this Seal is here, whole, and what the expert goes on from."""
        self._fetching, self._has_own_steps = None, False
        self.held = seal
        self._heard = max(self._heard, now) if self.state is State.HOLDING else self._heard
        if self.state in (State.ABSENT, State.ASIDE):
            self.state, self._heard = State.HOLDING, now
        self._persist()
        self._review(now, wall)

    def not_fetched(self, seal: Seal) -> None:
        """It could not be had: it is asked for again after the next look."""
        self._fetching = None

    # -- time ----------------------------------------------------------------------------------------------------------

    def handle_timer(self, now: float, wall: float) -> None:
        """What is due by `now`. The first thing after a suspend: a lease may have ended meanwhile."""
        if self.state is State.LEADING and now >= self._lease_until():
            self._fence(now)
        if self._poll is not None:
            if now >= self._poll.deadline:
                for peer in self._poll.waiting:
                    self._poll.silent.add(peer)
                self._poll.waiting.clear()
                self._count(now, wall)
            return
        if self._settle_at is not None:
            if now >= self._settle_at:
                self._settle_at = None
                self._look(now)
            return
        if (
            self.state is State.FENCED
            and now >= self._fenced_at + self._lease
            and len(self._members.settled) > 1
            and not self.is_twin
        ):
            # its members have stopped to listen: it stands like any of them
            self.state, self.term, self._heard = State.FOLLOWING, None, self._fenced_at
        if self.state in (State.LEADING, State.FENCED):
            if now >= self._beat_at:
                self._beat(now)
                self._review(now, wall)
        elif self.state in (State.FOLLOWING, State.HOLDING):
            if now >= self._silence_at():
                self._doubt(now, wall)
        elif now >= self._look_at:
            self._look(now)

    def _doubt(self, now: float, wall: float) -> None:
        """Silence: is the primary gone? Then this server stands, where it may."""
        best, held = self.lineage.best, self.held
        if best is None or held is None or self.is_twin:
            self._retry(now)
            return
        if self.state is State.HOLDING:
            others = {*held.members, best.primary} - {self.me}
        else:
            others = {best.primary} - {self.me}
        if not others or (self.state is State.FOLLOWING and self.lineage.is_exposed(best)):
            self._stand(Kind.TAKEOVER, held, now, wall)
            return
        self._ask_all("probe", others, best.epoch, now)

    def _ask_all(self, kind: str, others: set[PeerID], epoch: int, now: float) -> None:
        best, held = self.lineage.best, self.held
        term = b"" if best is None or kind == "vote" else best.blob
        ask = Ask(kind, epoch, self._boot, term, b"" if held is None else held.blob)
        self._poll = Poll(kind, now + 2.0, set(others), epoch)
        self._commands += [Send(peer, ask) for peer in sorted(others)]

    def _count(self, now: float, wall: float) -> None:
        """Whether the answers that came decide."""
        poll = self._poll
        assert poll is not None
        if poll.kind == "probe":
            if poll.alive:
                self._heard = now
                self._give_up(now)
            elif not poll.waiting:
                self._poll = None
                assert self.held is not None
                if self.state is State.CANDIDATE:
                    self._lead(now)
                elif self.state is State.FOLLOWING:
                    self._stand(Kind.TAKEOVER, self.held, now, wall)
                elif self.state is State.HOLDING and self._may_adopt(now, wall):
                    self._stand(Kind.ADOPTION, self.held, now, wall)
                else:
                    self._retry(now)
            return
        assert self.held is not None
        members = self.held.members
        if 1 + len(poll.votes) >= majority(len(members)) and now <= poll.deadline:
            self._poll = None
            self._begin(Kind.TAKEOVER, self.held, poll.epoch, now, wall, votes=list(poll.votes.values()))
        elif not poll.waiting or now > poll.deadline:
            self._poll = None
            everybody_else_is_gone = poll.silent | poll.votes.keys() >= set(members) - {self.me}
            if everybody_else_is_gone and now >= self._heard + 2 * self._lease and self._may_adopt(now, wall):
                self._begin(Kind.ADOPTION, self.held, poll.epoch, now, wall)
            else:
                if poll.alive:  # only this server was cut off: by the next time, its own vote binds it no more
                    self._heard = now
                self._give_up(now)

    def _may_adopt(self, now: float, wall: float) -> bool:
        """Whether the network answers here, so that the others' silence says something, and would believe it."""
        best = self.lineage.best
        seal = None if best is None else self.lineage.seal_of(best)
        past = seal is None or wall - EPOCH_ZERO > seal.time + 1
        return now - self._looked_at < self._lease / 2 and past

    # -- becoming the primary ------------------------------------------------------------------------------------------

    def _stand(self, kind: Kind, seal: Seal | None, now: float, wall: float, *, handover: bytes = b"") -> bool:
        """Tries to lead from this Seal, where no appointment says otherwise."""
        appointment = self._authority.appointment(self.uid)
        serial = 0 if seal is None else seal.serial
        may = self._authority.may(self.me, "host", self.uid, now=wall)
        may = may and (kind is not Kind.GENESIS or self._authority.founder in (None, self.me))
        another = appointment is not None and appointment.peer is not None and appointment.serial > serial
        if not may or self.is_twin or another:
            self._retry(now)
            return False
        best = self.lineage.best
        parent = max(self._promised, 0 if best is None else best.epoch, 0 if seal is None else seal.epoch)
        epoch = next_epoch(parent, wall - EPOCH_ZERO)
        others = set() if seal is None else set(seal.members) - {self.me}
        if kind is Kind.TAKEOVER and others and 1 < majority(len(others) + 1):
            self.state = State.CANDIDATE
            self._promise(epoch, self.me, now)
            self._persist()
            self._ask_all("vote", others, epoch, now)
            return True
        return self._begin(kind, seal, epoch, now, wall, handover=handover)

    def _begin(
        self,
        kind: Kind,
        seal: Seal | None,
        epoch: int,
        now: float,
        wall: float,
        *,
        serial: int | None = None,
        votes: Sequence[Vote] = (),
        handover: bytes = b"",
    ) -> bool:
        if serial is None:
            serial = 0 if seal is None else seal.serial
        try:
            term = sign_term(
                self._identity,
                self._run,
                uid=self.uid,
                epoch=epoch,
                boot=self._boot,
                kind=kind,
                serial=serial,
                seal=seal,
                votes=votes,
                handover=handover,
            )
        except ValueError:
            self._give_up(now)  # a signature that does not hold
            return False
        self.state, self.term, self._number = State.CANDIDATE, term, 0
        self._known[term.blob] = term
        self._promise(epoch, self.me, now)
        self.lineage.add(term, now=wall, leads=True)
        # those who had a say in the parent have it until a Seal with others is settled
        gone = kind in (Kind.GENESIS, Kind.ADOPTION, Kind.APPOINTED) or seal is None
        others = () if gone or seal is None else tuple(p for p in seal.members if p != self.me)
        self._members.begin(others, now)
        self._persist()
        self._publish(now)
        if kind is Kind.ADOPTION:
            # two may adopt at once: both wait, and see each other
            self._settle_at = now + min(5.0, self._lease / 6)
        else:
            self._commands.append(Look())
        return True

    def _read_back(self, now: float) -> None:
        """The network holds its Term, and nothing above it."""
        if self.term is None or self.lineage.best is not self.term or self.is_twin:
            return
        others = set() if self.held is None else set(self.held.members) - {self.me}
        if self.term.is_weak and others:
            # it may have been cut off itself until now: are they silent still?
            self._ask_all("probe", others, self.term.epoch, now)
            return
        self._lead(now)

    def _lead(self, now: float) -> None:
        self.state, self._has_own_steps = State.LEADING, True
        self._beat_at = now
        if now >= self._lease_until():
            self._fence(now)
        self._say_role()

    def _appoint(self, now: float, wall: float) -> None:
        """Takes what the run's owner gives it."""
        appointment = self._authority.appointment(self.uid)
        best = self.lineage.best
        if appointment is None or appointment.peer != self.me or self.is_twin:
            return
        if best is not None and best.serial >= appointment.serial:
            return
        if appointment.seal is not None and (self.held is None or self.held.digest != appointment.seal):
            return
        epoch = next_epoch(max(self._promised, 0 if best is None else best.epoch), wall - EPOCH_ZERO)
        self._poll = None
        self._begin(Kind.APPOINTED, self.held, epoch, now, wall, serial=appointment.serial)

    def _beat(self, now: float) -> None:
        assert self.term is not None
        self._beat_at = now + self._lease / 6
        targets = {*self._members.settled, *self._members.named}
        more = [peer for peer in sorted(self._hosts) if peer not in targets and peer != self.me]
        start = self._random.randrange(len(more)) if more else 0
        targets |= set((more[start:] + more[:start])[: max(0, MAX_BEATS - len(targets))])
        seal = self.lineage.seal_of(self.term)
        kind = "beat" if self.state is State.LEADING else "rise"
        for peer in sorted(targets):
            held = self._members.held_by(peer)  # None: it does not know of this Term yet
            term = self.term.blob if held is None else b""
            news = b"" if seal is None or (held is not None and held >= seal.age) else seal.blob
            self._commands.append(Send(peer, Ask(kind, self.term.epoch, self._boot, term, news)))
        if now - self._looked_at >= self._lease / 3:
            self._look(now)

    def _fence(self, now: float) -> None:
        self.state, self._fenced_at = State.FENCED, now
        self._poll, self._settle_at = None, None
        self._beat_at = now
        self._say_role()
        self._look(now)

    def _recover(self, now: float) -> None:
        """From FENCED: a majority answers, the network was read since, and nothing ranks higher."""
        best = self.lineage.best
        if self.term is None or best is not self.term or self.is_twin or self.term.epoch == self._handed_over:
            return
        if self._looked_at >= self._fenced_at and now < self._lease_until() and self._is_free(best, now):
            self.state, self._has_own_steps = State.LEADING, True
            self._say_role()

    # -- giving way ----------------------------------------------------------------------------------------------------

    def _review(self, now: float, wall: float) -> None:
        """Compares what holds with what this server does."""
        best = self.lineage.best
        if best is None:
            return
        if not self.lineage.is_home(best):
            self._home_since = now
        self.lineage.stay(best, is_old=now - self._home_since > 10 * self._lease)
        if self.term is not None and best is self.term:
            if self.lineage.is_exposed(best) and self.state in (State.LEADING, State.YIELDING):
                self._find_twin(now, wall)
            return
        if self._withstands(best, now, wall):
            return
        mine = self.state in (State.LEADING, State.FENCED, State.YIELDING, State.CANDIDATE)
        if mine:
            led = self.state is not State.CANDIDATE
            self._poll, self._settle_at, self.term = None, None, None
            self._take_back_own_vote()
            self.state = State.ASIDE if led else State.ABSENT if self.held is None else State.HOLDING
            self._members = Members()
        if best.digest != self._followed:
            self._followed, self._heard, self._poll = best.digest, now, None
            if (evidence := self.lineage.evidence(best)) is not None:
                self._commands.append(Publish(tuple(seal.blob for seal in evidence)))
        self._say_role()
        seal = self.lineage.seal_of(best)
        if best.primary == self.me:
            # of before this process: it goes on from there, if it is a member still
            self.state = State.FOLLOWING if self.held is not None else State.ABSENT
            return
        if seal is None:
            return
        in_line = self.held is not None and self.lineage.is_in_line(self.held, best)
        if in_line and self.state is not State.ASIDE:
            self.state = State.FOLLOWING if self.me in seal.members and self.held is not None else State.HOLDING
        if not in_line and self.held is not None and self.state is not State.ASIDE:
            self.state = State.ASIDE
        newer = not in_line or self.held is None or self.held.age < seal.age
        if self.state is State.ASIDE or newer:
            if self._fetching is None:
                self._fetching = seal.digest
                sources = tuple(dict.fromkeys(p for p in (best.primary, *seal.members) if p != self.me))
                self._commands.append(Fetch(seal, self._has_own_steps, sources))

    def _withstands(self, best: Term, now: float, wall: float) -> bool:
        """Whether a weak Term thinks this primary dead, which is not: it says so with a Seal, and goes on."""
        if self.term is None or not best.is_weak or not self.leads(now) or self.held is None:
            return False
        if best.seal is None or not self.lineage.is_in_line(best.seal, self.term):
            return False
        # it has seen that Term, whatever its own clock says
        self.seal(self.held.root, self.held.size, self.held.version, now, max(wall, EPOCH_ZERO + best.epoch + 1))
        self._publish(now)
        return self.lineage.best is self.term

    def _give_up(self, now: float) -> None:
        self._poll, self._settle_at = None, None
        if self.state is State.CANDIDATE:
            self.term = None
            self._take_back_own_vote()
            self.state = State.ABSENT if self.held is None else State.FOLLOWING
        self._retry(now)

    def _find_twin(self, now: float, wall: float) -> None:
        if not self.is_twin and self.held is not None and self.leads(now):
            # a last one, by which the other finds out, too
            self.seal(self.held.root, self.held.size, self.held.version, now, wall)
            self._publish(now)
        self.is_twin = True
        if self.state in (State.LEADING, State.YIELDING, State.CANDIDATE):
            self.state = State.FENCED
            self._poll, self._settle_at = None, None
            self._say_role()
