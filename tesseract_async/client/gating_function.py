"""`GatingFunction`: a mixture layer over a grid of experts on other people's computers."""

from __future__ import annotations

from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import index
from typing import Any, Literal, Self

import torch
from torch import nn

from tesseract_async.client.arguments import Versions, arguments_now
from tesseract_async.client.audits import Audits
from tesseract_async.client.autograd import refuse_wrappers, remote_call, uncompiled
from tesseract_async.client.beam_search import expert_scores
from tesseract_async.client.expert_calls import ExpertSchema, check_max_staleness
from tesseract_async.client.grid_search import GridSearch
from tesseract_async.client.isolated import NO_GRAD, isolated
from tesseract_async.client.mixture import MixtureCall
from tesseract_async.client.mixture_settings import MixtureSettings
from tesseract_async.client.remote_expert import RemoteExpert, cast_to, draw_seed, under_autocast
from tesseract_async.errors import NotEnoughExperts, SchemaMismatch
from tesseract_async.experts.manifest import is_prefix
from tesseract_async.wire.codecs import settle
from tesseract_async.wire.tensors import describe_schema, describe_structure, flatten_like, sequence_like, unflatten


@dataclass(frozen=True, slots=True, eq=False)
class Mixed:
    """What one pass through a gate gave."""

    output: Any
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

    Use on the node's loop only. Copies made with ``copy.deepcopy`` share the node and what was learnt about experts.
    """

    def __init__(
        self,
        node: Any,
        uid_prefix: str,
        *,
        grid_size: Sequence[int],
        in_features: int,
        k_best: int = 4,
        k_min: int = 1,
        spare: int = 1,
        forward_timeout: float = 15.0,
        timeout_after_k_min: float | None = None,
        backward_timeout: float = 15.0,
        backward_k_min: int = 0,
        rescale_backward: bool = False,
        patience: float | None = None,
        refill: bool = True,
        on_missing: Literal["raise", "zero"] = "raise",
        route: Literal["sample", "token"] = "sample",
        search: Literal["exact", "beam"] = "exact",
        load_balancing: bool = False,
        latency_weight: float = 0.0,
        jitter: float = 0.0,
        capacity_factor: float | None = None,
        priority: int = 0,
        codec: str | Mapping[str, str] = "auto",
        max_staleness: int | None = None,
        audit_share: float = 0.0,
    ) -> None:
        """Does no I/O. Arguments not named here: see `MixtureSettings`.

        - `node`: a `TesseractNode`, or a `BackgroundNode`: then calls are plain, without ``await``.
        - `uid_prefix`, `grid_size`: the experts are ``uid_prefix.i.j...``, with ``0 <= i < grid_size[0]`` and so on.
        - `in_features`: the size of the last dimension of what is scored.
        - `route`: whether a sequence goes to its experts as one row (``"sample"``) or each token as its own.
        - `search`: ``"exact"`` reads the whole grid and keeps it fresh; ``"beam"`` asks the network about the best
          cells of each batch, for grids too large to hold, and does as ``"exact"`` where few of these cells are hosted.
        - `load_balancing`: whether each pass computes a load-balancing loss (see `load_balancing_loss`).
        - `jitter`: in training mode, what is scored is multiplied by a random factor in ``[1 - jitter, 1 + jitter]``.

        Raises: ValueError or TypeError for a prefix, a grid, a number or a time-out that makes no sense.
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
        if route not in ("sample", "token") or search not in ("exact", "beam"):
            raise ValueError(f"route is 'sample' or 'token', search 'exact' or 'beam'; not {route!r} and {search!r}")
        if not 0 <= jitter < 1:
            raise ValueError(f"jitter lies in [0, 1), not at {jitter}")
        self.settings = MixtureSettings(
            k_best=k_best,
            k_min=k_min,
            spare=spare,
            forward_timeout=forward_timeout,
            timeout_after_k_min=timeout_after_k_min,
            backward_timeout=backward_timeout,
            backward_k_min=backward_k_min,
            rescale_backward=rescale_backward,
            patience=patience,
            refill=refill,
            on_missing=on_missing,
            capacity_factor=capacity_factor,
            latency_weight=latency_weight,
            priority=priority,
            codec=codec,
            max_staleness=max_staleness,
            audit_share=audit_share,
        )
        self._eval_staleness: int | None = None
        self.route = route
        self.search = search
        self.load_balancing = load_balancing
        self.jitter = jitter
        with torch.inference_mode(False):  # a gate made inside such a block can be trained outside of it
            self.proj = nn.Linear(in_features, sum(self.grid_size))
        self.load_balancing_loss: torch.Tensor | None = None
        """Of the latest pass that ended, if `load_balancing` is on. With several passes under way, use `mix`."""
        self._search = GridSearch(node, uid_prefix, self.grid_size, k_best=k_best, timeout=forward_timeout)

    def __getstate__(self) -> dict[str, Any]:
        # torch copies no tensor that has a graph
        return self.__dict__ | {"load_balancing_loss": None}

    def extra_repr(self) -> str:
        """Prefix and grid, for ``repr``."""
        return f"{self.uid_prefix}, grid_size={self.grid_size}, k_best={self.settings.k_best}"

    @uncompiled
    def choose(self, x: torch.Tensor) -> Any:
        """For each row of `x` its best live experts, best first, as a list of lists of `RemoteExpert`; await it.

        A row gets fewer than `k_best` only where fewer live. Raises: as `forward`; NotEnoughExperts if nobody lives.
        """
        self._search.check()
        with torch.no_grad():
            scores_RS = self._scores(self._rows((x,))[0][0])
        chosen = self._choose(scores_RS, self._settings_now(), self.training)
        return self._search.deliver(isolated(chosen, modes=NO_GRAD))

    @property
    def audits(self) -> Audits:
        """What audits of this node's calls have found."""
        return self._search.audits

    def eval(self, *, max_staleness: int | None = None) -> Self:
        """Evaluation mode, as of any module. `max_staleness`: what holds in it, until `eval` is called again; None:
        what the gate was made with. Raises: ValueError."""
        check_max_staleness(max_staleness)
        self._eval_staleness = max_staleness
        return super().eval()

    def _settings_now(self) -> MixtureSettings:
        if self.training or self._eval_staleness is None:
            return self.settings
        return replace(self.settings, max_staleness=self._eval_staleness)

    @uncompiled
    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """The mixture of the chosen experts' answers for every row of `x`; await it.

        `x`, ``[rows, in_features]`` or a sequence, is scored and is also the experts' first argument; further arguments
        go to the experts beside it, row by row. Experts that fail or are slow are left out, and weights are
        renormalised over those that answered. Reads grad mode, autocast and `training` now, not when awaited; under
        autocast, floating-point inputs are cast to the experts' dtypes. Cancelling cancels all calls under way.

        Raises at once: SchemaMismatch if `x` does not fit `in_features`; RuntimeError inside torch.utils.checkpoint
        and the transforms of torch.func, and if the node is not running.
        While no expert lives, somebody is waited for, `forward_timeout` seconds at most; then `on_missing` decides.
        Rows whose experts all failed wait for others in the same way (see `MixtureSettings.forward_timeout`).

        The awaitable raises: SchemaMismatch before anything is sent, if the arguments do not fit the experts' schema or
        their answers are not floating-point; NotEnoughExperts, which lists who failed and why.
        """
        return self._search.deliver(isolated(self._output(self._start(x, args, kwargs)), modes=NO_GRAD))

    @uncompiled
    def mix(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """As `forward`, but gives a `Mixed`: the output, and how it came about."""
        return self._search.deliver(self._start(x, args, kwargs))

    # ---------------------------------------------------------------------------------------------- what is scored

    def _rows(self, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
        """Arguments and keyword arguments with one routed row per line, and the shape that lines came from."""
        x = args[0]
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"the gate takes a tensor, not a {type(x).__name__}")
        in_features = self.proj.in_features
        if x.dim() < 2 or x.shape[-1] != in_features:
            wanted = f"(float32[rows, {in_features}]) or (float32[rows, length, {in_features}])"
            raise SchemaMismatch(f"the gate {self.uid_prefix} takes {wanted}; got {describe_structure((x,))}")
        if x.dim() == 2 or self.route == "sample":
            return args, kwargs or {}, None
        lead = x.shape[:-1]

        def flat(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                if value.shape[: len(lead)] != lead:
                    raise SchemaMismatch(
                        f"routed by token, all arguments start with {tuple(lead)}; got {describe_structure(value)}"
                    )
                return value.flatten(0, len(lead) - 1)
            if isinstance(value, tuple | list):
                return sequence_like(value, map(flat, value))
            if isinstance(value, Mapping):
                return {key: flat(item) for key, item in value.items()}
            return value

        return flat(args), flat(kwargs or {}), lead

    def _scores(self, x: torch.Tensor) -> torch.Tensor:
        """``[rows, sum(grid_size)]``, in the graph, at least float32."""
        pooled = x if x.dim() == 2 else x.flatten(1, -2).mean(1)
        if self.training and self.jitter:
            pooled = pooled * (1 + self.jitter * (2 * torch.rand_like(pooled) - 1))
        scores_RS: torch.Tensor = self.proj(pooled)
        return scores_RS if scores_RS.dtype == torch.float64 else scores_RS.float()

    # ---------------------------------------------------------------------------------------------- the passes

    async def _choose(
        self, scores_RS: torch.Tensor, settings: MixtureSettings, training: bool
    ) -> list[list[RemoteExpert]]:
        scores_RS = _sound(scores_RS)
        view = await self._search.view(scores_RS, beam=self.search == "beam")
        if len(scores_RS) and not len(view.coords):
            raise NotEnoughExperts(1, len(scores_RS), {})
        bias_N = self._search.bias(view, settings.latency_weight)
        best_RK = self._search.grid(view).top_k(scores_RS, settings.k_best, bias_N=bias_N)
        return self._search.experts(view, best_RK.numpy(), options=settings.call_options, training=training)

    def _start(self, x: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Coroutine[Any, Any, Mixed]:
        """Everything that belongs to the moment of the call: scores, modes, seed."""
        refuse_wrappers()
        self._search.check()
        (args, kwargs), versions = arguments_now(((x, *args), kwargs))
        rows, kwrows, lead = self._rows(args, kwargs)
        scores_RS = self._scores(rows[0])
        seed = draw_seed() if self.training else 0
        casts = under_autocast((rows, kwrows))
        mixed = self._mix(
            scores_RS,
            rows,
            kwrows,
            versions,
            lead,
            torch.is_grad_enabled(),
            casts,
            self.training,
            seed,
            self._settings_now(),
        )
        return isolated(mixed, modes=NO_GRAD)

    @staticmethod
    async def _output(mixed: Coroutine[Any, Any, Mixed]) -> Any:
        return (await mixed).output

    async def _mix(
        self,
        scores_RS: torch.Tensor,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        versions: Versions,
        lead: torch.Size | None,
        differentiable: bool,
        casts: bool,
        training: bool,
        seed: int,
        settings: MixtureSettings,
    ) -> Mixed:
        sound_RS = _sound(scores_RS)
        view = await self._search.view(sound_RS, beam=self.search == "beam")

        def fitting(schema: ExpertSchema) -> list[torch.Tensor]:
            given = args, kwargs
            if casts:
                with torch.set_grad_enabled(differentiable):
                    given = cast_to(schema.args, args), cast_to(schema.kwargs, kwargs)
            return flatten_like(schema.inputs, given, what=f"the grid {self.uid_prefix}")

        schema = await self._search.schema(sound_RS, view, fitting)
        if not all(spec.dtype.is_floating_point or spec.dtype.is_complex for spec in schema.output_specs):
            raise SchemaMismatch(
                f"the experts of {self.uid_prefix} answer {describe_schema(schema.outputs)}: a mixture averages, "
                "which whole numbers can't bear; call the experts that `choose` gives"
            )
        inputs = fitting(schema)
        settle(schema.codecs, settings.call_options.codecs)  # raises before anybody is asked
        call = MixtureCall(
            self._search,
            view,
            self._search.grid(view),
            prefix=self.uid_prefix,
            schema=schema,
            scores=sound_RS,
            bias=partial(self._search.bias, weight=settings.latency_weight),
            newcomers=partial(self._search.newcomers, beam=self.search == "beam"),
            settings=settings,
            training=training,
            seed=seed,
            differentiable=differentiable,
        )
        try:
            answers = await remote_call(call, inputs, versions=versions, differentiable=differentiable)
        finally:
            self._search.learn(call)
        device, num_rows = scores_RS.device, len(scores_RS)
        rows_L, experts_L = (index.to(device) for index in call.lines())
        num_answers_R = torch.from_numpy(call.num_answers).to(device)
        with torch.set_grad_enabled(differentiable):
            columns_ND = call.grid.columns_ND.to(device)
            scores_L = expert_scores(scores_RS, rows_L, experts_L, columns_ND)
            weights_L = self._weights(scores_L, scores_RS, rows_L)
            weights_L = weights_L * (num_answers_R >= settings.k_min)[rows_L]
            call.weights = weights_L.detach().cpu()
            outputs = [_weighted_sum(weights_L, answer, rows_L, num_rows) for answer in answers]
            if lead is not None:
                outputs = [output.reshape(*lead, *output.shape[1:]) for output in outputs]
            loss = None
            if self.load_balancing:
                loss = self._load_balancing_loss(scores_RS, columns_ND[call.chosen.to(device)])
        self.load_balancing_loss = loss
        return Mixed(unflatten(schema.outputs, outputs), num_answers_R, call.errors, call.versions(), loss)

    def _weights(self, scores_L: torch.Tensor, scores_RS: torch.Tensor, rows_L: torch.Tensor) -> torch.Tensor:
        """Softmax over the experts that answered each row."""
        num_rows = len(scores_RS)
        top_R = scores_L.new_full((num_rows,), -torch.inf).scatter_reduce(0, rows_L, scores_L.detach(), "amax")
        exp_L = (scores_L - top_R[rows_L]).exp()
        return exp_L / scores_L.new_zeros(num_rows).index_add(0, rows_L, exp_L)[rows_L]

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

    As a single expert's renormalised weight is always 1, which would teach the gate nothing, the answer is multiplied
    by the expert's probability, the product of its coordinates' softmaxes. By default with the paper's jitter and
    load-balancing loss; add ``0.01 * gate.load_balancing_loss`` to the loss. Set `capacity_factor` to bound an
    expert's rows: those beyond go to their next-best expert, or, with ``refill=False``, get zeros as in the paper.
    """

    def __init__(
        self,
        node: Any,
        uid_prefix: str,
        *,
        grid_size: Sequence[int],
        in_features: int,
        forward_timeout: float = 15.0,
        backward_timeout: float = 15.0,
        backward_k_min: int = 0,
        patience: float | None = None,
        refill: bool = True,
        on_missing: Literal["raise", "zero"] = "zero",
        route: Literal["sample", "token"] = "token",
        search: Literal["exact", "beam"] = "exact",
        load_balancing: bool = True,
        latency_weight: float = 0.0,
        jitter: float = 0.01,
        capacity_factor: float | None = None,
        priority: int = 0,
        codec: str | Mapping[str, str] = "auto",
        max_staleness: int | None = None,
        audit_share: float = 0.0,
    ) -> None:
        """See `GatingFunction`."""
        super().__init__(
            node,
            uid_prefix,
            grid_size=grid_size,
            in_features=in_features,
            k_best=1,
            k_min=1,
            forward_timeout=forward_timeout,
            backward_timeout=backward_timeout,
            backward_k_min=backward_k_min,
            patience=patience,
            refill=refill,
            on_missing=on_missing,
            route=route,
            search=search,
            load_balancing=load_balancing,
            latency_weight=latency_weight,
            jitter=jitter,
            capacity_factor=capacity_factor,
            priority=priority,
            codec=codec,
            max_staleness=max_staleness,
            audit_share=audit_share,
        )

    def _weights(self, scores_L: torch.Tensor, scores_RS: torch.Tensor, rows_L: torch.Tensor) -> torch.Tensor:
        normalizers = [part.logsumexp(1) for part in torch.split(scores_RS, list(self.grid_size), dim=1)]
        return (scores_L - torch.stack(normalizers).sum(0)[rows_L]).exp()


def _sound(scores_RS: torch.Tensor) -> torch.Tensor:
    """The scores as choosing takes them: on the CPU, outside of the graph, finite."""
    return torch.nan_to_num(scores_RS.detach().cpu(), nan=-1e30, posinf=1e30, neginf=-1e30)


def _weighted_sum(
    weights_L: torch.Tensor, answers_L: torch.Tensor, rows_L: torch.Tensor, num_rows: int
) -> torch.Tensor:
    """For each row the sum of its answers, weighted; ``[num_rows, ...]``. Rows without answers get zeros."""
    weights = weights_L.reshape(-1, *[1] * (answers_L.dim() - 1)).to(answers_L.dtype)
    return answers_L.new_zeros(num_rows, *answers_L.shape[1:]).index_add(0, rows_L, weights * answers_L)
