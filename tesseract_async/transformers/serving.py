"""Makes experts of a Transformers checkpoint that a `TesseractServer` can host."""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from tesseract_async.experts.manifest import split_uid
from tesseract_async.experts.run import Value
from tesseract_async.runtime.backend import BackendSettings, ExpertBackend, MakesScheduler
from tesseract_async.server.registry import optimizer_maker
from tesseract_async.transformers.families import gate_of
from tesseract_async.transformers.shards import Checkpoint
from tesseract_async.wire.tensors import TensorSpec


class CheckpointExpert(nn.Module):
    """One expert: ``[rows, hidden]`` -> ``[rows, hidden]``, as its family computes it.

    Its parameters bear the names of the family's own, without the dimension that counts the experts.
    """

    def __init__(self, family: nn.Module, tensors: Mapping[str, torch.Tensor], *, trains: bool) -> None:
        """`family`: the experts module of a layer, for what is not a parameter. `tensors` are kept, not copied."""
        super().__init__()
        for name, value in vars(family).items():
            if not name.startswith("_") and isinstance(value, bool | int | float):
                setattr(self, name, value)
        if isinstance(act := getattr(family, "act_fn", None), nn.Module):
            self.act_fn = act
        self.apply_gate = gate_of(family)
        for name, x in tensors.items():
            self.register_parameter(name, nn.Parameter(x, requires_grad=trains))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.has_gate:
            hidden = self.apply_gate(self, self._project(x, "gate_up_proj"))
        else:
            hidden = self.act_fn(self._project(x, "up_proj"))
        return self._project(hidden, "down_proj")

    def _project(self, x: torch.Tensor, name: str) -> torch.Tensor:
        weight, bias = getattr(self, name), getattr(self, f"{name}_bias", None)
        return F.linear(x, weight.t() if self.is_transposed else weight, bias)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointOptions:
    """How the experts of a checkpoint are hosted."""

    dtype: torch.dtype | None = None
    """That rows travel in and are computed in; None: the checkpoint's."""
    master: torch.dtype | None = None
    """That the weights are kept and trained in; None: `dtype`."""
    optimizer: str | None = None
    """A name of `server.registry.OPTIMIZERS`; None freezes the experts."""
    optimizer_options: Mapping[str, Value]
    scheduler: MakesScheduler | None = None
    max_batch_size: int = 4096


class CheckpointExperts:
    """The experts of one checkpoint, as many of them as are asked for."""

    def __init__(self, folder: Path, options: CheckpointOptions, settings: BackendSettings) -> None:
        """Reads the folder's configuration. Blocking. Raises: ValueError, as `Checkpoint`."""
        self.checkpoint = Checkpoint(folder)
        self._options = options
        self._dtype = options.dtype or self.checkpoint.dtype
        self._master = options.master or self._dtype
        if self._master != self._dtype:
            settings = dataclasses.replace(settings, autocast=self._dtype)
        self._settings = dataclasses.replace(settings, stochastic=False)

    def build(self, uids: Iterable[str]) -> dict[str, ExpertBackend]:
        """Read these experts, ``PREFIX.LAYER.EXPERT``, whose parameters are views of one tensor per layer and name.

        Blocking. Raises: ValueError for uids that are no expert of the model, or files that do not hold them.
        """
        wanted: dict[int, dict[int, str]] = {}
        for uid in uids:
            _, coords = split_uid(uid)
            if len(coords) != 2:
                raise ValueError(f"an expert of a checkpoint is PREFIX.LAYER.EXPERT, not {uid}")
            wanted.setdefault(coords[0], {})[coords[1]] = uid
        numbers = {layer: sorted(found) for layer, found in sorted(wanted.items())}
        read = self.checkpoint.read(numbers, self._master)
        backends = {}
        for layer, experts in numbers.items():
            family = self.checkpoint.layers[layer].module
            for row, expert in enumerate(experts):
                own = {name: x[row] for name, x in read[layer].items()}
                backends[wanted[layer][expert]] = self._backend(family, own)
        return backends

    def _backend(self, family: nn.Module, tensors: Mapping[str, torch.Tensor]) -> ExpertBackend:
        options, spec = self._options, TensorSpec((self.checkpoint.hidden_size,), self._dtype)
        module = CheckpointExpert(family, tensors, trains=options.optimizer is not None)
        optimizer = optimizer_maker(options.optimizer, module, options.optimizer_options)
        return ExpertBackend(
            module,
            optimizer=optimizer,
            scheduler=None if optimizer is None else options.scheduler,
            args_schema=(spec,),
            outputs_schema=spec,
            max_batch_size=options.max_batch_size,
            settings=self._settings,
        )
