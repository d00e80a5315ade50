"""Trainers' reports in the network, for observers: how far each trainer is, and what it received from each server."""

import math
import time
from collections.abc import Callable, Iterable
from typing import Final, NamedTuple, Protocol

from tesseract_async.admission import Policy
from tesseract_async.experts.authority import Authority
from tesseract_async.experts.trust import Trust
from tesseract_async.identity import PeerID
from tesseract_async.metrics import Metrics
from tesseract_async.network.network import TesseractNetwork

HOUR: Final = 3600
THANKS_TTL: Final = 86400.0
"""Seconds that an hour's counts are kept: a day is what can be shown."""
NUM_HOURS: Final = 24
PUBLISH_EVERY: Final = 60.0
SERVERS_PER_PART: Final = 16
MAX_PARTS: Final = 16
MAX_THANKS: Final = 4096
"""The most pairs of trainer and server that are read for one hour."""
GRANT: Final = "grant"
"""The subkey of the trainer's grant, for observers, which have not met the trainer."""
_MAX_SERVERS: Final = SERVERS_PER_PART * MAX_PARTS


class Thank(NamedTuple):
    trainer: PeerID
    server: PeerID
    hour: int
    """Hours since 1970."""
    rows: int
    steps: int


class Thanks:
    """The counts of one node: of this hour and the one before."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._published_at: dict[str, float] = {}
        self._hours: dict[int, dict[str, dict[PeerID, list[int]]]] = {}

    def add(self, prefix: str, server: PeerID | None, rows: int, steps: int) -> None:
        """Count the answer of a server that hosts experts of the grid `prefix`."""
        hour = int(self._clock()) // HOUR
        if hour not in self._hours:
            self._hours = {one: grids for one, grids in self._hours.items() if one == hour - 1} | {hour: {}}
        servers = self._hours[hour].setdefault(prefix, {})
        if server is not None and (server in servers or len(servers) < _MAX_SERVERS):
            counts = servers.setdefault(server, [0, 0])
            counts[0] += rows
            counts[1] += steps

    def is_due(self, prefix: str) -> bool:
        now = self._clock()
        if abs(now - self._published_at.get(prefix, -math.inf)) < PUBLISH_EVERY:
            return False
        self._published_at[prefix] = now
        return True

    def parts(self, prefix: str) -> Iterable[tuple[int, int, list[list[object]]]]:
        for hour, grids in self._hours.items():
            lines = [[bytes(server), *counts] for server, counts in grids.get(prefix, {}).items()]
            for number in range(-(-len(lines) // SERVERS_PER_PART)):
                yield hour, number, lines[number * SERVERS_PER_PART : (number + 1) * SERVERS_PER_PART]


def thanks_key(prefix: str, hour: int) -> str:
    return f"thanks/{prefix}/{hour}"


async def publish_thanks(
    network: TesseractNetwork, prefix: str, thanks: Thanks, *, authority: Authority | None = None
) -> None:
    """Store the counts of this hour and the one before, in a run with the grant by which this node trains.

    Raises: what the network raises.
    """
    grant = None if authority is None else authority.grant_of(network.peer_id)
    for hour, number, lines in list(thanks.parts(prefix)):
        key = thanks_key(prefix, hour)
        if grant is not None and number == 0:
            await network.store(key, grant.blob, ttl=THANKS_TTL, subkey=GRANT)
        await network.store(key, lines, ttl=THANKS_TTL, subkey=str(number))


async def read_thanks(
    network: TesseractNetwork, prefix: str, hour: int, policy: Policy, *, authority: Authority | None = None
) -> list[Thank]:
    """Return what trainers say of this hour: peers that `policy` lets train and, in a run, that its owner does.

    Raises: what the network raises.
    """
    found: dict[tuple[PeerID, PeerID], Thank] = {}
    entries = await network.get_entries(thanks_key(prefix, hour))
    for entry in entries:
        if entry.subkey == GRANT and authority is not None:
            authority.learn_grant(entry.value, entry.owner)
    for entry in entries:
        if authority is not None and not authority.may(entry.owner, "train", now=None):
            continue
        if entry.subkey == GRANT or not policy.allows(entry.owner, "train"):
            continue
        for server, rows, steps in _lines(entry.value):
            if server != entry.owner and len(found) < MAX_THANKS:
                found[entry.owner, server] = Thank(entry.owner, server, hour, rows, steps)
    return list(found.values())


def _lines(value: object) -> Iterable[tuple[PeerID, int, int]]:
    """Yield the lines of an entry; nothing where it is malformed. Untrusted."""
    for line in value if isinstance(value, list | tuple) and len(value) <= SERVERS_PER_PART else ():
        if not isinstance(line, list | tuple) or len(line) != 3:
            continue
        server, rows, steps = line
        counts = (rows, steps)
        if type(server) is bytes and len(server) == 32 and all(type(n) is int and 0 <= n < 2**53 for n in counts):
            yield PeerID(server), rows, steps


PROGRESS_TTL: Final = 60.0
"""Seconds for which a trainer is shown after its last report."""
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
        """The node's counters."""

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
    the node received (`Thanks`), and it tells how many answers and gradients the node's gates went on without.

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
