"""Client and server processes of one benchmark. Standard library only: the peers' environments use this file too.

A benchmark's parent process imports what its children need, touches no thread and no event loop, and forks: eight
clients that each import torch would spend more of two cores on importing than on the load.
"""

import contextlib
import multiprocessing
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

START_TIMEOUT = 120.0
MARGIN = 60.0

_fork = multiprocessing.get_context("fork")


class Gate:
    """Where all clients of a load wait until the last one is ready. They then run for the same `seconds`."""

    def __init__(self, num_clients: int, *, seconds: float) -> None:
        self.seconds = seconds
        self._barrier = _fork.Barrier(num_clients)

    def wait(self) -> float:
        """Blocks until every client is here. Returns the `time.perf_counter()` at which to stop."""
        self._barrier.wait(START_TIMEOUT)
        return time.perf_counter() + self.seconds

    def abort(self) -> None:
        """Wakes the others with an error: a client that will never come."""
        self._barrier.abort()


@dataclass(frozen=True)
class ClientResult:
    """What one client did: finished calls, the time they took together, and each call's time where it was kept."""

    num_calls: int
    seconds: float
    latencies: tuple[float, ...] = ()
    cpu_seconds: float = 0.0
    """Of the client's process meanwhile, where it was measured ..."""
    server_cpu_seconds: float = 0.0
    """... and of the server's."""


def timed(call: Callable[[], Any], stop_at: float) -> ClientResult:
    """Repeats `call`, one at a time, until `stop_at`."""
    latencies = []
    begin = before = time.perf_counter()
    while before < stop_at:
        call()
        now = time.perf_counter()
        latencies.append(now - before)
        before = now
    return ClientResult(len(latencies), before - begin, tuple(latencies))


def run_clients(
    client: Callable[..., ClientResult], num_clients: int, *, seconds: float, args: tuple[Any, ...] = ()
) -> list[ClientResult]:
    """Forks `num_clients` processes that run ``client(index, gate, *args)`` and returns what each returned.

    Raises: RuntimeError with the first traceback if a client fails.
    """
    gate = Gate(num_clients, seconds=seconds)
    with contextlib.ExitStack() as stack:
        children = [
            stack.enter_context(child(_run_client, (client, index, gate, args))) for index in range(num_clients)
        ]
        return [each.receive(START_TIMEOUT + seconds + MARGIN) for each in children]


def _run_client(ready: Connection, client: Any, index: int, gate: Gate, args: tuple[Any, ...]) -> None:
    try:
        ready.send(("value", client(index, gate, *args)))
    except BaseException:
        gate.abort()
        raise


@dataclass(frozen=True)
class Child:
    """A forked process and the pipe to it."""

    process: Any
    pipe: Connection

    def receive(self, timeout: float) -> Any:
        """The next value that the child sent. Raises: RuntimeError with its traceback, TimeoutError."""
        if not self.pipe.poll(timeout):
            raise TimeoutError(f"{self.process.name} sent nothing for {timeout:g} s")
        try:
            kind, value = self.pipe.recv()
        except EOFError:
            raise RuntimeError(f"{self.process.name} ended without a word") from None
        if kind == "error":
            raise RuntimeError(f"{self.process.name} failed:\n{value}")
        return value

    def stop(self) -> None:
        """Tells the child to end (a server waits for this)."""
        with contextlib.suppress(OSError):
            self.pipe.send("stop")


@contextlib.contextmanager
def child(target: Callable[..., None], args: tuple[Any, ...] = (), *, daemon: bool = False) -> Iterator[Child]:
    """Forks a process that runs ``target(pipe, *args)``; tells it to stop at the end, and ends it if it does not.

    `target` sends ``("value", ...)`` on its pipe; an exception that leaves it arrives as a RuntimeError.
    """
    ours, theirs = _fork.Pipe()
    process = _fork.Process(target=_guarded, args=(theirs, target, args), name=target.__name__, daemon=daemon)
    process.start()
    theirs.close()
    try:
        yield Child(process, ours)
    finally:
        with contextlib.suppress(OSError):
            ours.send("stop")
        process.join(20)
        for end in (process.terminate, process.kill):
            if process.is_alive():
                end()
                process.join(10)
        ours.close()


def _guarded(pipe: Connection, target: Any, args: tuple[Any, ...]) -> None:
    try:
        target(pipe, *args)
    except BaseException:
        with contextlib.suppress(OSError):
            pipe.send(("error", traceback.format_exc()))
        raise SystemExit(1) from None


def rate(results: list[ClientResult]) -> float:
    """Calls per second of all clients together."""
    return sum(result.num_calls / result.seconds for result in results if result.seconds)


def all_latencies(results: list[ClientResult]) -> list[float]:
    """Every call's seconds, of all clients."""
    return [seconds for result in results for seconds in result.latencies]


def wait_for_stop(pipe: Connection) -> None:
    """Blocks a server process until its parent says stop or is gone."""
    with contextlib.suppress(EOFError, OSError):
        pipe.recv()


def in_thread(target: Callable[[], None]) -> threading.Thread:
    """Starts a daemon thread: for a child that watches its pipe while an event loop runs."""
    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    return thread
