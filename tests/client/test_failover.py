import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tesseract_async.client.autograd import backward
from tesseract_async.client.experience import Experience
from tesseract_async.client.gating_function import GatingFunction, SwitchGatingFunction
from tesseract_async.client.grouping import Request
from tesseract_async.client.latency import MAX_PATIENCE, MIN_PATIENCE, LatencyBook, Lateness
from tesseract_async.client.passes import Pass
from tesseract_async.client.remote_expert import RemoteExpert
from tesseract_async.errors import ConnectionLost, ExpertFailed, ExpertNotFound, NotPrimary, Overloaded
from tesseract_async.wire.messages import BACKWARD, FORWARD
from tests.client.fake_node import FakeNode, gate_with
from tests.client.virtual_time import in_made_up_time


def peers_asked(node: FakeNode, method: str = FORWARD) -> list[Any]:
    return [asked.peer for asked in node.calls if asked.method == method]


def by_peer(node: FakeNode, seconds: dict[str, float]) -> None:
    async def fault(method: str, uid: str, number: int) -> None:
        if method == FORWARD:
            await asyncio.sleep(seconds[node.calls[number - 1].peer])

    node.fault = fault


@in_made_up_time
async def test_the_fastest_replica_is_asked_once_all_are_known(node: FakeNode) -> None:
    node.host("ffn.0", nn.Linear(8, 8), peers=("primary", "fast"))
    expert = RemoteExpert(node, "ffn.0")
    by_peer(node, {"primary": 0.05, "fast": 0.0})
    for _ in range(6):
        y = await expert(torch.zeros(1, 8))
    assert peers_asked(node)[:2] == ["primary", "fast"] and peers_asked(node)[2:] == ["fast"] * 4
    await backward(y.sum())
    assert peers_asked(node, BACKWARD) == ["primary"]


@in_made_up_time
async def test_a_call_slower_than_p95_is_hedged_and_the_loser_cancelled(node: FakeNode) -> None:
    node.host("ffn.0", nn.Linear(8, 8), peers=("a", "b"))
    expert = RemoteExpert(node, "ffn.0")
    by_peer(node, {"a": 0.001, "b": 0.02})
    for _ in range(12):
        await expert(torch.zeros(1, 8))
    cancelled = node.num_cancelled
    by_peer(node, {"a": 60.0, "b": 0.0})
    async with asyncio.timeout(30):
        await expert(torch.zeros(1, 8))
    assert peers_asked(node)[-2:] == ["a", "b"]
    assert node.num_cancelled == cancelled + 1 and node.num_open == 0 and not node.directory.failed


async def test_a_full_replica_is_left_alone_for_a_while(node: FakeNode) -> None:
    node.host("ffn.0", nn.Linear(8, 8), peers=("a", "b"))

    async def fault(method: str, uid: str, number: int) -> None:
        if method == FORWARD and node.calls[number - 1].peer == "a":
            raise Overloaded("full", retry_after=60.0)

    node.fault = fault
    expert = RemoteExpert(node, "ffn.0")
    for _ in range(3):
        await expert(torch.zeros(1, 8))
    assert peers_asked(node) == ["a", "b", "b", "b"] and not node.directory.failed


async def test_backward_goes_to_the_next_primary_under_the_same_call_id(node: FakeNode) -> None:
    hosted = node.host("ffn.0", nn.Linear(8, 8), peers=("leaving", "heir"), lr=0.1)
    x = torch.ones(2, 8, requires_grad=True)
    y = await RemoteExpert(node, "ffn.0")(x)

    async def fault(method: str, uid: str, number: int) -> None:
        asked = node.calls[number - 1]
        if asked.peer == "leaving":
            raise ExpertNotFound("it has left")
        if len(peers_asked(node, BACKWARD)) == 2:
            raise Overloaded("between two primaries", retry_after=0.0)

    node.fault = fault
    await backward(y.sum())
    assert peers_asked(node, BACKWARD) == ["leaving", "heir", "heir"]
    assert len({asked.body.call_id for asked in node.calls if asked.method == BACKWARD}) == 1
    assert hosted.version == 1 and x.grad is not None


async def test_a_follower_that_names_the_primary_is_believed_about_known_servers_only(node: FakeNode) -> None:
    hosted = node.host("ffn.0", nn.Linear(8, 8), peers=("follower", "primary"), lr=0.1)
    x = torch.ones(2, 8, requires_grad=True)
    y = await RemoteExpert(node, "ffn.0")(x)
    names: list[Any] = [bytes(32), "primary"]

    async def fault(method: str, uid: str, number: int) -> None:
        if node.calls[number - 1].peer == "follower":
            raise NotPrimary("it only follows", primary=names.pop(0))

    node.fault = fault
    await backward(y.sum())
    assert peers_asked(node, BACKWARD) == ["follower", "follower", "primary"]
    assert len({asked.body.call_id for asked in node.calls if asked.method == BACKWARD}) == 1
    assert hosted.version == 1 and x.grad is not None and not node.directory.failed
    assert node.directory.outdated == ["ffn.0", "ffn.0"], "what is remembered names the follower alone, for seconds"


@pytest.mark.parametrize("forgotten", [False, True])
async def test_inputs_that_the_server_keeps_do_not_travel_again(node: FakeNode, forgotten: bool) -> None:
    node.host("ffn.0", nn.Linear(8, 8))
    node.keeps_inputs = True
    x = torch.ones(2, 8, requires_grad=True)
    y = await RemoteExpert(node, "ffn.0")(x)
    if forgotten:
        node.kept.clear()
    await backward(y.sum())
    sent = [asked.body.num_inputs for asked in node.calls if asked.method == BACKWARD]
    assert sent == ([0, 1] if forgotten else [0])
    torch.testing.assert_close(x.grad, node.hosted["ffn.0"].module.weight.detach().sum(0).expand(2, 8))  # type: ignore
    with torch.no_grad():
        await RemoteExpert(node, "ffn.0")(x)
    assert not node.calls[-1].body.keep_inputs


async def test_all_replicas_gone(node: FakeNode) -> None:
    node.host("ffn.0", nn.Linear(8, 8), peers=("a", "b", "c"))
    expert = RemoteExpert(node, "ffn.0")
    await expert.info()

    async def fault(method: str, uid: str, number: int) -> None:
        raise ConnectionLost(node.calls[number - 1].peer, "test")

    node.fault = fault
    with pytest.raises(ConnectionLost):
        await expert(torch.zeros(1, 8))
    assert len(node.directory.failed) == 3


async def test_what_the_expert_itself_raises_is_not_asked_for_twice(node: FakeNode) -> None:
    node.host("ffn.0", nn.Linear(9, 8), peers=("a", "b"))
    with pytest.raises(ExpertFailed):
        await RemoteExpert(node, "ffn.0")(torch.zeros(1, 8))
    assert len(peers_asked(node)) == 1


@in_made_up_time
async def test_priority_and_timeout_travel(node: FakeNode) -> None:
    node.host("ffn.0", nn.Linear(8, 8))
    await RemoteExpert(node, "ffn.0").with_options(timeout=3.0, priority=1)(torch.zeros(1, 8))
    assert node.calls[-1].priority == 1 and 2.9 < node.calls[-1].timeout <= 3.0
    with pytest.raises(ValueError):
        RemoteExpert(node, "ffn.0").with_options(timeout=0.0)
    for priority in (2, -2, 1000, 0.5, True, "1"):
        with pytest.raises(ValueError, match="priority"):
            RemoteExpert(node, "ffn.0").with_options(priority=priority)  # type: ignore[arg-type]
        for kind in (GatingFunction, SwitchGatingFunction):
            with pytest.raises(ValueError, match="priority"):
                gate_with(node, "ffn", kind=kind, grid_size=(2,), in_features=8, priority=priority)
    with pytest.raises(ValueError, match="codec"):
        await RemoteExpert(node, "ffn.0").with_options(codec="zip")(torch.zeros(1, 8))


@in_made_up_time
async def test_a_relayed_slow_path_loses_against_a_direct_one_of_equal_queue(node: FakeNode) -> None:
    node.host("ffn.0", nn.Linear(8, 8), peers=("relayed", "direct"))
    expert = RemoteExpert(node, "ffn.0")
    node.paths = {"relayed": (0.05, 1e6), "direct": (0.01, 1e8)}
    for _ in range(3):
        await expert(torch.zeros(1, 8))
    assert peers_asked(node) == ["direct"] * 3
    node.paths["direct"] = (0.2, 1e5)  # the direct connection broke, and a worse one took its place
    await expert(torch.zeros(1, 8))
    assert peers_asked(node)[-1] == "relayed"


@in_made_up_time
async def test_bandwidth_counts_more_for_large_calls(node: FakeNode) -> None:
    node.host("ffn.0", nn.Linear(8, 8), peers=("far and wide", "near and narrow"))
    expert = RemoteExpert(node, "ffn.0")
    node.paths = {"far and wide": (0.1, 1e8), "near and narrow": (0.01, 1e5)}
    for rows, peer in ((1, "near and narrow"), (1000, "far and wide")):
        await expert(torch.zeros(rows, 8))
        assert peers_asked(node)[-1] == peer


def test_what_a_call_is_expected_to_take() -> None:
    book = LatencyBook()
    book.observe("a", 1.0, path=0.25)
    assert book.expected("a", path=0.5) == 0.5 + 0.75
    book.observe("b", 0.1, path=0.4)  # the path was quicker than it seemed
    assert book.expected("b", path=0.2) == 0.2 and book.expected("c", path=0.2) is None
    for path, seconds in ((None, 0.0), ((0.1, 0.0), 0.1), ((0.1, 1e6), 1.1)):
        knows: Any = SimpleNamespace(node=SimpleNamespace(path=lambda peer, path=path: path))
        assert Experience.path_seconds(knows, SimpleNamespace(peer=None), 10**6) == seconds


def test_latency_book() -> None:
    book = LatencyBook()
    assert book.expected("a") is None and book.p95("a") is None
    for i in range(100):
        book.observe("a", 1.0 if i % 10 else 2.0)
    assert book.p95("a") == 2.0 and 1.0 < (book.expected("a") or 0) < 2.0
    assert book.p95("new") == 2.0
    book.block("a", 5.0)
    assert book.is_blocked("a", 4.0) and not book.is_blocked("a", 5.0) and not book.is_blocked("b", 0.0)


def test_one_that_hung_for_long_is_not_waited_for_as_long_again() -> None:
    book = LatencyBook()
    book.observe("a", 0.1)
    for _ in range(20):
        book.observe("a", 15.0, answered=False)
    assert 0.2 < (book.usual("a") or 0) <= 0.4 and (book.expected("a") or 0) > 10
    for _ in range(20):
        book.observe("a", 0.1)
    assert book.usual("a") == pytest.approx(0.1, rel=0.05)
    book.observe("b", 15.0, answered=False)
    assert book.usual("b") is None


def test_patience_is_learned_from_how_far_answers_scatter() -> None:
    even, scattered, hanging = Lateness(), Lateness(), Lateness()
    assert even.patience == MAX_PATIENCE
    for i in range(400):
        even.observe([0.05], [0.05])
        scattered.observe([0.1 + 0.01 * (i % 10)], [0.1])
        hanging.observe([0.5 if i % 20 == 0 else 0.05], [0.05])  # one in twenty is given up
    assert even.patience == hanging.patience == pytest.approx(0.4)
    assert scattered.patience == pytest.approx(1.4 * 1.8 - 1, abs=0.15)
    for _ in range(400):
        even.observe([0.01], [0.05])
        hanging.observe([0.5], [0.05])
    assert even.patience == MIN_PATIENCE and hanging.patience == MAX_PATIENCE


@pytest.mark.parametrize("rival", [True, False], ids=["rival", "follower"])
@in_made_up_time
async def test_a_silent_primary_is_left_only_for_one_that_claims_the_same(node: FakeNode, rival: bool) -> None:
    """A primary whose loop stands still for 6 s, next to a follower that speaks: it is waited for. Where both say that
    they lead, the one that speaks is asked."""
    hosted = node.host("ffn.0", nn.Linear(8, 8), peers=("first",), lr=0.1)
    node.directory.add("ffn.0", "second", primary=rival)
    x = torch.ones(2, 8, requires_grad=True)
    y = await RemoteExpert(node, "ffn.0")(x)
    stands_until = asyncio.get_running_loop().time() + 6.0

    async def fault(method: str, uid: str, number: int) -> None:
        if node.calls[number - 1].peer == "first":
            await asyncio.sleep(stands_until - asyncio.get_running_loop().time())

    node.fault = fault
    await backward(y.sum())
    assert peers_asked(node, BACKWARD) == (["first", "second"] if rival else ["first"])
    assert hosted.version == 1 and [replica.peer for replica in node.directory.failed] == ["first"] * rival


@pytest.mark.parametrize("kind", ["expert", "gate"])
@in_made_up_time
async def test_a_primary_that_answers_is_not_late_where_others_claim_its_expert(node: FakeNode, kind: str) -> None:
    """It would be as doubtful as those that never answer, and they would be asked before it."""
    node.host("ffn.0", nn.Linear(8, 8), peers=("first",), lr=0.1)
    node.directory.add("ffn.0", "second")
    module: nn.Module = RemoteExpert(node, "ffn.0")
    if kind == "gate":
        module = gate_with(node, "ffn", grid_size=(1,), in_features=8, k_best=1)
    for _ in range(3):
        await backward((await module(torch.ones(2, 8, requires_grad=True))).sum())
    assert peers_asked(node, BACKWARD) == ["first"] * 3 and not node.directory.late


@in_made_up_time
async def test_a_primary_that_is_given_up_is_late(node: FakeNode) -> None:
    node.host("ffn.0", nn.Linear(8, 8), peers=("first",), lr=0.1)
    node.directory.add("ffn.0", "second")
    gate = gate_with(node, "ffn", grid_size=(1,), in_features=8, k_best=1, backward_timeout=6.0)
    x = torch.ones(2, 8, requires_grad=True)
    await backward((await gate(x)).sum())
    y = await gate(x)

    async def fault(method: str, uid: str, number: int) -> None:
        await asyncio.sleep(60.0)

    node.fault = fault
    await backward(y.sum())
    assert [replica.peer for replica in node.directory.late] == ["first"]


async def test_a_message_whose_experts_have_answered_elsewhere_is_not_made() -> None:
    """A rival's answer may come between the decision to ask and the first turn of the task that asks."""

    def refuse(*_: object) -> Any:
        raise AssertionError("nothing is left to ask")

    class Unpacked(Pass):
        rank = key = pack = add = refuse

    await object.__new__(Unpacked)._exchange(Request({}, 0.0), 1.0)
