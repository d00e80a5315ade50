"""What the runtime is asked for, and what it answers: one forward or backward of one expert."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from tesseract_async.runtime.backend import ExpertBackend
from tesseract_async.runtime.batcher import Request
from tesseract_async.runtime.merging import Gradients


@dataclass(frozen=True, slots=True)
class Answer:
    """What a request ends in: outputs, or one gradient per input (None where nothing flows)."""

    tensors: Sequence[torch.Tensor | None]
    version: int
    """Of a forward: the steps that the expert had taken. Of a backward: those that it led to."""


@dataclass(slots=True, eq=False)
class Work:
    """One forward or backward on its way. Made by the runtime; the fields below the line are the executor's."""

    backend: ExpertBackend
    inputs: Sequence[torch.Tensor]
    output_gradients: Gradients | None
    """None for a forward."""
    training: bool
    seed: int
    call_id: bytes | None
    """Journalled together with the step; None: compute the gradients, take no step."""
    forward_version: int | None
    """The version that the forward belonging to a backward saw; None counts as no staleness."""
    answer: Any
    """An ``asyncio.Future[Answer]`` of the runtime's loop."""
    request: Request | None = None
    # ------------------------------------------------------------------------
    parts: list[Answer] = field(default_factory=list)
    """Answers of the parts so far, if the request was split."""
    summed: Gradients | None = None
    """Parameter gradients of the parts so far."""

    @property
    def num_rows(self) -> int:
        return int(self.inputs[0].shape[0])

    @property
    def num_bytes(self) -> int:
        """What the batcher's budget counts."""
        gradients = self.output_gradients or ()
        return sum([x.nbytes for x in self.inputs]) + sum([x.nbytes for x in gradients if x is not None])


class Outcome(NamedTuple):
    """How a batch went for one of its requests. Neither answer nor error: more parts of it follow."""

    work: Work
    answer: Answer | None = None
    error: BaseException | None = None
