"""The states of a `Tenure`, the questions that servers ask each other about an expert, and commands to the driver.
No I/O.
"""

from enum import Enum
from typing import Final, NamedTuple

from tesseract_async.experts.terms import Seal, Term
from tesseract_async.identity import PeerID

MAX_PAST: Final = 4


class State(Enum):
    """The part that this server has in the expert."""

    ABSENT = "absent"
    """It has no state of the expert, or none that it may use."""
    FOLLOWING = "following"
    """A member: it holds a sealed file, and may take over."""
    HOLDING = "holding"
    """It holds a sealed file, but is not a member."""
    CANDIDATE = "candidate"
    """It asks for votes, or reads its Term back."""
    PRIMARY = "primary"
    YIELDING = "yielding"
    """It takes no more steps, and hands the expert over to another."""
    FENCED = "fenced"
    """Its Term holds, but not its lease: no steps, and no answers to steps."""
    ASIDE = "aside"
    """Another's Term outranks its own: its file is kept, and the other's fetched."""


class Question(NamedTuple):
    """One server asks another about an expert. `kind`: ``beat`` (I am its primary), ``rise`` (I would be again),
    ``probe`` (are you?) or ``vote``."""

    kind: str
    epoch: int
    boot: bytes
    term: bytes
    """The Term that the asker stands on; empty for none."""
    seal: bytes
    """Its newest Seal, or for a vote the one that the candidate holds."""


class Response(NamedTuple):
    """The answer to a `Question`."""

    agrees: bool
    """To a beat: you are my primary. To a probe: I am. To a vote: I have heard the primary just now."""
    held: tuple[int, int]
    """The age of the Seal whose file it holds; (0, 0) for none, and in answer to a probe by a server that could not
    lead the expert."""
    term: bytes
    """The Term that holds by what it knows, where that is not the asker's."""
    vote: bytes
    """To a vote; empty: no. To a probe: the Seal that it holds, where that is newer than the asker's."""


# -- commands ----------------------------------------------------------------------------------------------------------


class Persist(NamedTuple):
    """Bytes that must be on disk before what follows is done: `Tenure` takes them when the server starts again."""

    stored: bytes


class Publish(NamedTuple):
    """A Term, and a Seal of it if there is one, in place of those published before."""

    records: tuple[bytes, ...]
    past: tuple[bytes, ...] = ()
    """At most `MAX_PAST` records that led there, which are kept next to the later ones."""


class Send(NamedTuple):
    """A question to a peer; its answer goes to `Tenure.answered`."""

    peer: PeerID
    question: Question


class Look(NamedTuple):
    """Read what the network holds of the expert: `sight` each record, then `looked`."""


class Fetch(NamedTuple):
    """Get this Seal's file, from this server's own or one of `sources`, verify its root, install it; then `fetched`."""

    term: Term
    """The Term for which it is fetched."""
    seal: Seal
    sources: tuple[PeerID, ...]
    aside: bool
    """True if this server's file is of another line: it is kept, out of the way."""
    check: bool
    """True to find out only whether the file can be fetched: nothing is installed."""


class RoleChanged(NamedTuple):
    """True if this server trains the expert from now on, and which one does."""

    is_primary: bool
    primary: PeerID | None


Command = Persist | Publish | Send | Look | Fetch | RoleChanged
