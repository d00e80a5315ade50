"""A call, or a reply, that is alone leaves without another turn of the loop; several leave together."""

import asyncio
from dataclasses import replace

import pytest

from tesseract_async.endpoint.bounds import Bounds
from tesseract_async.endpoint.connection import Connection
from tesseract_async.endpoint.endpoint import EndpointSettings, Message
from tests.endpoint.test_deferred import PLAIN, Answers, call, client_of
from tests.faults.serving import serving, until


def count_writes(connection: Connection, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    channel, sizes = connection._channels[0], list[int]()
    assert channel is not None
    write = channel.write

    def counted(pieces: list[bytes]) -> None:
        sizes.append(sum(map(len, pieces)))
        write(pieces)

    monkeypatch.setattr(channel, "write", counted)
    return sizes


@pytest.mark.both_loops
async def test_one_after_the_other_leaves_at_once_and_a_crowd_together(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(PLAIN) as (server, address), client_of(PLAIN) as client:
        answers = Answers(server)

        async def begun(count: int) -> list[asyncio.Task[Message]]:
            tasks = [asyncio.create_task(call(client, address)) for _ in range(count)]
            await until(lambda: sum(not future.done() for future in answers.futures) == count)
            return tasks

        async def ended(tasks: list[asyncio.Task[Message]]) -> None:
            for future in answers.futures:
                if not future.done():
                    future.set_result(Message(1))
            await asyncio.gather(*tasks)

        await ended(await begun(1))
        (ours,), (theirs,) = client.pool.connections(), server.pool.connections()
        calls, replies = count_writes(ours, monkeypatch), count_writes(theirs, monkeypatch)
        task = asyncio.create_task(call(client, address))
        await asyncio.sleep(0)
        assert len(calls) == 1, "in the turn in which it was made"
        await until(lambda: not answers.futures[-1].done())
        answers.futures[-1].set_result(Message(1))
        await asyncio.sleep(0)
        assert len(replies) == 1, "in the turn in which it was answered"
        await task
        calls.clear()
        replies.clear()
        for _ in range(2):
            await ended(await begun(8))
        assert len(replies) == 2, "eight in one"
        assert len(calls) <= 3, "only the first of a crowd may go ahead, where calls were alone before"
        await ended(await begun(1))
        assert not ours.protocol.num_calls and not theirs.protocol.num_calls


async def test_large_ones_and_those_of_a_full_channel_wait_for_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(PLAIN) as (server, address), client_of(PLAIN) as client:
        for _ in range(2):
            await client.call(address, "echo", None, timeout=30.0)
        (ours,) = client.pool.connections()
        block = memoryview(bytearray(1 << 20))
        for _ in range(2):
            reply = await client.call(address, "echo", None, [block], timeout=30.0)
            assert reply.buffers[0] == block
        calls = count_writes(ours, monkeypatch)
        assert ours._channels[0] is not None
        ours._channels[0].pipe.paused = True  # type: ignore[misc]
        task = asyncio.create_task(client.call(address, "echo", 2, timeout=30.0))
        await asyncio.sleep(0.01)
        assert not calls
        ours._channels[0].pipe.paused = False  # type: ignore[misc]
        ours._channels[0].pipe_drained()
        assert (await task).body == 2


async def test_a_large_call_that_a_lone_reply_makes_room_for_begins_at_once() -> None:
    """Nothing else happens there that would: no ping, no frame, and no timer before the calls are over."""
    bounds = Bounds(ping_after=1000.0, dead_after=3000.0)
    calm = EndpointSettings(security="plain", bounds=bounds)
    small = replace(calm, max_receive_bytes=32 << 20)  # of which one peer may have 4 MiB
    async with serving(small) as (server, address), client_of(calm) as client:
        answers, block = Answers(server), memoryview(bytearray(3 << 20))
        tasks = [asyncio.create_task(client.call(address, "later", None, [block], timeout=20.0)) for _ in range(2)]
        await until(lambda: len(answers.futures) == 1)
        (ours,), (theirs,) = client.pool.connections(), server.pool.connections()
        await until(lambda: ours.has_bulk and theirs.has_bulk)
        for _ in range(20):
            await asyncio.sleep(0)
        assert len(answers.futures) == 1, "the second has no room"
        answers.futures[0].set_result(Message(1))
        await until(lambda: len(answers.futures) == 2)
        answers.futures[1].set_result(Message(2))
        assert [reply.body for reply in await asyncio.gather(*tasks)] == [1, 2]
