"""A node's metrics in Prometheus' text format, with its naming conventions: prefix, unit, ``_total`` for counters."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import TypeVar

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from tesseract_async.experts.manifest import join_uid
from tesseract_async.metrics import Key, Metrics
from tesseract_async.monitoring.catalogue import METRICS, SWARM_COUNTERS, SWARM_METRICS
from tesseract_async.monitoring.observer import SwarmObserver

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PREFIX = "tesseract_"
_OF_SERVER = ("num_rows", "num_calls", "busy_seconds", "num_waiting_rows", "memory_bytes", "sync_seconds")
_OF_EXPERT = ("num_calls", "num_rows", "num_failures", "slow_seconds")
"""Fields of statuses that are metrics by the same names, without ``num_``."""

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


class _Swarm:
    """The swarm as an observer sees it. Names come from strangers: they are label values, bounded in number."""

    def __init__(self, observer: SwarmObserver) -> None:
        self._observer = observer

    def collect(self) -> Iterator[Metric]:
        found: dict[str, list[tuple[dict[str, str], float]]] = defaultdict(list)
        state = self._observer.state()
        for peer_id, peer in self._observer.peers.items():
            server = {"server": str(peer_id), "name": "" if peer.status is None else peer.status.name}
            found["swarm_server_up"].append((server, float(peer.status is not None and peer.error is None)))
            if (status := peer.status) is None:
                continue
            for name in _OF_SERVER:
                found[f"swarm_server_{name.removeprefix('num_')}"].append((server, getattr(status, name)))
            for uid, one in status.experts.items():
                if uid not in peer.uids:
                    continue
                at = {"expert": uid, "server": str(peer_id)}
                for name in _OF_EXPERT:
                    found[f"swarm_expert_{name.removeprefix('num_')}"].append((at, getattr(one, name)))
        for grid in state["grids"]:
            found["swarm_experts_lost"].append(({"grid": grid["prefix"]}, len(grid["lost"])))
            for coords, _, replicas, version, _, behind in grid["experts"]:
                expert = {"expert": join_uid(grid["prefix"], coords)}
                found["swarm_expert_replicas"].append((expert, replicas))
                found["swarm_expert_behind_steps"].append((expert, behind))
                if version is not None:
                    found["swarm_expert_version"].append((expert, version))
        for trainer, told in self._observer.losses.items():
            found["swarm_trainer_loss"].append(({"trainer": trainer}, told.loss))
            found["swarm_trainer_step"].append(({"trainer": trainer}, told.step))
            found["swarm_trainer_seen"].append(({"trainer": trainer, "unit": told.unit}, told.seen))
        if self._observer.merged is not None:
            found["swarm_merged_loss"].append(({}, self._observer.merged.loss))
        for given in self._observer.contributors():
            found["swarm_thanks_rows"].append(({"server": given["peer_id"], "name": given["name"]}, given["rows"]))
        for name, samples in found.items():
            kind = CounterMetricFamily if name in SWARM_COUNTERS else GaugeMetricFamily
            family = kind(PREFIX + name, SWARM_METRICS[name][1], labels=list(samples[0][0]))
            for labels, value in samples:
                family.add_metric(list(labels.values()), value)
            yield family


def render(metrics: Metrics, observer: SwarmObserver | None = None) -> bytes:
    """Return all figures of this moment as text; with an `observer` also those of the swarm that it sees."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(metrics))
    if observer is not None:
        registry.register(_Swarm(observer))
    return generate_latest(registry)


def _by_name(source: Mapping[Key, T]) -> dict[str, list[tuple[Labels, T]]]:
    grouped: dict[str, list[tuple[Labels, T]]] = defaultdict(list)
    for (name, labels), value in source.items():
        grouped[name].append((labels, value))
    return grouped


def _help(name: str) -> str:
    return METRICS.get(name, ("", "A metric of the program that embeds this node."))[1]
