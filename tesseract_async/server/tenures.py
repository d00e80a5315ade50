"""Tenures: who is the primary of a server's experts of runs. Drives their `Tenure`s.

It carries their questions, reads and publishes their records, writes down what they must remember, and moves the sealed
files.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import TYPE_CHECKING, Final

from tesseract_async.endpoint.endpoint import IncomingCall, Message
from tesseract_async.errors import CheckpointError, NotAllowed, ProtocolError, TesseractError, describe
from tesseract_async.experts.authority import Authority
from tesseract_async.experts.claiming import GRANT_SUBKEY
from tesseract_async.experts.grid import ExpertReplica
from tesseract_async.experts.manifest import split_uid
from tesseract_async.experts.merkle import possession
from tesseract_async.experts.tenure import Tenure
from tesseract_async.experts.tenure_words import (
    Command,
    Fetch,
    Look,
    Persist,
    Publish,
    Question,
    Response,
    RoleChanged,
    Send,
    State,
)
from tesseract_async.experts.terms import Seal
from tesseract_async.identity import PeerID
from tesseract_async.server.checkpoint import encode
from tesseract_async.server.fetching import SealFetcher
from tesseract_async.server.hosted import HostedState
from tesseract_async.server.other_replicas import (
    MAX_SHARDS_READ,
    check_fitting,
    longest_state,
    owner_of,
    read_replicas,
    record_subkey,
    wall_clock,
)
from tesseract_async.server.state_files import SealedFiles
from tesseract_async.transport.base import PeerAddress
from tesseract_async.wire import messages

if TYPE_CHECKING:
    from tesseract_async.server.server import TesseractServer

logger = logging.getLogger(__name__)

RECORDS_TTL: Final = 24 * 3600.0
ASK_TIMEOUT: Final = 1.5
"""Seconds for a question about who is primary."""
MAX_RECORD_BYTES: Final = 1024
AUTHORITY_PERIOD: Final = 2.0
"""Seconds after which grants, revocations and appointments are looked at again: they come by themselves."""


@dataclass(slots=True)
class _Expert:
    """One expert of a run, hosted here."""

    uid: str
    hosted: HostedState
    authority: Authority
    tenure: Tenure
    carrying: asyncio.Lock = field(default_factory=asyncio.Lock)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set after every command; those who wait for something look again, and clear it."""
    progress: tuple[int, int] | None = None
    """How far the sealed file is."""
    sealed_at: float = -math.inf

    async def until(self, condition: Callable[[Tenure], bool], timeout: float) -> bool:
        """Wait until something holds. False if it does not within `timeout` seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while not condition(self.tenure):
                    self.changed.clear()
                    await self.changed.wait()
        return condition(self.tenure)


class Tenures:
    """Settles the roles of these experts, and follows their primaries by the Seals. `ReplicaKeeper` starts it."""

    def __init__(
        self,
        server: TesseractServer,
        authorities: Mapping[str, Authority],
        *,
        call_timeout: float,
        elapsed: Callable[[], float],
    ) -> None:
        """`authorities`: uid -> its run's. `elapsed` is that of `ReplicaKeeper`."""
        self._server, self._node = server, server.node
        self._call_timeout, self._elapsed = call_timeout, elapsed
        self._authorities = authorities
        self._experts: dict[str, _Expert] = {}
        self.files = SealedFiles(server.checkpoint_dir)
        self._fetcher = SealFetcher(self._node, self.files, timeout=call_timeout, aside=server.call_aside)
        self._addresses: dict[PeerID, PeerAddress] = {}  # of servers that were found to host one of the experts
        self._shown: dict[str, tuple[bytes, float]] = {}  # by shard key: the grant that lies there, and until when
        self._looks: set[str] = set()
        self._wants_look, self._wants_announcement, self._wake = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    async def start(self) -> None:
        """Take up what was left, and return once each expert has a role here, or a while has passed."""
        if not self._authorities:
            return
        boot, random = os.urandom(8), Random()
        for uid, authority in self._authorities.items():
            make = partial(
                Tenure,
                self._node.identity,
                uid,
                authority,
                boot=boot,
                now=self._elapsed(),
                wall=wall_clock(),
                stored=await self._server.call_aside(partial(self.files.load, uid)),
                random=random,
            )
            tenure = make(has_file=True)
            held = tenure.held
            if held is not None and held.primary != self._node.peer_id and self.files.find(uid, held.root) is None:
                tenure = make(has_file=False)  # its own state is in its checkpoints; another's is nowhere
            self._experts[uid] = _Expert(uid, self._server.hosted[uid], authority, tenure)
        self._spawn(self._turn())
        self._spawn(self._whenever(self._wants_look, self._look_at_wanted))
        self._spawn(self._whenever(self._wants_announcement, self._server.announce))
        self._spawn(self._seal_often())
        for expert in self._experts.values():
            await self._carry_out(expert)

        def is_settled(tenure: Tenure) -> bool:
            # and what it is, it also says
            says = self._server.is_primary(tenure.uid) == (tenure.state is State.PRIMARY)
            return tenure.state in (State.PRIMARY, State.FOLLOWING, State.HOLDING) and says

        await asyncio.gather(*(expert.until(is_settled, self._call_timeout) for expert in self._experts.values()))

    async def aclose(self) -> None:
        """Stop. Nothing is answered or trained any more."""
        self._closed = True
        async with contextlib.AsyncExitStack() as stack:
            for expert in self._experts.values():  # no command is cut off
                await stack.enter_async_context(expert.carrying)
            tasks = list(self._tasks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for expert in self._experts.values():
                for command in expert.tenure.commands():
                    if isinstance(command, Persist):
                        await self._do(expert, command)
        if self._experts:
            await self._server.call_aside(self.files.close)

    def has(self, uid: str) -> bool:
        """Return whether it looks after this expert."""
        return uid in self._authorities

    def may_step(self, uid: str) -> bool:
        """Return whether a step of this expert may be taken, or answered, at this moment."""
        expert = self._experts.get(uid)
        return expert is None or (not self._closed and expert.tenure.is_primary(self._elapsed()))

    def primary(self, uid: str) -> PeerID | None:
        """Return the primary, if that is another server."""
        expert = self._experts.get(uid)
        primary = None if expert is None else expert.tenure.primary
        return None if primary == self._node.peer_id else primary

    def tenure(self, uid: str) -> Tenure:
        """Return the machine of one expert, to look at."""
        return self._experts[uid].tenure

    def _now(self) -> tuple[float, float]:
        return self._elapsed(), wall_clock()

    async def answer(self, hosted: HostedState, call: IncomingCall) -> Message:
        """Answer ``expert.tenure``. Raises: NotAllowed, ProtocolError."""
        request = messages.decode(messages.TenureRequest, call.body)
        expert = self._experts.get(hosted.uid)
        if expert is None:
            raise NotAllowed(f"{hosted.uid} is of no run here")
        if request.kind in ("prepare", "take_over"):
            agrees, proof = await self._take_over(expert, call.peer_id, request)
            return Message(messages.encode(messages.TenureReply(agrees, [0, 0], [b"", proof])))
        boot, term, seal = _check_records(request.records, 3)
        question = Question(request.kind, request.epoch, boot, term, seal)
        answer = expert.tenure.ask(call.peer_id, question, *self._now())
        await self._carry_out(expert)
        return Message(
            messages.encode(messages.TenureReply(answer.agrees, list(answer.held), [answer.term, answer.vote]))
        )

    async def _take_over(self, expert: _Expert, peer: PeerID, request: messages.TenureRequest) -> tuple[bool, bytes]:
        tenure = expert.tenure
        if tenure.primary != peer:
            raise NotAllowed(f"{peer.short} is not the primary of {expert.uid} here")
        nonce_or_signature, blob = _check_records(request.records, 2)
        if request.kind == "prepare":
            tenure.sight(blob, *self._now())
            await self._carry_out(expert)
            await expert.until(lambda tenure: tenure.held is not None and tenure.held.blob == blob, self._call_timeout)
            held = tenure.held
            if held is None or held.blob != blob:
                return False, b""
            return True, await self._possession(expert.uid, held, nonce_or_signature)
        took = tenure.take(nonce_or_signature, *self._now())
        await self._carry_out(expert)
        if took:
            await expert.until(lambda tenure: tenure.state is State.PRIMARY, self._call_timeout)
        return took, b""

    async def _possession(self, uid: str, seal: Seal, nonce: bytes) -> bytes:
        """Return the proof that this server has the file; empty if it does not."""
        file = self.files.find(uid, seal.root)
        return b"" if file is None else await self._server.call_aside(lambda: possession(file.map(), nonce))

    async def hand_over(self, uid: str) -> bool:
        """Give the expert to one of its successors. Returns whether one took it; it stays here otherwise."""
        expert = self._experts[uid]
        tenure = expert.tenure
        heirs = tenure.heirs(self._elapsed())
        if not heirs or not tenure.leave():
            return False
        signed = False
        try:
            await self._carry_out(expert)
            await self._server.calls.wait_backwards(uid)
            seal = await self._seal(expert)
            if seal is None:
                return False
            for heir in heirs:
                nonce = os.urandom(16)
                reply = await self._call(uid, heir, "prepare", [nonce, seal.blob], timeout=self._call_timeout)
                if reply is None or reply.records[1] != await self._possession(uid, seal, nonce):
                    logger.warning("%s could not be handed over to %s: it has not fetched the state", uid, heir.short)
                    continue
                if tenure.state is not State.YIELDING:
                    return False  # another has it meanwhile
                signature, signed = tenure.hand_over(heir), True
                await self._carry_out(expert)
                reply = await self._call(uid, heir, "take_over", [signature, b""], timeout=self._call_timeout)
                logger.info("%s was handed over to %s", uid, heir.short)
                await self._see_term_of(expert, heir)
                return reply is not None and reply.agrees
            return False
        finally:
            if not signed:
                tenure.keep(self._elapsed())
                await self._carry_out(expert)

    async def _see_term_of(self, expert: _Expert, heir: PeerID) -> None:
        """Ask for the successor's Term, so that this server names it to trainers."""
        best = expert.tenure.lineage.best
        records = [b"", b"" if best is None else best.blob, b""]
        reply = await self._call(expert.uid, heir, "probe", records, timeout=ASK_TIMEOUT, epoch=expert.tenure.epoch)
        if reply is not None:
            expert.tenure.sight(reply.records[0], *self._now())
        await self._carry_out(expert)

    async def _carry_out(self, expert: _Expert) -> None:
        """Carry out each command before the next: what is to be on disk is there before anything that depends on it."""
        async with expert.carrying:
            while commands := expert.tenure.commands():
                for command in commands:
                    await self._do(expert, command)
            expert.hosted.epoch = expert.tenure.epoch
        expert.changed.set()
        self._wake.set()

    async def _do(self, expert: _Expert, command: Command) -> None:
        match command:
            case Persist(stored):
                await self._server.call_aside(partial(self.files.remember, expert.uid, stored))
            case Publish(records):
                self._spawn(self._publish(expert.uid, records))
            case Send(peer, question):
                self._spawn(self._send(expert, peer, question))
            case Look():
                self._looks.add(expert.uid)
                self._wants_look.set()
            case Fetch():
                self._spawn(self._fetch(expert, command))
            case RoleChanged(is_primary, _):
                if is_primary != expert.hosted.is_primary:
                    self._node.metrics.count("experts_taken_over" if is_primary else "experts_given_up")
                await self._server.set_primary(expert.uid, is_primary, announce=False)
                self._wants_announcement.set()

    async def _send(self, expert: _Expert, peer: PeerID, asked: Question) -> None:
        sent, answer = self._elapsed(), None
        records = [asked.boot, asked.term, asked.seal]
        reply = await self._call(expert.uid, peer, asked.kind, records, timeout=ASK_TIMEOUT, epoch=asked.epoch)
        if reply is not None:
            answer = Response(reply.agrees, (reply.held[0], reply.held[1]), reply.records[0], reply.records[1])
        expert.tenure.answered(peer, asked, answer, sent, *self._now())
        await self._carry_out(expert)

    async def _call(
        self, uid: str, peer: PeerID, kind: str, records: list[bytes], *, timeout: float, epoch: int = 0
    ) -> messages.TenureReply | None:
        """Ask a peer. None if it does not answer, or not what was asked."""
        address = self._addresses.get(peer)
        if address is None:
            return None
        body = messages.encode(messages.TenureRequest(uid, kind, epoch, records))
        try:
            async with asyncio.timeout(timeout):
                reply = await self._node.call_expert(address, messages.TENURE, body, timeout=timeout, idempotent=True)
            decoded = messages.decode(messages.TenureReply, reply.body)
            _check_records(decoded.records, 2)
            if len(decoded.held) != 2 or any(type(part) is not int or part < 0 for part in decoded.held):
                raise ProtocolError("a malformed answer about who is primary")
            return decoded
        except (TesseractError, TimeoutError, OSError) as error:
            logger.debug("%s of %s at %s: %s", kind, uid, peer.short, describe(error))
            return None

    async def _fetch(self, expert: _Expert, command: Fetch) -> None:
        found = False
        try:
            found = await self._pull(expert, command)
        except (TesseractError, TimeoutError, OSError) as error:
            logger.info("the state of %s could not be fetched: %s", expert.uid, describe(error))
        expert.tenure.fetched(command, found, *self._now())
        await self._carry_out(expert)

    async def _pull(self, expert: _Expert, command: Fetch) -> bool:
        """Take the sealed state, from this server's own files or from others. False if it is not wanted any more.

        Raises: as `SealFetcher.fetch` and `check_fitting`; then nothing has changed.
        """
        uid, hosted, seal, aside = expert.uid, expert.hosted, command.seal, self._server.call_aside
        sources = [address for peer in command.sources if (address := self._addresses.get(peer)) is not None]
        file = await self._fetcher.fetch(uid, seal, sources, max_bytes=longest_state(hosted.backend))
        if command.check:
            return True
        state = await aside(lambda: check_fitting(uid, hosted.backend, file.map()))
        if expert.tenure.state not in (State.ABSENT, State.FOLLOWING, State.HOLDING, State.ASIDE):
            return False  # it was long on its way: this server has become the primary, or is about to
        await hosted.take(state, aside=command.aside)
        expert.progress = hosted.backend.progress
        await aside(partial(self.files.take_in, uid, file))
        self._node.metrics.count("states_pulled")
        return True

    async def _turn(self) -> None:
        """Let each machine act when it is due."""
        told_at = self._elapsed()
        while True:
            now = self._elapsed()
            if now - told_at >= AUTHORITY_PERIOD:
                told_at = now
                for expert in self._experts.values():
                    expert.tenure.authority_changed(*self._now())
                    await self._carry_out(expert)
                self._node.metrics.set(
                    "lineage_forks", sum(one.tenure.lineage.num_forks for one in self._experts.values())
                )
            due = min(expert.tenure.timer_at() for expert in self._experts.values())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(1.0, max(0.01, due - now))):
                    await self._wake.wait()
            self._wake.clear()
            await asyncio.sleep(0.02)  # one turn for all that came at once
            for expert in self._experts.values():
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
                logger.info("who is primary could not be read or published: %s", describe(error))
            await asyncio.sleep(0.05)

    async def _look_at_wanted(self) -> None:
        uids, self._looks = self._looks, set()
        await self.read(uids)

    async def read(self, uids: Iterable[str]) -> None:
        """Read who else hosts these, and their records. Raises: TimeoutError if the network does not answer."""
        async with asyncio.timeout(self._call_timeout):
            if self._node.initial_peers and not await self._node.network.wait_joined(self._call_timeout):
                return  # alone for the moment: that nobody is seen says nothing
            records: dict[str, list[bytes]] = {uid: [] for uid in uids}
            replicas = await read_replicas(self._node, records, records=records)
            if len({self._node.trust.shard_key(uid) for uid in records}) > MAX_SHARDS_READ:  # only the grid was read
                changed = [uid for uid, others in replicas.items() if self._has_changed(uid, others)]
                for uid, more in (await read_replicas(self._node, changed, by_shard=True, records=records)).items():
                    replicas[uid] += more
            for uid, others in replicas.items():
                expert = self._experts[uid]
                for record in records[uid]:
                    expert.tenure.sight(record, *self._now())
                self._addresses |= {owner_of(one): one.peer for one in others}
                hosts = {owner_of(one): one.epoch for one in others}
                expert.tenure.set_hosts(hosts | {self._node.peer_id: expert.tenure.epoch}, *self._now())
                expert.tenure.looked(*self._now())
                await self._carry_out(expert)

    def _has_changed(self, uid: str, others: Iterable[ExpertReplica]) -> bool:
        tenure = self._experts[uid].tenure
        return tenure.state not in (State.PRIMARY, State.FOLLOWING) or any(o.epoch != tenure.epoch for o in others)

    async def _publish(self, uid: str, records: Sequence[bytes]) -> None:
        """Store a Term, and its Seal if there is one, with this node's grant. What cannot be stored is logged."""
        key = self._node.trust.shard_key(uid)
        named = [(record_subkey(uid, number), record) for number, record in enumerate(records)]
        grant = self._node.trust.own_grant(split_uid(uid)[0])
        blob, until = self._shown.get(key, (b"", 0.0))
        if grant != blob or self._elapsed() >= until:
            # records outlive manifests: their readers must know that the signer might sign them
            self._shown[key] = grant, self._elapsed() + RECORDS_TTL / 2
            named += [(GRANT_SUBKEY, grant)] if grant else []
        for subkey, record in named:
            try:
                await self._node.network.store(key, record, ttl=RECORDS_TTL, subkey=subkey)
            except (TesseractError, TimeoutError, OSError) as error:
                logger.warning("a record of %s could not be stored: %s", uid, describe(error))

    async def _seal_often(self) -> None:
        """Seal what changed, every `sync_every` of the run; at once what has no Seal yet."""
        while True:
            await asyncio.sleep(0.1)
            for expert in self._experts.values():
                tenure, now = expert.tenure, self._elapsed()
                if not tenure.is_primary(now):
                    continue
                is_new = tenure.held is None or tenure.term is None or tenure.held.term != tenure.term.digest
                if is_new or now - expert.sealed_at >= expert.authority.sync_every:
                    if not is_new and tenure.is_content and expert.progress == expert.hosted.backend.progress:
                        expert.sealed_at = now  # a Seal would say nothing
                        continue
                    try:
                        await self._seal(expert)
                    except (CheckpointError, OSError) as error:
                        logger.error("%s could not be sealed: %s", expert.uid, describe(error))
                        expert.sealed_at = now

    async def _seal(self, expert: _Expert) -> Seal | None:
        """Write the state down, and sign for it."""
        uid, tenure, hosted, held = expert.uid, expert.tenure, expert.hosted, expert.tenure.held
        expert.sealed_at = self._elapsed()
        if held is None or expert.progress != hosted.backend.progress or self.files.find(uid, held.root) is None:
            state = await hosted.snapshot()

            file = await self._server.call_aside(lambda: self.files.keep(uid, encode(state)))
            root, size = file.root, file.size
            version = hosted.shared_version = int(state["version"])
            expert.progress = version, state["num_accumulated"]
        else:
            root, size, version = held.root, held.size, held.version
        seal = tenure.seal(root, size, version, *self._now())
        await self._carry_out(expert)
        return seal

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work, name="server: tenures")
        self._tasks.add(task)
        task.add_done_callback(self._end)

    def _end(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("an expert's tenure: %s", describe(error), exc_info=error)


def _check_records(records: list[bytes], num: int) -> list[bytes]:
    """Check that these are so many records of at most 1 KiB. Raises: ProtocolError."""
    if len(records) != num or any(type(one) is not bytes or len(one) > MAX_RECORD_BYTES for one in records):
        raise ProtocolError("malformed records about who is primary")
    return records
