"""A batch while it is computed, and the checks of its gradients before a step."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import torch

from tesseract_async.errors import ExpertFailed
from tesseract_async.runtime.batcher import RowSlice
from tesseract_async.runtime.gradients import Gradients, per_row
from tesseract_async.runtime.norms import FAR_ABOVE
from tesseract_async.runtime.staging import Transfer
from tesseract_async.runtime.work import Work, WorkResult

_LARGEST_NORM: Final = math.sqrt(torch.finfo(torch.float32).max)
NOT_FINITE: Final = "the gradients that came with this call are not finite; no step was taken"

Outcomes = dict[Work, WorkResult | BaseException]
"""The result of each request in a batch. A request that is absent has more rows, in a later batch."""


@dataclass(slots=True, eq=False, repr=False)
class Attempt:
    """Slices of requests that are computed together once."""

    slices: Sequence[RowSlice]
    works: list[Work]
    """The slices' requests, all of one expert, direction and mode. The first one's peer answers for their gradients."""
    halved: bool = False
    """True for half of a request that ran out of memory."""
    upload: Transfer | None = None
    results: Sequence[torch.Tensor | None] = ()
    """Outputs, or gradients of the inputs, on the device."""
    summed: Gradients | None = None
    """Gradients of the parameters."""
    norm: float = 0.0
    """The norm of `summed` before it was scaled down."""
    scales: torch.Tensor | None = None
    """The factors by which each row's gradients were weakened because they are stale."""
    error: BaseException | None = None
    downloads: "list[Download]" = field(default_factory=list)
    """The results of each attempt without an error into which this one was split."""
    outcomes: Outcomes = field(default_factory=dict)
    """The errors of the requests that failed."""


class Download(NamedTuple):
    """Results of slices on their way back."""

    slices: Sequence[RowSlice]
    works: list[Work]
    wait: Callable[[], Sequence[torch.Tensor | None]]
    """Waits for the results and returns them."""
    version: int


def damp(attempt: Attempt, gradients: Gradients) -> Gradients:
    """Weaken stale gradients, row by row. Raises: ExpertFailed for those that are too stale."""
    attempt.scales = scales(attempt)
    if attempt.scales is None:
        return gradients
    return [None if x is None else x * per_row(attempt.scales, x) for x in gradients]


def undamped(results: Gradients, scales: torch.Tensor | None) -> Gradients:
    """Return the results that callers get, without the damping, which concerns the step only."""
    return results if scales is None else [None if x is None else x / per_row(scales, x) for x in results]


def scales(attempt: Attempt) -> torch.Tensor | None:
    """Return by how much each row's gradients are weakened. Raises: ExpertFailed for those that are too stale."""
    settings, version = attempt.works[0].backend.settings, attempt.works[0].backend.version
    ages = [0 if one.forward_version is None else max(0, version - one.forward_version) for one in attempt.works]
    if settings.max_staleness is not None and max(ages) > settings.max_staleness:
        raise ExpertFailed(
            f"the forward of this backward was {max(ages)} steps ago; at most {settings.max_staleness} are accepted"
        )
    if not settings.staleness_damping or not any(ages):
        return None
    counts = torch.tensor([one.stop - one.start for one in attempt.slices])
    scales = (1.0 + torch.tensor(ages, dtype=torch.float32)) ** -settings.staleness_damping
    return scales.repeat_interleave(counts)


def limit_norm(attempt: Attempt, summed: Gradients, norm: float) -> None:
    """Scale down parameter gradients that are unusually large. Raises: ExpertFailed for those that no optimizer may
    see."""
    backend = attempt.works[0].backend
    attempt.norm = norm
    if not math.isfinite(norm) and not backend.are_finite(summed):
        raise ExpertFailed("the gradients of the expert's parameters are not finite; no step was taken")
    limit, usual = backend.settings.max_gradient_norm, backend.norms.usual
    if limit == "adaptive":
        limit = _LARGEST_NORM
        if usual is not None and norm <= usual:
            return  # the bound of no account is lower
        bound = backend.norms.bound(attempt.works[0].peer)
        if len(attempt.slices) > 1 and usual is not None:
            # each may be as large as one alone
            limit, bound = FAR_ABOVE * usual * len(attempt.slices), max(bound, usual) * len(attempt.slices)
        if bound < norm <= limit:
            attempt.summed = backend.scaled(summed, bound / norm)
    if limit is not None and norm > limit:
        raise ExpertFailed(
            f"the gradients of the expert's parameters have norm {norm:.4g}; at most {limit:.4g} is accepted"
        )
