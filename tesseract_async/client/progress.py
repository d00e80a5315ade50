"""ProgressOf: publishes a trainer's loss for each grid that its module uses."""

import asyncio
import contextlib
import logging
from collections.abc import Mapping

from torch import nn

from tesseract_async.client.expert_pool import ExpertPool
from tesseract_async.client.gating_function import GatingFunction
from tesseract_async.client.remote_expert import RemoteExpert
from tesseract_async.errors import TesseractError, describe
from tesseract_async.experts.manifest import split_uid
from tesseract_async.experts.progress import publish_progress
from tesseract_async.node import TesseractNode

logger = logging.getLogger(__name__)

PERIOD = 5.0
"""Seconds between two publications."""
MAX_GRIDS = 16
"""The most grids of one module whose loss is published."""


class ProgressOf:
    """Publishes the mean loss since the last time, every `period` seconds, while losses come. Lives on one loop."""

    def __init__(self, module: nn.Module | None, *, trainer: str = "", period: float = PERIOD) -> None:
        """Find the grids of the module's gates and experts; None: nothing is published."""
        self._trainer, self._period = trainer, period
        self._grids: dict[str, TesseractNode] = {}
        for part in () if module is None else module.modules():
            if isinstance(part, GatingFunction | RemoteExpert | ExpertPool) and isinstance(part.node, TesseractNode):
                uid = part.uid if isinstance(part, RemoteExpert) else f"{part.uid_prefix}.0"
                prefix = split_uid(uid)[0]
                if len(self._grids) < MAX_GRIDS:
                    self._grids[prefix] = part.node
        self._step, self._losses = 0, list[float]()
        self._seen: Mapping[str, int] = {}
        self._task: asyncio.Task[None] | None = None

    def add(self, step: int, loss: float, seen: Mapping[str, int]) -> None:
        """`seen`: all samples and tokens so far."""
        if self._grids:
            self._step, self._seen = step, seen
            self._losses.append(loss)
            if self._task is None:
                self._task = asyncio.get_running_loop().create_task(self._publish(), name="trainer: progress")

    async def aclose(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _publish(self) -> None:
        while True:
            if self._losses:
                mean = sum(self._losses) / len(self._losses)
                self._losses.clear()
                unit = "tokens" if self._seen.get("tokens") else "samples"
                seen = self._seen.get(unit, 0)
                for prefix, node in self._grids.items():
                    try:
                        await publish_progress(
                            node, prefix, step=self._step, loss=mean, seen=seen, unit=unit, trainer=self._trainer
                        )
                    except (TesseractError, TimeoutError, RuntimeError) as error:
                        logger.info("the loss could not be published: %s", describe(error))
            await asyncio.sleep(self._period)
