"""The memory of small calls that a peer has under way here: each costs far more than its bytes. No I/O."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from tesseract_async.endpoint.budget import FairCount, Owner
from tesseract_async.endpoint.under_way import Incoming
from tesseract_async.wire import packed

CALL_BYTES: Final = 24 * 1024
"""What a call costs beside its bytes: the block that its buffers are cut from, its task, and what remembers it."""
STEP: Final = 256 * 1024
"""Calls are counted in the node's budget in steps of so many bytes; the first of each connection is not."""


class SmallCalls:
    """Those of one connection. `budget` is shared by all connections of the node; None: there is no such bound."""

    def __init__(self, budget: FairCount | None, owner: Owner) -> None:
        self.cost = 0
        """Of what is under way: each call's `cost` is taken off when it ends."""
        self._budget = budget
        self._owner = owner
        self._counted = STEP

    def began(self, call: Incoming, num_bytes: int, buffers: Sequence[memoryview]) -> bool:
        """Whether a request of so many bytes may be under way here, beside those that are."""
        cost = CALL_BYTES + num_bytes
        if num_bytes > packed.UNCOUNTED_BYTES:
            cost += packed.BYTES_PER_ITEM * min(num_bytes - sum(map(len, buffers)), packed.MAX_ITEMS)
        call.cost = cost
        self.cost += cost
        return self.cost <= self._counted or self._count()

    def _count(self) -> bool:
        more = -(-(self.cost - self._counted) // STEP) * STEP
        if self._budget is not None and not self._budget.take(self._owner, more):
            return False
        self._counted += more
        return True

    def settle(self) -> None:
        """Gives back what is counted beyond what is under way."""
        less = (self._counted - max(self.cost, STEP)) // STEP * STEP
        if less > 0:
            self._counted -= less
            if self._budget is not None:
                self._budget.give_back(self._owner, less)
