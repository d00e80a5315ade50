"""Experts that step together equal one optimizer over all of their parameters."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from tesseract_async.runtime import lockstep
from tesseract_async.runtime.backend import BackendSettings, ExpertBackend
from tesseract_async.wire.tensors import TensorSpec

Makes = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
RULES: dict[str, Makes] = {
    "adamw": lambda own: torch.optim.AdamW(own, lr=0.5, weight_decay=0.01),
    "sgd": lambda own: torch.optim.SGD(own, lr=0.5, momentum=0.9),
}


def make(slab: torch.Tensor, rule: Makes) -> dict[str, ExpertBackend]:
    """Experts whose weights are views of one tensor."""
    found = {}
    for index, own in enumerate(slab):
        module = nn.Linear(4, 4, bias=False)
        module.weight = nn.Parameter(own)
        found[f"ffn.{index}"] = ExpertBackend(
            module,
            optimizer=lambda module=module: rule(list(module.parameters())),  # type: ignore[misc]
            args_schema=(TensorSpec((4,)),),
            settings=BackendSettings(lockstep=True),
        )
    return found


def backward(backend: ExpertBackend, rows: int, seed: int) -> None:
    x = torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed))
    backend.step(backend.gradients([x], [torch.ones(rows, 4)])[1], [bytes(15) + bytes([seed])])


@pytest.mark.parametrize("name", RULES)
def test_all_step_as_one_optimizer_would_idle_ones_too(name: str) -> None:
    slab = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(0))
    whole = nn.Parameter(slab.clone())
    backends, optimizer = make(slab, RULES[name]), RULES[name]([whole])
    optimizer.param_groups[0]["lr"] = 0.1
    for number in range(4):
        for seed in (number, number + 9):  # two backwards make a step
            backward(backends[f"ffn.{seed % 2}"], 2 + seed % 3, seed)
            x = torch.randn(2 + seed % 3, 4, generator=torch.Generator().manual_seed(seed))
            nn.functional.linear(x, whole[seed % 2]).sum().backward()
        assert whole.grad is not None
        norm = whole.grad.norm()
        assert lockstep.squared_norm(list(backends.values())) == pytest.approx(float(norm) ** 2)
        whole.grad.clamp_(-0.5, 0.5)
        whole.grad *= 0.3
        optimizer.step()
        optimizer.zero_grad()
        for _ in range(2):  # a trainer that did not hear the answer asks again
            lockstep.step(backends, number, name, {"lr": 0.1, "limit": 0.5, "scale": 0.3})
        assert torch.allclose(slab, whole, atol=1e-6) and not torch.equal(slab[2], torch.zeros(4, 4))
        assert lockstep.round_of(backends) == number + 1
        assert not any(backend.applied for backend in backends.values())


def test_what_is_wrong_changes_nothing() -> None:
    slab = torch.ones(2, 4, 4)
    backends = make(slab, RULES["adamw"])
    for arguments, reason in (
        ((1, "adamw", {}), "taken 0 steps, and its trainer 1"),
        ((0, "sgd", {}), "with AdamW and the rest of the model with sgd"),
        ((0, "adamw", {"momentum": 0.9}), "has no momentum"),
        ((0, "adamw", {"scale": float("nan")}), "not finite"),
        ((0, "adamw", {"lr": float("nan")}), "not finite"),
        ((0, "adamw", {"limit": float("nan")}), "not finite"),
        ((0, "adamw", {"beta1": 1.0}), "betas"),
    ):
        with pytest.raises(ValueError, match=reason):
            lockstep.step(backends, *arguments)
    backends |= {f"x.{uid}": one for uid, one in make(torch.ones(1, 4, 4), lambda own: torch.optim.LBFGS(own)).items()}
    with pytest.raises(ValueError, match="LBFGS"):
        lockstep.step(backends, 0, "", {})
    assert torch.equal(slab, torch.ones(2, 4, 4)) and lockstep.round_of(backends) == 0


def test_gradients_can_be_forgotten_and_unequal_rounds_are_named() -> None:
    backends = make(torch.ones(2, 4, 4), RULES["sgd"])
    backward(backends["ffn.0"], 2, 1)
    lockstep.clear(list(backends.values()))
    assert lockstep.squared_norm(list(backends.values())) == 0
    lockstep.step({"ffn.0": backends["ffn.0"]}, 0, "", {})
    with pytest.raises(ValueError, match=r"ffn.1 has taken 0 steps and ffn.0 1"):
        lockstep.round_of(backends)
