"""An iterative lookup over disjoint paths (Kademlia section 2.3, S/Kademlia section 4.4). Pure.

The contacts known at the start are dealt to the paths in turn. Each contact is asked once, by one path, and what it
answers is believed by that path alone: a liar leads astray one path of several. A path is finished when the k contacts
nearest to the target that it has heard of have all answered; failed ones do not count. The lookup knows nothing of
datagrams: `to_ask` says whom to ask, and the caller reports `answered`, `stalled` or `failed`.
"""

from __future__ import annotations

import enum
from bisect import insort
from collections.abc import Iterable, Sequence

from tesseract_async.network.contacts import Contact


class State(enum.Enum):
    NEW = enum.auto()
    ASKED = enum.auto()
    STALLED = enum.auto()
    """Asked and late: still waited for, but its place in the parallelism is free for another."""
    ANSWERED = enum.auto()
    FAILED = enum.auto()


class Candidate:
    """A contact as one lookup sees it."""

    __slots__ = ("contact", "distance", "path", "round", "state")

    def __init__(self, contact: Contact, distance: int, round_number: int) -> None:
        self.contact = contact
        self.distance = distance
        self.state = State.NEW
        self.path: Path | None = None
        """The path that asked it."""
        self.round = round_number
        """How many answers led here, itself included: 1 for a contact known at the start."""


class Path:
    """The candidates that one path has heard of, nearest first."""

    __slots__ = ("candidates", "num_asked", "seen")

    def __init__(self) -> None:
        self.candidates: list[Candidate] = []
        self.seen: set[bytes] = set()
        self.num_asked = 0


class Lookup:
    """One search for the k contacts nearest to `target`.

    `max_per_path` bounds what a path remembers, whatever it is told.
    """

    def __init__(
        self, target: int, start: Sequence[Contact], *, k: int, num_paths: int, alpha: int, max_per_path: int = 64
    ) -> None:
        self.target = target
        self.k = k
        self.num_rounds = 0
        """The longest chain of answers that was followed."""
        self.num_asked = 0
        self._alpha = -(-alpha // num_paths)
        self._max_per_path = max_per_path
        self._candidates: dict[bytes, Candidate] = {}
        self._paths = [Path() for _ in range(num_paths)]
        nearest_first = sorted(start, key=lambda contact: contact.number ^ target)
        for position, contact in enumerate(nearest_first):
            self._hear(self._paths[position % num_paths], contact, 1)

    def to_ask(self) -> list[Contact]:
        """Contacts to ask now. Each is counted as asked."""
        asked: list[Contact] = []
        for path in self._paths:
            if path.num_asked >= self._alpha:
                continue
            for candidate in self._frontier(path):
                if candidate.state is State.NEW:
                    candidate.state = State.ASKED
                    candidate.path = path
                    path.num_asked += 1
                    asked.append(candidate.contact)
                    if path.num_asked >= self._alpha:
                        break
        self.num_asked += len(asked)
        return asked

    def answered(self, contact: Contact, found: Iterable[Contact]) -> None:
        """A contact proved itself and named those nearest to the target that it knows."""
        candidate = self._candidates[contact.raw]
        path = self._leave(candidate)
        candidate.state = State.ANSWERED
        self.num_rounds = max(self.num_rounds, candidate.round)
        for heard in found:
            self._hear(path, heard, candidate.round + 1)

    def stalled(self, contact: Contact) -> None:
        """A contact is late: others may be asked beside it."""
        candidate = self._candidates[contact.raw]
        if candidate.state is State.ASKED:
            self._leave(candidate)
            candidate.state = State.STALLED

    def failed(self, contact: Contact) -> None:
        """A contact did not answer, or not as itself."""
        candidate = self._candidates[contact.raw]
        self._leave(candidate)
        candidate.state = State.FAILED

    def knows(self, raw: bytes) -> bool:
        """Whether some path has heard of the contact with that `raw`."""
        return raw in self._candidates

    @property
    def finished(self) -> bool:
        """Whether every path is."""
        return all(candidate.state is State.ANSWERED for path in self._paths for candidate in self._frontier(path))

    def closest(self) -> list[Contact]:
        """The k nearest contacts that answered, nearest first."""
        answered = [item for item in self._candidates.values() if item.state is State.ANSWERED]
        answered.sort(key=lambda item: item.distance)
        return [item.contact for item in answered[: self.k]]

    def _frontier(self, path: Path) -> list[Candidate]:
        """The k nearest candidates of a path that may still count."""
        frontier: list[Candidate] = []
        for candidate in path.candidates:
            if candidate.state is not State.FAILED:
                frontier.append(candidate)
                if len(frontier) == self.k:
                    break
        return frontier

    def _hear(self, path: Path, contact: Contact, round_number: int) -> None:
        if contact.raw in path.seen:
            return
        candidate = self._candidates.get(contact.raw)
        if candidate is None:
            candidate = Candidate(contact, contact.number ^ self.target, round_number)
            self._candidates[contact.raw] = candidate
        path.seen.add(contact.raw)
        insort(path.candidates, candidate, key=_distance)
        if len(path.candidates) > self._max_per_path:
            dropped = path.candidates.pop()
            path.seen.discard(dropped.contact.raw)

    def _leave(self, candidate: Candidate) -> Path:
        assert candidate.path is not None
        if candidate.state is State.ASKED:
            candidate.path.num_asked -= 1
        return candidate.path


def _distance(candidate: Candidate) -> int:
    return candidate.distance
