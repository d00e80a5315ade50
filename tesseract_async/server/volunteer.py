"""VolunteerKeeper: keeps a server to its volunteer's contract. It watches the machine, pauses and resumes."""

import asyncio
import dataclasses
import json
import logging
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

import psutil

from tesseract_async.errors import TesseractError, describe
from tesseract_async.files import write_whole
from tesseract_async.server.contract import Usage, VolunteerContract, VolunteerSettings, WorkPermission
from tesseract_async.server.footprint import process_bytes
from tesseract_async.server.server import TesseractServer
from tesseract_async.tasks import end

logger = logging.getLogger(__name__)

BYTE_COUNTERS: Final = (
    "transport_bytes_sent",
    "transport_bytes_received",
    "network_bytes_sent",
    "network_bytes_received",
)
RETRY_AFTER: Final = 60.0
"""Seconds that callers are told to wait if it is not known when a pause ends."""
SAVE_PERIOD: Final = 30.0


class ThisMachine:
    def __init__(self) -> None:
        self._process = psutil.Process()
        self._num_processors = psutil.cpu_count() or 1
        self.load()  # the first figure is since ever

    def load(self) -> float:
        """Return the share of all processors (0 to 1) that other programs used since the last call."""
        everybody = psutil.cpu_percent(interval=None) / 100
        own = self._process.cpu_percent(interval=None) / 100 / self._num_processors
        return float(max(0.0, min(1.0, everybody - own)))

    def memory(self) -> int:
        return process_bytes()


class VolunteerKeeper:
    """Pauses and resumes a server as its volunteer's contract says. Use it inside the server's ``async with``.

    The bytes of the present quota period are kept in `usage_file`, so that a restart does not give the quota anew.
    """

    def __init__(
        self,
        server: TesseractServer,
        settings: VolunteerSettings,
        *,
        usage_file: str | Path | None = None,
        machine: ThisMachine | None = None,
        clock: Callable[[], float] = time.time,
        period: float = 1.0,
        before_pause: Callable[[], Awaitable[None]] | None = None,
        before_resume: Callable[[], Awaitable[None]] | None = None,
        tell: Callable[[WorkPermission], None] = lambda verdict: None,
    ) -> None:
        """`period`: seconds between looks. `before_pause` is awaited while the experts are still declared, and
        `before_resume` before they are declared again; `tell` is called at each change. `clock` gives wall-clock
        seconds.
        """
        self._usage_file = None if usage_file is None else Path(usage_file)
        self.contract = VolunteerContract(settings, usage=self._read_usage())
        self.verdict = WorkPermission(True, "", None)
        self._server = server
        self._metrics = server.node.metrics
        self._machine = machine if machine is not None else ThisMachine()
        self._clock, self._period, self._tell = clock, period, tell
        self._before_pause, self._before_resume = before_pause, before_resume
        self._num_bytes = self._count()
        self._saved = self.contract.usage(clock())
        self._saved_at = clock()
        self._task: asyncio.Task[None] | None = None
        self._most_told = 0

    async def __aenter__(self) -> "VolunteerKeeper":
        """Look once before returning, so that a server outside of its hours begins with a pause."""
        await self.look()
        self._task = asyncio.create_task(self._watch(), name="server: volunteer's contract")
        return self

    async def __aexit__(self, *_: object) -> None:
        await end(self._task)
        self._observe()
        self._save_usage()

    async def look(self) -> WorkPermission:
        """Observe, decide, and pause or resume the server if that changed."""
        now = self._observe()
        verdict = self.contract.may_serve(now, self._machine.load())
        before, self.verdict = self.verdict, verdict  # even if the rest fails, it is not tried every second
        self._metrics.set("volunteer_serving", float(verdict.serve))
        self._metrics.set("volunteer_period_bytes", self.contract.usage(now).num_bytes)
        if verdict.serve and not before.serve:
            logger.info("resuming: the volunteer's contract allows it again")
            if self._before_resume is not None:
                await self._before_resume()
            await self._server.resume()
            self._tell(verdict)
        elif not verdict.serve and (before.serve or verdict.reason != before.reason):
            wait = RETRY_AFTER if verdict.until is None else max(1.0, verdict.until - now)
            logger.info("pausing: %s", verdict.reason)
            if before.serve and self._before_pause is not None:
                await self._before_pause()
            await self._server.pause(f"this volunteer's computer rests: {verdict.reason}", retry_after=wait)
            self._tell(verdict)
        if now - self._saved_at >= SAVE_PERIOD or now < self._saved_at:
            self._save_usage()
        return verdict

    def _observe(self) -> float:
        now = self._clock()
        num_bytes = self._count()
        self.contract.count_bytes(num_bytes - self._num_bytes, now)
        self._num_bytes = num_bytes
        limit = self.contract.settings.max_memory_bytes
        held = self._machine.memory()
        if limit is not None and held > limit:
            freed = self._server.free_memory()
            after = self._machine.memory()
            if held > self._most_told:  # once for each time that it grows by a tenth, not every second
                self._most_told = held + limit // 10
                logger.warning(
                    "the process holds %d MiB, its limit is %d MiB; after forgetting %d MiB of kept inputs and answers "
                    "it holds %d MiB%s",
                    *(number >> 20 for number in (held, limit, freed, after)),
                    ": no new work is taken" if after > limit else "",
                )
            self._metrics.count("volunteer_memory_exceeded")
            held = after
        elif limit is not None and held <= 0.95 * limit:
            self._most_told = 0
        self._metrics.set("volunteer_memory_bytes", held)
        self.contract.observe_memory(held)
        return now

    def _count(self) -> int:
        return int(sum(self._metrics.total(name) for name in BYTE_COUNTERS))

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._period)
            try:
                await self.look()
            except (TesseractError, TimeoutError, OSError, psutil.Error) as error:
                logger.warning("the volunteer's contract could not be looked after: %s", describe(error))

    def _read_usage(self) -> Usage:
        if self._usage_file is not None and self._usage_file.exists():
            try:
                data = json.loads(self._usage_file.read_bytes())
                return Usage(float(data["period_start"]), int(data["num_bytes"]))
            except (OSError, ValueError, KeyError, TypeError) as error:
                logger.warning("%s cannot be read (%s): the data quota begins anew", self._usage_file, error)
        return Usage()

    def _save_usage(self) -> None:
        now = self._clock()
        usage = self.contract.usage(now)
        self._saved_at = now
        if self._usage_file is None or usage == self._saved:
            return
        try:
            write_whole(self._usage_file, [json.dumps(dataclasses.asdict(usage)).encode()])
            self._saved = usage
        except OSError as error:
            logger.warning("%s cannot be written: %s", self._usage_file, error)
