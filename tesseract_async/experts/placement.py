"""`Placement`: which experts of a run each of its members should lead, follow or hold, as a pure machine.

Every member publishes its `Place` (`experts.places`), and computes from all places the same `assign`: nobody assigns
work to others, each takes its own part. Places change slowly and are read a little late, so two members may take the
same expert for a moment. One copy too many does no harm, and `Tenure` alone decides who leads.

To compute an expert that it only holds, a member needs nothing but the file. So the same rule, rendezvous hashing,
decides where files are kept for survival and which members succeed a primary.
"""

import hashlib
import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from random import Random
from typing import Final, NamedTuple

from tesseract_async.experts.manifest import join_uid
from tesseract_async.experts.pattern import ExpertPattern
from tesseract_async.experts.places import MemberRole, Place, Survey
from tesseract_async.identity import PeerID

MOVE_EVERY: Final = 600.0
"""Seconds between two moves that balance load in which a server takes part, at either end."""
STAY: Final = 3600.0
"""Seconds for which an expert does not move back to the server that it came from."""
DROP_AFTER: Final = 600.0
"""Seconds for which a copy must be one too many before it is given up."""
YOUNG: Final = 3600.0
"""Seconds after a run began in which an expert that nobody has was probably never begun."""
NUM_LEASES_MISSED: Final = 10
"""Leases for which an expert's state must be missing before the expert may begin anew."""
STUCK_AFTER: Final = 60.0
"""Seconds that a member has to fetch a state before others stop counting on it."""
CHECK_EVERY: Final = 300.0
"""Seconds between two checks in which a member has others show their copies of an expert that it would be among the
next to take."""
MAX_CHECKED: Final = 16
"""The most copies that are to be shown at a time."""
MAX_LOOKED_AT: Final = 256
"""The most experts that are looked at to find one whose copies are to be shown."""
HOT: Final = 0.85
"""Demand as a share of what a server can compute: above this, the server needs relief."""
CALM: Final = 0.5
GAIN: Final = 0.8
"""A move must leave its target with less than this share of the pressure that its source had."""
MAX_STEPS: Final = 8
"""The most experts that a member takes at once."""
MAX_BEGUN: Final = 64
"""The most experts that are left to one member to begin at a time, whatever room it claims."""
MAX_SCANNED: Final = 1 << 16
"""The most uids of a grid that are searched for experts that nobody has."""


class PlacementStep(NamedTuple):
    kind: str
    """``hold`` or ``follow`` an expert that others have, or ``help`` a primary that has too much to do; ``begin`` one
    that nobody has, or ``restart`` one whose state is lost; ``drop`` a copy; ``move`` one that it leads to `peer`."""
    uid: str
    peer: PeerID | None = None


@lru_cache(maxsize=1 << 17)
def score(peer: PeerID, uid: str) -> bytes:
    """Return the place of a member in the order in which it takes this expert: lower comes first."""
    return hashlib.sha256(uid.encode() + b"/" + peer).digest()[:8]


def assign(
    survey: Survey,
    *,
    num_copies: int,
    pattern: ExpertPattern | None,
    may: Callable[[PeerID, str], bool],
    idle: Collection[PeerID] = (),
) -> dict[PeerID, list[PlacementStep]]:
    """Return what each member should take, from what all can see. `may`: whether a member may host an expert; `idle`:
    members that take nothing of what falls to them."""
    steps: defaultdict[PeerID, list[PlacementStep]] = defaultdict(list)
    free = {peer: 0 if peer in idle else place.files - len(place.parts) for peer, place in survey.places.items()}
    room = {peer: place.room - place.num_computed for peer, place in survey.places.items()}
    for uid in sorted(survey.alive):
        for peer in _missing(survey, uid, num_copies, free, may):
            free[peer] -= 1
            computes = room[peer] > 0
            room[peer] -= computes
            steps[peer].append(PlacementStep("follow" if computes else "hold", uid))
    if pattern is not None:
        _begin(survey, pattern, free, may, steps)
    _relieve(survey, free, may, steps)
    return steps


def _missing(
    survey: Survey, uid: str, num_copies: int, free: Mapping[PeerID, int], may: Callable[[PeerID, str], bool]
) -> list[PeerID]:
    """Choose the members that should get a copy: of different address ranges if there are enough, and so that at least
    two of them could lead it."""
    primary, places, copies = survey.primary(uid), survey.places, survey.copies(uid)
    num_able = max(0, min(2, num_copies) - sum(places[peer].can_be_primary for peer in copies))
    num = max(num_copies - len(copies), num_able)
    if num <= 0:
        return []
    taken = set().union(*(places[peer].ranges for peer in (*copies, *([] if primary is None else [primary]))))
    order = sorted(
        (peer for peer in places if free[peer] > 0 and uid not in places[peer].parts and may(peer, uid)),
        key=lambda peer: score(peer, uid),
    )
    chosen: list[PeerID] = []
    for wanted, able_only, apart_only in ((num_able, True, True), (num_able, True, False), (num, False, True)):
        for peer in order:
            place = places[peer]
            if len(chosen) >= wanted:
                break
            if (
                peer not in chosen
                and (place.can_be_primary or not able_only)
                and not (apart_only and taken & place.ranges)
            ):
                chosen.append(peer)
                taken |= place.ranges
    return chosen + [peer for peer in order if peer not in chosen][: num - len(chosen)]


def _begin(
    survey: Survey,
    pattern: ExpertPattern,
    free: dict[PeerID, int],
    may: Callable[[PeerID, str], bool],
    steps: dict[PeerID, list[PlacementStep]],
) -> None:
    wanted: Counter[PeerID] = Counter()
    for uid in sorted(survey.named - survey.alive):  # by several at once: one of them keeps it
        parts = survey.parts[uid]
        wanted.update(list(parts))
        steps[min(parts, key=lambda peer: score(peer, uid))].append(PlacementStep("begin", uid))
    rest = {
        peer: min(place.room - place.num_primaries - wanted[peer], free[peer], MAX_BEGUN)
        for peer, place in survey.places.items()
    }
    # what is only followed gives way where there is no other room
    spare = {peer: place.room - place.num_computed - wanted[peer] for peer, place in survey.places.items()}
    room = {peer: min(left, rest[peer]) for peer, left in spare.items()}
    if max(room.values(), default=0) <= 0:
        room = {peer: min(1, left) for peer, left in rest.items()}
    for uid in itertools.islice(unknown(survey, pattern), MAX_SCANNED):
        able = [peer for peer, left in room.items() if left > 0]
        if not able:
            return
        if some := [peer for peer in able if may(peer, uid)]:
            peer = min(some, key=lambda peer: (-room[peer], score(peer, uid)))
            room[peer] -= 1
            free[peer] -= 1
            steps[peer].append(PlacementStep("begin", uid))


def unknown(survey: Survey, pattern: ExpertPattern) -> Iterator[str]:
    """Iterate over the uids that no member names, in a grid of any size."""
    for rank in range(pattern.num_uids):
        uid = join_uid(pattern.prefix, pattern.coords_at(rank))
        if uid not in survey.named:
            yield uid


def _relieve(
    survey: Survey,
    free: dict[PeerID, int],
    may: Callable[[PeerID, str], bool],
    steps: dict[PeerID, list[PlacementStep]],
) -> None:
    """Relieve servers that are asked for more than they can compute: the hottest first, each server in one move at
    most."""
    places = survey.places
    pressure = {peer: place.pressure for peer, place in places.items()}
    hot = sorted((peer for peer in places if pressure[peer] > HOT), key=lambda peer: (-pressure[peer], peer))
    if not hot:
        return
    at_rest = {peer for peer, place in places.items() if place.moved_ago >= MOVE_EVERY}
    # each row comes forward, to any that computes the expert, and backward, to its primary
    backward = {uid: sum(one.demand for one in parts.values()) / 2 for uid, parts in survey.parts.items()}
    duty = {
        peer: sum(backward[uid] for uid, part in place.parts.items() if part.role is MemberRole.PRIMARY)
        for peer, place in places.items()
    }
    for source in hot:
        parts = places[source].parts
        mine = [uid for uid, part in parts.items() if part.role is MemberRole.PRIMARY and uid in backward]
        for uid in sorted(mine, key=lambda uid: (-parts[uid].demand, uid)):
            computing = [one for one in survey.parts[uid].values() if one.role is not MemberRole.HOLDER]
            more = backward[uid] / (1 + len(computing))
            others = [place for place in places.values() if place.peer != source and place.speed > 0]
            heirs = [
                ((duty[place.peer] + backward[uid]) / place.speed, place.peer)
                for place in others
                if place.peer in at_rest and _is_heir(place, uid) and may(place.peer, uid)
            ]
            if source in at_rest and heirs and min(heirs)[0] < GAIN * duty[source] / places[source].speed:
                _, target = min(heirs)
                steps[source].append(PlacementStep("move", uid, target))
                at_rest -= {source, target}
                duty[target] += backward[uid]
                break
            helpers = [
                (pressure[place.peer] + more / place.speed, place.peer)
                for place in others
                if _can_help(place, uid, free[place.peer]) and may(place.peer, uid)
            ]
            is_new = any(one.role is MemberRole.FOLLOWER and one.rate == 0 for one in computing)  # of use in a moment
            if helpers and not is_new and min(helpers)[0] < HOT:
                pressure[min(helpers)[1]], target = min(helpers)
                steps[target].append(PlacementStep("help", uid))
                break


def _is_heir(place: Place, uid: str) -> bool:
    part = place.parts.get(uid)
    return part is not None and part.has_file and place.can_be_primary


def _can_help(place: Place, uid: str, num_free: int) -> bool:
    part = place.parts.get(uid)
    has_room = num_free > 0 if part is None else part.role is MemberRole.HOLDER
    return has_room and place.num_computed < place.room


class Placement:
    """Decides over time what one member holds. Pass it all places whenever they are read."""

    def __init__(
        self,
        me: PeerID,
        pattern: ExpertPattern | None,
        *,
        num_copies: int,
        lease: float,
        created: float,
        may_restart: bool,
        may: Callable[[PeerID, str], bool] = lambda peer, uid: True,
    ) -> None:
        """`pattern`: the experts that members begin by themselves; None: others begin them. `created`: when the run
        was, in wall-clock seconds. `may`: whether a member may host an expert."""
        self._me, self._pattern, self._num_copies, self._may = me, pattern, num_copies, may
        self._grace = NUM_LEASES_MISSED * lease
        self._settle = min(1.5, lease / 6)
        self._created, self._may_restart = created, may_restart
        self.announced: dict[str, float] = {}
        """Experts that it would begin -> the time since which its place has named them."""
        self.lost: set[str] = set()
        """Experts that had a state, which nobody has any more."""
        self._known: set[str] = set()  # that had a state some time
        self._missed: dict[str, float] = {}  # of these and of those that nobody names: since when
        self._surplus: dict[str, float] = {}
        self._empty: dict[tuple[PeerID, str], float] = {}
        self._came: dict[str, tuple[PeerID, float]] = {}
        self._given: dict[PeerID, tuple[frozenset[str], float]] = {}  # who is to take more: what it had, since when
        self._idle: dict[PeerID, float] = {}  # who took nothing of it: until when
        self._unshown: dict[tuple[PeerID, str], float] = {}  # copies that do not count: until when
        self._check_at: float | None = None
        self._random = Random(bytes(me))

    def came(self, uid: str, source: PeerID, now: float) -> None:
        """Note that this member leads the expert, which `source` moved to it: it does not go back there soon."""
        self._came[uid] = source, now

    def survey(self, places: Mapping[PeerID, Place], now: float) -> Survey:
        """Sort the places by expert, without copies that were promised long ago and never came, and copies that were
        not shown."""
        empty = {
            (peer, uid): self._empty.get((peer, uid), now)
            for peer, place in places.items()
            for uid, part in place.parts.items()
            if not part.has_file
        }
        self._empty = empty
        stuck = {at for at, since in empty.items() if now - since > STUCK_AFTER and at[0] != self._me}
        self._unshown = {at: until for at, until in self._unshown.items() if until > now}
        return Survey(places, stuck=frozenset(stuck | self._unshown.keys()))

    def decide(self, places: Mapping[PeerID, Place], now: float, wall: float) -> list[PlacementStep]:
        """Return what to do now. `places` has this member's own, with the `announced` in it."""
        survey = self.survey(places, now)
        self._idle = {peer: until for peer, until in self._idle.items() if until > now}
        assigned = assign(survey, num_copies=self._num_copies, pattern=self._pattern, may=self._may, idle=self._idle)
        self._note_idle(survey, assigned, now, wall)
        return self.choose(survey, assigned.get(self._me, []), now, wall)

    def choose(self, survey: Survey, assigned: Sequence[PlacementStep], now: float, wall: float) -> list[PlacementStep]:
        """Return which of the steps that fell to it a member takes now, and which copies it gives up."""
        self._note_states(survey, now)
        came = {uid: peer for uid, (peer, at) in self._came.items() if now - at < STAY}
        assigned = [step for step in assigned if step.kind != "move" or came.get(step.uid) != step.peer]
        begins = {step.uid for step in assigned if step.kind == "begin"}
        self.announced = {uid: since for uid, since in self.announced.items() if uid in begins}
        steps = [step for step in assigned if step.kind != "begin"][:MAX_STEPS]
        for uid in sorted(begins)[:MAX_STEPS]:
            if not self._may_begin(survey, uid, now, wall):
                continue
            mine = survey.places[self._me].parts.get(uid)
            is_here = mine is not None and uid not in self.announced
            since = self.announced.setdefault(uid, now)
            if is_here or (mine is not None and now - since >= self._settle):
                steps.append(PlacementStep("restart" if uid in self.lost else "begin", uid))
                del self.announced[uid]
        return steps + self._drops(survey, now)

    def _note_idle(
        self, survey: Survey, assigned: Mapping[PeerID, Sequence[PlacementStep]], now: float, wall: float
    ) -> None:
        """Notice members that claim room and take nothing: what falls to them falls to others for a while."""
        given: dict[PeerID, tuple[frozenset[str], float]] = {}
        for peer, steps in assigned.items():
            kinds = {
                step.kind for step in steps if step.kind != "begin" or self._may_begin(survey, step.uid, now, wall)
            }
            if peer != self._me and kinds & {"begin", "hold", "follow"}:
                has = frozenset(survey.places[peer].parts)
                before = self._given.get(peer)
                given[peer] = before if before is not None and before[0] == has else (has, now)
                if now - given[peer][1] > STUCK_AFTER:
                    self._idle[peer] = now + DROP_AFTER
        self._given = given

    def _note_states(self, survey: Survey, now: float) -> None:
        self._known |= survey.alive
        self.lost = self._known - survey.alive
        self._missed = {uid: since for uid, since in self._missed.items() if uid not in survey.alive}
        for uid in self.lost | (survey.named - survey.alive):
            self._missed.setdefault(uid, now)

    def _may_begin(self, survey: Survey, uid: str, now: float, wall: float) -> bool:
        """Return whether an expert that nobody has was never begun, as far as one can tell, or may begin anew."""
        if uid not in self.lost:
            if 0 <= wall - self._created < YOUNG:
                return True
            others = (place for peer, place in survey.places.items() if peer != self._me)
            if any(place.uptime > self._grace and place.num_primaries for place in others):
                return self._may_restart
        return self._may_restart and now - self._missed.setdefault(uid, now) >= self._grace

    # -- copies that others only say they have -------------------------------------------------------------------------

    def to_check(self, places: Mapping[PeerID, Place], now: float) -> tuple[str, list[PeerID]] | None:
        """Return an expert of which this member would take one of the next copies, now and then, and some that say they
        have one: those that do not show it are `not_shown`."""
        if self._check_at is not None and now < self._check_at:
            return None
        is_first, self._check_at = self._check_at is None, now + CHECK_EVERY
        survey, mine = self.survey(places, now), places[self._me]
        if is_first or len(mine.parts) >= mine.files:
            return None
        uids = sorted(uid for uid in survey.alive if uid not in mine.parts and survey.primary(uid) is not None)
        free = [peer for peer, one in places.items() if len(one.parts) < one.files]
        for uid in self._random.sample(uids, min(MAX_LOOKED_AT, len(uids))):
            able = (peer for peer in free if uid not in places[peer].parts and self._may(peer, uid))
            line = sorted(able, key=lambda peer: score(peer, uid))[: self._num_copies]  # the first may be a liar, too
            copies = [peer for peer, part in survey.copies(uid).items() if part.has_file]
            if copies and self._me in line:
                return uid, self._random.sample(copies, min(MAX_CHECKED, len(copies)))
        return None

    def not_shown(self, uid: str, peers: Iterable[PeerID], now: float) -> None:
        """Note that these peers say they have a copy, and have none: it does not count for a while."""
        self._unshown.update({(peer, uid): now + DROP_AFTER for peer in peers})

    def keeps(self, uid: str, now: float) -> None:
        """Note that others did not show their copies: this one is kept until it has again been one too many for long
        enough."""
        self._surplus[uid] = now

    def keepers(self, survey: Survey, uid: str) -> list[PeerID]:
        """Return those that keep a copy rather than this member, the first before the others."""
        have = {peer: part for peer, part in survey.copies(uid).items() if part.has_file}
        order = sorted(have, key=lambda peer: (-have[peer].role, not survey.places[peer].room, score(peer, uid)))
        return order[: order.index(self._me)] if self._me in have else order

    def _drops(self, survey: Survey, now: float) -> list[PlacementStep]:
        mine = survey.places[self._me]
        copies = [uid for uid, part in mine.parts.items() if part.role is not MemberRole.PRIMARY]
        self._surplus = {uid: self._surplus.get(uid, now) for uid in copies if self._is_surplus(survey, uid)}
        drops = [uid for uid, since in self._surplus.items() if now - since >= DROP_AFTER]
        if (num_over := len(mine.parts) - len(drops) - mine.files) > 0:  # it has room for fewer than it had
            led = [uid for uid in copies if uid not in drops and survey.primary(uid) not in (None, self._me)]
            led.sort(key=lambda uid: (-survey.standing(uid).losses, uid))
            drops += led[: min(num_over, MAX_STEPS)]
        return [PlacementStep("drop", uid) for uid in drops]

    def _is_surplus(self, survey: Survey, uid: str) -> bool:
        primary = survey.primary(uid)
        if primary is None or survey.places[primary].pressure > CALM:
            return False
        others = self.keepers(survey, uid)
        is_of_use = self._me in survey.copies(uid) and survey.places[self._me].parts[uid].has_file
        return len(others) >= self._num_copies and (not is_of_use or self._leaves_apart(survey, others))

    def _leaves_apart(self, survey: Survey, order: Sequence[PeerID]) -> bool:
        """Return whether the others lie in as many address ranges as with this member."""
        kept = order[: self._num_copies]
        ranges = [survey.places[peer].ranges for peer in kept]
        mine = survey.places[self._me].ranges
        return any(one & mine for one in ranges) or len(set().union(*ranges)) >= len(kept) or not mine
