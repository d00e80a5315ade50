"""What channels share, and what they must not."""

import asyncio
from types import SimpleNamespace
from typing import Any, cast

from tesseract_async.transport.channel import Channel
from tesseract_async.transport.tls import TlsMachine


def buffer_of_a_channel() -> memoryview:
    return Channel(cast(Any, None), cast(TlsMachine, object()), cast(Any, None)).get_buffer()


async def test_channels_of_one_loop_share_their_block_and_those_of_two_loops_do_not() -> None:
    """Two nodes in two threads, such as a BackgroundNode next to one's own, receive at the same time."""

    async def elsewhere() -> memoryview:
        return buffer_of_a_channel()

    mine, mine_too = buffer_of_a_channel(), buffer_of_a_channel()
    other = await asyncio.to_thread(asyncio.run, elsewhere())
    assert mine.obj is mine_too.obj
    assert other.obj is not mine.obj


def test_what_was_written_is_the_callers_again_at_once() -> None:
    """Without TLS, too: transports keep views of what they could not send yet."""
    sent: list[bytes] = []
    pipe = SimpleNamespace(write=sent.append)
    payload = bytearray(b"a" * 100_000)
    channel = Channel(cast(Any, pipe), None, cast(Any, None))
    channel.write([b"head", memoryview(payload)])
    payload[:] = bytes(len(payload))
    assert b"".join(sent) == b"head" + b"a" * 100_000 and channel.bytes_sent == 100_004
