"""Calls one module as an expert is called: with flat tensors, its own seed, autocast and padding, and under watch.

``torch.compile`` and CUDA graphs like few, fixed numbers of rows; so a batch is padded up to the next preferred size
with copies of its last row (never with zeros, which a module may divide by), and the padding's outputs are cut off.
Copies get no gradient.
"""

import contextlib
import copy
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from tesseract_async.runtime import randomness
from tesseract_async.runtime.watching import Habits, Undone, call_watched, copies, generator_states, have_moved
from tesseract_async.wire import tensors as wire
from tesseract_async.wire.tensors import Schema, TensorSpec

logger = logging.getLogger(__name__)

_TRIED_SIZE = 8
"""Size of dimensions that vary, and one less, in the inputs by which a module's outputs are found out."""


class ModuleRunner:
    """One module and its schemas.

    - `outputs_schema`: what the module returns; found by running two rows of zeros if not given.
    - `sizes`: rows that batches are padded up to, with `compile_mode` or `cuda_graphs`.
    - `stochastic`: whether the module draws random numbers; None: wherever it was seen to draw.
    - `keeps_buffers`: whether the module is expected to leave its buffers alone; a warning says if it does not.

    Raises: ValueError if the module does not return as many rows as it was given, or for an unknown `compile_mode`.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        inputs_schema: tuple[tuple[Schema, ...], dict[str, Schema]],
        outputs_schema: Schema,
        sizes: Sequence[int],
        compile_mode: str | None,
        cuda_graphs: bool,
        autocast: torch.dtype | None,
        stochastic: bool | None,
        keeps_buffers: bool,
    ) -> None:
        self.name = type(module).__name__
        self._module, self._compile_mode = module, compile_mode
        self._callable: Callable[..., object] = self._compiled(module)
        self._inputs_schema = inputs_schema
        self._sizes = tuple(sorted(sizes))
        self._pads = bool(sizes) and (compile_mode is not None or cuda_graphs)
        self._cuda_graphs = cuda_graphs
        self._graphs: dict[int, _Graph] = {}
        self._autocast = autocast
        self._stochastic = stochastic
        self._keeps_buffers = keeps_buffers
        args_schema, kwargs_schema = inputs_schema
        self._is_flat = not kwargs_schema and all(isinstance(x, TensorSpec) for x in args_schema)
        self._is_plain = self._is_flat and not self._pads and autocast is None
        self._specs: list[TensorSpec] = wire.flatten(inputs_schema)
        self._absent: Sequence[int] = ()
        """The places of the inputs that are None in this call."""
        self._habits = {training: Habits() for training in (False, True)}
        has_buffers = next(module.buffers(), None) is not None
        self._keeps = {training: not has_buffers for training in (False, True)}  # seen to leave its buffers alone
        self.marks_inputs = True
        """False for a module that refuses inputs that require gradients."""
        self.outputs_schema: Schema = self._dry_run() if outputs_schema is None else outputs_schema
        self.output_specs: list[TensorSpec] = wire.flatten(self.outputs_schema)

    def another(self, module: nn.Module) -> "ModuleRunner":
        """Return a runner of a module that differs from this one's in numbers only: their habits are the same, and one
        of them is watched for all."""
        made = copy.copy(self)
        made.name, made._module, made._callable = type(module).__name__, module, self._compiled(module)
        made._absent, made._graphs = (), {}
        return made

    def _compiled(self, module: nn.Module) -> Callable[..., object]:
        if self._compile_mode is None:
            return module
        try:
            compiled: Callable[..., object] = torch.compile(module, mode=self._compile_mode)
            return compiled
        except RuntimeError as error:  # its sentence names the modes that there are
            raise ValueError(f"torch.compile: {error}") from error

    def is_stochastic(self, training: bool) -> bool:
        return self._habits[training].draws if self._stochastic is None else self._stochastic

    def run(
        self, inputs: Sequence[torch.Tensor | None], *, training: bool, seed: int | None, gradients: bool
    ) -> list[torch.Tensor]:
        """Return the module's outputs for these rows, and leave the inputs as they are.

        `gradients`: whether autograd records the call. With a `seed`, a stochastic module draws from it. Raises what
        the module raises; SchemaMismatch if its outputs do not fit the schema.
        """
        if self._module.training != training:
            self._module.train(training)
        present = self._take(inputs)
        before = torch.is_grad_enabled()
        torch._C._set_grad_enabled(gradients)  # ``torch.set_grad_enabled`` takes five times as long
        try:
            outputs = self._run(present, training, seed)
        finally:
            torch._C._set_grad_enabled(before)
        leaves = wire.flatten_like(self.outputs_schema, outputs, what="this expert's output")
        if leaves[0].shape[0] != present[0].shape[0]:
            raise ValueError(f"the module returned {leaves[0].shape[0]} rows for {present[0].shape[0]}")
        return leaves

    def _take(self, inputs: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
        """Note which inputs are absent until the next call, and return the others."""
        present = [x for x in inputs if x is not None]
        self._absent = [place for place, x in enumerate(inputs) if x is None] if len(present) < len(inputs) else ()
        return present

    def _arguments(self, present: Sequence[torch.Tensor]) -> tuple[Sequence[object], dict[str, object]]:
        inputs: list[torch.Tensor | None] = [*present]
        for place in self._absent:
            inputs.insert(place, None)
        if self._is_flat:
            return inputs, {}
        args, kwargs = wire.unflatten(self._inputs_schema, inputs)
        return args, kwargs

    def forget_graphs(self) -> None:
        """Drop recorded CUDA graphs: the module's tensors have moved."""
        self._graphs.clear()

    def _run(self, inputs: Sequence[torch.Tensor], training: bool, seed: int | None) -> object:
        habits = self._habits[training]
        if not habits.known:
            return self._watch(inputs, training, seed)
        draws = habits.draws if self._stochastic is None else self._stochastic
        given = copies(inputs) if habits.writes else inputs
        # in evaluation only the first call is looked at: all others would pay for it
        states = generator_states() if training and self._stochastic is None and not draws else ()
        versions = [x._version for x in given]
        outputs = self._call(given, seed if draws else None, records=not draws)
        habits.writes = habits.writes or versions != [x._version for x in given]
        # perhaps another thread has drawn: a watched call tells
        return self._watch(inputs, training, seed) if states and have_moved(states) else outputs

    def _watch(self, inputs: Sequence[torch.Tensor], training: bool, seed: int | None) -> object:
        """Run the module under watch, and learn its habits."""
        habits, given_seed = self._habits[training], seed if self.is_stochastic(training) else None
        outputs = call_watched(lambda given: self._call(given, given_seed, records=False), inputs, habits, self.name)
        if not habits.draws or seed is None or self._stochastic is not None:
            return outputs
        return self._call(copies(inputs), seed, records=False)  # what was drawn so can't be drawn again

    def _call(self, inputs: Sequence[torch.Tensor], seed: int | None, *, records: bool) -> object:
        """Call the module, which draws from the `seed`, if any. `records`: whether a CUDA graph may stand for it."""
        if seed is None and self._is_plain and not self._absent:
            return self._callable(*inputs)
        with contextlib.ExitStack() as stack:
            if seed is not None:
                stack.enter_context(randomness.seeded(seed))
            if self._autocast is not None:
                # a recorded graph must not remember autocast's copies of weights, which change with each step
                caches, kind = not self._cuda_graphs, inputs[0].device.type
                stack.enter_context(torch.autocast(kind, dtype=self._autocast, cache_enabled=caches))
            if not self._pads:
                return self._apply(inputs)
            num_rows = inputs[0].shape[0]
            size = next((size for size in self._sizes if size >= num_rows), num_rows)
            padded = [_pad(x, size) for x in inputs]
            if records and self._cuda_graphs and size in self._sizes and self._may_record(padded):
                if size not in self._graphs:
                    self._graphs[size] = _Graph(self._apply, padded)
                outputs = self._graphs[size].replay(padded)
            else:
                outputs = self._apply(padded)
            return outputs if size == num_rows else _map(outputs, lambda x: x[:num_rows])

    def _apply(self, inputs: Sequence[torch.Tensor]) -> object:
        """Call the module with flat inputs. Under autocast, outputs keep their schema's dtype."""
        args, kwargs = self._arguments(inputs)
        outputs = self._callable(*args, **kwargs)
        if self._autocast is not None:
            leaves = wire.flatten(outputs)
            if len(leaves) == len(self.output_specs):
                cast = [x.to(spec.dtype) for x, spec in zip(leaves, self.output_specs, strict=True)]
                return wire.unflatten(outputs, cast)
        return outputs

    def _may_record(self, inputs: Sequence[torch.Tensor]) -> bool:
        # a graph repeats its mode: only plain evaluation without gradients is recorded
        return inputs[0].is_cuda and not torch.is_grad_enabled() and not self._module.training

    def _dry_run(self) -> Schema:
        most = min((spec.max_size for spec in self._specs if spec.varies), default=0)
        sizes = min(most, _TRIED_SIZE), min(most, _TRIED_SIZE) - 1
        zeros = self._zeros(sizes[0])
        try:
            outputs = self._try_out(zeros, training=False)
        except NotImplementedError:  # it may compute only what is not differentiated
            self.marks_inputs = False
            outputs = self._try_out(zeros, training=False)
        leaves = wire.flatten(outputs)
        if any(isinstance(x, torch.Tensor) and (x.layout is not torch.strided or x.is_nested) for x in leaves):
            raise ValueError(
                "an expert returns dense tensors; this one's are sparse or nested: convert them (to_dense)"
            )
        if not leaves or not all(isinstance(x, torch.Tensor) and x.dim() and x.shape[0] == 2 for x in leaves):
            got = wire.describe_structure(outputs)
            raise ValueError(
                f"an expert returns dense tensors with as many rows as it was given; for 2 rows it gave {got}"
            )
        with contextlib.suppress(Exception):  # its first call in training says so, and is watched
            self._try_out(zeros, training=True)
        specs = [TensorSpec.of(leaf) for leaf in leaves]
        if most:
            others = wire.flatten(self._try_out(self._zeros(sizes[1]), training=False))
            pairs = zip(specs, map(TensorSpec.of, others), strict=True)
            specs = [_varying(one, other, sizes, most) for one, other in pairs]
        if any(spec.optional for spec in self._specs):
            without = [None if spec.optional else x for spec, x in zip(self._specs, zeros, strict=True)]
            self._try_out(without, training=False)
        return wire.unflatten(outputs, specs)

    def _zeros(self, size: int) -> list[torch.Tensor]:
        device = device_of(self._module)
        sized = (spec.sized(size) for spec in self._specs)
        return [torch.zeros(2, *spec.least_shape, dtype=spec.dtype, device=device) for spec in sized]

    def _try_out(self, inputs: Sequence[torch.Tensor | None], *, training: bool) -> object:
        was_training = self._module.training
        present = self._take(as_leaves(inputs) if self.marks_inputs else inputs)

        def call(given: Sequence[torch.Tensor]) -> object:
            args, kwargs = self._arguments(given)
            return self._module.train(training)(*args, **kwargs)

        try:
            # whatever autocast the expert is made in: its runtime's thread has none (and torch none for "meta")
            kind = "cuda" if device_of(self._module).type == "cuda" else "cpu"
            with torch.no_grad(), torch.autocast(kind, enabled=False), Undone(self._module) as undone:
                outputs = call_watched(call, present, self._habits[training], self.name, is_alone=True)
        finally:
            self._module.train(was_training)
        self._keeps[training] = not undone.changed
        if undone.changed and self._keeps_buffers:
            logger.warning(
                "%s changes its buffers in each forward pass (%s): an expert's is computed again in each backward, and "
                "has other people's rows",
                self.name,
                ", ".join(undone.changed[:3]),
            )
        return outputs


def only_compute(runners: Sequence[ModuleRunner], training: bool) -> bool:
    """Return whether all were seen to draw no random numbers in this mode, and to leave inputs and buffers alone."""
    for runner in runners:  # no call for each
        habits = runner._habits[training]
        acts = habits.draws or habits.draws_others or habits.writes or runner._stochastic
        if not habits.known or acts or not runner._keeps[training]:
            return False
    return True


class _Graph:
    """One recorded forward pass. The weights are read where they lie, so that it follows the optimizer's steps."""

    def __init__(self, call: Callable[[Sequence[torch.Tensor]], object], example: Sequence[torch.Tensor]) -> None:
        self._inputs = copies(example)
        streams: Any = torch.cuda  # its classes are untyped
        warm_up = streams.Stream(example[0].device)
        warm_up.wait_stream(torch.cuda.current_stream(example[0].device))
        with torch.cuda.stream(warm_up):
            for _ in range(3):
                call(self._inputs)
        torch.cuda.current_stream(example[0].device).wait_stream(warm_up)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._outputs = call(self._inputs)

    def replay(self, inputs: Sequence[torch.Tensor]) -> object:
        for mine, given in zip(self._inputs, inputs, strict=True):
            mine.copy_(given, non_blocking=True)
        self._graph.replay()
        return _map(self._outputs, torch.clone)  # the next replay overwrites them


def _varying(one: TensorSpec, other: TensorSpec, sizes: tuple[int, int], max_size: int) -> TensorSpec:
    """Return the spec of an output that was found to be these, for inputs of two sizes. Raises: ValueError."""
    shape = tuple(None if pair == sizes else pair[0] for pair in zip(one.shape, other.shape, strict=False))
    spec = TensorSpec(shape, one.dtype, max_size=max_size)
    if len(one.shape) != len(other.shape) or spec.sized(sizes[1]).shape != other.shape:
        raise ValueError(
            f"an output's size that varies is the one that varies in the inputs: for {sizes[0]} and {sizes[1]} there, "
            f"the module gave {one} and {other}"
        )
    return spec


def device_of(module: nn.Module) -> torch.device:
    """Return where the module lives, by its first parameter or buffer."""
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return torch.device("cpu")


def as_leaves(inputs: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """Return each as `as_leaf` does; None stays None."""
    return [None if x is None else as_leaf(x) for x in inputs]


def as_leaf(x: torch.Tensor) -> torch.Tensor:
    """Return the same tensor, requiring gradients if it can have some."""
    return x.detach().requires_grad_() if x.is_floating_point() or x.is_complex() else x.detach()


def _pad(x: torch.Tensor, size: int) -> torch.Tensor:
    missing = size - x.shape[0]
    if missing <= 0:
        return x
    padded = torch.cat([x, x[-1:].detach().expand(missing, *x.shape[1:])])
    return padded.requires_grad_(x.requires_grad)  # without gradients, torch.cat forgets it


def _map(structure: object, function: Callable[[torch.Tensor], torch.Tensor]) -> object:
    return wire.unflatten(structure, map(function, wire.flatten(structure)))
