"""What one expert computes: a module, its optimizer, and the steps that they took.

An `ExpertBackend` is made anywhere and then belongs to a runtime, whose thread alone calls the methods below
*Computing*. Tensors are flat lists here, in the order of the schemas: positional arguments first, then keyword ones.

Gradients never touch ``parameter.grad`` before the step: `gradients` returns them, the runtime sums what belongs into
one step, and `step` hands the sum to the optimizer. So a batch that fails leaves nothing behind, and a request that is
split over batches equals one that is not.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from tesseract_async.wire import tensors as wire
from tesseract_async.wire.tensors import Schema, TensorSpec

Gradients = list[torch.Tensor | None]
"""One per input, or one per trained parameter; None where nothing flows."""

_JOURNAL_LENGTH = 100_000


class ExpertBackend:
    """An expert that a `TesseractServer` can host.

    Args:
        module: takes tensors with rows first, and returns tensors (nested in tuples, lists, dicts as it likes) with as
            many rows. Rows must not influence one another: they meet other people's rows in a batch.
        optimizer: steps the module's parameters after each backward batch; None freezes the expert, which then
            still passes gradients on to its inputs.
        args_schema: the positional arguments, as nested `TensorSpec`s.
        kwargs_schema: the keyword arguments by name.
        outputs_schema: what the module returns; found by running two rows of zeros if not given.
        max_batch_size: rows that are computed at once, at most.

    Raises: ValueError if the module does not return as many rows as it was given, or `max_batch_size` is below 1.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        args_schema: Sequence[Schema],
        kwargs_schema: Mapping[str, Schema] | None = None,
        outputs_schema: Schema = None,
        max_batch_size: int = 4096,
    ) -> None:
        if max_batch_size < 1:
            raise ValueError(f"max_batch_size is at least 1, not {max_batch_size}")
        self.module = module
        self.optimizer = optimizer
        self.args_schema = tuple(args_schema)
        self.kwargs_schema = dict(kwargs_schema or {})
        self.inputs_schema: Schema = (self.args_schema, self.kwargs_schema)
        self.input_specs: list[TensorSpec] = wire.flatten(self.inputs_schema)
        if not self.input_specs:
            raise ValueError("an expert takes at least one tensor")
        self.max_batch_size = max_batch_size
        self.version = 0
        """Optimizer steps taken."""
        self.applied: OrderedDict[bytes, int] = OrderedDict()
        """The journal: call ids of backwards that were applied, and the version that each led to."""
        self.parameters: list[nn.Parameter] = []
        """What the optimizer steps: those of its parameters that want gradients."""
        if optimizer is not None:
            groups = optimizer.param_groups
            self.parameters = [one for group in groups for one in group["params"] if one.requires_grad]
        self.outputs_schema: Schema = self._dry_run() if outputs_schema is None else outputs_schema
        self.output_specs: list[TensorSpec] = wire.flatten(self.outputs_schema)

    @property
    def device(self) -> torch.device:
        """Where the module lives, by its first parameter or buffer."""
        for tensor in (*self.module.parameters(), *self.module.buffers()):
            return tensor.device
        return torch.device("cpu")

    # -- Computing: on the runtime's thread only -------------------------------------------------------------------

    def forward(self, inputs: Sequence[torch.Tensor], *, training: bool = False) -> list[torch.Tensor]:
        """The module's outputs for these rows, without gradients. Raises what the module raises; ValueError if its
        outputs do not fit the schema."""
        with torch.no_grad():
            return self._run(inputs, training)

    def gradients(
        self, inputs: Sequence[torch.Tensor], output_gradients: Gradients, *, training: bool = False
    ) -> tuple[Gradients, Gradients]:
        """Recomputes the outputs and backpropagates. Returns the gradients of the inputs and of `parameters`.

        Changes nothing. Raises what the module raises.
        """
        leaves = [
            x.detach().requires_grad_() if x.is_floating_point() or x.is_complex() else x.detach() for x in inputs
        ]
        wanted = [leaf for leaf in leaves if leaf.requires_grad] + self.parameters
        with torch.enable_grad():
            outputs = self._run(leaves, training)
            pairs = [
                (output, gradient)
                for output, gradient in zip(outputs, output_gradients, strict=True)
                if gradient is not None and output.requires_grad
            ]
        found: Sequence[torch.Tensor | None] = [None] * len(wanted)
        if pairs and wanted:
            found = torch.autograd.grad(
                [output for output, _ in pairs], wanted, [gradient for _, gradient in pairs], allow_unused=True
            )
        remaining = iter(found)
        of_inputs: Gradients = [next(remaining) if leaf.requires_grad else None for leaf in leaves]
        return of_inputs, list(remaining)

    def step(self, gradients: Gradients, call_ids: Sequence[bytes] = ()) -> int:
        """One optimizer step on these gradients of `parameters`; journals `call_ids`. Returns the new version.

        A frozen expert only journals. Raises what the optimizer raises; its state is then undefined.
        """
        if self.optimizer is not None:
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                parameter.grad = gradient
            try:
                self.optimizer.step()
            finally:
                self.optimizer.zero_grad(set_to_none=True)
            self.version += 1
        for call_id in call_ids:
            self.applied[call_id] = self.version
        while len(self.applied) > _JOURNAL_LENGTH:
            self.applied.popitem(last=False)
        return self.version

    def to(self, device: torch.device) -> None:
        """Moves the module and the optimizer's state."""
        self.module.to(device)
        if self.optimizer is not None:
            # load_state_dict puts every state tensor beside its parameter
            self.optimizer.load_state_dict(self.optimizer.state_dict())

    def state(self) -> dict[str, Any]:
        """Copies of everything that a checkpoint holds: nested dicts and lists of CPU tensors and plain values."""
        return {
            "module": _copy(self.module.state_dict()),
            "optimizer": None if self.optimizer is None else _copy(self.optimizer.state_dict()),
            "version": self.version,
            "applied": {call_id.hex(): version for call_id, version in self.applied.items()},
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continues from what `state` returned. Raises: RuntimeError, ValueError or KeyError if it does not fit."""
        self.module.load_state_dict(state["module"])
        if self.optimizer is not None and state["optimizer"] is not None:
            self.optimizer.load_state_dict(state["optimizer"])
        self.version = state["version"]
        self.applied = OrderedDict((bytes.fromhex(key), version) for key, version in state["applied"].items())

    def _run(self, inputs: Sequence[torch.Tensor], training: bool) -> list[torch.Tensor]:
        if self.module.training != training:
            self.module.train(training)
        args, kwargs = wire.unflatten(self.inputs_schema, inputs)
        outputs = self.module(*args, **kwargs)
        return wire.flatten_like(self.outputs_schema, outputs, what="this expert's output")

    def _dry_run(self) -> Schema:
        device, was_training = self.device, self.module.training
        args, kwargs = wire.unflatten(
            self.inputs_schema,
            [torch.zeros(2, *spec.shape, dtype=spec.dtype, device=device) for spec in self.input_specs],
        )
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


def _copy(value: Any) -> Any:
    """The same structure with every tensor copied to the CPU, so that training goes on while it is written."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_copy(item) for item in value]
    return value
