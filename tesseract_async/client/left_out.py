"""The answers and gradients that mixtures went on without: counted, and said now and then."""

from __future__ import annotations

import asyncio
import logging
import math
from collections import Counter
from collections.abc import Mapping

from tesseract_async.errors import ConnectionLost, PeerUnreachable, summarize
from tesseract_async.metrics import Metrics

logger = logging.getLogger(__name__)

SAY_EVERY_SECONDS = 60.0
_GONE = (PeerUnreachable, ConnectionLost)


class LeftOut:
    """Of all mixtures of one node."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._since: dict[int, Counter[str]] = {logging.INFO: Counter(), logging.WARNING: Counter()}
        self._said_at = dict.fromkeys(self._since, -math.inf)

    def note(self, way: str, errors: Mapping[str, BaseException]) -> None:
        """A pass (``forward`` or ``backward``) ended without these experts: uid -> why.

        Counts each in the metric ``answers_left_out``. Once a minute at most the log has a warning about experts that
        live, yet failed or were late, and as seldom an information about those whose server is gone: swarms are made
        for that.
        """
        for error in errors.values():
            reason = "late" if isinstance(error, TimeoutError) else type(error).__name__
            self._metrics.count("answers_left_out", way=way, reason=reason)
        gone = {uid: error for uid, error in errors.items() if isinstance(error, _GONE)}
        self._say(logging.INFO, way, gone)
        self._say(logging.WARNING, way, {uid: error for uid, error in errors.items() if uid not in gone})

    def _say(self, level: int, way: str, errors: Mapping[str, BaseException]) -> None:
        since = self._since[level]
        since[way] += len(errors)
        now = asyncio.get_running_loop().time()
        if errors and now >= self._said_at[level] + SAY_EVERY_SECONDS:
            answers, gradients = _counted(since["forward"], "answer"), _counted(since["backward"], "gradient")
            went_without = " and ".join(filter(None, (answers, gradients)))
            logger.log(level, "gates went on without %s: %s", went_without, summarize(errors))
            since.clear()
            self._said_at[level] = now


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}" if number else ""
