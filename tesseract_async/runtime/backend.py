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
import logging
import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from tesseract_async.errors import describe
from tesseract_async.runtime import modules, optimizers, randomness, states
from tesseract_async.runtime.acceleration import Acceleration, fuse
from tesseract_async.runtime.gradients import GatheredGradients, Gradients, are_finite, norm_of
from tesseract_async.runtime.norms import UsualNorms
from tesseract_async.runtime.watching import Habits, Undone, copies, generator_states, have_moved, watched
from tesseract_async.wire import tensors as wire
from tesseract_async.wire.codecs import CodecPolicy
from tesseract_async.wire.tensors import Schema, TensorSpec

logger = logging.getLogger(__name__)

MakesOptimizer = Callable[[], torch.optim.Optimizer]
MakesScheduler = Callable[[torch.optim.Optimizer], LRScheduler]


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendSettings:
    """How an expert is trained and computed."""

    clip_gradient_norm: float | None = None
    """Gradients of a step are scaled down to this norm (over all parameters)."""
    max_gradient_norm: float | Literal["adaptive"] | None = "adaptive"
    """A request whose parameter gradients have a larger norm is refused; it never reaches the optimizer. "adaptive"
    learns what is usual for this expert, and scales down what is larger (see `runtime.norms`). None: any finite
    gradient is taken."""
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
    """Whether the module draws random numbers, so that requests must not be merged: True always, False never, None
    wherever it was seen to draw from PyTorch's. Those of Python and NumPy are not repeated in the backward pass."""
    allow_batch_statistics: bool = False
    """Lets an expert that trains hold BatchNorm, whose outputs depend on whom a row shares its batch with."""
    own_options: tuple[str, ...] = ()
    """Options of the optimizer and its schedule, such as ``("lr",)``, of which the values given here hold after a
    checkpoint is loaded. The checkpoint's hold for all others."""
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
    (unless ``settings.allow_batch_statistics``), or holds what a checkpoint cannot; if the optimizer is another
    module's or, like its scheduler, cannot go by gradients and steps alone; if a schema cannot travel, or a size does
    not fit. What a function makes is checked when it is made.
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
        self.name = type(module).__name__
        """In the log: a server puts the uid here."""
        self.host: object | None = None
        """The server that hosts it now."""
        self.optimizer: torch.optim.Optimizer | None = None
        """None for a frozen expert, and where it is yet to be made (`prepare`)."""
        self.scheduler: LRScheduler | None = None
        self._make_optimizer: MakesOptimizer | None = None
        self._make_scheduler: MakesScheduler | None = None
        self._said: Sequence[str] = []
        self._schedule_ended = False
        if optimizer is None or isinstance(optimizer, torch.optim.Optimizer):
            self._take_optimizer(optimizer, scheduler if isinstance(scheduler, LRScheduler) else None)
        else:
            self._make_optimizer = optimizer
            self._make_scheduler = None if isinstance(scheduler, LRScheduler) else scheduler
        self.settings = settings
        if isinstance(args_schema, TensorSpec):
            raise TypeError("args_schema has one schema per positional argument: for a single one, (spec,)")
        self.args_schema = tuple(args_schema)
        self.kwargs_schema = dict(kwargs_schema or {})
        self.inputs_schema: Schema = (self.args_schema, self.kwargs_schema)
        self.input_specs: list[TensorSpec] = wire.flatten(self.inputs_schema)
        if not self.input_specs:
            raise ValueError("an expert takes at least one tensor")
        wire.check_schema(self.args_schema, what="args_schema")
        wire.check_schema(self.kwargs_schema, what="kwargs_schema")
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
        self._marks_inputs = True
        self._habits = {training: Habits() for training in (False, True)}
        self.norms = UsualNorms()
        """Of the gradients that it got."""
        self._gathered = GatheredGradients(settings.step_every, settings.trim_peers)
        self._acceleration = Acceleration(
            module, sizes=settings.preferred_sizes, compile_mode=settings.compile_mode, cuda_graphs=settings.cuda_graphs
        )
        self.outputs_schema: Schema = self._dry_run() if outputs_schema is None else outputs_schema
        self.output_specs: list[TensorSpec] = wire.flatten(self.outputs_schema)
        modules.check_module(module)  # not before: the dry run makes the weights of lazy layers
        wire.check_schema(self.outputs_schema, what="the module's output")
        if len(self.input_specs) + len(self.output_specs) > wire.MAX_TENSORS:
            raise ValueError(
                f"an expert takes and returns at most {wire.MAX_TENSORS} tensors together; this one takes "
                f"{len(self.input_specs)} and returns {len(self.output_specs)}: stack them"
            )

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The tensors that the optimizer steps, those that are frozen for now among them. Empty before it is made."""
        groups = [] if self.optimizer is None else self.optimizer.param_groups
        return [one for group in groups for one in group["params"]]

    @property
    def device(self) -> torch.device:
        """Where the module lives, by its first parameter or buffer."""
        for tensor in (*self.module.parameters(), *self.module.buffers()):
            return tensor.device
        return torch.device("cpu")

    def is_stochastic(self, training: bool) -> bool:
        """Whether a request's random numbers are its own, so that it is computed alone."""
        if self.settings.stochastic is None:
            return self._habits[training].draws
        return self.settings.stochastic

    @property
    def merges_backward(self) -> bool:
        """Whether backwards may be computed together."""
        return self.settings.merge_backward and not self.settings.trim_peers

    @property
    def progress(self) -> tuple[int, int]:
        """Steps taken, and backwards gathered for the next one (`step_every`)."""
        return self.version, self._gathered.num_batches

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
        self._take_optimizer(optimizer, None if self._make_scheduler is None else self._make_scheduler(optimizer))

    def _take_optimizer(self, optimizer: torch.optim.Optimizer | None, scheduler: LRScheduler | None) -> None:
        if optimizer is not None:
            optimizers.check_optimizer(self.module, optimizer)
            if scheduler is not None:
                optimizers.check_scheduler(optimizer, scheduler)
            fuse(optimizer)
        self.optimizer, self.scheduler = optimizer, scheduler

    def _say(self, sentences: Sequence[str]) -> None:
        """Logs them, unless they were said last: a follower loads states again and again."""
        if self._said != sentences:
            self._said = sentences
            for sentence in sentences:
                logger.warning("%s: %s", self.name, sentence)

    def forward(
        self, inputs: Sequence[torch.Tensor], *, training: bool = False, seed: int | None = None
    ) -> list[torch.Tensor]:
        """The module's outputs for these rows, without gradients.

        With a `seed`, a stochastic module draws from it. Raises what the module raises; SchemaMismatch if its outputs
        do not fit the schema.
        """
        with _grad_mode(False):
            # of tensors that want gradients, as in `gradients`: a module may look at that, and must do the same again
            marked = _leaves(inputs) if self._marks_inputs else inputs
            return [x.detach() if x.requires_grad else x for x in self._run(marked, training, seed)]

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
        leaves = _leaves(inputs)
        sources = leaves + self.parameters
        with _grad_mode(True):
            outputs = self._run(leaves, training, seed)
            pairs = [
                (output, gradient)
                for output, gradient in zip(outputs, output_gradients, strict=True)
                if gradient is not None and output.requires_grad
            ]
        wanted = [one for one in sources if one.requires_grad]  # not before: the module itself may freeze parameters
        found: Sequence[torch.Tensor | None] = [None] * len(wanted)
        if pairs and wanted:
            draws = seed is not None and self.is_stochastic(training)
            with randomness.seeded(seed, backward=True) if seed is not None and draws else contextlib.nullcontext():
                found = torch.autograd.grad(
                    [output for output, _ in pairs], wanted, [gradient for _, gradient in pairs], allow_unused=True
                )
        remaining = iter(found)
        gradients = [next(remaining) if one.requires_grad else None for one in sources]
        return gradients[: len(leaves)], gradients[len(leaves) :]

    def step(self, gradients: Gradients, call_ids: Sequence[bytes] = (), *, peer: Hashable = None) -> int:
        """Takes these gradients of `parameters`, sent by `peer`: one optimizer step, or a share of one (`step_every`).

        Journals `call_ids`, also for a frozen expert, which takes no steps. Returns the version that they led to.
        Raises what the optimizer raises; the expert's state is then undefined.
        """
        if self.optimizer is not None:
            gathered, settings = self._gathered, self.settings
            if settings.step_every == 1 and not settings.trim_peers and not gathered.num_batches:
                self._take_step(gradients)
            else:
                gathered.add(gradients, peer)
                if gathered.is_enough:
                    self._take_step(gathered.take() or ())
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

    def _take_step(self, gradients: Gradients) -> None:
        assert self.optimizer is not None
        parameters = self.parameters
        gradients = [*gradients, *[None] * (len(parameters) - len(gradients))]  # of groups that were added since
        gradients = [
            x if x is None or (x.layout is torch.strided and x.stride() == like.stride()) else _laid_out(x, like)
            for x, like in zip(gradients, parameters, strict=True)
        ]
        most = self.settings.clip_gradient_norm
        if most is not None and (norm := norm_of(gradients)) > most:
            gradients = [None if x is None else x * (most / norm) for x in gradients]  # not in place: two may be one
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
            if gradient is not None and (hooks := getattr(parameter, "_post_accumulate_grad_hooks", None)):
                for hook in hooks.values():
                    hook(parameter)
        try:
            self.optimizer.step()
        finally:
            for parameter in parameters:  # PyTorch's `zero_grad` does this in four times the time
                parameter.grad = None
        self.version += 1
        if self.scheduler is not None:
            try:
                self.scheduler.step()
            except Exception as error:  # one that has come to its end, such as OneCycleLR; the step stands
                if not self._schedule_ended:
                    self._schedule_ended = True
                    kind = type(self.scheduler).__name__
                    logger.warning(
                        "%s: the rate stays as it is from now on: %s raised %s", self.name, kind, describe(error)
                    )

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
        kinds = optimizers.kinds_of(self.module, self.optimizer, self.scheduler)
        of_optimizer = None if self.optimizer is None else self.optimizer.state_dict()
        of_scheduler = None if self.scheduler is None else self.scheduler.state_dict()
        return {
            "module": states.copied(self.module.state_dict()),
            "optimizer": states.copied(of_optimizer),
            "scheduler": states.copied(of_scheduler),
            "kinds": kinds,
            "version": self.version,
            "applied": {
                "ids": torch.frombuffer(bytearray(ids), dtype=torch.uint8)
                if ids
                else torch.empty(0, dtype=torch.uint8),
                "versions": torch.tensor(list(self.applied.values()), dtype=torch.int64),
                "num_bare": self.num_bare,
            },
            "accumulated": states.pack_gradients(self._gathered.merged()),
            "num_accumulated": self._gathered.num_batches,
            "gradient_norms": self.norms.values(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continues from what `state` returned. Raises: RuntimeError, ValueError or KeyError if it does not fit.

        What of the optimizer's class and options holds is logged where they differ (`BackendSettings.own_options`).
        """
        states.check_fits(self.module, state["module"])
        self.module.load_state_dict(state["module"])
        if state["optimizer"] is not None:
            self.prepare()  # at once: what does not fit is its owner's business, not its callers'
            if self.optimizer is not None:
                own = self.settings.own_options
                self._say(optimizers.restore(self.module, self.optimizer, self.scheduler, state, own))
        elif self._make_optimizer is not None:
            self.optimizer, self.scheduler = None, None  # the state of an expert that has taken no step
        self.version = state["version"]
        ids = state["applied"]["ids"].numpy().tobytes()
        versions = state["applied"]["versions"].tolist()
        self.applied = OrderedDict(
            (ids[16 * index : 16 * index + 16], version) for index, version in enumerate(versions)
        )
        self.num_bare = min(int(state["applied"].get("num_bare", len(versions))), len(self.applied))
        self._bare = set(itertools.islice(self.applied, self.num_bare))
        self._gathered.clear()
        if state["accumulated"] is not None and self.trains:
            gathered = states.unpack_gradients(state["accumulated"], self.device)
            self._gathered.add(gathered, None, state["num_accumulated"])
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
        outputs = self._compute(inputs, training, seed)
        leaves = wire.flatten_like(self.outputs_schema, outputs, what="this expert's output")
        if leaves[0].shape[0] != inputs[0].shape[0]:
            raise ValueError(f"the module returned {leaves[0].shape[0]} rows for {inputs[0].shape[0]}")
        return leaves

    def _compute(self, inputs: Sequence[torch.Tensor], training: bool, seed: int | None) -> Any:
        """Calls the module with these inputs, which stay as they are."""
        habits = self._habits[training]
        if not habits.known:
            return self._watch(inputs, training, seed)
        given = copies(inputs) if habits.writes else inputs
        # in evaluation only the first call is looked at: all others would pay for it
        glances = training and self.settings.stochastic is None and not habits.draws
        before, versions = generator_states() if glances else (), [x._version for x in given]
        outputs = self._call(given, training, seed, records=not self.is_stochastic(training))
        habits.writes = habits.writes or versions != [x._version for x in given]
        # perhaps another thread has drawn: a watched call tells
        return self._watch(inputs, training, seed) if have_moved(before) else outputs

    def _watch(self, inputs: Sequence[torch.Tensor], training: bool, seed: int | None) -> Any:
        """The same, and finds out what the module does beside."""
        habits = self._habits[training]
        outputs = watched(lambda given: self._call(given, training, seed, records=False), inputs, habits, self.name)
        if not habits.draws or seed is None or self.settings.stochastic is not None:
            return outputs
        return self._call(copies(inputs), training, seed, records=False)  # what was drawn so can't be drawn again

    def _call(self, inputs: Sequence[torch.Tensor], training: bool, seed: int | None, *, records: bool) -> Any:
        draws = seed is not None and self.is_stochastic(training)
        if not draws and self.settings.autocast is None:
            return self._acceleration.run(inputs, self._apply, records=records)
        with contextlib.ExitStack() as stack:
            if seed is not None and draws:
                stack.enter_context(randomness.seeded(seed))
            if self.settings.autocast is not None:
                # a recorded graph must not remember autocast's copies of weights, which change with each step
                caches, kind = not self.settings.cuda_graphs, inputs[0].device.type
                stack.enter_context(torch.autocast(kind, dtype=self.settings.autocast, cache_enabled=caches))
            return self._acceleration.run(inputs, self._apply, records=records)

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
        zeros = [torch.zeros(2, *spec.shape, dtype=spec.dtype, device=self.device) for spec in self.input_specs]
        try:
            outputs = self._try_out(zeros, training=False)
        except NotImplementedError:  # it may be one that computes only what nobody differentiates
            self._marks_inputs = False
            outputs = self._try_out(zeros, training=False)
        leaves = wire.flatten(outputs)
        if any(isinstance(x, torch.Tensor) and (x.layout is not torch.strided or x.is_nested) for x in leaves):
            raise ValueError(
                "an expert returns dense tensors; this one's are sparse or nested: convert them (to_dense)"
            )
        fits = leaves and all(isinstance(x, torch.Tensor) and x.dim() and x.shape[0] == 2 for x in leaves)
        if not fits:
            got = wire.describe_structure(outputs)
            raise ValueError(
                f"an expert returns dense tensors with as many rows as it was given; for 2 rows it gave {got}"
            )
        with contextlib.suppress(Exception):  # its first call in training says so, and is watched
            self._try_out(zeros, training=True)
        return wire.unflatten(outputs, [TensorSpec.of(leaf) for leaf in leaves])

    def _try_out(self, inputs: Sequence[torch.Tensor], *, training: bool) -> Any:
        """Runs the module once, watched, and leaves it as it was."""
        was_training = self.module.training
        inputs = _leaves(inputs) if self._marks_inputs else inputs

        def call(given: Sequence[torch.Tensor]) -> Any:
            args, kwargs = wire.unflatten(self.inputs_schema, given)
            return self.module.train(training)(*args, **kwargs)

        try:
            # whatever autocast the expert is made in: its runtime's thread has none (and torch none for "meta")
            kind = "cuda" if self.device.type == "cuda" else "cpu"
            with torch.no_grad(), torch.autocast(kind, enabled=False), Undone(self.module) as undone:
                outputs = watched(call, inputs, self._habits[training], self.name, is_alone=True)
        finally:
            self.module.train(was_training)
        if undone.changed and not self.settings.allow_batch_statistics:
            logger.warning(
                "%s changes its buffers in each forward pass (%s): an expert's is computed again in each backward, and "
                "has other people's rows",
                self.name,
                ", ".join(undone.changed[:3]),
            )
        return outputs


class _grad_mode:
    """``torch.set_grad_enabled``, at a fifth of its price."""

    __slots__ = ("mode", "before")

    def __init__(self, mode: bool) -> None:
        self.mode = mode

    def __enter__(self) -> None:
        self.before = torch.is_grad_enabled()
        torch._C._set_grad_enabled(self.mode)

    def __exit__(self, *_: object) -> None:
        torch._C._set_grad_enabled(self.before)


def _laid_out(gradient: torch.Tensor | None, parameter: torch.Tensor) -> torch.Tensor | None:
    # kernels read an expanded one as if it were laid out like the parameter; a sparse one is the optimizer's business
    if gradient is None or gradient.layout is not torch.strided:
        return gradient
    return torch.empty_like(parameter).copy_(gradient)


def _leaves(inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The same tensors, wanting gradients where they can have some."""
    return [x.detach().requires_grad_() if x.is_floating_point() or x.is_complex() else x.detach() for x in inputs]
