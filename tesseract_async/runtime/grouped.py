"""Computes rows of several experts of one *kind* in one pass.

Experts are of one kind if they differ in numbers only: the same classes, plain attributes, shapes and settings. Two
ways, by the device:

- On a CPU, the module is called once with the rows of all experts, one expert's after the other's, and *ragged*
  parameters: where a layer multiplies by a weight, each expert's rows meet its own. No weight is copied, unless all are
  so small that ``grouped_mm`` over a stack of them is faster. It takes layers that treat each row alone, which an
  expert's must; operations on parameters other than those listed here raise, and the second way is taken.
- On other devices, or for other modules: parameters are stacked, each expert's rows padded to equally many with copies
  of its last row, and ``torch.func.vmap`` calls the module. A stack costs little where memory is fast.

Modules that this could compute otherwise than one by one are left out: those that draw random numbers, change buffers
or attributes, write their inputs, have hooks, or use batch statistics. What escapes this is found by comparing: the
first pass of each kind is computed both ways (`Executor`).
"""

from __future__ import annotations

import copy
import enum
import logging
import types
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from operator import is_, itemgetter
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.func import vmap
from torch.nn import functional as F

from tesseract_async.runtime.backend import ExpertBackend, backpropagate, may_be_grouped
from tesseract_async.runtime.costs import BatchCost, GroupChoice
from tesseract_async.runtime.gradients import Gradients, run_engine, weight_gradients, weighted
from tesseract_async.runtime.module_runner import as_leaf
from tesseract_async.runtime.watching import uses_batch_statistics
from tesseract_async.wire import tensors as wire

logger = logging.getLogger(__name__)

MAX_BYTES: Final = 8 << 20
"""Bytes of an expert's parameters and buffers: computing a larger one takes so long that calling it costs nothing."""
_STACKED_BYTES: Final = 256 << 10
"""Up to this size of one weight, ``grouped_mm`` over a stack of them pays where gradients are computed."""
_STACKED_BYTES_FORWARD: Final = 64 << 10
"""The same without gradients, where there is less to gain from a copy."""
_LONG_ROWS: Final = range(256, 10_001)
"""Lengths of a weight's row for which a call costs little in comparison, and OpenBLAS wakes no other threads."""
_MAX_CHANGES: Final = 3
"""Changes of what makes an expert one of a kind after which it is computed alone: it keeps state there."""
_HOOKS: Final = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_OF_EVERY_MODULE: Final = frozenset(vars(nn.Module()))


Way = Callable[..., list[torch.Tensor]]


class Unfit(Exception):
    """This module can't be computed in this way."""


class Group:
    """Experts that may share a pass: of one kind, in one direction and mode. Made by `Groups`."""

    def __init__(self, kind: ExpertKind, training: bool) -> None:
        self.kind = kind
        self.training = training
        self.choice = GroupChoice(expected=kind.is_light)
        self.cost = BatchCost()
        """The cost of one expert's rows, learned from all of them: experts of one kind take equally long."""
        self.checked: Way | None = None
        """The way in which a pass was found to compute what each expert alone does."""

    @property
    def is_checked(self) -> bool:
        """True if that is the kind's present way: a pass of another mode may have found that one unfit since."""
        return self.checked is not None and self.checked == self.kind.way

    def gathers(self) -> bool:
        """Return whether it is worth while to look for more batches to share a pass."""
        return self.kind.may_fit and self.choice.gathers()


class Groups:
    """The kinds of experts on one device. Belongs to its thread."""

    def __init__(self) -> None:
        self._num_changes: weakref.WeakKeyDictionary[ExpertBackend, int] = weakref.WeakKeyDictionary()
        self.kinds: weakref.WeakValueDictionary[Hashable, ExpertKind] = weakref.WeakValueDictionary()
        self._groups: weakref.WeakValueDictionary[Hashable, Group] = weakref.WeakValueDictionary()

    def group_of(self, backend: ExpertBackend, *, training: bool, mode: Hashable) -> Group | None:
        """Return the group that an expert's batches of this `mode` belong to now; None if each has to be alone."""
        if not backend.may_be_grouped(training):
            return None
        member = self.member_of(backend)
        if member is None or not member.kind.may_fit:
            return None
        key = (id(member.kind), training, backend.trains, mode)
        group = self._groups.get(key)
        if group is None:
            group = self._groups[key] = Group(member.kind, training)
        return group

    def member_of(self, backend: ExpertBackend) -> Member | None:
        """Return the expert's tensors and its kind, unless it is of none."""
        member = backend.member
        if type(member) is Member and member.groups is self:
            if member.is_unchanged():
                return member
            backend.member = None
            self._num_changes[backend] = self._num_changes.get(backend, 0) + 1
        if self._num_changes.get(backend, 0) > _MAX_CHANGES:
            return None
        try:
            member = backend.member = Member(backend, self)
        except Unfit:
            return None
        return member

    def members_of(self, backends: Sequence[ExpertBackend], training: bool) -> list[Member] | None:
        """Return these experts' tensors; None unless all are of one kind now, and may be computed together."""
        if not may_be_grouped(backends, training):
            return None
        members: list[Member] = []
        for backend in backends:  # mostly they are as they were: then without a call for each
            if type(member := backend.member) is Member and member.groups is self:
                members.append(member)
        if len(members) < len(backends) or not _are_unchanged(members):
            members = [member for member in map(self.member_of, backends) if member is not None]
        if len(members) < len(backends) or len({member.kind for member in members}) > 1:
            return None
        return members


class Member:
    """One expert's tensors, and what must not change while it is of its kind. Raises: Unfit."""

    def __init__(self, backend: ExpertBackend, groups: Groups) -> None:
        module, settings = backend.module, backend.settings
        self.groups = groups
        slots = _slots_of(module)
        self._slots = [slot for slot in slots if slot.name == slot.first]
        tensors = self.tensors().values()
        if (
            type(backend) is not ExpertBackend
            or settings.compile_mode is not None
            or settings.cuda_graphs
            or settings.stochastic
            or uses_batch_statistics(module)
            or not tensors
            or len({x.device for x in tensors}) > 1
            or sum(x.nbytes for x in tensors) > MAX_BYTES
            or any(part.training != module.training for part in module.modules())
        ):
            raise Unfit
        parts = [(vars(part), *_attributes_of(part)) for part in module.modules()]
        self._parts = [
            (own, num_attributes, itemgetter(*_HOOKS, *names), (*[{} for _ in _HOOKS], *values))
            for own, names, values, num_attributes in parts
        ]
        if not self.is_unchanged():
            raise Unfit
        key = (
            tuple([(path, type(part)) for path, part in module.named_modules(remove_duplicate=False)]),
            tuple([(tuple(names), tuple(map(_Value, values))) for _, names, values, _ in parts]),
            tuple([(name, x.shape, x.dtype, x.requires_grad, x.device) for name, x in self.tensors().items()]),
            tuple([(slot.name, slot.first) for slot in slots]),
            backend.terms,
        )
        kind = groups.kinds.get(key)
        if kind is None:
            kind = groups.kinds[key] = ExpertKind(backend)
        self.kind = kind

    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: of[own] for name, _, of, own in self._slots}

    def is_unchanged(self) -> bool:
        """Return whether it has no hooks, and the attributes that it had."""
        return _are_unchanged([self])


def _are_unchanged(members: Sequence[Member]) -> bool:
    try:
        for member in members:
            for own, num_attributes, values_of, values in member._parts:
                if len(own) != num_attributes or values_of(own) != values:
                    return False
            for _, _, of, name in member._slots:
                if of[name]._backward_hooks:
                    return False
        return True
    except Exception:  # an attribute is gone, or can't be compared
        return False


def _columns(members: Sequence[Member]) -> dict[str, list[torch.Tensor]]:
    """Return the tensors of experts of one kind: by name, each one's."""
    return {
        name: [member._slots[place].of[own] for member in members]
        for place, (name, _, _, own) in enumerate(members[0]._slots)
    }


def _attributes_of(part: nn.Module) -> tuple[list[str], list[object], int]:
    """Return the names and values of a module's own attributes, and how many it has of all sorts."""
    own = vars(part)
    names = [name for name in own if name not in _OF_EVERY_MODULE]
    return names, [own[name] for name in names], len(own)


class _Value:
    """An attribute, as a key: plain values by what they are, others by their identity. Raises: Unfit for state."""

    __slots__ = ("_value", "_key")

    def __init__(self, value: object) -> None:
        self._value = value  # kept, so that no other object gets its id
        self._key = _key_of(value)

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Value) and self._key == other._key


def _key_of(value: object) -> Hashable:
    if isinstance(value, torch.Tensor | nn.Module | types.MethodType):
        raise Unfit
    if value is None or isinstance(value, bool | int | float | str | bytes | complex | enum.Enum | type):
        return type(value), value
    if isinstance(value, torch.Size | torch.dtype | torch.device):
        return type(value), value
    if isinstance(value, tuple | list):
        return type(value), tuple(map(_key_of, value))
    if isinstance(value, set | frozenset):
        return type(value), frozenset(map(_key_of, value))
    if isinstance(value, Mapping):
        return type(value), tuple((_key_of(name), _key_of(item)) for name, item in value.items())
    return type(value), id(value)


def _opaque(value: object) -> Iterator[object]:
    """Yield the objects in an attribute that are known by their identity only."""
    if isinstance(value, Mapping):
        value = [*value.keys(), *value.values()]
    if isinstance(value, tuple | list | set | frozenset):
        for item in value:
            yield from _opaque(item)
    elif _key_of(value) == (type(value), id(value)):
        yield value


class _Slot(NamedTuple):
    name: str
    first: str
    """The first name of the same tensor."""
    of: dict[str, Any]
    own: str


def _slots_of(module: nn.Module) -> list[_Slot]:
    seen: dict[int, str] = {}
    slots = []
    parts = [*module.named_modules(remove_duplicate=False)]
    # parameters before buffers, as `named_parameters` and `named_buffers` have them, in a third of the time
    for tensors in ("_parameters", "_buffers"):
        for path, part in parts:
            of: dict[str, Any] = getattr(part, tensors)
            for own, x in of.items():
                if x is not None:
                    name = f"{path}.{own}" if path else own
                    slots.append(_Slot(name, seen.setdefault(id(x), name), of, own))
    return slots


class ExpertKind:
    """Experts that differ in numbers only, and how they are computed together."""

    def __init__(self, example: ExpertBackend) -> None:
        attributes = [value for part in example.module.modules() for value in _attributes_of(part)[1]]
        # objects that are compared by identity are all the same ones here: copies would be others, if they can be made
        shared = {id(one): one for value in attributes for one in _opaque(value)}
        try:
            self._skeleton = copy.deepcopy(example.module, shared).to("meta")
        except Exception as error:  # a module may refuse to be copied
            raise Unfit from error
        self._attributes = [(vars(part), *_attributes_of(part)) for part in self._skeleton.modules()]
        slots = zip(_slots_of(self._skeleton), _slots_of(example.module), strict=True)  # copies may share less
        self._slots = [(original.first, slot.of, slot.own, slot.of[slot.own]) for slot, original in slots]
        self._inputs_schema = example.inputs_schema
        args, kwargs = self._inputs_schema
        self._takes_one = not kwargs and len(args) == 1 and type(args[0]) is wire.TensorSpec
        self._outputs_schema = example.outputs_schema
        self._output_specs = example.output_specs
        self._autocast = example.settings.autocast
        self.num_extra_rows = 0
        """Rows by which each expert's are padded beyond need: to see whether rows influence one another."""
        self.way: Way | None = self._vmapped
        """The function that computes them; None once every way has failed."""
        if example.device.type == "cpu" and self._autocast is None:
            self.way = self._ragged
        self.is_light = self.way != self._ragged or all([x.nbytes <= _STACKED_BYTES for _, _, _, x in self._slots])
        """True if one pass is expected to be faster than one for each: its layers then take less time than their calls."""
        self.name = example.name

    @property
    def may_fit(self) -> bool:
        return self.way is not None

    def misfits(self, error: BaseException | None) -> None:
        """Take the next way: this one raised, or computed something else."""
        if self.way is not None:
            self.way = self._vmapped if self.is_ragged else None
            logger.debug("experts such as %s are not computed together in one way: %s", self.name, error)

    def forward(
        self, members: Sequence[Member], inputs: Sequence[torch.Tensor], counts: Sequence[int], *, training: bool
    ) -> list[torch.Tensor]:
        """Return the outputs for `inputs`, of which `counts` rows belong to each member. Raises what the module raises.

        Raises: Unfit, if the module is not one that can be computed so.
        """
        with torch.no_grad():
            return self._call(_columns(members), {}, inputs, counts, training)

    def gradients(
        self,
        members: Sequence[Member],
        inputs: Sequence[torch.Tensor],
        output_gradients: Gradients,
        counts: Sequence[int],
        parameters: Sequence[Sequence[nn.Parameter]],
        *,
        training: bool,
        weights: torch.Tensor | None = None,
    ) -> tuple[Gradients, list[Gradients], Gradients | None]:
        """Do what `ExpertBackend.gradients` does.

        Returns gradients of the inputs, and of each one's `parameters`; where these are parts of stacks, one for each
        parameter, also the stacks.
        """
        leaves, columns = [as_leaf(x) for x in inputs], _columns(members)
        stacks = self._stacks(columns, parameters)
        with torch.enable_grad():
            outputs = self._call(columns, stacks, leaves, counts, training)
        sources = [*leaves, *(stacks.values() if stacks else [x for own in parameters for x in own])]
        found = backpropagate(outputs, weighted(output_gradients, weights), sources, run_engine)
        of_inputs, rest = found[: len(leaves)], found[len(leaves) :]
        if weights is not None:
            of_inputs.append(weight_gradients(outputs, output_gradients, weights))
        if stacks:
            rest = [None if x is None else x.contiguous() for x in rest]
            parts = [[None] * len(members) if x is None else x.unbind() for x in rest]
            return of_inputs, [*zip(*parts, strict=True)], rest
        size = len(parameters[0])
        return of_inputs, [rest[number * size : (number + 1) * size] for number in range(len(members))], None

    def _stacks(
        self, columns: Mapping[str, list[torch.Tensor]], parameters: Sequence[Sequence[nn.Parameter]]
    ) -> dict[str, torch.Tensor]:
        """Return the experts' `parameters` as leaves, each a stack of all experts', by name and in their order. Empty
        if they are not in one order, or so large that some layers do without a stack."""
        names = {id(column[0]): name for name, column in columns.items()}
        order = [names.get(id(x), "") for x in parameters[0]]
        if not all(order) or (self.is_ragged and any([x.nbytes > _STACKED_BYTES for x in parameters[0]])):
            return {}
        if set(map(len, parameters)) != {len(order)}:
            return {}
        for name, column in zip(order, zip(*parameters, strict=True), strict=True):
            if not all(map(is_, columns[name], column)):
                return {}
        with torch.no_grad():
            return {name: torch.stack(columns[name]).requires_grad_(columns[name][0].requires_grad) for name in order}

    @property
    def is_ragged(self) -> bool:
        """True if no weights are copied."""
        return self.way == self._ragged

    def _call(
        self,
        columns: Mapping[str, list[torch.Tensor]],
        stacks: Mapping[str, torch.Tensor],
        inputs: Sequence[torch.Tensor],
        counts: Sequence[int],
        training: bool,
    ) -> list[torch.Tensor]:
        """`columns`: the experts' tensors. `stacks`: those of them that are stacked already."""
        if self.way is None:
            raise Unfit
        if self._skeleton.training != training:
            self._skeleton.train(training)
        versions = [x._version for x in inputs]
        outputs = self.way({**columns, **stacks}, inputs, counts)
        if versions != [x._version for x in inputs]:
            raise Unfit("it writes its inputs")
        for own, names, values, num_attributes in self._attributes:
            if len(own) != num_attributes or any([own[name] is not value for name, value in zip(names, values)]):  # noqa: B905
                raise Unfit("it changes its attributes")
        return outputs

    def _apply(self, tensors: Mapping[str, torch.Tensor], inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        args, kwargs = (inputs, {}) if self._takes_one else wire.unflatten(self._inputs_schema, inputs)
        try:
            for name, of, own, _ in self._slots:
                of[own] = tensors[name]
            if self._autocast is None:
                outputs = self._skeleton(*args, **kwargs)
            else:
                with torch.autocast(inputs[0].device.type, dtype=self._autocast):
                    outputs = self._skeleton(*args, **kwargs)
        finally:
            for _, of, own, of_skeleton in self._slots:
                of[own] = of_skeleton
        if self._autocast is not None:
            leaves = wire.flatten(outputs)
            cast = [x.to(spec.dtype) for x, spec in zip(leaves, self._output_specs, strict=True)]
            outputs = wire.unflatten(outputs, cast)
        return wire.flatten_like(self._outputs_schema, outputs, what="this expert's output")

    def _ragged(
        self, table: Mapping[str, _Column], inputs: Sequence[torch.Tensor], counts: Sequence[int]
    ) -> list[torch.Tensor]:
        outputs = self._apply({name: _Ragged.of(each, counts) for name, each in table.items()}, inputs)
        if any([type(x) is _Ragged or x.shape[0] != inputs[0].shape[0] for x in outputs]):
            raise Unfit
        return outputs

    def _vmapped(
        self, table: Mapping[str, _Column], inputs: Sequence[torch.Tensor], counts: Sequence[int]
    ) -> list[torch.Tensor]:
        stacked = {name: _stacked(column) for name, column in table.items()}
        versions = [x._version for x in stacked.values()]
        num, most = len(counts), max(counts) + self.num_extra_rows
        taken = None
        if min(counts) < most:
            # each expert's rows, then copies of its last one; and where they are found afterwards
            last = torch.tensor(counts)[:, None] - 1
            place = torch.arange(most)[None].minimum(last) + (last + 1).cumsum(0) - (last + 1)
            taken = (torch.arange(most)[None] <= last).view(-1).nonzero()[:, 0].to(inputs[0].device)
            inputs = [x.index_select(0, place.view(-1).to(x.device)) for x in inputs]
        folded = [x.view(num, most, *x.shape[1:]) for x in inputs]
        outputs = vmap(lambda own, *rows: tuple(self._apply(own, rows)))(stacked, *folded)
        if versions != [x._version for x in stacked.values()]:
            raise Unfit("it changes its buffers")
        flat = [x.reshape(num * x.shape[1], *x.shape[2:]) for x in outputs]
        if flat[0].shape[0] != num * most:
            raise Unfit
        return flat if taken is None else [x.index_select(0, taken) for x in flat]


_Column = list[torch.Tensor] | torch.Tensor
"""One parameter of several experts: each one's, or a stack of all."""


def _stacked(column: _Column) -> torch.Tensor:
    return torch.stack(column) if isinstance(column, list) else column


class _Ragged(torch.Tensor):
    """One parameter of several experts. With rows, it acts on each one's rows; to all else it says Unfit."""

    column: _Column
    counts: Sequence[int]
    one: torch.Tensor
    """The first expert's."""

    @staticmethod
    def of(column: _Column, counts: Sequence[int]) -> _Ragged:
        one = column[0]
        made = torch.empty(one.shape, dtype=one.dtype, device="meta").as_subclass(_Ragged)
        made.column, made.counts, made.one = column, counts, one
        return made

    @property
    def each(self) -> Sequence[torch.Tensor]:
        return self.column if isinstance(self.column, list) else self.column.unbind()

    def beside(self, num_dims: int) -> torch.Tensor:
        """Return it row by row, to be broadcast against a tensor of so many dimensions."""
        rows = _stacked(self.column).repeat_interleave(torch.tensor(self.counts), 0, output_size=sum(self.counts))
        missing = num_dims - rows.dim()
        if missing < 0:
            raise Unfit
        return rows.view(rows.shape[0], *[1] * missing, *rows.shape[1:])

    @classmethod
    def __torch_function__(
        cls, func: Any, types: object, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func in _RAGGED_LAYERS:
                return _RAGGED_LAYERS[func](*args, **kwargs)
            name = getattr(func, "__name__", "")
            if name == "__get__":  # shape, dtype, device
                return func(args[0].one)
            if name in ("dim", "size", "numel"):
                return func(args[0].one, *args[1:], **kwargs)
            if name in _ELEMENTWISE and len(args) == 2 and not kwargs:
                plain = [x for x in args if isinstance(x, torch.Tensor) and not isinstance(x, _Ragged)]
                if len(plain) == 1:
                    return func(*(x.beside(plain[0].dim()) if isinstance(x, _Ragged) else x for x in args))
        raise Unfit(f"{name} of a parameter")


_ELEMENTWISE: Final = frozenset(
    {"add", "sub", "mul", "div", "true_divide"}
    | {f"__{side}{name}__" for side in ("", "r") for name in ("add", "sub", "mul", "truediv")}
)


def _linear(x: torch.Tensor, weight: Any, bias: Any = None) -> torch.Tensor:
    if isinstance(x, _Ragged) or not isinstance(weight, _Ragged) or not isinstance(bias, _Ragged | None):
        raise Unfit
    inner = x.shape[1:-1].numel()
    flat = x.reshape(-1, x.shape[-1])
    counts = [count * inner for count in weight.counts]
    one = weight.one
    limit = _STACKED_BYTES if torch.is_grad_enabled() else _STACKED_BYTES_FORWARD
    if one.nbytes <= limit and _fits_grouped_mm(one):
        offsets = torch.tensor(counts).cumsum(0).int()
        y = F.grouped_mm(flat, _stacked(weight.column).mT, offs=offsets)
        if bias is not None:
            y = y + _stacked(bias.column).repeat_interleave(torch.tensor(counts), 0, output_size=len(flat))
    else:
        apply: Any = _EachLinear.apply  # untyped
        call = apply if torch.is_grad_enabled() else _each_linear
        y = call(flat, counts, len(counts), *weight.each, *(bias.each if bias is not None else ()))
    return y.view(*x.shape[:-1], y.shape[-1])


def _fits_grouped_mm(weight: torch.Tensor) -> bool:
    aligned = all([size * weight.element_size() % 16 == 0 for size in weight.shape])
    return hasattr(F, "grouped_mm") and aligned and weight.dtype == torch.float32


def _reads_fast(weight: torch.Tensor) -> bool:
    """Return whether NumPy multiplies this weight by a vector in the time that reading it takes: half of that of
    PyTorch's library where the weight is not in the processor's cache, and no more where it is (measured on AMD)."""
    is_plain = weight.dtype in (torch.float32, torch.float64) and weight.is_contiguous()
    return is_plain and weight.shape[1] in _LONG_ROWS and hasattr(np, "vecdot")


def _each_linear(x: torch.Tensor, counts: list[int], num: int, *tensors: torch.Tensor) -> torch.Tensor:
    """``F.linear`` of each expert's rows with its own weight, which stays where it is: `num` weights, then biases."""
    weights, biases = tensors[:num], tensors[num:]
    y = x.new_empty(x.shape[0], weights[0].shape[0])
    if len(counts) == len(x):  # a row for each
        if _reads_fast(weights[0]):
            with np.errstate(all="ignore"):  # what is not finite is looked for in answers
                for row, sums, weight in zip(x.detach().numpy(), y.numpy(), weights, strict=True):
                    np.vecdot(weight.detach().numpy(), row, out=sums)
        else:  # a vector takes a call of torch less than a matrix, and no longer
            for own, out, weight in zip(x.unbind(), y.unbind(), weights, strict=True):
                torch.mv(weight, own, out=out)
        return y.add_(torch.stack(biases)) if biases else y
    rows, into = x.split_with_sizes(counts), y.split_with_sizes(counts)
    if biases:
        for own, out, weight, bias in zip(rows, into, weights, biases, strict=True):
            torch.addmm(bias, own, weight.t(), out=out)
    else:
        for own, out, weight in zip(rows, into, weights, strict=True):
            torch.mm(own, weight.t(), out=out)
    return y


class _EachLinear(torch.autograd.Function):
    """The same in a graph."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, counts: list[int], num: int, *tensors: torch.Tensor) -> torch.Tensor:
        y, weights, biases = _each_linear(x, counts, num, *tensors), tensors[:num], tensors[num:]
        ctx.save_for_backward(x, *weights)
        ctx.counts, ctx.has_bias = counts, bool(biases)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        x, *weights = ctx.saved_tensors
        rows, gradients = torch.split(x, ctx.counts), torch.split(gradient, ctx.counts)
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = torch.empty_like(x)
            for g, weight, out in zip(gradients, weights, torch.split(of_x, ctx.counts), strict=True):
                torch.mm(g, weight, out=out)
        needs = iter(ctx.needs_input_grad[3:])
        of_weights = [torch.mm(g.t(), own) if next(needs) else None for g, own in zip(gradients, rows, strict=True)]
        of_biases = [g.sum(0) if next(needs) else None for g in gradients] if ctx.has_bias else []
        return of_x, None, None, *of_weights, *of_biases


def _layer_norm(x: torch.Tensor, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> torch.Tensor:
    y = F.layer_norm(x, shape, eps=eps)
    y = y if weight is None else y * weight.beside(x.dim())
    return y if bias is None else y + bias.beside(x.dim())


def _rms_norm(x: torch.Tensor, shape: Any, weight: Any = None, eps: float | None = None) -> torch.Tensor:
    y = F.rms_norm(x, shape, eps=eps)
    return y if weight is None else y * weight.beside(x.dim())


_RAGGED_LAYERS: Final[Mapping[Any, Callable[..., torch.Tensor]]] = types.MappingProxyType(
    {F.linear: _linear, F.layer_norm: _layer_norm, F.rms_norm: _rms_norm}
)
