"""`RemoteExpert`: a module that lives on somebody else's computer."""

import asyncio
import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Self, TypeVar

import torch
from torch import nn

from tesseract_async.client.arguments import Arguments, present, with_absent
from tesseract_async.client.audits import Audits
from tesseract_async.client.exchanges import BackwardExchange, Exchange, ForwardExchange, SchemaExchange
from tesseract_async.client.experience import experience_of
from tesseract_async.client.expert_rpc import ExpertSchema, Forward, Receipt
from tesseract_async.client.failover import ask_best, ask_primary
from tesseract_async.client.isolated import NO_GRAD, isolated
from tesseract_async.client.ports import Node, PlainCalls, deliver
from tesseract_async.client.remote_call import refuse_wrappers, remote_call, uncompiled
from tesseract_async.client.settings import DEFAULT_OPTIONS, CallOptions, check_max_staleness, check_timeout
from tesseract_async.errors import ConnectionLost, ExpertNotFound, PeerUnreachable, SchemaMismatch, TesseractError
from tesseract_async.experts.grid import ExpertReplica
from tesseract_async.tasks import end
from tesseract_async.wire.tensors import Structure, unflatten

T = TypeVar("T")

LOOK_AGAIN_SECONDS = 1.0
"""Seconds between looks for other servers while only some that failed lately are asked."""


@dataclasses.dataclass(slots=True, eq=False)
class _Known:
    """The state that an expert shares with its twins with other options."""

    schema: ExpertSchema | None


class RemoteExpert(nn.Module):
    """The expert `uid` as a torch module without local parameters: call it, and await the result.

    ::

        y = await expert(x)                  # x: [rows, ...]; differentiable
        await tesseract_async.backward(y.sum())   # also trains the expert

    Arguments and results are nested as in the expert's schema. Each call finds the expert anew (from the directory's
    memory, mostly), so that a server that moved is found again. Results arrive on the first input's device.

    Copies made with ``copy.deepcopy`` share the node. Use on the node's loop only.
    """

    def __init__(
        self,
        node: Node | PlainCalls,
        uid: str,
        replicas: Sequence[ExpertReplica] = (),
        *,
        schema: ExpertSchema | None = None,
        options: CallOptions = DEFAULT_OPTIONS,
        timeout: float = 30.0,
        backward_timeout: float | None = None,
    ) -> None:
        """Does no I/O: the schema is fetched with the first call. `replicas`: those that hosted it when it was found.
        `timeout`: seconds for one call, all attempts together; `backward_timeout`: for a backward, where that differs.

        Raises: ValueError.
        """
        super().__init__()
        check_timeout("timeout", timeout)
        self.uid = uid
        self.options = options
        self.timeout = timeout
        self.backward_timeout = timeout if backward_timeout is None else backward_timeout
        check_timeout("backward_timeout", self.backward_timeout)
        self.replicas = tuple(replicas)
        self.version: int | None = None
        """Optimizer steps that the expert had taken when it computed the latest answer here; None before."""
        self._node = node
        self._experience = experience_of(node)
        self._eval_staleness: int | None = None
        self._known = _Known(schema)

    @property
    def node(self) -> Node | PlainCalls:
        return self._node

    def extra_repr(self) -> str:
        return self.uid

    def with_options(
        self,
        *,
        timeout: float | None = None,
        priority: int | None = None,
        codec: str | Mapping[str, str] | None = None,
        max_staleness: int | None = None,
        audit_share: float | None = None,
    ) -> "RemoteExpert":
        """Return the same expert with other options, such as ``await expert.with_options(timeout=2.0)(x)``.

        `timeout`: seconds for one call, forward or backward. `priority`: -1, 0 or 1; higher goes first at the server.
        `codec`: how floating-point tensors travel, such as ``"bf16"`` or ``{"outputs": "uint8_blockwise"}`` (see
        `CallOptions`). `max_staleness`: steps of the primary that a forward's answer may lack, where followers answer,
        too; 0: the primary answers. `audit_share`: share of forwards that another replica answers, too (see `audits`).
        Raises: ValueError.
        """
        given = {"priority": priority, "codec": codec, "max_staleness": max_staleness, "audit_share": audit_share}
        changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        twin = RemoteExpert(
            self._node,
            self.uid,
            self.replicas,
            options=dataclasses.replace(self.options, **changes),
            timeout=self.timeout if timeout is None else timeout,
            backward_timeout=self.backward_timeout if timeout is None else None,
        )
        twin._known = self._known
        twin.train(self.training)
        twin._eval_staleness = self._eval_staleness
        return twin

    def eval(self, *, max_staleness: int | None = None) -> Self:
        """Evaluation mode, as of any module. `max_staleness`: that of this mode, until `eval` or `with_options` sets
        another; None: the one from before. Raises: ValueError."""
        check_max_staleness(max_staleness)
        self._eval_staleness = max_staleness
        return super().eval()

    @uncompiled
    def forward(self, *args: Structure, **kwargs: Structure) -> Structure:
        """Apply the expert; await the result. Reads grad mode, autocast and `training` now, not when awaited.

        Under autocast, floating-point inputs are cast to the schema's dtypes. Arguments must not be changed in place
        before the result is there. Cancelling the awaiting task cancels the work at the server.

        The awaitable raises: SchemaMismatch or TypeError before anything is sent, if the arguments do not fit the
        schema; ExpertNotFound; TimeoutError; ExpertFailed, Overloaded and other RemoteErrors; ConnectionLost and
        PeerUnreachable; ProtocolError if the peer answers nonsense; RuntimeError if an argument was changed in place.
        Raises at once: RuntimeError inside ``torch.utils.checkpoint`` and torch.func, and if the node is not running.
        """
        refuse_wrappers()
        self._node.check_running()
        options = self.options
        if not self.training and self._eval_staleness is not None:
            options = dataclasses.replace(options, max_staleness=self._eval_staleness)
        call = self._call(Arguments.now(args, kwargs, training=self.training), options)
        return deliver(self._node, isolated(call, modes=NO_GRAD))

    @property
    def audits(self) -> Audits:
        """The audits of this node's calls and their findings."""
        return self._experience.audits

    def info(self) -> Any:
        """The expert's inputs and outputs (`ExpertSchema`), asked of its server once; await it. Raises: as a call."""
        self._node.check_running()
        return deliver(self._node, self._info())

    async def _info(self) -> ExpertSchema:
        """Return the primary's answer; that of the others if no primary answers in half the time."""
        if self._known.schema is not None:
            return self._known.schema
        exchange = SchemaExchange(self._experience, self.uid)
        live = self._experience.node.directory.known(self.uid) or await self._live()
        primaries = [replica for replica in live if replica.primary]
        if primaries:
            with contextlib.suppress(TesseractError, TimeoutError):
                self._known.schema = await ask_best(self._experience, primaries, exchange, timeout=self.timeout / 2)
                return self._known.schema
        self._known.schema = await self.ask(exchange)
        return self._known.schema

    async def _call(self, arguments: Arguments, options: CallOptions) -> Structure:
        schema = self._known.schema or await self._info()
        try:
            inputs = arguments.fit(schema, f"expert {self.uid}")
        except SchemaMismatch:
            other = await self._other_schema(schema, arguments)
            if other is None:
                raise
            schema, inputs = other, arguments.fit(other, f"expert {self.uid}")
        schema.settle(options.codecs)  # raises before anybody is asked
        mode = arguments.mode
        forward = Forward(self.uid, schema.sized(inputs), mode, options)
        try:
            if mode.differentiable:
                tensors, absent = present(inputs)
                outputs = await remote_call(_ExpertCall(self, forward, absent), tensors, versions=arguments.versions)
            else:
                outputs = await _ExpertCall(self, forward).forward(inputs)
                arguments.versions.check()
        except SchemaMismatch:
            if self._known.schema is schema:
                self._known.schema = None  # its servers refuse what the schema says: it is another expert now
            raise
        return unflatten(schema.outputs, outputs)

    async def _other_schema(self, schema: ExpertSchema, arguments: Arguments) -> ExpertSchema | None:
        """Another schema that the arguments fit, of a server that says that it is the primary, too, or of the expert as
        it is now: two servers host different experts under this uid, or it changed."""
        exchange, timeout = SchemaExchange(self._experience, self.uid), self.timeout / 2
        told = await asyncio.gather(
            *(exchange.send(replica, timeout) for replica in await self.find() if replica.primary),
            return_exceptions=True,
        )
        for other in told:
            if isinstance(other, ExpertSchema) and other.inputs != schema.inputs and arguments.fits(other):
                self._known.schema = other
                return other
        return None

    async def ask(self, exchange: Exchange[T]) -> T:
        """Ask the best of the known replicas (`ask_best`); if none of them lives any more, look for others.

        A server that came back at another address is known by its old one until a call there has failed. Where all
        failed lately, others are looked for again while these do not answer.
        """
        loop, directory = asyncio.get_running_loop(), self._experience.node.directory
        deadline = loop.time() + self.timeout
        live = directory.known(self.uid) or await self._live()
        replicas = exchange.eligible(live or await self.find())
        asking = ask_best(self._experience, replicas, exchange, timeout=self.timeout)
        try:
            if live:
                return await asking
            found = await self._found_before(first := loop.create_task(asking))
            if not found:
                return await first
        except (PeerUnreachable, ConnectionLost, ExpertNotFound):
            found = await directory.find(self.uid)  # without those that just failed
            if not found:
                raise
        if (time_left := deadline - loop.time()) <= 0:
            raise TimeoutError(f"no replica answered within {self.timeout} s")
        return await ask_best(self._experience, exchange.eligible(found), exchange, timeout=time_left)

    async def _live(self) -> Sequence[ExpertReplica]:
        """Return the replicas that did not fail lately, by what the network says now. Raises: TimeoutError."""
        async with asyncio.timeout(self.timeout):
            return await self._experience.node.directory.find(self.uid)

    async def _found_before(self, asking: asyncio.Task[T]) -> Sequence[ExpertReplica]:
        """Return live replicas once there are any, and end `asking`; return none if `asking` is over before."""
        found: Sequence[ExpertReplica] = ()
        try:
            while not found and not (await asyncio.wait([asking], timeout=LOOK_AGAIN_SECONDS))[0]:
                with contextlib.suppress(TesseractError, TimeoutError):
                    found = await self._experience.node.directory.find(self.uid)
            return () if asking.done() else found  # it may have been answered while others were looked for
        finally:
            if not asking.done():
                await end(asking)

    async def find(self) -> Sequence[ExpertReplica]:
        """The live replicas, the primary first; if there are none, those that failed lately: a server that stood still
        for a moment is there again long before it says so in the network.

        Raises: ExpertNotFound if there is none; TimeoutError.
        """
        directory = self._experience.node.directory
        if known := directory.known(self.uid):
            return known
        async with asyncio.timeout(self.timeout):
            found = await directory.find(self.uid, even_failed=True)
        if not found:
            raise ExpertNotFound(f"no live server hosts the expert {self.uid}")
        return found


class _ExpertCall:
    """One call of one expert: where its forward was answered, and how its backward goes (see `autograd.Remote`)."""

    def __init__(self, expert: RemoteExpert, forward: Forward, absent: Sequence[int] = ()) -> None:
        """`absent`: the places of optional inputs that were None, and are left out."""
        self.timeout = expert.backward_timeout
        self._expert = expert
        self._experience = expert._experience
        self._forward, self._absent = forward, absent
        self._receipt: Receipt | None = None

    async def forward(self, inputs: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
        exchange = ForwardExchange(self._experience, self._forward, with_absent(inputs, self._absent))
        outputs, receipt = await self._expert.ask(exchange)
        self._receipt = receipt
        self._expert.__dict__["version"] = receipt.version  # a module looks for parameters in whatever it is assigned
        if (first := inputs[0]) is not None and not first.is_cpu:
            outputs = [output.to(first.device) for output in outputs]
        return outputs

    async def backward(
        self, inputs: Sequence[torch.Tensor], output_gradients: Sequence[torch.Tensor | None]
    ) -> list[torch.Tensor | None]:
        if not present(output_gradients)[0]:
            return [None] * len(inputs)
        self._experience.node.check_running()
        assert self._receipt is not None
        given = with_absent(inputs, self._absent)
        exchange = BackwardExchange(self._experience, self._forward, self._receipt, given, output_gradients)
        expert, experience = self._expert, self._experience
        replicas = experience.node.directory.known(expert.uid) or await expert.find()
        gradients = await ask_primary(self._experience, replicas, exchange, timeout=self.timeout)
        for place in reversed(self._absent):
            del gradients[place]
        return gradients
