"""`OwnTerm`: this server's Term, the members that decide with it, and the lease that their agreement gives it. No
I/O."""

import math
from collections import deque
from collections.abc import Callable, Mapping, Set
from random import Random
from typing import Final

from tesseract_async.experts.tenure_words import Question, Send
from tesseract_async.experts.terms import MAX_SUCCESSORS, Seal, Term, TermKind, majority
from tesseract_async.identity import PeerID

NUM_SUCCESSORS: Final = 2
"""Successors wanted for each expert: a primary and two successors can vote after the death of any one."""
MAX_BEATS: Final = 6
"""The least number of an expert's hosts that hear from its primary: members, and hosts that may become one."""
PUBLISH_EVERY: Final = 600.0
"""Seconds between two Seals in the network if only the state changed; the members hear of each at once."""
MAX_BEHIND: Final = 3
"""The number of Seals that a copy may be behind its primary."""
NEVER: Final = -1e9
Age = tuple[int, int]


class OwnTerm:
    def __init__(
        self, term: Term, others: tuple[PeerID, ...], votes: Mapping[PeerID, tuple[float, Age]], *, now: float
    ) -> None:
        """`others` decide at first. Their `votes` count as agreement: when each was asked, and its file's age."""
        self.term = term
        self.number = 0
        """The number of its newest Seal."""
        self.settled = others
        """The other members that decide."""
        self.named = others
        """The members in the newest Seal. They decide, too, until most of `settled` hold a Seal that names them."""
        self.beat_at = now
        self.fenced_at = 0.0
        self.published_at = NEVER
        self.published = 0
        """The number of its newest Seal that the network was given."""
        self.seen = 0
        """An epoch after which its next Seal was signed."""
        self._named_at: Age = (0, 0)  # of the first Seal that names them
        self._root = b""
        self._states: deque[Age] = deque(maxlen=MAX_BEHIND + 1)  # the last states: not Seals that only name others
        self._began = now
        self._agreed = {peer: sent for peer, (sent, _) in votes.items()}
        if term.kind is TermKind.TAKEOVER and term.seal is not None:
            self._agreed.setdefault(term.seal.primary, NEVER)
        self._holds = {peer: held for peer, (_, held) in votes.items()}
        self._follow: set[PeerID] = set()  # agreed with a beat: they know of this Term, and of none above it

    def time(self, now: float) -> int:
        """Seconds since `EPOCH_ZERO` for a Seal made now: counted from its Term's epoch, by the clock that nobody
        sets."""
        return max(self.term.epoch + int(now - self._began), self.seen)

    @property
    def is_by_members(self) -> bool:
        """True if a majority of three members or more decides, and so nobody else need be asked."""
        return min(len(self.settled), len(self.named)) > 1

    @property
    def is_followed(self) -> bool:
        """True if a majority agreed with its beats. A member that agreed votes for no other within a lease."""
        return 1 + len(self._follow.intersection(self.settled)) >= majority(len(self.settled) + 1)

    @property
    def is_settled(self) -> bool:
        return self.settled == self.named

    def is_content(self, hosts: Set[PeerID]) -> bool:
        """Return whether another Seal would name nobody new: these are settled, and enough or all of the `hosts`."""
        return self.is_settled and (len(self.named) >= NUM_SUCCESSORS or hosts <= set(self.named))

    def is_left(self, now: float, lease: float) -> bool:
        return now >= self.fenced_at + lease and len(self.settled) > 1

    def agreed(self, peer: PeerID, sent: float, held: Age) -> None:
        """Note that `peer` agreed with the beat that was sent at that time, and holds the file of the Seal of this
        age."""
        self._agreed[peer] = max(sent, self._agreed.get(peer, sent))
        self._holds[peer] = held
        self._follow.add(peer)
        self._settle()

    def disagreed(self, peer: PeerID) -> None:
        """Note that `peer` did not agree: it may have started anew, and know nothing."""
        self._holds.pop(peer, None)
        self._follow.discard(peer)

    def sealed(self, seal: Seal) -> None:
        if seal.successors != self.named or self._named_at == (0, 0):
            self.named, self._named_at = seal.successors, seal.age
        if seal.root != self._root:
            self._root = seal.root
            self._states.append(seal.age)
        self._settle()

    def heard_of_most(self, lease: float) -> float:
        """Return the time at which a majority agreed last, by members."""
        return self.lease_until(math.inf, lease) - lease * 2 / 3

    def lease_until(self, renewed: float, lease: float) -> float:
        """Return the time at which the lease ends: two thirds of one after a majority agreed, counted from sending."""
        return min(self._until(some, renewed, lease) for some in (self.settled, self.named))

    def heirs(self, hosts: Set[PeerID], now: float, lease: float) -> list[PeerID]:
        """Sort the hosts: first those that agreed within a lease, successors before others, then the newest file."""

        def merit(peer: PeerID) -> tuple[bool, bool, Age]:
            is_alive = now - self._agreed.get(peer, NEVER) < lease
            return is_alive, is_alive and peer in self.named, self._holds.get(peer, (0, 0)) if is_alive else (0, 0)

        return sorted(sorted(hosts), key=merit, reverse=True)

    def choose(self, now: float, lease: float, may: Callable[[PeerID], bool]) -> tuple[PeerID, ...]:
        """Choose the successors to name in the next Seal.

        At most one more or fewer than before, so that a majority of either meets one of the other; none before the
        last change is settled. A new one holds a file no older than the Term's parent.
        """
        if not self.is_settled:
            return self.named
        first = (0, 1) if self.term.seal is None else self.term.seal.age
        live = {
            peer for peer, at in self._agreed.items() if now - at < lease and may(peer) and not self._is_behind(peer)
        }
        gone = [
            peer
            for peer in self.named
            if not may(peer) or now - self._agreed.get(peer, self._began) > lease or self._is_behind(peer)
        ]
        new = [peer for peer in live if peer not in self.named and self._holds.get(peer, (0, 0)) >= first]
        num_good = len(self.named) - len(gone)
        if new and num_good < NUM_SUCCESSORS and len(self.named) < MAX_SUCCESSORS:
            return (*self.named, min(new))
        # a pair leads by the network's word, which may come late: another may be here before long
        is_late = now - self._began > 2 * lease and not new
        if gone and (num_good >= NUM_SUCCESSORS or is_late or len(self.named) == MAX_SUCCESSORS):
            return tuple(peer for peer in self.named if peer != gone[-1])
        return self.named

    def _is_behind(self, peer: PeerID) -> bool:
        """Return whether it answers, but takes no new states: its disk is full, or its clock is wrong."""
        is_full = len(self._states) == self._states.maxlen
        return is_full and self._holds.get(peer, self._states[0]) < self._states[0]

    def beats(self, kind: str, boot: bytes, seal: Seal | None, hosts: list[PeerID], random: Random) -> list[Send]:
        """Return questions to the members, and to some of the other `hosts`, each with what it does not know yet."""
        targets = {*self.settled, *self.named}
        more = [peer for peer in hosts if peer not in targets]
        start = random.randrange(len(more)) if more else 0
        targets |= set((more[start:] + more[:start])[: max(0, MAX_BEATS - len(targets))])
        found = []
        for peer in sorted(targets):
            held = self._holds.get(peer)
            term = b"" if peer in self._follow else self.term.blob
            news = b"" if seal is None or (held is not None and held >= seal.age) else seal.blob
            found.append(Send(peer, Question(kind, self.term.epoch, boot, term, news)))
        return found

    def _until(self, others: tuple[PeerID, ...], renewed: float, lease: float) -> float:
        if len(others) < 2:
            return renewed + lease
        agreed = sorted((self._agreed.get(peer, NEVER) for peer in others), reverse=True)
        return agreed[majority(len(others) + 1) - 2] + lease * 2 / 3

    def _settle(self) -> None:
        have = sum(self._holds.get(peer, (0, 0)) >= self._named_at for peer in self.settled)
        if have >= (0 if len(self.settled) < 2 else majority(len(self.settled) + 1) - 1):
            self.settled = self.named
