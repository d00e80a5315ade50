"""The seam of every transport: an anonymous, ordered *pipe* of bytes. `channel` makes it a channel to a known peer.

A pipe pushes: it reads into memory that its receiver gives (`get_buffer`) and never holds received bytes. Writing never
blocks; `paused` says when to stop, and `pipe_drained` that everything written has left, so that memory on loan may be
used again.
"""

import ipaddress
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

from tesseract_async.identity import PeerID

MAX_HOST = 253
"""The most characters of a host's name, which is the limit of DNS; so strangers can have others print no more."""


def split_host_port(text: str) -> tuple[str, int]:
    """``"host:port"`` or ``"[v6]:port"`` in its parts. Raises: ValueError."""
    host, separator, port = text.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    is_name = 0 < len(bare) <= MAX_HOST and bare.isprintable() and " " not in bare
    if not separator or not is_name or (":" in bare) != (bare != host) or not port.isascii() or not port.isdigit():
        raise ValueError(f"not an address (host:port, or [v6]:port): {text[:300]!r}")
    if not 0 <= int(port) <= 65535:
        raise ValueError(f"a port is at most 65535: {text!r}")
    return bare, int(port)


def is_loopback(host: str) -> bool:
    """Return whether a host, by name or address, is this computer itself."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def join_host_port(host: str, port: int) -> str:
    """Undo `split_host_port`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def ip_version(address: str) -> int | None:
    """4 or 6 for the ``host:port`` of an IP address that a peer may have, None for anything else."""
    try:
        host, port = split_host_port(address)
        ip = ipaddress.ip_address(host)
    except ValueError:
        return None
    return None if ip.is_multicast or ip.is_unspecified or "%" in host or not port else ip.version


@lru_cache(maxsize=4096)
def range_of(host: str) -> str | None:
    """Return the neighbors with whom a host shares its limits: the /24 of public IPv4, the /64 of IPv6.

    In a private network, the host itself. None where the address tells nothing: on loopback, and for text that is no
    address.
    """
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        return None
    if ip.version == 6 and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped
    if ip.is_loopback:
        return None
    if ip.is_private:
        return str(ip)
    return str(ipaddress.ip_network((ip, 24 if ip.version == 4 else 64), strict=False))


@dataclass(frozen=True, slots=True)
class PeerAddress:
    """The addresses at which a peer can be dialed, best first, and the peer that must answer there (None: any)."""

    peer_id: PeerID | None
    addresses: tuple[str, ...]
    rendezvous: tuple[str, ...] = ()
    """Public nodes (``host:port/PEER_ID``) through which a peer that can't be dialed is asked to call back."""

    def __post_init__(self) -> None:
        for address in self.addresses:
            split_host_port(address)
        for text in self.rendezvous:
            split_host_port(text.partition("/")[0])

    @classmethod
    def parse(cls, text: str) -> "PeerAddress":
        """Read ``host:port`` or ``host:port/PEER_ID``, or several of one peer with commas, as ``str()`` writes.

        Raises: ValueError; also where some name a peer id and others another one, or none.
        """
        if text.startswith("/") or "://" in text:
            kind = "multiaddr" if text.startswith("/") else "URL"
            raise ValueError(f"an address is host:port or host:port/PEER_ID, not a {kind}: {text!r}")
        parts = [part.strip().partition("/") for part in text.split(",")]
        ids = {PeerID.parse(peer_id) if separator else None for _, separator, peer_id in parts}
        if len(ids) > 1:
            raise ValueError(f"these are addresses of different peers; give each by itself: {text!r}")
        return cls(ids.pop(), tuple(address for address, _, _ in parts))

    def __str__(self) -> str:
        name = f"/{self.peer_id}" if self.peer_id is not None else ""
        return ",".join(address + name for address in self.addresses)

    @property
    def short(self) -> str:
        """Return a short text for sentences: the address and the first digits of the id."""
        where = ",".join(self.addresses) or "no address"
        return f"{where} ({self.peer_id.short})" if self.peer_id is not None else where


class PipeReceiver(Protocol):
    """The receiver of a pipe's bytes and news, on its event loop. None of these may raise."""

    def get_buffer(self, sizehint: int = -1, /) -> memoryview:
        """Writable memory for the next received bytes: a memoryview, never empty. `sizehint` is an event loop's."""

    def buffer_updated(self, count: int) -> None:
        """`count` bytes were received into the memory that `get_buffer` gave last."""

    def pipe_drained(self) -> None:
        """After `Pipe.paused` was true: all that was written has left, no memory is on loan."""

    def pipe_lost(self, error: Exception | None) -> None:
        """Called once, at the end: after `close` or `abort`, at the peer's end of stream (None) or because of
        `error`."""


class Pipe(Protocol):
    """An ordered, reliable pipe of bytes to some computer. All calls are made on the pipe's event loop."""

    def __hash__(self) -> int:
        """Return the hash of the object's identity."""

    def start(self, receiver: PipeReceiver) -> None:
        """Begin to read. A second call changes the receiver."""

    def write(self, data: bytes | memoryview) -> None:
        """Send `data`, in order. Its memory is on loan until the pipe has drained. Ignored after the end."""

    paused: bool
    """True if enough is waiting to be sent; `PipeReceiver.pipe_drained` follows."""

    description: str
    """The pipe in words, for logs and people: ``tcp 10.0.0.1:4000``. The first word names the kind of path."""

    origin: str
    """The remote host, without the port: limits count by it."""

    @property
    def unsent(self) -> int:
        """Bytes written that have not left yet; 0 means that no memory is on loan."""

    def pause_reading(self) -> None:
        """Leave what arrives to the peer's and the network's buffers."""

    def resume_reading(self) -> None:
        """Undo `pause_reading`."""

    def close(self) -> None:
        """End the pipe after sending what was written; `pipe_lost` follows. Repeating it does nothing."""

    def abort(self) -> None:
        """End the pipe now; `pipe_lost` follows soon, never from within this call."""


@dataclass(frozen=True, slots=True)
class DialPath:
    """One way to a peer. Paths race: the first on which the peer has proven itself wins."""

    name: str
    """The path's name in errors and logs: ``tcp 10.0.0.1:4000``."""
    delay: float
    """Seconds of head start for the paths before; it starts at once when all of those have failed."""
    open: Callable[[], Awaitable[Pipe]]
    """Open the pipe. If cancelled, it leaves nothing open. May raise OSError, TimeoutError or any TesseractError."""


class Transport(Protocol):
    """A kind of pipe: what an endpoint is given to reach others and to be reached."""

    async def listen(self, accept: Callable[[Pipe], None]) -> None:
        """Call `accept` for each pipe that others open, from within the callback that told of it."""

    def paths(self, peer: PeerAddress) -> Sequence[DialPath]:
        """Return the ways to this peer, likeliest first."""

    def path_finished(self, peer: PeerAddress, path: DialPath, error: BaseException | None) -> None:
        """Learn how an attempt on one of `paths` ended; `error` is None for the one that won."""

    def peer_known(self, peer: PeerAddress) -> None:
        """Note that a call names this peer at other addresses than those at which it was dialed."""

    async def aclose(self) -> None:
        """Stop listening. Pipes live on; their receivers close them."""
