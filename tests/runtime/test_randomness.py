"""A call's random numbers follow from its seed alone, whatever other threads draw, and they disturb nobody."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional

from tesseract_async.runtime.backend import ExpertBackend
from tesseract_async.runtime.randomness import seeded
from tesseract_async.runtime.runtime import TesseractRuntime
from tesseract_async.wire.tensors import TensorSpec

X = torch.rand(6, 5, 8)
LSTM = nn.LSTM(8, 8, 2, dropout=0.5, batch_first=True)
TRANSFORMER = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3, batch_first=True)


@pytest.mark.parametrize(
    "draw",
    [
        pytest.param(lambda: functional.dropout(X, 0.5, True), id="dropout"),
        pytest.param(lambda: torch.native_dropout(X, 0.5, True)[0], id="native_dropout"),
        pytest.param(lambda: functional.alpha_dropout(X, 0.5, True), id="alpha_dropout"),
        pytest.param(lambda: functional.dropout2d(X[None], 0.5, True), id="dropout2d"),
        pytest.param(lambda: functional.rrelu(X - 1, training=True), id="rrelu"),
        pytest.param(lambda: functional.gumbel_softmax(X), id="gumbel"),
        pytest.param(lambda: torch.rand(5), id="rand"),
        pytest.param(lambda: torch.randn_like(X), id="randn_like"),
        pytest.param(lambda: torch.randint(1000, (9,)), id="randint"),
        pytest.param(lambda: torch.randint(3, 1000, (9,)), id="randint from"),
        pytest.param(lambda: torch.randint_like(X, 1000), id="randint_like"),
        pytest.param(lambda: torch.randperm(100), id="randperm"),
        pytest.param(lambda: torch.normal(X, X), id="normal"),
        pytest.param(lambda: torch.bernoulli(X), id="bernoulli"),
        pytest.param(lambda: torch.multinomial(X[0], 4), id="multinomial"),
        pytest.param(lambda: torch.empty(4).uniform_(), id="uniform_"),
        pytest.param(lambda: LSTM(X)[0].detach(), id="lstm"),
        pytest.param(lambda: TRANSFORMER(X).detach(), id="transformer"),
        pytest.param(
            lambda: functional.scaled_dot_product_attention(X[:, None], X[:, None], X[:, None], dropout_p=0.5),
            id="attention",
        ),
    ],
)
def test_every_kind_of_random_operation_follows_from_the_seed(draw: Callable[[], torch.Tensor]) -> None:
    results = []
    before = torch.random.get_rng_state()
    for seed in (5, 5, 6):
        with seeded(seed):
            results.append(draw())
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])
    assert torch.equal(torch.random.get_rng_state(), before), "the process's generator was used"


def test_a_generator_that_a_module_brings_is_left_to_it() -> None:
    mine = torch.Generator().manual_seed(3)
    expected = torch.rand(4, generator=torch.Generator().manual_seed(3))
    with seeded(9):
        assert torch.equal(torch.rand(4, generator=mine), expected)


def test_what_takes_no_generator_runs_on_the_default_one_put_back_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    # as a GPU's fused kernels do
    monkeypatch.setattr("tesseract_async.runtime.randomness._with_generator", lambda func: None)
    before = torch.random.get_rng_state()
    with seeded(5):
        first, second = torch.rand(4), torch.rand(4)
    with seeded(5):
        assert torch.equal(torch.rand(4), first) and not torch.equal(first, second)
    assert torch.equal(torch.random.get_rng_state(), before)


async def test_the_loops_own_random_numbers_and_an_experts_do_not_meet() -> None:
    module = nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.5), nn.Linear(64, 64), nn.Dropout(0.5))
    backend = ExpertBackend(module, args_schema=(TensorSpec((64,)),), max_batch_size=64)
    x = torch.randn(64, 64)
    runtime = TesseractRuntime()
    await runtime.start()
    try:
        torch.manual_seed(1)
        alone = [torch.rand(3) for _ in range(400)]
        torch.manual_seed(1)
        beside: list[torch.Tensor] = []

        async def draw() -> None:
            while len(beside) < 400:
                beside.append(torch.rand(3))
                if len(beside) % 10 == 0:
                    await asyncio.sleep(0)

        async def call(seed: int) -> None:
            y = (await runtime.forward(backend, [x], training=True, seed=seed)).tensors[0]
            again = (await runtime.forward(backend, [x], training=True, seed=seed)).tensors[0]
            gradient = (await runtime.backward(backend, [x], [torch.ones(64, 64)], training=True, seed=seed)).tensors[0]
            more = (await runtime.backward(backend, [x], [torch.ones(64, 64)], training=True, seed=seed)).tensors[0]
            assert y is not None and again is not None and torch.equal(y, again)
            assert gradient is not None and more is not None and torch.equal(gradient, more)

        await asyncio.gather(draw(), *(call(seed) for seed in range(20)))
        assert torch.equal(torch.stack(alone), torch.stack(beside))
    finally:
        await runtime.aclose()
