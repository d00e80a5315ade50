"""Answers a small ``expert.apply`` without looking at its experts one by one: a forward of a few rows by experts of one
kind, all of them here, which are computed in one pass. Everything that arrives here is untrusted.

Where that cannot be, or fails, `applying` answers.
"""

import asyncio
import operator
from collections.abc import Callable, Coroutine, Sequence
from typing import Final

import numpy as np
import torch

from tesseract_async.endpoint.endpoint import IncomingCall, Message
from tesseract_async.endpoint.handlers import Deferred
from tesseract_async.errors import Overloaded
from tesseract_async.runtime.gradients import are_finite
from tesseract_async.runtime.work import JointWork, WorkResult
from tesseract_async.server.answering import ExpertCalls, priority_of, told_of
from tesseract_async.server.hosted import HostedState
from tesseract_async.tasks import PromptFuture
from tesseract_async.wire.apply import APPLY, ApplyPart, ApplyRequest, encode_part
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


class AtOnce:
    """One such call under way."""

    def __init__(
        self,
        hosted: Sequence[HostedState],
        calls: ExpertCalls,
        work: JointWork,
        again: Callable[[], Coroutine[object, object, Message]],
    ) -> None:
        """`again` answers in the other way."""
        self._loop = asyncio.get_running_loop()
        self._hosted, self._calls, self._work, self._again = hosted, calls, work, again
        self._task: asyncio.Task[Message] | None = None
        self._message: PromptFuture[Message] = PromptFuture(loop=self._loop)
        self._is_open = True
        calls.entered()
        work.answer.add_listener(self._computed)

    def deferred(self) -> Deferred[Message]:
        return Deferred(self._message, finish=self._message.result, cancel=self._withdraw)

    def _computed(self, answer: asyncio.Future[WorkResult]) -> None:
        if not self._is_open or answer.cancelled():
            return
        if answer.exception() is None and are_finite(sums := answer.result().tensors):
            metas, buffers = pack_tensors(sums)
            part = ApplyPart(
                np.arange(len(self._hosted)),
                np.array(self._work.versions, dtype=np.int64),
                np.array([one.epoch for one in self._hosted], dtype=np.int64),
                (),
                metas,
                _NO_WEIGHTS,
            )
            body, _ = encode_part(part, backward=False)
            self._end()
            self._message.set_result(Message(body, tuple(buffers)))
            return
        self._task = self._loop.create_task(self._again())
        self._task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[Message]) -> None:
        if not self._is_open or task.cancelled():
            return
        self._end()
        if (error := task.exception()) is not None:
            self._message.set_exception(told_of(error, APPLY))
        else:
            self._message.set_result(task.result())

    def _withdraw(self) -> None:
        """Nobody waits for it any more."""
        if self._is_open:
            self._end()
            self._hosted[0].runtime.withdraw(self._work)
            if self._task is not None:
                self._task.cancel()

    def _end(self) -> None:
        self._is_open = False
        self._calls.left()


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
    return None if work is None else AtOnce(hosted, calls, work, again).deferred()
