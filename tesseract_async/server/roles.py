"""The choice of who trains an expert with a bare name that several servers host. No I/O: others' words are given to it.

Bare names have no records that say who may train (`experts.lineage` has, for runs), so one server's word counts for
little. A running primary gives way to no other for its large version: versions are compared only among servers that the
node's own allow-list names. Among others, which are machines on one's own network, it gives way

- while it has just begun and taken no step: two that start together settle on one;
- after it stood still or was cut off for a lease, in which another may have taken over;
- to the one that it took over from, if that has been there all the time.

Everything else stays as it is, and is reported: two primaries are for people to settle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from tesseract_async.identity import PeerID


@dataclass(frozen=True, slots=True)
class Contender:
    """One server's replica of an expert, as its live manifest and its answer say."""

    owner: PeerID
    primary: bool
    version: int | None
    """Optimizer steps; None if the server does not answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Past:
    """The memory of this server about an expert."""

    primary: PeerID | None = None
    """The server that it follows."""
    taken_from: PeerID | None = None
    """The server that it took over from, unasked."""
    is_new: bool = False
    """It has been primary for a moment only, without a step, or stood still for a lease."""
    has_waited: bool = True
    """A better follower had the time to take over, and did not."""


class Role(Enum):
    """The part that a server should play for one expert."""

    TRAIN = "train"
    """Be its primary."""
    FOLLOW = "follow"
    WAIT = "wait"
    """Follow nobody for the moment: a better follower is about to take over."""


def decide(me: Contender, others: Sequence[Contender], past: Past, *, listed: bool) -> tuple[Role, Contender | None]:
    """Return this server's role, and which server it follows.

    `others`: replicas whose word may count, and of those that call themselves primary only the ones that answered
    lately. `listed`: they are on an allow-list, so that their versions are believed.
    """
    assert me.version is not None
    primaries = [other for other in others if other.primary]
    if me.primary:
        speaking = [other for other in primaries if other.version is not None]
        if listed:
            better = [other for other in speaking if _rank(other) > _rank(me)]
        else:
            better = speaking if past.is_new else [other for other in speaking if other.owner == past.taken_from]
        return (Role.FOLLOW, max(better, key=_rank)) if better else (Role.TRAIN, None)
    if primaries:
        known = [other for other in primaries if other.owner == past.primary]
        return Role.FOLLOW, max((not listed and known) or primaries, key=_rank)
    better = [other for other in others if other.version is not None and _rank(other) > _rank(me)]
    return (Role.WAIT if better and not past.has_waited else Role.TRAIN), None


def _rank(one: Contender) -> tuple[int, int]:
    version = -1 if one.version is None else one.version
    return version, -int.from_bytes(one.owner, "big")
