"""The ``expert.*`` calls as coroutines over tensors. Replies are untrusted: each is checked against the schema.

A reply that breaks the rules raises ProtocolError, so that a server that lies about its shapes is treated like one that
is down.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import torch

from tesseract_async.client.ports import Node
from tesseract_async.client.settings import CallOptions
from tesseract_async.errors import ProtocolError, shortened, text_of
from tesseract_async.runtime.encoding import pack, unpack
from tesseract_async.transport.base import PeerAddress
from tesseract_async.wire import messages
from tesseract_async.wire.codecs import CodecPolicy, Codecs, settle
from tesseract_async.wire.messages import FORWARD, INFO
from tesseract_async.wire.packed import Value
from tesseract_async.wire.tensors import (
    Schema,
    TensorSpec,
    decode_schema,
    flatten,
    may_unpack,
    size_of,
    unflatten,
    unpack_plain,
)

MAX_SIZES: Final = 64
"""Sizes for which a schema whose sizes vary is kept."""


@dataclass(frozen=True, slots=True)
class ExpertSchema:
    args: tuple[Schema, ...]
    kwargs: dict[str, Schema]
    outputs: Schema
    max_batch_size: int
    codecs: CodecPolicy
    inputs: tuple[tuple[Schema, ...], dict[str, Schema]] = field(init=False)
    """Positional and keyword arguments as one structure."""
    input_specs: tuple[TensorSpec, ...] = field(init=False)
    """The inputs, one after the other."""
    output_specs: tuple[TensorSpec, ...] = field(init=False)
    """The outputs, one after the other."""
    row_bytes: int = field(init=False)
    """Bytes of one row's inputs and outputs together, uncompressed."""
    varies: bool = field(init=False)
    """True if a size varies from call to call."""
    _settled: dict[Codecs, Codecs] = field(init=False, default_factory=dict, compare=False)
    _sized: dict[int, "ExpertSchema"] = field(init=False, default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        # asked for in every call
        object.__setattr__(self, "inputs", (self.args, self.kwargs))
        object.__setattr__(self, "input_specs", tuple(flatten(self.inputs)))
        object.__setattr__(self, "output_specs", tuple(flatten(self.outputs)))
        specs = (*self.input_specs, *self.output_specs)
        object.__setattr__(self, "row_bytes", sum(spec.row_bytes for spec in specs))
        object.__setattr__(self, "varies", any(spec.varies for spec in self.input_specs))

    def settle(self, preference: Codecs) -> Codecs:
        """The codecs that calls with this preference use. Raises: SchemaMismatch if there is none."""
        settled = self._settled.get(preference)
        if settled is None:
            settled = self._settled[preference] = settle(self.codecs, preference)
        return settled

    def sized(self, inputs: Sequence[torch.Tensor | None]) -> "ExpertSchema":
        """The schema of a call with these inputs, which fit it: with what varies as it is there."""
        if not self.varies:
            return self
        size = size_of(self.input_specs, [None if x is None else x.shape for x in inputs])
        if size is None:
            return self
        if size not in self._sized:
            if len(self._sized) >= MAX_SIZES:
                self._sized.clear()
            args, kwargs = (unflatten(one, [spec.sized(size) for spec in flatten(one)]) for one in self.inputs)
            outputs = unflatten(self.outputs, [spec.sized(size) for spec in self.output_specs])
            self._sized[size] = ExpertSchema(args, kwargs, outputs, self.max_batch_size, self.codecs)
        return self._sized[size]

    @classmethod
    def decode(cls, info: messages.ExpertInfo) -> "ExpertSchema":
        """Read an untrusted info. Raises: ProtocolError."""
        args, kwargs = decode_schema(info.args_schema), decode_schema(info.kwargs_schema)
        outputs = decode_schema(info.outputs_schema)
        if not isinstance(args, tuple) or not isinstance(kwargs, dict):
            raise ProtocolError("an expert's arguments are a tuple and a map of schemas")
        specs, answered = flatten((args, kwargs)), flatten(outputs)
        if not specs or not answered:
            raise ProtocolError("an expert that takes no tensors, or returns none")
        first = next((spec for spec in specs if spec.varies), specs[0])
        if specs[0].optional or first.optional or any(spec.optional for spec in answered):
            raise ProtocolError("an optional tensor where one is required")
        if first is specs[0] and not first.varies and any(spec.varies for spec in answered):
            raise ProtocolError("an output whose size varies, of inputs whose sizes do not")
        return cls(args, kwargs, outputs, info.max_batch_size, CodecPolicy.decode(info.codecs))


class CallMode(NamedTuple):
    """The part of a call that is settled the moment a module is called."""

    training: bool
    seed: int
    """Seeds the expert's random numbers."""
    differentiable: bool
    """A backward may follow."""


class Forward(NamedTuple):  # one is made for every call: a frozen dataclass takes 2 us
    """One forward to one expert, as backward has to repeat it."""

    uid: str
    schema: ExpertSchema
    mode: CallMode
    options: CallOptions


class Receipt(NamedTuple):
    """The part of a forward's answer, besides the outputs, that its backward needs."""

    peer: PeerAddress
    version: int
    """Optimizer steps that the expert had taken."""
    inputs_cached: bytes | None
    """Names the inputs if that peer keeps them, so that they need not travel again."""
    epoch: int = 0
    """The epoch of the expert's lineage there; 0 outside of runs."""


async def fetch_info(node: Node, uid: str, peer: PeerAddress, *, timeout: float) -> messages.ExpertInfo:
    """Ask the expert's server about it. Raises: what the call raises; ProtocolError for nonsense."""
    body = messages.encode(messages.InfoRequest(uid))
    reply = await node.call_expert(peer, INFO, body, timeout=timeout, idempotent=True)
    info = messages.decode(messages.ExpertInfo, reply.body)
    if info.uid != uid:
        raise ProtocolError(f"asked about {uid}, the peer answered about {info.uid[:80]!r}")
    return info


async def call_forward(
    node: Node, forward: Forward, peer: PeerAddress, inputs: Sequence[torch.Tensor | None], *, timeout: float
) -> tuple[list[torch.Tensor], Receipt]:
    """The expert's outputs (on the CPU), and what its backward needs to know.

    `inputs` fit the schema; they must not change before the call ends. Raises: what the call raises; ProtocolError if
    the answer does not fit the schema; SchemaMismatch, before anything is sent, if the codecs can't be settled.
    """
    options, mode = forward.options, forward.mode
    codecs = forward.schema.settle(options.codecs)
    metas, buffers = await pack(inputs, codecs.inputs)
    request = messages.ForwardRequest(forward.uid, metas, mode.training, mode.seed, codecs.outputs, mode.differentiable)
    reply = await node.call_expert(
        peer,
        FORWARD,
        messages.encode(request),
        buffers,
        timeout=timeout,
        idempotent=True,
        priority=options.priority,
    )
    decoded = messages.decode(messages.ForwardReply, reply.body)
    specs = forward.schema.output_specs
    assert inputs[0] is not None
    num_rows = inputs[0].shape[0]
    receipt = Receipt(peer, decoded.version, decoded.inputs_cached, decoded.epoch)
    if (plain := unpack_plain(decoded.tensors, reply.buffers, specs, num_rows=num_rows)) is not None:
        return plain, receipt
    outputs = await unpack_fitting(forward.uid, decoded.tensors, reply.buffers, specs, num_rows)
    if any(output is None for output in outputs):
        raise ProtocolError(f"{forward.uid} answered nothing where its schema says a tensor")
    return [output for output in outputs if output is not None], receipt


async def unpack_fitting(
    who: str, metas: Value, buffers: Sequence[memoryview], specs: Sequence[TensorSpec | None], num_rows: int
) -> list[torch.Tensor | None]:
    """Return the tensors of an answer: each fits its spec, or is absent if it has none. An answer that would take more
    memory than a fitting one is refused before it is unpacked. Raises: ProtocolError."""
    if not may_unpack(metas, specs):
        got = shortened(text_of(lambda: str(metas)))  # they may be nested too deeply for `str`
        takes = shortened(", ".join(map(str, specs)))
        raise ProtocolError(f"{who} answered {got} where its schema says {takes}")
    tensors = await unpack(metas, buffers)
    if len(tensors) != len(specs):
        raise ProtocolError(f"{who} answered {len(tensors)} tensors instead of {len(specs)}")
    for tensor, spec in zip(tensors, specs, strict=True):
        if tensor is None:
            continue
        if spec is None or tensor.dtype != spec.dtype or tensor.shape != (num_rows, *spec.shape):
            got = f"{tensor.dtype} of shape {tuple(tensor.shape)}"
            raise ProtocolError(f"{who} answered {got} where its schema says {spec} with {num_rows} rows")
    return tensors
