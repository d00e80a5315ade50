"""`Tenure`: a pure machine that decides one server's role in one expert of a run: primary, follower, or aside.

Time goes in twice: `now` is a clock that nobody sets and that runs through suspend, for durations; `wall` is seconds
since 1970, for records. Other servers' answers and the network's records go in. Commands come out, to be carried out in
order, each before the next, so that what must be on disk is there before anything is said that depends on it. A primary
counts its lease from sending, its successors from receipt, so that its lease has ended before theirs begins.
"""

import math
from collections.abc import Mapping
from typing import Final

from tesseract_async.experts.duty import Duty
from tesseract_async.experts.own_term import NEVER
from tesseract_async.experts.tenure_words import (
    MAX_PAST,
    Fetch,
    Publish,
    Question,
    Response,
    State,
)
from tesseract_async.experts.terms import Seal, Term, TermKind, sign_handover, sign_vote
from tesseract_async.identity import PeerID

BEATING: Final = (State.PRIMARY, State.YIELDING, State.FENCED)
"""A primary in these states tells its members that it is there."""


class Tenure(Duty):
    """One expert on one server. The arguments of `sight`, `ask` and `answered` are untrusted; no method raises."""

    def waits_for_state(self, now: float, wall: float) -> bool:
        """Return whether nobody shows a state of the expert, though there may be one: it does not begin anew for
        now."""
        return self.state is State.ABSENT and self._member.is_unsealed(now) and not self._member.may_begin(now, wall)

    def misses_primary(self, now: float) -> bool:
        """Return whether the primary is silent, or this server stands: another may be known in a moment."""
        is_silent = self.state in (State.FOLLOWING, State.HOLDING) and now > self._member.heard + self._lease / 2
        return is_silent or self.state is State.CANDIDATE

    def timer_at(self) -> float:
        """The time at which `handle_timer` is due."""
        if self._poll is not None:
            return self._poll.deadline
        if self._settle_at is not None:
            return self._settle_at
        if self._own is not None and (self.state in BEATING or self._is_elected):
            until = self._patient_until if self._is_elected else self._lease_until()
            return min(self._own.beat_at, until if self.state in (State.PRIMARY, State.CANDIDATE) else math.inf)
        if self.state in (State.FOLLOWING, State.HOLDING):
            doubt = self._doubt_at()
            return min(doubt, self._look_at) if self._look_at <= self._member.vote_from else doubt
        return self._look_at

    # -- what is seen --------------------------------------------------------------------------------------------------

    def sight(self, blob: object, now: float, wall: float) -> bool:
        """Take a Term or Seal that a peer showed, or that lies in the network. Return whether it is new and counts."""
        record = self.lineage.read(blob)
        if record is not None and self.held is not None:
            age = record.age if isinstance(record, Seal) else (record.epoch, 0)
            self._is_unheard &= age < self.held.age
        if record is None or self._member.is_disproved(record, self.state, now):
            return False
        if not self.lineage.add(record, now=wall, has_term=self._own is not None):
            return False
        if self._member.is_of_twin(record):
            self._find_twin(now, wall)
        if isinstance(record, Seal) and record.primary == self.primary != self.me and self.state is State.HOLDING:
            self._member.heard = max(self._member.heard, now)
        self._review(now, wall)
        if isinstance(record, Term):
            self._show_to(record, now)
        return True

    def _show_to(self, other: Term, now: float) -> None:
        """Show the line of this primary, which holds, to the signer of another Term: it may not have seen that line, or
        not the newest Seal, of which only the members know."""
        own = self._own
        if own is None or other is own.term or self.lineage.best is not own.term or not self.is_primary(now):
            return
        if own.published < own.number or now >= own.published_at + self._lease / 6:
            self._publish(own, now)

    def set_hosts(self, hosts: Mapping[PeerID, int], now: float, wall: float) -> None:
        """Take the peers whose manifests name the expert now, and the epoch in each."""
        self._member.hosts = dict(hosts)
        self.lineage.set_hosts(hosts)
        self._review(now, wall)

    def authority_changed(self, now: float, wall: float) -> None:
        """Review everything: grants, revocations or appointments may have changed."""
        self.lineage.authority_changed()
        self._review(now, wall)
        self._appoint(now, wall)

    def looked(self, now: float, wall: float) -> None:
        """Note that everything that the network holds about the expert was sighted, and that it takes what this server
        publishes."""
        self._member.looked_at = now
        if self.may.write:  # else what it publishes goes nowhere: a pair's other half may have taken over
            self._renewed = now
        self._member.first_look = min(now, self._member.first_look)
        self._review(now, wall)
        if self._is_unheard and (best := self.lineage.best) is not None and self.held is not None:
            # those that know of this Seal may be away, or the network has forgotten it: show it, and what led there
            self._commands.append(Publish((best.blob, self.held.blob), past=tuple(self.lineage.line(best)[-MAX_PAST:])))
        self._is_unheard = False
        self._was_alone &= self.state is State.FOLLOWING
        if self.state is State.CANDIDATE and self._poll is None and self._settle_at is None:
            self._read_back(now, wall)
        elif self.state is State.FENCED:
            self._recover(now)
        elif self._was_alone and self.state is State.FOLLOWING and self.primary == self.me:
            self._was_alone = False  # once: if that does not make it primary, it stands like any other
            self._member.heard = self._member.vote_from = self._member.agreed_at = now - 2 * self._lease
        elif self.state is State.ABSENT and self._member.may_begin(now, wall):
            self._stand(TermKind.GENESIS, None, now, wall)
        self._appoint(now, wall)
        if (term := self.lineage.unshown) is not None and (seal := self.lineage.own_seal_of(term)) is not None:
            self._fetch(term, seal, check=True)

    # -- questions -----------------------------------------------------------------------------------------------------

    def ask(self, peer: PeerID, question: Question, now: float, wall: float) -> Response:
        """Answer `peer`. Carry out `commands` before the answer goes out."""
        if self._member.may_host(peer):
            self.sight(question.term, now, wall)
            self.sight(question.seal, now, wall)
        elif question.kind != "probe" or not self._member.may_look(peer):
            return Response(False, (0, 0), b"", b"")
        best, member, agrees, vote = self.lineage.best, self._member, False, b""
        is_standing = self.state is State.CANDIDATE  # the votes that it asks for are against that primary
        if question.kind in ("beat", "rise") and not is_standing and member.is_beat(peer, question, now):
            # for a lease, a primary that lost touch may come back; then others stand
            agrees = question.kind == "beat" or now < member.heard + self._lease
            if question.kind == "beat":
                member.heard = member.beaten = now
            if agrees:
                member.agree(now)
            self._review(now, wall)  # a file that could not be had is asked for again
        elif question.kind == "beat" and now >= self._look_at:
            self._look(now)  # what leads to that Term may be in the network
        elif question.kind == "probe":
            agrees, seal = self.is_primary(now), self.lineage.read(question.seal)
            if self.held is not None and (not isinstance(seal, Seal) or seal.age < self.held.age):
                vote = self.held.blob
        elif question.kind == "vote":
            agrees = self.state is State.FOLLOWING and now < member.heard + self._lease / 2
            vote = self._vote(peer, question, now, wall)
        known = b"" if best is None or agrees or best.blob == question.term else best.blob
        # one that is no member would be waited for in vain, and wait itself, unless it has more
        may_be_primary = self.may.primary and self.may.write and (self.state is not State.HOLDING or bool(vote))
        is_of_use = question.kind != "probe" or agrees or may_be_primary
        return Response(agrees, self.held.age if self.held is not None and is_of_use else (0, 0), known, vote)

    def answered(
        self, peer: PeerID, question: Question, answer: Response | None, sent: float, now: float, wall: float
    ) -> None:
        """Take `peer`'s answer to what was sent to it at `sent`; None: there was none within the time for it."""
        if answer is not None and answer.term:
            self.sight(answer.term, now, wall)
        if answer is not None and question.kind == "probe":
            self._take_from(peer, answer.vote, now, wall)
        own, poll = self._own, self._poll
        if question.kind in ("beat", "rise"):
            if own is None or answer is None:
                return
            if not answer.agrees:
                own.disagreed(peer)
            elif question.epoch == own.term.epoch:
                own.agreed(peer, sent, answer.held)
                self._member.unsettled = b"" if own.is_settled else self._member.unsettled
                self._renew_members(own, now, wall)
                if self.state is State.FENCED:
                    self._recover(now)
                elif self._is_elected and own.is_followed and self.lineage.best is own.term and not self.is_twin:
                    self._become_primary(now, wall)
        elif poll is not None and not (answer is None and poll.is_late(now)) and poll.settles(peer, question):
            if answer is None:
                poll.silent.add(peer)
            elif question.kind == "vote" and (vote := self._member.read_vote(peer, answer.vote, poll.epoch)):
                poll.votes[peer] = vote
                poll.given[peer] = sent, answer.held
            else:
                poll.has_primary |= answer.agrees
                poll.newest = max(poll.newest, answer.held)
            self._count(now, wall)

    def _take_from(self, peer: PeerID, blob: bytes, now: float, wall: float) -> None:
        """See a Seal whose file `peer` says it has. That file is fetched, too, where it is newer than what is here, but
        not the newest: if nobody has shown that one for two leases, or the primary is silent, which may be gone."""
        seal = self.lineage.read(blob)
        if isinstance(seal, Seal):
            self._shown_by = seal.digest, peer
        self.sight(blob, now, wall)
        best, held = self.lineage.best, self.held
        if best is None or not isinstance(seal, Seal) or False in self._fetching:
            return
        if held is None:
            is_wanted = self.state is State.ABSENT and self.lineage.is_unshown(best)
        else:
            is_wanted = self.state is State.HOLDING and held.age < seal.age and self.misses_primary(now)
        if is_wanted and self.lineage.is_sealed(seal):
            self._fetch(best, seal, check=False)

    def _vote(self, peer: PeerID, question: Question, now: float, wall: float) -> bytes:
        seal, member, epoch, best = self.lineage.read(question.seal), self._member, question.epoch, self.lineage.best
        if not isinstance(seal, Seal) or best is None or not member.may_vote(peer, epoch, seal, now, wall):
            return b""
        if self.state is State.FENCED and self._own is not None:
            if now < self._lease_until() or seal.age < (best.epoch, self._own.number):
                return b""
        elif self.state is State.FOLLOWING:
            # what it said to the last primary binds it against others
            if not member.is_free(now) and (peer, question.boot) != (best.primary, best.boot):
                return b""
        elif self.state is State.CANDIDATE and self._own is None and self._poll is not None:
            # the higher one goes on, or both would give way to each other, or neither, forever
            if (epoch, peer) <= (self._poll.epoch, self.me):
                return b""
            self._give_up(now)
        else:
            return b""
        if member.promised != epoch:
            member.promise(epoch, peer, now)
            self._persist()
        # two that stand against whom they just voted for would do so forever
        member.retry_at = max(member.retry_at, now + member.patience)
        assert member.held is not None
        return sign_vote(*member.signer, uid=self.uid, epoch=epoch, candidate=peer, seal=member.held.age).blob

    # -- as primary ----------------------------------------------------------------------------------------------------

    def leave(self) -> bool:
        """Take no more steps, in order to give the expert away. Then `seal` its last state, and `hand_over`."""
        if self.state is not State.PRIMARY:
            return False
        self.state = State.YIELDING
        self._say_role()
        return True

    def heirs(self, now: float) -> list[PeerID]:
        """Return the peers to which it may be given, the best first."""
        return [] if self._own is None else self._own.heirs(self._member.hosts.keys() - {self.me}, now, self._lease)

    def hand_over(self, heir: PeerID, now: float) -> bytes | None:
        """Sign the expert over to `heir`, which proved that it has the last Seal's file; None where this server's lease
        has ended meanwhile, and others may have elected another.

        Carry out `commands` before it goes out. This server is not the primary in this epoch again, whatever comes.
        """
        assert self.state is State.YIELDING and self._own is not None and self.held is not None
        if self._own.is_by_members and now >= self._lease_until():
            return None
        self._member.handed_over = self._own.term.epoch
        self.state = State.FOLLOWING
        self._member.heard = now
        self._persist()
        return sign_handover(*self._member.signer, self.held, heir)

    def keep(self, now: float) -> None:
        """Go on once a majority answers, since nobody took it."""
        if self.state is State.YIELDING:
            self._fence(now)

    def take(self, signature: bytes, now: float, wall: float) -> bool:
        """Become primary by the last primary's signature over the Seal whose file is here. Return whether the signature
        holds."""
        if self.held is None or self.state in (State.PRIMARY, State.YIELDING) or self.is_twin:
            return False
        if now >= self._member.heard + self._lease:  # it comes late: the others may have elected one meanwhile
            return False
        return self._stand(TermKind.HANDOVER, self.held, now, wall, signature)

    # -- the file ------------------------------------------------------------------------------------------------------

    def fetched(self, fetch: Fetch, found: bool, now: float, wall: float) -> None:
        """Note the outcome of a fetch: the whole file is here, and the expert goes on from it; or it could not be
        fetched now."""
        self._fetching.discard(fetch.check)
        member, is_waiting = self._member, self.state in (State.ABSENT, State.ASIDE)
        if found and fetch.seal.term == fetch.term.digest:
            self.lineage.shown(fetch.term)
        elif is_waiting and not found and not fetch.check:
            self.lineage.missed(fetch.term, now)
        if found and not fetch.check:
            self._has_own_steps, member.held = False, fetch.seal
            self._silent_at = NEVER  # its members are others, perhaps: they were not asked
            if is_waiting:
                self.state, member.heard = State.HOLDING, max(member.heard, now)
            self._persist()
        if found or self.lineage.best is not fetch.term:
            self._review(now, wall)

    # -- time ----------------------------------------------------------------------------------------------------------

    def handle_timer(self, now: float, wall: float) -> None:
        """Do what is due by `now`; first of all after a suspend, in which a lease may have ended."""
        if self.state is State.PRIMARY and now >= self._lease_until():
            self._fence(now)
        if self._is_elected and now >= self._patient_until:
            self._give_up(now)
        if self._poll is not None:
            if self._poll.is_late(now):  # who was silent may have answered meanwhile; votes bind for a lease only
                others = self._poll.waiting | self._poll.silent | self._poll.votes.keys()
                self._ask_all(self._poll.kind, others, self._poll.epoch, now)
                self._poll.is_second = True
            elif now >= self._poll.deadline:
                self._poll.silent |= self._poll.waiting
                self._poll.waiting.clear()
                self._count(now, wall)
            return
        if self._settle_at is not None:
            if now >= self._settle_at:
                self._settle_at = None
                self._look(now)
            return
        own = self._own
        if own is not None and self.state is State.FENCED and not self.is_twin and own.is_left(now, self._lease):
            # it stands like any of its members, which fell silent before it was fenced
            self.state, self._own, self._followed = State.FOLLOWING, None, own.term.digest
            self._member.heard = min(own.fenced_at, own.heard_of_most(self._lease))
        if own is not None and self.state in BEATING:
            if now >= own.beat_at:
                self._renew_members(own, now, wall)
                self._beat(own, now)
                self._review(now, wall)
        elif own is not None and self._is_elected:
            if now >= own.beat_at:
                self._beat(own, now)
        elif self.state in (State.FOLLOWING, State.HOLDING):
            if now >= self._doubt_at():
                self._doubt(now, wall)
            elif self._look_at <= min(now, self._member.vote_from):
                self._look(now)  # just started: who else comes back, with a newer file?
        elif now >= self._look_at:
            self._look(now)

    @property
    def _is_asked(self) -> bool:
        """True if the primary, and whom else this silence is of, did not answer lately."""
        return self._silent_at >= self._member.ask_at(self.state)

    def _doubt_at(self) -> float:
        return self._member.silence_at(self.state) if self._is_asked else self._member.ask_at(self.state)

    def _doubt(self, now: float, wall: float) -> None:
        """Act on a silence: find out whether the primary is gone, and then stand for election, if that is allowed."""
        best, held = self.lineage.best, self.held
        others = set[PeerID]()
        if best is not None and held is not None and not (self._is_asked or self.is_twin):
            others = self._member.primaries(best, held.members if self.state is State.HOLDING else ())
        is_exposed = self.state is State.FOLLOWING and best is not None and self.lineage.is_exposed(best)
        if best is not None and others and not is_exposed:
            if self.state is State.HOLDING or self._member.num_needed == 1:
                self._look(now)  # before it takes the expert by its own word, it must know what the network has
            self._ask_all("probe", others, best.epoch, now)
        elif now < self._member.silence_at(self.state):
            self._silent_at = now  # there is nobody to ask
        elif best is None or held is None or self.is_twin:
            self._retry(now)
        else:
            self._succeed(held, now, wall)

    def _succeed(self, held: Seal, now: float, wall: float) -> None:
        member = self._member
        if self.state is State.HOLDING and not member.may_adopt(now, wall):
            self._look(now)
            self._retry_adopting(now)
        elif self.state is State.FOLLOWING and member.num_needed == 1 and not member.has_looked(now):
            self._look(now)  # it may have slept: who adopted the expert meanwhile has trained it on
            member.retry_at = now + 1.0
        else:
            kind = TermKind.TAKEOVER if self.state is State.FOLLOWING else TermKind.ADOPTION
            self._stand(kind, held, now, wall)

    def _count(self, now: float, wall: float) -> None:
        poll, held = self._poll, self.held
        assert poll is not None and held is not None
        if poll.kind == "probe":
            # once its Term is out, a primary stops it, or a newer file than its own: two that make way for each other
            # would do so forever
            enough = held.age if self.state is State.CANDIDATE else (0, 0)
            if poll.has_primary or (self.state is not State.FOLLOWING and poll.newest > enough):
                self._member.heard = now
                self._give_up(now)
            elif not poll.waiting:
                self._poll, self._silent_at = None, now
                self._member.note_silence(poll, now)
                if self.state is State.CANDIDATE:
                    self._become_primary(now, wall)
                elif now >= self._member.silence_at(self.state):  # nor did it vote for another meanwhile
                    self._succeed(held, now, wall)
        elif 1 + len(poll.votes) >= self._member.num_needed and now <= poll.deadline:
            self._begin(TermKind.TAKEOVER, held, poll.epoch, now, wall, poll)
        elif not poll.waiting or now > poll.deadline:
            self._poll = None
            all_gone = poll.silent | poll.votes.keys() >= set(held.members) - {self.me}
            if all_gone and self._member.may_adopt(now, wall):
                self._begin(TermKind.ADOPTION, held, poll.epoch, now, wall, poll)
                return
            if poll.has_primary:  # only this server was cut off: by the next time, its own vote binds it no more
                self._member.heard = now
            if not all_gone and (best := self.lineage.best) is not None:  # they may go by a Term that this Seal refutes
                seal = self.lineage.own_seal_of(best) or held
                self._commands.append(Publish((best.blob, seal.blob), past=tuple(self.lineage.line(best)[-MAX_PAST:])))
            self._give_up(now)
            if all_gone:
                self._retry_adopting(now)
