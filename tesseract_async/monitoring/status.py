"""A node's figures, and the call ``node.status`` that asks for them."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import math
import os
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import psutil

import tesseract_async
from tesseract_async.endpoint.endpoint import IncomingCall, Message
from tesseract_async.errors import ProtocolError, TesseractError
from tesseract_async.experts.manifest import split_uid
from tesseract_async.node import TesseractNode
from tesseract_async.runtime.backend import ExpertBackend
from tesseract_async.runtime.runtime import TesseractRuntime
from tesseract_async.server.contract import MAX_NAME, check_name, is_name
from tesseract_async.server.server import TesseractServer
from tesseract_async.transport.base import PeerAddress
from tesseract_async.wire.packed import Value

METHOD = "node.status"
MAX_STATUS_BYTES = 2**20
MAX_EXPERTS = 2000
"""The most experts in one status."""
MAX_FIGURE = 2**63
"""All figures are below this, so that no sum or rate of them is ever infinite, which JSON cannot express."""
PADDING = 60_000
"""Bytes of padding that a request or a reply may have, so that the line can be measured: it is still one frame."""
PADDING_PER_MINUTE = 8 * 2**20
"""Bytes of such replies to all peers together each minute, so that measuring takes little from the others."""
NUM_PADDED = (2, 16)
"""Padded calls at once: first a few, then more where those took less than ..."""
ENOUGH_SECONDS = 0.3


@dataclass(frozen=True, slots=True)
class ExpertStatus:
    """One hosted expert."""

    version: int
    """Optimizer steps that it has taken."""
    primary: bool
    num_calls: int = 0
    num_failures: int = 0
    median_seconds: float = 0.0
    """Seconds from a request's arrival to its answer; 0 before the first."""
    slow_seconds: float = 0.0
    """The seconds that 99 of 100 requests do not exceed."""
    num_rows: int = 0
    """Rows that it has computed."""


@dataclass(frozen=True, slots=True)
class NodeStatus:
    """One node at one moment. Sums run since the node started: rates are differences of two statuses."""

    software: str
    """Version of this package there."""
    time: float
    """The node's wall clock (`time.time`), by which records expire."""
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
    name: str = ""
    """The machine's, as its operator calls it (`serve --name`)."""
    hardware: str = ""
    memory_bytes: int = 0
    """Memory of the process."""
    num_parameters: int = 0
    """The parameters of its largest expert."""
    sync_seconds: int = 0
    """Seconds between two Seals of what it leads in runs, at most: that much work is lost if it dies. 0: it leads
    nothing."""


class StatusService:
    """Answers ``node.status`` for a node and the servers on it. Use it as an async context manager, or call `close`."""

    def __init__(self, node: TesseractNode, *servers: TesseractServer, name: str = "") -> None:
        """Let the node answer. `name`: of this machine, for people.

        Raises: RuntimeError before the node is started; ValueError if it has one, or for a name that is too long.
        """
        check_name(name)
        self._node = node
        self._servers = servers
        self._name = name
        self._started_at = self._padded_at = asyncio.get_running_loop().time()
        self._room = float(PADDING_PER_MINUTE)
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
                uid: ExpertStatus(backend.version, server.is_primary(uid), *_figures(backend, runtimes))
                for server in self._servers
                for uid, backend in server.experts.items()
            },
            name=self._name,
            hardware=hardware({str(runtime.device) for runtime in runtimes}),
            memory_bytes=psutil.Process().memory_info().rss,
            num_parameters=max(self._sizes(), default=0),
            sync_seconds=max((math.ceil(server.succession.sync_seconds) for server in self._servers), default=0),
        )

    def _sizes(self) -> Iterator[int]:
        for server in self._servers:
            for kind in {type(backend.module): backend for backend in server.experts.values()}.values():
                yield sum(parameter.numel() for parameter in kind.module.parameters())

    async def _answer(self, call: IncomingCall) -> Message:
        if type(call.body) is not dict or "padded" not in call.body:
            return Message(encode_status(self.status()))
        now = asyncio.get_running_loop().time()
        self._room = min(PADDING_PER_MINUTE, self._room + (now - self._padded_at) * PADDING_PER_MINUTE / 60)
        self._padded_at = now
        if call.body["padded"] is not True or self._room < PADDING:
            return Message({})
        self._room -= PADDING
        return Message({}, (memoryview(bytes(PADDING)),))


def _figures(backend: ExpertBackend, runtimes: Sequence[TesseractRuntime]) -> tuple[int, int, float, float, int]:
    """Return calls, failures, the seconds that half and 99 of 100 of them took at most, and rows."""
    for runtime in runtimes:
        if backend in runtime.figures:
            one = runtime.figures[backend]
            median, slow = (one.latencies.quantile(share) or 0.0 for share in (0.5, 0.99))
            return one.num_calls, one.num_failures, median, slow, one.num_rows
    return 0, 0, 0.0, 0.0, 0


@functools.cache
def _machine() -> str:
    return f"{os.cpu_count() or 1} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB"


def hardware(devices: Collection[str]) -> str:
    """Return in words what computes at a node that has these devices."""
    torch = sys.modules.get("torch")  # a device is there only once it is loaded
    gpus = [torch.cuda.get_device_name(one) for one in sorted(devices) if torch is not None and one.startswith("cuda")]
    return ", ".join([_machine(), *gpus])[:MAX_NAME]


def encode_status(status: NodeStatus) -> dict[str, object]:
    body = {field.name: getattr(status, field.name) for field in dataclasses.fields(status)}
    uids = list(status.experts)
    if (last := len(uids) - 1) >= MAX_EXPERTS:
        # evenly from the first to the last, so that they show the size of the grid
        uids = [uids[place * last // (MAX_EXPERTS - 1)] for place in range(MAX_EXPERTS)]
    body["experts"] = {uid: list(dataclasses.astuple(status.experts[uid])) for uid in uids}
    return body


def decode_status(body: object) -> NodeStatus:
    """Read a status. Untrusted; unknown fields are ignored. Raises: ProtocolError."""
    if type(body) is not dict:
        raise ProtocolError("a status is a map")
    values: dict[str, Value] = {}
    for field in dataclasses.fields(NodeStatus):
        value = body.get(field.name, field.default)
        if field.name == "experts":
            value = _experts(value)
        elif not _fits(value, str(field.type)):
            raise ProtocolError(f"status: {field.name} is missing or malformed")
        values[field.name] = value
    return NodeStatus(**values)


def _fits(value: Value, kind: str) -> bool:
    if kind == "str":
        return type(value) is str and is_name(value)
    types = {"bool": (bool,), "int": (int,), "float": (int, float)}[kind]
    return type(value) in types and 0 <= value < MAX_FIGURE


def _experts(value: object) -> dict[str, ExpertStatus]:
    if type(value) is not dict or len(value) > MAX_EXPERTS:
        raise ProtocolError("status: experts is missing or malformed")
    kinds = [str(field.type) for field in dataclasses.fields(ExpertStatus)]
    experts = {}
    for uid, said in value.items():
        try:
            split_uid(uid)
            fits = all([_fits(one, kind) for one, kind in zip(said[: len(kinds)], kinds, strict=True)])
            experts[uid] = ExpertStatus(*said[: len(kinds)])
        except (TypeError, ValueError, LookupError, AttributeError):
            fits = False
        if not fits:
            raise ProtocolError("status: a malformed expert")
    return experts


async def ask_status(node: TesseractNode, peer: PeerAddress, *, timeout: float) -> NodeStatus:
    """Ask `peer` for its status. Raises: as `Endpoint.call`; UnknownMethod if it does not answer such calls."""
    reply = await node.endpoint.call(
        peer, METHOD, timeout=timeout, idempotent=True, max_reply_bytes=MAX_STATUS_BYTES, priority=-1
    )
    return decode_status(reply.body)


async def measure_line(
    node: TesseractNode, peer: PeerAddress, *, timeout: float = 3.0
) -> tuple[float | None, float | None]:
    """Return the bytes per second that this node can send to `peer`, and receive; at least, and at this moment.

    Takes up to two timeouts. None where the peer does not help: it is an older one, or has no room.
    """
    loop = asyncio.get_running_loop()

    async def call(body: object, buffers: Sequence[bytes]) -> int:
        reply = await node.endpoint.call(
            peer, METHOD, body, buffers, timeout=timeout, idempotent=True, max_reply_bytes=MAX_STATUS_BYTES
        )
        return sum(map(len, buffers)) + sum(map(len, reply.buffers))

    async def rate(body: object, buffers: Sequence[bytes]) -> float | None:
        found = None
        for number in NUM_PADDED:
            started = loop.time()
            done = await asyncio.gather(*(call(body, buffers) for _ in range(number)), return_exceptions=True)
            if any(isinstance(one, TimeoutError) for one in done):
                return found or number * PADDING / timeout
            num_bytes = sum(one for one in done if isinstance(one, int))
            if num_bytes < number * PADDING:
                return found
            seconds = loop.time() - started
            found = num_bytes / max(1e-6, seconds - trip)
            if seconds > ENOUGH_SECONDS:
                break
        return found

    started = loop.time()
    try:
        await call({"padded": False}, ())
    except (TesseractError, TimeoutError):
        return None, None
    trip = loop.time() - started
    return await rate({"padded": False}, [bytes(PADDING)]), await rate({"padded": True}, ())
