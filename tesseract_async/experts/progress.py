"""Trainers' progress, as observers see it: how far each trainer of a grid is, in the network."""

from typing import Final, NamedTuple, Protocol

from tesseract_async.experts.thanks import Thanks, publish_thanks
from tesseract_async.experts.trust import Trust
from tesseract_async.metrics import Metrics
from tesseract_async.network.network import TesseractNetwork

PROGRESS_TTL: Final = 60.0
"""Seconds that a trainer is shown after it was last heard of."""
MAX_LOSS: Final = 3.5e38
"""The largest loss that is shown, about float32's maximum: sums of several stay finite, as JSON requires."""
UNITS: Final = ("samples", "tokens")
"""The units that trainers count."""
MERGED: Final = "merged"
"""The trainer whose loss is that of the parameters that all trainers share."""


class Progress(NamedTuple):
    """The progress of one trainer."""

    step: int
    loss: float
    left_out: int
    """Answers and gradients that its gates went on without."""
    seen: int
    """Samples or tokens."""
    unit: str


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


def read_progress(value: object) -> Progress | None:
    """Return what a trainer says; None for a malformed value, such as an infinity, which JSON does not know.

    Untrusted. Later versions may append to the list.
    """
    if not isinstance(value, list | tuple) or len(value) < 5:
        return None
    step, loss, left_out, seen, unit = value[:5]
    if not all(type(number) is int and 0 <= number < 2**53 for number in (step, left_out, seen)):
        return None
    if not isinstance(loss, int | float) or not abs(loss) <= MAX_LOSS or unit not in UNITS:
        return None
    return Progress(step, round(float(loss), 6), left_out, seen, unit)


async def publish_progress(
    node: OnNetwork,
    prefix: str,
    *,
    step: int,
    loss: float,
    seen: int = 0,
    unit: str = UNITS[0],
    trainer: str = "",
) -> None:
    """Show observers the progress of training the grid `prefix`. Call it every few seconds, not at every step.

    `AsyncTrainer.run` does so by itself. Once a minute it also thanks the servers, by name, for the rows and steps that
    the node received (`experts.thanks`), and it tells how many answers and gradients the node's gates went on without.

    - `seen`: how many `unit` this trainer has seen so far: ``samples`` or ``tokens``.
    - `trainer`: tells several trainers on one node apart. The loss of ``merged`` is that of the model that trainers
      share (`SharedParameters.merged`).

    Raises: ValueError for another unit; what the network raises.
    """
    if unit not in UNITS:
        raise ValueError(f"trainers see {' or '.join(UNITS)}, not {unit!r}")
    left_out = int(node.metrics.total("answers_left_out"))
    value = [step, loss, left_out, seen, unit]
    await node.network.store(progress_key(prefix), value, ttl=PROGRESS_TTL, subkey=trainer)
    if node.thanks.is_due(prefix):
        await publish_thanks(node.network, prefix, node.thanks, authority=node.trust.authority(prefix))
