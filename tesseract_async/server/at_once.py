"""Answers a small ``expert.apply`` without looking at its experts one by one: a forward by experts of one kind, all of
them here, which are computed in one pass. Everything that arrives here is untrusted.

Where that cannot be, or fails, `applying` answers.
"""

import operator
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Final

import numpy as np
import torch

from tesseract_async.endpoint.endpoint import IncomingCall, Message
from tesseract_async.endpoint.handlers import Deferred
from tesseract_async.errors import Overloaded
from tesseract_async.runtime.gradients import are_finite
from tesseract_async.server.answering import ExpertCalls, priority_of
from tesseract_async.server.hosted import HostedState
from tesseract_async.wire.apply import ApplyPart, ApplyRequest, encode_part
from tesseract_async.wire.names import new_name
from tesseract_async.wire.tensors import pack_tensors, unpack_plain

MAX_PAIRS: Final = 4096
"""Pairs of an expert and a row."""
MAX_EXPERTS: Final = 64
MAX_BYTES: Final = 4 << 20
"""Memory of the block, and of inputs and outputs of each pair: the loop looks through the sums."""
_NO_WEIGHTS: Final = np.empty(0, dtype=np.float32)


def is_small(request: ApplyRequest) -> bool:
    """Return whether this call may be answered in this way."""
    return (
        not request.backward
        and len(request.rows) <= MAX_PAIRS
        and len(request.ids) <= MAX_EXPERTS
        and request.reply_codec == "none"
        and not any(request.versions.tolist())
    )


def begin(
    call: IncomingCall,
    request: ApplyRequest,
    buffers: Sequence[memoryview],
    hosted: Sequence[HostedState],
    calls: ExpertCalls,
    again: Callable[[], Coroutine[object, object, Message]],
) -> Deferred[Message] | None:
    """Begin to answer; None if `again` has to do it. `hosted`: the experts that are asked, of the server of `calls`."""
    first, backend = hosted[0], hosted[0].backend
    codecs = backend.settings.codecs
    if calls.refuse_forwards is not None or "none" not in codecs.inputs or "none" not in codecs.outputs:
        return None
    backends = []
    for one in hosted:
        if one.runtime is not first.runtime:
            return None
        backends.append(one.backend)
    num_bytes = 0  # the block, each expert's rows of it, and their outputs; no more rows are answered than were asked
    for spec in backend.output_specs:
        if not (spec.dtype.is_floating_point or spec.dtype.is_complex):
            return None
        num_bytes += len(request.rows) * spec.row_bytes
    inputs = unpack_plain(request.tensors, buffers, backend.input_specs)
    if inputs is None:
        return None
    is_seen = np.zeros(inputs[0].shape[0], dtype=np.bool_)
    is_seen[request.rows] = True
    if not np.logical_and.reduce(is_seen):  # an unseen row is not answered
        return None
    for x, spec in zip(inputs, backend.input_specs, strict=True):
        num_bytes += x.nbytes + len(request.rows) * spec.row_bytes
    if num_bytes > MAX_BYTES:
        return None
    offsets, owner = request.offsets.tolist(), calls.owner(call)
    try:
        work = first.runtime.submit_joint(
            backends,
            inputs,
            rows=torch.from_numpy(request.rows).long(),
            counts=[*map(operator.sub, offsets[1:], offsets)],
            weights=torch.from_numpy(request.weights),
            training=request.training,
            deadline=call.deadline,
            priority=call.priority and priority_of(call),
            peer=owner,
            num_bytes=num_bytes,
        )
    except Overloaded:
        return None
    if work is None:
        return None

    def computed() -> Message | Deferred[Message]:
        calls.left()
        answer, kept = work.answer, None
        if answer.exception() is not None or not are_finite(sums := answer.result().tensors):
            return calls.later(again())
        if request.keep:
            name = new_name()
            kept = name if calls.memory.keep_inputs(name, inputs, owner) else None
            for one, call_id in zip(hosted, request.ids, strict=True):
                calls.expect_backward(call_id, one, call)
        metas, encoded = pack_tensors(sums)
        part = ApplyPart(
            np.arange(len(hosted)),
            np.array(work.versions, dtype=np.int64),
            np.array([one.epoch for one in hosted], dtype=np.int64),
            (),
            metas,
            _NO_WEIGHTS,
            kept,
        )
        return Message(encode_part(part, backward=False)[0], tuple(encoded))

    calls.entered()
    return Deferred(work.answer, finish=computed, cancel=partial(calls.withdraw, first, work))
