"""Trainers' progress, as observers see it: the latest step and loss of each trainer of a grid, in the network."""

import math
from typing import Final, Protocol

from tesseract_async.experts.thanks import Thanks, publish_thanks
from tesseract_async.experts.trust import Trust
from tesseract_async.metrics import Metrics
from tesseract_async.network.network import TesseractNetwork

PROGRESS_TTL: Final = 60.0
"""Seconds that a trainer is shown after it was last heard of."""


class OnNetwork(Protocol):
    @property
    def network(self) -> TesseractNetwork:
        """The network that it takes part in."""

    @property
    def metrics(self) -> Metrics:
        """Its counters."""

    @property
    def thanks(self) -> Thanks:
        """The counts of what servers gave."""

    @property
    def trust(self) -> Trust:
        """The runs that it takes part in."""


def progress_key(prefix: str) -> str:
    return f"progress/{prefix}"


def read_progress(value: object) -> tuple[int, float, int] | None:
    """Return step, loss and answers left out, or None for a malformed value, such as an infinity, which JSON does not
    know. Untrusted."""
    if not isinstance(value, list | tuple) or len(value) != 3:
        return None
    step, loss, left_out = value
    if not all(type(number) is int and 0 <= number < 2**53 for number in (step, left_out)):
        return None
    if not isinstance(loss, int | float) or not math.isfinite(loss):
        return None
    return step, round(float(loss), 6), left_out


async def publish_progress(node: OnNetwork, prefix: str, *, step: int, loss: float, trainer: str = "") -> None:
    """Show observers the progress of training the grid `prefix`, and how many answers and gradients the node's gates
    went on without. Call it every few seconds, not at every step. Once a minute it also thanks the servers, by name,
    for the rows and steps that the node received (`experts.thanks`).

    `AsyncTrainer.run` does so by itself. `trainer` tells several trainers on one node apart.
    """
    left_out = int(node.metrics.total("answers_left_out"))
    await node.network.store(progress_key(prefix), [step, loss, left_out], ttl=PROGRESS_TTL, subkey=trainer)
    if node.thanks.is_due(prefix):
        await publish_thanks(node.network, prefix, node.thanks, authority=node.trust.authority(prefix))
