"""Running a command: the event loop, signals, lines for programs, logging, and what people see while they wait."""

import asyncio
import contextlib
import functools
import gc
import json
import logging
import math
import os
import select
import signal
import stat
import sys
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextvars import ContextVar
from typing import Final

import click

from tesseract_async.endpoint.connection_limits import raise_descriptor_limit
from tesseract_async.errors import TesseractError, printable, sentence_of
from tesseract_async.leaving import new_event_loop, told_to_leave

logger = logging.getLogger(__name__)

Main = Callable[[], Coroutine[None, None, int]]

MAX_UNREAD_BYTES: Final = 1 << 20
"""Bytes of lines for a program (`say`) that it has not read yet; beyond them, further lines are dropped."""
_LOOK_SECONDS: Final = 0.1
"""Seconds between two looks at whether that program reads."""
_LAST_SECONDS: Final = 1.0
"""Seconds that the program has to read what is left, once this process was told to leave."""


def run_command(main: Main, *, leave_with_parent: bool = False) -> None:
    """Run `main()` in an event loop (uvloop where it is installed) and exit with the status that it returns.

    An error ends in a sentence and status 1; with ``--verbose`` the log says where it happened. Ctrl-C, SIGTERM and
    SIGHUP end `until_told_to_leave`, or cancel `main()` where it is doing something else (then the status is 128 + the
    signal's number); so does the end of standard input with `leave_with_parent`, by which a process notices that the
    one that started it is gone. From then on only a second Ctrl-C cuts it short.
    """
    raise_descriptor_limit()
    told: list[int] = []
    try:
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            leaving = _Leaving()

            def leave(number: signal.Signals) -> None:
                told.append(128 + number)
                leaving.begin(number.name)

            def parent_ended() -> None:
                told.append(0)
                leaving.begin("the end of standard input")

            with told_to_leave(runner.get_loop(), leave):
                status = runner.run(leaving.run(main, parent_ended if leave_with_parent else None))
    except (KeyboardInterrupt, asyncio.CancelledError) as error:
        status = told[0] if told else 128 + (signal.SIGINT if isinstance(error, KeyboardInterrupt) else signal.SIGTERM)
    except click.ClickException as error:
        error.show()
        status = error.exit_code
    except (OSError, ValueError, TesseractError, RuntimeError, MemoryError, ExceptionGroup) as error:
        logger.info("what happened", exc_info=error)  # --verbose shows where
        click.echo(f"Error: {sentence_of(error)}", err=True)
        status = 1
    with contextlib.suppress(OSError):
        _lines.write(timeout=_LAST_SECONDS if told else math.inf)  # a pager takes its time
    sys.exit(status)


def asynchronous(function: Callable[..., Coroutine[None, None, int]]) -> Callable[..., None]:
    """Make a command of a coroutine function that returns the exit status, as `run_command` describes."""

    @functools.wraps(function)
    def command(*, leave_with_parent: bool = False, **values: object) -> None:
        run_command(lambda: function(**values), leave_with_parent=leave_with_parent)

    return command


class _Leaving:
    """The command's main task, and what ends it: `until_told_to_leave` once it waits there, cancellation before."""

    def __init__(self) -> None:
        self.waiting: asyncio.Future[str] | None = None
        self._task: asyncio.Task[int] | None = None

    async def run(self, main: Main, parent_ended: Callable[[], None] | None) -> int:
        self._task = asyncio.current_task()
        _leaving.set(self)
        if parent_ended is None:
            return await main()
        transport, watcher = await asyncio.get_running_loop().connect_read_pipe(
            lambda: _StandardInput(parent_ended), sys.stdin
        )
        try:
            return await main()
        finally:
            watcher.at_end = None
            transport.close()

    def begin(self, reason: str) -> None:
        if self.waiting is None:
            if self._task is not None:
                self._task.cancel()
        elif not self.waiting.done():
            self.waiting.set_result(reason)


_leaving: ContextVar[_Leaving] = ContextVar("leaving")


class _StandardInput(asyncio.Protocol):
    def __init__(self, at_end: Callable[[], None]) -> None:
        self.at_end: Callable[[], None] | None = at_end

    def connection_lost(self, error: Exception | None) -> None:
        if self.at_end is not None:
            self.at_end()


async def until_told_to_leave(*, tell_ready: Callable[[], None] | None = None) -> str:
    """Wait until the command is told to leave, as `run_command` describes; return what told it, such as ``SIGTERM``.

    `tell_ready` is called once this listens: a reader of what it prints may send a signal at once.
    """
    told: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    if (leaving := _leaving.get(None)) is not None:
        leaving.waiting = told
    if tell_ready is not None:
        tell_ready()
    return await told


@contextlib.contextmanager
def importing(*, without: Sequence[str] = ()) -> Iterator[None]:
    """Import torch, or build experts, without the garbage collector: neither makes garbage, and looking for it takes a
    sixth of the time of the imports, and a third of the time of building thousands of experts.

    `without`: packages that look as if they were not installed meanwhile, for what imports them only if they are.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    hidden = [name for name in without if name not in sys.modules]
    for name in hidden:
        sys.modules[name] = None  # type: ignore[assignment]  # what `import` takes for an absence
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
        if was_enabled:
            gc.enable()


@contextlib.contextmanager
def importing_dashboard(what: str) -> Iterator[None]:
    """Import the packages of the extra "dashboard". Raises: click.ClickException where they are missing."""
    try:
        yield
    except ImportError as error:
        raise click.ClickException(f"{what} needs {error.name}: pip install -e '.[dashboard]' in the clone") from None


def spare_the_collector() -> None:
    """Leave all present objects out of later garbage collections, and make these rarer, in a program that has started.

    PyTorch alone brings 350,000 objects: a search through them stops the loop for 0.2 to 1 s. Calls leave no cycles
    behind, so the collector has little to do. It belongs to the process: a library must not do this.
    """
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)


def say(event: str, /, on_terminal: object = False, **facts: object) -> None:
    """Print one line of JSON on standard output, for programs: on a terminal only with `on_terminal`.

    The event loop does not wait for a program that is slow to read (see `_Lines`).
    """
    if on_terminal or not sys.stdout.isatty():
        _lines.put(json.dumps({"event": event, **facts}) + "\n")


class _Lines:
    """Lines on their way to a pipe. What the pipe takes is written at once, and the loop tries again for the rest. If
    the program does not read, lines that no longer fit in `MAX_UNREAD_BYTES` are dropped."""

    def __init__(self) -> None:
        self._left = bytearray()
        self._descriptor = -1

    def put(self, line: str) -> None:
        """Write a line now or later. Raises: OSError."""
        try:
            self._descriptor = sys.stdout.fileno()
            kind, loop = os.fstat(self._descriptor).st_mode, asyncio.get_running_loop()
        except (OSError, ValueError, RuntimeError):  # it goes nowhere else, or nothing else waits
            print(line, end="", flush=True)
            return
        if sys.platform == "win32" or not (stat.S_ISFIFO(kind) or stat.S_ISSOCK(kind)):
            print(line, end="", flush=True)
        elif not self._left:
            sys.stdout.flush()
            self._left += line.encode()
            self._write(loop)
        elif len(self._left) + len(line) <= MAX_UNREAD_BYTES:
            self._left += line.encode()

    def _write(self, loop: asyncio.AbstractEventLoop) -> None:
        self.write()
        if self._left:
            loop.call_later(_LOOK_SECONDS, self._write_again, loop)

    def _write_again(self, loop: asyncio.AbstractEventLoop) -> None:
        with contextlib.suppress(OSError):
            self._write(loop)

    def write(self, timeout: float = 0.0) -> None:
        """Write what is left, as far as the program reads it in time. Raises: OSError."""
        until = time.monotonic() + timeout
        try:
            while self._left:
                patience = None if until == math.inf else max(0.0, until - time.monotonic())
                if not select.select((), (self._descriptor,), (), patience)[1]:
                    return
                # so much at a time never waits once a pipe takes anything
                del self._left[: os.write(self._descriptor, self._left[: select.PIPE_BUF])]
        except OSError:  # the reader is gone
            self._left.clear()
            raise


_lines = _Lines()


class TextLines(logging.Formatter):
    """Lines for people, on a terminal. Text from strangers must not control the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


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


def set_up_logging(*, verbose: bool = False, log_format: str = "text") -> None:
    """Log warnings to standard error, with `verbose` also what goes on; `log_format` is ``text`` or ``json``."""
    handler = logging.StreamHandler(sys.stderr)
    text = TextLines("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(JsonLines() if log_format == "json" else text)
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, handlers=[handler])


@contextlib.contextmanager
def progress_bar(what: str, *, total: float) -> Iterator[Callable[[float], None]]:
    """Draw a bar on standard error where that is a terminal. Yields the function that says how much more is done."""
    if not sys.stderr.isatty():
        yield lambda amount: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda amount: progress.advance(task, amount)


@contextlib.contextmanager
def spinner(what: str) -> Iterator[None]:
    """Draw a moving sign on standard error, where that is a terminal, while something takes an unknown time."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console
    from rich.text import Text

    with Console(stderr=True).status(Text(what)):  # [...] in an address is no markup
        yield
