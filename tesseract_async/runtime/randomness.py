"""Random numbers of one call, from its own seed: other threads' numbers are neither used nor disturbed.

PyTorch's default generators belong to the process, while modules such as dropout name none. Inside `seeded`, a dispatch
mode (which is the thread's own) hands each random operation a generator made for this call. What takes no generator,
such as the fused attention kernels of a GPU, runs with the device's default one seeded and put back around that single
operation.

``torch.utils.checkpoint`` inside a module repeats numbers by the process's generator, which is not in use here: random
layers inside of it would draw others when they are computed again, and gradients would silently be wrong. So it is
refused: `seeded` for a backward raises where a random operation is computed again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten: Any = torch.ops.aten  # made at run time
cuda: Any = torch.cuda  # its generators are untyped


@contextlib.contextmanager
def seeded(seed: int, *, backward: bool = False) -> Iterator[None]:
    """Random operations of this thread follow from `seed`, on every device.

    `backward`: around the backward pass of what was computed so; operations that are computed again in it, instead of
    kept, then raise RuntimeError if they are random.
    """
    with _OwnGenerators(seed, backward=backward):
        yield


class _OwnGenerators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operation below autograd, so that what a backward needs of a random one is saved as usual."""

    def __init__(self, seed: int, *, backward: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._seed = seed
        self._backward = backward
        self._generators: dict[torch.device, torch.Generator] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if torch.Tag.nondeterministic_seeded not in func.tags or has_own_generator(kwargs):
            return func(*args, **kwargs)
        if self._backward and torch.is_grad_enabled():  # a backward's own operations record no gradients
            raise RuntimeError(
                "torch.utils.checkpoint around a random layer, such as dropout, would draw other numbers when it is "
                "computed again; leave the checkpoint out, or the random layer outside of it"
            )
        device = _device_of(args, kwargs)
        if func is aten.native_dropout.default:  # a GPU's, fused
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

    def _dropout(self, device: torch.device, x: torch.Tensor, p: float, train: bool | None) -> Any:
        if train is False or p == 0:
            return x.clone(), torch.ones_like(x, dtype=torch.bool)
        mask = torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - p, generator=self._generator(device))
        return x * mask * (1 / (1 - p) if p < 1 else 0.0), mask

    def _fused(self, func: Any, device: torch.device, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        default = torch.default_generator if device.type == "cpu" else cuda.default_generators[device.index or 0]
        seed = torch.randint(2**62, (), generator=self._generator(torch.device("cpu")))
        before = default.get_state()
        try:
            default.manual_seed(int(seed))
            return func(*args, **kwargs)
        finally:
            default.set_state(before)


def has_own_generator(kwargs: Mapping[str, Any]) -> bool:
    """Whether an operation with these arguments draws from a generator that is none of PyTorch's default ones."""
    generator = kwargs.get("generator")
    defaults = (torch.default_generator, *cuda.default_generators)
    # an operation sees another object than its caller gave, of the same generator
    return generator is not None and all(generator._cdata != one._cdata for one in defaults)


def _with_generator(func: Any) -> Any:
    """The overload of this operation that takes a generator, if there is one."""
    wanted = _arguments(func)
    if "generator" in wanted:
        return func
    packet = func.overloadpacket
    for other in (getattr(packet, name) for name in packet.overloads()):
        arguments = _arguments(other)
        if arguments.pop("generator", None) is not None and arguments == wanted:
            return other
    return None


def _arguments(func: Any) -> dict[str, str]:
    return {argument.name: str(argument.type) for argument in func._schema.arguments}


def _device_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.device:
    device = kwargs.get("device")
    if device is None:
        device = next((x.device for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)), "cpu")
    return torch.device(device)
