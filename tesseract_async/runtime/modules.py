"""What a module's parts say about how its rows may be computed."""

from __future__ import annotations

from torch import nn
from torch.nn.parameter import is_lazy

from tesseract_async.runtime.states import check_stored


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


def uses_batch_statistics(module: nn.Module) -> bool:
    """Whether its outputs for one row depend on the other rows, or it learns from forward passes (BatchNorm)."""
    return any(
        isinstance(part, nn.modules.batchnorm._NormBase) and (part.track_running_stats or _is_batch_norm(part))
        for part in module.modules()
    )


def _is_batch_norm(part: nn.Module) -> bool:
    return isinstance(part, nn.modules.batchnorm._BatchNorm)


def sparse_parameters(module: nn.Module) -> set[int]:
    """The ids of those parameters whose gradients are sparse."""
    return {
        id(part.weight)
        for part in module.modules()
        if isinstance(part, nn.Embedding | nn.EmbeddingBag) and part.sparse and isinstance(part.weight, nn.Parameter)
    }
