"""Who answers is not left out, not in a first pass, on a busy machine or by a stalled loop; who is, is counted."""

import asyncio
import itertools
import logging
import random
import time
from typing import Any

import pytest
import torch

import tesseract_async as ta
from tesseract_async.client.autograd import backward
from tesseract_async.client.experience import LOOK_EVERY_SECONDS, LeftOut, Stalls
from tesseract_async.client.gating_function import GatingFunction
from tesseract_async.errors import ConnectionLost, ExpertFailed, PeerUnreachable
from tesseract_async.metrics import Metrics
from tesseract_async.wire.messages import BACKWARD, FORWARD, INFO
from tests.client.fake_node import FakeNode, Slope, gate_with
from tests.client.virtual_time import in_made_up_time

GRID = (4, 4)


def make_swarm() -> FakeNode:
    torch.manual_seed(3)
    node = FakeNode()
    for i, j in itertools.product(*map(range, GRID)):
        node.host(f"ffn.{i}.{j}", Slope(1.0 + i + j))
    return node


def make_gate(node: FakeNode, **settings: Any) -> GatingFunction:
    return gate_with(node, "ffn", grid_size=GRID, in_features=8, **{"k_best": 2, **settings})


async def step(node: FakeNode, gate: GatingFunction) -> int:
    """A pass forth and back; how many experts' gradients arrived."""
    x = torch.randn(16, 8)
    mixed = await gate.mix(x)
    before = sum(hosted.num_backwards for hosted in node.hosted.values())
    assert (mixed.num_answers >= 2).all() and not mixed.errors
    await backward(mixed.output.square().mean())
    return sum(hosted.num_backwards for hosted in node.hosted.values()) - before


@in_made_up_time
async def test_fresh_gates_lose_nobody_whatever_keeps_the_answers() -> None:
    """Thirty gates made one after another; a first pass of 2.5 s, and now and then a second in which nothing moves."""
    node, dice, seen = make_swarm(), random.Random(1), set()

    def seconds(uid: str) -> float:
        if uid not in seen:
            seen.add(uid)
            return dice.uniform(0.5, 2.5)
        return 0.9 if dice.random() < 0.05 else dice.uniform(0.001, 0.004)

    node.delay = seconds
    for _ in range(30):
        gate = make_gate(node)
        for _ in range(3):
            assert await step(node, gate) >= 2
    assert node.metrics.total("answers_left_out") == 0 and not node.directory.masked and node.num_cancelled == 0


@pytest.mark.parametrize("way", [FORWARD, BACKWARD])
@in_made_up_time
async def test_a_loop_that_stood_still_blames_nobody(way: str) -> None:
    node, loop = make_swarm(), asyncio.get_running_loop()
    node.delay = 0.01
    gate = make_gate(node)
    for _ in range(20):
        await step(node, gate)

    async def fault(method: str, uid: str, number: int) -> None:
        if method == way:
            await asyncio.sleep(0.002)
            if stalls:
                loop.clock.run(stalls.pop())  # type: ignore[attr-defined]

    node.fault = fault
    for seconds in (0.3, 4.0, 12.0):
        stalls = [seconds]
        await step(node, gate)
    assert node.metrics.total("answers_left_out") == 0 and not node.directory.masked and not node.directory.late
    assert way == FORWARD or node.num_cancelled == 0, "there are no stand-ins in backward"


@in_made_up_time
async def test_those_that_are_late_together_are_given_time_until_one_has_answered() -> None:
    """As in one server's queue: within a pass all take equally long, and in another one up to four times that."""
    node = make_swarm()
    gate = make_gate(node)
    for number in range(24):
        if number == 12:
            node.calls.clear()
        node.delay = 0.05 * (1 + number % 4)
        await step(node, gate)
    assert sum(asked.num_rows for asked in node.calls if asked.method == FORWARD) == 12 * 16 * 2, "no third expert"
    patience = node.client_state.patience("forward", gate.settings)  # type: ignore[attr-defined]
    assert patience.beside_others < 0.6 < 1.0 < patience.alone


@in_made_up_time
async def test_one_that_hangs_in_every_pass_is_waited_for_once_and_each_time_counted() -> None:
    node, loop = make_swarm(), asyncio.get_running_loop()
    node.delay = 0.05
    gate = make_gate(node, k_best=4, forward_timeout=15.0)
    for _ in range(10):
        await step(node, gate)
    dice = random.Random(2)

    async def fault(method: str, uid: str, number: int) -> None:
        draw = dice.random()
        if method != INFO and draw < 0.05:
            await asyncio.Event().wait()
        if method == FORWARD and draw > 0.95:
            raise ExpertFailed("script")

    node.fault = fault
    taken = []
    num_left_out = 0
    for _ in range(40):
        began = loop.time()
        mixed = await gate.mix(torch.randn(16, 8))
        num_left_out += len(mixed.errors)
        await backward(mixed.output.square().mean())
        taken.append(loop.time() - began)
        node.directory.forgive()
    assert max(taken) < 2.5, "the whole time-out is never waited"
    assert sum(taken[5:]) / len(taken[5:]) < 0.16
    counters = {
        dict(labels)["way"] + "/" + dict(labels)["reason"]: int(count)
        for (name, labels), count in node.metrics.counters.items()
        if name == "answers_left_out"
    }
    assert counters.keys() == {"forward/late", "forward/ExpertFailed", "backward/late"}
    assert counters["forward/late"] + counters["forward/ExpertFailed"] >= num_left_out > 10


@in_made_up_time
async def test_who_was_late_for_moments_only_is_not_masked() -> None:
    """Three strikes of a twentieth of a second each say little; a second of silence says more."""
    node = make_swarm()
    node.delay = 0.02
    gate = make_gate(node, patience=0.5, refill=False)
    for _ in range(10):
        await step(node, gate)
    node.delay = lambda uid: 60.0 if uid == "ffn.1.1" else 0.02
    x = torch.randn(32, 8)
    num_passes = 0
    with torch.no_grad():
        while not node.directory.masked:
            await gate(x)
            num_passes += 1
    assert {replica.uid for _, replica in node.directory.masked} == {"ffn.1.1"} and 10 < num_passes < 30


@in_made_up_time
async def test_what_is_left_out_is_said_once_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    metrics = Metrics()
    left_out = LeftOut(metrics)
    left_out.note("forward", {})
    for _ in range(90):
        left_out.note("forward", {"f.0": TimeoutError("late"), "f.1": ExpertFailed("no")})
        left_out.note("backward", {"f.0": TimeoutError("late")})
        await asyncio.sleep(1.0)
    first, second = [record.getMessage() for record in caplog.records]
    assert first == "gates went on without 2 answers: f.1: ExpertFailed: no; f.0: TimeoutError: late"
    assert second.startswith("gates went on without 120 answers and 60 gradients: ")
    assert metrics.total("answers_left_out") == 270


@in_made_up_time
async def test_servers_that_are_gone_are_no_warning_and_hide_none(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    left_out = LeftOut(Metrics())
    left_out.note("forward", {"f.0": PeerUnreachable("aa", {}), "f.1": ConnectionLost("bb", "gone")})
    left_out.note("backward", {"f.0": ConnectionLost("aa", "gone"), "f.2": TimeoutError("late")})
    said = [(record.levelname, record.getMessage().split(": ")[0]) for record in caplog.records]
    assert said == [
        ("INFO", "gates went on without 2 answers"),
        ("WARNING", "gates went on without 1 gradient"),
    ]


async def test_fresh_gates_beside_their_server_lose_nobody() -> None:
    """Server and trainer in one process and on one loop, which stands still now and then."""
    experts = {}
    for number in range(2):
        module = torch.nn.Sequential(torch.nn.Linear(32, 256), torch.nn.ReLU(), torch.nn.Linear(256, 32))
        experts[f"ffn.{number}"] = ta.ExpertBackend(
            module, optimizer=torch.optim.SGD(module.parameters(), lr=0.01), args_schema=(ta.TensorSpec((32,)),)
        )

    async def block() -> None:
        while True:
            await asyncio.sleep(0.02)
            time.sleep(0.05)  # noqa: ASYNC251 (that is the point)

    async with ta.TesseractNode() as node, ta.TesseractServer(node, experts):
        blocking = asyncio.create_task(block())
        for _ in range(10):
            gate = GatingFunction(node, uid_prefix="ffn", grid_size=(2,), in_features=32, k_best=2)
            mixed = await gate.mix(torch.randn(64, 32))
            assert (mixed.num_answers == 2).all()
            await ta.backward(mixed.output.square().mean())
        blocking.cancel()
        await asyncio.wait([blocking])
        assert node.metrics.total("answers_left_out") == 0
    assert [backend.version for backend in experts.values()] == [10, 10]


@in_made_up_time
async def test_what_the_loop_stood_still_is_counted_while_somebody_watches() -> None:
    loop: Any = asyncio.get_running_loop()
    stalls = Stalls()
    loop.clock.run(3.0)
    assert stalls.seconds == 0.0
    with stalls.watching():
        await asyncio.sleep(10 * LOOK_EVERY_SECONDS)
        assert abs(stalls.seconds) < 1e-9
        loop.clock.run(2.0)
        assert 2.0 - LOOK_EVERY_SECONDS <= stalls.seconds <= 2.0, "at once, before any timer had its turn"
        with stalls.watching():
            await asyncio.sleep(1.0)
        assert 2.0 - LOOK_EVERY_SECONDS <= stalls.seconds <= 2.0
        await asyncio.sleep(LOOK_EVERY_SECONDS / 2)
        loop.clock.run(1.0)
    counted = stalls.seconds
    assert 3.0 - 2 * LOOK_EVERY_SECONDS <= counted <= 3.0
    loop.clock.run(5.0)
    await asyncio.sleep(1.0)
    assert stalls.seconds == counted
