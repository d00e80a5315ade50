"""A node's figures, and the call ``node.status`` that asks for them."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import tesseract_async
from tesseract_async.endpoint.endpoint import IncomingCall, Message
from tesseract_async.errors import ProtocolError
from tesseract_async.experts import split_uid
from tesseract_async.transport.base import PeerAddress

if TYPE_CHECKING:
    from tesseract_async.node import TesseractNode

METHOD = "node.status"
MAX_STATUS_BYTES = 2**20
MAX_EXPERTS = 2000
"""Experts in one status."""


@dataclass(frozen=True, slots=True)
class ExpertStatus:
    """One hosted expert."""

    version: int
    """Optimizer steps that it has taken."""
    primary: bool


@dataclass(frozen=True, slots=True)
class NodeStatus:
    """One node at one moment. Sums run since the node started: rates are differences of two statuses."""

    software: str
    """Version of this package there."""
    time: float
    """Its wall clock (`time.time`): what records expire by."""
    uptime: float
    """Seconds since it started."""
    num_calls: int
    """Calls that its experts have been sent."""
    num_rows: int
    """Rows that its experts have computed."""
    num_waiting_rows: int
    """Rows that wait to be computed."""
    busy_seconds: float
    """Time that its devices have spent computing."""
    experts: Mapping[str, ExpertStatus]
    """uid -> status."""


class _Statistics(Protocol):
    @property
    def num_rows(self) -> int: ...
    @property
    def num_waiting_rows(self) -> int: ...


class _Runtime(Protocol):
    @property
    def busy_seconds(self) -> float: ...
    def statistics(self) -> _Statistics: ...


class _Backend(Protocol):
    @property
    def version(self) -> int: ...


class Server(Protocol):
    """The part of a `TesseractServer` that is read here."""

    @property
    def experts(self) -> Mapping[str, _Backend]: ...
    @property
    def runtimes(self) -> Sequence[_Runtime]: ...
    def is_primary(self, uid: str) -> bool: ...


class StatusService:
    """Answers ``node.status`` for a node and the servers on it. Use it as an async context manager, or call `close`."""

    def __init__(self, node: TesseractNode, *servers: Server) -> None:
        """Let the node answer. Raises: RuntimeError before the node is started; ValueError if it has one."""
        self._node = node
        self._servers = servers
        self._started_at = asyncio.get_running_loop().time()
        node.endpoint.handle(METHOD, self._answer)

    async def __aenter__(self) -> StatusService:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._node.endpoint.unhandle(METHOD)

    def status(self) -> NodeStatus:
        runtimes = [runtime for server in self._servers for runtime in server.runtimes]
        statistics = [runtime.statistics() for runtime in runtimes]
        return NodeStatus(
            software=tesseract_async.__version__,
            time=time.time(),
            uptime=asyncio.get_running_loop().time() - self._started_at,
            num_calls=int(self._node.metrics.total("expert_calls_answered")),
            num_rows=sum(one.num_rows for one in statistics),
            num_waiting_rows=sum(one.num_waiting_rows for one in statistics),
            busy_seconds=sum(runtime.busy_seconds for runtime in runtimes),
            experts={
                uid: ExpertStatus(backend.version, server.is_primary(uid))
                for server in self._servers
                for uid, backend in server.experts.items()
            },
        )

    async def _answer(self, call: IncomingCall) -> Message:
        return Message(encode_status(self.status()))


def encode_status(status: NodeStatus) -> dict[str, object]:
    body = {field.name: getattr(status, field.name) for field in dataclasses.fields(status)}
    uids = list(status.experts)
    if (last := len(uids) - 1) >= MAX_EXPERTS:
        # evenly from the first to the last, so that they show the size of the grid
        uids = [uids[place * last // (MAX_EXPERTS - 1)] for place in range(MAX_EXPERTS)]
    body["experts"] = {uid: [status.experts[uid].version, status.experts[uid].primary] for uid in uids}
    return body


def decode_status(body: object) -> NodeStatus:
    """Read a status. Untrusted; unknown fields are ignored. Raises: ProtocolError."""
    if type(body) is not dict:
        raise ProtocolError("a status is a map")
    values: dict[str, Any] = {}
    for field in dataclasses.fields(NodeStatus):
        value = body.get(field.name)
        if field.name == "experts":
            value = _experts(value)
        elif field.name == "software":
            if type(value) is not str or len(value) > 64 or not value.isprintable():
                raise ProtocolError("a malformed software version")
        elif str(field.type) == "int":
            if type(value) is not int or not 0 <= value < 2**63:
                raise ProtocolError(f"status: {field.name} is missing or malformed")
        elif not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
            raise ProtocolError(f"status: {field.name} is missing or malformed")
        values[field.name] = value
    return NodeStatus(**values)


def _experts(value: object) -> dict[str, ExpertStatus]:
    if type(value) is not dict or len(value) > MAX_EXPERTS:
        raise ProtocolError("status: experts is missing or malformed")
    experts = {}
    for uid, fields in value.items():
        try:
            version, primary = fields
            split_uid(uid)
        except (TypeError, ValueError, AttributeError):
            raise ProtocolError("status: a malformed expert") from None
        if type(version) is not int or not 0 <= version < 2**63 or type(primary) is not bool:
            raise ProtocolError("status: a malformed expert")
        experts[uid] = ExpertStatus(version, primary)
    return experts


async def ask_status(node: TesseractNode, peer: PeerAddress, *, timeout: float) -> NodeStatus:
    """Ask `peer` for its status. Raises: as `Endpoint.call`; UnknownMethod if it does not answer such calls."""
    reply = await node.endpoint.call(
        peer, METHOD, timeout=timeout, idempotent=True, max_reply_bytes=MAX_STATUS_BYTES, priority=-1
    )
    return decode_status(reply.body)
