"""`backward` without blocking the loop.

The engine runs in a thread, which waits for the gradients of remote calls (see `remote_call`). Where these calls cut
the graph in two and the local work is small, no other thread is needed: the loop's thread runs the engine down to the
calls, turns to other things, and runs the engine on from their answers (see `halves`).
"""

import asyncio
import contextlib
from collections.abc import Coroutine
from typing import Protocol

import torch

from tesseract_async.client.engine_threads import run_in_engine_thread
from tesseract_async.client.gradient_requests import BackwardStep, engine_thread, steps
from tesseract_async.client.halves import find_halves, run_halves
from tesseract_async.client.isolated import NO_GRAD, isolated
from tesseract_async.client.leaves import Leaves, gradients_of, separate
from tesseract_async.client.remote_call import recorded
from tesseract_async.client.scaling import Scaler


def backward(
    loss: torch.Tensor,
    gradient: torch.Tensor | None = None,
    *,
    retain_graph: bool = False,
    scaler: Scaler | None = None,
) -> Coroutine[object, object, None]:
    """Backpropagate `loss` while the loop stays free; await it. Like ``loss.backward()``, it adds to ``.grad``.

    The engine runs in a separate thread; gradients are added to the leaves' ``.grad`` in the awaiting task, in one
    turn of the loop and all or nothing: after an error or a cancellation every ``.grad`` is as before. Experts whose
    servers had answered by then have taken their step. Cancelling fails the gradient requests under way and returns
    once the thread has ended: it waits for a local operation in progress, but for nothing remote.

    Where the local work is small, the engine runs in the awaiting task instead: down to the calls, and on from their
    answers. So a hook must not wait for what needs the loop, such as another backward through a remote expert.

    Hooks that fire after accumulation (`register_post_accumulate_grad_hook`) fire in that turn, too. Where others may
    wait for it (on ``AccumulateGrad``; DistributedDataParallel's, as soon as `torch.distributed` is initialized), the
    engine's thread adds the gradients once all of them are there.

    `gradient` is needed where `loss` is not a scalar, as in ``Tensor.backward``; with `retain_graph`, backward can go
    through the graph again, and its experts then take another step. `scaler`: the `torch.amp.GradScaler` whose
    ``scale`` gave `loss`. Gradients are divided by its scale before they travel, and multiplied by it when they come
    back. Where they overflowed, none travel, and the local ones become NaN, so that the scaler skips its step.

    Raises: TypeError or RuntimeError for a loss without a graph; RuntimeError for a graph that only torch's own
    backward goes through (FSDP, reentrant checkpoints); ExpertFailed for gradients that are not finite; whatever else a
    remote expert's backward raises.
    """
    if isinstance(gradient, torch.Tensor):
        with torch.inference_mode(False):
            gradient = gradient.detach().clone()  # its buffer may be filled anew before the engine has read it
    return isolated(_backward(loss, gradient, retain_graph, scaler), modes=NO_GRAD)


async def _backward(
    loss: torch.Tensor, gradient: torch.Tensor | None, retain_graph: bool, scaler: Scaler | None
) -> None:
    if not isinstance(loss, torch.Tensor):
        raise TypeError(f"backward takes a tensor, not a {type(loss).__name__}")
    if scaler is not None and not (hasattr(scaler, "get_scale") and hasattr(scaler, "is_enabled")):
        raise TypeError(f"`scaler` is a torch.amp.GradScaler or one like it, not a {type(scaler).__name__}")
    if not loss.requires_grad:
        raise RuntimeError("this loss needs no gradient: it was made under no_grad, or of nothing that requires grad")
    if gradient is None and loss.numel() != 1:
        raise RuntimeError(f"backward of a tensor of shape {tuple(loss.shape)} takes its `gradient` too")
    step = BackwardStep(scaler, could_be_noted=gradient is None)
    stream: torch.cuda.Stream | None = torch.cuda.current_stream() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
    if stream is None and (halves := find_halves(loss)) is not None:
        await run_halves(step, loss, gradient, retain_graph, halves)
        return
    outcome: asyncio.Future[tuple[Leaves, list[torch.Tensor | None]]] = asyncio.get_running_loop().create_future()
    run_in_engine_thread(lambda: _run(step, loss, gradient, retain_graph, stream), outcome)
    cancelled: asyncio.CancelledError | None = None
    while not outcome.done():
        try:
            await asyncio.wait([outcome])
        except asyncio.CancelledError as caught:
            cancelled = caught
            step.cancel()
    error = outcome.exception()  # asked for in any case: otherwise it is logged as lost
    if (failed := cancelled or error) is not None:
        step.cancel()
        await step.aclose()
        raise failed
    leaves, gradients = outcome.result()
    leaves.add(gradients)


def _run(
    step: BackwardStep,
    loss: torch.Tensor,
    gradient: torch.Tensor | None,
    retain_graph: bool,
    stream: torch.cuda.Stream | None,
) -> tuple[Leaves, list[torch.Tensor | None]]:
    """Return the leaves under `loss` and what is left to add to each, in separate memory. Runs in an engine's thread,
    which continues the CUDA stream of the awaiting thread."""
    engine_thread.step = step
    try:
        with contextlib.nullcontext() if stream is None else torch.cuda.stream(stream):
            leaves = Leaves.under(loss)
            step.read_scale()
            (root,) = recorded(_Root, loss, step)
            gradients = gradients_of(root, leaves.tensors, gradient, retain_graph=retain_graph)
            if leaves.have_hooks:
                step.refuse_if_cancelled()
                leaves.accumulate(gradients)
                return leaves, [None for _ in gradients]
            return leaves, separate(gradients)
    finally:
        engine_thread.step = None
        if step.graph_task is not None:
            steps.pop(step.graph_task, None)


class _RootContext(Protocol):
    step: BackwardStep


class _Root(torch.autograd.Function):
    """The first node of every `backward` in a thread: it learns the engine's graph task before anything else runs."""

    @staticmethod
    def forward(ctx: _RootContext, loss: torch.Tensor, step: BackwardStep) -> torch.Tensor:
        ctx.step = step
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: _RootContext, *gradients: torch.Tensor | None) -> tuple[object, ...]:
        ctx.step.graph_task = torch._C._current_graph_task_id()
        steps[ctx.step.graph_task] = ctx.step
        return gradients[0], None
