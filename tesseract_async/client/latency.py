"""How fast replicas have answered: what choosing among them, hedging and latency-aware gating go by. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable

_WINDOW = 64
_MIN_FOR_QUANTILE = 8
_SMOOTHING = 0.2
_MAX_KEYS = 65_536


class _Record:
    __slots__ = ("expected", "recent", "blocked_until")

    def __init__(self) -> None:
        self.expected: float | None = None
        self.recent: deque[float] = deque(maxlen=_WINDOW)
        self.blocked_until = 0.0


class LatencyBook:
    """Seconds that calls took, by replica. They include the server's queue: that is the point."""

    def __init__(self) -> None:
        self._records: dict[Hashable, _Record] = {}
        self._all: deque[float] = deque(maxlen=4 * _WINDOW)

    def _record(self, key: Hashable) -> _Record:
        record = self._records.pop(key, None) or _Record()
        self._records[key] = record  # to the end: the longest unused goes first
        if len(self._records) > _MAX_KEYS:
            del self._records[next(iter(self._records))]
        return record

    def observe(self, key: Hashable, seconds: float) -> None:
        """A call to `key` took this long, or had taken it when it was given up."""
        record = self._record(key)
        record.recent.append(seconds)
        self._all.append(seconds)
        if record.expected is None:
            record.expected = seconds
        else:
            record.expected += _SMOOTHING * (seconds - record.expected)

    def block(self, key: Hashable, until: float) -> None:
        """`key` asked not to be called before `until` (the loop's time)."""
        record = self._record(key)
        record.blocked_until = max(record.blocked_until, until)

    def expected(self, key: Hashable) -> float | None:
        """Seconds that a call to `key` is expected to take; None if it was never called."""
        record = self._records.get(key)
        return None if record is None else record.expected

    def is_blocked(self, key: Hashable, now: float) -> bool:
        """Whether `block` still holds."""
        record = self._records.get(key)
        return record is not None and record.blocked_until > now

    def p95(self, key: Hashable) -> float | None:
        """95 % of recent calls to `key` took at most this long; of all calls where it is little known; or None."""
        record = self._records.get(key)
        recent = self._all if record is None or len(record.recent) < _MIN_FOR_QUANTILE else record.recent
        if len(recent) < _MIN_FOR_QUANTILE:
            return None
        ordered = sorted(recent)
        return ordered[int(0.95 * (len(ordered) - 1) + 0.5)]
