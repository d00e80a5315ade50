"""What people see while they wait: a bar or a moving sign on the terminal, and nothing where there is none.

Both are drawn on standard error, so that standard output stays what programs read, and vanish when they are done.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def bar(what: str, *, total: float) -> Iterator[Callable[[float], None]]:
    """A bar that fills up. Yields the function that says how much more is done."""
    if not sys.stderr.isatty():
        yield lambda amount: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda amount: progress.advance(task, amount)


@contextlib.contextmanager
def sign(what: str) -> Iterator[None]:
    """Something moves, for what takes nobody knows how long."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(what):
        yield
