"""`Tenured`: an expert of a run at one server: its `Tenure`, and what the server does for it."""

import asyncio
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from tesseract_async.experts.authority import Authority
from tesseract_async.experts.tenure import Tenure
from tesseract_async.server.hosted import HostedState
from tesseract_async.tasks import in_time


@dataclass(slots=True)
class Tenured:
    uid: str
    hosted: HostedState | None
    """None if the expert is here only as a sealed file."""
    authority: Authority
    tenure: Tenure
    carrying: asyncio.Lock = field(default_factory=asyncio.Lock)
    installing: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held from the choice of a state until the machine knows that the state is here. Taken before `carrying`."""
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set after every command; tasks that wait for something look again, and clear it."""
    progress: tuple[int, int] | None = None
    """The progress of the sealed file's state."""
    sealed_at: float = -math.inf
    versions: deque[tuple[float, int]] = field(default_factory=deque)
    """The times at which the last states were sealed, and their versions."""
    num_waiting: int = 0
    """Trainers that wait here for its next primary."""
    stands: bool = False
    """True if it was a candidate when its commands were carried out last."""
    waited_for: bool = False
    """True if it was told that this expert may have a state, which nobody shows."""
    wanted_root: bytes | None = None
    """The state that the run's owner named last."""
    unwritten: bytes | None = None
    """Data that the disk did not take, and must take before this server says anything."""
    is_unsealed: bool = False
    """True if its state could not be sealed when that was due."""
    silent_until: float = -math.inf
    """The time until which this primary leaves such an expert to its successors, which hold the last sealed state."""

    async def until(self, condition: Callable[[Tenure], bool], timeout: float) -> bool:
        """Wait until something holds. False if it does not within `timeout` seconds."""

        async def wait() -> None:
            while not condition(self.tenure):
                self.changed.clear()
                await self.changed.wait()

        return await in_time(wait(), timeout) or condition(self.tenure)

    @property
    def has_moved(self) -> bool:
        """True if it took steps since its file was sealed."""
        return self.hosted is not None and self.progress != self.hosted.backend.progress
