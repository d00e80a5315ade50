"""`OfferAnswerer`: what strangers can make a node do by their offers, and what they cannot."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest

from tesseract_async.errors import InvalidRecord, NotAllowed, Overloaded, ProtocolError
from tesseract_async.nat import offers
from tesseract_async.nat.hole_punching import HolePuncher
from tesseract_async.nat.offers import MAX_PER_SENDER, Description
from tesseract_async.transport.base import Pipe
from tests.nat.test_hole_punching import description
from tests.nat.town import path, town
from tests.transport.pipes import Receiver


async def end(pipe: Pipe) -> None:
    receiver = Receiver()
    pipe.start(receiver)
    pipe.abort()
    await receiver.until_lost()


async def test_forged_stale_and_repeated_offers_are_refused_and_counted() -> None:
    async with town(3) as (eve, asked, other):
        body = {"addresses": [eve.address], "token": bytes(16)}
        good = eve.offer(asked.peer_id, offers.REVERSE, body)
        answer = asked.answer
        for data in (b"", b"x" * 200, good[:-1], good[:70] + bytes([good[70] ^ 1]) + good[71:]):
            with pytest.raises(ProtocolError):
                await answer(data)
        with pytest.raises(InvalidRecord):
            await answer(eve.offer(other.peer_id, offers.REVERSE, body))
        for kind in (offers.REVERSE, offers.RELAY, offers.CHANNEL):  # signed as it should be, and empty
            with pytest.raises(ProtocolError):
                await answer(eve.offer(asked.peer_id, kind, {}))
        assert asked.refused("malformed") == 8
        with pytest.raises(NotAllowed):
            await answer(eve.offer(asked.peer_id, offers.REVERSE, body, age=3600))
        assert asked.refused("stale") == 1
        await answer(good)
        with pytest.raises(NotAllowed):
            await answer(good)
        assert asked.refused("replayed") == 1
        await end(await asked.accepted.get())


async def test_nobody_is_dialed_at_a_strangers_wish() -> None:
    async with town(3) as (eve, asked, _):
        body = {"addresses": ["203.0.113.9:80"], "token": bytes(16)}
        data = eve.offer(asked.peer_id, offers.REVERSE, body)
        answer = await asked.answer(data)
        read = offers.decode_answer(answer, data, sender=asked.peer_id, recipient=eve.peer_id)
        assert not read.accepted and "elsewhere" in read.reason
        data = eve.offer(asked.peer_id, offers.RELAY, {"relay": bytes(eve.peer_id), "token": bytes(16)})
        answer = await asked.answer(data)
        read = offers.decode_answer(answer, data, sender=asked.peer_id, recipient=eve.peer_id)
        assert not read.accepted and "rendezvous" in read.reason
        assert asked.refused("declined") == 2
        assert not asked.answerer.tasks


async def test_a_flood_of_offers_meets_a_bound() -> None:
    async with town(3) as (eve, asked, _):
        accepted, refused = 0, 0
        for sender in (eve,):
            for _ in range(MAX_PER_SENDER + 5):
                body = {"addresses": ["203.0.113.9:80"], "token": bytes(16)}
                try:
                    await asked.answer(sender.offer(asked.peer_id, offers.REVERSE, body))
                    accepted += 1
                except Overloaded:
                    refused += 1
        assert (accepted, refused) == (12, 13), "fewer still make it send to one host"
        assert asked.refused("too_many") == 13


async def test_few_data_channels_are_negotiated_at_once() -> None:
    async with town(3, max_negotiations=0) as (asker, asked, _):
        with pytest.raises(NotAllowed, match="too many"):
            await path(asker, asked.peer, "datachannel").open()


async def test_offers_that_name_third_parties_are_declined() -> None:
    async with town(3) as (asking, asked, _):
        body = description("9.9.9.9", "9.9.8.8").pack()
        offer = asking.offer(asked.peer_id, offers.CHANNEL, body)
        reply = await asked.answer(offer)
        answer = offers.decode_answer(reply, offer, sender=asked.peer_id, recipient=asking.peer_id)
        assert not answer.accepted and "name no address" in answer.reason
        assert asked.answerer.num_negotiations == 0


class SlowPuncher:
    """Negotiations that gather their candidates once they are let."""

    enabled = True

    def __init__(self) -> None:
        self.gathering, self.go_on = asyncio.Event(), asyncio.Event()
        self.is_closed = False

    async def negotiation(self, *, controlling: bool) -> SlowPuncher:
        return self

    async def gather(self) -> Description:
        self.gathering.set()
        await self.go_on.wait()
        return description("127.0.0.1")

    async def aclose(self) -> None:
        self.is_closed = True


async def test_a_negotiation_that_the_end_of_the_node_overtakes_keeps_no_socket() -> None:
    puncher = SlowPuncher()
    async with town(3, puncher=cast(HolePuncher, puncher)) as (asker, asked, _):
        body = description("127.0.0.1").pack()
        data = asker.offer(asked.peer_id, offers.CHANNEL, body)
        answering = asyncio.create_task(asked.answer(data))
        await puncher.gathering.wait()
        await asked.answerer.tasks.aclose()
        puncher.go_on.set()
        read = offers.decode_answer(await answering, data, sender=asked.peer_id, recipient=asker.peer_id)
        assert not read.accepted
        assert puncher.is_closed and asked.answerer.num_negotiations == 0
        with pytest.raises(NotAllowed, match="closing"):
            await asked.answer(asker.offer(asked.peer_id, offers.CHANNEL, body))
        assert asked.refused("closing") == 1
