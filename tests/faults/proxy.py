"""A proxy between two TCP endpoints that does what bad networks do, exactly once, at an exact byte."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Literal, Self

Action = Literal["cut", "stall", "corrupt", "delay"]


@dataclass(frozen=True)
class Fault:
    """What befalls one connection (numbered from 0) in one direction (0: towards the server) after so many bytes."""

    action: Action
    connection: int
    direction: int
    after: int


@dataclass
class Stream:
    """What passed in one direction of one connection."""

    data: bytearray = field(default_factory=bytearray)


class Proxy:
    """Forwards connections to `target`; `fault` strikes once. `streams[(connection, direction)]` records all bytes."""

    def __init__(self, target: str, fault: Fault | None = None) -> None:
        self.fault = fault
        self.struck = asyncio.Event()
        self.streams: dict[tuple[int, int], Stream] = {}
        self.address = ""
        self._host, _, port = target.rpartition(":")
        self._port = int(port)
        self._tasks: set[asyncio.Task[None]] = set()
        self._count = 0
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accepted, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._forward(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number, self._count = self._count, self._count + 1
        async with self._closing(writer):
            there, back = await asyncio.open_connection(self._host, self._port)
            async with self._closing(back):
                ways = [self._pump(number, 0, reader, back), self._pump(number, 1, there, writer)]
                pumps = [asyncio.ensure_future(way) for way in ways]
                try:
                    await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for pump in pumps:
                        pump.cancel()
                    await asyncio.gather(*pumps, return_exceptions=True)

    @staticmethod
    @contextlib.asynccontextmanager
    async def _closing(writer: asyncio.StreamWriter) -> AsyncIterator[None]:
        try:
            yield
        finally:
            writer.transport.abort()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _pump(
        self, number: int, direction: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        stream = self.streams.setdefault((number, direction), Stream())
        fault = self.fault
        mine = fault is not None and (fault.connection, fault.direction) == (number, direction)
        with contextlib.suppress(OSError):
            while data := bytearray(await reader.read(65536)):
                position = len(stream.data)
                stream.data += data
                if fault is not None and mine and position <= fault.after < position + len(data):
                    mine = False
                    at = fault.after - position
                    writer.write(data[:at])
                    del data[:at]
                    await writer.drain()
                    self.struck.set()
                    if fault.action == "cut":
                        return
                    if fault.action == "stall":
                        await asyncio.Event().wait()
                    if fault.action == "delay":
                        await asyncio.sleep(0.05)
                    if fault.action == "corrupt":
                        data[0] ^= 0x55
                writer.write(data)
                await writer.drain()
