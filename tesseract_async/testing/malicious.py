"""Nodes that do not play by the rules."""

from __future__ import annotations

from typing import Any, ClassVar

from tesseract_async.network import datagrams as wire
from tesseract_async.network.contacts import Contact, pack_contacts
from tesseract_async.network.protocol import NetworkProtocol
from tesseract_async.network.storage import Outcome


class LyingProtocol(NetworkProtocol):
    """Answers every lookup with its accomplices, holds nothing, and says that it stored what it was given.

    Subclass it for each conspiracy, and fill the subclass's `accomplices`.
    """

    accomplices: ClassVar[list[Contact]] = []

    def closest_for(self, target: bytes, asker: bytes, room: int) -> tuple[bytes, bytes]:
        number = int.from_bytes(target, "big")
        named = sorted(self.accomplices, key=lambda contact: contact.number ^ number)[: self.settings.k]
        return pack_contacts(named, room - 10)

    def _answer(self, datagram: wire.Datagram, request: wire.Request, *rest: Any) -> Any:
        if datagram.kind == wire.PAGE:
            return (None, [])
        if datagram.kind == wire.STORE:
            return (bytes([Outcome.STORED] * len(wire.read_items(request.arguments))),)
        return super()._answer(datagram, request, *rest)
