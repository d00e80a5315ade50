"""Whether tensors hold numbers only, cheaply: ``torch.isfinite`` makes three temporaries of each."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


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
