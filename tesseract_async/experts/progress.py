"""Trainers' progress, as observers see it: the latest step and loss of each trainer of a grid, in the network."""

from __future__ import annotations

import math
from typing import Final, Protocol

from tesseract_async.network.network import TesseractNetwork

PROGRESS_TTL: Final = 60.0
"""Seconds that a trainer is shown after it was last heard of."""


class OnNetwork(Protocol):
    """A node."""

    @property
    def network(self) -> TesseractNetwork:
        """The network that it takes part in."""


def progress_key(prefix: str) -> str:
    """Return where the progress of training the grid `prefix` is stored."""
    return f"progress/{prefix}"


def read_progress(value: object) -> tuple[int, float] | None:
    """Return (step, loss), or None for a malformed value, such as an infinity, which JSON does not know. Untrusted."""
    if not isinstance(value, list | tuple) or len(value) != 2:
        return None
    step, loss = value
    if type(step) is not int or not 0 <= step < 2**53 or not isinstance(loss, int | float) or not math.isfinite(loss):
        return None
    return step, round(float(loss), 6)


async def publish_progress(node: OnNetwork, prefix: str, *, step: int, loss: float, trainer: str = "") -> None:
    """Show observers the progress of training the grid `prefix`. Call it every few seconds, not at every step.

    `AsyncTrainer.run` does so by itself. `trainer` tells several trainers on one node apart.
    """
    await node.network.store(progress_key(prefix), [step, loss], ttl=PROGRESS_TTL, subkey=trainer)
