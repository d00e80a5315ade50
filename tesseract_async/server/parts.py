"""`Parts`: the answers of many experts to one message, gathered into the parts of one reply. No I/O, no clock.

Answers come in any order and at any time. A part is the sum of the answers that are there when it is taken, so that it
covers more of them the longer the experts take. Each part costs both ends extra work. So the first is due a little
after the message came, each later one after a longer pause, and the last when nothing is left to wait for.
"""

import math
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
import torch

from tesseract_async.errors import ExpertFailed, RemoteError
from tesseract_async.runtime.gradients import Gradients, are_finite
from tesseract_async.runtime.work import WorkResult
from tesseract_async.wire.apply import ApplyPart, ApplyRequest, Numbers, numbered

FIRST_PAUSE: Final = 0.02
"""Seconds from the message to the first part, unless all is answered sooner: many experts in one pass take as long."""
LENGTHENING: Final = 2.3
"""Each pause is this many times as long as the one before: seven pauses make five seconds, after which the eighth part
holds all that is left."""
MAX_PARTS: Final = 8
_STACKED_BYTES: Final = 512 * 1024
"""Answers of at most this many bytes together are added at once; larger ones one by one, without a copy."""


class ExpertAnswer(NamedTuple):
    """The answer of one expert: outputs, or in a backward input gradients, then its weights' gradients."""

    result: WorkResult
    epoch: int


class Parts:
    """The parts of the reply to `request`, which came at `now` (seconds of any monotonic clock)."""

    def __init__(self, request: ApplyRequest, now: float, *, max_parts: int = MAX_PARTS) -> None:
        self._request, self._max_parts = request, max_parts
        self._ready: dict[int, ExpertAnswer] = {}
        self._failures: list[tuple[int, RemoteError]] = []
        self._num_open = len(request.ids)
        self._num_taken = 0
        self._pause = FIRST_PAUSE
        self._next_at = now + FIRST_PAUSE

    @property
    def is_over(self) -> bool:
        """True if all experts have been named in parts that were taken."""
        return not (self._num_open or self._ready or self._failures)

    @property
    def num_bytes(self) -> int:
        """Bytes of the answers that are in no part yet."""
        return sum(x.nbytes for one in self._ready.values() for x in one.result.tensors if x is not None)

    def answered(self, expert: int, result: WorkResult, epoch: int) -> None:
        """Take in the answer of an expert (its place in the request)."""
        self._num_open -= 1
        self._ready[expert] = tuple.__new__(ExpertAnswer, (result, epoch))  # its own takes a Python call more

    def failed(self, expert: int, error: RemoteError) -> None:
        """Note that an expert does not answer."""
        self._num_open -= 1
        self._failures.append((expert, error))

    def due_at(self) -> float:
        """Return when to take the next part, if nothing is answered before; infinity if that has to be waited for."""
        if not self._num_open:
            return -math.inf
        if not (self._ready or self._failures) or self._num_taken == self._max_parts - 1:
            return math.inf
        return self._next_at

    def take(self, now: float) -> tuple[ApplyPart, Gradients]:
        """Return a part of all that is there, without its metas, and its sums. An answer that is not finite is turned
        into a failure first."""
        answers = dict(sorted(self._ready.items()))
        sums, weight_gradients = self._sums(answers)
        if not are_finite([*sums, weight_gradients]):  # also if a single answer is not, whatever its weight
            for expert, answer in list(answers.items()):
                if not are_finite(answer.result.tensors):
                    del answers[expert]
                    self._failures.append((expert, ExpertFailed("the expert answered numbers that are not finite")))
            sums, weight_gradients = self._sums(answers)
        results = [answer.result for answer in answers.values()]
        part = ApplyPart(
            np.array(list(answers), dtype=np.int64),
            np.array([result.version for result in results], dtype=np.int64),
            np.array([answer.epoch for answer in answers.values()], dtype=np.int64),
            self._failures,
            [],
            np.empty(0, dtype=np.float32) if weight_gradients is None else weight_gradients.numpy(),
        )
        self._ready, self._failures = {}, []
        self._num_taken += 1
        self._pause *= LENGTHENING
        self._next_at = now + self._pause
        return part, sums

    def _sums(self, answers: dict[int, ExpertAnswer]) -> tuple[Gradients, torch.Tensor | None]:
        """Return the sum of each tensor of the answers, and in a backward the weights' gradients of all."""
        if not answers:
            return [], None
        request, experts = self._request, np.array(list(answers), dtype=np.int64)
        pairs = request.pairs(experts)
        rows, index = numbered(request.rows[pairs])
        weights = None if request.backward else torch.from_numpy(request.weights[pairs])
        columns = list(zip(*[answer.result.tensors for answer in answers.values()], strict=True))
        gradients = torch.cat([x for x in columns.pop() if x is not None]) if request.backward else None
        sizes = request.offsets[experts + 1] - request.offsets[experts]
        return [_sum(column, sizes, torch.from_numpy(index), weights, len(rows)) for column in columns], gradients


def _sum(
    column: Sequence[torch.Tensor | None],
    sizes: Numbers,
    index: torch.Tensor,
    weights: torch.Tensor | None,
    num_rows: int,
) -> torch.Tensor | None:
    """Return ``[num_rows, ...]``: the sum of the tensors, one after the other, each row of which belongs to the row of
    the sum that `index` says, and has a weight."""
    there = [x for x in column if x is not None]
    if not there:
        return None
    total = torch.zeros(num_rows, *there[0].shape[1:], dtype=torch.promote_types(there[0].dtype, torch.float32))
    if len(there) == len(column) and sum([x.nbytes for x in there]) <= _STACKED_BYTES:
        column, sizes = [torch.cat(there)], np.array([len(index)])
    start = 0
    for x, size in zip(column, sizes.tolist(), strict=True):
        if x is not None:
            addend = x.to(total.dtype)
            if weights is not None:
                by_row = weights[start : start + size].view(-1, *[1] * (x.dim() - 1))
                addend = addend * by_row.to(total.real.dtype if total.is_complex() else total.dtype)
            total.index_add_(0, index[start : start + size], addend)
        start += size
    return total
