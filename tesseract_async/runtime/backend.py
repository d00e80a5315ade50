"""What one expert computes: a module, its optimizer, and the steps that they took.

An `ExpertBackend` is made anywhere and then belongs to a runtime, whose thread alone calls the methods below
*Computing*. Tensors are flat lists here, in the order of the schemas: positional arguments first, then keyword ones.

Gradients never touch ``parameter.grad`` before the step: `gradients` returns them, the runtime sums what belongs into
one step, and `step` hands the sum to the optimizer. So a batch that fails leaves nothing behind, and a request that is
split over batches equals one that is not.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from tesseract_async.runtime import modules, randomness
from tesseract_async.runtime.acceleration import Acceleration, fuse
from tesseract_async.runtime.finite import are_finite
from tesseract_async.runtime.merging import Gradients, trimmed_mean
from tesseract_async.runtime.norms import UsualNorms
from tesseract_async.wire import tensors as wire
from tesseract_async.wire.codecs import CodecPolicy
from tesseract_async.wire.tensors import Schema, TensorSpec

MakesOptimizer = Callable[[], torch.optim.Optimizer]
MakesScheduler = Callable[[torch.optim.Optimizer], LRScheduler]


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendSettings:
    """How an expert is trained and computed."""

    clip_gradient_norm: float | None = None
    """Gradients of a step are scaled down to this norm (over all parameters)."""
    max_gradient_norm: float | Literal["adaptive"] | None = "adaptive"
    """A request whose parameter gradients have a larger norm is refused; it never reaches the optimizer. "adaptive"
    learns what is usual for this expert: gradients above 8 times that are scaled down to it, those above 1,024
    times refused (see `runtime.norms`). None: any finite gradient is taken."""
    step_every: int = 1
    """Backward batches whose gradients are summed for one optimizer step."""
    trim_peers: float = 0.0
    """Share of the peers whose gradients are left out at each end, coordinate by coordinate, where one step gathers
    gradients of several peers: with `step_every` at 4 or more, 0.25 keeps one liar in four from deciding anything. A
    peer then counts once in a step, however many batches it sent. Each backward is then a batch of its own."""
    merge_backward: bool = True
    """Whether requests that arrive together share a step. Optimizers that ignore the gradient's scale, such as Adam,
    then take fewer, not larger, steps under load: the learning rate depends on load. False steps per request."""
    stochastic: bool | None = None
    """Whether the module draws random numbers, so that requests must not be merged: True always, False never, None in
    train mode if it holds PyTorch's dropout or the like."""
    allow_batch_statistics: bool = False
    """Lets an expert that trains hold BatchNorm, whose outputs depend on whom a row shares its batch with."""
    max_staleness: int | None = None
    """A backward whose forward is more steps ago than this is refused."""
    staleness_damping: float = 0.0
    """Gradients count ``(1 + staleness) ** -staleness_damping``; 1 is the rule of Zhang et al., "Staleness-aware
    Async-SGD" (2016)."""
    journal_length: int = 65536
    """Backward calls that are remembered, so that none is applied twice."""
    preferred_sizes: tuple[int, ...] = ()
    """Rows at which batches are best cut; with `compile_mode` or `cuda_graphs`, they are padded up to one of them."""
    codecs: CodecPolicy = CodecPolicy()
    """Codecs that its inputs, outputs and gradients may travel in; callers settle theirs against these."""
    autocast: torch.dtype | None = None
    """Computes in this dtype where PyTorch's autocast deems it safe; outputs keep their schema's dtype."""
    compile_mode: str | None = None
    """``torch.compile``'s mode, such as "default" or "reduce-overhead"; None leaves the module as it is."""
    cuda_graphs: bool = False
    """Records the forward pass of each preferred size as a CUDA graph; other devices and sizes run as usual."""

    def __post_init__(self) -> None:
        if self.step_every < 1:
            raise ValueError(f"step_every is at least 1, not {self.step_every}")
        for name in ("clip_gradient_norm", "max_gradient_norm"):
            value = getattr(self, name)
            if value is None or (name == "max_gradient_norm" and value == "adaptive"):
                continue
            if not isinstance(value, int | float) or not value > 0:
                raise ValueError(f"{name} is a positive number, not {value!r}")
        if not 0 <= self.trim_peers < 0.5:
            raise ValueError(f"trim_peers is 0 or more and less than 0.5, not {self.trim_peers}")


class ExpertBackend:
    """An expert that a `TesseractServer` can host.

    - `module`: takes tensors with rows first, and returns tensors (nested in tuples, lists, dicts as it likes) with as
      many rows. Rows must not influence one another: they meet other people's rows in a batch.
    - `optimizer`: steps the module's parameters after each backward batch; None freezes the expert, which then still
      passes gradients on to its inputs. A function makes it when it is needed first: PyTorch's first optimizer takes a
      second of imports, which need not pass before the expert can be found.
    - `scheduler`: of the optimizer's learning rate; stepped once per optimizer step. Where the optimizer is made by a
      function, this is one, too, which takes the optimizer.
    - `args_schema`: the positional arguments, as nested `TensorSpec`s, which leave the rows out.
    - `kwargs_schema`: the keyword arguments by name.
    - `outputs_schema`: what the module returns; found by running two rows of zeros if not given.
    - `max_batch_size`: rows that are computed at once, at most.
    - `settings`: see `BackendSettings`.

    Raises: ValueError if the module does not return as many rows as it was given, trains with BatchNorm inside
    (unless ``settings.allow_batch_statistics``), or a size does not fit.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        optimizer: torch.optim.Optimizer | MakesOptimizer | None = None,
        scheduler: LRScheduler | MakesScheduler | None = None,
        args_schema: Sequence[Schema],
        kwargs_schema: Mapping[str, Schema] | None = None,
        outputs_schema: Schema = None,
        max_batch_size: int = 4096,
        settings: BackendSettings = BackendSettings(),
    ) -> None:
        if max_batch_size < 1:
            raise ValueError(f"max_batch_size is at least 1, not {max_batch_size}")
        if any(not 1 <= size <= max_batch_size for size in settings.preferred_sizes):
            raise ValueError(
                f"a batch has at least 1 row and at most {max_batch_size}; preferred_sizes: {settings.preferred_sizes}"
            )
        if optimizer is not None and not settings.allow_batch_statistics and modules.uses_batch_statistics(module):
            raise ValueError(
                "a trained expert must not hold BatchNorm: its rows meet other people's rows. Use LayerNorm or "
                "GroupNorm, or say BackendSettings(allow_batch_statistics=True)"
            )
        if scheduler is not None and isinstance(optimizer, torch.optim.Optimizer) != isinstance(scheduler, LRScheduler):
            raise ValueError("an optimizer and its scheduler are both given, or both made by functions")
        self.module = module
        self.optimizer: torch.optim.Optimizer | None = None
        """None for a frozen expert, and where it is yet to be made (`prepare`)."""
        self.scheduler: LRScheduler | None = None
        self._make_optimizer: MakesOptimizer | None = None
        self._make_scheduler: MakesScheduler | None = None
        self._restored: tuple[Any, Any] = (None, None)  # states of an optimizer and a scheduler that are yet to be made
        if optimizer is None or isinstance(optimizer, torch.optim.Optimizer):
            self.optimizer = optimizer
            self.scheduler = scheduler if isinstance(scheduler, LRScheduler) else None
        else:
            self._make_optimizer = optimizer
            self._make_scheduler = None if isinstance(scheduler, LRScheduler) else scheduler
        self.settings = settings
        self.args_schema = tuple(args_schema)
        self.kwargs_schema = dict(kwargs_schema or {})
        self.inputs_schema: Schema = (self.args_schema, self.kwargs_schema)
        self.input_specs: list[TensorSpec] = wire.flatten(self.inputs_schema)
        if not self.input_specs:
            raise ValueError("an expert takes at least one tensor")
        self._takes_flat_inputs = not self.kwargs_schema and all(isinstance(x, TensorSpec) for x in self.args_schema)
        self.max_batch_size = max_batch_size
        self.version = 0
        """Optimizer steps taken."""
        self.applied: OrderedDict[bytes, int] = OrderedDict()
        """The journal: what names each backward that was applied (`server.calls.journal_key`), and the version that it
        led to."""
        self.num_bare = 0
        """The first so many of them, from a checkpoint of version 0.1, are call ids, whoever the trainer was."""
        self._bare: set[bytes] = set()
        self.parameters: list[nn.Parameter] = []
        """What the optimizer steps: those of its parameters that want gradients. Empty before it is made."""
        self._find_parameters()
        self._draws = modules.draws_random_numbers(module)
        self.norms = UsualNorms()
        """Of the gradients that it got."""
        self._gathered: dict[
            Hashable, tuple[Gradients, int]
        ] = {}  # per peer with `trim_peers`, else for all: sum, count
        self._num_accumulated = 0
        self._lately: deque[frozenset[Hashable]] = deque(maxlen=2)  # peers of the last steps
        self._acceleration = Acceleration(
            module, sizes=settings.preferred_sizes, compile_mode=settings.compile_mode, cuda_graphs=settings.cuda_graphs
        )
        self.outputs_schema: Schema = self._dry_run() if outputs_schema is None else outputs_schema
        self.output_specs: list[TensorSpec] = wire.flatten(self.outputs_schema)

    @property
    def device(self) -> torch.device:
        """Where the module lives, by its first parameter or buffer."""
        for tensor in (*self.module.parameters(), *self.module.buffers()):
            return tensor.device
        return torch.device("cpu")

    def is_stochastic(self, training: bool) -> bool:
        """Whether a request's random numbers are its own, so that it is computed alone."""
        if self.settings.stochastic is None:
            return training and self._draws
        return self.settings.stochastic

    @property
    def merges_backward(self) -> bool:
        """Whether backwards may be computed together."""
        return self.settings.merge_backward and not self.settings.trim_peers

    @property
    def progress(self) -> tuple[int, int]:
        """Steps taken, and backwards gathered for the next one (`step_every`)."""
        return self.version, self._num_accumulated

    @property
    def trains(self) -> bool:
        """Whether it has an optimizer, or will have one."""
        return self.optimizer is not None or self._make_optimizer is not None

    # -- Computing: on the runtime's thread only -------------------------------------------------------------------

    def prepare(self) -> None:
        """Makes the optimizer, if that is yet to be done. Raises what that raises."""
        if self._make_optimizer is None or self.optimizer is not None:
            return
        optimizer = self._make_optimizer()
        scheduler = None if self._make_scheduler is None else self._make_scheduler(optimizer)
        of_optimizer, of_scheduler = self._restored
        if of_optimizer is not None:
            optimizer.load_state_dict(_copy(of_optimizer))
        if scheduler is not None and of_scheduler is not None:
            scheduler.load_state_dict(of_scheduler)
        self.optimizer, self.scheduler, self._restored = optimizer, scheduler, (None, None)
        self._find_parameters()

    def forward(
        self, inputs: Sequence[torch.Tensor], *, training: bool = False, seed: int | None = None
    ) -> list[torch.Tensor]:
        """The module's outputs for these rows, without gradients.

        With a `seed`, a stochastic module draws from it. Raises what the module raises; SchemaMismatch if its outputs
        do not fit the schema.
        """
        with torch.no_grad():
            return self._run(inputs, training, seed)

    def gradients(
        self,
        inputs: Sequence[torch.Tensor],
        output_gradients: Gradients,
        *,
        training: bool = False,
        seed: int | None = None,
    ) -> tuple[Gradients, Gradients]:
        """Recomputes the outputs and backpropagates. Returns the gradients of the inputs and of `parameters`.

        Changes nothing, but calls `prepare` the first time. Raises what the module raises.
        """
        self.prepare()
        leaves = [
            x.detach().requires_grad_() if x.is_floating_point() or x.is_complex() else x.detach() for x in inputs
        ]
        wanted = [leaf for leaf in leaves if leaf.requires_grad] + self.parameters
        with torch.enable_grad():
            outputs = self._run(leaves, training, seed)
            pairs = [
                (output, gradient)
                for output, gradient in zip(outputs, output_gradients, strict=True)
                if gradient is not None and output.requires_grad
            ]
        found: Sequence[torch.Tensor | None] = [None] * len(wanted)
        if pairs and wanted:
            draws = seed is not None and self.is_stochastic(training)
            with randomness.seeded(seed, backward=True) if seed is not None and draws else contextlib.nullcontext():
                found = torch.autograd.grad(
                    [output for output, _ in pairs], wanted, [gradient for _, gradient in pairs], allow_unused=True
                )
        remaining = iter(found)
        of_inputs = [next(remaining) if leaf.requires_grad else None for leaf in leaves]
        return of_inputs, list(remaining)

    def _find_parameters(self) -> None:
        if self.optimizer is not None:
            fuse(self.optimizer)
        groups = [] if self.optimizer is None else self.optimizer.param_groups
        self.parameters = [one for group in groups for one in group["params"] if one.requires_grad]

    def step(self, gradients: Gradients, call_ids: Sequence[bytes] = (), *, peer: Hashable = None) -> int:
        """Takes these gradients of `parameters`, sent by `peer`: one optimizer step, or a share of one (`step_every`).

        Journals `call_ids`, also for a frozen expert, which takes no steps. Returns the version that they led to.
        Raises what the optimizer raises; the expert's state is then undefined.
        """
        if self.optimizer is not None:
            peer = peer if self.settings.trim_peers else None
            summed, count = self._gathered.get(peer, (None, 0))
            total = gradients if summed is None else add_gradients(summed, gradients)
            assert total is not None
            self._gathered[peer] = total, count + 1
            self._num_accumulated += 1
            if self._has_enough():
                self._take_step()
        for call_id in call_ids:
            self.applied[call_id] = self.version
        while len(self.applied) > self.settings.journal_length:
            self.applied.popitem(last=False)
            self.num_bare = max(0, self.num_bare - 1)
        return self.version

    def is_sound(self) -> bool:
        """Whether everything that the optimizer steps or remembers is finite."""
        states = () if self.optimizer is None else self.optimizer.state.values()
        remembered = [x for state in states for x in state.values() if isinstance(x, torch.Tensor)]
        return are_finite(
            [x.detach() for x in (*self.parameters, *remembered) if x.is_floating_point() or x.is_complex()]
        )

    def _has_enough(self) -> bool:
        """Whether it is time for a step: with `trim_peers` not before everybody who took part lately has, so that one
        who sends faster than the others is not the only one; but they are not waited for much longer than usual.
        """
        if self._num_accumulated < self.settings.step_every:
            return False
        absent = frozenset().union(*self._lately) - self._gathered.keys()
        return not self.settings.trim_peers or not absent or self._num_accumulated >= 4 * self.settings.step_every

    def _merged(self) -> Gradients | None:
        """The sum of what was gathered; with `trim_peers` as many times the trimmed mean of the peers."""
        if not self._gathered:
            return None
        if len(self._gathered) == 1:
            return next(iter(self._gathered.values()))[0]
        means = [[None if x is None else x / count for x in summed] for summed, count in self._gathered.values()]
        merged = trimmed_mean(means, self.settings.trim_peers)
        return [None if x is None else x * self._num_accumulated for x in merged]

    def _take_step(self) -> None:
        gradients = self._merged()
        assert self.optimizer is not None and gradients is not None
        self._lately.append(frozenset(self._gathered) - {None})
        self._gathered, self._num_accumulated = {}, 0
        clips, taken = self.settings.clip_gradient_norm is not None, set[int]()
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            if gradient is None or gradient.layout is not torch.strided:  # a sparse one is the optimizer's business
                parameter.grad = gradient
                continue
            if gradient.stride() != parameter.stride() or (clips and gradient.data_ptr() in taken):
                # kernels read an expanded one as if it were laid out like the parameter; two may be the same memory,
                # which clipping would scale twice
                gradient = torch.empty_like(parameter).copy_(gradient)
            if clips:
                taken.add(gradient.data_ptr())
            parameter.grad = gradient
        try:
            if self.settings.clip_gradient_norm is not None:
                torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.clip_gradient_norm)
            self.optimizer.step()
            if self.scheduler is not None:
                self.scheduler.step()
        finally:
            self.optimizer.zero_grad(set_to_none=True)
        self.version += 1

    def to(self, device: torch.device) -> None:
        """Moves the module and the optimizer's state."""
        self.module.to(device)
        if self.optimizer is not None:
            # load_state_dict puts every state tensor beside its parameter
            self.optimizer.load_state_dict(self.optimizer.state_dict())
        self._acceleration.forget()

    def state(self) -> dict[str, Any]:
        """Copies of everything that a checkpoint holds: nested dicts and lists of CPU tensors and plain values."""
        ids = b"".join(self.applied)
        of_optimizer, of_scheduler = self._restored
        return {
            "module": _copy(self.module.state_dict()),
            "optimizer": _copy(of_optimizer if self.optimizer is None else self.optimizer.state_dict()),
            "scheduler": _copy(of_scheduler if self.scheduler is None else self.scheduler.state_dict()),
            "version": self.version,
            "applied": {
                "ids": torch.frombuffer(bytearray(ids), dtype=torch.uint8)
                if ids
                else torch.empty(0, dtype=torch.uint8),
                "versions": torch.tensor(list(self.applied.values()), dtype=torch.int64),
                "num_bare": self.num_bare,
            },
            "accumulated": None if (gathered := self._merged()) is None else _copy(list(gathered)),
            "num_accumulated": self._num_accumulated,
            "gradient_norms": self.norms.values(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continues from what `state` returned. Raises: RuntimeError, ValueError or KeyError if it does not fit."""
        self.module.load_state_dict(state["module"])
        if self._make_optimizer is not None and (self.optimizer is None or state["optimizer"] is None):
            # made when it is needed; a state without one is that of an expert which has taken no step
            self.optimizer, self.scheduler = None, None
            self._restored = state["optimizer"], state["scheduler"]
            self._find_parameters()
        if self.optimizer is not None and state["optimizer"] is not None:
            # PyTorch takes the tensors themselves, and steps change them in place
            self.optimizer.load_state_dict(_copy(state["optimizer"]))
            fuse(self.optimizer)
        if self.scheduler is not None and state["scheduler"] is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        self.version = state["version"]
        ids = state["applied"]["ids"].numpy().tobytes()
        versions = state["applied"]["versions"].tolist()
        self.applied = OrderedDict(
            (ids[16 * index : 16 * index + 16], version) for index, version in enumerate(versions)
        )
        self.num_bare = min(int(state["applied"].get("num_bare", len(versions))), len(self.applied))
        self._bare = set(itertools.islice(self.applied, self.num_bare))
        accumulated, self._num_accumulated = state["accumulated"], state["num_accumulated"]
        self._gathered = {}
        if accumulated is not None and self.trains:
            summed = [None if x is None else x.to(self.device, copy=True) for x in accumulated]
            self._gathered[None] = summed, self._num_accumulated
        norms = state.get("gradient_norms", ())
        self.norms = UsualNorms(norm for norm in norms if isinstance(norm, float) and 0 < norm < math.inf)

    def led_to(self, key: bytes, call_id: bytes) -> int | None:
        """The version that a backward led to that was applied before; None if it was not."""
        version = self.applied.get(key)
        if version is None and call_id in self._bare:
            version = self.applied.get(call_id)
        return version

    def _run(self, inputs: Sequence[torch.Tensor], training: bool, seed: int | None) -> list[torch.Tensor]:
        if self.module.training != training:
            self.module.train(training)
        draws = seed is not None and self.is_stochastic(training)
        # a recorded graph would repeat its random numbers
        records = not self.is_stochastic(training)
        if draws or self.settings.autocast is not None:
            with contextlib.ExitStack() as stack:
                if seed is not None and draws:
                    stack.enter_context(randomness.seeded(seed))
                if self.settings.autocast is not None:
                    # a recorded graph must not remember autocast's copies of weights, which change with each step
                    caches, kind = not self.settings.cuda_graphs, inputs[0].device.type
                    stack.enter_context(torch.autocast(kind, dtype=self.settings.autocast, cache_enabled=caches))
                outputs = self._acceleration.run(inputs, self._apply, records=records)
        else:
            outputs = self._acceleration.run(inputs, self._apply, records=records)
        leaves = wire.flatten_like(self.outputs_schema, outputs, what="this expert's output")
        if leaves[0].shape[0] != inputs[0].shape[0]:
            raise ValueError(f"the module returned {leaves[0].shape[0]} rows for {inputs[0].shape[0]}")
        return leaves

    def _apply(self, module: Any, inputs: Sequence[torch.Tensor]) -> Any:
        if self._takes_flat_inputs:
            outputs = module(*inputs)
        else:
            args, kwargs = wire.unflatten(self.inputs_schema, inputs)
            outputs = module(*args, **kwargs)
        if self.settings.autocast is not None:
            leaves = wire.flatten(outputs)
            if len(leaves) == len(self.output_specs):
                cast = [x.to(spec.dtype) for x, spec in zip(leaves, self.output_specs, strict=True)]
                outputs = wire.unflatten(outputs, cast)
        return outputs

    def _dry_run(self) -> Schema:
        device, was_training = self.device, self.module.training
        zeros = [torch.zeros(2, *spec.shape, dtype=spec.dtype, device=device) for spec in self.input_specs]
        args, kwargs = wire.unflatten(self.inputs_schema, zeros)
        try:
            with torch.no_grad():
                outputs = self.module.eval()(*args, **kwargs)
        finally:
            self.module.train(was_training)
        leaves = wire.flatten(outputs)
        if not leaves or not all(isinstance(x, torch.Tensor) and x.dim() and x.shape[0] == 2 for x in leaves):
            got = wire.describe_structure(outputs)
            raise ValueError(f"an expert returns tensors with as many rows as it was given; for 2 rows it gave {got}")
        return wire.unflatten(outputs, [TensorSpec.of(leaf) for leaf in leaves])


def add_gradients(left: Gradients | None, right: Gradients | None) -> Gradients | None:
    """The sum, where absent ones count as zeros. Neither is changed."""
    if left is None or right is None:
        return left if right is None else right
    return [b if a is None else a if b is None else a + b for a, b in zip(left, right, strict=True)]


def _copy(value: Any) -> Any:
    """The same structure with every tensor copied to the CPU, so that training goes on while it is written."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_copy(item) for item in value]
    return value
