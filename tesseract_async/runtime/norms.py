"""The usual gradient norms of one expert, learned from its backwards. A pure machine.

One gradient of ten thousand times the usual size ruins Adam's second moments for thousands of steps, and SGD's weights
at once. No fixed limit fits every expert, so the limit is a multiple of what was usual lately: the median over accounts
(a peer, or an address range of unknown ones) of each one's median, the smaller one of two. So one account cannot raise
the limit for others however much it sends. An account that is alone can, within some backwards: an honest trainer whose
gradients have grown is scaled down for no longer than that.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Collection, Hashable, Iterable
from typing import Final

SCALED_ABOVE: Final = 8.0
"""Times the usual norm: larger gradients are scaled down to this. AutoClip (Seetharaman et al. 2020) clips at a
percentile of the history; several times the median leaves ordinary steps alone."""
FAR_ABOVE: Final = 128.0
"""Times the usual norm: requests that come to that together are computed alone, lest one's gradients scale all down."""
UNDONE_ABOVE: Final = 1024.0
"""Times the usual norm, once that is settled: if the very first gradient was that large, its step is undone."""
CHECKED_ABOVE: Final = 4.0
"""Times the usual norm: after a step on such gradients the expert's state is checked."""
NUM_FIRST: Final = 8
"""Norms that must be known before the usual one is settled."""
GROWTH: Final = 16.0
"""Times their norm, and as much again in absolute terms, that one of the first steps may make the weights."""
_NUM_HABIT: Final = 4
"""Gradients after which an account's own norms say something about it."""
_PER_ACCOUNT: Final = 16
_MAX_ACCOUNTS: Final = 16


class UsualNorms:
    """The norms of recent gradients of one expert's parameters."""

    def __init__(self, known: Iterable[float] = ()) -> None:
        """`known`: what `values` returned before a restart."""
        self._by_account: OrderedDict[Hashable, deque[float]] = OrderedDict()
        self._medians: dict[Hashable, float] = {}
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
        own = self._medians.get(account, 0.0) if len(self._by_account.get(account, ())) >= _NUM_HABIT else 0.0
        return usual if own > SCALED_ABOVE * usual else SCALED_ABOVE * usual

    def observe(self, account: Hashable, norm: float) -> bool:
        """Learn the norm of one backward's parameter gradients. Zero and infinity teach nothing.

        Returns whether it was the one that settled the usual norm.
        """
        if not 0.0 < norm < math.inf:
            return False
        norms = self._by_account.get(account)
        if norms is None:
            if len(self._by_account) == _MAX_ACCOUNTS:
                del self._medians[self._by_account.popitem(last=False)[0]]
            norms = self._by_account[account] = deque(maxlen=_PER_ACCOUNT)
        self._by_account.move_to_end(account)
        norms.append(norm)
        if self.usual is None:
            self.first = norm
        self._medians[account] = _lower_median(norms)
        if self._of_before:
            self._of_before.popleft()  # what is seen now replaces what was remembered
        was_settled = self.is_settled
        self._find()
        return not was_settled and self.is_settled

    def values(self) -> list[float]:
        """Return all norms that are remembered."""
        return [*self._of_before, *(norm for norms in self._by_account.values() for norm in norms)]

    def _find(self) -> None:
        if not self.is_settled:
            num_known = len(self._of_before) + sum(map(len, self._by_account.values()))
            self.is_settled = num_known >= NUM_FIRST
        medians = list(self._medians.values())
        if self._of_before:
            medians.append(_lower_median(self._of_before))
        if medians:
            self.usual = _lower_median(medians)


def _lower_median(values: Collection[float]) -> float:
    return sorted(values)[(len(values) - 1) // 2]
