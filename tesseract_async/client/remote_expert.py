"""`RemoteExpert`: a module that lives on somebody else's computer."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from tesseract_async.client.arguments import Versions, arguments_now
from tesseract_async.client.autograd import refuse_wrappers, remote_call, uncompiled
from tesseract_async.client.expert_calls import (
    Answer,
    CallOptions,
    ExpertSchema,
    Forward,
    call_backward,
    call_forward,
    fetch_schema,
)
from tesseract_async.client.isolated import NO_GRAD, isolated
from tesseract_async.client.replicas import Attempt, Shared, ask_best, ask_primary
from tesseract_async.errors import ConnectionLost, ExpertNotFound, PeerUnreachable
from tesseract_async.wire.names import new_name
from tesseract_async.wire.tensors import flatten, flatten_like, sequence_like, unflatten

T = TypeVar("T")

DEFAULT_OPTIONS = CallOptions()


@dataclasses.dataclass(slots=True, eq=False)
class _Known:
    """What an expert and its twins with other options have learnt about it."""

    schema: ExpertSchema | None


class RemoteExpert(nn.Module):
    """The expert `uid` as a torch module without parameters of its own: call it, and await the result.

    ::

        y = await expert(x)                  # x: [rows, ...]; differentiable
        await tesseract_async.backward(y.sum())   # also trains the expert

    Arguments and results are nested as in the expert's schema. Each call finds the expert anew (from the directory's
    memory, mostly), so that a server that moved is found again. Results arrive on the first input's device.

    Copies made with ``copy.deepcopy`` share the node. Use on the node's loop only.
    """

    def __init__(
        self,
        node: Any,
        uid: str,
        replicas: Sequence[Any] = (),
        *,
        schema: ExpertSchema | None = None,
        options: CallOptions = DEFAULT_OPTIONS,
    ) -> None:
        """Does no I/O: the schema is fetched with the first call. `replicas`: who hosted it when it was found."""
        super().__init__()
        self.uid = uid
        self.options = options
        self.replicas = tuple(replicas)
        self._shared = Shared(node)
        self._known = _Known(schema)

    def extra_repr(self) -> str:
        """The uid, for ``repr``."""
        return self.uid

    def with_options(
        self, *, timeout: float | None = None, priority: int | None = None, codec: str | Mapping[str, str] | None = None
    ) -> RemoteExpert:
        """The same expert with other options, such as ``await expert.with_options(timeout=2.0)(x)``.

        `timeout`: seconds for one call, forward or backward. `priority`: -1, 0 or 1; higher goes first at the server.
        `codec`: how floating-point tensors travel, such as ``"bf16"`` or ``{"outputs": "uint8_blockwise"}`` (see
        `CallOptions`). Raises: ValueError.
        """
        given = {"timeout": timeout, "priority": priority, "codec": codec}
        options = dataclasses.replace(self.options, **{k: v for k, v in given.items() if v is not None})  # type: ignore[arg-type]
        twin = RemoteExpert(self._shared.node, self.uid, self.replicas, options=options)
        twin._shared, twin._known = self._shared, self._known
        twin.train(self.training)
        return twin

    @uncompiled
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Applies the expert; await the result. Reads grad mode, autocast and `training` now, not when awaited.

        Under autocast, floating-point inputs are cast to the schema's dtypes. Arguments must not be changed in place
        before the result is there. Cancelling the awaiting task cancels the work at the server.

        The awaitable raises: SchemaMismatch or TypeError before anything is sent, if the arguments do not fit the
        schema; ExpertNotFound; TimeoutError; ExpertFailed, Overloaded and other RemoteErrors; ConnectionLost and
        PeerUnreachable; ProtocolError if the peer answers nonsense; RuntimeError if an argument was changed in place
        meanwhile. Raises at once: RuntimeError inside
        ``torch.utils.checkpoint`` and the transforms of torch.func, and if the node is not running.
        """
        refuse_wrappers()
        self._shared.check()
        differentiable = torch.is_grad_enabled()
        (args, kwargs), versions = arguments_now((args, kwargs))
        casts = under_autocast((args, kwargs))
        seed = draw_seed() if self.training else 0
        call = self._call(args, kwargs, versions, differentiable, casts, self.training, seed)
        return self._shared.deliver(isolated(call, modes=NO_GRAD))

    def info(self) -> Any:
        """What the expert takes and gives (`ExpertSchema`), asked of its server once; await it. Raises: as a call."""
        self._shared.check()
        return self._shared.deliver(self._info())

    async def _info(self) -> ExpertSchema:
        if self._known.schema is None:
            self._known.schema = await self._fetch_schema()
        return self._known.schema

    async def _call(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        versions: Versions,
        differentiable: bool,
        casts: bool,
        training: bool,
        seed: int,
    ) -> Any:
        schema = self._known.schema or await self._info()
        if casts:
            with torch.set_grad_enabled(differentiable):
                args, kwargs = cast_to(schema.args, args), cast_to(schema.kwargs, kwargs)
        inputs = flatten_like(schema.inputs, (args, kwargs), what=f"expert {self.uid}")
        call = _ExpertCall(self, Forward(self.uid, schema, training, seed, self.options, differentiable))
        outputs = await remote_call(call, inputs, versions=versions, differentiable=differentiable)
        return unflatten(schema.outputs, outputs)

    async def _fetch_schema(self) -> ExpertSchema:
        async def attempt(peer: Any, timeout: float) -> ExpertSchema:
            return await fetch_schema(self._shared.node, self.uid, peer, timeout=timeout)

        return await self.ask(attempt, timeout=self.options.timeout, observed=False)

    async def ask(self, attempt: Attempt[T], *, timeout: float, observed: bool = True, num_bytes: float = 0) -> T:
        """`ask_best` of the replicas known; if none of them lives any more, of those that are found then.

        A server that came back at another address is known by its old one until a call there has failed.
        """
        deadline = asyncio.get_running_loop().time() + timeout
        replicas = await self.find()
        try:
            return await ask_best(
                self._shared, replicas, attempt, timeout=timeout, observed=observed, num_bytes=num_bytes
            )
        except (PeerUnreachable, ConnectionLost, ExpertNotFound):
            left = deadline - asyncio.get_running_loop().time()
            found = await self._shared.node.directory.find(self.uid)  # without those that just failed
            if left <= 0 or not found:
                raise
            return await ask_best(self._shared, found, attempt, timeout=left, observed=observed, num_bytes=num_bytes)

    async def find(self, *, even_failed: bool = True) -> Sequence[Any]:
        """The live replicas, the primary first; unless told otherwise those that failed lately if there are no others,
        for a server that stood still for a moment is there again long before it says so in the network.

        Raises: ExpertNotFound if there is none; TimeoutError.
        """
        directory = self._shared.node.directory
        if known := directory.known(self.uid):
            return known
        async with asyncio.timeout(self.options.timeout):
            found = await directory.find(self.uid, even_failed=even_failed)
        if not found:
            raise ExpertNotFound(f"no live server hosts the expert {self.uid}")
        return found


def under_autocast(structure: Any) -> bool:
    """Whether autocast is on where the structure's tensors are."""
    if not (torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")):
        return False
    devices = {leaf.device.type for leaf in flatten(structure) if isinstance(leaf, torch.Tensor)}
    return any(torch.is_autocast_enabled(device) for device in devices)


def cast_to(schema: Any, value: Any) -> Any:
    """`value` with its floating-point tensors in the schema's dtypes; what does not fit is left for the check."""
    if isinstance(schema, dict) and isinstance(value, dict):
        return {key: cast_to(schema[key], item) if key in schema else item for key, item in value.items()}
    if isinstance(schema, tuple | list) and isinstance(value, tuple | list) and len(schema) == len(value):
        return sequence_like(value, [cast_to(part, item) for part, item in zip(schema, value, strict=True)])
    both = isinstance(value, torch.Tensor) and not isinstance(schema, tuple | list | dict)
    if both and value.is_floating_point() and schema.dtype.is_floating_point:
        return value.to(schema.dtype)
    return value


def draw_seed() -> int:
    """A seed for one call's random numbers, drawn from torch's generator of the CPU: `torch.manual_seed`,
    `torch.set_rng_state` and `torch.random.fork_rng` do to remote dropout what they do to local one."""
    return int(torch.empty((), dtype=torch.int64, device="cpu").random_(2**62))


class _ExpertCall:
    """One call of one expert: where its forward was answered, and how its backward goes (see `autograd.Remote`)."""

    def __init__(self, expert: RemoteExpert, forward: Forward) -> None:
        self.timeout = forward.options.timeout
        self._expert = expert
        self._shared = expert._shared
        self._forward = forward
        self._answer: Answer | None = None

    async def forward(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        async def attempt(peer: Any, timeout: float) -> tuple[list[torch.Tensor], Answer]:
            return await call_forward(self._shared.node, self._forward, peer, inputs, timeout=timeout)

        num_bytes = len(inputs[0]) * self._forward.schema.row_bytes
        outputs, self._answer = await self._expert.ask(attempt, timeout=self.timeout, num_bytes=num_bytes)
        device = inputs[0].device
        return outputs if device.type == "cpu" else [output.to(device) for output in outputs]

    async def backward(
        self, inputs: Sequence[torch.Tensor], output_grads: Sequence[torch.Tensor | None]
    ) -> list[torch.Tensor | None]:
        if all(grad is None for grad in output_grads):
            return [None] * len(inputs)

        self._shared.node.check_running()
        call_id = new_name()
        assert self._answer is not None
        answer = self._answer

        async def attempt(peer: Any, timeout: float) -> list[torch.Tensor | None]:
            return await call_backward(
                self._shared.node,
                self._forward,
                peer,
                inputs,
                output_grads,
                answer=answer,
                call_id=call_id,
                timeout=timeout,
            )

        replicas = await self._expert.find()
        find_others = partial(self._expert.find, even_failed=False)
        return await ask_primary(self._shared, replicas, find_others, attempt, timeout=self.timeout)
