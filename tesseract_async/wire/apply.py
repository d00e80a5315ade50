"""``expert.apply``: one message to a server for many of its experts. `ApplyRequest` -> `ApplyPart`s.

Every row travels once, whatever the number of experts that are to see it: the request holds a block of rows, and for
each expert the numbers of its rows in the block and a weight for each. The server answers with the weighted *sum* of
the experts' outputs, or of the gradients of their inputs, in parts, each of which names the experts that it is the sum
of. The outcome of each expert is told once, in one of the parts. See `docs/design/wire.md`, section 10.

Everything that decodes takes untrusted input and raises only `ProtocolError`. No torch: tensors are metas and buffers.
"""

import operator
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from tesseract_async.errors import NotPrimary, Overloaded, ProtocolError, RemoteError, text_of
from tesseract_async.wire import heads
from tesseract_async.wire.messages import MAX_UID_LENGTH
from tesseract_async.wire.packed import Value

APPLY: Final = "expert.apply"

MAX_EXPERTS: Final = 1024
"""Experts in one message."""
MAX_DIMS: Final = 8
"""Coordinates of an expert."""
MAX_SENTENCE_LENGTH: Final = 200
"""Characters of the sentence that says why one expert did not answer: the head holds up to `MAX_EXPERTS` of them."""
ID_BYTES: Final = 16

PackedCoordinates = npt.NDArray[np.uint32]
Numbers = npt.NDArray[np.int64]
Rows = npt.NDArray[np.int32]
Weights = npt.NDArray[np.float32]
Integers = npt.NDArray[np.integer]

_U4, _I4, _I8, _F4 = (np.dtype(name) for name in ("<u4", "<i4", "<i8", "<f4"))
_all: Final = np.logical_and.reduce  # an array's own `all` takes a Python call more, as do `min` and `max`


class ApplyRequest(NamedTuple):
    """Apply these experts of one grid, all of one schema, to some rows each.

    The *pairs* of an expert and one of its rows are numbered expert by expert: those of expert ``e`` (its place in
    `experts`) are ``offsets[e]`` to ``offsets[e + 1]``.
    """

    prefix: str
    experts: PackedCoordinates
    """``[E, D]``, in ascending order, none twice."""
    ids: Sequence[bytes]
    """16 random bytes per expert. They name what is asked of this expert with these rows, in forward and backward,
    wherever and however often it is sent: a backward repeated under the same id never steps the expert twice."""
    versions: Numbers
    """Per expert. Backward: the version that its forward saw, from which staleness is measured. Forward: the least
    version that is accepted; a replica that lacks steps answers `TooStale`."""
    offsets: Numbers
    """``[E + 1]``."""
    rows: Rows
    """``[P]``: of each pair, the row's number in the block; ascending for each expert."""
    weights: Weights
    """``[P]``."""
    tensors: Sequence[Value]
    """Metas of the block: the inputs, then in a backward one gradient per output (absent where it got none)."""
    num_inputs: int
    """0 if `kept` stands for the inputs."""
    backward: bool
    training: bool
    """True if the modules are in train mode (dropout and the like)."""
    keep: bool
    """Forward: a backward will follow, and the server may keep the block, so that it need not travel again."""
    seed: int
    """Seeds the modules' random numbers; in backward the forward's."""
    reply_codec: str
    """Codec for the sums; in backward, for those of the inputs' gradients."""
    kept: bytes | None = None
    """Backward: the name of the forward's block at this server. Rows are then numbered as there. An expert answers
    `InputsForgotten` if it is not kept any more."""

    @property
    def num_rows(self) -> int:
        return int(next(meta[1][0] for meta in self.tensors if meta is not None))

    def pairs(self, experts: Integers) -> Numbers:
        """The numbers of the pairs of these experts (ascending places in `experts`), one expert after the other."""
        if len(experts) == len(self.ids):
            return np.arange(len(self.rows))
        starts, ends = self.offsets[experts], self.offsets[experts + 1]
        lengths = ends - starts
        firsts = np.repeat(starts - (np.cumsum(lengths) - lengths), lengths)
        return firsts + np.arange(len(firsts))

    def rows_of(self, experts: Integers) -> Integers:
        """The rows that any of these experts sees, ascending: those of a part's sums."""
        return numbered(self.rows[self.pairs(experts)])[0]

    def scales_of(self, experts: Integers) -> Weights | None:
        """Return the divisors of the rows of these experts' sums before a lossy codec takes them: the greatest
        magnitude among each row's weights, if any is not 0. None for sums that travel as they are."""
        if self.backward or self.reply_codec == "none" or not len(experts):
            return None
        pairs = self.pairs(experts)
        index = numbered(self.rows[pairs])[1]
        scales = np.zeros(int(index.max()) + 1, dtype=np.float32)
        np.maximum.at(scales, index, np.abs(self.weights[pairs]))
        scales[scales == 0] = 1
        return scales


class ApplyPart(NamedTuple):
    """The sum over some experts, and the failures of others. The parts of a reply together name each expert once.

    A part's sums have the rows of `ApplyRequest.rows_of`: a row's sum is over those of `experts` that see it.
    Divided by `ApplyRequest.scales_of`, they travel in the codec that was asked for, from float32 (float64 and complex
    numbers where the experts' are).
    """

    experts: Numbers
    """Places in `ApplyRequest.experts`, ascending: those whose answers are in the sums."""
    versions: Numbers
    """The optimizer steps that each of `experts` had taken: before a forward, after a backward."""
    epochs: Numbers
    """The epoch of the lineage of each of `experts` at that server; 0 outside of runs."""
    failures: Sequence[tuple[int, RemoteError]]
    """Places of other experts, and why they did not answer. Each may be asked again, under the same id."""
    tensors: Sequence[Value]
    """Metas of the sums: one per output; in backward one per input, absent where it has no gradient. Empty if `experts`
    is."""
    weight_gradients: Weights
    """Backward: of each pair of `experts`, in their order, the gradient of its weight; from the recomputed answer, so
    as stale as the expert. Empty in a forward."""
    kept: bytes | None = None
    """Forward, first part: the name of the block, if the server keeps it."""


def numbered(rows: Rows) -> tuple[Integers, Integers]:
    """Return what `np.unique` does: the rows that occur, ascending, and of each the place among them."""
    size = int(np.maximum.reduce(rows, initial=-1)) + 1
    if size > 16 * len(rows):
        return np.unique(rows, return_inverse=True)
    occurs = np.zeros(size, dtype=np.bool_)  # a tenth of sorting them
    occurs[rows] = True
    return np.flatnonzero(occurs), (occurs.cumsum() - 1)[rows]


def encode_request(request: ApplyRequest) -> tuple[list[Value], list[memoryview]]:
    body: list[Value] = [
        request.prefix,
        request.experts.astype(_U4).tobytes(),
        b"".join(request.ids),
        request.versions.astype(_I8).tobytes(),
        request.offsets.astype(_U4).tobytes(),
        list(request.tensors),
        request.num_inputs,
        request.backward,
        request.training,
        request.keep,
        request.seed,
        request.reply_codec,
        request.kept,
    ]
    return body, [_buffer(request.rows, _I4), _buffer(request.weights, _F4)]


def decode_request(body: Value, buffers: Sequence[memoryview]) -> tuple[ApplyRequest, Sequence[memoryview]]:
    """Read an untrusted request; return it with the buffers of its tensors. Raises: ProtocolError."""
    if len(buffers) < 2:
        raise ProtocolError("ApplyRequest: rows and weights are missing")
    given = _fields(body, (str, bytes, bytes, bytes, bytes, list, int, bool, bool, bool, int, str))
    prefix, coordinates, ids, told_versions, told_offsets, tensors, num_inputs = given[:7]
    backward, training, keep, seed, reply_codec, kept = given[7:]
    num_experts, excess = divmod(len(ids), ID_BYTES)
    if excess or not 0 < num_experts <= MAX_EXPERTS:
        raise ProtocolError(f"ApplyRequest: from 1 to {MAX_EXPERTS} experts, with an id of {ID_BYTES} bytes each")
    if len(prefix) > MAX_UID_LENGTH or len(reply_codec) > MAX_UID_LENGTH or not 0 <= seed < 2**63:
        raise ProtocolError("ApplyRequest: prefix, reply_codec or seed is malformed")
    if kept is not None and not backward:
        raise ProtocolError("ApplyRequest: a forward brings its inputs")
    if (num_inputs != len(tensors) if not backward else not 0 <= num_inputs < len(tensors)) or (
        (num_inputs == 0) != (kept is not None)
    ):
        raise ProtocolError("ApplyRequest: num_inputs does not fit what travels")
    experts = _coordinates(coordinates, num_experts)
    versions = _numbers(told_versions, num_experts, _I8)
    offsets = _numbers(told_offsets, num_experts + 1, _U4)
    num_rows = _num_rows(tensors)
    rows, weights = _array(buffers[0], _I4), _array(buffers[1], _F4)
    if offsets[0] != 0 or offsets[-1] != len(rows) or not _ascend(offsets.tolist()):
        raise ProtocolError("ApplyRequest: the offsets do not divide the pairs among the experts")
    if len(weights) != len(rows) or not _all(np.isfinite(weights)):
        raise ProtocolError("ApplyRequest: each pair has a finite weight")
    rising = np.empty(len(rows), dtype=np.bool_)
    np.greater(rows[1:], rows[:-1], out=rising[1:])
    rising[offsets[:-1]] = True
    if not _all(rising) or np.minimum.reduce(rows) < 0 or np.maximum.reduce(rows) >= num_rows:
        raise ProtocolError("ApplyRequest: the rows of an expert ascend within the block")
    request = ApplyRequest(
        prefix,
        experts,
        [ids[start : start + ID_BYTES] for start in range(0, len(ids), ID_BYTES)],
        versions,
        offsets,
        rows,
        weights,
        tensors,
        num_inputs,
        backward,
        training,
        keep,
        seed,
        reply_codec,
        kept,
    )
    return request, buffers[2:]


def encode_part(part: ApplyPart, *, backward: bool) -> tuple[list[Value], list[memoryview]]:
    body: list[Value] = [
        part.experts.astype(_U4).tobytes(),
        part.versions.astype(_I8).tobytes(),
        part.epochs.astype(_I8).tobytes(),
        [[expert, *_told(error)] for expert, error in part.failures],
        list(part.tensors),
        part.kept,
    ]
    return body, [_buffer(part.weight_gradients, _F4)] if backward else []


def decode_part(
    body: Value, buffers: Sequence[memoryview], request: ApplyRequest
) -> tuple[ApplyPart, Sequence[memoryview]]:
    """Read an untrusted part of the reply to `request`; return it with the buffers of its sums, whose metas are not
    checked yet. Raises: ProtocolError."""
    if len(buffers) < request.backward:
        raise ProtocolError("ApplyPart: the weights' gradients are missing")
    packed, versions, epochs, told, tensors, kept = _fields(body, (bytes, bytes, bytes, list, list))
    num_experts = len(request.ids)
    experts = _numbers(packed, len(packed) // _U4.itemsize, _U4)
    if len(told) + len(experts) > num_experts or (tensors and not len(experts)):  # first: the next look is for few
        raise ProtocolError("ApplyPart: more experts than were asked, or sums of none")
    if len(experts) and (experts[-1] >= num_experts or not _ascend(experts.tolist())):
        raise ProtocolError("ApplyPart: the experts are not some of those that were asked, in order")
    failures = [_failure(entry, num_experts) for entry in told] if told else []
    if told and len({*experts.tolist(), *(expert for expert, _ in failures)}) < len(told) + len(experts):
        raise ProtocolError("ApplyPart: an expert is named twice")
    part = ApplyPart(
        experts,
        _numbers(versions, len(experts), _I8),
        _numbers(epochs, len(experts), _I8),
        failures,
        tensors,
        _array(buffers[0], _F4) if request.backward else np.empty(0, dtype=_F4),
        kept,
    )
    num_pairs = int((request.offsets[experts + 1] - request.offsets[experts]).sum()) if request.backward else 0
    if len(part.weight_gradients) != num_pairs:
        raise ProtocolError("ApplyPart: each pair of its experts has a gradient of its weight")
    return part, buffers[request.backward :]


def _told(error: RemoteError) -> tuple[str, str, float, bytes | None]:
    code, sentence = text_of(lambda: error.code), text_of(lambda: str(error))[:MAX_SENTENCE_LENGTH]
    primary = error.details.get("primary")
    return code, sentence, error.details.get("retry_after", 0.0), None if primary is None else bytes(primary)


def _failure(entry: Value, num_experts: int) -> tuple[int, RemoteError]:
    if type(entry) is not list or len(entry) != 5 or type(entry[0]) is not int or not 0 <= entry[0] < num_experts:
        raise ProtocolError("ApplyPart: a malformed failure")
    expert, code, sentence, retry_after, primary = entry
    if type(retry_after) not in (int, float) or not (primary is None or type(primary) is bytes):
        raise ProtocolError("ApplyPart: a malformed failure")
    details = {"retry_after": retry_after, "primary": primary} if code in (Overloaded.code, NotPrimary.code) else {}
    return expert, heads.decode_error(code, sentence, details)


def _fields(body: Value, kinds: Sequence[type]) -> list[Value]:
    """Return a body's first fields, each of its kind, and the name of a kept block, or None, that follows them. Further
    ones, of later versions, are ignored."""
    num_fields = len(kinds) + 1
    if type(body) is not list or len(body) < num_fields:
        raise ProtocolError("expert.apply: the body is no list, or too short")
    if any([type(value) is not kind for value, kind in zip(body, kinds, strict=False)]):
        raise ProtocolError("expert.apply: a field is malformed")
    kept = body[len(kinds)]
    if not (kept is None or (type(kept) is bytes and len(kept) == ID_BYTES)):
        raise ProtocolError("expert.apply: the name of a kept block is malformed")
    return body[:num_fields]


def _buffer(numbers: npt.NDArray[Any], dtype: np.dtype[Any]) -> memoryview:
    return np.ascontiguousarray(numbers, dtype=dtype).data.cast("B") if len(numbers) else memoryview(b"")


def _array(buffer: memoryview, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    if len(buffer) % dtype.itemsize:
        raise ProtocolError("expert.apply: a buffer of numbers is cut short")
    return np.frombuffer(buffer, dtype=dtype)


def _numbers(packed: bytes, count: int, dtype: np.dtype[Any]) -> Numbers:
    if len(packed) != count * dtype.itemsize:
        raise ProtocolError("expert.apply: a list of numbers has another length than its message says")
    numbers = np.frombuffer(packed, dtype=dtype).astype(np.int64)
    if dtype is _I8 and count and np.minimum.reduce(numbers) < 0:
        raise ProtocolError("expert.apply: a number is negative")
    return numbers


def _coordinates(packed: bytes, num_experts: int) -> PackedCoordinates:
    num_dims, excess = divmod(len(packed), num_experts * _U4.itemsize)
    if excess or not 0 < num_dims <= MAX_DIMS:
        raise ProtocolError(f"ApplyRequest: an expert has from 1 to {MAX_DIMS} coordinates")
    experts = np.frombuffer(packed, dtype=_U4).reshape(num_experts, num_dims)
    if not _ascend(experts.tolist()):
        raise ProtocolError("ApplyRequest: the experts are not in ascending order, or one is given twice")
    return experts


def _ascend(values: list[Any]) -> bool:
    """Return whether each of these is greater than the one before."""
    return not any(map(operator.ge, values, values[1:]))


def _num_rows(tensors: Sequence[Value]) -> int:
    """Return the number of rows that all tensors have. Raises: ProtocolError if they differ, or none is there."""
    found: set[int] = set()
    for meta in tensors:
        if meta is not None:
            shape = meta[1] if type(meta) is list and len(meta) == 3 else None
            if type(shape) is not list or not shape or type(shape[0]) is not int:
                raise ProtocolError("ApplyRequest: malformed tensor meta")
            found.add(shape[0])
    if len(found) != 1:
        raise ProtocolError("ApplyRequest: all tensors of a block have equally many rows")
    return found.pop()
