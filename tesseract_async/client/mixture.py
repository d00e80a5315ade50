"""The weighted sum of many experts' answers as one remote call: what its messages hold, and what becomes of the sums.

An expert's *value* for a row is an entry of a matrix, or the sum of some, as a gate's scores are. For a normalized sum
the weight is the exponential of the value. Weights leave before it is known who will answer: those of a message are
relative to the greatest value that it has for the row, and the caller divides by the weights of those that answered.
Otherwise the value is the weight.

Both directions end within their timeouts, whatever peers do. Suffixes of names: R rows, L lines (a row and an expert
that answered it), P the pairs of a message.
"""

import asyncio
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from tesseract_async.client.arguments import with_absent
from tesseract_async.client.dispatch import BackwardDispatch, CallsUnderWay, ExpertCall, ForwardDispatch
from tesseract_async.client.exchanges import eligible
from tesseract_async.client.experience import Experience, replica_key
from tesseract_async.client.expert_rpc import CallMode, ExpertSchema, Forward, Receipt, fetch_info
from tesseract_async.client.grid_search import GridSearch
from tesseract_async.client.grouping import Request, may_pass
from tesseract_async.client.passes import OptionalTensors, Pass, RowBlock, Values
from tesseract_async.client.routing import Indices
from tesseract_async.client.settings import MixtureSettings
from tesseract_async.errors import InputsForgotten, TesseractError, TooStale, describe
from tesseract_async.experts.grid import ExpertReplica
from tesseract_async.runtime.encoding import pack
from tesseract_async.wire.apply import ApplyPart, ApplyRequest
from tesseract_async.wire.names import new_name
from tesseract_async.wire.tensors import TensorSpec

_MAX_GAP: Final = 30.0
"""Weights in a message are not smaller than the exponential of minus this: all are well within float32."""


@dataclass(slots=True, eq=False)
class _Answer:
    block: RowBlock
    replica: ExpertReplica
    version: int


class MixtureCall:
    """See `autograd.Remote`. The inputs are those of the experts, and last the matrix of the values, ``[rows, ...]``.

    The outputs are the sums, one for each output of the experts, at least float32, and last the sum of the weights of
    those that answered each row, ``[rows]``; of weights relative to the row's greatest value if it is normalized: then
    the sums count as divided by it, and in no other way may a loss depend on it.
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
        self.top_R: Values = np.empty(0)
        """The greatest value of a row, which the weights are relative to; minus infinity for a row without answers."""
        self.weights_R: Values = np.empty(0)
        """The last output."""
        self.answers: dict[ExpertCall, _Answer] = {}
        self.ids: dict[ExpertCall, bytes] = {}
        """The ids by which servers know calls, until their backward begins: a second one gets new ids."""
        self._search, self._absent = search, absent

    @property
    def versions(self) -> dict[str, int]:
        """By uid, the optimizer steps that the experts had taken that answered."""
        return {call.uid: answer.version for call, answer in self.answers.items()}

    async def forward(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """See `MixtureCall`. Raises: NotEnoughExperts where the dispatch says so."""
        device = inputs[0].device
        forward = _ForwardPass(self, self._all(inputs), inputs[-1].cpu())
        await forward.run(None if self._search is None else self._find_more)
        self.answers = {call: forward.answers[call] for call in self.dispatch.answers}
        self.top_R, self.weights_R = forward.top_R, forward.weights_R
        return [total.to(device) for total in (*forward.sums, torch.from_numpy(forward.weights_R.copy()))]

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
        backward = _BackwardPass(self, self._all(inputs), inputs[-1].cpu(), gradients)
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

    def values(self, matrix: Values, rows: Indices, experts: Indices) -> Values:
        """The values of these experts (among the candidates) for these rows."""
        columns = self.dispatch.candidates.grid.columns_ND.numpy()[experts]
        values: Values = matrix[rows[:, None], columns].sum(1)
        return values


class _ForwardPass(Pass):
    what = "numbers"

    def __init__(self, call: MixtureCall, inputs: OptionalTensors, values: torch.Tensor) -> None:
        """`inputs` and `values`: see `MixtureCall`; on the CPU."""
        super().__init__(
            call.experience,
            call.dispatch,
            schema=call.schema,
            mode=call.mode,
            options=call.settings.calls,
            timeout=call.settings.forward_timeout,
        )
        self._call, self._inputs = call, inputs
        self._matrix: Values = np.nan_to_num(values.numpy(), posinf=1e30, neginf=-1e30)
        num_rows = len(self._matrix)
        specs = [TensorSpec(spec.shape, _sum_dtype(spec.dtype)) for spec in call.schema.output_specs]
        self.reply_specs = specs
        self.sums = [torch.zeros(num_rows, *spec.least_shape, dtype=spec.dtype, device="cpu") for spec in specs]
        self.weights_R: Values = np.zeros(num_rows, dtype=self._matrix.dtype)
        self.top_R: Values = np.full(num_rows, -np.inf, dtype=self._matrix.dtype)
        self.answers: dict[ExpertCall, _Answer] = {}
        self._audited: dict[ExpertCall, bool] = {}

    def rank(self, call: ExpertCall, found: Sequence[ExpertReplica] | None, now: float) -> Sequence[ExpertReplica]:
        """Return the replicas that are new enough; where a backward will follow, the primary first."""
        known = self.calls.candidates.replicas_of(call.expert)
        num_bytes = len(call.rows) * self.schema.row_bytes
        if found is None:
            self.experience.expect_forward(call, known, num_bytes, self._call.settings)
        replicas = eligible(call.uid, known if found is None else found, self.options.max_staleness)
        if len(replicas) < 2:
            return replicas
        return self.experience.by_expectation(replicas, now, num_bytes, primary_first=self.mode.differentiable)

    def key(self, call: ExpertCall, replica: ExpertReplica) -> Hashable:
        """An expert whose answer is audited is asked apart: of a sum nobody could say who was wrong."""
        server = replica.peer.peer_id or replica.peer
        if self.options.audit_share:
            if call not in self._audited:
                self._audited[call] = self.experience.audits.draws(self._forward(call))
            if self._audited[call]:
                return server, call
        return server

    async def pack(self, request: Request) -> tuple[RowBlock, ApplyRequest, Sequence[memoryview]]:
        versions = await self._least_versions(request)
        block = RowBlock.of(request.open, self.calls.candidates, len(self._matrix))
        values_P = self._call.values(self._matrix, block.rows_P, block.experts_P())
        if self._call.is_normalized:
            block.scales_R = np.full(len(block.rows), -np.inf, dtype=values_P.dtype)
            np.maximum.at(block.scales_R, block.numbers_P, values_P)
            gaps_P = values_P - block.scales_R[block.numbers_P]
            block.weights_P = np.exp(np.maximum(gaps_P, -_MAX_GAP)).astype(np.float32)
        elif self._audited.get(block.calls[0]):  # it is alone, and its answer is needed as it is
            block.weights_P, block.scales_R = np.ones(len(values_P), dtype=np.float32), values_P
        else:
            block.weights_P = values_P.astype(np.float32)
        metas, buffers = await pack(_rows_of(self._inputs, block.rows), self.codecs.inputs)
        asked = ApplyRequest(
            prefix=self.calls.candidates.prefix,
            experts=block.coords.astype(np.uint32),
            ids=[self._call.ids.setdefault(call, new_name()) for call in block.calls],
            versions=np.array([versions.get(call, 0) for call in block.calls], dtype=np.int64),
            offsets=block.offsets,
            rows=block.numbers_P.astype(np.int32),
            weights=block.weights_P,
            tensors=metas,
            num_inputs=len(metas),
            backward=False,
            training=self.mode.training,
            keep=self.mode.differentiable,
            seed=self.mode.seed,
            reply_codec=self.codecs.outputs,
        )
        return block, asked, buffers

    async def _least_versions(self, request: Request) -> dict[ExpertCall, int]:
        """The versions that followers have to have reached, by their primaries' word; those without it fail."""
        steps = self.options.max_staleness
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

    def settled(self, call: ExpertCall, replica: ExpertReplica, seconds: float, path: float) -> None:
        self.experience.latencies.observe(replica_key(replica), seconds, path=path)

    def cancelled(self, request: Request, now: float) -> None:
        """See `Pass.cancelled`: it would have taken at least this long."""
        book = self.experience.latencies
        for call, replica in request.open.items():
            key, path = (
                replica_key(replica),
                self.experience.path_seconds(replica, len(call.rows) * self.schema.row_bytes),
            )
            if now - request.sent > (book.expected(key, path=path) or 0.0):
                book.observe(key, now - request.sent, path=path, answered=False)

    def add(
        self, block: RowBlock, request: Request, part: ApplyPart, pairs: Indices, rows: Indices, sums: OptionalTensors
    ) -> None:
        factors, weights_P = np.ones(len(rows), dtype=self._matrix.dtype), block.weights_P[pairs]
        rows_P = block.rows_P[pairs]
        if block.scales_R is not None:
            scales = block.scales_R[np.searchsorted(block.rows, rows)]
            if self._call.is_normalized:
                # relative to the greatest value so far
                before = self.top_R[rows]
                self.top_R[rows] = top = np.maximum(before, scales)
                factors = np.exp(scales - top)
                grown = np.flatnonzero((before < scales) & (before > -np.inf))  # the others stay, or hold nothing yet
                if len(grown):
                    at, shrunk = rows[grown], np.exp(before[grown] - scales[grown])
                    self.weights_R[at] *= shrunk
                    for total in self.sums:
                        total[torch.from_numpy(at)] *= _factor(shrunk, total)
            else:
                factors = scales
        for total, partial in zip(self.sums, sums, strict=True):
            if partial is not None:
                total.index_add_(0, torch.from_numpy(rows), partial * _factor(factors, total))
        at = np.searchsorted(rows, rows_P)
        np.add.at(self.weights_R, rows_P, weights_P * factors[at])
        for place, version in zip(part.experts.tolist(), part.versions.tolist(), strict=True):
            call = block.calls[place]
            self.answers[call] = _Answer(block, request.asked[call], version)
            if self._audited.get(call):
                epoch = int(part.epochs[0])
                self.experience.audits.check(
                    self._forward(call),
                    Receipt(request.peer, version, None, epoch),
                    _rows_of(self._inputs, rows),
                    [
                        total.to(spec.dtype)
                        for total, spec in zip(sums, self.schema.output_specs, strict=True)
                        if total is not None
                    ],
                    timeout=self._timeout,
                )

    def _forward(self, call: ExpertCall) -> Forward:
        return Forward(call.uid, self.schema, self.mode, self.options)


class _BackwardPass(Pass):
    what = "gradients"

    def __init__(
        self, call: MixtureCall, inputs: OptionalTensors, values: torch.Tensor, gradients: OptionalTensors
    ) -> None:
        """`inputs`, `values` and `gradients` of the outputs: see `MixtureCall`; on the CPU."""
        patience = call.experience.patience("backward", call.settings)
        dispatch = BackwardDispatch(call.dispatch, settings=call.settings, patience=patience)
        super().__init__(
            call.experience,
            dispatch,
            schema=call.schema,
            mode=call.mode,
            options=call.settings.calls,
            timeout=call.settings.backward_timeout,
        )
        self._call, self._inputs = call, inputs
        self._matrix: Values = np.nan_to_num(values.numpy(), posinf=1e30, neginf=-1e30)
        self._gradients, self._values_dtype = gradients[:-1], values.dtype
        if call.is_normalized:
            # weights travel as shares of what answered, gradients as those of the average: a row whose best experts
            # all failed has tiny weights and huge gradients, which a codec or float32 may not hold
            self._gradients = [None if x is None else x * _factor(call.weights_R, x) for x in self._gradients]
        self._forward_calls = dispatch.forward_calls
        self.reply_specs = [
            TensorSpec(spec.shape, _sum_dtype(spec.dtype)) if x is not None and _is_differentiable(spec.dtype) else None
            for x, spec in zip(inputs, call.schema.input_specs, strict=True)
        ]
        self._ids: dict[ExpertCall, bytes] = {}
        self._totals: list[torch.Tensor | None] = [None] * len(self._inputs)
        self._pairs: list[tuple[Indices, Indices, Values, Values]] = []
        """Rows, experts, weights, and the weights' gradients: of each part."""
        self._arrived_R: Values = np.zeros(len(self._matrix))

    def rank(self, call: ExpertCall, found: Sequence[ExpertReplica] | None, now: float) -> Sequence[ExpertReplica]:
        if found is not None:
            return found
        known = self.calls.candidates.replicas_of(call.expert)
        self.experience.expect_backward(call, known, self._call.settings)
        self._ids[call] = self._call.ids.pop(self._forward_calls[call], b"") or new_name()
        return known

    def _kept_at(self, call: ExpertCall, replica: ExpertReplica) -> RowBlock | None:
        answer = self._call.answers[self._forward_calls[call]]
        return answer.block if answer.block.kept is not None and answer.replica.peer == replica.peer else None

    def key(self, call: ExpertCall, replica: ExpertReplica) -> Hashable:
        """See `Grouping`: calls that refer to one block go together."""
        return replica.peer.peer_id or replica.peer, self._kept_at(call, replica)

    async def pack(self, request: Request) -> tuple[RowBlock, ApplyRequest, Sequence[memoryview]]:
        block = RowBlock.of(request.open, self.calls.candidates, len(self._matrix))
        kept = self._kept_at(*next(iter(request.open.items())))
        if kept is not None:
            block.rows, block.numbers_P = kept.rows, np.searchsorted(kept.rows, block.rows_P)
        weights_P = self._call.values(self._matrix, block.rows_P, block.experts_P())
        if self._call.is_normalized:
            scales_P = self._scales(block)
            gaps_P = np.maximum(weights_P - scales_P, -_MAX_GAP) + scales_P - self._call.top_R[block.rows_P]
            weights_P = np.exp(gaps_P) / self._call.weights_R[block.rows_P]
        block.weights_P = weights_P.astype(np.float32)
        inputs = [] if kept is not None else _rows_of(self._inputs, block.rows)
        rows = torch.from_numpy(block.rows)
        gradients = [
            None if gradient is None else gradient.index_select(0, rows).to(spec.dtype)
            for gradient, spec in zip(self._gradients, self.schema.output_specs, strict=True)
        ]
        codecs: str | list[str] = self.codecs.gradients
        if inputs and self.codecs.inputs != codecs:
            codecs = [self.codecs.inputs] * len(inputs) + [self.codecs.gradients] * len(gradients)
        metas, buffers = await pack([*inputs, *gradients], codecs)
        answers = self._call.answers
        asked = ApplyRequest(
            prefix=self.calls.candidates.prefix,
            experts=block.coords.astype(np.uint32),
            ids=[self._ids[call] for call in block.calls],
            versions=np.array([answers[self._forward_calls[call]].version for call in block.calls], dtype=np.int64),
            offsets=block.offsets,
            rows=block.numbers_P.astype(np.int32),
            weights=block.weights_P,
            tensors=metas,
            num_inputs=len(inputs),
            backward=True,
            training=self.mode.training,
            keep=False,
            seed=self.mode.seed,
            reply_codec=self.codecs.gradients,
            kept=None if kept is None else kept.kept,
        )
        return block, asked, buffers

    def _scales(self, block: RowBlock) -> Values:
        """Return the unit of the weights in the forward's message, for each pair of `block`."""
        forward, each = self._forward_calls, self._call.answers
        sent = [each[forward[call]].block for call in block.calls]
        parts = [(one, call.rows) for one, call in zip(sent, block.calls, strict=True)]
        if all([one is sent[0] for one in sent]):  # nearly always
            parts = [(sent[0], block.rows_P)]
        found = []
        for one, rows in parts:
            assert one.scales_R is not None
            found.append(one.scales_R[np.searchsorted(one.rows, rows)])
        return np.concatenate(found)

    def failed(self, call: ExpertCall, replica: ExpertReplica, error: BaseException) -> None:
        if isinstance(error, InputsForgotten):
            self._call.answers[self._forward_calls[call]].block.kept = None
        super().failed(call, replica, error)

    def add(
        self, block: RowBlock, request: Request, part: ApplyPart, pairs: Indices, rows: Indices, sums: OptionalTensors
    ) -> None:
        at = torch.from_numpy(rows)
        for i, partial in enumerate(sums):
            if partial is not None:
                if (total := self._totals[i]) is None:
                    shape = (len(self._matrix), *partial.shape[1:])
                    total = self._totals[i] = torch.zeros(shape, dtype=partial.dtype, device="cpu")
                total.index_add_(0, at, partial)
        rows_P, weights_P = block.rows_P[pairs], block.weights_P[pairs]
        np.add.at(self._arrived_R, rows_P, weights_P)
        self._pairs.append((rows_P, block.experts_P()[pairs], weights_P, part.weight_gradients))

    def input_gradients(self) -> OptionalTensors:
        sums = self._totals
        if self._call.settings.rescale_backward:
            # a row that lost nearly all of its weight is not blown up to noise
            scale_R = 1 / np.maximum(self._arrived_R, 0.05)
            sums = [None if total is None else total * _factor(scale_R, total) for total in sums]
        pairs = zip(sums, self._inputs, strict=True)
        found = [None if total is None else total.to(x.dtype) for total, x in pairs if x is not None]
        return [*found, self._value_gradients()]

    def _value_gradients(self) -> torch.Tensor:
        found = torch.zeros(self._matrix.shape, dtype=self._values_dtype, device="cpu")
        if not self._pairs:
            return found
        rows_P, experts_P, weights_P, gradients_P = (np.concatenate(parts) for parts in zip(*self._pairs, strict=True))
        if self._call.is_normalized:
            # what experts answer by now is compared with the average of those that answered by now: by that of the
            # forward, experts that have learned meanwhile would all look better than those not chosen, and the gate
            # would choose ever fewer
            sum_R = np.bincount(rows_P, weights_P * gradients_P, minlength=len(self._matrix))
            average_R = sum_R / np.maximum(self._arrived_R, np.finfo(np.float32).tiny)
            gradients_P = weights_P * (gradients_P - average_R[rows_P])
        columns_PD = self.calls.candidates.grid.columns_ND[torch.from_numpy(experts_P)]
        found.index_put_(
            (torch.from_numpy(rows_P)[:, None], columns_PD),
            torch.from_numpy(gradients_P).to(found.dtype)[:, None].expand(columns_PD.shape),
            accumulate=True,
        )
        return found


def _rows_of(tensors: OptionalTensors, rows: Indices) -> OptionalTensors:
    """Return these rows of each; the tensors themselves where that is all of them."""
    if tensors[0] is not None and len(rows) == len(tensors[0]):
        return list(tensors)
    at = torch.from_numpy(rows)
    return [None if tensor is None else tensor.index_select(0, at) for tensor in tensors]


def _is_differentiable(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which experts' answers of `dtype` are summed up."""
    return dtype if dtype.is_complex else torch.promote_types(dtype, torch.float32)


def _factor(factor_R: Values, like: torch.Tensor) -> torch.Tensor:
    """A factor for each row, of the dtype and as many dimensions as `like`."""
    return torch.from_numpy(factor_R).to(like.dtype).reshape(-1, *[1] * (like.dim() - 1))
