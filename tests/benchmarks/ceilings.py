"""What this machine's sockets allow in Python: the least program that echoes frames between two processes.

Frames are a 12-byte head and a payload, received into the place where the payload stays, on uvloop where there is one;
with TLS by the loop itself. A framework that also routes, checks and computes can only come near.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import os
import ssl
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tests.benchmarks.figures import emit
from tests.benchmarks.processes import child, in_thread, wait_for_stop

HEAD = struct.Struct("!QI")
BIG, SMALL = 8 << 20, 4 << 10


class Frames(asyncio.BufferedProtocol):
    """Cuts a byte stream into frames: each payload is received straight into a buffer of its own."""

    def __init__(self, on_frame: Callable[[Frames, int, memoryview], None]) -> None:
        self._on_frame = on_frame
        self._head = memoryview(bytearray(HEAD.size))
        self._target = self._head
        self._filled = 0
        self._number = -1
        self._writable = asyncio.Event()
        self._writable.set()
        self.transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.transport.set_write_buffer_limits(high=2 * BIG)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._target[self._filled :]

    def buffer_updated(self, num_bytes: int) -> None:
        self._filled += num_bytes
        if self._filled < len(self._target):
            return
        self._filled = 0
        if self._number < 0:
            self._number, size = HEAD.unpack(self._head)
            self._target = memoryview(bytearray(size))
        else:
            number, payload = self._number, self._target
            self._number, self._target = -1, self._head
            self._on_frame(self, number, payload)

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def send(self, number: int, payload: Any) -> None:
        self.transport.write(HEAD.pack(number, len(payload)))
        self.transport.write(payload)

    async def writable(self) -> None:
        await self._writable.wait()


def run_on_fastest_loop(main: Coroutine[Any, Any, None]) -> None:
    """``asyncio.run`` on uvloop where it is installed."""
    if sys.platform == "win32":
        asyncio.run(main)
        return
    import uvloop

    uvloop.run(main)


def make_certificate(directory: Path) -> Path:
    """A self-signed Ed25519 certificate and its key in one file."""
    key = Ed25519PrivateKey.generate()
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "echo")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .sign(key, None)
    )
    path = directory / "echo.pem"
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path.write_bytes(private + certificate.public_bytes(pem))
    return path


def serve(pipe: Connection, certificate: Path | None) -> None:
    """The echoing process; sends its port."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        context = None
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.minimum_version = ssl.TLSVersion.TLSv1_3
            context.load_cert_chain(certificate)
        server = await loop.create_server(lambda: Frames(Frames.send), "127.0.0.1", 0, ssl=context)
        pipe.send(("value", server.sockets[0].getsockname()[1]))
        stopped = asyncio.Event()

        def watch() -> None:
            wait_for_stop(pipe)
            loop.call_soon_threadsafe(stopped.set)

        in_thread(watch)
        await stopped.wait()
        server.close()

    run_on_fastest_loop(main())


def cpu_seconds(*pids: int) -> float:
    """Processor time of these processes together, so far."""
    return sum(sum(psutil.Process(pid).cpu_times()[:2]) for pid in pids)


async def echo(
    port: int, *, size: int, at_once: int, seconds: float, tls: bool, pids: tuple[int, ...] = ()
) -> tuple[float, float]:
    """Frames per second, there and back, with `at_once` under way; processor time of `pids` for each, in seconds."""
    loop = asyncio.get_running_loop()
    waiting: dict[int, asyncio.Future[None]] = {}
    context = None
    if tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE

    def answered(_: Frames, number: int, payload: memoryview) -> None:
        waiting.pop(number).set_result(None)

    transport, protocol = await loop.create_connection(lambda: Frames(answered), "127.0.0.1", port, ssl=context)
    payload = memoryview(bytes(size))
    num_sent = 0

    async def call() -> None:
        nonlocal num_sent
        number, num_sent = num_sent, num_sent + 1
        future = waiting[number] = loop.create_future()
        await protocol.writable()
        protocol.send(number, payload)
        await future

    await asyncio.gather(*(call() for _ in range(at_once)))
    begin, num_warm, cpu = time.perf_counter(), num_sent, cpu_seconds(*pids)
    stop_at = begin + seconds

    async def caller() -> None:
        while time.perf_counter() < stop_at:
            await call()

    await asyncio.gather(*(caller() for _ in range(at_once)))
    elapsed, cpu = time.perf_counter() - begin, cpu_seconds(*pids) - cpu
    transport.close()
    return (num_sent - num_warm) / elapsed, cpu / (num_sent - num_warm)


def measure(*, tls: bool, seconds: float) -> None:
    """Prints the two ceilings, large frames and small ones, plain or with TLS."""
    security = "tls" if tls else "plain"
    with contextlib.ExitStack() as stack:
        certificate = None
        if tls:
            certificate = make_certificate(Path(stack.enter_context(tempfile.TemporaryDirectory())))
        server = stack.enter_context(child(serve, (certificate,)))
        port, pids = server.receive(30), (os.getpid(), server.process.pid)

        async def main() -> None:
            frames, _ = await echo(port, size=BIG, at_once=4, seconds=seconds, tls=tls)
            emit(f"ceiling: echo 8 MiB, {security}", frames * BIG / 1e6, "MB/s each way")
            for at_once in (32, 8, 1):
                frames, cpu = await echo(port, size=SMALL, at_once=at_once, seconds=seconds, tls=tls, pids=pids)
                emit(f"ceiling: echo 4 KiB, {at_once} at once, {security}", frames, "calls/s")
                if at_once == 8:
                    emit(f"ceiling: echo 4 KiB, 8 at once, {security}: processor time", cpu * 1e6, "us")

        run_on_fastest_loop(main())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--security", choices=("tls", "plain", "both"), default="both")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each figure")
    args = parser.parse_args()
    for security in ("plain", "tls") if args.security == "both" else (args.security,):
        measure(tls=security == "tls", seconds=args.seconds)


if __name__ == "__main__":
    main()
