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

    def __call__(self, frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code in self._codes:
            self.calls.append(Call(frame.f_code.co_qualname, dict(frame.f_locals), threading.get_ident()))

    def num(self, function: Callable[..., Any]) -> int:
        return sum(one.name == function.__qualname__ for one in self.calls)

    async def wait(self, function: Callable[..., Any], num: int) -> None:
        """Return when this function was called so many times, by this loop's thread."""
        while self.num(function) < num:  # noqa: ASYNC110 (it tells nobody)
            await asyncio.sleep(0.001)


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
