"""What a module does besides computing is found by looking, and costs only those that do it."""

import random
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from tesseract_async.runtime.backend import ExpertBackend
from tesseract_async.runtime.executor import Executor
from tesseract_async.wire.tensors import TensorSpec
from tests.runtime.test_executor import answer_of, compute, make_backend, whole, work_of


class Calls(nn.Module):
    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function
        self.seen: list[int] = []
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += self.training
        self.seen.append(x.data_ptr())
        return self.function(x)


def backend_of(function: Callable[[torch.Tensor], torch.Tensor], **options: Any) -> ExpertBackend:
    return ExpertBackend(Calls(function), args_schema=(TensorSpec((4,)),), **options)


def test_numbers_that_another_thread_draws_make_no_module_random() -> None:
    def beside(x: torch.Tensor) -> torch.Tensor:
        thread = threading.Thread(target=lambda: torch.rand(3))
        thread.start()
        thread.join()
        return x * 2

    backend = backend_of(beside)
    for _ in range(3):
        assert torch.equal(backend.forward([torch.ones(1, 4)], training=True, seed=1)[0], torch.full((1, 4), 2.0))
    assert not backend.is_stochastic(True) and not backend.is_stochastic(False)


def test_a_try_leaves_module_and_generators_as_they_were() -> None:
    before = torch.get_rng_state()
    backend = backend_of(lambda x: functional.dropout(x, 0.5))
    assert torch.equal(torch.get_rng_state(), before) and backend.module.training
    assert float(backend.module.count) == 0 and backend.is_stochastic(True) and backend.is_stochastic(False)  # type: ignore[arg-type]


def test_only_a_module_that_writes_its_inputs_pays_for_copies() -> None:
    x, seen = torch.ones(1, 4), []
    for function, copied in ((lambda x: x * 2, False), (lambda x: x.mul_(2), True)):
        backend = backend_of(function)
        backend.forward([x], training=True)
        backend.gradients([x], [x], training=True)
        seen = backend.module.seen[2:]  # type: ignore[index]
        assert (x.data_ptr() in seen) is not copied and torch.equal(x, torch.ones(1, 4))  # type: ignore[operator]


@pytest.mark.parametrize("backward", [False, True])
def test_requests_that_were_merged_are_computed_again_alone_once_they_draw(backward: bool) -> None:
    def late(x: torch.Tensor) -> torch.Tensor:
        return functional.dropout(x, 0.5) if bool((x > 1).any()) else x * 1.0

    backend = make_backend(Late(late))
    assert not backend.is_stochastic(True)
    x, g = torch.full((2, 4), 2.0), torch.ones(2, 4) if backward else None
    works = [work_of(backend, x, g, training=True, seed=seed, call_id=bytes([seed]) * 16) for seed in range(4)]
    found = compute(Executor(), [whole(work) for work in works])
    assert backend.is_stochastic(True)
    for seed, work in enumerate(works):
        (mine,) = answer_of(found, work).tensors
        again = work_of(backend, x, g, training=True, seed=seed)
        (alone,) = answer_of(compute(Executor(), [whole(again)]), again).tensors
        assert mine is not None and alone is not None and torch.equal(mine, alone)


class Late(nn.Module):
    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function, self.unused = function, nn.Parameter(torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x) + self.unused


@pytest.mark.parametrize("draw", [lambda: random.random(), lambda: np.random.rand()])
def test_numbers_that_are_not_pytorchs_are_warned_of(draw: Any, caplog: pytest.LogCaptureFixture) -> None:
    backend_of(lambda x: x * draw())
    assert "from Python's or NumPy's" in caplog.text


def test_attention_without_dropout_draws_nothing() -> None:
    backend = backend_of(lambda x: functional.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0])
    assert not backend.is_stochastic(True)


def test_a_module_that_seeds_and_puts_back_by_itself_is_no_random_one() -> None:
    def fixed(x: torch.Tensor) -> torch.Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return x + torch.rand(4)

    backend = backend_of(fixed)
    assert not backend.is_stochastic(True)
    torch.testing.assert_close(backend.forward([torch.ones(2, 4)], training=True, seed=9)[0], fixed(torch.ones(2, 4)))


def test_a_generator_of_the_modules_own_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    mine = torch.Generator().manual_seed(1)
    assert backend_of(lambda x: x * torch.rand(4, generator=mine)).is_stochastic(True)
    assert "draws from a generator of its own" in caplog.text


def test_batch_statistics_survive_a_try() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    ExpertBackend(module, args_schema=(TensorSpec((4,)),))
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


def test_control_flow_and_kernels_without_a_backward_pass_are_taken() -> None:
    branch = backend_of(lambda x: torch.cond(x.sum() > 0, lambda y: y * 2, lambda y: y * 3, (x,)))
    assert torch.equal(branch.forward([torch.ones(1, 4)], training=True, seed=1)[0], torch.full((1, 4), 2.0))

    def only_forward(x: torch.Tensor) -> torch.Tensor:
        if x.requires_grad:
            raise NotImplementedError("no backward pass")
        return x.detach() * 2

    assert torch.equal(backend_of(only_forward).forward([torch.ones(1, 4)])[0], torch.full((1, 4), 2.0))


def test_a_module_that_changes_its_buffers_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    module = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    ExpertBackend(module, args_schema=(TensorSpec((4,)),))
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert "changes its buffers in each forward pass (_u, _v)" in caplog.text
    caplog.clear()
    ExpertBackend(nn.LayerNorm(4), args_schema=(TensorSpec((4,)),))
    assert not caplog.text


def test_a_compiled_module_is_still_compiled_once_it_was_watched() -> None:
    compiled = []

    def compiler(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        compiled.append(graph)
        return graph.forward

    module: Any = torch.compile(nn.Linear(4, 4), backend=compiler)
    ExpertBackend(module, args_schema=(TensorSpec((4,)),)).forward([torch.ones(1, 4)])
    assert compiled
