"""TesseractRuntime: the one thread of a device, and the only place where the loop and that thread meet.

The loop adds requests to the batcher and the thread takes batches out, both under one lock that is held for
microseconds; so the thread never waits for the loop to hand it the next batch, however busy the loop is. A finished
batch wakes the loop once, for all of its requests. Everything that touches a module runs on the thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from tesseract_async.errors import ExpertFailed, Overloaded, RemoteError, describe
from tesseract_async.runtime.backend import ExpertBackend, Gradients
from tesseract_async.runtime.batcher import Batch, Batcher, BatcherSettings, BatcherStatistics, Part, Pool, Request

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeSettings:
    """How a device is used."""

    batcher: BatcherSettings = BatcherSettings()
    num_threads: int | None = None
    """Intra-op threads of the device's thread; None leaves PyTorch's own choice."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a request ends in: outputs, or one gradient per input (None where nothing flows)."""

    tensors: list[torch.Tensor | None]
    version: int
    """Of a forward: the steps that the expert had taken. Of a backward: those that it led to."""


@dataclass(slots=True, eq=False)
class Work:
    """One forward or backward on its way. `answer` is a future of the runtime's loop."""

    backend: ExpertBackend
    inputs: Sequence[torch.Tensor]
    output_gradients: Gradients | None
    """None for a forward."""
    training: bool
    call_id: bytes | None
    """Journalled together with the step; None: compute the gradients, take no step."""
    answer: asyncio.Future[Answer]
    request: Request | None = None
    parts: list[Answer] = field(default_factory=list)
    """Answers of the parts so far, if the request was split."""
    summed: Gradients | None = None
    """Parameter gradients of the parts so far."""

    @property
    def num_rows(self) -> int:
        return int(self.inputs[0].shape[0])


class TesseractRuntime:
    """Runs experts on one device, on a thread of its own.

    `start` and `aclose` it on the loop that calls it. All methods belong to that loop.
    """

    def __init__(self, *, device: str | torch.device = "cpu", settings: RuntimeSettings = RuntimeSettings()) -> None:
        self.device = torch.device(device)
        self.settings = settings
        self._batcher = Batcher(settings.batcher)
        self._pools: dict[Hashable, Pool] = {}
        self._jobs: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition(threading.Lock())
        self._closing = False
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopped: asyncio.Future[None] | None = None
        self._aside: ThreadPoolExecutor | None = None
        self._busy_seconds = 0.0

    async def start(self) -> None:
        """Starts the thread."""
        if self._thread is not None:
            raise RuntimeError("this runtime was started before")
        self._loop = asyncio.get_running_loop()
        self._stopped = self._loop.create_future()
        # a daemon, because a program that dies without closing its node must not hang at exit
        self._thread = threading.Thread(target=self._run, name=f"tesseract-runtime-{self.device}", daemon=True)
        self._thread.start()

    async def aclose(self) -> None:
        """Lets the running batch end, refuses what waits with `Overloaded`, and returns when the thread is gone."""
        if self._thread is None or self._closing:
            return
        with self._changed:
            self._closing = True
            left = self._batcher.waiting()
            for request in left:
                self._batcher.remove(request)
            self._changed.notify()
        for request in left:
            _fail(request.payload, Overloaded("this server is leaving; ask another replica", retry_after=1.0))
        assert self._stopped is not None
        await asyncio.shield(self._stopped)
        self._thread.join()  # its last act was to say so: this takes microseconds
        if self._aside is not None:
            self._aside.shutdown(wait=True)

    async def forward(
        self,
        backend: ExpertBackend,
        inputs: Sequence[torch.Tensor],
        *,
        training: bool = False,
        deadline: float | None = None,
        priority: int = 0,
        peer: Hashable = None,
    ) -> Answer:
        """The expert's outputs for these rows. `deadline` is in the loop's time.

        Cancelling withdraws what has not been computed. Raises: ExpertFailed, Overloaded, TimeoutError.
        """
        work = self.submit(backend, inputs, training=training, deadline=deadline, priority=priority, peer=peer)
        return await self._wait(work)

    async def backward(
        self,
        backend: ExpertBackend,
        inputs: Sequence[torch.Tensor],
        output_gradients: Gradients,
        *,
        training: bool = False,
        call_id: bytes | None = None,
        deadline: float | None = None,
        priority: int = 0,
        peer: Hashable = None,
    ) -> Answer:
        """The inputs' gradients; with a `call_id` the expert also takes its step. Otherwise like `forward`."""
        work = self.submit(
            backend,
            inputs,
            output_gradients,
            training=training,
            call_id=call_id,
            deadline=deadline,
            priority=priority,
            peer=peer,
        )
        return await self._wait(work)

    def submit(
        self,
        backend: ExpertBackend,
        inputs: Sequence[torch.Tensor],
        output_gradients: Gradients | None = None,
        *,
        training: bool = False,
        call_id: bytes | None = None,
        deadline: float | None = None,
        priority: int = 0,
        peer: Hashable = None,
    ) -> Work:
        """Queues a forward, or a backward if there are gradients; `Work.answer` will hold the end of it.

        Raises: Overloaded.
        """
        loop = self._running_loop
        work = Work(backend, inputs, output_gradients, training, call_id, loop.create_future())
        is_backward = output_gradients is not None
        # a backward that takes no step must not share a batch with one that does, and one that is split steps alone
        steps = call_id is not None
        num_bytes = sum(x.nbytes for x in inputs)
        if output_gradients is not None:
            num_bytes += sum(x.nbytes for x in output_gradients if x is not None)
        now = time.monotonic()
        request = work.request = Request(
            self._pool(backend, is_backward, training, steps),
            work.num_rows,
            num_bytes,
            peer=peer,
            payload=work,
            # the thread lives by time.monotonic; the loop's clock may be another one
            deadline=float("inf") if deadline is None else now + deadline - loop.time(),
            priority=priority,
            exclusive=is_backward and work.num_rows > backend.max_batch_size,
        )
        with self._changed:
            if self._closing or self._thread is None:
                raise Overloaded("this server is leaving; ask another replica", retry_after=1.0)
            self._batcher.add(request, now)
            self._changed.notify()
        return work

    def withdraw(self, work: Work) -> bool:
        """Drops work that nobody waits for. False if it can't be: all of it is being computed, or was."""
        if work.request is None:
            return False
        with self._changed:
            if not self._batcher.remove(work.request):
                return False
        work.answer.cancel()
        _forget(work)
        return True

    async def call(self, function: Callable[[], Result]) -> Result:
        """Runs `function` on the device's thread between two batches, and returns or raises what it does."""
        future: asyncio.Future[Result] = self._running_loop.create_future()

        def job() -> None:
            self._post(_settle, future, *_outcome(function))

        with self._changed:
            if self._closing or self._thread is None:
                raise RuntimeError("this runtime is closed")
            self._jobs.append(job)
            self._changed.notify()
        return await future

    async def call_aside(self, function: Callable[[], Result]) -> Result:
        """Runs `function`, which touches files and no module, on a helper thread: one at a time, in order."""
        if self._aside is None:
            self._aside = ThreadPoolExecutor(1, thread_name_prefix="tesseract-files")
        return await self._running_loop.run_in_executor(self._aside, function)

    def statistics(self) -> BatcherStatistics:
        """The batcher's figures."""
        with self._changed:
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
            return await asyncio.shield(work.answer)
        except asyncio.CancelledError:
            self.withdraw(work)
            raise

    def _pool(self, *kind: Any) -> Pool:
        pool = self._pools.get(kind)
        if pool is None:
            pool = self._pools[kind] = self._batcher.add_pool(kind, max_batch_size=kind[0].max_batch_size)
        return pool

    # -- On the thread ---------------------------------------------------------------------------------------------

    def _run(self) -> None:
        if self.settings.num_threads is not None:
            torch.set_num_threads(self.settings.num_threads)
        while True:
            job, batch, expired = self._next()
            if expired:
                self._post(_expire, expired)
            if job is not None:
                job()
            elif batch is not None:
                self._execute(batch)
            elif not expired:
                break
        self._post(_settle, self._stopped, None, None)

    def _next(self) -> tuple[Callable[[], None] | None, Batch | None, list[Request]]:
        """Waits for something to do. Nothing at all means: close."""
        with self._changed:
            while True:
                if self._jobs:
                    return self._jobs.popleft(), None, []
                now = time.monotonic()
                expired = self._batcher.pop_expired(now)
                batch = self._batcher.pop_ready(now)
                if expired or batch is not None or self._closing:
                    return None, batch, expired
                timer_at = self._batcher.timer_at()
                self._changed.wait(None if timer_at is None else max(timer_at - now, 0))

    def _execute(self, batch: Batch) -> None:
        started = time.monotonic()
        works: list[Work] = [part.request.payload for part in batch.parts]
        answers: list[tuple[Work, Answer | None, BaseException | None]] = []
        try:
            if works[0].output_gradients is None:
                answers = self._forward(batch.parts)
            else:
                answers = self._backward(batch.parts)
        except BaseException as error:  # our own mistake: the callers must not wait for ever
            logger.exception("a batch of %d rows failed outside the experts' code", batch.num_rows)
            answers = [(work, None, error) for work in works]
        finished = time.monotonic()
        self._busy_seconds += finished - started
        with self._changed:
            for work, _, failure in answers:
                if failure is not None and work.request is not None:
                    self._batcher.remove(work.request)  # the other parts of a split request
            self._batcher.finish(batch, finished)
        self._post(_deliver, answers)

    def _forward(self, parts: Sequence[Part]) -> list[tuple[Work, Answer | None, BaseException | None]]:
        """Computes a batch of forwards; if it fails, each half of it, so that only the request at fault fails."""
        works: list[Work] = [part.request.payload for part in parts]
        backend, training = works[0].backend, works[0].training
        try:
            outputs = backend.forward(self._gather(parts, [work.inputs for work in works]), training=training)
        except BaseException as error:
            if len(parts) == 1:
                return [(works[0], None, _expert_failed(error))]
            middle = len(parts) // 2
            return self._forward(parts[:middle]) + self._forward(parts[middle:])
        version = backend.version
        shares = _scatter([output.to("cpu") for output in outputs], parts)
        return [
            self._add_part(work, part, Answer(share, version))
            for work, part, share in zip(works, parts, shares, strict=True)
        ]

    def _backward(self, parts: Sequence[Part]) -> list[tuple[Work, Answer | None, BaseException | None]]:
        """Computes a batch of backwards and takes one step on the sum of their gradients."""
        backend = parts[0].request.payload.backend
        good, summed, answers = self._gradients(parts)
        version = backend.version
        if len(parts) == 1 and good and not (parts[0].start == 0 and parts[0].is_last):
            work: Work = parts[0].request.payload
            summed = work.summed = _add(work.summed, summed)
            if not parts[0].is_last:
                return [self._add_part(work, parts[0], Answer(good[0][1], version))]
        call_ids = [part.request.payload.call_id for part, _ in good]
        if good and None not in call_ids:
            assert summed is not None
            try:
                if not _all_finite(summed):
                    raise ExpertFailed("the parameters' gradients are not finite; no step was taken")
                version = backend.step(summed, call_ids)
            except BaseException as error:
                failure = _expert_failed(error)
                return answers + [(part.request.payload, None, failure) for part, _ in good]
        for part, share in good:
            answers.append(self._add_part(part.request.payload, part, Answer(share, version)))
        return answers

    def _gradients(
        self, parts: Sequence[Part]
    ) -> tuple[list[tuple[Part, Gradients]], Gradients | None, list[tuple[Work, Answer | None, BaseException | None]]]:
        """Input gradients of the parts that work, the sum of their parameter gradients, and the failures."""
        works: list[Work] = [part.request.payload for part in parts]
        backend, training = works[0].backend, works[0].training
        try:
            inputs = self._gather(parts, [work.inputs for work in works])
            gradients = self._gather_gradients(parts, works)
            if not _all_finite(gradients):
                raise ExpertFailed("the gradients that came with this call are not finite")
            of_inputs, of_parameters = backend.gradients(inputs, gradients, training=training)
            if not _all_finite(of_parameters):
                raise ExpertFailed("the gradients of the expert's parameters are not finite")
        except BaseException as error:
            if len(parts) == 1:
                return [], None, [(works[0], None, _expert_failed(error))]
            middle = len(parts) // 2
            good, summed, failed = self._gradients(parts[:middle])
            more_good, more_summed, more_failed = self._gradients(parts[middle:])
            return good + more_good, _add(summed, more_summed), failed + more_failed
        shares = _scatter([None if x is None else x.to("cpu") for x in of_inputs], parts)
        return list(zip(parts, shares, strict=True)), of_parameters, []

    def _gather(self, parts: Sequence[Part], tensors: Sequence[Sequence[torch.Tensor]]) -> list[torch.Tensor]:
        """The parts' rows as one batch on the device. One part alone is not copied."""
        columns = zip(
            *([x[part.start : part.stop] for x in row] for part, row in zip(parts, tensors, strict=True)), strict=True
        )
        return [(torch.cat(column) if len(column) > 1 else column[0]).to(self.device) for column in columns]

    def _gather_gradients(self, parts: Sequence[Part], works: Sequence[Work]) -> Gradients:
        """The same for output gradients: absent ones count as zeros beside present ones."""
        out: Gradients = []
        for index, spec in enumerate(works[0].backend.output_specs):
            column = [(work.output_gradients or [])[index] for work in works]
            if all(gradient is None for gradient in column):
                out.append(None)
                continue
            rows = [
                torch.zeros(part.stop - part.start, *spec.shape, dtype=spec.dtype)
                if gradient is None
                else gradient[part.start : part.stop]
                for part, gradient in zip(parts, column, strict=True)
            ]
            out.append((torch.cat(rows) if len(rows) > 1 else rows[0]).to(self.device))
        return out

    def _add_part(self, work: Work, part: Part, answer: Answer) -> tuple[Work, Answer | None, BaseException | None]:
        """The whole answer if this was the last part of the request, or the only one."""
        if part.start == 0 and part.is_last:
            return work, answer, None
        work.parts.append(answer)
        if not part.is_last:
            return work, None, None
        whole = [
            None if column[0] is None else torch.cat(column)
            for column in zip(*(one.tensors for one in work.parts), strict=True)
        ]
        return work, Answer(whole, answer.version), None

    def _post(self, function: Callable[..., None], *args: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop was closed without closing us: nobody waits any more
            self._running_loop.call_soon_threadsafe(function, *args)


# -- On the loop again -------------------------------------------------------------------------------------------------


def _deliver(answers: Sequence[tuple[Work, Answer | None, BaseException | None]]) -> None:
    for work, answer, error in answers:
        if error is not None:
            _fail(work, error)
        elif answer is not None and not work.answer.done():
            work.answer.set_result(answer)
        _forget(work)


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


def _outcome(function: Callable[[], Result]) -> tuple[Result | None, BaseException | None]:
    try:
        return function(), None
    except BaseException as error:
        return None, error


def _settle(future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)


def _expert_failed(error: BaseException) -> BaseException:
    if isinstance(error, RemoteError):
        return error
    logger.warning("an expert's module raised", exc_info=error)
    return ExpertFailed(f"the expert's module raised {describe(error)}")


def _scatter(tensors: Sequence[torch.Tensor | None], parts: Sequence[Part]) -> list[Gradients]:
    """Each part's rows of a batch's results, in order; they share the batch's memory."""
    shares: list[Gradients] = []
    row = 0
    for part in parts:
        stop = row + part.stop - part.start
        shares.append([None if tensor is None else tensor[row:stop] for tensor in tensors])
        row = stop
    return shares


def _add(left: Gradients | None, right: Gradients | None) -> Gradients | None:
    if left is None or right is None:
        return left if right is None else right
    return [b if a is None else a if b is None else a + b for a, b in zip(left, right, strict=True)]


def _all_finite(tensors: Gradients) -> bool:
    return all(tensor is None or bool(torch.isfinite(tensor).all()) for tensor in tensors)
