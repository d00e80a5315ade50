"""Who trains an expert that several servers host. No I/O: what is known of the others is given to it.

One replica is *primary*: it steps the optimizer. The others follow: they answer forwards from state that they pull, and
pass backwards on. When the primary's manifest has expired or was withdrawn, the follower with the most steps takes
over. Where two are primary (a partition healed, two newcomers met), the one with more steps stays, and the other
follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from tesseract_async.identity import PeerID


@dataclass(frozen=True, slots=True)
class Standing:
    """One server's replica of an expert, as its live manifest and its answer say."""

    owner: PeerID
    primary: bool
    version: int | None
    """Optimizer steps; None if the server does not answer."""


class Role(Enum):
    """What a server should do about one expert."""

    LEAD = "lead"
    FOLLOW = "follow"


def decide(me: Standing, others: Sequence[Standing]) -> tuple[Role, Standing | None]:
    """This server's role, and whom it follows (None where it leads).

    All servers that see the same decide the same; equal steps are decided by the lower id. A primary whose manifest is
    alive keeps its role although it does not answer: it may be busy, and its manifest will expire if it is not. A
    follower that does not answer is no rival.
    """
    assert me.version is not None
    primaries = [other for other in others if other.primary]
    if me.primary:
        # an unreachable rival keeps its steps, and nobody knows how many: only one that answers is given way to
        better = [other for other in primaries if _rank(other) > _rank(me)]
        return (Role.FOLLOW, max(better, key=_rank)) if better else (Role.LEAD, None)
    if primaries:
        return Role.FOLLOW, max(primaries, key=_rank)
    better = [other for other in others if _rank(other) > _rank(me)]
    return (Role.FOLLOW, max(better, key=_rank)) if better else (Role.LEAD, None)


def _rank(one: Standing) -> tuple[int, int]:
    version = -1 if one.version is None else one.version
    return version, -int.from_bytes(one.owner, "big")
