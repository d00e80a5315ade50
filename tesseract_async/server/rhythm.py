"""Decides when to begin work that takes a while and is due within a period: saving, pulling a state. No I/O."""

_IDLE = 0.1
"""Share of a period that passes at least after a round without work, also where rounds take longer than periods."""


class Rhythm:
    """Rounds of work, each of which ends at most a period after the one before it began.

    A round saves what happened before it began, so that nothing older than a period is ever unsaved. A round therefore
    begins earlier, by the time that it is expected to take.
    """

    def __init__(self, period: float, now: float, *, rest: float = 0.0) -> None:
        """`now`: by any clock; the other times are by the same one. `rest`: the shortest rest after a round, as a
        multiple of its length, even where that breaks the promise."""
        self._period, self._rest = period, rest
        self._began = self._rested_at = now
        self._expected: float | None = None

    @property
    def next_at(self) -> float:
        """The time at which the next round should begin."""
        expected = self._period / 2 if self._expected is None else self._expected
        return max(self._began + self._period - expected, self._rested_at)

    def note(self, began: float, ended: float, *, woken: float | None = None, worked: bool = True) -> None:
        """Take in a round. `woken`: the time at which the work on it began, if that was earlier. `worked` is False if
        there was nothing to do, so that the time it took says nothing."""
        rest = self._rest * (ended - began)
        self._began, self._rested_at = began, ended + (rest if worked else max(rest, _IDLE * self._period))
        if worked:
            took = ended - (began if woken is None else woken)
            self._expected = max(took, 0.0 if self._expected is None else 0.9 * self._expected)
