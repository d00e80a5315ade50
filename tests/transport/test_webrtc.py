"""What `Negotiation` gathers, and how long it takes. (Pipes of all kinds: `test_pipes`.)"""

from __future__ import annotations

import asyncio
import socket

import pytest

from tesseract_async.transport.webrtc import MAX_GAPS, Negotiation, WebrtcSettings
from tests.benchmarks import nat_links
from tests.transport.test_stun_client import serving

QUICK = WebrtcSettings(gathering_timeout=0.1)


def negotiation(
    stun_server: tuple[str, int] | None = None,
    settings: WebrtcSettings = QUICK,
    addresses: tuple[str, ...] = ("127.0.0.1",),
) -> Negotiation:
    return Negotiation(controlling=True, addresses=list(addresses), stun_server=stun_server, settings=settings)


async def test_without_servers_nobody_is_asked() -> None:
    """The library has a default server of its own: it must be told that there is none."""
    made = negotiation()
    assert made._ice.stun_server is None and made._ice.turn_server is None
    found = await made.gather()
    assert [(one.kind, one.host) for one in found.candidates] == [("host", "127.0.0.1")]
    await made.aclose()


async def test_the_outside_address_comes_from_the_server_that_was_given() -> None:
    async with serving(("203.0.113.7", 4000)) as (server, address):
        made = negotiation(address)
        found = await made.gather()
        assert server.num_asked > 0
        assert ("srflx", "203.0.113.7", 4000) in [(one.kind, one.host, one.port) for one in found.candidates]
        await made.aclose()


@pytest.mark.parametrize("kind", ["stun", "turn"])
async def test_a_dead_server_holds_up_nobody(kind: str) -> None:
    """Gathering is capped in time: the library itself would wait for five seconds."""
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind(("127.0.0.1", 0))
        address = silent.getsockname()
        settings = WebrtcSettings(
            gathering_timeout=0.1,
            turn_server=f"turn:127.0.0.1:{address[1]}" if kind == "turn" else None,
            turn_username="name",
            turn_password="word",
        )
        made = negotiation(address if kind == "stun" else None, settings)
        begun = loop.time()
        found = await made.gather()
        assert loop.time() - begun < 1.0
        assert [one.kind for one in found.candidates] == ["host"]
        await made.aclose()


async def test_few_candidates_are_told() -> None:
    """An offer has a bound; IPv6 addresses are offered beside the others."""
    made = negotiation(addresses=("127.0.0.1", "::1"))
    found = await made.gather()
    assert {one.host for one in found.candidates} == {"127.0.0.1", "::1"}
    await made.aclose()


def test_many_gaps_do_not_stop_a_channel() -> None:
    """A full window of which every other packet is dropped: more gaps than one acknowledgement can name."""

    class Spoilt(nat_links.Link):
        num_to_spoil = 0

        def send(self, data: bytes, queue: asyncio.Queue[bytes]) -> None:
            if self.num_to_spoil and len(data) > 1000:
                self.num_to_spoil -= 1
                if self.num_to_spoil % 2:
                    self.num_dropped += 1
                    return
            super().send(data, queue)

    async def main() -> None:
        out, back = (kind(rate=None, delay=0.1, loss=0.0, seed=0) for kind in (Spoilt, nat_links.Link))
        here, there = await nat_links.open_pipe(out, back)
        total, unused = nat_links.Total(), nat_links.Total()
        here.start(nat_links.End(unused))
        there.start(nat_links.End(total))
        here.write(bytes(5 * 2**20))
        async with asyncio.timeout(20):
            while here._sctp._flight_size < 800 * 1160:  # noqa: ASYNC110 (in virtual time)
                await asyncio.sleep(0.01)
            out.num_to_spoil = 900
            while total.count < 5 * 2**20:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert out.num_dropped > MAX_GAPS
        for pipe in (here, there):
            pipe.abort()
        await asyncio.sleep(3)

    nat_links.in_virtual_time(main())
