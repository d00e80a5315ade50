"""Finds out what a module does besides computing its outputs, such as drawing random numbers or writing its inputs.

A *watched* call runs on copies of its inputs and sees each operation of this thread: it is reliable, and slow. The
first call in each mode is watched. After later ones two checks are made: where a default generator has moved in
training, which another thread may have done, the call is repeated, watched; where an input's version has risen, later
calls get copies.
"""

import functools
import logging
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self, TypeVar

import numpy as np
import torch
from torch import nn
from torch._ops import OpOverload
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tesseract_async.runtime.randomness import Operand, cuda, has_own_generator
from tesseract_async.wire.compression import flat_of

Result = TypeVar("Result")

logger = logging.getLogger(__name__)

_NUM_TRIALS = 4


@dataclass(slots=True)
class Habits:
    """The habits of a module in one mode, training or evaluation."""

    known: bool = False
    """True once it was watched."""
    draws: bool = False
    draws_others: bool = False
    """True if it seems to draw from Python's or NumPy's generators."""
    writes: bool = False


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A context for one call of a module with `inputs`, which are used for nothing else."""

    def __init__(self, inputs: Sequence[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.draws = False
        self.writes = False
        self._storages = {x.untyped_storage()._cdata for x in inputs}
        self._own_generator = False
        self._is_seeded: bool | None = None
        self._before = generator_states()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        # one that seeds the generators itself and puts them back afterwards is not random
        self.draws = self._own_generator or (self.draws and (not self._is_seeded or have_moved(self._before)))

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: Sequence[Operand] = (), kwargs: Mapping[str, Operand] | None = None
    ) -> Operand:
        kwargs = kwargs or {}
        for index, name in _written(func):
            value = args[index] if index < len(args) else kwargs.get(name)
            for x in tree_leaves(value):
                if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata in self._storages:
                    self.writes = True
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        # an operation of this kind may also draw nothing: attention without dropout
        before = generator_states()
        if self._is_seeded is None:
            self._is_seeded = have_moved(self._before)
        result = func(*args, **kwargs)
        self._own_generator = self._own_generator or has_own_generator(kwargs)
        self.draws = self.draws or have_moved(before)
        return result

    def learn(self, habits: Habits, given: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor], who: str) -> None:
        """Note the habits after the call, which was run on `given`, copies of `inputs`."""
        # through NumPy's eyes, for example, inputs are written without an operation
        self.writes = self.writes or not all(map(_same_bytes, given, inputs))
        if self._own_generator:
            logger.warning(
                "%s draws from a generator of its own: unless it seeds that in each call, its backward pass draws "
                "others than its forward pass; let it draw from PyTorch's default generators",
                who,
            )
        habits.known, habits.draws, habits.writes = True, self.draws, self.writes


def call_watched(
    call: Callable[[Sequence[torch.Tensor]], Result],
    inputs: Sequence[torch.Tensor],
    habits: Habits,
    who: str,
    *,
    is_alone: bool = False,
) -> Result:
    """Call a module, which `who` names, with copies of `inputs`, and learn its `habits`. Raises what it raises.

    `is_alone`: the module is only tried out, so that it may be called again to see whether it draws from Python's or
    NumPy's generators. Other threads draw from them, too: a module that does so moves them in every call.
    """
    given = copies(inputs)
    others_before = _other_states() if is_alone else None
    watch = Watch(given)
    try:
        with watch:
            result = call(given)
    except (NotImplementedError, RuntimeError):
        # some operations, such as torch.cond, do not run while they are watched: they are judged from outside
        _forget_compiled()
        before = generator_states()
        result = call(copies(inputs))
        habits.known, habits.draws, habits.writes = True, have_moved(before), True
        return result
    _forget_compiled()
    watch.learn(habits, given, inputs, who)
    has_moved = is_alone and others_before != _other_states()
    if has_moved and all(_moves_others(call, inputs) for _ in range(_NUM_TRIALS)):
        habits.draws_others = True
        logger.warning(
            "%s draws, it seems, from Python's or NumPy's random numbers, which are not repeated in its backward pass: "
            "gradients may be of another function; let it draw from PyTorch",
            who,
        )
    return result


def _moves_others(call: Callable[[Sequence[torch.Tensor]], object], inputs: Sequence[torch.Tensor]) -> bool:
    before = _other_states()
    call(copies(inputs))
    return before != _other_states()


def _forget_compiled() -> None:
    """Let PyTorch's compiler look again at what it has seen watched."""
    if (compiler := sys.modules.get("torch._dynamo")) is not None:
        compiler.reset()


def copies(inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return copies that may be written, and that pass gradients on to `inputs`."""
    return [x.clone().requires_grad_(x.requires_grad) for x in inputs]


def generator_states() -> list[tuple[torch.Generator, torch.Tensor]]:
    """Return PyTorch's default generators of the devices in use, each with its state."""
    states = [(torch.default_generator, torch.default_generator.get_state())]
    if cuda.is_initialized():
        states += [(generator, generator.get_state()) for generator in cuda.default_generators]
    return states


def have_moved(before: Sequence[tuple[torch.Generator, torch.Tensor]]) -> bool:
    """Return whether one of them has drawn since `generator_states` was called."""
    for generator, state in before:
        # as bytes: `torch.equal` takes twice as long, and this is asked in each call
        if state.numpy().tobytes() != generator.get_state().numpy().tobytes():
            return True
    return False


class Undone:
    """A context that leaves the module's buffers, and the default generators, as they were."""

    def __init__(self, module: nn.Module) -> None:
        self.changed: list[str] = []
        """The buffers that had to be put back, once the context has ended."""
        self._buffers = [
            (part, name, buffer, buffer.clone(), buffer._version)
            for part in module.modules()
            for name, buffer in part._buffers.items()
            if buffer is not None and not is_lazy(buffer)
        ]
        self._generators = generator_states()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with torch.no_grad():
            for part, name, buffer, before, version in self._buffers:
                if part._buffers.get(name) is not buffer or buffer._version != version:
                    self.changed.append(name)
                buffer.copy_(before)
                part._buffers[name] = buffer
        for generator, state in self._generators:
            generator.set_state(state)


def uses_batch_statistics(module: nn.Module) -> bool:
    """Return whether its outputs for one row depend on the other rows, or it learns from forward passes (BatchNorm)."""
    return any(
        isinstance(part, nn.modules.batchnorm._NormBase) and (part.track_running_stats or _is_batch_norm(part))
        for part in module.modules()
    )


def _is_batch_norm(part: nn.Module) -> bool:
    return isinstance(part, nn.modules.batchnorm._BatchNorm)


@functools.cache
def _written(func: OpOverload) -> list[tuple[int, str]]:
    """Return the place and name of each argument that this operation writes."""
    arguments = enumerate(func._schema.arguments)
    return [(index, one.name) for index, one in arguments if one.alias_info is not None and one.alias_info.is_write]


def _same_bytes(x: torch.Tensor, y: torch.Tensor) -> bool:
    if x.is_meta or not x.numel():
        return True
    return torch.equal(flat_of(x).view(torch.uint8), flat_of(y).view(torch.uint8))  # NaN equals itself here


def _other_states() -> tuple[object, object]:
    kind, keys, *rest = np.random.get_state(legacy=True)
    return random.getstate(), (kind, keys.tobytes(), *rest)  # type: ignore[union-attr]
