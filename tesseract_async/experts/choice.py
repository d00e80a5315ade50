"""The choice of the experts of a pattern that a newcomer takes. No I/O; randomness is given.

A pattern may name more uids than fit any memory, so it is never expanded: members are counted and drawn by their rank.
"""

import hashlib
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from random import Random

from tesseract_async.experts.pattern import ExpertPattern
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

    `hosted` says how many servers host each expert; what is outside of the pattern does not count. Members in
    `without` are never chosen. Equals are drawn uniformly, so newcomers who saw the same state meet on an expert no
    more often than chance. Fewer than `num_experts` are returned only if there are no more.

    Takes time and memory by what is hosted and wanted, not by the pattern's size.
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
