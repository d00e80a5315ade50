"""The answers and gradients that mixtures went on without: counted, and said now and then."""

from __future__ import annotations

import asyncio
import logging
import math
from collections import Counter
from collections.abc import Mapping

from tesseract_async.errors import summarize
from tesseract_async.metrics import Metrics

logger = logging.getLogger(__name__)

SAY_EVERY_SECONDS = 60.0


class LeftOut:
    """Of all mixtures of one node."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._since: Counter[str] = Counter()
        self._said_at = -math.inf

    def note(self, way: str, errors: Mapping[str, BaseException]) -> None:
        """A pass (``forward`` or ``backward``) ended without these experts: uid -> why. Counts each in the metric
        ``answers_left_out``, and says so in the log once a minute at most."""
        if not errors:
            return
        for error in errors.values():
            reason = "late" if isinstance(error, TimeoutError) else type(error).__name__
            self._metrics.count("answers_left_out", way=way, reason=reason)
        self._since[way] += len(errors)
        now = asyncio.get_running_loop().time()
        if now >= self._said_at + SAY_EVERY_SECONDS:
            forward, backward = self._since["forward"], self._since["backward"]
            logger.warning(
                "gates went on without %d answers and %d gradients lately: %s", forward, backward, summarize(errors)
            )
            self._since.clear()
            self._said_at = now
