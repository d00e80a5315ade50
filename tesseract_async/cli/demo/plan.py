"""What the demo does: its settings, and which server hosts what. No I/O."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from tesseract_async.experts import ExpertPattern

PREFIX = "digits"
GRID_SIZE = (4, 4)
NUM_PIXELS = 64
NUM_CLASSES = 10
NUM_TRAINERS = 2
REQUIRED_ACCURACY = 0.97


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoSettings:
    """One run of the demo."""

    steps: int = 400
    """Steps of each trainer."""
    num_servers: int = 3
    seed: int = 0
    freeze_experts: bool = False
    """The control: experts without an optimizer. The accuracy then shows what gates alone can do."""
    plot: Path | None = Path("demo.png")
    kill_at: float = 1 / 3
    """Share of the steps after which a server is killed."""
    return_at: float = 0.42
    """Share of the steps after which it is started again."""

    wait_at: float = 0.8
    """Share of the steps after which trainers wait for the server that was killed, if it is not back yet."""

    rows: int = 64
    """Rows of one step."""
    noise: float = 0.5
    """Standard deviation of what is added to the training pixels (whose own is 1), so that 1,437 images suffice."""
    k_best: int = 4
    hidden_features: int = 128
    expert_learning_rate: float = 2e-3
    gate_learning_rate: float = 1e-3
    validate_every: int = 10
    """Steps between validations."""
    refresh_period: float = 1.0
    """Seconds between a trainer's readings of the directory."""
    ttl: float = 6.0
    """Seconds for which a server's manifest holds."""
    checkpoint_period: float = 1.0
    """Seconds between a server's checkpoints: what a killed server loses at most."""

    def __post_init__(self) -> None:
        if not 1 <= self.num_servers <= len(all_uids()):
            raise ValueError(f"the demo has {len(all_uids())} experts, so 1 to as many servers, not {self.num_servers}")
        if self.steps < 1:
            raise ValueError("the demo takes at least one step")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerTask:
    """What a trainer is told on its command line."""

    initial_peers: list[str]
    number: int
    """Which trainer it is: each draws its own batches."""
    seed: int
    steps: int
    rows: int
    noise: float
    k_best: int
    gate_learning_rate: float
    wait_at: int
    """Before this step, the trainer waits until all experts live and the file `go_on` exists."""
    go_on: str
    validate_every: int
    refresh_period: float

    def encode(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def decode(cls, text: str) -> TrainerTask:
        """Raises: TypeError, ValueError."""
        return cls(**json.loads(text))


def all_uids() -> list[str]:
    """Every expert of the demo's grid."""
    return list(ExpertPattern(PREFIX, tuple(range(size) for size in GRID_SIZE)))


def assign(num_servers: int) -> list[list[str]]:
    """Which server hosts which uids: dealt out like cards, so that a lost server leaves holes everywhere."""
    return [all_uids()[number::num_servers] for number in range(num_servers)]


def sizes(settings: DemoSettings) -> dict[str, int]:
    """Of the experts."""
    return {"in_features": NUM_PIXELS, "hidden_features": settings.hidden_features, "out_features": NUM_CLASSES}


def commands_to_join(settings: DemoSettings, address: str, program: str) -> list[str]:
    """What to type into a second terminal while the demo runs: to look on, and to lend a hand."""
    pattern = ExpertPattern(PREFIX, tuple(range(size) for size in GRID_SIZE))
    words = " ".join(f"--size {name}={size}" for name, size in sizes(settings).items())
    frozen = " --optimizer none" if settings.freeze_experts else f" --learning-rate {settings.expert_learning_rate}"
    return [
        f"{program} top -p {address}",
        f"{program} dashboard -p {address}",
        f"{program} serve -p {address} --experts '{pattern}' --num-experts 4 {words}{frozen}",
    ]


def server_name(number: int) -> str:
    """How people call a server: ``server 1``."""
    return f"server {number + 1}"


def trainer_name(number: int) -> str:
    """How people call a trainer: ``trainer 1``."""
    return f"trainer {number + 1}"
