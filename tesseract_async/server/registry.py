"""Ready-made experts by name, for `tesseract serve` and for examples; own ones by import path.

A builder takes sizes and returns a module and the schema of its arguments::

    module, args_schema = build_module("ffn", in_features=64, hidden_features=256)
    backend = make_backend("ffn", in_features=64, learning_rate=1e-3)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Self

import numpy as np
import torch
from torch import nn

from tesseract_async.runtime.backend import BackendSettings, ExpertBackend
from tesseract_async.server.builders import EXPERTS as EXPERTS
from tesseract_async.server.builders import build, find_builder, register, takes_seed
from tesseract_async.wire.tensors import Schema, TensorSpec

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
}


def build_module(name: str, *, seed: int | None = None, **sizes: Any) -> tuple[nn.Module, tuple[Schema, ...]]:
    """A new module and its args_schema. `name` is registered, or ``package.module:builder``.

    `seed` decides its first weights, whatever was drawn before. Raises: ValueError for an unknown name, and for sizes
    that the builder does not take, or that do not fit this computer's memory.
    """
    return build(find_builder(name), sizes, name=name, seed=seed)


def draws_its_own(name: str) -> bool:
    """Whether the builder takes a ``seed``, and so may run on several threads at once, with one for each.

    Raises: ValueError for an unknown name.
    """
    return takes_seed(find_builder(name))


def make_backend(
    name: str,
    *,
    optimizer: str | None = "adam",
    learning_rate: float = 1e-3,
    max_batch_size: int = 4096,
    seed: int | None = None,
    sizes: Mapping[str, Any] | None = None,
    settings: BackendSettings | None = None,
    max_bytes: int | None = None,
) -> ExpertBackend:
    """A backend of `build_module(name, seed=seed, **sizes)`; ``optimizer=None`` freezes it.

    The optimizer is made when it is first needed. `max_bytes`: of the expert with gradients and optimizer, by default
    this computer's memory. Raises: as `build_module`, and ValueError for an unknown optimizer or such a rate.
    """
    states = num_states(optimizer)
    builder = find_builder(name)
    module, args_schema = build(builder, sizes or {}, name=name, seed=seed, max_bytes=max_bytes, num_states=states)
    parameters = list(module.parameters())
    made: Callable[[], torch.optim.Optimizer] | None = None
    if optimizer is not None and parameters:
        if optimizer not in OPTIMIZERS:
            raise ValueError(f"no optimizer named {optimizer!r}; there are {', '.join(OPTIMIZERS)}")
        if not 0 <= learning_rate < math.inf:
            raise ValueError(f"a learning rate is a finite number, 0 or more, not {learning_rate}")
        kind: Any = OPTIMIZERS[optimizer]
        made = partial(kind, parameters, lr=learning_rate, fused=True)  # one kernel for all: a third of the time
    return ExpertBackend(
        module,
        optimizer=made,
        args_schema=args_schema,
        max_batch_size=max_batch_size,
        settings=settings or BackendSettings(),
    )


def num_states(optimizer: str | None) -> int:
    """How many numbers a trained one brings with it: its gradient, and what the optimizer keeps."""
    return {None: 0, "sgd": 2}.get(optimizer, 3)


class _Linear(nn.Linear):
    """`nn.Linear` with the distribution of its usual first weights, drawn by `draw` in less than half of the time.

    A server of 16 wide experts draws 400 million of them before it can answer.
    """

    def reset_parameters(self) -> None:
        pass  # this is what would draw them, when it is made

    def draw(self, numbers: np.random.BitGenerator) -> Self:
        """Lets other threads run meanwhile. Returns this layer."""
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
