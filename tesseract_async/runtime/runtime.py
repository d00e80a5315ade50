"""TesseractRuntime: one thread per device, where the event loop and that thread meet.

The loop adds requests to the batcher and the thread takes batches out, both under one lock that is held for
microseconds; so the thread never waits for the loop to hand it the next batch, however busy the loop is. A finished
batch wakes the loop once, for all of its requests. Everything that touches a module runs on the thread.
"""

import asyncio
import contextlib
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch

from tesseract_async.errors import Overloaded
from tesseract_async.metrics import Metrics
from tesseract_async.runtime.attempts import Outcomes
from tesseract_async.runtime.backend import ExpertBackend
from tesseract_async.runtime.batcher import MAX_QUEUE_BYTES, Batch, Batcher, BatcherStatistics, QueuedRequest
from tesseract_async.runtime.figures import Figures
from tesseract_async.runtime.gradients import Gradients
from tesseract_async.runtime.grouped import Group
from tesseract_async.runtime.passes import DevicePass, find_group, passes
from tesseract_async.runtime.queues import ExpertQueues
from tesseract_async.runtime.staging import Staging, staging_for
from tesseract_async.runtime.states import StateDict
from tesseract_async.runtime.together import GroupExecutor
from tesseract_async.runtime.wake_ups import Bell, Mailbox
from tesseract_async.runtime.work import JointWork, Work, WorkResult
from tesseract_async.tasks import PromptFuture
from tesseract_async.uncopied import Uncopied

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
Job = Callable[[GroupExecutor], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeSettings:
    """The settings of a device."""

    max_queue_bytes: int = MAX_QUEUE_BYTES
    """Bytes of all requests that wait or run; beyond it new ones are refused. Choose less on a computer with little
    memory."""
    num_threads: int | None = None
    """Intra-op threads of the device's thread; None leaves it to PyTorch. Fewer leave cores to other programs."""
    groups_experts: bool = True
    """True if small experts of one kind may be computed in one pass where that is faster. Their numbers then differ in
    the last digits from those of each one alone; False where they must be the same bit by bit."""
    stall_timeout: float = 60.0
    """Seconds after which a batch counts as hung: new work is refused until it ends. Choose more than the slowest batch
    takes."""
    close_timeout: float = 30.0
    """Seconds that closing waits for the running batch, before its thread is abandoned with an error in the log. Choose
    less than what the program that stops this process allows."""


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
        make_staging: Callable[[torch.device], Staging] = staging_for,
    ) -> None:
        """`make_staging` is called on the device's thread. Raises: ValueError for an unknown device."""
        try:
            self.device = torch.device(device)
        except RuntimeError as error:  # what PyTorch raises for a name that it does not know
            raise ValueError(f"not a device, such as 'cpu' or 'cuda:0': {device!r}") from error
        if self.device.type == "meta":
            raise ValueError("the device 'meta' computes nothing; an expert needs one such as 'cpu' or 'cuda:0'")
        self.settings = settings
        self.metrics = metrics or Metrics()
        self._make_staging = make_staging
        self._batcher = Batcher(max_queue_bytes=settings.max_queue_bytes)
        self._queues = ExpertQueues(self._batcher, groups_experts=settings.groups_experts)
        self.figures = Figures(self.metrics)
        self._jobs: deque[Job] = deque()
        self._lock = threading.Lock()
        self._is_idle = False
        self._bell, self._mailbox = Bell(), Mailbox()
        self._num_gathering = 0
        self._is_gathering = False  # within one turn of the loop: nothing is awaited meanwhile
        self._gathers = False  # until the end of this turn
        self._was_alone = False  # the request before the next one
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
        """Start the thread. Raises: RuntimeError the second time; ValueError for a device that is not here."""
        if self._thread is not None:
            raise RuntimeError("this runtime was started before")
        self._loop = self._mailbox.loop = asyncio.get_running_loop()
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
        """Let the running batch end, refuse what waits with `Overloaded`, and return when the thread is gone."""
        if self._thread is None or self._stopped is None or self._closing:
            return
        with self._lock:
            self._closing = True
            left: list[Work] = self._batcher.waiting()  # type: ignore[assignment]
            for request in left:
                self._batcher.remove(request)
            self._wake_thread()
        _fail(left, _leaving)
        try:
            async with asyncio.timeout(self.settings.close_timeout):
                await asyncio.shield(self._stopped)
        except TimeoutError:
            logger.error("an expert's module hangs; the thread of %s is abandoned with it", self.device)
        else:
            self._thread.join()  # it has just said that it ends: this takes microseconds
        if self._aside is not None:
            self._aside.shutdown(wait=True)

    def submit(
        self,
        backend: ExpertBackend,
        inputs: Sequence[torch.Tensor | None],
        output_gradients: Gradients | None = None,
        *,
        training: bool = False,
        seed: int = 0,
        call_id: bytes | None = None,
        forward_version: int | None = None,
        deadline: float | None = None,
        priority: int = 0,
        peer: Hashable = None,
        rows: torch.Tensor | None = None,
        weights: torch.Tensor | None = None,
        num_bytes: int | None = None,
    ) -> Work:
        """Queue a forward, or a backward if there are gradients; its `Work.answer` will be done when it ends.

        - `call_id`: of a backward after which the expert takes its step.
        - `deadline`: in the loop's time.
        - `rows`, `weights`: see `Work`; the caller has checked that they fit.
        - `num_bytes`: what counts as its memory, if that is not the tensors given: a share of a block.

        The tensors must not change until then. The answer is ExpertFailed, Overloaded or TimeoutError where there is
        no result; a caller that no longer waits for it calls `withdraw`. Raises: Overloaded.
        """
        if (loop := self._loop) is None:
            raise RuntimeError("this runtime was not started")
        now = time.monotonic()
        _ = self.figures[backend]  # made now: what ends after `forget` would hold the expert for ever
        assert inputs[0] is not None
        num_rows = inputs[0].shape[0] if rows is None else rows.shape[0]
        # requests that step alone, and split ones, whose chunks are summed for one step
        alone = backend.is_stochastic(training)
        if num_bytes is None:
            num_bytes = 0
            for x in (*inputs, *(output_gradients or ())):
                if x is not None:
                    num_bytes += x.nbytes
        if output_gradients is not None:
            alone = alone or num_rows > backend.max_batch_size or not backend.merges_backward
        # a backward that takes no step must not share a batch with one that does
        shapes = None
        if backend.varies:
            shapes = tuple(None if x is None else x.shape[1:] for x in (*inputs, *(output_gradients or ())))
        kind = (backend, output_gradients is not None, training, call_id is not None, weights is not None, shapes)
        work = Work(
            self._queues.known.get(kind) or self._queues.add(kind),
            num_rows,
            num_bytes,
            peer,
            # the thread lives by time.monotonic; the loop's clock may be another one
            math.inf if deadline is None else now + deadline - loop.time(),
            priority,
            alone,
            backend=backend,
            inputs=inputs,
            rows=rows,
            output_gradients=output_gradients,
            weights=weights,
            training=training,
            seed=seed,
            call_id=call_id,
            forward_version=forward_version,
            answer=PromptFuture(loop=loop),
        )
        self._enqueue(work, now)
        return work

    def submit_joint(
        self,
        backends: Sequence[ExpertBackend],
        inputs: Sequence[torch.Tensor | None],
        *,
        rows: torch.Tensor,
        counts: Sequence[int],
        weights: torch.Tensor,
        training: bool = False,
        deadline: float,
        priority: int,
        peer: Hashable,
        num_bytes: int,
    ) -> JointWork | None:
        """As `submit`, for a forward of several experts that is computed in one pass (see `JointWork`), each with
        `counts` of the rows and weights. None where that cannot be done, is slower, or would take long (see
        `ExpertQueues.of_joint`). Raises: Overloaded.
        """
        if (loop := self._loop) is None:
            raise RuntimeError("this runtime was not started")
        now = time.monotonic()
        queue = self._queues.of_joint(backends, counts, self._batcher.group_seconds(now), training=training)
        if queue is None:
            return None
        for one in backends:
            _ = self.figures[one]
        work = JointWork(
            queue,
            len(rows),
            num_bytes,
            peer,
            now + deadline - loop.time(),
            priority,
            True,
            backend=backends[0],
            inputs=inputs,
            rows=rows,
            weights=weights,
            training=training,
            answer=PromptFuture(loop=loop),
            backends=backends,
            counts=counts,
        )
        self._enqueue(work, now)
        return work

    def _enqueue(self, work: Work, now: float) -> None:
        if self._busy_since is not None and now - self._busy_since > self.settings.stall_timeout:
            raise Overloaded(
                f"a batch has computed here for {now - self._busy_since:.0f} s, longer than stall_timeout "
                f"({self.settings.stall_timeout:g} s): {self.device} is slow, or hangs; ask another replica",
                retry_after=self.settings.stall_timeout,
            )
        with self._lock:
            if self._closing or self._thread is None:
                raise _leaving()
            self._batcher.add(work, now)
            if self._is_idle and not self._num_gathering:
                self._wake_thread()

    @contextlib.contextmanager
    def gathering(self) -> Iterator[None]:
        """Wake the thread at the end of the block only, so that what is queued in it can be computed together."""
        self._num_gathering += 1
        outermost, self._is_gathering = not self._is_gathering, True
        try:
            yield
        finally:
            self._num_gathering -= 1
            self._is_gathering = not outermost
            with self._lock:
                self._wake_thread()

    def gather_turn(self) -> None:
        """Do as `gathering` until the end of this turn of the loop: callers that were answered together also call
        together. Not if the request finds the device idle, as the one before it did: such a caller is alone."""
        before, self._was_alone = self._was_alone, self._is_idle and not self._gathers
        if not self._gathers and not (before and self._was_alone) and self._loop is not None:
            self._gathers = True
            self._num_gathering += 1
            self._loop.call_soon(self._end_turn)

    def _end_turn(self) -> None:
        self._gathers = False
        self._num_gathering -= 1
        with self._lock:
            self._wake_thread()

    def hold(self, peer: Hashable, num_bytes: int) -> None:
        with self._lock:
            self._batcher.hold(peer, num_bytes)

    def withdraw(self, work: Work) -> bool:
        """Drop work whose result is not needed. Returns False if all of it is being computed, or was."""
        with self._lock:
            if not self._batcher.remove(work):
                return False
        work.answer.cancel()
        _forget(work)
        return True

    async def call(self, function: Callable[[], Result]) -> Result:
        """Run `function` on the device's thread between two batches, and return or raise what it does."""
        return await self._run_job(lambda _: function())

    async def snapshot(self, backend: ExpertBackend) -> StateDict:
        """Return a copy of the expert's state, taken between two batches. A failed step goes back to it, too."""
        return await self._run_job(lambda executor: executor.steps.keep_good_state(backend))

    async def call_aside(self, function: Callable[[], Result]) -> Result:
        """Run `function`, which touches files and no module, on a helper thread: one at a time, in order.

        Raises: Overloaded once it closes, as `call` and `snapshot` do.
        """
        if self._closing:
            raise _leaving()
        if self._aside is None:
            self._aside = ThreadPoolExecutor(1, thread_name_prefix="tesseract-files")
        return await asyncio.get_running_loop().run_in_executor(self._aside, function)

    def statistics(self) -> BatcherStatistics:
        with self._lock:
            return self._batcher.statistics()

    @property
    def busy_seconds(self) -> float:
        """Seconds that the thread has spent on batches."""
        return self._busy_seconds

    async def _run_job(self, function: Callable[[GroupExecutor], Result]) -> Result:
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()

        def job(executor: GroupExecutor) -> None:
            try:
                result = function(executor)
            except BaseException as error:  # it is handed to the awaiting task
                self._mailbox.post(_set_error, future, error)
            else:
                self._mailbox.post(_set_result, future, result)

        with self._lock:
            if self._closing:
                raise _leaving()
            if self._thread is None:
                raise RuntimeError("this runtime was not started")
            self._jobs.append(job)
            self._wake_thread()
        return await future

    def _wake_thread(self) -> None:
        """Wake the thread if it is idle. Call it under the lock."""
        if self._is_idle and not self._num_gathering:
            self._is_idle = False
            self._bell.ring()

    def rows_of(self, backend: ExpertBackend) -> tuple[int, int]:
        """Return how many rows of an expert were computed since it came here, and how many wait."""
        figures = self.figures.get(backend)
        return 0 if figures is None else figures.num_rows, self._queues.num_waiting_rows(backend)

    def forget(self, backend: ExpertBackend) -> None:
        """Release an expert that is no longer computed here."""
        self._queues.forget(backend)
        self.figures.pop(backend, None)

    def _deliver(self, batches: Sequence[Batch], outcomes: Outcomes, seconds: float) -> None:
        failed: list[Work] = []
        for batch in batches:
            for request, _, _ in batch.slices:
                work: Work = request  # type: ignore[assignment]
                outcome, answer = outcomes.get(work), work.answer
                if outcome is None or answer.done():
                    pass
                elif type(outcome) is WorkResult:
                    answer.set_result(outcome)
                else:
                    failed.append(work)
                    _set_error(answer, outcome)  # type: ignore[arg-type]
                if not work.alive and not work.num_running:  # as `_forget`
                    work.inputs, work.output_gradients, work.summed = (), None, None
                    work.rows = work.weights = None
                    if work.results:
                        work.results.clear()
        self.figures.count(batches, outcomes, seconds, failed)  # not before: those who asked would wait for it

    # -- On the thread ---------------------------------------------------------------------------------------------

    def _run(self, ready: asyncio.Future[None]) -> None:
        try:
            if self.settings.num_threads is not None:
                torch.set_num_threads(self.settings.num_threads)
            executor = GroupExecutor(self._make_staging(self.device))
        except BaseException as error:  # it is raised by `start`
            self._mailbox.post(_set_error, ready, error)
        else:
            self._mailbox.post(_set_result, ready, None)
            self._work(executor)
        self._mailbox.post(_set_result, self._stopped, None)

    def _work(self, executor: GroupExecutor) -> None:
        """Compute until the runtime closes. Where copies overlap, a pass is staged while another one computes."""
        running: DevicePass | None = None
        left: deque[DevicePass] = deque()  # of batches that were popped as a group, and are computed one by one
        while True:
            job: Job | None = None
            expired: Sequence[QueuedRequest] = ()
            closed = False
            if not left:
                job, batches, expired, closed = self._next(wait=running is None)
                left.extend(passes(batches))
            if expired:
                self._mailbox.post(
                    _fail, expired, partial(TimeoutError, "the deadline passed before the expert was free")
                )
            staged = left.popleft() if left else None
            if staged is not None:
                staged.stage(executor)
            if running is not None:
                running.complete()
            if staged is not None:
                staged.launch()
            if running is not None:
                self._finish(executor, running)
            running = staged
            if running is not None and not executor.staging.overlaps:
                running.complete()
                self._finish(executor, running)
                running = None
            if job is not None:  # between batches, never during one
                job(executor)
            if closed:
                return

    def _next(self, *, wait: bool) -> tuple[Job | None, list[Batch], Sequence[QueuedRequest], bool]:
        """Return a job, batches, what expired, and whether that was all; nothing at all only if it may not `wait`."""
        while True:
            with self._lock:
                self._is_idle = False
                if self._jobs:
                    return self._jobs.popleft(), [], (), False
                now = time.monotonic()
                expired = self._batcher.pop_expired(now)
                # while the loop gathers, what it has queued so far would be computed apart from what is about to come
                batch = None if self._is_gathering else self._batcher.pop_ready(now)
                if batch is not None:
                    batches, group = [batch], batch.queue.group
                    if isinstance(group, Group) and self._batcher.has_waiting and group.gathers():
                        batches += self._batcher.pop_group(batch, now)
                    if not self._num_running:
                        self._busy_since = now
                    self._num_running += len(batches)
                    return None, batches, expired, False
                if expired or self._closing or not wait:
                    return None, [], expired, self._closing and not expired
                timer_at = self._batcher.timer_at()
                self._is_idle = True
            self._bell.wait(None if timer_at is None else timer_at - now)

    def _finish(self, executor: GroupExecutor, computed: DevicePass) -> None:
        batches, outcomes = computed.batches, computed.outcomes()
        now = time.monotonic()
        with self._lock:
            for work, outcome in outcomes.items():
                if not isinstance(outcome, WorkResult):
                    self._batcher.remove(work)  # the rest of a split request
            seconds = self._batcher.finish(batches, now, computed.spent(executor))
            self._busy_seconds += now - (self._busy_since or now)
            self._num_running -= len(batches)
            self._busy_since = now if self._num_running else None
        self._mailbox.post(self._deliver, batches, outcomes, now - batches[0].started)
        computed.learn(executor, seconds)
        for batch in batches:
            if batch.queue in self._queues.ungrouped:
                find_group(executor, batch)
                self._queues.found(batch.queue)


# -- On the loop again -------------------------------------------------------------------------------------------------


def _leaving() -> Overloaded:
    return Overloaded("this server is leaving; ask another replica", retry_after=1.0)


def _fail(works: Sequence[Work], error: Callable[[], BaseException]) -> None:
    for work in works:
        _set_error(work.answer, error())
        _forget(work)


def _forget(work: Work) -> None:
    """Free the tensors, unless the thread still needs them: the batcher's queues may keep the request for a while."""
    if not work.alive and not work.num_running:
        work.inputs, work.output_gradients, work.summed = (), None, None
        work.rows = work.weights = None
        work.results.clear()


def _set_result(future: asyncio.Future[Result], result: Result) -> None:
    if not future.done():
        future.set_result(result)


def _set_error(future: asyncio.Future[Result], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)
        future.exception()  # marks it as seen: there may be no caller left
