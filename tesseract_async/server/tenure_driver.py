"""TenureDriver: carries out what the `Tenure` of an expert says, and answers others' questions about it."""

import asyncio
import contextlib
import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from random import Random
from typing import Final

from tesseract_async.endpoint.endpoint import IncomingCall, Message
from tesseract_async.errors import CheckpointError, NotAllowed, ProtocolError, TesseractError, describe
from tesseract_async.experts.grid import ExpertReplica
from tesseract_async.experts.manifest import split_uid
from tesseract_async.experts.places import Place
from tesseract_async.experts.tenure import BEATING
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
from tesseract_async.experts.terms import Seal, TermKind
from tesseract_async.identity import PeerID
from tesseract_async.server.hosted import HostedState
from tesseract_async.server.other_replicas import owner_of, wall_clock
from tesseract_async.server.records import Records
from tesseract_async.server.sealed_states import SealedStates
from tesseract_async.server.server import TesseractServer
from tesseract_async.server.state_transfer import StateSource
from tesseract_async.server.tenured import Tenured
from tesseract_async.tasks import TaskSet, in_time
from tesseract_async.transport.base import PeerAddress
from tesseract_async.wire import messages

logger = logging.getLogger(__name__)

MAX_ASKED: Final = 3
"""The most members that are asked for a newer state at a time."""
ASK_TIMEOUT: Final = 1.5
"""Seconds for a question about who is primary."""
MAX_RECORD_BYTES: Final = 1024


class TenureDriver:
    """Base of `Tenures`, which looks after all of a server's experts of runs."""

    def __init__(self, server: TesseractServer, *, call_timeout: float, elapsed: Callable[[], float]) -> None:
        """`elapsed` is that of `ReplicaKeeper`."""
        self._server, self._node = server, server.node
        self._call_timeout, self._elapsed = call_timeout, elapsed
        self._experts: dict[str, Tenured] = {}
        self.source: StateSource | None = None
        """Sends the states that are here only as files."""
        self.places: dict[str, Mapping[str, Mapping[PeerID, int]]] = {}
        """Prefix -> uid -> members that say they have its state, even if only as a file, and the epoch of that
        state."""
        self.on_primary: dict[str, Callable[[str], None]] = {}
        """Prefix -> called when this server becomes a candidate for an expert that is here only as a file, and when it
        leads it."""
        self.upload_rate: float | None = None
        """Bytes per second that the volunteer lends for sending; None without a limit."""
        self._boot, self._random = os.urandom(8), Random()
        self._addresses: dict[PeerID, PeerAddress] = {}  # of servers that were found to host one of the experts
        self.states = SealedStates(server, self._experts, self._addresses, call_timeout=call_timeout)
        self.files = self.states.files
        self.records = Records(
            self._node, self._experts, call_timeout=call_timeout, elapsed=elapsed, take_in=self._take_in
        )
        self._wants_announcement, self._wake = asyncio.Event(), asyncio.Event()
        self._tasks = TaskSet("server: tenures", on_error=_tell)
        self._closed = False

    def _now(self) -> tuple[float, float]:
        return self._elapsed(), wall_clock()

    async def answer(self, uid: str, call: IncomingCall) -> Message:
        """Answer ``expert.tenure``. Raises: NotAllowed, ProtocolError."""
        request = messages.decode(messages.TenureRequest, call.body)
        expert = self._experts.get(uid)
        if expert is None or self._closed:
            raise NotAllowed(f"{uid} is of no run here")
        if request.kind in ("prepare", "take_over"):
            agrees, proof = await self._take_over(expert, call.peer_id, request)
            return Message(messages.encode(messages.TenureReply(agrees, [0, 0], [b"", proof])))
        boot, term, seal = _check_records(request.records, 3)
        question = Question(request.kind, request.epoch, boot, term, seal)
        answer = expert.tenure.ask(call.peer_id, question, *self._now())
        await self._carry_out(expert)
        if not expert.tenure.may.write:
            raise NotAllowed(f"nothing is said about {uid} here: the disk does not take what must be remembered")
        return Message(
            messages.encode(messages.TenureReply(answer.agrees, list(answer.held), [answer.term, answer.vote]))
        )

    async def _take_over(self, expert: Tenured, peer: PeerID, request: messages.TenureRequest) -> tuple[bool, bytes]:
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
            can_be_primary = tenure.may.primary and tenure.may.write
            return can_be_primary, await self.states.possession(expert.uid, held, nonce_or_signature)
        took = tenure.take(nonce_or_signature, *self._now())
        await self._carry_out(expert)
        if took:
            await expert.until(lambda tenure: tenure.state is State.PRIMARY, self._call_timeout)
        return took, b""

    async def hand_over(self, uid: str, to: PeerID | None = None) -> bool:
        """Give the expert to one of its successors, or to this one. Returns whether one took it; it stays otherwise."""
        expert = self._experts[uid]
        tenure = expert.tenure
        # those that could not lead it come last
        heirs = sorted(tenure.heirs(self._elapsed()), key=lambda heir: heir in tenure.may.passive)
        heirs = [heir for heir in heirs if to in (None, heir)]
        if not heirs or not tenure.leave():
            return False
        signed = False
        try:
            until = self._elapsed() + expert.authority.lease  # nobody trains it meanwhile
            await self._carry_out(expert)
            await in_time(self._server.calls.wait_backwards(uid), expert.authority.lease)
            if self._elapsed() >= until or (seal := await self._seal(expert)) is None:
                return False
            for heir in heirs:
                if self._elapsed() >= until:
                    return False
                nonce = os.urandom(16)
                reply = await self._call(uid, heir, "prepare", [nonce, seal.blob], timeout=self._call_timeout)
                proof = await self.states.possession(uid, seal, nonce)
                has_state = reply is not None and reply.records[1] == proof
                if heir in tenure.may.passive:
                    if has_state:
                        return False  # nobody can lead it now, but who can next gets the last state from there
                    continue
                if reply is None or not (reply.agrees and has_state):
                    why = "it cannot lead it now" if has_state else "it has not fetched the state"
                    why = "it does not answer" if reply is None else why
                    logger.warning("%s could not be handed over to %s: %s", uid, heir.short, why)
                    continue
                if tenure.state is not State.YIELDING:
                    return False  # another has it meanwhile
                signature = tenure.hand_over(heir, self._elapsed())
                if signature is None:
                    return False  # nobody was in touch for long
                signed = True
                await self._carry_out(expert)
                if not tenure.may.write:
                    return False  # its disk does not know that it gave the expert away: its successors elect one
                reply = await self._call(uid, heir, "take_over", [signature, b""], timeout=self._call_timeout)
                logger.info("%s was handed over to %s", uid, heir.short)
                await self._see_term_of(expert, heir)
                return reply is not None and reply.agrees
            return False
        except (CheckpointError, OSError) as error:
            logger.error("%s could not be handed over: %s", uid, describe(error))
            return False
        finally:
            if not signed:
                tenure.keep(self._elapsed())
                await self._carry_out(expert)

    def look_for_newer(self, places: Mapping[PeerID, Place]) -> None:
        """Ask those that say they have a newer state than this server for its Seal: its signer may be gone, the network
        hears of few Seals, and the file of one that lies there may be nowhere any more."""
        for uid, expert in self._experts.items():
            held, best = expert.tenure.held, expert.tenure.lineage.best
            if expert.tenure.state not in (State.ABSENT, State.FOLLOWING, State.HOLDING):
                continue
            age, blob = ((0, 0), b"") if held is None else (held.age, held.blob)
            newer = [
                peer
                for peer, one in places.items()
                if (part := one.parts.get(uid)) and part.has_file and part.age > age and peer != self._node.peer_id
            ]
            question = Question("probe", expert.tenure.epoch, self._boot, b"" if best is None else best.blob, blob)
            # any, not the newest: who only says so must not keep it from the others
            for peer in self._random.sample(newer, min(MAX_ASKED, len(newer))):
                self._tasks.spawn(self._send(expert, peer, question))

    async def _see_term_of(self, expert: Tenured, heir: PeerID) -> None:
        """Ask for the successor's Term, so that this server names it to trainers."""
        best = expert.tenure.lineage.best
        records = [b"", b"" if best is None else best.blob, b""]
        reply = await self._call(expert.uid, heir, "probe", records, timeout=ASK_TIMEOUT, epoch=expert.tenure.epoch)
        if reply is not None:
            expert.tenure.sight(reply.records[0], *self._now())
        await self._carry_out(expert)

    async def _carry_out(self, expert: Tenured) -> None:
        """Carry out each command before the next: what is to be on disk is there before anything that depends on it."""
        async with expert.carrying:
            while commands := expert.tenure.commands():
                for command in commands:
                    await self._do(expert, command)
                self._prepare(expert)
            if expert.hosted is not None:
                expert.hosted.epoch = expert.tenure.epoch
        expert.changed.set()
        self._wake.set()

    async def _do(self, expert: Tenured, command: Command) -> None:
        match command:
            case Persist(stored):
                await self._remember(expert, stored)
            case Publish() | Send() if not expert.tenure.may.write:
                pass  # it is as if it were cut off: what it promised, or its state, is not on its disk
            case Publish(records, past):
                self._tasks.spawn(self.records.publish(expert.uid, dict(enumerate(records)) | dict(enumerate(past, 2))))
            case Send(peer, question):
                self._tasks.spawn(self._send(expert, peer, question))
            case Look():
                self.records.want(expert.uid)
            case Fetch():
                self._tasks.spawn(self._fetch(expert, command))
            case RoleChanged(is_primary, _) if expert.hosted is None:
                if is_primary:
                    self._node.metrics.count("experts_taken_over")
                    self.on_primary[split_uid(expert.uid)[0]](expert.uid)
            case RoleChanged(is_primary, _):
                term = expert.tenure.term
                if is_primary and term is not None and term.kind is TermKind.GENESIS and expert.waited_for:
                    logger.error("nobody came with a state of %s: it begins anew, from genesis", expert.uid)
                assert expert.hosted is not None
                if is_primary != expert.hosted.is_primary:
                    self._node.metrics.count("experts_taken_over" if is_primary else "experts_given_up")
                await self._server.set_primary(expert.uid, is_primary, announce=False)
                self._wants_announcement.set()

    def _prepare(self, expert: Tenured) -> None:
        """Build an expert that is here only as a file while this server is a candidate for it, to be ready in time."""
        before, expert.stands = expert.stands, expert.tenure.state is State.CANDIDATE
        if expert.stands and not before and expert.hosted is None and expert.tenure.held is not None:
            self.on_primary[split_uid(expert.uid)[0]](expert.uid)

    async def _remember(self, expert: Tenured, stored: bytes) -> None:
        """Write down what must be on the disk before anything else is said of the expert."""
        before, expert.unwritten = expert.unwritten, None
        try:
            await self._server.call_aside(partial(self.files.remember, expert.uid, stored))
        except OSError as error:
            expert.unwritten = stored
            if before is None:
                logger.error("%s: this server says nothing until its disk takes it: %s", expert.uid, describe(error))
        self._let_write(expert)

    def _let_write(self, expert: Tenured) -> None:
        """Tell the machine whether the disk takes what must be written before this server says anything about the
        expert."""
        is_silent = self._elapsed() < expert.silent_until and expert.tenure.state in BEATING
        expert.tenure.may.write = expert.unwritten is None and not is_silent

    async def _send(self, expert: Tenured, peer: PeerID, asked: Question) -> None:
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

    async def _fetch(self, expert: Tenured, command: Fetch) -> None:
        found, uid = False, expert.uid
        async with contextlib.AsyncExitStack() as stack:
            try:
                found = await self.states.pull(expert, command, stack)
            except (TesseractError, TimeoutError, OSError) as error:
                logger.info("the state of %s could not be fetched: %s", uid, describe(error))
            expert.tenure.fetched(command, found, *self._now())
        if self._experts.get(uid) is expert:
            await self._carry_out(expert)
        else:  # it was given up meanwhile
            await self._server.call_aside(partial(self.files.forget_parts, uid))

    async def _restore(self, expert: Tenured, hosted: HostedState, root: bytes) -> None:
        if await self.states.restore(expert, hosted, root):
            expert.tenure.restored(root, *self._now())
            await self._carry_out(expert)

    async def _take_in(self, uid: str, others: Iterable[ExpertReplica], records: Iterable[bytes]) -> None:
        """Take what the network holds of one expert."""
        if (expert := self._experts.get(uid)) is None:
            return
        for record in records:
            expert.tenure.sight(record, *self._now())
        self._addresses.update((owner_of(one), one.peer) for one in others)
        said = self.places.get(split_uid(uid)[0], {}).get(uid, {})
        hosts = {**said, **{owner_of(one): one.epoch for one in others}}
        expert.tenure.set_hosts(hosts | {self._node.peer_id: expert.tenure.epoch}, *self._now())
        expert.tenure.looked(*self._now())
        if expert.tenure.waits_for_state(*self._now()) and not expert.waited_for:
            expert.waited_for = True
            logger.warning("nobody has a state of %s now: this server waits for one that had it", uid)
        await self._carry_out(expert)

    async def _try_to_seal(self, expert: Tenured) -> None:
        """Seal the state. If the disk does not take it, the steps from now on are in nobody's file: a primary with
        successors falls silent, and they elect another, which goes on from the last Seal. Where nobody does within
        three leases, or there are none, it trains on, and tries again."""
        try:
            if expert.tenure.state in BEATING:
                await self._seal(expert)
            expert.is_unsealed, expert.silent_until = False, -math.inf
        except (CheckpointError, OSError) as error:
            now = expert.sealed_at = self._elapsed()
            if not expert.is_unsealed:
                expert.is_unsealed = True
                others = expert.tenure.members
                if others:  # later, what they have would be too old
                    expert.silent_until = now + 3 * expert.authority.lease
                what = "leaves it to its successors" if others else "trains on: what it trains now is lost if it dies"
                logger.error("%s could not be sealed, and this server %s: %s", expert.uid, what, describe(error))
        self._let_write(expert)
        await self._carry_out(expert)

    async def _seal(self, expert: Tenured) -> Seal | None:
        """Write the state down, and sign for it. Raises: CheckpointError, OSError."""
        expert.sealed_at = self._elapsed()
        root, size, version, progress = await self.states.write(expert)
        expert.silent_until = -math.inf  # the disk takes it
        self._let_write(expert)
        seal = expert.tenure.seal(root, size, version, *self._now())
        if seal is not None:
            expert.progress = progress
        await self._carry_out(expert)
        return seal


def _tell(error: BaseException) -> None:
    logger.error("an expert's tenure: %s", describe(error), exc_info=error)


def _check_records(records: list[bytes], num: int) -> list[bytes]:
    """Check that these are this many records of at most 1 KiB. Raises: ProtocolError."""
    if len(records) != num or any(type(one) is not bytes or len(one) > MAX_RECORD_BYTES for one in records):
        raise ProtocolError("malformed records about who is primary")
    return records
