"""Norms and finiteness of tensors of every kind."""

from __future__ import annotations

import math

import pytest
import torch

from tesseract_async.runtime.finite import are_finite, norm_of


@pytest.mark.parametrize("shape", [(5,), (256, 200)])  # a large one takes another way
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64])
def test_the_norm_is_that_of_all_elements(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tensors = [
        torch.randn(*shape).to(dtype),
        None,
        torch.randn(3).to(dtype),
        torch.randn(*shape[::-1]).to(dtype).permute(*reversed(range(len(shape)))),
    ]
    expected = math.hypot(*(float(x.abs().double().square().sum().sqrt()) for x in tensors if x is not None))
    assert norm_of(tensors) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("size", [4, 50_000])
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_one_wrong_element_is_seen(size: int, wrong: float) -> None:
    x = torch.zeros(size)
    assert norm_of([x, None]) == 0.0
    assert are_finite([x, None])
    x[size // 2] = wrong
    assert not math.isfinite(norm_of([torch.ones(2), x]))
    assert not are_finite([torch.ones(2), x])


@pytest.mark.parametrize("size", [3, 40_000])
def test_a_square_that_is_too_large_is_no_number(size: int) -> None:
    x = torch.full((size,), 1e30)
    assert not math.isfinite(norm_of([x]))
    assert are_finite([x])


def test_expanded_and_sparse_tensors_count_as_what_they_stand_for() -> None:
    assert norm_of([torch.ones(1, 1).expand(300, 300)]) == pytest.approx(300.0)
    twice = torch.sparse_coo_tensor(torch.tensor([[1, 1]]), torch.tensor([3.0, 4.0]), (5,), check_invariants=True)
    assert norm_of([twice]) == pytest.approx(7.0)
    assert norm_of([]) == 0.0
