"""The events that the machine has for its driver. Pure."""

from dataclasses import dataclass

from tesseract_async.identity import PeerID, SignedRecord
from tesseract_async.network.contacts import Address


@dataclass(frozen=True, slots=True)
class ReadFinished:
    """`NetworkProtocol.read` number `operation` ended. `records` are verified, merged, and may hold tombstones."""

    operation: int
    records: list[SignedRecord]
    num_rounds: int
    """The longest chain of answers that the lookup followed."""
    num_answers: int
    """Contacts that answered at all: if none did, finding no records says nothing."""
    complete: bool
    """True if everything that holders reported could be fetched from one of them."""


@dataclass(frozen=True, slots=True)
class WriteFinished:
    """`NetworkProtocol.write` number `operation` ended. One item for each record, in order."""

    operation: int
    num_holders: list[int]
    num_outdated: list[int]
    """Nodes that claim to hold a newer record of the same owner. Unproven: read before believing it."""


@dataclass(frozen=True, slots=True)
class Joined:
    """The routing table is no longer empty, and this node's neighborhood is known."""

    num_contacts: int


@dataclass(frozen=True, slots=True)
class Isolated:
    """No contact is left in the routing table. Seeds and remembered contacts are asked until somebody answers."""


@dataclass(frozen=True, slots=True)
class NodeRoleChanged:
    """Others found out if this node can be dialed: ``public`` or ``client``."""

    role: str


@dataclass(frozen=True, slots=True)
class ClockSkewed:
    """The other nodes' clocks, in the median, are `seconds` ahead of this one's: more than is tolerated."""

    seconds: float


@dataclass(frozen=True, slots=True)
class WrongPeer:
    """The node at a seed's address has proven to be `found`, not the one that was named. It is left alone."""

    address: Address
    found: PeerID


NetworkEvent = ReadFinished | WriteFinished | Joined | Isolated | NodeRoleChanged | ClockSkewed | WrongPeer
