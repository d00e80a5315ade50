"""One call to an expert that several servers host: which of them is asked, and whom else when it is slow or gone."""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections.abc import Awaitable, Callable, Collection, Coroutine, Sequence
from typing import Any, TypeVar

from tesseract_async.client.audits import Audits
from tesseract_async.client.expert_calls import fetch_version
from tesseract_async.client.latency import LatencyBook, path_seconds
from tesseract_async.client.left_out import LeftOut
from tesseract_async.client.limits import Limits
from tesseract_async.client.ports import Node, PlainCalls
from tesseract_async.client.stalls import Stalls
from tesseract_async.errors import (
    ConnectionLost,
    ExpertNotFound,
    NotAllowed,
    NotPrimary,
    Overloaded,
    PeerUnreachable,
    ProtocolError,
    RemoteError,
    SchemaMismatch,
    TesseractError,
    TooStale,
)
from tesseract_async.metrics import Metrics
from tesseract_async.uncopied import Uncopied

T = TypeVar("T")

logger = logging.getLogger(__name__)

Attempt = Callable[[Any, float], Awaitable[T]]
"""``attempt(peer, seconds)``: one call to one server."""

# Errors that say something about a replica, not about the request: it is masked until its next sign of life.
REPLICA_FAULTS = (PeerUnreachable, ConnectionLost, ProtocolError, ExpertNotFound, TimeoutError)

GRACE_SECONDS = 0.5
"""A call that outlives its time-out by this much is abandoned."""
BLOCK_SECONDS = 0.1
_MAX_HANDOVERS = 5
_MAX_IGNORED = 256
_HEDGE_SECONDS = 0.75
"""Where it is not known how long a replica may take, the next one is asked after so long."""
_PROBE_SECONDS = 2.0
"""A server that has not even answered a question by then, where another has, counts as silent."""
_REASONS = {
    PeerUnreachable: "unreachable",
    ConnectionLost: "lost",
    ProtocolError: "protocol",
    ExpertNotFound: "not_found",
    TimeoutError: "silent",
}


class _OfNode:
    """What all modules of one node share: what its calls have taught about replicas, and the guard of their ends."""

    def __init__(self, metrics: Metrics) -> None:
        self.audits = Audits()
        self.latencies = LatencyBook()
        self.limits = Limits()
        self.stalls = Stalls()
        self.left_out = LeftOut(metrics)
        self.ignored: dict[Any, None] = {}


_of_nodes: weakref.WeakKeyDictionary[Node, _OfNode] = weakref.WeakKeyDictionary()


class Shared(Uncopied):
    """What copies of a module share: a node has sockets, so ``copy.deepcopy`` of a module must not copy it."""

    _called = "a remote expert or a gate"

    def ignore(self, replica: Any, mismatch: SchemaMismatch) -> None:
        """A replica hosts something else under its uid than what others answer for. One line for each server."""
        peer = getattr(replica.peer, "peer_id", None) or replica.peer
        if peer not in self.ignored:
            logger.warning(
                "ignoring the replica of %s at %s (and others there), which takes something else than the primary: %s",
                replica.uid,
                getattr(peer, "short", peer),
                mismatch,
            )
            self.ignored[peer] = None
            if len(self.ignored) > _MAX_IGNORED:
                del self.ignored[next(iter(self.ignored))]
        self.node.directory.report_failure(replica, reason="schema")

    def are_new(self, replicas: Sequence[Any]) -> bool:
        """Whether none of `replicas` was ever called."""
        return all(self.latencies.is_new(_key(replica)) for replica in replicas)

    def __init__(self, node: Any) -> None:
        """`node`: a `Node`, or one that gives plain calls."""
        self._plain = node if isinstance(node, PlainCalls) else None
        self.node: Node = node.node if isinstance(node, PlainCalls) else node
        if (ours := _of_nodes.get(self.node)) is None:
            ours = _of_nodes[self.node] = _OfNode(self.node.metrics)
        self.audits = ours.audits
        self.latencies = ours.latencies
        self.limits = ours.limits
        self.stalls = ours.stalls
        self.left_out = ours.left_out
        self.ignored = ours.ignored

    def check(self) -> None:
        """Raises: RuntimeError if no call can be made (from here), before a coroutine is made in vain."""
        if self._plain is not None:
            self._plain.check()
        self.node.check_running()

    def deliver(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """What a module's call returns: the coroutine, to be awaited, or its result where calls are plain."""
        return coroutine if self._plain is None else self._plain.run(coroutine)

    def path_seconds(self, replica: Any, num_bytes: float) -> float:
        """Seconds that `num_bytes`, both ways together, are on their way to and from this replica."""
        return path_seconds(self.node.path(replica.peer), num_bytes)

    def usual(self, replicas: Sequence[Any], *, num_bytes: float = 0) -> float | None:
        """Seconds that the fastest of `replicas` usually takes for a forward; None if none ever answered."""
        known = [
            seconds
            for r in replicas
            if (seconds := self.latencies.usual(_key(r), path=self.path_seconds(r, num_bytes))) is not None
        ]
        return min(known, default=None)


def ask_best(
    shared: Shared,
    replicas: Sequence[Any],
    attempt: Attempt[T],
    *,
    timeout: float,
    observed: bool = True,
    num_bytes: float = 0,
) -> Coroutine[Any, Any, T]:
    """Asks the replica that is expected to answer first; the others when it fails, or is slower than 95 % of its calls.

    The first answer counts, the calls still under way are cancelled. Silent and broken replicas are reported to the
    directory, and those that refuse as SchemaMismatch what another one answers: they host something else under this
    uid. How long it took is remembered if `observed`. `num_bytes` travel, both ways together.

    Raises: the first error if none answers; at once an error that another replica would repeat (the expert's own);
    TimeoutError.
    """
    if len(replicas) == 1:
        return _ask(shared, replicas[0], attempt, timeout, observed=observed, num_bytes=num_bytes)
    return _ask_several(shared, replicas, attempt, timeout, observed=observed, num_bytes=num_bytes)


async def _ask_several(
    shared: Shared,
    replicas: Sequence[Any],
    attempt: Attempt[T],
    timeout: float,
    *,
    observed: bool,
    num_bytes: float,
) -> T:
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout
    queue = _by_expectation(shared, replicas, loop.time(), num_bytes)
    tasks: dict[asyncio.Task[T], Any] = {}
    strange: dict[Any, SchemaMismatch] = {}
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
                asking = _ask(shared, replica, attempt, deadline - now, observed=observed, num_bytes=num_bytes)
                tasks[loop.create_task(asking)] = replica
                if queue:
                    p95 = shared.latencies.p95(_key(replica))
                    hedge_at = now + (_HEDGE_SECONDS if p95 is None else p95)
            while tasks:
                wait_until = hedge_at if queue else deadline + GRACE_SECONDS
                done, _ = await asyncio.wait(
                    tasks, timeout=max(0.0, wait_until - loop.time()), return_when=asyncio.FIRST_COMPLETED
                )
                for task in done:
                    replica = tasks.pop(task)
                    error = task.exception()
                    if error is None:
                        for other, mismatch in strange.items():
                            shared.ignore(other, mismatch)
                        return task.result()
                    if isinstance(error, SchemaMismatch):
                        strange[replica] = error
                    elif not may_pass(error):
                        raise error
                    first_error = first_error or error
                if queue and (done or loop.time() >= hedge_at):
                    break
                if not done and loop.time() >= wait_until:
                    break
        raise first_error or TimeoutError(f"no replica answered within {timeout} s")
    finally:
        await cancel_all(tasks)


async def ask_primary(
    shared: Shared,
    replicas: Sequence[Any],
    find: Callable[[], Awaitable[Sequence[Any]]],
    attempt: Attempt[T],
    *,
    timeout: float,
) -> T:
    """Asks the primary, and whoever is primary then when that one fails: for calls that are safe to repeat elsewhere.

    `replicas` are those known, the primary first; `find` looks them up anew. A full one is asked again when it said.
    One that only follows names the primary. One that keeps silent where others claim the expert, too, is given up as
    soon as it does not even answer a question that another one answers. Raises: the first error if none answers;
    TimeoutError.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout
    first_error: Exception | None = None
    strange: dict[Any, SchemaMismatch] = {}
    redirected: set[Any] = set()
    for _ in range(_MAX_HANDOVERS):
        left = deadline - loop.time()
        replicas = [replica for replica in replicas if replica.peer not in strange]
        if left <= 0 or not replicas:
            break
        try:
            result = await _ask_watched(shared, replicas, attempt, left)
        except SchemaMismatch as error:
            first_error = first_error or error
            strange[replicas[0].peer] = error
            replicas = replicas[1:]
            continue
        except (*REPLICA_FAULTS, NotAllowed) as error:
            first_error = first_error or error
        except (Overloaded, NotPrimary) as error:
            first_error = first_error or error
            pause = max(error.retry_after, BLOCK_SECONDS)
            if isinstance(error, NotPrimary):
                named = [one for one in replicas[1:] if _key(one)[1] == error.primary]
                if named and error.primary not in redirected:
                    # among those that the directory knows only: a server that lies leads nobody to strangers
                    redirected.add(error.primary)
                    replicas = [*named, *(one for one in replicas if one not in named)]
                    continue
                redirected.clear()
            if loop.time() + pause >= deadline:
                break
            await asyncio.sleep(pause)
        else:
            return result
        try:
            async with asyncio.timeout_at(deadline):
                replicas = await find()
        except (TesseractError, TimeoutError):
            break
    raise first_error or TimeoutError(f"no answer within {timeout} s")


async def _ask_watched(shared: Shared, replicas: Sequence[Any], attempt: Attempt[T], timeout: float) -> T:
    """Asks the first of `replicas`. If it takes long and others say that they are the primary, too, all of these are
    asked a small question at once: those that are silent then, where another one speaks, are reported, and if the first
    is one of them, it is not waited for any more."""
    asking = _ask(shared, replicas[0], attempt, timeout, observed=False)
    rivals = [replicas[0], *(replica for replica in replicas[1:] if replica.primary)]
    if len(rivals) == 1:
        return await asking
    call = asyncio.ensure_future(asking)
    probes: list[asyncio.Task[bool]] = []
    try:
        await asyncio.wait([call], timeout=_HEDGE_SECONDS)
        if not call.done():
            probes = [asyncio.ensure_future(_speaks(shared, replica)) for replica in rivals]
            both: list[asyncio.Future[Any]] = [call, answering := asyncio.gather(*probes)]
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            if not call.done():
                speak = answering.result()
                for replica, speaks in zip(rivals, speak, strict=True):
                    if any(speak) and not speaks:
                        shared.node.directory.report_failure(replica, reason="silent")
                if any(speak) and not speak[0]:
                    raise TimeoutError(f"{replicas[0].uid} is silent at the server that claims to be its primary")
        return await call
    except asyncio.CancelledError:
        shared.node.directory.report_late(replicas[0])
        raise
    finally:
        await cancel_all([call, *probes])


async def _speaks(shared: Shared, replica: Any) -> bool:
    """Whether its server answers a question, whatever the answer."""
    try:
        async with asyncio.timeout(_PROBE_SECONDS):
            await fetch_version(shared.node, replica.uid, replica.peer, timeout=_PROBE_SECONDS)
    except (TimeoutError, PeerUnreachable, ConnectionLost):
        return False
    except TesseractError:
        pass
    return True


async def _ask(
    shared: Shared, replica: Any, attempt: Attempt[T], timeout: float, *, observed: bool, num_bytes: float = 0
) -> T:
    now = asyncio.get_running_loop().time
    start = now()
    try:
        with shared.limits.limit(start + timeout + GRACE_SECONDS):  # should the call itself not keep its time
            result = await attempt(replica.peer, timeout)
    except REPLICA_FAULTS as error:
        reason = next(reason for kind, reason in _REASONS.items() if isinstance(error, kind))
        shared.node.directory.report_failure(replica, reason=reason)
        raise
    except Overloaded as error:
        shared.latencies.block(_key(replica), now() + max(error.retry_after, BLOCK_SECONDS))
        raise
    except asyncio.CancelledError:
        path = shared.path_seconds(replica, num_bytes)
        if observed and now() - start > (shared.latencies.expected(_key(replica), path=path) or 0.0):
            # a loser took at least this long
            shared.latencies.observe(_key(replica), now() - start, path=path, answered=False)
        raise
    if observed:
        path = shared.path_seconds(replica, num_bytes)
        shared.latencies.observe(_key(replica), now() - start, path=path)
    shared.node.directory.report_answer(replica)
    return result


def _key(replica: Any) -> tuple[str, Any]:
    peer_id = getattr(replica.peer, "peer_id", None)
    return (replica.uid, replica.peer if peer_id is None else peer_id)


def may_pass(error: BaseException) -> bool:
    """Whether the same call may well succeed elsewhere or later: not what the expert itself says no to."""
    return isinstance(error, (*REPLICA_FAULTS, TooStale)) or (isinstance(error, RemoteError) and error.retryable)


def _by_expectation(shared: Shared, replicas: Sequence[Any], now: float, num_bytes: float) -> list[Any]:
    """Those not blocked and not in doubt first, then the fastest; of unknown ones no queue is assumed, so that they get
    known."""
    if len(replicas) < 2:
        return list(replicas)
    book = shared.latencies

    def order(replica: Any) -> tuple[bool, int, float]:
        key, path = _key(replica), shared.path_seconds(replica, num_bytes)
        expected = book.expected(key, path=path)
        return book.is_blocked(key, now), getattr(replica, "doubt", 0), path if expected is None else expected

    return sorted(replicas, key=order)


async def cancel_all(tasks: Collection[asyncio.Task[Any]]) -> None:
    """Ends the tasks that still run, and waits for them; their errors are nobody's business."""
    running = []
    for task in tasks:
        if task.done():
            _forget(task)
        else:
            task.add_done_callback(_forget)
            task.cancel()
            running.append(task)
    if running:
        await asyncio.wait(running)


def _forget(task: asyncio.Task[Any]) -> None:
    if not task.cancelled():
        task.exception()  # once asked for, it is not logged as lost
