"""The meeting of the processes of a mesh, and the format of what they send each other.

The leader listens only while the mesh meets, on the interface by which it reaches torch's store. Each side proves that
it read the token in that store; a stranger may send only a few bytes, and stay connected for a few seconds only.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import ipaddress
import os
import secrets
import selectors
import socket
import struct
import time
from typing import TYPE_CHECKING, Final

import msgpack

from tesseract_async.errors import describe
from tesseract_async.wire.packed import Value

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

MAX_FRAME_BYTES: Final = 64 << 20
"""The most bytes of a command without its tensors, which holds at most the names and options of an expert's state."""
HELLO_TIMEOUT: Final = 5.0
MAX_STRANGERS: Final = 64
"""The most connections that have not proved anything yet."""
RETRY_SECONDS: Final = 0.1
CHANNELS: Final = range(3)
COMMANDS, LIFELINE, STATES = CHANNELS

_KEY: Final = "tesseract/mesh"
_NONCE_BYTES: Final = 16
_PROOF_BYTES: Final = 32
_HELLO: Final = struct.Struct(f"!IB{_NONCE_BYTES}s{_PROOF_BYTES}s")
"""Rank, channel, the follower's nonce, its proof."""
LENGTH: Final = struct.Struct("!I")


class Meeting:
    """The result of the meeting: sockets to the others."""

    def __init__(self, store: Store, rank: int, size: int, timeout: float) -> None:
        """Meet the others, for at most `timeout` seconds. Raises: TimeoutError if they do not all come."""
        self.sockets: dict[tuple[int, int], socket.socket] = {}
        """The sockets to the others, by channel and rank; a follower's all lead to rank 0."""
        self.token = ""
        """Proves that a process belongs to this meeting, and to no other."""
        self.neighbors: dict[int, int] = {}
        """The pids of the followers on this machine, by rank; empty on a follower."""
        self._rank, self._size, self._timeout = rank, size, timeout
        until = time.monotonic() + timeout
        if rank == 0:
            self._gather(store, until)
        else:
            self._join(store, until)
        for one in self.sockets.values():
            _keep_alive(one)
        if rank:
            send(self.sockets[COMMANDS, 0], [socket.gethostname(), os.getpid()])
        for other in range(1, size if rank == 0 else 1):
            one = self.sockets[COMMANDS, other]
            one.settimeout(max(0.001, until - time.monotonic()))
            host, pid = receive(one)
            one.settimeout(None)
            if host == socket.gethostname():
                self.neighbors[other] = pid

    def _gather(self, store: Store, until: float) -> None:
        """Let the others connect; strangers may, too, and learn nothing."""
        host = own_address(store, self._size)
        self.token = secrets.token_hex(32)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.create_server((host, 0), family=family, backlog=128) as listener:
            listener.setblocking(False)
            store.set(_KEY, f"{host} {listener.getsockname()[1]} {self.token}")
            waiting: dict[socket.socket, _Stranger] = {}
            try:
                while len(self.sockets) < len(CHANNELS) * (self._size - 1):
                    self._admit(listener, waiting, until)
            finally:
                for one in waiting:
                    one.close()

    def _admit(self, listener: socket.socket, waiting: dict[socket.socket, _Stranger], until: float) -> None:
        now = time.monotonic()
        if now >= until:
            missing = sorted(set(range(1, self._size)) - {rank for _, rank in self.sockets})
            raise TimeoutError(f"the processes {missing} of the mesh did not come within {self._timeout:g} s")
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
            if not hmac.compare_digest(proof, expected) or not 0 < rank < self._size or channel not in CHANNELS:
                raise ConnectionRefusedError("not of this mesh")
            one.send(_proof(self.token, b"leader", nonce, stranger.nonce, rank, channel))
            one.setblocking(True)
        except (OSError, struct.error):
            del waiting[one]
            one.close()
            return
        del waiting[one]
        if (before := self.sockets.pop((channel, rank), None)) is not None:  # it began again
            before.close()
        self.sockets[channel, rank] = one

    def _join(self, store: Store, until: float) -> None:
        while len(self.sockets) < len(CHANNELS):
            # what is written there may be of a meeting that is over: then nobody listens any more
            host, port, self.token = store.get(_KEY).decode().split()
            try:
                for channel in CHANNELS:
                    self.sockets[channel, 0] = self._shake_hands(host, int(port), channel)
            except OSError as error:
                for one in self.sockets.values():
                    one.close()
                self.sockets.clear()
                if time.monotonic() > until:
                    raise TimeoutError(f"process 0 of the mesh was not found: {describe(error)}") from error
                time.sleep(RETRY_SECONDS)

    def _shake_hands(self, host: str, port: int, channel: int) -> socket.socket:
        """Connect to the leader. Raises: OSError if that is not who listens there."""
        one = socket.create_connection((host, port), timeout=HELLO_TIMEOUT)
        try:
            theirs, mine = bytes(read(one, _NONCE_BYTES)), secrets.token_bytes(_NONCE_BYTES)
            proof = _proof(self.token, b"follower", theirs, mine, self._rank, channel)
            one.sendall(_HELLO.pack(self._rank, channel, mine, proof))
            expected = _proof(self.token, b"leader", mine, theirs, self._rank, channel)
            if not hmac.compare_digest(bytes(read(one, _PROOF_BYTES)), expected):
                raise ConnectionRefusedError("somebody else listens there")
            one.settimeout(None)
        except BaseException:  # no socket is left open
            one.close()
            raise
        return one


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
            "with --local-addr, or set MASTER_ADDR, to an address of this machine that all of them reach"
        )
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


def frame_of(value: Value) -> bytes:
    """Return what is sent of a value. Raises: ValueError if that is too much."""
    data: bytes = msgpack.packb(value)
    if len(data) > MAX_FRAME_BYTES:
        raise ValueError(f"a command of {len(data)} bytes; at most {MAX_FRAME_BYTES} are sent")
    return LENGTH.pack(len(data)) + data


def send(one: socket.socket, value: Value) -> None:
    """Send one frame. Raises: OSError; ValueError for one that is too long."""
    one.sendall(frame_of(value))


def receive(one: socket.socket) -> Value:
    """Return the next frame's value. Raises: OSError, also at the end; ValueError for anything but a frame."""
    (length,) = LENGTH.unpack(read(one, LENGTH.size))
    if length > MAX_FRAME_BYTES:
        raise ValueError(f"a frame of {length} bytes; at most {MAX_FRAME_BYTES} are taken")
    return msgpack.unpackb(read(one, length), strict_map_key=False)


def read(one: socket.socket, length: int) -> bytearray:
    """Return this many bytes. Raises: OSError, also at the end."""
    data = bytearray(length)
    view = memoryview(data)
    while view:
        num = one.recv_into(view)
        if not num:
            raise ConnectionResetError("the other process is gone")
        view = view[num:]
    return data
