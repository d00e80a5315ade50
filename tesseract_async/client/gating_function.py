"""`GatingFunction`: a mixture layer over a grid of experts on other people's computers."""

from __future__ import annotations

from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import index
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from torch import nn

from tesseract_async.client.arguments import Arguments
from tesseract_async.client.audits import Audits
from tesseract_async.client.autograd import refuse_wrappers, remote_call, uncompiled
from tesseract_async.client.dispatch import ForwardDispatch
from tesseract_async.client.experience import experience_of
from tesseract_async.client.grid_search import GridSearch
from tesseract_async.client.isolated import NO_GRAD, isolated
from tesseract_async.client.mixture import MixtureCall
from tesseract_async.client.ports import Node, PlainCalls, check_running, deliver
from tesseract_async.client.remote_expert import RemoteExpert
from tesseract_async.client.routing import uid_at
from tesseract_async.client.schema_vote import SchemaVote
from tesseract_async.client.settings import MixtureSettings, check_max_staleness
from tesseract_async.errors import NotEnoughExperts, SchemaMismatch
from tesseract_async.experts.manifest import is_prefix
from tesseract_async.wire.codecs import settle
from tesseract_async.wire.tensors import Structure, describe_schema, describe_structure, flatten, unflatten


@dataclass(frozen=True, slots=True, eq=False)
class Mixed:
    """The result of one pass through a gate."""

    output: Structure
    """As the experts' outputs are nested, each ``[rows, ...]``."""
    num_answers: torch.Tensor
    """``int64[rows]``: experts that answered each row."""
    errors: Mapping[str, BaseException]
    """By uid, the experts that did not answer, and why."""
    versions: Mapping[str, int]
    """By uid, the optimizer steps that each expert had taken when it computed its answer."""
    load_balancing_loss: torch.Tensor | None
    """Scalar, differentiable with respect to the gate, 1 for a perfectly even load; None unless asked for."""


class GatingFunction(nn.Module):
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

    default_settings: ClassVar[MixtureSettings] = MixtureSettings()

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
        super().__init__()
        self.uid_prefix = uid_prefix
        if not is_prefix(uid_prefix):
            raise ValueError(f"a grid's prefix is text such as 'ffn' or 'layer.ffn', not {uid_prefix!r}")
        self.grid_size = tuple(index(size) for size in grid_size)
        if not self.grid_size or min(self.grid_size) < 1:
            raise ValueError(f"a grid has at least one dimension, and every size is positive: {self.grid_size}")
        if in_features < 1:
            raise ValueError(f"in_features is a positive number, not {in_features}")
        if route not in ("sample", "token"):
            raise ValueError(f"route is 'sample' or 'token', not {route!r}")
        self.settings = settings = self.default_settings if settings is None else settings
        if type(k_best) is not int or k_best < 1:
            raise ValueError(f"k_best is a whole number of at least 1, not {k_best!r}")
        for name, number in (("k_min", k_min), ("backward_k_min", settings.backward_k_min)):
            if type(number) is not int or not 0 <= number <= k_best:
                raise ValueError(f"{name} is a whole number between 0 and k_best={k_best}, not {number!r}")
        self.k_best = k_best
        self.k_min = k_min
        self.route = route
        self._eval_staleness: int | None = None
        with torch.inference_mode(False):  # a gate made inside such a block can be trained outside of it
            self.proj = nn.Linear(in_features, sum(self.grid_size))
        self.load_balancing_loss: torch.Tensor | None = None
        """The loss of the latest pass that ended, if the settings ask for it. With several under way, use `mix`."""
        self._node = node
        self._experience = experience_of(node)
        self._search = GridSearch(self._experience, uid_prefix, self.grid_size, k_best=k_best, settings=settings)
        self._schemas = SchemaVote(self._experience, timeout=settings.forward_timeout)
        self._chosen: dict[tuple[tuple[int, ...], bool], RemoteExpert] = {}
        """By coordinates and mode, the experts that `choose` has given."""

    def __getstate__(self) -> dict[str, object]:
        # torch copies no tensor that has a graph
        return self.__dict__ | {"load_balancing_loss": None, "_chosen": {}}

    @property
    def node(self) -> Node | PlainCalls:
        """The node that makes its calls."""
        return self._node

    def extra_repr(self) -> str:
        """Prefix and grid, for ``repr``."""
        return f"{self.uid_prefix}, grid_size={self.grid_size}, k_best={self.k_best}"

    @uncompiled
    def choose(self, x: torch.Tensor) -> Any:
        """Return for each row of `x` its best live experts, best first, as a list of lists of `RemoteExpert`; await it.

        A row gets fewer than `k_best` only where fewer live. Raises: as `forward`; NotEnoughExperts if no expert lives.
        """
        check_running(self._node)
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
        """Evaluation mode, as of any module. `max_staleness`: what holds in it, until `eval` is called again; None:
        what the gate was made with. Raises: ValueError."""
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

    # ---------------------------------------------------------------------------------------------- what is scored

    def _rows(
        self, args: tuple[Structure, ...], kwargs: Mapping[str, Structure]
    ) -> tuple[tuple[Structure, ...], Mapping[str, Structure], torch.Size | None]:
        """Arguments and keyword arguments with one routed row per line, and the shape that lines came from."""
        x = args[0]
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"the gate takes a tensor, not a {type(x).__name__}")
        in_features = self.proj.in_features
        if x.dim() < 2 or x.shape[-1] != in_features:
            wanted = f"(float32[rows, {in_features}]) or (float32[rows, length, {in_features}])"
            raise SchemaMismatch(f"the gate {self.uid_prefix} takes {wanted}; got {describe_structure((x,))}")
        if x.dim() == 2 or self.route == "sample":
            return args, kwargs, None
        leading = x.shape[:-1]

        def flat(leaf: object) -> object:
            if not isinstance(leaf, torch.Tensor):
                return leaf
            if leaf.shape[: len(leading)] != leading:
                raise SchemaMismatch(
                    f"routed by token, all arguments start with {tuple(leading)}; got {describe_structure(leaf)}"
                )
            return leaf.flatten(0, len(leading) - 1)

        given = args, kwargs
        return *unflatten(given, map(flat, flatten(given))), leading

    def _scores(self, x: torch.Tensor) -> torch.Tensor:
        """``[rows, sum(grid_size)]``, in the graph, at least float32."""
        pooled = x if x.dim() == 2 else x.flatten(1, -2).mean(1)
        if self.training and self.settings.jitter:
            pooled = pooled * (1 + self.settings.jitter * (2 * torch.rand_like(pooled) - 1))
        scores_RS: torch.Tensor = self.proj(pooled)
        return scores_RS if scores_RS.dtype == torch.float64 else scores_RS.float()

    # ---------------------------------------------------------------------------------------------- the passes

    async def _choose(
        self, scores_RS: torch.Tensor, settings: MixtureSettings, training: bool
    ) -> list[list[RemoteExpert]]:
        scores_RS = _sound(scores_RS)
        candidates = await self._search.candidates(scores_RS)
        if len(scores_RS) and not len(candidates):
            raise NotEnoughExperts(1, len(scores_RS), {})
        best_RK = candidates.grid.top_k(scores_RS, self.k_best, bias_N=candidates.bias_N).numpy()
        experts = np.empty(len(candidates), dtype=object)  # indexed by arrays, unlike a list
        for expert in np.unique(best_RK).tolist():
            experts[expert] = self._expert(candidates.coords(expert), training, settings)
        chosen: list[list[RemoteExpert]] = experts[best_RK].tolist()
        return chosen

    def _expert(self, coords: tuple[int, ...], training: bool, settings: MixtureSettings) -> RemoteExpert:
        """The expert there: in one mode always the same object, until it is given another mode or other options."""
        known = self._chosen.get((coords, training))
        wanted = training, settings.calls, settings.forward_timeout, settings.backward_timeout
        if known is None or wanted != (known.training, known.options, known.timeout, known.backward_timeout):
            known = self._chosen[(coords, training)] = RemoteExpert(
                self._node,
                uid_at(self.uid_prefix, coords),
                schema=self._schemas.known,
                options=settings.calls,
                timeout=settings.forward_timeout,
                backward_timeout=settings.backward_timeout,
            ).train(training)
        return known

    def _start(
        self, x: torch.Tensor, args: tuple[Structure, ...], kwargs: Mapping[str, Structure]
    ) -> Coroutine[object, object, Mixed]:
        """Everything that belongs to the moment of the call: scores, modes, seed."""
        refuse_wrappers()
        check_running(self._node)
        arguments = Arguments.now((x, *args), kwargs, training=self.training)
        rows, keyword_rows, leading_shape = self._rows(arguments.args, arguments.kwargs)
        arguments = replace(arguments, args=rows, kwargs=keyword_rows)
        scores_RS = self._scores(rows[0])
        return self._mix(scores_RS, arguments, leading_shape, self._settings_now())

    @staticmethod
    async def _output(mixed: Coroutine[object, object, Mixed]) -> Structure:
        return (await mixed).output

    async def _mix(
        self,
        scores_RS: torch.Tensor,
        arguments: Arguments,
        leading_shape: torch.Size | None,
        settings: MixtureSettings,
    ) -> Mixed:
        sound_RS, mode = _sound(scores_RS), arguments.mode
        candidates = await self._search.candidates(sound_RS)
        schema = await self._schemas.schema(candidates, sound_RS, arguments)
        if not all(spec.dtype.is_floating_point or spec.dtype.is_complex for spec in schema.output_specs):
            raise SchemaMismatch(
                f"the experts of {self.uid_prefix} answer {describe_schema(schema.outputs)}: a mixture averages, "
                "which whole numbers can't bear; call the experts that `choose` gives"
            )
        inputs = arguments.fit(schema, f"the grid {self.uid_prefix}")
        settle(schema.codecs, settings.calls.codecs)  # raises before anybody is asked
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
        )
        try:
            *sums, weights_R = await remote_call(
                call, [*inputs, scores_RS], versions=arguments.versions, differentiable=mode.differentiable
            )
        finally:
            self._search.learned.learn(dispatch, schema.row_bytes)
            if not dispatch.answers and any(isinstance(e, SchemaMismatch) for e in dispatch.errors.values()):
                self._schemas.known = None
        device = scores_RS.device
        num_answers_R = torch.from_numpy(dispatch.num_answers_R).to(device)
        has_enough_R = num_answers_R >= max(1, self.k_min)
        with torch.set_grad_enabled(mode.differentiable):
            top_R = torch.from_numpy(call.top_R).to(scores_RS)
            factor_R = torch.where(has_enough_R, self._factor(scores_RS, top_R, weights_R), 0.0)
            pairs = zip(sums, schema.output_specs, strict=True)
            outputs = [_scaled(total, factor_R).to(spec.dtype) for total, spec in pairs]
            if leading_shape is not None:
                outputs = [output.reshape(*leading_shape, *output.shape[1:]) for output in outputs]
            loss = None
            if settings.load_balancing:
                columns_ND = dispatch.candidates.grid.columns_ND.to(device)
                loss = self._load_balancing_loss(scores_RS, columns_ND[dispatch.chosen_RK.to(device)])
        self.load_balancing_loss = loss
        return Mixed(unflatten(schema.outputs, outputs), num_answers_R, dispatch.errors, call.versions, loss)

    def _factor(self, scores_RS: torch.Tensor, top_R: torch.Tensor, weights_R: torch.Tensor) -> torch.Tensor:
        """By what each row's sum is multiplied, where experts were weighted by the exponential of their score less
        `top_R`, and `weights_R` is the sum of these weights: a softmax over the experts that answered."""
        return 1 / weights_R.where(weights_R > 0, 1.0)

    def _load_balancing_loss(self, scores_RS: torch.Tensor, chosen_RKD: torch.Tensor) -> torch.Tensor:
        """Fedus et al. 2021, equation 4, for each grid dimension, averaged: with product keys an expert's probability
        is the product of its coordinates', so that loads are even if they are in every dimension."""
        losses = []
        offset = 0
        for d, size in enumerate(self.grid_size):
            probability_G = scores_RS[:, offset : offset + size].softmax(1).mean(0)
            count_G = torch.bincount((chosen_RKD[..., d] - offset).flatten(), minlength=size)
            losses.append(size * (probability_G * count_G / max(1, chosen_RKD[..., d].numel())).sum())
            offset += size
        return torch.stack(losses).mean()


class SwitchGatingFunction(GatingFunction):
    """The Switch layer (Fedus et al. 2021): each row goes to its one best expert, its answer times its probability.

    As a single expert's renormalized weight is always 1, which would teach the gate nothing, the answer is multiplied
    by the expert's probability, the product of its coordinates' softmaxes. By default with the paper's jitter and
    load-balancing loss; add ``0.01 * gate.load_balancing_loss`` to the loss. Set `capacity_factor` to bound an
    expert's rows: those beyond go to their next-best expert, or, with ``refill=False``, get zeros as in the paper.
    """

    default_settings = MixtureSettings(on_missing="zero", load_balancing=True, jitter=0.01)

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

    def _factor(self, scores_RS: torch.Tensor, top_R: torch.Tensor, weights_R: torch.Tensor) -> torch.Tensor:
        normalizers = [part.logsumexp(1) for part in torch.split(scores_RS, list(self.grid_size), dim=1)]
        return (top_R - torch.stack(normalizers).sum(0)).exp()


def _sound(scores_RS: torch.Tensor) -> torch.Tensor:
    """The scores as choosing takes them: on the CPU, outside of the graph, finite."""
    return torch.nan_to_num(scores_RS.detach().cpu(), nan=-1e30, posinf=1e30, neginf=-1e30)


def _scaled(total: torch.Tensor, factor_R: torch.Tensor) -> torch.Tensor:
    """Each row times its factor."""
    return total * factor_R.to(total.dtype).reshape(-1, *[1] * (total.dim() - 1))
