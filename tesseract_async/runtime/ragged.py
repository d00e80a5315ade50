"""Layers that multiply each expert's rows by its own weights. The rows of all experts lie one expert after the other.

Where the weights are stacked, experts that have equally many rows are multiplied in one call, and rows are padded so
that they do (`PaddedRows`). Elsewhere no weight is copied, and each expert's rows meet its own in a call of their own.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any, Final, Self

import numpy as np
import torch
from torch.nn import functional as F

_LONG_ROWS: Final = range(256, 10_001)
"""Lengths of a weight's row for which a call costs little in comparison, and OpenBLAS wakes no other threads."""
_PADDED_SHARE: Final = 1.3
"""The most rows of experts that are multiplied in one call, padding included, as a multiple of the rows without
padding."""

Column = list[torch.Tensor] | torch.Tensor
"""One parameter of several experts: each one's, or a stack of all."""


class Unfit(Exception):
    """This module can't be computed in this way."""


class PaddedRows:
    """The rows of several experts, to which copies of each one's last row are added."""

    def __init__(self, counts: Sequence[int], padded: Sequence[int]) -> None:
        """`counts`: rows of each; `padded`: as many or more."""
        self.counts = padded
        self._place: torch.Tensor | None = None
        """The given row that stands at each place; None if nothing is added."""
        self._own: torch.Tensor
        """The place of each given row."""
        if any(map(int.__ne__, counts, padded)):
            given, all_rows = np.array(counts), np.array(padded)  # in a tenth of the time that tensors take
            number = np.arange(all_rows.sum()) - np.repeat(all_rows.cumsum() - all_rows, all_rows)
            num_given = np.repeat(given, all_rows)
            place = np.minimum(number, num_given - 1) + np.repeat(given.cumsum() - given, all_rows)
            self._place = torch.from_numpy(place)
            self._own = torch.from_numpy(np.flatnonzero(number < num_given))

    @classmethod
    def even(cls, counts: Sequence[int], *, extra: int = 0) -> Self:
        """Pad all to the largest count, and `extra` rows."""
        return cls(counts, [max(counts) + extra] * len(counts))

    @classmethod
    def stepped(cls, counts: Sequence[int], *, extra: int = 0) -> Self:
        """Pad neighbors to be equally many where that adds few rows, and by `extra` rows. Best if the counts are
        sorted."""
        padded: list[int] = []
        first, total, most = 0, 0, 0
        for number, count in enumerate(counts):
            if max(most, count) * (number + 1 - first) > _PADDED_SHARE * (total + count):
                padded += [most] * (number - first)
                first, total, most = number, 0, 0
            total, most = total + count, max(most, count)
        padded += [most] * (len(counts) - first)
        return cls(counts, [count + extra for count in padded])

    def padded(self, x: torch.Tensor) -> torch.Tensor:
        if self._place is None:
            return x
        self._place = self._place.to(x.device)
        return x.index_select(0, self._place)

    def with_others(self, x: torch.Tensor) -> torch.Tensor:
        """Return padded rows, where those that were added are other rows, if they may be: whole numbers may be names.

        A module in which rows influence one another takes one row and its copies for one row alone.
        """
        rows = self.padded(x)
        if self._place is None or not (x.is_floating_point() or x.is_complex()):
            return rows
        is_added = torch.ones(len(rows), dtype=torch.bool)
        is_added[self._own.cpu()] = False
        added = is_added.nonzero()[:, 0].to(x.device)
        # of the same signs and sizes; scaled ones alone are the same to a module that normalizes first
        return rows.index_copy(0, added, rows.index_select(0, added).flip(-1) * 0.5)

    def with_zeros(self, x: torch.Tensor) -> torch.Tensor:
        """Return gradients of padded rows, where those that were added have none."""
        if self._place is None:
            return x
        self._own = self._own.to(x.device)
        return x.new_zeros(len(self._place), *x.shape[1:]).index_copy_(0, self._own, x)

    def own(self, x: torch.Tensor) -> torch.Tensor:
        """Return the given rows among padded ones."""
        if self._place is None:
            return x
        self._own = self._own.to(x.device)  # once: it is the same device each time
        return x.index_select(0, self._own)


def stacked(column: Column) -> torch.Tensor:
    return torch.stack(column) if isinstance(column, list) else column


class Ragged(torch.Tensor):
    """One parameter of several experts. With rows, it acts on each one's rows; to all else it says Unfit."""

    column: Column
    counts: Sequence[int]
    one: torch.Tensor
    """The first expert's."""

    @staticmethod
    def of(column: Column, counts: Sequence[int]) -> Ragged:
        one = column[0]
        made = torch.empty(one.shape, dtype=one.dtype, device="meta").as_subclass(Ragged)
        made.column, made.counts, made.one = column, counts, one
        return made

    @property
    def each(self) -> Sequence[torch.Tensor]:
        return self.column if isinstance(self.column, list) else self.column.unbind()

    def beside(self, num_dims: int) -> torch.Tensor:
        """Return it row by row, to be broadcast against a tensor of this many dimensions."""
        rows = stacked(self.column).repeat_interleave(torch.tensor(self.counts), 0, output_size=sum(self.counts))
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
            if func in _LAYERS:
                return _LAYERS[func](*args, **kwargs)
            name = getattr(func, "__name__", "")
            if name == "__get__":  # shape, dtype, device
                return func(args[0].one)
            if name in ("dim", "size", "numel"):
                return func(args[0].one, *args[1:], **kwargs)
            if name in _ELEMENTWISE and len(args) == 2 and not kwargs:
                plain = [x for x in args if isinstance(x, torch.Tensor) and not isinstance(x, Ragged)]
                if len(plain) == 1:
                    return func(*(x.beside(plain[0].dim()) if isinstance(x, Ragged) else x for x in args))
        raise Unfit(f"{name} of a parameter")


_ELEMENTWISE: Final = frozenset(
    {"add", "sub", "mul", "div", "true_divide"}
    | {f"__{side}{name}__" for side in ("", "r") for name in ("add", "sub", "mul", "truediv")}
)


def _linear(x: torch.Tensor, weight: Any, bias: Any = None) -> torch.Tensor:
    if isinstance(x, Ragged) or not isinstance(weight, Ragged) or not isinstance(bias, Ragged | None):
        raise Unfit
    inner = x.shape[1:-1].numel()
    flat, counts = x.reshape(-1, x.shape[-1]), [count * inner for count in weight.counts]
    if isinstance(weight.column, torch.Tensor):
        apply: Any = _StackedLinear.apply  # untyped
        y: torch.Tensor = apply(flat, counts, weight.column, None if bias is None else stacked(bias.column))
    else:
        apply = _EachLinear.apply
        call = apply if torch.is_grad_enabled() else _each_linear
        y = call(flat, counts, len(counts), *weight.each, *(bias.each if bias is not None else ()))
    return y.view(*x.shape[:-1], y.shape[-1])


class _StackedLinear(torch.autograd.Function):
    """``F.linear`` with weights and biases that are stacks, in one call for neighbors with equally many rows.

    The gradients of weights lie in memory as their parameters do, which fused optimizers take for granted: those that
    autograd finds are transposed, and their copies took longer than the products.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, counts: list[int], weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.runs = runs = [(len([*run]), count) for count, run in groupby(counts)]
        y = x.new_empty(x.shape[0], weight.shape[1])
        of_each = _rows(x, runs), _experts(weight.mT, runs), _rows(y, runs)
        if bias is None:
            for a, b, out in zip(*of_each, strict=True):
                torch.bmm(a, b, out=out)
        else:
            for a, b, out, added in zip(*of_each, _experts(bias[:, None], runs), strict=True):
                torch.baddbmm(added, a, b, out=out)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        (x, weight), runs = ctx.saved_tensors, ctx.runs
        needs_x, _, needs_weight, needs_bias = ctx.needs_input_grad
        gradients = _rows(gradient.contiguous(), runs)
        of_x = torch.empty_like(x) if needs_x else None
        of_weight = torch.empty_like(weight) if needs_weight else None
        of_bias = weight.new_empty(weight.shape[:2]) if needs_bias else None
        if of_x is not None:
            for g, own, out in zip(gradients, _experts(weight, runs), _rows(of_x, runs), strict=True):
                torch.bmm(g, own, out=out)
        if of_weight is not None:
            for g, own, out in zip(gradients, _rows(x, runs), _experts(of_weight, runs), strict=True):
                torch.bmm(g.mT, own, out=out)
        if of_bias is not None:
            for g, out in zip(gradients, _experts(of_bias, runs), strict=True):
                torch.sum(g, 1, out=out)
        return of_x, None, of_weight, of_bias


def _rows(x: torch.Tensor, runs: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
    """Return the rows of each run of experts that have equally many, by expert. A run: how many they and each's are."""
    parts = x.split_with_sizes([num * count for num, count in runs])
    return [part.view(num, count, -1) for part, (num, count) in zip(parts, runs, strict=True)]


def _experts(stack: torch.Tensor, runs: Sequence[tuple[int, int]]) -> tuple[torch.Tensor, ...]:
    return stack.split_with_sizes([num for num, _ in runs])


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
    """Do as `_each_linear` in a graph."""

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


_LAYERS: Final[Mapping[Any, Callable[..., torch.Tensor]]] = types.MappingProxyType(
    {F.linear: _linear, F.layer_norm: _layer_norm, F.rms_norm: _rms_norm}
)
