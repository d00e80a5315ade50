"""Whether tensors hold numbers only, cheaply: ``torch.isfinite`` makes three temporaries of each."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

_HALVES = (torch.float16, torch.bfloat16)


def norm_of(tensors: Sequence[torch.Tensor | None]) -> float:
    """The Euclidean norm over all elements. Not finite if any is not, or if its square is too large for its type."""
    plain = [x if x.layout is torch.strided else x.coalesce().values() for x in tensors if x is not None]
    plain = [torch.view_as_real(x) if x.is_complex() else x for x in plain]
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
    present = [torch.view_as_real(x) if x.is_complex() else x for x in tensors if x is not None]
    if not present:
        return True
    totals = [x.sum(dtype=torch.float64 if x.dtype == torch.float64 else torch.float32) for x in present]
    if math.isfinite(float(totals[0] if len(totals) == 1 else torch.stack(totals).sum())):
        return True
    return all(bool(torch.isfinite(x).all()) for x in present)
