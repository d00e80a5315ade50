"""What a `Tenure` remembers, writes down and shows; how it goes on is in `experts.tenure`. No I/O."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Any, Final

import msgpack

from tesseract_async.errors import ProtocolError
from tesseract_async.experts.lineage import Authority, Lineage
from tesseract_async.experts.members import NUM_SUCCESSORS, Members
from tesseract_async.experts.tenure_words import (
    Ask,
    Command,
    Look,
    Persist,
    Publish,
    Role,
    State,
)
from tesseract_async.experts.terms import EPOCH_ZERO, Kind, Seal, Term, Vote, read_seal, read_term
from tesseract_async.identity import Identity, PeerID

MAX_KNOWN: Final = 256
"""Records whose signatures are remembered as checked."""


@dataclass(slots=True)
class Poll:
    """Questions under way, of which all answers are waited for."""

    kind: str
    deadline: float
    waiting: set[PeerID]
    epoch: int = 0
    silent: set[PeerID] = field(default_factory=set)
    votes: dict[PeerID, Vote] = field(default_factory=dict)
    alive: bool = False


class TenureBase:
    """One expert on one server: its state, and what of it survives the process."""

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
        which counts only together with `stored`.
        """
        self.uid = uid
        self.state = State.ABSENT
        self.is_twin = False
        """Another process with this server's key leads, too: this one does not until it is started anew."""
        self.lineage = Lineage(uid, authority)
        self.me = identity.peer_id
        self.term: Term | None = None
        """The own Term, from candidacy on."""
        self.held: Seal | None = None
        """The Seal whose file is here."""
        self._identity = identity
        self._authority = authority
        self._run = authority.run_id
        self._lease = authority.lease
        self._boot = boot
        self._random = random
        self._commands: list[Command] = []
        self._known: dict[bytes, Term | Seal | None] = {}
        self._hosts: Mapping[PeerID, int] = {}
        self._started = wall - EPOCH_ZERO
        self._boots = {boot}
        self._promised = 0  # the highest epoch voted in: no beat of a lower one is answered for a lease
        self._promised_at = -1e9
        self._voted_for = b""
        self._number = 0  # of the own Term's newest Seal
        self._handed_over = 0  # epoch
        self._heard = now  # from the one followed
        self._agreed_at = now  # to its beat: no vote for a lease
        self._vote_from = now
        self._poll: Poll | None = None
        self._retry_at = 0.0
        self._settle_at: float | None = None
        self._looked_at = self._renewed = -1e9
        self._look_at = now
        self._fenced_at = 0.0
        self._beat_at = now
        self._published_at = -1e9
        self._members = Members()
        self._was_alone = False
        self._fetching: bytes | None = None
        self._has_own_steps = stored is not None  # that may be in no other server's file
        self._followed: bytes | None = None  # the Term's digest
        self._beaten = -math.inf  # when a primary was heard itself; `_heard` is also put off by what others say of it
        self._home_since = now  # the tree of Terms that it goes by
        self._role: Role | None = None
        if stored is not None:
            self._restore(stored, has_file, now, wall)
            self._review(now, wall)
            self._heard = self._vote_from - self._lease
        self._commands.append(Look())

    def _review(self, now: float, wall: float) -> None:
        raise NotImplementedError

    def leads(self, now: float) -> bool:
        """Whether a step may be taken, or the answer to one given, at this moment: ask before each."""
        return self.state is State.LEADING and now < self._lease_until()

    @property
    def primary(self) -> PeerID | None:
        """Who leads by what is known here."""
        best = self.lineage.best
        return None if best is None or self.lineage.is_exposed(best) else best.primary

    @property
    def epoch(self) -> int:
        """Of the Term that holds; 0 before any is known. What manifests and replies carry."""
        best = self.lineage.best
        return 0 if best is None else best.epoch

    @property
    def num_forks(self) -> int:
        """Terms that lost to one that does not descend from them: steps taken in them are not in what goes on."""
        return self.lineage.num_forks

    @property
    def members(self) -> tuple[PeerID, ...]:
        """The successors that this primary named last."""
        return self._members.named

    @property
    def is_settled(self) -> bool:
        """Whether a majority of the members before holds the Seal that names these."""
        return self._members.is_settled

    @property
    def is_content(self) -> bool:
        """Whether another Seal of the same state would name nobody new."""
        named = self._members.named
        enough = len(named) >= NUM_SUCCESSORS or self._hosts.keys() <= {self.me, *named}
        return self._members.is_settled and enough

    def commands(self) -> list[Command]:
        """What is to be done now, in this order."""
        commands, self._commands = self._commands, []
        return commands

    def timer_at(self) -> float:
        """When `handle_timer` is due."""
        if self._poll is not None:
            return self._poll.deadline
        if self._settle_at is not None:
            return self._settle_at
        if self.state is State.LEADING:
            return min(self._beat_at, self._lease_until())
        if self.state is State.FENCED:
            return self._beat_at
        if self.state in (State.FOLLOWING, State.HOLDING):
            return self._silence_at()
        return self._look_at

    def _may_host(self, peer: PeerID) -> bool:
        return self._authority.may(peer, "host", self.uid, now=None)

    def _silence_at(self) -> float:
        best = self.lineage.best
        exposed = best is not None and self.lineage.is_exposed(best)
        if self.state is State.HOLDING:
            wait = 2 * self._lease
        else:
            members = () if self.held is None else self.held.successors
            rank = members.index(self.me) + 1 if self.me in members else 0
            wait = 2.0 * max(0, rank - 1) + (0.0 if exposed else self._lease)
        return max(self._heard + wait, self._agreed_at + self._lease, self._retry_at, self._vote_from)

    def _lease_until(self) -> float:
        return self._members.lease_until(self._renewed, self._lease)

    def _is_free(self, term: Term, now: float) -> bool:
        """Whether no vote for another binds it: one that won by it has come forward within a lease, or never will."""
        return self._promised <= term.epoch or now >= self._promised_at + self._lease

    def _promise(self, epoch: int, candidate: PeerID, now: float) -> None:
        self._promised, self._voted_for, self._promised_at = epoch, bytes(candidate), now

    def _take_back_own_vote(self) -> None:
        """Nobody else can use it: the present primary is agreed with again."""
        if self._voted_for == self.me:
            self._promised_at = -1e9

    def _is_alive(self, record: Term | Seal, now: float) -> bool:
        """Whether it is an adoption which says that all members were silent for two leases, and this one was not."""
        if not isinstance(record, Term) or record.kind is not Kind.ADOPTION or record.seal is None:
            return False
        best = self.lineage.best
        if best is not None and self._hosts.get(best.primary, best.epoch) > best.epoch:
            return False  # its primary goes by another Term itself
        if (
            self.state not in (State.FOLLOWING, State.CANDIDATE)
            or self.held is None
            or now > self._beaten + 2 * self._lease
        ):
            return False
        return self.me in self.held.members and record.primary != self.me and record.seal.age <= self.held.age

    def _is_beat_of(self, peer: PeerID, ask: Ask, best: Term, now: float) -> bool:
        if peer != best.primary or ask.epoch != best.epoch or not self._is_free(best, now):
            return False
        if self.lineage.is_exposed(best):
            return False
        # the other of two processes with one key: nobody agrees with it
        return ask.boot == best.boot and peer != self.me

    def _is_of_twin(self, record: Term | Seal) -> bool:
        """Whether another process signed this with the same key, and not before this one started."""
        if isinstance(record, Term):
            return record.boot not in self._boots and record.epoch > self._started
        term = self.lineage.term_of(record)
        return term is not None and term.boot != self._boot and record.time > self._started

    def _retry(self, now: float) -> None:
        self._retry_at = now + self._lease * self._random.uniform(0.1, 0.4)
        self._look(now)

    def _look(self, now: float) -> None:
        self._look_at = now + self._lease / 6
        self._commands.append(Look())

    def _say_role(self) -> None:
        role = Role(self.state is State.LEADING, self.primary)
        if role != self._role:
            self._role = role
            self._commands.append(role)

    def _read(self, blob: Any) -> Term | Seal | None:
        """Checks each record once. None for what is neither."""
        if type(blob) is not bytes or not blob:
            return None
        if blob not in self._known:
            record: Term | Seal | None = None
            for reads in (read_seal, read_term):
                try:
                    record = reads(blob, self._run)
                    break
                except ProtocolError:
                    continue
            while len(self._known) >= MAX_KNOWN:
                self._known.pop(next(iter(self._known)))
            self._known[blob] = record
        return self._known[blob]

    def _publish(self, now: float) -> None:
        assert self.term is not None
        self._published_at = now
        seal = self.lineage.seal_of(self.term)
        own = seal is not None and seal.term == self.term.digest
        self._commands.append(Publish((self.term.blob, *((seal.blob,) if own and seal is not None else ()))))

    def _persist(self) -> None:
        best = self.term or self.lineage.best
        stored = {
            "promised": self._promised,
            "voted_for": self._voted_for,
            "handed_over": self._handed_over,
            "boot": self._boot,
            "terms": [] if best is None else self.lineage.line(best),
            "held": b"" if self.held is None else self.held.blob,
            "number": self._number,
        }
        self._commands.append(Persist(msgpack.packb(stored)))

    def _restore(self, stored: bytes, has_file: bool, now: float, wall: float) -> None:
        """A process that starts again waits one lease: it may have answered a beat just before it ended."""
        try:
            data = msgpack.unpackb(stored)
            self._promised, self._voted_for = int(data["promised"]), bytes(data["voted_for"])
            self._handed_over = int(data["handed_over"])
            self._boots.add(bytes(data["boot"]))
            records = [self._read(blob) for blob in (*data["terms"], data["held"])]
        except (ValueError, LookupError, TypeError, msgpack.UnpackException):
            return  # as if nothing had been stored: it may not vote or lead before it has read the network
        held = records[-1]
        for record in records:
            if record is not None:
                self.lineage.add(record, now=wall)
                if isinstance(record, Term) and record.primary == self.me:
                    self._boots.add(record.boot)
        self._vote_from = self._heard = now + self._lease
        self._promised_at = now
        if has_file and isinstance(held, Seal):
            self.held = held
            self.state = State.FOLLOWING if self.me in held.members else State.HOLDING
            # without successors nobody can have taken over: a look at the network is enough
            self._was_alone = held.members == (self.me,)
