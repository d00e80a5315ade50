"""The tensors that are made while something runs: where they lie, and how large they are."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Made(TorchDispatchMode):
    """Notes what PyTorch's operations give inside, in this thread."""

    def __init__(self) -> None:
        super().__init__()
        self.devices: set[str] = set()
        self.kinds: set[tuple[torch.dtype, tuple[int, ...]]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for one in tree_leaves(result):
            if isinstance(one, torch.Tensor):
                self.devices.add(one.device.type)
                self.kinds.add((one.dtype, tuple(one.shape)))
        return result
