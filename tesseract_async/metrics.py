"""Counters, gauges and histograms of one node, held in memory and read with `Metrics.snapshot`.

No I/O and no dependency: an exporter (Prometheus, the dashboard) reads the snapshot. Names are `snake_case` with the
unit last (``endpoint_bytes_sent``, ``call_seconds``); a label set is a small tuple of strings that the code chooses,
never something that a peer sent, so no peer can grow the registry.
"""

import bisect
from collections.abc import Sequence

from tesseract_async.uncopied import Uncopied

Key = tuple[str, tuple[tuple[str, str], ...]]

SECONDS_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)


class Histogram:
    """Counts of observations at or below each bound, with their number and sum."""

    __slots__ = ("bounds", "counts", "count", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.count = 0
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect.bisect_left(self.bounds, value)] += times
        self.count += times
        self.sum += value * times

    def quantile(self, share: float) -> float | None:
        """Return a value that this share of the observations does not exceed, as near as the bounds tell; None before
        the first."""
        left = share * self.count
        for low, high, count in zip((0.0, *self.bounds), (*self.bounds, self.bounds[-1]), self.counts, strict=True):
            if count and left <= count:
                return low + (high - low) * max(0.0, left) / count
            left -= count
        return None


class Metrics(Uncopied):
    """All figures of one node. Not thread-safe: used on the node's loop only."""

    def __init__(self) -> None:
        self.counters: dict[Key, float] = {}
        self.gauges: dict[Key, float] = {}
        self.histograms: dict[Key, Histogram] = {}

    def count(self, name: str, amount: float = 1, **labels: str) -> None:
        """Add to a counter, such as ``count("datagrams_dropped", reason="garbage")``."""
        key = (name, tuple(labels.items()) if len(labels) < 2 else _sorted(labels))
        self.counters[key] = self.counters.get(key, 0) + amount

    def set(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge."""
        self.gauges[(name, _sorted(labels))] = value

    def observe(self, name: str, value: float, *, bounds: Sequence[float] = SECONDS_BUCKETS, **labels: str) -> None:
        """Add an observation to a histogram; `bounds` is read at its first observation only."""
        self.histogram(name, bounds, **labels).observe(value)

    def histogram(self, name: str, bounds: Sequence[float], **labels: str) -> Histogram:
        """Return a histogram, for several observations; see `observe`."""
        key = (name, tuple(labels.items()) if len(labels) < 2 else _sorted(labels))
        histogram = self.histograms.get(key)
        if histogram is None:
            histogram = self.histograms[key] = Histogram(bounds)
        return histogram

    def total(self, name: str) -> float:
        """Return a counter's sum over all its labels."""
        return sum(value for (key, _), value in self.counters.items() if key == name)

    def snapshot(self) -> dict[str, float]:
        """Return every figure by a printable name: ``datagrams_dropped{reason=garbage}``, ``call_seconds_count``."""
        out: dict[str, float] = {}
        for source in (self.counters, self.gauges):
            for (name, labels), value in source.items():
                out[_printable(name, labels)] = value
        for (name, labels), histogram in self.histograms.items():
            out[_printable(f"{name}_count", labels)] = histogram.count
            out[_printable(f"{name}_sum", labels)] = histogram.sum
        return out


def _sorted(labels: dict[str, str]) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(labels.items()))


def _printable(name: str, labels: tuple[tuple[str, str], ...]) -> str:
    inside = ",".join(f"{key}={value}" for key, value in labels)
    return f"{name}{{{inside}}}" if inside else name
