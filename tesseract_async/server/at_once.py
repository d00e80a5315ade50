"""Answers a small ``expert.apply`` without looking at its experts one by one: a forward of a few rows by experts of one
kind, all of them here, which are computed in one pass. Everything that arrives here is untrusted.

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
from tesseract_async.runtime.work import JointWork
from tesseract_async.server.answering import ExpertCalls, priority_of
from tesseract_async.server.hosted import HostedState
from tesseract_async.wire.apply import ApplyPart, ApplyRequest, encode_part
from tesseract_async.wire.tensors import pack_tensors, unpack_plain

MAX_PAIRS: Final = 256
"""Pairs of an expert and a row."""
MAX_EXPERTS: Final = 64
_NO_WEIGHTS: Final = np.empty(0, dtype=np.float32)


def is_small(request: ApplyRequest) -> bool:
    """Return whether this is a call that may be answered so."""
    return (
        not (request.backward or request.training or request.keep)
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
    """Begin to answer; None if `again` has to. `hosted`: the experts that are asked, of the server of `calls`."""
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
    if inputs is None or len({*request.rows.tolist()}) < inputs[0].shape[0]:  # an unseen row is not answered
        return None
    for x, spec in zip(inputs, backend.input_specs, strict=True):
        num_bytes += x.nbytes + len(request.rows) * spec.row_bytes
    offsets = request.offsets.tolist()
    try:
        work = first.runtime.submit_joint(
            backends,
            inputs,
            rows=torch.from_numpy(request.rows).long(),
            counts=[*map(operator.sub, offsets[1:], offsets)],
            weights=torch.from_numpy(request.weights),
            deadline=call.deadline,
            priority=call.priority and priority_of(call),
            peer=calls.owner(call),
            num_bytes=num_bytes,
        )
    except Overloaded:
        return None
    if work is None:
        return None
    calls.entered()
    return Deferred(
        work.answer,
        finish=partial(_computed, hosted, calls, work, again),
        cancel=partial(calls.withdraw, first, work),
    )


def _computed(
    hosted: Sequence[HostedState],
    calls: ExpertCalls,
    work: JointWork,
    again: Callable[[], Coroutine[object, object, Message]],
) -> Message | Deferred[Message]:
    calls.left()
    answer = work.answer
    if answer.exception() is not None or not are_finite(sums := answer.result().tensors):
        return calls.later(again())
    metas, buffers = pack_tensors(sums)
    part = ApplyPart(
        np.arange(len(hosted)),
        np.array(work.versions, dtype=np.int64),
        np.array([one.epoch for one in hosted], dtype=np.int64),
        (),
        metas,
        _NO_WEIGHTS,
    )
    return Message(encode_part(part, backward=False)[0], tuple(buffers))
