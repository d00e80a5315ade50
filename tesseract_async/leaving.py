"""Signals that ask a program to leave: Ctrl-C, SIGTERM, SIGHUP. `run` is `asyncio.run` for programs that save."""

import asyncio
import contextlib
import os
import signal
import stat
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from types import FrameType
from typing import Any, Final, TypeVar

Result = TypeVar("Result")

SAME_PRESS: Final = 0.5
"""Seconds within which SIGINTs count as one: GNU ``timeout`` sends each signal twice."""

_SIGNALS: Final = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)  # Windows has no SIGHUP


def new_event_loop() -> asyncio.AbstractEventLoop:
    """Return a new event loop: uvloop's where that is installed, which takes half the time."""
    if sys.platform != "win32":
        with contextlib.suppress(ImportError):
            import uvloop

            return uvloop.new_event_loop()
    return asyncio.new_event_loop()


def run(
    main: Coroutine[None, None, Result], *, loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None
) -> Result:
    """Run `main` as `asyncio.run` does, for programs that host experts: they save whichever signal ends them.

    Ctrl-C, SIGTERM and SIGHUP (a closed terminal) cancel `main` once. While it leaves, only a second Ctrl-C ends the
    program at once. `loop_factory` makes the event loop, such as ``uvloop.new_event_loop``.

    Raises: SystemExit with 128 + the signal's number after a signal, else what `main` raises.
    """
    told: list[signal.Signals] = []
    try:
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            loop, task = runner.get_loop(), None

            async def started() -> Result:
                nonlocal task
                task = asyncio.current_task()
                return await main

            def leave(number: signal.Signals) -> None:
                told.append(number)
                if task is not None:
                    task.cancel()

            with told_to_leave(loop, leave):
                return runner.run(started())
    except asyncio.CancelledError:
        if not told:
            raise
        raise SystemExit(128 + told[0]) from None
    finally:
        main.close()


@contextlib.contextmanager
def told_to_leave(loop: asyncio.AbstractEventLoop, leave: Callable[[signal.Signals], None]) -> Iterator[None]:
    """Pass the first signal that asks the program to leave to `leave`, in `loop`; ignore further ones, except for a
    second Ctrl-C, which ends the program at once. SIGHUP stays ignored if it was, as under ``nohup``.

    Outside of the main thread, where no signals arrive, it does nothing.
    """
    pressed: float | None = None
    is_told = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal pressed, is_told
        if number == signal.SIGINT:
            if pressed is not None and time.monotonic() - pressed >= SAME_PRESS:
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                signal.raise_signal(signal.SIGINT)
            pressed = pressed or time.monotonic()
        elif number != signal.SIGTERM:
            _forget_terminal()
        if not is_told:
            is_told = True
            loop.call_soon_threadsafe(leave, signal.Signals(number))

    before: dict[int, Any] = {}
    try:
        for number in _SIGNALS:
            if number == signal.SIGINT or signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, handle)
    except ValueError:  # not the main thread
        pass
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _forget_terminal() -> None:
    """Send output elsewhere: writing to a terminal that is gone would be an error in the middle of saving."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (1, 2):
        with contextlib.suppress(OSError):
            if stat.S_ISCHR(os.fstat(number).st_mode):
                os.dup2(nothing, number)
    os.close(nothing)
