"""Loss scaling (`torch.amp.GradScaler`): what travels to experts is unscaled, for their optimizers know of no scale.

Gradients are divided on the way to experts, which take their steps during the backward; those that come back are
multiplied again. The caller of a backward says its scale, or a hook on what `GradScaler.scale` gives notes it.
"""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch

_UNTOLD = (
    "this loss was scaled by a GradScaler, which is not for remote experts: their gradients are divided by its scale. "
    "Say so with `tesseract_async.backward(scaler.scale(loss), scaler=scaler)`, or `AsyncTrainer(..., scaler=scaler)`"
)
_UNSCALED = (
    "backward was given a scaler, but a loss that `scaler.scale` did not make: remote experts' gradients are divided "
    "by a scale that they do not have. Use `tesseract_async.backward(scaler.scale(loss), scaler=scaler)`"
)
_MAX_NOTED = 4096


class Scaler(Protocol):
    """The part of a `torch.amp.GradScaler` that backward asks."""

    def get_scale(self) -> float:
        """Return the factor by which it multiplies."""

    def is_enabled(self) -> bool:
        """Return whether it does so at all."""


@dataclass(frozen=True, slots=True)
class Scaled:
    """The scaler of a loss that was multiplied already."""

    factor: float

    def get_scale(self) -> float:
        return self.factor

    def is_enabled(self) -> bool:
        return True


_noted: dict[int, torch.Tensor] = {}
"""The scale of each graph task's starting point. Only the latest tasks are kept, since nothing tells when a task has
ended."""


def noted_scale(graph_task: int) -> float | None:
    """The scale of the loss that this backward pass started from, if a `GradScaler` scaled it."""
    scale = _noted.get(graph_task)
    return None if scale is None else float(scale)


class Scaling:
    """The scale of one `backward`. Used in an engine's thread, since a scale on a GPU is waited for."""

    def __init__(self, scaler: Scaler | None, *, could_be_noted: bool) -> None:
        """`could_be_noted`: whether it starts from a loss that the scaler, if it is torch's, has made."""
        self._is_told = scaler is not None
        self._scale = scaler.get_scale() if scaler is not None and scaler.is_enabled() else None
        watched = getattr(type(scaler), "scale", None) is torch.amp.GradScaler.scale
        self._is_noted_for_sure = could_be_noted and watched and self._scale is not None

    def scale(self, graph_task: int) -> float | None:
        """Return the divisor of the gradients that travel. Warns (RuntimeWarning) if the loss is scaled and no scaler
        was given, or the other way round."""
        noted = noted_scale(graph_task)
        if not self._is_told:
            if noted is not None:
                warnings.warn(_UNTOLD, RuntimeWarning, stacklevel=2)
            return noted
        if noted is None and self._is_noted_for_sure:
            warnings.warn(_UNSCALED, RuntimeWarning, stacklevel=2)
        return self._scale


def _note(scale: torch.Tensor, _gradient: torch.Tensor) -> None:
    """A tensor's hook: in an engine's thread, before the backward of what made the tensor."""
    _noted[torch._C._current_graph_task_id()] = scale
    with contextlib.suppress(RuntimeError):  # another thread notes at this moment: it drops them, or the next one does
        while len(_noted) > _MAX_NOTED:
            _noted.pop(next(iter(_noted)), None)


def _hooked(scaler: torch.amp.GradScaler, scaled: object) -> object:
    if isinstance(scaled, torch.Tensor):
        if scaled.requires_grad and scaler._scale is not None:
            note = functools.partial(_note, scaler._scale.detach().clone())
            scaled.register_hook(note)  # type: ignore[no-untyped-call]
        return scaled
    if isinstance(scaled, tuple | list):
        for item in scaled:
            _hooked(scaler, item)
        return scaled
    return (_hooked(scaler, item) for item in scaled) if isinstance(scaled, Iterable) else scaled


def _watching(
    scale: Callable[[torch.amp.GradScaler, object], object],
) -> Callable[[torch.amp.GradScaler, object], object]:
    @functools.wraps(scale)
    def scale_and_note(self: torch.amp.GradScaler, outputs: object) -> object:
        scaled = scale(self, outputs)
        if not self.is_enabled() or torch._C._are_functorch_transforms_active() or torch.compiler.is_compiling():
            return scaled
        return _hooked(self, scaled)

    return scale_and_note


# The one place where torch itself is changed: who scaled a loss can't be seen in its graph. It is changed once only.
torch.amp.GradScaler.scale = _watching(  # type: ignore[method-assign, assignment]
    vars(torch.amp.GradScaler.scale).get("__wrapped__", torch.amp.GradScaler.scale)
)
