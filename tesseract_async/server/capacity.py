"""Measures the capacity of a member of a run: how many experts it computes, how fast, and how many it keeps on disk."""

import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil
import torch

from tesseract_async.runtime.backend import ExpertBackend
from tesseract_async.server.footprint import measure, probe, size_text, template_of
from tesseract_async.server.state_files import NUM_SEALED

MAX_ROOM: Final = 64
"""The most experts that a server takes on by itself."""
MEMORY_SHARE: Final = 0.5
"""Share of the free memory that is used where the volunteer set no limit."""
DISK_SHARE: Final = 0.1
MAX_HOLD_BYTES: Final = 20 * 10**9
"""Disk for states of other members' experts if the volunteer set no limit: at most this much, or that share of the free
disk."""
FRAGMENTS_MEMORY: Final = 1 / 16
FRAGMENTS_DISK: Final = 1 / 8
"""Shares of the memory, and of the disk for states, for fragments of the parameters that a run's trainers share."""
FRAGMENT_BYTES: Final = 16 << 20
"""Memory, or disk, that a fragment takes: its values and momentum, and its last updates."""
NUM_ROWS: Final = 64
NUM_TRIES: Final = 3


@dataclass(frozen=True, slots=True)
class Capacity:
    """The capacity of a member of a run."""

    room: int
    """The most experts that it computes; 0: it only holds states."""
    files: int
    """The most experts of which it keeps a state, those that it computes included."""
    speed: float = 0.0
    """The rows that it computes each second."""
    sentence: str = ""
    """The capacity in a sentence for people."""
    fragments: tuple[int, int] = (0, 0)
    """The same two numbers for fragments of shared parameters (`server.fragments`)."""


def measure_capacity(
    build: Callable[[], ExpertBackend],
    *,
    room: int | None,
    hold_bytes: int | None,
    folder: Path | None,
    max_bytes: int | None = None,
    devices: Sequence[str] = ("cpu",),
) -> tuple[Capacity, ExpertBackend]:
    """Build an expert and measure it; return what this computer can give, and the expert without its weights.

    `room`: experts to compute, None for as many as fit; 0 measures no speed. `hold_bytes`: disk for others' states in
    `folder`, None for a share of what is free. `max_bytes`: of memory, where the volunteer set a limit. Blocking.
    Raises what building and running the expert raises.
    """
    backend = build()
    speed = speed_of(backend, devices[0]) * len(devices) if room != 0 else 0.0
    footprint = measure(build())
    memory = psutil.virtual_memory().available
    if room is None:
        room = max(1, min(MAX_ROOM, int(MEMORY_SHARE * memory) // footprint.resident))
    where = Path(tempfile.gettempdir()) if folder is None else folder
    free = shutil.disk_usage(where).free
    if hold_bytes is None:
        hold_bytes = min(MAX_HOLD_BYTES, int(DISK_SHARE * free))
    num_files = NUM_SEALED + 1  # and one on its way
    on_disk = num_files * footprint.state
    num_held = int((1 - FRAGMENTS_DISK) * hold_bytes) // on_disk
    memory = memory if max_bytes is None else min(memory, max_bytes)
    num_fragments = int(FRAGMENTS_MEMORY * memory) // FRAGMENT_BYTES if room else 0
    fragments = num_fragments, num_fragments + int(FRAGMENTS_DISK * hold_bytes) // (num_files * FRAGMENT_BYTES)
    computes = f"computes up to {room} of the run's experts, about {speed:,.0f} rows/s, and " if room else ""
    sentence = f"this computer {computes}holds up to {num_held} on disk ({size_text(hold_bytes)})"
    if free < on_disk:
        sentence += (
            f". The disk is full: {where} has {size_text(free)} free, and the files of one expert take "
            f"{size_text(on_disk)}. Free some of it, or choose another folder: until then no state is kept here"
        )
    elif hold_bytes and not num_held:
        sentence += f", too little for the files of one expert, which take {size_text(on_disk)}"
    return Capacity(room, room + num_held, speed, sentence, fragments), template_of(backend)


def speed_of(backend: ExpertBackend, device: str) -> float:
    """Return the rows that an expert computes each second, forward and backward. Its state does not change."""
    backend.to(torch.device(device))
    inputs, gradients = probe(backend, min(NUM_ROWS, backend.max_batch_size), torch.device(device))
    best = float("inf")
    for _ in range(NUM_TRIES):
        started = time.perf_counter()
        backend.forward(inputs, training=True)
        backend.gradients(inputs, gradients, training=True)
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * inputs[0].shape[0] / max(best, 1e-6)
