"""Steps of experts whose one trainer has them step together, as if their parameters were its own.

A backward of such an expert (`BackendSettings.lockstep`) only adds to what was gathered. A step is then taken by all of
a server's experts of one grid; those without gradients step on zeros: with an optimizer that treats each number alone,
that equals one optimizer over all of them. Their versions count the steps of all, and are the *round*.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Final

import torch

from tesseract_async.runtime.backend import ExpertBackend
from tesseract_async.runtime.gradients import Gradients
from tesseract_async.runtime.stepping import rule_of, take_steps

_AT_ONCE: Final = 64 << 20
"""Bytes of parameters that are stepped in one computation: their scaled gradients are held meanwhile."""


def round_of(backends: Mapping[str, ExpertBackend]) -> int:
    """Return the round that all of these are in. Raises: ValueError, which names two of different ones."""
    (low, first), *_ = ordered = sorted((backend.version, uid) for uid, backend in backends.items())
    high, last = ordered[-1]
    if low != high:
        raise ValueError(f"{first} has taken {low} steps and {last} {high}: begin from a save point of all")
    return low


def squared_norm(backends: Sequence[ExpertBackend]) -> float:
    """Return the square of the norm of all gradients that were gathered."""
    return math.fsum(backend.norm_of(found) ** 2 for backend in backends if (found := backend.gathered) is not None)


def clear(backends: Sequence[ExpertBackend]) -> None:
    for backend in backends:
        backend.take_gathered()


def step(backends: Mapping[str, ExpertBackend], number: int, optimizer: str, options: Mapping[str, float]) -> None:
    """Have all experts in round `number` take their step; those that are one round further have taken it before.

    `options`: ``lr``, and others by PyTorch's names (``beta1`` and ``beta2`` for ``betas``), replace the experts' own;
    ``scale`` multiplies the gradients, and ``limit`` bounds the size of each number in them. `optimizer`: its name,
    where the trainer says it.

    Raises: ValueError, before anything was changed, for another round, an unknown or impossible option, another
    optimizer or one that does not treat each number alone. Raises what optimizers raise.
    """
    due: list[ExpertBackend] = []
    for uid, backend in backends.items():
        if backend.version not in (number, number + 1):
            raise ValueError(f"{uid} has taken {backend.version} steps, and its trainer {number}")
        if backend.version == number:
            _check(uid, backend, optimizer, options)
            due.append(backend)
    scale, limit = options.get("scale", 1.0), options.get("limit", math.inf)
    if not all(math.isfinite(value) for name, value in options.items() if name != "limit") or not limit >= 0:
        raise ValueError("the settings of this step are not finite")
    if not all(0 <= options.get(name, 0.0) < 1 for name in ("beta1", "beta2")):
        raise ValueError("the betas of this step are not between 0 and 1")
    for backend in due:
        _set(backend, options)
    for _, alike in groupby(_chunks(due), key=lambda one: one[0]):
        found = [backend for _, backend in alike]
        zeros: dict[tuple[torch.Size, torch.dtype, torch.device], torch.Tensor] = {}
        gradients = [_changed(backend, scale, limit, zeros) for backend in found]
        take_steps([one.optimizer for one in found if one.optimizer is not None], gradients, None)
        for backend in found:
            backend.end_lockstep()


def _check(uid: str, backend: ExpertBackend, optimizer: str, options: Mapping[str, float]) -> None:
    backend.prepare()
    own = backend.optimizer
    if own is None:
        raise ValueError(f"{uid} is frozen: it takes no steps")
    kind = type(own).__name__
    if rule_of(own) is None:
        raise ValueError(f"{kind} of {uid} does not treat each number alone: SGD, Adam and AdamW do")
    if optimizer and optimizer != kind.lower():
        raise ValueError(f"{uid} is trained with {kind} and the rest of the model with {optimizer}: take one for both")
    known = {"scale", "limit", *(() if "betas" not in own.defaults else ("beta1", "beta2")), *own.defaults}
    if unknown := [name for name in options if name not in known]:
        raise ValueError(f"{kind} of {uid} has no {', '.join(unknown)}")


def _set(backend: ExpertBackend, options: Mapping[str, float]) -> None:
    assert backend.optimizer is not None
    for group in backend.optimizer.param_groups:
        group |= {name: value for name, value in options.items() if name in group}
        if "betas" in group:
            first, second = group["betas"]
            group["betas"] = (options.get("beta1", first), options.get("beta2", second))


def _chunks(backends: Sequence[ExpertBackend]) -> list[tuple[tuple[object, int], ExpertBackend]]:
    """Return each expert with a key that is equal for those that are stepped at once."""
    ordered = sorted(((str(rule_of(one.optimizer)), one) for one in backends if one.optimizer), key=lambda one: one[0])
    found: list[tuple[tuple[object, int], ExpertBackend]] = []
    total = 0
    for rule, backend in ordered:
        found.append(((rule, total // _AT_ONCE), backend))
        total += sum(x.nbytes for x in backend.parameters)
    return found


def _changed(
    backend: ExpertBackend,
    scale: float,
    limit: float,
    zeros: dict[tuple[torch.Size, torch.dtype, torch.device], torch.Tensor],
) -> Gradients:
    found: Gradients = backend.take_gathered() or [None] * len(backend.parameters)
    if limit < math.inf:
        found = [None if x is None else x.clamp(-limit, limit) for x in found]
    return [
        zeros.setdefault((like.shape, like.dtype, like.device), torch.zeros_like(like))
        if x is None
        else x
        if scale == 1.0
        else x * scale
        for x, like in zip(found, backend.parameters, strict=True)
    ]
