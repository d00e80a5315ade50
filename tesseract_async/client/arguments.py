"""A call's arguments as they are when it is made: what is changed in place later is noticed, or was copied."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

_CHANGED = (
    "an input of a remote call was changed in place while the call was under way: await the call first, or give it a "
    "copy (x.clone())"
)


class Versions:
    """How often each of some tensors has been changed in place."""

    def __init__(self, tensors: Iterable[torch.Tensor] = ()) -> None:
        self._noted = [(tensor, tensor._version) for tensor in tensors if not tensor.is_inference()]

    def note(self, tensor: torch.Tensor) -> None:
        """Adds one; it is not an inference tensor."""
        self._noted.append((tensor, tensor._version))

    def check(self) -> None:
        """Raises: RuntimeError if one was changed since it was noted."""
        if any(tensor._version != version for tensor, version in self._noted):
            raise RuntimeError(_CHANGED)


def arguments_now(structure: Any) -> tuple[Any, Versions]:
    """The structure in plain tuples, lists and dicts of its own, and its tensors' versions, for a check after use.

    Copied, in the caller's grad mode, is what may change without another version (inference tensors, memory shared with
    NumPy or another process), and the part of a buffer whose other parts may be filled meanwhile.
    """
    versions = Versions()
    return _taken(structure, versions), versions


def _taken(value: Any, versions: Versions) -> Any:
    if isinstance(value, torch.Tensor):
        if _may_change_unseen(value):
            return value.clone()
        versions.note(value)
        return value
    if isinstance(value, tuple | list):
        items = [_taken(item, versions) for item in value]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, Mapping):
        return {key: _taken(item, versions) for key, item in value.items()}
    return value


def _may_change_unseen(tensor: torch.Tensor) -> bool:
    if tensor.is_inference():
        return True
    if tensor.grad_fn is not None or tensor.layout != torch.strided:
        return False  # torch shares no memory of what is in a graph
    if tensor._base is not None and tensor.numel() < tensor._base.numel():
        return True
    if tensor.device.type != "cpu":
        return False
    # not resizable: NumPy or somebody's bytes use the same memory (or did: a small tensor that was sent before)
    storage = tensor.untyped_storage()
    return not storage.resizable() or storage.is_shared()
