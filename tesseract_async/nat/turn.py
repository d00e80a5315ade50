"""An outside TURN server (RFC 8656), through which a data channel may run where nothing else works."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from tesseract_async.transport.base import split_host_port


@dataclass(frozen=True, slots=True)
class TurnServer:
    """Where it is, and as whom this node logs in there."""

    host: str
    port: int
    username: str
    password: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``USER:PASSWORD@HOST:PORT``. Raises: ValueError."""
        user, at, server = text.rpartition("@")
        name, colon, password = user.partition(":")
        host, port = split_host_port(server)
        if not (at and colon and name):
            raise ValueError("a TURN server is given as USER:PASSWORD@HOST:PORT")
        return cls(host, port, name, password)
