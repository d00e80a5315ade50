"""One pass of a mixture layer as one remote call: the asyncio driver of `dispatch`.

Forward leaves out experts that fail or are slow; backward asks the experts that answered, and goes on without those
that do not. Both end within their timeouts, whatever peers do.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from tesseract_async.client.completion_queue import CompletionQueue, cancel_all
from tesseract_async.client.dispatch import BackwardDispatch, CallsUnderWay, ExpertCall, ForwardDispatch
from tesseract_async.client.exchanges import BackwardExchange, ForwardExchange
from tesseract_async.client.experience import Experience
from tesseract_async.client.expert_rpc import CallMode, ExpertSchema, Forward, Receipt
from tesseract_async.client.failover import ask_best, ask_primary, may_pass
from tesseract_async.client.grid_search import GridSearch
from tesseract_async.client.settings import MixtureSettings
from tesseract_async.errors import ExpertFailed, NotEnoughExperts, TesseractError
from tesseract_async.runtime.gradients import are_finite
from tesseract_async.wire.tensors import flatten

Gradients = list[torch.Tensor | None]


async def _drive(dispatch: CallsUnderWay, sender: MixtureCall | _GradientSender, experience: Experience) -> None:
    """Run a pass to its end and learn from it; `sender` does the I/O of its direction.

    Cancelling cancels its calls. Raises: errors that are not a peer's.
    """
    loop = asyncio.get_running_loop()
    queue: CompletionQueue[None] = CompletionQueue()
    tasks: dict[asyncio.Task[None], ExpertCall | None] = {}
    with experience.stalls.watching():
        started, stalled = loop.time(), experience.stalls.seconds
        dispatch.start(started)
        try:
            while True:
                for call in dispatch.calls_to_send(loop.time(), stalled=experience.stalls.seconds - stalled):
                    sender.expect(call)
                    task = loop.create_task(sender.send(call))
                    tasks[task] = call
                    queue.add(task)
                if dispatch.is_over:
                    break
                rows = dispatch.rows_in_need
                if rows is not None and isinstance(sender, MixtureCall) and None not in tasks.values():
                    task = loop.create_task(sender.find_more(rows))
                    tasks[task] = None
                    queue.add(task)
                for task in await queue.wait(dispatch.timer_at()):
                    ended, error = tasks.pop(task), task.exception()
                    if ended is None or not isinstance(error, TesseractError | TimeoutError | None):
                        task.result()
                    elif error is None:
                        dispatch.answered(ended, loop.time())
                    else:
                        dispatch.failed(ended, loop.time(), _without_frames(error))
            experience.learn(dispatch, loop.time() - started)
        finally:
            await cancel_all(tasks)


class _ExpertAnswer(NamedTuple):
    forward: Forward
    outputs: list[torch.Tensor]
    receipt: Receipt


class MixtureCall:
    """See `autograd.Remote`. The outputs are all answers one under the other, in the order of `dispatch.answers`."""

    def __init__(
        self,
        dispatch: ForwardDispatch,
        search: GridSearch,
        *,
        schema: ExpertSchema,
        mode: CallMode,
        settings: MixtureSettings,
    ) -> None:
        self.timeout = settings.backward_timeout
        self.dispatch = dispatch
        self.weights: torch.Tensor | None = None
        """The weight of every line of the outputs, for `rescale_backward`."""
        self._search = search
        self._experience = search.experience
        self._schema = schema
        self._mode = mode
        self._settings = settings
        self._inputs: Sequence[torch.Tensor] = ()
        self._deadline = 0.0
        self._replies: dict[ExpertCall, _ExpertAnswer] = {}

    @property
    def versions(self) -> dict[str, int]:
        """By uid, the optimizer steps that the experts had taken that answered."""
        replies = (self._replies[call] for call in self.dispatch.answers)
        return {reply.forward.uid: reply.receipt.version for reply in replies}

    async def forward(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The answers. Raises: NotEnoughExperts if rows are short of them and `on_missing` says so."""
        dispatch, device = self.dispatch, inputs[0].device
        self._inputs = [tensor.cpu() for tensor in inputs]
        self._deadline = asyncio.get_running_loop().time() + self._settings.forward_timeout
        try:
            await _drive(dispatch, self, self._experience)
        finally:
            self._inputs = ()
        if dispatch.num_short and self._settings.on_missing == "raise":
            raise NotEnoughExperts(
                dispatch.k_min, dispatch.num_short, dispatch.errors, num_live=len(dispatch.candidates)
            )
        self._replies = {call: self._replies[call] for call in dispatch.answers}  # others came too late to count
        replies = list(self._replies.values())
        outputs = []
        for i, spec in enumerate(flatten(self._schema.outputs)):
            none = torch.empty(0, *spec.shape, dtype=spec.dtype, device="cpu")
            outputs.append(torch.cat([reply.outputs[i] for reply in replies]) if replies else none)
        for reply in replies:
            reply.outputs.clear()  # the copies live in the stack now
        return [output.to(device) for output in outputs]

    async def backward(
        self, inputs: Sequence[torch.Tensor], output_gradients: Sequence[torch.Tensor | None]
    ) -> Gradients:
        """The sum of the gradients of the experts that answer in time.

        Raises: NotEnoughExperts if a row gets fewer than `backward_k_min` of them.
        """
        if all(gradient is None for gradient in output_gradients) or not self.dispatch.answers:
            return [None] * len(inputs)
        self._experience.node.check_running()
        patience = self._experience.patience("backward", self._settings)
        dispatch = BackwardDispatch(self.dispatch, settings=self._settings, patience=patience)
        inputs = [tensor.cpu() for tensor in inputs]
        output_gradients = [None if gradient is None else gradient.cpu() for gradient in output_gradients]
        sender = _GradientSender(self._experience, self._settings, dispatch, self._replies, inputs, output_gradients)
        await _drive(dispatch, sender, self._experience)
        if dispatch.num_short:
            k_min = self._settings.backward_k_min
            raise NotEnoughExperts(k_min, dispatch.num_short, dispatch.errors, what="gradients")
        return sender.sums(self.weights if self._settings.rescale_backward else None)

    # ------------------------------------------------------------------------------------------------ for `_drive`

    def expect(self, call: ExpertCall) -> None:
        """Set `call.expected` and `call.grace`."""
        replicas = self.dispatch.candidates.replicas_of(call.expert)
        self._experience.expect_forward(call, replicas, len(call.rows) * self._schema.row_bytes, self._settings)

    async def send(self, call: ExpertCall) -> None:
        """Make the call and keep what it brings. Raises: as a call to an expert."""
        candidates, rows = self.dispatch.candidates, torch.from_numpy(call.rows)
        forward = Forward(call.uid, self._schema, self._mode, self._settings.calls)
        exchange = ForwardExchange(self._experience, forward, [x.index_select(0, rows) for x in self._inputs])
        replicas = exchange.eligible(candidates.replicas_of(call.expert))
        time_left = max(self._deadline - asyncio.get_running_loop().time(), 1e-3)
        outputs, receipt = await ask_best(self._experience, replicas, exchange, timeout=time_left)
        if not are_finite(outputs):
            raise ExpertFailed(f"{call.uid} answered numbers that are not finite")
        self._replies[call] = _ExpertAnswer(forward, outputs, receipt)

    async def find_more(self, rows: torch.Tensor) -> None:
        """Look for experts for these rows (see `CallsUnderWay.rows_in_need`) and tell the dispatch. If all that failed
        said no themselves, only experts that are there already help."""
        dispatch = self.dispatch
        errors = dispatch.errors.values()
        candidates, experts = await self._search.more(dispatch, rows, wait=not errors or any(map(may_pass, errors)))
        dispatch.came(candidates, experts)


@dataclass(slots=True, eq=False)
class _GradientSender:
    """The I/O of `MixtureCall.backward`."""

    experience: Experience
    settings: MixtureSettings
    dispatch: BackwardDispatch
    replies: Mapping[ExpertCall, _ExpertAnswer]
    """The forward's."""
    inputs: Sequence[torch.Tensor]
    output_gradients: Sequence[torch.Tensor | None]
    gradients: dict[ExpertCall, Gradients] = field(default_factory=dict)
    """By call, those of the inputs."""

    def expect(self, call: ExpertCall) -> None:
        """Set `call.expected` and `call.grace`."""
        replicas = self.dispatch.candidates.replicas_of(call.expert)
        self.experience.expect_backward(call, replicas, self.settings)

    async def send(self, call: ExpertCall) -> None:
        """Make the call and keep what it brings. Raises: as a call to an expert."""
        replicas = self.dispatch.candidates.replicas_of(call.expert)
        reply = self.replies[self.dispatch.forward_calls[call]]
        lines, rows = self.dispatch.forward_lines[call], torch.from_numpy(call.rows)
        exchange = BackwardExchange(
            self.experience,
            reply.forward,
            reply.receipt,
            [tensor.index_select(0, rows) for tensor in self.inputs],
            [None if gradient is None else gradient[lines] for gradient in self.output_gradients],
        )
        timeout = self.settings.backward_timeout
        gradients = await ask_primary(self.experience, replicas, exchange, timeout=timeout)
        if not are_finite(gradients):
            raise ExpertFailed(f"{call.uid} answered gradients that are not finite")
        self.gradients[call] = gradients

    def sums(self, weights: torch.Tensor | None) -> Gradients:
        """For every input the sum of its gradients, in an order that does not depend on which answer came first.

        `weights`: of every line of the outputs, where each row's gradient is to be divided by the weight of those
        experts whose gradients arrived.
        """
        sums: Gradients = [None] * len(self.inputs)
        arrived = None if weights is None else weights.new_zeros(len(self.dispatch.num_answers_R))
        for call in sorted(self.dispatch.answers, key=lambda call: (call.expert, call.rows[0])):
            rows = torch.from_numpy(call.rows)
            for i, gradient in enumerate(self.gradients[call]):
                if gradient is not None:
                    if (total := sums[i]) is None:
                        total = sums[i] = torch.zeros_like(self.inputs[i])
                    total.index_add_(0, rows, gradient)
            if arrived is not None and weights is not None:
                arrived.index_add_(0, rows, weights[self.dispatch.forward_lines[call]])
        if arrived is None:
            return sums
        # a row that lost nearly all of its weight is not blown up to noise
        scale = 1 / arrived.clamp(min=0.05)
        return [
            None if total is None else total * scale.to(total.dtype).reshape(-1, *[1] * (total.dim() - 1))
            for total in sums
        ]


def _without_frames(error: BaseException) -> BaseException:
    """The error without its traceback, whose frames hold the call that keeps the error: a cycle full of tensors."""
    link: BaseException | None = error
    while link is not None:
        link.__traceback__ = None
        link = link.__cause__ or link.__context__
    return error
