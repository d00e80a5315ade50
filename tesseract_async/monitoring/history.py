"""History: the figures of the last 5 minutes, hour and day, at most some hundred points each. No I/O."""

from collections import deque
from collections.abc import Mapping
from typing import Final

SPANS: Final = {"5 min": 300.0, "1 h": 3600.0, "1 day": 86400.0}
NUM_POINTS: Final = 300

Point = dict[str, float]
"""Figures by name, among them ``time`` (wall clock)."""


class History:
    """Points of three densities: in a longer span, each point is the mean of a longer time."""

    def __init__(self) -> None:
        self.points: dict[str, deque[Point]] = {name: deque(maxlen=NUM_POINTS) for name in SPANS}
        self.num_points = dict.fromkeys(SPANS, 0)
        """Points ever made, of each span."""
        self.last: Point = {}
        """The latest point as it was added; empty before the first."""
        self._open: dict[str, list[Point]] = {name: [] for name in SPANS}

    def add(self, point: Point) -> None:
        self.last = point
        for name, span in SPANS.items():
            open_ = self._open[name]
            open_.append(point)
            points = self.points[name]
            if not points or point["time"] - points[-1]["time"] >= 0.99 * span / NUM_POINTS:
                points.append(_mean(open_))
                self.num_points[name] += 1
                open_.clear()

    def since(self, told: Mapping[str, int]) -> dict[str, list[Point]]:
        """Return the points of each span that are not among the first `told` ever made."""
        new = {name: self.num_points[name] - told.get(name, 0) for name in SPANS}
        return {name: list(self.points[name])[-number:] if number else [] for name, number in new.items()}


def _mean(points: list[Point]) -> Point:
    names = {name for point in points for name in point}
    found = {name: [point[name] for point in points if name in point] for name in names}
    means = {name: round(sum(values) / len(values), 4) for name, values in found.items()}
    return means | {"time": points[-1]["time"]}
