"""The leaves under a loss, and how their gradients get into ``.grad`` once all of them are there."""

import sys
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

with torch.inference_mode(False), torch.enable_grad():  # this module may be imported in the midst of anything
    _leaf = torch.empty(0, requires_grad=True, device="cpu")
    _AccumulateGrad = type(_leaf.view(0).grad_fn.next_functions[0][0])  # type: ignore[union-attr]

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

    def __init__(self, loss: torch.Tensor) -> None:
        """Raises: RuntimeError if something in the graph works in torch's own backward only."""
        self.tensors: list[torch.Tensor] = []
        self.have_hooks = torch.distributed.is_available() and torch.distributed.is_initialized()
        """Hooks may wait for the accumulation itself: those of DDP, in C++, can't be seen."""
        if self.have_hooks and _has_sharded_modules():
            raise _refusal("a program with layers under FSDP")
        if loss.grad_fn is None:
            self.tensors.append(loss)
            return
        seen: set[torch.autograd.graph.Node] = {loss.grad_fn}
        stack: list[torch.autograd.graph.Node] = [loss.grad_fn]
        while stack:
            node = stack.pop()
            if isinstance(node, _AccumulateGrad):
                if node.variable.requires_grad:  # type: ignore[attr-defined]
                    self.tensors.append(node.variable)  # type: ignore[attr-defined]
                    self.have_hooks = self.have_hooks or _has_hooks(node)
            elif (what := _REFUSED.get(type(node).__name__)) is not None:
                raise _refusal(what)
            for following, _ in node.next_functions:
                if following is not None and following not in seen:
                    seen.add(following)
                    stack.append(following)
        for leaf in self.tensors:
            if getattr(leaf, "_is_flat_param", False):
                raise _refusal("a layer under FSDP")
            own = (leaf._backward_hooks or {}).values()
            if any(getattr(hook, "__module__", "") == "torch.autograd.graph" for hook in list(own)):
                raise _refusal("a parameter in torch.autograd.graph.register_multi_grad_hook")
            if self.have_hooks and own:
                raise _refusal("a parameter with a hook of its own and others that wait for accumulation, as DDP's do,")

    def accumulate(self, gradients: Sequence[torch.Tensor | None]) -> None:
        """Add them to ``.grad`` as the engine does, and its hooks fire; in an engine's thread, for they may block."""
        pairs = [(leaf, grad) for leaf, grad in zip(self.tensors, gradients, strict=True) if grad is not None]
        if pairs:
            torch.autograd.backward([leaf for leaf, _ in pairs], [grad for _, grad in pairs])

    def add(self, gradients: Sequence[torch.Tensor | None]) -> None:
        """Add them to ``.grad``, or makes them it, and then calls the hooks that fire after accumulation."""
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
        filled = [leaf for leaf, grad in zip(self.tensors, gradients, strict=True) if grad is not None]
        if any([leaf._post_accumulate_grad_hooks for leaf in filled]):
            fire_post_accumulate_hooks(filled)


class GraphCut(NamedTuple):
    """The place where a graph falls into two parts."""

    ends: list[torch.autograd.graph.Node]
    """The last nodes of the first part."""
    leaves: set[int]
    """The ids of that part's leaves."""
    kinds: frozenset[type]
    """All nodes' types."""


def find_cut(loss: torch.Tensor, above: type, below: type, *, most: int) -> GraphCut | None:
    """Return where the nodes of kind `above` cut the graph of `loss`: each node belongs to the part from `loss` down to
    them, or to the part from the nodes of kind `below`, which follow them, on.

    None if there is no such place. None, too, for more than `most` nodes in a part, and for functions in Python besides
    these, which may do anything, such as another backward.
    """
    upper: set[torch.autograd.graph.Node] = set()
    lower: set[torch.autograd.graph.Node] = set()
    ends: list[torch.autograd.graph.Node] = []
    leaves: set[int] = set()
    stack: list[torch.autograd.graph.Node | None] = [loss.grad_fn]
    for part, kind in ((upper, above), (lower, below)):
        while stack:
            node = stack.pop()
            if node is None or node in part:
                continue
            part.add(node)
            if len(part) > most or (part is lower and node in upper):
                return None
            if type(node) is above and part is upper:
                ends.append(node)
            elif isinstance(node, torch.autograd.function.BackwardCFunction) and type(node) is not kind:
                return None
            else:
                stack += [following for following, _ in node.next_functions]
                if part is upper and isinstance(node, _AccumulateGrad):
                    leaves.add(id(node.variable))  # type: ignore[attr-defined]
        stack = [following for end in ends for following, _ in end.next_functions]
    return GraphCut(ends, leaves, frozenset(map(type, upper | lower))) if ends else None


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


def _has_hooks(node: torch.autograd.graph.Node) -> bool:
    for register in (node.register_hook, node.register_prehook):
        handle = register(_nothing)
        hooks = handle.hooks_dict_ref() or {}  # all that were registered
        del hooks[handle.id]
        if hooks and any(hook is not _nothing for hook in list(hooks.values())):
            return True
    return False


def _nothing(*_: object) -> None:
    pass
