"""Ready-made experts by name, and what is said of builders that return something else than they should."""

import pytest
import torch
from torch import nn

import tesseract_async as ta
from tesseract_async.server import registry

RESULTS = [None, nn.Linear(4, 4), (nn.Linear(4, 4),), ("module", ()), (1, 2, 3)]
SMALL: dict[str, dict[str, int]] = {
    "ffn": {"in_features": 8},
    "transformer": {"in_features": 8, "num_heads": 2, "sequence_length": 4},
    "block": {"in_features": 8, "num_heads": 2, "sequence_length": 4},
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
    module, _ = registry.build_module("tesseract_async.server.registry:linear", {"in_features": 2})
    assert isinstance(module, torch.nn.Linear)
    for name in ("no such", "os:no_such", "no_such_module:x"):
        with pytest.raises(ValueError, match="no expert"):
            registry.build_module(name, {})


def test_names_are_unique() -> None:
    with pytest.raises(ValueError, match="exists already"):
        registry.register("ffn")(registry.nop)


@pytest.mark.parametrize("name", ["ffn", "linear"])
def test_a_seed_decides_the_first_weights_and_nothing_else(name: str) -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    one, again, other = (registry.build_module(name, SMALL[name], seed=seed)[0].state_dict() for seed in (5, 5, 6))
    assert torch.equal(torch.rand(3), expected), "the caller's random numbers go on as if nothing had been drawn"
    assert all(torch.equal(one[key], again[key]) for key in one)
    assert not all(torch.equal(one[key], other[key]) for key in one)


def test_first_weights_are_distributed_as_those_of_a_linear_layer() -> None:
    module, _ = registry.build_module("ffn", {"in_features": 256, "hidden_features": 1024}, seed=3)
    usual = torch.nn.Linear(256, 1024).requires_grad_(False)
    for name, parameter in usual.named_parameters():
        drawn = dict(module.named_parameters())[f"layers.0.{name}"].detach()
        assert drawn.abs().max() <= 1 / 16
        assert drawn.mean().abs() < 0.005 and drawn.std() == pytest.approx(float(parameter.std()), rel=0.1)
    numbers = dict(module.named_parameters())["layers.0.weight"].flatten()
    assert len(numbers.unique()) > 0.95 * len(numbers), "no block is drawn twice"


def test_an_optimizer_is_made_when_it_is_first_needed() -> None:
    backend = registry.make_backend("ffn", sizes=SMALL["ffn"])
    x = torch.randn(5, 8)
    outputs = backend.forward([x])
    assert backend.trains and backend.optimizer is None, "answering needs none"
    _, of_parameters = backend.gradients([x], [torch.ones_like(output) for output in outputs])
    assert isinstance(backend.optimizer, torch.optim.Adam)
    assert backend.step(of_parameters) == 1


@ta.expert_builder
def returns(number: int = 0) -> object:  # type: ignore[arg-type]
    return RESULTS[number]


@pytest.mark.parametrize("number", range(len(RESULTS)))
def test_what_is_no_module_with_schemas_is_refused(number: int) -> None:
    with pytest.raises(ValueError, match=":returns returns a .*, not a module and the schemas of its arguments"):
        registry.build_module(f"{__name__}:returns", {"number": number}, marked=True)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("ffn", {"in_features": 8, "hidden_features": 50}),
        ("block", {"in_features": 12, "num_heads": 6, "sequence_length": 2}),
    ],
)
def test_what_tensor_parallelism_cannot_divide_is_said_before_it_is_tried(name: str, sizes: dict[str, int]) -> None:
    module, _ = registry.EXPERTS[name](**sizes)
    assert module.tensor_plan(2)
    with pytest.raises(ValueError, match="cannot be divided over 4 processes"):
        module.tensor_plan(4)
