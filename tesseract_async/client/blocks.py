"""The rows and experts of one message of a pass, and their weights. Pure.

An expert's *value* for a row is an entry of a matrix, or the sum of several, as a gate's scores are. For a normalized
sum the weight is the exponential of the value. Weights are sent before it is known who will answer. Those in a message
are therefore relative to the greatest value that the message has for the row, the row's *unit*, and the caller divides
by the weights of those that answered. For other sums, the value is the weight.

Suffixes of names: R rows, E experts, P pairs of an expert and a row.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from tesseract_async.client.dispatch import ExpertCall
from tesseract_async.client.routing import Candidates, Indices
from tesseract_async.experts.manifest import Coordinates
from tesseract_async.runtime.gradients import per_row
from tesseract_async.wire.apply import Integers, Weights

OptionalTensors = list[torch.Tensor | None]
Values = npt.NDArray[np.floating]

_MAX_GAP: Final = 30.0
"""Weights in a message are not smaller than the exponential of minus this: all are well within float32."""
_MAX_LEAD: Final = 3.0
"""A row's sum keeps its unit until a message comes whose unit is larger by the exponential of this: most sums are never
rescaled, and float32 can hold the sums of answers up to 1e36."""


@dataclass(slots=True, eq=False)
class RowBlock:
    """The rows that travel in one message, each once, and the pairs of an expert and a row."""

    calls: list[ExpertCall]
    """The calls, in the order of their experts' coordinates."""
    coords: Coordinates
    rows: Indices
    """``[R]``: rows of the batch, ascending."""
    offsets: Indices
    """``[E + 1]``: where the pairs of each call begin and end."""
    numbers_P: Indices
    """The row of the block for each pair."""
    weights_P: Weights
    versions: Sequence[int] = ()
    """The versions, one for each call: see `ApplyRequest.versions`."""
    units_R: Values | None = None
    """The logarithm of the unit of each row's weights, if the sum is normalized."""
    kept: bytes | None = None
    """The block's name, for as long as its server keeps it."""

    @classmethod
    def of(cls, calls: Collection[ExpertCall], candidates: Candidates, num_rows: int) -> "RowBlock":
        """The block of these calls for a batch of `num_rows`; the weights are for the caller to set."""
        given = list(calls)
        coords = candidates.grid.coords_ND[[call.expert for call in given]]
        order = np.lexsort(coords.T[::-1])
        given = [given[i] for i in order.tolist()]
        rows_P = np.concatenate([call.rows for call in given])
        is_there = np.zeros(num_rows, dtype=np.bool_)
        is_there[rows_P] = True
        offsets = np.array([0, *[len(call.rows) for call in given]]).cumsum()
        numbers_P = (is_there.cumsum() - 1)[rows_P]
        return cls(given, coords[order], is_there.nonzero()[0], offsets, numbers_P, np.empty(0, dtype=np.float32))

    def experts_P(self) -> Indices:
        """Return the expert of each pair, by its number among the candidates."""
        return np.repeat([call.expert for call in self.calls], self.offsets[1:] - self.offsets[:-1])

    def pairs(self, place: int) -> slice:
        """Return where the pairs of a call are."""
        return slice(self.offsets[place], self.offsets[place + 1])

    def weigh(self, matrix: Values, candidates: Candidates, *, is_normalized: bool, is_bare: bool) -> None:
        """Set the weights by the experts' values. With `is_bare`, the answer of an expert that is alone here comes back
        unweighted, and is weighted afterwards."""
        rows_P, columns_PD = self.rows[self.numbers_P], candidates.grid.columns_ND.numpy()[self.experts_P()]
        values_P = matrix[rows_P, columns_PD[:, 0]]
        for column in range(1, columns_PD.shape[1]):
            values_P += matrix[rows_P, columns_PD[:, column]]
        if is_normalized:
            self.units_R = np.full(len(self.rows), -np.inf, dtype=values_P.dtype)
            np.maximum.at(self.units_R, self.numbers_P, values_P)
            gaps_P = values_P - self.units_R[self.numbers_P]
            values_P = np.exp(np.maximum(gaps_P, -_MAX_GAP))
        elif is_bare:
            self.units_R, values_P = values_P, np.ones_like(values_P)
        self.weights_P = values_P.astype(np.float32)


class WeightedSums:
    """The sums of the answers to a forward's messages, part by part."""

    def __init__(self, sums: list[torch.Tensor], dtype: np.dtype[np.floating], *, is_normalized: bool) -> None:
        """`sums`: zeros, one tensor for each output. `dtype`: of the values."""
        self.sums, self._is_normalized = sums, is_normalized
        self.weights_R: Values = np.zeros(len(sums[0]), dtype=dtype)
        """The sum of the weights of those that answered a row."""
        self.units_R: Values = np.full(len(sums[0]), -np.inf, dtype=dtype)
        """The logarithm of the unit of a row's weights, if the sum is normalized; minus infinity without answers."""

    def add(self, block: RowBlock, pairs: Integers, numbers: Integers, at_P: Integers, sums: OptionalTensors) -> None:
        """Add the sums of these rows of the block (given by their numbers). They cover these of its pairs; `at_P` is
        each pair's row among the sums."""
        rows, weights_P = block.rows[numbers], block.weights_P[pairs]
        factors_R = None if block.units_R is None else block.units_R[numbers]
        if factors_R is not None and self._is_normalized:
            before, units_R = self.units_R[rows], factors_R
            grown_R = before < units_R - _MAX_LEAD
            self.units_R[rows] = now_R = np.where(grown_R, units_R, before)
            factors_R = np.exp(units_R - now_R)
            grown = np.flatnonzero(grown_R & (before > -np.inf))  # the others stay, or hold nothing yet
            if len(grown):
                at, shrunk = rows[grown], np.exp(before[grown] - units_R[grown])
                self.weights_R[at] *= shrunk
                for total in self.sums:
                    total[torch.from_numpy(at)] *= per_row(torch.from_numpy(shrunk), total)
        added_R = np.bincount(at_P, weights_P, minlength=len(rows))
        self.weights_R[rows] += (added_R if factors_R is None else added_R * factors_R).astype(self.weights_R.dtype)
        for total, partial in zip(self.sums, sums, strict=True):
            if partial is not None:
                addend = partial if factors_R is None else partial * per_row(torch.from_numpy(factors_R), total)
                total.index_add_(0, torch.from_numpy(rows), addend)

    def weights_of(self, block: RowBlock) -> Values:
        """Return the final weights of a message of this forward, for the rows that were answered."""
        if (factors_R := block.units_R) is None:
            return block.weights_P
        if self._is_normalized:
            total_R = np.maximum(self.weights_R[block.rows], np.finfo(np.float32).tiny)
            factors_R = np.exp(np.minimum(factors_R - self.units_R[block.rows], _MAX_LEAD)) / total_R
        return block.weights_P * factors_R[block.numbers_P]


def rows_of(tensors: OptionalTensors, rows: Indices) -> OptionalTensors:
    """Return these rows of each tensor; the tensors themselves where that is every row."""
    if tensors[0] is not None and len(rows) == len(tensors[0]):
        return list(tensors)
    at = torch.from_numpy(rows)
    return [None if tensor is None else tensor.index_select(0, at) for tensor in tensors]
