"""Those who may succeed an expert's primary: who of them agrees with it, and until when it leads by that. No I/O."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from tesseract_async.experts.terms import MAX_SUCCESSORS, majority
from tesseract_async.identity import PeerID

NUM_SUCCESSORS: Final = 2
"""Wanted for each expert: a primary and two successors outlive the death of any one by vote."""
Age = tuple[int, int]
NEVER: Final = -1e9


class Members:
    """The others of an expert's members, as its primary knows them; of one Term."""

    def __init__(self) -> None:
        self.settled: tuple[PeerID, ...] = ()
        """Those who decide."""
        self.named: tuple[PeerID, ...] = ()
        """Those in the newest Seal, who decide as well until a majority of `settled` holds that."""
        self._age: Age = (0, 0)
        self._began = NEVER
        self._agreed: dict[PeerID, float] = {}
        self._holds: dict[PeerID, Age] = {}

    @property
    def is_settled(self) -> bool:
        """Whether no change is under way."""
        return self.settled == self.named

    def begin(self, others: tuple[PeerID, ...], now: float) -> None:
        """A Term begins, in which these decide at first. Their votes count as agreement."""
        self.settled = self.named = others
        self._began = now

    def agreed(self, peer: PeerID, sent: float, held: Age) -> None:
        """`peer` agreed with what was sent to it at that time, and holds the file of the Seal of this age."""
        self._agreed[peer] = max(sent, self._agreed.get(peer, sent))
        self._holds[peer] = held
        self._settle()

    def disagreed(self, peer: PeerID) -> None:
        """It may have started anew, and know nothing."""
        self._holds.pop(peer, None)

    def held_by(self, peer: PeerID) -> Age | None:
        """The age of the Seal whose file it holds; None if it never agreed in this Term."""
        return self._holds.get(peer)

    def name(self, successors: tuple[PeerID, ...], age: Age) -> None:
        """The newest Seal, of this age, names these."""
        self.named, self._age = successors, age
        self._settle()

    def lease_until(self, renewed: float, lease: float) -> float:
        """When the lease ends: two thirds of one after a majority agreed, counted from sending.

        One or two lead on for a whole one after the network took their word: availability first.
        """
        return min(self._until(some, renewed, lease) for some in (self.settled, self.named))

    def best(self, now: float, lease: float) -> list[PeerID]:
        """Those who agreed within a lease: successors first, then those with the newest file."""
        alive = [peer for peer, at in self._agreed.items() if now - at < lease]
        return sorted(alive, key=lambda peer: (peer in self.named, self._holds.get(peer, (0, 0))), reverse=True)

    def choose(self, now: float, lease: float, first: Age, may: Callable[[PeerID], bool]) -> tuple[PeerID, ...]:
        """The successors to name in the next Seal.

        At most one more or fewer than before, so that a majority of either meets one of the other; none before the
        last change is settled. `first`: the age of the oldest file that a new one must hold.
        """
        if not self.is_settled:
            return self.named
        live = {peer for peer, at in self._agreed.items() if now - at < lease and may(peer)}
        gone = [p for p in self.named if not may(p) or now - self._agreed.get(p, self._began) > 2 * lease]
        new = [peer for peer in live if peer not in self.named and self._holds.get(peer, (0, 0)) >= first]
        num_good = len(self.named) - len(gone)
        if new and num_good < NUM_SUCCESSORS and len(self.named) < MAX_SUCCESSORS:
            return (*self.named, min(new))
        if gone and (num_good >= NUM_SUCCESSORS or not new or len(self.named) == MAX_SUCCESSORS):
            return tuple(peer for peer in self.named if peer != gone[-1])
        return self.named

    def _until(self, others: tuple[PeerID, ...], renewed: float, lease: float) -> float:
        if len(others) < 2:
            return renewed + lease
        agreed = sorted((self._agreed.get(peer, NEVER) for peer in others), reverse=True)
        return agreed[majority(len(others) + 1) - 2] + lease * 2 / 3

    def _settle(self) -> None:
        have = sum(self._holds.get(peer, (0, 0)) >= self._age for peer in self.settled)
        if have >= (0 if len(self.settled) < 2 else majority(len(self.settled) + 1) - 1):
            self.settled = self.named
