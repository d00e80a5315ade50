"""`Duty`: one server's role in an expert, the records that it signs in that role, and how it gives way. No I/O."""

from random import Random

from tesseract_async.experts.authority import Authority
from tesseract_async.experts.membership import Membership, Poll
from tesseract_async.experts.own_term import NEVER, PUBLISH_EVERY, OwnTerm
from tesseract_async.experts.tenure_words import MAX_PAST, Command, Fetch, Look, Persist, Publish, RoleChanged, State
from tesseract_async.experts.terms import EPOCH_ZERO, Seal, Term, TermKind, sign_seal
from tesseract_async.identity import Identity, PeerID


class Duty:
    """Base of `Tenure`, which takes in answers and the time."""

    def __init__(
        self,
        identity: Identity,
        uid: str,
        authority: Authority,
        *,
        boot: bytes,
        now: float,
        wall: float,
        stored: bytes | None = None,
        has_file: bool = False,
        random: Random,
    ) -> None:
        """`boot`: 8 random bytes of this process. `stored`: the bytes that it last persisted. `has_file`: whether a
        state is here, which counts only together with `stored`."""
        self.uid = uid
        self.state = State.ABSENT
        self.is_twin = False
        """Another process with this server's key is primary, too: this one is not until it is started anew."""
        self.me = identity.peer_id
        self._lease = authority.lease
        self._boot = boot
        self._random = random
        self._commands: list[Command] = []
        self._member = Membership(identity, uid, authority, boot=boot, now=now, wall=wall)
        self.lineage, self.may = self._member.lineage, self._member.leave
        self._own: OwnTerm | None = None
        self._shown_by: tuple[bytes, PeerID] | None = None  # the digest of the last Seal that a peer said it has
        self._poll: Poll | None = None
        self._settle_at: float | None = None
        self._patient_until = NEVER
        self._renewed = NEVER
        self._silent_at = NEVER  # when a primary that was asked, and all others that were, had not answered
        self._look_at = now
        self._was_alone = False
        self._is_unheard = stored is not None  # nothing as new as the file here was seen
        self._fetching: set[bool] = set()  # `Fetch.check` of those under way: one to follow, one to look
        self._has_own_steps = stored is not None  # that may be in no other server's file
        self._came_with: Seal | None = None  # what was here when the process began
        self._followed: bytes | None = None  # the Term's digest
        self._role: RoleChanged | None = None
        if stored is not None:
            self._member.restore(stored, has_file=has_file, now=now, wall=wall)
            self._came_with = self.held
            if (held := self.held) is not None:
                self.state = State.FOLLOWING if self.me in held.members else State.HOLDING
                self._has_own_steps = held.primary == self.me
                # without successors nobody can have taken over: a look at the network is enough
                self._was_alone = held.members == (self.me,)
            self._review(now, wall)
            self._member.heard = self._member.vote_from - self._lease
        self._commands.append(Look())

    @property
    def held(self) -> Seal | None:
        """The Seal whose file is here."""
        return self._member.held

    def is_primary(self, now: float) -> bool:
        """Return whether a step may be taken, or the answer to one given, at this moment: ask before each."""
        return self.state is State.PRIMARY and now < self._lease_until()

    @property
    def primary(self) -> PeerID | None:
        return self.lineage.primary

    @property
    def epoch(self) -> int:
        """The epoch of the Term that holds, for manifests; 0 before any is known."""
        return self.lineage.epoch

    @property
    def term(self) -> Term | None:
        """The Term of this server, from candidacy on."""
        return None if self._own is None else self._own.term

    @property
    def members(self) -> tuple[PeerID, ...]:
        """The successors that this primary named last."""
        return () if self._own is None else self._own.named

    @property
    def is_content(self) -> bool:
        """True if another Seal of the same state would name nobody new: these are settled, and enough or everybody."""
        return self._own is not None and self._own.is_content(self._member.hosts.keys() - {self.me})

    def commands(self) -> list[Command]:
        """Return the commands to carry out now, in this order, and forget them."""
        commands, self._commands = self._commands, []
        return commands

    # -- as primary ----------------------------------------------------------------------------------------------------

    def seal(self, root: bytes, size: int, version: int, now: float, wall: float) -> Seal | None:
        """Sign the state that was just written to a file, for the members; None while this server is not the primary,
        or its disk does not take its promises.

        The file stays as it is until the next Seal: others fetch it by its root.
        """
        own = self._own
        if own is None or not self.may.write or not (self.is_primary(now) or self.state is State.YIELDING):
            return None
        before = members = own.named
        if self.state is State.PRIMARY:
            members = own.choose(now, self._lease, self._member.may_succeed)
        own.number += 1
        seal = sign_seal(
            *self._member.signer,
            term=own.term,
            number=own.number,
            version=version,
            root=root,
            size=size,
            time=own.time(now),
            successors=members,
        )
        self._member.held = seal
        self.lineage.add(seal, now=max(wall, EPOCH_ZERO + seal.time))
        own.sealed(seal)
        self._member.unsettled = b"" if own.is_settled else seal.digest
        self._persist()
        is_news = members != before or own.number == 1 or self.state is State.YIELDING
        if is_news or now >= own.published_at + PUBLISH_EVERY:
            self._publish(own, now)
        own.beat_at = now
        return seal

    def _seal_again(self, now: float, wall: float) -> bool:
        """Show the network that this server is still the primary."""
        own, held = self._own, self.held
        if own is None or held is None or self.seal(held.root, held.size, held.version, now, wall) is None:
            return False
        self._publish(own, now)
        return True

    def _renew_members(self, own: OwnTerm, now: float, wall: float) -> None:
        """Name others in the place of members that fell silent, in a Seal of the last state: that costs no transfer,
        and the next state may take a while."""
        held = self.held
        if self.is_primary(now) and held is not None and held.term == own.term.digest:
            if own.choose(now, self._lease, self._member.may_succeed) != own.named:
                self.seal(held.root, held.size, held.version, now, wall)

    # -- becoming the primary ------------------------------------------------------------------------------------------

    def _stand(self, kind: TermKind, seal: Seal | None, now: float, wall: float, handover: bytes = b"") -> bool:
        """Try to become primary from this Seal, where no appointment says otherwise."""
        if self.is_twin or not self._member.may_stand(kind, seal, wall):
            self._retry(now)
            return False
        epoch = self._member.next_epoch(seal, wall)
        others = set() if seal is None else set(seal.members) - {self.me}
        if kind is TermKind.TAKEOVER and others and self._member.num_needed > 1:
            self.state = State.CANDIDATE  # its own vote is promised where a Term stands on it
            self._look(now)  # should all others be gone, it must know that the network has nothing newer
            self._ask_all("vote", others, epoch, now)
            return True
        return self._begin(kind, seal, epoch, now, wall, handover)

    def _begin(
        self, kind: TermKind, seal: Seal | None, epoch: int, now: float, wall: float, evidence: Poll | bytes = b""
    ) -> bool:
        """Sign a Term, and publish it. Return whether the evidence (votes, or the signature of a handover) is enough
        for it."""
        self._poll = None
        term = self._member.sign_term(kind, seal, epoch, evidence) if self.may.write else None
        if term is None:
            self._give_up(now)
            return False
        # the members of the parent decide until a Seal with others is settled
        others = seal.members if seal is not None and kind in (TermKind.TAKEOVER, TermKind.HANDOVER) else ()
        self.state = State.CANDIDATE
        votes = evidence.given if isinstance(evidence, Poll) else {}
        self._own = OwnTerm(term, tuple(peer for peer in others if peer != self.me), votes, now=now)
        self._member.promise(epoch, self.me, now)
        # with nobody else to ask its own word counts, even where its line lies in the future by the present clock
        self.lineage.add(term, now=wall if set(others) - {self.me} else max(wall, EPOCH_ZERO + epoch), has_term=True)
        if kind is TermKind.GENESIS:  # its own word counts for that, not for an earlier beginning that never had a Seal
            self.lineage.set_hosts({**self._member.hosts, self.me: epoch})
        self._persist()
        self._publish(self._own, now)
        if kind is TermKind.ADOPTION:
            # two may adopt at once: both wait, and see each other
            self._settle_at = self._member.settled_at(now)
        elif self._is_elected:
            self._patient_until = now + self._member.patience
            self._beat(self._own, now)  # the network may take long: the members that it needs say it sooner
        else:
            self._commands.append(Look())
        return True

    @property
    def _is_elected(self) -> bool:
        """True if most of three members or more gave it their votes, or the last primary its word, and it waits until
        most follow it."""
        own = self._own
        return self.state is State.CANDIDATE and own is not None and own.is_by_members and not own.term.is_weak

    def _read_back(self, now: float, wall: float) -> None:
        """Act on it that the network holds this server's Term, and none that ranks higher."""
        term = self.term
        if term is None or self.lineage.best is not term or self.is_twin or self._is_elected:
            return
        is_half = term.kind is TermKind.TAKEOVER and self.held is not None
        if not self.may.write or (is_half and 1 + len(term.voters) < self._member.num_needed):
            self._give_up(now)
            return
        others = set() if self.held is None else set(self.held.members) - {self.me}
        if term.is_weak and others:  # it may have been cut off itself until now: are they silent still?
            self._ask_all("probe", others, term.epoch, now)
            return
        self._become_primary(now, wall)

    def _become_primary(self, now: float, wall: float) -> None:
        own, held = self._own, self.held
        assert own is not None
        self.state, self._has_own_steps = State.PRIMARY, True
        own.beat_at = now
        if now >= self._lease_until():
            self._fence(now)
        elif held is not None and own.term.seal is not None and held.digest == own.term.seal.digest:
            # names successors before there is a new state for them to fetch: another may die soon
            self.seal(held.root, held.size, held.version, now, wall)
        self._say_role()

    @property
    def wanted_root(self) -> bytes | None:
        """The root of the state with which the run's owner gives the expert to this server: install it, then say
        `restored`. None if nothing is to be installed."""
        appointment = None if self.is_twin else self._member.appointment()
        return None if appointment is None else appointment.root

    def restored(self, root: bytes, now: float, wall: float) -> None:
        """Note that the state of that root is installed, and begin from it, if that is still what the owner wants."""
        if self.wanted_root == root:
            self._appoint(now, wall, restored=True)

    def _appoint(self, now: float, wall: float, *, restored: bool = False) -> None:
        """Take over as the run's owner has appointed this server."""
        appointment = None if self.is_twin else self._member.appointment()
        if appointment is not None and (appointment.root is None or restored):
            parent = None if restored else self.held  # nobody has a Seal of what was put aside
            self._begin(TermKind.APPOINTED, parent, self._member.next_epoch(None, wall), now, wall)

    def _beat(self, own: OwnTerm, now: float) -> None:
        own.beat_at = now + self._lease / 6
        kind = "rise" if self.state is State.FENCED else "beat"
        hosts = [peer for peer in sorted(self._member.hosts) if peer != self.me]
        self._commands += own.beats(kind, self._boot, self.lineage.seal_of(own.term), hosts, self._random)
        if now - self._member.looked_at >= self._lease / 3:
            self._look(now)

    def _recover(self, now: float) -> None:
        """Leave FENCED if a majority answers (of one or two members: the network) and nothing ranks higher."""
        best, own = self.lineage.best, self._own
        if own is None or best is not own.term or self.is_twin or best.epoch == self._member.handed_over:
            return
        may = own.is_by_members or self._member.looked_at >= own.fenced_at
        if may and now < self._lease_until() and not self._member.is_bound(best, now):
            self.state, self._has_own_steps = State.PRIMARY, True
            self._say_role()

    def _retry_adopting(self, now: float) -> None:
        """Try again as soon as the expert may be adopted, since no other server is left that could go first."""
        self._member.retry_at = max(now + 1.0, self._member.adopt_at)

    def _ask_all(self, kind: str, others: set[PeerID], epoch: int, now: float) -> None:
        self._poll, sends = self._member.ask(kind, others, epoch, now)
        self._commands += sends

    # -- giving way ----------------------------------------------------------------------------------------------------

    def _review(self, now: float, wall: float) -> None:
        """Compare the Term that holds with this server's state, and act on a difference."""
        best = self.lineage.best
        if best is None:
            return
        self.lineage.stay(best, now)
        if best is self.term and self.lineage.is_exposed(best) and self.state in (State.PRIMARY, State.YIELDING):
            self._find_twin(now, wall)
        if best is self.term or self._withstands(best, now, wall):
            return
        was_candidate = self.state is State.CANDIDATE
        if was_candidate and self._own is None and best.digest == self._followed:
            return  # that is the Term that it would succeed
        if was_candidate or self.state in (State.PRIMARY, State.FENCED, State.YIELDING):
            self._poll, self._settle_at, self._own = None, None, None
            self._member.take_back_own_vote()
            self._member.retry_at = now + self._lease * self._random.uniform(0.1, 0.4)
            self.state = State.ASIDE if not was_candidate else State.ABSENT if self.held is None else State.HOLDING
            if best.digest == self._followed:
                self._member.heard = now  # whom it took for dead has said the contrary
        if best.digest != self._followed:
            self._followed, self._poll = best.digest, None
            if best.kind is not TermKind.ADOPTION or self._member.voted_for(best):
                self._member.heard = now
            if (evidence := self.lineage.evidence(best)) is not None:
                self._commands.append(Publish(tuple(seal.blob for seal in evidence)))
        self._say_role()
        if best.primary == self.me:  # of before this process: it goes on from there, if it is a member still
            self.state = State.FOLLOWING if self.held is not None else State.ABSENT
        elif (seal := self.lineage.seal_of(best)) is not None:
            self._follow(best, seal)

    def _follow(self, best: Term, seal: Seal) -> None:
        """Another server's Term holds, and this is its newest Seal."""
        held = self.held
        in_line = held is not None and self.lineage.is_in_line(held, best)
        if held is not None and (self.state is not State.ASIDE or (in_line and not self._has_own_steps)):
            # an adopter may have gone on from an older Seal, and given up: who holds a later one elects by that
            members = max(held, seal, key=lambda one: one.age).members
            member = State.FOLLOWING if self.me in members else State.HOLDING
            self.state = member if in_line else State.ASIDE
        is_newer = held is None or not in_line or held.age < seal.age
        if held is not None and in_line and is_newer and not self._has_own_steps and held.root == seal.root:
            self._member.held = seal  # the file is here: only the members are others
            self._persist()
            return
        if self.state is State.ASIDE or is_newer:
            self._fetch(best, seal if held is None or is_newer else held, check=False)

    def _fetch(self, term: Term, seal: Seal, *, check: bool) -> None:
        if check not in self._fetching:
            self._fetching.add(check)
            sources = self._member.sources(term, seal, self._random)
            if self._shown_by is not None and self._shown_by[0] == seal.digest:
                sources = tuple(dict.fromkeys((self._shown_by[1], *sources)))
            # on a branch that ended while this server was away, it may have steps that nobody else has: kept, too, but
            # only what it came with, so that nobody fills the disk with branches
            held, line = self.held, self.lineage
            is_more = held is not None and held is self._came_with and held.version > seal.version
            aside = self._has_own_steps or (is_more and held is not None and not line.has_passed(held, term))
            self._commands.append(Fetch(term, seal, sources, aside=aside, check=check))

    def _withstands(self, best: Term, now: float, wall: float) -> bool:
        """Return whether that Term, or one that it goes on from, is weak and wrongly thinks this primary dead, which
        then proves the contrary with a Seal and goes on."""
        own = self._own
        if own is None or not self.is_primary(now):
            return False
        if not (epoch := self.lineage.doubts(best, own.term)):
            return False  # its Seals would only outnumber the other's, and the other's those
        own.seen = epoch + 1
        return self._seal_again(now, wall) and self.lineage.best is own.term

    def _give_up(self, now: float) -> None:
        self._poll, self._settle_at = None, None
        if self.state is State.CANDIDATE:
            self._member.take_back_own_vote()
            self._own = None
            self.state = State.ABSENT if self.held is None else State.FOLLOWING
        self._retry(now)

    def _find_twin(self, now: float, wall: float) -> None:
        if not self.is_twin and self.is_primary(now):
            self._seal_again(now, wall)  # a last one, by which the other finds out, too
        self.is_twin = True
        if self.state in (State.PRIMARY, State.YIELDING, State.CANDIDATE):
            self.state, self._poll, self._settle_at = State.FENCED, None, None
            self._say_role()

    def _lease_until(self) -> float:
        return NEVER if self._own is None else self._own.lease_until(self._renewed, self._lease)

    def _fence(self, now: float) -> None:
        assert self._own is not None
        self.state, self._poll, self._settle_at = State.FENCED, None, None
        self._own.fenced_at = self._own.beat_at = now
        self._say_role()
        self._look(now)

    # -- commands ------------------------------------------------------------------------------------------------------

    def _retry(self, now: float) -> None:
        self._member.retry_at = now + self._lease * self._random.uniform(0.1, 0.4)
        self._look(now)

    def _look(self, now: float) -> None:
        self._look_at = now + self._lease / 6
        self._commands.append(Look())

    def _say_role(self) -> None:
        role = RoleChanged(self.state is State.PRIMARY, self.primary)
        if role != self._role:
            self._role = role
            self._commands.append(role)

    def _publish(self, own: OwnTerm, now: float) -> None:
        """Publish its Term and newest Seal, with the records that led there: a reader that has not seen these takes the
        Term for another tree."""
        own.published_at, own.published = now, own.number
        records = (own.term, self.lineage.own_seal_of(own.term))
        line = self.lineage.line(own.term)
        past = line[: line.index(own.term.blob)][-MAX_PAST:]
        self._commands.append(Publish(tuple(record.blob for record in records if record is not None), tuple(past)))

    def _persist(self) -> None:
        self._commands.append(Persist(self._member.stored(self.term)))
