"""A small pass without gradients is the weighted sum, whatever happens to it on its straight way."""

import asyncio
import contextlib
import dataclasses
import gc
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn

import tesseract_async as ta
from tesseract_async.client.dispatch import StrictForward
from tesseract_async.client.experience import Experience, replica_key
from tesseract_async.client.expert_rpc import ExpertSchema
from tesseract_async.client.failover import HEDGE_SECONDS
from tesseract_async.client.settings import DEFAULT_OPTIONS
from tesseract_async.client.straight import Servers, Straight, questions
from tesseract_async.endpoint.events import CallFailed, PartReceived, ReplyReceived
from tesseract_async.errors import ConnectionLost, ExpertFailed, NotEnoughExperts
from tesseract_async.metrics import Metrics
from tesseract_async.wire.apply import ApplyPart, decode_request, encode_part
from tesseract_async.wire.codecs import CodecPolicy
from tesseract_async.wire.tensors import TensorSpec, pack_tensors
from tests.client.fake_node import FakeReplica
from tests.client.virtual_time import in_made_up_time
from tests.faults.serving import let_pass
from tests.watching import watched

NUM_EXPERTS, WIDTH, ROWS = 6, 8, 3


class Sour(nn.Module):
    """Answers what is not a number where the first of a row is above 100, while all of them are let."""

    goes_on = threading.Event()
    goes_on.set()

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self.goes_on.wait(60)
        y: torch.Tensor = self.inner(x)
        return torch.where(x[:, :1] > 100, torch.nan, y)


def modules() -> dict[int, Sour]:
    torch.manual_seed(0)
    return {number: Sour() for number in range(NUM_EXPERTS)}


@contextlib.contextmanager
def swarm(hosts: list[list[int]]) -> Iterator[tuple[ta.BackgroundNode, list[ta.BackgroundNode]]]:
    """A node, and servers that host these frozen experts."""
    with contextlib.ExitStack() as stack:
        servers: list[ta.BackgroundNode] = []
        for numbers in hosts:
            server = ta.BackgroundNode(initial_peers=[one.address for one in servers[:1]])
            servers.append(stack.enter_context(server))
            backends = {
                f"m.0.{number}": ta.ExpertBackend(module, args_schema=(TensorSpec((WIDTH,)),))
                for number, module in modules().items()
                if number in numbers
            }
            stack.enter_context(server.entered(ta.TesseractServer(server.node, backends)))
        yield stack.enter_context(ta.BackgroundNode(initial_peers=[one.address for one in servers])), servers


def local(x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    own = modules()
    rows = zip(x, index.tolist(), weights, strict=True)
    with torch.no_grad():
        return torch.stack(
            [sum(w * own[e](row[None])[0] for e, w in zip(experts, by, strict=True)) for row, experts, by in rows]
        )


def routed(num_rows: int, k: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    made = torch.Generator().manual_seed(seed)
    index = torch.stack([torch.randperm(NUM_EXPERTS, generator=made)[:k] for _ in range(num_rows)])
    return torch.randn(num_rows, WIDTH, generator=made), index, torch.randn(num_rows, k, generator=made)


def test_it_is_the_weighted_sum_and_one_message_to_each_server() -> None:
    with swarm([[0, 2, 4], [1, 3, 5]]) as (node, servers):
        pool = ta.ExpertPool(node, "m.0", num_experts=NUM_EXPERTS).eval()
        for seed in range(40):
            x, index, weights = routed(1 + seed % 3, 4, seed)
            before = node.metrics.snapshot().get("expert_calls{method=expert.apply}", 0)
            torch.testing.assert_close(pool.answer(x, index, weights), local(x, index, weights), rtol=0, atol=1e-5)
            asked = node.metrics.snapshot()["expert_calls{method=expert.apply}"] - before
            assert asked == len({int(expert) % 2 for expert in index.unique()})
        tasks: list[int] = []
        loop = node.run(counting_tasks(tasks))
        x, index, weights = routed(1, 4, 1)
        pool.answer(x, index, weights)
        loop.set_task_factory(None)
        assert not tasks, "it goes straight by now"
        gc.collect()
        gc.disable()
        try:
            pool.answer(x, index, weights)
            node.run(asyncio.sleep(0.0))  # the loop lets go of what it has called
            assert not any(isinstance(one, Straight) for one in gc.get_objects()), "a cycle full of tensors"
        finally:
            gc.enable()
        for bad, reason in ((index + NUM_EXPERTS, "numbers 0 to 5"), (index[0], "rows, k")):
            with pytest.raises(ValueError, match=reason):
                pool.answer(x, bad, weights)
        with pytest.raises(ValueError, match="finite"):
            pool.answer(x, index, weights * torch.inf)
        index[0, 1] = index[0, 0]  # named twice
        torch.testing.assert_close(pool.answer(x, index, weights), local(x, index, weights), rtol=0, atol=1e-5)


async def counting_tasks(seen: list[int]) -> asyncio.AbstractEventLoop:
    loop = asyncio.get_running_loop()

    def factory(loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> asyncio.Task[Any]:
        seen.append(1)
        return asyncio.Task(coroutine, loop=loop, **options)

    loop.set_task_factory(factory)  # type: ignore[arg-type]
    return loop


def test_an_expert_at_fault_is_named_and_the_others_go_on() -> None:
    with swarm([[0, 2, 4], [1, 3, 5]]) as (node, _):
        pool = ta.ExpertPool(node, "m.0", num_experts=NUM_EXPERTS).eval()
        x, index, weights = routed(1, NUM_EXPERTS, 1)
        for _ in range(20):
            pool.answer(x, index, weights)
        with pytest.raises(NotEnoughExperts) as caught:
            pool.answer(torch.full((1, WIDTH), 1e3), torch.tensor([[2, 3]]), torch.ones(1, 2))
        assert {*caught.value.errors} and {*caught.value.errors} <= {"m.0.2", "m.0.3"}
        assert all(isinstance(one, ExpertFailed) for one in caught.value.errors.values())
        torch.testing.assert_close(pool.answer(x, index, weights), local(x, index, weights), rtol=0, atol=1e-5)


async def lose(node: ta.TesseractNode) -> None:
    for connection in node.endpoint.pool.connections():
        connection.abort("lost")


def test_a_lost_connection_costs_nothing_but_time() -> None:
    with swarm([[*range(NUM_EXPERTS)], [*range(NUM_EXPERTS)]]) as (node, servers):
        pool = ta.ExpertPool(node, "m.0", num_experts=NUM_EXPERTS, timeout=10.0).eval()
        x, index, weights = routed(1, 4, 1)
        expected = local(x, index, weights)
        for turn in range(12):
            if turn == 8:
                servers[1].run(lose(servers[1].node))
            torch.testing.assert_close(pool.answer(x, index, weights), expected, rtol=0, atol=1e-5)


async def pass_by(seconds: float) -> None:
    let_pass(seconds)


def goes_straight(pool: ta.ExpertPool, *given: torch.Tensor) -> bool:
    with mock.patch.object(pool, "ask", wraps=pool.ask) as asked:
        pool.answer(*given)
    return not asked.called


def test_news_of_the_network_and_other_servers_take_one_pass_at_most_another_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unhurried() -> None:
        monkeypatch.setattr(Straight, "_hedge_after", lambda _: None)  # this machine may be slow

    unhurried()
    with swarm([[*range(NUM_EXPERTS)], [*range(NUM_EXPERTS)]]) as (node, _):
        node.node.directory.refresh_period = 3600.0  # what is news, this test says
        pool = ta.ExpertPool(node, "m.0", num_experts=NUM_EXPERTS).eval()
        given = routed(1, 4, 1)
        for _ in range(8):
            pool.answer(*given)
        assert goes_straight(pool, *given)
        node.run(node.node.directory.refresh("m"))  # as it does every ten seconds
        assert not goes_straight(pool, *given)
        assert goes_straight(pool, *given)
        node.run(pass_by(1.5))  # the fastest server is looked for again
        assert goes_straight(pool, *given) and goes_straight(pool, *given)
        monkeypatch.undo()
        ask = pool.ask

        def ask_and_go_on(*some: Any, **options: Any) -> Any:
            Sour.goes_on.set()
            return ask(*some, **options)

        Sour.goes_on.clear()
        with mock.patch.object(pool, "ask", side_effect=ask_and_go_on) as asked:
            pool.answer(*given)
        assert asked.called, "it took too long"
        unhurried()
        assert goes_straight(pool, *given), "that was no failure"


def test_both_ways_together_keep_the_time_out() -> None:
    with (
        watched(StrictForward.__init__) as seen,
        ta.BackgroundNode() as host,
        ta.BackgroundNode(initial_peers=[host.address]) as node,
    ):
        backends = {"m.0.0": ta.ExpertBackend(modules()[0], args_schema=(TensorSpec((WIDTH,)),))}
        with host.entered(ta.TesseractServer(host.node, backends)) as server:
            pool = ta.ExpertPool(node, "m.0", num_experts=1).eval()
            begun, released = threading.Event(), threading.Event()
            given = torch.ones(1, WIDTH), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1)
            pool.answer(*given)
            assert goes_straight(pool, *given)
            pool._settings = dataclasses.replace(pool._settings, forward_timeout=0.2)

            def block() -> None:
                begun.set()
                released.wait(60)

            blocked = threading.Thread(target=lambda: host.run(server.runtimes[0].call(block)))
            blocked.start()
            try:
                assert begun.wait(60)
                with pytest.raises(NotEnoughExperts, match=r"m\.0\.0"):
                    pool.answer(*given)
            finally:
                released.set()
                blocked.join()
    timeouts = [one.arguments["timeout"] for one in seen.calls]
    assert timeouts[0] == 30.0 and timeouts[-1] == pytest.approx(0.05)


# -- Replies of liars --------------------------------------------------------------------------------------------------


class Wire:
    """A node of which a pass is sent into these lists."""

    def __init__(self) -> None:
        self.sent: list[tuple[Any, Any, Callable[[Any], None]]] = []
        self.num_cancelled = 0
        self.client_state, self.metrics = None, Metrics()
        self.thanked: list[tuple[object, ...]] = []
        self.thanks = SimpleNamespace(add=lambda *given: self.thanked.append(given))
        self.directory = SimpleNamespace(has_doubts=False)

    def path(self, peer: object) -> None:
        return None

    def endpoint_towards(self, *_: object) -> "Wire":
        return self

    def call_into(self, peer: Any, method: str, body: Any, buffers: Any, sink: Any, **_: Any) -> Callable[[], None]:
        self.sent.append((body, [memoryview(bytes(one)) for one in buffers], sink))

        def cancel() -> None:
            self.num_cancelled += 1

        return cancel


def begun(copies: str = "") -> tuple[Straight, Wire, list[int], torch.Tensor]:
    """A pass of three rows over the servers "a" and "b", which is sent. `copies`: servers that host all, too."""
    wire = Wire()
    schema = ExpertSchema((TensorSpec((WIDTH,)),), {}, TensorSpec((WIDTH,)), 64, CodecPolicy())
    replicas: Any = {
        (e,): [FakeReplica(f"m.0.{e}", peer) for peer in ("ab"[e % 2], *copies)] for e in range(NUM_EXPERTS)
    }
    experience: Any = Experience(wire)  # type: ignore[arg-type]
    servers = Servers(experience, "m.0", replicas, schema)
    x = torch.arange(float(ROWS * WIDTH)).view(ROWS, WIDTH)
    asked = questions(servers, x, torch.tensor([[0, 1], [1, 2], [3, 4]]), torch.ones(ROWS, 2))
    assert asked is not None
    straight = Straight(
        experience, servers, asked, num_rows=ROWS, options=DEFAULT_OPTIONS, timeout=5.0, holds=lambda: True
    )
    over: list[int] = []
    straight.begin(lambda: over.append(1))
    assert len(wire.sent) == 2 and not over
    wire.experience, wire.asked = experience, asked
    return straight, wire, over, x


def answered(sent: Any, *, places: list[int] | None = None, end: bool = True, **changed: Any) -> Any:
    """The sums of experts that multiply by 2, of these places."""
    request, (buffer,) = decode_request(sent[0], sent[1])
    rows = torch.frombuffer(bytearray(buffer), dtype=torch.float32).view(-1, WIDTH) * 2
    experts = np.array(range(len(request.ids)) if places is None else places, dtype=np.int64)
    total = torch.zeros_like(rows)
    pairs = request.pairs(experts)
    for number in request.rows[pairs]:
        total[number] += rows[number]
    metas, buffers = pack_tensors([total[torch.from_numpy(request.rows_of(experts)).long()]])
    zeros = np.zeros(len(experts), dtype=np.int64)
    part = ApplyPart(experts, zeros, zeros, [], metas, np.empty(0, dtype=np.float32))._replace(**changed)
    body, _ = encode_part(part, backward=False)
    kind = ReplyReceived if end else PartReceived
    return kind(1, body, tuple(memoryview(bytearray(one)) for one in buffers))


async def test_answers_in_one_and_in_parts_add_up() -> None:
    straight, wire, over, x = begun()
    wire.sent[0][2](answered(wire.sent[0]))
    num_experts = len(decode_request(*wire.sent[1][:2])[0].ids)
    for place in range(num_experts):
        assert not over
        wire.sent[1][2](answered(wire.sent[1], places=[place], end=False))
    wire.sent[1][2](ReplyReceived(1, None, ()))
    assert over == [1] and straight.answer is not None and not wire.num_cancelled
    torch.testing.assert_close(straight.answer, x * 4)


@pytest.mark.parametrize(
    "event",
    [
        lambda sent: CallFailed(1, ConnectionLost("a", "gone")),
        lambda sent: ReplyReceived(1, None, ()),
        lambda sent: ReplyReceived(1, ["no", b"part"], ()),
        lambda sent: answered(sent, places=[0]),
        lambda sent: answered(sent, failures=[(0, ExpertFailed("no"))], experts=np.array([1])),
        lambda sent: answered(sent, tensors=[["float32", [1, WIDTH], "none"]]),
        lambda sent: answered(sent, tensors=[["float64", [2, WIDTH], "none"]]),
        lambda sent: answered(sent, tensors=[]),
        lambda sent: answered(sent)._replace(buffers=(memoryview(bytearray(4)),)),
        lambda sent: answered(sent)._replace(buffers=()),
    ],
)
async def test_an_answer_that_does_not_fit_ends_it_without_one(event: Callable[[Any], Any]) -> None:
    straight, wire, over, _ = begun()
    wire.sent[0][2](event(wire.sent[0]))
    assert over == [1] and straight.answer is None and wire.num_cancelled >= 1
    wire.sent[1][2](answered(wire.sent[1]))  # comes too late
    assert over == [1] and straight.answer is None


async def test_thanks_are_for_answers_that_count() -> None:
    straight, wire, over, _ = begun()
    for sent in wire.sent:
        sent[2](answered(sent))
    assert straight.answer is not None and wire.thanked == [("m", "a", 3, 0), ("m", "b", 3, 0)]


@in_made_up_time
async def test_a_server_that_keeps_silent_is_remembered_as_slow() -> None:
    straight, wire, over, _ = begun(copies="c")
    wire.sent[0][2](answered(wire.sent[0]))
    await asyncio.sleep(HEDGE_SECONDS + 1)
    assert over == [1] and straight.answer is None and wire.num_cancelled == 1
    assert straight.is_late and straight.seconds == pytest.approx(HEDGE_SECONDS)
    book, silent = wire.experience.latencies, wire.asked[1].replicas[0]
    assert (book.expected(replica_key(silent)) or 0) >= HEDGE_SECONDS
    assert book.expected(replica_key(wire.asked[0].replicas[0])) is None, "it is asked anew"
    assert not wire.thanked


async def test_numbers_that_are_not_finite_are_no_answer() -> None:
    straight, wire, over, _ = begun()
    bad = answered(wire.sent[0])
    torch.frombuffer(bad.buffers[0], dtype=torch.float32)[3] = torch.nan
    wire.sent[0][2](bad)
    wire.sent[1][2](answered(wire.sent[1]))
    assert over == [1] and straight.answer is None and not wire.thanked


async def test_a_pass_is_not_sent_where_its_servers_are_not_what_they_were() -> None:
    wire, over = Wire(), []
    straight = Straight(
        Experience(wire),
        None,
        [None],
        num_rows=1,
        options=DEFAULT_OPTIONS,
        timeout=5.0,
        holds=lambda: False,  # type: ignore[arg-type]
    )
    straight.begin(lambda: over.append(1))
    assert over and straight.answer is None and not wire.sent and not straight.is_sent
