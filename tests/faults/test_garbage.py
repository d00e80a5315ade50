"""Strangers who send nonsense to an open port disturb nobody."""

import asyncio
import random
import socket

import pytest
import torch
from torch import nn

import tesseract_async as ta
from tesseract_async.server.server import ServerSettings


@pytest.mark.both_loops
async def test_garbage_on_either_port_is_dropped_counted_and_disturbs_nobody() -> None:
    rng = random.Random(0)
    backend = ta.ExpertBackend(nn.Linear(4, 4), args_schema=(ta.TensorSpec((4,)),), max_batch_size=8)
    async with (
        ta.TesseractNode() as host,
        ta.TesseractServer(host, {"e.0": backend}, settings=ServerSettings(drain_timeout=0.1)),
        ta.TesseractNode(initial_peers=[host.address]) as guest,
    ):
        expert = await guest.get_expert("e.0")
        address = host.address.split(":")[0], int(host.address.split(":")[1])
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
            for _ in range(200):
                udp.sendto(rng.randbytes(rng.randrange(1, 1400)), address)
            udp.sendto(b"", address)

        async def spit(data: bytes) -> None:
            reader, writer = await asyncio.open_connection(*address)
            try:
                writer.write(data)
                await writer.drain()
                await asyncio.wait_for(reader.read(), 30)  # until the host hangs up
            except ConnectionError:
                pass
            finally:
                writer.close()
                await asyncio.gather(writer.wait_closed(), return_exceptions=True)

        noise = [rng.randbytes(rng.randrange(1, 5000)) for _ in range(20)]
        _, *answers = await asyncio.gather(
            asyncio.gather(*map(spit, [*noise, b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\xff\xff"])),
            *(expert(torch.ones(2, 4)) for _ in range(20)),
        )
        assert all(torch.equal(answer, answers[0]) for answer in answers)
        # the kernel may drop datagrams, and hand over the others and the hang-ups a little later: a few are enough
        async with asyncio.timeout(40):
            while (
                host.metrics.total("network_datagrams_dropped") < 10
                or host.metrics.total("endpoint_handshakes_failed") < 10
            ):
                await expert(torch.ones(2, 4))
        await host.network.store("still", "here", ttl=60)
        assert await guest.network.get("still") == "here"
