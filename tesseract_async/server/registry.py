"""Ready-made experts and optimizers by name, for `tesseract serve`, runs and examples.

::

    module, args_schema = build_module("ffn", {"in_features": 64, "hidden_features": 256})
    backend = make_backend("ffn", sizes={"in_features": 64}, learning_rate=1e-3)
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Final, Self

import numpy as np
import torch
from torch import nn

from tesseract_async.experts.run import Value
from tesseract_async.runtime.backend import BackendSettings, ExpertBackend, MakesOptimizer
from tesseract_async.server.builders import EXPERTS as EXPERTS
from tesseract_async.server.builders import build_module as build_module
from tesseract_async.server.builders import register
from tesseract_async.wire.tensors import Schema, TensorSpec

OPTIMIZERS: Final[Mapping[str, Callable[..., torch.optim.Optimizer]]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
}
OWN_BUSINESS: Final = frozenset({"fused", "foreach", "capturable", "differentiable", "params"})
"""Arguments of optimizers that nobody gives by name: how a computer computes the same numbers."""
BETAS: Final = ("beta1", "beta2")
"""Adam's ``betas``, as plain values."""


def make_backend(
    name: str,
    *,
    optimizer: str | None = "adam",
    learning_rate: float = 1e-3,
    max_batch_size: int = 4096,
    seed: int | None = None,
    sizes: Mapping[str, Value] | None = None,
    settings: BackendSettings | None = None,
    max_bytes: int | None = None,
) -> ExpertBackend:
    """Return a backend of `build_module(name, sizes, seed=seed)`; ``optimizer=None`` freezes it.

    The optimizer is made when it is first needed. `max_bytes`: of the expert with gradients and optimizer, by default
    this computer's memory. Raises: as `build_module` and `optimizer_maker`.
    """
    module, args_schema = build_module(name, sizes or {}, seed=seed, max_bytes=max_bytes, optimizer=optimizer)
    return ExpertBackend(
        module,
        optimizer=optimizer_maker(optimizer, module, {"learning_rate": learning_rate}),
        args_schema=args_schema,
        max_batch_size=max_batch_size,
        settings=settings or BackendSettings(),
    )


def optimizer_maker(name: str | None, module: nn.Module, options: Mapping[str, Value]) -> MakesOptimizer | None:
    """Return what makes the optimizer of that name; None without a name, or for a module without parameters.

    `options` are plain values: ``learning_rate``, ``beta1`` and ``beta2``, and others by PyTorch's names. Raises:
    ValueError for an unknown optimizer, or options that it does not take.
    """
    parameters = list(module.parameters())
    if name is None or not parameters:
        return None
    if name not in OPTIMIZERS:
        raise ValueError(f"no optimizer named {name!r}; there are {', '.join(OPTIMIZERS)}")
    if wrong := [key for key, value in options.items() if key in OWN_BUSINESS or type(value) is str]:
        raise ValueError(f"{name} does not take its options: {', '.join(wrong)}")
    given: dict[str, object] = {key: value for key, value in options.items() if key not in BETAS}
    if "learning_rate" in given:
        rate = given["lr"] = given.pop("learning_rate")
        if not isinstance(rate, int | float) or not 0 <= rate < math.inf:
            raise ValueError(f"{name} does not take its options: a learning rate is a finite number, 0 or more")
    if any(key in options for key in BETAS):
        given["betas"] = (options.get("beta1", 0.9), options.get("beta2", 0.999))
    given.setdefault("fused", True)  # one kernel for all parameters: a third of the time on a CPU
    kind = OPTIMIZERS[name]
    try:
        inspect.signature(kind).bind(parameters, **given)
    except TypeError as error:
        raise ValueError(f"{name} does not take its options: {error}") from None
    return partial(kind, parameters, **given)


class _Linear(nn.Linear):
    """`nn.Linear` with the distribution of its usual first weights, drawn by `draw` in less than half of the time: a
    server of 16 wide experts draws 400 million of them before it can answer."""

    def reset_parameters(self) -> None:
        pass  # this is what would draw them, when it is made

    def draw(self, numbers: np.random.BitGenerator) -> Self:
        """Draw the weights; other threads run meanwhile. Returns this layer."""
        if self.weight.is_meta:
            return self
        bound = 1 / math.sqrt(self.in_features)
        for parameter in (self.weight, self.bias):
            for part in torch.split(parameter.detach().view(-1), 1 << 16):  # as many as stay in the cache
                drawn = numbers.random_raw((len(part) + 1) // 2).view(np.int32)[: len(part)]
                torch.mul(torch.from_numpy(drawn), bound / 2**31, out=part)
        return self


class FeedForward(nn.Module):
    """Two hidden layers, then a residual connection and layer norm where input and output are equally wide.

    The feed-forward expert of "Outrageously Large Neural Networks" (Shazeer et al. 2017) in hivemind's variant.
    """

    def __init__(self, in_features: int, hidden_features: int, out_features: int, *, seed: int | None = None) -> None:
        """`seed` decides the first weights; PyTorch's global generator does without it."""
        super().__init__()
        numbers = np.random.SFC64(int(torch.randint(2**62, ())) if seed is None else seed)
        self.layers = nn.Sequential(
            _Linear(in_features, hidden_features).draw(numbers),
            nn.GELU(),
            _Linear(hidden_features, hidden_features).draw(numbers),
            nn.GELU(),
            _Linear(hidden_features, out_features).draw(numbers),
        )
        self.norm = nn.LayerNorm(out_features) if in_features == out_features else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [rows, in] -> [rows, out]
        y: torch.Tensor = self.layers(x)
        return y if self.norm is None else self.norm(x + y)


@register("ffn")
def ffn(
    in_features: int = 1024,
    hidden_features: int | None = None,
    out_features: int | None = None,
    *,
    seed: int | None = None,
) -> tuple[nn.Module, tuple[Schema, ...]]:
    """Return a `FeedForward`; by default 4 x wider inside, and as wide at its end as at its beginning."""
    hidden = hidden_features or 4 * in_features
    module = FeedForward(in_features, hidden, out_features or in_features, seed=seed)
    return module, (TensorSpec((in_features,)),)


@register("transformer")
def transformer(
    in_features: int = 512, num_heads: int = 8, sequence_length: int = 128, dropout: float = 0.0
) -> tuple[nn.Module, tuple[Schema, ...]]:
    """Return one pre-norm transformer encoder layer over [rows, sequence_length, in_features]."""
    layer = nn.TransformerEncoderLayer(
        in_features, num_heads, 4 * in_features, dropout=dropout, batch_first=True, norm_first=True, activation="gelu"
    )
    return layer, (TensorSpec((sequence_length, in_features)),)


@register("linear")
def linear(in_features: int = 1024, out_features: int | None = None) -> tuple[nn.Module, tuple[Schema, ...]]:
    """Return one `nn.Linear`."""
    return nn.Linear(in_features, out_features or in_features), (TensorSpec((in_features,)),)


@register("nop")
def nop(in_features: int = 1024) -> tuple[nn.Module, tuple[Schema, ...]]:
    """Return the identity, to measure everything but the computing."""
    return nn.Identity(), (TensorSpec((in_features,)),)
