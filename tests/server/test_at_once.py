"""A small ``expert.apply`` for experts of one kind is one work, and keeps what is promised of shares of a message."""

import asyncio
import itertools
import os
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import torch
from torch import nn

from tesseract_async.endpoint.endpoint import IncomingCall
from tesseract_async.endpoint.handlers import Deferred
from tesseract_async.errors import ExpertFailed, Overloaded
from tesseract_async.runtime.backend import ExpertBackend
from tesseract_async.server.server import ServerSettings, TesseractServer
from tesseract_async.wire import apply
from tesseract_async.wire import tensors as wire
from tesseract_async.wire.apply import ApplyPart, ApplyRequest
from tesseract_async.wire.tensors import TensorSpec
from tests.server.serving_node import PEER, ServingNode

WIDTH, NUM_EXPERTS = 8, 4
PAIRS = {0: {0: 0.5, 1: 2.0}, 1: {1: -1.0}, 3: {0: 1.5, 2: 3.0}}
"""By expert, the weights of its rows."""


def make_module(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(WIDTH, 16), nn.Tanh(), nn.Linear(16, 4))


@pytest.fixture
def node() -> ServingNode:
    return ServingNode()


@pytest_asyncio.fixture
async def server(node: ServingNode) -> AsyncIterator[TesseractServer]:
    experts = {
        f"ffn.{number}": ExpertBackend(make_module(number), args_schema=(TensorSpec((WIDTH,)),))
        for number in range(NUM_EXPERTS)
    }
    async with TesseractServer(node, experts, settings=ServerSettings(drain_timeout=0.0)) as server:  # type: ignore[arg-type]
        for _ in range(100):  # until their passes were compared with each alone
            answer, request, x = asked(node)
            await taken(answer, request)
            if isinstance(answer, Deferred):
                break
        else:
            raise AssertionError("no message was answered at once")
        yield server


def asked(
    node: ServingNode, pairs: dict[int, dict[int, float]] = PAIRS, *, num_rows: int = 3, **fields: Any
) -> tuple[Any, ApplyRequest, torch.Tensor]:
    """`fields`: those of the request that are not as usual; in a backward, the tensor is the gradient."""
    x = torch.randn(num_rows, 4 if fields.get("backward") else WIDTH)
    metas, buffers = wire.pack_tensors([x])
    request = ApplyRequest(
        prefix="ffn",
        experts=np.array([[expert] for expert in pairs], dtype=np.uint32),
        ids=[os.urandom(16) for _ in pairs],
        versions=np.zeros(len(pairs), dtype=np.int64),
        offsets=np.cumsum([0, *map(len, pairs.values())]),
        rows=np.array([row for one in pairs.values() for row in one], dtype=np.int32),
        weights=np.array([weight for one in pairs.values() for weight in one.values()], dtype=np.float32),
        tensors=metas,
        num_inputs=1,
        backward=False,
        training=False,
        keep=False,
        seed=0,
        reply_codec="none",
    )._replace(**fields)
    body, numbers = apply.encode_request(request)
    received = tuple(memoryview(bytearray(one)) for one in (*numbers, *buffers))
    deadline = asyncio.get_running_loop().time() + 10.0
    call = IncomingCall(PEER, apply.APPLY, body, received, deadline, 0, in_parts=True)
    return node.together[0](call), request, x


async def taken(answer: Any, request: ApplyRequest) -> list[tuple[ApplyPart, torch.Tensor | None]]:
    messages = [await answer] if isinstance(answer, Deferred) else [message async for message in answer]
    found = []
    for message in messages:
        part, buffers = apply.decode_part(message.body, message.buffers, request)
        sums = wire.unpack_tensors(part.tensors, buffers)
        found.append((part, sums[0] if sums else None))
    return found


def by_hand(x: torch.Tensor, pairs: dict[int, dict[int, float]]) -> torch.Tensor:
    total = torch.zeros(len(x), 4)
    for expert, rows in pairs.items():
        for row, weight in rows.items():
            total[row] += weight * make_module(expert)(x[row]).detach()
    return total


async def test_it_is_the_weighted_sum_and_a_call_of_each_expert(node: ServingNode, server: TesseractServer) -> None:
    runtime = server.runtimes[0]
    before = {uid: (runtime.figures[one].num_calls, runtime.rows_of(one)[0]) for uid, one in server.experts.items()}
    answer, request, x = asked(node)
    assert isinstance(answer, Deferred)
    ((part, sums),) = await taken(answer, request)
    assert part.experts.tolist() == [0, 1, 2] and part.versions.tolist() == [0, 0, 0] and not part.failures
    torch.testing.assert_close(sums, by_hand(x, PAIRS), rtol=0, atol=1e-5)
    for number, uid in enumerate(server.experts):
        calls, rows = before[uid]
        backend, expected = server.experts[uid], PAIRS.get(number, {})
        assert runtime.figures[backend].num_calls == calls + bool(expected), uid
        assert runtime.rows_of(backend) == (rows + len(expected), 0), uid


async def test_a_forward_in_training_is_kept_and_its_backward_awaited(
    node: ServingNode, server: TesseractServer
) -> None:
    for _ in range(100):  # passes in training mode are compared with each alone, too
        answer, request, x = asked(node, training=True, keep=True)
        part, sums = (await taken(answer, request))[0]
        if isinstance(answer, Deferred):
            break
        ending, *_ = asked(node, training=True, backward=True, kept=part.kept, num_inputs=0, ids=request.ids)
        assert [part async for part in ending]
    assert isinstance(answer, Deferred) and sums is not None and part.kept is not None
    torch.testing.assert_close(sums, by_hand(x, PAIRS), rtol=0, atol=1e-5)
    draining = asyncio.create_task(server.drain(timeout=60.0))
    for _ in range(20):
        await asyncio.sleep(0)
    assert not draining.done(), "a backward of each of them is to come"
    ending, backward, gradient = asked(
        node, training=True, backward=True, kept=part.kept, num_inputs=0, ids=request.ids
    )
    found = torch.zeros(3, WIDTH)
    for part, sums in await taken(ending, backward):
        assert sums is not None
        found[torch.from_numpy(backward.rows_of(part.experts)).long()] += sums
    assert await draining
    rows = x.clone().requires_grad_()
    total = torch.zeros(3, 4)
    for expert, own in PAIRS.items():
        for row, weight in own.items():
            total[row] += weight * make_module(expert)(rows[row])
    torch.testing.assert_close(found, *torch.autograd.grad(total, rows, gradient), rtol=0, atol=1e-5)


async def test_a_row_that_no_expert_sees_is_not_answered(node: ServingNode, server: TesseractServer) -> None:
    """The caller counts on a row for each that is seen; and few pairs must not fetch many rows."""
    pairs = {0: {1: 1.0}, 3: {3: 2.0}}
    answer, _, _ = asked(node, {0: {1: 1.0}, 3: {0: 2.0}}, num_rows=2)
    assert isinstance(answer, Deferred)
    await answer
    answer, request, x = asked(node, pairs, num_rows=1000)
    parts = await taken(answer, request)
    total = torch.zeros(1000, 4)
    for part, sums in parts:
        assert sums is not None and len(sums) == len(request.rows_of(part.experts))
        total[torch.from_numpy(request.rows_of(part.experts)).long()] += sums
    torch.testing.assert_close(total[[1, 3]], by_hand(x, pairs)[[1, 3]], rtol=0, atol=1e-5)


async def test_an_expert_at_fault_is_named_and_none_counts_twice(node: ServingNode, server: TesseractServer) -> None:
    runtime = server.runtimes[0]
    with torch.no_grad():
        next(server.experts["ffn.1"].module.parameters())[0, 0] = torch.nan
    before = [runtime.figures[one].num_calls for one in server.experts.values()]
    rows = [runtime.rows_of(one)[0] for one in server.experts.values()]
    answer, request, x = asked(node)
    assert isinstance(answer, Deferred)
    ((part, sums),) = await taken(answer, request)
    assert [(place, type(error)) for place, error in part.failures] == [(1, ExpertFailed)]
    healthy = {expert: own for expert, own in PAIRS.items() if expert != 1}
    assert sums is not None
    torch.testing.assert_close(sums, by_hand(x, healthy), rtol=0, atol=1e-5)
    # one pass of all, whose sum told of a fault, and one call of each
    assert [runtime.figures[one].num_calls for one in server.experts.values()] == [
        calls + 2 * (number in PAIRS) for number, calls in enumerate(before)
    ]
    assert [runtime.rows_of(one)[0] for one in server.experts.values()] == [
        count + 2 * len(PAIRS.get(number, ())) for number, count in enumerate(rows)
    ]


async def test_an_expert_that_has_changed_is_computed_apart_and_counts_once(
    node: ServingNode, server: TesseractServer
) -> None:
    runtime = server.runtimes[0]
    server.experts["ffn.1"].module.register_forward_hook(lambda module, args, y: 2 * y)
    before = [runtime.figures[one].num_calls for one in server.experts.values()]
    answer, request, x = asked(node)
    assert isinstance(answer, Deferred)
    ((part, sums),) = await taken(answer, request)
    assert not part.failures and sums is not None
    twice = PAIRS | {1: {1: 2 * PAIRS[1][1]}}
    torch.testing.assert_close(sums, by_hand(x, twice), rtol=0, atol=1e-5)
    after = [runtime.figures[one].num_calls for one in server.experts.values()]
    assert after == [calls + (number in PAIRS) for number, calls in enumerate(before)]


async def test_a_pass_that_would_take_long_is_made_in_shares(
    node: ServingNode, server: TesseractServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All others would wait for its end."""
    seconds = itertools.count(0.0, 10.0)
    monkeypatch.setattr(time, "thread_time", lambda: next(seconds))  # the processor's, as long as it computes
    await taken(*asked(node)[:2])
    await server.runtimes[0].call(int)  # by now it has learned from it
    answer, request, x = asked(node)
    assert not isinstance(answer, Deferred)
    total = sum(sums for _, sums in await taken(answer, request) if sums is not None)
    torch.testing.assert_close(total, by_hand(x, PAIRS), rtol=0, atol=1e-5)


async def test_its_memory_counts_as_its_callers_and_leaving_drops_it(
    node: ServingNode, server: TesseractServer
) -> None:
    runtime, released = server.runtimes[0], threading.Event()
    holding = asyncio.create_task(runtime.call(lambda: released.wait(60)))
    await asyncio.sleep(0)
    try:
        before = runtime.statistics()
        answer, request, x = asked(node)
        assert isinstance(answer, Deferred)
        held = runtime.statistics()
        assert held.num_bytes - before.num_bytes >= x.nbytes + len(request.rows) * (WIDTH + 4) * 4
        assert held.num_waiting == before.num_waiting + 1
        answer.cancel()
        assert runtime.statistics().num_bytes == before.num_bytes
        assert not runtime.statistics().num_waiting
    finally:
        released.set()
    await holding
    assert await server.drain(timeout=10.0), "it is over"


async def test_no_backward_is_awaited_of_an_expert_that_is_not_here_any_more(
    node: ServingNode, server: TesseractServer
) -> None:
    answer, request, _ = asked(node, {1: {0: 1.0}}, num_rows=1, training=True, keep=True)
    assert await taken(answer, request)
    await server.remove("ffn.1")
    assert await server.drain(timeout=60.0)


async def test_an_expert_that_is_removed_during_its_pass_is_let_go(node: ServingNode, server: TesseractServer) -> None:
    runtime, released, backend = server.runtimes[0], threading.Event(), server.experts["ffn.1"]
    holding = asyncio.create_task(runtime.call(lambda: released.wait(60)))
    await asyncio.sleep(0)
    answer, request, _ = asked(node)
    alone, single, _ = asked(node, {1: {0: 1.0}}, num_rows=1, training=True)
    waiting = asyncio.create_task(taken(alone, single))
    assert isinstance(answer, Deferred)
    await asyncio.sleep(0)
    await server.remove("ffn.1")
    released.set()
    ((part, _),) = await taken(answer, request)
    assert not part.failures and await waiting
    await holding
    await runtime.call(lambda: None)
    assert backend not in runtime.figures


async def test_a_server_that_closes_says_so_of_each_expert(node: ServingNode, server: TesseractServer) -> None:
    runtime, released = server.runtimes[0], threading.Event()
    holding = asyncio.create_task(runtime.call(lambda: released.wait(60)))
    await asyncio.sleep(0)
    answer, request, _ = asked(node)
    assert isinstance(answer, Deferred)
    closing = asyncio.create_task(runtime.aclose())
    await asyncio.sleep(0)
    released.set()
    ((part, _),) = await taken(answer, request)
    assert len(part.failures) == 3 and all(isinstance(error, Overloaded) for _, error in part.failures)
    await closing
    await holding
