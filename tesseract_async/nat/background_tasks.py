"""Work that nobody waits for: its failures are counted, and it ends with its owner."""

import asyncio
import logging
from collections.abc import Coroutine
from typing import Final

from tesseract_async.errors import ConnectionLost, TesseractError, describe
from tesseract_async.metrics import Metrics
from tesseract_async.tasks import end

logger = logging.getLogger(__name__)

REASONS: Final = {TimeoutError: "timeout", ConnectionLost: "lost", OSError: "io", TesseractError: "protocol"}


class BackgroundTasks:
    """Tasks that may fail with TesseractError, OSError or TimeoutError: metric ``nat_offers_failed``."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._tasks: set[asyncio.Task[None]] = set()
        self.is_closed = False

    def __len__(self) -> int:
        return len(self._tasks)

    def spawn(self, work: Coroutine[object, object, None]) -> None:
        """Run `work` in a task; not at all after `aclose`."""
        if self.is_closed:
            work.close()
            return
        task = asyncio.get_running_loop().create_task(self._run(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, work: Coroutine[object, object, None]) -> None:
        try:
            await work
        except (TesseractError, OSError) as error:
            logger.debug("a peer's offer came to nothing: %s", describe(error))
            reason = next(name for kind, name in REASONS.items() if isinstance(error, kind))
            self._metrics.count("nat_offers_failed", reason=reason)

    async def wait_done(self) -> None:
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def aclose(self) -> None:
        self.is_closed = True
        await end(*self._tasks)
