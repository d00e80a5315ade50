"""Asks STUN servers where this node seems to be: which of them answer, and what kind of NAT lies in between."""

import asyncio
import logging
import os
import socket
from collections.abc import Callable, Sequence
from typing import Final, cast

from tesseract_async.errors import ProtocolError
from tesseract_async.nat.role import ListeningAddress, NatKind, kind_of_nat
from tesseract_async.network.contacts import Address
from tesseract_async.transport.base import PeerAddress, split_host_port
from tesseract_async.wire import stun

logger = logging.getLogger(__name__)

RETRANSMIT_AFTER: Final = 0.25
"""Seconds without an answer after which the question is sent again."""
TIMEOUT: Final = 1.0
"""Seconds within which servers must have answered."""
FRESH: Final = 60.0
"""Seconds for which a server that answered counts as alive."""


class StunClient:
    def __init__(
        self,
        address: ListeningAddress,
        *,
        outside_servers: Sequence[str] = (),
        contacts: Callable[[], Sequence[PeerAddress]],
        own_hosts: Callable[[], Sequence[str]],
        fresh: float = FRESH,
    ) -> None:
        """`outside_servers`: each ``host:port``. `contacts` returns public nodes; they answer STUN at their first
        address. `own_hosts` returns the addresses of this computer."""
        self._address = address
        self._outside_servers = tuple(map(split_host_port, outside_servers))
        self._contacts = contacts
        self._own_hosts = own_hosts
        self._fresh = fresh
        self._server: tuple[Address, float] | None = None

    async def server(self) -> Address | None:
        """Return an IPv4 server that answered within `fresh` seconds."""
        now = asyncio.get_running_loop().time()
        if self._server is None or now - self._server[1] > self._fresh:
            await self.look()
        return self._server[0] if self._server is not None else None

    async def look(self) -> tuple[NatKind, str | None]:
        """Return what the servers' answers tell of the NAT, and this node's host as they see it. IPv4 is asked first:
        data channels use it only."""
        servers = [split_host_port(peer.addresses[0]) for peer in self._contacts()]
        for server in self._outside_servers:
            servers += await _resolve(*server)
        answers: dict[Address, Address] = {}
        if 4 in self._address.versions:
            answers = await self._ask(servers, any_host="0.0.0.0")
            if answers:
                self._server = next(iter(answers)), asyncio.get_running_loop().time()
        if not answers and 6 in self._address.versions:
            answers = await self._ask(servers, any_host="::")
        seen = list(answers.values())
        return kind_of_nat(seen, self._own_hosts()), seen[0][0] if seen else None

    async def _ask(self, servers: Sequence[Address], *, any_host: str) -> dict[Address, Address]:
        is_v6 = ":" in any_host
        asked = list(dict.fromkeys(server for server in servers if (":" in server[0]) == is_v6))
        here = self._address.host
        try:
            return await ask(asked, local_host=here if here and (":" in here) == is_v6 else any_host)
        except OSError as error:
            logger.debug("no STUN server can be asked: %s", error)
            return {}


class _Asker(asyncio.DatagramProtocol):
    def __init__(self, questions: dict[bytes, Address]) -> None:
        self.questions = questions
        self.answers: dict[Address, Address] = {}
        self.complete: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.closed = asyncio.Event()
        self._transport: asyncio.DatagramTransport | None = None
        self._is_over = False

    def send(self) -> None:
        for transaction_id, server in self.questions.items():
            if self._transport is not None:
                self._transport.sendto(stun.encode_request(transaction_id), server)

    async def aclose(self) -> None:
        """Close the socket, also one whose opening was cancelled: uvloop opens it all the same, and tells nobody."""
        self._is_over = True
        if self._transport is not None:
            self._transport.close()
            await self.closed.wait()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.DatagramTransport, transport)
        if self._is_over:
            transport.close()

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        try:
            transaction_id, host, port = stun.decode_response(data)
        except ProtocolError:
            return
        server = self.questions.pop(transaction_id, None)
        if server is not None and server[0] == addr[0]:
            self.answers[server] = (host, port)
        if not self.questions and not self.complete.done():
            self.complete.set_result(None)

    def error_received(self, exc: Exception) -> None:
        pass  # one server is unreachable; the others may not be

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed.set()


async def ask(
    servers: Sequence[Address], *, local_host: str = "0.0.0.0", timeout: float = TIMEOUT
) -> dict[Address, Address]:
    """Ask each server from one new socket, for `timeout` seconds at most. Servers and `local_host` are IP addresses of
    one version.

    Returns what those that answered saw, the quickest first. Raises: OSError.
    """
    if not servers:
        return {}
    protocol = _Asker({os.urandom(12): server for server in servers})
    loop = asyncio.get_running_loop()
    give_up_at = loop.time() + timeout
    try:
        await loop.create_datagram_endpoint(lambda: protocol, local_addr=(local_host, 0))
        while protocol.questions and (time_left := give_up_at - loop.time()) > 0:
            protocol.send()
            await asyncio.wait([protocol.complete], timeout=min(RETRANSMIT_AFTER, time_left))
    finally:
        await protocol.aclose()
    return protocol.answers


async def _resolve(host: str, port: int) -> list[Address]:
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_DGRAM)
    except OSError as error:
        logger.warning("the STUN server %s is unknown: %s", host, error)
        return []
    first = {family: str(address[0]) for family, *_, address in reversed(found)}
    return [(host, port) for host in first.values()]
