"""Ready-made experts by name."""

from __future__ import annotations

import pytest
import torch

from tesseract_async.server import registry

SMALL = {
    "ffn": {"in_features": 8},
    "transformer": {"in_features": 8, "num_heads": 2, "sequence_length": 4},
    "linear": {"in_features": 8, "out_features": 3},
    "nop": {"in_features": 8},
}


@pytest.mark.parametrize("name", sorted(registry.EXPERTS))
def test_every_ready_made_expert_computes(name: str) -> None:
    backend = registry.make_backend(name, sizes=SMALL[name])
    x = [torch.randn(5, *spec.shape) for spec in backend.input_specs]
    outputs = backend.forward(x)
    of_inputs, of_parameters = backend.gradients(x, [torch.ones_like(output) for output in outputs])
    assert of_inputs[0] is not None
    assert backend.step(of_parameters) == (name != "nop")


def test_optimizers_by_name_and_frozen_experts() -> None:
    backend = registry.make_backend("ffn", optimizer="sgd", sizes=SMALL["ffn"])
    backend.prepare()
    assert isinstance(backend.optimizer, torch.optim.SGD)
    assert not registry.make_backend("ffn", optimizer=None, sizes=SMALL["ffn"]).trains
    with pytest.raises(ValueError, match="no optimizer named 'adamm'; there are adam"):
        registry.make_backend("ffn", optimizer="adamm", sizes=SMALL["ffn"])


def test_own_experts_by_import_path() -> None:
    module, _ = registry.build_module("tesseract_async.server.registry:linear", in_features=2)
    assert isinstance(module, torch.nn.Linear)
    for name in ("no such", "os:no_such", "no_such_module:x"):
        with pytest.raises(ValueError, match="no expert"):
            registry.build_module(name)


def test_names_are_unique() -> None:
    with pytest.raises(ValueError, match="exists already"):
        registry.register("ffn")(registry.nop)
