"""Counts what one thread calls."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")


class Calls:
    """The calls of one thread, while it is profiled: Python functions by name, and C functions together."""

    def __init__(self) -> None:
        self.python: collections.Counter[str] = collections.Counter()
        self.own: collections.Counter[tuple[str, str]] = collections.Counter()
        """Those of the package, by file and name."""
        self.num_c = 0

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            code = frame.f_code
            self.python[code.co_qualname] += 1
            if "/tesseract_async/" in code.co_filename:
                self.own[code.co_filename.rpartition("/tesseract_async/")[2], code.co_qualname] += 1
        elif event == "c_call":
            self.num_c += 1

    def snapshot(self) -> collections.Counter[str]:
        """The counts so far: by name, ``"python"`` and ``"c"`` in all, and ``"turns"`` of asyncio's loop."""
        counts = collections.Counter(self.python)
        counts["turns"] = counts["BaseEventLoop._run_once"]
        counts["python"], counts["c"] = sum(self.python.values()), self.num_c
        return counts


class ServerThread:
    """A node in a thread of its own, with a loop of its own: what it calls is counted apart from its clients."""

    def __init__(self) -> None:
        self.calls = Calls()
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="cost server")

    def run(self, work: Coroutine[Any, Any, T]) -> asyncio.Future[T]:
        """Run `work` there; await the result here."""
        return asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self.loop))

    def run_plainly(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` there; blocks meanwhile."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()

    @contextlib.contextmanager
    def running(self) -> Iterator[ServerThread]:
        """The thread lives within it."""
        self._thread.start()
        try:
            yield self
        finally:
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join()
            self.loop.close()

    async def profile(self, on: bool) -> None:
        """Begin, or end, to count."""
        await self.run(_profile(self.calls if on else None))

    async def snapshot(self) -> collections.Counter[str]:
        """The counts so far; asking costs always the same."""
        return await self.run(_snapshot(self.calls))


async def _profile(calls: Calls | None) -> None:
    sys.setprofile(calls)


async def _snapshot(calls: Calls) -> collections.Counter[str]:
    return calls.snapshot()


async def least(
    block: Callable[[int], Coroutine[Any, Any, None]],
    snapshot: Callable[[], Coroutine[Any, Any, collections.Counter[str]]],
    *,
    size: int,
    num_blocks: int,
) -> dict[str, float]:
    """What one round of ``block(size)`` adds to the counts, divided by `size`: the least of several, since timers and
    other sockets add to some, less what an empty block adds."""
    costs: dict[str, list[float]] = {}
    for _ in range(num_blocks):
        empty, before = await snapshot(), await snapshot()
        await block(size)
        after = await snapshot()
        for name in after:
            added = (after[name] - before[name]) - (before[name] - empty[name])
            costs.setdefault(name, []).append(added / size)
    return {name: min(values) for name, values in costs.items()}
