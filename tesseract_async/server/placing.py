"""Placing: decides which experts of a run a server leads, follows and holds, and carries that out. Drives
`Placement`."""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from random import Random
from typing import Final

from tesseract_async.errors import TesseractError, describe
from tesseract_async.experts.authority import Authority
from tesseract_async.experts.membership import Permissions
from tesseract_async.experts.pattern import ExpertPattern
from tesseract_async.experts.place_directory import Places, fetch_places
from tesseract_async.experts.placement import DROP_AFTER, MAX_CHECKED, STUCK_AFTER, Placement, PlacementStep
from tesseract_async.experts.places import (
    NEVER,
    MemberPart,
    MemberRole,
    Place,
    Survey,
    encode_place,
    places_key,
    ranges_of,
)
from tesseract_async.experts.tenure_words import State
from tesseract_async.experts.terms import Seal, TermKind
from tesseract_async.experts.trust import SHARED
from tesseract_async.identity import PeerID
from tesseract_async.runtime.backend import ExpertBackend
from tesseract_async.server.capacity import Capacity
from tesseract_async.server.fetching import ask_seal, find_shown
from tesseract_async.server.other_replicas import wall_clock
from tesseract_async.server.server import TesseractServer
from tesseract_async.server.succession import ReplicaKeeper
from tesseract_async.sharing.layout import MAX_FRAGMENTS
from tesseract_async.tasks import TaskSet, in_time
from tesseract_async.transport.base import PeerAddress

logger = logging.getLogger(__name__)

MAX_PERIOD: Final = 5.0
"""Seconds between two looks at the others' places, at most."""
HURRIED_PERIOD: Final = 0.8
"""Seconds between two looks while there is something to take, or the member is new."""
NEW_SECONDS: Final = 30.0
"""Seconds after entering the run for which a member is new."""
MISSED_SECONDS: Final = 60.0
"""Seconds for which a member whose place cannot be read does not become a successor."""
SHOW_SECONDS: Final = 10.0
"""Seconds that a member has to show a piece of a copy."""
RATE_SECONDS: Final = 30.0
"""Rates are averages over about this many seconds."""


class Placing:
    """Takes, follows, holds and gives up experts of one run as `Placement` says. Use it as an async context manager
    inside that of the server's `ReplicaKeeper`.
    """

    def __init__(
        self,
        server: TesseractServer,
        keeper: ReplicaKeeper,
        authority: Authority,
        capacity: Capacity,
        *,
        build: Callable[[str], ExpertBackend],
        template: ExpertBackend | None,
        chooses: bool = True,
        pattern: ExpertPattern | None = None,
    ) -> None:
        """`build` makes an expert with its first weights; `template` is one, of which shapes and sizes count.
        `pattern`: the experts in which it takes part, by default all of the run's; others are begun by other servers.

        `chooses`: the server computes what the run lacks. Otherwise it computes what it was told to, and only holds
        others.
        """
        self._server, self._node, self._keeper = server, server.node, keeper
        self._tenures = keeper.tenures
        self._authority, self.capacity, self._build, self._chooses = authority, capacity, build, chooses
        manifest = authority.run.manifest
        self._pattern = manifest.pattern if pattern is None else pattern
        self._prefix, self._begins = self._pattern.prefix, pattern is None
        if self._begins:
            self._tenures.states.template = template
        self._period = min(MAX_PERIOD, max(0.5, authority.lease / 3))
        self._ttl = max(4.0, 6 * self._period)
        self.placement = Placement(
            self._node.peer_id,
            self._pattern if self._begins else None,
            num_copies=manifest.num_replicas,
            lease=authority.lease,
            created=manifest.created / 1000,
            may_restart=manifest.may_restart,
            may=lambda peer, uid: authority.may(peer, "host", uid, now=None),
        )
        self.places: Places = {}
        """The latest place that each member published, this one included."""
        self._addresses: dict[PeerID, PeerAddress] = {}
        self._seen_at: dict[PeerID, float] = {}  # when the place of each member was read last
        self._random = Random()
        self._now = asyncio.get_running_loop().time
        self._began, self._moved_at = self._now(), -NEVER
        self._wanted: set[str] = set()  # to be computed, once their file is here
        self._unable: dict[str, float] = {}  # computing them here failed; left to others until then
        self._primaries: dict[str, PeerID | None] = {}  # uid -> its primary at the last look
        self._rates: dict[str, tuple[float, int]] = {}  # rows each second, and rows ever
        self._rated_at = self._now()
        self._published: list[bytes] = []
        self._published_at = -NEVER
        self._said: object = None
        self._tasks = TaskSet("server: placing", on_error=_tell)
        self._building = asyncio.Lock()
        self._looked = asyncio.Event()
        self._is_settled = self._is_short = False

    @classmethod
    def of_fragments(
        cls, server: TesseractServer, keeper: ReplicaKeeper, authority: Authority, room: int, files: int
    ) -> "Placing":
        """The same for the fragments of the parameters that the run's trainers share: they begin them, and servers
        lead, follow and hold what is there. `room`, `files`: how many it computes, and has a state of, at most."""
        pattern = ExpertPattern(authority.prefix + SHARED, (range(MAX_FRAGMENTS),))
        build = keeper.tenures.states.fragment
        return cls(server, keeper, authority, Capacity(room, files), build=build, template=None, pattern=pattern)

    async def __aenter__(self) -> "Placing":
        self._tenures.on_primary[self._prefix] = lambda uid: self._tasks.spawn(self._compute(uid))
        for uid in self._tenures.stored(self._pattern):
            await self._hold(uid)  # what was held before, also where others hold it now
        self._tasks.spawn(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._tasks.aclose()
        if self._node.is_running:
            with contextlib.suppress(TesseractError, TimeoutError, OSError):
                async with asyncio.timeout(2.0):
                    await self._publish([])

    async def _run(self) -> None:
        while True:
            try:
                await self.look()
            except (TesseractError, TimeoutError, OSError) as error:
                logger.info("the members of %s could not be read: %s", self._authority.run.full_name, describe(error))
            except (ValueError, LookupError) as error:  # no address at the moment, or an expert just given up
                logger.warning("this member's place in %s: %s", self._authority.run.full_name, describe(error))
            self._looked.set()
            # what it announced and nobody contests is begun soon, and a newcomer is waited for
            is_new = not self._is_settled and self._now() - self._began < NEW_SECONDS
            hurries = is_new or self.placement.announced or self._wanted
            await asyncio.sleep(min(self._period, HURRIED_PERIOD) if hurries else self._period)

    async def wait_settled(self, timeout: float) -> bool:
        """Return once there is nothing left to take at the moment; False if that is not so within `timeout` seconds."""

        async def wait() -> None:
            while not self._is_settled:
                self._looked.clear()
                await self._looked.wait()

        return await in_time(wait(), timeout)

    async def look(self) -> None:
        """Read the others' places, do what falls to this member, and publish its own.

        Raises: TimeoutError and what the network raises.
        """
        if self._node.initial_peers and not await self._node.network.wait_joined(self._period):
            return  # alone for the moment: that nobody is seen says nothing
        network, trust, scope = self._node.network, self._node.trust, self._node.scope
        places, addresses = await fetch_places(network, trust, self._authority, scope, pattern=self._pattern)
        self._tenures.knows(addresses)
        self._addresses = addresses
        self._note_loads()
        self._note_moves()
        me = self.place()
        self.places = {**{peer: self._checked(place) for peer, place in places.items()}, self._node.peer_id: me}
        by_uid: dict[str, dict[PeerID, int]] = {}
        for peer, place in places.items():
            for uid, part in place.parts.items():
                if part.has_file or part.role is MemberRole.PRIMARY:
                    by_uid.setdefault(uid, {})[peer] = part.epoch
        self._tenures.places[self._prefix] = by_uid
        self._tenures.look_for_newer(places)
        self._unable = {uid: until for uid, until in self._unable.items() if until > self._now()}
        survey, now = Survey(places), self._now()
        self._seen_at = {peer: at for peer, at in self._seen_at.items() if now - at < MISSED_SECONDS}
        missed = self._seen_at.keys() - places.keys()
        self._seen_at |= dict.fromkeys(places, now)
        for uid in self._uids():
            may, held = self._tenures.tenure(uid).may, self._tenures.tenure(uid).held
            if held is not None:
                may.begin = may.anew = False
            may.primary = uid in self._server.experts or (me.can_be_primary and uid not in self._unable)
            # one that this look missed still answers: it is what it was
            may.passive = survey.unfit(uid) | (may.passive & missed)
        steps = self.placement.decide(self.places, self._now(), wall_clock())
        for step in steps:
            await self._take(step)
        idle = not await self._compute_wanted()
        self._is_settled = idle and not steps and not self.placement.announced and not self._wanted
        self._tell_of_shortage()
        if (found := self.placement.to_check(self.places, self._now())) is not None:
            self._tasks.spawn(self._check(*found))
        me = self.place()
        self.places[self._node.peer_id] = me
        self._tell(me)
        await self._publish_if_due(me)

    # -- what is here ----------------------------------------------------------------------------------------------

    def place(self) -> Place:
        now, capacity = self._now(), self.capacity
        parts = {uid: MemberPart(MemberRole.HOLDER) for uid in self.placement.announced}
        for uid in self._uids():
            tenure, hosted = self._tenures.tenure(uid), self._server.hosted.get(uid)
            held = tenure.held
            age = (tenure.epoch, 0) if held is None else held.age
            role = MemberRole.HOLDER if hosted is None else MemberRole.FOLLOWER
            if tenure.state in (State.PRIMARY, State.FENCED, State.YIELDING):
                role = MemberRole.PRIMARY
                age = (tenure.epoch, age[1] if age[0] == tenure.epoch else 0)
            waiting = 0 if hosted is None else hosted.runtime.rows_of(hosted.backend)[1]
            rate = self._rates.get(uid, (0.0, 0))[0]
            parts[uid] = MemberPart(role, *age, 0 if held is None else held.version, rate, waiting)
        if self._server.is_paused:  # it keeps what it has, and computes nothing
            capacity = replace(capacity, room=0, files=len(parts))
        return Place(
            self._node.peer_id,
            capacity.room,
            capacity.files,
            capacity.speed,
            ranges_of(self._node.peer_address.addresses),
            min(NEVER, now - self._moved_at),
            now - self._began,
            parts,
        )

    def _checked(self, place: Place) -> Place:
        """Return a member's place without what the lineage of an expert that is here speaks against: otherwise one that
        says it leads it, or is newer than all others, makes copies look old that are not."""
        mine = {uid: self._tenures.tenure(uid) for uid in self._tenures.uids() if uid in place.parts}

        def is_possible(uid: str, part: MemberPart) -> bool:
            if (tenure := mine.get(uid)) is None:
                return True
            return part.epoch <= tenure.epoch and (part.role is not MemberRole.PRIMARY or place.peer == tenure.primary)

        return replace(place, parts={uid: part for uid, part in place.parts.items() if is_possible(uid, part)})

    def _note_loads(self) -> None:
        now = self._now()
        seconds, self._rated_at = max(0.01, now - self._rated_at), now
        share = min(1.0, seconds / RATE_SECONDS)
        found: dict[str, tuple[float, int]] = {}
        for uid in self._computed():
            hosted = self._server.hosted[uid]
            num_rows = hosted.runtime.rows_of(hosted.backend)[0]
            rate, before = self._rates.get(uid, (0.0, num_rows))
            found[uid] = rate + share * (max(0, num_rows - before) / seconds - rate), num_rows
        self._rates = found

    def _note_moves(self) -> None:
        """Notice experts that another primary handed over since the last look."""
        now, me = self._now(), self._node.peer_id
        primaries: dict[str, PeerID | None] = {}
        for uid in self._uids():
            tenure = self._tenures.tenure(uid)
            primaries[uid] = tenure.primary
            before, term = self._primaries.get(uid), tenure.term
            if (
                tenure.primary == me
                and before not in (None, me)
                and term is not None
                and term.kind is TermKind.HANDOVER
            ):
                assert before is not None
                self._moved_at = now
                self.placement.came(uid, before, now)
        self._primaries = primaries

    def _uids(self) -> list[str]:
        return [uid for uid in self._tenures.uids() if uid in self._pattern]

    def _computed(self) -> list[str]:
        return [uid for uid in self._server.experts if uid in self._pattern]

    def _tell(self, me: Place) -> None:
        if not self._begins:
            return
        metrics = self._node.metrics
        metrics.set("run_experts_primary", me.num_primaries)
        metrics.set("run_experts_held", sum(part.has_file for part in me.parts.values()))
        metrics.set("run_experts_lost", len(self.placement.lost))

    def _tell_of_shortage(self) -> None:
        """Say once when the members are too few for all copies, or have too little room, and when that is over."""
        num_copies, name = self._authority.run.manifest.num_replicas, self._authority.run.full_name
        if not (self._is_settled and self._begins):
            return
        why = Survey(self.places).shortage(num_copies)
        if why and not self._is_short:
            logger.warning("%s: %s", name, why)
        elif self._is_short and not why:
            logger.info("%s: its members keep %d copies besides each primary again", name, num_copies)
        self._is_short = bool(why)

    # -- steps -----------------------------------------------------------------------------------------------------

    async def _take(self, step: PlacementStep) -> None:
        uid, peer = step.uid, step.peer
        try:
            if step.kind == "move" and peer is not None:
                self._moved_at = self._now()
                logger.info("%s moves to %s, which has more room for its rows", uid, peer.short)
                self._tasks.spawn(self._move(uid, peer))
            elif step.kind == "drop":
                me = self.places[self._node.peer_id]
                if len(me.parts) > me.files:  # it has no room for it any more
                    await self._drop(uid)
                else:
                    self.placement.keeps(uid, self._now())  # until the others have shown theirs, or for as long again
                    self._tasks.spawn(self._drop_if_shown(uid))
            elif self._chooses or step.kind in ("hold", "follow", "help"):
                if step.kind == "restart":
                    logger.error("%s is lost: nobody has a state of it any more; it begins anew, from genesis", uid)
                    self._node.metrics.count("experts_restarted")
                if step.kind in ("follow", "help") and self._chooses:
                    self._wanted.add(uid)
                await self._hold(uid, begin=step.kind in ("begin", "restart"), anew=step.kind == "restart")
        except (TesseractError, OSError) as error:  # a full disk, too
            logger.error("%s of %s: %s", step.kind, uid, describe(error))

    async def _drop(self, uid: str) -> None:
        logger.info("%s has enough copies without this one", uid)
        self._wanted.discard(uid)
        await self._tenures.drop(uid)

    async def _drop_if_shown(self, uid: str) -> None:
        """Give a copy up, if enough of those that keep theirs show a piece of it: until then they only say that they
        have it."""
        lineage, num_copies = self._tenures.tenure(uid).lineage, self._authority.run.manifest.num_replicas
        newest = None if lineage.best is None else lineage.seal_of(lineage.best)
        keepers = self.placement.keepers(self.placement.survey(self.places, self._now()), uid)
        if newest is None or len(await self._shown(newest, keepers[:MAX_CHECKED])) < num_copies:
            return
        if uid in self._uids():  # nor was it given up meanwhile
            await self._drop(uid)

    async def _check(self, uid: str, peers: list[PeerID]) -> None:
        """Have these show the copies of which this member would take another. Twice: a new state may be on its way."""
        left = set(peers)
        for seconds in (0.0, STUCK_AFTER):
            await asyncio.sleep(seconds)
            primary = self.placement.survey(self.places, self._now()).primary(uid)
            if primary is None or (address := self._addresses.get(primary)) is None:
                return
            try:
                seal = await ask_seal(self._node, self._authority.run_id, uid, address, timeout=SHOW_SECONDS)
            except (TesseractError, TimeoutError, OSError) as error:
                logger.info("%s does not show the Seal of %s: %s", primary.short, uid, describe(error))
                return
            left -= await self._shown(seal, left)
        self.placement.not_shown(uid, left, self._now())

    async def _shown(self, seal: Seal, peers: Iterable[PeerID]) -> set[PeerID]:
        known = {peer: self._addresses[peer] for peer in peers if peer in self._addresses}
        return await find_shown(
            self._node, self._authority.run_id, seal, known, timeout=SHOW_SECONDS, random=self._random
        )

    async def _hold(self, uid: str, *, begin: bool = False, anew: bool = False) -> None:
        lead = self.capacity.room > 0 and uid not in self._unable
        await self._tenures.add(uid, self._authority, Permissions(primary=lead, begin=begin, anew=anew))
        may = self._tenures.tenure(uid).may
        may.begin |= begin
        may.anew |= anew

    async def _move(self, uid: str, peer: PeerID) -> None:
        if not await self._keeper.hand_over_one(uid, to=peer):
            logger.warning("%s stays here: %s did not take it", uid, peer.short)

    async def _compute_wanted(self) -> bool:
        """Compute what is only held, where that was wanted, and what this server became the primary of meanwhile."""
        is_busy = False
        for uid in self._uids():
            tenure = self._tenures.tenure(uid)
            leads = tenure.state is State.PRIMARY
            is_busy |= uid not in self._server.experts and (leads or tenure.may.begin)
            if uid in self._server.experts or not (leads or (uid in self._wanted and tenure.held is not None)):
                continue
            if leads or len(self._computed()) < self.capacity.room:
                self._tasks.spawn(self._compute(uid))
        return is_busy

    async def _compute(self, uid: str) -> None:
        async with self._building:
            if uid in self._server.experts:
                return
            self._wanted.discard(uid)
            try:
                await self._make_room()
                backend = await self._server.call_aside(partial(self._build, uid))
                await self._tenures.compute(uid, backend)
            except (TesseractError, OSError, ValueError, LookupError, RuntimeError, TypeError, MemoryError) as error:
                logger.error("%s cannot be computed here, and is left to others: %s", uid, describe(error))
                self._unable[uid] = self._now() + DROP_AFTER
                if uid in self._uids() and self._tenures.tenure(uid).state is State.PRIMARY:
                    await self._tenures.drop(uid, even_primary=True)

    async def _make_room(self) -> None:
        """Move one expert that is only followed to disk, if all places are taken."""
        followed = [uid for uid in self._computed() if not self._server.is_primary(uid)]
        if len(self._computed()) >= max(1, self.capacity.room) and followed:
            await self._tenures.rest(min(followed, key=lambda uid: self._rates.get(uid, (0.0, 0))[0]))

    # -- in the network --------------------------------------------------------------------------------------------

    async def _publish_if_due(self, me: Place) -> None:
        trust, prefix, address = self._node.trust, self._prefix, self._node.peer_address
        parts = encode_place(
            me,
            prefix=prefix,
            tag=self._authority.tag,
            grant=trust.own_grant(prefix),
            addresses=address.addresses,
            rendezvous=address.rendezvous,
        )
        is_news = _news(me) != self._said
        if is_news or self._now() - self._published_at >= self._ttl / 3:
            await self._publish(parts)
            self._said = _news(me)

    async def _publish(self, parts: list[bytes]) -> None:
        key, network = places_key(self._prefix, self._authority.tag), self._node.network
        gone = range(len(parts), len(self._published))
        self._published, self._published_at = parts, self._now()
        for number, part in enumerate(parts):
            await network.store(key, part, ttl=self._ttl, subkey=str(number))
        for number in gone:
            await network.withdraw(key, subkey=str(number))


def _tell(error: BaseException) -> None:
    logger.error("an expert's place: %s", describe(error), exc_info=error)


def _news(place: Place) -> object:
    """Return the parts of the news that others must hear at once: not loads, nor times."""
    parts = {uid: (part.role, part.epoch, min(part.number, 1)) for uid, part in place.parts.items()}
    return place.room, place.files, parts, place.moved_ago < MAX_PERIOD
