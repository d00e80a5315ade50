"""Takes batches that came together through the executor: in one pass, or each in its own. Belongs to its thread."""

import time
from collections.abc import Hashable, Sequence
from functools import partial
from operator import attrgetter
from typing import Final

import torch

from tesseract_async.runtime.backend import ExpertBackend
from tesseract_async.runtime.batcher import Batch
from tesseract_async.runtime.grouped import Group
from tesseract_async.runtime.together import GroupExecutor, Together
from tesseract_async.runtime.work import JointWork

_NUM_ROWS: Final = attrgetter("num_rows")

QueueKind = tuple[ExpertBackend, bool, bool, bool, bool, Hashable]
"""The name of a queue, whose requests may share a batch: the backwards or forwards of one expert, all in training or
not, all stepping or not, all weighted or not, of one size where sizes vary, and with the same tensors where some are
optional."""


class Trial:
    """The way in which batches that might share a pass are computed, and what that takes."""

    __slots__ = ("group", "num_batches", "num_rows", "is_together", "num_left", "seconds")

    def __init__(self, group: Group, batches: Sequence[Batch]) -> None:
        self.group = group
        self.num_batches = self.num_left = len(batches)
        self.num_rows = sum([batch.num_rows for batch in batches])
        self.is_together = group.choice.is_together(self.num_batches, self.num_rows)
        self.seconds = 0.0


class DevicePass:
    """Batches that the device computes at once: one as an attempt, several together."""

    __slots__ = ("batches", "group", "trial", "together", "launch", "complete", "outcomes", "_began")

    def __init__(self, batches: list[Batch], trial: Trial | None = None) -> None:
        queue, work = batches[0].queue, batches[0].slices[0].request
        group = queue.name[-1] if type(work) is JointWork else queue.group  # type: ignore[index]
        self.batches = batches
        self.group = group if isinstance(group, Group) else None
        self.trial = trial
        self.together: Together | None = None

    def stage(self, executor: GroupExecutor) -> None:
        """Bring the batches to the device, which then takes them through `launch`, `complete` and `outcomes`."""
        self._began = time.thread_time()
        if self.trial is not None and len(self.batches) > 1:
            alike = sorted(self.batches, key=_NUM_ROWS)  # those with equally many rows are multiplied at once
            self.together = together = executor.stage_together(self.trial.group, [each.slices for each in alike])
            self.launch = partial(executor.launch_together, together)
            self.complete = partial(executor.complete_together, together)
            self.outcomes = partial(executor.outcomes_together, together)
        else:
            attempt = executor.stage(self.batches[0].slices)
            self.launch, self.complete = partial(executor.launch, attempt), partial(executor.complete, attempt)
            self.outcomes = partial(executor.outcomes, attempt)

    def spent(self, executor: GroupExecutor) -> float | None:
        """Return the processor's seconds since it was staged; None where they are not what it took: the device is
        another one, PyTorch may wait for threads that help this one, or the expert does more than compute."""
        if executor.staging.overlaps or self.group is None or torch.get_num_threads() > 1:
            return None
        return time.thread_time() - self._began

    def learn(self, executor: GroupExecutor, seconds: float) -> None:
        """Note what it took, for the choice of the ways of later ones."""
        together, trial, batch = self.together, self.trial, self.batches[0]
        if len(self.batches) == 1:
            work = batch.slices[0].request
            num_experts = len(work.counts) if type(work) is JointWork else 1
            if self.group is not None:
                self.group.cost.add(batch.num_rows / num_experts, seconds / num_experts)
        if trial is None:
            if isinstance(group := batch.queue.group, Group):
                group.choice.spent += seconds
            return
        trial.seconds += seconds
        trial.num_left -= len(self.batches)
        if not trial.num_left and (together is None or together.is_measured):
            trial.group.choice.add(trial.num_batches, trial.num_rows, trial.is_together, trial.seconds)
        if together is not None and together.is_each_alone:
            for batch in self.batches:  # an expert may have changed
                find_group(executor, batch)


def passes(batches: list[Batch]) -> list[DevicePass]:
    """Return how batches that came together are computed: in one pass, or each in its own."""
    if len(batches) < 2:
        return [DevicePass(batches)] if batches else []
    group = batches[0].queue.group
    assert isinstance(group, Group)
    trial = Trial(group, batches)
    return [DevicePass(batches, trial)] if trial.is_together else [DevicePass([batch], trial) for batch in batches]


def find_group(executor: GroupExecutor, batch: Batch) -> None:
    """Find out which batches this one's queue may be computed with."""
    kind: QueueKind = batch.queue.name  # type: ignore[assignment]
    backend, is_backward, training, *rest = kind
    batch.queue.group = executor.groups.group_of(backend, training=training, mode=(is_backward, *rest))
