"""An expert's state as a file: the format of checkpoints, of sealed files, and of states that are sent to followers and
exports.

The format is safetensors (https://github.com/huggingface/safetensors): the header's length as 8 bytes, little-endian; a
JSON header that maps each tensor's name to its dtype, shape and place; the tensors' bytes. Any safetensors reader loads
the weights, whose names begin with ``module/``. Everything else is JSON in the header's ``__metadata__``, with a
SHA-256 over the whole: nothing is ever unpickled, and a damaged file is noticed.
"""

import hashlib
import json
import math
import mmap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Final

import torch

from tesseract_async.errors import CheckpointError, ProtocolError, describe
from tesseract_async.experts.pieces import leaves_of, root_from
from tesseract_async.runtime.backend import ExpertBackend
from tesseract_async.runtime.spread_tensor import SpreadTensor
from tesseract_async.runtime.states import JOURNAL_LENGTH, SAFETENSORS, StateDict
from tesseract_async.wire.compression import flat_of

FORMAT_VERSION: Final = 1
MAX_HEADER_VALUES: Final = 1 << 20
"""The most lists, maps and values in them in the header of a stranger's file: a full journal has a fifth of that. A
byte of JSON may cost 60 bytes of memory."""
MAX_VERSION: Final = 2**53
"""The greatest version in a stranger's state: no expert takes this many steps, and it would leave no room for more."""

JOURNAL_SHARE: Final = 0.045
"""The part of a sealed file that the journal takes at most, unless more backwards came within minutes."""
_BYTES_OF_ENTRY: Final = 24

_DTYPE_NAMES: Final = {dtype: name for name, dtype in SAFETENSORS.items()}
_MAX_HEADER_BYTES: Final = 16 << 20


class EncodedState:
    """A file's bytes, in pieces that are made when they are looked at, as often as that is: the parts of a spread
    expert's tensors are fetched from its processes then, and are never all here."""

    def __init__(self, head: bytes, tensors: Sequence[torch.Tensor | SpreadTensor]) -> None:
        self._head, self._tensors = head, [one for one in tensors if one.nbytes]
        self.size = len(head) + sum(one.nbytes for one in tensors)
        """Bytes."""
        spread = sum(one.nbytes for one in self._tensors if isinstance(one, SpreadTensor))
        self.num_held = self.size - spread
        """Bytes of it that are here."""
        self.is_spread = spread > 0

    @cached_property
    def leaves(self) -> Sequence[bytes]:
        """`pieces.leaves_of` it, which takes a while the first time."""
        return leaves_of(self)

    @cached_property
    def root(self) -> bytes:
        """`pieces.root_of` it. Each piece that is sent names it."""
        return root_from(self.leaves, self.size)

    def __iter__(self) -> Iterator[bytes | memoryview]:
        if self._head:
            yield self._head
        for tensor in self._tensors:
            if isinstance(tensor, SpreadTensor):
                yield from (_bytes_of(tensor.rows(start, stop)) for start, stop in tensor.blocks())
            else:
                yield _bytes_of(tensor)

    def read(self, offset: int, num_bytes: int) -> bytes | memoryview:
        """Return a part of it, shorter only at its end. Blocking where tensors are spread."""
        stop, at = min(offset + num_bytes, self.size), len(self._head)
        found: list[bytes | memoryview] = [self._head[offset:stop]]
        for tensor in self._tensors:
            start, end = max(offset, at) - at, min(stop, at + tensor.nbytes) - at
            if start >= end:
                pass
            elif isinstance(tensor, SpreadTensor):
                row = tensor.nbytes // tensor.num_rows
                first, last = start // row, -(-end // row)
                found.append(_bytes_of(tensor.rows(first, last))[start - first * row : end - first * row])
            else:
                found.append(_bytes_of(tensor)[start:end])
            at += tensor.nbytes
        pieces = [one for one in found if len(one)]
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def encode_state(state: Mapping[str, object]) -> EncodedState:
    """Return a file's bytes, which change if the state does. Raises: TypeError for what neither safetensors nor JSON
    can hold; what reading a spread tensor raises."""
    tensors: dict[str, torch.Tensor | SpreadTensor] = {}
    rest = _take_tensors(state, "", tensors)
    header: dict[str, object] = {}
    offset = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPE_NAMES:
            raise TypeError(f"{name}: safetensors cannot hold {tensor.dtype}")
        header[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    metadata = {"format": "pt", "tesseract_format": str(FORMAT_VERSION), "tesseract_state": json.dumps(rest)}
    header["__metadata__"] = metadata
    metadata["tesseract_sha256"] = _digest(header, EncodedState(b"", [*tensors.values()]))
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    return EncodedState(len(head).to_bytes(8, "little") + head, [*tensors.values()])


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    found: memoryview = flat_of(tensor).view(torch.uint8).numpy().data
    return found


def decode_state(data: bytes | bytearray | memoryview, *, max_values: float = math.inf) -> StateDict:
    """Return what `encode_state` was given. Takes untrusted bytes; `max_values` bounds the values that a stranger's
    header may hold.

    Tensors of a mapped file (`files.mapped`) stay there until they are looked at, or written.

    Raises: CheckpointError for anything damaged or foreign.
    """
    try:
        length = int.from_bytes(data[:8], "little")
        if length > min(_MAX_HEADER_BYTES, len(data) - 8):
            raise CheckpointError("the header is cut off")
        text = bytes(data[8 : 8 + length])
        if sum(map(text.count, (b"[", b"{", b","))) > max_values:
            raise CheckpointError("the header holds too many values")
        header = json.loads(text)
        metadata = header["__metadata__"]
        if metadata.get("tesseract_format") != str(FORMAT_VERSION):
            raise CheckpointError(f"format {metadata.get('tesseract_format')!r} is not {FORMAT_VERSION}")
        # writable: tensors may be trained in place
        is_mapped = isinstance(data, memoryview) and isinstance(data.obj, mmap.mmap)
        body = memoryview(data)[8 + length :] if is_mapped else memoryview(bytearray(data[8 + length :]))
        expected = metadata.pop("tesseract_sha256")
        if _digest(header, [body]) != expected:
            raise CheckpointError("the checksum is wrong")
        tensors = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            start, stop = entry["data_offsets"]
            dtype, shape = SAFETENSORS[entry["dtype"]], tuple(entry["shape"])
            if stop - start != math.prod(shape) * dtype.itemsize or not 0 <= start <= stop <= len(body):
                raise CheckpointError(f"{name} does not fit its place")
            flat = torch.frombuffer(body[start:stop], dtype=dtype) if stop > start else torch.empty(0, dtype=dtype)
            whole = flat.view(shape)
            tensors[name] = whole if is_mapped and start % dtype.itemsize == 0 else whole.clone()
        state = _put_tensors(json.loads(metadata["tesseract_state"]), tensors)
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError, RuntimeError) as error:
        raise CheckpointError(f"not a checkpoint: {describe(error)}") from error
    if not isinstance(state, dict):
        raise CheckpointError("not a checkpoint: no state inside")
    return state


def largest_state(backend: ExpertBackend) -> int:
    """Return the bytes of the longest file that a state of this expert could have: weights, what an optimizer keeps of
    each (four times their size at most), gathered gradients, the journal, names."""
    tensors = [*backend.module.parameters(), *backend.module.buffers()]
    num_bytes = sum(max(4, x.element_size()) * x.numel() for x in tensors)
    return 6 * num_bytes + 32 * JOURNAL_LENGTH + (4096 * len(tensors)) + (1 << 20)


def with_recent_journal(state: StateDict, *, since: int) -> StateDict:
    """Return the state with the newest entries of its journal: those after version `since`, and as many more as take
    `JOURNAL_SHARE` of the file. Only calls that are under way are sent again."""
    applied = state.get("applied")
    if not isinstance(applied, dict) or "versions" not in applied:
        return state  # a piece of shared parameters, which has none
    versions = applied["versions"]
    rest = _num_bytes({name: value for name, value in state.items() if name != "applied"})
    room = int(rest * JOURNAL_SHARE / (1 - JOURNAL_SHARE)) // _BYTES_OF_ENTRY
    gone = len(versions) - max(room, int((versions > since).sum()))
    if gone <= 0:
        return state
    ids = applied["ids"].view(len(versions), -1)[gone:].reshape(-1)
    num_bare = max(0, applied["num_bare"] - gone)
    return {**state, "applied": {"ids": ids, "versions": versions[gone:], "num_bare": num_bare}}


def _num_bytes(value: object) -> int:
    if isinstance(value, Mapping):
        return sum(map(_num_bytes, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(_num_bytes, value))
    return value.nbytes if isinstance(value, torch.Tensor | SpreadTensor) else 0


def difference(uid: str, backend: ExpertBackend, state: StateDict) -> str | None:
    """Describe the first thing in which a state's weights do not fit this expert; None if they fit."""
    mine, theirs = backend.module.state_dict(), state["module"]
    for name in sorted(mine.keys() | theirs.keys()):
        shapes = [list(some[name].shape) if name in some else None for some in (theirs, mine)]
        if shapes[0] != shapes[1]:
            said = ["none" if shape is None else f"shape {shape}" for shape in shapes]
            return f"{uid}: its weight {name[:80]} has {said[0]} there and {said[1]} here"
    return None


def check_state(uid: str, data: bytes | memoryview, *, weights_only: bool = False) -> StateDict:
    """Return the state in a stranger's file: checked for its form, not for how good its weights are. Raises:
    ProtocolError."""
    try:
        state = decode_state(data, max_values=MAX_HEADER_VALUES)
    except (CheckpointError, RecursionError, IndexError, OverflowError) as error:
        raise ProtocolError(f"{uid}: its state cannot be read: {describe(error)}") from None
    module, version = state.get("module"), state.get("version")
    if type(version) is not int or not 0 <= version < MAX_VERSION:
        raise ProtocolError(f"{uid}: a state without a version")
    if not isinstance(module, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in module.items()
    ):
        raise ProtocolError(f"{uid}: a state without weights")
    if weights_only:
        structure = state.get("structure")
        told = {"structure": structure} if isinstance(structure, dict) else {}
        return {"module": module, "version": version, **told}
    optimizer, applied = state.get("optimizer"), state.get("applied")
    if not (optimizer is None or isinstance(optimizer, dict)) or not isinstance(applied, dict):
        raise ProtocolError(f"{uid}: a state without an optimizer's part")
    return state


def _digest(header: Mapping[str, object], pieces: Iterable[bytes | memoryview]) -> str:
    """Return the SHA-256 of the header without the digest, in one canonical spelling, and of the tensors' bytes."""
    digest = hashlib.sha256(json.dumps(header, sort_keys=True, separators=(",", ":")).encode())
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


# JSON has no integer keys and no tensors: dicts become lists of pairs, tensors are named by where they stood.


def _take_tensors(value: object, path: str, tensors: dict[str, torch.Tensor | SpreadTensor]) -> object:
    if isinstance(value, torch.Tensor | SpreadTensor):
        while path in tensors:  # a key that holds a slash may spell another one's path
            path += "~"
        tensors[path] = value
        return {"t": path}
    if isinstance(value, Mapping):
        pairs = [
            [key, _take_tensors(item, f"{path}/{key}" if path else str(key), tensors)] for key, item in value.items()
        ]
        return {"d": pairs}
    if isinstance(value, list | tuple):
        return {"l": [_take_tensors(item, f"{path}/{index}", tensors) for index, item in enumerate(value)]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{path}: a {type(value).__name__} cannot be written to a checkpoint")


def _put_tensors(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "t":
        return tensors[content]
    if kind == "d":
        return {key: _put_tensors(item, tensors) for key, item in content}
    return [_put_tensors(item, tensors) for item in content]
