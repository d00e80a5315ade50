"""Padding to preferred sizes, and torch.compile where a compiler is at hand."""

import importlib.util
import shutil
from typing import Any

import pytest
import torch
from torch import nn

from tesseract_async.runtime.backend import BackendSettings, ExpertBackend
from tesseract_async.wire.tensors import TensorSpec, flatten


class Recorder(nn.Module):
    """Divides by its input, as a module may, and records the sizes of its batches."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.sizes: list[int] = []

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor | tuple[torch.Tensor]]:
        self.sizes.append(len(x))
        return {"y": self.linear(1 / x), "rest": (x.sum(-1),)}


SCHEMAS: dict[str, Any] = {
    "args_schema": (TensorSpec((2,)),),
    "outputs_schema": {"y": TensorSpec((2,)), "rest": (TensorSpec(()),)},
}


def test_batches_are_padded_to_a_preferred_size_and_cut_again() -> None:
    module = Recorder()
    # CUDA graphs are not recorded on the CPU, but padding is the same
    padded = ExpertBackend(module, settings=BackendSettings(preferred_sizes=(4, 8), cuda_graphs=True), **SCHEMAS)
    for num_rows, size in ((1, 4), (4, 4), (5, 8), (9, 9)):
        x = torch.rand(num_rows, 2) + 1
        module.sizes.clear()
        outputs = padded.forward([x])
        assert module.sizes == [size]
        torch.testing.assert_close(outputs, flatten(module(x)))


def test_padding_brings_no_gradient_and_nothing_that_is_not_finite() -> None:
    module = Recorder()
    settings = BackendSettings(preferred_sizes=(8,), cuda_graphs=True)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    padded = ExpertBackend(module, optimizer=optimizer, settings=settings, **SCHEMAS)
    plain = ExpertBackend(module, optimizer=optimizer, **SCHEMAS)
    x = torch.rand(3, 2) + 1
    gradients = [torch.randn(3, 2), torch.randn(3)]
    torch.testing.assert_close(padded.gradients([x], gradients), plain.gradients([x], gradients))


compiles = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("g++") is None and shutil.which("clang++") is None, reason="torch.compile needs a C++ compiler"
    ),
    # PyTorch's compiler warns about its own parts
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture
def no_helpers(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's compiler would leave processes, and threads that watch them, until the program ends."""
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
    if importlib.util.find_spec("tqdm") is not None:
        import tqdm

        monkeypatch.setattr(tqdm.tqdm, "monitor_interval", 0)


@pytest.mark.parametrize("dropout", [pytest.param(p, marks=compiles) for p in (0.0, 0.5)])
def test_compiled_equals_plain(dropout: float, no_helpers: None) -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.GELU(), nn.Dropout(dropout))
    settings = BackendSettings(preferred_sizes=(4,), compile_mode="default")
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    compiled = ExpertBackend(module, optimizer=optimizer, args_schema=(TensorSpec((2,)),), settings=settings)
    plain = ExpertBackend(module, optimizer=optimizer, args_schema=(TensorSpec((2,)),))
    for num_rows in (1, 3, 4):
        x, gradient = torch.randn(num_rows, 2), [torch.randn(num_rows, 2)]
        torch.testing.assert_close(compiled.forward([x]), plain.forward([x]))
        torch.testing.assert_close(compiled.gradients([x], gradient), plain.gradients([x], gradient))
        if dropout:  # padded rows draw, too: compared with itself
            (y,) = compiled.forward([x], training=True, seed=num_rows)
            (again,), _ = compiled.gradients([x], [torch.ones(num_rows, 2)], training=True, seed=num_rows)
            assert torch.equal(y, compiled.forward([x], training=True, seed=num_rows)[0])
            kept = (y != 0).float() * 2
            with torch.enable_grad():
                leaf = x.clone().requires_grad_()
                (expected,) = torch.autograd.grad((module[:2](leaf) * kept).sum(), leaf)
            torch.testing.assert_close(again, expected)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_adam_steps_in_one_kernel_unless_its_owner_says_otherwise(kind: type[torch.optim.Adam]) -> None:
    def make(**options: bool) -> ExpertBackend:
        torch.manual_seed(1)
        module = nn.Linear(3, 3)
        optimizer = kind(module.parameters(), lr=0.1, **options)  # type: ignore[arg-type]
        return ExpertBackend(module, optimizer=optimizer, args_schema=(TensorSpec((3,)),))

    usual, plain, many = make(), make(fused=False), make(foreach=True)
    assert usual.optimizer is not None and usual.optimizer.param_groups[0]["fused"]
    assert plain.optimizer is not None and plain.optimizer.param_groups[0]["fused"] is False
    assert many.optimizer is not None and not many.optimizer.param_groups[0]["fused"]
    x, gradient = torch.randn(4, 3), torch.randn(4, 3)

    def train(backend: ExpertBackend) -> torch.Tensor:
        for _ in range(3):
            backend.step(backend.gradients([x], [gradient])[1])
        return backend.forward([x])[0]

    expected = train(plain)
    torch.testing.assert_close(train(usual), expected)
    # a state that was saved by an optimizer that went one by one
    usual.load_state(plain.state())
    assert usual.optimizer.param_groups[0]["fused"], "how a step is computed is no part of a state"
    plain.load_state(usual.state())
    assert plain.optimizer.param_groups[0]["fused"] is False, "as its owner had said"
    torch.testing.assert_close(train(usual), train(plain))


class Odd(nn.Module):
    """Gradients that are expanded scalars, transposed, or one and the same tensor; parameters laid out otherwise."""

    def __init__(self, *, transposed: bool) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.summed, self.turned = nn.Parameter(torch.randn(40_000)), nn.Parameter(torch.randn(3, 4))
        self.left, self.right = nn.Parameter(torch.randn(3, 3)), nn.Parameter(torch.randn(3, 3))
        self.columns = nn.Parameter(torch.randn(5, 3).t() if transposed else torch.randn(3, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        turned = (self.turned.t() * torch.arange(12.0).reshape(4, 3)).sum() + (x @ self.columns).square().mean()
        return x @ (self.left + self.right) + self.summed.sum() + turned


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_step_does_not_depend_on_how_gradients_lie_in_memory(transposed: bool, clip: float | None) -> None:
    settings = BackendSettings(clip_gradient_norm=clip)
    ours, theirs = Odd(transposed=transposed), Odd(transposed=transposed)
    backend = ExpertBackend(
        ours, optimizer=torch.optim.Adam(ours.parameters(), 0.1), args_schema=(TensorSpec((3,)),), settings=settings
    )
    optimizer = torch.optim.Adam(theirs.parameters(), 0.1, fused=False)
    assert backend.optimizer is not None and bool(backend.optimizer.param_groups[0]["fused"]) is not transposed
    for _ in range(3):
        x, gradient = torch.randn(4, 3), torch.randn(4, 3)
        backend.step(backend.gradients([x], [gradient])[1])
        backend.load_state(backend.state())
        theirs(x).backward(gradient)
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(theirs.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other)


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4, sparse=True)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return self.embedding(words).sum(1)


def test_sparse_gradients_are_left_to_the_optimizer() -> None:
    module, alone = Words(), Words()
    alone.load_state_dict(module.state_dict())
    backend = ExpertBackend(
        module, optimizer=torch.optim.SGD(module.parameters(), 0.1), args_schema=(TensorSpec((3,), torch.int64),)
    )
    words = torch.tensor([[1, 2, 3], [3, 4, 4]])
    _, gradients = backend.gradients([words], [torch.ones(2, 4)], training=True, seed=1)
    assert gradients[0] is not None and gradients[0].is_sparse
    backend.step(gradients)
    alone(words).sum().backward()
    torch.optim.SGD(alone.parameters(), 0.1).step()
    torch.testing.assert_close(module.embedding.weight, alone.embedding.weight)
