"""One mixture layer's calls as *one* remote call: rows out to many experts, whatever comes back in time.

Forward drops experts that fail or are slow and sends the rows concerned to their next-best ones; backward asks the
experts that answered, and goes on without those that do not. Both end within their time-outs, whatever peers do.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from tesseract_async.client.beam_search import group, next_best, top_k
from tesseract_async.client.expert_calls import CallOptions, ExpertSchema, Forward, call_backward, call_forward
from tesseract_async.client.ports import Node, View
from tesseract_async.client.remote_expert import GRACE_SECONDS, try_replicas
from tesseract_async.errors import ExpertFailed, NotEnoughExperts, TesseractError
from tesseract_async.wire.tensors import flatten


@dataclass(frozen=True, slots=True)
class MixtureSettings:
    """How a mixture deals with experts that may vanish. Times in seconds."""

    k_best: int = 4
    """Experts asked for each row."""
    k_min: int = 1
    """Answers that a row needs."""
    forward_timeout: float = 15.0
    """For a row to get its `k_min` answers, refills included."""
    timeout_after_k_min: float = 1.0
    """Once every row has `k_min` answers, how much longer the others are waited for."""
    backward_timeout: float = 15.0
    """For the experts' gradients. An expert that has not answered by then contributes none."""
    backward_k_min: int = 0
    """Experts whose gradients a row needs, of those that answered it; with fewer, backward raises NotEnoughExperts."""
    on_missing: Literal["raise", "zero"] = "raise"
    """What becomes of a row short of `k_min` answers in the end: NotEnoughExperts, or an output of zeros."""
    priority: int = 0
    """Higher goes first at the servers."""
    codec: str = "none"
    """How floating-point tensors travel."""

    def __post_init__(self) -> None:
        if self.k_best < 1:
            raise ValueError(f"k_best is at least 1, not {self.k_best}")
        if not 0 <= self.k_min <= self.k_best:
            raise ValueError(f"k_min lies between 0 and k_best={self.k_best}, not at {self.k_min}")
        if not 0 <= self.backward_k_min <= self.k_best:
            raise ValueError(f"backward_k_min lies between 0 and k_best={self.k_best}, not at {self.backward_k_min}")
        if self.on_missing not in ("raise", "zero"):
            raise ValueError(f"on_missing is 'raise' or 'zero', not {self.on_missing!r}")
        if min(self.forward_timeout, self.backward_timeout) <= 0 or self.timeout_after_k_min < 0:
            raise ValueError("time-outs are positive numbers of seconds")


@dataclass(slots=True, eq=False)
class Part:
    """The rows that go to one expert."""

    uid: str
    expert: int
    """Row of the view's coordinates."""
    rows: torch.Tensor
    replicas: Sequence[Any]
    forward: Forward
    outputs: list[torch.Tensor] = field(default_factory=list)
    version: int = 0
    peer_replica: Any = None


class MixtureCall:
    """See `autograd.Remote`. Outputs are all experts' answers, one under the other, in the order of `answered`."""

    def __init__(
        self,
        node: Node,
        view: View,
        *,
        prefix: str,
        schema: ExpertSchema,
        grid_size: Sequence[int],
        scores: torch.Tensor,
        settings: MixtureSettings,
        training: bool,
        seed: int,
    ) -> None:
        """`scores`: ``[rows, sum(grid_size)]``, on the CPU, outside of the graph; never NaN."""
        self.timeout = settings.backward_timeout
        self.answered: list[Part] = []
        self.errors: dict[str, BaseException] = {}
        self._node = node
        self._view = view
        self._prefix = prefix
        self._schema = schema
        self._grid_size = grid_size
        self._scores = scores
        self._settings = settings
        self._training = training
        self._seed = seed
        num_rows = scores.shape[0]
        self.num_answers: npt.NDArray[np.int64] = np.zeros(num_rows, dtype=np.int64)
        """Answers by row."""
        self._num_pending: npt.NDArray[np.int64] = np.zeros(num_rows, dtype=np.int64)
        self._tried_RT: npt.NDArray[np.int64] = np.empty((num_rows, 0), dtype=np.int64)
        self._excluded: npt.NDArray[np.bool_] = np.zeros(len(view.coords), dtype=np.bool_)

    # ---------------------------------------------------------------------------------------------- forward

    async def forward(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Asks the best experts of every row until all have `k_min` answers, or time or experts run out.

        Raises: NotEnoughExperts if `on_missing` says so.
        """
        device = inputs[0].device
        inputs = [tensor.cpu() for tensor in inputs]
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._settings.forward_timeout
        tasks: dict[asyncio.Task[None], Part] = {}

        def launch(parts: list[Part]) -> None:
            for part in parts:
                self._num_pending[part.rows.numpy()] += 1
                tasks[loop.create_task(self._ask(part, inputs, deadline))] = part

        try:
            best = top_k(self._scores, self._view.coords, self._grid_size, self._settings.k_best).numpy()
            launch(self._assign(np.repeat(np.arange(len(best)), best.shape[1]), best.reshape(-1)))
            satisfied = False
            while tasks:
                if not satisfied and (self.num_answers >= self._settings.k_min).all():
                    satisfied = True
                    deadline = min(deadline, loop.time() + self._settings.timeout_after_k_min)
                done, _ = await asyncio.wait(tasks, timeout=deadline - loop.time(), return_when=asyncio.FIRST_COMPLETED)
                if not done:
                    break
                for task in done:
                    self._settle(tasks.pop(task), task.exception())
                launch(self._refill())
            for part in tasks.values():
                self.errors.setdefault(part.uid, TimeoutError(f"{part.uid} did not answer in time"))
        finally:
            await _cancel_all(tasks)
        short = int((self.num_answers < self._settings.k_min).sum())
        if short and self._settings.on_missing == "raise":
            raise NotEnoughExperts(self._settings.k_min, short, self.errors)
        return [output.to(device) for output in self._stacked_outputs()]

    def _assign(self, rows_P: npt.NDArray[np.int64], experts_P: npt.NDArray[np.int64]) -> list[Part]:
        """Parts for these pairs, which are also remembered as tried."""
        width = int(np.bincount(rows_P, minlength=1).max(initial=0))
        fresh = np.full((len(self._tried_RT), width), -1, dtype=np.int64)
        order = np.argsort(rows_P, kind="stable")
        rows, experts = rows_P[order], experts_P[order]
        at = np.arange(len(rows)) - np.searchsorted(rows, rows)
        fresh[rows, at] = experts
        self._tried_RT = np.concatenate([self._tried_RT, fresh], axis=1)
        return [self._part(expert, members) for expert, members in group(rows_P, experts_P)]

    def _part(self, expert: int, rows: npt.NDArray[np.int64]) -> Part:
        coords = tuple(self._view.coords[expert].tolist())
        uid = ".".join((self._prefix, *map(str, coords)))
        options = CallOptions(
            timeout=self._settings.forward_timeout, priority=self._settings.priority, codec=self._settings.codec
        )
        forward = Forward(uid, self._schema, self._training, self._seed, options)
        return Part(uid, expert, torch.from_numpy(rows), self._view.replicas[coords], forward)

    async def _ask(self, part: Part, inputs: Sequence[torch.Tensor], deadline: float) -> None:
        chosen = [tensor.index_select(0, part.rows) for tensor in inputs]

        async def find() -> Sequence[Any]:
            return part.replicas

        async def attempt(peer: Any, timeout: float) -> tuple[list[torch.Tensor], int]:
            return await call_forward(self._node, part.forward, peer, chosen, timeout=timeout)

        left = max(deadline - asyncio.get_running_loop().time(), 1e-3)
        outputs, part.version = await try_replicas(self._node, find, attempt, timeout=left)
        if not all(torch.isfinite(output).all() for output in outputs):
            raise ExpertFailed(f"{part.uid} answered numbers that are not finite")
        part.outputs = outputs

    def _settle(self, part: Part, error: BaseException | None) -> None:
        rows = part.rows.numpy()
        self._num_pending[rows] -= 1
        if error is None:
            self.num_answers[rows] += 1
            self.answered.append(part)
        elif isinstance(error, TesseractError | TimeoutError):
            self.errors[part.uid] = error
            self._excluded[part.expert] = True
        else:
            raise error

    def _refill(self) -> list[Part]:
        """Parts for the rows that can no longer reach `k_min` with what is under way."""
        missing = self._settings.k_min - self.num_answers - self._num_pending
        rows = np.flatnonzero(missing > 0)
        if not len(rows):
            return []
        at, experts = next_best(
            self._scores[torch.from_numpy(rows)],
            self._view.coords,
            self._grid_size,
            tried_RT=self._tried_RT[rows],
            excluded_N=self._excluded,
            wanted_R=missing[rows],
        )
        return self._assign(rows[at], experts) if len(at) else []

    def _stacked_outputs(self) -> list[torch.Tensor]:
        stacked = []
        for i, spec in enumerate(flatten(self._schema.outputs)):
            answers = [part.outputs[i] for part in self.answered]
            stacked.append(torch.cat([torch.empty(0, *spec.shape, dtype=spec.dtype), *answers]))
        for part in self.answered:
            part.outputs = []  # the copies live in the stack now
        return stacked

    def pairs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Row and expert of every line of the outputs."""
        empty = torch.empty(0, dtype=torch.int64)
        rows = torch.cat([empty, *(part.rows for part in self.answered)])
        experts = torch.cat([empty, *(torch.full_like(part.rows, part.expert) for part in self.answered)])
        return rows, experts

    # ---------------------------------------------------------------------------------------------- backward

    async def backward(
        self, inputs: Sequence[torch.Tensor], output_grads: Sequence[torch.Tensor | None]
    ) -> list[torch.Tensor | None]:
        """The sum of the gradients of the experts that answer in time.

        Raises: NotEnoughExperts if a row gets fewer than `backward_k_min` of them.
        """
        if all(grad is None for grad in output_grads) or not self.answered:
            return [None] * len(inputs)
        inputs = [tensor.cpu() for tensor in inputs]
        output_grads = [None if grad is None else grad.cpu() for grad in output_grads]
        num_rows = inputs[0].shape[0]
        sums: list[torch.Tensor | None] = [None] * len(inputs)
        answers = np.zeros(num_rows, dtype=np.int64)
        asked = np.zeros(num_rows, dtype=np.int64)
        errors: dict[str, BaseException] = {}
        loop = asyncio.get_running_loop()
        tasks: dict[asyncio.Task[list[torch.Tensor | None]], Part] = {}
        start = 0
        for part in self.answered:
            stop = start + len(part.rows)
            grads = [None if grad is None else grad[start:stop] for grad in output_grads]
            tasks[loop.create_task(self._ask_backward(part, inputs, grads))] = part
            asked[part.rows.numpy()] += 1
            start = stop
        try:
            await asyncio.wait(tasks, timeout=self._settings.backward_timeout + 2 * GRACE_SECONDS)
            for task, part in tasks.items():
                error = task.exception() if task.done() else TimeoutError(f"{part.uid} did not answer in time")
                if error is None:
                    answers[part.rows.numpy()] += 1
                    for i, grad in enumerate(task.result()):
                        if grad is not None:
                            if (total := sums[i]) is None:
                                total = sums[i] = torch.zeros_like(inputs[i])
                            total.index_add_(0, part.rows, grad)
                elif isinstance(error, TesseractError | TimeoutError):
                    errors[part.uid] = error
                else:
                    raise error
        finally:
            await _cancel_all(tasks)
        short = int((answers < np.minimum(asked, self._settings.backward_k_min)).sum())
        if short:
            raise NotEnoughExperts(self._settings.backward_k_min, short, errors)
        return sums

    async def _ask_backward(
        self, part: Part, inputs: Sequence[torch.Tensor], grads: Sequence[torch.Tensor | None]
    ) -> list[torch.Tensor | None]:
        chosen = [tensor.index_select(0, part.rows) for tensor in inputs]

        async def find() -> Sequence[Any]:
            return part.replicas

        async def attempt(peer: Any, timeout: float) -> list[torch.Tensor | None]:
            return await call_backward(
                self._node, part.forward, peer, chosen, grads, version=part.version, timeout=timeout
            )

        result = await try_replicas(self._node, find, attempt, timeout=self._settings.backward_timeout, only_first=True)
        if not all(grad is None or torch.isfinite(grad).all() for grad in result):
            raise ExpertFailed(f"{part.uid} answered gradients that are not finite")
        return result


async def _cancel_all(tasks: Any) -> None:
    """Ends the tasks that still run, and waits for them; their errors are nobody's business."""
    running = [task for task in tasks if not task.done()]
    for task in running:
        task.cancel()
    if running:
        await asyncio.wait(running)
    for task in tasks:
        if not task.cancelled():
            task.exception()
