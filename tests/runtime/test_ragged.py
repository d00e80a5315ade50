"""Rows of several experts, each through its own weights, against one expert after the other."""

import pytest
import torch
from torch.nn import functional as F

from tesseract_async.runtime.ragged import PaddedRows, Ragged


@pytest.mark.parametrize("counts", [[1], [4, 4, 4], [1, 2, 3, 30, 31, 40], [7, 1, 7], [5, 6, 6, 7, 8, 9]])
def test_rows_that_are_added_are_copies_and_found_by_nobody(counts: list[int]) -> None:
    x = torch.randn(sum(counts), 3)
    for rows in (
        PaddedRows.stepped(counts),
        PaddedRows.even(counts, extra=1),
        PaddedRows.even(counts),
        PaddedRows(counts, counts),
    ):
        padded = rows.padded(x)
        assert len(padded) == sum(rows.counts) and torch.equal(rows.own(padded), x)
        for given, own, count in zip(x.split(counts), padded.split([*rows.counts]), counts, strict=True):
            assert torch.equal(own[:count], given) and bool((own[count:] == given[-1]).all())
        gradients = rows.with_zeros(x)
        assert torch.equal(rows.own(gradients), x)
        assert float(gradients.abs().sum()) == pytest.approx(float(x.abs().sum())), "what was added has no gradient"


def test_other_rows_are_added_where_a_pass_is_compared() -> None:
    x = torch.randn(4, 3)
    for rows in (PaddedRows.even([1, 3], extra=1), PaddedRows.stepped([1, 3], extra=1), PaddedRows([1, 3], [2, 4])):
        others = rows.with_others(x)
        assert torch.equal(rows.own(others), x)
        assert not any(torch.equal(row, last) for row in others[1:2] for last in x)
        assert not torch.equal(others[-1], x[-1]) and torch.equal(others[-1], x[-1].flip(0) / 2)
    names = torch.arange(4)[:, None]
    assert torch.equal(rows.with_others(names), rows.padded(names)), "others may be unknown"
    assert torch.equal(PaddedRows([1, 3], [1, 3]).with_others(x), x)


def test_few_rows_are_added_where_neighbors_have_about_equally_many() -> None:
    counts = [20, 22, 25, 27, 29, 30, 32, 33, 40, 41]
    padded = PaddedRows.stepped(counts).counts
    assert sum(padded) <= 1.3 * sum(counts) and len({*padded}) <= 3
    assert PaddedRows.stepped([8] * 5).counts == [8] * 5
    assert sum(PaddedRows.stepped([1, 100]).counts) == 101


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", [(6,), (3, 6)])
@pytest.mark.parametrize("is_stack", [True, False])
def test_each_experts_rows_meet_its_own_weights(is_stack: bool, shape: tuple[int, ...], has_bias: bool) -> None:
    counts = [2, 2, 3, 1]
    x = torch.randn(sum(counts), *shape, requires_grad=True)
    weights = torch.randn(4, 5, 6, requires_grad=True)
    biases = torch.randn(4, 5, requires_grad=True) if has_bias else None
    sources = [x, weights, *([] if biases is None else [biases])]
    expected = torch.cat(
        [
            F.linear(own, weights[number], None if biases is None else biases[number])
            for number, own in enumerate(x.split(counts))
        ]
    )
    columns = [None if one is None else one if is_stack else [*one.unbind()] for one in (weights, biases)]
    weight, bias = (None if one is None else Ragged.of(one, counts) for one in columns)
    assert weight is not None
    y = F.linear(x, weight, bias)
    torch.testing.assert_close(y, expected)
    upstream = torch.randn_like(y)
    found = torch.autograd.grad(y, sources, upstream)
    for ours, theirs in zip(found, torch.autograd.grad(expected, sources, upstream), strict=True):
        torch.testing.assert_close(ours, theirs)
    if is_stack:
        assert all(one.is_contiguous() for one in found), "as fused optimizers take for granted"
