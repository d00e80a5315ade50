"""Ends tasks that nobody waits for any more, and futures that tell at once."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class PromptFuture(asyncio.Future[T]):
    """A future whose listeners hear of its end within it, not in the loop's next turn."""

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
        """As of any future."""
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
            except BaseException as error:  # of the others, and of who ends it, it is no business: a cancellation, too
                context = {"message": f"a listener of {type(self).__name__} failed", "exception": error}
                self.get_loop().call_exception_handler(context)


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
