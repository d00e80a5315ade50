"""Whether tensors hold numbers only, and how large they are, cheaply: ``torch.isfinite`` makes three temporaries."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

_HALVES = (torch.float16, torch.bfloat16)


def norm_of(tensors: Sequence[torch.Tensor | None]) -> float:
    """The Euclidean norm over all elements. Not finite if any is not, or if its square is too large for its type."""
    plain = [_numbers(x.coalesce() if x.layout is torch.sparse_coo else x) for x in tensors if x is not None]
    if not plain:
        return 0.0
    norms = list(torch._foreach_norm([x.float() if x.dtype in _HALVES else x for x in plain]))
    if len({norm.device for norm in norms}) > 1:
        return math.hypot(*map(float, norms))
    return float(norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack([x.double() for x in norms])))


def are_finite(tensors: Sequence[torch.Tensor | None]) -> bool:
    """Whether no tensor holds a NaN or an infinity. One sum per device decides, unless it overflowed: then each element
    is looked at.
    """
    present = [_numbers(x) for x in tensors if x is not None]
    if not present:
        return True
    totals = [x.sum(dtype=torch.float64 if x.dtype == torch.float64 else torch.float32) for x in present]
    if math.isfinite(float(totals[0] if len(totals) == 1 else torch.stack(totals).sum())):
        return True
    return all(bool(torch.isfinite(x).all()) for x in present)


def _numbers(x: torch.Tensor) -> torch.Tensor:
    """The real numbers that it consists of; of a sparse tensor, those that it stores."""
    if x.layout is not torch.strided:
        x = x._values() if x.layout is torch.sparse_coo else x.values()
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
