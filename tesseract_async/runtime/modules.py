"""What a module's parts say about how its rows may be computed."""

from __future__ import annotations

from torch import nn


def draws_random_numbers(module: nn.Module) -> bool:
    """Whether a module of PyTorch's own inside draws random numbers in train mode (dropout and the like)."""
    for part in module.modules():
        if isinstance(part, nn.modules.dropout._DropoutNd) and part.p > 0:
            return True
        if isinstance(part, nn.RReLU) or (isinstance(part, nn.MultiheadAttention | nn.RNNBase) and part.dropout > 0):
            return True
    return False


def uses_batch_statistics(module: nn.Module) -> bool:
    """Whether its outputs for one row depend on the other rows, or it learns from forward passes (BatchNorm)."""
    return any(
        isinstance(part, nn.modules.batchnorm._NormBase) and (part.track_running_stats or _is_batch_norm(part))
        for part in module.modules()
    )


def _is_batch_norm(part: nn.Module) -> bool:
    return isinstance(part, nn.modules.batchnorm._BatchNorm)
