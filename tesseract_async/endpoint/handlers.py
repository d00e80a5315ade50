"""Runs the handlers of the calls that one peer makes, and sends their answers."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Generator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, Generic, TypeVar

from tesseract_async.endpoint.call_table import Answer, IncomingCall, LastPart, Message, in_one
from tesseract_async.endpoint.events import CallReceived
from tesseract_async.endpoint.protocol import ConnectionProtocol
from tesseract_async.errors import RemoteError, describe
from tesseract_async.identity import PeerID
from tesseract_async.tasks import PromptFuture

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

STARTS_PER_TURN: Final = 128
"""Handlers started in one turn of the loop: a burst of calls is started in portions, so that its first replies show
whether the peer reads them."""


@dataclass(slots=True, eq=False)
class Deferred(Awaitable[Result], Generic[Result]):
    """A result that follows from a future. As the answer of a handler, a message, it takes no task.

    `finish` makes it once the future is done, or raises, or gives another `Deferred` to wait for. `cancel` is called
    instead where nobody waits any more.
    """

    future: asyncio.Future[Any]
    finish: "Callable[[], Result | Deferred[Result]]" = field(kw_only=True)
    cancel: Callable[[], object] = field(kw_only=True)

    def __await__(self) -> Generator[object, object, Result]:
        try:
            yield from asyncio.shield(self.future).__await__()  # others may wait for it, too
        except asyncio.CancelledError:
            self.cancel()
            raise
        except Exception:  # the work's own
            pass  # `finish` meets it, too
        result = self.finish()
        return (yield from result.__await__()) if isinstance(result, Deferred) else result


class Handlers:
    """The handlers of one connection, each in a task of its own unless it answers by a `Deferred`. `answer` finds and
    calls the handler of a call.

    While more than `max_backlog` bytes of replies wait to be read, further calls are held and replies in parts pause.
    `done` is called whenever a handler has ended, or sent a part: with True where it answered by a `Deferred` and was
    the last one under way.
    """

    def __init__(
        self,
        protocol: ConnectionProtocol,
        answer: Callable[[IncomingCall], Answer],
        peer_id: PeerID,
        origin: str,
        *,
        max_backlog: int,
        done: Callable[[bool], None],
    ) -> None:
        self.tasks: set[asyncio.Task[None]] = set()
        """Tasks of handlers that have not ended."""
        self._protocol = protocol
        self._answer = answer
        self._peer_id = peer_id
        self._origin = origin
        self._max_backlog = max_backlog
        self._done = done
        self._loop = asyncio.get_running_loop()
        self._running: dict[int, asyncio.Task[None] | Deferred[Message]] = {}
        self._held: dict[int, CallReceived] = {}
        self._started = 0  # since the last flush
        self._may_send: dict[int, asyncio.Event] = {}  # of replies in parts

    def received(self, event: CallReceived, *, was_held: bool = False) -> bool:
        """Start the call's handler. False if it is held until a flush."""
        if not was_held and (
            self._held or self._started >= STARTS_PER_TURN or self._protocol.backlog > self._max_backlog
        ):
            self._held[event.stream] = event
            return False
        self._started += 1
        head = event.head
        call = IncomingCall(
            peer_id=self._peer_id,
            method=head.method,
            body=head.body,
            buffers=event.buffers,
            deadline=event.deadline,
            priority=head.priority,
            origin=self._origin,
            in_parts=event.in_parts,
        )
        stream = event.stream
        try:
            answer = self._answer(call)
        except Exception as error:  # a handler may raise anything
            self._fail(stream, call.method, error)
            self._done(False)
            return True
        if type(answer) is Deferred:
            self._defer(stream, call.method, answer)
            return True
        task = self._running[stream] = self._loop.create_task(self._run(stream, call.method, call.in_parts, answer))
        self.tasks.add(task)
        task.add_done_callback(partial(self._ended, answer))
        return True

    def cancel(self, stream: int) -> None:
        self._held.pop(stream, None)
        running = self._running.pop(stream, None)
        if running is not None:
            running.cancel()

    def part_wanted(self, stream: int) -> None:
        if (may_send := self._may_send.get(stream)) is not None:
            may_send.set()

    def flushed(self) -> bool:
        """Start held calls, resume replies in parts. Return whether more calls may start after the next flush."""
        self._started = 0
        while self._held and self._started < STARTS_PER_TURN and self._protocol.backlog <= self._max_backlog:
            self.received(self._held.pop(next(iter(self._held))), was_held=True)
        if self._protocol.backlog > self._max_backlog:
            return False
        for may_send in self._may_send.values():
            may_send.set()
        return bool(self._held)

    def _defer(self, stream: int, method: str, deferred: Deferred[Message]) -> None:
        self._running[stream] = deferred
        future, ended = deferred.future, partial(self._finish, stream, method, deferred)
        if isinstance(future, PromptFuture):
            future.add_listener(ended)
        else:
            future.add_done_callback(ended)

    def _ended(self, answer: Answer, task: asyncio.Task[None]) -> None:
        self.tasks.discard(task)
        if isinstance(answer, Coroutine):  # it never began, if the task was cancelled before its turn
            answer.close()

    def _finish(self, stream: int, method: str, deferred: Deferred[Message], _: object) -> None:
        if self._running.get(stream) is not deferred:  # cancelled
            return
        del self._running[stream]
        try:
            answer = deferred.finish()
            if isinstance(answer, Deferred):
                self._defer(stream, method, answer)
                return
            body, buffers = answer
            self._protocol.reply(stream, body, buffers, now=self._loop.time())
        except (Exception, asyncio.CancelledError) as error:
            self._fail(stream, method, error)
        if is_last := not self._running and not self._held:
            self._started = 0
        self._done(is_last)

    async def _run(self, stream: int, method: str, in_parts: bool, answer: Answer) -> None:
        try:
            if in_parts and isinstance(answer, AsyncGenerator):
                await self._send_parts(stream, answer)
            else:
                body, buffers = await in_one(answer, method)
                self._protocol.reply(stream, body, buffers, now=self._loop.time())
        except asyncio.CancelledError as error:
            if self._running.get(stream) is asyncio.current_task():
                self._fail(stream, method, error)
            raise
        except Exception as error:  # a handler may raise anything
            self._fail(stream, method, error)
        finally:
            if self._running.get(stream) is asyncio.current_task():  # a peer may use its number anew meanwhile
                del self._running[stream]
            self._done(False)

    def _fail(self, stream: int, method: str, error: BaseException) -> None:
        if isinstance(error, asyncio.CancelledError):  # not by us: it cancelled itself, or the program stops
            error = RemoteError(f"{method} was cancelled")
        elif not isinstance(error, RemoteError):  # what a handler raises is not ours to know
            logger.error("%s, called by %s, failed", method, self._peer_id.short, exc_info=error)
            error = RemoteError(f"{method} failed: {describe(error)}")
        self._protocol.fail(stream, error)

    async def _send_parts(self, stream: int, parts: AsyncGenerator[Message, None]) -> None:
        may_send = self._may_send[stream] = asyncio.Event()
        try:
            async with contextlib.aclosing(parts):
                more = True
                while more:
                    while self._protocol.backlog > self._max_backlog or not self._protocol.incoming.takes_part(stream):
                        may_send.clear()
                        await may_send.wait()
                    message = await anext(parts, None)
                    more = message is not None and type(message) is not LastPart
                    body, buffers = message or Message()
                    if not self._protocol.reply(stream, body, buffers, now=self._loop.time(), more=more):
                        return
                    self._done(False)
        finally:
            if self._may_send.get(stream) is may_send:
                del self._may_send[stream]
