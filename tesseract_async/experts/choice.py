"""The choice of the experts that a server hosts: as its user asked, within its run, its grant and its memory, and at
random among free ones. No I/O; randomness is passed in.

A pattern may name more uids than fit any memory, so it is never expanded: members are counted and drawn by their rank.
"""

import hashlib
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from random import Random

from tesseract_async.experts.authority import Authority
from tesseract_async.experts.grants import is_within
from tesseract_async.experts.manifest import join_uid
from tesseract_async.experts.pattern import ExpertPattern
from tesseract_async.experts.run import RunManifest
from tesseract_async.identity import PeerID

Coords = tuple[int, ...]


def choose(
    pattern: ExpertPattern,
    num_experts: int,
    hosted: Mapping[Coords, int],
    random: Random,
    *,
    without: Collection[Coords] = (),
) -> list[Coords]:
    """Choose members of `pattern` to host: free ones first, then those with the fewest replicas; never one twice.

    `hosted` says how many servers host each expert; experts outside of the pattern do not count. Members in `without`
    are never chosen. Equals are drawn uniformly, so newcomers who saw the same state meet on an expert no more often
    than chance. Fewer than `num_experts` are returned only if there are no more.

    Time and memory depend on the number of experts that are hosted and wanted, not on the pattern's size.
    """
    excluded = {rank for coords in without if (rank := pattern.rank_of(coords)) is not None}
    counts = {
        rank: count
        for coords, count in hosted.items()
        if count > 0 and (rank := pattern.rank_of(coords)) is not None and rank not in excluded
    }
    taken = sorted({*counts, *excluded})
    num_free = pattern.num_uids - len(taken)
    # how many free members lie below each taken one: so a free one's place among the free ones gives its rank
    free_below = [rank - index for index, rank in enumerate(taken)]
    places = _sample(num_free, max(0, min(num_experts, num_free)), random)
    chosen = [place + bisect_right(free_below, place) for place in places]
    by_count: defaultdict[int, list[int]] = defaultdict(list)
    for rank in sorted(counts):
        by_count[counts[rank]].append(rank)
    for count in sorted(by_count):
        wanted = max(0, num_experts - len(chosen))
        chosen += random.sample(by_count[count], min(wanted, len(by_count[count])))
    return [pattern.coords_at(rank) for rank in chosen]


def losers(mine: Iterable[Coords], others: Mapping[PeerID, Collection[Coords]], me: PeerID) -> set[Coords]:
    """Return those of `mine` that another newcomer keeps, which reserved them at the same time."""
    return {
        coords
        for coords in mine
        if any(coords in theirs and _draw(coords, owner) < _draw(coords, me) for owner, theirs in others.items())
    }


def _sample(population: int, wanted: int, random: Random) -> list[int]:
    """`wanted` different numbers below `population`, which may be more than `Random.sample` can index."""
    if population < 2**62:
        return random.sample(range(population), wanted)
    found: dict[int, None] = {}
    while len(found) < wanted:
        found[random.randrange(population)] = None
    return list(found)


def _draw(coords: Coords, owner: PeerID) -> bytes:
    return hashlib.sha256(b".".join(str(at).encode() for at in coords) + b"/" + owner).digest()


EXPIRED = "the grant has expired: only what was hosted here before goes on"


@dataclass(frozen=True, slots=True)
class Selection:
    """The experts that are settled, and how many more to claim (`claiming.claim_experts`)."""

    uids: list[str]
    num_more: int = 0
    pattern: ExpertPattern | None = None
    """The pattern within which to claim the others."""
    notes: tuple[str, ...] = ()
    """Sentences that tell the user why it is less than was asked for."""


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

    `patterns` and `num_experts` say what was asked for: without a number, all uids of the patterns; with one, that many
    of the one pattern or, without any pattern, of the run or of the server's grant. `stored`: uids with a checkpoint
    here. `max_experts`: how many fit into memory, None without a limit. `now`: wall-clock seconds.

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
                "as many as fit are chosen"
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
