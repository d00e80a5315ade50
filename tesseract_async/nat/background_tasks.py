"""Work on offers that nobody waits for."""

import logging
from typing import Final

from tesseract_async.errors import ConnectionLost, TesseractError, describe
from tesseract_async.metrics import Metrics
from tesseract_async.tasks import TaskSet

logger = logging.getLogger(__name__)

REASONS: Final = {TimeoutError: "timeout", ConnectionLost: "lost", OSError: "io", TesseractError: "protocol"}


def offer_tasks(metrics: Metrics) -> TaskSet:
    """Return a set of tasks that may raise TesseractError or OSError, counted as ``nat_offers_failed``."""

    def failed(error: BaseException) -> None:
        reason = next((name for kind, name in REASONS.items() if isinstance(error, kind)), None)
        if reason is None:
            raise error
        logger.debug("a peer's offer came to nothing: %s", describe(error))
        metrics.count("nat_offers_failed", reason=reason)

    return TaskSet("nat: offer", on_error=failed)
