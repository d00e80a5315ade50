"""Tasks that nobody waits for, and how they end; futures that notify their listeners at once."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import TypeVar

T = TypeVar("T")


class PromptFuture(asyncio.Future[T]):
    """A future that calls its listeners at the moment when it is done, not in the loop's next turn."""

    _listeners: tuple[Callable[[asyncio.Future[T]], object], ...] = ()

    def add_listener(self, listener: Callable[[asyncio.Future[T]], object]) -> None:
        """Have `listener` called with this future as soon as it is done, in the order in which they came."""
        if self.done():
            self.get_loop().call_soon(listener, self)
        else:
            self._listeners = (*self._listeners, listener)

    def set_result(self, result: T, /) -> None:
        super().set_result(result)
        self._tell()

    def set_exception(self, exception: type | BaseException, /) -> None:
        super().set_exception(exception)
        self._tell()

    def cancel(self, msg: object = None) -> bool:
        """Cancel it, as any future."""
        is_cancelled = super().cancel(msg)
        self._tell()
        return is_cancelled

    def _tell(self) -> None:
        listeners, self._listeners = self._listeners, ()
        for listener in listeners:
            try:
                listener(self)
            except (SystemExit, KeyboardInterrupt):
                raise
            except BaseException as error:  # a cancellation, too: it concerns no other listener and not the caller
                context = {"message": f"a listener of {type(self).__name__} failed", "exception": error}
                self.get_loop().call_exception_handler(context)


class TaskSet(set[asyncio.Task[None]]):
    """Tasks that nobody waits for, until they are over."""

    def __init__(self, name: str, *, on_error: Callable[[BaseException], None] | None = None) -> None:
        """`name`: the tasks'. `on_error` is told what one of them raises; otherwise the loop logs it."""
        super().__init__()
        self._name, self._on_error = name, on_error
        self.is_closed = False

    def spawn(self, work: Coroutine[object, object, None]) -> None:
        """Run `work` in a task; not at all after `aclose`."""
        if self.is_closed:
            work.close()
            return
        task = asyncio.get_running_loop().create_task(work, name=self._name)
        self.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self.discard(task)
        if self._on_error is not None and not task.cancelled() and (error := task.exception()) is not None:
            self._on_error(error)

    async def wait_done(self) -> None:
        while self:
            await asyncio.wait(self)

    async def aclose(self) -> None:
        """Cancel all tasks and wait for their end."""
        self.is_closed = True
        await end(*self)


async def in_time(work: Awaitable[object], seconds: float | None) -> bool:
    """Await `work` for so many seconds at most (None: however long); return whether it ended by then."""
    try:
        async with asyncio.timeout(seconds):
            await work
    except TimeoutError:
        return False
    return True


async def end(*tasks: asyncio.Task[object] | None) -> None:
    """Cancel the tasks that still run, and wait until they are over; their errors are dropped."""
    running = [task for task in tasks if task is not None]
    for task in running:
        task.add_done_callback(_forget)
        task.cancel()
    if running:
        await asyncio.wait(running)


def _forget(task: asyncio.Task[object]) -> None:
    if not task.cancelled():
        task.exception()  # once asked for, it is not logged as lost
