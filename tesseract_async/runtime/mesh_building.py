"""Builds a module of which each process keeps its part only."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from tesseract_async.runtime.mesh_plans import Plan
from tesseract_async.wire.tensors import Schema

Built = tuple[nn.Module, tuple[Schema, ...]]


def build_spread(
    build: Callable[[], Built], plan: Plan, mesh: DeviceMesh, place: torch.device
) -> tuple[nn.Module, tuple[Schema, ...], DeviceMesh | None]:
    """Return the spread module, its args_schema, and the mesh over which rows are divided."""
    module, schema = build()
    rows = plan(module, mesh)
    return module.to(place), schema, rows
