"""Threads in which torch's engine runs for those who wait on a loop. One of the files that cross threads."""

import asyncio
import atexit
import contextlib
import functools
import os
import threading
from collections.abc import Callable
from typing import TypeVar

R = TypeVar("R")

IDLE_SECONDS = 1.0
"""An engine thread without work ends after this long."""


class _Inbox:
    """Holds the next job of one thread."""

    def __init__(self) -> None:
        self._job: Callable[[], None] | None = None
        self._filled = threading.Lock()  # no SimpleQueue: see `TesseractRuntime`
        self._filled.acquire()

    def put(self, job: Callable[[], None]) -> None:
        """Put in a job; the inbox must be empty."""
        self._job = job
        self._filled.release()

    def get(self, timeout: float = -1) -> Callable[[], None] | None:
        """Wait for a job, at most this many seconds (-1: without a limit). Return None if none came."""
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
