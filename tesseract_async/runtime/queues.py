"""The queues of a device's experts: one for whatever may share a batch, made when it is needed."""

from collections import Counter
from collections.abc import Sequence
from typing import Final

from tesseract_async.runtime.backend import ExpertBackend
from tesseract_async.runtime.batcher import Batcher, BatchQueue
from tesseract_async.runtime.grouped import Group
from tesseract_async.runtime.passes import QueueKind

MAX_SIZES: Final = 256
"""Queues of experts whose sizes vary that are kept while nothing waits in them."""
FORWARD_HEAD_START: Final = 0.2
"""Seconds by which a forward counts as older than it is, compared with backwards of its priority. See `batcher`."""


class ExpertQueues:
    """See the module's docstring. `groups_experts`: experts' batches may share a pass with others'."""

    def __init__(self, batcher: Batcher, *, groups_experts: bool) -> None:
        self.ungrouped: set[BatchQueue] = set()
        """Those whose first batch is yet to run."""
        self._batcher = batcher
        self._groups_experts = groups_experts
        self.known: dict[QueueKind, BatchQueue] = {}
        """Those that there are."""
        self._of_sizes: set[QueueKind] = set()  # kinds of experts whose sizes vary
        self._num_rows_before: Counter[ExpertBackend] = Counter()  # of queues that were forgotten

    def of_joint(self, backends: Sequence[ExpertBackend], counts: Sequence[int], seconds: float) -> BatchQueue | None:
        """Return the queue of forwards that all of these experts compute in one pass, each `counts` of the rows.

        None unless they were seen to be of one kind that can be computed so without copies of large weights, and are
        expected to take no longer than that many `seconds`, for which everybody else would wait.
        """
        first = backends[0]
        known = [self.known.get((one, False, False, False, False, None)) for one in backends]
        group, expected = None if known[0] is None else known[0].group, 0.0
        if not isinstance(group, Group) or not group.is_checked or not group.kind.is_ragged:
            return None
        for queue, num_rows in zip(known, counts, strict=True):
            if queue is None or queue.group is not group:
                return None
            expected += queue.cost.seconds_per_row * num_rows
        if expected > seconds or sum(counts) > first.max_batch_size:
            return None
        kind = (first, False, False, False, True, group)
        return self.known.get(kind) or self.add(kind, is_joint=True)

    def count(self, backend: ExpertBackend, num_rows: int) -> None:
        """Count rows of an expert that were computed with others', as one work."""
        self._num_rows_before[backend] += num_rows

    def add(self, kind: QueueKind, *, is_joint: bool = False) -> BatchQueue:
        """Make one. `is_joint`: its batches are of several experts already."""
        backend, is_backward, *_ = kind
        if backend.varies:
            if len(self._of_sizes) >= MAX_SIZES:
                self._forget_sizes()
            self._of_sizes.add(kind)
        queue = self.known[kind] = self._batcher.add_queue(
            kind,
            max_batch_size=backend.max_batch_size,
            preferred_sizes=backend.settings.preferred_sizes,
            head_start=0.0 if is_backward else FORWARD_HEAD_START,
        )
        if self._groups_experts and not (is_joint or backend.varies):
            self.ungrouped.add(queue)
        return queue

    def rows_of(self, backend: ExpertBackend) -> tuple[int, int]:
        """Return how many rows of an expert were computed, ever, and how many wait."""
        # without those of joint works, which are forwards with weights: their rows are counted as each expert's
        queues = [
            queue
            for (one, is_backward, _, _, weighted, _), queue in self.known.items()
            if one is backend and (is_backward or not weighted)
        ]
        return self._num_rows_before[backend] + sum(queue.num_rows for queue in queues), sum(
            queue.num_waiting_rows for queue in queues
        )

    def forget(self, backend: ExpertBackend) -> None:
        """Drop the queues of an expert that is not computed here any more."""
        self.known = {kind: queue for kind, queue in self.known.items() if kind[0] is not backend}
        self._of_sizes &= self.known.keys()
        self._num_rows_before.pop(backend, None)

    def _forget_sizes(self) -> None:
        """Drop the queues of sizes of which no request waits."""
        for kind in [kind for kind in self._of_sizes if not self.known[kind].num_waiting_rows]:
            self._num_rows_before[kind[0]] += self.known.pop(kind).num_rows
            self._of_sizes.discard(kind)
