"""Which experts of a grid score highest, for a batch of rows at once. Pure: no loop, no clock, no network.

Product-key gating (Lample et al. 2019, as the paper's section 3.1 uses it): an expert's score is the sum, over the
grid's dimensions, of the score of its coordinate there.

Suffixes of names: R rows, S sum of the grid's sizes, N live experts, D dimensions, K experts wanted.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

Coordinates = npt.NDArray[np.int64]

_CHUNK_ELEMENTS = 1 << 20


def columns(coords_ND: Coordinates, grid_size: Sequence[int]) -> torch.Tensor:
    """The columns of the scores ``[R, S]`` that add up to each expert's score: ``[N, D]``."""
    offsets = np.array([0, *itertools.accumulate(grid_size)][:-1], dtype=np.int64)
    return torch.from_numpy(coords_ND + offsets)


def expert_scores(
    scores_RS: torch.Tensor, rows_P: torch.Tensor, experts_P: torch.Tensor, columns_ND: torch.Tensor
) -> torch.Tensor:
    """The score of each pair (row, expert); differentiable with respect to `scores_RS`."""
    return scores_RS[rows_P[:, None], columns_ND[experts_P]].sum(1)


def top_k(scores_RS: torch.Tensor, coords_ND: Coordinates, grid_size: Sequence[int], k: int) -> torch.Tensor:
    """Exactly the `k` best of the live experts for every row: ``[R, min(k, N)]`` rows of `coords_ND`, best first."""
    num_rows, num_live = scores_RS.shape[0], len(coords_ND)
    k = min(k, num_live)
    if k == 0 or num_rows == 0:
        return torch.empty(num_rows, k, dtype=torch.int64)
    columns_DN = columns(coords_ND, grid_size).T.contiguous()
    best = torch.empty(num_rows, k, dtype=torch.int64)
    step = max(1, _CHUNK_ELEMENTS // num_live)
    for start in range(0, num_rows, step):
        chunk = scores_RS[start : start + step]
        total = chunk.index_select(1, columns_DN[0])
        for column in columns_DN[1:]:
            total += chunk.index_select(1, column)
        best[start : start + step] = total.topk(k, dim=1).indices
    return best


def next_best(
    scores_RS: torch.Tensor,
    coords_ND: Coordinates,
    grid_size: Sequence[int],
    *,
    tried_RT: npt.NDArray[np.int64],
    excluded_N: npt.NDArray[np.bool_],
    wanted_R: npt.NDArray[np.int64],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """For each row its `wanted_R` best experts that it has not tried (`tried_RT`, -1 pads) and that are not excluded.

    Returns pairs: rows and experts. A row with no expert left is in no pair.
    """
    usable = np.flatnonzero(~excluded_N)
    width = int(wanted_R.max(initial=0)) + tried_RT.shape[1]
    best = top_k(scores_RS, coords_ND[usable], grid_size, width).numpy()
    experts_RW = usable[best]
    fresh = ~(experts_RW[:, :, None] == tried_RT[:, None, :]).any(2)
    chosen = fresh & (fresh.cumsum(1) <= wanted_R[:, None])
    rows, at = np.nonzero(chosen)
    return rows, experts_RW[rows, at]


def group(rows_P: npt.NDArray[np.int64], experts_P: npt.NDArray[np.int64]) -> list[tuple[int, npt.NDArray[np.int64]]]:
    """The pairs by expert: each expert once, with its rows in ascending order."""
    order = np.lexsort((rows_P, experts_P))
    rows_P, experts_P = rows_P[order], experts_P[order]
    experts, starts = np.unique(experts_P, return_index=True)
    return list(zip(experts.tolist(), np.split(rows_P, starts[1:]), strict=True)) if len(experts) else []
