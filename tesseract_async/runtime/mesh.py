"""An expert that is spread over the processes of one torch.distributed job, by FSDP or tensor parallelism.

Process 0 leads: it has the node, the batcher, the journal and the device's thread. All others follow: each thing that
the leader's thread does with the expert is one command (`runtime.mesh_link`) that every process carries out. Rows,
weights and gradients travel by torch.distributed, pieces of states by sockets of their own, so that what is being saved
or sent is never whole anywhere.

Where the processes divide a batch's rows, a row may make the module raise in one of them alone, while the others wait
for it in a collective. So before each part that is gathered for itself, all say whether they are well: a stranger's row
fails its own batch, everywhere, and not the mesh.
"""

import functools
import itertools
import math
import os
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _get_default_group, _get_default_store
from torch.distributed.fsdp import FSDPModule
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor, Replicate
from torch.optim.lr_scheduler import LRScheduler

from tesseract_async.runtime import optimizers, states
from tesseract_async.runtime.backend import BackendSettings, ExpertBackend
from tesseract_async.runtime.gradients import Gradients, add_gradients, are_finite, norm_of
from tesseract_async.runtime.mesh_building import Build, box_of, build_spread, like
from tesseract_async.runtime.mesh_link import Counts, FaultElsewhere, MeshLink, Value
from tesseract_async.runtime.mesh_plans import Plan, check_torch, fsdp
from tesseract_async.runtime.module_runner import ModuleRunner
from tesseract_async.runtime.spread_tensor import Part, SpreadTensor, blocks_of
from tesseract_async.runtime.states import StateDict
from tesseract_async.runtime.watching import copies
from tesseract_async.wire.tensors import Schema

_links: Final[weakref.WeakKeyDictionary[object, MeshLink]] = weakref.WeakKeyDictionary()
"""By process group."""


class SpreadGradients(list[torch.Tensor | None]):
    """The leader's part of gradients of a spread expert's parameters, and what is known of the whole."""

    def __init__(self, mine: Gradients, number: int, squared_norm: float) -> None:
        super().__init__(mine)
        self.number, self.squared_norm = number, squared_norm


class _SteadyRunner(ModuleRunner):
    """Goes by what was learned when the module was tried out: no call is repeated because of what one process sees.

    What is raised in one process is raised in all that divide the rows, at the same point (`vote`).
    """

    vote: Callable[[bool], bool] | None = None
    """Tells the others whether this process failed; returns whether any did."""
    _is_running = False

    def run(
        self, inputs: Sequence[torch.Tensor | None], *, training: bool, seed: int | None, gradients: bool
    ) -> list[torch.Tensor]:
        if self.vote is None:
            return super().run(inputs, training=training, seed=seed, gradients=gradients)
        self._is_running = True
        try:
            outputs = super().run(inputs, training=training, seed=seed, gradients=gradients)
        except FaultElsewhere:
            raise
        except BaseException:
            self.vote(True)  # the others hear of it where they ask next
            raise
        finally:
            self._is_running = False
        if self.vote(False):
            raise FaultElsewhere
        return outputs

    def before_unit(self, *_: object) -> None:
        """Stop where another process failed."""
        if self._is_running and self.vote is not None and self.vote(False):
            raise FaultElsewhere

    def _run(self, inputs: Sequence[torch.Tensor], training: bool, seed: int | None) -> object:
        draws = self.is_stochastic(training)
        given = copies(inputs) if self._habits[training].writes else inputs
        return self._call(given, seed if draws else None, records=False)


@dataclass(frozen=True, slots=True)
class Spread:
    """How experts are spread: the arguments of `MeshBackend` that are the same for all of them."""

    mesh: DeviceMesh
    plan: Plan
    timeout: float


class MeshBackend(ExpertBackend):
    """An expert whose module is spread over `mesh`. Every process of the job makes the same ones, in the same order.

    - `build`: returns a module and its args_schema, as the experts' builders do. It is called in every process, twice
      where it can run on PyTorch's ``meta`` device; a process then keeps its part of each layer as soon as the next one
      is made.
    - `mesh`: over all processes, as ``torch.distributed.device_mesh.init_device_mesh`` makes it.
    - `plan`: spreads the module in place; returns the one-dimensional mesh over which a batch's rows are divided, or
      None if every process computes all rows. See `runtime.mesh_plans`.
    - `optimizer`: makes it of the spread module, when it is first needed; `scheduler` makes that one's schedule.
    - `timeout`: seconds that one command may take, more than the slowest batch.

    The others as for `ExpertBackend`. The leader's is given to a `TesseractServer`; all others call `follow`.

    Raises: as `ExpertBackend`, and ValueError for what does not go with a mesh.
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
        if settings.cuda_graphs or settings.compile_mode is not None:
            raise ValueError("an expert that is spread over a mesh is neither compiled nor recorded as a CUDA graph")
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
        self.groups = _groups(module, mesh, self._rows)
        """Process groups that its collectives use."""
        for unit in self._units:
            # a plan's outermost is not, by default: its weights would then be PyTorch's, of memory that may be gone
            unit.set_reshard_after_forward(True, recurse=False)
            if self._rows is not None:  # rows are divided, not repeated: their gradients add up
                unit.set_gradient_divide_factor(1.0)
                unit.set_force_sum_reduction_for_comms(True)  # gloo has no other
        self._given: Any = None
        self._numbers = self.link.numbers
        self._sums: dict[int, Gradients] = {}
        self._states: dict[int, StateDict] = {}
        super().__init__(
            module,
            optimizer=None if optimizer is None else functools.partial(optimizer, module),
            scheduler=scheduler,
            args_schema=args_schema,
            kwargs_schema=kwargs_schema,
            max_batch_size=max_batch_size,
            settings=settings,
        )
        if self._rows is not None:
            self._runner.vote = self._vote
            for unit in self._units:
                unit.register_forward_pre_hook(self._runner.before_unit, prepend=True)
        self._index = self.link.add(self)
        self.link.counts = functools.partial(_counts, self.link)

    def follow(self) -> None:
        """Do what the leader does with all experts of this job, until it leaves. See `MeshLink.follow`."""
        self.link.follow()

    async def wait_lost(self) -> str:
        """Return why, once the mesh is lost. The leader's process should then end. See `MeshLink.wait_lost`."""
        return await self.link.wait_lost()

    def leave(self) -> None:
        """Let the followers go. On the leader, after the last command; blocking."""
        self.link.leave()

    # -- What the runtime calls, on the leader ----------------------------------------------------------------------

    def prepare(self) -> None:
        if self._make_optimizer is not None and self.optimizer is None:
            self._command("prepare")

    def forward(
        self, inputs: Sequence[torch.Tensor | None], *, training: bool = False, seed: int | None = None
    ) -> list[torch.Tensor]:
        found: list[torch.Tensor] = self._command("forward", _described(inputs), training, seed, given=inputs)[0]
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
        number = next(self._numbers)
        found = self._command("gradients", number, _described(given), training, seed, given=given)
        of_inputs: Gradients = found[0][0]
        return of_inputs, self._own(number, [found[0][1], *found[1:]])

    def add(self, left: Gradients | None, right: Gradients | None) -> Gradients | None:
        if left is None or right is None:
            return left if right is None else right
        number = next(self._numbers)
        return self._own(number, self._command("add", number, _number_of(left), _number_of(right)))

    def scaled(self, gradients: Gradients, factor: float) -> Gradients:
        number = next(self._numbers)
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

    def state(self) -> StateDict:
        """Return the state, whose large tensors stay where they are: each process keeps a copy of its parts."""
        number = next(self._numbers)
        boxes = self._command("state", number)
        owner = _Kept()
        weakref.finalize(owner, self.link.forget, self._index, number)

        def handle(leaf: _Leaf) -> SpreadTensor:
            parts = [Part(rank, *boxes_there[leaf.index]) for rank, boxes_there in enumerate(boxes)]

            def read(rank: int, start: int, stop: int) -> bytes | bytearray | memoryview:
                return self.link.read(rank, number, leaf.index, start, stop)

            owner.number = number
            return SpreadTensor(leaf.dtype, leaf.shape, parts, read, owner)

        found: StateDict = _map(self._states[number], lambda leaf: handle(leaf) if isinstance(leaf, _Leaf) else leaf)
        return found

    def load_state(self, state: StateDict) -> None:
        owners = {leaf.owner for leaf in _leaves(state) if isinstance(leaf, SpreadTensor)}
        if owners:
            numbers = {one.number for one in owners if isinstance(one, _Kept)} & self._states.keys()
            if len(owners) > 1 or not numbers:
                raise ValueError("this state is of another expert's processes")
            self._command("load_kept", *numbers)
            return
        # what does not fit must be refused before anybody is asked to load it
        states.check_fits(self.module, state["module"])
        self._command("load", _stripped({**state, "applied": None, "gradient_norms": ()}), given=state)

    def to(self, device: torch.device) -> None:
        """Raises: ValueError for a device of another kind than the mesh's."""
        if device.type != self._place.type:
            raise ValueError(f"this expert is spread over {self._place.type} devices; it cannot move to {device}")

    def _command(self, name: str, *args: Value, given: Any = None) -> list[Value]:
        self._given = given
        try:
            return self.link.command(self._index, name, args)
        finally:
            self._given = None

    def _own(self, number: int, squares: Sequence[float]) -> SpreadGradients:
        found = SpreadGradients(self._sums[number], number, sum(squares))
        weakref.finalize(found, self.link.forget, self._index, number)
        return found

    # -- What every process does -------------------------------------------------------------------------------------

    def carry_out(self, name: str, args: Sequence[Value]) -> Value:
        return _COMMANDS[name](self, *args)

    def recover(self) -> None:
        for parameter in self.module.parameters():
            parameter.grad = None
        inner = {id(below) for one in self._units for below in one.modules() if below is not one}
        for unit in self._units:
            if id(unit) not in inner:  # it resets those inside, too
                unit.reset_iter_state()

    def _forget(self, number: int) -> None:
        if not number:  # the expert itself
            self._sums.clear()
            self._states.clear()
        self._sums.pop(number, None)
        self._states.pop(number, None)

    def _prepare(self) -> None:
        super().prepare()

    def _forward(self, described: Value, training: bool, seed: int | None) -> list[torch.Tensor] | None:
        inputs: list[torch.Tensor] = self._shared(described)  # type: ignore[assignment]
        outputs = super().forward([self._my_rows(x) for x in inputs], training=training, seed=self._my_seed(seed))
        whole = [self._all_rows(x, len(inputs[0])) for x in outputs]
        return whole if self.link.rank == 0 else None

    def _gradients(self, number: int, described: Value, training: bool, seed: int | None) -> Value:
        *given, weights = self._shared(described)
        num_inputs = len(self.input_specs)
        inputs: list[torch.Tensor] = given[:num_inputs]  # type: ignore[assignment]
        try:
            found, of_parameters = super().gradients(
                [self._my_rows(x) for x in inputs],
                [None if x is None else self._my_rows(x, pads_zeros=True) for x in given[num_inputs:]],
                training=training,
                seed=self._my_seed(seed),
                weights=None if weights is None else self._my_rows(weights),
            )
        finally:
            for parameter in self.module.parameters():
                parameter.grad = None
        square = self._keep(number, of_parameters)
        whole = [None if x is None else self._all_rows(x, len(inputs[0])) for x in found]
        return (whole, square) if self.link.rank == 0 else square

    def _backpropagate(
        self, outputs: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]
    ) -> Sequence[torch.Tensor | None]:
        # FSDP reduces in hooks of backward(): autograd.grad would not see the parameters
        torch.autograd.backward(outputs, gradients)
        with torch.no_grad():
            return [self._local_gradient(one) if isinstance(one, nn.Parameter) else one.grad for one in sources]

    def _add(self, number: int, left: int, right: int) -> float:
        return self._keep(number, add_gradients(self._sums[left], self._sums[right]) or ())

    def _scale(self, number: int, of: int, factor: float) -> float:
        return self._keep(number, [None if x is None else x * factor for x in self._sums[of]])

    def _weights(self) -> float:
        return self._square([_local(one) for one in self.parameters])

    def _is_sound(self) -> bool:
        return are_finite([_local(x) for x in self._trained()])

    def _step(self, number: int, account: int | None) -> None:
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
        optimizers.take_step(optimizer, self.parameters, whole, None)

    def _take_optimizer(self, optimizer: torch.optim.Optimizer | None, scheduler: LRScheduler | None) -> None:
        super()._take_optimizer(optimizer, scheduler)
        for group in () if optimizer is None else optimizer.param_groups:
            kinds = {isinstance(one, DTensor) for one in group["params"]}
            if len(kinds) > 1:  # kernels for many tensors take one kind only
                group.update({name: False for name in ("fused", "foreach") if name in group})
            elif True in kinds and isinstance(optimizer, torch.optim.SGD):  # not known to DTensor
                group["fused"] = False

    def _keep_state(self, number: int) -> list[Any]:
        kept: list[torch.Tensor] = []
        boxes: list[Any] = []

        def copied(value: Any) -> Any:
            if isinstance(value, DTensor):
                kept.append(states.copied(_local(value)))
                boxes.append(box_of(value))
                return _Leaf(len(kept) - 1, value.dtype, value.shape)
            return states.copied(value)

        state = self._state(lambda value: _map(value, copied))
        gathered = self._gathered.merged()
        if gathered is not None:
            own = itertools.zip_longest(self.parameters, gathered)
            state["accumulated"] = [None if x is None else copied(like(one, x)) for one, x in own]
        self._states[number], self.link.states[number] = state, kept
        return boxes

    def _load_kept(self, number: int) -> None:
        kept = self.link.states[number]
        self._install(self._states[number], lambda leaf, _: kept[leaf.index] if isinstance(leaf, _Leaf) else leaf)

    def _load(self, stripped: Value) -> None:
        self._install(_filled(stripped) if self._given is None else self._given, self._receive)

    def _install(self, state: StateDict, local_of: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
        """Load a state; `local_of(leaf, like)` returns what of a tensor is this process's, as of the tensor `like`."""
        here = self.module.state_dict()
        with torch.no_grad():
            for name, mine in here.items():
                if isinstance(mine, torch.Tensor):
                    _local(mine).copy_(local_of(state["module"][name], mine))
            given = {name: one for name, one in state["module"].items() if not isinstance(here.get(name), torch.Tensor)}
            saved = state["optimizer"]
            if saved is not None and self.trains:
                super().prepare()
                numbers = [number for group in saved["param_groups"] for number in group["params"]]
                owned = dict(zip(numbers, self.parameters, strict=False))
                found = {
                    number: {name: self._as_memory(value, owned.get(number), local_of) for name, value in one.items()}
                    for number, one in saved["state"].items()
                }
                saved = {**saved, "state": found}
            gathered = state["accumulated"]
            if gathered is not None and self.trains:
                own = zip(self.parameters, gathered, strict=False)
                gathered = [None if x is None else local_of(x, one).to(self._place, copy=True) for one, x in own]
        applied = state["applied"] or {
            "ids": torch.empty(0, dtype=torch.uint8),
            "versions": torch.empty(0, dtype=torch.int64),
        }
        super().load_state(
            {**state, "module": {**here, **given}, "optimizer": saved, "accumulated": gathered, "applied": applied}
        )

    def _as_memory(
        self, value: Any, parameter: nn.Parameter | None, local_of: Callable[[Any, torch.Tensor], torch.Tensor]
    ) -> Any:
        """Return a value of the optimizer's memory as it is in this process."""
        if not hasattr(value, "shape"):
            return value
        if parameter is not None and value.shape == parameter.shape and isinstance(parameter, DTensor):
            return like(parameter, local_of(value, parameter).to(self._place, copy=True))
        return local_of(value, torch.empty(0))

    def _receive(self, leaf: Any, like: torch.Tensor) -> torch.Tensor:
        """Return this process's part of a tensor that only the leader has, block by block."""
        if isinstance(like, DTensor) and tuple(leaf.shape) != tuple(like.shape):  # everywhere, before any block
            raise ValueError(f"it has {tuple(leaf.shape)} for what has the shape {tuple(like.shape)} here")
        offsets, sizes = box_of(like) if isinstance(like, DTensor) else ([0] * len(leaf.shape), list(leaf.shape))
        mine = torch.empty(sizes, dtype=leaf.dtype, device=self._place)
        rows = mine if mine.dim() else mine.view(1)
        first, num = (offsets[0], sizes[0]) if offsets else (0, 1)
        for start, stop in blocks_of(leaf.shape, leaf.dtype):
            block = torch.empty((stop - start, *leaf.shape[1:]), dtype=leaf.dtype, device=self._place)
            if self.link.rank == 0:
                block.copy_(leaf[start:stop] if leaf.dim() else leaf)
            self._broadcast(block)
            low, high = max(start, first), min(stop, first + num)
            if low < high:
                box = block[low - start : high - start]
                for dim, (offset, size) in enumerate(zip(offsets[1:], sizes[1:], strict=True), 1):
                    box = box.narrow(dim, offset, size)
                rows[low - first : high - first].copy_(box)
        return mine

    # -- Rows ---------------------------------------------------------------------------------------------------------

    def _vote(self, failed: bool) -> bool:
        assert self._rows is not None
        flag = torch.full((), int(failed), dtype=torch.uint8, device=self._place)
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._rows.get_group())
        return bool(flag)

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
        dist.all_gather_single(_raw(found), _raw(x), group=self._rows.get_group())
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
            self._broadcast(x)
            found.append(x)
        return found

    def _broadcast(self, x: torch.Tensor) -> None:
        if x.numel():
            dist.broadcast(_raw(x), src=0)

    # -- Gradients ----------------------------------------------------------------------------------------------------

    def _local_gradient(self, parameter: nn.Parameter) -> torch.Tensor | None:
        """Return what of a parameter's gradient, over all rows, belongs to this process."""
        gradient = parameter.grad
        if gradient is None:
            return None
        if isinstance(gradient, DTensor) and isinstance(parameter, DTensor):
            if gradient.placements != parameter.placements:
                gradient = gradient.redistribute(parameter.device_mesh, parameter.placements)
            gradient = _local(gradient)
        if self._rows is not None and not _divides(parameter, self._rows):
            gradient = gradient.contiguous()
            dist.all_reduce(gradient, group=self._rows.get_group())
        return gradient

    def _keep(self, number: int, gradients: Gradients) -> float:
        self._sums[number] = gradients
        return self._square(gradients)

    def _square(self, tensors: Gradients) -> float:
        """Return this process's share of the squared norm: what several have alike, each has a share of."""
        total = 0.0
        for one, x in zip(self.parameters, tensors, strict=False):
            if x is not None and x.numel():
                total += norm_of([x.detach()]) ** 2 / _num_copies(one, self.link.size)
        return total


class _Kept:
    """A state that the processes keep parts of, until this is gone."""

    number = 0


class _Leaf:
    """Stands for a tensor of a kept state."""

    def __init__(self, index: int, dtype: torch.dtype, shape: Sequence[int]) -> None:
        self.index, self.dtype, self.shape = index, dtype, torch.Size(shape)


_COMMANDS: Final[Mapping[str, Callable[..., Value]]] = {
    "forget": MeshBackend._forget,
    "prepare": MeshBackend._prepare,
    "forward": MeshBackend._forward,
    "gradients": MeshBackend._gradients,
    "add": MeshBackend._add,
    "scale": MeshBackend._scale,
    "weights": MeshBackend._weights,
    "is_sound": MeshBackend._is_sound,
    "step": MeshBackend._step,
    "state": MeshBackend._keep_state,
    "load_kept": MeshBackend._load_kept,
    "load": MeshBackend._load,
}


def join_job(timeout: float) -> None:
    """Make torch's process group of the processes that torchrun, or whatever sets its variables, has started.

    One that somebody else has made is taken as it is. torchrun keeps its store over restarts, and hands out the
    addresses of processes that are gone: so the others are met first, and the group's addresses are of this meeting.

    Raises: ValueError where there are no such processes; TimeoutError if they do not meet.
    """
    if dist.is_initialized():
        return
    if "RANK" not in os.environ:
        raise ValueError(
            "--shard is for processes of one job: start them by torchrun -m -- tesseract_async.cli serve ..."
        )
    from torch._C._distributed_c10d import PrefixStore

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
    _links[_get_default_group()] = link


def link_of_job(timeout: float = 60.0) -> MeshLink:
    """Return this process's link to the others of torch's process group; the first call meets them."""
    group = _get_default_group()
    if group not in _links:
        _links[group] = MeshLink(_get_default_store(), dist.get_rank(), dist.get_world_size(), timeout=timeout)
    return _links[group]


def _groups(module: nn.Module, mesh: DeviceMesh, rows: DeviceMesh | None) -> list[dist.ProcessGroup]:
    meshes = [mesh, *(one.device_mesh for one in module.parameters() if isinstance(one, DTensor))]
    meshes += [] if rows is None else [rows]
    found = {group.group_name: group for one in meshes for group in one.get_all_groups()}
    return [_get_default_group(), *found.values()]


def _counts(link: MeshLink) -> Counts:
    groups = {one.group_name: one for backend in link.followers() for one in getattr(backend, "groups", ())}
    return [(dist.get_process_group_ranks(one), one._get_sequence_number_for_group()) for one in groups.values()]


def _number_of(gradients: Gradients) -> int:
    assert isinstance(gradients, SpreadGradients)
    return gradients.number


def _described(tensors: Sequence[torch.Tensor | None]) -> list[Value]:
    return [None if x is None else [str(x.dtype).removeprefix("torch."), list(x.shape)] for x in tensors]


def _raw(x: torch.Tensor) -> torch.Tensor:
    """Return the bytes of a contiguous tensor: gloo and NCCL know them, of whatever dtype."""
    return x.detach().view(-1).view(torch.uint8)


def _local(x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return x.to_local() if isinstance(x, DTensor) else x.detach()


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
    return set(dist.get_process_group_ranks(rows.get_group())) in ranks


def _map(value: Any, function: Callable[[Any], Any]) -> Any:
    if isinstance(value, Mapping):
        return {key: _map(item, function) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_map(item, function) for item in value]
    return function(value)


def _leaves(value: Any) -> list[Any]:
    found: list[Any] = []
    _map(value, found.append)
    return found


# msgpack holds no tensors: the followers of a state that is loaded get their dtypes and shapes.


def _stripped(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return {"t": _described([value])[0]}
    if isinstance(value, Mapping):
        return {"d": [[key, _stripped(item)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return {"l": [_stripped(item) for item in value]}
    return value


def _filled(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "t":
        return _Leaf(-1, getattr(torch, content[0]), content[1])
    if kind == "d":
        return {key: _filled(item) for key, item in content}
    return [_filled(item) for item in content]
