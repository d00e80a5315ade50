"""How a long-running command starts, reports, and leaves: signals, the event loop, lines for programs."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import signal
import sys
from collections.abc import Callable, Coroutine, Iterator
from contextvars import ContextVar
from typing import Any

import click

from tesseract_async.errors import TesseractError
from tesseract_async.leaving import told_to_leave
from tesseract_async.transport.descriptors import raise_descriptor_limit

logger = logging.getLogger(__name__)

MAX_SENTENCE = 400
"""Characters of an error that a command ends with."""

LOG_FORMAT = "tesseract_async.log_format"
"""Where the commands' context keeps what `--log-format` said."""

_stdin_is_watched: ContextVar[bool] = ContextVar("stdin_is_watched", default=False)

FAILED = 1
"""The exit status of a mistake. After a signal it is 128 + the signal's number, as shells say it."""


def run(main: Callable[[], Coroutine[Any, Any, int]]) -> None:
    """Runs `main()` in an event loop (uvloop where there is one) and exits with what it returns.

    What goes wrong ends in a sentence and status 1; with ``--verbose`` the log says where it happened.
    Ctrl-C, SIGTERM and SIGHUP end `until_told_to_leave`, or cancel `main()` where it is doing something else; then
    nothing but a second Ctrl-C cuts it short.
    """
    raise_descriptor_limit()
    context = click.get_current_context(silent=True)
    with_parent = context is not None and bool(context.params.get("leave_with_parent"))
    told: list[int] = []
    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            listener = _Listener()

            def leave(number: signal.Signals) -> None:
                told.append(number)
                listener.leave(number.name)

            with told_to_leave(runner.get_loop(), leave):
                status = runner.run(listener.run(_with_parent(main) if with_parent else main()))
    except (KeyboardInterrupt, asyncio.CancelledError) as error:
        status = 128 + (told or [signal.SIGINT if isinstance(error, KeyboardInterrupt) else signal.SIGTERM])[0]
    except click.ClickException as error:
        error.show()
        status = error.exit_code
    except (OSError, ValueError, TesseractError, RuntimeError, MemoryError, ExceptionGroup) as error:
        logger.info("what happened", exc_info=error)  # --verbose shows where
        click.echo(f"Error: {sentence_of(error)}", err=True)
        status = FAILED
    sys.exit(status)


def sentence_of(error: Exception) -> str:
    """What happened to which file, without "[Errno 98]" before it; of several errors the first; not too long."""
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    sentence = str(error) or type(error).__name__
    if isinstance(error, OSError):
        sentence = error.strerror or sentence
        sentence = sentence if error.filename is None else f"{error.filename}: {sentence}"
    return sentence if len(sentence) <= MAX_SENTENCE else f"{sentence[: MAX_SENTENCE - 4]} ..."


class _Listener:
    """Whom a signal is meant for: `until_told_to_leave` once it waits, the main task before."""

    def __init__(self) -> None:
        self.waiting: asyncio.Future[str] | None = None
        self._task: asyncio.Task[Any] | None = None

    async def run(self, main: Coroutine[Any, Any, int]) -> int:
        self._task = asyncio.current_task()
        _listener.set(self)
        return await main

    def leave(self, reason: str) -> None:
        if self.waiting is None:
            if self._task is not None:
                self._task.cancel()
        elif not self.waiting.done():
            self.waiting.set_result(reason)


_listener: ContextVar[_Listener] = ContextVar("listener")


async def _with_parent(main: Callable[[], Coroutine[Any, Any, int]]) -> int:
    """Runs `main()`, and cancels it when standard input ends, also in the middle of starting."""
    loop = asyncio.get_running_loop()
    gone: asyncio.Future[str] = loop.create_future()
    stop_watching = await _at_end_of_stdin(gone)
    _stdin_is_watched.set(True)
    work = asyncio.create_task(main())
    try:
        waiting: set[asyncio.Future[Any]] = {work, gone}
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            work.cancel()
            await asyncio.wait({work})
        return 0 if work.cancelled() else work.result()
    finally:
        stop_watching()


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Around imports of torch: they make no garbage, and looking for it takes a sixth of their time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    if sys.platform != "win32":
        try:
            import uvloop
        except ImportError:
            pass
        else:
            factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
            return factory
    return asyncio.new_event_loop


def spare_the_collector() -> None:
    """Leaves all that lives now out of later garbage collections, and makes them rarer. For a program that has started.

    PyTorch alone brings 350,000 objects: looking through them stops the loop for 0.2 to 1 s each time. Calls leave no
    cycles behind, so that the collector has little to do. It is the process's own: no library may do this.
    """
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)


async def until_told_to_leave(*, watch_stdin: bool = False, tell_ready: Callable[[], None] | None = None) -> str:
    """Waits for SIGINT, SIGTERM, SIGHUP, or (with `watch_stdin`) the end of standard input; says which it was.

    `tell_ready` is called as soon as it listens: whoever is told may send a signal in the same moment.
    The end of standard input is how a process notices that the one that started it is gone, however it died.
    Signals reach it in a `main` that `run` runs; later ones are handled as said there.
    """
    told: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    if (listener := _listener.get(None)) is not None:
        listener.waiting = told
    stop_watching = await _at_end_of_stdin(told) if watch_stdin and not _stdin_is_watched.get() else None
    try:
        if tell_ready is not None:
            tell_ready()
        return await told
    finally:
        if stop_watching is not None:
            stop_watching()


async def _at_end_of_stdin(told: asyncio.Future[str]) -> Callable[[], None]:
    class Watcher(asyncio.Protocol):
        def connection_lost(self, error: Exception | None) -> None:
            if not told.done():
                told.set_result("the end of standard input")

    transport, _ = await asyncio.get_running_loop().connect_read_pipe(Watcher, sys.stdin)
    return transport.close


def say(event: str, **facts: Any) -> None:
    """One line of JSON on standard output, for programs. People read standard error."""
    print(json.dumps({"event": event, **facts}), flush=True)


class JsonLines(logging.Formatter):
    """One JSON object per line: time (seconds), level, logger, message, and the traceback if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        facts = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            facts["traceback"] = self.formatException(record.exc_info)
        return json.dumps(facts)


def set_up_logging(*, verbose: bool) -> None:
    """Logs to standard error: what went wrong, and with `verbose` also what went on; in the form of `--log-format`."""
    context = click.get_current_context(silent=True)
    form = context.meta.get(LOG_FORMAT, "text") if context is not None else "text"
    handler = logging.StreamHandler(sys.stderr)
    text = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(JsonLines() if form == "json" else text)
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, handlers=[handler])
