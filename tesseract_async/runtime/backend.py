"""ExpertBackend: a module, its optimizer, and the journal of the steps that they took.

An `ExpertBackend` is made anywhere and then belongs to a runtime, whose thread alone calls the methods below
*Computing*. Tensors are flat lists here, in the order of the schemas: positional arguments first, then keyword ones.

Gradients never touch ``parameter.grad`` before the step: `gradients` returns them, the runtime sums those that belong
to one step, and `step` hands the sum to the optimizer. So a batch that fails leaves no trace, and a request that is
split over batches gives the same result as one that is not.
"""

import copy
import itertools
import logging
import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from tesseract_async.errors import describe
from tesseract_async.runtime import optimizers, randomness, states, stepping
from tesseract_async.runtime.gradients import (
    GatheredGradients,
    Gradients,
    add_gradients,
    are_finite,
    backpropagate,
    norm_of,
    norms_of,
    run_engine,
    weight_gradients,
    weighted,
)
from tesseract_async.runtime.module_runner import ModuleRunner, as_leaves, device_of, only_compute
from tesseract_async.runtime.norms import UsualNorms
from tesseract_async.runtime.states import StateDict
from tesseract_async.runtime.watching import uses_batch_statistics
from tesseract_async.wire import tensors as wire
from tesseract_async.wire.codecs import CodecPolicy
from tesseract_async.wire.tensors import Schema, TensorSpec

logger = logging.getLogger(__name__)

MakesOptimizer = Callable[[], torch.optim.Optimizer]
MakesScheduler = Callable[[torch.optim.Optimizer], LRScheduler]


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendSettings:
    """The settings that say how an expert is trained and computed."""

    clip_gradient_norm: float | None = None
    """Gradients of a step are scaled down to this norm (over all parameters)."""
    max_gradient_norm: float | Literal["adaptive"] | None = "adaptive"
    """A request whose parameter gradients have a larger norm is refused; it never reaches the optimizer. "adaptive"
    learns what is usual for this expert, and scales down what is larger (see `runtime.norms`). None: any finite
    gradient is taken."""
    step_every: int = 1
    """Backward batches whose gradients are summed for one optimizer step; more make steps larger and rarer."""
    trim_peers: float = 0.0
    """Share of the peers whose gradients are left out at each end, coordinate by coordinate, where one step gathers
    gradients of several peers: with `step_every` at 4 or more, 0.25 keeps one peer in four that sends false gradients
    from deciding anything. A peer then counts once in a step, however many batches it sent. Each backward is then a
    batch of its own."""
    lockstep: bool = False
    """True if gradients are only summed until the one trainer has all experts step together (`runtime.lockstep`):
    with the norm that they have (`max_gradient_norm` is None then), and none of an earlier round (`max_staleness`)."""
    merge_backward: bool = True
    """True if requests that arrive together share a step. Optimizers that ignore the gradient's scale, such as Adam,
    then take fewer, not larger, steps under load: the learning rate depends on load. False steps per request."""
    stochastic: bool | None = None
    """True if the module always draws random numbers, so that its requests are not merged; False if it never does; None
    if its calls are to be watched for PyTorch's random numbers. Those of Python and NumPy are not repeated in the
    backward pass."""
    allow_batch_statistics: bool = False
    """Allows BatchNorm in an expert that trains: its outputs depend on the rows that share the batch."""
    own_options: tuple[str, ...] = ()
    """Options of the optimizer and its schedule, such as ``("lr",)``, whose values given here hold after a checkpoint
    is loaded. The checkpoint's hold for all others."""
    max_staleness: int | None = None
    """A backward is refused once the expert has taken more steps than this since its forward; None: never."""
    staleness_damping: float = 0.0
    """Gradients count ``(1 + staleness) ** -staleness_damping``; 1 is the rule of Zhang et al., "Staleness-aware
    Async-SGD" (2016), for optimizers that go by the gradient's scale. Adam's steps are as long on weaker gradients."""
    preferred_sizes: tuple[int, ...] = ()
    """Rows at which batches are best cut; with `compile_mode` or `cuda_graphs`, they are padded up to one of them."""
    codecs: CodecPolicy = CodecPolicy()
    """Codecs in which its inputs, outputs and gradients may travel; callers choose among these."""
    autocast: torch.dtype | None = None
    """Computes in this dtype where PyTorch's autocast deems it safe; outputs keep their schema's dtype."""
    compile_mode: str | None = None
    """``torch.compile``'s mode, such as "default" or "reduce-overhead"; None leaves the module as it is."""
    cuda_graphs: bool = False
    """Records the forward pass of each preferred size as a CUDA graph; other devices and sizes run as usual."""

    def __post_init__(self) -> None:
        if self.step_every < 1:
            raise ValueError(f"step_every is at least 1, not {self.step_every}")
        if self.lockstep:
            object.__setattr__(self, "max_gradient_norm", None)
            object.__setattr__(self, "max_staleness", 0)
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
      passes gradients on to its inputs. A function is called when the optimizer is first needed: PyTorch's first
      optimizer takes a second of imports, and the expert can be found before that.
    - `scheduler`: of the optimizer's learning rate; stepped once per optimizer step. Where the optimizer is made by a
      function, this is one, too, which takes the optimizer.
    - `args_schema`: the positional arguments, as nested `TensorSpec`s, which leave the rows out. A size may vary from
      call to call, and an argument may be optional (see `TensorSpec`).
    - `kwargs_schema`: the keyword arguments by name.
    - `outputs_schema`: what the module returns; found by running two rows of zeros if not given.
    - `max_batch_size`: the most rows that are computed at once.
    - `settings`: see `BackendSettings`.

    Raises: ValueError if the module does not return as many rows as it was given, trains with BatchNorm inside
    (unless ``settings.allow_batch_statistics``), or holds something that a checkpoint cannot hold; if the optimizer is
    another module's; if the optimizer or its scheduler needs more than gradients and steps; if a schema cannot travel,
    or a size does not fit. The result of a function is checked when it is made.
    """

    _runner_type = ModuleRunner
    num_processes = 1
    """The number of processes over which it is spread."""
    rebuild: Callable[[], nn.Module] | None = None
    """Makes the module of a spread expert anew, perhaps with other weights."""

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
        if optimizer is not None and not settings.allow_batch_statistics and uses_batch_statistics(module):
            raise ValueError(
                "a trained expert must not hold BatchNorm: its rows meet other people's rows. Use LayerNorm or "
                "GroupNorm, or say BackendSettings(allow_batch_statistics=True)"
            )
        if scheduler is not None and isinstance(optimizer, torch.optim.Optimizer) != isinstance(scheduler, LRScheduler):
            raise ValueError("an optimizer and its scheduler are both given, or both made by functions")
        self.settings = settings
        self._begin(module, optimizer, scheduler)
        if isinstance(args_schema, TensorSpec):
            raise TypeError("args_schema has one schema per positional argument: for a single one, (spec,)")
        self.args_schema = tuple(args_schema)
        self.kwargs_schema = dict(kwargs_schema or {})
        self.inputs_schema: Schema = (self.args_schema, self.kwargs_schema)
        self.input_specs: list[TensorSpec] = wire.flatten(self.inputs_schema)
        if not self.input_specs:
            raise ValueError("an expert takes at least one tensor")
        self.varies = any(spec.varies or spec.optional for spec in self.input_specs)
        """True if the shapes of its tensors vary from call to call, or some may be absent."""
        first = next((spec for spec in self.input_specs if spec.varies), self.input_specs[0])
        if self.input_specs[0].optional or first.optional:
            raise ValueError("an expert's first tensor, and the first of those whose sizes vary, is not optional")
        if len({spec.max_size for spec in self.input_specs if spec.varies}) > 1:
            raise ValueError("all sizes that vary are equal in one call, and have the same max_size")
        if self.varies and (self.num_processes > 1 or settings.cuda_graphs):
            raise ValueError("sizes that vary, and optional tensors, go with neither CUDA graphs nor a mesh")
        wire.check_schema(self.args_schema, what="args_schema")
        wire.check_schema(self.kwargs_schema, what="kwargs_schema")
        self.max_batch_size = max_batch_size
        self._runner = self._runner_type(
            module,
            inputs_schema=(self.args_schema, self.kwargs_schema),
            outputs_schema=outputs_schema,
            sizes=settings.preferred_sizes,
            compile_mode=settings.compile_mode,
            cuda_graphs=settings.cuda_graphs,
            autocast=settings.autocast,
            stochastic=settings.stochastic,
            keeps_buffers=not settings.allow_batch_statistics,
        )
        self.outputs_schema = self._runner.outputs_schema
        self.output_specs = self._runner.output_specs
        states.check_module(module)  # not before: the dry run makes the weights of lazy layers
        wire.check_schema(self.outputs_schema, what="the module's output")
        self.signature = repr((self.input_specs, self.output_specs, settings.codecs))
        """Equal for experts that take and return the same tensors, in the same codecs."""
        self.terms = repr((self.inputs_schema, self.outputs_schema, settings))
        """Equal for experts that take and return the same tensors, and are trained and computed in the same way."""
        self.alike: object = object()
        """Equal for experts that differ in numbers only (`another`)."""
        if len(self.input_specs) + len(self.output_specs) > wire.MAX_TENSORS:
            raise ValueError(
                f"an expert takes and returns at most {wire.MAX_TENSORS} tensors together; this one takes "
                f"{len(self.input_specs)} and returns {len(self.output_specs)}: stack them"
            )

    def another(
        self,
        module: nn.Module,
        *,
        optimizer: torch.optim.Optimizer | MakesOptimizer | None = None,
        scheduler: LRScheduler | MakesScheduler | None = None,
    ) -> Self:
        """Return a new backend of a module that differs from this one's in numbers only: schemas, settings and what the
        module was seen to do hold for both, and are not checked again. For thousands of experts of a checkpoint."""
        made = copy.copy(self)
        made._runner = self._runner.another(module)
        made._begin(module, optimizer, scheduler)
        if made.trains != self.trains:
            made.alike = object()
        return made

    def _begin(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer | MakesOptimizer | None,
        scheduler: LRScheduler | MakesScheduler | None,
    ) -> None:
        """Set up the state that belongs to this expert alone."""
        self.module = module
        self.host: object | None = None
        """The server that hosts it at present."""
        self.member: object | None = None
        """The expert's tensors, as `grouped.Groups` knows them."""
        self.optimizer: torch.optim.Optimizer | None = None
        """The optimizer; None for a frozen expert, and before it is made (`prepare`)."""
        self.scheduler: LRScheduler | None = None
        self._make_optimizer: MakesOptimizer | None = None
        self._make_scheduler: MakesScheduler | None = None
        self._said: Sequence[str] = []
        self._schedule_ended = False
        self.version = 0
        """Optimizer steps taken."""
        self.applied: OrderedDict[bytes, int] = OrderedDict()
        """The journal: the key of each applied backward (`server.answering.journal_key`), and the version after it."""
        self.num_bare = 0
        """This many of the first keys are bare call ids of any trainer, from a checkpoint of version 0.1."""
        self._bare: set[bytes] = set()
        self.norms = UsualNorms()
        """The usual norms of its gradients."""
        self._gathered = GatheredGradients(self.settings.step_every, self.settings.trim_peers)
        if optimizer is None or isinstance(optimizer, torch.optim.Optimizer):
            self._take_optimizer(optimizer, scheduler if isinstance(scheduler, LRScheduler) else None)
        else:
            self._make_optimizer = optimizer
            self._make_scheduler = None if isinstance(scheduler, LRScheduler) else scheduler

    def specs(self, size: int | None) -> tuple[Sequence[TensorSpec], Sequence[TensorSpec]]:
        """Return the specs of inputs and outputs in a call in which the size that varies is this one."""
        if size is None or not self.varies:
            return self.input_specs, self.output_specs
        return [one.sized(size) for one in self.input_specs], [one.sized(size) for one in self.output_specs]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The tensors of the optimizer, including those that are frozen for now. Empty before it is made."""
        groups = [] if self.optimizer is None else self.optimizer.param_groups
        return [one for group in groups for one in group["params"]]

    @property
    def device(self) -> torch.device:
        return device_of(self.module)

    @property
    def name(self) -> str:
        """The expert's name in the log: the module's class, until a server sets it to the uid."""
        return self._runner.name

    @name.setter
    def name(self, name: str) -> None:
        self._runner.name = name

    def is_stochastic(self, training: bool) -> bool:
        """Return whether each request has random numbers of its own, so that it is computed alone."""
        return self._runner.is_stochastic(training)

    def may_be_grouped(self, training: bool) -> bool:
        """Return whether its module was seen to do nothing but compute its outputs from inputs, weights and buffers."""
        return may_be_grouped([self], training)

    @property
    def merges_backward(self) -> bool:
        """True if backwards may be computed together."""
        return self.settings.merge_backward and not self.settings.trim_peers

    @property
    def progress(self) -> tuple[int, int]:
        """Steps taken, and backwards gathered for the next one (`step_every`)."""
        return self.version, self._gathered.num_batches

    @property
    def journal_length(self) -> int:
        """Backwards that are remembered: in lockstep, those of one step at most."""
        return states.LOCKSTEP_JOURNAL_LENGTH if self.settings.lockstep else states.JOURNAL_LENGTH

    @property
    def trains(self) -> bool:
        return self.optimizer is not None or self._make_optimizer is not None

    # -- Computing: on the runtime's thread only -------------------------------------------------------------------

    def prepare(self) -> None:
        """Make the optimizer, if there is none yet. Raises what that raises."""
        if self._make_optimizer is None or self.optimizer is not None:
            return
        optimizer = self._make_optimizer()
        self._take_optimizer(optimizer, None if self._make_scheduler is None else self._make_scheduler(optimizer))

    def _take_optimizer(self, optimizer: torch.optim.Optimizer | None, scheduler: LRScheduler | None) -> None:
        if optimizer is not None:
            optimizers.check_optimizer(self.module, optimizer)
            if scheduler is not None:
                optimizers.check_scheduler(optimizer, scheduler)
            stepping.fuse(optimizer)
        self.optimizer, self.scheduler = optimizer, scheduler

    def _say(self, sentences: Sequence[str]) -> None:
        """Log the sentences, unless they were logged last: a follower loads states again and again."""
        if self._said != sentences:
            self._said = sentences
            for sentence in sentences:
                logger.warning("%s: %s", self.name, sentence)

    def forward(
        self, inputs: Sequence[torch.Tensor | None], *, training: bool = False, seed: int | None = None
    ) -> list[torch.Tensor]:
        """Return the module's outputs for these rows, without gradients. Optional inputs may be None.

        With a `seed`, a stochastic module draws from it. Raises what the module raises; SchemaMismatch if its outputs
        do not fit the schema.
        """
        # of tensors that require gradients, as in `gradients`: a module may look at that, and must do the same again
        marked = as_leaves(inputs) if self._runner.marks_inputs else inputs
        outputs = self._runner.run(marked, training=training, seed=seed, gradients=False)
        return [x.detach() if x.requires_grad else x for x in outputs]

    def gradients(
        self,
        inputs: Sequence[torch.Tensor | None],
        output_gradients: Gradients,
        *,
        training: bool = False,
        seed: int | None = None,
        weights: torch.Tensor | None = None,
    ) -> tuple[Gradients, Gradients]:
        """Recompute the outputs and backpropagate. Returns the gradients of the inputs and of `parameters`.

        `weights` ([rows], float32) multiply the output gradients; their own gradients then follow those of the inputs.
        Changes nothing, but calls `prepare` the first time. Raises what the module raises.
        """
        if self.optimizer is None:
            self.prepare()
        leaves = as_leaves(inputs)
        present = [x for x in leaves if x is not None]
        sources = present + self.parameters
        outputs = self._runner.run(leaves, training=training, seed=seed, gradients=True)
        if seed is not None and self.is_stochastic(training):
            with randomness.seeded(seed, backward=True):
                gradients = backpropagate(outputs, weighted(output_gradients, weights), sources, self._backpropagate)
        else:
            gradients = backpropagate(outputs, weighted(output_gradients, weights), sources, self._backpropagate)
        found = iter(gradients[: len(present)])
        of_inputs = [None if x is None else next(found) for x in leaves]
        if weights is not None:
            of_inputs.append(weight_gradients(outputs, output_gradients, weights))
        return of_inputs, gradients[len(present) :]

    def _backpropagate(
        self, outputs: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]
    ) -> Sequence[torch.Tensor | None]:
        return run_engine(outputs, gradients, sources)

    def step(self, gradients: Gradients, call_ids: Sequence[bytes] = (), *, peer: Hashable = None) -> int:
        """Take these gradients of `parameters`, sent by `peer`: one optimizer step, or a share of one (`step_every`).

        Journals `call_ids`. A frozen expert does nothing. Returns the version that they led to.
        Raises what the optimizer raises; the expert's state is then undefined.
        """
        if self.optimizer is not None:
            gathered = self._gathered
            if self.steps_at_once:
                self._take_step(gradients)
            else:
                gathered.add(gradients, peer)
                if gathered.is_enough and not self.settings.lockstep:
                    self._take_step(gathered.take() or ())
            self._journal(call_ids)
        return self.version

    @property
    def steps_at_once(self) -> bool:
        """True if the next gradients are a whole step by themselves."""
        settings = self.settings
        return (
            not settings.lockstep
            and settings.step_every == 1
            and not settings.trim_peers
            and not self._gathered.num_batches
        )

    @property
    def gathered(self) -> Gradients | None:
        return self._gathered.merged()

    def take_gathered(self) -> Gradients | None:
        found = self._gathered.merged()
        self._gathered.clear()
        return found

    def end_lockstep(self) -> None:
        """Count a step that was taken together with others. Backwards of an earlier round are refused from now on, and
        need no journal."""
        self._count_step()
        self.applied.clear()
        self.num_bare, self._bare = 0, set()

    def _journal(self, call_ids: Sequence[bytes]) -> None:
        for call_id in call_ids:
            self.applied[call_id] = self.version
        while len(self.applied) > self.journal_length:
            self.applied.popitem(last=False)
            self.num_bare = max(0, self.num_bare - 1)

    # What `gradients` returned for the parameters is the backend's own: its owner adds, judges and scales it by these.

    def add(self, left: Gradients | None, right: Gradients | None) -> Gradients | None:
        return add_gradients(left, right)

    def scaled(self, gradients: Gradients, factor: float) -> Gradients:
        """Return `factor` times gradients of the parameters, which are not changed."""
        return [None if x is None else x * factor for x in gradients]

    def norm_of(self, gradients: Gradients) -> float:
        """Return the norm of gradients of the parameters, as `gradients.norm_of`."""
        return norm_of(gradients)

    def are_finite(self, gradients: Gradients) -> bool:
        """Return whether gradients of the parameters hold no NaN and no infinity."""
        return are_finite(gradients)

    def weights_norm(self) -> float:
        """Return the norm of all numbers that the optimizer steps."""
        return norm_of([x.detach() for x in self.parameters])

    def is_sound(self) -> bool:
        """Return whether everything that the optimizer steps or remembers is finite."""
        return are_finite(self._trained())

    def _trained(self) -> list[torch.Tensor]:
        """Return the numbers that the optimizer steps, then those that it remembers."""
        states = () if self.optimizer is None else self.optimizer.state.values()
        remembered = [x for state in states for x in state.values() if isinstance(x, torch.Tensor)]
        return [x.detach() for x in (*self.parameters, *remembered) if x.is_floating_point() or x.is_complex()]

    def _take_step(self, gradients: Gradients) -> None:
        assert self.optimizer is not None
        self._apply(self.optimizer, gradients)
        self._count_step()

    def _count_step(self) -> None:
        self.version += 1
        if self.scheduler is not None:
            try:
                self.scheduler.step()
            except Exception as error:  # one that has come to its end, such as OneCycleLR; the step stands
                if not self._schedule_ended:
                    self._schedule_ended = True
                    kind = type(self.scheduler).__name__
                    logger.warning(
                        "%s: the rate stays as it is from now on: %s raised %s",
                        self.name,
                        kind,
                        describe(error),
                    )

    def _apply(self, optimizer: torch.optim.Optimizer, gradients: Gradients) -> None:
        stepping.take_step(optimizer, self.parameters, gradients, self.settings.clip_gradient_norm)

    def to(self, device: torch.device) -> None:
        """Move the module and the optimizer's state to a device."""
        if any([x.device != device for x in (*self.module.parameters(), *self.module.buffers())]):
            self.module.to(device)
        if self.optimizer is not None:
            # load_state_dict puts every state tensor on its parameter's device
            self.optimizer.load_state_dict(self.optimizer.state_dict())
        self._runner.forget_graphs()

    def state(self) -> StateDict:
        """Return copies of everything that a checkpoint holds."""
        return self._state(states.copied)

    def _state(self, copied: Callable[[Any], Any]) -> StateDict:
        ids = bytearray(b"".join(self.applied))
        empty = torch.empty(0, dtype=torch.uint8)  # no tensor is made from an empty buffer
        kinds = optimizers.kinds_of(self.module, self.optimizer, self.scheduler)
        of_optimizer = None if self.optimizer is None else self.optimizer.state_dict()
        of_scheduler = None if self.scheduler is None else self.scheduler.state_dict()
        return {
            "module": copied(self.module.state_dict()),
            "optimizer": copied(of_optimizer),
            "scheduler": copied(of_scheduler),
            "kinds": kinds,
            "version": self.version,
            "applied": {
                "ids": torch.frombuffer(ids, dtype=torch.uint8) if ids else empty,
                "versions": torch.tensor(list(self.applied.values()), dtype=torch.int64),
                "num_bare": self.num_bare,
            },
            "accumulated": states.pack_gradients(self._gathered.merged()),
            "num_accumulated": self._gathered.num_batches,
            "gradient_norms": self.norms.values(),
        }

    def load_state(self, state: StateDict) -> None:
        """Continue from what `state` returned. Raises: RuntimeError, ValueError or KeyError if it does not fit.

        Where the optimizer's class or options differ, the log says which hold (`BackendSettings.own_options`).
        """
        states.check_fits(self.module, state["module"])
        self.module.load_state_dict(state["module"])
        if state["optimizer"] is not None:
            self.prepare()  # at once: its owner must hear of what does not fit, not its callers
            if self.optimizer is not None:
                own = self.settings.own_options
                self._say(optimizers.restore(self.module, self.optimizer, self.scheduler, state, own))
        elif self._make_optimizer is not None:
            self.optimizer, self.scheduler = None, None  # the state of an expert that has taken no step
        self.version = state["version"]
        ids, versions = state["applied"]["ids"], state["applied"]["versions"]
        if versions.dtype != torch.int64 or versions.dim() != 1 or ids.numel() != 16 * len(versions):
            raise ValueError("a malformed journal")
        versions = versions[-states.JOURNAL_LENGTH :].tolist()  # a stranger's may be longer
        ids = ids[-16 * len(versions) :].numpy().tobytes()
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
        """Return the version after a backward that was applied before; None if it was not."""
        version = self.applied.get(key)
        if version is None and call_id in self._bare:
            version = self.applied.get(call_id)
        return version


def may_be_grouped(backends: Sequence[ExpertBackend], training: bool) -> bool:
    """Return whether `ExpertBackend.may_be_grouped` holds for all of them."""
    for backend in backends:
        if backend.varies:
            return False
    return only_compute([backend._runner for backend in backends], training)


def step_together(steps: Sequence[tuple[ExpertBackend, Gradients, Sequence[bytes]]]) -> None:
    """Do what `ExpertBackend.step` does for each of these experts, whose optimizers are of one rule, in one step.

    Each must step at once (`steps_at_once`). Raises what an optimizer raises; their state is then undefined.
    """
    stepping.take_steps(
        [backend.optimizer for backend, _, _ in steps if backend.optimizer is not None],
        [gradients for _, gradients, _ in steps],
        steps[0][0].settings.clip_gradient_norm,
    )
    for backend, _, call_ids in steps:
        if backend.scheduler is None:
            backend.version += 1
        else:
            backend._count_step()
        applied, version = backend.applied, backend.version
        for call_id in call_ids:
            applied[call_id] = version
        if len(applied) > states.JOURNAL_LENGTH:  # as long as it may be: none of them is in lockstep
            backend._journal(())


def weights_norms(backends: Sequence[ExpertBackend]) -> list[float]:
    """Return `ExpertBackend.weights_norm` of each, after one wait for the device."""
    weights = [[x.detach() for x in backend.parameters] for backend in backends]
    norms = iter(norms_of([x for own in weights for x in own]))
    return [math.hypot(*itertools.islice(norms, len(own))) for own in weights]


def trained_norms(backends: Sequence[ExpertBackend]) -> list[tuple[float, bool]]:
    """Return `ExpertBackend.weights_norm` and `ExpertBackend.is_sound` of each, after one wait for the device."""
    trained = [backend._trained() for backend in backends]
    norms, found = iter(norms_of([x for own in trained for x in own])), []
    for backend, own in zip(backends, trained, strict=True):
        each = [*itertools.islice(norms, len(own))]
        if math.isfinite(sum(each)):
            found.append((math.hypot(*each[: len(backend.parameters)]), True))
        else:  # perhaps a square overflowed
            found.append((backend.weights_norm(), backend.is_sound()))
    return found
