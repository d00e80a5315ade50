"""Builds a module of which each process keeps its part only.

The module is built on PyTorch's ``meta`` device first, where nothing takes memory, and spread there, which tells which
part of each parameter belongs to this process. Then it is built for real; as soon as the next layer is begun, the one
before is cut down to that part. So no process ever holds more than its part and one layer, with any builder. Where that
cannot be (the builder does not run on ``meta``, or goes back to weights that it made before), the module is built
whole.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn
from torch._ops import OpOverload
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tesseract_async.errors import describe
from tesseract_async.runtime.mesh_plans import Plan
from tesseract_async.wire.tensors import Schema

logger = logging.getLogger(__name__)

Build = Callable[[], tuple[nn.Module, tuple[Schema, ...]]]
"""Returns a module and the schemas of its arguments: the same in every process."""

Box = tuple[Sequence[int], Sequence[int]]
"""The offsets of a part in each dimension, and its sizes."""


def build_spread(
    build: Build, plan: Plan, mesh: DeviceMesh, place: torch.device
) -> tuple[nn.Module, tuple[Schema, ...], DeviceMesh | None]:
    """Return the spread module, its args_schema, and the mesh over which rows are divided.

    Raises: what the builder and the plan raise; ValueError for a module without parameters.
    """
    state = torch.get_rng_state()
    found = _planned(build, plan, mesh)
    torch.set_rng_state(state)
    if found is not None:
        module, schema, rows, order = found
        cuts = _Cuts([None if one is None else box_of(one) for one in order])
        if cuts.build(build):
            return _filled(module, order, cuts, place), schema, rows
        logger.info("this expert's builder goes back to weights that it has made: it is built whole")
        torch.set_rng_state(state)
    module, schema = build()
    _check(module)
    rows = plan(module, mesh)
    return module.to(place), schema, rows


def box_of(x: torch.Tensor) -> Box:
    if not isinstance(x, DTensor):
        return [0] * x.dim(), list(x.shape)
    (chunk,) = x.__create_chunk_list__()  # type: ignore[no-untyped-call]
    return list(chunk.offsets), list(chunk.sizes)


def _check(module: nn.Module) -> None:
    if next(module.parameters(), None) is None:
        raise ValueError(f"{type(module).__name__} has no parameters: there is nothing to spread")


_Planned = tuple[nn.Module, tuple[Schema, ...], DeviceMesh | None, list[nn.Parameter | None]]


def _planned(build: Build, plan: Plan, mesh: DeviceMesh) -> _Planned | None:
    """Return a module on ``meta``, spread, and its parameters in the order in which they were made."""
    made: list[nn.Parameter] = []

    def note(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            made.append(parameter)

    hook = register_module_parameter_registration_hook(note)
    try:
        with torch.device("meta"):
            module, schema = build()
    except Exception as error:  # it may look at numbers, which ``meta`` does not have
        logger.info("an expert cannot be built on meta: %s", describe(error))
        return None
    finally:
        hook.remove()
    _check(module)
    names = {id(one): name for name, one in module.named_parameters()}
    if any(not one.is_meta for one in (*module.parameters(), *module.buffers())):
        return None
    rows = plan(module, mesh)
    spread = dict(module.named_parameters())
    order = [spread.get(names[id(one)]) if id(one) in names else None for one in made]
    return module, schema, rows, order


class _Cuts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The parts of parameters that this process keeps while a builder makes the next one."""

    def __init__(self, boxes: Sequence[Box | None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kept: list[torch.Tensor | None] = []
        self.buffers: list[torch.Tensor] = []
        self._boxes = boxes
        self._open: list[tuple[nn.Module, str]] = []
        self._went_back = False

    def build(self, build: Build) -> bool:
        """Return whether all was made as on ``meta``, and nothing was looked at or changed after it was cut."""
        hook = register_module_parameter_registration_hook(self._note)
        try:
            with self:
                module, _ = build()
                self._close()
            self.buffers = list(module.buffers())
        except (NotImplementedError, RuntimeError) as error:  # it may have looked at the numbers of what was cut
            logger.info("an expert cannot be cut while it is built: %s", describe(error))
            return False
        finally:
            hook.remove()
        return not self._went_back and len(self.kept) == len(self._boxes)

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if any(isinstance(x, torch.Tensor) and x.is_meta for x in tree_leaves((args, kwargs))):
            self._went_back = self._went_back or func is not torch.ops.aten.detach.default
        return func(*args, **(kwargs or {}))

    def _note(self, module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is None:
            return
        if self._open and self._open[0][0] is not module:
            self._close()
        self._open.append((module, name))

    def _close(self) -> None:
        for module, name in self._open:
            whole = module._parameters.get(name)
            box = self._boxes[len(self.kept)] if len(self.kept) < len(self._boxes) else None
            if whole is None or box is None or whole.is_meta:  # taken away again, or shared with a layer before
                self.kept.append(None)
                continue
            part = whole.detach()
            for dim, (offset, size) in enumerate(zip(*box, strict=True)):
                part = part.narrow(dim, offset, size)
            self.kept.append(part.clone())
            module._parameters[name] = nn.Parameter(whole.detach().to("meta"), whole.requires_grad)
        self._open.clear()


def _filled(module: nn.Module, order: Sequence[nn.Parameter | None], cuts: _Cuts, place: torch.device) -> nn.Module:
    numbers = {id(one): number for number, one in enumerate(order) if one is not None and cuts.kept[number] is not None}
    weights = {}
    for name, one in module.named_parameters():
        local = cast(torch.Tensor, cuts.kept[numbers[id(one)]]).to(place)
        weights[name] = like(one, local)
    made = iter(cuts.buffers)
    for part in module.modules():
        for name, buffer in part._buffers.items():
            part._buffers[name] = None if buffer is None else next(made).to(place)
    # assigned, not copied: the parts are there once
    module.load_state_dict({**module.state_dict(), **weights}, assign=True)
    return module


def like(parameter: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    """Return this process's part of something that is spread as `parameter` is."""
    if not isinstance(parameter, DTensor):
        return local
    return DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
