"""Figures of a device: rows and steps of each expert, and the metrics of its batches. On the loop."""

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from tesseract_async.metrics import SECONDS_BUCKETS, Histogram, Metrics
from tesseract_async.runtime.attempts import Outcomes
from tesseract_async.runtime.backend import ExpertBackend
from tesseract_async.runtime.batcher import Batch
from tesseract_async.runtime.work import JointWork, Work, WorkResult

ROWS_BUCKETS: Final = tuple(float(2**power) for power in range(15))


@dataclass(slots=True)
class ExpertFigures:
    num_calls: int = 0
    num_rows: int = 0
    num_failures: int = 0
    latencies: Histogram = field(default_factory=lambda: Histogram(SECONDS_BUCKETS))
    """Seconds from the arrival of each batch's first request to its answer."""


class Figures(defaultdict[ExpertBackend, ExpertFigures]):
    """Counts by expert, from when it came here. Work is not counted if its expert was dropped before the work ended."""

    def __init__(self, metrics: Metrics) -> None:
        super().__init__(ExpertFigures)
        self._metrics = metrics

    def count(self, batches: Sequence[Batch], outcomes: Outcomes, seconds: float, failed: Sequence[Work]) -> None:
        """Count batches of one direction that took this many seconds together. `failed`: the requests that got an
        error."""
        now, metrics = time.monotonic(), self._metrics
        direction = "backward" if batches[0].queue.name[1] else "forward"  # type: ignore[index]
        for batch in batches:
            first: Work = batch.slices[0].request  # type: ignore[assignment]
            if type(first) is JointWork:
                self._count_joint(first, type(outcomes.get(first)) is WorkResult, now)
                continue
            if (figures := self.get(first.backend)) is not None:
                figures.num_calls += len(batch.slices)
                figures.num_rows += batch.num_rows
                figures.latencies.observe(now - first.arrival)
        for work in failed:
            if type(work) is not JointWork:
                if (figures := self.get(work.backend)) is not None:
                    figures.num_failures += 1
                metrics.count("runtime_failures", direction=direction)
        rows = metrics.histogram("runtime_batch_rows", ROWS_BUCKETS, direction=direction)
        times = metrics.histogram("runtime_batch_seconds", SECONDS_BUCKETS, direction=direction)
        for batch in batches:
            rows.observe(batch.num_rows)
        times.observe(seconds / len(batches), len(batches))
        if len(batches) > 1:
            metrics.count("runtime_grouped_batches", len(batches), direction=direction)

    def _count_joint(self, work: JointWork, is_answered: bool, now: float) -> None:
        """Count one pass of several experts as a call of each; where it failed, they are asked again one by one."""
        if not is_answered:
            return
        self._metrics.count("runtime_grouped_batches", len(work.backends), direction="forward")
        for backend, num_rows in zip(work.backends, work.counts, strict=True):
            if (figures := self.get(backend)) is not None:
                figures.num_calls += 1
                figures.num_rows += num_rows
                figures.latencies.observe(now - work.arrival)
