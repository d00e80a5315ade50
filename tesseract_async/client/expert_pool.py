"""`ExpertPool`: many experts as one layer, where a router of your own says which of them each row goes to."""

import asyncio
import dataclasses
import functools
import math
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from operator import index as as_index
from typing import Final

import numpy as np
import torch
from torch import nn

from tesseract_async.client import straight
from tesseract_async.client.arguments import Arguments, present
from tesseract_async.client.audits import Audits
from tesseract_async.client.dispatch import StrictForward
from tesseract_async.client.experience import experience_of
from tesseract_async.client.isolated import NO_GRAD, isolated
from tesseract_async.client.mixture import MixtureCall
from tesseract_async.client.ports import Node, PlainCalls, deliver
from tesseract_async.client.remote_call import refuse_wrappers, remote_call, uncompiled
from tesseract_async.client.routing import Candidates, Indices, LiveGrid, cut
from tesseract_async.client.schema_vote import SchemaVote
from tesseract_async.client.settings import DEFAULT_OPTIONS, CallOptions, MixtureSettings
from tesseract_async.errors import ExpertNotFound, NotEnoughExperts, ProtocolError, SchemaMismatch
from tesseract_async.experts.grid import ExpertReplica, GridView
from tesseract_async.experts.manifest import split_uid
from tesseract_async.tasks import in_time
from tesseract_async.wire.tensors import Structure, describe_schema, unflatten

_NUM_LAYERS: Final = 1 << 16


@dataclasses.dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class PoolAnswer:
    """The answers of a pool's experts, and the way back through their call."""

    answer: torch.Tensor
    _call: MixtureCall
    _inputs: Sequence[torch.Tensor]
    _index: torch.Tensor
    _dtype: torch.dtype

    async def backward(self, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the gradients of `x` and `weights`, given the answer's `gradient`; trains the experts. Each call is
        another step. Raises: NotEnoughExperts.
        """
        x = self._inputs[0]
        of_x, of_values = await isolated(self._call.backward(self._inputs, [gradient, None]), modes=NO_GRAD)
        if of_x is None or of_values is None:  # no row, or no expert with anything to differentiate
            of_x, of_values = torch.zeros_like(x), torch.zeros_like(self._inputs[-1])
        of_weights = of_values.to(self._index.device).gather(1, self._index.to(torch.int64))
        return of_x.to(gradient.device, gradient.dtype), of_weights.to(self._dtype)


class ExpertPool(nn.Module):
    """The experts ``uid_prefix.0``, ``uid_prefix.1`` and so on as one layer without local parameters. The prefix may
    end in numbers, such as a layer's.

    ::

        pool = ta.ExpertPool(node, "qwen3.7", num_experts=128)
        y = await pool(x, index, weights)    # x: [rows, width]; index, weights: [rows, k]

    A row's result is the weighted sum of the answers of the experts that `index` names: of all of them, or the call
    raises. So does backward, which trains the experts and gives the gradients of `x` and of `weights`. (A
    `GatingFunction` goes on without experts that fail or are slow.) What fails at one replica is tried at the others;
    an expert that several servers host is lost only with all of them.

    Each server gets one message with each row once, however many of its experts see it. Copies made with
    ``copy.deepcopy`` share the node. Use on the node's loop only; with a `BackgroundNode` calls are plain, from any
    thread, several at once.
    """

    def __init__(
        self,
        node: Node | PlainCalls,
        uid_prefix: str,
        *,
        num_experts: int,
        options: CallOptions = DEFAULT_OPTIONS,
        timeout: float = 30.0,
        backward_timeout: float | None = None,
    ) -> None:
        """Does no I/O. All experts take one tensor and have one schema.

        `timeout`: seconds for one call, all attempts together; `backward_timeout`: for a backward, where that differs.
        Raises: ValueError.
        """
        super().__init__()
        if (num_experts := as_index(num_experts)) < 1:
            raise ValueError(f"num_experts is a positive number, not {num_experts}")
        self.uid_prefix, self.num_experts = uid_prefix, num_experts
        self._prefix, (*layer, _) = split_uid(f"{uid_prefix}.{num_experts - 1}")
        # one size for all layers of a model, which the directory then reads once
        self._layer, self._size = tuple(layer), (*(max(_NUM_LAYERS, at + 1) for at in layer), num_experts)
        backward_timeout = timeout if backward_timeout is None else backward_timeout
        self._settings = MixtureSettings(forward_timeout=timeout, backward_timeout=backward_timeout, calls=options)
        self._node = node
        self._experience = experience_of(node)
        self._grid = LiveGrid(np.arange(num_experts, dtype=np.int64)[:, None], (num_experts,))
        self._schemas = SchemaVote(self._experience, timeout=timeout)
        self._borrowed: SchemaVote | None = None
        """The schema of another pool, whose experts are assumed to be like these."""
        self._view: tuple[GridView, dict[tuple[int, ...], Sequence[ExpertReplica]]] | None = None
        """The directory's latest view, and the replicas of these experts in it."""
        self._servers: straight.Servers | None = None
        """The servers that small passes ask without a `mixture`, if they do."""
        self._rests_until = -math.inf

    @property
    def node(self) -> Node | PlainCalls:
        return self._node

    def extra_repr(self) -> str:
        return f"{self.uid_prefix}, num_experts={self.num_experts}"

    @property
    def audits(self) -> Audits:
        """The audits of this node's calls and their findings."""
        return self._experience.audits

    def take_for_like(self, other: "ExpertPool") -> None:
        """Assume that these experts have the schema of those of `other`, such as another layer of the same model. If a
        call fails because of that, these experts are asked for theirs, and the call is made again."""
        self._schemas = self._borrowed = other._schemas

    async def watch(self) -> None:
        """Begin to look up who hosts these experts, which the first call would do otherwise. On the node's loop."""
        self._experience.node.directory.watch(self._prefix, self._size)

    @uncompiled
    def forward(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> Structure:
        """Return, for each row, the sum of ``weights[row, j]`` times the answer of the expert ``index[row, j]``; await
        it.

        `index` holds whole numbers below `num_experts`; weights are finite numbers of any sign, and travel in float32.
        The result has the experts' dtypes. Reads grad mode, autocast and `training` now, not when awaited; under
        autocast `x` is cast to the experts' dtype. `x` must not be changed in place before the result is there.
        Cancelling cancels the work at the servers.

        Raises at once: ValueError or TypeError for an index or weights that make no sense; RuntimeError inside
        ``torch.utils.checkpoint`` and torch.func, and if the node is not running. The awaitable raises: SchemaMismatch
        before anything is sent, if `x` does not fit; NotEnoughExperts, which names the experts that did not answer, and
        why.
        """
        refuse_wrappers()
        arguments, values, pairs = self._routed(x, index, weights)
        through = functools.partial(
            remote_call, versions=arguments.versions, differentiable=arguments.mode.differentiable
        )
        return deliver(self._node, isolated(self._call(arguments, values, pairs, through), modes=NO_GRAD))

    def ask(
        self,
        x: torch.Tensor,
        index: torch.Tensor,
        weights: torch.Tensor,
        *,
        differentiable: bool,
        timeout: float | None = None,
    ) -> Coroutine[object, object, PoolAnswer]:
        """As `forward`, outside of torch's graph, for code that has a graph of its own: see `PoolAnswer`.

        `differentiable`: a backward may follow. `x` is cast to the experts' dtype, and the answer to that of `x`.
        `timeout`: in place of the pool's, for this forward.
        """
        arguments, values, pairs = self._routed(x, index, weights)
        mode = arguments.mode._replace(differentiable=differentiable)
        arguments = dataclasses.replace(arguments, mode=mode, casts=True)
        return isolated(self._ask(arguments, values, pairs, index, weights.dtype, timeout), modes=NO_GRAD)

    def answer(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """As `ask`, of a `BackgroundNode` and where no backward may follow: blocks until the answer is there."""
        assert isinstance(self._node, PlainCalls)
        passing, timeout = self._straight(x, index, weights), self._settings.forward_timeout
        if passing is not None:
            self._node.wait(passing.begin, passing.end)
            if passing.answer is not None:
                return passing.answer.to(x.device, x.dtype)
            if passing.is_sent:
                if not passing.is_late:
                    self._rests_until = time.monotonic() + straight.REST_SECONDS
                timeout = max(timeout - passing.seconds, straight.seconds_for_another(timeout))
        return self._node.run(self.ask(x, index, weights, differentiable=False, timeout=timeout)).answer

    def _straight(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> straight.Straight | None:
        """Return the straight way (`client.straight`) for such a call, if it may take that."""
        servers, settings = self._servers, self._settings
        if servers is None or servers.schema is not self._schemas.known or self.training:
            return None
        if not 0 < index.numel() <= straight.MAX_PAIRS or not servers.take(x, index, weights):
            return None
        if time.monotonic() < self._rests_until:
            return None
        asked = straight.questions(servers, x.detach().cpu(), index, weights)
        if asked is None:
            return None
        return straight.Straight(
            self._experience,
            servers,
            asked,
            num_rows=x.shape[0],
            options=settings.calls,
            timeout=settings.forward_timeout - straight.seconds_for_another(settings.forward_timeout),
            holds=functools.partial(self._holds, servers),
        )

    def _holds(self, servers: straight.Servers) -> bool:
        """Return whether these experts' servers are what they were. On the loop."""
        view = self._view
        if view is None or servers.replicas is not view[1]:
            return False
        if asyncio.get_running_loop().time() >= servers.renew_at and servers is self._servers:  # for the next pass
            self._servers = straight.Servers(self._experience, servers.prefix, servers.replicas, servers.schema)
        return self._experience.node.directory.live(self._prefix, self._size) is view[0]

    async def _ask(
        self,
        arguments: Arguments,
        values: torch.Tensor,
        pairs: list[tuple[int, Indices]],
        index: torch.Tensor,
        dtype: torch.dtype,
        timeout: float | None,
    ) -> PoolAnswer:
        made: list[tuple[MixtureCall, Sequence[torch.Tensor]]] = []  # the last one holds

        async def through(call: MixtureCall, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
            made.append((call, inputs))
            return await call.forward(inputs)

        answer = await self._call(arguments, values, pairs, through, timeout)
        arguments.versions.check()
        (x,) = arguments.args
        assert isinstance(answer, torch.Tensor) and isinstance(x, torch.Tensor)
        return PoolAnswer(answer.to(x.dtype), *made[-1], index, dtype)

    async def replicas(self) -> Mapping[int, Sequence[ExpertReplica]]:
        """Return the known replicas of each expert; await it on the node's loop."""
        candidates = await self._candidates()
        found = ((number, candidates.replicas_of(number)) for number in range(self.num_experts))
        return {number: replicas for number, replicas in found if replicas}

    def _routed(
        self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> tuple[Arguments, torch.Tensor, list[tuple[int, Indices]]]:
        """The arguments of a call made now, the weight of every expert for every row, and the experts' rows."""
        self._node.check_running()
        self._check(x, index, weights)
        arguments = Arguments.now((x,), {}, training=self.training)
        pairs = self._pairs(index.cpu().numpy())
        index = index.to(weights.device, torch.int64)
        values = weights.new_zeros(len(index), self.num_experts, dtype=torch.float32)
        values = values.scatter_add(1, index, weights.float())  # an expert that a row names twice is asked once
        return arguments, values, pairs

    def _check(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> None:
        for name, given in (("x", x), ("index", index), ("weights", weights)):
            if not isinstance(given, torch.Tensor):
                raise TypeError(f"{name} is a tensor, not a {type(given).__name__}")
        if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
            raise TypeError(f"an index of experts holds whole numbers, not {index.dtype}")
        if not weights.is_floating_point():
            raise TypeError(f"weights are floating-point numbers, not {weights.dtype}")
        if not len(x.shape) or index.dim() != 2 or index.shape != weights.shape or len(index) != len(x):
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (x, index, weights))
            raise ValueError(f"x, index and weights are [rows, ...], [rows, k] and [rows, k]; got {shapes}")
        if index.numel() and not (int(index.min()) >= 0 and int(index.max()) < self.num_experts):
            raise ValueError(f"the experts of {self.uid_prefix} have the numbers 0 to {self.num_experts - 1}")
        if not bool(torch.isfinite(weights.detach().float().abs().sum(1)).all()):
            raise ValueError("weights are finite numbers, and so is their sum in float32")

    @staticmethod
    def _pairs(index_RK: Indices) -> list[tuple[int, Indices]]:
        """The experts that are named, ascending, each with its rows, ascending."""
        num_rows, k = index_RK.shape
        cells = np.unique(index_RK.astype(np.int64) * num_rows + np.arange(num_rows)[:, None])
        if not len(cells):
            return []
        return cut(*np.unique(cells // num_rows, return_index=True), cells % num_rows)

    async def _call(
        self,
        arguments: Arguments,
        values: torch.Tensor,
        pairs: list[tuple[int, Indices]],
        through: Callable[[MixtureCall, Sequence[torch.Tensor]], Awaitable[list[torch.Tensor]]],
        timeout: float | None = None,
        candidates: Candidates | None = None,
    ) -> Structure:
        mode, settings = arguments.mode, self._settings
        if timeout is not None and timeout != settings.forward_timeout:
            settings = dataclasses.replace(settings, forward_timeout=timeout)
        candidates = candidates or await self._candidates()
        if pairs and not any(candidates.replicas_of(expert) for expert, _ in pairs):
            uids = [candidates.uid(expert) for expert, _ in pairs]
            errors = {uid: ExpertNotFound(f"no live server hosts the expert {uid}") for uid in uids}
            raise NotEnoughExperts(None, len(values), errors)
        schemas = self._schemas
        schema = schemas.known
        if schema is None:
            is_hosted = torch.zeros(1, self.num_experts, device="cpu")
            is_hosted[0, [expert for expert, _ in pairs if candidates.replicas_of(expert)]] = 1.0
            schema = await schemas.schema(candidates, is_hosted, arguments)
        if not all(spec.dtype.is_floating_point or spec.dtype.is_complex for spec in schema.output_specs):
            raise SchemaMismatch(
                f"the experts of {self.uid_prefix} answer {describe_schema(schema.outputs)}: whole numbers can't be "
                "weighted"
            )
        inputs = arguments.fit(schema, f"the pool {self.uid_prefix}")
        schema, (tensors, absent) = schema.sized(inputs), present(inputs)
        dispatch = StrictForward(candidates, pairs, len(values), timeout=settings.forward_timeout)
        call = MixtureCall(
            dispatch, self._experience, schema=schema, mode=mode, settings=settings, is_normalized=False, absent=absent
        )
        try:
            *sums, _ = await through(call, [*tensors, values])
        except NotEnoughExperts as error:
            if not any(isinstance(one, SchemaMismatch | ProtocolError) for one in error.errors.values()):
                raise
            if self._schemas is schemas:
                # they may be other experts now; what those of another pool say is theirs
                self._schemas = SchemaVote(self._experience, timeout=self._settings.forward_timeout)
            if schemas is not self._borrowed:
                raise
            # of the servers found before: some may be hidden now, for an answer that was measured by another's word
            return await self._call(arguments, values, pairs, through, timeout, candidates)
        replicas, servers = candidates.replicas, self._servers
        holds = servers is not None and servers.replicas is replicas and servers.schema is schema
        may_go = schema is schemas.known and straight.may_go(schema, settings.calls)
        if may_go and not (holds or mode.differentiable):
            # from now on, passes that are small may go there without looking
            self._servers = straight.Servers(self._experience, self.uid_prefix, replicas, schema)
        with torch.set_grad_enabled(mode.differentiable):
            specs = zip(sums, schema.output_specs, strict=True)
            return unflatten(schema.outputs, [total.to(spec.dtype) for total, spec in specs])

    async def _candidates(self) -> Candidates:
        """All experts; those that nobody is known to host have no replicas, and are looked up when they are asked."""
        directory = self._experience.node.directory
        view = directory.live(self._prefix, self._size)
        if self._view is None or view is not self._view[0]:
            found = {} if view is None else view.replicas_under(self._layer)
            if view is None or (self._view is None and not found):
                await self.watch()
                # what was read while the model was loaded lacks experts that have come since
                read = directory.wait_warm(self._prefix) if view is None else directory.wait_read(self._prefix)
                await in_time(read, self._settings.forward_timeout)
                view = directory.live(self._prefix, self._size)
                found = {} if view is None else view.replicas_under(self._layer)
            if view is not None:
                self._view = view, {(expert,): replicas for expert, replicas in found.items()}
        return Candidates(self.uid_prefix, self._grid, {} if self._view is None else self._view[1])
