"""Gradient requests: a thread that runs torch's engine starts them, a loop carries them. One of the files that cross
threads.

Requests under way are keyed by graph task, so that one graph can be gone through several times.
"""

import asyncio
import contextvars
import os
import threading
from collections.abc import Coroutine, Sequence
from typing import Protocol

import torch

from tesseract_async.client.arguments import Versions
from tesseract_async.client.isolated import NO_GRAD, isolated
from tesseract_async.client.scaling import Scaler, Scaling

_POLL_SECONDS = 1.0
_ON_THE_LOOP = (
    "backward through a remote expert was called on the event loop's own thread, which has to stay free to carry the "
    "gradients: use `await tesseract_async.backward(loss)` (or call .backward() in another thread); in a hook, note "
    "what is to be done, and await it after the backward that the hook belongs to"
)
_LOOP_GONE = (
    "the event loop that carried this remote call no longer runs: backward needs it, so call it before `asyncio.run` "
    "returns or the BackgroundNode is closed, and in the process that made the call"
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


class RemoteCall:
    """One remote call in a graph, and the loop that carries it."""

    def __init__(self, remote: Remote) -> None:
        self.remote = remote
        self.loop = asyncio.get_running_loop()
        self.loop_thread = threading.get_ident()
        self._process = os.getpid()
        self.context = contextvars.copy_context()
        self.outputs: list[torch.Tensor] | None = None
        self.requests: dict[int, GradientRequest] = {}
        """The requests by graph task: several backwards may go through one graph, even at the same time."""

    def is_loop_running(self) -> bool:
        """Return whether the loop runs in this process; its copy in a fork's child claims to run, too."""
        return self.loop.is_running() and os.getpid() == self._process

    def refuse_loop_thread(self) -> None:
        if threading.get_ident() == self.loop_thread and self.is_loop_running():
            raise RuntimeError(_ON_THE_LOOP)


class _Cancelled(Exception):
    """The step that this gradient request belongs to was cancelled. Never reaches a user."""


class GradientRequest:
    """One gradient request under way: started by an engine thread, carried by the loop, awaited by an engine thread."""

    def __init__(
        self,
        call: RemoteCall,
        inputs: Sequence[torch.Tensor],
        gradients: Sequence[torch.Tensor | None],
        scale: float | None,
    ) -> None:
        self.call = call
        self.scale = scale
        """The factor by which the gradients that it carries were multiplied; they travel without it."""
        self.task: asyncio.Task[list[torch.Tensor | None]] | None = None
        self._versions = Versions((*inputs, *gradients))
        self._tensors: tuple[Sequence[torch.Tensor], Sequence[torch.Tensor | None]] = inputs, gradients
        self._is_cancelled = False
        self.is_done = False
        """True once there is an answer or an error, or it was cancelled."""
        self._waiting = threading.Lock()  # held until it is done: an Event takes some twenty Python calls
        self._waiting.acquire()
        self._result: list[torch.Tensor | None] | None = None
        self._error: BaseException | None = None

    def start(self) -> None:
        """Let the loop begin, from an engine's thread. Raises: RuntimeError if it is not running."""
        if not self.call.is_loop_running():
            raise RuntimeError(_LOOP_GONE)
        self.call.loop.call_soon_threadsafe(self.begin, context=self.call.context)

    def skip(self) -> None:
        """Instead of `start`, where scaled gradients overflowed: gives NaN, at which the scaler skips its step."""
        numbers = (x if x.is_floating_point() or x.is_complex() else None for x in self._tensors[0])
        self._result = [None if tensor is None else torch.full_like(tensor, torch.nan) for tensor in numbers]
        self._end()

    def _end(self) -> None:
        self.is_done = True
        try:
            self._waiting.release()
        except RuntimeError:  # the waiting thread was let go before
            pass

    def begin(self) -> None:
        """Go on in a task of the loop. Call this on that loop."""
        if self.is_done:  # cancelled before it began, or skipped
            return
        self.task = self.call.loop.create_task(isolated(self._work(), modes=NO_GRAD))
        self.task.add_done_callback(self._finish)

    async def run(self) -> None:
        """Do the same in this task, which is outside of autograd. Raises: what the remote backward raises."""
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
        return self.call.remote.backward(inputs, gradients)

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
        """Raise what the remote backward raised, and forget it: it refers to this frame, which would be a cycle."""
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
        if self._error is not None:
            self.check()
        assert self._result is not None
        self._versions.check()
        return self._result


class BackwardStep:
    """One `backward` and its gradient requests."""

    def __init__(self, scaler: Scaler | None, *, could_be_noted: bool) -> None:
        """`could_be_noted`: see `Scaling`."""
        self._scaler, self._could_be_noted = scaler, could_be_noted
        self.graph_task: int | None = None
        self.scaling: Scaling | None = None
        self.cut: dict[RemoteCall, GradientRequest | None] = {}
        """The remote calls between the two halves, where the engine runs twice in the loop's thread."""
        self._lock = threading.Lock()
        self._is_cancelled = False
        self._requests: list[GradientRequest] = []

    def read_scale(self) -> None:
        """Ask the scaler, in the thread that runs the engine."""
        self.scaling = Scaling(self._scaler, could_be_noted=self._could_be_noted)

    def add(self, request: GradientRequest) -> None:
        """Add a request, in an engine's thread."""
        with self._lock:
            if self._is_cancelled:
                self.refuse_if_cancelled()
            self._requests.append(request)

    def cancel(self) -> None:
        """Fail everything under way and to come, so that the engine's thread leaves."""
        with self._lock:
            self._is_cancelled = True
            requests = list(self._requests)
        for request in requests:
            request.cancel()

    def refuse_if_cancelled(self) -> None:
        if self._is_cancelled:
            raise _Cancelled("the step was cancelled")

    async def aclose(self) -> None:
        """Wait until the tasks of cancelled requests have ended, those on the running loop."""
        loop = asyncio.get_running_loop()
        tasks = [r.task for r in self._requests if r.task is not None and r.call.loop is loop and not r.task.done()]
        while tasks := [task for task in tasks if not task.done()]:
            await asyncio.wait(tasks)


engine_thread = threading.local()
"""Per thread: its `step` is the `backward` for which the thread runs the engine, if it runs one."""
steps: dict[int, BackwardStep] = {}
"""The steps by graph task, from which a node learns in which `backward` it runs."""


def num_steps() -> int:
    """Return how many `backward`s of this process are under way in an engine's thread."""
    return len(steps)
