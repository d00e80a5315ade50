"""Agreement of the processes that divide a batch's rows: what fails in one of them fails in all, at the same point.

A row may make the module raise in one process alone, in its forward or its backward pass, while the others wait for
that process in a collective. So within an `Agreement.section` all of them say whether they are well before each
collective of FSDP, and stop together where one is not.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather, DefaultReduceScatter

from tesseract_async.runtime.mesh_link import FaultElsewhere


class Agreement:
    """Of the processes of one group; each makes one of these."""

    def __init__(self, group: dist.ProcessGroup, units: Sequence[FSDPModule]) -> None:
        """`group`: knows tensors of the CPU. `units`: the parts of the module that FSDP gathers.

        Raises: ValueError for a part whose parameters are spread over several meshes.
        """
        self._group = group
        self._is_open = False
        for unit in units:
            unit.set_custom_all_gather(_AllGather(self.check))
            unit.set_custom_reduce_scatter(_ReduceScatter(self.check))

    @contextlib.contextmanager
    def section(self) -> Iterator[None]:
        """Enclose what all do alike. Raises: FaultElsewhere where another process had a fault."""
        self._is_open = True
        try:
            yield
        except FaultElsewhere:
            raise
        except BaseException:
            self._vote(True)  # the others hear of it where they ask next
            raise
        finally:
            self._is_open = False
        if self._vote(False):
            raise FaultElsewhere

    def check(self) -> None:
        """Stop where another process had a fault. Raises: FaultElsewhere."""
        if self._is_open and self._vote(False):
            raise FaultElsewhere

    def _vote(self, failed: bool) -> bool:
        """Return whether any process failed."""
        flag = torch.full((), int(failed), dtype=torch.uint8)
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group)
        return bool(flag)


class _AllGather(DefaultAllGather):
    def __init__(self, check: Callable[[], None]) -> None:
        self._check = check

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._check()
        return super().__call__(*args, **kwargs)


class _ReduceScatter(DefaultReduceScatter):
    def __init__(self, check: Callable[[], None]) -> None:
        self._check = check

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._check()
        return super().__call__(*args, **kwargs)
