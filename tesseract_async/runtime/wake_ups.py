"""Wake-ups between the event loop and a device's thread: a `Bell` wakes the thread, and a `Mailbox` the loop."""

import asyncio
import threading
from collections import deque
from collections.abc import Callable


class Bell:
    """Wakes the one thread that waits for it. A ring before it waits is kept; several are one."""

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        # held until the thread is to wake. No SimpleQueue: if the thread loses the processor at the wrong moment,
        # its get(timeout) waits forever (seen with CPython 3.11); and a Queue takes six Python calls
        self._lock = threading.Lock()
        self._lock.acquire()

    def ring(self) -> None:
        """Wake the thread. From one thread at a time: callers hold a lock of their own."""
        if self._lock.locked():
            self._lock.release()

    def wait(self, seconds: float | None) -> None:
        """Sleep until the next ring, at most this long (None: as long as it takes)."""
        self._lock.acquire(timeout=-1 if seconds is None else min(max(seconds, 0), threading.TIMEOUT_MAX))


class Mailbox:
    """Functions that threads post, and the loop calls, in their order. What fails is the loop's exception handler's."""

    __slots__ = ("loop", "_posted", "_delivers")

    def __init__(self) -> None:
        self.loop: asyncio.AbstractEventLoop | None = None
        """The loop that calls them; known before the first is posted."""
        self._posted: deque[tuple[Callable[..., None], tuple[object, ...]]] = deque()
        self._delivers = False  # True if the loop was woken for what is posted

    def post(self, function: Callable[..., None], *args: object) -> None:
        """Let the loop call this. Waking it is a system call: what is posted until it looks shares one."""
        self._posted.append((function, args))
        if not self._delivers:
            self._delivers = True
            assert self.loop is not None
            try:
                self.loop.call_soon_threadsafe(self._call_posted)
            except RuntimeError:  # the loop was closed before this
                pass

    def _call_posted(self) -> None:
        self._delivers = False  # before looking: what is posted from now on wakes the loop again
        try:
            while self._posted:
                function, args = self._posted.popleft()
                function(*args)
        finally:
            if self._posted:  # one failed; it is logged, and the others must not wait for it
                asyncio.get_running_loop().call_soon(self._call_posted)
