"""The queues of a device's experts: one for whatever may share a batch, made when it is needed."""

import weakref
from collections.abc import Hashable, Sequence
from typing import Final

from tesseract_async.runtime.backend import ExpertBackend
from tesseract_async.runtime.batcher import Batcher, BatchQueue
from tesseract_async.runtime.grouped import Group
from tesseract_async.runtime.passes import QueueKind

MAX_SIZES: Final = 256
"""The most queues of experts with varying sizes that are kept while nothing waits in them."""
FORWARD_HEAD_START: Final = 0.2
"""Seconds by which a forward counts as older than it is, compared with backwards of its priority. See `batcher`."""
_FORWARD: Final = {training: (False, training, False, False, None) for training in (False, True)}
"""The rest of the name of a queue of forwards, in training or not."""


class ExpertQueues:
    """See the module's docstring. `groups_experts`: experts' batches may share a pass with others'."""

    def __init__(self, batcher: Batcher, *, groups_experts: bool) -> None:
        self.ungrouped: set[BatchQueue] = set()
        """Queues whose first batch has yet to run."""
        self._batcher = batcher
        self._groups_experts = groups_experts
        self.known: dict[QueueKind, BatchQueue] = {}
        """All queues by kind."""
        self._of_sizes: set[QueueKind] = set()  # kinds of experts whose sizes vary
        self._expected: weakref.WeakValueDictionary[Hashable, Group] = weakref.WeakValueDictionary()
        """The latest group that an expert was found to be of, by its `alike` and the rest of the queue's name. Experts
        alike are expected to be of it, too; each pass looks whether they are."""

    def of_joint(
        self, backends: Sequence[ExpertBackend], counts: Sequence[int], seconds: float, *, training: bool = False
    ) -> BatchQueue | None:
        """Return the queue of forwards that all of these experts compute in one pass, each `counts` of the rows.

        None unless they, or experts alike, were seen to be of one kind that can be computed so without copies of large
        weights, did not turn out to be faster one by one, and are expected to take no longer than that many `seconds`,
        for which everybody else would wait.
        """
        first, known, forward = backends[0], self.known, _FORWARD[training]
        queue = known.get((first, *forward))
        group = self._expected.get((first.alike, *forward)) if queue is None else queue.group
        if not isinstance(group, Group) or not group.is_checked or not group.kind.is_ragged:
            return None
        for one in backends:
            queue = known.get((one, *forward))
            if queue is None:  # it was not asked alone yet
                if one.alike is not first.alike:
                    return None
            elif queue.group is not group:
                return None
        num_rows = sum(counts)
        if sum(map(group.cost.seconds, counts)) > seconds or num_rows > first.max_batch_size:
            return None
        if group.choice.loses(len(backends), num_rows):
            return None
        kind = (first, False, training, False, True, group)
        return known.get(kind) or self.add(kind, is_joint=True)

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
            queue.group = group = self._expected.get((backend.alike, *kind[1:]))
            if group is not None:  # experts of one kind take equally long
                queue.cost.seconds_per_row = group.cost.seconds_per_row
        return queue

    def found(self, queue: BatchQueue) -> None:
        """Note the group that a queue's first batch was found to be of. On the device's thread."""
        kind: QueueKind = queue.name  # type: ignore[assignment]
        self.ungrouped.discard(queue)
        if isinstance(queue.group, Group):
            self._expected[(kind[0].alike, *kind[1:])] = queue.group

    def num_waiting_rows(self, backend: ExpertBackend) -> int:
        """Return the number of an expert's rows that wait."""
        return sum([queue.num_waiting_rows for (one, *_), queue in self.known.items() if one is backend])

    def forget(self, backend: ExpertBackend) -> None:
        """Drop the queues of an expert that is not computed here any more."""
        self.known = {kind: queue for kind, queue in self.known.items() if kind[0] is not backend}
        self._of_sizes &= self.known.keys()

    def _forget_sizes(self) -> None:
        """Drop the queues of sizes of which no request waits."""
        for kind in [kind for kind in self._of_sizes if not self.known[kind].num_waiting_rows]:
            del self.known[kind]
            self._of_sizes.discard(kind)
