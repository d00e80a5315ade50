import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tesseract_async.nat import stun_client
from tesseract_async.nat.role import ListeningAddress
from tesseract_async.nat.stun_client import FRESH, StunClient
from tesseract_async.transport.base import PeerAddress, join_host_port
from tesseract_async.wire import stun

pytestmark = pytest.mark.both_loops


class Server(asyncio.DatagramProtocol):
    """Answers as if the asker sat behind a NAT that showed it as `seen`; the first `num_lost` questions get lost."""

    def __init__(self, seen: tuple[str, int], num_lost: int) -> None:
        self.seen = seen
        self.num_lost = num_lost
        self.num_asked = 0
        self.gone = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        self.num_asked += 1
        if self.num_asked > self.num_lost:
            answer = stun.answer(data, self.seen)
            assert answer is not None
            for reply in (
                b"noise",
                answer[:-1],
                stun.answer(stun.encode_request(bytes(12)), ("9.9.9.9", 9)),
                answer,
                answer,
            ):
                self.transport.sendto(reply, addr)  # type: ignore[attr-defined]

    def connection_lost(self, exc: Exception | None) -> None:
        self.gone.set()


@contextlib.asynccontextmanager
async def serving(seen: tuple[str, int], *, num_lost: int = 0) -> AsyncIterator[tuple[Server, tuple[str, int]]]:
    loop = asyncio.get_running_loop()
    transport, server = await loop.create_datagram_endpoint(lambda: Server(seen, num_lost), local_addr=("127.0.0.1", 0))
    try:
        yield server, transport.get_extra_info("sockname")
    finally:
        transport.close()
        await server.gone.wait()


async def test_each_server_tells_what_it_saw() -> None:
    async with serving(("203.0.113.1", 1)) as (_, one), serving(("203.0.113.1", 2)) as (_, other):
        answers = await stun_client.ask([one, other], local_host="127.0.0.1", timeout=30.0)
        assert answers == {one: ("203.0.113.1", 1), other: ("203.0.113.1", 2)}


async def test_a_lost_question_is_repeated() -> None:
    async with serving(("203.0.113.1", 1), num_lost=1) as (server, address):
        assert await stun_client.ask([address], local_host="127.0.0.1", timeout=30.0) == {address: ("203.0.113.1", 1)}
        assert server.num_asked >= 2


async def test_the_silent_are_left_out() -> None:
    async with serving(("203.0.113.1", 1)) as (_, one), serving(("203.0.113.1", 2), num_lost=99) as (_, silent):
        answers = await stun_client.ask([silent, one], local_host="127.0.0.1", timeout=1.5)
        assert list(answers) == [one]
    assert await stun_client.ask([]) == {}


def client(*contacts: tuple[str, int], outside: tuple[str, ...] = (), fresh: float = FRESH) -> StunClient:
    peers = [PeerAddress(None, (join_host_port(*address),)) for address in contacts]
    return StunClient(
        ListeningAddress("127.0.0.1", 1, (), (4,)),
        outside_servers=outside,
        contacts=lambda: peers,
        own_hosts=lambda: ["192.168.1.2"],
        fresh=fresh,
    )


async def test_the_server_for_data_channels_is_one_that_answered_within_a_minute() -> None:
    async with serving(("203.0.113.1", 1)) as (server, address):
        made = client(address, ("::1", 9))  # aioice asks over IPv4 only
        assert await made.server() == address
        before = server.num_asked
        assert await made.server() == address
        assert server.num_asked == before
        made = client(address, fresh=-1.0)
        for _ in range(2):
            before = server.num_asked
            assert await made.server() == address
            assert server.num_asked > before
    assert await client(address).server() is None


async def test_outside_servers_are_asked_besides_those_of_the_swarm(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.get_running_loop()
    look_up = loop.getaddrinfo

    async def without_network(host: str, *args: Any, **kwargs: Any) -> Any:
        """Resolvers take their time to say no where there is no network, and some never do."""
        if host.endswith(".invalid"):
            raise socket.gaierror(socket.EAI_NONAME, "unknown")
        return await look_up(host, *args, **kwargs)

    monkeypatch.setattr(loop, "getaddrinfo", without_network)
    async with serving(("203.0.113.1", 1)) as (_, one), serving(("203.0.113.1", 1)) as (_, other):
        made = client(one, outside=(join_host_port(*other), "no.such.host.invalid:1"))
        assert await made.look() == ("keeping", "203.0.113.1")
    async with serving(("203.0.113.1", 1)) as (_, one), serving(("203.0.113.1", 2)) as (_, other):
        assert await client(one, other).look() == ("symmetric", "203.0.113.1")


def _open_files() -> list[str]:
    return [fd for fd in os.listdir("/proc/self/fd") if os.path.islink(f"/proc/self/fd/{fd}")]


async def test_cancelled_while_its_socket_is_opened_it_leaves_none() -> None:
    def num_sockets() -> int:
        return sum(os.readlink(f"/proc/self/fd/{fd}").startswith("socket:") for fd in _open_files())

    async def cancel(turns: int) -> None:
        # each look comes before what `ask` schedules in the same turn
        while num_sockets() == before:  # noqa: ASYNC110
            await asyncio.sleep(0)
        for _ in range(turns):
            await asyncio.sleep(0)
        asking.cancel()

    await stun_client.ask([("127.0.0.1", 9)], timeout=0.001)  # what the loop opens for itself is open from now on
    before = num_sockets()
    for turns in range(4):
        canceling = asyncio.create_task(cancel(turns))
        asking = asyncio.create_task(stun_client.ask([("127.0.0.1", 9)]))
        await asyncio.wait([canceling, asking])
        for _ in range(4):
            await asyncio.sleep(0)
        assert num_sockets() == before, turns
