"""From scores to choices: the experts of a grid that score highest, for a batch of rows at once. Pure.

Product-key gating (Lample et al. 2019, as in the paper's section 3.1): an expert's score is the sum, over the grid's
dimensions, of the score of its coordinate there.

Suffixes of names: R rows, S sum of the grid's sizes, N live experts, D dimensions, K experts wanted, P prefixes (all
coordinates but the last), M values of the last coordinate, U distinct patterns of which experts live under a prefix,
L lines (pairs of a row and an expert).
"""

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from tesseract_async.experts.grid import ExpertReplica
from tesseract_async.experts.manifest import Coordinates

Indices = npt.NDArray[np.int64]

_CHUNK_ELEMENTS = 1 << 18
"""Scores computed at once: what a core's cache holds."""


def score_columns(coords_ND: Coordinates, grid_size: Sequence[int]) -> torch.Tensor:
    """Return the columns of the scores ``[R, S]`` that add up to each expert's score: ``[N, D]``."""
    offsets = np.array([0, *itertools.accumulate(grid_size)][:-1], dtype=np.int64)
    return torch.from_numpy(coords_ND + offsets)


class LiveGrid:
    """The live experts of a grid, prepared for `top_k`. Reusable as long as the same experts live."""

    def __init__(self, coords_ND: Coordinates, grid_size: Sequence[int]) -> None:
        """`coords_ND` are distinct and lie in the grid."""
        self.coords_ND = coords_ND
        self.grid_size = tuple(grid_size)
        self.columns_ND = score_columns(coords_ND, grid_size)
        self._by_prefix: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
        self._tables: dict[torch.dtype, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        num_live, num_dims = coords_ND.shape
        if num_dims < 2 or num_live == 0:
            return
        prefixes, prefix_of = _distinct(coords_ND[:, :-1], self.grid_size[:-1])
        lasts, last_of = _distinct(coords_ND[:, -1:], self.grid_size[-1:])
        cells = len(prefixes) * len(lasts)
        # Scoring one expert outright costs some ten times as much as one cell of the table (measured), which in turn
        # has fixed costs.
        if num_live < 512 + cells // 10:
            return
        expert_PM = torch.full((len(prefixes), len(lasts)), -1, dtype=torch.int64, device="cpu")
        expert_PM[torch.from_numpy(prefix_of), torch.from_numpy(last_of)] = torch.arange(num_live, device="cpu")
        offset = sum(self.grid_size[:-1])
        self._by_prefix = (score_columns(prefixes, grid_size[:-1]), torch.from_numpy(lasts[:, 0]) + offset, expert_PM)

    @functools.cached_property
    def coords(self) -> list[tuple[int, ...]]:
        """The places of the experts, in order."""
        return [*map(tuple, self.coords_ND.tolist())]

    def top_k(self, scores_RS: torch.Tensor, k: int, *, bias_N: torch.Tensor | None = None) -> torch.Tensor:
        """Exactly the `k` best live experts of every row: ``[R, min(k, N)]`` indices into `coords_ND`, best first.

        `bias_N`, where given, is added to the experts' scores. Neither holds NaN. Ties are broken somehow.
        """
        num_rows, num_live = scores_RS.shape[0], len(self.coords_ND)
        k = min(k, num_live)
        best_RK = torch.empty(num_rows, k, dtype=torch.int64, device="cpu")
        if k == 0:
            return best_RK
        prepared = None if self._by_prefix is None else self._table(bias_N, scores_RS.dtype)
        width = num_live
        if prepared is not None:
            width = max(len(prepared[1]), min(k, len(prepared[0]))) * prepared[0].shape[1]
        step = max(1, _CHUNK_ELEMENTS // width)
        for start in range(0, num_rows, step):
            chunk = scores_RS[start : start + step]
            best = self._scan(chunk, k, bias_N) if prepared is None else self._descend(chunk, k, *prepared)
            best_RK[start : start + step] = best
        return best_RK

    def _scan(self, scores_RS: torch.Tensor, k: int, bias_N: torch.Tensor | None) -> torch.Tensor:
        first, *others = self.columns_ND.T
        total_RN = scores_RS.index_select(1, first)
        for column in others:
            total_RN += scores_RS.index_select(1, column)
        if bias_N is not None:
            total_RN += bias_N
        return total_RN.topk(k, dim=1).indices

    def _table(
        self, bias_N: torch.Tensor | None, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Additions to the cells' scores, ``[P, M]``, minus infinity where no expert lives; its distinct rows, and
        which of them each prefix has (a prefix all of whose children live is like any other such)."""
        if bias_N is None and dtype in self._tables:
            return self._tables[dtype]
        assert self._by_prefix is not None
        expert_PM = self._by_prefix[2]
        if bias_N is None:
            bias_PM = torch.zeros(expert_PM.shape, dtype=dtype, device="cpu")
        else:
            bias_PM = bias_N.to(dtype)[expert_PM]
        bias_PM = bias_PM.masked_fill(expert_PM < 0, -torch.inf)
        table = (bias_PM, *torch.unique(bias_PM, dim=0, return_inverse=True))
        if bias_N is None:
            self._tables[dtype] = table
        return table

    def _descend(
        self, scores_RS: torch.Tensor, k: int, bias_PM: torch.Tensor, bias_UM: torch.Tensor, which_P: torch.Tensor
    ) -> torch.Tensor:
        """Finds the k prefixes with the best live child: the k best experts lie under them, whatever the holes."""
        assert self._by_prefix is not None
        columns_PD, columns_M, expert_PM = self._by_prefix
        first, *others = columns_PD.T
        prefix_RP = scores_RS.index_select(1, first)
        for column in others:
            prefix_RP += scores_RS.index_select(1, column)
        last_RM = scores_RS.index_select(1, columns_M)
        best_child_RP = (last_RM[:, None, :] + bias_UM).amax(2)[:, which_P]
        prefixes_RK = (prefix_RP + best_child_RP).topk(min(k, len(columns_PD)), dim=1).indices
        cells_RKM = prefix_RP.gather(1, prefixes_RK)[:, :, None] + last_RM[:, None, :] + bias_PM[prefixes_RK]
        best_RK = cells_RKM.flatten(1).topk(k, dim=1).indices
        width = len(columns_M)
        return expert_PM[prefixes_RK.gather(1, best_RK // width), best_RK % width]

    def next_best(
        self,
        scores_RS: torch.Tensor,
        *,
        tried_RT: Indices,
        excluded_N: npt.NDArray[np.bool_],
        wanted_R: Indices,
        bias_N: torch.Tensor | None = None,
    ) -> tuple[Indices, Indices]:
        """Each row's `wanted_R` best experts that it has not tried (`tried_RT`; -1 pads) and that are not excluded;
        `bias_N` as for `top_k`.

        Returns pairs: rows and experts. A row with no expert left is in no pair.
        """
        usable = np.flatnonzero(~excluded_N)
        width = int(wanted_R.max(initial=0)) + tried_RT.shape[1]
        grid = LiveGrid(self.coords_ND[usable], self.grid_size)
        bias_N = None if bias_N is None else bias_N[torch.from_numpy(usable)]
        experts_RK = usable[grid.top_k(scores_RS, width, bias_N=bias_N).numpy()]
        fresh_RK = ~(experts_RK[:, :, None] == tried_RT[:, None, :]).any(2)
        chosen_RK = fresh_RK & (fresh_RK.cumsum(1) <= wanted_R[:, None])
        rows, at = np.nonzero(chosen_RK)
        return rows, experts_RK[rows, at]


@dataclass(frozen=True, slots=True, eq=False)
class Candidates:
    """The live experts that a batch may go to, numbered as in `grid.coords_ND`."""

    prefix: str
    grid: LiveGrid
    replicas: Mapping[tuple[int, ...], Sequence[ExpertReplica]]
    """By coordinates: the servers that host an expert, the primary first."""
    bias_N: torch.Tensor | None = None
    """Added to the experts' scores in choosing; it has no part in their weights."""

    def __len__(self) -> int:
        return len(self.grid.coords_ND)

    def coords(self, expert: int) -> tuple[int, ...]:
        return self.grid.coords[expert]

    def uid(self, expert: int) -> str:
        return uid_at(self.prefix, self.coords(expert))

    def replicas_of(self, expert: int) -> Sequence[ExpertReplica]:
        """The servers that host the expert, the primary first; none where nobody is known to."""
        try:
            return self.replicas[self.grid.coords[expert]]
        except KeyError:
            return ()


def uid_at(prefix: str, coords: Sequence[int]) -> str:
    return ".".join((prefix, *map(str, coords)))


def _distinct(coords_ND: Coordinates, grid_size: Sequence[int]) -> tuple[Coordinates, Indices]:
    """The distinct rows, ascending, and which of them each row is. (`np.unique` over rows takes ten times as long.)"""
    num_cells = math.prod(grid_size)
    if num_cells > 2**62:
        rows, which = np.unique(coords_ND, axis=0, return_inverse=True)
        return rows, which.reshape(-1)
    flat = np.ravel_multi_index(tuple(coords_ND.T), tuple(grid_size))
    if num_cells <= 4 * len(flat):
        present = np.zeros(num_cells, dtype=bool)
        present[flat] = True
        cells, which = np.flatnonzero(present), (present.cumsum() - 1)[flat]
    else:
        cells, which = np.unique(flat, return_inverse=True)
    return np.stack(np.unravel_index(cells, tuple(grid_size)), axis=1), which


def group(rows_L: Indices, experts_L: Indices) -> list[tuple[int, Indices]]:
    """The pairs by expert: each expert once, with its rows in ascending order."""
    order = np.lexsort((rows_L, experts_L))
    rows_L, experts_L = rows_L[order], experts_L[order]
    return cut(*np.unique(experts_L, return_index=True), rows_L)


def cut(experts: Indices, starts: Indices, rows_L: Indices) -> list[tuple[int, Indices]]:
    """Each expert with the part of the rows that begins at its start. (`np.split` takes ten times as long.)"""
    bounds = [*starts.tolist(), len(rows_L)]
    return [(expert, rows_L[bounds[i] : bounds[i + 1]]) for i, expert in enumerate(experts.tolist())]


def within_capacity(
    rows_L: Indices, experts_L: Indices, scores_L: npt.NDArray[np.floating], room_N: Indices
) -> Indices:
    """Return the pairs that fit if expert n takes `room_N` more rows, the best scores first, as ascending indices."""
    order = np.lexsort((-scores_L, experts_L))
    experts = experts_L[order]
    rank = np.arange(len(experts)) - np.searchsorted(experts, experts)
    return np.sort(order[rank < room_N[experts]])
