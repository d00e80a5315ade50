"""Keeps a server's experts in step with their other replicas: follows, takes over, passes backwards on, hands over."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from tesseract_async.endpoint.endpoint import IncomingCall, Message
from tesseract_async.errors import (
    CheckpointError,
    ConnectionLost,
    NotAllowed,
    Overloaded,
    PeerUnreachable,
    ProtocolError,
    RemoteError,
    TesseractError,
    describe,
)
from tesseract_async.experts.directory import read_claims
from tesseract_async.experts.grid import ExpertReplica, rank_replicas
from tesseract_async.experts.manifest import split_uid
from tesseract_async.identity import PeerID
from tesseract_async.server.roles import Role, Standing, decide
from tesseract_async.server.state_transfer import StateSource, TransferSettings, fetch_state
from tesseract_async.wire import messages

if TYPE_CHECKING:
    from tesseract_async.node import TesseractNode
    from tesseract_async.runtime.backend import ExpertBackend
    from tesseract_async.server.server import TesseractServer

logger = logging.getLogger(__name__)

PASSED_ON: Final = "passed_on"
"""In the body of a backward that a follower sent on: it is never sent on again, so that no circle can form."""
MAX_SHARDS_READ: Final = 16
"""For more uids than lie in so many shards, the whole grid is read instead."""


@dataclass(frozen=True, slots=True)
class ReplicaSettings:
    """How closely replicas keep together. Times are seconds."""

    sync_every: float = 30.0
    """A follower pulls the primary's state so often."""
    check_every: float = 5.0
    """Roles are looked at so often: a primary that is gone is replaced this long after its manifest is."""
    call_timeout: float = 10.0
    """For a question to another replica, for each piece of a state, and for asking the network who hosts what."""
    hand_over_timeout: float = 30.0
    """For one expert, when this server leaves."""
    num_at_once: int = 4
    """Experts that are looked after at the same time."""
    transfer: TransferSettings = TransferSettings()

    def __post_init__(self) -> None:
        if self.sync_every <= 0 or self.check_every <= 0:
            raise ValueError("sync_every and check_every are more than 0")


async def read_replicas(
    node: TesseractNode, uids: Iterable[str], *, clock: Callable[[], float] = time.time
) -> dict[str, list[ExpertReplica]]:
    """Who else hosts these, by what the network says now: uid -> replicas at other nodes, the primary first."""
    by_key: defaultdict[str, list[str]] = defaultdict(list)
    by_prefix: defaultdict[str, list[str]] = defaultdict(list)
    for uid in uids:
        by_key[node.trust.shard_key(uid)].append(uid)
        by_prefix[split_uid(uid)[0]].append(uid)
    if len(by_key) > MAX_SHARDS_READ:
        by_key = defaultdict(list, {node.trust.grid_key(prefix): some for prefix, some in by_prefix.items()})
    found: dict[str, list[ExpertReplica]] = {}

    async def read(key: str, some: list[str]) -> None:
        entries = [entry for entry in await node.network.get_entries(key) if entry.owner != node.peer_id]
        prefix, _ = split_uid(some[0])  # a key is of one grid
        claims = await read_claims(
            entries, prefix=prefix, now=clock(), dropped=_dropped, trust=node.trust, scope=node.scope
        )
        for uid in some:
            prefix, coords = split_uid(uid)
            found[uid] = rank_replicas(claim.replica(prefix, row) for claim in claims for row in claim.rows_of(coords))

    # at once: where nobody answers, each takes as long as the network waits
    tasks = [asyncio.create_task(read(key, some)) for key, some in by_key.items()]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return found


def _dropped(entry: Any, error: ProtocolError) -> None:
    logger.debug("dropped a manifest of %s: %s", entry.owner.short, error)


async def adopt_states(
    node: TesseractNode, backends: dict[str, ExpertBackend], *, settings: ReplicaSettings = ReplicaSettings()
) -> set[str]:
    """Loads the state of each expert that another server hosts already; returns those, which this one will follow.

    For backends that no server has been given yet. Where nobody gives the state, this server begins by itself: the
    others may be gone (or be this very server, before it was killed), and if they are not, the one with fewer steps
    gives way.
    """
    followed: set[str] = set()
    gate = asyncio.Semaphore(settings.num_at_once)

    async def adopt(uid: str, replicas: list[ExpertReplica]) -> None:
        async with gate:
            for replica in replicas:
                try:
                    state = await fetch_state(
                        node, replica.peer, uid, timeout=settings.call_timeout, settings=settings.transfer
                    )
                    if state is not None:
                        backends[uid].name = uid
                        backends[uid].load_state(state)
                        followed.add(uid)
                        return
                except (TesseractError, TimeoutError, RuntimeError, ValueError, LookupError, TypeError) as error:
                    logger.warning("the state of %s at %s: %s", uid, replica.peer.short, describe(error))

    replicas = await read_replicas(node, backends)
    async with asyncio.TaskGroup() as group:
        for uid, some in replicas.items():
            if some:
                group.create_task(adopt(uid, some))
    return followed


class ReplicaKeeper:
    """Looks after the roles of one server's experts. Use it as an async context manager inside the server's.

    Entering takes one look, so that followers are in step; ``expert.state`` and ``expert.lead`` calls and backwards of
    followed experts are answered from then on.
    """

    def __init__(
        self,
        server: TesseractServer,
        *,
        settings: ReplicaSettings = ReplicaSettings(),
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`clock` gives wall-clock seconds, as manifests carry them."""
        self.settings = settings
        self.leaders: dict[str, ExpertReplica] = {}
        """Of each followed expert, the primary."""
        self._server = server
        self._node = server.node
        self._clock = clock
        self._source = StateSource(server.snapshot, self._aside, settings=settings.transfer)
        self._synced: dict[str, tuple[PeerID | None, float]] = {}  # from whom, and when (loop time)
        # whom an expert was taken over from, and the last manifest in which that one still calls itself primary
        self._predecessors: dict[str, tuple[PeerID, int]] = {}
        self._moving: dict[str, asyncio.Future[None]] = {}  # being handed over
        self._looking = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> ReplicaKeeper:
        self._server.pass_on = self.pass_on
        self._server.handle(messages.STATE, self._source.answer)
        self._server.handle(messages.LEAD, self._take_lead)
        await self._look_and_log()
        self._task = asyncio.create_task(self._keep(), name="server: replicas")
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Stops looking. States are still sent, and backwards passed on, until the server closes."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
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
            replicas = await self._read(self._server.experts)
            gate = asyncio.Semaphore(self.settings.num_at_once)

            async def one(uid: str, others: list[ExpertReplica]) -> None:
                async with gate:
                    try:
                        await self._settle(uid, others)
                    except (TesseractError, TimeoutError) as error:
                        logger.warning("replica of %s: %s", uid, describe(error))

            async with asyncio.TaskGroup() as group:
                for uid, others in replicas.items():
                    if others or not self._server.is_primary(uid):
                        group.create_task(one(uid, others))

    def forget(self, uid: str) -> None:
        """Pulls the expert's state in the next round, whenever it was pulled last."""
        self._synced.pop(uid, None)

    async def pass_on(self, uid: str, call: IncomingCall) -> Message:
        """Sends a backward to the expert's primary, under the same call id. Raises: RemoteErrors only."""
        if uid in self._moving:
            await asyncio.shield(self._moving[uid])
        if self._server.is_primary(uid):  # nobody took it
            peer, body = self._node.peer_address, call.body
        else:
            leader = self.leaders.get(uid)
            if leader is None or call.body.get(PASSED_ON):
                raise Overloaded(f"{uid} is between two primaries; try again", retry_after=self.settings.check_every)
            peer, body = leader.peer, {**call.body, PASSED_ON: True}
        left = call.deadline - asyncio.get_running_loop().time()
        try:
            return await self._node.call_expert(
                peer,
                messages.BACKWARD,
                body,
                call.buffers,
                timeout=max(0.001, left),
                idempotent=True,  # the primary journals the id
                priority=call.priority,
            )
        except (ConnectionLost, PeerUnreachable, ProtocolError) as error:
            self._node.metrics.count("backwards_not_passed_on")
            raise Overloaded(
                f"the primary of {uid} does not answer ({describe(error)}); another takes over soon",
                retry_after=self.settings.check_every,
            ) from error

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
            replicas = await self._read(mine)
            gate = asyncio.Semaphore(self.settings.num_at_once)

            async def move(uid: str) -> bool:
                async with gate:
                    return await self._hand_over_one(uid, replicas[uid])

            num_moved = sum(await asyncio.gather(*(move(uid) for uid in mine if replicas[uid])))
            if num_moved:
                await self._server.announce()
            return num_moved

    async def _read(self, uids: Iterable[str]) -> dict[str, list[ExpertReplica]]:
        async with asyncio.timeout(self.settings.call_timeout):
            return await read_replicas(self._node, uids, clock=self._clock)

    # -- one expert ------------------------------------------------------------------------------------------------

    async def _settle(self, uid: str, others: list[ExpertReplica]) -> None:
        if uid in self._moving:
            return
        primary = self._server.is_primary(uid)
        before, sequence = self._predecessors.get(uid, (None, 0))
        rivals = [other for other in others if other.primary and (_owner(other) != before or other.sequence > sequence)]
        # versions matter only where there is something to decide
        standings = {
            other: Standing(
                _owner(other), other.primary, await self._version(uid, other) if primary or not rivals else None
            )
            for other in (rivals if primary else others)
        }
        me = Standing(self._node.peer_id, primary, self._server.experts[uid].version)
        role, leader = decide(me, list(standings.values()))
        if role is Role.LEAD:
            self.leaders.pop(uid, None)
            if not primary:
                logger.warning("%s has no primary any more: this server takes over at version %s", uid, me.version)
                self._node.metrics.count("experts_taken_over")
                await self._server.set_primary(uid, True)
            return
        followed = next(other for other, standing in standings.items() if standing == leader)
        self.leaders[uid] = followed
        if primary:
            logger.warning("%s has another primary, %s: this server follows it", uid, followed.peer.short)
            self._node.metrics.count("experts_given_up")
            await self._server.set_primary(uid, False)
        await self._sync(uid, followed)

    async def _sync(self, uid: str, leader: ExpertReplica) -> None:
        now = asyncio.get_running_loop().time()
        before, at = self._synced.get(uid, (None, 0.0))
        same = before == leader.peer.peer_id
        if same and now - at < self.settings.sync_every:
            return
        # of a new leader whatever it has, even if that is less than the steps that were taken here
        version = self._server.experts[uid].version + 1 if same else 0
        await self._pull(uid, leader, min_version=version)
        self._synced[uid] = (leader.peer.peer_id, now)

    async def _pull(self, uid: str, leader: ExpertReplica, *, min_version: int) -> None:
        state = await fetch_state(
            self._node,
            leader.peer,
            uid,
            min_version=min_version,
            timeout=self.settings.call_timeout,
            settings=self.settings.transfer,
        )
        if state is not None:
            await self._server.install(uid, state)
            self._node.metrics.count("states_pulled")

    async def _version(self, uid: str, replica: ExpertReplica) -> int | None:
        try:
            reply = await self._node.call_expert(
                replica.peer,
                messages.INFO,
                messages.encode(messages.InfoRequest(uid)),
                timeout=self.settings.call_timeout,
                idempotent=True,
            )
            return messages.decode(messages.ExpertInfo, reply.body).version
        except (TesseractError, TimeoutError) as error:
            logger.info("%s at %s does not tell its version: %s", uid, replica.peer.short, describe(error))
            return None

    async def _hand_over_one(self, uid: str, others: list[ExpertReplica]) -> bool:
        moved: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._moving[uid] = moved
        try:
            # From here on backwards are not applied, so that the state which the follower fetches is the last one. The
            # network hears of it later: followers would take over by themselves, from an older state.
            await self._server.set_primary(uid, False, announce=False)
            await self._server.wait_backwards(uid)
            self._source.drop(uid)
            for other in others:
                try:
                    await self._node.call_expert(
                        other.peer,
                        messages.LEAD,
                        messages.encode(messages.LeadRequest(uid)),
                        timeout=self.settings.hand_over_timeout,
                    )
                except (TesseractError, TimeoutError) as error:
                    logger.warning("%s could not be handed over to %s: %s", uid, other.peer.short, describe(error))
                    continue
                self.leaders[uid] = other
                logger.info("%s was handed over to %s", uid, other.peer.short)
                return True
            await self._server.set_primary(uid, True, announce=False)
            return False
        finally:
            del self._moving[uid]
            moved.set_result(None)

    async def _take_lead(self, uid: str, backend: ExpertBackend, call: IncomingCall) -> Message:
        """Answers ``expert.lead``. Only the primary that this server knows of may ask."""
        messages.decode(messages.LeadRequest, call.body)
        leader = self.leaders.get(uid)
        if leader is None or leader.peer.peer_id != call.peer_id:
            known = (await read_replicas(self._node, [uid], clock=self._clock))[uid]
            leader = next((one for one in known if one.peer.peer_id == call.peer_id), None)
            if self._server.is_primary(uid) or leader is None or any(one.primary for one in known if one != leader):
                raise NotAllowed(f"{call.peer_id.short} is not the primary of {uid} here")
        try:
            await self._pull(uid, leader, min_version=0)
        except (CheckpointError, ConnectionLost, PeerUnreachable, TimeoutError) as error:
            raise RemoteError(f"{uid} was not taken over: {describe(error)}") from error
        self.leaders.pop(uid, None)
        self.forget(uid)
        self._predecessors[uid] = (call.peer_id, leader.sequence)
        await self._server.set_primary(uid, True)
        return Message(messages.encode(messages.LeadReply(backend.version)))

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

    async def _aside(self, work: Callable[[], bytes]) -> bytes:
        return await self._server.call_aside(work)


def _owner(replica: ExpertReplica) -> PeerID:
    assert replica.peer.peer_id is not None, "manifests are read with their owners"
    return replica.peer.peer_id
