"""Merges gradients of several peers so that a few of them cannot decide where a step goes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch

Gradients = Sequence[torch.Tensor | None]
"""One per input, or one per trained parameter; None where nothing flows."""

_CHUNK: Final = 1 << 15
"""Elements at a time: the few copies that sorting needs then stay in a processor's cache, four times as fast."""


def trimmed_mean(gradients: Sequence[Gradients], share: float, *, scale: float = 1.0) -> Gradients:
    """Coordinate by coordinate, `scale` times the mean of the peers' values, but for a `share` of largest and smallest.

    The rule of Yin et al., "Byzantine-Robust Distributed Learning" (2018). Of so few peers that the share is less than
    one of them, the plain mean. An absent gradient is zero where another peer has one. Sparse ones become dense.
    """
    num_left_out = min(int(share * len(gradients) + 1e-9), (len(gradients) - 1) // 2)
    return [_merge(column, num_left_out, scale) for column in zip(*gradients, strict=True)]


def _merge(column: Sequence[torch.Tensor | None], num_left_out: int, scale: float) -> torch.Tensor | None:
    present = next((x for x in column if x is not None), None)
    if present is None:
        return None
    dense = [torch.zeros_like(present) if x is None else x for x in column]
    dense = [x if x.layout is torch.strided else x.to_dense() for x in dense]
    merged = torch.empty(dense[0].shape, dtype=dense[0].dtype, device=dense[0].device)
    plain = [(torch.view_as_real(x) if x.is_complex() else x).reshape(-1) for x in (merged, *dense)]
    size = _CHUNK if merged.device.type == "cpu" else max(1, plain[0].numel())
    for into, *rows in zip(*(torch.split(x, size) for x in plain), strict=True):
        middle = _middle(rows, num_left_out)
        torch.mul(sum(middle[1:], middle[0]), scale / len(middle), out=into)
    return merged


def _middle(rows: list[torch.Tensor], num_left_out: int) -> list[torch.Tensor]:
    """The rows left when in each coordinate the largest and smallest `num_left_out` are gone, by a sorting network:
    sorting along so short a dimension takes torch twenty times as long.
    """
    low, high = 0, len(rows) - 1
    for _ in range(num_left_out):
        for index in range(low, high):
            _order(rows, index)
        high -= 1
        for index in range(high - 1, low - 1, -1):
            _order(rows, index)
        low += 1
    return rows[low : high + 1]


def _order(rows: list[torch.Tensor], index: int) -> None:
    left, right = rows[index], rows[index + 1]
    rows[index], rows[index + 1] = torch.minimum(left, right), torch.maximum(left, right)
