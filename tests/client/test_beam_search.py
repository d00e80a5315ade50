import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tesseract_async.client.beam_search import BeamSearch, best_cells
from tesseract_async.client.routing import LiveGrid, group, score_columns, within_capacity

grids = st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple)


def random_coords(grid: tuple[int, ...], share: float, rng: np.random.Generator) -> np.ndarray:
    cells = np.array(list(itertools.product(*map(range, grid))), dtype=np.int64)
    return cells[rng.random(len(cells)) < share]


def totals(scores: torch.Tensor, coords: np.ndarray, grid: tuple[int, ...]) -> np.ndarray:
    offsets = [0, *itertools.accumulate(grid)]
    return np.array(
        [[sum(float(row[o + c]) for o, c in zip(offsets, at, strict=False)) for at in coords] for row in scores]
    )


@settings(deadline=None, max_examples=40)
@given(grid=grids, share=st.floats(0, 1), k=st.integers(1, 7), seed=st.integers(0, 2**32 - 1), biased=st.booleans())
@pytest.mark.parametrize("by_prefix", [False, True])
def test_top_k_is_exact_whatever_the_holes(
    grid: tuple[int, ...], share: float, k: int, seed: int, biased: bool, by_prefix: bool
) -> None:
    rng = np.random.default_rng(seed)
    coords = random_coords(grid, share, rng)
    scores = torch.from_numpy(rng.integers(-3, 4, (5, sum(grid))).astype(np.float32))  # with ties
    bias = torch.from_numpy(rng.integers(-3, 1, len(coords)).astype(np.float32)) if biased else None
    live = LiveGrid(coords, grid)
    if by_prefix and len(grid) > 1 and len(coords):
        force_prefixes(live)
    best = live.top_k(scores, k, bias_N=bias).numpy()
    expected = totals(scores, coords, grid).reshape(5, len(coords)) + (0 if bias is None else bias.numpy())
    assert best.shape == (5, min(k, len(coords)))
    for row, chosen in zip(expected, best, strict=True):
        assert len(set(chosen.tolist())) == len(chosen)
        assert row[chosen].tolist() == sorted(row, reverse=True)[: len(chosen)]


def force_prefixes(live: LiveGrid) -> None:
    """The path for large grids, which these small ones would not take."""
    prefixes, prefix_of = np.unique(live.coords_ND[:, :-1], axis=0, return_inverse=True)
    lasts, last_of = np.unique(live.coords_ND[:, -1], return_inverse=True)
    table = torch.full((len(prefixes), len(lasts)), -1, dtype=torch.int64)
    table[torch.from_numpy(prefix_of.reshape(-1)), torch.from_numpy(last_of)] = torch.arange(len(live.coords_ND))
    offset = sum(live.grid_size[:-1])
    live._by_prefix = (score_columns(prefixes, live.grid_size[:-1]), torch.from_numpy(lasts) + offset, table)


def test_a_large_grid_takes_the_fast_path_and_is_exact() -> None:
    rng = np.random.default_rng(0)
    scores = torch.randn(300, 128, generator=torch.Generator().manual_seed(0))
    for share in (0.3, 1.0):
        coords = random_coords((64, 64), share, rng)
        live = LiveGrid(coords, (64, 64))
        assert live._by_prefix is not None
        full = scores[:, coords[:, 0]] + scores[:, 64 + coords[:, 1]]
        best = full.gather(1, live.top_k(scores, 4))
        torch.testing.assert_close(best, full.topk(4).values, rtol=0, atol=0)


@settings(deadline=None, max_examples=40)
@given(grid=grids, k=st.integers(1, 7), seed=st.integers(0, 2**32 - 1))
def test_best_cells_of_the_whole_grid(grid: tuple[int, ...], k: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = torch.from_numpy(rng.integers(-3, 4, (4, sum(grid))).astype(np.float32))
    cells = best_cells(scores, grid, k).numpy()
    everything = totals(scores, random_coords(grid, 2.0, rng), grid)
    for r in range(4):
        assert len({tuple(cell) for cell in cells[r].tolist()}) == min(k, math.prod(grid))
        got = totals(scores[r : r + 1], cells[r], grid)[0].tolist()
        assert got == sorted(everything[r], reverse=True)[: len(got)]


@settings(deadline=None, max_examples=25)
@given(grid=grids, share=st.floats(0, 1), k=st.integers(1, 4), seed=st.integers(0, 2**32 - 1), limit=st.integers(1, 9))
@example(grid=(5, 5, 5), share=0.125, k=1, seed=3, limit=1)
def test_beam_search_finds_the_best_that_live(
    grid: tuple[int, ...], share: float, k: int, seed: int, limit: int
) -> None:
    rng = np.random.default_rng(seed)
    coords = random_coords(grid, share, rng)
    alive = {tuple(cell) for cell in coords.tolist()}
    scores = torch.from_numpy(rng.standard_normal((3, sum(grid))).astype(np.float32))
    search = BeamSearch(scores, grid, k=k)
    asked: set[tuple[int, ...]] = set()
    while cells := search.wanted(limit):
        assert len(cells) <= limit
        asked |= set(cells)
        for cell in cells:
            search.learn(cell, cell in alive)
    if not search.is_exact:  # it ended early: reading the whole grid is less work
        assert len(asked) >= 64 and len(asked & alive) < 0.25 * len(asked)
        return
    found = np.array(sorted(asked & alive), dtype=np.int64).reshape(-1, len(grid))
    expected = totals(scores, coords, grid).reshape(3, len(coords))
    mine = totals(scores, found, grid).reshape(3, len(found))
    for r in range(3):
        assert sorted(mine[r], reverse=True)[:k] == sorted(expected[r], reverse=True)[:k]


def test_beam_search_ends_early_after_enough_questions() -> None:
    search = BeamSearch(torch.randn(2, 200), (100, 100), k=4, max_asked=50)
    asked = 0
    while cells := search.wanted():
        asked += len(cells)
        for cell in cells:
            search.learn(cell, False)
    assert asked == 50


@settings(deadline=None)
@given(pairs=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 4)), unique=True))
def test_group(pairs: list[tuple[int, int]]) -> None:
    rows, experts = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    groups = group(rows, experts)
    assert [expert for expert, _ in groups] == sorted(set(experts.tolist()))
    for expert, members in groups:
        assert members.tolist() == sorted(r for r, e in pairs if e == expert)


@settings(deadline=None)
@given(
    pairs=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3), st.integers(-5, 5)), unique_by=lambda p: p[:2]),
    room=st.lists(st.integers(0, 4), min_size=4, max_size=4),
)
def test_within_capacity_keeps_the_best(pairs: list[tuple[int, int, int]], room: list[int]) -> None:
    rows, experts, scores = np.array(pairs, dtype=np.int64).reshape(-1, 3).T
    kept = within_capacity(rows, experts, scores.astype(np.float32), np.array(room)).tolist()
    for expert in range(4):
        mine = sorted((s for r, e, s in pairs if e == expert), reverse=True)
        assert sorted((scores[i] for i in kept if experts[i] == expert), reverse=True) == mine[: room[expert]]


def test_next_best_skips_what_was_tried_and_excluded() -> None:
    coords = np.array([[0], [1], [2], [3]], dtype=np.int64)
    live = LiveGrid(coords, (4,))
    scores = torch.tensor([[4.0, 3, 2, 1], [1, 2, 3, 4]])
    rows, experts = live.next_best(
        scores,
        tried_RT=np.array([[0, -1], [3, 2]]),
        excluded_N=np.array([False, True, False, False]),
        wanted_R=np.array([2, 2]),
    )
    assert list(zip(rows.tolist(), experts.tolist(), strict=True)) == [(0, 2), (0, 3), (1, 0)]
