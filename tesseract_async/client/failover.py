"""One exchange with an expert that several servers host: which of them is asked, and which next if that one fails."""

import asyncio
from collections.abc import Coroutine, Iterable, Sequence
from typing import Final, TypeVar

import torch

from tesseract_async.client.exchanges import BackwardExchange, Exchange
from tesseract_async.client.experience import Experience, replica_key
from tesseract_async.client.expert_rpc import fetch_info
from tesseract_async.client.grouping import REPLICA_FAULTS, may_pass
from tesseract_async.client.latency import ABANDON_SECONDS, BLOCK_SECONDS
from tesseract_async.errors import (
    ConnectionLost,
    NotAllowed,
    NotPrimary,
    Overloaded,
    PeerUnreachable,
    SchemaMismatch,
    TesseractError,
    TooStale,
)
from tesseract_async.experts.grid import ExpertReplica
from tesseract_async.experts.manifest import split_uid
from tesseract_async.tasks import end
from tesseract_async.transport.base import PeerAddress

T = TypeVar("T")

_REASONS: Final = ("unreachable", "lost", "protocol", "not_found", "not_found", "silent")
_MAX_HANDOVERS: Final = 5
HEDGE_SECONDS: Final = 0.75
"""Seconds after which the next replica is asked, where it is not known how long the first may take."""
_PROBE_SECONDS: Final = 2.0
"""Seconds after which a server that has not even answered a small question counts as silent, if another one has."""


def ask_best(
    experience: Experience, replicas: Sequence[ExpertReplica], exchange: Exchange[T], *, timeout: float
) -> Coroutine[object, object, T]:
    """Ask the replica that is expected to answer first; the others when it fails, or is slower than 95 % of its calls.

    The first answer counts, the calls still under way are cancelled. Silent and broken replicas are reported to the
    directory, and so are those that refuse, with SchemaMismatch, what another one answers.

    Raises: the first error if none answers; at once an error that another replica would repeat (the expert's own);
    TimeoutError.
    """
    if len(replicas) == 1:
        return _ask(experience, replicas[0], exchange, timeout)
    return _ask_several(experience, replicas, exchange, timeout)


async def _ask_several(
    experience: Experience, replicas: Sequence[ExpertReplica], exchange: Exchange[T], timeout: float
) -> T:
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout
    queue = experience.by_expectation(replicas, loop.time(), exchange.num_bytes)
    tasks: dict[asyncio.Task[T], ExpertReplica] = {}
    strange: list[tuple[ExpertReplica, SchemaMismatch]] = []
    first_error: BaseException | None = None
    try:
        while queue or tasks:
            now = loop.time()
            if now >= deadline:
                break
            hedge_at = deadline
            if queue:
                # one more under way than before: at the start, after a failure, or because the last one is slow
                replica = queue.pop(0)
                tasks[loop.create_task(_ask(experience, replica, exchange, deadline - now))] = replica
                if queue:
                    p95 = experience.latencies.p95(replica_key(replica))
                    hedge_at = now + (HEDGE_SECONDS if p95 is None else p95)
            while tasks:
                wait_until = hedge_at if queue else deadline + ABANDON_SECONDS
                done, _ = await asyncio.wait(
                    tasks, timeout=max(0.0, wait_until - loop.time()), return_when=asyncio.FIRST_COMPLETED
                )
                for task in done:
                    replica = tasks.pop(task)
                    error = task.exception()
                    if error is None:
                        for other, mismatch in strange:
                            experience.ignore(other, mismatch)
                        return task.result()
                    if isinstance(error, SchemaMismatch):
                        strange.append((replica, error))
                    elif not may_pass(error):
                        raise error
                    first_error = first_error or error
                if queue and (done or loop.time() >= hedge_at):
                    break
                if not done and loop.time() >= wait_until:
                    break
        raise first_error or TimeoutError(f"no replica answered within {timeout} s")
    finally:
        await end(*tasks)


async def ask_primary(
    experience: Experience, replicas: Sequence[ExpertReplica], exchange: BackwardExchange, *, timeout: float
) -> list[torch.Tensor | None]:
    """Ask the primary, and the next primary when that one fails: for calls that are safe to repeat elsewhere.

    `replicas` are those known, the primary first; after a failure they are looked up anew. A server that is full is
    asked again when it said. A follower names the primary. A primary that keeps silent where others claim the expert,
    too, is given up as soon as it does not even answer a question that another one answers.

    Raises: the first error if none answers; TimeoutError.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout
    first_error: Exception | None = None
    strange: set[PeerAddress] = set()
    redirected: set[object] = set()
    for _ in range(_MAX_HANDOVERS):
        time_left = deadline - loop.time()
        if strange:
            replicas = [replica for replica in replicas if replica.peer not in strange]
        if time_left <= 0 or not replicas:
            break
        try:
            asking = _ask(experience, replicas[0], exchange, time_left)
            if len(replicas) == 1:
                return await asking
            rivals = [replicas[0], *(replica for replica in replicas[1:] if replica.primary)]
            return await watched(experience, asking, rivals, rivals[:1])
        except SchemaMismatch as error:
            first_error = first_error or error
            strange.add(replicas[0].peer)
            replicas = replicas[1:]
            continue
        except (*REPLICA_FAULTS, NotAllowed, TooStale) as error:
            first_error = first_error or error
        except (Overloaded, NotPrimary) as error:
            first_error = first_error or error
            pause = max(error.retry_after, BLOCK_SECONDS)
            if isinstance(error, NotPrimary):
                named = [one for one in replicas[1:] if one.peer.peer_id == error.primary]
                if named and error.primary not in redirected:
                    # only if the directory knows it, so that a server that lies can't send anybody to strangers
                    redirected.add(error.primary)
                    replicas = [*named, *(one for one in replicas if one not in named)]
                    continue
                redirected.clear()
            if loop.time() + pause >= deadline:
                break
            await asyncio.sleep(pause)
        try:
            async with asyncio.timeout_at(deadline):
                replicas = await experience.node.directory.find(exchange.forward.uid)
        except (TesseractError, TimeoutError):
            break
    raise first_error or TimeoutError(f"no answer within {timeout} s")


async def watched(
    experience: Experience,
    asking: Coroutine[object, object, T],
    rivals: Sequence[ExpertReplica],
    unanswered: Iterable[ExpertReplica],
) -> T:
    """Await `asking`, which asks the server of the first of `rivals`. If it takes long, and other servers say that they
    are the primary, too, all of these are asked a small question at once: those that are silent then, where another one
    speaks, are reported, and if the first is one of them, it is not waited for any more. Those that are still
    `unanswered` when this is cancelled count as late."""
    if len(rivals) < 2 or all(replica.peer == rivals[0].peer for replica in rivals):
        return await asking
    call = asyncio.ensure_future(asking)
    probes: list[asyncio.Task[bool]] = []
    try:
        await asyncio.wait([call], timeout=HEDGE_SECONDS)
        if not call.done():
            servers = list({replica.peer: replica for replica in rivals}.values())
            probes = [asyncio.ensure_future(_speaks(experience, replica)) for replica in servers]
            answering = asyncio.gather(*probes)
            waiting: set[asyncio.Future[T] | asyncio.Future[list[bool]]] = {call, answering}
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if not call.done():
                speak = dict(zip((replica.peer for replica in servers), answering.result(), strict=True))
                for replica in rivals:
                    if any(speak.values()) and not speak[replica.peer]:
                        experience.node.directory.report_failure(replica, reason="silent")
                if any(speak.values()) and not speak[rivals[0].peer]:
                    raise TimeoutError(f"{rivals[0].uid} is silent at the server that claims to be its primary")
        return await call
    except asyncio.CancelledError:
        for replica in unanswered:
            experience.node.directory.report_late(replica)
        raise
    finally:
        await end(call, *probes)


async def _speaks(experience: Experience, replica: ExpertReplica) -> bool:
    try:
        async with asyncio.timeout(_PROBE_SECONDS):
            await fetch_info(experience.node, replica.uid, replica.peer, timeout=_PROBE_SECONDS)
    except (TimeoutError, PeerUnreachable, ConnectionLost):
        return False
    except TesseractError:
        pass
    return True


async def _ask(experience: Experience, replica: ExpertReplica, exchange: Exchange[T], timeout: float) -> T:
    now, book, key = asyncio.get_running_loop().time, experience.latencies, (replica.uid, replica.peer.peer_id)
    start = now()
    try:
        result = await exchange.send(replica, timeout)
        exchange.answered(replica, result, timeout)
    except (*REPLICA_FAULTS, Overloaded, NotPrimary) as error:
        report(experience, replica, error)
        raise
    except asyncio.CancelledError:
        path = experience.path_seconds(replica, exchange.num_bytes)
        if exchange.is_timed and now() - start > (book.expected(key, path=path) or 0.0):
            book.observe(key, now() - start, path=path, answered=False)  # it would have taken at least this long
        raise
    if exchange.is_timed:
        book.observe(key, now() - start, path=experience.path_seconds(replica, exchange.num_bytes))
    if any(exchange.gives):
        experience.node.thanks.add(split_uid(replica.uid)[0], replica.peer.peer_id, *exchange.gives)
    experience.node.directory.report_answer(replica)
    return result


def report(experience: Experience, replica: ExpertReplica, error: BaseException) -> None:
    """Learn from a replica's failure: tell the directory, or prefer others for a while."""
    if isinstance(error, NotPrimary):  # another leads, or will in a moment: what is remembered of the expert lacks that
        experience.node.directory.report_outdated(replica.uid)
        return
    if isinstance(error, Overloaded):
        until = asyncio.get_running_loop().time() + max(error.retry_after, BLOCK_SECONDS)
        experience.latencies.block(replica_key(replica), until)
        return
    reason = next((r for fault, r in zip(REPLICA_FAULTS, _REASONS, strict=True) if isinstance(error, fault)), None)
    if reason is not None:
        experience.node.directory.report_failure(replica, reason=reason)
