"""`GatingFunction`: a mixture layer over a grid of experts on other people's computers."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from tesseract_async.client.autograd import refuse_checkpoint, remote_call
from tesseract_async.client.beam_search import columns, expert_scores, top_k
from tesseract_async.client.expert_calls import REPLICA_FAULTS, CallOptions, ExpertSchema, fetch_schema
from tesseract_async.client.isolated import isolated
from tesseract_async.client.mixture import MixtureCall, MixtureSettings
from tesseract_async.client.ports import Node, View
from tesseract_async.client.remote_expert import NO_GRAD, RemoteExpert, Shared
from tesseract_async.errors import NotEnoughExperts, ProtocolError, RemoteError, SchemaMismatch
from tesseract_async.wire.tensors import describe_structure, flatten_like, unflatten

_NUM_SCHEMA_WITNESSES = 3


class GatingFunction(nn.Module):
    """Sends every row of its input to its `k_best` experts and averages their answers by their scores.

    The experts are those that live under ``uid_prefix`` in a grid of `grid_size`; `proj`, the only local parameter,
    scores all grid dimensions at once, and an expert's score is the sum over its coordinates. With a warm directory
    the chosen experts are exactly the best that live. All experts of a grid have one schema.

    ::

        gate = GatingFunction(node, uid_prefix="ffn", grid_size=(16, 16), in_features=1024, k_best=4)
        y = await gate(x)                   # x: [rows, 1024]
        experts = await gate.choose(x)      # for each row its best experts, best first

    Use on the node's loop only. Copies made with ``copy.deepcopy`` share the node.
    """

    def __init__(
        self,
        node: Node,
        uid_prefix: str,
        *,
        grid_size: Sequence[int],
        in_features: int,
        k_best: int = 4,
        k_min: int = 1,
        forward_timeout: float = 15.0,
        timeout_after_k_min: float = 1.0,
        backward_timeout: float = 15.0,
        backward_k_min: int = 0,
        on_missing: Literal["raise", "zero"] = "raise",
        priority: int = 0,
        codec: str = "none",
    ) -> None:
        """See `MixtureSettings` for the keyword arguments from `k_best` on. Does no I/O.

        Raises: ValueError for a grid, a number or a time-out that makes no sense.
        """
        super().__init__()
        self.uid_prefix = uid_prefix
        self.grid_size = tuple(int(size) for size in grid_size)
        if not self.grid_size or min(self.grid_size) < 1:
            raise ValueError(f"a grid has at least one dimension, and every size is positive: {self.grid_size}")
        self.settings = MixtureSettings(
            k_best=k_best,
            k_min=k_min,
            forward_timeout=forward_timeout,
            timeout_after_k_min=timeout_after_k_min,
            backward_timeout=backward_timeout,
            backward_k_min=backward_k_min,
            on_missing=on_missing,
            priority=priority,
            codec=codec,
        )
        self.proj = nn.Linear(in_features, sum(self.grid_size))
        self._shared = _GateShared(node)

    def extra_repr(self) -> str:
        """Prefix and grid, for ``repr``."""
        return f"{self.uid_prefix}, grid_size={self.grid_size}, k_best={self.settings.k_best}"

    def choose(self, x: torch.Tensor) -> Awaitable[list[list[RemoteExpert]]]:
        """For each row of `x` (``[rows, in_features]``) its best live experts, best first; await it.

        A row gets fewer than `k_best` only where fewer live. Raises: as `forward`, NotEnoughExperts if none lives.
        """
        self._check(x)
        with torch.no_grad():
            scores_RS = self.proj(x)
        return isolated(self._choose(scores_RS), modes=NO_GRAD)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Awaitable[Any]:
        """The mixture of the chosen experts' answers for every row of `x`; await it.

        `x`: ``[rows, in_features]``, which is scored and is also the experts' first argument; further arguments go to
        the experts beside it, row by row. Experts that fail or are slow are left out, and weights are renormalised over
        those that answered. Reads grad mode, autocast and `training` now, not when awaited.

        Raises at once: SchemaMismatch if `x` does not fit `in_features`; RuntimeError inside torch.utils.checkpoint.
        The awaitable raises: SchemaMismatch before anything is sent, if the arguments do not fit the experts' schema;
        NotEnoughExperts, which lists who failed and why.
        """
        refuse_checkpoint()
        self._check(x)
        differentiable = torch.is_grad_enabled()
        scores_RS = self.proj(x).float() if not x.dtype == torch.float64 else self.proj(x)
        seed = int(torch.randint(2**62, ())) if self.training else 0
        return isolated(self._mix(scores_RS, (x, *args), kwargs, differentiable, self.training, seed), modes=NO_GRAD)

    def _check(self, x: torch.Tensor) -> None:
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"the gate takes a tensor, not a {type(x).__name__}")
        if x.dim() != 2 or x.shape[1] != self.proj.in_features:
            wanted = f"(float32[rows, {self.proj.in_features}])"
            raise SchemaMismatch(f"the gate {self.uid_prefix} takes {wanted}; got {describe_structure((x,))}")

    # ---------------------------------------------------------------------------------------------- choosing

    async def _choose(self, scores_RS: torch.Tensor) -> list[list[RemoteExpert]]:
        view = await self._live_view()
        if not len(view.coords):
            raise NotEnoughExperts(self.settings.k_min, len(scores_RS), {})
        best = top_k(_sound(scores_RS), view.coords, self.grid_size, self.settings.k_best).numpy()
        experts = np.empty(len(view.coords), dtype=object)
        for index in np.unique(best).tolist():
            experts[index] = self._shared.expert(self.uid_prefix, view, index)
        chosen: list[list[RemoteExpert]] = experts[best].tolist()
        return chosen

    async def _live_view(self) -> View:
        """The grid's live experts. Raises: NotEnoughExperts if the directory does not get warm in time."""
        directory = self._shared.node.directory
        view = directory.live(self.uid_prefix)
        if view is None:
            directory.watch(self.uid_prefix, self.grid_size)
            try:
                async with asyncio.timeout(self.settings.forward_timeout):
                    await directory.wait_warm(self.uid_prefix)
            except TimeoutError:
                cold = TimeoutError("the grid's directory could not be read in time")
                raise NotEnoughExperts(self.settings.k_min, 0, {self.uid_prefix: cold}) from None
            view = directory.live(self.uid_prefix)
        assert view is not None
        live: View = view
        return live

    # ---------------------------------------------------------------------------------------------- mixing

    async def _mix(
        self,
        scores_RS: torch.Tensor,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        differentiable: bool,
        training: bool,
        seed: int,
    ) -> Any:
        view = await self._live_view()
        num_rows = len(scores_RS)
        sound_RS = _sound(scores_RS)
        schema = await self._schema(sound_RS, view)
        inputs = flatten_like(schema.inputs, (args, kwargs), what=f"the experts of {self.uid_prefix}")
        call = MixtureCall(
            self._shared.node,
            view,
            prefix=self.uid_prefix,
            schema=schema,
            grid_size=self.grid_size,
            scores=sound_RS,
            settings=self.settings,
            training=training,
            seed=seed,
        )
        answers = await remote_call(call, inputs, differentiable=differentiable)
        rows_P, experts_P = (index.to(scores_RS.device) for index in call.pairs())
        columns_ND = columns(view.coords, self.grid_size).to(scores_RS.device)
        enough_R = torch.from_numpy(call.num_answers >= max(1, self.settings.k_min)).to(scores_RS.device)
        with torch.set_grad_enabled(differentiable):
            weights_P = _softmax_by_row(expert_scores(scores_RS, rows_P, experts_P, columns_ND), rows_P, num_rows)
            weights_P = weights_P * enough_R[rows_P]
            outputs = [_weighted_sum(weights_P, answer, rows_P, num_rows) for answer in answers]
        return unflatten(schema.outputs, outputs)

    async def _schema(self, scores_RS: torch.Tensor, view: View) -> ExpertSchema:
        """What the experts of this grid take and give: the word of most of the first few that are asked."""
        if self._shared.schema is None:
            if not len(view.coords):
                raise NotEnoughExperts(self.settings.k_min, len(scores_RS), {})
            best = top_k(scores_RS[:1], view.coords, self.grid_size, len(view.coords)).reshape(-1).tolist()
            if not best:
                best = list(range(len(view.coords)))
            self._shared.schema = await self._ask_for_schema(view, best)
        return self._shared.schema

    async def _ask_for_schema(self, view: View, experts: list[int]) -> ExpertSchema:
        errors: dict[str, BaseException] = {}
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.settings.forward_timeout
        for start in range(0, len(experts), _NUM_SCHEMA_WITNESSES):
            left = deadline - loop.time()
            if left <= 0:
                break
            asked = [
                self._shared.expert(self.uid_prefix, view, i) for i in experts[start : start + _NUM_SCHEMA_WITNESSES]
            ]
            # half of the time is kept for the next ones, should these be silent
            told = await asyncio.gather(*(self._ask_one(expert, left / 2) for expert in asked), return_exceptions=True)
            schemas = Counter[str]()
            by_text: dict[str, ExpertSchema] = {}
            for expert, answer in zip(asked, told, strict=True):
                if isinstance(answer, ExpertSchema):
                    schemas[repr(answer.inputs) + repr(answer.outputs)] += 1
                    by_text.setdefault(repr(answer.inputs) + repr(answer.outputs), answer)
                elif isinstance(answer, RemoteError | TimeoutError | ProtocolError | OSError) or (
                    isinstance(answer, REPLICA_FAULTS)
                ):
                    errors[expert.uid] = answer
                else:
                    raise answer
            if schemas:
                return by_text[schemas.most_common(1)[0][0]]
        raise NotEnoughExperts(self.settings.k_min, 0, errors)

    async def _ask_one(self, expert: RemoteExpert, timeout: float) -> ExpertSchema:
        replica = (await expert.find())[0]
        try:
            async with asyncio.timeout(timeout):
                return await fetch_schema(self._shared.node, expert.uid, replica.peer, timeout=timeout)
        except REPLICA_FAULTS:
            self._shared.node.directory.report_failure(replica)
            raise


class _GateShared(Shared):
    """What the copies of a gate share: the node, the schema, and one RemoteExpert per uid."""

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self.schema: ExpertSchema | None = None
        self._experts: dict[tuple[int, ...], RemoteExpert] = {}

    def expert(self, prefix: str, view: View, index: int) -> RemoteExpert:
        """The expert at this row of the view's coordinates, made once."""
        coords = tuple(view.coords[index].tolist())
        expert = self._experts.get(coords)
        if expert is None:
            uid = ".".join((prefix, *map(str, coords)))
            expert = RemoteExpert(self.node, uid, schema=self.schema, options=CallOptions())
            self._experts[coords] = expert
        return expert


def _sound(scores_RS: torch.Tensor) -> torch.Tensor:
    """The scores as choosing takes them: on the CPU, outside of the graph, NaN last."""
    return torch.nan_to_num(scores_RS.detach().cpu(), nan=-1e30, posinf=1e30, neginf=-1e30)


def _softmax_by_row(scores_P: torch.Tensor, rows_P: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Softmax over the pairs of each row."""
    top_R = scores_P.new_full((num_rows,), -torch.inf).scatter_reduce(0, rows_P, scores_P.detach(), "amax")
    exp_P = (scores_P - top_R[rows_P]).exp()
    return exp_P / scores_P.new_zeros(num_rows).index_add(0, rows_P, exp_P)[rows_P]


def _weighted_sum(
    weights_P: torch.Tensor, answers_P: torch.Tensor, rows_P: torch.Tensor, num_rows: int
) -> torch.Tensor:
    """For each row the sum of its answers, weighted; ``[num_rows, ...]``. Rows without answers get zeros."""
    weights = weights_P.reshape(-1, *[1] * (answers_P.dim() - 1)).to(answers_P.dtype)
    return answers_P.new_zeros(num_rows, *answers_P.shape[1:]).index_add(0, rows_P, weights * answers_P)
