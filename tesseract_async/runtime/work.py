"""The runtime's unit of work, one forward or backward of one expert, and its result."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from tesseract_async.runtime.backend import ExpertBackend
from tesseract_async.runtime.batcher import QueuedRequest
from tesseract_async.runtime.gradients import Gradients
from tesseract_async.tasks import PromptFuture


@dataclass(slots=True, eq=False)  # a frozen one takes four times as long to make
class WorkResult:
    """Outputs, or one gradient per input (None where nothing flows)."""

    tensors: Sequence[torch.Tensor | None]
    version: int
    """Steps that the expert had taken: before a forward, after a backward."""
    encoded: Sequence[memoryview] | None = None
    """The tensors in codec ``none``, where they are parts of one array of a whole batch."""


@dataclass(slots=True, eq=False, kw_only=True)
class Work(QueuedRequest):
    """One forward or backward in progress. Made by the runtime; the last two fields are the executor's."""

    backend: ExpertBackend
    inputs: Sequence[torch.Tensor | None]
    rows: torch.Tensor | None
    """The rows of `inputs` and `output_gradients` that are this request's: [num_rows], int64. They are then a block
    that several requests share. None: all of them, in order."""
    output_gradients: Gradients | None = None
    """None for a forward."""
    weights: torch.Tensor | None
    """The factor of each row's output gradients: [num_rows], float32. The results then end with the weights'
    own gradients."""
    training: bool = False
    seed: int = 0
    call_id: bytes | None = None
    """Journalled together with the step; None: compute the gradients, take no step."""
    forward_version: int | None = None
    """The version that the forward belonging to a backward saw; None counts as no staleness."""
    answer: PromptFuture[WorkResult]
    """Belongs to the runtime's loop."""
    results: list[WorkResult] = field(default_factory=list)
    """Results of the slices so far, if the request was split."""
    summed: Gradients | None = None
    """Gradients of the parameters, over the slices so far."""


@dataclass(slots=True, eq=False, kw_only=True)
class JointWork(Work):
    """A small forward of several experts of one kind, in one pass: the result is the weighted sum of their outputs,
    one row for each row of the inputs, at least float32. Nothing is known of each expert's part in a failure."""

    backends: Sequence[ExpertBackend]
    """`backend` is the first of them."""
    counts: Sequence[int]
    """Rows of each."""
    versions: Sequence[int] = ()
    """The steps that each had taken when it was computed."""
