"""Functions that build experts, by name or by import path, and the checks of their arguments.

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
from typing import Final, TypeVar

import psutil
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from tesseract_async.errors import describe
from tesseract_async.server.footprint import Counting, OutOfBudget, size_text
from tesseract_async.wire.tensors import Schema, TensorSpec

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
    nothing else of the module can be named. It is called on PyTorch's ``meta`` device first, to see how much memory it
    takes.

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

    `marked`: of builders by import path, only those that `expert_builder` marked are found. Raises: ValueError.
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
    return "seed" in signature_of(builder).parameters


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

    `name` is registered, or ``package.module:builder``; `marked` as for `find_builder`. `seed` alone decides the first
    weights, whatever was drawn before. `max_bytes`: of the expert, with its gradients and that optimizer's state; by
    default this computer's memory.

    Raises: ValueError for an unknown name, sizes that the builder does not take, too large ones, or a result that no
    builder may return.
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
def signature_of(builder: Callable[..., object]) -> inspect.Signature:
    try:
        return inspect.signature(builder)
    except (TypeError, ValueError):  # some of C have none
        return inspect.Signature()


def _check_sizes(builder: Builder, sizes: Mapping[str, object], name: str) -> None:
    parameters = {
        key: one
        for key, one in signature_of(builder).parameters.items()
        if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY) and key != "seed"
    }
    known = f"it takes {', '.join(parameters)}" if parameters else "it takes none"
    takes_any = any(one.kind is one.VAR_KEYWORD for one in signature_of(builder).parameters.values())
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
    """Return whether a plain value may be given for this annotation; an annotation that is not a plain type takes any
    value."""
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
