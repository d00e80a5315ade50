"""A beam search of a gate gives the best that live, however few of a grid's cells anybody hosts."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tesseract_async.errors import NotEnoughExperts
from tesseract_async.wire.messages import FORWARD
from tests.client.fake_node import FakeNode, Slope, gate_with
from tests.client.virtual_time import run_in_virtual_time

GRIDS = [(40,), (12, 12), (32, 32, 32), (7, 1000), (2, 3, 4, 5), (100, 100)]


def swarm(grid: tuple[int, ...], num_live: int, seed: int) -> tuple[FakeNode, set[tuple[int, ...]]]:
    rng = np.random.default_rng(seed)
    node = FakeNode()
    live = {tuple(int(rng.integers(size)) for size in grid) for _ in range(num_live)}
    for coords in live:
        node.host("g." + ".".join(map(str, coords)), Slope(1.0))
    return node, live


@settings(deadline=None, max_examples=40)
@example(grid=(32, 32, 32), num_live=128, k=4, num_rows=3, seed=1)
@example(grid=(32, 32, 32), num_live=2, k=4, num_rows=1, seed=2)
@given(
    grid=st.sampled_from(GRIDS),
    num_live=st.integers(1, 200),
    k=st.integers(1, 6),
    num_rows=st.integers(1, 5),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_beam_finds_the_best_of_those_that_live(
    grid: tuple[int, ...], num_live: int, k: int, num_rows: int, seed: int
) -> None:
    async def main() -> None:
        node, live = swarm(grid, num_live, seed)
        torch.manual_seed(seed)
        gate = gate_with(node, "g", grid_size=grid, in_features=8, k_best=k, search="beam")
        for _ in range(2):
            x = torch.randn(num_rows, 8)
            scores = torch.split(gate.proj(x).detach(), list(grid), dim=1)
            for row, experts in enumerate(await gate.choose(x)):
                by_uid = {
                    "g." + ".".join(map(str, coords)): sum(
                        part[row, at] for part, at in zip(scores, coords, strict=True)
                    )
                    for coords in live
                }
                best = sorted(by_uid.values(), reverse=True)[:k]
                chosen = [by_uid[expert.uid] for expert in experts]
                assert len({expert.uid for expert in experts}) == len(chosen)
                np.testing.assert_allclose(chosen, best, rtol=1e-5, atol=1e-6)

    run_in_virtual_time(main())


def test_rows_whose_experts_fail_get_the_next_best_of_a_sparse_grid() -> None:
    async def main() -> None:
        node, live = swarm((32, 32, 32), 60, 5)
        gate = gate_with(node, "g", grid_size=(32, 32, 32), in_features=8, k_best=2, search="beam")
        x = torch.randn(3, 8)
        dead = {expert.uid for row in await gate.choose(x) for expert in row}

        async def fault(method: str, uid: str, number: int) -> None:
            if method == FORWARD and uid in dead:
                raise TimeoutError("script")

        node.fault = fault
        mixed = await gate.mix(x)
        assert (mixed.num_answers >= 1).all() and dead <= mixed.errors.keys() and len(live) > len(dead)

    run_in_virtual_time(main())


@pytest.mark.parametrize("joined", [True, False])
def test_that_nobody_lives_is_said_only_where_it_is_known(joined: bool) -> None:
    async def main() -> None:
        node = FakeNode()
        if not joined:
            node.directory.cold = True

            async def find(uid: str, *, even_failed: bool = False) -> list[object]:
                raise TimeoutError("no node of the network answered")

            node.directory.find = find  # type: ignore[assignment, method-assign]
        gate = gate_with(node, "g", grid_size=(32, 32, 32), in_features=8, k_best=2, search="beam", forward_timeout=5.0)
        with pytest.raises(
            NotEnoughExperts, match="no expert is alive" if joined else "no node of the network answered"
        ):
            await gate(torch.randn(2, 8))

    run_in_virtual_time(main())
