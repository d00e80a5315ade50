"""Padding to preferred sizes, and torch.compile where a compiler is at hand."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import nn

from tesseract_async.runtime.acceleration import Acceleration
from tesseract_async.runtime.backend import BackendSettings, ExpertBackend
from tesseract_async.wire.tensors import TensorSpec


class Recorder(nn.Module):
    """Divides by its input, as a module may, and records the sizes of its batches."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.sizes: list[int] = []

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor | tuple[torch.Tensor]]:
        self.sizes.append(len(x))
        return {"y": self.linear(1 / x), "rest": (x.sum(-1),)}


def test_batches_are_padded_to_a_preferred_size_and_cut_again() -> None:
    module = Recorder()
    # CUDA graphs are not recorded on the CPU, but padding is the same
    accelerated = Acceleration(module, sizes=(4, 8), compile_mode=None, cuda_graphs=True)
    for num_rows, size in ((1, 4), (4, 4), (5, 8), (9, 9)):
        x = torch.rand(num_rows, 2) + 1
        module.sizes.clear()
        outputs = accelerated.run([x], lambda callable, inputs: callable(*inputs))
        assert module.sizes == [size]
        torch.testing.assert_close(outputs, module(x))


def test_padding_brings_no_gradient_and_nothing_that_is_not_finite() -> None:
    module = Recorder()
    settings = BackendSettings(preferred_sizes=(8,), cuda_graphs=True)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    schemas = {"args_schema": (TensorSpec((2,)),), "outputs_schema": {"y": TensorSpec((2,)), "rest": (TensorSpec(()),)}}
    padded = ExpertBackend(module, optimizer=optimizer, settings=settings, **schemas)  # type: ignore[arg-type]
    plain = ExpertBackend(module, optimizer=optimizer, **schemas)  # type: ignore[arg-type]
    x = torch.rand(3, 2) + 1
    gradients = [torch.randn(3, 2), torch.randn(3)]
    torch.testing.assert_close(padded.gradients([x], gradients), plain.gradients([x], gradients))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler here")
@pytest.mark.filterwarnings("ignore")
def test_compiled_equals_plain() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.GELU())
    settings = BackendSettings(preferred_sizes=(4, 8), compile_mode="default")
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    compiled = ExpertBackend(module, optimizer=optimizer, args_schema=(TensorSpec((2,)),), settings=settings)
    plain = ExpertBackend(module, optimizer=optimizer, args_schema=(TensorSpec((2,)),))
    for num_rows in (1, 3, 7):
        x, gradient = torch.randn(num_rows, 2), [torch.randn(num_rows, 2)]
        torch.testing.assert_close(compiled.forward([x]), plain.forward([x]))
        torch.testing.assert_close(compiled.gradients([x], gradient), plain.gradients([x], gradient))
