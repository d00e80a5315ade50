"""Agreement of the processes that divide a batch's rows: what fails in one of them fails in all, at the same point.

A row may make the module raise in one process alone, in its forward or its backward pass, while the others wait for
that process in a collective; or take another way through its layers, so that the processes would wait for different
collectives. So within an `Agreement.section`, before each collective of FSDP, each process says whether it is well and
where it is; all stop together if one has failed, or is at another point.
"""

import contextlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather, DefaultReduceScatter

from tesseract_async.runtime.mesh_link import FaultElsewhere

DIFFERS: Final = "rows decide what this module computes: then they cannot be divided over processes, as fsdp does"


class Agreement:
    """The agreement of the processes of one group; each makes one of these."""

    def __init__(self, group: dist.ProcessGroup, units: Sequence[FSDPModule]) -> None:
        """`group`: knows tensors of the CPU. `units`: the parts of the module that FSDP gathers.

        Raises: ValueError for a part whose parameters are spread over several meshes.
        """
        self._group = group
        self._is_open = False
        for number, unit in enumerate(units):
            unit.set_custom_all_gather(_AllGather(self.check, number))
            unit.set_custom_reduce_scatter(_ReduceScatter(self.check, number))

    @contextlib.contextmanager
    def section(self) -> Iterator[None]:
        """Enclose work that all processes do alike. Raises: FaultElsewhere as `check`."""
        self._is_open = True
        try:
            yield
            self.check("end")
        except FaultElsewhere:
            raise
        except BaseException:  # a module may raise anything, and whatever it is, the others wait for this process
            self._vote(True, 0)  # they hear of it where they ask next
            raise
        finally:
            self._is_open = False

    def check(self, *where: object) -> None:
        """Stop where another process had a fault, or is not at the same point. Raises: FaultElsewhere."""
        if self._is_open:
            failed, highest, lowest = self._vote(False, zlib.crc32(repr(where).encode()))
            if failed:
                raise FaultElsewhere
            if highest != lowest:
                raise FaultElsewhere(DIFFERS)

    def _vote(self, failed: bool, where: int) -> tuple[bool, int, int]:
        """Return whether any process failed, and the greatest and the least number of the points where they are."""
        said = torch.tensor([int(failed), where, -where])
        dist.all_reduce(said, dist.ReduceOp.MAX, group=self._group)
        any_failed, highest, lowest = said.tolist()
        return bool(any_failed), highest, -lowest


class _AllGather(DefaultAllGather):
    def __init__(self, check: Callable[..., None], number: int) -> None:
        self._check, self._number = check, number

    def __call__(self, output_tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self._check("gather", self._number)
        return super().__call__(output_tensor, *args, **kwargs)


class _ReduceScatter(DefaultReduceScatter):
    def __init__(self, check: Callable[..., None], number: int) -> None:
        self._check, self._number = check, number

    def __call__(self, output_tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self._check("reduce", self._number, output_tensor.numel())  # fewer, if some parameters have no gradient
        return super().__call__(output_tensor, *args, **kwargs)
