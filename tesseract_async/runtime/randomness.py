"""Random numbers of one call, from its own seed: other threads' numbers are neither used nor disturbed.

PyTorch's default generators belong to the process, and modules such as dropout draw from them. Inside `seeded`, a
dispatch mode of this thread hands each random operation a generator made for this call. An operation that takes no
generator, such as the fused attention kernels of a GPU, runs with the device's default generator seeded and put back
around it.

``torch.utils.checkpoint`` inside a module would draw other numbers when it computes random layers again, and gradients
would silently be wrong. So it is refused: `seeded` for a backward raises where a random operation is computed again.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

Operand = Any  # an argument or result of an operation
cuda: Any = torch.cuda  # its generators are untyped


class seeded(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A context in which random operations of this thread follow from `seed`, on every device.

    `backward`: for the backward pass of what was computed so; random operations that are computed again in it, because
    they were not kept, raise RuntimeError. Works below autograd, so that what a backward needs is saved as usual.
    """

    def __init__(self, seed: int, *, backward: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._seed = seed
        self._backward = backward
        self._generators: dict[torch.device, torch.Generator] = {}

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: Sequence[Operand] = (), kwargs: Mapping[str, Operand] | None = None
    ) -> Operand:
        kwargs = dict(kwargs or {})
        if torch.Tag.nondeterministic_seeded not in func.tags or has_own_generator(kwargs):
            return func(*args, **kwargs)
        if self._backward and torch.is_grad_enabled():  # a backward's own operations record no gradients
            raise RuntimeError(
                "torch.utils.checkpoint around a random layer, such as dropout, would draw other numbers when it is "
                "computed again; leave the checkpoint out, or the random layer outside of it"
            )
        device = _device_of(args, kwargs)
        if func is torch.ops.aten.native_dropout.default:  # a GPU's, fused
            return self._dropout(device, *args, **kwargs)
        variant = _with_generator(func)
        if variant is not None:
            kwargs.pop("generator", None)  # none, or a default one
            return variant(*args, **kwargs, generator=self._generator(device))
        result = func.decompose(*args, **kwargs)  # recurrent layers are made of simpler operations
        return self._fused(func, device, args, kwargs) if result is NotImplemented else result

    def _generator(self, device: torch.device) -> torch.Generator:
        found = self._generators.get(device)
        if found is None:
            found = self._generators[device] = torch.Generator(device).manual_seed(self._seed)
        return found

    def _dropout(self, device: torch.device, x: torch.Tensor, p: float, train: bool | None) -> Operand:
        if train is False or p == 0:
            return x.clone(), torch.ones_like(x, dtype=torch.bool)
        mask = torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - p, generator=self._generator(device))
        return x * mask * (1 / (1 - p) if p < 1 else 0.0), mask

    def _fused(
        self, func: OpOverload, device: torch.device, args: Sequence[Operand], kwargs: Mapping[str, Operand]
    ) -> Operand:
        default = torch.default_generator if device.type == "cpu" else cuda.default_generators[device.index or 0]
        seed = torch.randint(2**62, (), generator=self._generator(torch.device("cpu")))
        before = default.get_state()
        try:
            default.manual_seed(int(seed))
            return func(*args, **kwargs)
        finally:
            default.set_state(before)


def has_own_generator(kwargs: Mapping[str, Operand]) -> bool:
    """Return whether an operation with these arguments draws from a generator that is not one of PyTorch's defaults."""
    generator = kwargs.get("generator")
    defaults = (torch.default_generator, *cuda.default_generators)
    # an operation sees another object than its caller gave, of the same generator
    return generator is not None and all(generator._cdata != one._cdata for one in defaults)


def _with_generator(func: OpOverload) -> OpOverload | None:
    wanted = _arguments(func)
    if "generator" in wanted:
        return func
    for name in func.overloadpacket.overloads():
        other: OpOverload = getattr(func.overloadpacket, name)
        arguments = _arguments(other)
        if arguments.pop("generator", None) is not None and arguments == wanted:
            return other
    return None


def _arguments(func: OpOverload) -> dict[str, str]:
    return {argument.name: str(argument.type) for argument in func._schema.arguments}


def _device_of(args: Sequence[Operand], kwargs: Mapping[str, Operand]) -> torch.device:
    device = kwargs.get("device")
    if device is None:
        device = next((x.device for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)), "cpu")
    return torch.device(device)
