"""A search for the best live experts of a grid that is too large to read, or not read yet: cell by cell. Pure."""

from collections.abc import Sequence

import numpy as np
import torch

_SPARSE_AFTER = 64
_SPARSE_SHARE = 0.25
"""A search ends early if less than this share of the cells live, once at least `_SPARSE_AFTER` cells are known."""


def best_cells(scores_RS: torch.Tensor, grid_size: Sequence[int], k: int) -> torch.Tensor:
    """The `k` best cells of the whole grid for every row, hosted or not: coordinates ``[R, K, D]``, best first.

    Uses a beam of width `k` over the dimensions, which is exact because scores add up. For grids too large to hold.
    """
    parts = torch.split(scores_RS, list(grid_size), dim=1)
    num_rows = len(scores_RS)
    total_RK = scores_RS.new_zeros(num_rows, 1)
    cells_RKD = torch.empty(num_rows, 1, 0, dtype=torch.int64, device="cpu")
    for part_RG in parts:
        size = part_RG.shape[1]
        extended = (total_RK[:, :, None] + part_RG[:, None, :]).flatten(1)
        total_RK, at = extended.topk(min(k, extended.shape[1]), dim=1)
        kept = cells_RKD.gather(1, (at // size)[:, :, None].expand(-1, -1, cells_RKD.shape[2]))
        cells_RKD = torch.cat([kept, (at % size)[:, :, None]], dim=2)
    return cells_RKD


class BeamSearch:
    """Finds every row's `k` best live experts by asking about cells, best first: for a directory that is not warm.

    Ask about the cells of `wanted()` and pass on with `learn` which of them live, until `wanted` returns nothing more.
    The search ends early after `max_asked` cells, or where few of the cells asked about live: then `is_exact` is False,
    and reading the whole grid is less work than asking further.
    """

    def __init__(self, scores_RS: torch.Tensor, grid_size: Sequence[int], *, k: int, max_asked: int = 512) -> None:
        self._scores = scores_RS
        self._grid_size = tuple(grid_size)
        self._k = k
        self._max_asked = max_asked
        self._beam = k
        self._alive: dict[tuple[int, ...], bool] = {}
        self.is_exact = not len(scores_RS)
        """True if the `k` best live experts of every row are known, or all that live if these are fewer."""

    def wanted(self, limit: int = 64) -> list[tuple[int, ...]]:
        """Return at most `limit` cells to ask about next, those that most rows need first; none once the search is
        over."""
        limit = min(limit, self._max_asked - len(self._alive))
        if len(self._alive) >= _SPARSE_AFTER and sum(self._alive.values()) < _SPARSE_SHARE * len(self._alive):
            limit = 0
        num_cells = int(np.prod(np.array(self._grid_size, dtype=object)))
        while limit > 0 and len(self._scores):
            cells_RKD = best_cells(self._scores, self._grid_size, self._beam).numpy()
            flat, which = np.unique(cells_RKD.reshape(-1, len(self._grid_size)), axis=0, return_inverse=True)
            known = [self._alive.get(tuple(cell)) for cell in flat.tolist()]
            which_RK = which.reshape(cells_RKD.shape[:2])
            alive_RK = np.array([state is True for state in known])[which_RK]
            unknown_RK = np.array([state is None for state in known])[which_RK]
            # a row needs the cells up to its k-th live one
            needed_RK = unknown_RK & (alive_RK.cumsum(1) < self._k)
            if needed_RK.any():
                votes = np.bincount(which_RK[needed_RK], minlength=len(flat))
                order = np.argsort(-votes, kind="stable")[:limit]
                return [tuple(flat[i].tolist()) for i in order if votes[i]]
            if (alive_RK.sum(1) >= self._k).all() or self._beam >= num_cells:
                self.is_exact = True
                return []
            self._beam = min(2 * self._beam, num_cells)
        return []

    def learn(self, cell: tuple[int, ...], alive: bool) -> None:
        self._alive[cell] = alive
