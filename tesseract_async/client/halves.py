"""A small backward in the loop's own thread: down to the remote calls, and on from their answers."""

import asyncio
import time
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch.autograd.graph import Node

from tesseract_async.client.gradient_requests import BackwardStep, GradientRequest, RemoteCall, engine_thread
from tesseract_async.client.leaves import AccumulateGrad, Leaves, gradients_of, separate
from tesseract_async.client.remote_call import AWAIT, ISSUE
from tesseract_async.lru import LRU
from tesseract_async.runtime.gradients import run_engine

R = TypeVar("R")

MAX_NODES_HERE = 64
MAX_NUMBERS_HERE = 2**16
MAX_SECONDS_HERE = 0.002
"""Seconds for which a backward may keep the loop's thread at a time. Estimated by the nodes on each side of remote
calls, the numbers in leaves and inputs, and the seconds that the same operations took before."""

_took: LRU[frozenset[type], float] = LRU(1024)
"""Seconds for which graphs of these kinds of nodes kept a loop, smoothed."""


class GraphCut(NamedTuple):
    """The place where remote calls cut a graph into two parts."""

    ends: list[Any]
    """The last nodes of the first part, the remote calls'."""
    above: list[Node]
    """The nodes that accumulate the gradients of the first part's leaves."""
    below: list[Node]
    """The same nodes of the second part."""
    kinds: frozenset[type]
    """All nodes' types."""


class Halves(NamedTuple):
    """A backward that can be done in two halves."""

    cut: GraphCut
    leaves: Leaves
    """First those of the first half."""
    tokens: list[torch.Tensor]
    """The remote calls', where the second half starts."""
    calls: list[RemoteCall]


def find_cut(loss: torch.Tensor) -> GraphCut | None:
    """Return where the remote calls' `_Issue`s cut the graph of `loss`: each node belongs to the part from `loss` down
    to them, or to the part that begins at the `_Await`s, which follow them.

    Returns None if there is no such place, if a part has many nodes, or if it holds other functions in Python, which
    may do anything, such as another backward.
    """
    upper: set[Node] = set()
    lower: set[Node] = set()
    above: list[Node] = []
    below: list[Node] = []
    ends: list[Node] = []
    kinds: set[type] = set()
    stack = [] if loss.grad_fn is None else [loss.grad_fn]
    for part, leaves, kind in ((upper, above, ISSUE), (lower, below, AWAIT)):
        while stack:
            node = stack.pop()
            if node in part:
                continue
            part.add(node)
            if len(part) > MAX_NODES_HERE or (part is lower and node in upper):
                return None
            kinds.add(type(node))
            if isinstance(node, AccumulateGrad):
                if node.variable.requires_grad:  # type: ignore[attr-defined]
                    leaves.append(node)
            elif part is upper and type(node) is ISSUE:
                ends.append(node)
            elif isinstance(node, torch.autograd.function.BackwardCFunction) and type(node) is not kind:
                return None
            else:
                for following, _ in node.next_functions:
                    if following is not None:
                        stack.append(following)
        stack = [following for end in ends for following, _ in end.next_functions if following is not None]
    return GraphCut(ends, above, below, frozenset(kinds)) if ends else None


def find_halves(loss: torch.Tensor) -> Halves | None:
    """Return the two halves of the backward of `loss`; None where the loop's thread is not to compute them."""
    cut = find_cut(loss)
    if cut is None or _took.get(cut.kinds, 0.0) > MAX_SECONDS_HERE:
        return None
    loop = asyncio.get_running_loop()
    leaves = Leaves([*cut.above, *cut.below])
    if leaves.have_hooks:
        return None
    tokens, calls, num_numbers = [], [], 0
    for leaf in leaves.tensors:
        if not leaf.is_cpu:
            return None
        num_numbers += leaf.numel()
    for node in cut.ends:
        if node.call.loop is not loop:
            return None
        token, *inputs = node.saved_tensors
        tokens.append(token)
        calls.append(node.call)
        for x in inputs:
            num_numbers += x.numel()
    return Halves(cut, leaves, tokens, calls) if num_numbers <= MAX_NUMBERS_HERE else None


async def run_halves(
    step: BackwardStep, loss: torch.Tensor, gradient: torch.Tensor | None, retain_graph: bool, halves: Halves
) -> None:
    """Do all of a backward in the loop's thread. Raises: what the engine and the remote backwards raise."""
    (_, above, _, kinds), leaves, tokens, calls = halves
    upper, lower = leaves.tensors[: len(above)], leaves.tensors[len(above) :]
    step.cut = dict.fromkeys(calls)
    step.read_scale()
    try:
        first = _timed(step, kinds, lambda: gradients_of(loss, [*tokens, *upper], gradient, retain_graph=retain_graph))
        await _run_requests([request for request in step.cut.values() if request is not None])
        seeds = [seed for seed in first[: len(tokens)] if seed is not None]
        second = _timed(step, kinds, lambda: run_engine(tokens, seeds, lower, retain_graph=retain_graph))
    except BaseException:  # cancelled, too: no remote backward goes on without its caller
        step.cancel()
        await step.aclose()
        raise
    leaves.add(separate([*first[len(tokens) :], *second]))


async def _run_requests(requests: list[GradientRequest]) -> None:
    if len(requests) == 1:
        await requests[0].run()
        return
    for request in requests:
        request.begin()
    for request in requests:
        if request.task is not None:
            await asyncio.wait([request.task])
        request.check()


def _timed(step: BackwardStep, kinds: frozenset[type], compute: Callable[[], R]) -> R:
    """Run the engine for `step`, and learn how long that takes."""
    engine_thread.step, began = step, time.thread_time()
    try:
        return compute()
    finally:
        engine_thread.step = None
        # a quarter: one that was slow once, on a busy computer, is no reason
        before = _took.get(kinds, 0.0)
        _took[kinds] = before + (time.thread_time() - began - before) / 4
