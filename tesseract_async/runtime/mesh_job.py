"""This process's job: torch's process group, made or found, and the link to its other processes."""

import os
import weakref
from datetime import timedelta
from typing import Final

import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _get_default_group, _get_default_store, _set_pg_timeout
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor

from tesseract_async.runtime.mesh_link import Counts, MeshLink

_links: Final[weakref.WeakKeyDictionary[object, MeshLink]] = weakref.WeakKeyDictionary()
"""The links, by process group."""
_on_cpu: Final[weakref.WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup]] = weakref.WeakKeyDictionary()
"""Process groups for tensors of the CPU, by the group of the same processes for a GPU's tensors."""


def join_job(timeout: float) -> None:
    """Make torch's process group of the processes that torchrun, or whatever sets its variables, has started.

    A group that somebody else has made is taken as it is. torchrun keeps its store over restarts, and hands out the
    addresses of processes that are gone. So this process meets the others first, and the group uses the addresses of
    this meeting.

    Raises: ValueError where there are no such processes; TimeoutError if they do not meet.
    """
    if dist.is_initialized():
        return
    if "RANK" not in os.environ:
        raise ValueError(
            "--shard is for processes of one job: start them by torchrun -m -- tesseract_async.cli serve ..."
        )
    store, rank, size = next(iter(rendezvous("env://", timeout=timedelta(seconds=timeout))))
    link = MeshLink(store, rank, size, timeout=timeout)
    kind = "cpu"
    if torch.cuda.is_available():
        kind = "cuda"
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group(
        "nccl" if kind == "cuda" else "gloo",
        store=PrefixStore(link.token, store),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout),
    )
    _take(link)


def link_of_job(timeout: float = 60.0) -> MeshLink:
    """Return this process's link to the others of torch's process group; the first call meets them."""
    group = _get_default_group()
    if group not in _links:
        _take(MeshLink(_get_default_store(), dist.get_rank(), dist.get_world_size(), timeout=timeout))
    return _links[group]


def groups_of(module: nn.Module, mesh: DeviceMesh, rows: DeviceMesh | None, timeout: float) -> list[dist.ProcessGroup]:
    """Return the process groups of a module's collectives, whose timeout is `timeout` from now on: a plan that makes
    groups leaves them PyTorch's, of half an hour."""
    meshes = [mesh, *(one.device_mesh for one in module.parameters() if isinstance(one, DTensor))]
    meshes += [] if rows is None else [rows]
    found = {group.group_name: group for one in meshes for group in (_get_default_group(), *one.get_all_groups())}
    for group in found.values():
        _set_pg_timeout(timedelta(seconds=timeout), group)
    return list(found.values())


def on_cpu(group: dist.ProcessGroup, timeout: float) -> dist.ProcessGroup:
    """Return a group of the same processes that knows tensors of the CPU. Blocking."""
    if torch.device("cpu") in group._device_types:
        return group
    if group not in _on_cpu:
        ranks = dist.get_process_group_ranks(group)
        _on_cpu[group] = dist.new_group(ranks, timedelta(seconds=timeout), "gloo", use_local_synchronization=True)
    return _on_cpu[group]


def _take(link: MeshLink) -> None:
    _links[_get_default_group()] = link

    def counts() -> Counts:
        groups = (one for backend in link.followers() for one in getattr(backend, "groups", ()))
        return {one.group_name: one._get_sequence_number_for_group() for one in groups}

    link.counts = counts
