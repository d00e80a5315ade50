"""The experts of one layer as one operator of torch, ``tesseract::experts``: a call, and in backward a second one.

``torch.compile`` leaves an operator whole, and an operator carries its own backward through checkpoints. This one
returns the sum of the experts' answers, and a *token*: a number that names the call, in memory of its own. What
backward needs is kept exactly as long as some graph holds that memory.

Checkpoints run a layer's forward again in backward. If the same layer runs with the same rows in a backward pass, it is
such a repetition: it gets the first answer, and no server is asked.
"""

import itertools
import warnings
import weakref
from collections.abc import Sequence
from typing import Final, Protocol

import numpy as np
import torch

from tesseract_async.client.background import BackgroundNode
from tesseract_async.client.expert_pool import ExpertPool, PoolAnswer
from tesseract_async.client.scaling import noted_scale
from tesseract_async.errors import ExpertFailed
from tesseract_async.runtime.gradients import are_finite
from tesseract_async.transformers.lockstep import LockstepTrainer
from tesseract_async.uncopied import Uncopied

_NOT_FINITE: Final = (
    "the gradients of remote experts' outputs are not finite (is the loss, or is it NaN?): nothing was sent, and no "
    "expert learned from them"
)
_REENTRANT: Final = (
    "a checkpoint runs the forward of remote experts again, and asks them again: use_reentrant=False spares the second "
    "call"
)
_FORGOTTEN: Final = "this graph's call to remote experts was made by another process, or is gone: run the forward again"


class RemoteLayer(Uncopied):
    """A layer's experts, as the operator finds them; copies of the model share it."""

    def __init__(self, node: BackgroundNode, pool: ExpertPool, lockstep: LockstepTrainer) -> None:
        self.node, self.pool, self.lockstep = node, pool, lockstep
        self.number: Final = next(_numbers)
        self.calls: weakref.WeakSet[_LayerCall] = weakref.WeakSet()
        """Calls that a backward may still go through."""
        self.of_compiled: _LayerCall | None = None
        """The latest call of a compiled graph, which drops the token if it is going to run the forward again."""
        _layers[self.number] = self

    def set_training(self, training: bool) -> None:
        if self.pool.training is not training:
            self.pool.train(training)


class _LayerCall:
    """One forward that a backward may go through."""

    def __init__(self, layer: RemoteLayer, given: Sequence[torch.Tensor], pool_answer: PoolAnswer) -> None:
        self.layer, self.number, self.pool_answer = layer, next(_numbers), pool_answer
        self._given = given
        layer.calls.add(self)
        _calls[self.number] = self

    def is_of(self, given: Sequence[torch.Tensor]) -> bool:
        return all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(self._given, given, strict=True))

    def token(self) -> torch.Tensor:
        """A new token, whose memory holds this call."""
        memory = np.array([self.number])
        weakref.finalize(memory, _let_go, self).atexit = False
        return torch.from_numpy(memory)


_numbers = itertools.count(1)
_layers: weakref.WeakValueDictionary[int, RemoteLayer] = weakref.WeakValueDictionary()
_calls: weakref.WeakValueDictionary[int, _LayerCall] = weakref.WeakValueDictionary()


def _let_go(_call: _LayerCall) -> None:
    """The finalizer that held the call drops it by ending."""


@torch.library.custom_op("tesseract::experts", mutates_args=())
def experts(
    x: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    anchor: torch.Tensor,
    layer: int,
    training: bool,
    differentiable: bool,
    compiled: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The layer's weighted sum for rows `x`, and the call's token. `anchor`, a parameter, makes backward come here also
    where neither `x` nor `weights` need a gradient. Raises: as `ExpertPool.forward`."""
    remote = _layers[layer]
    given = x, index, weights
    if differentiable and torch._C._current_graph_task_id() != -1:
        for call in tuple(remote.calls):
            if call.is_of(given):
                return call.pool_answer.answer.clone(), call.token()
        warnings.warn(_REENTRANT, stacklevel=2)
    if not len(x):
        return torch.zeros_like(x), torch.zeros(1, dtype=torch.int64)
    remote.set_training(training)
    answer = remote.node.run(remote.pool.ask(x, index, weights, differentiable=differentiable))
    if not differentiable:
        return answer.answer, torch.zeros(1, dtype=torch.int64)
    call = _LayerCall(remote, given, answer)
    if compiled:
        remote.of_compiled = call
    return answer.answer.clone(), call.token()


@torch.library.custom_op("tesseract::experts_backward", mutates_args=())
def experts_backward(
    gradient: torch.Tensor, token: torch.Tensor, x: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of `x` and `weights`; the experts learn. Raises: ExpertFailed for gradients that are not finite,
    RuntimeError for a call that is gone, NotEnoughExperts."""
    if not len(x):
        return torch.zeros_like(x), torch.zeros_like(weights)
    call = _calls.get(int(token))
    if call is None:
        raise RuntimeError(_FORGOTTEN)
    layer = call.layer
    scale = noted_scale(torch._C._current_graph_task_id())
    if scale is not None:
        gradient = gradient / scale
    if not are_finite([gradient]):
        if scale is None:
            raise ExpertFailed(_NOT_FINITE)
        return torch.full_like(x, torch.nan), torch.full_like(weights, torch.nan)  # at which the scaler skips its step
    layer.lockstep.backward_begins()
    torch.autograd.Variable._execution_engine.queue_callback(layer.lockstep.backward_ends)
    of_x, of_weights = layer.node.run(call.pool_answer.backward(gradient))
    if layer.of_compiled is call:
        layer.of_compiled = None
    return (of_x, of_weights) if scale is None else (of_x * scale, of_weights * scale)


@experts.register_fake
def _(x, index, weights, anchor, layer, training, differentiable, compiled):  # type: ignore[no-untyped-def]
    return torch.empty_like(x), torch.empty(1, dtype=torch.int64, device="cpu")


@experts_backward.register_fake
def _(gradient, token, x, weights):  # type: ignore[no-untyped-def]
    return torch.empty_like(x), torch.empty_like(weights)


class _OperatorContext(Protocol):
    token: torch.Tensor
    saved_tensors: tuple[torch.Tensor, ...]

    def save_for_backward(self, *tensors: torch.Tensor) -> None: ...


def _keep(ctx: _OperatorContext, inputs: tuple[torch.Tensor, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, _, weights, anchor, *_ = inputs
    ctx.token = output[1]  # checkpoints drop what is saved, and need the call when they run the forward again
    ctx.save_for_backward(output[1], x, weights, anchor)


def _go_back(ctx: _OperatorContext, gradient: torch.Tensor, _: object) -> tuple[torch.Tensor | None, ...]:
    token, x, weights, anchor = ctx.saved_tensors
    of_x, of_weights = experts_backward(gradient, token, x, weights)
    return of_x, None, of_weights, torch.zeros_like(anchor), None, None, None, None


experts.register_autograd(_go_back, setup_context=_keep)
