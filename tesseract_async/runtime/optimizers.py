"""An expert's optimizer and schedule: checks, and how they go on from a checkpoint."""

import copy
import hashlib
import inspect
import json
from collections import defaultdict
from collections.abc import Callable, Collection
from typing import Final

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from tesseract_async.errors import describe
from tesseract_async.runtime.states import StateDict, copied
from tesseract_async.runtime.stepping import fuse

_OWN: Final = ("fused", "foreach", "capturable")
"""Options that say how a step is computed, not what it results in: each computer chooses its own."""
_NOT_SAID: Final = (*_OWN, "initial_lr")
"""Options that are not compared: those of `_OWN`, and the learning rate that a schedule began with."""
_CYCLED: Final = ("lr", "momentum", "betas")
"""Options that a schedule changes as it goes."""
_SHAPED: Final = ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "sum")
"""The state of the fused optimizers: one number, and tensors like their parameter."""
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

    The classes stay those given here; if the checkpoint had another class, that one begins anew. The checkpoint's
    options hold, except for those that are named in `own`.

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
