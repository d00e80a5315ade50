"""The arithmetic of a pass's messages against a softmax over the experts that answered."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from tesseract_async.client.blocks import RowBlock, WeightedSums
from tesseract_async.client.dispatch import ExpertCall
from tesseract_async.client.routing import Candidates, LiveGrid

ROWS, EXPERTS = 5, 4


def make_blocks(scores: np.ndarray, groups: Sequence[Sequence[int]], *, is_normalized: bool = True) -> list[RowBlock]:
    """One block for each group of experts, every one of which sees the rows whose sum with its number is not 3k."""
    candidates = Candidates("m", LiveGrid(np.arange(EXPERTS)[::-1, None].copy(), (EXPERTS,)), {})
    blocks = []
    for group in groups:
        rows = {expert: np.array([row for row in range(ROWS) if (row + expert) % 3]) for expert in group}
        calls = [ExpertCall(expert, f"m.{expert}", rows[expert], 0.0) for expert in group]
        block = RowBlock.of(calls, candidates, ROWS)
        block.weigh(scores, candidates, is_normalized=is_normalized, is_bare=False)
        blocks.append(block)
    return blocks


def answer(
    block: RowBlock, places: Sequence[int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[torch.Tensor | None]]:
    """The part about these calls: expert e answers e + 1 to each row."""
    pairs = np.concatenate([np.arange(*block.offsets[place : place + 2]) for place in places])
    numbers, at_P = np.unique(block.numbers_P[pairs], return_inverse=True)
    sums = np.zeros((len(numbers), 1), dtype=np.float32)
    np.add.at(sums[:, 0], at_P, block.weights_P[pairs] * (block.experts_P()[pairs] + 1))
    return pairs, numbers, at_P, [torch.from_numpy(sums)]


def test_a_block_has_each_row_once_and_the_experts_in_order_of_their_coordinates() -> None:
    (block,) = make_blocks(np.zeros((ROWS, EXPERTS), dtype=np.float32), [[0, 2, 3]])
    assert [call.expert for call in block.calls] == [3, 2, 0], "the grid's coordinates descend here"
    assert block.coords[:, 0].tolist() == [0, 1, 3]
    for place, call in enumerate(block.calls):
        assert block.rows[block.numbers_P[block.pairs(place)]].tolist() == call.rows.tolist()
    assert block.rows.tolist() == list(range(ROWS))


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_parts_in_any_order_make_a_softmax_of_those_that_answered(order: list[int], scale: float) -> None:
    scores = np.random.default_rng(1).normal(size=(ROWS, EXPERTS)).astype(np.float32) * scale
    blocks = make_blocks(scores, [[0, 1], [2, 3]])
    places = [[0, 1], [1]]  # of the second message only one expert answers
    total = WeightedSums([torch.zeros(ROWS, 1)], scores.dtype, is_normalized=True)
    for i in order:
        total.add(blocks[i], *answer(blocks[i], places[i]))
    # the columns of the scores go by coordinates, which descend: expert e has the last column but e
    asked = [(call, i) for i in (0, 1) for call in (blocks[i].calls[place] for place in places[i])]
    dense = np.full((ROWS, EXPERTS), -np.inf)
    for call, _ in asked:
        dense[call.rows, call.expert] = scores[call.rows, EXPERTS - 1 - call.expert]
    answered = np.isfinite(dense).any(1)
    assert answered.all()
    shares = torch.softmax(torch.from_numpy(dense), 1).numpy()
    mixed = total.sums[0][:, 0].numpy() / total.weights_R
    np.testing.assert_allclose(mixed, shares @ (np.arange(EXPERTS) + 1), rtol=1e-5)
    for i in (0, 1):
        weights_P = total.weights_of(blocks[i])
        for place in places[i]:
            call, pairs = blocks[i].calls[place], blocks[i].pairs(place)
            np.testing.assert_allclose(weights_P[pairs], shares[call.rows, call.expert], rtol=1e-4, atol=1e-12)


def test_large_answers_do_not_overflow_a_sum_in_a_small_unit() -> None:
    """Each message's values are greater than those of the one before, by what most sums are not scaled again for."""
    for step in (0.5, 2.9, 9.9, 40.0):
        scores = np.tile(np.arange(EXPERTS, dtype=np.float32)[::-1] * step, (ROWS, 1))
        total = WeightedSums([torch.zeros(ROWS, 1)], scores.dtype, is_normalized=True)
        for block in make_blocks(scores, [[expert] for expert in range(EXPERTS)]):
            pairs, numbers, at_P, (sums,) = answer(block, [0])
            assert sums is not None
            total.add(block, pairs, numbers, at_P, [sums * 1e36])
        assert bool(total.sums[0].isfinite().all())


def test_other_sums_have_the_values_as_weights() -> None:
    scores = np.random.default_rng(1).normal(size=(ROWS, EXPERTS)).astype(np.float32)
    (block,) = make_blocks(scores, [[1, 2]], is_normalized=False)
    total = WeightedSums([torch.zeros(ROWS, 1)], scores.dtype, is_normalized=False)
    total.add(block, *answer(block, [0, 1]))
    expected = np.zeros(ROWS)
    for call in block.calls:
        expected[call.rows] += scores[call.rows, EXPERTS - 1 - call.expert] * (call.expert + 1)
    np.testing.assert_allclose(total.sums[0][:, 0].numpy(), expected, rtol=1e-5)
    assert total.weights_of(block) is block.weights_P
