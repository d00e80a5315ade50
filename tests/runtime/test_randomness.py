"""A call's random numbers follow from its seed alone, whatever other threads draw, and they disturb nobody."""

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from tesseract_async.runtime.backend import BackendSettings, ExpertBackend
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
        pytest.param(lambda: torch.rand(5, generator=None), id="rand, generator=None"),
        pytest.param(lambda: torch.quasirandom.SobolEngine(4, scramble=True).draw(2), id="sobol"),
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


class Halting(nn.Module):
    """Draws, lets somebody else draw, and draws again."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn = asyncio.Event()
        self.go_on = threading.Event()
        self.loop = asyncio.get_running_loop()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = functional.dropout(x, 0.5, self.training)
        self.loop.call_soon_threadsafe(self.drawn.set)
        assert self.go_on.wait(timeout=60)
        self.go_on.clear()
        return functional.dropout(y, 0.5, self.training)


@pytest.mark.parametrize("backward", [False, True])
async def test_the_loops_own_random_numbers_and_an_experts_do_not_meet(backward: bool) -> None:
    module = Halting()
    spec = TensorSpec((64,))
    settings = BackendSettings(stochastic=True)
    backend = ExpertBackend(module, args_schema=(spec,), outputs_schema=spec, settings=settings)
    x = torch.ones(8, 64)
    runtime = TesseractRuntime()
    await runtime.start()

    async def compute(num_draws: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        gradients = [x] if backward else None
        work = runtime.submit(backend, [x], gradients, training=True, seed=7)
        await module.drawn.wait()
        module.drawn.clear()
        drawn = [torch.rand(3) for _ in range(num_draws)]
        module.go_on.set()
        (result,) = (await work.answer).tensors
        assert result is not None
        return result, drawn

    try:
        torch.manual_seed(1)
        expected = torch.rand(30, 3)
        undisturbed, _ = await compute(0)
        torch.manual_seed(1)
        drawn = []
        for _ in range(3):
            result, some = await compute(10)
            assert torch.equal(result, undisturbed)
            drawn += some
        assert torch.equal(torch.cat(drawn).view(30, 3), expected)
    finally:
        await runtime.aclose()


class Checkpointed(nn.Module):
    """Computes its inside again in the backward pass, to save memory."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.inside = nn.Sequential(nn.Linear(8, 8), nn.Dropout(p))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = checkpoint(self.inside, x, use_reentrant=False)
        return y


class NoisyGradient(torch.autograd.Function):
    """Draws in its backward pass, as stochastic rounding does."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient + torch.rand_like(gradient)


class Noisy(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = NoisyGradient.apply(x)
        return y


def test_a_checkpoint_around_a_random_layer_is_refused_and_other_checkpoints_are_not() -> None:
    spec, x = TensorSpec((8,)), torch.randn(3, 8)
    gradient = [torch.ones(3, 8)]
    random, plain = (
        ExpertBackend(Checkpointed(p), args_schema=(spec,), settings=BackendSettings(stochastic=True)) for p in (0.5, 0)
    )
    with pytest.raises(RuntimeError, match="torch.utils.checkpoint around a random layer"):
        random.gradients([x], gradient, training=True, seed=3)
    # in evaluation nothing is drawn
    for backend, training in ((random, False), (plain, False)):
        (found,), _ = backend.gradients([x], gradient, training=training, seed=3)
        assert found is not None
        torch.testing.assert_close(found, torch.ones(3, 8) @ backend.module.inside[0].weight)  # type: ignore[union-attr, index]


def test_what_a_backward_draws_itself_follows_from_the_seed() -> None:
    spec, x = TensorSpec((8,)), torch.randn(3, 8)
    backend = ExpertBackend(Noisy(), args_schema=(spec,), settings=BackendSettings(stochastic=True))
    before = torch.random.get_rng_state()
    first, again, other = (
        backend.gradients([x], [torch.ones(3, 8)], training=True, seed=seed)[0][0] for seed in (3, 3, 4)
    )
    assert first is not None and again is not None and other is not None
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), before)
