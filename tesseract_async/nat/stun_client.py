"""Asks STUN servers where we seem to be: which of them answer, and what kind of NAT lies in between."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from typing import Final

from tesseract_async.errors import ProtocolError
from tesseract_async.wire import stun

Address = tuple[str, int]

RETRANSMIT_AFTER: Final = 0.25
"""Seconds without an answer after which the question is sent again."""


class _Asker(asyncio.DatagramProtocol):
    def __init__(self, questions: dict[bytes, Address]) -> None:
        self.questions = questions
        self.answers: dict[Address, Address] = {}
        self.complete = asyncio.Event()
        self.closed = asyncio.Event()

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        try:
            transaction_id, host, port = stun.decode_response(data)
        except ProtocolError:
            return
        server = self.questions.pop(transaction_id, None)
        if server is not None and server[0] == addr[0]:
            self.answers[server] = (host, port)
        if not self.questions:
            self.complete.set()

    def error_received(self, exc: Exception) -> None:
        pass  # one server is unreachable; the others may not be

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed.set()


async def ask(
    servers: Sequence[Address], *, local_host: str = "0.0.0.0", timeout: float = 1.0
) -> dict[Address, Address]:
    """From one new socket asks each server, for `timeout` seconds at most. Servers and `local_host` are IP addresses of
    one kind, IPv4 or IPv6.

    Returns what those who answered saw, in the order of their answers: the quickest one first. Raises: OSError.
    """
    protocol = _Asker({os.urandom(12): server for server in servers})
    if not servers:
        return {}
    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_datagram_endpoint(lambda: protocol, local_addr=(local_host, 0))
    try:
        async with asyncio.timeout(timeout):
            while True:
                for transaction_id, server in list(protocol.questions.items()):
                    transport.sendto(stun.encode_request(transaction_id), server)
                try:
                    await asyncio.wait_for(protocol.complete.wait(), RETRANSMIT_AFTER)
                except TimeoutError:
                    continue
                break
    except TimeoutError:
        pass  # whoever has not answered by now is not listed
    finally:
        transport.close()
        await protocol.closed.wait()
    return protocol.answers
