"""An expert's optimizer and schedule: checks, steps, and how they go on from a checkpoint."""

import copy
import hashlib
import inspect
import json
from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from operator import is_
from typing import Any, Final, NamedTuple

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from tesseract_async.errors import describe
from tesseract_async.runtime.gradients import Gradients, norm_of
from tesseract_async.runtime.states import StateDict, copied

_OWN: Final = ("fused", "foreach", "capturable")
"""Options that say how a step is computed, not its result: each computer's own business."""
_NOT_SAID: Final = (*_OWN, "initial_lr")
"""Options that are not compared: those, and the rate that a schedule began with."""
_CYCLED: Final = ("lr", "momentum", "betas")
"""Options that a schedule changes as it goes."""
_SHAPED: Final = ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "sum")
"""The state of the fused optimizers: one number, and tensors like their parameter."""
_IMMUTABLE: Final = frozenset({float, int, bool, type(None), tuple})
_PROGRESS: Final = frozenset({"last_epoch", "base_lrs", "T_cur", "T_i", "verbose", "total_size"})
"""Names in a schedule's state that are progress, not options; so are names that begin with an underscore."""


def check_optimizer(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raises: ValueError if it cannot train this module, step by step, from gradients that come from elsewhere."""
    own = set(map(id, module.parameters()))
    num_foreign = sum(id(one) not in own for group in optimizer.param_groups for one in group["params"])
    kind = type(optimizer).__name__
    if num_foreign:
        raise ValueError(
            f"the optimizer steps {num_foreign} tensor(s) that are not parameters of the expert's module: make {kind} "
            "of this module's parameters, after the last of them was replaced"
        )
    if _takes_more(type(optimizer).step):
        raise ValueError(
            f"{kind} calls the module again in each step (a closure), but an expert only gets gradients: use another "
            "optimizer, such as torch.optim.AdamW"
        )

    error = _refusal(optimizer, _sparse_parameters(module))
    if error is not None:
        raise ValueError(f"{kind} cannot step this module: {describe(error)}")


def _refusal(optimizer: torch.optim.Optimizer, sparse: Collection[int]) -> Exception | None:
    """Return the error about sparse or dense gradients, or a closure, that a copy of it raises on small weights."""
    owned = [one for group in optimizer.param_groups for one in group["params"]]
    small = {id(one): nn.Parameter(torch.zeros(2, 2, dtype=one.dtype), one.requires_grad) for one in owned}
    for one in (one for one in small.values() if one.requires_grad):
        one.grad = torch.zeros_like(one)
    for name in sparse & small.keys():
        small[name].grad = torch.zeros(2, 2, dtype=small[name].dtype).to_sparse(1)
    try:
        # not by the copy's own name of it, which a schedule has bound to the original
        type(optimizer).step(copy.deepcopy(optimizer, {**small, id(optimizer.state): defaultdict(dict)}))
    except Exception as error:  # its objections to the small weights themselves say nothing
        if any(word in str(error) for word in ("sparse", "dense", "closure", "'NoneType' object is not callable")):
            return error
    return None


def _sparse_parameters(module: nn.Module) -> set[int]:
    """Return the ids of those parameters whose gradients are sparse."""
    return {
        id(part.weight)
        for part in module.modules()
        if isinstance(part, nn.Embedding | nn.EmbeddingBag) and part.sparse and isinstance(part.weight, nn.Parameter)
    }


def check_scheduler(optimizer: torch.optim.Optimizer, scheduler: LRScheduler) -> None:
    """Raises: ValueError if it does not follow this optimizer, or needs more than the number of steps."""
    kind = type(scheduler).__name__
    if getattr(scheduler, "optimizer", optimizer) is not optimizer:
        raise ValueError(f"{kind} is the schedule of another optimizer: make it of the expert's own")
    if _takes_more(type(scheduler).step):
        raise ValueError(
            f"{kind} needs a figure at each step, such as a loss, which a server does not have: use a schedule that "
            "follows the steps alone, such as LambdaLR"
        )


def _takes_more(method: Callable[..., object]) -> bool:
    try:
        inspect.signature(method).bind("self")
    except TypeError:
        return True
    return False


def fuse(optimizer: torch.optim.Optimizer) -> None:
    """Let PyTorch's Adam step all parameters in one kernel, where they are on the CPU and its owner left the choice.

    PyTorch would go parameter by parameter there: for 526,080 weights 3.6 ms instead of 0.7. The results differ by
    rounding only. The kernel ignores strides, so that gradients need their parameter's layout.
    """
    if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW):
        return
    for group in optimizer.param_groups:
        free = group["fused"] is None and group["foreach"] is None
        if free and not group["differentiable"] and not isinstance(group["lr"], torch.Tensor):
            group["fused"] = all(map(_is_plain, group["params"])) or None


def _is_plain(parameter: torch.Tensor) -> bool:
    return parameter.is_cpu and parameter.is_floating_point() and parameter.is_contiguous()


def take_step(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[nn.Parameter],
    gradients: Gradients,
    max_norm: float | None,
) -> None:
    """Step with these gradients, scaled down to `max_norm`. Hooks of parameters run; `.grad` is None afterwards.

    Raises what the optimizer raises.
    """
    if rule_of(optimizer) is not None:
        take_steps([optimizer], [gradients], max_norm)
        return
    try:
        _give(parameters, gradients, max_norm)
        optimizer.step()
    finally:
        for parameter in parameters:  # PyTorch's `zero_grad` does this in four times the time
            parameter.grad = None


def rule_of(optimizer: torch.optim.Optimizer) -> Hashable:
    """Return what optimizers have in common that `take_steps` may step at once; None for one that steps alone."""
    own_step = vars(optimizer).get("step")
    if (
        type(optimizer) not in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)
        or (own_step is not None and not hasattr(own_step, "_wrapped_by_lr_sched"))
        or optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        # a trainer's in this process that looks for its own parameters alone (`transformers.lockstep`)
        or (
            _global_optimizer_pre_hooks
            and any(not hasattr(hook, "_is_trainers") for hook in _global_optimizer_pre_hooks.values())
        )
        or _global_optimizer_post_hooks
    ):
        return None
    known: _Rule | None = vars(optimizer).get("_rule")  # not in its state
    if known is not None and len(known.values) == len(optimizer.param_groups):
        for group, names, values in zip(optimizer.param_groups, known.names, known.values, strict=True):
            if [*group] != names or not all(map(is_, group.values(), values)):
                break
        else:
            return known.rule
    options, is_fixed = [], True
    for group in optimizer.param_groups:
        own = group.copy()
        own["params"] = own["initial_lr"] = None
        if type(own.get("betas")) is list:  # in a state that came from elsewhere
            own["betas"], is_fixed = tuple(own["betas"]), False
        options.append((*sorted(own.items()),))  # a loaded state has them in another order
        for value in own.values():
            if type(value) not in _IMMUTABLE and (isinstance(value, torch.Tensor) or value.__hash__ is None):
                return None
    rule = type(optimizer).__name__, *options
    if is_fixed:
        groups = optimizer.param_groups
        vars(optimizer)["_rule"] = _Rule(rule, [[*group] for group in groups], [[*group.values()] for group in groups])
    return rule


class _Rule(NamedTuple):
    """The result of `rule_of`, which holds while the options of each group are the same objects."""

    rule: Hashable
    names: list[list[str]]
    values: list[list[object]]


def take_steps(
    optimizers: Sequence[torch.optim.Optimizer], gradients: Sequence[Gradients], max_norm: float | None
) -> None:
    """Take one step of each of these optimizers of one rule, in one computation. Each keeps its own moments and count.

    `gradients`: of each one's parameters. Raises what the optimizers raise.
    """
    if max_norm is not None or not _step_at_once(optimizers, gradients):
        _step_given(optimizers, gradients, max_norm)
    for optimizer in optimizers:
        optimizer._opt_called = True  # type: ignore[attr-defined]  # what a schedule looks at


def _step_given(
    optimizers: Sequence[torch.optim.Optimizer], gradients: Sequence[Gradients], max_norm: float | None
) -> None:
    """Do what `take_steps` does, for all sorts of gradients and parameters."""
    parameters = [[one for group in optimizer.param_groups for one in group["params"]] for optimizer in optimizers]
    try:
        for own, found in zip(parameters, gradients, strict=True):
            _give(own, found, max_norm)
        first = optimizers[0]
        groups = [dict(group) for group in first.param_groups]
        for index, group in enumerate(groups):
            group["params"] = [x for one in optimizers for x in one.param_groups[index]["params"] if x.grad is not None]
            if type(first) is torch.optim.SGD and group["foreach"] is None and not group["fused"]:
                group["foreach"] = not group["differentiable"]  # PyTorch would go one by one on a CPU
        if _step_fused(groups, optimizers):
            return
        if len(optimizers) == 1:
            first.step()
        else:
            merged = type(first).__new__(type(first))
            merged.__setstate__({"defaults": first.defaults, "state": {}, "param_groups": groups})
            stepped = ((one.state, x) for one, own in zip(optimizers, parameters, strict=True) for x in own)
            merged.state = {x: state[x] for state, x in stepped if x.grad is not None}  # type: ignore[assignment]
            merged.step()
    finally:
        for own in parameters:
            for parameter in own:
                parameter.grad = None


class _Memory:
    """The parameters of a fused Adam and what it remembers of each, group by group, as lists for its kernel.

    All its counts of steps lie in one tensor.
    """

    __slots__ = ("state", "groups", "_ids", "counts")

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        """Each parameter was stepped before."""
        self.state = optimizer.state
        self.groups = [(group["params"], [self.state[x] for x in group["params"]]) for group in optimizer.param_groups]
        self._ids = [[*map(id, group["params"])] for group in optimizer.param_groups]
        memories = [memory for _, own in self.groups for memory in own]
        self.counts = torch.stack([memory["step"] for memory in memories])
        for memory, count in zip(memories, self.counts.unbind(), strict=True):
            memory["step"] = count

    def holds(self, optimizer: torch.optim.Optimizer) -> bool:
        """Return whether nothing was replaced since."""
        groups = optimizer.param_groups
        if self.state is not optimizer.state or len(groups) != len(self._ids):
            return False
        for group, ids in zip(groups, self._ids, strict=True):
            if [*map(id, group["params"])] != ids:
                return False
        return True


def _memory_of(optimizer: torch.optim.Optimizer) -> _Memory | None:
    """None for an optimizer that `_step_fused` leaves to PyTorch."""
    memory: _Memory | None = vars(optimizer).get("_kernel_memory")  # not in its state
    if memory is not None and memory.holds(optimizer):
        return memory
    for group in optimizer.param_groups:
        unusual = group.get("amsgrad"), group.get("capturable"), group.get("differentiable")
        if group.get("fused") is not True or any(unusual) or not group["params"]:
            return None
        if not all(map(_is_plain, group["params"])) or not all([optimizer.state.get(x) for x in group["params"]]):
            return None
    memory = vars(optimizer)["_kernel_memory"] = _Memory(optimizer)
    return memory


def _step_at_once(optimizers: Sequence[torch.optim.Optimizer], gradients: Sequence[Gradients]) -> bool:
    """Do what `_step_fused` does where every parameter has a gradient and no hooks, with less ado."""
    memories = []
    for one in optimizers:
        if (memory := _memory_of(one)) is None:
            return False
        memories.append(memory)
    groups = []
    start = 0
    for index, group in enumerate(optimizers[0].param_groups):
        stop = start + len(group["params"])
        own = [memory.groups[index] for memory in memories]
        parameters = [x for given, _ in own for x in given]
        found = [x for one in gradients for x in one[start:stop]]
        if len(found) != len(parameters) or any([x._post_accumulate_grad_hooks for x in parameters]):
            return False
        for x, like in zip(found, parameters, strict=True):
            if x is None or x.layout is not torch.strided or not (x.is_contiguous() and like.is_contiguous()):
                return False
        groups.append((group, parameters, found, [memory for _, those in own for memory in those]))
        start = stop
    with torch.no_grad():
        torch._foreach_add_([memory.counts for memory in memories], 1)
        for group, parameters, found, of_parameters in groups:
            _run_fused(group, type(optimizers[0]), parameters, found, of_parameters)
    return True


def _run_fused(
    group: Mapping[str, Any],
    kind: type,
    parameters: list[torch.Tensor],
    gradients: list[Any],
    memories: Sequence[Mapping[str, torch.Tensor]],
) -> None:
    """Step these parameters, all of which have gradients, and whose steps were counted."""
    beta1, beta2 = group["betas"]
    # the option came after PyTorch 2.4
    is_decoupled = group.get("decoupled_weight_decay", kind is torch.optim.AdamW)
    step = torch._fused_adamw_ if is_decoupled else torch._fused_adam_
    step(
        parameters,
        gradients,
        [memory["exp_avg"] for memory in memories],
        [memory["exp_avg_sq"] for memory in memories],
        [],
        [memory["step"] for memory in memories],
        amsgrad=False,
        lr=group["lr"],
        beta1=beta1,
        beta2=beta2,
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=group["maximize"],
    )


def _step_fused(groups: Sequence[Mapping[str, Any]], optimizers: Sequence[torch.optim.Optimizer]) -> bool:
    """Step these groups of Adams in one kernel, as ``Adam.step`` does, which makes ten calls for every parameter.

    False if something is unusual, or a parameter has never been stepped: nothing is done then.
    """
    memory_of = {id(x): memory for one in optimizers for x, memory in one.state.items()}
    due = []
    for group in groups:
        memories = [memory_of.get(id(x), {}) for x in group["params"]]
        unusual = group.get("amsgrad"), group.get("capturable"), group.get("differentiable")
        if group.get("fused") is not True or any(unusual) or not memories or not all(memories):
            return False
        due.append((group, memories))
    with torch.no_grad():
        for group, memories in due:
            torch._foreach_add_([memory["step"] for memory in memories], 1)
            gradients = [x.grad for x in group["params"]]
            _run_fused(group, type(optimizers[0]), group["params"], gradients, memories)
    return True


def _give(parameters: Sequence[nn.Parameter], gradients: Gradients, max_norm: float | None) -> None:
    """Set `.grad`, scaled down to `max_norm` and laid out as the parameters are, and run the parameters' hooks."""
    gradients = [*gradients, *[None] * (len(parameters) - len(gradients))]  # of groups that were added since
    gradients = [
        x if x is None or (x.layout is torch.strided and x.stride() == like.stride()) else _laid_out(x, like)
        for x, like in zip(gradients, parameters, strict=True)
    ]
    if max_norm is not None and (norm := norm_of(gradients)) > max_norm:
        gradients = [None if x is None else x * (max_norm / norm) for x in gradients]  # not in place: two may be one
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
        if gradient is not None and (hooks := getattr(parameter, "_post_accumulate_grad_hooks", None)):
            for hook in hooks.values():
                hook(parameter)


def _laid_out(gradient: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    # kernels read an expanded one as if it were laid out like the parameter; a sparse one is the optimizer's business
    return torch.empty_like(parameter).copy_(gradient) if gradient.layout is torch.strided else gradient


def kinds_of(
    module: nn.Module, optimizer: torch.optim.Optimizer | None, scheduler: LRScheduler | None
) -> dict[str, list[int]]:
    """Return the classes of both, as a checkpoint names them: in UTF-8, as a state holds numbers and tensors only."""
    kinds = {"optimizer": _kind(optimizer), "scheduler": _kind(scheduler)}
    found = {what: list(kind.encode()) for what, kind in kinds.items() if kind is not None}
    if optimizer is not None:
        found["parameters"] = _digest(module, optimizer)
    return found


def _digest(module: nn.Module, optimizer: torch.optim.Optimizer) -> list[int]:
    names = {id(one): name for name, one in module.named_parameters()}
    groups = [[names.get(id(one)) for one in group["params"]] for group in optimizer.param_groups]
    return list(hashlib.sha256(json.dumps(groups).encode()).digest())


def restore(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: LRScheduler | None,
    state: StateDict,
    own: Collection[str],
) -> list[str]:
    """Let both go on from a checkpoint's ``optimizer``, ``scheduler`` and ``kinds``. Returns sentences for the log.

    The classes are those given here; one whose checkpoint had another class begins anew. Of the options, the
    checkpoint's hold, except for those that are named in `own`.

    Raises: KeyError, TypeError or ValueError if it does not fit.
    """
    said: list[str] = []
    given = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    saved, kinds = state["optimizer"], state.get("kinds") or {}
    theirs, their_schedule = (
        bytes(kinds[what]).decode() if what in kinds else None for what in ("optimizer", "scheduler")
    )
    mine = _kind(optimizer)
    same = theirs in (None, mine)
    if same:
        _check_memory(optimizer, saved)
        if kinds.get("parameters") not in (None, _digest(module, optimizer)):
            raise ValueError(f"{mine} holds its parameters in another order, or other groups, than its checkpoint says")
        groups = [
            before | {name: value for name, value in options.items() if name in _OWN}
            for before, options in zip(saved["param_groups"], given, strict=True)
        ]
        vars(optimizer).pop("_kernel_memory", None)  # it holds the moments that are replaced
        # PyTorch takes the tensors themselves, and steps change them in place
        optimizer.load_state_dict(copied({**saved, "param_groups": groups}))
        _lay_out(optimizer)
    else:
        said.append(f"its checkpoint was trained with {theirs}; {mine} begins without its moments")
    goes_on = _restore_scheduler(scheduler, state["scheduler"], their_schedule, own, said)
    begins = scheduler is not None and not goes_on
    for group, options, before in zip(optimizer.param_groups, given, saved["param_groups"], strict=same):
        for name, value in options.items():
            if name not in group:
                group[name] = value
            elif same and name in before and name not in (_CYCLED if scheduler else ("lr",)) and name not in _NOT_SAID:
                if not _same(before[name], value):
                    said.append(_holds(name, before[name], value, given=name in own))
                    group[name] = value if name in own else group[name]
        there = before.get("initial_lr", before["lr"]) if goes_on else before["lr"]
        here = options.get("initial_lr", options["lr"])
        if same and not begins and not _same(there, here):
            said.append(_holds("lr", there, here, given="lr" in own))
        if not same or begins or "lr" in own:
            group["lr"] = here * (before["lr"] / there if goes_on and there else 1.0)
            if "initial_lr" in group:
                group["initial_lr"] = here
    if scheduler is not None and hasattr(scheduler, "base_lrs"):
        scheduler.base_lrs = [group.get("initial_lr", group["lr"]) for group in optimizer.param_groups]
    fuse(optimizer)
    return list(dict.fromkeys(said))


def _check_memory(optimizer: torch.optim.Optimizer, saved: StateDict) -> None:
    """Raises: ValueError for moments that do not fit; kernels take their shapes for granted."""
    sizes = [[len(group["params"]) for group in groups] for groups in (optimizer.param_groups, saved["param_groups"])]
    if sizes[0] != sizes[1]:
        raise ValueError(f"its optimizer had groups of {sizes[1]} parameters, this one has {sizes[0]}")
    owned = [one for group in optimizer.param_groups for one in group["params"]]
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    for number, parameter in zip(numbers, owned, strict=True):
        for name, value in saved["state"].get(number, {}).items():
            shape = () if name == "step" else parameter.shape
            if name in _SHAPED and isinstance(value, torch.Tensor) and value.shape != shape:
                raise ValueError(f"its optimizer's {name} has the shape {tuple(value.shape)}, not {tuple(shape)}")


def _lay_out(optimizer: torch.optim.Optimizer) -> None:
    """Lay out moments as their parameters are: a file has them row by row, and fused kernels go by memory alone."""
    for parameter, memory in optimizer.state.items():
        for name, value in memory.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                if value.layout is torch.strided and value.stride() != parameter.stride():
                    memory[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _restore_scheduler(
    scheduler: LRScheduler | None, saved: StateDict | None, theirs: str | None, own: Collection[str], said: list[str]
) -> bool:
    """Restore the schedule, and return whether the checkpoint's goes on."""
    mine = _kind(scheduler)
    if scheduler is None:
        if saved is not None:
            said.append(f"its checkpoint's schedule, {theirs or 'which was another'}, ends here: the rate stays")
        return False
    if saved is None or theirs not in (None, mine):
        said.append(f"{mine} begins at its first step: its checkpoint had {theirs or 'no schedule'}")
        return False
    options = _options_of(scheduler)
    scheduler.load_state_dict(copied(saved))
    for name, value in options.items():
        if name in saved and not _same(saved[name], value):
            said.append(_holds(f"{mine}'s {name}", saved[name], value, given=name in own))
            if name in own:
                setattr(scheduler, name, value)
    return True


def _options_of(scheduler: LRScheduler) -> dict[str, object]:
    state = scheduler.state_dict()
    return {name: value for name, value in state.items() if not name.startswith("_") and name not in _PROGRESS}


def _holds(name: str, theirs: object, mine: object, *, given: bool) -> str:
    if given:
        return f"{name}={_short(mine)} holds, as it was given, not {_short(theirs)}, which its checkpoint has"
    return f"{name}={_short(theirs)} holds, as its checkpoint has it, not {_short(mine)}"


def _short(value: object) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 40 else text[:36] + " ..."


def _kind(one: object) -> str | None:
    return None if one is None else type(one).__qualname__


def _same(x: object, y: object) -> bool:
    x, y = (one.tolist() if isinstance(one, torch.Tensor) else one for one in (x, y))
    if isinstance(x, list | tuple) and isinstance(y, list | tuple):
        return len(x) == len(y) and all(map(_same, x, y))
    return bool(x == y)
