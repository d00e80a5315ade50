"""Experts and optimizers by name, for `tesseract serve`, runs and examples, and the functions that build experts.

::

    module, args_schema = build_module("ffn", {"in_features": 64, "hidden_features": 256})
    backend = make_backend("ffn", sizes={"in_features": 64}, learning_rate=1e-3)

A builder takes sizes and returns a module and the schema of its arguments. Sizes may come from strangers: they are
compared with the builder's signature, and the expert is built on PyTorch's ``meta`` device first, where nothing
takes memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib
import inspect
import logging
import math
import os
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Final, Self, TypeVar

import numpy as np
import psutil
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from tesseract_async.errors import describe
from tesseract_async.experts.run import Scalar
from tesseract_async.runtime.backend import BackendSettings, ExpertBackend, MakesOptimizer, MakesScheduler
from tesseract_async.server.footprint import Counting, OutOfBudget, size_text
from tesseract_async.wire.tensors import Schema, TensorSpec

if TYPE_CHECKING:
    from tesseract_async.runtime.mesh import Spread

logger = logging.getLogger(__name__)

Built = tuple[nn.Module, tuple[Schema, ...]]
"""A module and the schemas of its arguments."""
Builder = Callable[..., Built]
Expert = TypeVar("Expert")

EXPERTS: Final[dict[str, Builder]] = {}
_MARKED: Final[dict[str, Builder]] = {}

MAX_REASON: Final = 200
"""Characters of a builder's own error: PyTorch's may be pages."""
NUM_PLANNED_ROWS: Final = 4
"""Rows of the planned call: at least as many as a backend's first look at its module takes."""

OPTIMIZERS: Final[Mapping[str, Callable[..., torch.optim.Optimizer]]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
}
OWN_BUSINESS: Final = frozenset({"fused", "foreach", "capturable", "differentiable", "params"})
"""Arguments of optimizers that nobody gives by name: how a computer computes the same numbers."""
BETAS: Final = ("beta1", "beta2")
"""Adam's ``betas``, as plain values."""


def register(name: str) -> Callable[[Builder], Builder]:
    """Decorate a builder, so that `build_module` finds it by `name`. Raises: ValueError if there is one."""

    def decorate(builder: Builder) -> Builder:
        if name in EXPERTS:
            raise ValueError(f"an expert named {name!r} exists already")
        EXPERTS[name] = builder
        return builder

    return decorate


def expert_builder(builder: Builder) -> Builder:
    """Mark a function of your module as one that a run may name, as ``module:function``.

    The function takes sizes (numbers, text, truth values) as named arguments and returns a module and the schemas of
    its arguments. Volunteers that allow your module (``--allow-module``) run it with sizes that the run's author chose:
    nothing else of the module can be named. It is called on PyTorch's ``meta`` device first, to see what it takes.

    Raises: TypeError for anything but a function at the top level of a module, ValueError for a private name.
    """
    if not inspect.isfunction(builder) or builder.__qualname__ != builder.__name__:
        raise TypeError(f"an expert's builder is a function at the top of its module, not {builder!r}")
    if builder.__name__.startswith("_"):
        raise ValueError(f"an expert's builder has a public name, not {builder.__name__}")
    _MARKED[f"{builder.__module__}:{builder.__name__}"] = builder
    return builder


def find_builder(name: str, *, marked: bool = False) -> Builder:
    """Return the builder of a registered name, or of ``package.module:function``.

    `marked`: of those by import path, only what `expert_builder` marked there. Raises: ValueError.
    """
    if (builder := EXPERTS.get(name)) is not None:
        return builder
    path, separator, attribute = name.partition(":")
    if not separator:
        raise ValueError(f"no expert named {name!r}; there are {', '.join(sorted(EXPERTS))}, and module:builder")
    try:
        builder = getattr(importlib.import_module(path), attribute)
    except Exception as error:  # the module is its author's: it may raise anything
        raise ValueError(f"no expert at {name!r}: {describe(error)}") from error
    if marked and (_MARKED.get(name) is not builder or builder is None):
        raise ValueError(
            f"{name} is no builder of experts: in {path}, @ta.expert_builder marks those that a run may name"
        )
    if not callable(builder):
        raise ValueError(f"no expert at {name!r}: that is no function that builds one, but a {type(builder).__name__}")
    found: Builder = builder
    return found


def takes_seed(builder: Builder) -> bool:
    """Return whether the builder draws its weights from a ``seed``, and so may run on several threads at once."""
    return "seed" in _signature(builder).parameters


def build_module(
    name: str,
    sizes: Mapping[str, object],
    *,
    seed: int | None = None,
    marked: bool = False,
    max_bytes: int | None = None,
    optimizer: str | None = None,
) -> Built:
    """Return a new module and its args_schema, once its sizes are known to fit.

    `name` is registered, or ``package.module:builder``; `marked` as for `find_builder`. `seed` decides the first
    weights, whatever was drawn before. `max_bytes`: of the expert, with its gradients and that optimizer's state; by
    default this computer's memory.

    Raises: ValueError for an unknown name, sizes that the builder does not take, too large ones, or a result that is no
    builder's.
    """
    builder = find_builder(name, marked=marked)
    _check_sizes(builder, sizes, name)
    limit = int(psutil.virtual_memory().total) if max_bytes is None else max_bytes
    num_states = {None: 0, "sgd": 2}.get(optimizer, 3)  # numbers for each trained one: its gradient, and the state
    plan = builder, tuple(sorted(sizes.items())), name, limit, num_states
    try:
        is_planned = _check_plan(*plan)
    except TypeError:  # a size that cannot be hashed: not from a manifest
        is_planned = _check_plan.__wrapped__(*plan)
    with contextlib.nullcontext() if is_planned else Counting(limit):
        return _checked(_call(builder, sizes, name, seed), name)


async def build_all(
    name: str, uids: Sequence[str], build: Callable[[str], Expert], *, on_built: Callable[[], None]
) -> dict[str, Expert]:
    """Build many experts of the class `name`, on all cores where the class takes a seed; call `on_built` after each.

    Meanwhile the event loop is free where the class takes a seed. Raises: ValueError as `build` does.
    """
    if ":" in name or not takes_seed(find_builder(name)):
        return {uid: build(uid) for uid in uids}
    limit = asyncio.Semaphore(os.cpu_count() or 1)

    async def build_one(uid: str) -> Expert:
        async with limit:
            built = await asyncio.to_thread(build, uid)
        on_built()
        return built

    try:
        async with asyncio.TaskGroup() as group:
            tasks = {uid: group.create_task(build_one(uid)) for uid in uids}
    except* ValueError as errors:
        raise errors.exceptions[0] from None
    return {uid: task.result() for uid, task in tasks.items()}


def _checked(built: object, name: str) -> Built:
    if not (isinstance(built, tuple) and len(built) == 2 and isinstance(built[0], nn.Module)):
        raise ValueError(f"{name} returns a {type(built).__name__}, not a module and the schemas of its arguments")
    return built


@functools.lru_cache(maxsize=64)
def _signature(builder: Callable[..., object]) -> inspect.Signature:
    try:
        return inspect.signature(builder)
    except (TypeError, ValueError):  # some of C have none
        return inspect.Signature()


def _check_sizes(builder: Builder, sizes: Mapping[str, object], name: str) -> None:
    parameters = {
        key: one
        for key, one in _signature(builder).parameters.items()
        if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY) and key != "seed"
    }
    known = f"it takes {', '.join(parameters)}" if parameters else "it takes none"
    takes_any = any(one.kind is one.VAR_KEYWORD for one in _signature(builder).parameters.values())
    if not takes_any and (unknown := [key for key in sizes if key not in parameters]):
        raise ValueError(f"{name} takes no size {', '.join(unknown)}; {known}")
    if missing := [key for key, one in parameters.items() if one.default is one.empty and key not in sizes]:
        raise ValueError(f"{name} needs the size {', '.join(missing)}; {known}")
    try:
        hints = typing.get_type_hints(builder)
    except Exception:  # hints that cannot be resolved: anything goes
        hints = {}
    for key, value in sizes.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name}: {key} is a finite number, not {value}")
        if type(value) is int and not -(2**63) <= value < 2**63:
            raise ValueError(f"{name}: {key} is too large a number")
        if key in hints and not _fits(value, hints[key]):
            kind = getattr(hints[key], "__name__", str(hints[key]))
            raise ValueError(f"{name}: {key} is {_WORDS.get(kind, kind)}, not {value!r}")
        if builder in EXPERTS.values() and type(value) is int and value < 1:
            raise ValueError(f"{name}: {key} is a whole number of 1 or more, not {value}")


_WORDS: Final = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}


def _fits(value: object, hint: object) -> bool:
    """Return whether a plain value may be given where this is annotated; what is no plain type takes anything."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in typing.get_args(hint))
    if hint is types.NoneType:
        return value is None
    if hint is float:
        return type(value) in (int, float)
    return type(value) is hint if hint in (int, bool, str) else True


@functools.lru_cache(maxsize=256)
def _check_plan(
    builder: Builder, sizes: tuple[tuple[str, object], ...], name: str, limit: int, num_states: int
) -> bool:
    """Build it on ``meta``, and run a few rows through it there. False if it cannot be built there.

    Raises: ValueError if it takes more than `limit` bytes, or rows of no numbers.
    """
    what = f"{name} with {', '.join(f'{key}={value}' for key, value in sizes) or 'its own sizes'}"
    seed = {"seed": 0} if takes_seed(builder) else {}
    try:
        with torch.device("meta"), Counting(limit) as counting:
            try:
                module, schemas = _checked(builder(**dict(sizes), **seed), name)
                found = [one for one in tree_leaves(schemas) if isinstance(one, TensorSpec)]
                specs = [one.sized(one.max_size) for one in found]
            except OutOfBudget:
                raise
            except Exception as error:  # it may look at numbers, which ``meta`` does not have
                logger.info("%s cannot be built on meta: %s", what, describe(error))
                return False
            counting.add(num_states * sum(one.nbytes for one in module.parameters() if one.requires_grad))
            if any(size is not None and size < 1 for spec in specs for size in spec.shape):
                raise ValueError(f"{what} takes rows of no numbers")
            rows = [torch.empty(NUM_PLANNED_ROWS, *spec.least_shape, dtype=spec.dtype) for spec in specs]
            try:
                module.eval()(*rows)
            except OutOfBudget:
                raise
            except Exception as error:  # a schema of another structure, or again what ``meta`` does not have
                logger.info("%s does not run on meta: %s", what, describe(error))
    except OutOfBudget as error:
        raise ValueError(f"{what} takes {error} or more; here it may take {size_text(limit)}") from None
    return True


def _call(builder: Builder, sizes: Mapping[str, object], name: str, seed: int | None) -> Built:
    try:
        if seed is None:
            return builder(**sizes)
        if takes_seed(builder):
            return builder(seed=seed, **sizes)
        with torch.random.fork_rng(devices=[]):  # the caller's own random numbers are not ours to change
            torch.manual_seed(seed)
            return builder(**sizes)
    except Exception as error:  # a stranger's builder may raise anything
        given = ", ".join(f"{key}={value}" for key, value in sizes.items()) or "its own sizes"
        reason = describe(error).partition("\n")[0][:MAX_REASON]
        raise ValueError(f"{name} cannot be built with {given}: {reason}") from error


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
        _signature(kind).bind(parameters, **given)
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
