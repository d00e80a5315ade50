"""The commands of a mesh: sockets between the process that leads it and those that follow.

The processes of a mesh compute together by torch.distributed; these sockets tell them what to compute. No process waits
in a collective while there is nothing to do, so that an idle mesh costs nothing and outlasts every timeout. A socket
that reaches its end shows that a process has ended. Each follower has three sockets to the leader: one for commands,
one for pieces of states, and one that carries nothing, its lifeline.

A command is carried out by all. A fault that all had at the same point, counted in collectives, harms nobody; after any
other, collectives would no longer match, and the mesh is *lost*: its processes end, and what started them starts them
again.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import signal
import socket
import struct
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Final, Protocol

import psutil
import torch

from tesseract_async.errors import Overloaded, describe
from tesseract_async.runtime.mesh_meeting import (
    COMMANDS,
    LENGTH,
    LIFELINE,
    STATES,
    Meeting,
    frame_of,
    read,
    receive,
    send,
)
from tesseract_async.tasks import end
from tesseract_async.wire.compression import flat_of
from tesseract_async.wire.packed import Value

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

logger = logging.getLogger(__name__)

LOST_STATUS: Final = 75
"""The exit status of a process whose mesh is lost (EX_TEMPFAIL): it should be started again."""
_PIECE: Final = struct.Struct("!QIQQ")
"""The number of a state, the number of a tensor, its first row, and the row after the last."""

Counts = Mapping[str, int]
"""Collectives that were begun, by the name of their process group: each group's processes have begun the same."""


class Follows(Protocol):
    """The part that carries out commands: the same on every process, in the same order."""

    def carry_out(self, name: str, args: Sequence[Value]) -> Value:
        """Return what the leader should know; `forget` is a command, too. Raises what a module may raise: anything."""

    def recover(self) -> None:
        """Tidy up after a fault that every process had."""


class FaultElsewhere(Exception):
    """Raised by all processes that agree to stop. If the fault is another process's, that process knows more about
    it."""

    def __init__(self, text: str = "another process of the mesh raised") -> None:
        super().__init__(text)


class MeshLink:
    """This process's place among those of one torch.distributed job."""

    def __init__(self, store: Store, rank: int, size: int, *, timeout: float = 60.0, grace: float = 4.0) -> None:
        """Meet the others. `timeout`: seconds for this, and for a command under way; never for waiting for work.
        `grace`: seconds to wait for the others' reports after one had a fault.

        Raises: TimeoutError if they do not all come.
        """
        self.rank, self.size = rank, size
        self.timeout, self.grace = timeout, grace
        self.lost: str | None = None
        """The reason why this mesh no longer computes; None while it does."""
        self._followers: list[Callable[[], Follows | None]] = []  # what commands are about, by its number
        self.counts: Callable[[], Counts] = dict
        """The counts of this process."""
        self.states: dict[int, Sequence[torch.Tensor]] = {}
        """Tensors that are kept here for the leader, by the number of their state."""
        self.numbers = itertools.count(1)
        """The leader's, for what is kept everywhere."""
        self.retry_after = 5.0
        """Seconds after which callers of a lost mesh are told to ask again."""
        self._forgotten: deque[tuple[int, int]] = deque()  # filled from any thread
        self._commanding = threading.Lock()
        self._reading = [threading.Lock() for _ in range(size)]
        self._noticed: Callable[[], None] = lambda: None
        self._leaving = False
        meeting = Meeting(store, rank, size, timeout)
        self.token = meeting.token
        """Proves that a process belongs to this meeting, and to no other."""
        self._sockets, self._neighbors = meeting.sockets, meeting.neighbors
        if rank:
            self._start_thread(self._end_with_leader)

    # -- Leading ---------------------------------------------------------------------------------------------------

    def add(self, follower: Follows) -> int:
        """Return the number of something that commands are about: the same in every process. The others keep it as long
        as the leader does."""
        number = len(self._followers)
        if self.rank:
            self._followers.append(lambda: follower)
        else:
            self._followers.append(weakref.ref(follower))
            weakref.finalize(follower, self.forget, number, 0)
        return number

    def followers(self) -> list[Follows]:
        return [one for find in self._followers if (one := find()) is not None]

    def command(self, number: int, name: str, args: Sequence[Value] = ()) -> list[Value]:
        """Have every process do this with the follower of that number. Returns what it gave each, by rank.

        Raises: Overloaded once the mesh is lost; what was raised here, if it was raised everywhere at the same point.
        """
        with self._commanding:
            self.check()
            forgotten = [self._forgotten.popleft() for _ in range(len(self._forgotten))]
            frame = frame_of([number, name, args, forgotten])
            follower = self._followers[number]()
            assert follower is not None
            fault: BaseException | None = None
            result = None
            try:
                for rank in range(1, self.size):
                    one = self._sockets[COMMANDS, rank]
                    one.settimeout(self.timeout)  # one that is stopped reads nothing
                    one.sendall(frame)
                self._forget(forgotten)
                result = follower.carry_out(name, args)
            except BaseException as error:  # a module may raise anything
                fault = error
            # who had no fault is through when we are; who had one says so at once
            replies = self._replies(time.monotonic() + (self.timeout if fault is None else self.grace))
            if self.lost is None and (fault is not None or any(text is not None for text, _, _ in replies)):
                self._compare(fault, replies)
            self.check()
            if fault is None:
                return [result, *(value for _, _, value in replies)]
            follower.recover()
            for rank in range(1, self.size):
                send(self._sockets[COMMANDS, rank], None)  # go on
            if isinstance(fault, FaultElsewhere):
                known = (text for text, _, _ in replies if text is not None and not text.endswith(str(fault)))
                fault = RuntimeError(next(known, str(fault)))
            raise fault

    def _replies(self, until: float) -> list[tuple[str | None, Counts, Value]]:
        replies = []
        for rank in range(1, self.size):
            one = self._sockets[COMMANDS, rank]
            try:
                one.settimeout(max(0.001, until - time.monotonic()))
                replies.append(receive(one))
                one.settimeout(None)
            except (OSError, ValueError):
                self.lost = self.lost or f"process {rank} of the mesh does not answer"
                break
        return replies

    def _compare(self, fault: BaseException | None, replies: Sequence[tuple[str | None, Counts, Value]]) -> None:
        """Find out whether all had the same fault at the same point; else the mesh is lost."""
        counted: dict[str, set[int]] = {}
        for name, count in itertools.chain(self.counts().items(), *(counts.items() for _, counts, _ in replies)):
            counted.setdefault(name, set()).add(count)
        texts = [None if fault is None else f"process 0: {describe(fault)}", *(text for text, _, _ in replies)]
        if None in texts or any(len(numbers) > 1 for numbers in counted.values()):
            said = "; ".join(text for text in texts if text is not None)
            self.lost = f"the processes of the mesh are no longer in step ({said[:400]})"

    def end_followers(self) -> None:
        """Kill those on this machine, once the mesh is lost: one that hangs would keep torchrun waiting for 30 s."""
        for pid in self._neighbors.values():
            with contextlib.suppress(psutil.Error):
                one = psutil.Process(pid)
                if one.ppid() == os.getppid():  # a machine may have several containers, which number processes alike
                    one.kill()

    def check(self) -> None:
        """Raises: Overloaded once the mesh is lost."""
        if self.lost is not None:
            self._noticed()
            raise Overloaded(
                f"{self.lost}: this expert comes back from its last checkpoint", retry_after=self.retry_after
            )

    async def wait_lost(self) -> str:
        """Wait until the mesh is lost, even while there is nothing to do, and return why. On the leader's loop."""
        loop = asyncio.get_running_loop()
        found: asyncio.Future[str] = loop.create_future()

        def notice() -> None:
            if not found.done():
                found.set_result(self.lost or "the mesh is lost")

        async def watch(rank: int) -> None:
            one = self._sockets[LIFELINE, rank]
            one.setblocking(False)
            with contextlib.suppress(OSError):
                await loop.sock_recv(one, 1)
            if not self._leaving:
                self.lost = self.lost or f"process {rank} of the mesh is gone"
                notice()

        def noticed() -> None:
            loop.call_soon_threadsafe(notice)

        self._noticed = noticed
        watchers = [asyncio.create_task(watch(rank), name="mesh") for rank in range(1, self.size)]
        try:
            if self.lost is not None:
                notice()
            return await found
        finally:
            self._noticed = lambda: None
            await end(*watchers)

    def forget(self, follower: int, number: int) -> None:
        """Let every process drop what it keeps under this number, or the follower itself (0), with the next command.

        From any thread."""
        self._forgotten.append((follower, number))

    def read(self, rank: int, state: int, tensor: int, start: int, stop: int) -> bytes | bytearray | memoryview:
        """Return these rows of a tensor that a process keeps. From any thread. Raises: Overloaded."""
        if rank == 0:
            return _bytes_of(self.states[state][tensor][start:stop])
        one = self._sockets[STATES, rank]
        with self._reading[rank]:
            try:
                one.settimeout(self.timeout)
                one.sendall(_PIECE.pack(state, tensor, start, stop))
                return read(one, LENGTH.unpack(read(one, LENGTH.size))[0])
            except (OSError, struct.error):
                self.lost = self.lost or f"process {rank} of the mesh does not hand out its state"
        self.check()
        raise AssertionError("a lost mesh raises")

    def leave(self) -> None:
        """Let the followers go, after the last command; a lost mesh is left as it is."""
        with self._commanding:
            if self._leaving or self.lost is not None:
                return
            self._leaving = True
            for rank in range(1, self.size):
                with contextlib.suppress(OSError, ValueError):
                    one = self._sockets[COMMANDS, rank]
                    one.settimeout(self.grace)
                    send(one, None)
                    receive(one)
            self.close()

    def close(self) -> None:
        """Close every socket: the others see this process leave."""
        self._leaving = True
        for one in self._sockets.values():
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)  # wakes the threads that wait for it
            one.close()

    # -- Following -------------------------------------------------------------------------------------------------

    def follow(self) -> None:
        """Do what the leader does, until it leaves. On the main thread, signals to leave are the leader's business.

        If the leader ends otherwise, or this process is no longer in step with the others, the process exits with
        status `LOST_STATUS`: it may hang in a collective, from which nothing else frees it.
        """
        for number in (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ():
            # the leader is told, too, and needs this process for its last checkpoint
            signal.signal(number, lambda *_: None)
        self._start_thread(self._hand_out)
        leader = self._sockets[COMMANDS, 0]
        try:
            while (command := receive(leader)) is not None:
                index, name, args, forgotten = command
                follower = self._followers[index]()
                assert follower is not None
                try:
                    self._forget(forgotten)
                    reply = [None, {}, follower.carry_out(name, args)]
                except BaseException as error:  # a module may raise anything; the leader mostly has it, too
                    logger.info("process %d: %s", self.rank, describe(error), exc_info=error)
                    send(leader, [f"process {self.rank}: {describe(error)[:400]}", self.counts(), None])
                    leader.settimeout(2 * self.grace)
                    receive(leader)  # go on
                    leader.settimeout(None)
                    follower.recover()
                else:
                    send(leader, reply)
        except (OSError, ValueError) as error:
            # which, after a fault that this process alone had, nobody else knows
            fault = error.__context__
            logger.warning("process %d leaves its mesh: %s", self.rank, describe(error), exc_info=fault)
            os._exit(LOST_STATUS)
        self._leaving = True
        send(leader, None)
        self.close()

    def _start_thread(self, work: Callable[[], None]) -> None:
        threading.Thread(target=work, name="tesseract-mesh", daemon=True).start()

    def _forget(self, forgotten: Sequence[Sequence[int]]) -> None:
        for index, number in forgotten:
            self.states.pop(number, None)  # which may outlive its expert
            if (follower := self._followers[index]()) is not None:
                follower.carry_out("forget", [number])
            if not number:
                self._followers[index] = lambda: None

    def _end_with_leader(self) -> None:
        with contextlib.suppress(OSError):
            self._sockets[LIFELINE, 0].recv(1)
        if not self._leaving:
            time.sleep(min(1.0, self.grace))  # the main thread may have noticed by itself, and says why
        if not self._leaving:
            os._exit(LOST_STATUS)

    def _hand_out(self) -> None:
        one = self._sockets[STATES, 0]
        with contextlib.suppress(OSError, ValueError, struct.error, LookupError):
            while True:
                state, tensor, start, stop = _PIECE.unpack(read(one, _PIECE.size))
                rows = _bytes_of(self.states[state][tensor][start:stop])
                one.sendall(LENGTH.pack(len(rows)))
                one.sendall(rows)


def _bytes_of(rows: torch.Tensor) -> memoryview:
    found: memoryview = flat_of(rows).view(torch.uint8).numpy().data
    return found
