"""`GatingFunction`: a mixture layer over a grid of experts on other people's computers."""

from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, Self

import numpy as np
import torch

from tesseract_async.client.arguments import Arguments, present
from tesseract_async.client.audits import Audits
from tesseract_async.client.dispatch import ForwardDispatch
from tesseract_async.client.experience import experience_of
from tesseract_async.client.gate import Gate, Mixed, sound
from tesseract_async.client.grid_search import GridSearch
from tesseract_async.client.isolated import NO_GRAD, isolated
from tesseract_async.client.mixture import MixtureCall
from tesseract_async.client.ports import Node, PlainCalls, deliver
from tesseract_async.client.remote_call import refuse_wrappers, remote_call, uncompiled
from tesseract_async.client.remote_expert import RemoteExpert
from tesseract_async.client.routing import uid_at
from tesseract_async.client.schema_vote import SchemaVote
from tesseract_async.client.settings import MixtureSettings, check_max_staleness
from tesseract_async.errors import NotEnoughExperts, SchemaMismatch
from tesseract_async.wire.tensors import Structure, describe_schema


def _nothing_chosen() -> dict[bool, dict[tuple[int, ...], RemoteExpert]]:
    return {True: {}, False: {}}


class GatingFunction(Gate):
    """Sends every row of its input to its `k_best` experts and averages their answers by their scores.

    The experts are those that live under ``uid_prefix`` in a grid of `grid_size`; `proj`, the only local parameters,
    scores all grid dimensions at once, and an expert's score is the sum over its coordinates. With a warm directory
    the chosen experts are exactly the best that live. All experts of a grid have one schema. (Product-key gating:
    Lample et al. 2019, as in section 3.1 of Ryabinin & Gusev 2020.)

    ::

        gate = GatingFunction(node, uid_prefix="ffn", grid_size=(16, 16), in_features=1024, k_best=4)
        y = await gate(x)                   # x: [rows, 1024]
        experts = await gate.choose(x)      # for each row its best experts, best first

    Sequences ``[rows, length, features]`` are routed as a whole, by their mean (the experts then take ``[length,
    features]`` for a row), or token by token (`route`).

    Use on the node's loop only. Copies made with ``copy.deepcopy`` share the node and what was learned about experts.
    """

    def __init__(
        self,
        node: Node | PlainCalls,
        *,
        uid_prefix: str,
        grid_size: Sequence[int],
        in_features: int,
        k_best: int = 4,
        k_min: int = 1,
        route: Literal["sample", "token"] = "sample",
        settings: MixtureSettings | None = None,
    ) -> None:
        """Does no I/O.

        - `node`: a `TesseractNode`, or a `BackgroundNode`: then calls are plain, without ``await``.
        - `uid_prefix`, `grid_size`: the experts are ``uid_prefix.i.j...``, with ``0 <= i < grid_size[0]`` and so on.
        - `in_features`: the size of the last dimension of what is scored.
        - `k_best`: experts asked for each row. `k_min`: answers that a row needs.
        - `route`: a sequence goes to its experts as one row (``"sample"``), or each token as its own.
        - `settings`: everything else; None: `default_settings`.

        Raises: ValueError or TypeError for a prefix, a grid or a number that makes no sense.
        """
        super().__init__(
            uid_prefix=uid_prefix,
            grid_size=grid_size,
            in_features=in_features,
            k_best=k_best,
            k_min=k_min,
            route=route,
            settings=self.default_settings if settings is None else settings,
        )
        self._eval_staleness: int | None = None
        self._node = node
        self._experience = experience_of(node)
        self._search = GridSearch(self._experience, uid_prefix, self.grid_size, k_best=k_best, settings=self.settings)
        self._schemas = SchemaVote(self._experience, timeout=self.settings.forward_timeout)
        self._chosen = _nothing_chosen()
        """By mode and coordinates, the experts that `choose` has given: the same object until it is given another mode
        or other options."""

    def __getstate__(self) -> dict[str, object]:
        # torch copies no tensor that has a graph
        return self.__dict__ | {"load_balancing_loss": None, "_chosen": _nothing_chosen()}

    @property
    def node(self) -> Node | PlainCalls:
        return self._node

    @uncompiled
    def choose(self, x: torch.Tensor) -> Any:
        """Return for each row of `x` its best live experts, best first, as a list of lists of `RemoteExpert`; await it.

        A row gets fewer than `k_best` only where fewer live. Raises: as `forward`; NotEnoughExperts if no expert lives.
        """
        self._node.check_running()
        with torch.no_grad():
            scores_RS = self._scores(self._rows((x,), {})[0][0])
        return deliver(
            self._node, isolated(self._choose(scores_RS, self._settings_now(), self.training), modes=NO_GRAD)
        )

    @property
    def audits(self) -> Audits:
        """The audits of this node's calls and their findings."""
        return self._experience.audits

    def eval(self, *, max_staleness: int | None = None) -> Self:
        """Evaluation mode, as of any module. `max_staleness`: that of this mode, until `eval` is called again; None:
        the one that the gate was made with. Raises: ValueError."""
        check_max_staleness(max_staleness)
        self._eval_staleness = max_staleness
        return super().eval()

    def _settings_now(self) -> MixtureSettings:
        if self.training or self._eval_staleness is None:
            return self.settings
        return replace(self.settings, calls=replace(self.settings.calls, max_staleness=self._eval_staleness))

    @uncompiled
    def forward(self, x: torch.Tensor, *args: Structure, **kwargs: Structure) -> Structure:
        """The mixture of the chosen experts' answers for every row of `x`; await it.

        `x`, ``[rows, in_features]`` or a sequence, is scored and is also the experts' first argument; further arguments
        go to the experts with it, row by row. Experts that fail or are slow are left out, and weights are
        renormalized over those that answered. Reads grad mode, autocast and `training` now, not when awaited; under
        autocast, floating-point inputs are cast to the experts' dtypes. Cancelling cancels all calls under way.

        Raises at once: SchemaMismatch if `x` does not fit `in_features`; RuntimeError inside torch.utils.checkpoint
        and the transforms of torch.func, and if the node is not running.
        While no expert lives, the call waits for one, `forward_timeout` seconds at most; then `on_missing` decides.
        Rows whose experts all failed wait for others in the same way (see `MixtureSettings.forward_timeout`).

        The awaitable raises: SchemaMismatch before anything is sent, if the arguments do not fit the experts' schema or
        their answers are not floating-point; NotEnoughExperts, which lists who failed and why.
        """
        return deliver(self._node, isolated(self._output(self._start(x, args, kwargs)), modes=NO_GRAD))

    @uncompiled
    def mix(self, x: torch.Tensor, *args: Structure, **kwargs: Structure) -> Structure:
        """As `forward`, but gives a `Mixed`: the output, and how it came about."""
        return deliver(self._node, isolated(self._start(x, args, kwargs), modes=NO_GRAD))

    async def _choose(
        self, scores_RS: torch.Tensor, settings: MixtureSettings, training: bool
    ) -> list[list[RemoteExpert]]:
        scores_RS = sound(scores_RS)
        candidates = await self._search.candidates(scores_RS)
        if len(scores_RS) and not len(candidates):
            raise NotEnoughExperts(1, len(scores_RS), {})
        best_RK = candidates.grid.top_k(scores_RS, self.k_best, bias_N=candidates.bias_N).numpy()
        experts = np.empty(len(candidates), dtype=object)  # indexed by arrays, unlike a list
        known, coords = self._chosen[training], candidates.grid.coords
        wanted = training, settings.calls, settings.forward_timeout, settings.backward_timeout
        for number in np.unique(best_RK).tolist():  # thousands in large grids
            expert = known.get(place := coords[number])
            if expert is None or wanted != (expert.training, expert.options, expert.timeout, expert.backward_timeout):
                expert = known[place] = self._new_expert(place, training, settings)
            experts[number] = expert
        chosen: list[list[RemoteExpert]] = experts[best_RK].tolist()
        return chosen

    def _new_expert(self, coords: tuple[int, ...], training: bool, settings: MixtureSettings) -> RemoteExpert:
        return RemoteExpert(
            self._node,
            uid_at(self.uid_prefix, coords),
            schema=self._schemas.known,
            options=settings.calls,
            timeout=settings.forward_timeout,
            backward_timeout=settings.backward_timeout,
        ).train(training)

    def _start(
        self, x: torch.Tensor, args: tuple[Structure, ...], kwargs: Mapping[str, Structure]
    ) -> Coroutine[object, object, Mixed]:
        """Collect everything that belongs to the moment of the call: scores, modes, seed."""
        refuse_wrappers()
        self._node.check_running()
        arguments = Arguments.now((x, *args), kwargs, training=self.training)
        returns = self._own_dtype(x)
        arguments = replace(arguments, casts=arguments.casts or returns is not None)
        rows, keyword_rows, leading_shape = self._rows(arguments.args, arguments.kwargs)
        arguments = replace(arguments, args=rows, kwargs=keyword_rows)
        scores_RS = self._scores(rows[0])
        return self._mix(scores_RS, arguments, leading_shape, returns, self._settings_now())

    @staticmethod
    async def _output(mixed: Coroutine[object, object, Mixed]) -> Structure:
        return (await mixed).output

    async def _mix(
        self,
        scores_RS: torch.Tensor,
        arguments: Arguments,
        leading_shape: torch.Size | None,
        returns: torch.dtype | None,
        settings: MixtureSettings,
    ) -> Mixed:
        sound_RS, mode = sound(scores_RS), arguments.mode
        candidates = await self._search.candidates(sound_RS)
        schema = await self._schemas.schema(candidates, sound_RS, arguments)
        if not all(spec.dtype.is_floating_point or spec.dtype.is_complex for spec in schema.output_specs):
            raise SchemaMismatch(
                f"the experts of {self.uid_prefix} answer {describe_schema(schema.outputs)}: a mixture averages, "
                "which needs floating-point numbers; call the experts that `choose` gives"
            )
        inputs = arguments.fit(schema, f"the grid {self.uid_prefix}")
        schema, (tensors, absent) = schema.sized(inputs), present(inputs)
        patience = self._experience.patience("forward", settings)
        dispatch = ForwardDispatch(
            candidates, sound_RS, k_best=self.k_best, k_min=self.k_min, settings=settings, patience=patience
        )
        call = MixtureCall(
            dispatch,
            self._experience,
            schema=schema,
            mode=mode,
            settings=settings,
            is_normalized=True,
            search=self._search,
            absent=absent,
        )
        try:
            *sums, weights_R = await remote_call(
                call, [*tensors, scores_RS], versions=arguments.versions, differentiable=mode.differentiable
            )
        finally:
            self._search.learned.learn(dispatch, schema.row_bytes)
            if not dispatch.answers and any(isinstance(e, SchemaMismatch) for e in dispatch.errors.values()):
                self._schemas.known = None
        with torch.set_grad_enabled(mode.differentiable):
            return self._mixed(
                sums,
                [returns or spec.dtype for spec in schema.output_specs],
                schema.outputs,
                dispatch,
                scores_RS,
                weights_R,
                leading_shape,
                versions=call.versions,
                settings=settings,
            )


class SwitchGatingFunction(GatingFunction):
    """The Switch layer (Fedus et al. 2021): each row goes to its one best expert, its answer times its probability.

    As a single expert's renormalized weight is always 1, which would teach the gate nothing, the answer is multiplied
    by the expert's probability, the product of its coordinates' softmaxes. By default with the paper's jitter and
    load-balancing loss; add ``0.01 * gate.load_balancing_loss`` to the loss. Set `capacity_factor` to bound an
    expert's rows: those beyond go to their next-best expert, or, with ``refill=False``, get zeros as in the paper.
    """

    default_settings = MixtureSettings(on_missing="zero", load_balancing=True, jitter=0.01)
    is_switch = True

    def __init__(
        self,
        node: Node | PlainCalls,
        *,
        uid_prefix: str,
        grid_size: Sequence[int],
        in_features: int,
        route: Literal["sample", "token"] = "token",
        settings: MixtureSettings | None = None,
    ) -> None:
        """See `GatingFunction`; change the settings with ``dataclasses.replace(SwitchGatingFunction.default_settings,
        capacity_factor=1.25)``."""
        super().__init__(
            node,
            uid_prefix=uid_prefix,
            grid_size=grid_size,
            in_features=in_features,
            k_best=1,
            route=route,
            settings=settings,
        )
