"""Keeps a server's experts in step with their other replicas: follows, takes over, hands over."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING, Final

from tesseract_async.endpoint.endpoint import IncomingCall, Message
from tesseract_async.errors import (
    CheckpointError,
    ConnectionLost,
    NotAllowed,
    PeerUnreachable,
    ProtocolError,
    RemoteError,
    TesseractError,
    describe,
)
from tesseract_async.experts.grid import ExpertReplica
from tesseract_async.experts.manifest import split_uid
from tesseract_async.experts.merkle import possession
from tesseract_async.identity import PeerID
from tesseract_async.server.adoption import (
    DEFAULT_SETTINGS,
    NUM_AT_ONCE,
    ReplicaSettings,
    ask_info,
    fetch_bounded,
    may_follow,
    owner_of,
    read_replicas,
)
from tesseract_async.server.checkpoint import check_state, difference
from tesseract_async.server.hosted import Succession
from tesseract_async.server.roles import Past, Role, Standing, decide
from tesseract_async.server.state_transfer import REUSE_SECONDS, StateSource
from tesseract_async.server.tenures import TenureKeeper
from tesseract_async.wire import messages

if TYPE_CHECKING:
    from tesseract_async.node import TesseractNode
    from tesseract_async.runtime.backend import ExpertBackend
    from tesseract_async.server.server import TesseractServer

logger = logging.getLogger(__name__)

HAND_OVER_TIMEOUT: Final = 30.0
"""Seconds for one expert, when this server leaves."""


def boottime() -> float:
    """Seconds of a clock that nobody sets, and that runs through suspend where there is one."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


class _Round:
    """What one look asks of others: of each peer once whether it is there."""

    def __init__(self, node: TesseractNode, timeout: float) -> None:
        self._node, self._timeout = node, timeout
        self._asked: dict[PeerID, asyncio.Task[messages.ExpertInfo | None]] = {}

    async def speaks(self, uid: str, replica: ExpertReplica) -> bool:
        """Whether its server answered a question of this look."""
        owner = owner_of(replica)
        if owner not in self._asked:
            asking = ask_info(self._node, uid, replica, self._timeout)
            self._asked[owner] = asyncio.get_running_loop().create_task(asking)
        return await asyncio.shield(self._asked[owner]) is not None

    async def versions(self, uid: str, replicas: Iterable[ExpertReplica]) -> dict[ExpertReplica, int | None]:
        """Their steps, or None; all are asked at once."""

        async def version(replica: ExpertReplica) -> int | None:
            if not await self.speaks(uid, replica):
                return None
            info = await ask_info(self._node, uid, replica, self._timeout)
            return None if info is None else info.version

        some = list(replicas)
        return dict(zip(some, await asyncio.gather(*map(version, some)), strict=True))

    def close(self) -> None:
        """Asks no more."""
        for task in self._asked.values():
            task.cancel()


class ReplicaKeeper(Succession):
    """Looks after the roles of one server's experts. Use it as an async context manager inside the server's.

    Entering takes one look, so that followers are in step; ``expert.state`` and ``expert.lead`` calls are answered, and
    backwards of followed experts sent to their primary, from then on.
    """

    def __init__(
        self,
        server: TesseractServer,
        *,
        settings: ReplicaSettings = DEFAULT_SETTINGS,
        reuse: float = REUSE_SECONDS,
        clock: Callable[[], float] = time.time,
        elapsed: Callable[[], float] = boottime,
    ) -> None:
        """`reuse`: seconds for which a copy of a state counts as the newest.

        `clock` gives wall-clock seconds, as manifests carry them; `elapsed` those of a clock such as `boottime`.
        """
        self.settings = settings
        self.leaders: dict[str, ExpertReplica] = {}
        """Of each followed expert, the primary."""
        self._server = server
        self._node = server.node
        self._clock = clock
        self._elapsed = elapsed
        self._source = StateSource(
            lambda uid: server.hosted[uid].snapshot(),
            server.call_aside,
            max_bytes=settings.max_copies_bytes,
            reuse=reuse,
        )
        self._synced: dict[str, tuple[PeerID | None, float]] = {}  # from whom, and when
        # who gave an expert here, and the last manifest in which that one still calls itself primary
        self._givers: dict[str, tuple[PeerID, int]] = {}
        self._taken_from: dict[str, PeerID] = {}  # whose silence made this server take over
        self._led_since: dict[str, tuple[float, int | None]] = {}  # when, and the version then (None: any)
        self._waiting: dict[str, float] = {}
        self._heard: dict[PeerID, float] = {}
        self._disputed: set[tuple[str, PeerID]] = set()
        self._began = self._read_at = elapsed()
        self._moving: dict[str, asyncio.Future[None]] = {}  # being handed over
        trust = server.node.trust
        authorities = {uid: trust.authority(split_uid(uid)[0]) for uid in server.experts}
        self._bare = [uid for uid, authority in authorities.items() if authority is None]
        self.tenures = TenureKeeper(
            server,
            {uid: authority for uid, authority in authorities.items() if authority is not None},
            call_timeout=settings.call_timeout,
            clock=clock,
            elapsed=elapsed,
        )
        """Of experts of runs."""
        self._looking = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> ReplicaKeeper:
        self._server.succession = self
        self._server.handle(messages.STATE, self._source.answer)
        self._server.handle(messages.LEAD, self._take_lead)
        self._server.handle(messages.TENURE, self.tenures.answer)
        self._source.find_sealed = self.tenures.sealed
        if self.tenures.uids:
            await self.tenures.start()
        for uid, backend in self._server.experts.items():
            self._led_since[uid] = self._began, backend.version
        await self._look_and_log()
        self._task = asyncio.create_task(self._keep(), name="server: replicas")
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Stops looking. States are still sent, and backwards sent elsewhere, until the server closes."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        await self.tenures.aclose()
        self._source.close()

    async def come_back(self) -> None:
        """Before a pause of the server ends: follows whoever trains its experts now, from their state."""
        await self.look(even_paused=True)

    async def look(self, *, even_paused: bool = False) -> None:
        """One round over all experts: settles their roles, and pulls the states that are due.

        Nothing is done while the server pauses, unless `even_paused`.
        """
        if self._server.is_paused and not even_paused:
            return
        async with self._looking:
            if not await self._node.network.wait_joined(self.settings.check_every):
                return  # alone for the moment: that nobody is seen says nothing
            replicas = await self._read(self._bare)
            now = self._elapsed()
            if now - self._read_at > self.settings.lease + self.settings.check_every:
                # it was suspended, or cut off: another may have taken over meanwhile
                self._led_since = dict.fromkeys(self._server.experts, (now, None))
                self._heard.clear()
            self._read_at = now
            gate = asyncio.Semaphore(NUM_AT_ONCE)
            round_ = _Round(self._node, self.settings.call_timeout / 5)

            async def one(uid: str, others: list[ExpertReplica]) -> None:
                async with gate:
                    followable = [other for other in others if may_follow(self._node, other)]
                    if self._server.is_primary(uid):
                        strange = [other for other in others if other.primary and other not in followable]
                        self._tell_dispute(uid, strange[:4])
                    try:
                        await self._settle(uid, followable, round_)
                    except (TesseractError, TimeoutError) as error:
                        logger.warning("replica of %s: %s", uid, describe(error))

            try:
                async with asyncio.TaskGroup() as group:
                    for uid, others in replicas.items():
                        if others or not self._server.is_primary(uid):
                            group.create_task(one(uid, others))
            finally:
                round_.close()

    def forget(self, uid: str) -> None:
        """Pulls the expert's state in the next round, whenever it was pulled last."""
        self._synced.pop(uid, None)

    def may_step(self, uid: str) -> bool:
        """Return whether a primary may take a step at this moment: always where names are bare."""
        return self.tenures.may_step(uid)

    def epochs(self) -> dict[str, int]:
        """Return the epochs of experts of runs."""
        return self.tenures.epochs()

    async def find_primary(self, uid: str) -> tuple[PeerID | None, float]:
        """Who trains the expert, once a handover that is under way has ended; or None, and when to ask again."""
        if uid in self._moving:
            await asyncio.shield(self._moving[uid])
        if uid in self.tenures.uids:
            return self.tenures.primary(uid), 1.0
        leader = self.leaders.get(uid)
        return None if leader is None else leader.peer.peer_id, self.settings.check_every

    async def hand_over(self) -> int:
        """Before this server leaves: has a follower take over each expert that has one. Returns how many moved.

        From the moment that an expert is handed over, its backwards wait, and then go to the new primary: none is lost
        and none is applied twice. What cannot be handed over stays. An expert that was on its way when this is
        cancelled takes no more backwards here: nobody knows whether the follower has taken over.

        Raises: TimeoutError if the network does not tell who follows.
        """
        if not await self._node.network.wait_joined(0.0):
            return 0  # there is nobody
        async with self._looking:
            mine = [uid for uid in self._server.experts if self._server.is_primary(uid)]
            replicas = await self._read(uid for uid in mine if uid in self._bare)
            if of_runs := [uid for uid in mine if uid in self.tenures.uids]:
                await self.tenures.look(of_runs)
            gate = asyncio.Semaphore(NUM_AT_ONCE)

            async def move(uid: str) -> bool:
                async with gate:
                    if uid in self.tenures.uids:
                        return await self._moved(uid, self.tenures.hand_over(uid))
                    heirs = [one for one in replicas[uid] if not one.primary and may_follow(self._node, one)]
                    return bool(heirs) and await self._moved(uid, self._hand_over_one(uid, heirs))

            num_moved = sum(await asyncio.gather(*map(move, mine)))
            if num_moved:
                await self._server.announce()
            return num_moved

    async def _read(self, uids: Iterable[str]) -> dict[str, list[ExpertReplica]]:
        async with asyncio.timeout(self.settings.call_timeout):
            return await read_replicas(self._node, uids, clock=self._clock)

    # -- one expert ------------------------------------------------------------------------------------------------

    async def _settle(self, uid: str, others: list[ExpertReplica], round_: _Round) -> None:
        if uid in self._moving:
            return
        primary, version = self._server.is_primary(uid), self._server.experts[uid].version
        listed, now = self._node.policy.storers is not None, self._elapsed()
        giver, sequence = self._givers.get(uid, (None, 0))
        rivals = [
            other for other in others if other.primary and (owner_of(other) != giver or other.sequence > sequence)
        ]
        if not primary:
            rivals = await self._living(uid, rivals, round_)
        followers = [other for other in others if not other.primary]
        asked = rivals if primary or (listed and len(rivals) > 1) else [] if rivals else followers
        versions = await round_.versions(uid, asked)
        standings = {
            other: Standing(owner_of(other), other.primary, versions.get(other)) for other in (asked or rivals)
        }
        leader = self.leaders.get(uid)
        past = Past(
            leader=None if leader is None else leader.peer.peer_id,
            taken_from=self._taken_from.get(uid),
            is_new=self._is_new(uid, version, now),
            has_waited=now - self._waiting.get(uid, now) >= self.settings.check_every,
        )
        me = Standing(self._node.peer_id, primary, version)
        role, chosen = decide(me, list(standings.values()), past, listed=listed)
        if role is Role.WAIT:
            self._waiting.setdefault(uid, now)
            return
        self._waiting.pop(uid, None)
        if role is Role.LEAD:
            if primary:
                self._tell_dispute(
                    uid, [other for other, standing in standings.items() if standing.version is not None]
                )
                return
            logger.warning("%s has no primary any more: this server takes over at version %s", uid, version)
            self._node.metrics.count("experts_taken_over")
            if leader is not None:
                self._taken_from[uid] = owner_of(leader)
            self.leaders.pop(uid, None)
            self._led_since[uid] = now, version
            await self._server.set_primary(uid, True)
            return
        followed = next(other for other, standing in standings.items() if standing == chosen)
        self.leaders[uid] = followed
        if primary:
            logger.warning("%s has another primary, %s: this server follows it", uid, followed.peer.short)
            self._node.metrics.count("experts_given_up")
            await self._server.set_primary(uid, False)
        await self._sync(uid, followed)

    async def _living(self, uid: str, primaries: list[ExpertReplica], round_: _Round) -> list[ExpertReplica]:
        """Those who answer, and for a lease the one that was followed and does not: it may be busy.

        So a claim that nobody stands behind delays no takeover. Just after a start nobody is known yet: then for all.
        """
        speak = await asyncio.gather(*(round_.speaks(uid, one) for one in primaries))
        now, leader, living = self._elapsed(), self.leaders.get(uid), []
        for one, speaks in zip(primaries, speak, strict=True):
            owner = owner_of(one)
            if speaks:
                self._heard[owner] = now
            known = leader is not None and owner == leader.peer.peer_id
            since = self._heard.setdefault(owner, now) if known else self._began if leader is None else now - 1e9
            if speaks or now - since < self.settings.lease:
                living.append(one)
        return living

    def _is_new(self, uid: str, version: int, now: float) -> bool:
        since, before = self._led_since.get(uid, (self._began, None))
        return now - since < self.settings.lease and before in (None, version)

    def _tell_dispute(self, uid: str, rivals: list[ExpertReplica]) -> None:
        for rival in rivals:
            if (uid, owner_of(rival)) not in self._disputed and len(self._disputed) < 1024:
                self._disputed.add((uid, owner_of(rival)))
                self._node.metrics.count("primaries_disputed")
                logger.warning(
                    "%s calls itself the primary of %s, too; this server goes on, and they train apart. If both are "
                    "yours, stop one of them, or list them all with --allow-file",
                    rival.peer.short,
                    uid,
                )

    async def _sync(self, uid: str, leader: ExpertReplica) -> None:
        now = self._elapsed()
        before, at = self._synced.get(uid, (None, 0.0))
        same = before == leader.peer.peer_id
        if same and now - at < self.settings.sync_every:
            return
        # of a new leader whatever it has, even if that is less than the steps that were taken here
        version = self._server.experts[uid].version + 1 if same else 0
        await self._pull(uid, leader, min_version=version)
        self._synced[uid] = (leader.peer.peer_id, now)

    async def _pull(self, uid: str, leader: ExpertReplica, *, min_version: int) -> bytes | None:
        backend = self._server.experts[uid]
        hosted = self._server.hosted[uid]
        file = await fetch_bounded(self._node, uid, leader, backend, self.settings, min_version=min_version)
        if file is None:
            return None
        state = await self._server.call_aside(lambda: check_state(uid, file))
        if (wrong := difference(uid, backend, state)) is not None:
            raise CheckpointError(f"{wrong}, so it is not taken from {leader.peer.short}")
        await hosted.take(state)
        self._node.metrics.count("states_pulled")
        return file

    async def _moved(self, uid: str, moving: Awaitable[bool]) -> bool:
        """Has backwards wait meanwhile."""
        moved: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._moving[uid] = moved
        try:
            return await moving
        finally:
            del self._moving[uid]
            moved.set_result(None)

    async def _hand_over_one(self, uid: str, heirs: list[ExpertReplica]) -> bool:
        # From here on backwards are not applied, so that the state which the follower fetches is the last one. The
        # network hears of it later: followers would take over by themselves, from an older state.
        await self._server.set_primary(uid, False, announce=False)
        await self._server.wait_backwards(uid)
        self._source.drop(uid)
        for heir in heirs:
            try:
                await self._give(uid, heir)
            except (TesseractError, TimeoutError) as error:
                logger.warning("%s could not be handed over to %s: %s", uid, heir.peer.short, describe(error))
                continue
            self.leaders[uid] = heir
            logger.info("%s was handed over to %s", uid, heir.peer.short)
            return True
        await self._server.set_primary(uid, True, announce=False)
        return False

    async def _give(self, uid: str, heir: ExpertReplica) -> None:
        """Raises: what the call raises; ProtocolError if the heir does not prove that it has the last state."""
        nonce = os.urandom(16)
        reply = await self._node.call_expert(
            heir.peer,
            messages.LEAD,
            messages.encode(messages.LeadRequest(uid, nonce)),
            timeout=HAND_OVER_TIMEOUT,
        )
        proof = messages.decode(messages.LeadReply, reply.body).proof
        file = self._source.copy_of(uid)
        if file is None or proof != possession(file, nonce)[:16]:
            raise ProtocolError("it says that it leads, but has not fetched the state")

    async def _take_lead(self, uid: str, backend: ExpertBackend, call: IncomingCall) -> Message:
        """Answers ``expert.lead``. Only the primary that this server follows may ask."""
        request = messages.decode(messages.LeadRequest, call.body)
        leader = self.leaders.get(uid)
        if self._server.is_primary(uid) or leader is None or leader.peer.peer_id != call.peer_id:
            raise NotAllowed(f"{call.peer_id.short} is not the primary of {uid} here")
        try:
            file = await self._pull(uid, leader, min_version=0)
        except (CheckpointError, ConnectionLost, PeerUnreachable, TimeoutError) as error:
            raise RemoteError(f"{uid} was not taken over: {describe(error)}") from error
        self.leaders.pop(uid, None)
        self.forget(uid)
        self._givers[uid] = (call.peer_id, leader.sequence)
        self._led_since[uid] = self._elapsed(), backend.version
        await self._server.set_primary(uid, True)
        proof = None if file is None or request.nonce is None else possession(file, request.nonce)[:16]
        return Message(messages.encode(messages.LeadReply(backend.version, proof)))

    # -- in the background -----------------------------------------------------------------------------------------

    async def _keep(self) -> None:
        while True:
            await asyncio.sleep(self.settings.check_every)
            await self._look_and_log()

    async def _look_and_log(self) -> None:
        try:
            await self.look()
        except (TesseractError, TimeoutError, OSError) as error:
            logger.warning("could not look after the replicas: %s", describe(error))
