"""The cost of batches of one kind, learned from those that ran: so much each, and so much per row. A pure machine."""

from __future__ import annotations

import math

_KEPT = 0.98
_MIN_BATCHES = 10
_MIN_VARIATION = 0.15
_OUTLIER = 3.0


class BatchCost:
    """A straight line through (1 / rows, seconds / rows) of the last fifty batches or so, old ones weighing less.

    In these coordinates the errors of small and of large batches, which grow with their seconds, weigh the same. A
    batch that took several times what the line says (something else used the machine) counts as three times of it.
    """

    __slots__ = ("_count", "_x", "_y", "_xx", "_xy", "_each", "_per_row", "_is_known")

    def __init__(self) -> None:
        self._count = self._x = self._y = self._xx = self._xy = 0.0
        self._each = self._per_row = 0.0
        self._is_known = False

    def add(self, num_rows: int, seconds: float) -> None:
        """Learn from a batch that has run."""
        x, y = 1 / num_rows, seconds / num_rows
        expected = self._per_row + self._each * x
        if expected > 0.0:
            y = min(y, _OUTLIER * expected)
        self._count = self._count * _KEPT + 1.0
        self._x = self._x * _KEPT + x
        self._y = self._y * _KEPT + y
        self._xx = self._xx * _KEPT + x * x
        self._xy = self._xy * _KEPT + x * y
        if self._count < _MIN_BATCHES:
            return
        mean_x, mean_y = self._x / self._count, self._y / self._count
        variance = self._xx / self._count - mean_x * mean_x
        if variance < (_MIN_VARIATION * mean_x) ** 2:
            return  # batches of one size can't be told apart: what was known before stays
        each = (self._xy / self._count - mean_x * mean_y) / variance
        self._each = min(max(each, 0.0), mean_y / mean_x)
        self._per_row = mean_y - self._each * mean_x
        self._is_known = True

    @property
    def seconds_per_row(self) -> float:
        """Seconds that a row took lately, on average over batches; next to nothing before the first batch."""
        return self._y / self._count if self._count else 1e-9

    def rows_until(self, share: float) -> float:
        """Return the rows at which a batch's fixed cost is no more than this share of its cost; infinity if unknown."""
        if not self._is_known or share <= 0.0 or self._per_row <= 0.0:
            return math.inf
        return self._each / self._per_row * (1.0 - share) / share
