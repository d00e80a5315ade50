"""The cost of batches, learned from those that ran; and the choice between one pass and several. Pure machines."""

import math
from collections import deque
from typing import Final

_KEPT = 0.98
_MIN_BATCHES = 10
_MIN_VARIATION = 0.15
_OUTLIER = 3.0


class BatchCost:
    """A straight line through (1 / rows, seconds / rows) of the last fifty batches or so, old ones weighing less.

    In these coordinates the errors of small and of large batches, which grow with their seconds, weigh the same. A
    batch that took several times what the line says (something else used the machine) counts as three times of it.
    """

    __slots__ = ("seconds_per_row", "_count", "_x", "_y", "_xx", "_xy", "_each", "_per_row", "_is_known")

    def __init__(self) -> None:
        self.seconds_per_row = 1e-9
        """Seconds that a row took lately, on average over batches; next to nothing before the first batch."""
        self._count = self._x = self._y = self._xx = self._xy = 0.0
        self._each = self._per_row = 0.0
        self._is_known = False

    def add(self, num_rows: float, seconds: float) -> None:
        x, y = 1 / num_rows, seconds / num_rows
        expected = self._per_row + self._each * x
        if expected > 0.0:
            y = min(y, _OUTLIER * expected)
        self._count = self._count * _KEPT + 1.0
        self._x = self._x * _KEPT + x
        self._y = self._y * _KEPT + y
        self._xx = self._xx * _KEPT + x * x
        self._xy = self._xy * _KEPT + x * y
        self.seconds_per_row = self._y / self._count
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

    def seconds(self, num_rows: float) -> float:
        """Return the seconds that a batch of this many rows is expected to take: too many, while its fixed cost is
        unknown."""
        return self._each + self._per_row * num_rows if self._is_known else self.seconds_per_row * num_rows

    def rows_until(self, share: float) -> float:
        """Return the rows at which a batch's fixed cost is no more than this share of its cost; infinity if unknown."""
        if not self._is_known or share <= 0.0 or self._per_row <= 0.0:
            return math.inf
        return self._each / self._per_row * (1.0 - share) / share


PATIENCE: Final = 2.0
"""Passes whose time may be lost to trying the slower way before one is chosen: many if the ways differ by little."""
MARGIN: Final = 0.95
"""The other way is chosen if it takes less than this share of the time."""
TRIED_SHARE: Final = 0.01
"""Share of the time that trying the slower way may take: of passes of one size until one is chosen, of all afterwards.
With more, most passes of ways that differ by a tenth would be trials."""
_FIRST_PAIRS: Final = 2
"""Trials that are made at once, whatever they take: by chance the first one may have taken ten times as long."""
_PAIRS: Final = 48


class GroupChoice:
    """The choice whether batches of several experts of one kind are computed in one pass, by what that took.

    Sizes are told apart by their powers of four. Each begins with the way that is expected to be the faster one. The
    other is tried in the second pass and the fourth, and again as soon as trials have cost little: the slower it seems,
    the more rarely. One that seems faster is taken at once. Once trials have told enough, the other way is only looked
    at from time to time: what else is going on may change what pays.
    Compared are pairs of passes that ran one after the other, for the machine is not equally busy at all times; and the
    faster half of each way, for by chance a pass takes ten times as long.
    """

    __slots__ = ("_expected", "_sizes", "spent", "_lost")

    def __init__(self, *, expected: bool = False) -> None:
        """`expected`: true if one pass for all is expected to be the faster way."""
        self._expected = expected
        self._sizes: dict[tuple[int, int], _Size] = {}
        self.spent = 0.0
        """Seconds of all batches, also of those that shared no pass for want of others: these its owner adds."""
        self._lost = 0.0

    def gathers(self) -> bool:
        """Return whether it is worthwhile to look for more batches."""
        return not self._sizes or self._may_retry() or any([one.wants_more for one in self._sizes.values()])

    def is_together(self, num_batches: int, num_rows: int) -> bool:
        """Return whether this many batches, of this many rows in all, should be computed in one pass."""
        size = self._size(num_batches, num_rows)
        if size.tried is not None:
            return size.pays
        return size.pays != (self._may_retry() if size.is_known else size.may_try())

    def loses(self, num_batches: int, num_rows: int) -> bool:
        """Return whether passes of this many batches are known to be slower together."""
        size = self._sizes.get(_size_of(num_batches, num_rows))
        return size is not None and size.is_known and not size.pays

    def add(self, num_batches: int, num_rows: int, together: bool, seconds: float) -> None:
        self.spent += seconds
        size = self._size(num_batches, num_rows)
        if size.is_known and together != size.pays:
            self._lost += seconds * size.waste
        size.add(together, seconds / num_batches)

    def _may_retry(self) -> bool:
        return self._lost < TRIED_SHARE * self.spent

    def _size(self, num_batches: int, num_rows: int) -> "_Size":
        return self._sizes.setdefault(_size_of(num_batches, num_rows), _Size(self._expected))


def _size_of(num_batches: int, num_rows: int) -> tuple[int, int]:
    # rounded such that powers of two lie within a size, not at its border
    return round(math.log(num_batches, 4) - 0.25), round(math.log(num_rows / num_batches, 4) - 0.25)


class _Size:
    """The seconds per batch that passes of about one size took."""

    __slots__ = ("pairs", "tried", "is_known", "pays", "waste", "spent", "lost")

    def __init__(self, pays: bool) -> None:
        self.pairs: deque[tuple[float, float]] = deque(maxlen=_PAIRS)
        """Seconds alone, and together."""
        self.tried: float | None = None
        """Seconds in the way not chosen, until the next pass in the other one makes a pair with them. The pass before a
        trial is no measure: those that took long by chance make room for one."""
        self.is_known = False
        self.pays = pays
        self.waste = 0.0
        """Share of the time of a pass in the way not chosen that counts as lost."""
        self.spent = self.lost = 0.0
        """Seconds of all passes, and what trials have lost of them, by what is known of both ways now."""

    def may_try(self) -> bool:
        """Return whether the way not chosen is due, while too little is known to choose one for long."""
        if len(self.pairs) < _FIRST_PAIRS:
            return self.spent > 0.0  # the first pass goes the way that is expected to be faster
        return self.lost < TRIED_SHARE * self.spent

    @property
    def wants_more(self) -> bool:
        """True if more passes of this size are worth looking for."""
        return self.pays or not self.is_known or self.tried is not None

    def add(self, together: bool, seconds: float) -> None:
        self.spent += seconds
        if together != self.pays:
            self.tried = seconds
        elif self.tried is not None:
            pairs = self.pairs
            pairs.append((self.tried, seconds) if together else (seconds, self.tried))
            self.tried = None
            # what else uses the machine makes some slower and none faster
            half = (len(pairs) + 1) // 2
            alone, with_others = (sum(sorted(one)[:half]) / half for one in zip(*pairs, strict=True))
            chosen, other = (with_others, alone) if self.pays else (alone, with_others)
            if other < MARGIN * chosen:
                self.pays, chosen, other = not self.pays, other, chosen
            self.waste = 1.0 - min(MARGIN, chosen / other if other else 0.0)
            self.lost = len(pairs) * self.waste * other
            self.is_known = len(pairs) * self.waste >= PATIENCE
