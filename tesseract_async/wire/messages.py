"""Messages between clients and servers about experts: the bodies of the ``expert.*`` calls.

Each message is a named tuple (one is made for every call, and a frozen dataclass takes 2 to 4 us); `encode` gives the
msgpack body, a list of its fields, `decode` reads an untrusted body and raises only `ProtocolError`. Requests begin
with the expert's uid, by which they find its handler. Tensors travel next to the body (`tensors` holds their metas, see
`wire.tensors`).

- ``expert.info``: `InfoRequest` -> `ExpertInfo`
- ``expert.forward``: `ForwardRequest` + inputs -> `ForwardReply` + outputs
- ``expert.backward``: `BackwardRequest` + inputs, then output gradients -> `BackwardReply` + input gradients
- ``expert.take_over``: `TakeOverRequest` -> `TakeOverReply`, from a primary that leaves to a follower
- ``expert.tenure``: `TenureRequest` -> `TenureReply`, among the servers of a run's expert
- ``expert.push``: `PushRequest` + a difference -> `UpdatesReply` + updates, of a fragment of shared parameters
- ``expert.pull``: `PullRequest` -> `UpdatesReply` + updates
- ``expert.samples``: `SamplesRequest` -> `SamplesReply`, of the first fragment's primary
- ``expert.lockstep``: `LockstepRequest` -> `LockstepReply`, for all experts of the uid's grid at that server
- ``expert.state``: `StateRequest` -> `StateReply` + one buffer, a piece of the expert's state as a file
- ``expert.restore``: `RestoreRequest` + a piece of a state to go back to -> `RestoreReply`
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, Final, NamedTuple, TypeVar

from tesseract_async.errors import ProtocolError
from tesseract_async.wire.packed import Value

INFO = "expert.info"
FORWARD = "expert.forward"
BACKWARD = "expert.backward"
STATE = "expert.state"
TAKE_OVER = "expert.take_over"
TENURE = "expert.tenure"
RESTORE = "expert.restore"
PUSH = "expert.push"
PULL = "expert.pull"
SAMPLES = "expert.samples"
LOCKSTEP = "expert.lockstep"

Root = bytes
"""32 bytes that name a file."""
NO_ROOT: Final = bytes(32)
NO_POINT: Final = bytes(16)

LOWEST_PRIORITY, HIGHEST_PRIORITY = -1, 1
"""Servers take no notice of what lies beyond."""

MAX_UID_LENGTH = 256


class InfoRequest(NamedTuple):
    """Asks for the inputs and outputs of the expert `uid`."""

    uid: str


class ExpertInfo(NamedTuple):
    """The inputs and outputs of an expert. Schemas are as `wire.tensors.encode_schema` makes them."""

    uid: str
    args_schema: list[Value]
    """Schema of the positional arguments (a tuple)."""
    kwargs_schema: dict[str, Value]
    """Schema of the keyword arguments (a dict)."""
    outputs_schema: list[Value] | dict[str, Value]
    """Schema of what the module returns (a single spec for a bare tensor)."""
    max_batch_size: int
    """Rows that the server computes at once; larger requests are split by the server."""
    version: int
    """Optimizer steps taken so far."""
    codecs: dict[str, Value]
    """Codecs that the server accepts and answers with, as `wire.codecs.CodecPolicy` encodes them."""


class ForwardRequest(NamedTuple):
    """Apply the expert. The inputs travel as buffers: positional arguments, then keyword ones, in schema order."""

    uid: str
    tensors: list[Value]
    training: bool
    """True if the module is in train mode (dropout and the like)."""
    seed: int
    """Seeds the module's random numbers, so that backward's recomputation draws the same."""
    reply_codec: str
    """Codec for the outputs; one that the expert accepts for them."""
    keep_inputs: bool = False
    """A backward will follow: the server may keep the inputs, so that they need not travel again."""


class ForwardReply(NamedTuple):
    """The outputs travel as buffers, in the order of the outputs schema."""

    tensors: list[Value]
    version: int
    """Optimizer steps that the expert had taken when it computed this."""
    inputs_cached: bytes | None = None
    """Names the inputs that the server keeps for the backward; None if it keeps none."""
    epoch: int = 0
    """The epoch of the expert's lineage at that server; 0 outside of runs."""


class BackwardRequest(NamedTuple):
    """Recompute the forward, backpropagate, take an optimizer step.

    With it travel `num_inputs` inputs as in forward, then one gradient per output (absent where it got none).
    """

    uid: str
    call_id: bytes
    """16 random bytes. A request repeated under the same id never steps the optimizer twice."""
    tensors: list[Value]
    num_inputs: int
    training: bool
    seed: int
    """As in the forward that this belongs to."""
    version: int
    """The version that the forward's reply carried: what staleness is measured from."""
    reply_codec: str
    """Codec for the inputs' gradients."""
    inputs_cached: bytes | None = None
    """The name from the forward's reply: it stands for the inputs, of which then none travel (``num_inputs`` is 0). A
    server that has dropped them answers `InputsForgotten`, and the request is repeated with them."""


class BackwardReply(NamedTuple):
    """One gradient per input travels as a buffer, absent for inputs that have none (integers, unused ones)."""

    tensors: list[Value]
    version: int
    epoch: int = 0
    """As in `ForwardReply`."""


class TakeOverRequest(NamedTuple):
    """Asks a follower to fetch the expert's last state from the caller, its primary, and to train it from then on."""

    uid: str
    nonce: bytes | None = None
    """16 bytes, by which the follower proves that it has the state's file."""


class TakeOverReply(NamedTuple):
    """The follower is the primary now."""

    version: int
    proof: bytes | None = None
    """The first 16 bytes of `experts.pieces.possession` of the file."""


class TenureRequest(NamedTuple):
    """One server of an expert asks another about its primary (`experts.tenure_words.Question`), or hands it over."""

    uid: str
    kind: str
    """``beat``, ``rise``, ``probe``, ``vote``; ``prepare`` (fetch this sealed state, and prove it) and ``take_over``
    (by this signature)."""
    epoch: int
    records: list[Value]
    """Bytes, each at most 1,024: boot nonce, Term and Seal; or a nonce and a Seal; or a signature."""


class TenureReply(NamedTuple):
    """The answer (`experts.tenure_words.Response`)."""

    agrees: bool
    held: list[Value]
    """Epoch and number of the Seal whose file is there."""
    records: list[Value]
    """Term, and vote or proof; empty where there is none."""


class StateRequest(NamedTuple):
    """Asks for a piece of the expert's state as a file. Piece 0 is the list of the other pieces' hashes, or the
    whole of a file of one piece (`experts.pieces`)."""

    uid: str
    weights_only: bool
    """True for a state without the optimizer's and the journal: for an export."""
    min_version: int
    """Send nothing while the expert has taken fewer steps: a follower asks for what is newer than its own."""
    root: Root
    """The file, by `experts.pieces.root_of`; `NO_ROOT` for the newest."""
    piece: int
    point: bytes = NO_POINT
    """16 random bytes: the state at the moment when the caller asks under this id first. It is written down, and says
    how the expert's module is built."""


class StateReply(NamedTuple):
    """The answer to a `StateRequest`, with the piece as its buffer; without one where `size` is 0."""

    version: int
    root: Root
    size: int
    """Bytes of the whole file; 0 if it is not here, or the expert has not reached `min_version`."""
    piece: int


class RestoreRequest(NamedTuple):
    """A piece of a state to go on from; with it travel `experts.pieces.PIECE_BYTES`, or the file's last ones. They come
    in order, and the last is answered when the expert has the state."""

    uid: str
    root: Root
    size: int
    """Bytes of the whole file."""
    offset: int


class RestoreReply(NamedTuple):
    version: int
    """Optimizer steps of the expert now."""


class PushRequest(NamedTuple):
    """A trainer's difference from a base, the state of a fragment that it began at. The answer comes when the round
    that counts it has closed. Repeated without the difference, it asks for the outcome. If the push is not here, the
    answer says that it is not counted although its base is known, and the difference is sent again."""

    uid: str
    call_id: bytes
    """16 random bytes. A push repeated under the same id never counts twice."""
    version: int
    root: bytes
    """The first state's `sharing.fragment.anchor_root`."""
    steps: int
    """Optimizer steps in it."""


class PullRequest(NamedTuple):
    uid: str
    version: int
    root: bytes
    journal: bool = False
    """True to get everything that another host of the fragment needs to have the same state."""


class UpdatesReply(NamedTuple):
    """The way from the base to the present state. With it travel the updates, encoded, the oldest first."""

    counted: bool
    """True if the push is in the present state."""
    known: bool
    """False if the base is unknown here or too old: no updates come, and the state must be fetched whole."""
    epoch: int
    version: int
    steps: int
    """Optimizer steps of all members that were ever pushed."""
    roots: list[Value]
    """The root after each update."""
    journal: list[Value] = []  # noqa: RUF012  (a named tuple's default)
    """If it was asked for, for each update: steps of all members then, the journal's keys of what it counts, 16 bytes
    each, and the state of the samples (`sharing.samples.Ledger.encode`)."""


class SamplesRequest(NamedTuple):
    """A trainer's `sharing.samples.Report` to the primary of the first fragment."""

    uid: str
    trainer: bytes
    """16 random bytes: one start of its program."""
    turn: int
    """The number of the trainer's message; the numbers ascend."""
    epoch: int
    num_samples: int
    wanted: int
    held: list[Value]
    """Pieces, as `sharing.spans.encode_pieces` gives them; so are the next."""
    done: list[Value]
    returned: list[Value]


class SamplesReply(NamedTuple):
    """A `sharing.samples.Allotment`."""

    session: bytes
    """16 bytes that name the ledger: another one has to be told all that was done."""
    pieces: list[Value]
    again: int
    gone: list[Value]
    first: int
    waits: bool


class LockstepRequest(NamedTuple):
    """A request to all experts of one grid at a server, which gather gradients until their trainer has them step."""

    uid: str
    """The uid of one of these experts."""
    action: str
    """``status``; ``step``; ``clear``: forget what was gathered; ``save``: write checkpoints."""
    round: int = 0
    """The steps that all have taken before this one. One that has taken it already takes no other."""
    optimizer: str = ""
    """The name of the trainer's optimizer: experts with another one refuse. Empty: any will do."""
    options: dict[str, Value] = {}  # noqa: RUF012  (a named tuple's default)
    """Numbers: ``lr`` and others of the optimizer; ``scale`` that multiplies gradients; ``limit`` of their numbers."""
    num_experts: int = 0
    """The number that the status gave after the backward, so that no step is taken on other gradients. 0: unknown."""
    squared_norm: float = 0.0
    """The squared norm that the status gave then."""


class LockstepReply(NamedTuple):
    round: int
    """The steps that all have taken now."""
    num_experts: int
    squared_norm: float
    """The square of the norm of what was gathered, if the ``status`` was asked for."""


Body = TypeVar("Body", bound=tuple[Value, ...])


def _has_text_keys(value: Value) -> bool:
    return type(value) is list or all(type(key) is str for key in value)


_Kind = tuple[tuple[type, ...], range | None, Callable[[Value], bool] | None]
"""The types that a value has exactly, its lengths (None has none), and a check."""
_KINDS: Final[dict[str, _Kind]] = {
    "str": ((str,), range(MAX_UID_LENGTH + 1), None),
    "int": ((int,), None, range(2**63).__contains__),
    "float": ((float,), None, lambda value: value >= 0),
    "bool": ((bool,), None, None),
    "bytes": ((bytes,), range(16, 17), None),
    "bytes | None": ((bytes, type(None)), range(16, 17), None),
    "Root": ((bytes,), range(32, 33), None),
    "list[Value]": ((list,), None, None),
    "list[Value] | dict[str, Value]": ((list, dict), None, _has_text_keys),
    "dict[str, Value]": ((dict,), None, _has_text_keys),
}
_MISSING: Final = object()


_Form = tuple[list[Value], frozenset[tuple[type, ...]], list[tuple[int, range | None, Callable[[Value], bool] | None]]]
"""Defaults of a message's fields; all that their types may be together, which is looked up at once, in half the time of
one by one; and the places of those with lengths or a check, and these."""


def _form_of(message: Any) -> _Form:
    # the annotations are strings here, kept as forward references
    kinds = [_KINDS[one.__forward_arg__] for one in message.__annotations__.values()]
    defaults = [message._field_defaults.get(name, _MISSING) for name in message._fields]
    types = frozenset(itertools.product(*(of for of, _, _ in kinds)))
    return defaults, types, [(at, lengths, check) for at, (_, lengths, check) in enumerate(kinds) if lengths or check]


_FORMS: Final = {one: _form_of(one) for one in [*globals().values()] if hasattr(one, "_fields")}


encode: Callable[[tuple[Value, ...]], list[Value]] = list


def decode(kind: type[Body], body: Value) -> Body:
    """Read an untrusted body as `kind`. Later versions may add fields at the end: unknown ones are ignored, and those
    with a default may be missing.

    Raises: ProtocolError for a missing field or a value of the wrong type.
    """
    defaults, types, looks = _FORMS[kind]
    if type(body) is not list:
        raise ProtocolError(f"{kind.__name__}: the body is not a list")
    if len(body) != len(defaults):
        body = [*body[: len(defaults)], *defaults[len(body) :]]
    wrong = -1
    if tuple(map(type, body)) not in types:
        wrong = next(at for at, value in enumerate(body) if all(type(value) is not one[at] for one in types))
    else:
        for at, lengths, check in looks:
            value = body[at]
            if lengths is not None and value is not None and len(value) not in lengths:
                wrong = at
            elif check is not None and not check(value):
                wrong = at
    if wrong >= 0:
        raise ProtocolError(f"{kind.__name__}: {kind._fields[wrong]} is missing or malformed")  # type: ignore[attr-defined]
    made: Body = tuple.__new__(kind, body)
    return made


def uid_of(body: Value) -> str | None:
    """Return the uid that the untrusted body of an ``expert.*`` request begins with, if it does."""
    uid = body[0] if type(body) is list and body else None
    return uid if type(uid) is str else None
