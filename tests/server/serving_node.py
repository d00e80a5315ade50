"""A node without a network for tests of servers, and of what they host."""

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from tesseract_async.endpoint.call_table import CallHandler, CallTable
from tesseract_async.endpoint.endpoint import IncomingCall, Message
from tesseract_async.errors import RemoteError
from tesseract_async.experts.manifest import decode_manifest, join_uid
from tesseract_async.experts.node_calls import EXPERT_METHODS
from tesseract_async.experts.trust import Trust
from tesseract_async.identity import Identity, PeerID
from tesseract_async.metrics import Metrics
from tesseract_async.wire import messages
from tesseract_async.wire import tensors as wire
from tesseract_async.wire.apply import APPLY
from tests.experts.fake_network import FakeNetwork, FakeSwarm

PEER = Identity.from_seed(bytes(32)).peer_id


class ServingNode:
    """The node of a server, without a network: calls arrive as from an endpoint, all from one peer."""

    def __init__(self) -> None:
        self.check: Callable[[IncomingCall, str], None] = lambda call, uid: None
        """Asked before an expert is, as `TesseractNode` asks its policy."""
        self.table = CallTable(
            "fake",
            uid_methods={**EXPERT_METHODS, "expert.age": "call"},
            check=lambda call, uid: self.check(call, uid),
        )
        self.metrics = Metrics()
        self.network = FakeNetwork(FakeSwarm(), Identity.generate().peer_id)
        self.trust = Trust()
        self.throttle = None
        self.peer_address = SimpleNamespace(addresses=("127.0.0.1:1",), rendezvous=())
        self.connected = True
        self.asked_for_connection = asyncio.Event()
        """Set once somebody has asked whether a peer that is not connected is."""
        self.is_closed = False
        self.together: list[CallHandler] = []
        self.publisher_places: set[int] = set()

    def is_connected(self, peer_id: Any) -> bool:
        if not self.connected:
            self.asked_for_connection.set()
        return self.connected

    @property
    def declared(self) -> dict[str, bool]:
        """What servers have declared in the network: uid -> whether the server is its primary."""
        manifests = (decode_manifest(entry.value) for entry in self.network.swarm.entries.values())
        return {
            join_uid(one.prefix, coords): bool(primary)
            for one in manifests
            for coords, primary in zip(one.coords.tolist(), one.primary.tolist(), strict=True)
        }

    @property
    def is_running(self) -> bool:
        return not self.is_closed

    def check_running(self) -> None:
        if self.is_closed:
            raise RuntimeError("this node is closed")

    async def wait_reachable(self) -> bool:
        return True

    def watch_address(self, watcher: Callable[[], None]) -> Callable[[], None]:
        return lambda: None

    def host_expert(self, uid: str, handlers: Mapping[str, CallHandler]) -> None:
        self.table.host(uid, handlers)

    def unhost_expert(self, uid: str) -> None:
        self.table.unhost(uid)

    def host_together(self, handler: CallHandler) -> Callable[[], None]:
        self.together.append(handler)
        return lambda: self.together.remove(handler)

    def find_experts(self, call: IncomingCall, uids: Sequence[str]) -> list[CallHandler | RemoteError]:
        found: list[CallHandler | RemoteError] = []
        for uid in uids:
            try:
                found.append(self.table.find_for(call, uid, APPLY))
            except RemoteError as error:
                found.append(error)
        return found

    async def call(
        self, uid: str, method: str, body: Any, tensors: Any = (), *, timeout: float = 10.0, peer_id: PeerID = PEER
    ) -> Message:
        _, buffers = wire.pack_tensors(tensors)
        now = asyncio.get_running_loop().time()
        received = tuple(memoryview(bytearray(buffer)) for buffer in buffers)
        call = IncomingCall(
            peer_id=peer_id,
            method=method,
            body=body,
            buffers=received,
            deadline=now + timeout,
            priority=0,
        )
        return await self.table.find(call)(call)

    async def call_expert(
        self, peer: Any, method: str, body: Any, *, timeout: float, idempotent: bool, priority: int = 0
    ) -> Message:
        return await self.call(body[0], method, body, timeout=timeout)

    def path(self, peer: Any) -> tuple[float, float] | None:
        return None

    async def forward(self, uid: str, *inputs: torch.Tensor | None, **changes: Any) -> tuple[list[Any], int]:
        metas, _ = wire.pack_tensors(inputs)
        request = messages.ForwardRequest(uid=uid, tensors=metas, training=False, seed=0, reply_codec="none")
        reply = await self.call(uid, messages.FORWARD, list(request._replace(**changes)), inputs)
        body = messages.decode(messages.ForwardReply, reply.body)
        return wire.unpack_tensors(body.tensors, reply.buffers), body.version

    async def backward(
        self, uid: str, inputs: list[torch.Tensor | None], gradients: list[torch.Tensor | None], **changes: Any
    ) -> tuple[list[Any], int]:
        together = [*inputs, *gradients]
        metas, _ = wire.pack_tensors(together)
        request = messages.BackwardRequest(
            uid=uid,
            call_id=os.urandom(16),
            tensors=metas,
            num_inputs=len(inputs),
            training=False,
            seed=0,
            version=0,
            reply_codec="none",
        )
        reply = await self.call(uid, messages.BACKWARD, list(request._replace(**changes)), together)
        body = messages.decode(messages.BackwardReply, reply.body)
        return wire.unpack_tensors(body.tensors, reply.buffers), body.version
