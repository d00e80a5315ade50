"""An expert that is spread over the processes of one torch.distributed job, by FSDP or tensor parallelism.

Process 0 leads: it has the node, the batcher, the journal and the device's thread. All others follow: each thing that
the leader's thread does with the expert is one command (`runtime.mesh_link`) that every process carries out. Rows,
weights and gradients travel by torch.distributed, pieces of states by sockets of their own, so that a state that is
being saved or sent is never whole anywhere.

Where the processes divide a batch's rows, a stranger's row that makes the module raise in one of them fails its own
batch, everywhere, and not the mesh (`runtime.mesh_agreement`).
"""

import contextlib
import functools
import itertools
import math
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate
from torch.optim.lr_scheduler import LRScheduler

from tesseract_async.runtime.backend import BackendSettings
from tesseract_async.runtime.gradients import Gradients, add_gradients, are_finite, norm_of
from tesseract_async.runtime.mesh_agreement import Agreement
from tesseract_async.runtime.mesh_building import Build, build_spread, like
from tesseract_async.runtime.mesh_job import groups_of, link_of_job, on_cpu
from tesseract_async.runtime.mesh_plans import Plan, check_torch, fsdp
from tesseract_async.runtime.mesh_states import SpreadStates, broadcast, described, local, raw
from tesseract_async.runtime.module_runner import ModuleRunner
from tesseract_async.runtime.stepping import take_step
from tesseract_async.runtime.watching import copies
from tesseract_async.wire.packed import Value
from tesseract_async.wire.tensors import Schema


class SpreadGradients(list[torch.Tensor | None]):
    """The leader's part of the gradients of a spread expert's parameters, and facts about the whole."""

    def __init__(self, mine: Gradients, number: int, squared_norm: float) -> None:
        super().__init__(mine)
        self.number, self.squared_norm = number, squared_norm


class _SteadyRunner(ModuleRunner):
    """A runner that relies on what was learned when the module was tried out, so that no call is repeated because of
    what one process sees."""

    def _run(self, inputs: Sequence[torch.Tensor], training: bool, seed: int | None) -> object:
        draws = self.is_stochastic(training)
        given = copies(inputs) if self._habits[training].writes else inputs
        return self._call(given, seed if draws else None, records=False)


@dataclass(frozen=True, slots=True)
class Spread:
    """The arguments of `MeshBackend` that are the same for all experts."""

    mesh: DeviceMesh
    plan: Plan
    timeout: float


class MeshBackend(SpreadStates):
    """An expert whose module is spread over `mesh`. Every process of the job makes the same ones, in the same order.

    - `build`: returns a module and its args_schema, as the experts' builders do. It is called in every process, twice
      where it can run on PyTorch's ``meta`` device; a process then keeps its part of each layer as soon as the next one
      is made.
    - `mesh`: over all processes, as ``torch.distributed.device_mesh.init_device_mesh`` makes it.
    - `plan`: spreads the module in place; returns the one-dimensional mesh over which a batch's rows are divided, or
      None if every process computes all rows. See `runtime.mesh_plans`.
    - `optimizer`: makes it of the spread module, when it is first needed; `scheduler` makes that one's schedule.
    - `timeout`: seconds that one command may take, more than the slowest batch. The process groups of `mesh` and of the
      plan get it, too.

    The others as for `ExpertBackend`. The leader's is given to a `TesseractServer`; all others call `follow`.

    Raises: as `ExpertBackend`, and ValueError for settings that a mesh does not support.
    """

    _runner: _SteadyRunner
    _runner_type = _SteadyRunner

    def __init__(
        self,
        build: Build,
        *,
        mesh: DeviceMesh,
        plan: Plan = fsdp,
        optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None = None,
        scheduler: Callable[[torch.optim.Optimizer], LRScheduler] | None = None,
        kwargs_schema: Mapping[str, Schema] | None = None,
        max_batch_size: int = 4096,
        settings: BackendSettings | None = None,
        timeout: float = 60.0,
    ) -> None:
        check_torch()
        settings = settings or BackendSettings()
        if settings.cuda_graphs or settings.compile_mode is not None or settings.lockstep:
            raise ValueError("an expert that is spread over a mesh is not compiled, recorded, or lockstep")
        if mesh.size() != dist.get_world_size():
            raise ValueError(f"the mesh has {mesh.size()} of the job's {dist.get_world_size()} processes: it needs all")
        self.link = link_of_job(timeout)
        self.mesh = mesh
        self._place = torch.device(mesh.device_type)
        if self._place.type == "cuda":
            self._place = torch.device("cuda", torch.cuda.current_device())
        self.num_processes = mesh.size()
        self.rebuild = lambda: build()[0]
        module, args_schema, self._rows = build_spread(build, plan, mesh, self._place)
        self._num_parts = 1 if self._rows is None else self._rows.size()
        self._part = 0 if self._rows is None else self._rows.get_local_rank()
        self._units = [one for one in module.modules() if isinstance(one, FSDPModule)]
        self.groups = groups_of(module, mesh, self._rows, self.link.timeout)
        """Process groups that its collectives use."""
        self._agreement: Agreement | None = None
        if self._rows is not None:  # a fault is found by the CPU, and need not wait for what a GPU has yet to compute
            self._agreement = Agreement(on_cpu(self._rows.get_group(), self.link.timeout), self._units)
        for unit in self._units:
            # a plan's outermost is not, by default: its weights would then be PyTorch's, of memory that may be gone
            unit.set_reshard_after_forward(True, recurse=False)
            if self._rows is not None:  # rows are divided, not repeated: their gradients add up
                unit.set_gradient_divide_factor(1.0)
                unit.set_force_sum_reduction_for_comms(True)  # gloo has no other
        self._sums: dict[int, Gradients] = {}
        self._states = {}
        super().__init__(
            module,
            optimizer=None if optimizer is None else functools.partial(optimizer, module),
            scheduler=scheduler,
            args_schema=args_schema,
            kwargs_schema=kwargs_schema,
            max_batch_size=max_batch_size,
            settings=settings,
        )
        self._index = self.link.add(self)

    def follow(self) -> None:
        """Do what the leader does with all experts of this job, until it leaves. See `MeshLink.follow`."""
        self.link.follow()

    async def wait_lost(self) -> str:
        """Wait until the mesh is lost, and return why. The leader's process should then end. See
        `MeshLink.wait_lost`."""
        return await self.link.wait_lost()

    def leave(self) -> None:
        """Let the followers end. Called on the leader, after the last command; blocking."""
        self.link.leave()

    # -- What the runtime calls, on the leader ----------------------------------------------------------------------

    def prepare(self) -> None:
        if self._make_optimizer is not None and self.optimizer is None:
            self._command("prepare")

    def forward(
        self, inputs: Sequence[torch.Tensor | None], *, training: bool = False, seed: int | None = None
    ) -> list[torch.Tensor]:
        found: list[torch.Tensor] = self._command("forward", described(inputs), training, seed, given=inputs)[0]
        return found

    def gradients(
        self,
        inputs: Sequence[torch.Tensor | None],
        output_gradients: Gradients,
        *,
        training: bool = False,
        seed: int | None = None,
        weights: torch.Tensor | None = None,
    ) -> tuple[Gradients, Gradients]:
        self.prepare()
        given = [*inputs, *output_gradients, weights]
        number = next(self.link.numbers)
        found = self._command("gradients", number, described(given), training, seed, given=given)
        of_inputs: Gradients = found[0][0]
        return of_inputs, self._own(number, [found[0][1], *found[1:]])

    def add(self, left: Gradients | None, right: Gradients | None) -> Gradients | None:
        if left is None or right is None:
            return left if right is None else right
        number = next(self.link.numbers)
        return self._own(number, self._command("add", number, _number_of(left), _number_of(right)))

    def scaled(self, gradients: Gradients, factor: float) -> Gradients:
        number = next(self.link.numbers)
        return self._own(number, self._command("scale", number, _number_of(gradients), factor))

    def norm_of(self, gradients: Gradients) -> float:
        assert isinstance(gradients, SpreadGradients)
        return math.sqrt(gradients.squared_norm)

    def are_finite(self, gradients: Gradients) -> bool:
        return math.isfinite(self.norm_of(gradients))

    def weights_norm(self) -> float:
        return math.sqrt(sum(self._command("weights")))

    def is_sound(self) -> bool:
        return all(self._command("is_sound"))

    def step(self, gradients: Gradients, call_ids: Sequence[bytes] = (), *, peer: Hashable = None) -> int:
        account = None if peer is None or not self.settings.trim_peers else hash(peer)
        self._command("step", _number_of(gradients), account, given=call_ids)
        return self.version

    def to(self, device: torch.device) -> None:
        """Raises: ValueError for a device of another kind than the mesh's."""
        if device.type != self._place.type:
            raise ValueError(f"this expert is spread over {self._place.type} devices; it cannot move to {device}")

    def _own(self, number: int, squares: Sequence[float]) -> SpreadGradients:
        found = SpreadGradients(self._sums[number], number, sum(squares))
        weakref.finalize(found, self.link.forget, self._index, number)
        return found

    # -- What every process does -------------------------------------------------------------------------------------

    def carry_out(self, name: str, args: Sequence[Value]) -> Value:
        return getattr(self, f"_do_{name}")(*args)

    def recover(self) -> None:
        inner = {id(below) for one in self._units for below in one.modules() if below is not one}
        for unit in self._units:
            if id(unit) not in inner:  # it resets those inside, too
                unit.reset_iter_state()
        self._drop_gradients()  # of parts that were whole until now

    def _drop_gradients(self) -> None:
        for parameter in self.module.parameters():
            parameter.grad = None

    def _do_forget(self, number: int) -> None:
        if not number:  # the expert itself
            self._sums.clear()
            self._states.clear()
        self._sums.pop(number, None)
        self._states.pop(number, None)

    def _do_prepare(self) -> None:
        super().prepare()

    def _do_forward(self, described: Value, training: bool, seed: int | None) -> list[torch.Tensor] | None:
        inputs: list[torch.Tensor] = self._shared(described)  # type: ignore[assignment]
        with self._section():
            outputs = super().forward([self._my_rows(x) for x in inputs], training=training, seed=self._my_seed(seed))
        whole = [self._all_rows(x, len(inputs[0])) for x in outputs]
        return whole if self.link.rank == 0 else None

    def _do_gradients(self, number: int, described: Value, training: bool, seed: int | None) -> Value:
        *given, weights = self._shared(described)
        num_inputs = len(self.input_specs)
        inputs: list[torch.Tensor] = given[:num_inputs]  # type: ignore[assignment]
        try:
            with self._section():
                found, of_parameters = super().gradients(
                    [self._my_rows(x) for x in inputs],
                    [None if x is None else self._my_rows(x, pads_zeros=True) for x in given[num_inputs:]],
                    training=training,
                    seed=self._my_seed(seed),
                    weights=None if weights is None else self._my_rows(weights),
                )
        finally:
            self._drop_gradients()
        square = self._keep(number, of_parameters)
        whole = [None if x is None else self._all_rows(x, len(inputs[0])) for x in found]
        return (whole, square) if self.link.rank == 0 else square

    def _backpropagate(
        self, outputs: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]
    ) -> Sequence[torch.Tensor | None]:
        # FSDP reduces in hooks of backward(): autograd.grad would not see the parameters
        torch.autograd.backward(outputs, gradients)
        if self._agreement is not None:
            self._agreement.check("gradients", [one.grad is None for one in sources])
        with torch.no_grad():
            return [self._local_gradient(one) if isinstance(one, nn.Parameter) else one.grad for one in sources]

    def _do_add(self, number: int, left: int, right: int) -> float:
        return self._keep(number, add_gradients(self._sums[left], self._sums[right]) or ())

    def _do_scale(self, number: int, of: int, factor: float) -> float:
        return self._keep(number, [None if x is None else x * factor for x in self._sums[of]])

    def _do_weights(self) -> float:
        return self._square([local(one) for one in self.parameters])

    def _do_is_sound(self) -> bool:
        return are_finite([local(x) for x in self._trained()])

    def _do_step(self, number: int, account: int | None) -> None:
        super().step(self._sums[number], self._given or (), peer=account)

    def _apply(self, optimizer: torch.optim.Optimizer, gradients: Gradients) -> None:
        limit = self.settings.clip_gradient_norm
        if limit is not None:
            total = torch.tensor(self._square(gradients), dtype=torch.float64, device=self._place)
            dist.all_reduce(total)
            if (norm := math.sqrt(float(total))) > limit:
                gradients = [None if x is None else x * (limit / norm) for x in gradients]
        whole = [
            x if x is None else like(one, x) for one, x in itertools.zip_longest(self.parameters, gradients)
        ]  # fewer, if groups were added since
        take_step(optimizer, self.parameters, whole, None)

    def _take_optimizer(self, optimizer: torch.optim.Optimizer | None, scheduler: LRScheduler | None) -> None:
        super()._take_optimizer(optimizer, scheduler)
        for group in () if optimizer is None else optimizer.param_groups:
            kinds = {isinstance(one, DTensor) for one in group["params"]}
            if len(kinds) > 1:  # kernels for many tensors take one kind only
                group.update({name: False for name in ("fused", "foreach") if name in group})
            elif True in kinds and isinstance(optimizer, torch.optim.SGD):  # not known to DTensor
                group["fused"] = False

    # -- Rows ---------------------------------------------------------------------------------------------------------

    def _section(self) -> contextlib.AbstractContextManager[None]:
        """Enclose what may raise in one process alone."""
        return contextlib.nullcontext() if self._agreement is None else self._agreement.section()

    def _my_seed(self, seed: int | None) -> int | None:
        return None if seed is None else (seed + self._part * 0x632BE5AB) & 0x7FFF_FFFF_FFFF_FFFF

    def _my_rows(self, x: torch.Tensor, *, pads_zeros: bool = False) -> torch.Tensor:
        """Return this process's rows, as many as any other's: where they don't suffice, copies of the last one, whose
        gradient is zero."""
        if self._num_parts == 1:
            return x
        each = -(-len(x) // self._num_parts)
        mine = x[self._part * each : (self._part + 1) * each]
        missing = each - len(mine)
        if not missing:
            return mine
        more = x[-1:].expand(missing, *x.shape[1:])
        return torch.cat([mine, torch.zeros_like(more) if pads_zeros else more])

    def _all_rows(self, x: torch.Tensor, num_rows: int) -> torch.Tensor:
        if self._rows is None:
            return x
        x = x.detach().contiguous()
        found = x.new_empty(self._num_parts * len(x), *x.shape[1:])
        dist.all_gather_single(raw(found), raw(x), group=self._rows.get_group())
        return found[:num_rows]

    def _shared(self, described: Value) -> list[torch.Tensor | None]:
        given = [None] * len(described) if self._given is None else self._given
        found: list[torch.Tensor | None] = []
        for one, x in zip(described, given, strict=True):
            if one is None:
                found.append(None)
                continue
            name, shape = one
            x = torch.empty(shape, dtype=getattr(torch, name), device=self._place) if x is None else x.contiguous()
            broadcast(x)
            found.append(x)
        return found

    # -- Gradients ----------------------------------------------------------------------------------------------------

    def _local_gradient(self, parameter: nn.Parameter) -> torch.Tensor | None:
        """Return this process's part of a parameter's gradient over all rows."""
        gradient = parameter.grad
        if gradient is None:
            return None
        if isinstance(gradient, DTensor) and isinstance(parameter, DTensor):
            if gradient.placements != parameter.placements:
                gradient = gradient.redistribute(parameter.device_mesh, parameter.placements)
            gradient = local(gradient)
        if self._rows is not None and not _divides(parameter, self._rows):
            gradient = gradient.contiguous()
            dist.all_reduce(gradient, group=self._rows.get_group())
        return gradient

    def _keep(self, number: int, gradients: Gradients) -> float:
        self._sums[number] = gradients
        return self._square(gradients)

    def _square(self, tensors: Gradients) -> float:
        """Return this process's share of the squared norm; parts that several processes have alike are divided among
        these."""
        total = 0.0
        for one, x in zip(self.parameters, tensors, strict=False):
            if x is not None and x.numel():
                total += norm_of([x.detach()]) ** 2 / _num_copies(one, self.link.size)
        return total


def _number_of(gradients: Gradients) -> int:
    assert isinstance(gradients, SpreadGradients)
    return gradients.number


def _num_copies(x: torch.Tensor, num_processes: int) -> int:
    if not isinstance(x, DTensor):
        return num_processes
    for size, placement in zip(x.device_mesh.shape, x.placements, strict=True):
        num_processes //= 1 if isinstance(placement, Replicate) else size
    return num_processes


def _divides(x: torch.Tensor, rows: DeviceMesh) -> bool:
    """Return whether FSDP adds up this tensor's gradient over the processes that divide the rows."""
    if not isinstance(x, DTensor):
        return False
    ranks = [set(dist.get_process_group_ranks(group)) for group in x.device_mesh.get_all_groups()]
    ranks.append(set(x.device_mesh.mesh.flatten().tolist()))  # over two dimensions, as HSDP
    return set(dist.get_process_group_ranks(rows.get_group())) in ranks
