"""One call to an expert that several servers host: which of them is asked, and whom else when it is slow or gone."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Awaitable, Callable, Collection, Coroutine, Sequence
from typing import Any, TypeVar

from tesseract_async.client.latency import LatencyBook, path_seconds
from tesseract_async.client.limits import Limits
from tesseract_async.client.ports import Node, PlainCalls
from tesseract_async.errors import (
    ConnectionLost,
    ExpertNotFound,
    NotAllowed,
    Overloaded,
    PeerUnreachable,
    ProtocolError,
    RemoteError,
    TesseractError,
)
from tesseract_async.uncopied import Uncopied

T = TypeVar("T")

Attempt = Callable[[Any, float], Awaitable[T]]
"""``attempt(peer, seconds)``: one call to one server."""

# Errors that say something about a replica, not about the request: it is masked until its next sign of life.
REPLICA_FAULTS = (PeerUnreachable, ConnectionLost, ProtocolError, ExpertNotFound, TimeoutError)

GRACE_SECONDS = 0.5
"""A call that outlives its time-out by this much is abandoned."""
BLOCK_SECONDS = 0.1
_MAX_HANDOVERS = 5


class _OfNode:
    """What all modules of one node share: what its calls have taught about replicas, and the guard of their ends."""

    def __init__(self) -> None:
        self.latencies = LatencyBook()
        self.limits = Limits()


_of_nodes: weakref.WeakKeyDictionary[Node, _OfNode] = weakref.WeakKeyDictionary()


class Shared(Uncopied):
    """What copies of a module share: a node has sockets, so ``copy.deepcopy`` of a module must not copy it."""

    def __init__(self, node: Any) -> None:
        """`node`: a `Node`, or one that gives plain calls."""
        self._plain = node if isinstance(node, PlainCalls) else None
        self.node: Node = node.node if isinstance(node, PlainCalls) else node
        if (ours := _of_nodes.get(self.node)) is None:
            ours = _of_nodes[self.node] = _OfNode()
        self.latencies = ours.latencies
        self.limits = ours.limits

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
    directory. How long it took is remembered if `observed`. `num_bytes` travel, both ways together.

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
                p95 = shared.latencies.p95(_key(replica))
                if queue and p95 is not None:
                    hedge_at = now + p95
            while tasks:
                wait_until = hedge_at if queue else deadline + GRACE_SECONDS
                done, _ = await asyncio.wait(
                    tasks, timeout=max(0.0, wait_until - loop.time()), return_when=asyncio.FIRST_COMPLETED
                )
                for task in done:
                    del tasks[task]
                    error = task.exception()
                    if error is None:
                        return task.result()
                    if not may_pass(error):
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
    Raises: the first error if none answers; TimeoutError.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout
    first_error: Exception | None = None
    for _ in range(_MAX_HANDOVERS):
        left = deadline - loop.time()
        if left <= 0 or not replicas:
            break
        try:
            return await _ask(shared, replicas[0], attempt, left, observed=False)
        except (*REPLICA_FAULTS, NotAllowed) as error:
            first_error = first_error or error
        except Overloaded as error:
            first_error = first_error or error
            pause = max(error.retry_after, BLOCK_SECONDS)
            if loop.time() + pause >= deadline:
                break
            await asyncio.sleep(pause)
        try:
            async with asyncio.timeout_at(deadline):
                replicas = await find()
        except (TesseractError, TimeoutError):
            break
    raise first_error or TimeoutError(f"no answer within {timeout} s")


async def _ask(
    shared: Shared, replica: Any, attempt: Attempt[T], timeout: float, *, observed: bool, num_bytes: float = 0
) -> T:
    now = asyncio.get_running_loop().time
    start = now()
    try:
        with shared.limits.limit(start + timeout + GRACE_SECONDS):  # should the call itself not keep its time
            result = await attempt(replica.peer, timeout)
    except REPLICA_FAULTS:
        shared.node.directory.report_failure(replica)
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
    return result


def _key(replica: Any) -> tuple[str, Any]:
    peer_id = getattr(replica.peer, "peer_id", None)
    return (replica.uid, replica.peer if peer_id is None else peer_id)


def may_pass(error: BaseException) -> bool:
    """Whether the same call may well succeed elsewhere or later: not what the expert itself says no to."""
    return isinstance(error, REPLICA_FAULTS) or (isinstance(error, RemoteError) and error.retryable)


def _by_expectation(shared: Shared, replicas: Sequence[Any], now: float, num_bytes: float) -> list[Any]:
    """Those not blocked first, then the fastest; of unknown ones no queue is assumed, so that they get known."""
    if len(replicas) < 2:
        return list(replicas)
    book = shared.latencies

    def order(replica: Any) -> tuple[bool, float]:
        key, path = _key(replica), shared.path_seconds(replica, num_bytes)
        expected = book.expected(key, path=path)
        return book.is_blocked(key, now), path if expected is None else expected

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
