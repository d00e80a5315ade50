"""Remote calls in torch's graph, and `backward` without blocking the loop. One of three files that cross threads.

A remote call has *two* nodes in the graph: `_Await` is made when the call is sent, `_Issue` when its answer arrives.
In backward, `_Issue` starts the gradient request on the loop and returns at once; `_Await`, whose gradient is the
request's answer, blocks the engine's thread (never the loop's) until that is there. PyTorch's engine runs ready nodes
by descending sequence number; `_Issue` carries the highest, so that all requests go out before anything blocks.

Where these are the only such nodes between a loss and its leaves, and what is local takes little, no other thread is
needed: the loop's runs the engine from the loss to `_Issue`, goes on with other things, and runs it from `_Await` on
once the answers are there (`_Step.run_in_halves`).

The token between the two nodes is a CPU scalar: `_Await` runs in the thread that called the engine even if the rest of
the graph is on a GPU. Requests under way are keyed by graph task, so that one graph can be gone through several times.
"""

import asyncio
import atexit
import contextlib
import contextvars
import functools
import os
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from types import FrameType
from typing import Any, ParamSpec, Protocol, TypeVar

import torch
import torch.utils.checkpoint

from tesseract_async.client.arguments import Versions
from tesseract_async.client.isolated import DEFAULT, NO_GRAD, isolated
from tesseract_async.client.leaves import GraphCut, Leaves, find_cut
from tesseract_async.client.scaling import Scaler, Scaling, noted_scale
from tesseract_async.errors import ExpertFailed
from tesseract_async.lru import LRU
from tesseract_async.runtime.gradients import are_finite, run_engine

P = ParamSpec("P")
R = TypeVar("R")

IDLE_SECONDS = 1.0
"""An engine thread without work ends after this long."""
_POLL_SECONDS = 1.0
_ISSUE_FIRST = 2**62
MAX_NODES_HERE = 64
MAX_NUMBERS_HERE = 2**16
MAX_SECONDS_HERE = 0.002
"""Seconds for which a backward may keep the loop's thread at a time. Estimated by the nodes on each side of remote
calls, the numbers in leaves and inputs, and the seconds that the same operations took before."""

_ON_THE_LOOP = (
    "backward through a remote expert was called on the event loop's own thread, which has to stay free to carry the "
    "gradients: use `await tesseract_async.backward(loss)` (or call .backward() in another thread); in a hook, note "
    "what is to be done, and await it after the backward that the hook belongs to"
)
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
_LOOP_GONE = (
    "the event loop that carried this remote call no longer runs: backward needs it, so call it before `asyncio.run` "
    "returns or the BackgroundNode is closed, and in the process that made the call"
)

_NOT_FINITE = (
    "the gradients of a remote call's outputs are not finite (is the loss, or is it NaN?): nothing was sent, and no "
    "expert took a step on them"
)
_CANCELLED_OUTSIDE = "a gradient request was cancelled, and not by its backward: is the program ending?"


class Remote(Protocol):
    """One remote call, as `remote_call` needs it. Both methods run on the loop, outside of autograd."""

    timeout: float
    """Seconds within which `backward` ends, one way or another."""

    async def forward(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The outputs: fresh tensors, no views of each other."""

    async def backward(
        self, inputs: Sequence[torch.Tensor], output_gradients: Sequence[torch.Tensor | None]
    ) -> list[torch.Tensor | None]:
        """One gradient per input, each of its input's shape and dtype, or None."""


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
    call = _RemoteCall(remote)
    (token,) = _recorded(_Await, call, _always_needed, *inputs)
    call.outputs = await remote.forward(detached)
    versions.check()
    results = _recorded(_Issue, call, token, *detached)
    node = next((result.grad_fn for result in results if result.grad_fn is not None), None)
    if node is not None and hasattr(node, "_set_sequence_nr"):  # private: a test notices if it goes away
        node._set_sequence_nr(_ISSUE_FIRST)
    return list(results)


def _recorded(function: type[torch.autograd.Function], *args: object) -> tuple[torch.Tensor, ...]:
    """Return what `function` gives, as autograd records it, whatever modes the thread is in."""
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False):
            return _recorded(function, *args)
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


with torch.inference_mode(False), torch.enable_grad():  # this module may be imported in the midst of anything
    # A leaf in every remote call's graph: without it a call whose inputs need no gradient would have no backward.
    _always_needed = torch.empty(0, requires_grad=True, device="cpu")


class _Cancelled(Exception):
    """The step that this gradient request belongs to was cancelled. Never reaches a user."""


class _GradientRequest:
    """One gradient request under way: started by an engine thread, carried by the loop, awaited by an engine thread."""

    def __init__(self, call: "_RemoteCall", scale: float | None) -> None:
        self.call = call
        self.scale = scale
        """The factor by which the gradients that it carries were multiplied; they travel without it."""
        self.task: asyncio.Task[list[torch.Tensor | None]] | None = None
        self._versions = Versions()
        self._tensors: tuple[Sequence[torch.Tensor], Sequence[torch.Tensor | None]] = (), ()
        self._is_cancelled = False
        self.is_done = False
        """True once there is an answer or an error, or it was cancelled."""
        self._waiting = threading.Lock()  # held until it is done: an Event takes some twenty Python calls
        self._waiting.acquire()
        self._result: list[torch.Tensor | None] | None = None
        self._error: BaseException | None = None

    def start(self, inputs: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor | None], *, is_cut: bool) -> None:
        """Take the gradients, in the thread that runs the engine. `is_cut`: `begin` or `run` follows.

        Raises: RuntimeError if the loop is not running.
        """
        if not self.call.is_loop_running():
            raise RuntimeError(_LOOP_GONE)
        self._versions = Versions((*inputs, *gradients))
        self._tensors = inputs, gradients
        if not is_cut:
            self.call.loop.call_soon_threadsafe(self.begin, context=self.call.context)

    def skip(self, inputs: Sequence[torch.Tensor]) -> None:
        """Instead of `start`, where scaled gradients overflowed: gives NaN, at which the scaler skips its step."""
        numbers = (tensor if tensor.is_floating_point() or tensor.is_complex() else None for tensor in inputs)
        self._result = [None if tensor is None else torch.full_like(tensor, torch.nan) for tensor in numbers]
        self._end()

    def _end(self) -> None:
        self.is_done = True
        with contextlib.suppress(RuntimeError):  # cancelled in this very moment: the other one let go
            if self._waiting.locked():
                self._waiting.release()

    def begin(self) -> None:
        if self.is_done:  # cancelled before it began, or skipped
            return
        self.task = self.call.loop.create_task(self._work())
        self.task.add_done_callback(self._finish)

    async def run(self) -> None:
        """Do the same in this task. Raises: what the remote backward raises."""
        if not self.is_done:
            try:
                self._result = await self._work()
            except asyncio.CancelledError as error:
                task = asyncio.current_task()
                if task is None or task.cancelling():
                    raise
                raise RuntimeError(_CANCELLED_OUTSIDE) from error
            self._end()

    def _work(self) -> Coroutine[object, object, list[torch.Tensor | None]]:
        (inputs, gradients), self._tensors = self._tensors, ((), ())
        return isolated(self.call.remote.backward(inputs, gradients), modes=NO_GRAD, steady=True)

    def _finish(self, task: asyncio.Task[list[torch.Tensor | None]]) -> None:
        self.task = None  # it knows the error, which soon knows the frames that know this: a cycle
        if task.cancelled():
            self._error = self._error or RuntimeError(_CANCELLED_OUTSIDE)
        elif (error := task.exception()) is not None:
            self._error = self._error or error
        else:
            self._result = task.result()
        self._end()

    def cancel(self) -> None:
        """Free the waiting thread at once, and cancel the call, from the loop's thread or another one."""
        if not self.is_done:
            self._error = _Cancelled("the step was cancelled")
            self._end()
        try:
            self.call.loop.call_soon_threadsafe(self._cancel_task)
        except RuntimeError:  # the loop is closed: so is the task
            pass

    def _cancel_task(self) -> None:
        if self.task is not None and not self._is_cancelled:
            self._is_cancelled = True  # once: a second time would break off how it ends its own calls
            self.task.cancel()

    def check(self) -> None:
        """Raise what the remote backward raised, and forget it: it knows this frame, a cycle."""
        error, self._error = self._error, None
        if error is not None:
            try:
                raise error
            finally:
                del error

    def wait(self) -> list[torch.Tensor | None]:
        """Block an engine's thread. Raises: what the remote backward raised; RuntimeError if the loop has ended."""
        while not self._waiting.acquire(timeout=_POLL_SECONDS):
            if not self.call.is_loop_running():
                raise RuntimeError(_LOOP_GONE)
        self.check()
        assert self._result is not None
        self._versions.check()
        return self._result


class _RemoteCall:
    def __init__(self, remote: Remote) -> None:
        self.remote = remote
        self.loop = asyncio.get_running_loop()
        self.loop_thread = threading.get_ident()
        self._process = os.getpid()
        self.context = contextvars.copy_context()
        self.outputs: list[torch.Tensor] | None = None
        self.requests: dict[int, _GradientRequest] = {}
        """By graph task: the same graph may be gone through several times, at once even."""

    def is_loop_running(self) -> bool:
        """Return whether the loop runs in this process; its copy in a fork's child claims to run, too."""
        return self.loop.is_running() and os.getpid() == self._process

    def refuse_loop_thread(self) -> None:
        if threading.get_ident() == self.loop_thread and self.is_loop_running():
            raise RuntimeError(_ON_THE_LOOP)


class _CallContext(Protocol):
    """The part of torch's context that the nodes below use, and what they keep in it."""

    call: _RemoteCall
    devices: list[torch.device]
    step: "_Step"
    saved_tensors: tuple[torch.Tensor, ...]

    def save_for_backward(self, *tensors: torch.Tensor) -> None: ...
    def mark_non_differentiable(self, *outputs: torch.Tensor) -> None: ...
    def set_materialize_grads(self, value: bool) -> None: ...


class _Await(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _CallContext, call: _RemoteCall, always_needed: torch.Tensor, *inputs: torch.Tensor
    ) -> torch.Tensor:
        ctx.set_materialize_grads(False)
        ctx.call = call
        ctx.devices = [tensor.device for tensor in inputs]
        return torch.zeros((), device="cpu")  # whatever torch.set_default_device says

    @staticmethod
    def backward(ctx: _CallContext, *gradients: torch.Tensor | None) -> tuple[object, ...]:
        call: _RemoteCall = ctx.call
        step: _Step | None = getattr(_engine_thread, "step", None)
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
        ctx: _CallContext, call: _RemoteCall, token: torch.Tensor, *inputs: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.call = call
        ctx.save_for_backward(token, *inputs)
        assert call.outputs is not None
        outputs, call.outputs = tuple(call.outputs), None
        ctx.mark_non_differentiable(*(o for o in outputs if not (o.is_floating_point() or o.is_complex())))
        return outputs

    @staticmethod
    def backward(ctx: _CallContext, *gradients: torch.Tensor | None) -> tuple[object, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(_DOUBLE)
        call: _RemoteCall = ctx.call
        inputs = ctx.saved_tensors[1:]
        graph_task = torch._C._current_graph_task_id()
        step: _Step | None = _steps.get(graph_task) or getattr(_engine_thread, "step", None)
        is_cut = step is not None and step.cut.get(call, call) is None
        if not is_cut:  # in a hook, a backward inside this one may be through another loop's call
            call.refuse_loop_thread()
        if step is None or step.scaling is None:
            scale = noted_scale(graph_task)
        else:  # a backward inside another one is a separate graph task
            scale = step.scaling.scale(graph_task if step.graph_task is None else step.graph_task)
        if scale is not None:
            gradients = tuple(None if grad is None else grad / scale for grad in gradients)
        request = _GradientRequest(call, scale)
        if step is not None:
            step.add(request)
        if are_finite(gradients):
            request.start(inputs, gradients, is_cut=is_cut)
        elif scale is not None:
            request.skip(inputs)
        else:
            raise ExpertFailed(_NOT_FINITE)
        if step is not None and is_cut:
            step.cut[call] = request
        else:
            call.requests[graph_task] = request
        return (None, torch.zeros((), device="cpu"), *(None for _ in inputs))


class _Step:
    def __init__(self, scaler: Scaler | None) -> None:
        """Made in the thread that awaits, whose stream the engine continues."""
        self.graph_task: int | None = None
        self._scaler = scaler
        self._stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
        self.scaling: Scaling | None = None
        self._lock = threading.Lock()
        self._cancelled = False
        self._requests: list[_GradientRequest] = []
        self.cut: dict[_RemoteCall, _GradientRequest | None] = {}
        """The remote calls between the two halves, where the engine runs twice in the loop's thread."""

    def parts_of(self, loss: torch.Tensor) -> tuple[Leaves, list[torch.Tensor], GraphCut] | None:
        """Return the leaves under `loss`, the tokens of its remote calls and where they lie. None if `run_in_halves`
        cannot compute them."""
        found = None if self._stream is not None else find_cut(loss, *_KINDS, most=MAX_NODES_HERE)
        if found is None or _took.get(found.kinds, 0.0) > MAX_SECONDS_HERE:
            return None
        loop, tokens = asyncio.get_running_loop(), []
        calls: dict[_RemoteCall, _GradientRequest | None] = {}
        issues: list[Any] = found.ends
        leaves = Leaves(loss)
        num_numbers = sum([leaf.numel() for leaf in leaves.tensors])
        for node in issues:
            token, *inputs = node.saved_tensors
            tokens.append(token)
            calls[node.call] = None
            num_numbers += sum([x.numel() for x in inputs])
            if node.call.loop is not loop:
                return None
        is_small = num_numbers <= MAX_NUMBERS_HERE and all([x.is_cpu for x in leaves.tensors])
        if not is_small or leaves.have_hooks:
            return None
        self.cut = calls
        return leaves, tokens, found

    async def run_in_halves(
        self,
        loss: torch.Tensor,
        gradient: torch.Tensor | None,
        retain_graph: bool,
        parts: tuple[Leaves, list[torch.Tensor], GraphCut],
    ) -> None:
        """Do all of a backward in the loop's thread: down to the remote calls, and on from their answers."""
        leaves, tokens, found = parts
        upper = [leaf for leaf in leaves.tensors if id(leaf) in found.leaves]
        lower = [leaf for leaf in leaves.tensors if id(leaf) not in found.leaves]
        leaves.tensors = [*upper, *lower]
        self.scaling = Scaling(self._scaler, could_be_noted=gradient is None)
        with self._here(found):
            above = gradients_of(loss, [*tokens, *upper], gradient, retain_graph=retain_graph)
        requests = list(filter(None, self.cut.values()))
        if len(requests) == 1:
            await requests[0].run()
        else:
            for request in requests:
                request.begin()
            for request in requests:
                if request.task is not None:
                    await _ended(request.task)
                request.check()
        with self._here(found):
            seeds = [seed for seed in above[: len(tokens)] if seed is not None]
            below = run_engine(tokens, seeds, lower, retain_graph=retain_graph)
        leaves.add([None if grad is None else grad.detach().clone() for grad in (*above[len(tokens) :], *below)])

    @contextlib.contextmanager
    def _here(self, found: GraphCut) -> Iterator[None]:
        _engine_thread.step, began = self, time.thread_time()
        try:
            yield
        finally:
            _engine_thread.step = None
            # a quarter: one that was slow once, on a busy computer, is no reason
            before = _took.get(found.kinds, 0.0)
            _took[found.kinds] = before + (time.thread_time() - began - before) / 4

    def run(
        self, loss: torch.Tensor, gradient: torch.Tensor | None, retain_graph: bool
    ) -> tuple[Leaves, list[torch.Tensor | None]]:
        """Return the leaves under `loss` and what is left to add to each, in separate memory. In an engine's thread."""
        _engine_thread.step = self
        try:
            stream: Any = contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
            with stream:
                leaves = Leaves(loss)
                self.scaling = Scaling(self._scaler, could_be_noted=gradient is None)
                (root,) = _recorded(_Root, loss, self)
                gradients = gradients_of(root, leaves.tensors, gradient, retain_graph=retain_graph)
                if leaves.have_hooks:
                    self._refuse_if_cancelled()
                    leaves.accumulate(gradients)
                    return leaves, [None for _ in gradients]
                # The engine may hand out one tensor for two leaves, or an expanded one: .grad must be neither.
                return leaves, [None if grad is None else grad.detach().clone() for grad in gradients]
        finally:
            _engine_thread.step = None
            if self.graph_task is not None:
                _steps.pop(self.graph_task, None)

    def add(self, request: _GradientRequest) -> None:
        """Add a request, in an engine's thread."""
        with self._lock:
            self._refuse_if_cancelled()
            self._requests.append(request)

    def cancel(self) -> None:
        """Fail everything under way and to come, so that the engine's thread leaves."""
        with self._lock:
            self._cancelled = True
            requests = list(self._requests)
        for request in requests:
            request.cancel()

    def _refuse_if_cancelled(self) -> None:
        if self._cancelled:
            raise _Cancelled("the step was cancelled")

    async def aclose(self) -> None:
        """Wait until the tasks of cancelled requests have ended, those on the running loop."""
        loop = asyncio.get_running_loop()
        tasks = [r.task for r in self._requests if r.task is not None and r.call.loop is loop and not r.task.done()]
        while tasks := [task for task in tasks if not task.done()]:
            await asyncio.wait(tasks)


_KINDS: tuple[type, type] = _Issue._backward_cls, _Await._backward_cls
_took: LRU[frozenset[type], float] = LRU(1024)
"""Seconds for which graphs of these kinds of nodes kept a loop, smoothed."""
_steps: dict[int, _Step] = {}
"""By graph task: how a node learns which `backward` it runs in."""
_engine_thread = threading.local()


def gradients_of(
    root: torch.Tensor, leaves: Sequence[torch.Tensor], gradient: torch.Tensor | None, *, retain_graph: bool
) -> Sequence[torch.Tensor | None]:
    """Do what ``torch.autograd.grad(..., allow_unused=True)`` does; without its checks where one is implied."""
    if gradient is None and root.is_floating_point() and leaves:
        seed = torch.ones_like(root, memory_format=torch.preserve_format)
        return run_engine((root,), (seed,), leaves, retain_graph=retain_graph)
    return torch.autograd.grad(root, leaves, gradient, retain_graph=retain_graph, allow_unused=True)


class _Root(torch.autograd.Function):
    """The first node of every `backward`: it learns the engine's graph task before anything else runs."""

    @staticmethod
    def forward(ctx: _CallContext, loss: torch.Tensor, step: _Step) -> torch.Tensor:
        ctx.step = step
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: _CallContext, *gradients: torch.Tensor | None) -> tuple[object, ...]:
        ctx.step.graph_task = torch._C._current_graph_task_id()
        _steps[ctx.step.graph_task] = ctx.step
        return gradients[0], None


def num_steps() -> int:
    """Return how many `backward`s of this process are under way in an engine's thread."""
    return len(_steps)


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
    once the thread has left, which waits for a local operation in progress but for nothing remote.

    Where what is local is small, the engine runs in the awaiting task instead, up to the calls and on from their
    answers. So a hook must not wait for what needs the loop, such as another backward through a remote expert.

    Hooks that fire after accumulation (`register_post_accumulate_grad_hook`) fire in that turn, too. Where others may
    wait for it (on ``AccumulateGrad``; DistributedDataParallel's, as soon as `torch.distributed` is initialized), the
    engine's thread adds the gradients once all of them are there.

    `gradient` is needed where `loss` is not a scalar, as in ``Tensor.backward``; with `retain_graph` the graph can be
    gone through again, and its experts then take another step. `scaler`: the `torch.amp.GradScaler` whose ``scale``
    gave `loss`. What travels is divided by its scale, what comes back multiplied; where gradients overflowed, nothing
    travels, and the local ones become NaN, at which the scaler skips its step.

    Raises: TypeError or RuntimeError for a loss without a graph; RuntimeError for a graph that only torch's own
    backward goes through (FSDP, reentrant checkpoints); ExpertFailed for gradients that are not finite, and what else a
    remote expert's backward raises.
    """
    if isinstance(gradient, torch.Tensor):
        with torch.inference_mode(False):
            gradient = gradient.detach().clone()  # its buffer may be filled anew before the engine has read it
    return isolated(_backward(loss, gradient, retain_graph, scaler), modes=DEFAULT)


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
    step = _Step(scaler)
    if (parts := step.parts_of(loss)) is not None:
        try:
            await step.run_in_halves(loss, gradient, retain_graph, parts)
        except BaseException:  # cancelled, too: no remote backward goes on without its caller
            step.cancel()
            await step.aclose()
            raise
        return
    outcome: asyncio.Future[tuple[Leaves, list[torch.Tensor | None]]] = asyncio.get_running_loop().create_future()
    run_in_engine_thread(lambda: step.run(loss, gradient, retain_graph), outcome)
    cancelled: asyncio.CancelledError | None = None
    while not outcome.done():
        try:
            await _ended(outcome)
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


async def _ended(future: asyncio.Future[R]) -> None:
    """Wait until it is done. A cancellation of this leaves it as it is."""
    told = future.get_loop().create_future()

    def tell(_: object) -> None:
        if not told.done():
            told.set_result(None)

    future.add_done_callback(tell)
    try:
        await told
    finally:
        future.remove_done_callback(tell)


class _Inbox:
    """Holds the next job of one thread."""

    def __init__(self) -> None:
        self._job: Callable[[], None] | None = None
        self._filled = threading.Lock()  # no SimpleQueue: see `TesseractRuntime`
        self._filled.acquire()

    def put(self, job: Callable[[], None]) -> None:
        """Give it one; it must be empty."""
        self._job = job
        self._filled.release()

    def get(self, timeout: float = -1) -> Callable[[], None] | None:
        """Wait for it, at most so many seconds (-1: for as long as it takes). None where none came."""
        if not self._filled.acquire(timeout=timeout):
            return None
        job, self._job = self._job, None
        return job


class _EngineThreads:
    """Threads that grow with the work in flight: a backward that waits for its experts never keeps another waiting."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Forget all threads: in a fork's child there are none."""
        self._lock = threading.Lock()
        self._idle: list[_Inbox] = []
        self._num_busy = 0
        self._all_idle = threading.Condition(self._lock)

    def wait_idle(self, timeout: float) -> bool:
        """Wait until no job runs, at most `timeout` seconds. Return whether none does."""
        with self._all_idle:
            return self._all_idle.wait_for(lambda: not self._num_busy, timeout)

    def submit(self, job: Callable[[], None]) -> None:
        """Run `job`, which must not raise, in a thread at once."""
        with self._lock:
            inbox = self._idle.pop() if self._idle else None
            self._num_busy += 1
        if inbox is not None:
            inbox.put(job)
        else:
            threading.Thread(target=self._run, args=(job,), name="tesseract-backward", daemon=True).start()

    def _run(self, job: Callable[[], None] | None) -> None:
        inbox = _Inbox()
        while job is not None:
            job()
            job = None  # an idle thread must not keep a graph alive
            with self._lock:
                self._idle.append(inbox)
                self._num_busy -= 1
                self._all_idle.notify_all()
            if (job := inbox.get(timeout=IDLE_SECONDS)) is None:
                with self._lock:
                    if inbox in self._idle:
                        self._idle.remove(inbox)
                        return
                job = inbox.get()  # it was taken in this very moment: its job is on the way


_threads = _EngineThreads()
# A thread that comes back from PyTorch into an interpreter that is being taken down ends the process with SIGABRT.
# On a busy machine the last ones take seconds to come back. Those that wait for a loop that goes on never do.
atexit.register(_threads.wait_idle, 5.0)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_threads.forget)


def run_in_engine_thread(work: Callable[[], R], outcome: asyncio.Future[R]) -> None:
    """Run `work` in a thread of the engine's pool; its result or error becomes that of `outcome`, on its loop."""
    loop = outcome.get_loop()

    def job() -> None:
        finish: Callable[[], None]
        try:
            finish = functools.partial(outcome.set_result, work())
        except BaseException as error:  # it is handed to the awaiting task, whatever it is
            finish = functools.partial(outcome.set_exception, error)
        with contextlib.suppress(RuntimeError):  # the loop is closed, and with it the task that waited
            loop.call_soon_threadsafe(lambda: None if outcome.cancelled() else finish())

    _threads.submit(job)
