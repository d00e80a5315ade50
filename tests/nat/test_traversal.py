"""`NatTransport` against other places, with signalling in memory: the ways, and those who spoil them."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import pytest

from tesseract_async.errors import PeerUnreachable
from tesseract_async.nat import preamble
from tesseract_async.transport import tcp
from tesseract_async.transport.base import DialPath, PeerAddress, Pipe
from tests.nat.town import path, town
from tests.transport.pipes import Receiver


async def check(one: Pipe, other: Pipe) -> None:
    """Bytes flow both ways; then both are gone."""
    here, there = Receiver(), Receiver()
    one.start(here)
    other.start(there)
    one.write(b"ping")
    await there.until_bytes(4)
    other.write(b"pong")
    await here.until_bytes(4)
    one.abort()
    await here.until_lost()
    await there.until_lost()


def won(kind: str) -> DialPath:
    async def opened() -> Pipe:
        raise AssertionError("it was opened before")

    return DialPath(kind, 0.0, opened)


@pytest.mark.both_loops
@pytest.mark.parametrize("kind", ["reverse", "datachannel", "relay"])
async def test_every_way_leads_there(kind: str) -> None:
    async with town(3) as (asker, asked, _):
        if kind == "reverse":
            asker.public_addresses = (asker.address,)
        pipe = await path(asker, asked.peer, kind).open()
        assert pipe.description.startswith(kind)
        await check(pipe, await asked.accepted.get())
        asker.nat.path_finished(asked.peer, won(kind), None)


@pytest.mark.both_loops
@pytest.mark.parametrize("kind", ["reverse", "datachannel", "relay"])
async def test_cancelled_it_leaves_nothing(kind: str) -> None:
    async with town(3) as (asker, asked, _):
        asked.is_silent = True
        asker.public_addresses = (asker.address,) if kind == "reverse" else ()
        opening = asyncio.ensure_future(path(asker, asked.peer, kind).open())
        for _ in range(3):
            await asyncio.sleep(0)
        opening.cancel()
        await asyncio.wait([opening])


def names(paths: Sequence[DialPath]) -> list[str]:
    return [one.name for one in sorted(paths, key=lambda one: one.delay)]


def delay(paths: Sequence[DialPath], name: str) -> float:
    [found] = [one.delay for one in paths if one.name == name]
    return found


async def test_which_ways_are_tried_and_when() -> None:
    async with town(3) as (asker, asked, _):
        nat, peer = asker.nat, asked.peer
        assert names(nat.paths(peer)) == ["datachannel", "relay"]
        assert nat.paths(PeerAddress(asked.peer_id, ("127.0.0.1:1",))) == []
        assert nat.paths(PeerAddress(None, (), peer.rendezvous)) == []
        assert nat.paths(replace(peer, peer_id=asker.peer_id)) == []
        patient = delay(nat.paths(peer), "relay")
        asker.symmetric = True
        assert delay(nat.paths(peer), "relay") < patient
        # direct addresses get a head start
        assert delay(nat.paths(replace(peer, addresses=("127.0.0.1:1",))), "datachannel") > 0
        # what worked comes first
        for kind, expected in (("relay", ["relay"]), ("datachannel", ["datachannel", "relay"])):
            nat.path_finished(peer, won(kind), None)
            assert names(nat.paths(peer)) == expected
        assert delay(nat.paths(peer), "relay") == patient
        nat.path_finished(peer, won("datachannel"), OSError())
        assert delay(nat.paths(peer), "relay") < patient
        asker.puncher.enabled = False
        assert names(nat.paths(peer)) == ["relay"]
        asker.public_addresses = (asker.address,)
        assert names(nat.paths(peer)) == ["reverse", "relay"]
        asker.puncher.enabled = True  # dialed by those who have IPv6 only: others may need a hole
        assert names(nat.paths(peer)) == ["reverse", "datachannel", "relay"]
        asker.behind_nat = False
        assert names(nat.paths(peer)) == ["reverse", "relay"]


@pytest.mark.parametrize("kind", ["reverse", "datachannel", "relay"])
async def test_a_carrier_that_forges_answers_gets_nowhere(kind: str) -> None:
    async with town(3) as (asker, asked, carrier):
        asker.public_addresses = (asker.address,) if kind == "reverse" else ()

        def by_another(answer: bytes) -> bytes:
            payload = carrier.identity.public_key + answer[96:]
            return carrier.identity.sign(b"tesseract offer 1\0" + payload) + payload

        for spoil in (by_another, lambda answer: answer[:-1] + b"\0", lambda answer: b""):
            asker.spoil = spoil
            with pytest.raises(PeerUnreachable) as caught:
                await path(asker, asked.peer, kind).open()
            assert "ProtocolError" in str(caught.value) or "InvalidRecord" in str(caught.value)


async def test_a_token_that_nobody_expects_is_sent_away() -> None:
    async with town(2) as (asked, _):
        pipe, receiver = await tcp.connect(asked.address), Receiver()
        pipe.start(receiver)
        pipe.write(preamble.encode_preamble(preamble.REVERSE, bytes(16)))
        await receiver.until_lost()
        assert asked.metrics.snapshot()["nat_refused{reason=unknown_token}"] == 1
