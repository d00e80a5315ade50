"""The arguments of a call, as they were when it was made: a later change in place is noticed, or does not reach it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat

import torch

from tesseract_async.client.expert_rpc import CallMode, ExpertSchema
from tesseract_async.errors import SchemaMismatch
from tesseract_async.wire.tensors import Schema, Structure, flatten_like, sequence_like

_CHANGED = (
    "an input of a remote call was changed in place while the call was under way: await the call first, or give it a "
    "copy (x.clone())"
)


with torch.inference_mode(False):  # this module may be imported in the midst of anything
    _drawn = torch.empty((), dtype=torch.int64, device="cpu")
    """The tensor that seeds are drawn into; kept, because making one takes longer than drawing. Threads that draw at
    the same time may get the same seed."""


class Versions:
    """The in-place versions of some tensors; other objects among them are left out."""

    def __init__(self, leaves: Iterable[object] = ()) -> None:
        self._noted: list[tuple[torch.Tensor, int]] = []
        for x in leaves:  # no comprehension: another call of a function, before Python 3.12
            if isinstance(x, torch.Tensor) and not x.is_inference():
                self._noted.append((x, x._version))

    def check(self) -> None:
        """Raises: RuntimeError if one was changed since it was noted."""
        for tensor, version in self._noted:
            if tensor._version != version:
                raise RuntimeError(_CHANGED)


@dataclass(frozen=True, slots=True, eq=False)
class Arguments:
    args: tuple[Structure, ...]
    kwargs: Mapping[str, Structure]
    versions: Versions
    mode: CallMode
    casts: bool
    """True if autocast is on for the tensors' device: floating-point ones are then cast to the schema's dtypes."""

    @classmethod
    def now(cls, args: tuple[Structure, ...], kwargs: Mapping[str, Structure], *, training: bool) -> "Arguments":
        """Read grad mode and autocast, draw a seed if `training`, and hold the arguments in new plain structures.

        Tensors that may change without another version are copied. The seed comes from torch's CPU generator, so
        `torch.manual_seed`, `torch.set_rng_state` and `torch.random.fork_rng` act on remote dropout as they do on local
        dropout.
        """
        tensors: list[torch.Tensor] = []
        taken = tuple(map(_taken, args, repeat(tensors)))
        keywords = {key: _taken(value, tensors) for key, value in kwargs.items()} if kwargs else {}
        seed = int(_drawn.random_(2**62)) if training else 0
        mode = CallMode(training, seed, torch.is_grad_enabled())
        casts = torch._C._is_any_autocast_enabled() and any(
            torch.is_autocast_enabled(leaf.device.type) for leaf in tensors
        )
        return cls(taken, keywords, Versions(tensors), mode, casts)

    def fit(self, schema: ExpertSchema, what: str) -> list[torch.Tensor | None]:
        """The tensors in the order of `schema`, None where an optional one is absent.

        Raises: SchemaMismatch, which names `what`; TypeError.
        """
        given = self.args, self.kwargs
        if self.casts:
            with torch.set_grad_enabled(self.mode.differentiable):
                given = _cast_to(schema.args, self.args), _cast_to(schema.kwargs, self.kwargs)
        return flatten_like(schema.inputs, given, what=what)

    def fits(self, schema: ExpertSchema) -> bool:
        try:
            self.fit(schema, "")
        except SchemaMismatch:
            return False
        return True


def present(inputs: Sequence[torch.Tensor | None]) -> tuple[list[torch.Tensor], list[int]]:
    """Return the tensors, and the places of those that are absent."""
    tensors: list[torch.Tensor] = []
    places: list[int] = []
    for place, x in enumerate(inputs):
        if x is None:
            places.append(place)
        else:
            tensors.append(x)
    return tensors, places


def with_absent(tensors: Sequence[torch.Tensor | None], places: Sequence[int]) -> list[torch.Tensor | None]:
    """Undo `present`."""
    inputs = [*tensors]
    for place in places:
        inputs.insert(place, None)
    return inputs


def _cast_to(schema: Schema, value: Structure) -> Structure:
    """`value` with its floating-point tensors in the schema's dtypes; what does not fit is left for the check."""
    if isinstance(schema, dict) and isinstance(value, Mapping):
        return {key: _cast_to(schema[key], item) if key in schema else item for key, item in value.items()}
    if isinstance(schema, tuple | list) and isinstance(value, tuple | list) and len(schema) == len(value):
        return sequence_like(value, [_cast_to(part, item) for part, item in zip(schema, value, strict=True)])
    both = isinstance(value, torch.Tensor) and not isinstance(schema, tuple | list | dict)
    if both and value.is_floating_point() and schema.dtype.is_floating_point:
        return value.to(schema.dtype)
    return value


def _taken(value: Structure, tensors: list[torch.Tensor]) -> Structure:
    if isinstance(value, torch.Tensor):
        tensors.append(value.clone() if _may_change_unseen(value) else value)
        return tensors[-1]
    if isinstance(value, tuple | list):
        items = [_taken(item, tensors) for item in value]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, Mapping):
        return {key: _taken(item, tensors) for key, item in value.items()}
    return value


def _may_change_unseen(tensor: torch.Tensor) -> bool:
    if tensor.is_inference():
        return True
    if tensor.grad_fn is not None or tensor.layout != torch.strided:
        return False  # torch shares no memory of what is in a graph
    if tensor._base is not None and tensor.numel() < tensor._base.numel():
        return True
    if tensor.device.type != "cpu":
        return False
    # not resizable: NumPy or somebody's bytes use the same memory (or did: a small tensor that was sent before)
    storage = tensor.untyped_storage()
    return not storage.resizable() or storage.is_shared()
