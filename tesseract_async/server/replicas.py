"""Keeps a server's experts in step with their other replicas: follows, takes over, hands over."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

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
from tesseract_async.experts.directory import read_claims
from tesseract_async.experts.grid import ExpertReplica, rank_replicas
from tesseract_async.experts.manifest import split_uid
from tesseract_async.experts.merkle import possession
from tesseract_async.identity import PeerID
from tesseract_async.server.roles import Past, Role, Standing, decide
from tesseract_async.server.state_transfer import (
    StateSource,
    TransferSettings,
    check_state,
    difference,
    fetch_file,
    largest_state,
)
from tesseract_async.server.tenures import TenureKeeper
from tesseract_async.transport.address_scope import PUBLIC, kind_of
from tesseract_async.transport.base import split_host_port
from tesseract_async.wire import messages
from tesseract_async.wire import tensors as wire

if TYPE_CHECKING:
    from tesseract_async.node import TesseractNode
    from tesseract_async.runtime.backend import ExpertBackend
    from tesseract_async.server.server import TesseractServer

logger = logging.getLogger(__name__)

MAX_SOURCES: Final = 4
"""Of whom a newcomer asks for an expert's state, one after the other."""
MAX_SHARDS_READ: Final = 16
"""For more uids than lie in so many shards, the whole grid is read instead."""


@dataclass(frozen=True, slots=True)
class ReplicaSettings:
    """How closely replicas keep together. Times are seconds."""

    sync_every: float = 30.0
    """A follower pulls the primary's state so often."""
    check_every: float = 5.0
    """Roles are looked at so often."""
    lease: float = 30.0
    """A primary that answers nobody for so long is replaced; one that stood still for so long asks who leads now."""
    probe_timeout: float = 2.0
    """For a question whether another replica is there."""
    call_timeout: float = 10.0
    """For a question to another replica, for each piece of a state, and for asking the network who hosts what."""
    hand_over_timeout: float = 30.0
    """For one expert, when this server leaves."""
    num_at_once: int = 4
    """Experts that are looked after at the same time."""
    transfer: TransferSettings = TransferSettings()

    def __post_init__(self) -> None:
        if min(self.sync_every, self.check_every, self.lease) <= 0:
            raise ValueError("sync_every, check_every and lease are more than 0")


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


class ReplicaMismatch(ValueError):
    """An expert that this server would host is trained elsewhere as something else; the sentence names both."""


def boottime() -> float:
    """Seconds of a clock that nobody sets, and that runs through suspend where there is one."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


def may_follow(node: TesseractNode, replica: ExpertReplica) -> bool:
    """Whether this node takes states from that replica, and gives way to it, where names are bare.

    Those on its allow-list, if it has one; else machines on its own network only: on public addresses anybody may claim
    a bare name.
    """
    if node.policy.storers is not None:
        return True  # others' manifests are not even read
    hosts = [split_host_port(address)[0] for address in replica.peer.addresses]
    return bool(hosts) and all(kind_of(host) not in (PUBLIC, None) for host in hosts)


async def adopt_states(
    node: TesseractNode, backends: dict[str, ExpertBackend], *, settings: ReplicaSettings = ReplicaSettings()
) -> set[str]:
    """Loads the state of each expert that another server trains already; returns those, which this one will follow.

    For backends that no server has been given yet. Where nobody gives the state, this server begins by itself: the
    others may be gone (or be this very server, before it was killed).

    Raises: ReplicaMismatch if the expert is something else there.
    """
    # experts of a run are followed by their records (`server.tenures`)
    followed = {uid for uid in backends if node.trust.authority(split_uid(uid)[0]) is not None}
    gate = asyncio.Semaphore(settings.num_at_once)

    async def adopt(uid: str, replicas: list[ExpertReplica]) -> None:
        async with gate:
            infos = await asyncio.gather(*(_ask_info(node, uid, one, settings.call_timeout) for one in replicas))
            # the silent ones cost one time-out together; of the others the primary comes first
            for replica, info in [(r, i) for r, i in zip(replicas, infos, strict=True) if i is not None][:MAX_SOURCES]:
                if replica.primary:
                    _check_schemas(uid, backends[uid], info, replica)
                try:
                    file = await _fetch(node, uid, replica, backends[uid], settings)
                    if file is None:
                        continue
                    state = check_state(uid, file, weights_only=False)
                    if (wrong := difference(uid, backends[uid], state)) is not None:
                        if replica.primary:
                            raise ReplicaMismatch(f"{wrong}: {_SAME} as its primary {replica.peer.peer_id}")
                        continue
                    backends[uid].name = uid
                    backends[uid].load_state(state)
                    followed.add(uid)
                    return
                except ReplicaMismatch:
                    raise
                except (TesseractError, TimeoutError, RuntimeError, ValueError, LookupError, TypeError) as error:
                    logger.warning("the state of %s at %s: %s", uid, replica.peer.short, describe(error))

    replicas = await read_replicas(node, backends.keys() - followed)
    try:
        async with asyncio.TaskGroup() as group:
            for uid, some in replicas.items():
                if some := [one for one in some if may_follow(node, one)]:
                    group.create_task(adopt(uid, some))
    except* ReplicaMismatch as errors:
        raise errors.exceptions[0] from None
    return followed


_SAME: Final = "start this server with the same --expert-class and --size"


def _check_schemas(uid: str, backend: ExpertBackend, info: messages.ExpertInfo, primary: ExpertReplica) -> None:
    try:
        theirs = [wire.decode_schema(one) for one in (info.args_schema, info.kwargs_schema, info.outputs_schema)]
    except ProtocolError:
        return
    mine = [backend.args_schema, backend.kwargs_schema, backend.outputs_schema]
    for there, here in zip(theirs, mine, strict=True):
        if there != here:
            said = [wire.describe_schema(one)[:100] for one in (there, here)]
            at = _owner(primary).short
            raise ReplicaMismatch(f"{uid} is {said[0]} at {at}, which trains it, and {said[1]} here: {_SAME}")


async def _ask_info(
    node: TesseractNode, uid: str, replica: ExpertReplica, timeout: float
) -> messages.ExpertInfo | None:
    """What the replica says of itself; None if it does not answer."""
    try:
        async with asyncio.timeout(timeout):
            body = messages.encode(messages.InfoRequest(uid))
            reply = await node.call_expert(replica.peer, messages.INFO, body, timeout=timeout, idempotent=True)
        return messages.decode(messages.ExpertInfo, reply.body)
    except (TesseractError, TimeoutError) as error:
        logger.info("%s at %s does not answer: %s", uid, replica.peer.short, describe(error))
        return None


async def _fetch(
    node: TesseractNode,
    uid: str,
    replica: ExpertReplica,
    backend: ExpertBackend,
    settings: ReplicaSettings,
    *,
    min_version: int = 0,
) -> bytes | None:
    """The file of its state, which is no longer than one of this expert can be."""
    limit = min(settings.transfer.max_state_bytes, largest_state(backend))
    transfer = dataclasses.replace(settings.transfer, max_state_bytes=limit)
    return await fetch_file(
        node, replica.peer, uid, min_version=min_version, timeout=settings.call_timeout, settings=transfer
    )


class _Round:
    """What one look asks of others: of each peer once whether it is there."""

    def __init__(self, node: TesseractNode, timeout: float) -> None:
        self._node, self._timeout = node, timeout
        self._asked: dict[PeerID, asyncio.Task[messages.ExpertInfo | None]] = {}

    async def speaks(self, uid: str, replica: ExpertReplica) -> bool:
        """Whether its server answered a question of this look."""
        owner = _owner(replica)
        if owner not in self._asked:
            asking = _ask_info(self._node, uid, replica, self._timeout)
            self._asked[owner] = asyncio.get_running_loop().create_task(asking)
        return await asyncio.shield(self._asked[owner]) is not None

    async def versions(self, uid: str, replicas: Iterable[ExpertReplica]) -> dict[ExpertReplica, int | None]:
        """Their steps, or None; all are asked at once."""

        async def version(replica: ExpertReplica) -> int | None:
            if not await self.speaks(uid, replica):
                return None
            info = await _ask_info(self._node, uid, replica, self._timeout)
            return None if info is None else info.version

        some = list(replicas)
        return dict(zip(some, await asyncio.gather(*map(version, some)), strict=True))

    def close(self) -> None:
        """Asks no more."""
        for task in self._asked.values():
            task.cancel()


class ReplicaKeeper:
    """Looks after the roles of one server's experts. Use it as an async context manager inside the server's.

    Entering takes one look, so that followers are in step; ``expert.state`` and ``expert.lead`` calls are answered, and
    backwards of followed experts sent to their primary, from then on.
    """

    def __init__(
        self,
        server: TesseractServer,
        *,
        settings: ReplicaSettings = ReplicaSettings(),
        clock: Callable[[], float] = time.time,
        elapsed: Callable[[], float] = boottime,
    ) -> None:
        """`clock` gives wall-clock seconds, as manifests carry them; `elapsed` those of a clock as `boottime`."""
        self.settings = settings
        self.leaders: dict[str, ExpertReplica] = {}
        """Of each followed expert, the primary."""
        self._server = server
        self._node = server.node
        self._clock = clock
        self._elapsed = elapsed
        self._source = StateSource(server.snapshot, self._aside, settings=settings.transfer)
        self._synced: dict[str, tuple[PeerID | None, float]] = {}  # from whom, and when
        self._pulled: dict[str, int] = {}  # the version of the last state from elsewhere
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
            transfer=settings.transfer,
            call_timeout=settings.call_timeout,
            clock=clock,
            elapsed=elapsed,
        )
        """Of experts of runs."""
        self._looking = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> ReplicaKeeper:
        self._server.find_primary = self.find_primary
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
            gate = asyncio.Semaphore(self.settings.num_at_once)
            round_ = _Round(self._node, self.settings.probe_timeout)

            async def one(uid: str, others: list[ExpertReplica]) -> None:
                async with gate:
                    try:
                        await self._settle(uid, [other for other in others if may_follow(self._node, other)], round_)
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
            gate = asyncio.Semaphore(self.settings.num_at_once)

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
        rivals = [other for other in others if other.primary and (_owner(other) != giver or other.sequence > sequence)]
        if not primary:
            rivals = await self._living(uid, rivals, round_)
        followers = [other for other in others if not other.primary]
        asked = rivals if primary or (listed and len(rivals) > 1) else [] if rivals else followers
        versions = await round_.versions(uid, asked)
        standings = {other: Standing(_owner(other), other.primary, versions.get(other)) for other in (asked or rivals)}
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
                self._taken_from[uid] = _owner(leader)
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
            owner = _owner(one)
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
            if (uid, _owner(rival)) not in self._disputed and len(self._disputed) < 1024:
                self._disputed.add((uid, _owner(rival)))
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
        file = await _fetch(self._node, uid, leader, backend, self.settings, min_version=min_version)
        if file is None:
            return None
        state = await self._server.call_aside(lambda: check_state(uid, file, weights_only=False))
        if (wrong := difference(uid, backend, state)) is not None:
            raise CheckpointError(f"{wrong}, so it is not taken from {leader.peer.short}")
        if backend.version > self._pulled.get(uid, 0):
            await self._server.set_aside(uid)  # its own steps are not in there
        await self._server.install(uid, state)
        self._pulled[uid] = backend.version
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
            timeout=self.settings.hand_over_timeout,
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

    async def _aside(self, work: Callable[[], bytes]) -> bytes:
        return await self._server.call_aside(work)


def _owner(replica: ExpertReplica) -> PeerID:
    assert replica.peer.peer_id is not None, "manifests are read with their owners"
    return replica.peer.peer_id
