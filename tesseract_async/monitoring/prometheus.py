"""A node's metrics in Prometheus' text format, with its naming conventions: prefix, unit, ``_total`` for counters."""

from __future__ import annotations

import tomllib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final, TypeVar

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from tesseract_async.metrics import Key, Metrics

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PREFIX = "tesseract_"
METRICS: Final[dict[str, tuple[str, str]]] = {
    name: (unit, sentence)
    for name, (unit, sentence) in tomllib.loads((Path(__file__).parent / "metrics.toml").read_text("utf-8")).items()
}
"""name -> (unit, sentence): all metrics of a node."""

Labels = tuple[tuple[str, str], ...]
T = TypeVar("T")


class _Collector:
    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        for kind, source in ((CounterMetricFamily, self._metrics.counters), (GaugeMetricFamily, self._metrics.gauges)):
            for name, items in _by_name(source).items():
                labels = sorted({label for pairs, _ in items for label, _ in pairs})
                family = kind(PREFIX + name, _help(name), labels=labels)
                for pairs, value in items:
                    given = dict(pairs)
                    family.add_metric([given.get(label, "") for label in labels], value)
                yield family
        for name, observed in _by_name(self._metrics.histograms).items():
            labels = sorted({label for pairs, _ in observed for label, _ in pairs})
            histograms = HistogramMetricFamily(PREFIX + name, _help(name), labels=labels)
            for pairs, histogram in observed:
                given, total, buckets = dict(pairs), 0, []
                for bound, count in zip((*map(str, histogram.bounds), "+Inf"), histogram.counts, strict=True):
                    total += count
                    buckets.append((bound, total))
                histograms.add_metric([given.get(label, "") for label in labels], buckets, histogram.sum)
            yield histograms


def render(metrics: Metrics) -> bytes:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(metrics))
    return generate_latest(registry)


def _by_name(source: Mapping[Key, T]) -> dict[str, list[tuple[Labels, T]]]:
    grouped: dict[str, list[tuple[Labels, T]]] = defaultdict(list)
    for (name, labels), value in source.items():
        grouped[name].append((labels, value))
    return grouped


def _help(name: str) -> str:
    return METRICS.get(name, ("", "A metric of the program that embeds this node."))[1]
