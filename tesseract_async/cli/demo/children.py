"""The demo's processes: started, heard, killed, and never left behind."""

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from tesseract_async.cli.demo.plan import Facts

LEAVE_TIMEOUT = 8.0
"""Seconds that a process gets to leave by itself before it is killed."""

FactListener = Callable[[str, Facts], None]


class ChildFailed(Exception):
    """A process of the demo ended when it should not have. The message holds the last lines that it printed."""


class Child:
    """A process that prints lines of JSON, each with an ``event``.

    Its standard input is a pipe whose other end this process holds, so it ends when this process does, however that
    happens. It has a session of its own, so that a Ctrl-C at the terminal reaches this process only, which then tells
    it to leave.
    """

    def __init__(self, name: str, process: asyncio.subprocess.Process, *, log: Path, on_event: FactListener) -> None:
        """Use `start`."""
        self.name = name
        self.process = process
        self._log = log
        self._on_event = on_event
        self._ready: asyncio.Future[Facts] = asyncio.get_running_loop().create_future()
        self._killed = False
        self._reader = asyncio.create_task(self._read(), name=f"demo: hear {name}")

    @classmethod
    async def start(cls, name: str, arguments: list[str], *, log: Path, on_event: FactListener) -> "Child":
        """Start Python with these arguments; `ready` tells when it works."""
        # one thread each: five processes share a few cores, and threads of one would wait for another's
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        with log.open("ab") as file:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                *arguments,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=file,
                env=environment,
                limit=1 << 20,
                start_new_session=True,
            )
        return cls(name, process, log=log, on_event=on_event)

    async def ready(self, *, timeout: float) -> Facts:
        """Return its ``ready`` line. Raises: ChildFailed if it ends before, or takes longer than `timeout` seconds."""
        try:
            return await asyncio.wait_for(asyncio.shield(self._ready), timeout)
        except TimeoutError:
            raise ChildFailed(f"{self.name} was not ready after {timeout:.0f} s.\n{self._last_words()}") from None

    async def wait(self) -> None:
        """Wait until it has ended well, or was killed by us. Raises: ChildFailed if it ended otherwise."""
        await asyncio.shield(self._reader)
        status = await self.process.wait()
        if status != 0 and not self._killed:
            raise ChildFailed(f"{self.name} ended with status {status}.\n{self._last_words()}")

    async def kill(self) -> None:
        """Kill it with SIGKILL: no farewell, nothing saved. Returns when it is gone."""
        self._killed = True
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        await self._gone()

    async def aclose(self) -> None:
        """Tell it to leave, and kill it if it does not within `LEAVE_TIMEOUT`. Safe to call at any time."""
        self._killed = True
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGTERM)
            try:
                await asyncio.wait_for(self.process.wait(), LEAVE_TIMEOUT)
            except TimeoutError:
                self.process.kill()
        await self._gone()

    async def _gone(self) -> None:
        assert self.process.stdin is not None
        await self.process.wait()
        await self._reader
        self.process.stdin.close()
        with contextlib.suppress(OSError):
            await self.process.stdin.wait_closed()

    async def _read(self) -> None:
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            try:
                facts = json.loads(line)
                event = facts["event"]
            except (ValueError, KeyError, TypeError):
                continue  # some library's chatter
            if event == "ready" and not self._ready.done():
                self._ready.set_result(facts)
            self._on_event(self.name, facts)
        if not self._ready.done():
            await self.process.wait()
            self._ready.set_exception(ChildFailed(f"{self.name} ended before it was ready.\n{self._last_words()}"))
            self._ready.exception()  # retrieved, so that it is no warning where nobody waits

    def _last_words(self) -> str:
        text = self._log.read_text(errors="replace") if self._log.exists() else ""
        return "\n".join(text.splitlines()[-15:])


@contextlib.asynccontextmanager
async def children() -> AsyncIterator[list[Child]]:
    """Enter with a list whose processes are all gone when the block ends, also by an error or Ctrl-C."""
    family: list[Child] = []
    try:
        yield family
    finally:
        leaving = asyncio.gather(*(child.aclose() for child in family))
        try:
            await asyncio.shield(leaving)
        except asyncio.CancelledError:
            # told twice: no more patience, but still no process is left behind
            for child in family:
                with contextlib.suppress(ProcessLookupError):
                    if child.process.returncode is None:
                        child.process.kill()
            await leaving
            raise
