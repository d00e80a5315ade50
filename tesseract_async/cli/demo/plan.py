"""The plan of the demo: its options and constants, and which server hosts which experts. No I/O."""

from dataclasses import dataclass
from typing import Annotated, Any

import click

from tesseract_async.cli.flags import Flag
from tesseract_async.experts.pattern import ExpertPattern

Facts = dict[str, Any]
"""A line of a demo's process."""

PREFIX = "digits"
GRID_SIZE = (4, 4)
PATTERN = ExpertPattern(PREFIX, tuple(range(size) for size in GRID_SIZE))
NUM_PIXELS = 64
NUM_CLASSES = 10
HIDDEN_FEATURES = 128
NUM_TRAINERS = 2
REQUIRED_ACCURACY = 0.97

KILL_AT = 1 / 3
"""Share of the steps after which a server is killed."""
RETURN_AT = 0.42
"""Share of the steps after which it is started again."""
WAIT_AT = 0.8
"""Share of the steps after which trainers wait for the server that was killed, if it is not back yet."""

ROWS = 64
"""Rows of one step."""
NOISE = 0.5
"""Standard deviation of what is added to the training pixels (which have 1), so that 1,437 images suffice."""
K_BEST = 4
EXPERT_LEARNING_RATE = 2e-3
GATE_LEARNING_RATE = 1e-3
SHARE_EVERY = 16
"""Steps between two exchanges of what trainers share."""
VALIDATE_EVERY = 10
"""Steps between validations."""
REFRESH_PERIOD = 1.0
"""Seconds between a trainer's readings of the directory."""
TTL = 6.0
"""Seconds for which a server's manifest holds."""
CHECKPOINT_PERIOD = 1.0
"""Seconds between a server's checkpoints: what a killed server loses at most."""
SIZES = {"in_features": NUM_PIXELS, "hidden_features": HIDDEN_FEATURES, "out_features": NUM_CLASSES}


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoOptions:
    """The flags of the command that change the training."""

    steps: Annotated[int, click.IntRange(1)] = 400
    """Let each of the two trainers take this many steps."""
    num_servers: Annotated[int, click.IntRange(1, 16), Flag("--servers")] = 3
    """Spread the 16 experts over this many servers."""
    seed: Annotated[int, click.IntRange(0, 2**32 - 1)] = 0
    """Draw the training's random numbers from this seed."""
    freeze_experts: bool = False
    """Keep the experts from learning, for comparison: accuracy stays below 0.6. This is what gates alone can do."""


UIDS = [*PATTERN]
"""Every expert of the demo's grid."""


def assign(num_servers: int) -> list[list[str]]:
    """Return the uids of each server, dealt out like cards, so that a lost server leaves holes everywhere."""
    return [UIDS[number::num_servers] for number in range(num_servers)]


def expert_arguments(options: DemoOptions) -> list[str]:
    """Return the flags of `tesseract serve` by which every server builds the same experts."""
    words = [word for name, size in SIZES.items() for word in ("--size", f"{name}={size}")]
    return [
        *words,
        *(["--optimizer", "none"] if options.freeze_experts else ["--learning-rate", f"{EXPERT_LEARNING_RATE}"]),
    ]


def commands_to_join(options: DemoOptions, address: str, program: str) -> list[str]:
    """Return what to type into a second terminal while the demo runs, to watch, and to lend a hand."""
    words = " ".join(expert_arguments(options))
    return [
        f"{program} top -p {address}",
        f"{program} dashboard -p {address}",
        f"{program} serve -p {address} --experts '{PATTERN}' --num-experts 4 {words}",
    ]
