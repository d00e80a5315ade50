"""Layout: how a model's parameters and buffers are cut into fragments. Pure.

Trainable parameters lie one after another, in the order of their names, and are cut into at least `MIN_FRAGMENTS`
fragments of nearly equal size, of at most `MAX_ELEMENTS` elements. Tensors that are not trained have fragments of their
own, one set for each `MergeKind`. Tied tensors are taken once, under their first name.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from operator import attrgetter
from typing import Final

import msgpack
import torch
from torch import nn

from tesseract_async.errors import ProtocolError
from tesseract_async.wire.tensors import DTYPE_NAMES, DTYPES

MAX_ELEMENTS: Final = 1 << 20
"""The most elements of a fragment: 4 MiB of float32."""
MIN_FRAGMENTS: Final = 4
MAX_FRAGMENTS: Final = 4096
MAX_TENSORS: Final = 16384
MAX_NAME: Final = 256
MAX_LAYOUT_BYTES: Final = 4 << 20
_ALIGNED: Final = 128
"""Fragments begin at multiples of a codec's block."""


class MergeKind(StrEnum):
    """The ways in which the members' values of a fragment are merged."""

    STEPPED = "stepped"
    """Trainable parameters: the outer optimizer steps on the mean difference."""
    AVERAGED = "averaged"
    """Floating buffers: the mean, without momentum."""
    NEWEST = "newest"
    """Integer and bool buffers: those of the member with the most steps."""
    FIXED = "fixed"
    """Frozen parameters: fetched by a newcomer, never pushed."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of the model."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: MergeKind

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Cut:
    """One fragment: elements `start` to `stop` of the tensors of its kind, laid one after another."""

    kind: MergeKind
    start: int
    stop: int

    @property
    def numel(self) -> int:
        return self.stop - self.start

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which its values are kept: sums are taken in float32, whatever the model's dtype."""
        return torch.int64 if self.kind is MergeKind.NEWEST else torch.float32


class LayoutMismatch(ValueError):
    """A model's tensors are not those of the run; the text names each that differs."""


class Layout:
    """The tensors that trainers of a run share, and how they are cut into `cuts`, the fragments in their order."""

    def __init__(self, entries: Sequence[TensorEntry]) -> None:
        """Raises: ValueError for nothing to train, or a model that is too large."""
        self.entries = tuple(entries)
        if len(self.entries) > MAX_TENSORS or sum(one.numel for one in self.entries) > MAX_FRAGMENTS * MAX_ELEMENTS:
            # before it is cut: a stranger's layout may have any size
            raise ValueError(
                f"a shared model has at most {MAX_TENSORS} tensors and {MAX_FRAGMENTS * MAX_ELEMENTS} elements"
            )
        cuts: list[Cut] = []
        for kind in MergeKind:
            total = sum(entry.numel for entry in self.entries if entry.kind is kind)
            least = MIN_FRAGMENTS if kind is MergeKind.STEPPED else 1
            num = max(min(least, total), -(-total // MAX_ELEMENTS))
            size = -(-total // max(1, num))
            if num > 1 and size >= _ALIGNED:
                size = min(MAX_ELEMENTS, -(-size // _ALIGNED) * _ALIGNED)
            cuts += [Cut(kind, start, min(total, start + size)) for start in range(0, total, size or 1)]
        if not cuts or cuts[0].kind is not MergeKind.STEPPED:
            raise ValueError("this model has no parameters that are trained, so there is nothing to share")
        self.cuts: tuple[Cut, ...] = tuple(cuts)
        starts: dict[MergeKind, int] = dict.fromkeys(MergeKind, 0)
        self._placed: list[tuple[TensorEntry, int]] = []
        for entry in self.entries:
            self._placed.append((entry, starts[entry.kind]))
            starts[entry.kind] += entry.numel

    @classmethod
    def of(cls, model: nn.Module) -> "Layout":
        """Return the layout of a model. Raises: ValueError, naming a tensor that cannot be shared."""
        entries, places = list[TensorEntry](), dict[int, str]()
        for name, tensor in _tensors_of(model).items():
            if nn.parameter.is_lazy(tensor):
                raise ValueError(f"{name} has no shape yet: call the model once before it is shared")
            if tensor.dtype not in DTYPE_NAMES or tensor.is_complex() or tensor.layout is not torch.strided:
                raise ValueError(f"{name} cannot be shared: {tensor.dtype}, {tensor.layout}")
            if any(step == 0 and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True)):
                raise ValueError(f"{name} is expanded, so it cannot be written: give the model its `contiguous()`")
            place = tensor.data_ptr() if tensor.numel() else 0
            if place and (other := places.setdefault(place, name)) != name:
                raise ValueError(
                    f"{other} and {name} share memory, but are two tensors: tie them by using one tensor for both"
                )
            if len(name) > MAX_NAME:
                raise ValueError(f"{name[:MAX_NAME]}...: names of shared tensors have at most {MAX_NAME} characters")
            if isinstance(tensor, nn.Parameter):
                kind = MergeKind.STEPPED if tensor.requires_grad else MergeKind.FIXED
            else:
                kind = MergeKind.AVERAGED if tensor.is_floating_point() else MergeKind.NEWEST
            entries.append(TensorEntry(name, tuple(tensor.shape), tensor.dtype, kind))
        return cls(entries)

    def encode(self) -> bytes:
        """Return the layout's bytes; equal layouts have equal ones."""
        rows = [[one.name, list(one.shape), DTYPE_NAMES[one.dtype], one.kind.value] for one in self.entries]
        encoded: bytes = msgpack.packb(rows)
        return encoded

    @classmethod
    def decode(cls, data: bytes) -> "Layout":
        """Read what `encode` made. Untrusted. Raises: ProtocolError."""
        if len(data) > MAX_LAYOUT_BYTES:
            raise ProtocolError("a layout is too large")
        try:
            rows = msgpack.unpackb(data)
            if type(rows) is not list or len(rows) > MAX_TENSORS:
                raise ProtocolError("a layout is a list of tensors")
            layout = cls([_entry(row) for row in rows])
        except ProtocolError:
            raise
        except Exception:  # msgpack raises many kinds
            raise ProtocolError("malformed layout") from None
        if len({one.name for one in layout.entries}) < len(layout.entries):
            raise ProtocolError("two tensors of one name")
        return layout

    def check(self, ours: "Layout") -> None:
        """Compare a model's layout with this one, the run's. Raises: LayoutMismatch, naming what differs."""
        theirs, mine = ({one.name: one for one in layout.entries} for layout in (self, ours))
        differences = [f"{name} is missing here" for name in theirs if name not in mine]
        differences += [f"{name} is not in the run" for name in mine if name not in theirs]
        for name in theirs.keys() & mine.keys():
            run, here = theirs[name], mine[name]
            if run != here:
                differences.append(f"{name} is {_described(run)} in the run, but {_described(here)} here")
        if not differences and self.entries != ours.entries:
            differences = ["its tensors come in another order"]
        if differences:
            shown = sorted(differences)[:8]
            more = f"; and {len(differences) - 8} more" if len(differences) > 8 else ""
            raise LayoutMismatch(f"this model is not the run's: {'; '.join(shown)}{more}")

    def unsound(self, values: Sequence[torch.Tensor]) -> list[str]:
        """Return the names of the tensors that hold a NaN or infinity, in the pieces' values."""
        if all(map(is_finite, values)):
            return []
        return [name for name, one in self.tensors(values).items() if one.is_floating_point() and not is_finite(one)]

    def tensors(self, values: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        found = {one.name: torch.empty(one.shape, dtype=one.dtype, device="cpu") for one in self.entries}
        for cut, mine in zip(self.cuts, values, strict=True):
            for name, start, stop, at in self._parts(cut):
                found[name].view(-1)[start:stop] = mine[at : at + stop - start]
        return found

    def read(self, model: nn.Module, cut: Cut) -> torch.Tensor:
        """Return a copy of the fragment's values on the CPU, in `cut.dtype`."""
        out = torch.empty(cut.numel, dtype=cut.dtype, device="cpu")
        for name, start, stop, at in self._parts(cut):
            out[at : at + stop - start] = attrgetter(name)(model).detach().reshape(-1)[start:stop]
        return out

    def add(self, model: nn.Module, cut: Cut, change: torch.Tensor) -> torch.Tensor | None:
        """Add `change` to the fragment's values in place.

        Returns the part that rounding to 16 bits lost, which belongs to the values until the next change; None if
        nothing was rounded.
        """
        return self._put(model, cut, change, replace=False)

    def write(self, model: nn.Module, cut: Cut, values: torch.Tensor) -> torch.Tensor | None:
        """Set the fragment's values in place. Returns as `add`."""
        return self._put(model, cut, values, replace=True)

    def _put(self, model: nn.Module, cut: Cut, values: torch.Tensor, *, replace: bool) -> torch.Tensor | None:
        lost = None
        with torch.no_grad():
            for name, start, stop, at in self._parts(cut):
                tensor, part = attrgetter(name)(model).detach(), values[at : at + stop - start]
                flat = tensor.view(-1) if tensor.is_contiguous() else tensor.reshape(-1)
                here = flat[start:stop]
                if here.is_floating_point() and here.element_size() < 4:
                    # the sum is rounded once, not the change and then the sum
                    exact = part.to(here.device) if replace else here.float().add_(part.to(here.device))
                    here.copy_(exact)
                    lost = torch.zeros(cut.numel, device="cpu") if lost is None else lost
                    lost[at : at + stop - start] = exact - here.float()
                elif replace:
                    here.copy_(part)
                elif here.dtype == torch.bool:
                    here.copy_(here + part.to(here.device) > 0)
                else:
                    here.add_(part.to(here.device))
                if not tensor.is_contiguous():
                    tensor.copy_(flat.view(tensor.shape))
        return lost

    def _parts(self, cut: Cut) -> Iterator[tuple[str, int, int, int]]:
        """Yield (name, start, stop, place in the fragment) of each tensor's piece."""
        for entry, at in self._placed:
            if entry.kind is cut.kind:
                start, stop = max(cut.start, at), min(cut.stop, at + entry.numel)
                if start < stop:
                    yield entry.name, start - at, stop - at, start - cut.start


def _tensors_of(model: nn.Module) -> Mapping[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = dict(model.named_parameters())
    kept = model.state_dict(keep_vars=True)
    seen = {id(tensor) for tensor in found.values()}
    for name, tensor in model.named_buffers():
        if name in kept and id(tensor) not in seen:
            found[name] = tensor
    return found


def is_finite(tensor: torch.Tensor) -> bool:
    """Return whether no element is infinite or NaN: a sum tells it, unless it is too large itself."""
    return math.isfinite(tensor.sum().item()) or bool(torch.isfinite(tensor).all())


def _entry(row: object) -> TensorEntry:
    if type(row) is not list or len(row) != 4 or any(type(row[place]) is not str for place in (0, 2, 3)):
        raise ProtocolError("malformed tensor of a layout")
    name, shape, dtype, kind = row
    if not 0 < len(name) <= MAX_NAME or not name.isprintable() or dtype not in DTYPES:
        raise ProtocolError("malformed tensor of a layout")
    if type(shape) is not list or len(shape) > 16 or any(type(n) is not int or not 0 <= n < 2**40 for n in shape):
        raise ProtocolError("malformed shape of a layout")
    return TensorEntry(name, tuple(shape), DTYPES[dtype], MergeKind(kind))


def _described(entry: TensorEntry) -> str:
    return f"{str(entry.dtype).removeprefix('torch.')}{list(entry.shape)}, {entry.kind}"
