"""Experts and optimizers by name, for `tesseract serve`, runs and examples.

::

    module, args_schema = build_module("ffn", {"in_features": 64, "hidden_features": 256})
    backend = make_backend("ffn", sizes={"in_features": 64}, learning_rate=1e-3)
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final, Self

import numpy as np
import torch
from torch import nn

from tesseract_async.experts.run import Scalar
from tesseract_async.runtime.backend import BackendSettings, ExpertBackend, MakesOptimizer, MakesScheduler
from tesseract_async.server.builders import EXPERTS as EXPERTS
from tesseract_async.server.builders import Built as Built
from tesseract_async.server.builders import build_all as build_all
from tesseract_async.server.builders import build_module as build_module
from tesseract_async.server.builders import expert_builder as expert_builder
from tesseract_async.server.builders import register as register
from tesseract_async.server.builders import signature_of
from tesseract_async.wire.tensors import Schema, TensorSpec

if TYPE_CHECKING:
    from tesseract_async.runtime.mesh import Spread

OPTIMIZERS: Final[Mapping[str, Callable[..., torch.optim.Optimizer]]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
}
OWN_BUSINESS: Final = frozenset({"fused", "foreach", "capturable", "differentiable", "params"})
"""Arguments of optimizers that cannot be given by name: they say only how a computer computes the same numbers."""
BETAS: Final = ("beta1", "beta2")
"""Adam's ``betas``, as plain values."""


def make_backend(
    name: str,
    *,
    optimizer: str | None = "adam",
    learning_rate: float = 1e-3,
    optimizer_options: Mapping[str, Scalar] | None = None,
    scheduler: MakesScheduler | None = None,
    max_batch_size: int = 4096,
    seed: int | None = None,
    sizes: Mapping[str, Scalar] | None = None,
    settings: BackendSettings | None = None,
    max_bytes: int | None = None,
    spread: Spread | None = None,
) -> ExpertBackend:
    """Return a backend of `build_module(name, sizes, seed=seed)`; ``optimizer=None`` freezes it.

    The optimizer, with `optimizer_options` besides its learning rate, is made when it is first needed. `max_bytes`: of
    the expert with gradients and optimizer, by default this computer's memory. `spread`: over which processes.
    Raises: as `build_module` and `optimizer_maker`.
    """
    options = {"learning_rate": learning_rate, **(optimizer_options or {})}
    return backend_of(
        functools.partial(build_module, name, sizes or {}, seed=seed, max_bytes=max_bytes, optimizer=optimizer),
        optimizer=None if optimizer is None else (optimizer, options),
        scheduler=scheduler,
        max_batch_size=max_batch_size,
        settings=settings or BackendSettings(),
        spread=spread,
    )


def backend_of(
    build: Callable[[], Built],
    *,
    optimizer: tuple[str, Mapping[str, Scalar]] | None,
    scheduler: MakesScheduler | None = None,
    max_batch_size: int,
    settings: BackendSettings,
    spread: Spread | None,
    like: ExpertBackend | None = None,
) -> ExpertBackend:
    """Return the backend of what `build` returns, in this process or spread over several.

    `optimizer`: its name and options. `like`: one with the same settings whose module differs in numbers only, which
    spares looking at this one. Raises: as `optimizer_maker`, `ExpertBackend`, `MeshBackend`, `build`.
    """
    if spread is not None:
        from tesseract_async.runtime.mesh import MeshBackend  # torch.distributed takes its time

        def make(module: nn.Module) -> torch.optim.Optimizer:
            assert optimizer is not None and (maker := optimizer_maker(optimizer[0], module, optimizer[1])) is not None
            return maker()

        return MeshBackend(
            build,
            mesh=spread.mesh,
            plan=spread.plan,
            timeout=spread.timeout,
            optimizer=None if optimizer is None else make,
            scheduler=None if optimizer is None else scheduler,
            max_batch_size=max_batch_size,
            settings=settings,
        )
    module, args_schema = build()
    maker = None if optimizer is None else optimizer_maker(optimizer[0], module, optimizer[1])
    if like is not None:
        return like.another(module, optimizer=maker, scheduler=None if maker is None else scheduler)
    return ExpertBackend(
        module,
        optimizer=maker,
        scheduler=None if maker is None else scheduler,
        args_schema=args_schema,
        outputs_schema=getattr(module, "outputs_schema", None),  # few say so; the others are run once
        max_batch_size=max_batch_size,
        settings=settings,
    )


def optimizer_maker(name: str | None, module: nn.Module, options: Mapping[str, Scalar]) -> MakesOptimizer | None:
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
        signature_of(kind).bind(parameters, **given)
    except TypeError as error:
        raise ValueError(f"{name} does not take its options: {error}") from None
    return functools.partial(kind, parameters, **given)


class _Linear(nn.Linear):
    """`nn.Linear` with the distribution of its usual first weights, drawn by `draw` in less than half of the time: a
    server of 16 wide experts draws 400 million of them before it can answer."""

    def reset_parameters(self) -> None:
        pass  # this is what would draw them, when it is made

    def draw(self, numbers: np.random.BitGenerator) -> Self:
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
        self.hidden_features = hidden_features
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

    def tensor_plan(self, num_processes: int) -> dict[str, str]:
        """Return how `runtime.mesh_plans.tensor_parallel` divides it. Raises: ValueError if its width cannot be."""
        if self.hidden_features % num_processes:
            raise ValueError(f"{self.hidden_features} hidden features cannot be divided over {num_processes} processes")
        return {"layers.0": "columns", "layers.2": "rows", "layers.4": "gathered columns"}


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
    """Return one pre-norm transformer encoder layer over [rows, sequence_length, in_features]; 0: of any length."""
    layer = nn.TransformerEncoderLayer(
        in_features, num_heads, 4 * in_features, dropout=dropout, batch_first=True, norm_first=True, activation="gelu"
    )
    return layer, (TensorSpec((sequence_length or None, in_features)),)


class Block(nn.Module):
    """One pre-norm causal transformer block, whose queries, keys and values are layers of their own, which tensor
    parallelism divides by heads."""

    def __init__(self, in_features: int, num_heads: int) -> None:
        super().__init__()
        self.head_size = in_features // num_heads
        self.norm1, self.norm2 = nn.LayerNorm(in_features), nn.LayerNorm(in_features)
        self.q, self.k, self.v, self.o = (nn.Linear(in_features, in_features) for _ in range(4))
        self.up, self.down = nn.Linear(in_features, 4 * in_features), nn.Linear(4 * in_features, in_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [rows, positions, features] -> the same
        rows, positions, _ = x.shape
        y = self.norm1(x)
        # as many heads as are here
        q, k, v = (
            layer(y).view(rows, positions, -1, self.head_size).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).reshape(rows, positions, -1))
        z: torch.Tensor = x + self.down(nn.functional.gelu(self.up(self.norm2(x))))
        return z

    def tensor_plan(self, num_processes: int) -> dict[str, str]:
        """Return how `runtime.mesh_plans.tensor_parallel` divides it. Raises: ValueError if the heads cannot be."""
        num_heads = self.q.out_features // self.head_size
        if num_heads % num_processes:
            raise ValueError(f"{num_heads} heads cannot be divided over {num_processes} processes")
        return {name: "columns" for name in ("q", "k", "v", "up")} | {name: "rows" for name in ("o", "down")}


@register("block")
def block(
    in_features: int = 512, num_heads: int = 8, sequence_length: int = 128
) -> tuple[nn.Module, tuple[Schema, ...]]:
    """Return a causal transformer `Block` over [rows, sequence_length, in_features]; 0: of any length."""
    if in_features % num_heads:
        raise ValueError(f"{in_features} features cannot be divided over {num_heads} heads")
    return Block(in_features, num_heads), (TensorSpec((sequence_length or None, in_features)),)


@register("linear")
def linear(in_features: int = 1024, out_features: int | None = None) -> tuple[nn.Module, tuple[Schema, ...]]:
    return nn.Linear(in_features, out_features or in_features), (TensorSpec((in_features,)),)


@register("nop")
def nop(in_features: int = 1024) -> tuple[nn.Module, tuple[Schema, ...]]:
    """Return the identity, to measure everything but the computing."""
    return nn.Identity(), (TensorSpec((in_features,)),)
