"""The rows of a batch: gathered from its requests, and given back to them."""

from collections.abc import Sequence

import torch

from tesseract_async.runtime.batcher import RowSlice
from tesseract_async.runtime.staging import Columns
from tesseract_async.runtime.work import JointWork, Work, WorkResult
from tesseract_async.wire.compression import small_bytes


def columns(slices: Sequence[RowSlice], works: Sequence[Work]) -> Columns:
    """Return the rows of each slice, tensor by tensor: inputs, then output gradients, then weights."""
    first = works[0]
    if (
        len(slices) == 1
        and first.rows is None
        and first.weights is None
        and slices[0].stop - slices[0].start == first.num_rows
    ):
        return [None if x is None else (x,) for x in (*first.inputs, *(first.output_gradients or ()))]
    if type(first) is JointWork:  # a batch of its own, never divided
        assert first.rows is not None and first.weights is not None
        index = first.rows
        return [*[None if x is None else (x.index_select(0, index),) for x in first.inputs], (first.weights,)]
    given = [[*by.inputs, *(by.output_gradients or ())] for by in works]
    columns: list[Sequence[torch.Tensor] | None] = []
    weights = [] if first.weights is None else _cut([by.weights for by in works], slices)
    if first.rows is not None and all([by.inputs is first.inputs and by.rows is not None for by in works]):
        # of one block: every row is copied once, to where it is computed
        parts = _cut([by.rows for by in works], slices)
        index = parts[0] if len(parts) == 1 else torch.cat(parts)
        if all([by.output_gradients is first.output_gradients for by in works]):
            columns = [None if x is None else (x.index_select(0, index),) for x in given[0]]
            return [*columns, weights] if weights else columns
    specs = (*first.backend.input_specs, *(first.backend.output_specs if first.output_gradients is not None else ()))
    for column, spec in zip(zip(*given, strict=True), specs, strict=True):
        if all(x is None for x in column):
            columns.append(None)
            continue
        rows = []
        for x, one, by in zip(column, slices, works, strict=True):
            if x is None:  # next to others that are present, an absent gradient is zero
                rows.append(torch.zeros(one.stop - one.start, *spec.shape, dtype=spec.dtype))
            else:
                if by.rows is not None:
                    x = x.index_select(0, _cut([by.rows], [one])[0])
                elif one.stop - one.start < by.num_rows:
                    x = x[one.start : one.stop]
                rows.append(x)
        columns.append(rows)
    return [*columns, weights] if weights else columns


def _cut(tensors: Sequence[torch.Tensor | None], slices: Sequence[RowSlice]) -> list[torch.Tensor]:
    """Return the rows of each slice, of its request's tensor."""
    parts = []
    for x, (request, start, stop) in zip(tensors, slices, strict=True):
        assert x is not None
        parts.append(x if stop - start == request.num_rows else x[start:stop])
    return parts


def divided(tensors: Sequence[torch.Tensor | None], counts: Sequence[int]) -> list[Sequence[torch.Tensor | None]]:
    """Return each of the tensors in parts of this many rows."""
    columns = [[None] * len(counts) if x is None else x.split_with_sizes(counts) for x in tensors]
    return [*map(list, zip(*columns, strict=True))] if columns else [[] for _ in counts]


def encoded(tensors: Sequence[torch.Tensor | None], counts: Sequence[int]) -> Sequence[Sequence[memoryview] | None]:
    """Return the bytes of what `divided` returns, of each tensor from one copy. None for all, if one of the tensors is
    large or not plain."""
    wholes = []
    for x in tensors:
        whole = None if x is None else small_bytes(x)
        if whole is None:
            return [None] * len(counts)
        wholes.append((whole, len(whole) // sum(counts)))
    parts, start = [], 0
    for count in counts:
        parts.append([whole[start * size : (start + count) * size] for whole, size in wholes])
        start += count
    return parts


def joined(part: RowSlice, work: Work, result: WorkResult) -> WorkResult | None:
    work.results.append(result)
    if not part.is_last:
        return None
    columns = zip(*(one.tensors for one in work.results), strict=True)
    return WorkResult([None if None in column else torch.cat(column) for column in columns], result.version)


def presence(works: Sequence[Work]) -> tuple[bool, ...]:
    given = [by.output_gradients for by in works if by.output_gradients is not None]
    return tuple([any(x is not None for x in column) for column in zip(*given, strict=True)])
