"""An iterative lookup over disjoint paths (Kademlia section 2.3, S/Kademlia section 4.4). Pure.

Each contact is asked once, by one path, and what it answers is believed by that path alone. `to_ask` says whom to ask,
and the caller reports `answered`, `stalled` or `failed`.
"""

import enum
from bisect import insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from random import Random

from tesseract_async.network.contacts import Contact, few_per_range

MAX_PER_PATH = 64
MAX_ASKED_PER_PATH = 100
MAX_PER_RANGE = 3
"""Candidates of one address range on one path."""
MAX_IN_VAIN = 4
"""Once this many contacts named by one teller have not answered, and two more for each that has, no other that it named
is asked."""


class CandidateState(enum.Enum):
    NEW = enum.auto()
    ASKED = enum.auto()
    STALLED = enum.auto()
    """Asked and late: still waited for, but its place in the parallelism is free for another."""
    ANSWERED = enum.auto()
    FAILED = enum.auto()


@dataclass(slots=True, eq=False)
class LookupCandidate:
    """A contact as one lookup sees it."""

    contact: Contact
    distance: int
    round: int
    """Answers that led here, its own included: 1 for a contact known at the start."""
    teller: "LookupCandidate | None"
    """The candidate that named it, and is answerable for it."""
    state: CandidateState = CandidateState.NEW
    path: "LookupPath | None" = None
    """The path that asked it."""
    num_in_vain: int = 0
    """Number of contacts named by this one that did not answer, less two for each that did."""


@dataclass(slots=True, eq=False)
class LookupPath:
    candidates: list[LookupCandidate] = field(default_factory=list)
    starts: list[LookupCandidate] = field(default_factory=list)
    """The candidates known at the start that are asked in any case."""
    seen: set[bytes] = field(default_factory=set)
    ignored: set[LookupCandidate] = field(default_factory=set)
    """Candidates that apparently only a liar named."""
    ranges: dict[bytes, int] = field(default_factory=dict)
    num_asked: int = 0
    """Now, without those that are late."""
    num_asked_ever: int = 0


class Lookup:
    """One search for the k contacts nearest to `target`.

    Whatever it is told, a path remembers `MAX_PER_PATH` candidates at most, `MAX_PER_RANGE` of one address range, and
    gives up after `MAX_ASKED_PER_PATH` questions.
    """

    def __init__(
        self,
        target: int,
        start: Sequence[Contact],
        *,
        k: int,
        num_paths: int,
        alpha: int,
        radius: int = 0,
        random: Random | None = None,
    ) -> None:
        """`radius`: of those nearer to the target than that, any is as good as another, and `random` says which is
        asked first: the nearest may have made ids for it."""
        self.target = target
        self.k = k
        self.num_rounds = 0
        """The longest chain of answers that was followed."""
        self.num_answered = 0
        self.max_in_progress = alpha
        """Requests in progress over all paths; may be changed between two calls of `to_ask`."""
        self._radius = radius
        self._random = random
        self._candidates: dict[bytes, LookupCandidate] = {}
        self._paths = [LookupPath() for _ in range(num_paths)]
        nearest_first = sorted(start, key=lambda contact: contact.number ^ target)
        for position, contact in enumerate(nearest_first):
            self._hear(self._paths[position % num_paths], contact, 1, None)
        for path in self._paths:
            path.starts = path.candidates[: -(-alpha // num_paths)]

    def to_ask(self) -> list[Contact]:
        asked: list[Contact] = []
        alpha = -(-self.max_in_progress // len(self._paths))
        room = self.max_in_progress - sum(path.num_asked for path in self._paths)
        paths = self._paths
        if room < len(paths):
            # whose turn it is: otherwise the last path would wait forever
            paths = sorted(paths, key=lambda path: path.num_asked_ever)
        for path in paths:
            if room <= 0:
                break
            if path.num_asked >= alpha or path.num_asked_ever >= MAX_ASKED_PER_PATH:
                continue
            for candidate in self._next(path, min(room, alpha - path.num_asked)):
                candidate.state = CandidateState.ASKED
                candidate.path = path
                path.num_asked += 1
                path.num_asked_ever += 1
                asked.append(candidate.contact)
                room -= 1
        return asked

    def answered(self, contact: Contact, found: Iterable[Contact]) -> None:
        """Note that a contact proved itself and named those nearest to the target that it knows."""
        candidate = self._candidates[contact.raw]
        path = self._leave(candidate)
        candidate.state = CandidateState.ANSWERED
        self.num_answered += 1
        self.num_rounds = max(self.num_rounds, candidate.round)
        if candidate.teller is not None:
            candidate.teller.num_in_vain -= 2
        for heard in found:
            self._hear(path, heard, candidate.round + 1, candidate)

    def stalled(self, contact: Contact) -> None:
        """Note that a contact is late: others may be asked, too. Late again, it counts as failed until it answers."""
        candidate = self._candidates[contact.raw]
        if candidate.state is CandidateState.ASKED:
            self._in_vain(candidate, self._leave(candidate))
            candidate.state = CandidateState.STALLED
        elif candidate.state is CandidateState.STALLED:
            candidate.state = CandidateState.FAILED

    def failed(self, contact: Contact) -> None:
        candidate = self._candidates[contact.raw]
        path = self._leave(candidate)
        if candidate.state is CandidateState.ASKED:
            self._in_vain(candidate, path)
        candidate.state = CandidateState.FAILED

    def knows(self, raw: bytes) -> bool:
        return raw in self._candidates

    @property
    def finished(self) -> bool:
        """True once every path is: the k nearest that it may still count on have answered."""
        return all(self._path_finished(path) for path in self._paths)

    def answered_within(self, radius: int | None = None) -> list[Contact]:
        """Return all contacts that answered and are nearer to the target than `radius`, nearest first."""
        answered = [item for item in self._candidates.values() if item.state is CandidateState.ANSWERED]
        answered.sort(key=lambda item: item.distance)
        return [item.contact for item in answered if radius is None or item.distance < radius]

    def heard_of(self) -> list[Contact]:
        return [item.contact for item in self._candidates.values() if item.state is not CandidateState.FAILED]

    def closest(self, *, max_per_range: int | None = None) -> list[Contact]:
        """Return the k nearest contacts that answered, nearest first; at most `max_per_range` of one address range."""
        answered = self.answered_within()
        return (answered if max_per_range is None else few_per_range(answered, max_per_range))[: self.k]

    def _next(self, path: LookupPath, count: int) -> list[LookupCandidate]:
        found: list[LookupCandidate] = []
        num_counted = 0
        for candidate in path.candidates:
            if candidate.state is not CandidateState.FAILED and candidate not in path.ignored:
                if candidate.state is CandidateState.NEW:
                    if len(found) >= count and candidate.distance >= self._radius:
                        break
                    found.append(candidate)
                num_counted += 1
                if num_counted == self.k:
                    break
        if len(found) > count and self._random is not None:
            return self._random.sample(found, count)
        return found[:count] or [item for item in path.starts if item.state is CandidateState.NEW][:count]

    def _path_finished(self, path: LookupPath) -> bool:
        given_up = path.num_asked_ever >= MAX_ASKED_PER_PATH
        if not given_up and any(item.state in (CandidateState.NEW, CandidateState.ASKED) for item in path.starts):
            return False
        num_counted = 0
        for candidate in path.candidates:
            if candidate.state is CandidateState.ANSWERED:
                num_counted += 1
                if num_counted == self.k:
                    return True
            elif candidate.state is not CandidateState.FAILED and candidate not in path.ignored:
                if not (given_up and candidate.state is CandidateState.NEW):
                    return False
        return True

    def _in_vain(self, candidate: LookupCandidate, path: LookupPath) -> None:
        """Note that a contact is late for the first time, or failed: what else its teller named is worth less."""
        teller = candidate.teller
        if teller is not None and not candidate.contact.proven:
            teller.num_in_vain += 1
            if teller.num_in_vain >= MAX_IN_VAIN:
                path.ignored.update(
                    other for other in path.candidates if other.teller is teller and other.state is CandidateState.NEW
                )

    def _hear(self, path: LookupPath, contact: Contact, round_number: int, teller: LookupCandidate | None) -> None:
        if contact.raw in path.seen:
            path.ignored.discard(self._candidates[contact.raw])  # another one knows it, too
            return
        if contact.range is not None:
            if path.ranges.get(contact.range, 0) >= MAX_PER_RANGE:
                return
            path.ranges[contact.range] = path.ranges.get(contact.range, 0) + 1
        candidate = self._candidates.get(contact.raw)
        if candidate is None:
            candidate = LookupCandidate(contact, contact.number ^ self.target, round_number, teller)
            self._candidates[contact.raw] = candidate
        path.seen.add(contact.raw)
        insort(path.candidates, candidate, key=attrgetter("distance"))
        if len(path.candidates) > MAX_PER_PATH:
            dropped = path.candidates.pop().contact
            path.seen.discard(dropped.raw)
            if dropped.range is not None:
                path.ranges[dropped.range] -= 1

    def _leave(self, candidate: LookupCandidate) -> LookupPath:
        path = candidate.path
        assert path is not None
        if candidate.state is CandidateState.ASKED:
            path.num_asked -= 1
        return path
