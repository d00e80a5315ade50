"""The calls that a mixture's batch falls into, and how long each may take before it counts as hanging. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tesseract_async.client.expert_calls import Answer, Forward

_MIN_PATIENCE_SECONDS = 0.02
_MAX_SHARE = 4.0


@dataclass(slots=True, eq=False)
class Part:
    """The rows that go to one expert."""

    uid: str
    expert: int
    """Index into the live experts."""
    rows: torch.Tensor
    replicas: Sequence[Any]
    forward: Forward
    sent: float
    """The loop's time."""
    expected: float | None
    """Seconds that its forward usually takes, as far as known when it was sent."""
    num_rows: int = 0
    """As many as `rows` has; set when it is made."""
    outputs: list[torch.Tensor] = field(default_factory=list)
    answer: Answer | None = None
    slow: bool = False
    """Whether it takes suspiciously long."""
    grace: float = 0.0
    """Seconds that it is waited for when it is slow, where its rows have enough answers."""
    late_at: float = math.inf
    """From when on it is slow (the loop's time)."""

    def __post_init__(self) -> None:
        self.num_rows = self.rows.shape[0]

    @property
    def num_bytes(self) -> int:
        """What travels there and back, uncompressed."""
        return self.num_rows * self.forward.schema.row_bytes


@dataclass(frozen=True, slots=True)
class Usual:
    """What the answers of a batch so far say about how long an answer may take."""

    seconds: float
    num_rows: float

    @classmethod
    def of(cls, parts: Sequence[Part], seconds: Sequence[float], num_asked: int) -> Usual | None:
        """The medians; None unless half of those asked (and not failed) have answered."""
        if not parts or 2 * len(parts) < num_asked:
            return None
        return cls(statistics.median(seconds), statistics.median([part.num_rows for part in parts]))


def usual_seconds(part: Part, usual: Usual | None, expected: float | None) -> float | None:
    """Seconds that `part` may well take; None if nothing is known. Those with more rows get more time.

    `expected`: what it usually takes itself, where that is known.
    """
    seconds = expected
    if usual is not None:
        of_others = usual.seconds * min(_MAX_SHARE, max(1.0, part.num_rows / usual.num_rows))
        seconds = of_others if expected is None else max(expected, of_others)
    return seconds


def patience_limit(seconds: float | None, patience: float) -> float:
    """Seconds after which a part that may well take `seconds` counts as hanging; infinite if nothing is known."""
    return math.inf if seconds is None else seconds + max(_MIN_PATIENCE_SECONDS, patience * seconds)
