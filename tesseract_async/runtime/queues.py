"""The queues of a device's experts: one for whatever may share a batch, made when it is needed."""

from collections import Counter
from typing import Final

from tesseract_async.runtime.backend import ExpertBackend
from tesseract_async.runtime.batcher import Batcher, BatchQueue
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

    def add(self, kind: QueueKind) -> BatchQueue:
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
        if self._groups_experts and not backend.varies:
            self.ungrouped.add(queue)
        return queue

    def rows_of(self, backend: ExpertBackend) -> tuple[int, int]:
        """Return how many rows of an expert were computed, ever, and how many wait."""
        queues = [queue for (one, *_), queue in self.known.items() if one is backend]
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
