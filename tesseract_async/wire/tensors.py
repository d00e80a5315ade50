"""Tensors as raw buffers of a message, and the schemas that say which tensors an expert takes.

A packed tensor is one *meta*, ``[dtype, shape, codec]``, in the message's msgpack body, and one raw buffer.
`None` stands for an absent tensor (an output that got no gradient, say): its meta is nil and it has no buffer.

Everything that decodes takes untrusted input and raises only `ProtocolError`; sizes are checked before memory is taken.
"""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any

import numpy as np
import torch

from tesseract_async.errors import ProtocolError, SchemaMismatch, shortened
from tesseract_async.wire import compression
from tesseract_async.wire.packed import Value

DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name)
    for name in (
        *("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"),
        *("complex64", "complex128"),
    )
}
DTYPE_NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}

MAX_DIMS = 16
MAX_TENSORS = 256
MAX_SCHEMA_DEPTH = 8
MAX_SIZE = 1 << 20

Meta = list[Value] | None
"""``[dtype name, shape, codec name]`` as msgpack holds it, or None for an absent tensor."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a schema: its shape *without* the leading row dimension, and its dtype.

    A size of None varies from call to call, such as the length of a sequence. In one call it is the same wherever the
    schema says None, and only calls of one size share a batch.
    """

    shape: tuple[int | None, ...]
    dtype: torch.dtype = torch.float32
    optional: bool = False
    """True for an argument that may be None."""
    max_size: int = 4096
    """The largest value of a size that varies."""
    varies: bool = field(init=False, repr=False, compare=False)
    """True if the shape has a size that varies."""
    least_shape: tuple[int, ...] = field(init=False, repr=False, compare=False)
    """The shape, with sizes of 1 where they vary."""
    sizes: list[int | None] = field(init=False, repr=False, compare=False)
    """The shape as metas have it."""
    row_bytes: int = field(init=False, repr=False, compare=False)
    """Bytes of one row, uncompressed; with sizes of 1 where they vary."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        object.__setattr__(self, "varies", None in self.shape)
        if type(self.optional) is not bool or type(self.max_size) is not int or not 2 <= self.max_size <= MAX_SIZE:
            raise ValueError(f"max_size is a whole number from 2 to {MAX_SIZE}, and optional True or False")
        if self.dtype not in DTYPE_NAMES:
            raise ValueError(f"tensors of {self.dtype} cannot travel; one of {', '.join(DTYPES)} can")
        if len(self.shape) >= MAX_DIMS - 1 or any(
            size is not None and (not isinstance(size, int) or size < 0) for size in self.shape
        ):
            raise ValueError(
                f"besides the rows, a shape has up to {MAX_DIMS - 2} sizes, each 0 or more, or None: {self.shape}"
            )
        object.__setattr__(self, "sizes", [*self.shape])
        object.__setattr__(self, "least_shape", tuple(1 if size is None else size for size in self.shape))
        object.__setattr__(self, "row_bytes", math.prod(self.least_shape) * self.dtype.itemsize)

    def sized(self, size: int | None) -> "TensorSpec":
        """Return the spec of calls in which what varies has this size; the same one if nothing does."""
        return self if size is None or not self.varies else _sized(self, size)

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "TensorSpec":
        """The spec that `tensor` (rows first) fits. Raises: ValueError for a 0-d tensor, which has no rows."""
        if tensor.dim() == 0:
            raise ValueError("an expert's tensors have rows as their first dimension; got a 0-d tensor")
        return cls(tuple(tensor.shape[1:]), tensor.dtype)

    def __str__(self) -> str:
        sizes = ["any" if size is None else str(size) for size in self.shape]
        return f"{DTYPE_NAMES[self.dtype]}[{', '.join(('rows', *sizes))}]{' or None' if self.optional else ''}"


@functools.lru_cache(maxsize=1024)
def _sized(spec: TensorSpec, size: int) -> TensorSpec:
    shape = tuple(size if one is None else one for one in spec.shape)
    return TensorSpec(shape, spec.dtype, spec.optional)


def size_of(specs: Iterable[TensorSpec], shapes: Iterable[Sequence[object] | None]) -> int | None:
    """Return the size of what varies in a call with tensors of these shapes (untrusted; None: no tensor); None if no
    size varies, or if the size is not an allowed one."""
    for spec, shape in zip(specs, shapes, strict=False):
        if spec.varies and shape is not None:
            at = 1 + spec.shape.index(None)
            size = shape[at] if at < len(shape) else None
            return size if type(size) is int and 1 <= size <= spec.max_size else None
    return None


def meta_size(specs: Sequence[TensorSpec], metas: Value) -> int | None:
    """Return `size_of` what these untrusted metas say."""
    known = [meta if type(meta) is list and len(meta) == 3 else None for meta in (metas if type(metas) is list else ())]
    return size_of(specs, [None if meta is None or type(meta[1]) is not list else meta[1] for meta in known])


Structure = Any
"""Nested tuples, lists and dicts (string keys) of leaves: of tensors in what a module takes and gives."""
Schema = Structure
"""A structure of `TensorSpec`s."""


_SEQUENCES = (tuple, list)  # isinstance() makes a union anew each time it is given `tuple | list`: three times slower
_LEAVES = (torch.Tensor, TensorSpec)


def flatten(structure: Structure) -> list[Structure]:
    """The leaves of nested tuples, lists and dicts, in order (dicts by insertion)."""
    leaves: list[Structure] = []
    _flatten_into(leaves, structure)
    return leaves


# These walk by functions of the module: a nested function that calls itself is a reference cycle, and would keep the
# tensors of every call alive until the collector comes by.


def _flatten_into(leaves: list[Structure], structure: Structure) -> None:
    if isinstance(structure, _SEQUENCES):
        for item in structure:
            _flatten_into(leaves, item)
    elif not isinstance(structure, _LEAVES) and isinstance(structure, Mapping):
        for item in structure.values():
            _flatten_into(leaves, item)
    else:
        leaves.append(structure)


def sequence_like(part: Sequence[Structure], items: Iterable[Structure]) -> Structure:
    """A list, tuple or named tuple of `items`, as `part` is one; of other kinds of tuples and lists, a plain one."""
    if type(part) is tuple or type(part) is list:
        return type(part)(items)
    if isinstance(part, tuple):
        return type(part)._make(items) if hasattr(part, "_make") else tuple(items)
    return list(items)


def unflatten(schema: Schema, leaves: Iterable[Structure]) -> Structure:
    """The structure of `schema` with its specs replaced, in order, by `leaves`; the inverse of `flatten`."""
    if type(schema) is TensorSpec:
        return next(iter(leaves))
    return _unflatten_from(iter(leaves), schema)


def _unflatten_from(leaves: Iterator[Structure], part: Schema) -> Structure:
    if isinstance(part, _SEQUENCES):
        return sequence_like(part, [_unflatten_from(leaves, item) for item in part])
    if not isinstance(part, _LEAVES) and isinstance(part, Mapping):
        return {key: _unflatten_from(leaves, item) for key, item in part.items()}
    return next(leaves)


def flatten_like(schema: Schema, structure: Structure, *, what: str) -> list[Any]:
    """The tensors of `structure`, in the order of `schema`, each checked against its spec. Where that is optional, None
    stands for a tensor.

    Dict keys may come in any order. All tensors must have the same number of rows (dimension 0).

    Raises: SchemaMismatch (both schemas in the sentence) for another structure, shape or dtype; TypeError if a leaf is
    not a tensor.
    """
    leaves: list[Structure] = []
    sizes: list[int] = []
    if not _flatten_fitting(leaves, schema, structure, sizes) or (sizes and min(sizes) < max(sizes)):
        for leaf in leaves:
            if not isinstance(leaf, torch.Tensor | None):
                got = f"a {type(leaf).__name__} where a tensor belongs"
                raise TypeError(f"{what} takes {shortened(describe_schema(schema))}; got {got}")
        raise SchemaMismatch(
            f"{what} takes {shortened(describe_schema(schema))}; got {shortened(describe_structure(structure))}"
        )
    if len(leaves) > 1 and len({tensor.shape[0] for tensor in leaves if tensor is not None}) > 1:
        raise SchemaMismatch(
            f"{what} takes equally many rows of every tensor; got {shortened(describe_structure(structure))}"
        )
    return leaves


def _flatten_fitting(leaves: list[Structure], part: Schema, value: Structure, sizes: list[int]) -> bool:
    """Append the leaves until one does not fit; then False, and the last leaf may be no tensor. `sizes`: of what
    varies."""
    if type(part) is TensorSpec:
        if value is None and part.optional:
            leaves.append(None)
            return True
        if isinstance(value, torch.Tensor):
            leaves.append(value)
            if part.varies:
                size = size_of((part,), (value.shape,))
                part = part.sized(size)
                sizes += [] if size is None else [size]
            return value.dtype == part.dtype and value.dim() > 0 and value.shape[1:] == part.shape
        if not isinstance(value, _SEQUENCES) and not isinstance(value, Mapping):
            leaves.append(value)
        return False
    if isinstance(part, _SEQUENCES):
        if not isinstance(value, _SEQUENCES) or len(part) != len(value):
            return False
        for one, item in zip(part, value, strict=True):
            if type(one) is type(item) is dict and not one and not item:
                continue  # no keyword arguments: nearly every call
            if not _flatten_fitting(leaves, one, item, sizes):
                return False
        return True
    if not isinstance(value, Mapping) or part.keys() != value.keys():
        return False
    return all([_flatten_fitting(leaves, part[key], value[key], sizes) for key in part])


def describe_schema(schema: Schema) -> str:
    """Return a schema as people write it: ``(float32[rows, 1024], {mask: bool[rows, 16]})``."""
    return _describe(schema, str)


def describe_structure(structure: Structure) -> str:
    """Return a structure of tensors as people write it: ``(float32[4, 1024])``. Anything else is named by its type."""

    def leaf(value: object) -> str:
        if not isinstance(value, torch.Tensor):
            return "None" if value is None else type(value).__name__
        return f"{str(value.dtype).removeprefix('torch.')}[{', '.join(map(str, value.shape))}]"

    return _describe(structure, leaf)


def _describe(part: Structure, leaf: Callable[[Structure], str]) -> str:
    if isinstance(part, tuple | list):
        return f"({', '.join(_describe(item, leaf) for item in part)})"
    if isinstance(part, Mapping):
        return f"{{{', '.join(f'{key}: {_describe(item, leaf)}' for key, item in part.items())}}}"
    return leaf(part)


def encode_schema(schema: Schema) -> Value:
    """A schema as msgpack can hold it; tuples and lists both become tagged lists."""
    if isinstance(schema, tuple | list):
        return ["t" if isinstance(schema, tuple) else "l", *map(encode_schema, schema)]
    if isinstance(schema, Mapping):
        for key in schema:
            if not isinstance(key, str) or not key.isprintable():
                raise TypeError(f"the keys of a schema's dicts are printable strings, not such as {key!r}")
        return {key: encode_schema(item) for key, item in schema.items()}
    if isinstance(schema, TensorSpec) and (schema.varies or schema.optional):
        return ["v", DTYPE_NAMES[schema.dtype], list(schema.shape), schema.optional, schema.max_size]
    if isinstance(schema, TensorSpec):
        return ["s", DTYPE_NAMES[schema.dtype], list(schema.shape)]
    raise TypeError(f"a schema consists of TensorSpecs in tuples, lists and dicts; got a {type(schema).__name__}")


def check_schema(schema: Schema, *, what: str) -> None:
    """Raises: ValueError, naming `what`, if callers could not be told this schema."""
    try:
        decode_schema(encode_schema(schema))
    except (TypeError, ProtocolError) as error:
        raise ValueError(f"{what}: {error}") from None


def decode_schema(data: Value) -> Schema:
    """Read what `encode_schema` made. Untrusted. Raises: ProtocolError."""
    count = 0

    def build(part: Value, depth: int) -> Schema:
        nonlocal count
        if depth > MAX_SCHEMA_DEPTH:
            raise ProtocolError(f"a schema is nested too deeply, more than {MAX_SCHEMA_DEPTH} levels")
        if isinstance(part, dict):
            if not all(isinstance(key, str) and key.isprintable() for key in part):
                raise ProtocolError("a schema's keys are printable strings")
            return {key: build(item, depth + 1) for key, item in part.items()}
        if isinstance(part, list) and part and part[0] in ("t", "l"):
            items = [build(item, depth + 1) for item in part[1:]]
            return tuple(items) if part[0] == "t" else items
        if isinstance(part, list) and len(part) in (3, 5) and part[0] == ("s" if len(part) == 3 else "v"):
            count += 1
            if count > MAX_TENSORS:
                raise ProtocolError(f"a schema has more than {MAX_TENSORS} tensors")
            try:
                if len(part) == 3:
                    return TensorSpec(_shape(part[2]), _dtype(part[1]))
                given = part[2] if type(part[2]) is list else [-1]
                known = iter(_shape([size for size in given if size is not None]))
                shape = tuple(None if size is None else next(known) for size in given)
                return TensorSpec(shape, _dtype(part[1]), part[3], part[4])
            except ValueError as error:
                raise ProtocolError(str(error)) from None
        raise ProtocolError("malformed schema")

    return build(data, 0)


def pack_tensors(
    tensors: Sequence[torch.Tensor | None], codecs: str | Sequence[str] = "none"
) -> tuple[list[Meta], list[memoryview]]:
    """Metas for the message's body and one raw buffer for each tensor that is not None.

    `codecs` is one codec's name or one per tensor (see `compression`); integer and bool tensors pass untouched
    whatever it says. With codec ``none`` the buffers *share memory* with contiguous CPU tensors: don't change them
    before the message is sent. Tensors on other devices are copied to the CPU.
    """
    names = repeat(codecs, len(tensors)) if type(codecs) is str else codecs
    metas: list[Meta] = []
    buffers: list[memoryview] = []
    for tensor, name in zip(tensors, names, strict=True):
        if tensor is None:
            metas.append(None)
            continue
        dtype = tensor.dtype
        codec = name if dtype.is_floating_point else "none"
        metas.append([DTYPE_NAMES[dtype], list(tensor.shape), codec])
        buffers.append(compression.encode(tensor, codec))
    return metas, buffers


def plain_metas(tensors: Sequence[torch.Tensor]) -> list[Meta]:
    """The metas that `pack_tensors` gives in codec ``none``."""
    return [[DTYPE_NAMES[tensor.dtype], list(tensor.shape), "none"] for tensor in tensors]


def may_unpack(metas: Value, specs: Sequence[TensorSpec | None]) -> bool:
    """Return whether unpacking these untrusted metas takes no more memory than tensors of `specs` (None: no tensor)
    would.

    A byte of a lossy codec becomes up to 12 while it is decoded, in a dtype that its sender names. So a tensor in such
    a codec may be unpacked only where its dtype and shape (but for the rows) are those of its spec.
    """
    for index, meta in enumerate(metas if type(metas) is list else ()):
        if type(meta) is list and len(meta) == 3 and meta[2] != "none":
            spec = specs[index] if index < len(specs) else None
            name, sizes, _ = meta
            if spec is None or name != DTYPE_NAMES[spec.dtype] or type(sizes) is not list or sizes[1:] != [*spec.shape]:
                return False
    return True


def unpack_plain(
    metas: Value, buffers: Sequence[memoryview], specs: Sequence[TensorSpec], *, num_rows: int = 0
) -> list[torch.Tensor] | None:
    """The tensors, if these untrusted metas are what `specs` say, in codec ``none``, with equally many rows (`num_rows`
    where given). As with `unpack_tensors`, they use `buffers`.

    None for all else: nearly all calls are plain, and one look at each tensor is enough for them.
    """
    if type(metas) is not list or not len(metas) == len(buffers) == len(specs):
        return None
    tensors: list[torch.Tensor] = []
    for meta, buffer, spec in zip(metas, buffers, specs, strict=True):
        if type(meta) is not list or len(meta) != 3:
            return None
        name, sizes, codec = meta
        if codec != "none" or name != DTYPE_NAMES[spec.dtype] or type(sizes) is not list or sizes[1:] != spec.sizes:
            return None
        if not sizes:
            return None  # no rows at all
        num_rows = num_rows or sizes[0]
        known = compression.CASTABLE.get(spec.dtype)
        if known is None or type(num_rows) is not int or num_rows != sizes[0] or not spec.row_bytes:
            return None
        if len(buffer) != num_rows * spec.row_bytes or not buffer or buffer.readonly:
            return None
        # a view of a tensor would let go of the interpreter's lock: with a busy device thread, that is slow
        tensors.append(torch.from_numpy(np.ndarray((num_rows, *spec.least_shape), known, buffer)))
    return tensors


def unpack_tensors(metas: Value, buffers: Sequence[memoryview]) -> list[torch.Tensor | None]:
    """The tensors that `pack_tensors` packed. Codec ``none`` gives tensors that *own* no copy: they use `buffers`.

    Untrusted: metas and buffers must agree in number and size. Raises: ProtocolError.
    """
    if not isinstance(metas, list) or len(metas) > MAX_TENSORS:
        raise ProtocolError(f"tensor metas are a list of at most {MAX_TENSORS}")
    if len(buffers) != len(metas) - metas.count(None):
        raise ProtocolError(f"{len(buffers)} buffers for {len(metas)} tensor metas")
    remaining = iter(buffers)
    out: list[torch.Tensor | None] = []
    for meta in metas:
        if meta is None:
            out.append(None)
            continue
        if type(meta) is not list or len(meta) != 3 or type(meta[2]) is not str:
            raise ProtocolError("malformed tensor meta")
        name, sizes, codec = meta
        out.append(compression.decode(next(remaining), _dtype(name), _shape(sizes), codec))
    return out


def _dtype(name: object) -> torch.dtype:
    dtype = DTYPES.get(name) if isinstance(name, str) else None
    if dtype is None:
        raise ProtocolError("unknown dtype")
    return dtype


def _shape(sizes: Value) -> tuple[int, ...]:
    if type(sizes) is list and len(sizes) < MAX_DIMS:
        if all([type(size) is int and 0 <= size < 2**40 for size in sizes]):
            return tuple(sizes)
    raise ProtocolError("malformed shape")
