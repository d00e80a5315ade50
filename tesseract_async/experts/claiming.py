"""Reservations in the network, by which a newcomer settles which experts it takes before it builds any.

A newcomer publishes its choice (`choice.choose`) under the grid's *claims* key, and after a moment reads what others
reserved meanwhile. If two took the same expert, both compute which of them keeps it. Reservations bind nobody.

A reservation is bytes: the number of dimensions, then 4 bytes (big-endian) per coordinate, expert by expert.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from random import Random
from typing import Final

import numpy as np

from tesseract_async.errors import ProtocolError, TesseractError, describe
from tesseract_async.experts.choice import Coords, choose, losers
from tesseract_async.experts.directory import read_claims
from tesseract_async.experts.grid import in_order_of_trust
from tesseract_async.experts.manifest import MAX_DIMS, RunTag, grid_key, join_uid
from tesseract_async.experts.pattern import ExpertPattern
from tesseract_async.experts.trust import Trust
from tesseract_async.identity import PeerID
from tesseract_async.network.network import TesseractNetwork

logger = logging.getLogger(__name__)

MAX_PART_BYTES: Final = 800
GRANT_SUBKEY: Final = "grant"
"""The subkey under which a newcomer to a run shows its grant to host there, since it has no manifest yet that says
so."""
RESERVATION_TTL: Final = 60.0
"""Seconds for which a reservation holds: enough to build the experts and declare them."""
SETTLE_SECONDS: Final = 0.5
"""Seconds between a reservation and the look at others'; longer than it takes to choose and to store."""
MAX_DRAWS: Final = 4
"""The number of draws after which a newcomer keeps its choice, even if another one has chosen the same."""


class ExpertClaim:
    """Experts that this node reserved. `release` it once they are declared, or are not going to be."""

    def __init__(self, network: TesseractNetwork, prefix: str, trust: Trust | None = None) -> None:
        self._network = network
        self._trust = Trust() if trust is None else trust
        self._prefix = prefix
        self._key = claims_key(prefix, self._trust.tag(prefix))
        self._subkeys: set[str] = set()
        self.uids: dict[str, bool] = {}
        """uid -> whether nobody hosted it when it was chosen, so that this node will train it."""

    async def reserve(self, coords: Sequence[Coords]) -> None:
        values = {str(number): part for number, part in enumerate(encode_reservation(coords))}
        if grant := self._trust.own_grant(self._prefix):
            values[GRANT_SUBKEY] = grant
        gone, self._subkeys = self._subkeys - values.keys(), set(values)
        for subkey, value in values.items():
            await self._network.store(self._key, value, ttl=RESERVATION_TTL, subkey=subkey)
        for subkey in gone:
            await self._network.withdraw(self._key, subkey=subkey)

    async def release(self) -> None:
        gone, self._subkeys = self._subkeys, set()
        for subkey in gone:
            try:
                await self._network.withdraw(self._key, subkey=subkey)
            except (TesseractError, TimeoutError, OSError) as error:
                logger.info("a reservation could not be withdrawn, it will expire: %s", describe(error))


async def claim_experts(
    network: TesseractNetwork,
    pattern: ExpertPattern,
    num_experts: int,
    *,
    random: Random,
    trust: Trust | None = None,
    clock: Callable[[], float] = time.time,
    log: Callable[[str], None] = logger.info,
) -> ExpertClaim:
    """Reserve `num_experts` of `pattern`: free ones, else those with the fewest replicas.

    Fewer only if the pattern names fewer. Peers whom `trust` does not believe are passed over. `clock` gives wall-clock
    time. Cancelled, it leaves a reservation that expires. Raises: what the network raises.
    """
    trust = Trust() if trust is None else trust
    claim = ExpertClaim(network, pattern.prefix, trust)
    hosted = await _hosted(network, pattern, trust, clock)
    mine: list[Coords] = []
    others = await _reserved(network, pattern, trust, clock)
    for attempt in range(MAX_DRAWS):
        counts = hosted + Counter(coords for theirs in others.values() for coords in theirs)
        mine += choose(pattern, num_experts - len(mine), counts, random, without=mine)
        if not mine:
            break
        await claim.reserve(mine)
        await asyncio.sleep(SETTLE_SECONDS)
        others = await _reserved(network, pattern, trust, clock)
        lost = losers(mine, others, network.peer_id)
        if not lost or attempt == MAX_DRAWS - 1:
            break
        log(f"{len(lost)} of {len(mine)} chosen experts were taken by others at the same time; drawing again")
        mine = [coords for coords in mine if coords not in lost]
    claim.uids = {join_uid(pattern.prefix, coords): coords not in hosted for coords in sorted(mine)}
    return claim


def claims_key(prefix: str, tag: RunTag | None = None) -> str:
    return f"claims/{grid_key(prefix, tag)}"


def encode_reservation(coords: Sequence[Coords]) -> list[bytes]:
    """The parts that reserve `coords`, which have equally many dimensions."""
    if not coords:
        return []
    num_dims = len(coords[0])
    per_part = (MAX_PART_BYTES - 1) // (4 * num_dims)
    packed = np.array(coords, dtype=">u4")
    return [bytes([num_dims]) + packed[start : start + per_part].tobytes() for start in range(0, len(coords), per_part)]


def decode_reservation(value: object) -> list[Coords]:
    """Read one part. Untrusted. Raises: ProtocolError."""
    if type(value) is not bytes or not 1 < len(value) <= MAX_PART_BYTES:
        raise ProtocolError("a reservation consists of bytes, not too many of them")
    num_dims = value[0]
    if not 0 < num_dims <= MAX_DIMS or (len(value) - 1) % (4 * num_dims):
        raise ProtocolError("a malformed reservation")
    rows: list[list[int]] = np.frombuffer(value, ">u4", offset=1).reshape(-1, num_dims).tolist()
    return [tuple(row) for row in rows]


async def _hosted(
    network: TesseractNetwork, pattern: ExpertPattern, trust: Trust, clock: Callable[[], float]
) -> Counter[Coords]:
    entries = await network.get_entries(trust.grid_key(pattern.prefix))
    others = [entry for entry in entries if entry.owner != network.peer_id]
    claims = await read_claims(others, prefix=pattern.prefix, now=clock(), trust=trust)
    servers: set[tuple[PeerID, Coords]] = set()
    for claim in in_order_of_trust(claims):
        servers |= {(claim.owner, tuple(row)) for row in claim.manifest.coords.tolist()}
        await asyncio.sleep(0)
    return Counter(coords for _, coords in servers)


async def _reserved(
    network: TesseractNetwork, pattern: ExpertPattern, trust: Trust, clock: Callable[[], float]
) -> dict[PeerID, set[Coords]]:
    found: dict[PeerID, set[Coords]] = {}
    run = trust.authority(pattern.prefix)
    entries = await network.get_entries(claims_key(pattern.prefix, trust.tag(pattern.prefix)))
    for entry in entries:
        if entry.subkey == GRANT_SUBKEY and type(entry.value) is bytes:
            trust.introduced(entry.owner, [entry.value])
    for entry in entries:
        if entry.owner == network.peer_id or entry.expiration <= clock() or entry.subkey == GRANT_SUBKEY:
            continue
        if not trust.may_be_read(entry.owner) or not (run is None or run.may(entry.owner, "host", now=clock())):
            continue
        try:
            rows = decode_reservation(entry.value)
            may = [row for row in rows if trust.may_host(entry.owner, join_uid(pattern.prefix, row), anew=True)]
            found.setdefault(entry.owner, set()).update(may)
            await asyncio.sleep(0)  # strangers may have written many
        except ProtocolError as error:
            logger.debug("dropped a reservation of %s: %s", entry.owner.short, error)
    return found
