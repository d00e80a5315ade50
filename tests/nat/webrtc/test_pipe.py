"""What `Negotiation` gathers, and how long it takes. (Pipes of all kinds: `test_pipes`.)"""

import asyncio
import socket

from tesseract_async.nat.webrtc.pipe import Negotiation
from tests.loopback import needs_ipv6_loopback
from tests.nat.test_stun_client import serving

QUICK, PATIENT = 0.1, 30.0
"""Seconds to gather: for what is not answered, and for what is."""


def negotiation(
    stun_server: tuple[str, int] | None = None,
    gathering_timeout: float = QUICK,
    addresses: tuple[str, ...] = ("127.0.0.1",),
) -> Negotiation:
    return Negotiation(
        controlling=True,
        addresses=addresses,
        stun_server=stun_server,
        gathering_timeout=gathering_timeout,
    )


async def test_without_servers_nobody_is_asked() -> None:
    """The library has a default server of its own: it must be told that there is none."""
    made = negotiation()
    assert made._ice.stun_server is None
    found = await made.gather()
    assert [(one.kind, one.host) for one in found.candidates] == [("host", "127.0.0.1")]
    await made.aclose()


async def test_the_outside_address_comes_from_the_server_that_was_given() -> None:
    async with serving(("203.0.113.7", 4000)) as (server, address):
        made = negotiation(address, PATIENT)
        found = await made.gather()
        assert server.num_asked > 0
        assert ("srflx", "203.0.113.7", 4000) in [(one.kind, one.host, one.port) for one in found.candidates]
        await made.aclose()


async def test_a_dead_server_holds_up_nobody() -> None:
    """Gathering is capped in time: the library itself would wait for five seconds."""
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind(("127.0.0.1", 0))
        made = negotiation(silent.getsockname())
        begun = loop.time()
        found = await made.gather()
        assert loop.time() - begun < 4.0
        assert [one.kind for one in found.candidates] == ["host"]
        await made.aclose()


@needs_ipv6_loopback
async def test_few_candidates_are_told() -> None:
    """An offer has a bound; IPv6 addresses are offered along with the others."""
    made = negotiation(None, PATIENT, ("127.0.0.1", "::1"))
    found = await made.gather()
    assert {one.host for one in found.candidates} == {"127.0.0.1", "::1"}
    await made.aclose()


async def test_gathering_that_is_cancelled_leaves_no_task() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind(("127.0.0.1", 0))
        silent.setblocking(False)
        before = asyncio.all_tasks()
        negotiation = Negotiation(controlling=True, addresses=["127.0.0.1"], stun_server=silent.getsockname())
        gathering = asyncio.create_task(negotiation.gather())
        await asyncio.get_running_loop().sock_recv(silent, 2048)
        gathering.cancel()
        await asyncio.wait({gathering})
        await negotiation.aclose()
        for _ in range(3):
            await asyncio.sleep(0)
        assert asyncio.all_tasks() == before
