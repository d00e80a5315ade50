"""The latency of replicas so far, for choosing among them, hedging and latency-aware gating. Pure.

A call is expected to take the way there and back (`Experience.path_seconds`, of the path in use *now*) plus what calls
took beyond that so far: the server's queue and its work.
"""

from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from tesseract_async.lru import LRU

_WINDOW = 64
_MIN_FOR_QUANTILE = 8
_SMOOTHING = 0.2
_MAX_SLOWDOWN = 4.0
_MAX_KEYS = 65_536
MIN_PATIENCE, MAX_PATIENCE = 0.25, 1.5
MAX_PATIENCE_ALONE = 4.0
"""The most patience before others of a pass have answered: calls that wait in one queue are late together."""
_PATIENCE_MARGIN = 1.4
FIRST_GRACE_SECONDS = 3.0
"""The factor for experts that were never asked before: a first pass may load, compile and allocate."""
ABANDON_SECONDS = 0.5
"""A call that outlives its timeout by this much is abandoned."""
BLOCK_SECONDS = 0.1
"""The least seconds for which a server that was overloaded is not asked again."""
_MIN_FOR_PATIENCE = 32
_RELEARN_EVERY = 16


class Patience(NamedTuple):
    """The shares beyond what is usual after which a call is slow."""

    alone: float
    """The share beyond what it usually takes, while few of its pass have answered."""
    beside_others: float
    """The share beyond what it usually takes or the others took, whichever is longer."""


@dataclass(slots=True)
class _Record:
    beyond_path: float | None = None
    answered: float | None = None
    usual: float | None = None
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=_WINDOW))
    blocked_until: float = 0.0


class Lateness:
    """The spread of answers around their expected times, and so when a call counts as hanging."""

    def __init__(self, most: float = MAX_PATIENCE) -> None:
        self._recent: deque[float] = deque(maxlen=4 * _WINDOW)
        self._num_new = 0
        self._most = most
        self.patience = MAX_PATIENCE
        """The share beyond what is expected, between `MIN_PATIENCE` and `most`."""

    def observe(self, seconds: Sequence[float], expected: Sequence[float | None]) -> None:
        """Take in the seconds that answers took, or had taken when they were given up, where `expected` was usual."""
        new = [took / (usual or 1e-9) for took, usual in zip(seconds, expected, strict=True) if usual is not None]
        self._recent += new
        self._num_new += len(new)
        if self._num_new >= _RELEARN_EVERY and len(self._recent) >= _MIN_FOR_PATIENCE:
            self._num_new = 0
            ordered = sorted(self._recent)
            learned = _PATIENCE_MARGIN * ordered[int(0.9 * (len(ordered) - 1))] - 1
            self.patience = min(self._most, max(MIN_PATIENCE, learned))


class LatencyBook:
    """Seconds that calls took, by replica, with the time in the server's queue."""

    def __init__(self) -> None:
        self.lateness = {"forward": Lateness(), "backward": Lateness()}
        """The lateness of all mixtures' calls, by direction, compared with others of the same pass that have
        answered."""
        self.lateness_alone = {way: Lateness(MAX_PATIENCE_ALONE) for way in self.lateness}
        """The lateness compared with what was expected of each call before any had answered."""
        self._records: LRU[Hashable, _Record] = LRU(_MAX_KEYS)
        self._all: deque[float] = deque(maxlen=4 * _WINDOW)

    def observe(self, key: Hashable, seconds: float, *, path: float = 0.0, answered: bool = True) -> None:
        """Note that a call to `key` took this long, or had when it was given up (not `answered`); `path` seconds of
        that were spent on the way."""
        record = self._records.get(key)
        if record is None:
            record = self._records[key] = _Record()
        else:
            self._records.move_to_end(key)
        record.recent.append(seconds)
        self._all.append(seconds)
        beyond = max(0.0, seconds - path)
        if answered and record.answered is not None and record.usual is not None and record.beyond_path is not None:
            # nearly all calls: once for each expert of a pass
            record.beyond_path += _SMOOTHING * (beyond - record.beyond_path)
            record.answered += _SMOOTHING * (beyond - record.answered)
            record.usual += _SMOOTHING * (beyond - record.usual)
            return
        record.beyond_path = _smoothed(record.beyond_path, beyond)
        if answered:
            record.answered = _smoothed(record.answered, beyond)
        elif record.answered is None or record.usual is None:
            return
        else:
            # it may have become slower, or hang: one that hung for long is not to be waited for as long again
            beyond = min(beyond, 2 * record.usual, _MAX_SLOWDOWN * record.answered)
        record.usual = _smoothed(record.usual, beyond)

    def block(self, key: Hashable, until: float) -> None:
        """`key` asked not to be called before `until` (the loop's time)."""
        record = self._records[key] = self._records.get(key) or _Record()
        record.blocked_until = max(record.blocked_until, until)

    def expected(self, key: Hashable, *, path: float = 0.0) -> float | None:
        """Seconds that a call to `key` is expected to take, `path` of them on the way; None if it was never called."""
        record = self._records.get(key)
        return None if record is None or record.beyond_path is None else path + record.beyond_path

    def usual(self, key: Hashable, *, path: float = 0.0) -> float | None:
        """Seconds that `key` usually takes to answer; those given up count little. None if it never answered."""
        record = self._records.get(key)
        return None if record is None or record.usual is None else path + record.usual

    def is_blocked(self, key: Hashable, now: float) -> bool:
        record = self._records.get(key)
        return record is not None and record.blocked_until > now

    def p95(self, key: Hashable) -> float | None:
        """Return the seconds that 95 % of recent calls to `key` took at most; of all calls, if it is little known; or
        None."""
        record = self._records.get(key)
        recent = self._all if record is None or len(record.recent) < _MIN_FOR_QUANTILE else record.recent
        if len(recent) < _MIN_FOR_QUANTILE:
            return None
        ordered = sorted(recent)
        return ordered[int(0.95 * (len(ordered) - 1) + 0.5)]


def _smoothed(known: float | None, seconds: float) -> float:
    return seconds if known is None else known + _SMOOTHING * (seconds - known)
