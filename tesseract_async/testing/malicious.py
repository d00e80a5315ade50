"""Nodes that break the rules."""

from collections.abc import Sequence
from typing import ClassVar

from tesseract_async.network import datagrams as wire
from tesseract_async.network.contacts import Address, Contact, pack_contacts
from tesseract_async.network.protocol import NetworkProtocol
from tesseract_async.network.routing_table import K
from tesseract_async.network.storage import NUM_RANGES, StoreOutcome


class LyingProtocol(NetworkProtocol):
    """Answers every lookup with its accomplices, stores nothing, and claims to have stored everything.

    Subclass it for each conspiracy, and fill the subclass's `accomplices`.
    """

    accomplices: ClassVar[list[Contact]] = []

    def answer(
        self,
        datagram: wire.Datagram,
        request: wire.RpcRequest,
        *,
        address: Address,
        address_proven: bool,
        room: int,
        now: float,
    ) -> Sequence[object]:
        if datagram.kind == wire.PAGE:
            return (None, [])
        if datagram.kind == wire.STORE:
            return (bytes([StoreOutcome.STORED] * len(wire.read_items(request.arguments))),)
        results = super().answer(datagram, request, address=address, address_proven=address_proven, room=room, now=now)
        if datagram.kind == wire.FIND:
            return self._accomplices_near(request, room)
        if datagram.kind == wire.GET:
            digests, bodies = wire.read_value(list(results))
            used = sum(len(body) + 3 for body in bodies) if bodies or not digests else 8 * NUM_RANGES
            return (*results[:3], *self._accomplices_near(request, room - used))
        return results

    def _accomplices_near(self, request: wire.RpcRequest, room: int) -> tuple[bytes, bytes]:
        number = int.from_bytes(wire.read_key(request.arguments), "big")
        named = sorted(self.accomplices, key=lambda contact: contact.number ^ number)[:K]
        return pack_contacts(named, room - 10)
