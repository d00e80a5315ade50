"""Gradients as lists of tensors: their sum, their norm, whether they are finite, and the trimmed mean over peers."""

import math
from collections.abc import Callable, Hashable, Sequence
from itertools import zip_longest
from typing import Final

import torch
from torch.autograd.graph import _engine_run_backward

Gradients = Sequence[torch.Tensor | None]
"""A gradient for each input, or for each trained parameter; None where no gradient flows."""

_HALVES: Final = (torch.float16, torch.bfloat16)
_PLAIN: Final = (torch.float32, torch.float64)
_LARGE: Final = 32768
"""Elements."""
_CHUNK: Final = 1 << 15
"""Elements sorted at a time: the few copies that sorting needs then stay in a processor's cache, which is four times as
fast."""


def per_row(scales: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return the rows' scales in a shape and dtype that `x` is multiplied with."""
    real = x.real.dtype if x.is_complex() else x.dtype
    return scales.to(x.device, real).view(-1, *(1 for _ in x.shape[1:]))


def weighted(gradients: Gradients, weights: torch.Tensor | None) -> Gradients:
    """Return gradients of which each row is multiplied by its weight, if there are weights."""
    return gradients if weights is None else [None if x is None else x * per_row(weights, x) for x in gradients]


def weight_gradients(outputs: Sequence[torch.Tensor], gradients: Gradients, weights: torch.Tensor) -> torch.Tensor:
    """Return the gradients of the rows' weights, each the product of its row's outputs and their gradients."""
    total = torch.zeros_like(weights)
    for output, gradient in zip(outputs, gradients, strict=True):
        if gradient is not None:
            products = output.detach() * gradient.conj()
            total += (products.real if products.is_complex() else products).flatten(1).sum(1, dtype=total.dtype)
    return total


def norm_of(tensors: Gradients) -> float:
    """Return the Euclidean norm over all elements: not finite if one is not, or if its square overflows its type."""
    plain = [x if x.dtype in _PLAIN and x.layout is torch.strided else for_norm(x) for x in tensors if x is not None]
    if not plain:
        return 0.0
    large = [x for x in plain if x.numel() >= _LARGE and x.is_cpu and x.is_contiguous()]
    if large:
        # twice as fast as torch's norm
        squares = [float(torch.dot(flat, flat)) for flat in (x.detach().view(-1) for x in large)]
        others = [x for x in plain if not (x.numel() >= _LARGE and x.is_cpu and x.is_contiguous())]
        return math.hypot(norm_of(others), *map(math.sqrt, squares))
    norms = torch._foreach_norm(plain)
    if not norms[0].is_cpu and len({norm.device for norm in norms}) == 1:
        return float(torch.linalg.vector_norm(torch.stack([x.double() for x in norms])))  # one wait for the device
    return math.hypot(*map(float, norms))


def norms_of(tensors: Sequence[torch.Tensor]) -> list[float]:
    """Return the norm of each, as `norm_of` does of all, after one wait for the device."""
    if not tensors:
        return []
    norms = torch._foreach_norm(
        [x if x.dtype in _PLAIN and x.layout is torch.strided else for_norm(x) for x in tensors]
    )
    if len({(x.dtype, x.device) for x in norms}) > 1:  # optimizers may count their steps on the CPU
        norms = tuple([x.to(tensors[0].device, torch.float64) for x in norms])
    found: list[float] = torch.stack(norms).tolist()
    return found


def are_finite(tensors: Gradients) -> bool:
    """Return whether no tensor holds a NaN or an infinity.

    One sum per device decides, unless it overflowed: ``torch.isfinite`` of each element makes three temporaries.
    """
    present = [x if x.dtype in _PLAIN and x.layout is torch.strided else _numbers(x) for x in tensors if x is not None]
    if not present:
        return True
    totals = [x.sum(dtype=torch.float64 if x.dtype == torch.float64 else torch.float32) for x in present]
    if math.isfinite(float(totals[0] if len(totals) == 1 else torch.stack(totals).sum())):
        return True
    return all(bool(torch.isfinite(x).all()) for x in present)


def add_gradients(left: Gradients | None, right: Gradients | None) -> Gradients | None:
    """Return the sum, where absent gradients count as zeros. Neither is changed."""
    if left is None or right is None:
        return left if right is None else right
    return [_sum(a, b) for a, b in zip_longest(left, right)]  # parameters may have been added between them


class GatheredGradients:
    """Gradients of one expert's parameters that wait for its next step.

    `step_every`: batches that make a step. `trim_peers`: the share of peers left out at each end, coordinate by
    coordinate; at 0, gradients of all peers are summed.
    """

    def __init__(self, step_every: int, trim_peers: float) -> None:
        self._step_every = step_every
        self._trim_peers = trim_peers
        self.num_batches = 0
        self._sums: dict[Hashable, tuple[Gradients, int]] = {}  # of each peer, or of all under None; and how many
        self._last_peers: list[frozenset[Hashable]] = []  # of the last two steps

    def add(self, gradients: Gradients, peer: Hashable, num_batches: int = 1) -> None:
        peer = peer if self._trim_peers else None
        if peer in self._sums:
            before, count = self._sums[peer]
            self._sums[peer] = [_sum(a, b) for a, b in zip_longest(before, gradients)], count + num_batches
        else:
            self._sums[peer] = [None if x is None else _alone(x) for x in gradients], num_batches
        self.num_batches += num_batches

    @property
    def is_enough(self) -> bool:
        if self.num_batches < self._step_every or not self._trim_peers:
            return self.num_batches >= self._step_every
        absent = frozenset().union(*self._last_peers) - self._sums.keys()
        return not absent or self.num_batches >= 4 * self._step_every

    def merged(self) -> Gradients | None:
        """Return the sum; with `trim_peers`, the trimmed mean over peers times the number of batches."""
        if len(self._sums) <= 1:
            return next(iter(self._sums.values()))[0] if self._sums else None
        means = [
            summed if count == 1 else [None if x is None else x / count for x in summed]
            for summed, count in self._sums.values()
        ]
        return trimmed_mean(means, self._trim_peers, scale=self.num_batches)

    def take(self) -> Gradients | None:
        merged = self.merged()
        self._last_peers = [*self._last_peers[-1:], frozenset(self._sums) - {None}]
        self.clear()
        return merged

    def clear(self) -> None:
        self._sums, self.num_batches = {}, 0


def trimmed_mean(gradients: Sequence[Gradients], share: float, *, scale: float = 1.0) -> Gradients:
    """Return, for each coordinate, `scale` times the mean of the peers' values without a `share` at each end.

    The rule of Yin et al., "Byzantine-Robust Distributed Learning" (2018). With so few peers that the share is less
    than one of them, the plain mean. An absent gradient is zero where another peer has one. Sparse ones become dense.
    """
    num_left_out = min(int(share * len(gradients) + 1e-9), (len(gradients) - 1) // 2)
    return [_merge(column, num_left_out, scale) for column in zip(*gradients, strict=True)]


def _merge(column: Sequence[torch.Tensor | None], num_left_out: int, scale: float) -> torch.Tensor | None:
    present = next((x for x in column if x is not None), None)
    if present is None:
        return None
    dense = [torch.zeros_like(present) if x is None else x for x in column]
    dense = [x if x.layout is torch.strided else x.to_dense() for x in dense]
    merged = torch.empty(dense[0].shape, dtype=dense[0].dtype, device=dense[0].device)
    plain = [(torch.view_as_real(x) if x.is_complex() else x).reshape(-1) for x in (merged, *dense)]
    size = _CHUNK if merged.device.type == "cpu" else max(1, plain[0].numel())
    for into, *rows in zip(*(torch.split(x, size) for x in plain), strict=True):
        middle = _middle(rows, num_left_out)
        torch.mul(sum(middle[1:], middle[0]), scale / len(middle), out=into)
    return merged


def _middle(rows: list[torch.Tensor], num_left_out: int) -> list[torch.Tensor]:
    """Return the rows without the largest and smallest `num_left_out` values of each coordinate.

    By a sorting network: sorting along so short a dimension takes torch twenty times as long.
    """
    low, high = 0, len(rows) - 1
    for _ in range(num_left_out):
        for index in range(low, high):
            _order(rows, index)
        high -= 1
        for index in range(high - 1, low - 1, -1):
            _order(rows, index)
        low += 1
    return rows[low : high + 1]


def _order(rows: list[torch.Tensor], index: int) -> None:
    left, right = rows[index], rows[index + 1]
    rows[index], rows[index + 1] = torch.minimum(left, right), torch.maximum(left, right)


def _sum(a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b if a.layout is torch.strided else b + a  # PyTorch adds a sparse one to a dense one, in this order


def _alone(x: torch.Tensor) -> torch.Tensor:
    """Copy a part of a stack of many experts' gradients, which would keep the whole stack in memory until the next
    step."""
    return x.clone() if x.layout is torch.strided and x.untyped_storage().nbytes() > 2 * x.nbytes else x


def for_norm(x: torch.Tensor) -> torch.Tensor:
    x = _numbers(x.coalesce() if x.layout is torch.sparse_coo else x)
    return x.float() if x.dtype in _HALVES else x


def _numbers(x: torch.Tensor) -> torch.Tensor:
    """Return the real numbers that it consists of; of a sparse tensor, those that it stores."""
    if x.layout is not torch.strided:
        x = x._values() if x.layout is torch.sparse_coo else x.values()
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def run_engine(
    outputs: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor],
    sources: Sequence[torch.Tensor],
    *,
    retain_graph: bool = False,
) -> Sequence[torch.Tensor | None]:
    """Do what ``torch.autograd.grad(..., allow_unused=True)`` does, without its forty checks of the arguments."""
    return _engine_run_backward(
        tuple(outputs),
        tuple(gradients),
        retain_graph,
        False,
        tuple(sources),
        allow_unreachable=True,
        accumulate_grad=False,
    )


def backpropagate(
    outputs: Sequence[torch.Tensor],
    output_gradients: Gradients,
    sources: Sequence[torch.Tensor],
    run: Callable[..., Sequence[torch.Tensor | None]],
) -> list[torch.Tensor | None]:
    """Return the gradients of `sources`, None for those that have none. Raises: ValueError for one that fits no output.

    `run`: does it for outputs and sources that require gradients.
    """
    roots: list[torch.Tensor] = []
    seeds: list[torch.Tensor] = []
    for output, gradient in zip(outputs, output_gradients, strict=True):
        if gradient is not None and output.requires_grad:
            if gradient.shape != output.shape or gradient.is_complex() != output.is_complex():
                raise ValueError(f"a gradient of {gradient.shape} for an output of {output.shape}")
            roots.append(output)
            seeds.append(gradient)
    wanted = [one for one in sources if one.requires_grad]  # not before: the module itself may freeze parameters
    if not roots or not wanted:
        return [None] * len(sources)
    found = iter(run(roots, seeds, wanted))
    return [next(found) if one.requires_grad else None for one in sources]
