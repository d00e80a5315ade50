"""BareNames: who is the primary of a server's experts that belong to no run (`docs/design/authority.md`, Bare names).

Bare names have no records that say who may train, so a server's claim alone counts for little: versions are compared
only among servers that the node's own allow-list names.
"""

import asyncio
import contextlib
import logging
import math
import os
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

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
from tesseract_async.experts.pieces import possession
from tesseract_async.identity import PeerID
from tesseract_async.node import TesseractNode
from tesseract_async.runtime.states import StateDict
from tesseract_async.server.fragments import FragmentBackend, fetch_replay
from tesseract_async.server.hosted import HostedState
from tesseract_async.server.other_replicas import (
    NUM_AT_ONCE,
    ReplicaSettings,
    ask_info,
    check_path,
    fetch_fitting,
    may_follow,
    owner_of,
    read_replicas,
)
from tesseract_async.server.rhythm import Rhythm
from tesseract_async.server.server import TesseractServer
from tesseract_async.server.state_transfer import StateSource
from tesseract_async.tasks import in_time
from tesseract_async.wire import messages

logger = logging.getLogger(__name__)

HAND_OVER_TIMEOUT: Final = 30.0
"""Seconds for one expert, when this server leaves."""
MAX_DISPUTES: Final = 1024
"""Rivals that are told of once each."""


@dataclass(frozen=True, slots=True)
class Contender:
    """One server's replica of an expert, as described by its live manifest and its answer."""

    owner: PeerID
    primary: bool
    version: int | None
    """Optimizer steps; None if the server does not answer."""


class BareRole(Enum):
    TRAIN = "train"
    """Be its primary."""
    FOLLOW = "follow"
    WAIT = "wait"
    """Follow no server for the moment: a better follower is about to take over."""


def decide(
    me: Contender,
    others: Sequence[Contender],
    *,
    listed: bool,
    followed: PeerID | None = None,
    taken_from: PeerID | None = None,
    is_new: bool = False,
    has_waited: bool = True,
) -> tuple[BareRole, Contender | None]:
    """Return this server's role, and which server it follows.

    `others`: replicas whose claims may count; of those that claim to be the primary, only the ones that answered
    lately. `listed`: they are on an allow-list, so that their versions are believed. `followed`: the server that this
    one follows. `taken_from`: the server from which this one took over, unasked. `is_new`: this server has been primary
    for a moment only, without a step, or stood still for a lease. `has_waited`: a better follower had the time to take
    over, and did not.
    """
    assert me.version is not None
    primaries = [other for other in others if other.primary]
    if me.primary:
        speaking = [other for other in primaries if other.version is not None]
        if listed:
            better = [other for other in speaking if _rank(other) > _rank(me)]
        else:
            better = speaking if is_new else [other for other in speaking if other.owner == taken_from]
        return (BareRole.FOLLOW, max(better, key=_rank)) if better else (BareRole.TRAIN, None)
    if primaries:
        known = [other for other in primaries if other.owner == followed]
        return BareRole.FOLLOW, max((not listed and known) or primaries, key=_rank)
    better = [other for other in others if other.version is not None and _rank(other) > _rank(me)]
    return (BareRole.WAIT if better and not has_waited else BareRole.TRAIN), None


def _rank(one: Contender) -> tuple[int, int]:
    version = -1 if one.version is None else one.version
    return version, -int.from_bytes(one.owner, "big")


@dataclass(slots=True)
class _BareExpert:
    """One expert with a bare name, and what this server remembers of its primaries."""

    hosted: HostedState
    primary_since: float
    version_then: int | None
    """None: any."""
    primary: ExpertReplica | None = None
    """The primary that is followed."""
    synced_from: PeerID | None = None
    syncing: Rhythm | None = None
    """The rhythm of pulls from the primary."""
    giver: PeerID | None = None
    """The server that handed the expert over to this one."""
    giver_sequence: int = 0
    """The number of the last manifest in which that server still calls itself primary."""
    taken_from: PeerID | None = None
    """The server whose silence made this one take over."""
    waiting_since: float | None = None
    installing: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while a state is loaded, and while this server becomes the primary, after which no state is loaded."""
    others: list[ExpertReplica] = field(default_factory=list)
    """The replicas elsewhere that may be followed, as last read from the network."""


class _Look:
    """The questions of one round of looking at the roles: each server is asked once whether it is there."""

    def __init__(self, node: TesseractNode, timeout: float) -> None:
        self._node, self._timeout = node, timeout
        self._speaks: dict[PeerID, asyncio.Task[messages.ExpertInfo | None]] = {}

    async def speaks(self, replica: ExpertReplica) -> bool:
        """Return whether its server answered a question of this look."""
        owner = owner_of(replica)
        if owner not in self._speaks:
            self._speaks[owner] = asyncio.get_running_loop().create_task(ask_info(self._node, replica, self._timeout))
        return await asyncio.shield(self._speaks[owner]) is not None

    async def contender(self, replica: ExpertReplica) -> Contender:
        info = await ask_info(self._node, replica, self._timeout) if await self.speaks(replica) else None
        return Contender(owner_of(replica), replica.primary, None if info is None else info.version)

    def close(self) -> None:
        for task in self._speaks.values():
            task.cancel()


class BareNames:
    """Settles the roles of these experts, and pulls the states of followed ones."""

    def __init__(
        self,
        server: TesseractServer,
        uids: Iterable[str],
        source: StateSource,
        *,
        settings: ReplicaSettings,
        elapsed: Callable[[], float],
        adopted: Mapping[str, PeerID | None],
    ) -> None:
        """`source` sends the states of this server's experts; `elapsed` and `adopted` are those of `ReplicaKeeper`."""
        self._server, self._node, self._source = server, server.node, source
        self._settings, self._elapsed = settings, elapsed
        self._began = self._read_at = self._looked_at = elapsed()
        self._pulling, self._wake = asyncio.Lock(), asyncio.Event()
        self._experts = {uid: _BareExpert(server.hosted[uid], self._began, server.experts[uid].version) for uid in uids}
        for uid, one in self._experts.items():
            if (giver := adopted.get(uid)) is not None and not one.hosted.is_restored:
                one.synced_from, one.syncing = giver, Rhythm(settings.sync_every, self._began)
                one.hosted.shared_version = one.hosted.version
        self._heard: dict[PeerID, float] = {}
        self._disputed: set[tuple[str, PeerID]] = set()

    def primary(self, uid: str) -> PeerID | None:
        one = self._experts.get(uid)
        return None if one is None or one.primary is None else owner_of(one.primary)

    def forget(self, uid: str) -> None:
        self._experts[uid].synced_from = None

    async def read(self, uids: Iterable[str]) -> None:
        """Read who else hosts these. Raises: TimeoutError if the network does not answer."""
        async with asyncio.timeout(self._settings.call_timeout):
            replicas = await read_replicas(self._node, uids)
        for uid, others in replicas.items():
            one = self._experts[uid]
            one.others = [other for other in others if may_follow(self._node, other)]
            if one.hosted.is_primary:
                strange = [other for other in others if other.primary and other not in one.others]
                self._tell_dispute(uid, [owner_of(other) for other in strange[:4]])

    async def settle(self) -> None:
        """Settle all roles; notice if this server was suspended or cut off before: another may have taken over.

        Raises: as `read`.
        """
        longest = self._settings.lease + self._settings.check_every
        with contextlib.closing(_Look(self._node, self._settings.call_timeout / 5)) as look:
            await self.read(self._experts)
            now = self._elapsed()
            if now - self._read_at > longest:
                for one in self._experts.values():
                    one.primary_since, one.version_then = now, None
            self._read_at = now
            if now - self._looked_at > longest:
                self._heard.clear()  # by then a look that is slow itself, for others' silence, has not stood still
            wanted = [one for one in self._experts.values() if one.others or not one.hosted.is_primary]
            await self._each(lambda one: self._settle(one, look), wanted)
        self._looked_at = self._elapsed()

    async def pull(self) -> None:
        """Pull the states that are due. Roles are settled meanwhile: on a slow line it takes longer than a lease."""
        async with self._pulling:
            began = self._elapsed()
            with contextlib.closing(_Look(self._node, self._settings.call_timeout / 5)) as look:
                due = [one for one in self._experts.values() if self._due_at(one) <= began]
                await self._each(lambda one: self._sync(one, look, began), due)

    async def wait_due(self) -> None:
        """Wait until a state is to be pulled; at most until roles are looked at again."""
        now = self._elapsed()
        due = (at - now for at in map(self._due_at, self._experts.values()))
        await in_time(self._wake.wait(), min([self._settings.check_every, *(one for one in due if one > 0)]))
        self._wake.clear()

    def _due_at(self, one: _BareExpert) -> float:
        if one.hosted.is_primary or one.primary is None:
            return math.inf
        if one.syncing is None or one.synced_from != owner_of(one.primary):
            return -math.inf
        return one.syncing.next_at

    @staticmethod
    async def _each(act: Callable[[_BareExpert], Awaitable[None]], experts: Iterable[_BareExpert]) -> None:
        """Do this with all of them, some at a time. A failure of one is logged."""
        gate = asyncio.Semaphore(NUM_AT_ONCE)

        async def carry_out(one: _BareExpert) -> None:
            async with gate:
                try:
                    await act(one)
                except (TesseractError, TimeoutError) as error:
                    logger.warning("replica of %s: %s", one.hosted.uid, describe(error))

        async with asyncio.TaskGroup() as group:
            for one in experts:
                group.create_task(carry_out(one))

    async def _settle(self, one: _BareExpert, look: _Look) -> None:
        uid, is_primary, version = one.hosted.uid, one.hosted.is_primary, one.hosted.backend.version
        listed, now = self._node.policy.hosts is not None, self._elapsed()
        rivals = [
            other
            for other in one.others
            if other.primary and (owner_of(other) != one.giver or other.sequence > one.giver_sequence)
        ]
        if not is_primary:
            rivals = await self._living(one, rivals, look)
        contenders = rivals if rivals or is_primary else [other for other in one.others if not other.primary]
        if rivals and not is_primary and not (listed and len(rivals) > 1):
            said = [Contender(owner_of(other), True, None) for other in rivals]  # whichever it is, no version matters
        else:
            said = await asyncio.gather(*map(look.contender, contenders))
        role, chosen = decide(
            Contender(self._node.peer_id, is_primary, version),
            said,
            listed=listed,
            followed=self.primary(uid),
            taken_from=one.taken_from,
            is_new=now - one.primary_since < self._settings.lease and one.version_then in (None, version),
            has_waited=one.waiting_since is not None and now - one.waiting_since >= self._settings.check_every,
        )
        if role is BareRole.WAIT:
            one.waiting_since = one.waiting_since or now
            return
        one.waiting_since = None
        if role is BareRole.FOLLOW:
            one.primary = next(other for other, at in zip(contenders, said, strict=True) if at == chosen)
            if is_primary:
                logger.warning("%s has another primary, %s: this server follows it", uid, one.primary.peer.short)
                self._node.metrics.count("experts_given_up")
                await self._server.set_primary(uid, False)
            if self._due_at(one) <= now:
                self._wake.set()
        elif is_primary:
            self._tell_dispute(uid, [at.owner for at in said if at.version is not None])
        else:
            logger.warning("%s has no primary any more: this server takes over at version %s", uid, version)
            self._node.metrics.count("experts_taken_over")
            one.taken_from = one.taken_from if one.primary is None else owner_of(one.primary)
            async with one.installing:
                await self._become_primary(one)

    async def _living(self, one: _BareExpert, primaries: list[ExpertReplica], look: _Look) -> list[ExpertReplica]:
        """Return the servers that answer and, for a lease, the followed one even if it does not answer: it may be
        busy."""
        speak = await asyncio.gather(*map(look.speaks, primaries))
        now, followed, living = self._elapsed(), self.primary(one.hosted.uid), []
        for other, speaks in zip(primaries, speak, strict=True):
            owner = owner_of(other)
            if speaks:
                self._heard[owner] = now
            if owner == followed:
                since = self._heard.setdefault(owner, now)
            else:
                since = self._began if followed is None else -math.inf
            if speaks or now - since < self._settings.lease:
                living.append(other)
        return living

    async def _become_primary(self, one: _BareExpert) -> None:
        one.primary = one.synced_from = None
        one.primary_since, one.version_then = self._elapsed(), one.hosted.backend.version
        await self._server.set_primary(one.hosted.uid, True)

    def _tell_dispute(self, uid: str, rivals: list[PeerID]) -> None:
        for rival in rivals:
            if (uid, rival) not in self._disputed and len(self._disputed) < MAX_DISPUTES:
                self._disputed.add((uid, rival))
                self._node.metrics.count("primaries_disputed")
                logger.warning(
                    "%s calls itself the primary of %s, too; this server goes on, and they train apart. If both are "
                    "yours, stop one of them, or list them all with --allow-file",
                    rival.short,
                    uid,
                )

    async def _sync(self, one: _BareExpert, look: _Look, woken: float) -> None:
        primary, now = one.primary, self._elapsed()
        if primary is None or not await look.speaks(primary):
            return  # waiting for the state of one that is gone would keep the others' from coming
        owner, version = owner_of(primary), one.hosted.backend.version
        is_same = one.synced_from == owner
        if not is_same or not await self._replay(one, primary):
            # of a new primary whatever it has, even if that is less than the steps that were taken here
            found = await self._fetch(one, primary, min_version=version + 1 if is_same else 0)
            async with one.installing:
                if found is not None and self.primary(one.hosted.uid) == owner:
                    await self._install(one, found[1])
        if self.primary(one.hosted.uid) != owner:
            return  # meanwhile it has become the primary, or follows another
        if not is_same or one.syncing is None:
            one.syncing = Rhythm(self._settings.sync_every, now)
        one.synced_from = owner
        one.syncing.note(now, self._elapsed(), woken=woken, worked=one.hosted.backend.version != version)

    async def _replay(self, one: _BareExpert, primary: ExpertReplica) -> bool:
        """Follow a fragment's primary by its updates. False if its state must be fetched whole."""
        hosted, backend = one.hosted, one.hosted.backend
        if not isinstance(backend, FragmentBackend):
            return False
        check_path(self._node, primary)
        timeout = self._settings.call_timeout
        try:
            update = await fetch_replay(self._node, hosted.uid, backend, primary.peer, timeout=timeout)
            async with one.installing:
                if update is None or self.primary(hosted.uid) != owner_of(primary):
                    return False
                await hosted.runtime.call(update)
        except ProtocolError as error:
            logger.info("%s could not be followed by its updates: %s", hosted.uid, describe(error))
            return False
        hosted.shared_version = hosted.version
        self._node.metrics.count("fragments_replayed")
        return True

    async def _fetch(
        self, one: _BareExpert, primary: ExpertReplica, *, min_version: int = 0
    ) -> tuple[bytes | memoryview, StateDict] | None:
        """Return the file of the primary's state, and the state; None before `min_version`."""
        check_path(self._node, primary)
        return await fetch_fitting(
            self._node,
            primary.peer,
            one.hosted.uid,
            one.hosted.backend,
            min_version=min_version,
            timeout=self._settings.call_timeout,
            aside=self._server.call_aside,
        )

    async def _install(self, one: _BareExpert, state: StateDict) -> None:
        await one.hosted.take(state)
        self._node.metrics.count("states_pulled")

    async def hand_over(self, uid: str) -> bool:
        """Have a follower take over, by what was read last. Returns whether one did; else the expert stays here."""
        one = self._experts[uid]
        heirs = [other for other in one.others if not other.primary]
        if not heirs:
            return False
        # From here on backwards are not applied, so that the state which the follower fetches is the last one. The
        # network hears of it later: followers would take over by themselves, from an older state.
        await self._server.set_primary(uid, False, announce=False)
        await self._server.calls.wait_backwards(uid)
        self._source.drop(uid)
        for heir in heirs:
            try:
                await self._give(uid, heir)
            except (TesseractError, TimeoutError) as error:
                logger.warning("%s could not be handed over to %s: %s", uid, heir.peer.short, describe(error))
                continue
            one.primary = heir
            logger.info("%s was handed over to %s", uid, heir.peer.short)
            return True
        await self._server.set_primary(uid, True, announce=False)
        return False

    async def _give(self, uid: str, heir: ExpertReplica) -> None:
        """Have the heir take over. Raises: as the call; ProtocolError unless it proves that it has the last state."""
        nonce = os.urandom(16)
        body = messages.encode(messages.TakeOverRequest(uid, nonce))
        reply = await self._node.call_expert(heir.peer, messages.TAKE_OVER, body, timeout=HAND_OVER_TIMEOUT)
        proof = messages.decode(messages.TakeOverReply, reply.body).proof
        file = self._source.copy_of(uid)
        if file is None or proof != await self._server.call_aside(lambda: possession(file, nonce)[:16]):
            raise ProtocolError("it says that it is the primary now, but has not fetched the state")

    async def take_over(self, hosted: HostedState, call: IncomingCall) -> Message:
        """Answer ``expert.take_over``, for the primary that this server follows. Raises: NotAllowed, RemoteError."""
        request, uid = messages.decode(messages.TakeOverRequest, call.body), hosted.uid
        one = self._experts.get(uid)
        primary = None if one is None else one.primary
        if one is None or hosted.is_primary or primary is None or owner_of(primary) != call.peer_id:
            raise NotAllowed(f"{call.peer_id.short} is not the primary of {uid} here")
        if self._server.calls.refuse_forwards is not None:  # it leaves, or rests
            raise self._server.calls.refuse_forwards
        async with one.installing:
            try:
                if (found := await self._fetch(one, primary)) is not None:
                    await self._install(one, found[1])
            except (CheckpointError, ConnectionLost, PeerUnreachable, TimeoutError) as error:
                raise RemoteError(f"{uid} was not taken over: {describe(error)}") from error
            one.giver, one.giver_sequence = call.peer_id, primary.sequence
            await self._become_primary(one)
        proof = None if found is None or request.nonce is None else possession(found[0], request.nonce)[:16]
        return Message(messages.encode(messages.TakeOverReply(hosted.backend.version, proof)))
