"""Lockstep, the trainer's side: remote experts take the steps of the local optimizer, with its settings and clipping.

In backward the experts only accumulate. A small parameter, the *anchor*, stands for all of them in the local model:
after a backward its gradient has the norm of what they have accumulated, so that clipping counts it. The change that
clipping made to it tells the experts what to do to their gradients when the optimizer steps: see `Norm`.

Experts that step on every gradient, as those of swarms do, and frozen ones need none of this; the servers say so.
"""

import asyncio
import math
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, Final, Self

import torch
from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from tesseract_async.client.background import BackgroundNode
from tesseract_async.client.expert_pool import ExpertPool
from tesseract_async.client.scaling import noted_scale
from tesseract_async.errors import ExpertNotFound, UnknownMethod
from tesseract_async.transport.base import PeerAddress
from tesseract_async.uncopied import Uncopied
from tesseract_async.wire import messages
from tesseract_async.wire.messages import LOCKSTEP, LockstepReply, LockstepRequest

_OPTIMIZERS: Final = {torch.optim.AdamW: "adamw", torch.optim.Adam: "adam", torch.optim.SGD: "sgd"}
_UNKNOWN_SETTINGS: Final = ("amsgrad", "maximize", "nesterov", "dampening")
_NORMS: Final = frozenset({torch._foreach_norm, torch.linalg.vector_norm, torch.norm, torch.Tensor.norm})
_TRACE: Final = 2.0**-30
_BIASES: Final = (
    "these experts have biases, to which weight_decay applies as to their weights, and this optimizer has several "
    "groups of parameters: take weight_decay=0, or one group for all"
)


class Norm(torch.Tensor):
    """The anchor's gradient: two numbers, ``[n / 2**30, n]`` for the norm ``n`` of what the experts have gathered.

    Its norm of order 2 is ``n``; it cannot stand for norms of another order. Multiplying all gradients changes both
    numbers alike; limiting the size of each number changes only the second, to that limit.
    """

    @classmethod
    def of(cls, norm: float, like: torch.Tensor) -> Self:
        """Return the anchor's gradient for this norm, as a gradient of `like`."""
        return torch.tensor([norm * _TRACE, norm], dtype=like.dtype, device=like.device).as_subclass(cls)

    def change(self, norm: float) -> dict[str, float]:
        """Return how it was changed since it stood for `norm`: ``scale``, or ``limit`` of each number.

        Raises: ValueError for both, and for gradients that are not finite.
        """
        trace, total = self.as_subclass(torch.Tensor).tolist()
        scale = trace / (norm * _TRACE) if norm else 1.0
        if not math.isfinite(scale):
            raise ValueError("the gradients of this step are not finite")
        if math.isclose(total, scale * norm, rel_tol=1e-5):
            return {"scale": scale}
        if not math.isclose(scale, 1.0, rel_tol=1e-5):
            raise ValueError(
                "gradients of remote experts can be clipped by norm or by value, but not by both: choose one"
            )
        return {"limit": total}

    @classmethod
    def __torch_function__(
        cls, func: Any, types: object, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _NORMS:
            order = kwargs.get("ord", kwargs.get("p", args[1] if len(args) > 1 else 2))
            if order not in (2, None, "fro"):
                raise ValueError(
                    f"remote experts know the norm of order 2 of their gradients, not that of order {order}"
                )
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)


class StandIn(nn.Module):
    """Stands in a local model for its remote experts' steps: a part of its first experts module."""

    round: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(2, device="cpu", dtype=torch.float32))
        self.register_buffer("round", torch.zeros((), device="cpu", dtype=torch.int64))
        """The steps that the experts had taken when these weights were theirs."""

    @property
    def _is_hf_initialized(self) -> bool:
        return False

    @_is_hf_initialized.setter
    def _is_hf_initialized(self, value: bool) -> None:
        """Set by Transformers, which leaves memory uninitialized where a file lacks a tensor, and notes here that it is
        done."""
        with torch.no_grad():
            for tensor in (self.anchor, self.round):
                if not getattr(tensor, "_is_hf_initialized", False) and not tensor.is_meta:
                    tensor.zero_()


class LockstepTrainer(Uncopied):
    """Tells the servers of one model's experts what its trainer does. The model's layers share it."""

    def __init__(self, node: BackgroundNode, prefix: str, *, timeout: float) -> None:
        self._node, self._prefix, self._timeout = node, prefix, timeout
        self._pools: list[ExpertPool] = []
        self._has_biases = False
        self._stand_in: weakref.ref[StandIn] | None = None
        self.round: int | None = None
        """The steps that the experts have taken; None before they were asked, and if they are not in lockstep."""
        self._was_asked = False
        self._task: int | None = None
        """The backward pass under way."""
        self._scale = 1.0
        """The factor by which a `GradScaler` multiplies the gradients of this pass."""
        self._norm = 0.0
        """The norm of the gradients that the experts have gathered."""
        self._told: dict[object, LockstepReply] = {}
        """Each server's reply after the last backward."""
        self._holds_some = True
        """The servers may hold gradients that no step has used."""

    def add(self, pool: ExpertPool, *, has_biases: bool) -> None:
        """Add one of the model's layers. `has_biases`: whether its experts have biases."""
        self._pools.append(pool)
        self._has_biases |= has_biases

    def belongs_to(self, stand_in: StandIn) -> None:
        """Note that this stand-in belongs to the model that is computed now: a copy may belong to another model."""
        if (
            getattr(stand_in.anchor, "tesseract_lockstep", None) is not self
            or self._stand_in is None
            or self._stand_in() is not stand_in
        ):
            self._stand_in = weakref.ref(stand_in)
            stand_in.anchor.tesseract_lockstep = self  # type: ignore[attr-defined]

    def backward_begins(self) -> None:
        """Check the experts' step before the gradients of a layer leave, once per layer, in the engine's thread.

        Raises: ValueError if the experts are of another step than the model, or what they gathered was changed here.
        """
        task = torch._C._current_graph_task_id()
        if task == self._task:
            return
        before, self._task, self._scale = self._norm * self._scale, task, noted_scale(task) or 1.0
        anchor = self._local().anchor
        if not anchor.requires_grad or self.agree() is None:
            return
        if anchor.grad is None or not bool(anchor.grad.any()):
            if self._holds_some:
                self._ask("clear")  # zero_grad() was called without a step, or another trainer left some
        elif not torch.equal(anchor.grad, Norm.of(before, anchor)):
            raise ValueError(
                "gradients were changed between two backwards of one step: clip them once, before the step"
            )
        self._holds_some = True

    def backward_ends(self) -> None:
        """Learn the norm of what experts gathered, now that the pass is over; once per layer that took part."""
        if self._task is None:
            return
        self._task = None
        anchor = self._local().anchor
        if self.round is None or not anchor.requires_grad:
            return
        replies = self._ask("status")
        for reply in replies:
            if reply.num_experts and reply.round != self.round:  # another trainer's, or a server went back
                raise ValueError(self._of_another_step(self.round, reply.round))
        self._norm = math.sqrt(sum(reply.squared_norm for reply in replies))
        anchor.grad = Norm.of(self._norm * self._scale, anchor)

    def step(self, anchor: nn.Parameter, optimizer: Optimizer, group: Mapping[str, Any]) -> None:
        """Have the experts step, as the local optimizer is about to. Raises: ValueError for an optimizer that the
        experts do not have."""
        gradient, anchor.grad = anchor.grad, None  # the optimizer leaves it alone
        if gradient is None or self.round is None:
            return
        try:
            change = gradient.as_subclass(Norm).change(self._norm)
            # what a GradScaler leaves to optimizers with kernels of their own
            scale, overflown = (getattr(optimizer, name, None) for name in ("grad_scale", "found_inf"))
            if overflown is not None and bool(overflown):
                return
            if scale is not None:
                change["scale"] = change.get("scale", 1.0) / float(scale)
            name, settings = _rule(optimizer, group)
            if self._has_biases and settings.get("weight_decay") and len(optimizer.param_groups) > 1:
                raise ValueError(_BIASES)
            self._ask("step", name, settings | change)
        except BaseException:  # the step may be tried again
            anchor.grad = gradient
            raise
        self._holds_some = False
        self.round += 1
        self._local().round.fill_(self.round)

    def save(self) -> int:
        """Have the servers write checkpoints; return the round. Raises: ValueError if they are not in lockstep."""
        if self.agree() is None:
            raise ValueError(f"the experts of {self._prefix} are not in lockstep: their servers save by themselves")
        self._ask("save")
        assert self.round is not None
        return self.round

    def agree(self) -> int | None:
        """Return the round of experts and model; None if they are not in lockstep. Raises: ValueError if the two
        differ."""
        if not self._was_asked:
            replies = self._ask("status")
            num_experts, wanted = sum(reply.num_experts for reply in replies), sum(p.num_experts for p in self._pools)
            rounds = {reply.round for reply in replies if reply.num_experts}
            if num_experts not in (0, wanted) or len(rounds) > 1:
                raise ValueError(
                    f"{num_experts} of the {wanted} experts of {self._prefix} are in lockstep, at the steps "
                    f"{', '.join(map(str, sorted(rounds)))}: they have to go together, from one save point"
                )
            self.round, self._was_asked = min(rounds, default=None), True
        mine = int(self._local().round)
        if self.round is not None and mine != self.round:
            raise ValueError(self._of_another_step(mine, self.round))
        return self.round

    def _of_another_step(self, mine: int, theirs: int) -> str:
        return (
            f"these weights are of step {mine}, and the remote experts of {self._prefix} have taken {theirs}: start "
            "the servers, or load the model, from the same save point"
        )

    def _ask(self, action: str, optimizer: str = "", options: Mapping[str, float] | None = None) -> list[LockstepReply]:
        return self._node.run(self._ask_all(action, optimizer, options or {}))

    async def _ask_all(self, action: str, optimizer: str, options: Mapping[str, float]) -> list[LockstepReply]:
        """The replies of all servers that train experts of the model."""
        servers: dict[object, tuple[str, PeerAddress]] = {}
        for pool in self._pools:
            replicas = await pool.replicas()
            if len(replicas) < pool.num_experts:
                missing = next(number for number in range(pool.num_experts) if number not in replicas)
                raise ExpertNotFound(f"no live server hosts the expert {pool.uid_prefix}.{missing}")
            for found in replicas.values():
                one = next((replica for replica in found if replica.primary), found[0])
                servers[one.peer.peer_id or one.peer] = one.uid, one.peer

        if action == "step" and servers.keys() != self._told.keys():
            raise ValueError(
                f"other servers train the experts of {self._prefix} than at the backward: forget the gradients "
                "(zero_grad), and run the backward again"
            )

        async def ask(uid: str, peer: PeerAddress, told: LockstepReply | None) -> LockstepReply:
            request = LockstepRequest(uid, action, self.round or 0, optimizer, dict(options))
            if action == "step" and told is not None:
                request = request._replace(num_experts=told.num_experts, squared_norm=told.squared_norm)
            try:
                body = messages.encode(request)
                reply = await self._node.node.call_expert(peer, LOCKSTEP, body, timeout=self._timeout)
            except UnknownMethod:  # it knows of no lockstep at all
                return LockstepReply(0, 0, 0.0)
            return messages.decode(LockstepReply, reply.body)

        replies = await asyncio.gather(*(ask(*one, self._told.get(key)) for key, one in servers.items()))
        if action == "status":
            self._told = dict(zip(servers, replies, strict=True))
        return replies

    def _local(self) -> StandIn:
        found = None if self._stand_in is None else self._stand_in()
        if found is None:
            raise RuntimeError("the model of these remote experts is gone")
        return found


def _rule(optimizer: Optimizer, group: Mapping[str, Any]) -> tuple[str, dict[str, float]]:
    """The name of an optimizer, and the settings of a step. Raises: ValueError for what the servers do not have."""
    unknown = [name for name in _UNKNOWN_SETTINGS if group.get(name)]
    if type(optimizer) not in _OPTIMIZERS or unknown:
        what = f"{type(optimizer).__name__} {' '.join(unknown)}".strip()
        raise ValueError(f"remote experts in lockstep take steps of AdamW, Adam or SGD of torch.optim, not of {what}")
    found = {name: float(group[name]) for name in ("lr", "weight_decay", "eps", "momentum") if name in group}
    if "betas" in group:
        found["beta1"], found["beta2"] = map(float, group["betas"])
    return "adamw" if group.get("decoupled_weight_decay") else _OPTIMIZERS[type(optimizer)], found


def _before_step(optimizer: Optimizer, _args: object, _kwargs: object) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            lockstep: LockstepTrainer | None = getattr(parameter, "tesseract_lockstep", None)
            if lockstep is not None:
                lockstep.step(parameter, optimizer, group)


_before_step._is_trainers = True  # type: ignore[attr-defined]
# of all optimizers in this process: which one a model will be given to, nothing says beforehand
register_optimizer_step_pre_hook(_before_step)
