"""Watches what runs, without touching it: the calls that are made of functions of the package."""

import asyncio
import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NamedTuple


class Call(NamedTuple):
    name: str
    """The function's, with its class: ``"Rounds.add"``."""
    arguments: dict[str, Any]
    thread: int


class Watch:
    """A profile function (`sys.setprofile`) that notes the calls of functions and methods."""

    def __init__(self, *functions: Callable[..., Any]) -> None:
        self._codes = {one.__code__ for one in functions}  # type: ignore[attr-defined]
        self.calls: list[Call] = []
        self._waiting: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None

    def __call__(self, frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code in self._codes:
            self.calls.append(Call(frame.f_code.co_qualname, dict(frame.f_locals), threading.get_ident()))
            if self._waiting is not None:
                loop, news = self._waiting
                loop.call_soon_threadsafe(news.set)

    def num(self, function: Callable[..., Any]) -> int:
        return sum(one.name == function.__qualname__ for one in self.calls)

    async def wait(self, function: Callable[..., Any], num: int) -> None:
        """Return when this function was called this often. Only one may wait at a time."""
        _, news = self._waiting = asyncio.get_running_loop(), asyncio.Event()
        try:
            while self.num(function) < num:
                await news.wait()
                news.clear()
        finally:
            self._waiting = None


@contextlib.contextmanager
def watched(*functions: Callable[..., Any]) -> Iterator[Watch]:
    """Watch this thread, and those that begin meanwhile."""
    watch = Watch(*functions)
    threading.setprofile(watch)
    sys.setprofile(watch)
    try:
        yield watch
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


@contextlib.contextmanager
def calls_of(function: Callable[..., Any]) -> Iterator[list[Call]]:
    """The calls of this function by this thread, one by one."""
    watch = Watch(function)
    sys.setprofile(watch)
    try:
        yield watch.calls
    finally:
        sys.setprofile(None)
