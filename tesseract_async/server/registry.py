"""Ready-made experts by name, for `tesseract serve` and for examples; own ones by import path.

A builder takes sizes and returns a module and the schema of its arguments::

    module, args_schema = build_module("ffn", in_features=64, hidden_features=256)
    backend = make_backend("ffn", in_features=64, learning_rate=1e-3)
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Self

import numpy as np
import torch
from torch import nn

from tesseract_async.runtime.backend import BackendSettings, ExpertBackend
from tesseract_async.wire.tensors import Schema, TensorSpec

Builder = Callable[..., tuple[nn.Module, tuple[Schema, ...]]]

EXPERTS: dict[str, Builder] = {}
OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
}


def register(name: str) -> Callable[[Builder], Builder]:
    """Decorates a builder, so that `build_module` finds it by `name`."""

    def decorate(builder: Builder) -> Builder:
        if name in EXPERTS:
            raise ValueError(f"an expert named {name!r} exists already")
        EXPERTS[name] = builder
        return builder

    return decorate


def build_module(name: str, *, seed: int | None = None, **sizes: Any) -> tuple[nn.Module, tuple[Schema, ...]]:
    """A new module and its args_schema. `name` is registered, or ``package.module:builder``.

    `seed` decides its first weights, whatever was drawn before. Raises: ValueError for an unknown name; TypeError for
    sizes that the builder does not take.
    """
    builder = _find(name)
    if seed is None:
        return builder(**sizes)
    if draws_its_own(name):
        return builder(seed=seed, **sizes)
    with torch.random.fork_rng(devices=[]):  # the caller's own random numbers are not ours to change
        torch.manual_seed(seed)
        return builder(**sizes)


def draws_its_own(name: str) -> bool:
    """Whether the builder takes a ``seed``, and so may run on several threads at once, with one for each.

    Raises: ValueError for an unknown name.
    """
    return "seed" in inspect.signature(_find(name)).parameters


def _find(name: str) -> Builder:
    builder = EXPERTS.get(name)
    if builder is None:
        path, separator, attribute = name.partition(":")
        if not separator:
            raise ValueError(f"no expert named {name!r}; there are {', '.join(sorted(EXPERTS))}, and module:builder")
        try:
            builder = getattr(importlib.import_module(path), attribute)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"no expert at {name!r}: {error}") from error
    if not callable(builder):
        raise ValueError(f"no expert at {name!r}: that is no function that builds one, but a {type(builder).__name__}")
    return builder


def make_backend(
    name: str,
    *,
    optimizer: str | None = "adam",
    learning_rate: float = 1e-3,
    max_batch_size: int = 4096,
    seed: int | None = None,
    sizes: Mapping[str, Any] | None = None,
    settings: BackendSettings | None = None,
) -> ExpertBackend:
    """A backend of `build_module(name, seed=seed, **sizes)`; ``optimizer=None`` freezes it.

    The optimizer is made when it is first needed. Raises: as `build_module`.
    """
    module, args_schema = build_module(name, seed=seed, **(sizes or {}))
    parameters = list(module.parameters())
    made: Callable[[], torch.optim.Optimizer] | None = None
    if optimizer is not None and parameters:
        if optimizer not in OPTIMIZERS:
            raise ValueError(f"no optimizer named {optimizer!r}; there are {', '.join(OPTIMIZERS)}")
        if learning_rate < 0:
            raise ValueError(f"a learning rate is 0 or more, not {learning_rate}")
        kind: Any = OPTIMIZERS[optimizer]
        made = partial(kind, parameters, lr=learning_rate, fused=True)  # one kernel for all: a third of the time
    return ExpertBackend(
        module,
        optimizer=made,
        args_schema=args_schema,
        max_batch_size=max_batch_size,
        settings=settings or BackendSettings(),
    )


class _Linear(nn.Linear):
    """`nn.Linear` with the distribution of its usual first weights, drawn by `draw` in less than half of the time.

    A server of 16 wide experts draws 400 million of them before it can answer.
    """

    def reset_parameters(self) -> None:
        pass  # this is what would draw them, when it is made

    def draw(self, numbers: np.random.BitGenerator) -> Self:
        """Lets other threads run meanwhile. Returns this layer."""
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
    """`FeedForward`; 4 x wider inside, and as wide outside as inside by default."""
    hidden = hidden_features or 4 * in_features
    module = FeedForward(in_features, hidden, out_features or in_features, seed=seed)
    return module, (TensorSpec((in_features,)),)


@register("transformer")
def transformer(
    in_features: int = 512, num_heads: int = 8, sequence_length: int = 128, dropout: float = 0.0
) -> tuple[nn.Module, tuple[Schema, ...]]:
    """One pre-norm transformer encoder layer over [rows, sequence_length, in_features]."""
    layer = nn.TransformerEncoderLayer(
        in_features, num_heads, 4 * in_features, dropout=dropout, batch_first=True, norm_first=True, activation="gelu"
    )
    return layer, (TensorSpec((sequence_length, in_features)),)


@register("linear")
def linear(in_features: int = 1024, out_features: int | None = None) -> tuple[nn.Module, tuple[Schema, ...]]:
    """One `nn.Linear`."""
    return nn.Linear(in_features, out_features or in_features), (TensorSpec((in_features,)),)


@register("nop")
def nop(in_features: int = 1024) -> tuple[nn.Module, tuple[Schema, ...]]:
    """Returns its input: measures everything but the computing."""
    return nn.Identity(), (TensorSpec((in_features,)),)
