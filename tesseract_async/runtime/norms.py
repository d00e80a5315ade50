"""The usual gradient norms of one expert, learned from its backwards. A pure machine.

One gradient of ten thousand times the usual size ruins Adam's second moments for thousands of steps, and SGD's weights
at once. No fixed limit fits every expert, so the limit is a multiple of what was usual lately: the median over accounts
(a peer, or an address range of unknown ones) of each one's median, the smaller one of two. So one account cannot raise
the limit for others however much it sends. An account that is alone can raise it within a few backwards: an honest
trainer whose gradients have grown is not scaled down for longer than that.
"""

import math
from collections import deque
from collections.abc import Collection, Hashable, Iterable
from dataclasses import dataclass
from typing import Final

from tesseract_async.lru import LRU

SCALED_ABOVE: Final = 8.0
"""A multiple of the usual norm: larger gradients are scaled down to it. AutoClip (Seetharaman et al. 2020) clips at a
percentile of the history; several times the median leaves ordinary steps alone."""
FAR_ABOVE: Final = 128.0
"""A multiple of the usual norm: requests whose summed gradients exceed it are computed one by one, so that one's
gradients do not scale all of them down."""
UNDONE_ABOVE: Final = 1024.0
"""A multiple of the usual norm, once that is settled: if the very first gradient was this large, its step is undone."""
CHECKED_ABOVE: Final = 4.0
"""A multiple of the usual norm: after a step on gradients this large, the expert's state is checked."""
NUM_FIRST: Final = 8
"""Norms that must be known before the usual one is settled."""
GROWTH: Final = 16.0
"""Times their norm, and as much again in absolute terms, that one of the first steps may make the weights."""
_NUM_HABIT: Final = 4
"""Gradients after which an account's own norms say something about it."""
_PER_ACCOUNT: Final = 16
_MAX_ACCOUNTS: Final = 16


@dataclass(slots=True)
class _Account:
    norms: deque[float]
    median: float = 0.0


class UsualNorms:
    def __init__(self, known: Iterable[float] = ()) -> None:
        """`known`: what `values` returned before a restart."""
        self._accounts = LRU[Hashable, _Account](_MAX_ACCOUNTS)
        self._of_before = deque(known, maxlen=_PER_ACCOUNT * 2)
        self.usual: float | None = None
        """The usual norm of an account's gradients; None as long as nothing is known."""
        self.is_settled = False
        """True once enough norms are known to tell."""
        self.first = 0.0
        """The very first norm, which nothing could be compared with."""
        self._find()

    def bound(self, account: Hashable) -> float:
        """Return the norm that larger gradients of this account are scaled down to.

        A gradient that is far larger than usual is let through at `SCALED_ABOVE` times the usual. An account that sends
        such gradients all the time would decide where the expert goes: it is scaled down to the usual norm. It is not
        refused: an honest trainer that still errs has gradients thousands of times those of one that does not.
        """
        usual = self.usual
        if usual is None:
            return math.inf
        own = self._accounts.get(account)
        always = own is not None and len(own.norms) >= _NUM_HABIT and own.median > SCALED_ABOVE * usual
        return usual if always else SCALED_ABOVE * usual

    def observe(self, account: Hashable, norm: float) -> bool:
        """Learn the norm of one backward's parameter gradients. Zero and infinity teach nothing.

        Returns whether it was the one that settled the usual norm.
        """
        if not 0.0 < norm < math.inf:
            return False
        known = self._accounts.get(account)
        if known is None:
            known = self._accounts[account] = _Account(deque(maxlen=_PER_ACCOUNT))
        else:
            self._accounts.move_to_end(account)
        norms = known.norms
        norms.append(norm)
        known.median = sorted(norms)[(len(norms) - 1) // 2]  # as `_lower_median`
        if self.usual is None:
            self.first = norm
        if self._of_before:
            self._of_before.popleft()  # what is seen now replaces what was remembered
        was_settled = self.is_settled
        if was_settled and not self._of_before and len(self._accounts) == 1:
            self.usual = known.median
            return False
        self._find()
        return not was_settled and self.is_settled

    def values(self) -> list[float]:
        return [*self._of_before, *(norm for account in self._accounts.values() for norm in account.norms)]

    def _find(self) -> None:
        if not self.is_settled:
            num_known = len(self._of_before) + sum(len(account.norms) for account in self._accounts.values())
            self.is_settled = num_known >= NUM_FIRST
        medians = [account.median for account in self._accounts.values()]
        if self._of_before:
            medians.append(_lower_median(self._of_before))
        if medians:
            self.usual = _lower_median(medians)


def _lower_median(values: Collection[float]) -> float:
    return sorted(values)[(len(values) - 1) // 2]
