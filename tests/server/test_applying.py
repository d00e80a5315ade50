"""``expert.apply`` against a node of three lines: it gives what torch gives, and each expert's trouble is its own."""

import asyncio
import copy
import os
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import torch
from torch import nn

import tesseract_async as ta
from tesseract_async.endpoint.endpoint import IncomingCall
from tesseract_async.errors import (
    ConnectionLost,
    ExpertFailed,
    ExpertNotFound,
    InputsForgotten,
    NotAllowed,
    NotPrimary,
    Overloaded,
    RemoteError,
    SchemaMismatch,
    TooStale,
)
from tesseract_async.identity import Identity
from tesseract_async.runtime.backend import BackendSettings, ExpertBackend
from tesseract_async.runtime.runtime import RuntimeSettings
from tesseract_async.server.applying import PORTION, SHARE_BYTES
from tesseract_async.server.hosted import Succession
from tesseract_async.server.server import ServerSettings, TesseractServer
from tesseract_async.wire import apply, messages
from tesseract_async.wire import tensors as wire
from tesseract_async.wire.apply import ApplyRequest
from tesseract_async.wire.codecs import CodecPolicy
from tesseract_async.wire.tensors import TensorSpec
from tests.server.serving_node import PEER, ServingNode

UIDS = ("ffn.0", "ffn.1", "ffn.2")


class Expert(nn.Module):
    """Two layers, and a switch that makes it misbehave."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
        self.answers: Any = lambda x: x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.answers(self.layers(x))


def make_backend(seed: int, **changes: Any) -> ExpertBackend:
    module = Expert(seed)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    return ExpertBackend(
        module, optimizer=optimizer, args_schema=(TensorSpec((8,)),), settings=BackendSettings(**changes)
    )


@pytest.fixture
def node() -> ServingNode:
    return ServingNode()


@pytest_asyncio.fixture
async def server(node: ServingNode) -> AsyncIterator[TesseractServer]:
    experts = {uid: make_backend(seed) for seed, uid in enumerate(UIDS)}
    async with TesseractServer(node, experts, settings=ServerSettings(drain_timeout=0.0)) as server:  # type: ignore[arg-type]
        yield server


@dataclass
class Wave:
    """Rows of a block for some experts, with weights; expert 0 sees rows 0, 1 and 2, and so on."""

    x: torch.Tensor = field(default_factory=lambda: torch.randn(5, 8))
    pairs: Mapping[str, Mapping[int, float]] = field(
        default_factory=lambda: {
            "ffn.0": {0: 0.5, 1: 2.0, 2: -1.0},
            "ffn.1": {0: 0.25, 4: 1.0},
            "ffn.2": {1: 1.5, 2: 0.0, 3: 1.0, 4: 3.0},
        }
    )
    ids: dict[str, bytes] = field(default_factory=dict)
    versions: dict[str, int] = field(default_factory=dict)
    kept: bytes | None = None

    def request(self, gradient: torch.Tensor | None = None, *, only: Sequence[str] = (), **changes: Any) -> Any:
        """The request and its tensors: a forward, or the backward of `gradient`."""
        pairs = {uid: pairs for uid, pairs in self.pairs.items() if not only or uid in only}
        inputs = [] if gradient is not None and self.kept else [self.x]
        tensors = inputs if gradient is None else [*inputs, gradient]
        metas, _ = wire.pack_tensors(tensors)
        request = ApplyRequest(
            prefix="ffn",
            experts=np.array([[int(uid.split(".")[1])] for uid in pairs], dtype=np.uint32),
            ids=[self.ids.setdefault(uid, os.urandom(16)) for uid in pairs],
            versions=np.array([self.versions.get(uid, 0) for uid in pairs]),
            offsets=np.cumsum([0, *map(len, pairs.values())]),
            rows=np.array([row for one in pairs.values() for row in one], dtype=np.int32),
            weights=np.array([weight for one in pairs.values() for weight in one.values()], dtype=np.float32),
            tensors=metas,
            num_inputs=len(inputs),
            backward=gradient is not None,
            training=False,
            keep=gradient is None,
            seed=0,
            reply_codec="none",
            kept=None if gradient is None else self.kept,
        )
        return request._replace(**changes), tensors


@dataclass
class Replied:
    """All parts of a reply together."""

    total: torch.Tensor
    """[R, ...]"""
    versions: dict[str, int] = field(default_factory=dict)
    failures: dict[str, RemoteError] = field(default_factory=dict)
    weights: dict[tuple[str, int], float] = field(default_factory=dict)
    num_parts: int = 0
    kept: bytes | None = None


class Reply:
    """The parts of a reply, as a caller that may leave sees them; `through` a real connection, or straight."""

    def __init__(
        self,
        node: ServingNode | None,
        request: ApplyRequest,
        tensors: Sequence[torch.Tensor],
        *,
        through: Any = None,
        **changes: Any,
    ) -> None:
        self.request = request
        self.replied = Replied(torch.zeros(request.num_rows, 8 if request.backward else 4))
        body, first = apply.encode_request(request)
        _, buffers = wire.pack_tensors(tensors)
        if through is not None:
            self.parts: Any = through(body, (*first, *buffers))
            return
        call = IncomingCall(
            peer_id=changes.pop("peer_id", PEER),
            method=apply.APPLY,
            body=body,
            buffers=tuple(memoryview(bytearray(one)) for one in (*first, *buffers)),
            deadline=asyncio.get_running_loop().time() + changes.pop("timeout", 10.0),
            priority=0,
            in_parts=True,
        )
        assert node is not None
        self.parts = node.together[0](call)

    def take(self, message: Any) -> Replied:
        part, buffers = apply.decode_part(message.body, message.buffers, self.request)
        uids = [f"ffn.{number}" for number in self.request.experts[:, 0].tolist()]
        replied, place = self.replied, 0
        sums = wire.unpack_tensors(part.tensors, buffers)
        rows = torch.from_numpy(self.request.rows_of(part.experts)).long()
        scales = self.request.scales_of(part.experts)
        for one in sums:
            assert one is not None and one.dtype == torch.float32 and len(one) == len(rows)
            replied.total.index_add_(0, rows, one if scales is None else one * torch.from_numpy(scales)[:, None])
        for expert, version in zip(part.experts.tolist(), part.versions.tolist(), strict=True):
            assert uids[expert] not in replied.versions
            replied.versions[uids[expert]] = version
            for row in self.request.rows[self.request.offsets[expert] : self.request.offsets[expert + 1]].tolist():
                if self.request.backward:
                    replied.weights[uids[expert], row] = float(part.weight_gradients[place])
                    place += 1
        replied.failures |= {uids[expert]: error for expert, error in part.failures}
        assert part.kept is None or not replied.num_parts, "only the first part says that"
        replied.kept = part.kept or replied.kept
        replied.num_parts += 1
        return replied

    async def until(self, *uids: str) -> Replied:
        """Take parts until these have answered."""
        while not set(uids) <= self.replied.versions.keys():
            self.take(await anext(self.parts))
        return self.replied

    async def all(self) -> Replied:
        async for message in self.parts:
            self.take(message)
        replied = self.replied
        assert len(replied.versions) + len(replied.failures) == len(self.request.ids)
        return replied


async def forward(node: ServingNode, wave: Wave, **changes: Any) -> Replied:
    replied = await Reply(node, *wave.request(**changes)).all()
    wave.kept = replied.kept
    wave.versions |= replied.versions
    return replied


async def backward(node: ServingNode, wave: Wave, gradient: torch.Tensor, **changes: Any) -> Replied:
    return await Reply(node, *wave.request(gradient, **changes)).all()


def by_hand(modules: Mapping[str, nn.Module], wave: Wave, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The mixture that torch computes; `weights`, one per pair, in order."""
    total, at = torch.zeros(len(x), 4), 0
    for uid, pairs in wave.pairs.items():
        if uid in modules:
            rows = torch.tensor(list(pairs))
            by_row = weights[at : at + len(rows), None]
            total = total.index_add(0, rows, modules[uid](x[rows]) * by_row)
        at += len(pairs)
    return total


def weights_of(wave: Wave) -> torch.Tensor:
    return torch.tensor([weight for one in wave.pairs.values() for weight in one.values()])


@pytest.mark.parametrize("is_kept", [True, False])
async def test_it_equals_the_same_mixture_in_torch(node: ServingNode, server: TesseractServer, is_kept: bool) -> None:
    modules = {uid: copy.deepcopy(backend.module) for uid, backend in server.experts.items()}
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.1) for module in modules.values()]
    for step in range(3):
        wave, gradient = Wave(), torch.randn(5, 4)
        x, weights = wave.x.clone().requires_grad_(), weights_of(wave).requires_grad_()
        expected = by_hand(modules, wave, x, weights)
        replied = await forward(node, wave)
        assert replied.versions == dict.fromkeys(UIDS, step) and not replied.failures
        torch.testing.assert_close(replied.total, expected.detach(), atol=1e-6, rtol=1e-6)
        if not is_kept:
            wave.kept = None
        replied = await backward(node, wave, gradient)
        assert replied.versions == dict.fromkeys(UIDS, step + 1) and not replied.failures
        expected.backward(gradient)
        torch.testing.assert_close(replied.total, x.grad, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(torch.tensor(list(replied.weights.values())), weights.grad, atol=1e-6, rtol=1e-6)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for uid, module in modules.items():
            torch.testing.assert_close(
                server.experts[uid].module.state_dict(), module.state_dict(), atol=1e-6, rtol=1e-6
            )


@pytest.mark.parametrize("codec", ["uint8", "int4_blockwise", "fp16"])
async def test_a_row_of_tiny_weights_keeps_its_digits_in_every_codec(
    node: ServingNode, server: TesseractServer, codec: str
) -> None:
    wave = Wave(pairs={"ffn.0": {0: 1.0, 1: 1e-12, 2: 0.0}, "ffn.1": {1: -3e-13, 3: 2e9}})
    weights = weights_of(wave)
    expected = by_hand({uid: one.module for uid, one in server.experts.items()}, wave, wave.x, weights).detach()
    replied = await forward(node, wave, reply_codec=codec)
    scales = torch.tensor([1.0, 1e-12, 1.0, 2e9, 1.0])[:, None]
    assert float(((replied.total - expected) / scales).abs().max()) < 0.15


async def test_a_replayed_backward_steps_once_and_has_the_same_answer(
    node: ServingNode, server: TesseractServer
) -> None:
    wave, gradient = Wave(), torch.randn(5, 4)
    await forward(node, wave)
    wave.kept = None
    first = await backward(node, wave, gradient)
    again = await backward(node, wave, gradient)
    torch.testing.assert_close(again.total, first.total)
    assert again.versions == first.versions == dict.fromkeys(UIDS, 1) and again.weights == first.weights
    server.free_memory()
    forgotten = await backward(node, wave, gradient)
    assert forgotten.versions == first.versions, "computed again, by weights that have moved, without a step"
    assert not torch.equal(forgotten.total, first.total)
    together = await asyncio.gather(*(backward(node, Wave(ids=dict(wave.ids)), gradient) for _ in range(3)))
    assert all(one.versions == first.versions for one in together)
    assert [one.version for one in server.experts.values()] == [1, 1, 1]


async def test_messages_in_flight_together_share_a_step(node: ServingNode, server: TesseractServer) -> None:
    wave, gradient = Wave(), torch.randn(5, 4)
    replies = await asyncio.gather(*(backward(node, wave, gradient) for _ in range(4)))
    assert [one.version for one in server.experts.values()] == [1, 1, 1]
    for one in replies:
        torch.testing.assert_close(one.total, replies[0].total)


async def test_regrouped_experts_keep_their_ids(node: ServingNode, server: TesseractServer) -> None:
    wave, gradient = Wave(), torch.randn(5, 4)
    first = await backward(node, wave, gradient, only=["ffn.0", "ffn.2"])
    assert set(first.versions) == {"ffn.0", "ffn.2"}
    whole = await backward(node, wave, gradient)
    assert whole.versions == dict.fromkeys(UIDS, 1) and not whole.failures
    assert [one.version for one in server.experts.values()] == [1, 1, 1]


async def test_an_expert_that_is_not_here_is_not_found_and_the_others_answer(
    node: ServingNode, server: TesseractServer
) -> None:
    wave = Wave()
    wave.pairs = {**wave.pairs, "ffn.7": {0: 1.0, 3: 1.0}}
    replied = await forward(node, wave)
    assert set(replied.versions) == set(UIDS) and isinstance(replied.failures["ffn.7"], ExpertNotFound)
    expected = by_hand({uid: one.module for uid, one in server.experts.items()}, wave, wave.x, weights_of(wave))
    torch.testing.assert_close(replied.total, expected)
    replied = await backward(node, wave, torch.ones(5, 4))
    assert set(replied.versions) == set(UIDS) and isinstance(replied.failures["ffn.7"], ExpertNotFound)
    wave.pairs = {"ffn.8": {0: 1.0}}
    replied = await forward(node, wave)
    assert set(replied.failures) == {"ffn.8"} and replied.kept is None and replied.num_parts == 1


async def test_two_servers_of_a_node_answer_one_message(node: ServingNode, server: TesseractServer) -> None:
    wave = Wave()
    wave.pairs = {**wave.pairs, "ffn.3": {0: 1.0, 3: 1.0}}
    settings = ServerSettings(drain_timeout=0.0)
    async with TesseractServer(node, {"ffn.3": make_backend(3)}, settings=settings) as second:  # type: ignore[arg-type]
        replied = await forward(node, wave)
        assert set(replied.versions) == set(wave.pairs)
        replied = await backward(node, wave, torch.ones(5, 4))
        assert replied.versions == dict.fromkeys(wave.pairs, 1) and second.experts["ffn.3"].version == 1
    assert set((await forward(node, wave)).failures) == {"ffn.3"}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
async def test_an_answer_that_is_not_finite_fails_alone(node: ServingNode, server: TesseractServer, bad: float) -> None:
    server.experts["ffn.1"].module.answers = lambda y: y * bad  # type: ignore[assignment]
    wave = Wave()
    replied = await forward(node, wave)
    assert isinstance(replied.failures["ffn.1"], ExpertFailed) and set(replied.versions) == {"ffn.0", "ffn.2"}
    others = {uid: server.experts[uid].module for uid in ("ffn.0", "ffn.2")}
    torch.testing.assert_close(replied.total, by_hand(others, wave, wave.x, weights_of(wave)))
    wave.kept = None
    replied = await backward(node, wave, torch.ones(5, 4))
    assert isinstance(replied.failures["ffn.1"], ExpertFailed)
    assert replied.versions == {"ffn.0": 1, "ffn.2": 1} and server.experts["ffn.1"].version == 0


async def test_a_module_that_raises_fails_alone(node: ServingNode, server: TesseractServer) -> None:
    def fails(y: torch.Tensor) -> torch.Tensor:
        raise ValueError("no such luck")

    server.experts["ffn.2"].module.answers = fails  # type: ignore[assignment]
    replied = await forward(node, Wave())
    assert "no such luck" in str(replied.failures["ffn.2"]) and set(replied.versions) == {"ffn.0", "ffn.1"}


async def test_a_replica_that_lacks_steps_says_so(node: ServingNode, server: TesseractServer) -> None:
    await backward(node, Wave(), torch.ones(5, 4), only=["ffn.1"])
    wave = Wave(versions={"ffn.0": 1, "ffn.1": 1})
    replied = await forward(node, wave)
    assert isinstance(replied.failures["ffn.0"], TooStale) and replied.versions == {"ffn.1": 1, "ffn.2": 0}


async def test_a_gradient_that_is_too_stale_fails_alone(node: ServingNode) -> None:
    experts = {"ffn.0": make_backend(0, max_staleness=0), "ffn.1": make_backend(1)}
    async with TesseractServer(node, experts, settings=ServerSettings(drain_timeout=0.0)):  # type: ignore[arg-type]
        await backward(node, Wave(), torch.ones(5, 4), only=UIDS[:2])
        replied = await backward(node, Wave(), torch.ones(5, 4), only=UIDS[:2])
        assert "steps ago" in str(replied.failures["ffn.0"]) and replied.versions == {"ffn.1": 2}


async def test_a_block_that_is_not_kept_any_more_is_said_of_each_expert(
    node: ServingNode, server: TesseractServer
) -> None:
    wave, gradient = Wave(), torch.ones(5, 4)
    await forward(node, wave)
    assert wave.kept is not None
    server.free_memory()
    replied = await backward(node, wave, gradient)
    assert set(replied.failures) == set(UIDS)
    assert all(isinstance(error, InputsForgotten) for error in replied.failures.values())
    wave.kept = None
    assert (await backward(node, wave, gradient)).versions == dict.fromkeys(UIDS, 1)
    wave.kept = bytes(16)
    assert (await backward(node, wave, gradient)).versions == dict.fromkeys(UIDS, 1), "answers are remembered"


async def test_a_block_is_kept_once_and_let_go_when_all_have_answered(
    node: ServingNode, server: TesseractServer
) -> None:
    wave = Wave(x=torch.randn(1000, 8))
    await forward(node, wave)
    kept = server.free_memory()
    assert 32_000 <= kept < 40_000, "the block counts once, whatever the number of experts"
    await forward(node, wave)
    await backward(node, wave, torch.ones(1000, 4), only=["ffn.1"])
    again = await backward(node, wave, torch.ones(1000, 4), only=["ffn.0"])
    assert isinstance(again.failures["ffn.0"], InputsForgotten)


async def test_a_block_stays_while_an_expert_has_yet_to_answer(node: ServingNode, server: TesseractServer) -> None:
    wave = Wave()
    await forward(node, wave)
    wave.pairs = {**wave.pairs, "ffn.7": {0: 1.0}}
    assert set((await backward(node, wave, torch.ones(5, 4))).failures) == {"ffn.7"}
    del wave.pairs["ffn.7"]  # type: ignore[attr-defined]
    wave.ids.clear()
    assert not (await backward(node, wave, torch.ones(5, 4))).failures


async def test_experts_that_do_not_fit_into_the_queue_are_overloaded(node: ServingNode) -> None:
    room_for_two = 2 * 2 * (SHARE_BYTES + 500)  # half of it is a peer's
    settings = ServerSettings(drain_timeout=0.0, runtime=RuntimeSettings(max_queue_bytes=room_for_two))
    async with TesseractServer(node, {uid: make_backend(0) for uid in UIDS}, settings=settings) as server:  # type: ignore[arg-type]
        released = threading.Event()
        holding = asyncio.create_task(server.runtimes[0].call(lambda: released.wait(60)))
        await asyncio.sleep(0)
        reply = Reply(node, *Wave().request())
        first = asyncio.create_task(anext(reply.parts))
        replied = reply.take(await first)
        assert set(replied.failures) == {"ffn.2"} and not replied.versions
        error = replied.failures["ffn.2"]
        assert isinstance(error, Overloaded) and error.retry_after > 0
        released.set()
        await holding
        replied = await reply.all()
        assert set(replied.versions) == {"ffn.0", "ffn.1"} and replied.num_parts >= 2


async def test_answers_that_are_not_taken_leave_their_peer_less_room(
    node: ServingNode, server: TesseractServer
) -> None:
    statistics, begun, released = server.runtimes[0].statistics, threading.Event(), threading.Event()

    def waits(y: torch.Tensor) -> torch.Tensor:
        begun.set()
        released.wait(60)
        return y

    server.experts["ffn.2"].module.answers = waits  # type: ignore[assignment]
    reply = Reply(node, *Wave().request())
    await reply.until("ffn.0", "ffn.1")
    assert await asyncio.to_thread(begun.wait, 60)
    of_one = statistics().num_bytes
    assert SHARE_BYTES < of_one < 2 * SHARE_BYTES, "what was taken counts no more"
    released.set()
    await server.runtimes[0].call(lambda: None)
    assert statistics().num_bytes == of_one and not statistics().num_waiting, "it is computed, and waits"
    await reply.parts.aclose()
    assert statistics().num_bytes == 0


async def test_a_message_for_a_thousand_experts_takes_its_share_and_no_more(node: ServingNode) -> None:
    num_experts, num_rows = 2 * PORTION + 22, 64
    frozen = {
        f"ffn.{number}": ExpertBackend(nn.Identity(), args_schema=(TensorSpec((8,)),)) for number in range(num_experts)
    }
    # all of it would be 64 bytes a pair, 0.6 MB
    settings = ServerSettings(drain_timeout=0.0, runtime=RuntimeSettings(max_queue_bytes=2**20))
    async with TesseractServer(node, frozen, settings=settings) as server:  # type: ignore[arg-type]
        released = threading.Event()
        holding = asyncio.create_task(server.runtimes[0].call(lambda: released.wait(60)))
        await asyncio.sleep(0)
        pairs = {uid: dict.fromkeys(range(num_rows), 1.0) for uid in frozen}
        request, tensors = Wave(x=torch.ones(num_rows, 8), pairs=pairs).request()
        flood = Reply(node, request, tensors)
        waiting = asyncio.create_task(anext(flood.parts))
        first, _ = apply.decode_part(*(await waiting), request)
        assert 0 < len(first.failures) < num_experts and not len(first.experts)
        assert server.runtimes[0].statistics().num_bytes <= 2**19
        other = Reply(node, *Wave().request(only=["ffn.1"]), peer_id=Identity.generate().peer_id)
        also_waiting = asyncio.create_task(anext(other.parts))
        await asyncio.sleep(0)
        released.set()
        await holding
        decoded, _ = apply.decode_part(*(await also_waiting), other.request)
        assert decoded.experts.tolist() == [0], "another peer is served"
        total = 0
        async for message in flood.parts:
            part, buffers = apply.decode_part(*message, request)
            (sums,) = wire.unpack_tensors(part.tensors, buffers)
            assert sums is not None and (sums == len(part.experts)).all()
            total += len(part.experts)
        assert total == num_experts - len(first.failures)
        await other.parts.aclose()


async def test_a_slow_expert_does_not_hold_up_the_others(node: ServingNode, server: TesseractServer) -> None:
    released = threading.Event()

    def waits(y: torch.Tensor) -> torch.Tensor:
        released.wait(60)
        return y

    server.experts["ffn.2"].module.answers = waits  # type: ignore[assignment]
    reply = Reply(node, *Wave().request())
    assert set((await reply.until("ffn.0", "ffn.1")).versions) == {"ffn.0", "ffn.1"}
    released.set()
    assert set((await reply.all()).versions) == set(UIDS)


async def test_leaving_drops_what_has_not_begun_and_what_has_steps(node: ServingNode, server: TesseractServer) -> None:
    begun, released = threading.Event(), threading.Event()

    def waits(y: torch.Tensor) -> torch.Tensor:
        begun.set()
        released.wait(60)
        return y

    server.experts["ffn.0"].module.answers = waits  # type: ignore[assignment]
    wave = Wave()
    reply = Reply(node, *wave.request(torch.ones(5, 4)))
    waiting = asyncio.create_task(anext(reply.parts))
    await asyncio.to_thread(begun.wait, 60)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await reply.parts.aclose()
    assert server.runtimes[0].statistics().num_waiting == 0
    released.set()
    replied = await backward(node, wave, torch.ones(5, 4))
    assert replied.versions == dict.fromkeys(UIDS, 1)
    assert [one.version for one in server.experts.values()] == [1, 1, 1]


async def test_leaving_between_parts_drops_the_rest(node: ServingNode, server: TesseractServer) -> None:
    released = threading.Event()

    def waits(y: torch.Tensor) -> torch.Tensor:
        released.wait(60)
        return y

    server.experts["ffn.1"].module.answers = waits  # type: ignore[assignment]
    reply = Reply(node, *Wave().request(keep=False))
    replied = reply.take(await anext(reply.parts))
    assert replied.versions
    await reply.parts.aclose()
    assert server.runtimes[0].statistics().num_waiting == 0
    released.set()
    assert await server.drain(timeout=10.0), "nothing counts as under way any more"


async def test_one_of_two_messages_may_leave(node: ServingNode, server: TesseractServer) -> None:
    released = threading.Event()
    holding = asyncio.create_task(server.runtimes[0].call(lambda: released.wait(60)))
    await asyncio.sleep(0)
    wave = Wave()
    replies = [Reply(node, *wave.request(torch.ones(5, 4))) for _ in range(2)]
    tasks = [asyncio.create_task(anext(one.parts)) for one in replies]
    await asyncio.sleep(0)
    tasks[0].cancel()
    await asyncio.gather(tasks[0], return_exceptions=True)
    await replies[0].parts.aclose()
    released.set()
    await holding
    replies[1].take(await tasks[1])
    assert (await replies[1].all()).versions == dict.fromkeys(UIDS, 1)


async def test_a_follower_names_the_primary_and_the_others_step(node: ServingNode) -> None:
    class Elsewhere(Succession):
        async def find_primary(self, uid: str) -> Any:
            return PEER, 2.0

    settings = ServerSettings(drain_timeout=0.0)
    experts = {uid: make_backend(0) for uid in UIDS}
    async with TesseractServer(node, experts, settings=settings, followers=["ffn.1"]) as server:  # type: ignore[arg-type]
        server.succession = Elsewhere()
        wave = Wave()
        assert set((await forward(node, wave)).versions) == set(UIDS)
        replied = await backward(node, wave, torch.ones(5, 4))
        error = replied.failures["ffn.1"]
        assert isinstance(error, NotPrimary) and (error.primary, error.retry_after) == (PEER, 2.0)
        assert replied.versions == {"ffn.0": 1, "ffn.2": 1}


async def test_a_server_that_has_lost_its_lease_tells_of_no_step(node: ServingNode, server: TesseractServer) -> None:
    class Lost(Succession):
        asked = 0

        def may_step(self, uid: str) -> bool:
            self.asked += 1
            return self.asked <= 3  # before each step, not after it

    server.succession = Lost()
    replied = await backward(node, Wave(), torch.ones(5, 4))
    assert all(isinstance(error, NotPrimary) for error in replied.failures.values()) and len(replied.failures) == 3


async def test_a_server_that_rests_takes_no_forwards_but_backwards(node: ServingNode, server: TesseractServer) -> None:
    wave = Wave()
    await forward(node, wave)
    await server.pause("resting", retry_after=5.0)
    refused = await forward(node, Wave())
    assert all(isinstance(error, Overloaded) and error.retry_after == 5 for error in refused.failures.values())
    assert (await backward(node, wave, torch.ones(5, 4))).versions == dict.fromkeys(UIDS, 1)


async def test_who_may_not_ask_for_an_expert_is_told_so(node: ServingNode, server: TesseractServer) -> None:
    asked: list[tuple[str, str]] = []

    def check(call: IncomingCall, uid: str) -> None:
        asked.append((call.method, uid))
        if uid == "ffn.1":
            raise NotAllowed("not you")

    node.check = check
    assert set((await forward(node, Wave())).failures) == {"ffn.1"}
    replied = await backward(node, Wave(), torch.ones(5, 4))
    assert isinstance(replied.failures["ffn.1"], NotAllowed) and server.experts["ffn.1"].version == 0
    assert asked == [(method, uid) for method in (messages.FORWARD, messages.BACKWARD) for uid in UIDS]


async def test_codecs_are_checked_for_each_expert(node: ServingNode) -> None:
    lossless = make_backend(0, codecs=CodecPolicy(outputs=("none",), gradients=("none",)))
    experts = {"ffn.0": lossless, "ffn.1": make_backend(1)}
    async with TesseractServer(node, experts, settings=ServerSettings(drain_timeout=0.0)):  # type: ignore[arg-type]
        wave = Wave()
        request, tensors = wave.request(only=UIDS[:2], reply_codec="bf16")
        reply = Reply(node, request, tensors)
        part, buffers = apply.decode_part(*(await anext(reply.parts)), request)
        assert isinstance(dict(part.failures)[0], SchemaMismatch) and part.experts.tolist() == [1]
        assert part.tensors[0][2] == "bf16" and len(buffers[0]) == 2 * 2 * 4
        await reply.parts.aclose()
        replied = await backward(node, wave, torch.ones(5, 4), only=UIDS[:2], reply_codec="bf16")
        assert isinstance(replied.failures["ffn.0"], SchemaMismatch)


async def test_a_remembered_answer_is_not_given_in_a_codec_that_is_not_known(
    node: ServingNode, server: TesseractServer
) -> None:
    wave, gradient = Wave(), torch.ones(5, 4)
    await forward(node, wave)
    assert not (await backward(node, wave, gradient)).failures
    wave.kept = None
    replied = await backward(node, wave, gradient, reply_codec="float99")
    assert len(replied.failures) == 3
    assert all(isinstance(error, SchemaMismatch) for error in replied.failures.values())
    assert [one.version for one in server.experts.values()] == [1, 1, 1]


async def test_an_id_that_came_with_other_rows_is_refused(node: ServingNode, server: TesseractServer) -> None:
    wave = Wave()
    await backward(node, wave, torch.ones(5, 4))
    wave.pairs = {uid: {**pairs, 3: 1.0} if uid == "ffn.0" else pairs for uid, pairs in wave.pairs.items()}
    replied = await backward(node, wave, torch.ones(5, 4))
    assert "under this id" in str(replied.failures["ffn.0"]) and len(replied.versions) == 2
    single = await node.backward("ffn.1", [torch.zeros(2, 8)], [torch.ones(2, 4)], call_id=b"s" * 16)
    assert single is not None
    wave.ids["ffn.1"] = b"s" * 16
    replied = await backward(node, wave, torch.ones(5, 4))
    assert "under this id" in str(replied.failures["ffn.1"])


@pytest.mark.parametrize("width, dtype", [(9, torch.float32), (8, torch.float64)])
async def test_a_block_that_does_not_fit_is_said_of_each_expert(
    node: ServingNode, server: TesseractServer, width: int, dtype: torch.dtype
) -> None:
    replied = await forward(node, Wave(x=torch.zeros(5, width, dtype=dtype)))
    assert all(isinstance(error, SchemaMismatch) for error in replied.failures.values()) and len(replied.failures) == 3
    for gradient in (torch.zeros(5, 3), torch.zeros(5, 4, dtype=torch.float64)):
        replied = await backward(node, Wave(), gradient)
        assert all(isinstance(error, SchemaMismatch) for error in replied.failures.values())
    assert [one.version for one in server.experts.values()] == [0, 0, 0]


async def test_an_expert_of_another_schema_fails_alone(node: ServingNode) -> None:
    wide = ExpertBackend(nn.Linear(9, 4), args_schema=(TensorSpec((9,)),))
    whole = ExpertBackend(nn.Identity(), args_schema=(TensorSpec((8,), torch.int64),))
    experts = {"ffn.0": make_backend(0), "ffn.1": wide, "ffn.2": make_backend(2), "ffn.3": whole}
    async with TesseractServer(node, experts, settings=ServerSettings(drain_timeout=0.0)):  # type: ignore[arg-type]
        wave = Wave()
        replied = await forward(node, wave)
        assert isinstance(replied.failures["ffn.1"], SchemaMismatch) and set(replied.versions) == {"ffn.0", "ffn.2"}
        replied = await backward(node, wave, torch.ones(5, 4))
        assert isinstance(replied.failures["ffn.1"], SchemaMismatch) and set(replied.versions) == {"ffn.0", "ffn.2"}
        numbers = Wave(x=torch.ones(5, 8, dtype=torch.int64), pairs={"ffn.3": {0: 1.0}})
        replied = await forward(node, numbers)
        assert "whole numbers" in str(replied.failures["ffn.3"])


async def test_malformed_messages_are_refused_as_a_whole(node: ServingNode, server: TesseractServer) -> None:
    request, tensors = Wave().request()
    for changes in (
        {"offsets": np.array([0, 3, 5, 8])},
        {"rows": request.rows + 3},
        {"tensors": [["float32", [5, 9], "none"]]},
        {"tensors": [["float99", [5, 8], "none"]]},
        {"tensors": [["float64", [5, 8], "uint8"]]},
    ):
        with pytest.raises(RemoteError):
            await Reply(node, request._replace(**changes), tensors).all()
    assert not (await forward(node, Wave())).failures


async def test_dropout_draws_the_same_in_backward(node: ServingNode) -> None:
    class Drops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4))
            self.drop = nn.Dropout(0.5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.drop(x[:, :4] * self.scale)

    backend = ExpertBackend(
        module := Drops(), optimizer=torch.optim.SGD(module.parameters(), lr=0.0), args_schema=(TensorSpec((8,)),)
    )
    async with TesseractServer(node, {"ffn.0": backend}, settings=ServerSettings(drain_timeout=0.0)):  # type: ignore[arg-type]
        wave = Wave(x=torch.ones(5, 8), pairs={"ffn.0": dict.fromkeys(range(5), 1.0)})
        replied = await forward(node, wave, training=True, seed=7)
        assert 0 < (replied.total == 0).sum() < 20
        gradients = await backward(node, wave, torch.ones(5, 4), training=True, seed=7)
        torch.testing.assert_close(gradients.total[:, :4], replied.total)
        torch.testing.assert_close(torch.tensor(list(gradients.weights.values())), replied.total.sum(1))


async def test_the_backwards_of_answered_forwards_are_waited_for(node: ServingNode) -> None:
    experts = {uid: make_backend(0) for uid in UIDS}
    async with TesseractServer(node, experts, settings=ServerSettings(drain_timeout=0.0)) as server:  # type: ignore[arg-type]
        wave = Wave()
        await forward(node, wave)
        draining = asyncio.create_task(server.drain(timeout=30.0))
        while node.declared:  # noqa: ASYNC110 (they are withdrawn first)
            await asyncio.sleep(0)
        for uid in UIDS:
            for _ in range(20):
                await asyncio.sleep(0)
            assert not draining.done()
            one = Wave(x=wave.x, pairs={uid: wave.pairs[uid]}, ids=wave.ids)
            assert not (await backward(node, one, torch.ones(5, 4))).failures
        assert await draining


@pytest.mark.both_loops
async def test_over_the_network_the_caller_may_leave_at_any_point_and_nothing_steps_twice() -> None:
    experts = {uid: make_backend(0) for uid in UIDS}
    settings = ServerSettings(drain_timeout=0.0)
    async with ta.TesseractNode() as host, TesseractServer(host, experts, settings=settings) as server:
        begun, released = threading.Event(), threading.Event()

        def waits(y: torch.Tensor) -> torch.Tensor:
            begun.set()
            released.wait(60)
            return y

        server.experts["ffn.2"].module.answers = waits  # type: ignore[assignment]
        wave, identity = Wave(), Identity.generate()
        async with ta.TesseractNode(initial_peers=[host.address], identity=identity) as guest:
            through = partial(guest.endpoint.call_parts, host.peer_address, apply.APPLY, timeout=60.0)
            lost = Reply(None, *wave.request(torch.ones(5, 4)), through=through)
            await lost.until("ffn.0", "ffn.1")
            await asyncio.to_thread(begun.wait, 60)
        with pytest.raises(ConnectionLost):
            await anext(lost.parts)
        released.set()
        async with ta.TesseractNode(initial_peers=[host.address], identity=identity) as guest:
            through = partial(guest.endpoint.call_parts, host.peer_address, apply.APPLY, timeout=60.0)
            replied = await Reply(None, *wave.request(torch.ones(5, 4)), through=through).all()
            assert replied.versions == dict.fromkeys(UIDS, 1) and not replied.failures
            with pytest.raises(RemoteError, match="does not hold|malformed|prefix"):
                _, tensors = wave.request()
                _, buffers = wire.pack_tensors(tensors)
                await anext(through(["ffn"], buffers))
            with pytest.raises(RemoteError, match="parts"):
                body, first = apply.encode_request(wave.request()[0])
                await guest.endpoint.call(host.peer_address, apply.APPLY, body, [*first, *buffers], timeout=60.0)
        assert [one.version for one in experts.values()] == [1, 1, 1]
        assert await server.drain(timeout=30.0)
        assert server.runtimes[0].statistics().num_bytes == 0


async def test_policies_and_quotas_hold_for_each_expert() -> None:
    guest_identity = Identity.generate()
    async with ta.TesseractNode(policy=ta.Policy(trainers=[])) as host:
        settings = ServerSettings(drain_timeout=0.0)
        experts = {uid: make_backend(0) for uid in UIDS}
        async with (
            TesseractServer(host, experts, settings=settings),
            ta.TesseractNode(initial_peers=[host.address], identity=guest_identity) as guest,
        ):
            through = partial(guest.endpoint.call_parts, host.peer_address, apply.APPLY, timeout=60.0)
            assert len((await Reply(None, *Wave().request(), through=through).all()).versions) == 3
            replied = await Reply(None, *Wave().request(torch.ones(5, 4)), through=through).all()
            assert len(replied.failures) == 3
            assert all(isinstance(error, NotAllowed) for error in replied.failures.values())
            assert [one.version for one in experts.values()] == [0, 0, 0]
            host.endpoint.policy = ta.Policy(quota=ta.Quota(calls=3, period=1000.0))
            replied = await Reply(None, *Wave().request(), through=through).all()
            assert set(replied.versions) == {"ffn.0", "ffn.1"}, "the message is the first call"
            error = replied.failures["ffn.2"]
            assert isinstance(error, Overloaded) and 300 < error.retry_after < 340
