"""Remote calls in torch's graph.

A remote call has *two* nodes in the graph: `_Await` is made when the call is sent, `_Issue` when its answer arrives.
In backward, `_Issue` starts the gradient request on the loop and returns at once; `_Await`, whose gradient is the
request's answer, blocks the engine's thread (never the loop's) until that is there. PyTorch's engine runs ready nodes
by descending sequence number; `_Issue` carries the highest, so that all requests go out before anything blocks.

The token between the two nodes is a CPU scalar: `_Await` runs in the thread that called the engine even if the rest of
the graph is on a GPU.
"""

import functools
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import ParamSpec, Protocol, TypeVar

import torch
import torch.utils.checkpoint

from tesseract_async.client.arguments import Versions
from tesseract_async.client.gradient_requests import (
    BackwardStep,
    GradientRequest,
    Remote,
    RemoteCall,
    engine_thread,
    steps,
)
from tesseract_async.client.leaves import always_needed
from tesseract_async.client.scaling import noted_scale
from tesseract_async.errors import ExpertFailed
from tesseract_async.runtime.gradients import are_finite

P = ParamSpec("P")
R = TypeVar("R")

_ISSUE_FIRST = 2**62
_DOUBLE = (
    "a remote expert's gradient can't be differentiated again: call backward without create_graph=True "
    "(double backward would need the expert's second derivatives from its server)"
)
_CHECKPOINTED = (
    "a remote expert can't be called inside torch.utils.checkpoint: its server recomputes the forward anyway, so there "
    "is nothing to save; leave it outside of the checkpointed function"
)
_TRANSFORMED = (
    "a remote expert can't be called inside a transform of torch.func (grad, vmap, jacrev, ...), which does not see "
    "what happens on other computers: use .backward(), torch.autograd.grad or `await tesseract_async.backward(loss)`"
)
_NOT_FINITE = (
    "the gradients of a remote call's outputs are not finite (is the loss, or is it NaN?): nothing was sent, and no "
    "expert took a step on them"
)


async def remote_call(
    remote: Remote, inputs: Sequence[torch.Tensor], *, versions: Versions, differentiable: bool = True
) -> list[torch.Tensor]:
    """Run `remote.forward` and, if `differentiable`, put the call into the graph of `inputs`.

    It is differentiable even where no input requires grad: backward trains the expert. `inputs` are as `Arguments`
    holds them. Raises: what `remote.forward` raises; RuntimeError if an input was changed in place since `versions`.
    """
    if not differentiable:
        outputs = await remote.forward(inputs)
        versions.check()
        return outputs
    detached = [tensor.detach() for tensor in inputs]
    call = RemoteCall(remote)
    (token,) = recorded(_Await, call, always_needed, *inputs)
    call.outputs = await remote.forward(detached)
    versions.check()
    results = recorded(_Issue, call, token, *detached)
    for result in results:
        if (node := result.grad_fn) is not None:
            if hasattr(node, "_set_sequence_nr"):  # private: a test notices if it goes away
                node._set_sequence_nr(_ISSUE_FIRST)
            break
    return list(results)


def recorded(function: type[torch.autograd.Function], *args: object) -> tuple[torch.Tensor, ...]:
    """Return what `function` gives, as autograd records it, whatever modes the thread is in."""
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False):
            return recorded(function, *args)
    before = torch.is_grad_enabled()
    torch._C._set_grad_enabled(True)  # as in `isolated`: a context takes a dozen Python calls
    try:
        # past `Function.apply`, which sees to transforms (refused here) and to default arguments (there are none)
        result: torch.Tensor | tuple[torch.Tensor, ...] = super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]
    finally:
        torch._C._set_grad_enabled(before)
    return result if isinstance(result, tuple) else (result,)


def uncompiled(method: Callable[P, R]) -> Callable[P, R]:
    """The same method; ``torch.compile`` of a model around it compiles what comes before and after."""
    guarded: Callable[P, R] = torch._disable_dynamo(method)  # type: ignore[attr-defined]

    @functools.wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        # the guard imports the compiler, which takes a second; while that is not imported, nothing is being compiled
        return guarded(*args, **kwargs) if "torch._dynamo" in sys.modules else method(*args, **kwargs)

    return call


def refuse_wrappers() -> None:
    """Raise RuntimeError if called inside ``torch.utils.checkpoint`` or a transform of torch.func.

    A transform belongs to its thread; with a BackgroundNode the graph is built in another one, and would give zeros.
    """
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(_TRANSFORMED)
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_filename == torch.utils.checkpoint.__file__:
            raise RuntimeError(_CHECKPOINTED)
        frame = frame.f_back


class _CallContext(Protocol):
    """The part of torch's context that the nodes below use, and what they keep in it."""

    call: RemoteCall
    devices: list[torch.device]
    saved_tensors: tuple[torch.Tensor, ...]

    def save_for_backward(self, *tensors: torch.Tensor) -> None: ...
    def mark_non_differentiable(self, *outputs: torch.Tensor) -> None: ...
    def set_materialize_grads(self, value: bool) -> None: ...


class _Await(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _CallContext, call: RemoteCall, always: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        ctx.set_materialize_grads(False)
        ctx.call = call
        ctx.devices = [tensor.device for tensor in inputs]
        return torch.zeros((), device="cpu")  # whatever torch.set_default_device says

    @staticmethod
    def backward(ctx: _CallContext, *gradients: torch.Tensor | None) -> tuple[object, ...]:
        call: RemoteCall = ctx.call
        step: BackwardStep | None = getattr(engine_thread, "step", None)
        request = None if step is None else step.cut.pop(call, None)
        if request is None:
            request = call.requests.pop(torch._C._current_graph_task_id())
        try:
            if not request.is_done:
                call.refuse_loop_thread()  # here too: on a GPU, _Issue runs in the device's thread
            results = request.wait()
        except BaseException:  # the answer is not waited for any more
            request.cancel()
            raise
        moved = [None if grad is None else grad.to(device) for grad, device in zip(results, ctx.devices, strict=True)]
        if request.scale is not None:
            moved = [None if grad is None else grad * request.scale for grad in moved]
        return (None, None, *moved)


class _Issue(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _CallContext, call: RemoteCall, token: torch.Tensor, *inputs: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.call = call
        ctx.save_for_backward(token, *inputs)
        assert call.outputs is not None
        outputs, call.outputs = tuple(call.outputs), None
        if others := [o for o in outputs if not (o.is_floating_point() or o.is_complex())]:
            ctx.mark_non_differentiable(*others)
        return outputs

    @staticmethod
    def backward(ctx: _CallContext, *gradients: torch.Tensor | None) -> tuple[object, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(_DOUBLE)
        call = ctx.call
        inputs = ctx.saved_tensors[1:]
        graph_task = torch._C._current_graph_task_id()
        step: BackwardStep | None = steps.get(graph_task) or getattr(engine_thread, "step", None)
        is_cut = step is not None and step.cut.get(call, call) is None
        if not is_cut:  # in a hook, a backward inside this one may be through another loop's call
            call.refuse_loop_thread()
        if step is None or step.scaling is None:
            scale = noted_scale(graph_task)
        else:  # a backward inside another one is a separate graph task
            scale = step.scaling.scale(graph_task if step.graph_task is None else step.graph_task)
        if scale is not None:
            gradients = tuple(None if grad is None else grad / scale for grad in gradients)
        request = GradientRequest(call, inputs, gradients, scale)
        if step is not None:
            step.add(request)
        if not are_finite(gradients):
            if scale is None:
                raise ExpertFailed(_NOT_FINITE)
            request.skip()
        elif not is_cut:
            request.start()
        if step is not None and is_cut:
            step.cut[call] = request
        else:
            call.requests[graph_task] = request
        return (None, torch.zeros((), device="cpu"), *[None for _ in inputs])


ISSUE, AWAIT = _Issue._backward_cls, _Await._backward_cls
"""The types of the two nodes."""
