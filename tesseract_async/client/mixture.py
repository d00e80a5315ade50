"""The weighted sum of many experts' answers as one remote call: which messages are sent, and what becomes of answers.

`passes` sends them and waits; `blocks` says what they hold. Both directions end within their timeouts, whatever peers
do.
"""

import asyncio
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tesseract_async.client.arguments import with_absent
from tesseract_async.client.blocks import OptionalTensors, RowBlock, Values, WeightedSums, rows_of
from tesseract_async.client.dispatch import BackwardDispatch, CallsUnderWay, ExpertCall, ForwardDispatch
from tesseract_async.client.exchanges import eligible
from tesseract_async.client.experience import Experience, replica_key
from tesseract_async.client.expert_rpc import CallMode, ExpertSchema, Forward, Receipt, fetch_info
from tesseract_async.client.grid_search import GridSearch
from tesseract_async.client.grouping import Request, may_pass
from tesseract_async.client.passes import PartSums, Pass
from tesseract_async.client.routing import Indices
from tesseract_async.client.settings import MixtureSettings
from tesseract_async.errors import InputsForgotten, TesseractError, TooStale, describe
from tesseract_async.experts.grid import ExpertReplica
from tesseract_async.runtime.gradients import per_row
from tesseract_async.wire.apply import ApplyPart
from tesseract_async.wire.tensors import TensorSpec


@dataclass(slots=True, eq=False)
class _Answer:
    block: RowBlock
    place: int
    """The place of its call in the block."""
    replica: ExpertReplica
    version: int


class MixtureCall:
    """See `autograd.Remote`. The inputs are those of the experts, followed by the matrix of the values, ``[rows,
    ...]``.

    The outputs are the sums, one for each output of the experts, at least float32, followed by the sum of the weights
    of those that answered each row, ``[rows]``. Those of a normalized sum are in a unit of the row's own: a loss may
    depend only on the sums divided by the sum of the weights.
    """

    def __init__(
        self,
        dispatch: CallsUnderWay,
        experience: Experience,
        *,
        schema: ExpertSchema,
        mode: CallMode,
        settings: MixtureSettings,
        is_normalized: bool,
        search: GridSearch | None = None,
        absent: Sequence[int] = (),
    ) -> None:
        """`search`: looks for further experts where rows are in need of them. `absent`: the places of optional inputs
        that are None."""
        self.timeout = settings.backward_timeout
        self.dispatch, self.experience = dispatch, experience
        self.schema, self.mode, self.settings = schema, mode, settings
        self.is_normalized = is_normalized
        self.total: WeightedSums | None = None
        """The forward's, without the sums themselves: the weights that they are divided by."""
        self.answers: dict[ExpertCall, _Answer] = {}
        self._search, self._absent = search, absent

    @property
    def versions(self) -> dict[str, int]:
        """The optimizer steps, by uid, of the experts that answered."""
        return {call.uid: answer.version for call, answer in self.answers.items()}

    async def forward(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """See `MixtureCall`. Raises: NotEnoughExperts where the dispatch says so."""
        device = inputs[0].device
        forward = _ForwardPass(self, self._all(inputs), inputs[-1].cpu())
        await forward.run(None if self._search is None else self._find_more)
        self.answers = {call: forward.answers[call] for call in self.dispatch.answers}
        self.total = forward.total
        sums, self.total.sums = self.total.sums, []
        return [one.to(device) for one in (*sums, torch.from_numpy(self.total.weights_R.copy()))]

    async def backward(
        self, inputs: Sequence[torch.Tensor], output_gradients: Sequence[torch.Tensor | None]
    ) -> OptionalTensors:
        """The gradients of the inputs, and of the values: of the experts that answer in time.

        Raises: NotEnoughExperts if a row gets fewer than it needs.
        """
        if all(gradient is None for gradient in output_gradients[:-1]) or not self.answers:
            return [None] * len(inputs)
        self.experience.node.check_running()
        gradients = [None if gradient is None else gradient.cpu() for gradient in output_gradients]
        backward = _BackwardPass(self, self._all(inputs), inputs[-1], gradients)
        await backward.run()
        return backward.input_gradients()

    def _all(self, inputs: Sequence[torch.Tensor]) -> OptionalTensors:
        """The experts' inputs, with those that are absent."""
        return with_absent([tensor.cpu() for tensor in inputs[:-1]], self._absent)

    async def _find_more(self, rows: torch.Tensor) -> None:
        """Look for experts for these rows (see `CallsUnderWay.rows_in_need`) and tell the dispatch. If all that failed
        said no themselves, only experts that are there already help."""
        dispatch = self.dispatch
        assert self._search is not None and isinstance(dispatch, ForwardDispatch)
        errors = dispatch.errors.values()
        candidates, experts = await self._search.more(dispatch, rows, wait=not errors or any(map(may_pass, errors)))
        dispatch.came(candidates, experts)


class _ForwardPass(Pass):
    what = "numbers"

    def __init__(self, call: MixtureCall, inputs: OptionalTensors, values: torch.Tensor) -> None:
        """`inputs` and `values`: see `MixtureCall`; on the CPU."""
        super().__init__(call.experience, call.dispatch, schema=call.schema, mode=call.mode, settings=call.settings)
        self._call, self._inputs = call, inputs
        self._matrix: Values = np.nan_to_num(values.numpy(), posinf=1e30, neginf=-1e30)
        specs = [TensorSpec(spec.shape, _sum_dtype(spec.dtype)) for spec in call.schema.output_specs]
        self.reply_specs = specs
        shapes = [(len(self._matrix), *spec.least_shape) for spec in specs]
        sums = [torch.zeros(shape, dtype=spec.dtype, device="cpu") for shape, spec in zip(shapes, specs, strict=True)]
        self.total = WeightedSums(sums, self._matrix.dtype, is_normalized=call.is_normalized)
        self.answers: dict[ExpertCall, _Answer] = {}
        self._audited: dict[ExpertCall, bool] = {}

    def rank(self, call: ExpertCall, found: Sequence[ExpertReplica] | None, now: float) -> Sequence[ExpertReplica]:
        """Return the replicas that are new enough; where a backward will follow, the primary first."""
        known = self.calls.candidates.replicas_of(call.expert)
        num_bytes = len(call.rows) * self.schema.row_bytes
        if found is None:
            self.experience.expect_forward(call, known, num_bytes, self.settings)
        replicas = eligible(call.uid, known if found is None else found, self.settings.calls.max_staleness)
        if len(replicas) < 2:
            return replicas
        return self.experience.by_expectation(replicas, now, num_bytes, primary_first=self.mode.differentiable)

    def key(self, call: ExpertCall, replica: ExpertReplica) -> Hashable:
        """An expert whose answer is audited is asked separately: in a sum, nobody could say who was wrong."""
        server = replica.peer.peer_id or replica.peer
        if self.settings.calls.audit_share:
            if call not in self._audited:
                self._audited[call] = self.experience.audits.draws(self._forward(call))
            if self._audited[call]:
                return server, call
        return server

    async def pack(self, request: Request) -> tuple[RowBlock, OptionalTensors, OptionalTensors]:
        versions = await self._least_versions(request)
        block = RowBlock.of(request.open, self.calls.candidates, len(self._matrix))
        is_audited = self._audited.get(block.calls[0], False)
        block.weigh(self._matrix, self.calls.candidates, is_normalized=self._call.is_normalized, is_bare=is_audited)
        block.versions = [versions.get(call, 0) for call in block.calls]
        return block, rows_of(self._inputs, block.rows), []

    async def _least_versions(self, request: Request) -> dict[ExpertCall, int]:
        """The versions that followers have to have reached, by their primaries' word; those without it fail."""
        steps = self.settings.calls.max_staleness
        followers = [call for call, replica in request.open.items() if not replica.primary] if steps else []
        if not steps or not followers:
            return {}
        node, timeout = self.experience.node, max(self._deadline - asyncio.get_running_loop().time(), 1e-3)

        async def ask(call: ExpertCall) -> int | BaseException:
            replicas = self.calls.candidates.replicas_of(call.expert)
            try:
                primary = next(replica for replica in replicas if replica.primary)
                return (await fetch_info(node, call.uid, primary.peer, timeout=timeout)).version
            except (TesseractError, TimeoutError, StopIteration) as error:
                return TooStale(
                    f"how old the answer of a follower of {call.uid} is, its primary does not say: {describe(error)}"
                )

        newest = dict(zip(followers, await asyncio.gather(*map(ask, followers)), strict=True))
        errors = {call: error for call, error in newest.items() if isinstance(error, BaseException)}
        self._grouping.part(request, (), errors, asyncio.get_running_loop().time())
        return {call: max(0, newest - steps) for call, newest in newest.items() if isinstance(newest, int)}

    def cancelled(self, request: Request, now: float) -> None:
        """See `Pass.cancelled`: it would have taken at least this long."""
        experience, book, seconds = self.experience, self.experience.latencies, now - request.sent
        for call, replica in request.open.items():
            key, path = replica_key(replica), experience.path_seconds(replica, len(call.rows) * self.schema.row_bytes)
            if seconds > (book.expected(key, path=path) or 0.0):
                book.observe(key, seconds, path=path, answered=False)

    def add(self, request: Request, block: RowBlock, part: ApplyPart, own: PartSums) -> None:
        self.total.add(block, own.pairs, own.numbers, own.at_P, own.sums)
        experience, seconds = self.experience, asyncio.get_running_loop().time() - request.sent
        places = part.experts.tolist()
        first = request.asked[block.calls[places[0]]]
        path = experience.path_seconds(first, len(block.rows) * self.schema.row_bytes)
        for place, version in zip(places, part.versions.tolist(), strict=True):
            call = block.calls[place]
            replica = request.asked[call]
            experience.latencies.observe(replica_key(replica), seconds, path=path)
            self.answers[call] = _Answer(block, place, replica, version)
            if self._audited.get(call):
                outputs = [
                    x.to(spec.dtype)
                    for x, spec in zip(own.sums, self.schema.output_specs, strict=True)
                    if x is not None
                ]
                receipt = Receipt(request.peer, version, None, int(part.epochs[0]))
                inputs = rows_of(self._inputs, block.rows[own.numbers])
                experience.audits.check(self._forward(call), receipt, inputs, outputs, timeout=self.timeout)

    def _forward(self, call: ExpertCall) -> Forward:
        return Forward(call.uid, self.schema, self.mode, self.settings.calls)


class _BackwardPass(Pass):
    what = "gradients"

    def __init__(
        self, call: MixtureCall, inputs: OptionalTensors, values: torch.Tensor, gradients: OptionalTensors
    ) -> None:
        """`inputs`, `values` and `gradients` of the outputs: see `MixtureCall`; but for `values` on the CPU."""
        patience = call.experience.patience("backward", call.settings)
        dispatch = BackwardDispatch(call.dispatch, settings=call.settings, patience=patience)
        super().__init__(call.experience, dispatch, schema=call.schema, mode=call.mode, settings=call.settings)
        self._call, self._inputs = call, inputs
        assert call.total is not None
        self._values, self._total, self._gradients = values, call.total, gradients[:-1]
        if call.is_normalized:
            # weights travel as shares of what answered, gradients as those of the average: a row whose best experts
            # all failed has tiny weights and huge gradients, which a codec or float32 may not hold
            weights_R = torch.from_numpy(call.total.weights_R)
            self._gradients = [None if x is None else x * per_row(weights_R, x) for x in self._gradients]
        self._forward_calls = dispatch.forward_calls
        self.reply_specs = [
            TensorSpec(spec.shape, _sum_dtype(spec.dtype)) if x is not None and _is_differentiable(spec.dtype) else None
            for x, spec in zip(inputs, call.schema.input_specs, strict=True)
        ]
        self._totals: list[torch.Tensor | None] = [None] * len(self._inputs)
        self._pairs: list[tuple[Indices, Indices, Values, Values]] = []
        """Rows, experts, weights, and the weights' gradients: of each part."""
        self._weights: dict[RowBlock, Values] = {}
        """The final weights of the forward's messages."""

    def rank(self, call: ExpertCall, found: Sequence[ExpertReplica] | None, now: float) -> Sequence[ExpertReplica]:
        if found is not None:
            return found
        known = self.calls.candidates.replicas_of(call.expert)
        self.experience.expect_backward(call, known, self.settings)
        return known

    def _answer(self, call: ExpertCall) -> _Answer:
        """Return the answer that a call differentiates."""
        return self._call.answers[self._forward_calls[call]]

    def _kept_at(self, call: ExpertCall, replica: ExpertReplica) -> RowBlock | None:
        answer = self._answer(call)
        return answer.block if answer.block.kept is not None and answer.replica.peer == replica.peer else None

    def key(self, call: ExpertCall, replica: ExpertReplica) -> Hashable:
        """See `Grouping`: calls that refer to one block go together."""
        return replica.peer.peer_id or replica.peer, self._kept_at(call, replica)

    async def pack(self, request: Request) -> tuple[RowBlock, OptionalTensors, OptionalTensors]:
        block = RowBlock.of(request.open, self.calls.candidates, len(self._values))
        answers = [self._answer(call) for call in block.calls]
        kept = self._kept_at(*next(iter(request.open.items())))
        if kept is not None:
            block.rows, block.kept = kept.rows, kept.kept
            block.numbers_P = np.concatenate([kept.numbers_P[kept.pairs(answer.place)] for answer in answers])
        for sent in {answer.block for answer in answers} - self._weights.keys():
            self._weights[sent] = self._total.weights_of(sent)
        weights = [self._weights[answer.block][answer.block.pairs(answer.place)] for answer in answers]
        block.weights_P = np.concatenate(weights).astype(np.float32)
        block.versions = [answer.version for answer in answers]
        rows = torch.from_numpy(block.rows)
        gradients = [
            None if gradient is None else gradient.index_select(0, rows).to(spec.dtype)
            for gradient, spec in zip(self._gradients, self.schema.output_specs, strict=True)
        ]
        return block, [] if kept is not None else rows_of(self._inputs, block.rows), gradients

    def failed(self, call: ExpertCall, replica: ExpertReplica, error: BaseException) -> None:
        if isinstance(error, InputsForgotten):
            self._answer(call).block.kept = None
        super().failed(call, replica, error)

    def add(self, request: Request, block: RowBlock, part: ApplyPart, own: PartSums) -> None:
        rows, at_P = block.rows[own.numbers], own.at_P
        at = torch.from_numpy(rows)
        for i, partial in enumerate(own.sums):
            if partial is not None:
                if (total := self._totals[i]) is None:
                    shape = (len(self._values), *partial.shape[1:])
                    total = self._totals[i] = torch.zeros(shape, dtype=partial.dtype, device="cpu")
                total.index_add_(0, at, partial)
        experts_P, weights_P = block.experts_P()[own.pairs], block.weights_P[own.pairs]
        self._pairs.append((rows[at_P], experts_P, weights_P, part.weight_gradients))

    def input_gradients(self) -> OptionalTensors:
        """Return the gradients of the inputs and of the values, of what has answered."""
        num_rows, sums = len(self._values), self._totals
        if not self._pairs:
            return [*[None for x in self._inputs if x is not None], torch.zeros_like(self._values, device="cpu")]
        rows_P, experts_P, weights_P, gradients_P = (np.concatenate(parts) for parts in zip(*self._pairs, strict=True))
        arrived_R = np.bincount(rows_P, weights_P, minlength=num_rows)
        if self.settings.rescale_backward:
            # a row that lost nearly all of its weight is not blown up to noise
            scale_R = torch.from_numpy(1 / np.maximum(arrived_R, 0.05))
            sums = [None if total is None else total * per_row(scale_R, total) for total in sums]
        pairs = zip(sums, self._inputs, strict=True)
        found = [None if total is None else total.to(x.dtype) for total, x in pairs if x is not None]
        if self._call.is_normalized:
            # what experts answer by now is compared with the average of those that answered by now: by that of the
            # forward, experts that have learned meanwhile would all look better than those not chosen, and the gate
            # would choose ever fewer
            sum_R = np.bincount(rows_P, weights_P * gradients_P, minlength=num_rows)
            average_R = sum_R / np.maximum(arrived_R, np.finfo(np.float32).tiny)
            gradients_P = weights_P * (gradients_P - average_R[rows_P])
        columns_PD, width = self.calls.candidates.grid.columns_ND.numpy()[experts_P], self._values.shape[1]
        of_values = np.zeros(num_rows * width)
        for column in range(columns_PD.shape[1]):
            of_values += np.bincount(rows_P * width + columns_PD[:, column], gradients_P, minlength=len(of_values))
        return [*found, torch.from_numpy(of_values).to(self._values.dtype).view(num_rows, width)]


def _is_differentiable(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which experts' answers of `dtype` are summed up."""
    return dtype if dtype.is_complex else torch.promote_types(dtype, torch.float32)
