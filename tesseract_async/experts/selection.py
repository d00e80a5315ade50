"""Selects the experts that a server hosts: as it was asked, within its run, its grant and its memory. No I/O.

What this computer hosted before comes first: its checkpoints are worth more than a free place.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from tesseract_async.experts.authority import Authority
from tesseract_async.experts.grants import is_within
from tesseract_async.experts.manifest import join_uid
from tesseract_async.experts.pattern import ExpertPattern
from tesseract_async.experts.run import RunManifest
from tesseract_async.identity import PeerID

EXPIRED = "the grant has expired: only what was hosted here before goes on"


@dataclass(frozen=True, slots=True)
class Selection:
    """The experts that are settled, and how many more to claim (`claiming.claim_experts`)."""

    uids: list[str]
    num_more: int = 0
    pattern: ExpertPattern | None = None
    """The pattern within which to claim the others."""
    notes: tuple[str, ...] = ()
    """Sentences for the user: why it is less than was asked for."""


def select_experts(
    peer_id: PeerID,
    patterns: Sequence[ExpertPattern],
    *,
    num_experts: int | None,
    run: RunManifest | None,
    authority: Authority | None,
    stored: Collection[str],
    max_experts: int | None,
    now: float,
) -> Selection:
    """Return what the server `peer_id` hosts.

    `patterns` and `num_experts` are what was asked for: all uids of the patterns without a number, else so many of the
    one pattern; without any pattern, of the run or of the server's grant. `stored`: uids with a checkpoint here.
    `max_experts`: how many fit into memory, None without a limit. `now`: wall-clock seconds.

    Raises: ValueError with a sentence if this is more than the run has, the grant covers or the memory holds, or if the
    grant has expired and nothing is stored.
    """
    is_asked_for = bool(patterns)
    if run is not None:
        for pattern in patterns:
            _check_inside(pattern, run)
        grant = None if authority is None else authority.grant_of(peer_id)
        patterns = patterns or [run.pattern if grant is None or grant.pattern is None else grant.pattern]
    for pattern in patterns:
        ends = (join_uid(pattern.prefix, [one[end] for one in pattern.ranges]) for end in (0, -1))
        if authority is not None and not all(authority.may(peer_id, "host", uid, now=None) for uid in ends):
            raise ValueError(f"the grant of {peer_id} does not cover {pattern}")
    if num_experts is None and is_asked_for:
        uids = list(dict.fromkeys(uid for pattern in patterns for uid in pattern))
        if max_experts is not None and max_experts < len(uids):
            raise ValueError(
                f"{len(uids)} experts were asked for, but only {max_experts} fit --max-memory: with --num-experts, "
                "so many are chosen"
            )
        kept = [uid for uid in uids if uid in set(stored)]
        return Selection(uids) if _may_begin(peer_id, authority, kept, now) else Selection(kept, notes=(EXPIRED,))
    if len(patterns) != 1:
        raise ValueError("--num-experts chooses from one pattern; say --experts once")
    (pattern,) = patterns
    num_experts = num_experts or 1
    notes: tuple[str, ...] = ()
    if max_experts is not None and max_experts < num_experts:
        notes = (f"only {max_experts} of {num_experts} experts fit --max-memory",)
        num_experts = max_experts
    kept = sorted(uid for uid in stored if uid in pattern)[:num_experts]
    if len(kept) < num_experts and not _may_begin(peer_id, authority, kept, now):
        return Selection(kept, notes=(*notes, EXPIRED))
    return Selection(kept, num_experts - len(kept), pattern, notes)


def _check_inside(pattern: ExpertPattern, run: RunManifest) -> None:
    if pattern.prefix != run.prefix or len(pattern.ranges) != len(run.grid_size):
        raise ValueError(f"{pattern} is not part of the run's grid {run.pattern}")
    if not is_within(pattern, run.pattern):
        raise ValueError(f"{pattern} reaches beyond the run's grid {run.pattern}")


def _may_begin(peer_id: PeerID, authority: Authority | None, kept: Sequence[str], now: float) -> bool:
    """Return whether the server may host what it has not hosted before. Raises: ValueError if it may not, and `kept` is
    empty."""
    if authority is None or authority.may(peer_id, "host", now=now):
        return True
    if not kept:
        raise ValueError(f"the grant of {peer_id} has expired: ask the run's owner to renew it")
    return False
