"""One mixture layer's calls as *one* remote call: rows out to many experts, whatever comes back in time.

Forward drops experts that fail or are slow and sends the rows concerned to their next-best ones; backward asks the
experts that answered, and goes on without those that do not. Both end within their time-outs, whatever peers do.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from tesseract_async.client.beam_search import Indices, LiveGrid, group, within_capacity
from tesseract_async.client.endings import Endings
from tesseract_async.client.expert_calls import (
    Answer,
    ExpertSchema,
    Forward,
    call_backward,
)
from tesseract_async.client.latency import FIRST_GRACE_SECONDS
from tesseract_async.client.mixture_settings import MixtureSettings
from tesseract_async.client.parts import Part, Usual, patience_limit, usual_seconds
from tesseract_async.client.ports import View
from tesseract_async.client.replicas import (
    BLOCK_SECONDS,
    GRACE_SECONDS,
    Shared,
    ask_best,
    ask_primary,
    cancel_all,
    may_pass,
)
from tesseract_async.client.staleness import fresh_enough
from tesseract_async.errors import ExpertFailed, NotEnoughExperts, Overloaded, TesseractError
from tesseract_async.runtime.gradients import are_finite
from tesseract_async.wire.names import new_name
from tesseract_async.wire.tensors import flatten


@dataclass(frozen=True, slots=True, eq=False)
class _Extended:
    """A view with the experts that came later behind those that it had, whose numbers stay."""

    coords: npt.NDArray[np.int64]
    replicas: Mapping[tuple[int, ...], list[Any]]
    version: int = -1


class MixtureCall:
    """See `autograd.Remote`. The outputs are all experts' answers, one under the other, in the order of `answered`."""

    def __init__(
        self,
        shared: Shared,
        view: View,
        grid: LiveGrid,
        *,
        prefix: str,
        schema: ExpertSchema,
        scores: torch.Tensor,
        bias: Callable[[View], torch.Tensor | None],
        newcomers: Callable[..., Awaitable[Mapping[tuple[int, ...], list[Any]]]],
        settings: MixtureSettings,
        training: bool,
        seed: int,
        differentiable: bool,
    ) -> None:
        """`scores`: ``[rows, sum(grid_size)]``, on the CPU, outside of the graph, without NaN; `bias`: of a view's
        experts; `newcomers`: see `GridSearch.newcomers`."""
        self.timeout = settings.backward_timeout
        self.answered: list[Part] = []
        self.chosen = torch.empty(0, 0, dtype=torch.int64, device="cpu")
        """``[rows, k]``: the experts that were asked first."""
        self.errors: dict[str, BaseException] = {}
        self.seconds: dict[int, float] = {}
        """By expert, how long it took, or had taken when nobody waited any more."""
        self.weights: torch.Tensor | None = None
        """The weight of every line of the outputs, for `rescale_backward`."""
        self.view = view
        """The experts that this call knows; those that come while it runs are added."""
        self.grid = grid
        self._shared = shared
        self._prefix = prefix
        self._schema = schema
        self._scores = scores
        self._bias_of = bias
        self._bias = bias(view)
        self._newcomers = newcomers
        self._nobody_comes = not (settings.refill and settings.k_min) or settings.capacity_factor is not None
        """Whether rows that have tried everybody are given up."""
        self._settings = settings
        self._options = settings.call_options
        self._training = training
        self._seed = seed
        self._differentiable = differentiable
        self._stalled = shared.stalls.seconds
        self._num_first = 0
        """Parts sent at first."""
        num_rows, num_live = len(scores), len(view.coords)
        self.num_answers: Indices = np.zeros(num_rows, dtype=np.int64)
        """Answers by row."""
        self.given_up: list[Part] = []
        """Those that nobody waited for any more, `slow` or not."""
        self._full: list[tuple[float, Part]] = []
        """When those that were overloaded may be asked again."""
        self._num_pending: Indices = np.zeros(num_rows, dtype=np.int64)
        self._failed: dict[str, BaseException] = {}
        """Of this pass, by uid; those that came back are still in it."""
        self._num_slow: Indices = np.zeros(num_rows, dtype=np.int64)
        self._exhausted: npt.NDArray[np.bool_] = np.zeros(num_rows, dtype=np.bool_)
        """Rows for which no further expert is left."""
        self._tried_RT: Indices = np.empty((num_rows, 0), dtype=np.int64)
        self._excluded: npt.NDArray[np.bool_] = np.zeros(num_live, dtype=np.bool_)
        self._room: Indices = np.full(num_live, num_rows, dtype=np.int64)
        if settings.capacity_factor is not None and num_live:
            share = num_rows * min(settings.k_best, num_live) / num_live
            self._room[:] = max(1, math.ceil(settings.capacity_factor * share))

    # ---------------------------------------------------------------------------------------------- forward

    async def forward(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Asks the best experts of every row until all have `k_min` answers, or time or experts run out.

        Raises: NotEnoughExperts if `on_missing` says so.
        """
        with self._shared.stalls.watching():
            return await self._forward(inputs)

    async def _forward(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        device = inputs[0].device
        inputs = [tensor.cpu() for tensor in inputs]
        loop = asyncio.get_running_loop()
        started = loop.time()
        deadline = started + self._settings.forward_timeout
        tasks: dict[asyncio.Task[None], Part] = {}
        coming: asyncio.Task[Mapping[tuple[int, ...], list[Any]]] | None = None
        endings: Endings[Any] = Endings()

        def launch(parts: list[Part]) -> None:
            for part in parts:
                task = loop.create_task(self._ask(part, inputs, deadline))
                tasks[task] = part
                endings.add(task)

        try:
            self.chosen = self.grid.top_k(self._scores, self._settings.k_best, bias_N=self._bias)
            best_RK = self.chosen.numpy()
            num_rows, k = best_RK.shape
            launch(self._assign(np.repeat(np.arange(num_rows), k), best_RK.reshape(-1)))
            launch(self._refill())  # what did not fit into the capacity
            self._num_first = len(tasks)
            lost = False
            while True:
                now = loop.time()
                suspicious_at = self._suspect(tasks.values(), now)
                if refills := self._refill():
                    launch(refills)
                    suspicious_at = self._suspect(tasks.values(), now)  # they may hang, too
                again_at = math.inf
                stuck = self._exhausted & (self._num_pending + self._num_slow == 0) & ~self._satisfied()
                if not self._nobody_comes and stuck.any():
                    if free := self._free_again(now):
                        self._welcome(free, tasks.values())
                        continue
                    again_at = min((at for at, _ in self._full), default=math.inf)
                    if coming is None:
                        coming = loop.create_task(self._more_experts(stuck))
                        endings.add(coming)
                elif stuck.any() and self._settings.on_missing == "raise" and self._settings.k_min:
                    lost = True
                    break
                give_up_at = deadline
                if (self._satisfied() | (stuck & self._nobody_comes)).all():
                    give_up_at = max((part.late_at + part.grace for part in tasks.values()), default=-math.inf)
                    if now >= give_up_at:
                        break
                    if self._settings.timeout_after_k_min is not None:
                        deadline = min(deadline, now + self._settings.timeout_after_k_min)
                if now >= deadline:
                    break
                for task in await endings.wait(min(deadline, give_up_at, suspicious_at, again_at)):
                    if task is coming:
                        coming, came = None, task.result()
                        self._nobody_comes = not came
                        self._welcome(came, tasks.values())
                    else:
                        self._settle(tasks.pop(task), task.exception(), loop.time())
            at_last = loop.time() >= started + self._settings.forward_timeout
            for part in tasks.values():
                part.slow |= at_last
                if lost and not part.slow:
                    continue  # there was nothing to wait for any more
                self.given_up.append(part)
                self.seconds[part.expert] = loop.time() - part.sent
                self.errors.setdefault(part.uid, TimeoutError(f"{part.uid} did not answer in time"))
            self._learn(loop.time() - started)
        finally:
            await cancel_all([*tasks, *([] if coming is None else [coming])])
        short = int((self.num_answers < self._settings.k_min).sum())
        if short and self._settings.on_missing == "raise":
            raise NotEnoughExperts(self._settings.k_min, short, self.errors, num_live=len(self.view.coords))
        return [output.to(device) for output in self._stacked_outputs()]

    def _satisfied(self) -> npt.NDArray[np.bool_]:
        # even where no answer is needed, one is worth waiting for
        return self.num_answers >= max(1, self._settings.k_min)

    def _assign(self, rows_L: Indices, experts_L: Indices) -> list[Part]:
        """Parts for these pairs of a row and an expert, now remembered as tried; not for those beyond capacity."""
        if not len(rows_L):
            return []
        order = np.argsort(rows_L, kind="stable")
        rows, experts = rows_L[order], experts_L[order]
        at = np.arange(len(rows)) - np.searchsorted(rows, rows)
        tried = np.full((len(self._tried_RT), int(at.max()) + 1), -1, dtype=np.int64)
        tried[rows, at] = experts
        self._tried_RT = np.concatenate([self._tried_RT, tried], axis=1)
        if self._settings.capacity_factor is not None:
            scores = self._scores.numpy()[rows[:, None], self.grid.columns_ND.numpy()[experts]].sum(1)
            kept = within_capacity(rows, experts, scores, self._room)
            rows, experts = rows[kept], experts[kept]
            self._room -= np.bincount(experts, minlength=len(self._room))
            self._excluded |= self._room <= 0
        np.add.at(self._num_pending, rows, 1)
        now = asyncio.get_running_loop().time()
        return [self._part(expert, members, now) for expert, members in group(rows, experts)]

    def _part(self, expert: int, rows: Indices, now: float) -> Part:
        coords = self._coords(expert)
        uid = ".".join((self._prefix, *map(str, coords)))
        forward = Forward(uid, self._schema, self._training, self._seed, self._options, self._differentiable)
        replicas = self.view.replicas[coords]
        expected = self._shared.usual(replicas, num_bytes=len(rows) * self._schema.row_bytes)
        part = Part(uid, expert, torch.from_numpy(rows), replicas, forward, now, expected)
        part.grace = self._grace("forward", self._shared.are_new(replicas), self._settings.forward_timeout)
        return part

    async def _ask(self, part: Part, inputs: Sequence[torch.Tensor], deadline: float) -> None:
        chosen = [tensor.index_select(0, part.rows) for tensor in inputs]

        def attempt(peer: Any, timeout: float) -> Awaitable[tuple[list[torch.Tensor], Answer]]:
            return self._shared.audits.forward(self._shared.node, part.forward, peer, chosen, timeout=timeout)

        left = max(deadline - asyncio.get_running_loop().time(), 1e-3)
        replicas, ask = fresh_enough(self._shared, part.uid, part.replicas, attempt, self._settings.max_staleness)
        outputs, part.answer = await ask_best(self._shared, replicas, ask, timeout=left, num_bytes=part.num_bytes)
        if not are_finite(outputs):
            raise ExpertFailed(f"{part.uid} answered numbers that are not finite")
        part.outputs = outputs

    def _settle(self, part: Part, error: BaseException | None, now: float) -> None:
        rows = part.rows.numpy()
        (self._num_slow if part.slow else self._num_pending)[rows] -= 1
        if error is None:
            self.errors.pop(part.uid, None)  # it came back
            self.seconds[part.expert] = now - part.sent
            self.num_answers[rows] += 1
            self.answered.append(part)
        elif isinstance(error, TesseractError | TimeoutError):
            self.errors[part.uid] = _without_frames(error)
            self._failed[part.uid] = self.errors[part.uid]
            self._excluded[part.expert] = True
            if isinstance(error, Overloaded):
                self._full.append((now + max(error.retry_after, BLOCK_SECONDS), part))
        else:
            raise error

    def _usual(self) -> Usual | None:
        seconds = [self.seconds[part.expert] for part in self.answered]
        return Usual.of(self.answered, seconds, self._num_first - len(self._failed))

    def _patience(self, way: Literal["forward", "backward"]) -> float:
        known = self._settings.patience
        return self._shared.latencies.lateness[way].patience if known is None else known

    def _grace(self, way: Literal["forward", "backward"], is_new: bool, timeout: float) -> float:
        """For how long one that is slow is waited for, where all rows have enough; not at all with a given patience."""
        if self._settings.patience is not None:
            return 0.0
        return min(FIRST_GRACE_SECONDS if is_new else self._shared.latencies.grace[way].seconds, timeout / 3)

    def _suspect(self, under_way: Iterable[Part], now: float) -> float:
        """Marks the parts that take suspiciously long; returns when the next one would (the loop's time)."""
        next_at = math.inf
        usual, patience = self._usual(), self._patience("forward")
        stalled = self._shared.stalls.seconds - self._stalled
        for part in under_way:
            limit = patience_limit(usual_seconds(part, usual, part.expected), patience)
            part.late_at = part.sent + limit + stalled
            if part.slow:
                continue
            if now >= part.late_at:
                part.slow = True
                self._num_pending[part.rows.numpy()] -= 1
                self._num_slow[part.rows.numpy()] += 1
            else:
                next_at = min(next_at, part.late_at)
        return next_at

    def _learn(self, seconds: float) -> None:
        """Takes in how far this batch's answers scattered, how long was waited in vain, and who was left out."""
        usual, book = self._usual(), self._shared.latencies
        late = [part for part in self.given_up if part.slow]
        for part in (*self.answered, *late):
            if (may_take := usual_seconds(part, usual, part.expected)) is not None:
                book.lateness["forward"].observe(self.seconds[part.expert], may_take)
        if late:
            book.grace["forward"].spend()
        elif not self.given_up:
            book.grace["forward"].earn(seconds)
        self._shared.left_out.note("forward", {part.uid: self.errors[part.uid] for part in late} | self._failed)

    def _refill(self) -> list[Part]:
        """Parts for the rows that have too few answers to come, from their next-best experts."""
        parts: list[Part] = []
        if not self._settings.refill:
            self._exhausted[:] = True
            return parts
        target = min(max(1, self._settings.k_min) + self._settings.spare, self._settings.k_best)
        while True:
            is_open = ~self._satisfied() & ~self._exhausted
            missing = np.where(is_open, target - self.num_answers - self._num_pending, 0)
            rows = np.flatnonzero(missing > 0)
            if not len(rows):
                return parts
            at, experts = self.grid.next_best(
                self._scores[torch.from_numpy(rows)],
                tried_RT=self._tried_RT[rows],
                excluded_N=self._excluded,
                wanted_R=missing[rows],
                bias_N=self._bias,
            )
            self._exhausted[np.delete(rows, at)] = True
            parts += self._assign(rows[at], experts)
            if self._settings.capacity_factor is None:
                return parts

    async def _more_experts(self, stuck_R: npt.NDArray[np.bool_]) -> Mapping[tuple[int, ...], list[Any]]:
        """Experts for these rows, which have tried all; only those there now if all that failed said no themselves."""
        return await self._newcomers(
            self.view,
            self._scores[torch.from_numpy(stuck_R)],
            num_tried=self._tried_RT.shape[1],
            wait=not self.errors or any(map(may_pass, self.errors.values())),
        )

    def _free_again(self, now: float) -> dict[tuple[int, ...], list[Any]]:
        """The experts that were overloaded, and may be asked again."""
        free = [part for at, part in self._full if at <= now]
        self._full = [(at, part) for at, part in self._full if at > now]
        return {self._coords(part.expert): list(part.replicas) for part in free}

    def _welcome(self, came: Mapping[tuple[int, ...], list[Any]], under_way: Iterable[Part]) -> None:
        """Adds experts that came, or came back: under new numbers, behind those known."""
        if not came:
            return
        number = {coords: at for at, coords in enumerate(came, len(self.view.coords))}
        for old, coords in enumerate(map(tuple, self.view.coords.tolist())):
            if coords in number:
                self._excluded[old] = True
        for part in (*self.answered, *under_way):  # nobody answers a row twice
            if (new := number.get(self._coords(part.expert))) is not None:
                self._tried_RT = np.pad(self._tried_RT, ((0, 0), (0, 1)), constant_values=-1)
                self._tried_RT[part.rows.numpy(), -1] = new
        coords_ND = np.concatenate([self.view.coords, np.array(list(came), dtype=np.int64)])
        self.view = _Extended(coords_ND, {**self.view.replicas, **came})
        self.grid = LiveGrid(coords_ND, self.grid.grid_size)
        self._bias = self._bias_of(self.view)
        self._excluded = np.pad(self._excluded, (0, len(came)))
        self._room = np.pad(self._room, (0, len(came)), constant_values=len(self._scores))
        self._exhausted[:] = False

    def _coords(self, expert: int) -> tuple[int, ...]:
        return tuple(self.view.coords[expert].tolist())

    def _stacked_outputs(self) -> list[torch.Tensor]:
        stacked = []
        for i, spec in enumerate(flatten(self._schema.outputs)):
            answers = [part.outputs[i] for part in self.answered]
            none = torch.empty(0, *spec.shape, dtype=spec.dtype, device="cpu")
            stacked.append(torch.cat(answers) if answers else none)
        for part in self.answered:
            part.outputs = []  # the copies live in the stack now
        return stacked

    def versions(self) -> dict[str, int]:
        """By uid, the optimizer steps that the experts had taken that answered."""
        return {part.uid: part.answer.version for part in self.answered if part.answer is not None}

    def lines(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Row and expert of every line of the outputs."""
        # on the CPU whatever torch.set_default_device says, as everything here
        empty = torch.empty(0, dtype=torch.int64, device="cpu")
        rows = torch.cat([empty, *(part.rows for part in self.answered)])
        sizes = torch.tensor([part.num_rows for part in self.answered], dtype=torch.int64, device="cpu")
        experts = torch.tensor([part.expert for part in self.answered], dtype=torch.int64, device="cpu")
        return rows, experts.repeat_interleave(sizes)

    # ---------------------------------------------------------------------------------------------- backward

    async def backward(
        self, inputs: Sequence[torch.Tensor], output_grads: Sequence[torch.Tensor | None]
    ) -> list[torch.Tensor | None]:
        """The sum of the gradients of the experts that answer in time.

        Raises: NotEnoughExperts if a row gets fewer than `backward_k_min` of them.
        """
        if all(grad is None for grad in output_grads) or not self.answered:
            return [None] * len(inputs)
        self._shared.node.check_running()
        inputs = [tensor.cpu() for tensor in inputs]
        output_grads = [None if grad is None else grad.cpu() for grad in output_grads]
        loop = asyncio.get_running_loop()
        tasks: dict[asyncio.Task[list[torch.Tensor | None]], Part] = {}
        asked = np.zeros(len(self.num_answers), dtype=np.int64)
        slices: dict[int, slice] = {}
        start = 0
        for part in self.answered:
            lines = slices[part.expert] = slice(start, start + part.num_rows)
            start = lines.stop
            grads = [None if grad is None else grad[lines] for grad in output_grads]
            tasks[loop.create_task(self._ask_backward(part, inputs, grads))] = part
            asked[part.rows.numpy()] += 1
        try:
            with self._shared.stalls.watching():
                results, errors = await self._collect(tasks, asked)
        finally:
            await cancel_all(tasks)
        got = np.zeros_like(asked)
        for part, _ in results:
            got[part.rows.numpy()] += 1
        short = int((got < np.minimum(asked, self._settings.backward_k_min)).sum())
        if short:
            raise NotEnoughExperts(self._settings.backward_k_min, short, errors, what="gradients")
        sums = self._sum(inputs, results)
        return self._rescaled(sums, [slices[part.expert] for part, _ in results])

    async def _collect(
        self, tasks: dict[asyncio.Task[list[torch.Tensor | None]], Part], asked: Indices
    ) -> tuple[list[tuple[Part, list[torch.Tensor | None]]], dict[str, BaseException]]:
        """What arrives in time: until all have answered, or all rows have enough and the rest takes too long."""
        loop = asyncio.get_running_loop()
        started = loop.time()
        deadline = started + self._settings.backward_timeout + GRACE_SECONDS
        needed = np.minimum(asked, self._settings.backward_k_min)
        got = np.zeros_like(asked)
        results: list[tuple[Part, list[torch.Tensor | None]]] = []
        errors: dict[str, BaseException] = {}
        seconds: list[float] = []
        book = self._shared.latencies
        expected = {part.uid: book.usual((part.uid, "backward")) for part in tasks.values()}
        patience = self._patience("backward")
        stalled = self._shared.stalls.seconds
        timeout = self._settings.backward_timeout
        grace = {
            # of several that claim to be the primary, those that are silent are found out within that time
            uid: self._grace("backward", book.is_new((uid, "backward")) or len(rivals) > 1, timeout)
            for uid, rivals in ((p.uid, [r for r in p.replicas if r.primary]) for p in tasks.values())
        }

        def usual() -> Usual | None:
            return Usual.of([part for part, _ in results], seconds, len(tasks) - len(errors))

        waiting = dict.fromkeys(tasks)
        endings: Endings[list[torch.Tensor | None]] = Endings()
        for task in tasks:
            endings.add(task)

        def give_up_at() -> float:
            if (got < needed).any():
                return deadline
            now_usual = usual()
            late_at = (
                patience_limit(usual_seconds(part, now_usual, expected[part.uid]), patience) + grace[part.uid]
                for part in map(tasks.__getitem__, waiting)
            )
            return min(deadline, started + self._shared.stalls.seconds - stalled + max(late_at))

        while waiting:
            done = await endings.wait(give_up_at())
            if not done and give_up_at() <= loop.time():
                break
            for task in done:
                del waiting[task]
                part, error = tasks[task], task.exception()
                if error is None:
                    got[part.rows.numpy()] += 1
                    results.append((part, task.result()))
                    seconds.append(loop.time() - started)
                    book.observe((part.uid, "backward"), seconds[-1])
                elif isinstance(error, TesseractError | TimeoutError):
                    errors[part.uid] = _without_frames(error)
                else:
                    raise error
        if waiting:
            book.grace["backward"].spend()
        else:
            book.grace["backward"].earn(loop.time() - started)
        taken = [(part, s) for (part, _), s in zip(results, seconds, strict=True)]
        at_last = usual()
        for task in waiting:
            part = tasks[task]
            taken.append((part, loop.time() - started))
            book.observe((part.uid, "backward"), taken[-1][1], answered=False)
            errors[part.uid] = TimeoutError(f"{part.uid} sent no gradient in time")
        for part, s in taken:
            if (may_take_s := usual_seconds(part, at_last, expected[part.uid])) is not None:
                book.lateness["backward"].observe(s, may_take_s)
        self._shared.left_out.note("backward", errors)
        return results, errors

    async def _ask_backward(
        self, part: Part, inputs: Sequence[torch.Tensor], grads: Sequence[torch.Tensor | None]
    ) -> list[torch.Tensor | None]:
        chosen = [tensor.index_select(0, part.rows) for tensor in inputs]

        call_id = new_name()
        assert part.answer is not None
        answer = part.answer

        def attempt(peer: Any, timeout: float) -> Awaitable[list[torch.Tensor | None]]:
            return call_backward(
                self._shared.node, part.forward, peer, chosen, grads, answer=answer, call_id=call_id, timeout=timeout
            )

        async def find() -> Sequence[Any]:
            return await self._shared.node.directory.find(part.uid)

        timeout = self._settings.backward_timeout
        result = await ask_primary(self._shared, part.replicas, find, attempt, timeout=timeout)
        if not are_finite(result):
            raise ExpertFailed(f"{part.uid} answered gradients that are not finite")
        return result

    def _sum(
        self, inputs: Sequence[torch.Tensor], results: Sequence[tuple[Part, list[torch.Tensor | None]]]
    ) -> list[torch.Tensor | None]:
        """For every input the sum of its gradients, in an order that does not depend on who answered first."""
        sums: list[torch.Tensor | None] = [None] * len(inputs)
        for part, grads in sorted(results, key=lambda result: result[0].expert):
            for i, grad in enumerate(grads):
                if grad is not None:
                    if (total := sums[i]) is None:
                        total = sums[i] = torch.zeros_like(inputs[i])
                    total.index_add_(0, part.rows, grad)
        return sums

    def _rescaled(self, sums: list[torch.Tensor | None], survivors: Sequence[slice]) -> list[torch.Tensor | None]:
        """Each row's gradient divided by the weight of those experts whose gradients arrived, if it is asked for."""
        if not self._settings.rescale_backward or self.weights is None:
            return sums
        rows, _ = self.lines()
        arrived = self.weights.new_zeros(len(rows))
        for lines in survivors:
            arrived[lines] = self.weights[lines]
        share = arrived.new_zeros(len(self.num_answers)).index_add_(0, rows, arrived)
        # a row that lost nearly all of its weight is not blown up to noise
        scale = 1 / share.clamp(min=0.05)
        return [
            None if total is None else total * scale.to(total.dtype).reshape(-1, *[1] * (total.dim() - 1))
            for total in sums
        ]


def _without_frames(error: BaseException) -> BaseException:
    """The error without its traceback, whose frames hold the call that keeps the error: such a cycle, with all the
    tensors of a batch in it, would stay until the collector comes by."""
    link: BaseException | None = error
    while link is not None:
        link.__traceback__ = None
        link = link.__cause__ or link.__context__
    return error
