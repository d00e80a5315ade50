"""Gate: what a mixture's gate scores and how its answers are weighed, wherever the experts are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import index
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import nn

from tesseract_async.client.dispatch import ForwardDispatch
from tesseract_async.client.settings import MixtureSettings
from tesseract_async.errors import SchemaMismatch
from tesseract_async.experts.manifest import is_prefix
from tesseract_async.runtime.gradients import per_row
from tesseract_async.wire.tensors import Structure, describe_structure, flatten, unflatten


@dataclass(frozen=True, slots=True, eq=False)
class Mixed:
    """The result of one pass through a gate."""

    output: Structure
    """As the experts' outputs are nested, each ``[rows, ...]``."""
    num_answers: torch.Tensor
    """``int64[rows]``: experts that answered each row."""
    errors: Mapping[str, BaseException]
    """The errors, by uid, of the experts that did not answer."""
    versions: Mapping[str, int]
    """The optimizer steps, by uid, that each expert had taken when it computed its answer."""
    load_balancing_loss: torch.Tensor | None
    """Scalar, differentiable with respect to the gate, 1 for a perfectly even load; None unless asked for."""


class Gate(nn.Module):
    """The parameters and settings of a mixture layer over a grid of experts; see `GatingFunction`."""

    default_settings: ClassVar[MixtureSettings] = MixtureSettings()
    is_switch: bool = False
    """A row's answer is multiplied by its expert's probability, as in the Switch layer."""

    def __init__(
        self,
        *,
        uid_prefix: str,
        grid_size: Sequence[int],
        in_features: int,
        k_best: int,
        k_min: int,
        route: Literal["sample", "token"],
        settings: MixtureSettings,
    ) -> None:
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
        self.settings = settings
        if type(k_best) is not int or k_best < 1:
            raise ValueError(f"k_best is a whole number of at least 1, not {k_best!r}")
        for name, number in (("k_min", k_min), ("backward_k_min", settings.backward_k_min)):
            if type(number) is not int or not 0 <= number <= k_best:
                raise ValueError(f"{name} is a whole number between 0 and k_best={k_best}, not {number!r}")
        self.k_best = k_best
        self.k_min = k_min
        self.route = route
        with torch.inference_mode(False):  # a gate made inside such a block can be trained outside of it
            self.proj = nn.Linear(in_features, sum(self.grid_size))
        self.load_balancing_loss: torch.Tensor | None = None
        """The loss of the latest pass that ended, if the settings ask for it. With several under way, use `mix`."""

    def extra_repr(self) -> str:
        return f"{self.uid_prefix}, grid_size={self.grid_size}, k_best={self.k_best}, route={self.route!r}"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Take the gate's part of a `LocalMixture`'s state, which holds its experts, too."""
        for name in [name for name in state_dict if name.startswith(f"{prefix}experts.")]:
            del state_dict[name]
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _rows(
        self, args: tuple[Structure, ...], kwargs: Mapping[str, Structure]
    ) -> tuple[tuple[Structure, ...], Mapping[str, Structure], torch.Size | None]:
        """Return all arguments with one routed row per line, and the shape that the lines came from."""
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

    def _own_dtype(self, x: torch.Tensor) -> torch.dtype | None:
        """The dtype that the gate was moved to (``.half()``, ``.double()``), if `x` has it. Experts keep theirs: what
        goes there is cast, and what comes back is cast to the gate's."""
        own = self.proj.weight.dtype
        return own if own != torch.float32 and isinstance(x, torch.Tensor) and x.dtype == own else None

    def _scores(self, x: torch.Tensor) -> torch.Tensor:
        """``[rows, sum(grid_size)]``, in the graph, at least float32."""
        pooled = x if x.dim() == 2 else x.flatten(1, -2).mean(1)
        if self.training and self.settings.jitter:
            pooled = pooled * (1 + self.settings.jitter * (2 * torch.rand_like(pooled) - 1))
        scores_RS: torch.Tensor = self.proj(pooled.to(self.proj.weight.dtype))
        return scores_RS if scores_RS.dtype == torch.float64 else scores_RS.float()

    def _mixed(
        self,
        sums: Sequence[torch.Tensor],
        dtypes: Sequence[torch.dtype],
        structure: Structure,
        dispatch: ForwardDispatch,
        scores_RS: torch.Tensor,
        weights_R: torch.Tensor,
        leading_shape: torch.Size | None,
        *,
        versions: Mapping[str, int],
        settings: MixtureSettings,
    ) -> Mixed:
        """The result of a pass, from the weighted sums of the experts' answers; see `_factor`."""
        device = scores_RS.device
        num_answers_R = torch.from_numpy(dispatch.num_answers_R).to(device)
        has_enough_R = num_answers_R >= max(1, self.k_min)
        factor_R = torch.where(has_enough_R, self._factor(scores_RS, weights_R, dispatch), 0.0)
        outputs = [(total * per_row(factor_R, total)).to(dtype) for total, dtype in zip(sums, dtypes, strict=True)]
        if leading_shape is not None:
            outputs = [output.reshape(*leading_shape, *output.shape[1:]) for output in outputs]
        loss = None
        if settings.load_balancing:
            columns_ND = dispatch.candidates.grid.columns_ND.to(device)
            loss = self._load_balancing_loss(scores_RS, columns_ND[dispatch.chosen_RK.to(device)])
        self.load_balancing_loss = loss
        return Mixed(unflatten(structure, outputs), num_answers_R, dispatch.errors, versions, loss)

    def _factor(self, scores_RS: torch.Tensor, weights_R: torch.Tensor, dispatch: ForwardDispatch) -> torch.Tensor:
        """Return the factor of each row's sum, where experts were weighted by the exponential of their score, and
        `weights_R` is the sum of these weights: a softmax over the experts that answered. For a Switch layer also their
        probability, the product of their coordinates' softmaxes."""
        factor_R = 1 / weights_R.where(weights_R > 0, 1.0)
        if not self.is_switch:
            return factor_R
        normalizers = [part.logsumexp(1) for part in torch.split(scores_RS, list(self.grid_size), dim=1)]
        normalizer_R, answers = torch.stack(normalizers).sum(0), dispatch.answers
        each = [np.empty(0, dtype=np.int64), *[call.rows for call in answers]]
        rows_L = torch.from_numpy(np.concatenate(each)).to(scores_RS.device)
        sizes = np.array([len(call.rows) for call in answers], dtype=np.int64)
        experts_L = torch.from_numpy(np.repeat(np.array([call.expert for call in answers], dtype=np.int64), sizes))
        columns_LD = dispatch.candidates.grid.columns_ND[experts_L].to(scores_RS.device)
        log_L = scores_RS[rows_L[:, None], columns_LD].sum(1) - normalizer_R[rows_L]
        return factor_R * torch.zeros_like(normalizer_R).index_add(0, rows_L, log_L.exp())

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


def sound(scores_RS: torch.Tensor) -> torch.Tensor:
    """Return the scores in the form that choosing needs: on the CPU, outside of the graph, finite."""
    return torch.nan_to_num(scores_RS.detach().cpu(), nan=-1e30, posinf=1e30, neginf=-1e30)
