"""The leaves under a loss, and how their gradients get into ``.grad`` once all of them are there."""

import sys
from collections.abc import Iterable, Sequence

import torch
from torch.autograd.graph import Node

from tesseract_async.runtime.gradients import run_engine

_IS_DISTRIBUTED = torch.distributed.is_available()

with torch.inference_mode(False), torch.enable_grad():  # this module may be imported in the midst of anything
    always_needed = torch.empty(0, requires_grad=True, device="cpu")
    """A leaf in every remote call's graph: without it a call whose inputs need no gradient would have no backward."""
    AccumulateGrad = type(always_needed.view(0).grad_fn.next_functions[0][0])  # type: ignore[union-attr]

_REFUSED = {
    "CheckpointFunctionBackward": "a layer under torch.utils.checkpoint with use_reentrant=True",
    "_DDPSinkBackward": "DistributedDataParallel with static_graph or find_unused_parameters",
}


def _refusal(what: str) -> RuntimeError:
    return RuntimeError(
        f"{what} needs torch's own backward, which tesseract_async.backward is not: "
        "use `await asyncio.to_thread(loss.backward)`"
    )


class Leaves:
    """The tensors whose ``.grad`` a backward of one loss would fill."""

    def __init__(self, nodes: Iterable[Node], tensors: Sequence[torch.Tensor] = ()) -> None:
        """`nodes`: those that accumulate their gradients, where there are any.

        Raises: RuntimeError if something about them works in torch's own backward only.
        """
        self.tensors: list[torch.Tensor] = [*tensors]
        self.have_hooks = _IS_DISTRIBUTED and torch.distributed.is_initialized()
        """True if hooks may wait for the accumulation itself: those of DDP are in C++ and can't be seen."""
        if self.have_hooks and _has_sharded_modules():
            raise _refusal("a program with layers under FSDP")
        for node in nodes:
            leaf: torch.Tensor = node.variable  # type: ignore[attr-defined]
            self.tensors.append(leaf)
            self.have_hooks = self.have_hooks or (leaf is not always_needed and _has_hooks(node))
        for leaf in self.tensors:
            if getattr(leaf, "_is_flat_param", False):
                raise _refusal("a layer under FSDP")
            if hooks := list((leaf._backward_hooks or {}).values()):
                if any(getattr(hook, "__module__", "") == "torch.autograd.graph" for hook in hooks):
                    raise _refusal("a parameter in torch.autograd.graph.register_multi_grad_hook")
                if self.have_hooks:
                    raise _refusal(
                        "a parameter with a hook of its own and others that wait for accumulation, as DDP's do,"
                    )

    @classmethod
    def under(cls, loss: torch.Tensor) -> "Leaves":
        """Find the leaves by searching the whole graph. Raises: RuntimeError if something in it works in torch's own
        backward only."""
        if loss.grad_fn is None:
            return cls((), (loss,))
        found: list[Node] = []
        seen: set[Node] = {loss.grad_fn}
        stack: list[Node] = [loss.grad_fn]
        while stack:
            node = stack.pop()
            if isinstance(node, AccumulateGrad):
                if node.variable.requires_grad:  # type: ignore[attr-defined]
                    found.append(node)
            elif (what := _REFUSED.get(type(node).__name__)) is not None:
                raise _refusal(what)
            for following, _ in node.next_functions:
                if following is not None and following not in seen:
                    seen.add(following)
                    stack.append(following)
        return cls(found)

    def accumulate(self, gradients: Sequence[torch.Tensor | None]) -> None:
        """Add the gradients to ``.grad`` as the engine does, hooks included; in an engine's thread, since hooks may
        block."""
        pairs = [(leaf, grad) for leaf, grad in zip(self.tensors, gradients, strict=True) if grad is not None]
        if pairs:
            torch.autograd.backward([leaf for leaf, _ in pairs], [grad for _, grad in pairs])

    def add(self, gradients: Sequence[torch.Tensor | None]) -> None:
        """Add the gradients to ``.grad``, or make them the ``.grad``, and then call the hooks that fire after
        accumulation."""
        hooked: list[torch.Tensor] = []
        for leaf, grad in zip(self.tensors, gradients, strict=True):
            if grad is None:
                continue
            if leaf.grad is None:
                leaf.grad = grad
            elif leaf.grad.requires_grad or leaf.grad.layout != grad.layout:
                # torch adds sparse to dense only
                leaf.grad = grad + leaf.grad if leaf.grad.is_sparse else leaf.grad + grad
            else:
                leaf.grad.add_(grad)
            if leaf._post_accumulate_grad_hooks:
                hooked.append(leaf)
        if hooked:
            fire_post_accumulate_hooks(hooked)


def gradients_of(
    root: torch.Tensor, leaves: Sequence[torch.Tensor], gradient: torch.Tensor | None, *, retain_graph: bool
) -> Sequence[torch.Tensor | None]:
    """Do what ``torch.autograd.grad(..., allow_unused=True)`` does; without its checks where one is implied."""
    if gradient is None and root.is_floating_point() and leaves:
        seed = torch.ones_like(root, memory_format=torch.preserve_format)
        return run_engine((root,), (seed,), leaves, retain_graph=retain_graph)
    return torch.autograd.grad(root, leaves, gradient, retain_graph=retain_graph, allow_unused=True)


def separate(gradients: Iterable[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """Copy what the engine hands out, which may be one tensor for two leaves, or an expanded one: ``.grad`` must be
    neither."""
    return [None if grad is None else grad.detach().clone() for grad in gradients]


@torch.no_grad()
def fire_post_accumulate_hooks(leaves: Iterable[torch.Tensor]) -> None:
    """Call what `register_post_accumulate_grad_hook` registered."""
    for leaf in leaves:
        for hook in list((leaf._post_accumulate_grad_hooks or {}).values()):
            hook(leaf)


def _has_sharded_modules() -> bool:
    """Return whether there are modules under `fully_shard`: it leaves no trace in a graph that begins at data."""
    composable: object = sys.modules.get("torch.distributed._composable_state")
    modules = list(getattr(composable, "_module_state_mapping", ()))
    return any(cls.__name__ == "FSDPModule" for module in modules for cls in type(module).__mro__)


def wait_for_accumulation(leaf: torch.Tensor) -> bool:
    """Return whether hooks were registered in Python on the node that accumulates this leaf's gradient."""
    with torch.inference_mode(False), torch.enable_grad():
        view = leaf.view_as(leaf)
    accumulates = None if view.grad_fn is None else view.grad_fn.next_functions[0][0]
    return accumulates is not None and _has_hooks(accumulates)


def _has_hooks(node: Node) -> bool:
    for register in (node.register_hook, node.register_prehook):
        handle = register(_nothing)
        hooks = handle.hooks_dict_ref() or {}  # all that were registered
        del hooks[handle.id]
        if hooks and any(hook is not _nothing for hook in list(hooks.values())):
            return True
    return False


def _nothing(*_: object) -> None:
    pass
