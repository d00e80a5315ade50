"""The commands of a mesh: sockets between the process that leads it and those that follow.

The processes of a mesh compute together by torch.distributed; what they compute is said here. Nobody waits in a
collective while there is nothing to do, so that an idle mesh costs nothing and outlasts every time-out, and the end of
a process is the end of a file. Each follower has three sockets to the leader: one for commands, one for pieces of
states, and one that carries nothing, its lifeline.

The leader listens only while the mesh meets, on the interface by which it reaches torch's store. Each side proves that
it read the token in that store; a stranger gets so many bytes of attention and so many seconds.

A command is carried out by all. A fault that all had at the same point, counted in collectives, harms nobody; after any
other, collectives would no longer match, and the mesh is *lost*: its processes end, and what started them starts them
again.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import ipaddress
import itertools
import logging
import os
import secrets
import selectors
import signal
import socket
import struct
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol

import msgpack
import torch

from tesseract_async.errors import Overloaded, describe
from tesseract_async.wire.compression import flat_of

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

logger = logging.getLogger(__name__)

LOST_STATUS: Final = 75
"""The exit status of a process whose mesh is lost (EX_TEMPFAIL): it should be started again."""
MAX_FRAME_BYTES: Final = 64 << 20
"""A command without its tensors: the names and options of an expert's state, at most."""
PIECE_BYTES: Final = 4 << 20
"""Of a state, about as much at a time."""
HELLO_TIMEOUT: Final = 5.0
MAX_STRANGERS: Final = 64
"""Connections that have not proved anything yet."""
RETRY_SECONDS: Final = 0.1

_KEY: Final = "tesseract/mesh"
_CHANNELS: Final = range(3)
_COMMANDS, _LIFELINE, _STATES = _CHANNELS
_NONCE_BYTES: Final = 16
_PROOF_BYTES: Final = 32
_HELLO: Final = struct.Struct(f"!IB{_NONCE_BYTES}s{_PROOF_BYTES}s")
"""Rank, channel, the follower's nonce, its proof."""
_LENGTH: Final = struct.Struct("!I")
_PIECE: Final = struct.Struct("!QIQQ")
"""A state's number, a tensor's, its first row and the one after the last."""

Value = Any  # what msgpack holds
Counts = Sequence[tuple[Sequence[int], int]]


class Follows(Protocol):
    """What carries out commands: the same on every process, in the same order."""

    def carry_out(self, name: str, args: Sequence[Value]) -> Value:
        """Return what the leader should know; `forget` is a command, too. Raises what a module may raise: anything."""

    def recover(self) -> None:
        """Tidy up after a fault that every process had."""


class FaultElsewhere(Exception):
    """The fault is another process's, which knows more."""

    def __init__(self) -> None:
        super().__init__("another process of the mesh raised")


class MeshLink:
    """This process's place among those of one torch.distributed job."""

    def __init__(self, store: Store, rank: int, size: int, *, timeout: float = 60.0, grace: float = 4.0) -> None:
        """Meet the others. `timeout`: seconds for this, and for a command under way; never for waiting for work.
        `grace`: for the others' word after one had a fault.

        Raises: TimeoutError if they do not all come.
        """
        self.rank, self.size = rank, size
        self.timeout, self.grace = timeout, grace
        self.lost: str | None = None
        """Why this mesh computes no more, once that is so."""
        self._followers: list[Callable[[], Follows | None]] = []  # what commands are about, by its number
        self.counts: Callable[[], Counts] = tuple
        """The collectives begun here, of each group of ranks."""
        self.states: dict[int, Sequence[torch.Tensor]] = {}
        """Tensors that are kept here for the leader, by the number of their state."""
        self.numbers = itertools.count(1)
        """The leader's, for what is kept everywhere."""
        self.token = ""
        """Proves that a process belongs to this meeting, and to no other."""
        self.retry_after = 5.0
        """Seconds after which callers of a lost mesh are told to ask again."""
        self._sockets: dict[tuple[int, int], socket.socket] = {}  # by channel and rank; a follower's are of rank 0
        self._forgotten: deque[tuple[int, int]] = deque()  # filled from any thread
        self._commanding = threading.Lock()
        self._reading = [threading.Lock() for _ in range(size)]
        self._noticed: Callable[[], None] = lambda: None
        self._leaving = False
        until = time.monotonic() + timeout
        if rank == 0:
            self._gather(store, until)
        else:
            self._join(store, until)
        for one in self._sockets.values():
            _keep_alive(one)
        if rank:
            _send(self._sockets[_COMMANDS, 0], [socket.gethostname(), os.getpid()])
        self._neighbors = self._hear_names(until)

    # -- Meeting ---------------------------------------------------------------------------------------------------

    def _gather(self, store: Store, until: float) -> None:
        """Let the others connect; strangers may, too, and learn nothing."""
        host = own_address(store, self.size)
        self.token = secrets.token_hex(32)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.create_server((host, 0), family=family, backlog=128) as listener:
            listener.setblocking(False)
            store.set(_KEY, f"{host} {listener.getsockname()[1]} {self.token}")
            waiting: dict[socket.socket, _Stranger] = {}
            try:
                while len(self._sockets) < 3 * (self.size - 1):
                    self._admit(listener, waiting, until)
            finally:
                for one in waiting:
                    one.close()

    def _admit(self, listener: socket.socket, waiting: dict[socket.socket, _Stranger], until: float) -> None:
        now = time.monotonic()
        if now >= until:
            missing = sorted(set(range(1, self.size)) - {rank for _, rank in self._sockets})
            raise TimeoutError(f"the processes {missing} of the mesh did not come within {self.timeout:g} s")
        for one in [one for one, stranger in waiting.items() if stranger.until <= now]:
            del waiting[one]
            one.close()
        with selectors.DefaultSelector() as selector:
            for one in (listener, *waiting):
                selector.register(one, selectors.EVENT_READ)
            ready = selector.select(min([until, *(stranger.until for stranger in waiting.values())]) - now)
        for key, _ in ready:
            if key.fileobj is not listener:
                self._hear(key.fileobj, waiting)  # type: ignore[arg-type]
                continue
            with contextlib.suppress(OSError):
                one, _ = listener.accept()
                if len(waiting) >= MAX_STRANGERS:
                    oldest = next(iter(waiting))  # if it is one of ours, it comes again
                    del waiting[oldest]
                    oldest.close()
                waiting[one] = _Stranger(time.monotonic() + HELLO_TIMEOUT)
                one.setblocking(False)
                one.send(waiting[one].nonce)

    def _hear_names(self, until: float) -> dict[int, int]:
        """Return the pids of the followers on this machine, by rank; empty on a follower."""
        found = {}
        for rank in range(1, self.size if self.rank == 0 else 1):
            one = self._sockets[_COMMANDS, rank]
            one.settimeout(max(0.001, until - time.monotonic()))
            host, pid = _receive(one)
            one.settimeout(None)
            if host == socket.gethostname():
                found[rank] = pid
        return found

    def _hear(self, one: socket.socket, waiting: dict[socket.socket, _Stranger]) -> None:
        stranger = waiting.get(one)
        if stranger is None:  # it gave way meanwhile
            return
        try:
            data = one.recv(_HELLO.size - len(stranger.said))
            stranger.said += data
            if data and len(stranger.said) < _HELLO.size:
                return
            rank, channel, nonce, proof = _HELLO.unpack(stranger.said)
            expected = _proof(self.token, b"follower", stranger.nonce, nonce, rank, channel)
            if not hmac.compare_digest(proof, expected) or not 0 < rank < self.size or channel not in _CHANNELS:
                raise ConnectionRefusedError("not of this mesh")
            one.send(_proof(self.token, b"leader", nonce, stranger.nonce, rank, channel))
            one.setblocking(True)
        except (OSError, struct.error):
            del waiting[one]
            one.close()
            return
        del waiting[one]
        if (before := self._sockets.pop((channel, rank), None)) is not None:  # it began again
            before.close()
        self._sockets[channel, rank] = one

    def _join(self, store: Store, until: float) -> None:
        while len(self._sockets) < 3:
            # what is written there may be of a meeting that is over: then nobody listens any more
            host, port, self.token = store.get(_KEY).decode().split()
            try:
                for channel in _CHANNELS:
                    self._sockets[channel, 0] = self._shake_hands(host, int(port), channel)
            except OSError as error:
                for one in self._sockets.values():
                    one.close()
                self._sockets.clear()
                if time.monotonic() > until:
                    raise TimeoutError(f"process 0 of the mesh was not found: {describe(error)}") from error
                time.sleep(RETRY_SECONDS)

    def _shake_hands(self, host: str, port: int, channel: int) -> socket.socket:
        """Connect to the leader. Raises: OSError if that is not who listens there."""
        one = socket.create_connection((host, port), timeout=HELLO_TIMEOUT)
        try:
            theirs, mine = bytes(_read(one, _NONCE_BYTES)), secrets.token_bytes(_NONCE_BYTES)
            one.sendall(
                _HELLO.pack(self.rank, channel, mine, _proof(self.token, b"follower", theirs, mine, self.rank, channel))
            )
            expected = _proof(self.token, b"leader", mine, theirs, self.rank, channel)
            if not hmac.compare_digest(bytes(_read(one, _PROOF_BYTES)), expected):
                raise ConnectionRefusedError("somebody else listens there")
            one.settimeout(None)
        except BaseException:
            one.close()
            raise
        return one

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
            frame = _frame([number, name, args, forgotten])
            follower = self._followers[number]()
            assert follower is not None
            fault: BaseException | None = None
            result = None
            try:
                for rank in range(1, self.size):
                    one = self._sockets[_COMMANDS, rank]
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
                _send(self._sockets[_COMMANDS, rank], None)  # go on
            if isinstance(fault, FaultElsewhere):
                known = (text for text, _, _ in replies if text is not None and not text.endswith(str(fault)))
                fault = RuntimeError(next(known, str(fault)))
            raise fault

    def _replies(self, until: float) -> list[tuple[str | None, Counts, Value]]:
        replies = []
        for rank in range(1, self.size):
            one = self._sockets[_COMMANDS, rank]
            try:
                one.settimeout(max(0.001, until - time.monotonic()))
                replies.append(_receive(one))
                one.settimeout(None)
            except (OSError, ValueError):
                self.lost = self.lost or f"process {rank} of the mesh does not answer"
                break
        return replies

    def _compare(self, fault: BaseException | None, replies: Sequence[tuple[str | None, Counts, Value]]) -> None:
        """Find out whether all had the same fault at the same point; else the mesh is lost."""
        counted: dict[tuple[int, ...], set[int]] = {}
        for ranks, count in [*self.counts(), *(one for _, counts, _ in replies for one in counts)]:
            counted.setdefault(tuple(ranks), set()).add(count)
        texts = [None if fault is None else f"process 0: {describe(fault)}", *(text for text, _, _ in replies)]
        if None in texts or any(len(numbers) > 1 for numbers in counted.values()):
            said = "; ".join(text for text in texts if text is not None)
            self.lost = f"the processes of the mesh are no longer in step ({said[:400]})"

    def end_followers(self) -> None:
        """Kill those on this machine, once the mesh is lost: one that hangs would keep torchrun waiting for 30 s."""
        for pid in self._neighbors.values():
            with contextlib.suppress(OSError):
                os.kill(pid, getattr(signal, "SIGKILL", signal.SIGTERM))

    def check(self) -> None:
        """Raises: Overloaded once the mesh is lost."""
        if self.lost is not None:
            self._noticed()
            raise Overloaded(
                f"{self.lost}: this expert comes back from its last checkpoint", retry_after=self.retry_after
            )

    async def wait_lost(self) -> str:
        """Return why, once the mesh is lost, be it while there is nothing to do. On the leader's loop."""
        loop = asyncio.get_running_loop()
        found: asyncio.Future[str] = loop.create_future()

        def notice() -> None:
            if not found.done():
                found.set_result(self.lost or "the mesh is lost")

        async def watch(rank: int) -> None:
            one = self._sockets[_LIFELINE, rank]
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
            for one in watchers:
                one.cancel()
            await asyncio.gather(*watchers, return_exceptions=True)

    def forget(self, follower: int, number: int) -> None:
        """Let every process drop what it keeps under this number, or the follower itself (0), with the next command.

        From any thread."""
        self._forgotten.append((follower, number))

    def read(self, rank: int, state: int, tensor: int, start: int, stop: int) -> bytes | bytearray | memoryview:
        """Return these rows of a tensor that a process keeps. From any thread. Raises: Overloaded."""
        if rank == 0:
            return _bytes_of(self.states[state][tensor][start:stop])
        one = self._sockets[_STATES, rank]
        with self._reading[rank]:
            try:
                one.settimeout(self.timeout)
                one.sendall(_PIECE.pack(state, tensor, start, stop))
                return _read(one, _LENGTH.unpack(_read(one, _LENGTH.size))[0])
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
                    one = self._sockets[_COMMANDS, rank]
                    one.settimeout(self.grace)
                    _send(one, None)
                    _receive(one)
            self._close()

    def _close(self) -> None:
        for one in self._sockets.values():
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
        for work in (self._end_with_leader, self._hand_out):
            threading.Thread(target=work, name="tesseract-mesh", daemon=True).start()
        leader = self._sockets[_COMMANDS, 0]
        try:
            while (command := _receive(leader)) is not None:
                index, name, args, forgotten = command
                follower = self._followers[index]()
                assert follower is not None
                try:
                    self._forget(forgotten)
                    reply = [None, [], follower.carry_out(name, args)]
                except BaseException as error:  # a module may raise anything; the leader mostly has it, too
                    logger.info("process %d: %s", self.rank, describe(error), exc_info=error)
                    _send(leader, [f"process {self.rank}: {describe(error)[:400]}", self.counts(), None])
                    leader.settimeout(2 * self.grace)
                    _receive(leader)  # go on
                    leader.settimeout(None)
                    follower.recover()
                else:
                    _send(leader, reply)
        except (OSError, ValueError) as error:
            logger.warning("process %d leaves its mesh: %s", self.rank, describe(error))
            os._exit(LOST_STATUS)
        self._leaving = True
        _send(leader, None)
        self._close()

    def _forget(self, forgotten: Sequence[Sequence[int]]) -> None:
        for index, number in forgotten:
            self.states.pop(number, None)  # which may outlive its expert
            if (follower := self._followers[index]()) is not None:
                follower.carry_out("forget", [number])
            if not number:
                self._followers[index] = lambda: None

    def _end_with_leader(self) -> None:
        with contextlib.suppress(OSError):
            self._sockets[_LIFELINE, 0].recv(1)
        if not self._leaving:
            time.sleep(min(1.0, self.grace))  # the main thread may have noticed by itself, and says why
        if not self._leaving:
            os._exit(LOST_STATUS)

    def _hand_out(self) -> None:
        one = self._sockets[_STATES, 0]
        with contextlib.suppress(OSError, ValueError, struct.error, LookupError):
            while True:
                state, tensor, start, stop = _PIECE.unpack(_read(one, _PIECE.size))
                rows = _bytes_of(self.states[state][tensor][start:stop])
                one.sendall(_LENGTH.pack(len(rows)))
                one.sendall(rows)


class _Stranger:
    """A connection that has yet to prove that it is of this mesh."""

    def __init__(self, until: float) -> None:
        self.until = until
        self.nonce = secrets.token_bytes(_NONCE_BYTES)
        self.said = b""


def own_address(store: Store, size: int) -> str:
    """Return the address of this machine on the interface by which it reaches torch's store, which `size` share.

    Raises: ValueError if processes on other machines could not reach it.
    """
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    host, port = str(getattr(store, "host", "localhost")), int(getattr(store, "port", 9))
    kind, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(kind, socket.SOCK_DGRAM) as one:
        one.connect(address)  # of a datagram socket: sends nothing
        found = str(one.getsockname()[0])
    if int(os.environ.get("LOCAL_WORLD_SIZE", size)) < size and ipaddress.ip_address(found).is_loopback:
        raise ValueError(
            f"{host} is {found} on its own machine, where the mesh's other machines cannot reach it: start torchrun "
            "with --rdzv-endpoint, or MASTER_ADDR, at an address that all of them reach"
        )
    return found


def _bytes_of(rows: torch.Tensor) -> memoryview:
    found: memoryview = flat_of(rows).view(torch.uint8).numpy().data
    return found


def _proof(token: str, who: bytes, first: bytes, second: bytes, rank: int, channel: int) -> bytes:
    said = who + first + second + rank.to_bytes(4, "big") + bytes([channel])
    return hmac.digest(token.encode(), said, hashlib.sha256)


def _keep_alive(one: socket.socket) -> None:
    """Notice within some ten seconds that another machine has lost its power."""
    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            one.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _frame(value: Value) -> bytes:
    data: bytes = msgpack.packb(value)
    if len(data) > MAX_FRAME_BYTES:
        raise ValueError(f"a command of {len(data)} bytes; at most {MAX_FRAME_BYTES} are sent")
    return _LENGTH.pack(len(data)) + data


def _send(one: socket.socket, value: Value) -> None:
    one.sendall(_frame(value))


def _receive(one: socket.socket) -> Value:
    """Raises: OSError, also at the end; ValueError for what is no frame."""
    (length,) = _LENGTH.unpack(_read(one, _LENGTH.size))
    if length > MAX_FRAME_BYTES:
        raise ValueError(f"a frame of {length} bytes; at most {MAX_FRAME_BYTES} are taken")
    return msgpack.unpackb(_read(one, length), strict_map_key=False)


def _read(one: socket.socket, length: int) -> bytearray:
    """Raises: OSError, also at the end."""
    data = bytearray(length)
    view = memoryview(data)
    while view:
        num = one.recv_into(view)
        if not num:
            raise ConnectionResetError("the other process is gone")
        view = view[num:]
    return data
