"""The demo's processes: started, heard, killed, and never left behind."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

LEAVE_TIMEOUT = 8.0
"""Seconds that a process gets to leave by itself before it is killed."""

Listener = Callable[[str, dict[str, Any]], None]


class ChildFailed(Exception):
    """A process of the demo ended when it should not have; the sentence holds the end of what it said."""


class Child:
    """A process that says lines of JSON, each with an ``event``.

    Its standard input is a pipe whose other end we hold: it ends when we do, however we do. It has a session of its
    own, so that a Ctrl-C at the terminal reaches us only, and we tell it to leave.
    """

    def __init__(self, name: str, arguments: list[str], *, log: Path, on_event: Listener) -> None:
        """`on_event(name, line)` is called in the loop for each line; `log` takes what it writes to standard error."""
        self.name = name
        self._arguments = arguments
        self._log = log
        self._on_event = on_event
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._ready: asyncio.Future[dict[str, Any]] | None = None
        self._killed = False

    async def start(self) -> None:
        """Starts the process; `ready` tells when it works."""
        self._ready = asyncio.get_running_loop().create_future()
        # one thread each: five processes share a few cores, and threads of one would wait for another's
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        with self._log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                *self._arguments,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                env=environment,
                limit=1 << 20,
                start_new_session=True,
            )
        self._reader = asyncio.create_task(self._read(), name=f"demo: hear {self.name}")

    async def ready(self, *, timeout: float) -> dict[str, Any]:
        """Its ``ready`` line. Raises: ChildFailed if it ends before, or takes longer than `timeout` seconds."""
        assert self._ready is not None, "started"
        try:
            return await asyncio.wait_for(asyncio.shield(self._ready), timeout)
        except TimeoutError:
            raise ChildFailed(f"{self.name} was not ready after {timeout:.0f} s.\n{self._last_words()}") from None

    async def wait(self) -> None:
        """Returns when it has ended well, or was killed by us. Raises: ChildFailed if it ended otherwise."""
        assert self._process is not None and self._reader is not None, "started"
        await asyncio.shield(self._reader)
        status = await self._process.wait()
        if status != 0 and not self._killed:
            raise ChildFailed(f"{self.name} ended with status {status}.\n{self._last_words()}")

    async def kill(self) -> None:
        """SIGKILL: no farewell, nothing saved. Returns when it is gone."""
        assert self._process is not None, "started"
        self._killed = True
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._gone()

    async def aclose(self) -> None:
        """Tells it to leave, and kills it if it does not within `LEAVE_TIMEOUT`. Safe to call at any time."""
        if self._process is None:
            return
        self._killed = True
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGTERM)
            try:
                await asyncio.wait_for(self._process.wait(), LEAVE_TIMEOUT)
            except TimeoutError:
                self._process.kill()
        await self._gone()

    async def _gone(self) -> None:
        assert self._process is not None and self._reader is not None and self._process.stdin is not None
        await self._process.wait()
        await self._reader
        self._process.stdin.close()
        with contextlib.suppress(OSError):
            await self._process.stdin.wait_closed()

    async def _read(self) -> None:
        assert self._process is not None and self._process.stdout is not None and self._ready is not None
        async for line in self._process.stdout:
            try:
                facts = json.loads(line)
                event = facts["event"]
            except (ValueError, KeyError, TypeError):
                continue  # some library's chatter
            if event == "ready" and not self._ready.done():
                self._ready.set_result(facts)
            self._on_event(self.name, facts)
        if not self._ready.done():
            await self._process.wait()
            self._ready.set_exception(ChildFailed(f"{self.name} ended before it was ready.\n{self._last_words()}"))
            self._ready.exception()  # whoever waits gets it; nobody has to

    def _last_words(self, num_lines: int = 15) -> str:
        text = self._log.read_text(errors="replace") if self._log.exists() else ""
        return "\n".join(text.splitlines()[-num_lines:])


@contextlib.asynccontextmanager
async def children() -> AsyncIterator[list[Child]]:
    """A list whose processes are all gone when the block ends, also by an error or Ctrl-C."""
    family: list[Child] = []
    try:
        yield family
    finally:
        leaving = asyncio.gather(*(child.aclose() for child in family))
        try:
            await asyncio.shield(leaving)
        except asyncio.CancelledError:
            # told twice: no more patience, but still nobody is left behind
            for child in family:
                with contextlib.suppress(ProcessLookupError):
                    if child._process is not None and child._process.returncode is None:
                        child._process.kill()
            await leaving
            raise
