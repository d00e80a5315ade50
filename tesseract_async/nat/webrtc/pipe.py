"""Pipes through NATs: a WebRTC data channel between two nodes that have exchanged an offer and an answer (`offers`).

ICE (aioice) punches the hole, DTLS and SCTP (aiortc) carry messages through it, and `message_stream` makes them an
ordered stream of bytes. The ordinary TLS runs inside, as in every pipe: DTLS' own certificates only tie the association
to the signed offer. aiortc takes half a second to import, so it is imported by `load`, in a thread, when first needed.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import aioice

from tesseract_async.errors import ConnectionLost, ProtocolError, describe
from tesseract_async.nat.offers import MAX_CANDIDATES, Candidate, Description
from tesseract_async.nat.webrtc.message_stream import MessageStream
from tesseract_async.tasks import in_time
from tesseract_async.transport.base import PipeReceiver, join_host_port

if TYPE_CHECKING:
    from aiortc import RTCCertificate

logger = logging.getLogger(__name__)

SCTP_PORT: Final = 5000
BUFFERED_HIGH: Final = 256 * 1024
"""Bytes in aiortc's own queue beyond which nothing is added."""
BUFFERED_LOW: Final = 128 * 1024
"""Bytes in that queue at which more is added again."""
CLOSE_TIMEOUT: Final = 2.0
"""Seconds that `close` gives to what was written."""
GATHERING_TIMEOUT: Final = 1.0
"""Seconds given to the STUN server; what has not answered by then is left out."""
CONNECT_TIMEOUT: Final = 8.0
"""Seconds for punching, DTLS and SCTP together. Where it works, it takes one or two."""


async def load() -> None:
    """Import aiortc without holding up the loop. The first connection does it, too.

    Raises: ConnectionLost where it can't be imported, or in another version: relays and direct paths remain.
    """
    name = "tesseract_async.nat.webrtc.association"
    if name not in sys.modules:
        try:
            await asyncio.to_thread(importlib.import_module, name)
        except ImportError as error:
            logger.warning("no data channels here, only direct connections and relays: %s", error)
            raise ConnectionLost("the peer", f"no data channels: {error}") from None


class _Ice(aioice.Connection):
    """An ICE connection that gathers on given addresses, for a given time."""

    own_hosts: list[str]
    gathering_timeout: float

    async def get_component_candidates(
        self, component: int, addresses: list[str], timeout: float = 0.0
    ) -> list[aioice.Candidate]:
        # aioice would offer every interface, and wait five seconds for a server that is gone
        try:
            return await super().get_component_candidates(component, self.own_hosts, self.gathering_timeout)  # type: ignore[arg-type]
        except asyncio.CancelledError:
            self._cancel_queries()
            raise

    def _cancel_queries(self) -> None:
        """End the questions to the STUN server: where gathering is cancelled, aioice leaves them to their timeouts."""
        for task in asyncio.all_tasks():
            coro = task.get_coro()
            if getattr(coro, "__name__", "") == "server_reflexive_candidate":
                frame = getattr(coro, "cr_frame", None)
                if frame is not None and frame.f_locals.get("protocol") in self._protocols:
                    task.cancel()


class _IcePort:
    def __init__(self, ice: _Ice, role: str) -> None:
        self._recv = ice.recv
        self._send = ice.send
        self.role = role
        self.state = "completed"


class Negotiation:
    """One attempt at a data channel. `gather`, tell the peer, `connect`; `aclose` in any case but success.

    `controlling`: whether this side made the offer. `stun_server`: ``(IPv4 address, port)`` of a server that is known
    to answer, or None.
    """

    def __init__(
        self,
        *,
        controlling: bool,
        addresses: Sequence[str],
        stun_server: tuple[str, int] | None,
        gathering_timeout: float = GATHERING_TIMEOUT,
    ) -> None:
        self._controlling = controlling
        self._ice = _Ice(controlling, stun_server=stun_server)
        self._ice.own_hosts = list(addresses)
        self._ice.gathering_timeout = gathering_timeout
        self._certificate: RTCCertificate | None = None
        self._dtls: Any = None
        self._sctp: Any = None

    async def _own_certificate(self) -> RTCCertificate:
        """Return this side's DTLS certificate. It proves nothing: the signed offer or answer holds its fingerprint."""
        if self._certificate is None:
            await load()
            import aiortc

            self._certificate = aiortc.RTCCertificate.generateCertificate()
        return self._certificate

    async def gather(self) -> Description:
        """Find out under which addresses this side may be reached. Returns its half of the offer and answer."""
        certificate = await self._own_certificate()
        await self._ice.gather_candidates()
        [fingerprint] = [f for f in certificate.getFingerprints() if f.algorithm == "sha-256"]
        candidates = [
            Candidate(one.type, one.host, one.port, one.priority, one.foundation[:32])
            for one in self._ice.local_candidates
        ]
        return Description(
            self._ice.local_username,
            self._ice.local_password,
            bytes.fromhex(fingerprint.value.replace(":", "")),
            tuple(candidates[:MAX_CANDIDATES]),
        )

    async def connect(self, remote: Description) -> DataChannelPipe:
        """Punch the hole and open the channel. Closes this negotiation when it fails or is cancelled.

        Raises: ConnectionLost if no path was found; TimeoutError after `CONNECT_TIMEOUT` seconds.
        """
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                return await self._connect(remote)
        except BaseException:  # cancelled, too: sockets are closed
            await self.aclose()
            raise

    async def _connect(self, remote: Description) -> DataChannelPipe:
        import aiortc
        from aiortc.rtcdatachannel import RTCDataChannelParameters
        from aiortc.rtcsctptransport import LOCAL_MAX_MESSAGE_SIZE

        from tesseract_async.nat.webrtc.association import CHANNEL, Association

        ice = self._ice
        ice.remote_username, ice.remote_password = remote.username, remote.password
        for one in remote.candidates:
            await ice.add_remote_candidate(
                aioice.Candidate(
                    foundation=one.foundation,
                    component=1,
                    transport="udp",
                    priority=one.priority,
                    host=one.host,
                    port=one.port,
                    type=one.kind,
                )
            )
        await ice.add_remote_candidate(None)
        try:
            await ice.connect()
        except ConnectionError:
            raise ConnectionLost("the peer", "no hole could be punched") from None
        port = _IcePort(ice, "controlling" if self._controlling else "controlled")
        self._dtls = dtls = aiortc.RTCDtlsTransport(port, [await self._own_certificate()])  # type: ignore[arg-type]
        value = ":".join(f"{byte:02X}" for byte in remote.fingerprint)
        fingerprint = aiortc.RTCDtlsFingerprint(algorithm="sha-256", value=value)
        await dtls.start(aiortc.RTCDtlsParameters(fingerprints=[fingerprint]))
        if dtls.state != "connected":
            raise ConnectionLost("the peer", "the DTLS handshake failed")
        self._sctp = sctp = Association(dtls, SCTP_PORT, lambda error: pipe.fail(error))
        parameters = RTCDataChannelParameters(label="tesseract", negotiated=True, id=CHANNEL)
        channel = aiortc.RTCDataChannel(sctp, parameters)
        opened = asyncio.Event()
        channel.once("open", opened.set)
        channel.once("close", opened.set)
        # messages may follow the opening at once: the pipe must listen before
        pipe = DataChannelPipe(self, channel, dtls)
        await sctp.start(aiortc.RTCSctpCapabilities(maxMessageSize=LOCAL_MAX_MESSAGE_SIZE), SCTP_PORT)
        await opened.wait()
        if channel.readyState != "open":
            raise ConnectionLost("the peer", "it hung up")
        pair = ice._nominated.get(1)
        if pair is not None:
            pipe.origin, remote_port = pair.remote_addr
            pipe.description = f"datachannel {join_host_port(pipe.origin, remote_port)}"
        return pipe

    async def aclose(self) -> None:
        """End everything; no task or socket is left. Safe to repeat."""
        sctp, self._sctp = self._sctp, None
        dtls, self._dtls = self._dtls, None
        if sctp is not None:
            await sctp.stop()
        if dtls is not None:
            pump = dtls._task
            await dtls.stop()
            if pump is not None:
                await asyncio.wait([pump])
        await self._ice.close()


class DataChannelPipe:
    """A `base.Pipe` over an open data channel. Made by `Negotiation.connect`."""

    def __init__(self, negotiation: Negotiation, channel: Any, dtls: Any) -> None:
        self._loop = asyncio.get_running_loop()
        self._negotiation = negotiation
        self._channel = channel
        self._stream = MessageStream()
        self._receiver: PipeReceiver | None = None
        self._reading = True
        self.paused = False
        self._delivering = False
        self._closing: asyncio.Task[None] | None = None
        self._gone = asyncio.Event()
        self.description = "datachannel"
        self.origin = ""
        channel.bufferedAmountLowThreshold = BUFFERED_LOW
        channel.on("message", self._received)
        channel.on("bufferedamountlow", self._pump)
        channel.on("close", self._channel_closed)
        dtls.on("statechange", self._channel_closed)
        self._dtls = dtls

    @property
    def unsent(self) -> int:
        return self._stream.unsent + int(self._channel.bufferedAmount)

    def write(self, data: bytes | memoryview) -> None:
        if self._closing is None:
            self._stream.write(data)
            self._pump()
            if self._stream.paused:
                self.paused = True

    def _pump(self) -> None:
        channel = self._channel
        if channel.readyState != "open":
            return
        for message in self._stream.messages_to_send(BUFFERED_HIGH - channel.bufferedAmount):
            channel.send(message)
        if self.paused and self._stream.unsent == 0:
            self.paused = False
            if self._receiver is not None:
                self._receiver.pipe_drained()

    def start(self, receiver: PipeReceiver) -> None:
        self._receiver = receiver
        self._loop.call_soon(self._deliver)

    def pause_reading(self) -> None:
        self._reading = False

    def resume_reading(self) -> None:
        self._reading = True
        self._loop.call_soon(self._deliver)

    def _received(self, message: bytes | str) -> None:
        try:
            self._stream.receive(message)
        except ProtocolError as error:
            self._end(error, flush=False)
            return
        if isinstance(message, str):
            self._pump()
        self._deliver()

    def _deliver(self) -> None:
        stream = self._stream
        if self._delivering:
            return  # the receiver resumed from within buffer_updated: the outer loop goes on
        self._delivering = True
        while stream.held and self._reading and self._receiver is not None and self._closing is None:
            count = stream.read_into(self._receiver.get_buffer())
            self._receiver.buffer_updated(count)
        self._delivering = False
        if self._closing is None:
            self._pump()
            if stream.ended and not stream.held and self._receiver is not None:
                self._end(None, flush=False)

    def close(self) -> None:
        self._end(None, flush=True)

    def abort(self) -> None:
        if self._closing is not None:
            self._gone.set()  # `close` may be waiting
        self._end(None, flush=False)

    def fail(self, error: ProtocolError) -> None:
        self._end(error, flush=False)
        self._gone.set()

    def _channel_closed(self) -> None:
        if self._dtls.state != "connected" or self._channel.readyState in ("closing", "closed"):
            self._gone.set()
            self._end(None if self._stream.ended else ConnectionLost("the peer", "the channel broke"), flush=False)

    def _end(self, error: Exception | None, *, flush: bool) -> None:
        if self._closing is None:
            self._closing = self._loop.create_task(self._run_end(error, flush))

    async def _run_end(self, error: Exception | None, flush: bool) -> None:
        if flush:
            self._stream.finish()
            self._pump()  # the peer hangs up when it has read everything
            if not await in_time(self._gone.wait(), CLOSE_TIMEOUT):
                logger.debug("%s: closed before everything was sent", self.description)
        try:
            await self._negotiation.aclose()
        except Exception as failure:  # the receiver hears of the end all the same
            logger.warning("%s: %s", self.description, describe(failure))
        receiver, self._receiver = self._receiver, None
        if receiver is not None:
            receiver.pipe_lost(error)
