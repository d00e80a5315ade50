"""The ``expert.*`` calls as coroutines over tensors. Replies come from strangers: each is checked against the schema.

Nothing here knows of autograd. A reply that breaks the rules raises ProtocolError; a server that lies about its shapes
is treated like one that is down.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from tesseract_async.client.ports import Node
from tesseract_async.errors import InputsForgotten, ProtocolError, shortened, text_of
from tesseract_async.runtime.encoding import pack, unpack
from tesseract_async.wire import messages
from tesseract_async.wire.codecs import AUTO, CodecPolicy, Codecs, settle
from tesseract_async.wire.messages import BACKWARD, FORWARD, HIGHEST_PRIORITY, INFO, LOWEST_PRIORITY
from tesseract_async.wire.tensors import Schema, TensorSpec, decode_schema, flatten, may_unpack


@dataclass(frozen=True, slots=True)
class ExpertSchema:
    """What an expert takes and gives, decoded and checked."""

    args: tuple[Schema, ...]
    kwargs: dict[str, Schema]
    outputs: Schema
    max_batch_size: int
    codecs: CodecPolicy
    inputs: tuple[tuple[Schema, ...], dict[str, Schema]] = field(init=False)
    """Positional and keyword arguments as one structure."""
    output_specs: tuple[TensorSpec, ...] = field(init=False)
    """The outputs, one after the other."""
    row_bytes: int = field(init=False)
    """Bytes of one row's inputs and outputs together, uncompressed."""

    def __post_init__(self) -> None:
        # asked for in every call
        object.__setattr__(self, "inputs", (self.args, self.kwargs))
        object.__setattr__(self, "output_specs", tuple(flatten(self.outputs)))
        specs = (*flatten(self.inputs), *self.output_specs)
        object.__setattr__(self, "row_bytes", sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in specs))

    @classmethod
    def decode(cls, info: messages.ExpertInfo) -> ExpertSchema:
        """Reads an untrusted info. Raises: ProtocolError."""
        args, kwargs = decode_schema(info.args_schema), decode_schema(info.kwargs_schema)
        outputs = decode_schema(info.outputs_schema)
        if not isinstance(args, tuple) or not isinstance(kwargs, dict):
            raise ProtocolError("an expert's arguments are a tuple and a map of schemas")
        if not flatten((args, kwargs)) or not flatten(outputs):
            raise ProtocolError("an expert without tensors to take or to give")
        return cls(args, kwargs, outputs, info.max_batch_size, CodecPolicy.decode(info.codecs))


@dataclass(frozen=True, slots=True)
class CallOptions:
    """How calls to an expert are made; see `RemoteExpert.with_options`."""

    timeout: float = 30.0
    """Seconds for one call, forward or backward, all attempts together."""
    backward_timeout: float | None = None
    """For a backward, where that is another."""
    max_staleness: int | None = None
    """A forward's answer lacks at most so many of the steps that the primary has taken; 0: the primary answers. None:
    whoever answers first, from weights that followers pulled up to `sync_every` seconds ago."""
    audit_share: float = 0.0
    """Share of forwards that another replica answers, too, so that wrong answers are noticed (see `client.audits`)."""
    priority: int = 0
    """-1, 0 or 1; higher goes first at the server."""
    codec: str | Mapping[str, str] = AUTO
    """How floating-point tensors travel: a codec's name, or names by ``inputs``, ``outputs``, ``gradients``. What the
    expert does not accept gives way to what loses no more, see `wire.codecs`."""
    codecs: Codecs = field(init=False)
    """The same, checked."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "codecs", Codecs.of(self.codec))
        check_priority(self.priority)
        check_max_staleness(self.max_staleness)
        check_audit_share(self.audit_share)
        if not min(self.timeout, self.backward_timeout or self.timeout) > 0:
            raise ValueError(f"a timeout is a positive number of seconds, not {self.timeout}")


def check_priority(priority: int) -> None:
    """Raises: ValueError unless servers tell this priority from others."""
    if type(priority) is not int or not LOWEST_PRIORITY <= priority <= HIGHEST_PRIORITY:
        raise ValueError(f"a priority is {LOWEST_PRIORITY}, 0 or {HIGHEST_PRIORITY} (goes first), not {priority!r}")


def check_audit_share(share: float) -> None:
    """Raises: ValueError unless it is a share."""
    if not 0 <= share <= 1:
        raise ValueError(f"audit_share lies between 0 and 1, not at {share!r}")


class Forward(NamedTuple):  # one is made for every call: a frozen dataclass takes 2 us
    """One forward to one expert, as backward has to repeat it."""

    uid: str
    schema: ExpertSchema
    training: bool
    seed: int
    options: CallOptions
    differentiable: bool = False
    """Whether a backward may follow."""


class Answer(NamedTuple):
    """What a forward brought back, besides the outputs: its backward needs it."""

    peer: Any
    version: int
    """Optimizer steps that the expert had taken."""
    inputs_cached: bytes | None
    """Names the inputs if that peer keeps them, so that they need not travel again."""


def check_max_staleness(max_staleness: int | None) -> None:
    """Raises: ValueError unless it is None or a number of steps."""
    if max_staleness is not None and (type(max_staleness) is not int or max_staleness < 0):
        raise ValueError(f"max_staleness is a number of optimizer steps, 0 or more, or None; not {max_staleness!r}")


async def fetch_schema(node: Node, uid: str, peer: Any, *, timeout: float) -> ExpertSchema:
    """Asks the expert's server what it takes and gives. Raises: what the call raises; ProtocolError for nonsense."""
    return ExpertSchema.decode(await _fetch_info(node, uid, peer, timeout=timeout))


async def fetch_version(node: Node, uid: str, peer: Any, *, timeout: float) -> int:
    """Asks how many steps the expert has taken there. Raises: as `fetch_schema`."""
    return (await _fetch_info(node, uid, peer, timeout=timeout)).version


async def _fetch_info(node: Node, uid: str, peer: Any, *, timeout: float) -> messages.ExpertInfo:
    body = messages.encode(messages.InfoRequest(uid))
    reply = await node.call_expert(peer, INFO, body, timeout=timeout, idempotent=True)
    info = messages.decode(messages.ExpertInfo, reply.body)
    if info.uid != uid:
        raise ProtocolError(f"asked about {uid}, the peer answered about {info.uid[:80]!r}")
    return info


async def call_forward(
    node: Node, forward: Forward, peer: Any, inputs: Sequence[torch.Tensor], *, timeout: float | None = None
) -> tuple[list[torch.Tensor], Answer]:
    """The expert's outputs (on the CPU), and what its backward needs to know.

    `inputs` fit the schema; they must not change before the call ends. Raises: what the call raises; ProtocolError if
    the answer does not fit the schema; SchemaMismatch, before anything is sent, if the codecs can't be settled.
    """
    options = forward.options
    codecs = settle(forward.schema.codecs, options.codecs)
    metas, buffers = await pack(inputs, codecs.inputs)
    request = messages.ForwardRequest(
        forward.uid, metas, forward.training, forward.seed, codecs.outputs, forward.differentiable
    )
    reply = await node.call_expert(
        peer,
        FORWARD,
        messages.encode(request),
        buffers,
        timeout=options.timeout if timeout is None else timeout,
        idempotent=True,
        priority=options.priority,
    )
    decoded = messages.decode(messages.ForwardReply, reply.body)
    specs = forward.schema.output_specs
    _check_growth(forward.uid, decoded.tensors, specs)
    outputs = await unpack(decoded.tensors, reply.buffers)
    if len(outputs) != len(specs):
        raise ProtocolError(f"{forward.uid} answered {len(outputs)} tensors instead of {len(specs)}")
    num_rows = inputs[0].shape[0]
    checked = [_fit(forward.uid, out, spec, num_rows) for out, spec in zip(outputs, specs, strict=True)]
    return checked, Answer(peer, decoded.version, decoded.inputs_cached)


def _check_growth(uid: str, metas: list[Any], specs: Sequence[TensorSpec]) -> None:
    """Refuses an answer that would take more memory, unpacked, than what fits. Raises: ProtocolError."""
    if not may_unpack(metas, specs):
        got = shortened(text_of(lambda: str(metas)))  # they may be nested too deeply for `str`
        takes = shortened(", ".join(map(str, specs)))
        raise ProtocolError(f"{uid} answered {got} where its schema says {takes}")


def _fit(uid: str, output: torch.Tensor | None, spec: TensorSpec, num_rows: int) -> torch.Tensor:
    if output is None or output.dtype != spec.dtype or output.shape != (num_rows, *spec.shape):
        got = "nothing" if output is None else f"{output.dtype} of shape {tuple(output.shape)}"
        raise ProtocolError(f"{uid} answered {got} where its schema says {spec} with {num_rows} rows")
    return output


async def call_backward(
    node: Node,
    forward: Forward,
    peer: Any,
    inputs: Sequence[torch.Tensor],
    output_grads: Sequence[torch.Tensor | None],
    *,
    answer: Answer,
    call_id: bytes,
    timeout: float | None = None,
) -> list[torch.Tensor | None]:
    """The inputs' gradients (None where there is none), on the CPU. The expert takes an optimizer step.

    Under one `call_id` it takes that step once, whichever replicas are asked however often. Raises: what the call
    raises; ProtocolError if the answer does not fit the inputs.
    """
    if answer.inputs_cached is not None and peer == answer.peer:
        try:
            return await _send_backward(
                node, forward, peer, inputs, output_grads, answer, call_id, timeout, answer.inputs_cached
            )
        except InputsForgotten:
            pass  # then they travel once more
    return await _send_backward(node, forward, peer, inputs, output_grads, answer, call_id, timeout, None)


async def _send_backward(
    node: Node,
    forward: Forward,
    peer: Any,
    inputs: Sequence[torch.Tensor],
    output_grads: Sequence[torch.Tensor | None],
    answer: Answer,
    call_id: bytes,
    timeout: float | None,
    cached: bytes | None,
) -> list[torch.Tensor | None]:
    options = forward.options
    sent = [] if cached is not None else inputs
    codecs = settle(forward.schema.codecs, options.codecs)
    names: str | list[str] = codecs.gradients
    if sent and codecs.inputs != codecs.gradients:
        names = [codecs.inputs] * len(sent) + [codecs.gradients] * len(output_grads)
    metas, buffers = await pack([*sent, *output_grads], names)
    request = messages.BackwardRequest(
        uid=forward.uid,
        call_id=call_id,
        tensors=metas,
        num_inputs=len(sent),
        training=forward.training,
        seed=forward.seed,
        version=answer.version,
        reply_codec=codecs.gradients,
        inputs_cached=cached,
    )
    reply = await node.call_expert(
        peer,
        BACKWARD,
        messages.encode(request),
        buffers,
        timeout=options.timeout if timeout is None else timeout,
        idempotent=True,  # under one call id it is applied once
        priority=options.priority,
    )
    decoded = messages.decode(messages.BackwardReply, reply.body)
    _check_growth(forward.uid, decoded.tensors, [TensorSpec.of(x) for x in inputs])
    grads = await unpack(decoded.tensors, reply.buffers)
    if len(grads) != len(inputs):
        raise ProtocolError(f"{forward.uid} answered {len(grads)} gradients for {len(inputs)} inputs")
    for grad, tensor in zip(grads, inputs, strict=True):
        if grad is not None and (grad.shape != tensor.shape or grad.dtype != tensor.dtype):
            raise ProtocolError(
                f"{forward.uid} answered a gradient of {grad.dtype} and shape {tuple(grad.shape)} "
                f"for an input of {tensor.dtype} and shape {tuple(tensor.shape)}"
            )
    return grads
