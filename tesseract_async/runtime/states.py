"""States of experts: the dtypes and values that a checkpoint can hold, copies of them, and their fit to a module."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import nn
from torch.nn.parameter import is_lazy

StateDict = dict[str, Any]
"""The state of an expert: nested dicts and lists of CPU tensors and plain values, as a checkpoint holds them."""

JOURNAL_LENGTH: Final = 65536
"""Backward calls that an expert remembers, so that none is applied twice: those of the last minutes under any load."""
LOCKSTEP_JOURNAL_LENGTH: Final = 256
"""Backward calls that an expert remembers in lockstep, where they are forgotten with each step."""

SAFETENSORS: Final[Mapping[str, torch.dtype]] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
"""The dtypes of a checkpoint, by their names in the file."""
_STORED: Final = frozenset(SAFETENSORS.values())


def copied(value: Any) -> Any:
    """Return the same structure with every tensor copied to the CPU, so that training can go on."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: copied(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [copied(item) for item in value]
    return value


def check_module(module: nn.Module) -> None:
    """Raises: ValueError for tensors that cannot be trained or written to a checkpoint."""
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if is_lazy(tensor):
            raise ValueError(f"{name} has no shape yet: call the module once before it becomes an expert")
        if tensor.is_inference():
            raise ValueError(
                f"{name} was made under torch.inference_mode(), so that nothing can be learned: make the "
                "module outside of it"
            )
    try:
        check_stored(module.state_dict(), "its state")
    except TypeError as error:
        raise ValueError(f"{error}: a buffer of it takes persistent=False, an extra state another form") from None


def check_stored(value: object, path: str) -> None:
    """Raises: TypeError, naming `path`, for what a checkpoint cannot hold."""
    if isinstance(value, torch.Tensor):
        if value.dtype not in _STORED or value.layout is not torch.strided:
            raise TypeError(f"{path}: a checkpoint cannot hold a {value.dtype} tensor of layout {value.layout}")
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if key is not None and not isinstance(key, bool | int | float | str):
                raise TypeError(f"{path}: a checkpoint cannot hold a key of type {type(key).__name__}")
            check_stored(item, f"{path}/{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            check_stored(item, f"{path}/{index}")
    elif value is not None and not isinstance(value, bool | int | float | str):
        raise TypeError(f"{path}: a checkpoint cannot hold a {type(value).__name__}")


def check_fits(module: nn.Module, state: Mapping[str, object]) -> None:
    """Raises: ValueError, naming the first difference, if `state` has other names or shapes than this module's."""
    here = module.state_dict()
    for name, tensor in here.items():
        if name not in state:
            raise ValueError(f"it has no {name}")
        shapes = [tuple(x.shape) if hasattr(x, "shape") else None for x in (state[name], tensor)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"its {name} has the shape {shapes[0]}, this module's {shapes[1]}")
    for name in state:
        if name not in here:
            raise ValueError(f"its {name} is unknown to this module")


def pack_gradients(gradients: Sequence[torch.Tensor | None] | None) -> list[object] | None:
    """Return copies of gradients as a checkpoint holds them; a sparse one by its indices, values and shape."""
    if gradients is None:
        return None
    packed: list[object] = []
    for x in gradients:
        if x is not None and x.layout is torch.sparse_coo:
            x = x.detach().coalesce()
            packed.append({"indices": copied(x.indices()), "values": copied(x.values()), "shape": list(x.shape)})
        else:
            packed.append(None if x is None else copied(x.to_dense()))
    return packed


def unpack_gradients(packed: Sequence[Any], device: torch.device) -> list[torch.Tensor | None]:
    """Return copies on `device` of the gradients that `pack_gradients` was given."""
    found: list[torch.Tensor | None] = []
    for x in packed:
        if isinstance(x, Mapping):
            x = torch.sparse_coo_tensor(x["indices"], x["values"], x["shape"], is_coalesced=True, check_invariants=True)
        found.append(None if x is None else x.to(device, copy=True))
    return found
