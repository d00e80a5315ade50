"""The state of a running demo: fed with the processes' lines, read by the view and the report. No I/O."""

from collections import deque
from dataclasses import dataclass, field

from tesseract_async.cli.demo import plan

RATE_WINDOW = 3.0
"""Seconds over which rates are averaged."""


@dataclass(slots=True)
class Trainer:
    step: int = 0
    losses: list[tuple[float, float]] = field(default_factory=list)
    """(seconds since the start, loss of the step)"""
    accuracies: list[tuple[float, float]] = field(default_factory=list)
    """(seconds since the start, validation accuracy of the model that all trainers made together)"""
    model: str | None = None
    """That model's digest at the end."""
    errors: list[str] = field(default_factory=list)
    """Sentences about steps that were lost."""
    num_calls: int = 0
    """Calls to experts so far."""
    live: frozenset[str] = frozenset()
    """The experts that its directory shows."""
    recent: deque[tuple[float, int]] = field(default_factory=deque)

    @property
    def loss(self) -> float | None:
        last = [loss for _, loss in self.losses[-10:]]
        return sum(last) / len(last) if last else None

    @property
    def accuracy(self) -> float | None:
        return self.accuracies[-1][1] if self.accuracies else None

    @property
    def calls_per_second(self) -> float:
        if len(self.recent) < 2 or self.recent[-1][0] == self.recent[0][0]:
            return 0.0
        return (self.recent[-1][1] - self.recent[0][1]) / (self.recent[-1][0] - self.recent[0][0])


@dataclass(slots=True)
class ServerProgress:
    """One server: what it hosts, if it lives, and the steps of its experts."""

    uids: list[str]
    alive: bool = False
    versions: dict[str, int] = field(default_factory=dict)
    versions_at_return: dict[str, int] | None = None
    """The versions in its checkpoints when it came back."""

    @property
    def num_steps(self) -> int:
        return sum(self.versions.values())


class DemoProgress:
    """The whole demo. Times are seconds since the start of training."""

    def __init__(self, options: plan.DemoOptions) -> None:
        self.options = options
        self.trainers = {f"trainer {number + 1}": Trainer() for number in range(plan.NUM_TRAINERS)}
        self.servers = {
            f"server {number + 1}": ServerProgress(uids) for number, uids in enumerate(plan.assign(options.num_servers))
        }
        self.log: list[tuple[float, str]] = []
        self.killed_at: float | None = None
        self.returned_at: float | None = None
        self.num_processes = 0
        self.address: str | None = None
        """The address for others to join; known once the bootstrap node is ready."""

    def note(self, now: float, sentence: str) -> None:
        self.log.append((now, sentence))

    def take(self, name: str, facts: plan.Facts, now: float) -> None:
        if name in self.trainers:
            self._take_trainer(self.trainers[name], facts, now)
        elif name in self.servers and "versions" in facts:
            self.servers[name].versions = facts["versions"]

    def _take_trainer(self, trainer: Trainer, facts: plan.Facts, now: float) -> None:
        if "accuracy" in facts:
            trainer.accuracies.append((now, facts["accuracy"]))
        if facts["event"] == "done":
            trainer.model = facts["model"]
        if facts["event"] != "step":
            return
        trainer.step = facts["step"]
        trainer.live = frozenset(facts["live"])
        trainer.num_calls = facts["num_calls"]
        trainer.recent.append((now, trainer.num_calls))
        while trainer.recent[0][0] < now - RATE_WINDOW and len(trainer.recent) > 2:
            trainer.recent.popleft()
        if "loss" in facts:
            trainer.losses.append((now, facts["loss"]))
        if "error" in facts:
            trainer.errors.append(facts["error"])

    @property
    def share(self) -> float:
        return min(trainer.step for trainer in self.trainers.values()) / self.options.steps

    @property
    def live(self) -> frozenset[str]:
        return frozenset().union(*(trainer.live for trainer in self.trainers.values()))

    @property
    def accuracy(self) -> float | None:
        """The lowest of the trainers' last accuracies; None before the first."""
        known = [trainer.accuracy for trainer in self.trainers.values()]
        return None if None in known else min(value for value in known if value is not None)

    @property
    def models(self) -> set[str | None]:
        """The trainers' models at the end: one."""
        return {trainer.model for trainer in self.trainers.values()}

    @property
    def is_done(self) -> bool:
        return None not in self.models

    @property
    def passed(self) -> bool:
        is_one = self.is_done and len(self.models) == 1
        return is_one and self.accuracy is not None and self.accuracy >= plan.REQUIRED_ACCURACY
