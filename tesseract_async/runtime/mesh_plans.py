"""Plans that spread a module over a mesh: FSDP, and tensor parallelism where the module says how.

A plan is a function that takes the module and a `DeviceMesh` over all processes, spreads the module in place, and
returns the one-dimensional mesh over which the rows of a batch are divided, or None where every process computes all
rows. A plan that does both, with two processes to each tensor, is::

    def plan(module, mesh):
        grid = init_device_mesh(mesh.device_type, (mesh.size() // 2, 2), mesh_dim_names=("rows", "tensors"))
        tensor_parallel(module, grid["tensors"])
        return fsdp(module, grid["rows"])
"""

import importlib
from collections.abc import Callable, Mapping
from typing import Final

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from tesseract_async.errors import describe

Plan = Callable[[nn.Module, DeviceMesh], DeviceMesh | None]

STYLES: Final[Mapping[str, Callable[[], ParallelStyle]]] = {
    "columns": ColwiseParallel,
    "rows": RowwiseParallel,
    "gathered columns": lambda: ColwiseParallel(output_layouts=Replicate()),
}
"""The ways to divide a linear layer's weight: by outputs; by inputs; by outputs, which are then gathered."""


def check_torch() -> None:
    """Raises: ValueError for a PyTorch whose FSDP cannot go on after a fault."""
    if not hasattr(FSDPModule, "reset_iter_state"):
        raise ValueError(f"experts larger than one device need PyTorch 2.13 or newer; this is {torch.__version__}")


def fsdp(module: nn.Module, mesh: DeviceMesh) -> DeviceMesh:
    """FSDP: each process keeps its share of every tensor, and computes its share of the rows.

    The parts of a ``Sequential`` or ``ModuleList`` are gathered one at a time, and the rest in the end.
    """
    for part in reversed(list(module.modules())):  # the innermost first
        if isinstance(part, nn.Sequential | nn.ModuleList):
            for child in part:
                if not isinstance(child, FSDPModule) and next(child.parameters(), None) is not None:
                    fully_shard(child, mesh=mesh, reshard_after_forward=True)
    if not isinstance(module, FSDPModule) and next(module.parameters(), None) is not None:
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    return mesh


def tensor_parallel(module: nn.Module, mesh: DeviceMesh) -> None:
    """Tensor parallelism: each process keeps its share of the large matrices, and computes all rows with that.

    The module says how by a method ``tensor_plan(num_processes)``, which returns styles (`STYLES`) by the names of
    linear layers. Raises: ValueError if it has none, or what that raises.
    """
    own = getattr(module, "tensor_plan", None)
    if own is None:
        raise ValueError(
            f"{type(module).__name__} has no plan for tensor parallelism: give it a method tensor_plan, or spread it "
            "by fsdp or by a function of yours"
        )
    parallelize_module(module, mesh, {name: STYLES[style]() for name, style in own(mesh.size()).items()})


PLANS: Final[Mapping[str, Plan]] = {"fsdp": fsdp, "tp": tensor_parallel}


def find_plan(name: str) -> Plan:
    """Return the plan of that name, or of ``module:function``. Raises: ValueError."""
    if (plan := PLANS.get(name)) is not None:
        return plan
    path, separator, attribute = name.partition(":")
    if not separator:
        raise ValueError(f"no plan named {name!r}; there are {', '.join(PLANS)}, and module:function")
    try:
        found: Plan = getattr(importlib.import_module(path), attribute)
    except Exception as error:  # the module is its author's: it may raise anything
        raise ValueError(f"no plan at {name!r}: {describe(error)}") from error
    if not callable(found):
        raise ValueError(f"no plan at {name!r}: that is no function, but a {type(found).__name__}")
    return found
