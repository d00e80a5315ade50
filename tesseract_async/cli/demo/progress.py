"""The state of a running demo: fed with the processes' lines, read by the report. No I/O."""

from collections import deque
from dataclasses import dataclass, field

from tesseract_async.cli.demo import plan


@dataclass(slots=True)
class Trainer:
    step: int = 0
    losses: deque[float] = field(default_factory=lambda: deque(maxlen=10))
    """The losses of the last steps."""
    seconds: float = 0.0
    """From the start to its last step that was not lost."""
    accuracies: list[tuple[float, float]] = field(default_factory=list)
    """(seconds since the start, validation accuracy of the model that all trainers made together)"""
    model: str | None = None
    """That model's digest at the end."""
    num_lost: int = 0
    """Steps that were lost."""
    num_calls: int = 0
    """Calls to experts so far."""
    live: frozenset[str] = frozenset()
    """The experts that its directory shows."""

    @property
    def loss(self) -> float | None:
        return sum(self.losses) / len(self.losses) if self.losses else None

    @property
    def accuracy(self) -> float | None:
        return self.accuracies[-1][1] if self.accuracies else None


class DemoProgress:
    """The whole demo. Times are seconds since the start of training."""

    def __init__(self, options: plan.DemoOptions) -> None:
        self.options = options
        self.trainers = {f"trainer {number + 1}": Trainer() for number in range(plan.NUM_TRAINERS)}
        self.steps = {f"server {number + 1}": 0 for number in range(options.num_servers)}
        """The steps of each server's experts, all together."""
        self.log: list[tuple[float, str]] = []
        self.killed_at: float | None = None
        self.returned_at: float | None = None
        self.steps_kept = 0
        """The steps of the killed server's experts that were in its checkpoints when it came back."""
        self.num_processes = 0
        self.address: str | None = None
        """The address for others to join; known once the bootstrap node is ready."""

    def take(self, name: str, facts: plan.Facts, now: float) -> None:
        if name in self.trainers:
            self._take_trainer(self.trainers[name], facts, now)
        elif name in self.steps and "versions" in facts:
            self.steps[name] = sum(facts["versions"].values())

    def _take_trainer(self, trainer: Trainer, facts: plan.Facts, now: float) -> None:
        if "accuracy" in facts:
            trainer.accuracies.append((now, facts["accuracy"]))
        if facts["event"] == "done":
            trainer.model = facts["model"]
        if facts["event"] != "step":
            return
        trainer.step, trainer.num_calls = facts["step"], facts["num_calls"]
        trainer.live = frozenset(facts["live"])
        trainer.num_lost += "error" in facts
        if "loss" in facts:
            trainer.losses.append(facts["loss"])
            trainer.seconds = now

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
