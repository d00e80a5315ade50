"""Several ways to one peer, tried with head starts (RFC 8305's "happy eyeballs"): the first that succeeds wins."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from tesseract_async.errors import TesseractError
from tesseract_async.transport.base import DialPath

Result = TypeVar("Result")


async def race(
    paths: Sequence[DialPath],
    attempt: Callable[[DialPath], Awaitable[Result]],
    *,
    finished: Callable[[DialPath, BaseException | None], None],
) -> tuple[Result | None, dict[str, BaseException]]:
    """The first attempt's result, or None and each path's error. The other attempts are cancelled and awaited.

    A path starts after its delay, or as soon as all attempts before it have failed. An attempt fails with OSError,
    TimeoutError or TesseractError; any other exception ends the race. `finished` is called for each attempt that
    ended by itself.
    """
    loop = asyncio.get_running_loop()
    queue = deque(sorted(paths, key=lambda path: path.delay))
    begun = loop.time()
    running: dict[asyncio.Future[Result], DialPath] = {}
    errors: dict[str, BaseException] = {}
    try:
        while queue or running:
            while queue and (not running or loop.time() - begun >= queue[0].delay):
                path = queue.popleft()
                running[asyncio.ensure_future(attempt(path))] = path
            timeout = max(0.0, begun + queue[0].delay - loop.time()) if queue else None
            done, _ = await asyncio.wait(running, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                path = running[task]
                error = task.exception()
                if error is not None and not isinstance(error, OSError | TesseractError):  # TimeoutError is an OSError
                    raise error
                finished(path, error)
                if error is None:
                    return task.result(), errors
                errors[path.name] = error
                del running[task]
        return None, errors
    finally:
        for task in running:
            task.cancel()
        if running:
            await asyncio.wait(running)
        for task in running:
            if not task.cancelled():
                task.exception()  # retrieved: it finished in the same turn as the winner
