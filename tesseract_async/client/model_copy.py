"""ModelCopy: the copy of a module on which one step runs."""

import copy
from typing import Generic, TypeVar

import torch
from torch import nn

from tesseract_async.client.leaves import fire_post_accumulate_hooks

M = TypeVar("M", bound=nn.Module)


class ModelCopy(Generic[M]):
    """A copy of the master, and which of its tensors stands for which of the master's. That is worked out once: looking
    for parameters costs more than copying them."""

    def __init__(self, master: M) -> None:
        self.module = _copied(master)
        self._parameters = list(zip(self.module.parameters(), master.parameters(), strict=True))
        self.parameters: list[torch.Tensor] = [mine for mine, _ in self._parameters]
        self._masters: list[torch.Tensor] = [own for _, own in self._parameters]
        self._modules = list(zip(self.module.modules(), master.modules(), strict=True))
        # A module may put a new tensor where a buffer was: these are looked up by name each time.
        self._buffers: list[tuple[nn.Module, nn.Module, str]] = []
        seen: set[int] = set()
        for module, own_module in self._modules:
            for name, buffer in module._buffers.items():
                if buffer is not None and id(buffer) not in seen:
                    seen.add(id(buffer))
                    self._buffers.append((module, own_module, name))

    @torch.no_grad()
    def refresh(self) -> None:
        if self.parameters:
            torch._foreach_copy_(self.parameters, self._masters)
        for mine, own in self._parameters:
            if mine.requires_grad != own.requires_grad:
                mine.requires_grad_(own.requires_grad)
        for module, master, name in self._buffers:
            getattr(module, name).copy_(getattr(master, name))
        for module, master in self._modules:
            if module.training != master.training:
                module.training = master.training

    def give_gradients(self) -> None:
        """Hand the gradients to the master, in place of its own, and fire its parameters' hooks, which copies lack."""
        for mine, own in self._parameters:
            grad, mine.grad = mine.grad, None
            if grad is not None:
                for hook in list((own._backward_hooks or {}).values()):
                    grad = grad if (changed := hook(grad)) is None else changed
            own.grad = grad
        fire_post_accumulate_hooks(own for _, own in self._parameters if own.grad is not None)

    @torch.no_grad()
    def give_buffers(self) -> None:
        """Set the master's buffers to the copy's values."""
        for module, master, name in self._buffers:
            getattr(master, name).copy_(getattr(module, name))


def _copied(master: M) -> M:
    try:
        return copy.deepcopy(master)
    except Exception as error:  # a module's own code may raise anything
        raise TypeError(
            f"AsyncTrainer copies the module for each step in flight, but {_uncopiable(master)} can't be copied: keep "
            f"it outside of the module, or give its class a __deepcopy__ that returns itself ({error})"
        ) from error


def _uncopiable(master: nn.Module) -> str:
    """The path of the first thing in it that can't be copied, and its type."""
    for path, module in master.named_modules():
        for name, value in vars(module).items():
            if name != "_modules":
                for key, item in value.items() if isinstance(value, dict) else [(name, value)]:
                    try:
                        copy.deepcopy(item)
                    except Exception:  # any: it is the caller's object
                        return f"its {'.'.join(filter(None, (path, str(key))))} (a {type(item).__name__})"
    return f"a {type(master).__name__}"
