"""A relay that drops, corrupts, reorders, repeats or records: calls fail with a typed error, never with wrong bytes."""

import contextlib
import random
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import pytest

from tesseract_async.endpoint.bounds import Bounds
from tesseract_async.endpoint.endpoint import Endpoint, EndpointSettings, IncomingCall, Message
from tesseract_async.errors import ConnectionLost, PeerUnreachable, ProtocolError
from tesseract_async.identity import Identity
from tesseract_async.metrics import Metrics
from tesseract_async.nat import preamble
from tesseract_async.nat.demux import PreambleDemultiplexer
from tesseract_async.nat.relay import Relay, RelaySettings
from tesseract_async.transport import tcp
from tesseract_async.transport.base import DialPath, PeerAddress, Pipe
from tests.transport.pipes import bound_socket

pytestmark = pytest.mark.both_loops

Mutate = Callable[[bytes], list[bytes]]
SECRET = b"the gradient of my private data " * 64


class SpoiledPipe:
    """A relay's pipe whose written bytes pass through `mutate` first."""

    def __init__(self, pipe: Pipe, mutate: Mutate) -> None:
        self._pipe = pipe
        self._mutate = mutate

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipe, name)

    def write(self, data: bytes) -> None:
        for part in self._mutate(bytes(data)):
            self._pipe.write(part)


class Spoiler:
    """Spoils what passes, once `active`; counts how often."""

    def __init__(self, how: str) -> None:
        self.how = how
        self.active = False
        self.num_spoilt = 0
        self.recorded = bytearray()
        self._held: list[bytes] = []
        self._rng = random.Random(1)

    def __call__(self, data: bytes) -> list[bytes]:
        self.recorded += data
        if not self.active or self.how == "record":
            return [data]
        self.num_spoilt += 1
        if self.how == "corrupt":
            position = self._rng.randrange(len(data))
            return [data[:position] + bytes([data[position] ^ 0x10]) + data[position + 1 :]]
        if self.how == "truncate":
            return [data[:-1]]
        if self.how == "repeat":
            return [data, data]
        if self.how == "insert":
            return [b"\x17\x03\x03\x00\x20" + bytes(32), data]
        if self.how == "reorder":
            self._held.append(data)
            if len(self._held) < 2:
                return []
            held, self._held = self._held, []
            return held[::-1]
        assert self.how == "drop"
        return []


class OnePath:
    def __init__(self, open_pipe: Any) -> None:
        self._open = open_pipe

    async def listen(self, accept: Callable[[Pipe], None]) -> None:
        pass

    def paths(self, peer: PeerAddress) -> Sequence[DialPath]:
        return [DialPath("relay", 0.0, self._open)]

    def path_finished(self, peer: PeerAddress, path: DialPath, error: BaseException | None) -> None:
        pass

    def peer_known(self, peer: PeerAddress) -> None:
        pass

    async def aclose(self) -> None:
        pass


@contextlib.asynccontextmanager
async def relayed(spoiler: Spoiler, *, handshake_timeout: float = 5.0) -> AsyncIterator[tuple[Endpoint, PeerAddress]]:
    """An endpoint, and the address of another one that it reaches through the evil relay only."""
    relay = Relay(settings=RelaySettings(max_rate=None), metrics=Metrics())
    sock = bound_socket()
    address = f"127.0.0.1:{sock.getsockname()[1]}"
    demultiplexer = PreambleDemultiplexer(
        sock,
        handlers={preamble.RELAY: lambda token, pipe: relay.pipe_arrived(token, SpoiledPipe(pipe, spoiler))},  # type: ignore[arg-type]
        metrics=Metrics(),
    )
    await demultiplexer.listen(lambda pipe: pipe.abort())
    settings = EndpointSettings(bounds=Bounds(handshake_timeout=handshake_timeout))
    server = Endpoint(identity=Identity.generate(), settings=settings)

    async def echo(call: IncomingCall) -> Message:
        return Message(call.body, call.buffers)

    async def meet(token: bytes) -> Pipe:
        pipe = await tcp.connect(address)
        pipe.write(preamble.encode_preamble(preamble.RELAY, token))
        return pipe

    async def open_pipe() -> Pipe:
        mine, theirs = relay.reserve(server.peer_id)
        server.accept(await meet(theirs))
        return await meet(mine)

    server.handle("echo", echo)
    client = Endpoint(identity=Identity.generate(), transports=[OnePath(open_pipe)], settings=settings)
    async with server, client:
        yield client, PeerAddress(server.peer_id, ())
        spoiler.active = False
    await demultiplexer.aclose()
    await relay.aclose()


ERRORS = (ConnectionLost, PeerUnreachable, ProtocolError, TimeoutError)


@pytest.mark.parametrize("how", ["drop", "corrupt", "truncate", "repeat", "insert", "reorder"])
@pytest.mark.parametrize("size", [len(SECRET), 3_000_000])
async def test_an_evil_relay_cannot_change_what_arrives(how: str, size: int) -> None:
    data = random.Random(size).randbytes(size)
    spoiler = Spoiler(how)
    async with relayed(spoiler) as (client, peer):
        reply = await client.call(peer, "echo", "good", [data], timeout=30)
        assert bytes(reply.buffers[0]) == data
        spoiler.active = True
        try:
            reply = await client.call(peer, "echo", "evil", [data], timeout=0.5)
        except ERRORS:
            pass
        else:  # the good copy may have been faster than the bad one
            assert how == "repeat"
            assert reply.body == "evil" and bytes(reply.buffers[0]) == data
        assert spoiler.num_spoilt
        # with an honest relay it goes on
        spoiler.active = False
        for _ in range(3):
            try:
                reply = await client.call(peer, "echo", "good again", [data], timeout=30)
                break
            except ConnectionLost:  # the old connection's end was noticed only now
                continue
        assert reply.body == "good again" and bytes(reply.buffers[0]) == data


@pytest.mark.parametrize("how", ["drop", "corrupt", "truncate", "repeat", "insert", "reorder"])
async def test_an_evil_relay_cannot_spoil_the_handshake_unnoticed(how: str) -> None:
    spoiler = Spoiler(how)
    spoiler.active = True
    async with relayed(spoiler, handshake_timeout=0.4) as (client, peer):
        with pytest.raises(ERRORS):
            await client.call(peer, "echo", "evil", [SECRET], timeout=4)


async def test_a_relay_that_records_has_nothing_to_read() -> None:
    spoiler = Spoiler("record")
    async with relayed(spoiler) as (client, peer):
        for _ in range(3):
            reply = await client.call(peer, "echo", "private words", [SECRET], timeout=30)
            assert bytes(reply.buffers[0]) == SECRET
    assert len(spoiler.recorded) > 6 * len(SECRET)
    assert SECRET[:16] not in spoiler.recorded and b"private words" not in spoiler.recorded
