"""Tenures: settles who is the primary of a server's experts of runs, and when each is read, sealed, computed and given
up."""

import asyncio
import contextlib
import logging
import math
from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import partial
from typing import Final

from tesseract_async.endpoint.endpoint import IncomingCall, Message
from tesseract_async.errors import CheckpointError, NotAllowed, TesseractError, describe
from tesseract_async.experts.authority import Authority
from tesseract_async.experts.membership import Permissions
from tesseract_async.experts.pattern import ExpertPattern
from tesseract_async.experts.place_directory import MAX_MEMBERS
from tesseract_async.experts.tenure import Tenure
from tesseract_async.experts.tenure_words import (
    Persist,
    State,
)
from tesseract_async.identity import PeerID
from tesseract_async.runtime.backend import ExpertBackend
from tesseract_async.server.fragments import FragmentBackend
from tesseract_async.server.hosted import HostedState
from tesseract_async.server.other_replicas import wall_clock
from tesseract_async.server.sealed_states import check_file
from tesseract_async.server.state_files import stored_uids
from tesseract_async.server.state_transfer import SealedState
from tesseract_async.server.tenure_driver import TenureDriver
from tesseract_async.server.tenured import Tenured
from tesseract_async.tasks import in_time
from tesseract_async.transport.base import PeerAddress
from tesseract_async.wire import messages

logger = logging.getLogger(__name__)

MAX_ADDRESSES: Final = 2 * MAX_MEMBERS
"""Members whose addresses are remembered."""
RETRY_SECONDS: Final = 1.0
"""Seconds after which a trainer whose backward came to a server that is not the primary asks again."""
MAX_WAITING: Final = 256
"""Trainers that may wait for an expert's next primary instead: their gradients take memory meanwhile."""
UPLOAD_SHARE: Final = 0.5
"""The share of the upload rate that copies of states may take."""
AUTHORITY_PERIOD: Final = 2.0
"""Seconds after which grants, revocations and appointments are looked at again: they come by themselves."""


class Tenures(TenureDriver):
    """Settles the roles of these experts, and follows their primaries by the Seals. `ReplicaKeeper` starts it."""

    async def start(self, authorities: Mapping[str, Authority]) -> None:
        """Take up what was left of these, by uid, and return once each has a role here, or a while has passed."""
        for uid, authority in authorities.items():
            self._experts[uid] = await self._load(uid, authority, self._server.hosted[uid])
        self._tasks.spawn(self._turn())
        self._tasks.spawn(self._whenever(self.records.wants, self._read_wanted))
        self._tasks.spawn(self._whenever(self._wants_announcement, self._server.announce))
        self._tasks.spawn(self._seal_often())
        for expert in self._experts.values():
            await self._carry_out(expert)

        def is_settled(tenure: Tenure) -> bool:
            # and what it is, it also says
            says = self._server.is_primary(tenure.uid) == (tenure.state is State.PRIMARY)
            return tenure.state in (State.PRIMARY, State.FOLLOWING, State.HOLDING) and says

        await asyncio.gather(*(expert.until(is_settled, self._call_timeout) for expert in self._experts.values()))

    async def _load(self, uid: str, authority: Authority, hosted: HostedState | None) -> Tenured:
        make = partial(
            Tenure,
            self._node.identity,
            uid,
            authority,
            boot=self._boot,
            now=self._elapsed(),
            wall=wall_clock(),
            stored=await self._server.call_aside(partial(self.files.load, uid)),
            random=self._random,
        )
        tenure = make(has_file=True)
        held = tenure.held
        own = held is not None and held.primary == self._node.peer_id and hosted is not None
        if held is not None and not own and self.files.find(uid, held.root) is None:
            tenure = make(has_file=False)  # its own state is in its checkpoints; another's is nowhere
        if hosted is not None:
            await self.states.return_to(tenure.held, hosted)
        return Tenured(uid, hosted, authority, tenure)

    async def add(self, uid: str, authority: Authority, leave: Permissions) -> None:
        """Keep this expert here, too, as a file only. Raises: OSError."""
        if uid in self._experts or self._closed:
            return
        expert = await self._load(uid, authority, None)
        for name in ("primary", "begin", "anew", "passive"):
            setattr(expert.tenure.may, name, getattr(leave, name))
        self._experts[uid] = expert
        self._answer_as_file(uid)
        await self._carry_out(expert)

    def _answer_as_file(self, uid: str) -> None:
        handlers = {messages.TENURE: partial(self.answer, uid), messages.STATE: partial(self._send_file, uid)}
        self._node.host_expert(uid, handlers)

    async def _send_file(self, uid: str, call: IncomingCall) -> Message:
        held = self._experts[uid].tenure.held
        file = None if held is None else self.files.find(uid, held.root)
        if held is None or file is None or self.source is None:
            raise NotAllowed(f"the state of {uid} is not here yet")
        return await self.source.answer(SealedState(uid, held.version, file, self._server.call_aside), call)

    async def compute(self, uid: str, backend: ExpertBackend) -> None:
        """Compute an expert that is here only as a file, as its follower or as its primary.

        Raises: CheckpointError, ProtocolError if the file does not fit it; OSError; ValueError.
        """
        expert = self._experts[uid]
        async with expert.installing:  # a newer one that has come meanwhile waits, and is taken by the expert
            state = None
            if (held := expert.tenure.held) is not None:
                file = self.files.find(uid, held.root)
                if file is None:
                    raise CheckpointError(f"the sealed file of {uid} is gone")
                state = await self._server.call_aside(partial(check_file, uid, backend, file))
            # until then the file answers: a primary that says nothing is taken for dead
            leave = partial(self._node.unhost_expert, uid)
            expert.hosted = await self._server.add(uid, backend, state, ready=leave)
            expert.progress = None if state is None else backend.progress
        expert.hosted.epoch = expert.tenure.epoch
        await self._server.set_primary(uid, expert.tenure.state is State.PRIMARY, announce=False)
        self._wants_announcement.set()

    async def rest(self, uid: str) -> None:
        """Keep an expert of which this server is not the primary as a file only. Raises: CheckpointError."""
        expert = self._experts[uid]
        async with expert.installing:
            if expert.hosted is not None and expert.tenure.state in (State.FOLLOWING, State.HOLDING):
                await self._server.remove(uid)
                expert.hosted, expert.progress = None, None
                self._answer_as_file(uid)
                self._wants_announcement.set()

    async def drop(self, uid: str, *, even_primary: bool = False) -> None:
        """Give an expert up, and its file, unless this server is its primary.

        `even_primary`: it fell silent as one that cannot compute it. Others take over after a lease; its file stays.
        """
        expert = self._experts[uid]
        await self.rest(uid)
        async with expert.installing, expert.carrying:
            if expert.hosted is None and (even_primary or expert.tenure.state is not State.PRIMARY):
                del self._experts[uid]
                self._node.unhost_expert(uid)
                if not even_primary:
                    await self._server.call_aside(partial(self.files.forget, uid))

    def stored(self, pattern: ExpertPattern) -> list[str]:
        """Return the experts of a run that have a folder here, and are not looked after yet."""
        return [uid for uid in stored_uids(self._server.checkpoint_dir) if uid in pattern and uid not in self._experts]

    def uids(self) -> list[str]:
        """Return the experts that are here, computed or as files."""
        return list(self._experts)

    def knows(self, addresses: Mapping[PeerID, PeerAddress]) -> None:
        """Take in the addresses of members. Of members that come and go, the latest are remembered."""
        for peer, address in addresses.items():
            self._addresses.pop(peer, None)
            self._addresses[peer] = address
        for peer in list(self._addresses)[:-MAX_ADDRESSES]:
            del self._addresses[peer]

    async def read(self, uids: Iterable[str]) -> None:
        """Read who else hosts these, and their records. Raises: TimeoutError if the network does not answer."""
        await self.records.read(uids)

    async def _read_wanted(self) -> None:
        if uids := self.records.take_wanted():
            self._tasks.spawn(self.records.read_wanted(uids))

    async def aclose(self) -> None:
        """Stop. Nothing is answered or trained any more."""
        self._closed = True
        async with contextlib.AsyncExitStack() as stack:
            for expert in self._experts.values():  # no command is cut off
                await stack.enter_async_context(expert.carrying)
            await self._tasks.aclose()
            for uid, expert in self._experts.items():
                if expert.hosted is None:  # the others answer until the server closes
                    self._node.unhost_expert(uid)
                for command in expert.tenure.commands():
                    if isinstance(command, Persist):
                        await self._do(expert, command)
        if self.files.is_temporary:  # also where the last expert was given up
            await self._server.call_aside(self.files.close)

    def has(self, uid: str) -> bool:
        """Return whether it looks after this expert, once it has loaded what was left of it."""
        return uid in self._experts

    def may_step(self, uid: str) -> bool:
        """Return whether a step of this expert may be taken, or answered, at this moment."""
        tenure = self._experts[uid].tenure  # what one trains whose disk takes nothing would be in nobody's file
        return not self._closed and tenure.may.write and tenure.is_primary(self._elapsed())

    def primary(self, uid: str) -> PeerID | None:
        """Return the primary, if that is another server."""
        expert = self._experts.get(uid)  # it may have been given up meanwhile
        primary = None if expert is None else expert.tenure.primary
        return None if primary == self._node.peer_id else primary

    async def find_primary(self, uid: str) -> tuple[PeerID | None, float]:
        """Return `primary`, and the seconds until to ask again. Where it fell silent, wait a moment for the next one
        (unless many do); the caller hears of that one at once."""
        expert = self._experts[uid]
        if not expert.tenure.misses_primary(self._elapsed()) or expert.num_waiting >= MAX_WAITING:
            return self.primary(uid), RETRY_SECONDS
        before = expert.tenure.primary

        def is_settled(tenure: Tenure) -> bool:
            leads = expert.hosted is not None and expert.hosted.is_primary
            return leads or (tenure.state is not State.CANDIDATE and tenure.primary != before)

        expert.num_waiting += 1
        try:
            await expert.until(is_settled, RETRY_SECONDS)
        finally:
            expert.num_waiting -= 1
        return self.primary(uid), 0.0

    def tenure(self, uid: str) -> Tenure:
        """Return the machine of one expert, to look at."""
        return self._experts[uid].tenure

    async def _turn(self) -> None:
        """Let each machine act when it is due."""
        told_at = self._elapsed()
        while True:
            now = self._elapsed()
            if now - told_at >= AUTHORITY_PERIOD:
                told_at = now
                for expert in list(self._experts.values()):
                    if expert.unwritten is not None:
                        async with expert.carrying:
                            await self._remember(expert, expert.unwritten)
                    expert.tenure.authority_changed(*self._now())
                    await self._carry_out(expert)
                    root, hosted = expert.tenure.wanted_root, expert.hosted
                    if hosted is not None and root != expert.wanted_root:
                        expert.wanted_root = root
                        if root is not None:
                            self._tasks.spawn(self._restore(expert, hosted, root))
                self._node.metrics.set(
                    "lineage_forks", sum(one.tenure.lineage.num_forks for one in self._experts.values())
                )
            due = min((expert.tenure.timer_at() for expert in self._experts.values()), default=math.inf)
            await in_time(self._wake.wait(), min(1.0, max(0.01, due - now)))
            self._wake.clear()
            await asyncio.sleep(0.02)  # one turn for all that came at once
            for expert in list(self._experts.values()):
                if self._elapsed() >= expert.tenure.timer_at():
                    expert.tenure.handle_timer(*self._now())
                    await self._carry_out(expert)

    async def _whenever(self, wanted: asyncio.Event, act: Callable[[], Awaitable[None]]) -> None:
        while True:
            await wanted.wait()
            wanted.clear()
            try:
                await act()
            except (TesseractError, TimeoutError, OSError) as error:
                logger.info("who is primary could not be published: %s", describe(error))
            await asyncio.sleep(0.05)

    async def _seal_often(self) -> None:
        """Seal what changed, every `sync_every` of the run; at once what has no Seal yet."""
        while True:
            await asyncio.sleep(0.1)
            for expert in list(self._experts.values()):
                tenure, now = expert.tenure, self._elapsed()
                if expert.is_unsealed:
                    self._let_write(expert)
                    if now - expert.sealed_at >= expert.authority.lease / 6:
                        await self._try_to_seal(expert)
                    continue
                if not tenure.is_primary(now) or (expert.hosted is None and tenure.held is None):
                    continue
                is_new = tenure.held is None or tenure.term is None or tenure.held.term != tenure.term.digest
                hosted = expert.hosted
                at_once = hosted is not None and isinstance(hosted.backend, FragmentBackend) and expert.has_moved
                if is_new or at_once or now - expert.sealed_at >= self.sync_every(expert.authority):
                    if not is_new and tenure.is_content and not expert.has_moved:
                        expert.sealed_at = now  # a Seal would say nothing
                        continue
                    await self._try_to_seal(expert)
            num_unsealed = sum(one.is_unsealed for one in self._experts.values())
            self._node.metrics.set("experts_unsealed", num_unsealed)

    def sync_every(self, authority: Authority) -> float:
        """Return the seconds between two Seals: the run's, or longer, where the upload rate does not suffice for all
        copies of what this server leads."""
        period, rate = authority.run.manifest.sync_every, self.upload_rate
        if rate is None:
            return period
        led = (one.tenure.held for one in self._experts.values() if one.tenure.state is State.PRIMARY)
        num_bytes = sum(seal.size for seal in led if seal is not None)
        return max(period, num_bytes * authority.run.manifest.num_replicas / (UPLOAD_SHARE * rate))

    @property
    def sync_seconds(self) -> float:
        """Seconds between two Seals of what this server leads, at most; 0 where it leads nothing."""
        led = {one.authority for one in self._experts.values() if one.tenure.state is State.PRIMARY}
        return max(map(self.sync_every, led), default=0.0)
