"""`Duty`: the part that one server has in an expert, what that makes it say, and how it gives way. No I/O."""

from random import Random

from tesseract_async.experts.authority import Authority
from tesseract_async.experts.membership import Membership, Poll
from tesseract_async.experts.own_term import NEVER, PUBLISH_EVERY, OwnTerm
from tesseract_async.experts.tenure_words import MAX_PAST, Command, Fetch, Look, Persist, Publish, RoleChanged, State
from tesseract_async.experts.terms import EPOCH_ZERO, Seal, Term, TermKind
from tesseract_async.identity import Identity, PeerID


class Duty:
    """Base of `Tenure`, which says how a server becomes the primary."""

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
        """`boot`: 8 bytes drawn by this process. `stored`: what it last persisted. `has_file`: whether a state is here,
        which counts only together with `stored`."""
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
        """Take what is to be done now, in this order."""
        commands, self._commands = self._commands, []
        return commands

    # -- as primary ----------------------------------------------------------------------------------------------------

    def seal(self, root: bytes, size: int, version: int, now: float, wall: float) -> Seal | None:
        """Sign the state that was just written to a file, for the members; None while this server is not the primary,
        or its disk does not take what it says.

        The file stays as it is until the next Seal: others fetch it by its root.
        """
        own = self._own
        if own is None or not self.may.write or not (self.is_primary(now) or self.state is State.YIELDING):
            return None
        before = members = own.named
        if self.state is State.PRIMARY:
            members = own.choose(now, self._lease, self._member.may_succeed)
        own.number += 1
        seal = self._member.sign_seal(own, root, size, version, successors=members, now=now)
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
        """Say in the network that this server is the primary still."""
        own, held = self._own, self.held
        if own is None or held is None or self.seal(held.root, held.size, held.version, now, wall) is None:
            return False
        self._publish(own, now)
        return True

    def _renew_members(self, own: OwnTerm, now: float, wall: float) -> None:
        """Name others in the place of members that fell silent, in a Seal of the last state: that costs no transfer,
        and the next state may be a while."""
        held = self.held
        if self.is_primary(now) and held is not None and held.term == own.term.digest:
            if own.choose(now, self._lease, self._member.may_succeed) != own.named:
                self.seal(held.root, held.size, held.version, now, wall)

    # -- giving way ----------------------------------------------------------------------------------------------------

    def _review(self, now: float, wall: float) -> None:
        """Compare what holds with what this server does."""
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
        """Return whether that Term, or one that it goes on from, is weak and thinks this primary dead, which is not: it
        says so with a Seal, and goes on."""
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
        """Show its Term and newest Seal, with what led there: those who did not see that take it for another tree."""
        own.published_at, own.published = now, own.number
        records = (own.term, self.lineage.own_seal_of(own.term))
        line = self.lineage.line(own.term)
        past = line[: line.index(own.term.blob)][-MAX_PAST:]
        self._commands.append(Publish(tuple(record.blob for record in records if record is not None), tuple(past)))

    def _persist(self) -> None:
        self._commands.append(Persist(self._member.stored(self.term)))
