"""What an expert costs in memory, against what it makes when it computes; and how a limit is divided."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tesseract_async.runtime.backend import BackendSettings, ExpertBackend
from tesseract_async.runtime.states import JOURNAL_LENGTH
from tesseract_async.server import footprint
from tesseract_async.server.footprint import Footprint, measure, plan_memory
from tesseract_async.server.registry import make_backend
from tesseract_async.wire.tensors import TensorSpec


def make(module: nn.Module, *, max_batch_size: int = 512, width: int = 64, **settings: Any) -> ExpertBackend:
    return ExpertBackend(
        module,
        optimizer=lambda: torch.optim.Adam(module.parameters()),
        args_schema=(TensorSpec((width,)),),
        max_batch_size=max_batch_size,
        settings=BackendSettings(**settings),
    )


def test_weights_gradients_optimizer_and_journal_are_counted() -> None:
    expert = measure(make(nn.Linear(64, 64), step_every=2))
    weights = 4 * (64 * 64 + 64)
    assert (expert.weights, expert.gradients) == (weights, weights)
    assert expert.optimizer == 2 * weights + 2 * 4, "two moments, and two counters of steps"
    copied = 24 * JOURNAL_LENGTH
    assert expert.journal == 256 * JOURNAL_LENGTH
    assert expert.state == 4 * weights + 8 + copied, "gradients of half a step are saved, too"
    assert expert.resident == 2 * (4 * weights + 8) + copied + expert.journal
    together = measure(make(nn.Linear(64, 64), lockstep=True))
    assert together.resident == 4 * weights + 8 + 256 * 256, "no state to go back to, and a journal of one step"
    frozen = measure(ExpertBackend(nn.Linear(64, 64), args_schema=(TensorSpec((64,)),)))
    assert frozen.gradients == frozen.optimizer == 0 and frozen.weights == weights
    assert frozen.resident == frozen.state == weights, "it takes no steps: nothing to journal, nothing to go back to"


@pytest.mark.parametrize(
    ("name", "sizes", "max_batch_size"),
    [
        ("ffn", {"in_features": 64, "hidden_features": 256}, 1024),
        ("transformer", {"in_features": 64, "sequence_length": 16, "dropout": 0.1}, 64),
        ("nop", {"in_features": 64}, 1024),
    ],
)
def test_the_largest_batch_is_what_it_really_makes(name: str, sizes: dict[str, Any], max_batch_size: int) -> None:
    expert = measure(make_backend(name, sizes=sizes, max_batch_size=max_batch_size))
    real = make_backend(name, sizes=sizes, max_batch_size=max_batch_size)
    made = footprint.peak_of(real, max_batch_size, torch.device("cpu"))
    assert made <= expert.batch <= 1.2 * made


def test_a_module_that_looks_at_its_numbers_is_estimated_and_not_too_low() -> None:
    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(64, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.linear(x.relu()) * (2.0 if x.sum().item() > 0 else 1.0)
            return result

    expert = measure(make(Looks()))
    assert footprint.peak_of(make(Looks()), 512, torch.device("cpu")) <= expert.batch


def test_measuring_holds_nothing_afterwards() -> None:
    with footprint.Counting() as counting:
        x = torch.zeros(1000)
        y = x * 2
        assert counting.num_bytes == 8000
        del x
        assert counting.num_bytes == 4000
        view = y[:10]
        del y
        assert counting.num_bytes == 4000, "a view keeps what it looks at"
        del view
        assert counting.num_bytes == 0 and counting.peak == 8000


@given(
    limit=st.integers(0, 8 << 30),
    base=st.integers(0, 2 << 30),
    weights=st.integers(1, 1 << 28),
    batch=st.integers(0, 1 << 29),
    on_gpu=st.booleans(),
)
def test_everything_together_stays_within_the_limit(
    limit: int, base: int, weights: int, batch: int, on_gpu: bool
) -> None:
    expert = Footprint(weights, weights, 2 * weights, batch)
    plan = plan_memory(limit, base=base, expert=expert, on_gpu=on_gpu)
    one = expert.state + expert.journal if on_gpu else expert.resident
    rest = (
        base
        + plan.budgets["queue"]
        + plan.budgets["inputs"]
        + plan.budgets["answers"]
        + plan.budgets["received"]
        + plan.budgets["replies"]
        + plan.budgets["calls"]
        + plan.budgets["copies"]
        + batch
        + 2 * expert.state
    )
    if plan.num_experts:
        assert rest + plan.num_experts * one <= limit < rest + (plan.num_experts + 1) * one
        assert limit >= plan.needed_for_one or plan.budgets["queue"] == 1 << 30
    elif plan.budgets["queue"] < 1 << 30:
        assert limit < plan.needed_for_one
    if plan.needed_for_one - base < 4 << 30:  # below what makes the shares reach their most
        assert plan_memory(plan.needed_for_one, base=base, expert=expert, on_gpu=on_gpu).num_experts >= 1
