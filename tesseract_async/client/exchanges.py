"""The exchanges with an expert's servers that `failover` may try with one replica after another."""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Coroutine, Sequence
from typing import Generic, TypeVar

import torch

from tesseract_async.client.experience import Experience
from tesseract_async.client.expert_rpc import ExpertSchema, Forward, Receipt, call_forward, fetch_info, unpack_fitting
from tesseract_async.endpoint.call_table import Message
from tesseract_async.errors import ExpertNotFound, InputsForgotten, TesseractError, TooStale, describe
from tesseract_async.experts.grid import ExpertReplica
from tesseract_async.runtime.encoding import pack
from tesseract_async.tasks import end
from tesseract_async.transport.base import PeerAddress
from tesseract_async.wire import messages
from tesseract_async.wire.messages import BACKWARD
from tesseract_async.wire.names import new_name
from tesseract_async.wire.tensors import unpack_plain

T = TypeVar("T")

Forwarded = tuple[list[torch.Tensor], Receipt]


def eligible(uid: str, replicas: Sequence[ExpertReplica], max_staleness: int | None) -> Sequence[ExpertReplica]:
    """Return the replicas that may answer: with ``max_staleness=0`` the primaries only.

    Raises: ExpertNotFound if none of them is the primary, by which the age of others' answers is measured.
    """
    if max_staleness is None:
        return replicas
    primaries = [replica for replica in replicas if replica.primary]
    if not primaries:
        raise ExpertNotFound(f"nobody is the primary of {uid} now: max_staleness={max_staleness} can't be kept")
    return replicas if max_staleness else primaries


class Exchange(ABC, Generic[T]):
    """A question to one expert, which any of some replicas may answer."""

    is_timed = False
    """True if its duration tells how long a forward takes there."""

    num_bytes = 0
    """Uncompressed bytes both ways together; 0 if they are few."""
    gives = 0, 0
    """Rows and optimizer steps that its answer is worth (`experts.progress`)."""

    def eligible(self, replicas: Sequence[ExpertReplica]) -> Sequence[ExpertReplica]:
        """Return those of `replicas` that may answer. Raises: ExpertNotFound."""
        return replicas

    @abstractmethod
    def send(self, replica: ExpertReplica, timeout: float) -> Coroutine[object, object, T]:
        """Make one call to one server. Raises: what the call raises; ProtocolError if the answer does not fit."""

    def answered(self, replica: ExpertReplica, answer: T, timeout: float) -> None:
        """Look at what `send` gave. Raises: TooStale."""


class SchemaExchange(Exchange[ExpertSchema]):
    def __init__(self, experience: Experience, uid: str) -> None:
        self.experience, self.uid = experience, uid

    async def send(self, replica: ExpertReplica, timeout: float) -> ExpertSchema:
        return ExpertSchema.decode(await fetch_info(self.experience.node, self.uid, replica.peer, timeout=timeout))


class ForwardExchange(Exchange[Forwarded]):
    """One forward, whose answer may be no older than its options say; a share of the answers is audited."""

    is_timed = True
    _primaries: Sequence[PeerAddress] = ()
    """The primaries, where the age of others' answers is to be checked."""

    def __init__(self, experience: Experience, forward: Forward, inputs: Sequence[torch.Tensor | None]) -> None:
        """`inputs`: on the CPU; they fit the schema and must not change before the end."""
        assert inputs[0] is not None
        self.experience, self.forward, self.inputs = experience, forward, inputs
        num_rows = inputs[0].shape[0]
        self.num_bytes, self.gives = num_rows * forward.schema.row_bytes, (num_rows, 0)

    def eligible(self, replicas: Sequence[ExpertReplica]) -> Sequence[ExpertReplica]:
        max_staleness = self.forward.options.max_staleness
        if max_staleness is None:
            return replicas
        if max_staleness:
            self._primaries = [replica.peer for replica in replicas if replica.primary]
        return eligible(self.forward.uid, replicas, max_staleness)

    def send(self, replica: ExpertReplica, timeout: float) -> Coroutine[object, object, Forwarded]:
        """See `call_forward`. While a follower answers, the primary is asked for its version. Raises: TooStale."""
        if not self._primaries or replica.peer in self._primaries:
            return call_forward(self.experience.node, self.forward, replica.peer, self.inputs, timeout=timeout)
        return self._call_follower(replica, timeout)

    def answered(self, replica: ExpertReplica, answer: Forwarded, timeout: float) -> None:
        """Learn from the epoch, and perhaps have the answer audited. Raises: TooStale."""
        outputs, receipt = answer
        self.experience.lineages.take(replica, receipt.epoch, receipt.version)
        if self.forward.options.audit_share:
            self.experience.audits.consider(self.forward, receipt, self.inputs, outputs, timeout=timeout)

    async def _call_follower(self, replica: ExpertReplica, timeout: float) -> Forwarded:
        uid, node = self.forward.uid, self.experience.node
        asking = asyncio.ensure_future(fetch_info(node, uid, self._primaries[0], timeout=timeout))
        try:
            outputs, receipt = await call_forward(node, self.forward, replica.peer, self.inputs, timeout=timeout)
            try:
                newest = (await asking).version
            except (TesseractError, TimeoutError) as error:
                raise TooStale(
                    f"the primary of {uid} does not say how old its follower's answer is: {describe(error)}"
                ) from error
        finally:
            await end(asking)
        max_staleness = self.forward.options.max_staleness
        if max_staleness is not None and receipt.version + max_staleness < newest:
            raise TooStale(
                f"a follower of {uid} answered at version {receipt.version}, its primary is at {newest}: "
                f"more than max_staleness={max_staleness} steps"
            )
        return outputs, receipt


class BackwardExchange(Exchange[list[torch.Tensor | None]]):
    """The gradients of one forward; the expert takes one optimizer step, whichever replicas are asked however often."""

    gives = 0, 1

    def __init__(
        self,
        experience: Experience,
        forward: Forward,
        receipt: Receipt,
        inputs: Sequence[torch.Tensor | None],
        output_gradients: Sequence[torch.Tensor | None],
    ) -> None:
        self.experience, self.forward, self.receipt = experience, forward, receipt
        self.inputs, self.output_gradients = inputs, output_gradients
        self.call_id = new_name()

    async def send(self, replica: ExpertReplica, timeout: float) -> list[torch.Tensor | None]:
        """The inputs' gradients (None where there is none), on the CPU. See `Exchange.send`."""
        cached = self.receipt.inputs_cached if replica.peer == self.receipt.peer else None
        try:
            reply = await self._call(replica, timeout, cached)
        except InputsForgotten:
            if cached is None:
                raise
            reply = await self._call(replica, timeout, None)  # they travel once more
        decoded = messages.decode(messages.BackwardReply, reply.body)
        self.experience.lineages.take(replica, decoded.epoch, decoded.version)
        specs = self.forward.schema.input_specs
        assert self.inputs[0] is not None
        num_rows = self.inputs[0].shape[0]
        plain = unpack_plain(decoded.tensors, reply.buffers, specs, num_rows=num_rows)
        if plain is not None:
            return [*plain]
        return await unpack_fitting(self.forward.uid, decoded.tensors, reply.buffers, specs, num_rows)

    async def _call(self, replica: ExpertReplica, timeout: float, cached: bytes | None) -> Message:
        forward = self.forward
        sent = [] if cached is not None else self.inputs
        codecs = forward.schema.settle(forward.options.codecs)
        names: str | list[str] = codecs.gradients
        if sent and codecs.inputs != codecs.gradients:
            names = [codecs.inputs] * len(sent) + [codecs.gradients] * len(self.output_gradients)
        metas, buffers = await pack([*sent, *self.output_gradients], names)
        request = messages.BackwardRequest(
            uid=forward.uid,
            call_id=self.call_id,
            tensors=metas,
            num_inputs=len(sent),
            training=forward.mode.training,
            seed=forward.mode.seed,
            version=self.receipt.version,
            reply_codec=codecs.gradients,
            inputs_cached=cached,
        )
        return await self.experience.node.call_expert(
            replica.peer,
            BACKWARD,
            messages.encode(request),
            buffers,
            timeout=timeout,
            idempotent=True,  # under one call id it is applied once
            priority=forward.options.priority,
        )
