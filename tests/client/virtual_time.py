"""An event loop in virtual time, for training steps too: hours of a swarm's life in seconds, and nobody waits."""

import asyncio
import contextlib
import functools
import selectors
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar

import pytest

from tesseract_async.client import autograd
from tesseract_async.client.gradient_requests import GradientRequest
from tesseract_async.testing import VirtualClock

T = TypeVar("T")

STUCK_SECONDS = 5.0
"""After so many real ones in which nothing can happen any more, a test has found a deadlock."""


class Engine:
    """Knows whether an engine's thread computes: then time stands still. One that waits for an answer does not."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_jobs = 0
        self.most_jobs = 0
        self._waiting: list[Any] = []
        submit, wait = autograd.run_in_engine_thread, GradientRequest.wait

        def counted_submit(work: Any, outcome: asyncio.Future[Any]) -> None:
            self.num_jobs += 1
            self.most_jobs = max(self.most_jobs, self.num_jobs)
            outcome.add_done_callback(self._ended)
            submit(work, outcome)

        def watched_wait(request: Any) -> Any:
            self._waiting.append(request)
            try:
                return wait(request)
            finally:
                self._waiting.remove(request)

        monkeypatch.setattr(autograd, "run_in_engine_thread", counted_submit)
        monkeypatch.setattr(GradientRequest, "wait", watched_wait)

    def _ended(self, outcome: object) -> None:
        self.num_jobs -= 1

    def computes(self) -> bool:
        return self.num_jobs > sum(not request.is_done for request in list(self._waiting))


class _Selector(selectors.DefaultSelector):  # type: ignore[valid-type, misc]
    """Does not sleep until the loop's next timer is due, but makes it due."""

    clock: VirtualClock
    engine: Engine
    stuck_seconds = STUCK_SECONDS

    def select(self, timeout: float | None = None) -> Any:
        stuck_at = time.monotonic() + self.stuck_seconds
        while True:
            happened = super().select(0)
            if happened or (timeout is not None and timeout <= 0):
                return happened
            if self.engine.computes():
                if happened := super().select(0.001):
                    return happened
            elif timeout is not None:
                if happened := super().select(0):  # what it had started before it waited
                    return happened
                self.clock.run(timeout)
                return []
            elif happened := super().select(0.05):
                return happened
            elif time.monotonic() > stuck_at:
                raise AssertionError("nothing will ever happen any more: a deadlock")


class VirtualLoop(asyncio.SelectorEventLoop):
    """An asyncio loop whose `time` is a `VirtualClock`."""

    def __init__(self, engine: Engine, *, stuck_seconds: float = STUCK_SECONDS) -> None:
        selector = _Selector()
        selector.stuck_seconds = stuck_seconds
        selector.clock, selector.engine = VirtualClock(), engine
        self.clock = selector.clock
        super().__init__(selector)

    def time(self) -> float:
        return self.clock.now


@contextlib.contextmanager
def virtual_time(*, stuck_seconds: float = STUCK_SECONDS) -> Iterator[asyncio.Runner]:
    """A runner of coroutines in virtual time; `asyncio.get_running_loop().time()` is seconds since the start."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        engine = Engine(monkeypatch)
        with asyncio.Runner(loop_factory=lambda: VirtualLoop(engine, stuck_seconds=stuck_seconds)) as runner:
            runner.engine = engine  # type: ignore[attr-defined]
            yield runner


def run_in_virtual_time(coroutine: Coroutine[Any, Any, T], *, stuck_seconds: float = STUCK_SECONDS) -> T:
    """The coroutine's result. It must leave no task behind."""

    async def main() -> T:
        result = await coroutine
        for _ in range(3):
            await asyncio.sleep(0)
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left, f"tasks left: {left}"
        return result

    with virtual_time(stuck_seconds=stuck_seconds) as runner:
        return runner.run(main())


def in_made_up_time(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """A test that runs in virtual time: what it holds of time-outs and latencies holds on a busy machine, too."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        run_in_virtual_time(test(*args, **kwargs))

    return run
