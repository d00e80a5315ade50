"""Whether tensors hold numbers only, and how large they are, cheaply: ``torch.isfinite`` makes three temporaries."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

_HALVES = (torch.float16, torch.bfloat16)
_PLAIN = (torch.float32, torch.float64)
_LARGE = 32768
"""Elements."""


def norm_of(tensors: Sequence[torch.Tensor | None]) -> float:
    """The Euclidean norm over all elements. Not finite if any is not, or if its square is too large for its type."""
    plain = [x if x.dtype in _PLAIN and x.layout is torch.strided else _for_norm(x) for x in tensors if x is not None]
    if not plain:
        return 0.0
    large = [x for x in plain if x.numel() >= _LARGE and x.is_cpu and x.is_contiguous()]
    if large:
        # twice as fast as torch's norm
        squares = [float(torch.dot(flat, flat)) for flat in (x.detach().view(-1) for x in large)]
        others = [x for x in plain if not (x.numel() >= _LARGE and x.is_cpu and x.is_contiguous())]
        return math.hypot(norm_of(others), *map(math.sqrt, squares))
    norms = torch._foreach_norm(plain)
    if not norms[0].is_cpu and len({norm.device for norm in norms}) == 1:
        return float(torch.linalg.vector_norm(torch.stack([x.double() for x in norms])))  # one wait for the device
    return math.hypot(*map(float, norms))


def are_finite(tensors: Sequence[torch.Tensor | None]) -> bool:
    """Whether no tensor holds a NaN or an infinity. One sum per device decides, unless it overflowed: then each element
    is looked at.
    """
    present = [x if x.dtype in _PLAIN and x.layout is torch.strided else _numbers(x) for x in tensors if x is not None]
    if not present:
        return True
    totals = [x.sum(dtype=torch.float64 if x.dtype == torch.float64 else torch.float32) for x in present]
    if math.isfinite(float(totals[0] if len(totals) == 1 else torch.stack(totals).sum())):
        return True
    return all(bool(torch.isfinite(x).all()) for x in present)


def _for_norm(x: torch.Tensor) -> torch.Tensor:
    x = _numbers(x.coalesce() if x.layout is torch.sparse_coo else x)
    return x.float() if x.dtype in _HALVES else x


def _numbers(x: torch.Tensor) -> torch.Tensor:
    """The real numbers that it consists of; of a sparse tensor, those that it stores."""
    if x.layout is not torch.strided:
        x = x._values() if x.layout is torch.sparse_coo else x.values()
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
