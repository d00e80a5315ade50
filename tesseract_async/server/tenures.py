"""Drives the `Tenure`s of a server's experts of a run: carries their questions, writes down what they must remember,
reads and publishes their records, and moves the sealed files.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Coroutine, Iterable
from functools import partial
from random import Random
from typing import TYPE_CHECKING, Any, Final

from tesseract_async.endpoint.endpoint import IncomingCall, Message
from tesseract_async.errors import CheckpointError, NotAllowed, ProtocolError, TesseractError, describe
from tesseract_async.experts.authority import Authority
from tesseract_async.experts.claiming import GRANT_SUBKEY
from tesseract_async.experts.directory import read_claims
from tesseract_async.experts.grid import rank_replicas
from tesseract_async.experts.manifest import MAGIC, split_uid
from tesseract_async.experts.merkle import possession, root_of
from tesseract_async.experts.tenure import Tenure
from tesseract_async.experts.tenure_words import Answer, Ask, Fetch, Look, Persist, Publish, Role, Send, State
from tesseract_async.experts.terms import Seal
from tesseract_async.identity import PeerID
from tesseract_async.server import checkpoint
from tesseract_async.server.checkpoint import check_state, difference, largest_state
from tesseract_async.server.state_files import SealedFile, SealedFiles
from tesseract_async.server.state_transfer import MAX_STATE_BYTES, fetch_file
from tesseract_async.transport.base import PeerAddress
from tesseract_async.wire import messages

if TYPE_CHECKING:
    from tesseract_async.runtime.backend import ExpertBackend
    from tesseract_async.server.server import TesseractServer

logger = logging.getLogger(__name__)

ASK_TIMEOUT: Final = 1.5
"""Seconds for a question about who leads."""
RECORDS_TTL: Final = 24 * 3600.0
MAX_SHARDS_READ: Final = 16
"""For more uids than lie in so many shards, the grid is read, and the shards where it shows that something changed."""
LONGEST_SUBKEY: Final = 120


class _Expert:
    """One expert of a run, hosted here."""

    def __init__(self, uid: str, authority: Authority, tenure: Tenure) -> None:
        self.uid = uid
        self.authority = authority
        self.tenure = tenure
        self.carrying = asyncio.Lock()
        self.changed = asyncio.Event()
        """Set after every command; whoever waits for something looks again, and clears it."""
        self.progress: tuple[int, int] | None = None
        """How far the sealed file is."""
        self.sealed_at = -1e9


class TenureKeeper:
    """Leads and follows one server's experts of runs. `ReplicaKeeper` starts it, and asks it for those uids."""

    def __init__(
        self,
        server: TesseractServer,
        authorities: dict[str, Authority],
        *,
        call_timeout: float,
        clock: Callable[[], float],
        elapsed: Callable[[], float],
        random: Random | None = None,
    ) -> None:
        """`authorities`: uid -> its run's."""
        self._server = server
        self._node = server.node
        self._call_timeout = call_timeout
        self._clock, self._elapsed = clock, elapsed
        self._random = Random() if random is None else random
        self._authorities = authorities
        self._experts: dict[str, _Expert] = {}
        self._files = SealedFiles(server.checkpoint_dir)
        self._addresses: dict[PeerID, PeerAddress] = {}
        self._looks: set[str] = set()
        self._shown: dict[str, tuple[bytes, float]] = {}  # by key: the grant that lies there, and until when
        self._wants_look, self._wants_announcement, self._wake = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    @property
    def uids(self) -> Iterable[str]:
        """The experts that it looks after."""
        return self._authorities.keys()

    async def start(self) -> None:
        """Takes up what was left, and returns once each expert is led or followed here, or a while has passed."""
        boot = os.urandom(8)
        for uid, authority in self._authorities.items():
            stored = await self._server.call_aside(lambda uid=uid: self._files.load(uid))  # type: ignore[misc]
            make = partial(
                Tenure,
                self._node.identity,
                uid,
                authority,
                boot=boot,
                now=self._elapsed(),
                wall=self._clock(),
                stored=stored,
                random=self._random,
            )
            tenure = make(has_file=True)
            held = tenure.held
            if held is not None and held.primary != self._node.peer_id and self._files.find(uid, held.root) is None:
                tenure = make(has_file=False)  # its own state is in its checkpoints; another's is nowhere
            self._experts[uid] = _Expert(uid, authority, tenure)
        for work in (self._turn, self._look_often, self._announce_often, self._seal_often):
            self._spawn(work())
        for expert in self._experts.values():
            await self._carry_out(expert)
        settled = (State.LEADING, State.FOLLOWING, State.HOLDING)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._call_timeout):
                for expert in self._experts.values():
                    await self._until(expert, lambda tenure: tenure.state in settled)
                    # what it is, it also says
                    await self._until(expert, lambda tenure: self._is_said(tenure))

    def _is_said(self, tenure: Tenure) -> bool:
        return self._server.is_primary(tenure.uid) == (tenure.state is State.LEADING)

    async def look(self, uids: Iterable[str]) -> None:
        """Reads now who else hosts these. Raises: TimeoutError if the network does not answer."""
        async with asyncio.timeout(self._call_timeout):
            await self._look(set(uids))

    async def aclose(self) -> None:
        """Stops. Nothing is answered or led any more."""
        self._closed = True
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._experts:
            await self._server.call_aside(self._files.close)

    def may_step(self, uid: str) -> bool:
        """Whether a step of this expert may be taken, or answered, at this moment."""
        expert = self._experts.get(uid)
        return expert is None or (not self._closed and expert.tenure.leads(self._elapsed()))

    def epochs(self) -> dict[str, int]:
        """Return each expert's epoch."""
        return {uid: expert.tenure.epoch for uid, expert in self._experts.items()}

    def primary(self, uid: str) -> PeerID | None:
        """Who leads, if that is another server."""
        primary = self._experts[uid].tenure.primary
        return None if primary == self._node.peer_id else primary

    def tenure(self, uid: str) -> Tenure:
        """The machine of one expert, for those who look."""
        return self._experts[uid].tenure

    # -- questions of others -------------------------------------------------------------------------------------------

    async def answer(self, uid: str, backend: ExpertBackend, call: IncomingCall) -> Message:
        """Answers ``expert.tenure``. Raises: NotAllowed, ProtocolError."""
        request = messages.decode(messages.TenureRequest, call.body)
        expert = self._experts.get(uid)
        if expert is None:
            raise NotAllowed(f"{uid} is of no run here")
        tenure = expert.tenure
        if request.kind in ("take", "lead"):
            agrees, proof = await self._take_over(expert, call.peer_id, request)
            return Message(messages.encode(messages.TenureReply(agrees, [0, 0], [b"", proof])))
        boot, term, seal = _texts(request.records, 3)
        ask = Ask(request.kind, request.epoch, boot, term, seal)
        answer = tenure.ask(call.peer_id, ask, self._elapsed(), self._clock())
        await self._carry_out(expert)
        return Message(
            messages.encode(messages.TenureReply(answer.agrees, list(answer.held), [answer.term, answer.vote]))
        )

    async def _take_over(self, expert: _Expert, peer: PeerID, request: messages.TenureRequest) -> tuple[bool, bytes]:
        tenure = expert.tenure
        if tenure.primary != peer:
            raise NotAllowed(f"{peer.short} is not the primary of {expert.uid} here")
        nonce_or_signature, blob = _texts(request.records, 2)
        if request.kind == "take":
            tenure.sight(blob, self._elapsed(), self._clock())
            await self._carry_out(expert)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._call_timeout):
                    await self._until(expert, lambda tenure: tenure.held is not None and tenure.held.blob == blob)
            held = tenure.held
            if held is None or held.blob != blob:
                return False, b""
            data = await self._read(expert.uid, held)
            return True, b"" if data is None else possession(data, nonce_or_signature)
        took = tenure.take(nonce_or_signature, self._elapsed(), self._clock())
        await self._carry_out(expert)
        if took:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._call_timeout):
                    await self._until(expert, lambda tenure: tenure.state is State.LEADING)
        return took, b""

    def sealed(self, uid: str, digest: bytes) -> SealedFile | None:
        """The sealed file whose root begins so, for `StateSource`; None if it is not here."""
        return self._files.find(uid, digest) if uid in self._experts else None

    async def _read(self, uid: str, seal: Seal) -> bytes | None:
        file = self._files.find(uid, seal.root)
        return None if file is None else await self._server.call_aside(file.read)

    # -- handing over --------------------------------------------------------------------------------------------------

    async def hand_over(self, uid: str) -> bool:
        """Gives the expert to one of its successors; whether somebody took it. It stays here otherwise."""
        expert = self._experts[uid]
        tenure = expert.tenure
        heirs = tenure.heirs(self._elapsed())
        if not heirs or not tenure.leave():
            return False
        signed = False
        try:
            await self._carry_out(expert)
            await self._server.wait_backwards(uid)
            seal = await self._seal(expert)
            if seal is None:
                return False
            data = await self._read(uid, seal)
            for heir in heirs:
                nonce = os.urandom(16)
                reply = await self._call(uid, heir, "take", [nonce, seal.blob], timeout=self._call_timeout)
                if reply is None or data is None or reply.records[1] != possession(data, nonce):
                    logger.warning("%s could not be handed over to %s: it has not fetched the state", uid, heir.short)
                    continue
                if tenure.state is not State.YIELDING:
                    return False  # another has it meanwhile
                signature, signed = tenure.hand_over(heir), True
                await self._carry_out(expert)
                reply = await self._call(uid, heir, "lead", [signature, b""], timeout=self._call_timeout)
                logger.info("%s was handed over to %s", uid, heir.short)
                await self._until_known(expert, heir)
                return reply is not None and reply.agrees
            return False
        finally:
            if not signed:
                tenure.keep(self._elapsed())
                await self._carry_out(expert)

    async def _until_known(self, expert: _Expert, heir: PeerID) -> None:
        """Until this server has seen its successor's Term, so that it names it to trainers."""
        now, wall = self._elapsed(), self._clock()
        term = b"" if expert.tenure.lineage.best is None else expert.tenure.lineage.best.blob
        ask = Ask("probe", expert.tenure.epoch, b"", term, b"")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ASK_TIMEOUT):
                reply = await self._call(expert.uid, heir, ask.kind, [b"", term, b""], timeout=ASK_TIMEOUT)
                if reply is not None:
                    expert.tenure.sight(reply.records[0], now, wall)
        await self._carry_out(expert)

    # -- commands ------------------------------------------------------------------------------------------------------

    async def _carry_out(self, expert: _Expert) -> None:
        """Each before the next: what is to be on disk is there before anything that depends on it goes out."""
        async with expert.carrying:
            while commands := expert.tenure.commands():
                for command in commands:
                    await self._do(expert, command)
        expert.changed.set()
        self._wake.set()

    async def _do(self, expert: _Expert, command: Any) -> None:
        uid = expert.uid
        if isinstance(command, Persist):
            await self._server.call_aside(lambda: self._files.remember(uid, command.stored))
        elif isinstance(command, Publish):
            self._spawn(self._publish(expert, command))
        elif isinstance(command, Send):
            self._spawn(self._send(expert, command))
        elif isinstance(command, Look):
            self._looks.add(uid)
            self._wants_look.set()
        elif isinstance(command, Fetch):
            self._spawn(self._fetch(expert, command))
        elif isinstance(command, Role):
            if command.leads and not self._server.is_primary(uid):
                self._node.metrics.count("experts_taken_over")
            elif not command.leads and self._server.is_primary(uid):
                self._node.metrics.count("experts_given_up")
            await self._server.set_primary(uid, command.leads, announce=False)
            self._wants_announcement.set()

    async def _publish(self, expert: _Expert, command: Publish) -> None:
        key = self._node.trust.shard_key(expert.uid)
        named = [(_subkey(expert.uid, number), record) for number, record in enumerate(command.records)]
        grant = self._node.trust.own_grant(split_uid(expert.uid)[0])
        blob, until = self._shown.get(key, (b"", 0.0))
        if grant != blob or self._elapsed() >= until:
            # records outlive manifests: who reads them later must know that their signer might sign them
            self._shown[key] = grant, self._elapsed() + RECORDS_TTL / 2
            named += [(GRANT_SUBKEY, grant)] if grant else []
        for subkey, record in named:
            try:
                await self._node.network.store(key, record, ttl=RECORDS_TTL, subkey=subkey)
            except (TesseractError, TimeoutError, OSError) as error:
                logger.warning("a record of %s could not be stored: %s", expert.uid, describe(error))

    async def _send(self, expert: _Expert, command: Send) -> None:
        ask, sent = command.ask, self._elapsed()
        records = [ask.boot, ask.term, ask.seal]
        reply = await self._call(expert.uid, command.peer, ask.kind, records, timeout=ASK_TIMEOUT, epoch=ask.epoch)
        now, wall = self._elapsed(), self._clock()
        if reply is None:
            expert.tenure.silent(command.peer, ask, now, wall)
        else:
            answer = Answer(reply.agrees, (reply.held[0], reply.held[1]), reply.records[0], reply.records[1])
            expert.tenure.answered(command.peer, ask, answer, sent, now, wall)
        await self._carry_out(expert)

    async def _call(
        self, uid: str, peer: PeerID, kind: str, records: list[bytes], *, timeout: float, epoch: int = 0
    ) -> messages.TenureReply | None:
        """None if nobody answers there, or not what was asked."""
        address = self._addresses.get(peer)
        if address is None:
            return None
        body = messages.encode(messages.TenureRequest(uid, kind, epoch, records))
        try:
            async with asyncio.timeout(timeout):
                reply = await self._node.call_expert(address, messages.TENURE, body, timeout=timeout, idempotent=True)
            decoded = messages.decode(messages.TenureReply, reply.body)
            _texts(decoded.records, 2)
            if len(decoded.held) != 2 or any(type(part) is not int or part < 0 for part in decoded.held):
                raise ProtocolError("a malformed answer about who leads")
            return decoded
        except (TesseractError, TimeoutError, OSError) as error:
            logger.debug("%s of %s at %s: %s", kind, uid, peer.short, describe(error))
            return None

    async def _fetch(self, expert: _Expert, command: Fetch) -> None:
        uid, seal, tenure = expert.uid, command.seal, expert.tenure
        done = False
        for source in command.sources:
            try:
                if (address := self._addresses.get(source)) is not None:
                    await self._install(expert, command, address)
                    done = True
                    break
            except (TesseractError, TimeoutError, OSError) as error:
                logger.info("the state of %s at %s: %s", uid, source.short, describe(error))
        if done:
            self._node.metrics.count("states_pulled")
            tenure.fetched(seal, self._elapsed(), self._clock())
        else:
            tenure.not_fetched(seal)
        await self._carry_out(expert)

    async def _install(self, expert: _Expert, command: Fetch, source: PeerAddress) -> None:
        """Raises: ProtocolError, CheckpointError and what the call raises; then everything is as before."""
        uid, seal, backend = expert.uid, command.seal, self._server.experts[expert.uid]
        limit = min(MAX_STATE_BYTES, largest_state(backend))
        if seal.size > limit:
            raise ProtocolError(f"{uid}: a state of {seal.size} bytes; at most {limit} are fetched")
        data = await fetch_file(self._node, source, uid, root=seal.root, max_bytes=limit, timeout=self._call_timeout)

        def check() -> Any:
            if data is None or len(data) != seal.size or root_of(data) != seal.root:
                raise ProtocolError(f"{uid}: not the file that was sealed")
            return check_state(uid, data)

        state = await self._server.call_aside(check)
        if (wrong := difference(uid, backend, state)) is not None:
            raise CheckpointError(wrong)
        await self._server.hosted[uid].take(state, aside=command.aside)
        expert.progress = backend.progress
        assert data is not None
        await self._server.call_aside(lambda: self._files.keep(uid, seal.root, data))

    # -- in the background ---------------------------------------------------------------------------------------------

    async def _turn(self) -> None:
        """Lets each machine act when it is due."""
        told_at = self._elapsed()
        while True:
            now = self._elapsed()
            if now - told_at >= 2.0:  # grants, revocations and appointments come by themselves
                told_at = now
                for expert in self._experts.values():
                    expert.tenure.authority_changed(now, self._clock())
                    await self._carry_out(expert)
                self._node.metrics.set("lineage_forks", sum(e.tenure.num_forks for e in self._experts.values()))
            due = min(expert.tenure.timer_at() for expert in self._experts.values())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(1.0, max(0.01, due - now))):
                    await self._wake.wait()
            self._wake.clear()
            await asyncio.sleep(0.02)  # one turn for all that came at once
            for expert in list(self._experts.values()):
                if self._elapsed() >= expert.tenure.timer_at():
                    expert.tenure.handle_timer(self._elapsed(), self._clock())
                    await self._carry_out(expert)

    async def _look_often(self) -> None:
        while True:
            await self._wants_look.wait()
            self._wants_look.clear()
            uids, self._looks = self._looks, set()
            try:
                async with asyncio.timeout(self._call_timeout):
                    await self._look(uids)
            except (TesseractError, TimeoutError, OSError) as error:
                logger.info("could not read who leads: %s", describe(error))
            await asyncio.sleep(0.05)

    async def _look(self, uids: set[str]) -> None:
        network = self._node.network
        if self._node.initial_peers and not await network.wait_joined(self._call_timeout):
            return  # alone for the moment: that nobody is seen says nothing
        trust, now = self._node.trust, self._clock()
        hosts: dict[str, dict[PeerID, int]] = {uid: {} for uid in uids}
        grid = {trust.grid_key(split_uid(uid)[0]): split_uid(uid)[0] for uid in uids}
        shards = {trust.shard_key(uid) for uid in uids}
        if len(shards) > MAX_SHARDS_READ:
            for key, prefix in grid.items():
                await self._read_hosts(await network.get_entries(key), prefix, hosts)
            changed = {uid for uid in uids if self._has_changed(uid, hosts[uid])}
            shards = {trust.shard_key(uid) for uid in changed}
        subkeys = {_subkey(uid, number): uid for uid in uids for number in (0, 1)}
        for key in shards:
            entries = await network.get_entries(key)
            for prefix in grid.values():
                await self._read_hosts(entries, prefix, hosts)
            for entry in entries:
                if entry.subkey == GRANT_SUBKEY and type(entry.value) is bytes:
                    trust.introduced(entry.owner, [entry.value])
            for entry in entries:
                if entry.expiration > now and type(entry.value) is bytes and entry.subkey in subkeys:
                    uid = subkeys[entry.subkey]
                    # what others store costs no signature check
                    if not entry.value.startswith(MAGIC) and trust.may_host(entry.owner, uid):
                        self._experts[uid].tenure.sight(entry.value, self._elapsed(), self._clock())
        for uid in uids:
            expert = self._experts[uid]
            mine = {self._node.peer_id: expert.tenure.epoch}
            expert.tenure.set_hosts(hosts[uid] | mine, self._elapsed(), self._clock())
            expert.tenure.looked(self._elapsed(), self._clock())
            await self._carry_out(expert)

    def _has_changed(self, uid: str, hosts: dict[PeerID, int]) -> bool:
        tenure = self._experts[uid].tenure
        return tenure.state not in (State.LEADING, State.FOLLOWING) or any(e != tenure.epoch for e in hosts.values())

    async def _read_hosts(self, entries: Iterable[Any], prefix: str, hosts: dict[str, dict[PeerID, int]]) -> None:
        others = [e for e in entries if e.owner != self._node.peer_id and _is_manifest(e.value)]
        claims = await read_claims(
            others,
            prefix=prefix,
            now=self._clock(),
            trust=self._node.trust,
            scope=self._node.scope,
        )
        for uid in hosts:
            for claim in claims:
                for row in claim.rows_of(split_uid(uid)[1]):
                    epochs = claim.manifest.epochs
                    hosts[uid][claim.owner] = 0 if epochs is None else int(epochs[row])
                    (replica,) = rank_replicas([claim.replica(prefix, row)])
                    self._addresses[claim.owner] = replica.peer

    async def _announce_often(self) -> None:
        while True:
            await self._wants_announcement.wait()
            self._wants_announcement.clear()
            try:
                await self._server.announce()
            except (TesseractError, TimeoutError, OSError) as error:
                logger.info("the new roles could not be published yet: %s", describe(error))
            await asyncio.sleep(0.05)

    async def _seal_often(self) -> None:
        """Seals what changed, every `sync_every` of the run; at once what has no Seal yet."""
        while True:
            await asyncio.sleep(0.1)
            for expert in list(self._experts.values()):
                tenure, now = expert.tenure, self._elapsed()
                if not tenure.leads(now):
                    continue
                is_new = tenure.held is None or tenure.term is None or tenure.held.term != tenure.term.digest
                if is_new or now - expert.sealed_at >= expert.authority.sync_every:
                    if not is_new and tenure.is_content and expert.progress == self._progress(expert.uid):
                        expert.sealed_at = now  # a Seal would say nothing
                        continue
                    try:
                        await self._seal(expert)
                    except (CheckpointError, OSError) as error:
                        logger.error("%s could not be sealed: %s", expert.uid, describe(error))
                        expert.sealed_at = now

    def _progress(self, uid: str) -> tuple[int, int]:
        return self._server.experts[uid].progress

    async def _seal(self, expert: _Expert) -> Seal | None:
        """Writes the state down, and signs for it."""
        uid, tenure, backend = expert.uid, expert.tenure, self._server.experts[expert.uid]
        held, progress = tenure.held, backend.progress
        expert.sealed_at = self._elapsed()
        if held is None or expert.progress != progress or self._files.find(uid, held.root) is None:
            hosted = self._server.hosted[uid]
            state = await hosted.snapshot()

            def write() -> tuple[bytes, int]:
                data = b"".join(checkpoint.encode(state))
                root = root_of(data)
                self._files.keep(uid, root, data)
                return root, len(data)

            root, size = await self._server.call_aside(write)
            version, expert.progress = int(state["version"]), (state["version"], state["num_accumulated"])
            hosted.shared_version = version
        else:
            root, size, version = held.root, held.size, held.version
        seal = tenure.seal(root, size, version, self._elapsed(), self._clock())
        await self._carry_out(expert)
        return seal

    async def _until(self, expert: _Expert, condition: Callable[[Tenure], bool]) -> None:
        while not condition(expert.tenure):
            expert.changed.clear()
            await expert.changed.wait()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work, name="server: tenures")
        self._tasks.add(task)
        task.add_done_callback(self._end)

    def _end(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("an expert's tenure: %s", describe(error), exc_info=error)


def _is_manifest(value: Any) -> bool:
    return type(value) is bytes and value.startswith(MAGIC)


def _subkey(uid: str, number: int) -> str:
    return f"{'ts'[number > 0]}.{uid}"[:LONGEST_SUBKEY]


def _texts(records: list[Any], num: int) -> list[bytes]:
    if len(records) != num or any(type(record) is not bytes or len(record) > 1024 for record in records):
        raise ProtocolError("malformed records about who leads")
    return records
