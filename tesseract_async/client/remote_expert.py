"""`RemoteExpert`: a module that lives on somebody else's computer."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any, Self, TypeVar

import torch
from torch import nn

from tesseract_async.client.arguments import Versions, arguments_now
from tesseract_async.client.audits import Audits
from tesseract_async.client.autograd import refuse_wrappers, remote_call, uncompiled
from tesseract_async.client.expert_calls import (
    Answer,
    CallOptions,
    ExpertSchema,
    Forward,
    call_backward,
    check_max_staleness,
    fetch_schema,
)
from tesseract_async.client.isolated import NO_GRAD, isolated
from tesseract_async.client.replicas import Attempt, Shared, ask_best, ask_primary
from tesseract_async.client.staleness import Forwarded, fresh_enough
from tesseract_async.errors import (
    ConnectionLost,
    ExpertNotFound,
    PeerUnreachable,
    SchemaMismatch,
    TesseractError,
)
from tesseract_async.wire.codecs import settle
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
        self.version: int | None = None
        """Optimizer steps that the expert had taken when it computed the latest answer here; None before."""
        self._shared = Shared(node)
        self._eval_staleness: int | None = None
        self._known = _Known(schema)

    def extra_repr(self) -> str:
        """The uid, for ``repr``."""
        return self.uid

    def with_options(
        self,
        *,
        timeout: float | None = None,
        priority: int | None = None,
        codec: str | Mapping[str, str] | None = None,
        max_staleness: int | None = None,
        audit_share: float | None = None,
    ) -> RemoteExpert:
        """The same expert with other options, such as ``await expert.with_options(timeout=2.0)(x)``.

        `timeout`: seconds for one call, forward or backward. `priority`: -1, 0 or 1; higher goes first at the server.
        `codec`: how floating-point tensors travel, such as ``"bf16"`` or ``{"outputs": "uint8_blockwise"}`` (see
        `CallOptions`). `max_staleness`: steps of the primary that a forward's answer may lack, where followers answer,
        too; 0: the primary answers. `audit_share`: share of forwards that another replica answers, too (see `audits`).
        Raises: ValueError.
        """
        given = {
            "timeout": timeout,
            "priority": priority,
            "codec": codec,
            "max_staleness": max_staleness,
            "audit_share": audit_share,
        }
        changes: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
        if timeout is not None:
            changes["backward_timeout"] = None
        options = dataclasses.replace(self.options, **changes)
        twin = RemoteExpert(self._shared.node, self.uid, self.replicas, options=options)
        twin._shared, twin._known = self._shared, self._known
        twin.train(self.training)
        twin._eval_staleness = self._eval_staleness
        return twin

    def eval(self, *, max_staleness: int | None = None) -> Self:
        """Evaluation mode, as of any module. `max_staleness`: what holds in it, until `eval` or `with_options` says
        otherwise; None: what held before. Raises: ValueError."""
        check_max_staleness(max_staleness)
        self._eval_staleness = max_staleness
        return super().eval()

    def _options_now(self) -> CallOptions:
        if self.training or self._eval_staleness is None:
            return self.options
        return dataclasses.replace(self.options, max_staleness=self._eval_staleness)

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
        options = self._options_now()
        call = self._call(args, kwargs, versions, differentiable, casts, self.training, seed, options)
        return self._shared.deliver(isolated(call, modes=NO_GRAD))

    @property
    def audits(self) -> Audits:
        """What audits of this node's calls have found."""
        return self._shared.audits

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
        options: CallOptions,
    ) -> Any:
        schema = self._known.schema or await self._info()

        def fitting(schema: ExpertSchema) -> list[torch.Tensor]:
            given = args, kwargs
            if casts:
                with torch.set_grad_enabled(differentiable):
                    given = cast_to(schema.args, args), cast_to(schema.kwargs, kwargs)
            return flatten_like(schema.inputs, given, what=f"expert {self.uid}")

        try:
            inputs = fitting(schema)
        except SchemaMismatch:
            found = await self._other_schema(schema, fitting)
            if found is None:
                raise
            schema, inputs = found
        settle(schema.codecs, options.codecs)  # raises before anybody is asked
        call = _ExpertCall(self, Forward(self.uid, schema, training, seed, options, differentiable))
        try:
            outputs = await remote_call(call, inputs, versions=versions, differentiable=differentiable)
        except SchemaMismatch:
            if self._known.schema is schema:
                self._known.schema = None  # nobody takes what the schema says: it is another expert now
            raise
        return unflatten(schema.outputs, outputs)

    async def _other_schema(
        self, schema: ExpertSchema, fitting: Callable[[ExpertSchema], list[torch.Tensor]]
    ) -> tuple[ExpertSchema, list[torch.Tensor]] | None:
        """Another schema that the inputs fit, of a server that says that it is the primary, too, or of the expert as it
        is now: two servers host different experts under this uid, or it changed."""
        primaries = [replica for replica in await self.find() if replica.primary]
        timeout = self.options.timeout / 2
        told = await asyncio.gather(
            *(fetch_schema(self._shared.node, self.uid, replica.peer, timeout=timeout) for replica in primaries),
            return_exceptions=True,
        )
        for answer in told:
            if isinstance(answer, ExpertSchema) and answer.inputs != schema.inputs:
                with contextlib.suppress(SchemaMismatch):
                    inputs = fitting(answer)
                    self._known.schema = answer
                    return answer, inputs
        return None

    async def _fetch_schema(self) -> ExpertSchema:
        """The primary's word; that of the others if none answers in half the time."""

        async def attempt(peer: Any, timeout: float) -> ExpertSchema:
            return await fetch_schema(self._shared.node, self.uid, peer, timeout=timeout)

        primaries = [replica for replica in await self.find() if replica.primary]
        timeout = self.options.timeout
        if primaries:
            with contextlib.suppress(TesseractError, TimeoutError):
                return await ask_best(self._shared, primaries, attempt, timeout=timeout / 2, observed=False)
        return await self.ask(lambda replicas: (replicas, attempt), timeout=timeout, observed=False)

    async def ask(
        self,
        choose: Callable[[Sequence[Any]], tuple[Sequence[Any], Attempt[T]]],
        *,
        timeout: float,
        observed: bool = True,
        num_bytes: float = 0,
    ) -> T:
        """`ask_best` of the replicas known; if none of them lives any more, of those that are found then. `choose` says
        which of these are asked, and how.

        A server that came back at another address is known by its old one until a call there has failed.
        """
        deadline = asyncio.get_running_loop().time() + timeout
        replicas, attempt = choose(await self.find())
        try:
            return await ask_best(
                self._shared, replicas, attempt, timeout=timeout, observed=observed, num_bytes=num_bytes
            )
        except (PeerUnreachable, ConnectionLost, ExpertNotFound):
            left = deadline - asyncio.get_running_loop().time()
            found = await self._shared.node.directory.find(self.uid)  # without those that just failed
            if left <= 0 or not found:
                raise
            replicas, attempt = choose(found)
            return await ask_best(self._shared, replicas, attempt, timeout=left, observed=observed, num_bytes=num_bytes)

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
        options = forward.options
        self.timeout = options.timeout if options.backward_timeout is None else options.backward_timeout
        self._expert = expert
        self._shared = expert._shared
        self._forward = forward
        self._answer: Answer | None = None

    async def forward(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        def attempt(peer: Any, timeout: float) -> Awaitable[tuple[list[torch.Tensor], Answer]]:
            return self._shared.audits.forward(self._shared.node, self._forward, peer, inputs, timeout=timeout)

        num_bytes = inputs[0].shape[0] * self._forward.schema.row_bytes
        options = self._forward.options

        def choose(replicas: Sequence[Any]) -> tuple[Sequence[Any], Attempt[Forwarded]]:
            return fresh_enough(self._shared, self._forward.uid, replicas, attempt, options.max_staleness)

        outputs, answer = await self._expert.ask(choose, timeout=options.timeout, num_bytes=num_bytes)
        self._answer, self._expert.version = answer, answer.version
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
