"""Watches what runs, without touching it: which calls a thread makes of a function of the package."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any


class Watch:
    """A profile function (`sys.setprofile`) that notes the calls of one function, or method, by their arguments."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.code = function.__code__  # type: ignore[attr-defined]
        self.calls: list[dict[str, Any]] = []

    def __call__(self, frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code is self.code:
            self.calls.append(dict(frame.f_locals))


@contextlib.contextmanager
def calls_of(function: Callable[..., Any]) -> Iterator[list[dict[str, Any]]]:
    """The calls that this thread makes of it, one by one, by name of argument."""
    watch = Watch(function)
    sys.setprofile(watch)
    try:
        yield watch.calls
    finally:
        sys.setprofile(None)
