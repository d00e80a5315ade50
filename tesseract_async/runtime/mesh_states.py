"""States of a spread expert, which are never whole: each process keeps, gives and takes its parts of them."""

import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import (
    tree_flatten,
    tree_leaves,
    tree_map,
    tree_unflatten,
    treespec_dumps,
    treespec_loads,
)

from tesseract_async.runtime import states
from tesseract_async.runtime.backend import ExpertBackend
from tesseract_async.runtime.mesh_building import box_of, like
from tesseract_async.runtime.mesh_link import MeshLink
from tesseract_async.runtime.spread_tensor import SpreadTensor, TensorPart, blocks_of
from tesseract_async.runtime.states import StateDict
from tesseract_async.wire.packed import Value


class SpreadStates(ExpertBackend):
    """A backend whose large tensors are spread, and the commands by which its processes keep and load states."""

    link: MeshLink
    _index: int
    _place: torch.device
    _given: Any = None
    """The argument of the command under way, which only the leader was given."""
    _states: dict[int, StateDict]
    """The states that are kept, by number, with a `_Leaf` for each tensor that is spread."""

    def state(self) -> StateDict:
        """Return the state, whose large tensors stay where they are: each process keeps a copy of its parts."""
        number = next(self.link.numbers)
        boxes = self._command("keep", number)
        owner = _Kept(number)
        weakref.finalize(owner, self.link.forget, self._index, number)

        def handle(leaf: Any) -> Any:
            if not isinstance(leaf, _Leaf):
                return leaf
            parts = [TensorPart(rank, *boxes_there[leaf.index]) for rank, boxes_there in enumerate(boxes)]

            def read(rank: int, start: int, stop: int) -> bytes | bytearray | memoryview:
                return self.link.read(rank, number, leaf.index, start, stop)

            return SpreadTensor(leaf.dtype, leaf.shape, parts, read, owner)

        found: StateDict = tree_map(handle, self._states[number])
        return found

    def load_state(self, state: StateDict) -> None:
        owners = {leaf.owner for leaf in tree_leaves(state) if isinstance(leaf, SpreadTensor)}
        if owners:
            numbers = {one.number for one in owners if isinstance(one, _Kept)} & self._states.keys()
            if len(owners) > 1 or not numbers:
                raise ValueError("this state is of another expert's processes")
            self._command("load_kept", *numbers)
            return
        # what does not fit must be refused before anybody is asked to load it
        states.check_fits(self.module, state["module"])
        self._command("load", _stripped({**state, "applied": None, "gradient_norms": ()}), given=state)

    def _command(self, name: str, *args: Value, given: Any = None) -> list[Value]:
        """Have every process do this; `given` are tensors that only the leader has."""
        self._given = given
        try:
            return self.link.command(self._index, name, args)
        finally:
            self._given = None

    # -- What every process does -------------------------------------------------------------------------------------

    def _do_keep(self, number: int) -> list[Any]:
        kept: list[torch.Tensor] = []
        boxes: list[Any] = []

        def copied(value: Any) -> Any:
            if isinstance(value, DTensor):
                kept.append(states.copied(local(value)))
                boxes.append(box_of(value))
                return _Leaf(len(kept) - 1, value.dtype, value.shape)
            return states.copied(value)

        state = self._state(lambda value: tree_map(copied, value))
        gathered = self._gathered.merged()
        if gathered is not None:
            own = itertools.zip_longest(self.parameters, gathered)
            state["accumulated"] = [None if x is None else copied(like(one, x)) for one, x in own]
        self._states[number], self.link.states[number] = state, kept
        return boxes

    def _do_load_kept(self, number: int) -> None:
        kept = self.link.states[number]
        self._install(self._states[number], lambda leaf, _: kept[leaf.index] if isinstance(leaf, _Leaf) else leaf)

    def _do_load(self, stripped: Value) -> None:
        self._install(_filled(stripped) if self._given is None else self._given, self._receive)

    def _install(self, state: StateDict, local_of: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
        """Load a state; `local_of(leaf, like)` returns this process's part of a tensor, spread as the tensor `like`
        is."""
        here = self.module.state_dict()
        with torch.no_grad():
            for name, mine in here.items():
                if isinstance(mine, torch.Tensor):
                    local(mine).copy_(local_of(state["module"][name], mine))
            given = {name: one for name, one in state["module"].items() if not isinstance(here.get(name), torch.Tensor)}
            saved = state["optimizer"]
            if saved is not None and self.trains:
                super().prepare()
                numbers = [number for group in saved["param_groups"] for number in group["params"]]
                owned = dict(zip(numbers, self.parameters, strict=False))
                found = {
                    number: {name: self._as_memory(value, owned.get(number), local_of) for name, value in one.items()}
                    for number, one in saved["state"].items()
                }
                saved = {**saved, "state": found}
            gathered = state["accumulated"]
            if gathered is not None and self.trains:
                own = zip(self.parameters, gathered, strict=False)
                gathered = [None if x is None else local_of(x, one).to(self._place, copy=True) for one, x in own]
        applied = state["applied"] or {
            "ids": torch.empty(0, dtype=torch.uint8),
            "versions": torch.empty(0, dtype=torch.int64),
        }
        super().load_state(
            {**state, "module": {**here, **given}, "optimizer": saved, "accumulated": gathered, "applied": applied}
        )

    def _as_memory(
        self, value: Any, parameter: nn.Parameter | None, local_of: Callable[[Any, torch.Tensor], torch.Tensor]
    ) -> Any:
        """Return a value of the optimizer's memory as it is in this process."""
        if not hasattr(value, "shape"):
            return value
        if parameter is not None and value.shape == parameter.shape and isinstance(parameter, DTensor):
            return like(parameter, local_of(value, parameter).to(self._place, copy=True))
        return local_of(value, torch.empty(0))

    def _receive(self, leaf: Any, like: torch.Tensor) -> torch.Tensor:
        """Return this process's part of a tensor that only the leader has, block by block."""
        if isinstance(like, DTensor) and tuple(leaf.shape) != tuple(like.shape):  # everywhere, before any block
            raise ValueError(f"it has {tuple(leaf.shape)} for what has the shape {tuple(like.shape)} here")
        offsets, sizes = box_of(like) if isinstance(like, DTensor) else ([0] * len(leaf.shape), list(leaf.shape))
        mine = torch.empty(sizes, dtype=leaf.dtype, device=self._place)
        rows = mine if mine.dim() else mine.view(1)
        first, num = (offsets[0], sizes[0]) if offsets else (0, 1)
        for start, stop in blocks_of(leaf.shape, leaf.dtype):
            block = torch.empty((stop - start, *leaf.shape[1:]), dtype=leaf.dtype, device=self._place)
            if self.link.rank == 0:
                block.copy_(leaf[start:stop] if leaf.dim() else leaf)
            broadcast(block)
            low, high = max(start, first), min(stop, first + num)
            if low < high:
                box = block[low - start : high - start]
                for dim, (offset, size) in enumerate(zip(offsets[1:], sizes[1:], strict=True), 1):
                    box = box.narrow(dim, offset, size)
                rows[low - first : high - first].copy_(box)
        return mine


def described(tensors: Sequence[torch.Tensor | None]) -> list[Value]:
    """Return dtypes and shapes, for a process that has to receive these tensors."""
    return [None if x is None else [str(x.dtype).removeprefix("torch."), list(x.shape)] for x in tensors]


def raw(x: torch.Tensor) -> torch.Tensor:
    """Return a contiguous tensor as bytes, which gloo and NCCL can send whatever its dtype is."""
    return x.detach().view(-1).view(torch.uint8)


def broadcast(x: torch.Tensor) -> None:
    """Fill a contiguous tensor with the values of the leader's."""
    if x.numel():
        dist.broadcast(raw(x), src=0)


def local(x: torch.Tensor) -> torch.Tensor:
    """Return this process's part, which shares its memory."""
    with torch.no_grad():
        return x.to_local() if isinstance(x, DTensor) else x.detach()


class _Kept:
    """A state that the processes keep parts of, until this is gone."""

    def __init__(self, number: int) -> None:
        self.number = number


class _Leaf:
    """Stands for a tensor of a kept state."""

    def __init__(self, index: int, dtype: torch.dtype, shape: Sequence[int]) -> None:
        self.index, self.dtype, self.shape = index, dtype, torch.Size(shape)


# msgpack holds no tensors: the followers of a state that is loaded get their dtypes and shapes.


def _stripped(state: StateDict) -> Value:
    leaves, spec = tree_flatten(state)
    return [treespec_dumps(spec), [described([x]) if isinstance(x, torch.Tensor) else x for x in leaves]]


def _filled(stripped: Value) -> StateDict:
    spec, leaves = stripped
    filled = [_Leaf(-1, getattr(torch, x[0][0]), x[0][1]) if isinstance(x, list) else x for x in leaves]
    found: StateDict = tree_unflatten(filled, treespec_loads(spec))
    return found
