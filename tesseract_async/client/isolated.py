"""Torch's modes (grad mode, inference mode, autocast) belong to a thread; tasks that share the thread share them.

A task that awaits inside ``with torch.no_grad():`` leaves the mode switched for tasks that run meanwhile. `isolated`
swaps a coroutine's modes out at every suspension and back in when it goes on. While an awaitable of this package is
suspended, the thread is in torch's default modes.
"""

import asyncio
import types
from collections.abc import Coroutine, Generator
from typing import NamedTuple, TypeVar

import torch

T = TypeVar("T")

_DEVICES = ("cpu", "cuda")


class Modes(NamedTuple):
    grad: bool
    inference: bool
    autocast: tuple[tuple[str, torch.dtype], ...]
    """Device types where autocast is on, each with its dtype."""
    autocast_cache: bool

    @classmethod
    def current(cls) -> "Modes":
        inference, cache = torch.is_inference_mode_enabled(), torch.is_autocast_cache_enabled()
        if cache and not inference and not torch._C._is_any_autocast_enabled():
            # as nearly always: this runs several times in every call
            return DEFAULT if torch.is_grad_enabled() else NO_GRAD
        autocast = tuple((d, torch.get_autocast_dtype(d)) for d in _DEVICES if torch.is_autocast_enabled(d))
        return cls(torch.is_grad_enabled(), inference, autocast, cache)


DEFAULT = Modes(grad=True, inference=False, autocast=(), autocast_cache=True)
NO_GRAD = DEFAULT._replace(grad=False)
"""The modes in which the machinery of a call runs; what it gives back is put into the graph by `remote_call`."""


class _Switch:
    """Sets this thread's modes, for one coroutine that is swapped in and out."""

    # Inference mode can only be set by a guard, which restores what it found when it is left.
    _guard: torch.inference_mode | None = None

    def to(self, modes: Modes) -> Modes:
        """Set `modes`. Return those in which the thread was."""
        now = found = Modes.current()
        if now is modes:
            return found
        if now.inference != modes.inference:
            if self._guard is not None:
                guard, self._guard = self._guard, None
                guard.__exit__(None, None, None)
            if torch.is_inference_mode_enabled() != modes.inference:
                self._guard = torch.inference_mode(modes.inference)
                self._guard.__enter__()
            now = Modes.current()  # the guard sets grad mode, too
        if now.autocast != modes.autocast:
            self._set_autocast(now, modes)
        if now.autocast_cache != modes.autocast_cache:
            torch.set_autocast_cache_enabled(modes.autocast_cache)
        if now.grad != modes.grad:
            torch._C._set_grad_enabled(modes.grad)
        return found

    @staticmethod
    def _set_autocast(now: Modes, modes: Modes) -> None:
        # The cache of cast weights lives as long as the nesting is not zero: without separate nesting, a task
        # suspended in autocast would keep another task's weights in it beyond that one's optimizer step.
        if now.autocast and not modes.autocast:
            torch.autocast_decrement_nesting()
            torch.clear_autocast_cache()
        elif modes.autocast and not now.autocast:
            torch.autocast_increment_nesting()
        wanted = dict(modes.autocast)
        for device in {*wanted, *dict(now.autocast)}:
            torch.set_autocast_enabled(device, device in wanted)
            if device in wanted:
                torch.set_autocast_dtype(device, wanted[device])


def isolated(coroutine: Coroutine[object, object, T], *, modes: Modes | None = None) -> Coroutine[object, object, T]:
    """Return the same coroutine with separate torch modes: other tasks do not see what it switches.

    It starts in the modes of the moment when `isolated` is called (or in `modes`). While it is suspended the thread
    is in the modes that it was found in, or, where it is awaited inside a task, in torch's defaults; afterwards the
    awaiting code goes on in the modes that it had. Results, errors and cancellation pass through.
    """
    own: list[object] = []
    wrapped = _isolate(coroutine, Modes.current() if modes is None else modes, own)
    own.append(wrapped)
    return wrapped


async def _isolate(coroutine: Coroutine[object, object, T], mine: Modes, own: list[object]) -> T:
    task = asyncio.current_task()
    is_task = task is not None and task.get_coro() is own[0]
    own.clear()  # it names this very coroutine: a cycle, left alone
    del task  # it will know the error that knows this frame, where it fails
    return await _trampoline(coroutine, mine, is_task)


@types.coroutine
def _trampoline(coroutine: Coroutine[object, object, T], mine: Modes, is_task: bool) -> Generator[object, object, T]:
    switch = _Switch()
    entered = switch.to(mine)
    outside = entered if is_task else DEFAULT
    value: object = None
    error: BaseException | None = None
    while True:
        try:
            waiting_for = coroutine.send(value) if error is None else coroutine.throw(error)
        except BaseException as end:  # StopIteration among them; all are passed on
            switch.to(outside if is_task else entered)
            if isinstance(end, StopIteration):
                result: T = end.value
                return result
            error = None  # what was thrown in here knows this frame: a cycle
            raise
        mine = switch.to(outside)
        error = None
        try:
            value = yield waiting_for
        except BaseException as thrown:  # it belongs to the coroutine, whatever it is
            error = thrown
        outside = switch.to(mine)
