"""`LocalMixture`: a gate whose experts are here: an ordinary module, which answers as the swarm did."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from tesseract_async.client.dispatch import ExpertCall, ForwardDispatch
from tesseract_async.client.gate import Gate, Mixed, sound
from tesseract_async.client.latency import Patience
from tesseract_async.client.routing import Candidates, LiveGrid
from tesseract_async.client.settings import MixtureSettings
from tesseract_async.errors import NotEnoughExperts
from tesseract_async.experts.manifest import split_uid
from tesseract_async.runtime.gradients import per_row
from tesseract_async.wire.tensors import Structure, flatten


class LocalMixture(Gate):
    """A `GatingFunction` without a swarm: the experts are its own modules, trained and saved with it.

    The state of a `GatingFunction` loads into it, and leaves the experts as they are; its own state loads into a
    `GatingFunction`, which takes the gate's part.
    """

    def __init__(
        self,
        experts: Mapping[str, nn.Module],
        *,
        uid_prefix: str,
        grid_size: Sequence[int],
        in_features: int,
        k_best: int = 4,
        k_min: int = 1,
        route: Literal["sample", "token"] = "sample",
        settings: MixtureSettings | None = None,
        is_switch: bool = False,
        is_awaited: bool = False,
    ) -> None:
        """`experts`: by uid, such as those of `SavedExperts`; of other grids than `uid_prefix` they are left out.
        `is_switch`: answer as a `SwitchGatingFunction`. `is_awaited`: calls are awaited, as those of a gate on a
        `TesseractNode` are, so that the same model works with both. The rest: see `GatingFunction`.

        Raises: ValueError or TypeError as `GatingFunction`; ValueError for an expert outside of the grid.
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
        self.is_switch, self.is_awaited = is_switch, is_awaited
        coords = sorted(at for prefix, at in map(split_uid, experts) if prefix == uid_prefix)
        for at in coords:
            if len(at) != len(self.grid_size) or any(i >= size for i, size in zip(at, self.grid_size, strict=True)):
                raise ValueError(f"there is no {at} in a grid of {self.grid_size}")
        # a module's name has no dots
        names = ["_".join(map(str, at)) for at in coords]
        uids = [".".join((uid_prefix, *map(str, at))) for at in coords]
        self.experts = nn.ModuleDict({name: experts[uid] for name, uid in zip(names, uids, strict=True)})
        grid = np.array(coords, dtype=np.int64).reshape(-1, len(self.grid_size))
        self._candidates = Candidates(uid_prefix, LiveGrid(grid, self.grid_size), {})

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Take a state of its own, or a gate's, which leaves the experts as they are."""
        start = f"{prefix}experts."
        if not any(name.startswith(start) for name in state_dict):
            state_dict |= self.experts.state_dict(prefix=start)
        nn.Module._load_from_state_dict(self, state_dict, prefix, *rest)

    def forward(self, x: torch.Tensor, *args: Structure, **kwargs: Structure) -> Structure:
        """See `GatingFunction.forward`; awaited if `is_awaited`. Raises: SchemaMismatch; NotEnoughExperts."""
        return self._output(x, args, kwargs) if self.is_awaited else self._mix(x, args, kwargs).output

    def mix(self, x: torch.Tensor, *args: Structure, **kwargs: Structure) -> Structure:
        return self._later(x, args, kwargs) if self.is_awaited else self._mix(x, args, kwargs)

    async def _later(self, x: torch.Tensor, args: tuple[Structure, ...], kwargs: Mapping[str, Structure]) -> Mixed:
        return self._mix(x, args, kwargs)

    async def _output(self, x: torch.Tensor, args: tuple[Structure, ...], kwargs: Mapping[str, Structure]) -> Structure:
        return self._mix(x, args, kwargs).output

    def _mix(self, x: torch.Tensor, args: tuple[Structure, ...], kwargs: Mapping[str, Structure]) -> Mixed:
        rows, keyword_rows, leading_shape = self._rows((x, *args), kwargs)
        given, returns = (rows, dict(keyword_rows)), self._own_dtype(x)
        scores_RS, candidates = self._scores(rows[0]), self._candidates
        if not len(candidates):
            raise NotEnoughExperts(1, len(scores_RS), {})
        dispatch = ForwardDispatch(
            candidates,
            sound(scores_RS),
            k_best=self.k_best,
            k_min=self.k_min,
            settings=self.settings,
            patience=Patience(1.0, 1.0),
        )
        dispatch.start(0.0)
        device, columns_ND = scores_RS.device, candidates.grid.columns_ND
        # without rows, an expert says what an answer looks like
        calls = dispatch.calls_to_send(0.0) or [ExpertCall(0, candidates.uid(0), np.empty(0, dtype=np.int64), 0.0)]
        asked = [(call, torch.from_numpy(call.rows).to(device)) for call in calls]
        values = [scores_RS[at][:, columns_ND[call.expert].to(device)].sum(1) for call, at in asked]
        top_R = torch.full((len(scores_RS),), -torch.inf, dtype=scores_RS.dtype, device=device)
        for (_, at), value in zip(asked, values, strict=True):
            top_R[at] = torch.maximum(top_R[at], value.detach())
        weights_R, sums, answer = torch.zeros_like(top_R), list[torch.Tensor](), None
        for (call, at), value in zip(asked, values, strict=True):
            expert = self.experts["_".join(map(str, candidates.coords(call.expert)))]
            mine = tree_map_only(torch.Tensor, partial(torch.index_select, dim=0, index=at), given)
            if returns is not None:
                mine = tree_map_only(torch.Tensor, partial(_fitted, expert), mine)
            answer = expert(*mine[0], **mine[1])
            weight_L = (value - top_R[at]).exp()
            weights_R = weights_R.index_add(0, at, weight_L)
            leaves = flatten(answer)
            if not sums:
                sums = [
                    leaf.new_zeros(len(top_R), *leaf.shape[1:], dtype=torch.promote_types(leaf.dtype, torch.float32))
                    for leaf in leaves
                ]
            sums = [
                total.index_add(0, at, leaf.to(total.dtype) * per_row(weight_L, total))
                for total, leaf in zip(sums, leaves, strict=True)
            ]
            if len(call.rows):
                dispatch.answered([call], 0.0)
        if (error := dispatch.shortage()) is not None:
            raise error
        structure, dtypes = answer, [returns or leaf.dtype for leaf in flatten(answer)]
        return self._mixed(
            *(sums, dtypes, structure, dispatch, scores_RS, weights_R, leading_shape),
            versions={},
            settings=self.settings,
        )


def _fitted(expert: nn.Module, tensor: torch.Tensor) -> torch.Tensor:
    """Return what a gate of another dtype gives this expert: floating-point numbers of the expert's."""
    dtypes = (one.dtype for one in expert.parameters() if one.is_floating_point())
    return tensor.to(next(dtypes, tensor.dtype)) if tensor.is_floating_point() else tensor
