"""TesseractRuntime: the one thread of a device, and the only place where the loop and that thread meet.

The loop adds requests to the batcher and the thread takes batches out, both under one lock that is held for
microseconds; so the thread never waits for the loop to hand it the next batch, however busy the loop is. A finished
batch wakes the loop once, for all of its requests. Everything that touches a module runs on the thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

import torch

from tesseract_async.errors import Overloaded
from tesseract_async.metrics import Metrics
from tesseract_async.runtime.backend import ExpertBackend
from tesseract_async.runtime.batcher import Batch, Batcher, BatcherSettings, BatcherStatistics, Pool, Request
from tesseract_async.runtime.executor import Attempt, Executor
from tesseract_async.runtime.merging import Gradients
from tesseract_async.runtime.staging import staging_for
from tesseract_async.runtime.work import Answer, Outcome, Work
from tesseract_async.uncopied import Uncopied

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

ROWS_BUCKETS = tuple(float(2**power) for power in range(15))


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeSettings:
    """How a device is used."""

    batcher: BatcherSettings = BatcherSettings()
    num_threads: int | None = None
    """Intra-op threads of the device's thread; None leaves PyTorch's own choice."""
    forward_head_start: float = 0.2
    """Seconds by which a forward counts as older than it is, beside backwards of its priority."""
    overlap: bool | None = None
    """Whether the next batch is staged while one computes; None: where the device has copy engines."""
    stall_timeout: float = 60.0
    """Seconds after which a batch is taken as hung: new work is refused until it ends. More than the slowest takes."""
    close_timeout: float = 30.0
    """Seconds that closing waits for the running batch; a thread that hangs for longer is abandoned, loudly."""


class TesseractRuntime(Uncopied):
    """Runs experts on one device, on a thread of its own.

    `start` and `aclose` it on the loop that calls it. All methods belong to that loop.
    """

    def __init__(
        self,
        *,
        device: str | torch.device = "cpu",
        settings: RuntimeSettings = RuntimeSettings(),
        metrics: Metrics | None = None,
    ) -> None:
        try:
            self.device = torch.device(device)
        except RuntimeError as error:  # what PyTorch raises for a name that it does not know
            raise ValueError(f"not a device, such as 'cpu' or 'cuda:0': {device!r}") from error
        if self.device.type == "meta":
            raise ValueError("the device 'meta' computes nothing; an expert needs one such as 'cpu' or 'cuda:0'")
        self.settings = settings
        self.metrics = metrics or Metrics()
        self._batcher = Batcher(settings.batcher)
        self._pools: dict[Hashable, Pool] = {}
        self._jobs: deque[Callable[[Executor], None]] = deque()
        self._lock = threading.Lock()
        self._is_idle = False
        self._bell: SimpleQueue[None] = SimpleQueue()  # wakes the idle thread: half the price of a threading.Condition
        self._posted: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._delivers = False  # whether the loop was woken for what is posted
        self._closing = False
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopped: asyncio.Future[None] | None = None
        self._aside: ThreadPoolExecutor | None = None
        self._num_running = 0
        self._busy_since: float | None = None
        self._busy_seconds = 0.0

    # -- On the loop -----------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Starts the thread. Raises: RuntimeError the second time; ValueError for a device that is not here."""
        if self._thread is not None:
            raise RuntimeError("this runtime was started before")
        self._loop = asyncio.get_running_loop()
        self._stopped = self._loop.create_future()
        ready: asyncio.Future[None] = self._loop.create_future()
        # a daemon, because a program that dies without closing its node must not hang at exit
        self._thread = threading.Thread(
            target=self._run, args=(ready,), name=f"tesseract-runtime-{self.device}", daemon=True
        )
        self._thread.start()
        try:
            await asyncio.shield(ready)
        except BaseException:  # cancelled, too: no thread stays behind
            await self.aclose()
            raise

    async def aclose(self) -> None:
        """Lets the running batch end, refuses what waits with `Overloaded`, and returns when the thread is gone."""
        if self._thread is None or self._stopped is None or self._closing:
            return
        with self._lock:
            self._closing = True
            left = self._batcher.waiting()
            for request in left:
                self._batcher.remove(request)
            self._wake_thread()
        for request in left:
            _fail(request.payload, _leaving())
        try:
            async with asyncio.timeout(self.settings.close_timeout):
                await asyncio.shield(self._stopped)
        except TimeoutError:
            logger.error("an expert's module hangs; the thread of %s is abandoned with it", self.device)
        else:
            self._thread.join()  # its last act was to say so: this takes microseconds
        if self._aside is not None:
            self._aside.shutdown(wait=True)

    async def forward(
        self,
        backend: ExpertBackend,
        inputs: Sequence[torch.Tensor],
        *,
        training: bool = False,
        seed: int = 0,
        deadline: float | None = None,
        priority: int = 0,
        peer: Hashable = None,
    ) -> Answer:
        """The expert's outputs for these rows. `deadline` is in the loop's time.

        Cancelling withdraws what has not been computed. Raises: ExpertFailed, Overloaded, TimeoutError.
        """
        work = self.submit(
            backend, inputs, training=training, seed=seed, deadline=deadline, priority=priority, peer=peer
        )
        return await self._wait(work)

    async def backward(
        self,
        backend: ExpertBackend,
        inputs: Sequence[torch.Tensor],
        output_gradients: Gradients,
        *,
        training: bool = False,
        seed: int = 0,
        call_id: bytes | None = None,
        forward_version: int | None = None,
        deadline: float | None = None,
        priority: int = 0,
        peer: Hashable = None,
    ) -> Answer:
        """The inputs' gradients; with a `call_id` the expert also takes its step. Otherwise like `forward`."""
        return await self._wait(
            self.submit(
                backend,
                inputs,
                output_gradients,
                training=training,
                seed=seed,
                call_id=call_id,
                forward_version=forward_version,
                deadline=deadline,
                priority=priority,
                peer=peer,
            )
        )

    def submit(
        self,
        backend: ExpertBackend,
        inputs: Sequence[torch.Tensor],
        output_gradients: Gradients | None = None,
        *,
        training: bool = False,
        seed: int = 0,
        call_id: bytes | None = None,
        forward_version: int | None = None,
        deadline: float | None = None,
        priority: int = 0,
        peer: Hashable = None,
    ) -> Work:
        """Queues a forward, or a backward if there are gradients; `Work.answer` will hold the end of it.

        The tensors must not change until then. Raises: Overloaded.
        """
        loop = self._running_loop
        now = time.monotonic()
        if self._busy_since is not None and now - self._busy_since > self.settings.stall_timeout:
            raise Overloaded(
                f"a batch has computed here for {now - self._busy_since:.0f} s, longer than stall_timeout "
                f"({self.settings.stall_timeout:g} s): {self.device} is slow, or hangs; ask another replica",
                retry_after=self.settings.stall_timeout,
            )
        is_backward = output_gradients is not None
        work = Work(
            backend,
            inputs,
            output_gradients,
            training,
            seed,
            call_id,
            forward_version,
            loop.create_future(),
        )
        num_rows = work.num_rows
        request = work.request = Request(
            # a backward that takes no step must not share a batch with one that does
            self._pool(backend, is_backward, training, call_id is not None),
            num_rows,
            work.num_bytes,
            peer=peer,
            payload=work,
            # the thread lives by time.monotonic; the loop's clock may be another one
            deadline=math.inf if deadline is None else now + deadline - loop.time(),
            priority=priority,
            # requests that step alone, and split ones, whose chunks are summed for one step
            exclusive=backend.is_stochastic(training)
            or (is_backward and (num_rows > backend.max_batch_size or not backend.merges_backward)),
        )
        with self._lock:
            if self._closing or self._thread is None:
                raise _leaving()
            self._batcher.add(request, now)
            self._wake_thread()
        return work

    def withdraw(self, work: Work) -> bool:
        """Drops work that nobody waits for. False if it can't be: all of it is being computed, or was."""
        if work.request is None:
            return False
        with self._lock:
            if not self._batcher.remove(work.request):
                return False
        work.answer.cancel()
        _forget(work)
        return True

    async def call(self, function: Callable[[], Result]) -> Result:
        """Runs `function` on the device's thread between two batches, and returns or raises what it does."""
        return await self._run_job(lambda _: function())

    async def snapshot(self, backend: ExpertBackend) -> dict[str, Any]:
        """A copy of the expert's state, taken between two batches; a failed step goes back to it, too."""
        return await self._run_job(lambda executor: executor.keep_good_state(backend))

    async def call_aside(self, function: Callable[[], Result]) -> Result:
        """Runs `function`, which touches files and no module, on a helper thread: one at a time, in order."""
        if self._aside is None:
            self._aside = ThreadPoolExecutor(1, thread_name_prefix="tesseract-files")
        return await self._running_loop.run_in_executor(self._aside, function)

    def statistics(self) -> BatcherStatistics:
        """The batcher's figures."""
        with self._lock:
            return self._batcher.statistics()

    @property
    def busy_seconds(self) -> float:
        """Time that the thread has spent on batches."""
        return self._busy_seconds

    @property
    def _running_loop(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            raise RuntimeError("this runtime was not started")
        return self._loop

    async def _wait(self, work: Work) -> Answer:
        try:
            answer: Answer = await work.answer
        except asyncio.CancelledError:
            self.withdraw(work)
            raise
        return answer

    async def _run_job(self, function: Callable[[Executor], Result]) -> Result:
        future: asyncio.Future[Result] = self._running_loop.create_future()

        def job(executor: Executor) -> None:
            try:
                result = function(executor)
            except BaseException as error:  # it is handed to the awaiting task
                self._post(_settle, future, None, error)
            else:
                self._post(_settle, future, result, None)

        with self._lock:
            if self._closing or self._thread is None:
                raise RuntimeError("this runtime is closed")
            self._jobs.append(job)
            self._wake_thread()
        return await future

    def _wake_thread(self) -> None:
        """Under the lock."""
        if self._is_idle:
            self._is_idle = False
            self._bell.put(None)

    def _pool(self, backend: ExpertBackend, is_backward: bool, training: bool, steps: bool) -> Pool:
        kind = (backend, is_backward, training, steps)
        pool = self._pools.get(kind)
        if pool is None:
            pool = self._pools[kind] = self._batcher.add_pool(
                kind,
                max_batch_size=backend.max_batch_size,
                preferred_sizes=backend.settings.preferred_sizes,
                head_start=0.0 if is_backward else self.settings.forward_head_start,
            )
        return pool

    def _deliver(self, batch: Batch, outcomes: Sequence[Outcome], seconds: float) -> None:
        direction = "backward" if batch.pool.name[1] else "forward"  # type: ignore[index]
        self.metrics.count("runtime_batches", direction=direction)
        self.metrics.count("runtime_rows", batch.num_rows, direction=direction)
        self.metrics.observe("runtime_batch_rows", batch.num_rows, bounds=ROWS_BUCKETS, direction=direction)
        self.metrics.observe("runtime_batch_seconds", seconds, direction=direction)
        for work, answer, error in outcomes:
            if error is not None:
                self.metrics.count("runtime_failures", direction=direction)
                _fail(work, error)
            elif answer is not None and not work.answer.done():
                work.answer.set_result(answer)
            _forget(work)

    # -- On the thread ---------------------------------------------------------------------------------------------

    def _run(self, ready: asyncio.Future[None]) -> None:
        try:
            if self.settings.num_threads is not None:
                torch.set_num_threads(self.settings.num_threads)
            executor = Executor(staging_for(self.device))
        except BaseException as error:  # it is handed to whoever starts the runtime
            self._post(_settle, ready, None, error)
        else:
            self._post(_settle, ready, None, None)
            overlap = executor.staging.overlaps if self.settings.overlap is None else self.settings.overlap
            self._work(executor, overlap)
        self._post(_settle, self._stopped, None, None)

    def _work(self, executor: Executor, overlap: bool) -> None:
        """Computes until the runtime closes. With `overlap`, a batch is staged while the one before it computes."""
        running: tuple[Batch, Attempt] | None = None
        while True:
            job, batch, expired, closed = self._next(wait=running is None)
            if expired:
                self._post(_expire, expired)
            staged = None if batch is None else (batch, executor.stage(batch.parts))
            if running is not None:
                executor.complete(running[1])
            if staged is not None:
                executor.launch(staged[1])
            if running is not None:
                self._finish(executor, *running)
            running = staged
            if running is not None and not overlap:
                executor.complete(running[1])
                self._finish(executor, *running)
                running = None
            if job is not None:  # between batches, never beside one
                job(executor)
            if closed:
                return

    def _next(self, *, wait: bool) -> tuple[Callable[[Executor], None] | None, Batch | None, Sequence[Request], bool]:
        """A job, a batch, what expired, and whether that was all; nothing at all only if it may not `wait`."""
        while True:
            with self._lock:
                self._is_idle = False
                if self._jobs:
                    return self._jobs.popleft(), None, (), False
                now = time.monotonic()
                expired = self._batcher.pop_expired(now)
                batch = self._batcher.pop_ready(now)
                if batch is not None:
                    self._num_running += 1
                    if self._num_running == 1:
                        self._busy_since = now
                    return None, batch, expired, False
                if expired or self._closing or not wait:
                    return None, None, expired, self._closing and not expired
                timer_at = self._batcher.timer_at()
                self._is_idle = True
            with contextlib.suppress(Empty):
                self._bell.get(timeout=None if timer_at is None else max(timer_at - now, 0))

    def _finish(self, executor: Executor, batch: Batch, attempt: Attempt) -> None:
        """Hands out what became of a batch."""
        outcomes = executor.outcomes(attempt)
        now = time.monotonic()
        with self._lock:
            for outcome in outcomes:
                if outcome.error is not None and outcome.work.request is not None:
                    self._batcher.remove(outcome.work.request)  # the other parts of a split request
            self._batcher.finish(batch, now)
            self._busy_seconds += now - (self._busy_since or now)
            self._num_running -= 1
            self._busy_since = now if self._num_running else None
        self._post(self._deliver, batch, outcomes, now - batch.started)

    def _post(self, function: Callable[..., None], *args: Any) -> None:
        """Lets the loop call this. Waking it is a system call: what is posted until it looks shares one."""
        self._posted.append((function, args))
        if not self._delivers:
            self._delivers = True
            with contextlib.suppress(RuntimeError):  # the loop was closed without closing us: nobody waits any more
                self._running_loop.call_soon_threadsafe(self._call_posted)

    def _call_posted(self) -> None:
        """On the loop."""
        self._delivers = False  # before looking: what is posted from now on wakes the loop again
        try:
            while self._posted:
                function, args = self._posted.popleft()
                function(*args)
        finally:
            if self._posted:  # one failed; it is logged, and the others must not wait for it
                self._running_loop.call_soon(self._call_posted)


# -- On the loop again -------------------------------------------------------------------------------------------------


def _leaving() -> Overloaded:
    return Overloaded("this server is leaving; ask another replica", retry_after=1.0)


def _expire(requests: Sequence[Request]) -> None:
    for request in requests:
        _fail(request.payload, TimeoutError("the deadline passed before the expert was free"))


def _fail(work: Work, error: BaseException) -> None:
    if not work.answer.done():
        work.answer.set_exception(error)
        work.answer.exception()  # whoever waited may be gone: then it was seen here
    _forget(work)


def _forget(work: Work) -> None:
    """Frees the tensors, unless the thread still needs them: the batcher's queues may keep the request for a while."""
    if work.request is None or work.request.alive or work.request.num_running:
        return
    work.request.payload = None
    work.request = None
    work.inputs, work.output_gradients, work.summed = (), None, None
    work.parts.clear()


def _settle(future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
