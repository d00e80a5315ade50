"""Who answers wrongly is found out, who answers rightly is not, and what cannot be told is not claimed."""

import asyncio
import math
from collections.abc import Callable, Coroutine
from random import Random
from typing import Any

import pytest
import torch
from torch import nn

import tesseract_async as ta
from tesseract_async.client.audits import MAX_PENDING_BYTES, TOLERANCES, Verdict, deviation
from tesseract_async.client.remote_expert import RemoteExpert
from tesseract_async.errors import ConnectionLost
from tesseract_async.wire import messages
from tesseract_async.wire.apply import APPLY
from tesseract_async.wire.codecs import CODECS
from tests.client.fake_node import FakeNode, FakeReplica, gate_with
from tests.client.virtual_time import in_made_up_time

Lie = Callable[[list[memoryview], Any], list[memoryview]]


class Swarm(FakeNode):
    """Replicas of one expert, each with a version and a way of lying of its own."""

    def __init__(self, **peers: Lie | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lies = peers
        self.versions = dict.fromkeys(peers, 0)
        self.distrusted: dict[Any, str] = {}
        self.closing: list[Any] = []
        self.host("x.0", nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)), peers=tuple(peers))
        self.directory.known = lambda uid: self.directory.alive(uid)  # type: ignore[method-assign]
        self.random = Random(1)

    def distrust(self, peer_id: Any, reason: str) -> None:
        self.distrusted[peer_id] = reason
        for replica in self.directory.replicas["x.0"]:
            if replica.peer == peer_id:
                self.directory.report_failure(replica)

    def at_close(self, aclose: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self.closing.append(aclose)

    async def call_expert(self, peer: Any, method: str, body: Any = None, *args: Any, **options: Any) -> Any:
        self.hosted["x.0"].version = self.versions[peer]
        reply = await super().call_expert(peer, method, body, *args, **options)
        lie = self.lies[peer]
        if method == messages.FORWARD and lie is not None:
            return type(reply)(reply.body, lie(reply.buffers, body))
        return reply


def shifted(buffers: list[memoryview], body: Any) -> list[memoryview]:
    """Always the same wrong answer."""
    for buffer in buffers:
        torch.frombuffer(buffer, dtype=torch.float32).add_(1.0)
    return buffers


def sometimes(share: float, seed: int = 0) -> Lie:
    random = Random(seed)

    def lie(buffers: list[memoryview], body: Any) -> list[memoryview]:
        return shifted(buffers, body) if random.random() < share else buffers

    return lie


def noisy(buffers: list[memoryview], body: Any) -> list[memoryview]:
    for buffer in buffers:
        x = torch.frombuffer(buffer, dtype=torch.float32)
        x.mul_(1 + 1e-3 * torch.randn_like(x))
    return buffers


def expert_of(node: FakeNode, share: float = 1.0) -> RemoteExpert:
    return RemoteExpert(node, "x.0").with_options(audit_share=share)


async def ask(expert: RemoteExpert, times: int = 1) -> None:
    for _ in range(times):
        with torch.no_grad():
            await expert(torch.randn(4, 8))
        await expert.audits.wait()


async def test_honest_replicas_agree_although_they_round_differently() -> None:
    node = Swarm(a=None, b=noisy, c=noisy)
    expert = expert_of(node)
    await ask(expert, 20)
    await ask(expert.eval(), 20)
    assert expert.audits.outcomes == {Verdict.AGREED: 40} and not expert.audits.findings and not node.distrusted
    assert node.metrics.total("audits") == 40


@pytest.mark.parametrize("liar", ["a", "b", "c"])
async def test_of_three_the_one_that_two_contradict_is_caught(liar: str) -> None:
    peers: dict[str, Lie | None] = dict.fromkeys("abc")
    node = Swarm(**peers | {liar: shifted})
    await ask(expert := expert_of(node), 40)
    assert list(node.distrusted) == [liar]
    (finding,) = expert.audits.findings
    assert finding.peers == (liar,) and finding.verdict is Verdict.CAUGHT
    assert finding.deviation > finding.tolerance and finding.uid == "x.0"


@pytest.mark.parametrize("liar", ["a", "b"])
async def test_of_two_the_one_that_contradicts_itself_is_caught(liar: str) -> None:
    peers: dict[str, Lie | None] = dict.fromkeys("ab")
    node = Swarm(**peers | {liar: sometimes(0.2)})
    await ask(expert_of(node), 60)
    assert list(node.distrusted) == [liar]


async def test_two_that_stick_to_their_answers_are_disputed_and_neither_is_dropped() -> None:
    node = Swarm(a=None, b=shifted)
    await ask(expert := expert_of(node).eval())
    assert expert.audits.outcomes == {Verdict.DISPUTED: 1} and not node.distrusted
    assert set(expert.audits.findings[0].peers) == {"a", "b"}


async def test_replicas_of_other_versions_prove_nothing() -> None:
    node = Swarm(a=None, b=shifted)
    node.versions["b"] = 7
    await ask(expert := expert_of(node))
    alone = Swarm(a=None)
    await ask(lonely := expert_of(alone))
    assert expert.audits.outcomes == lonely.audits.outcomes == {Verdict.UNCHECKED: 1}


async def test_an_expert_that_draws_numbers_of_its_own_is_left_alone() -> None:
    node = Swarm(a=sometimes(0.5, 1), b=sometimes(0.5, 2))
    await ask(expert := expert_of(node), 60)
    outcomes = expert.audits.outcomes
    assert outcomes[Verdict.UNREPEATABLE] == 1 or node.distrusted


async def test_random_numbers_that_differ_by_device_are_no_lie() -> None:
    """A GPU's dropout mask is another one than a CPU's, from the same seed."""

    def device(buffers: list[memoryview], body: Any) -> list[memoryview]:
        return shifted(buffers, body) if body[2] else buffers

    node = Swarm(cpu=None, gpu=device)
    await ask(expert := expert_of(node), 10)
    assert expert.audits.outcomes == {Verdict.UNREPEATABLE: 1} and not node.distrusted
    await ask(expert.eval(), 10)
    assert expert.audits.outcomes[Verdict.AGREED] == 10


async def test_the_share_is_kept_and_nothing_costs_anything_without_one() -> None:
    node = Swarm(a=None, b=None)
    expert = expert_of(node, share=0.0)
    await ask(expert, 50)
    assert node.count(messages.FORWARD) == 50 and not expert.audits.outcomes and not node.closing
    expert.audits.random = Random(0)
    await ask(expert.with_options(audit_share=0.25), 400)
    assert 70 < sum(expert.audits.outcomes.values()) < 130


@in_made_up_time  # a slow first answer would send all others elsewhere
async def test_five_percent_of_wrong_answers_are_noticed_within_ten_thousand_calls() -> None:
    """At a share of 1 %: the chance that 100 audits miss all of it is .95 ** 100 = 0.6 %. Here one such run."""
    node = Swarm(a=sometimes(0.05, 3), b=None)
    expert = expert_of(node, share=0.01).eval()
    expert.audits.random = Random(5)
    node.directory.replicas["x.0"] = [FakeReplica("x.0", "a"), FakeReplica("x.0", "b", primary=False)]
    x = torch.randn(1, 8)
    with torch.no_grad():
        for _ in range(10_000):
            await expert(x)
            if node.distrusted:
                break
    await expert.audits.wait()
    assert list(node.distrusted) == ["a"]


async def test_who_cannot_be_asked_again_is_not_accused() -> None:
    node = Swarm(a=None, b=shifted)

    async def fault(method: str, uid: str, number: int) -> None:
        if method == messages.FORWARD and sum(one.method == messages.FORWARD for one in node.calls) > 2:
            raise ConnectionLost("b", "gone")

    node.fault = fault
    await ask(expert := expert_of(node).eval())
    assert expert.audits.outcomes == {Verdict.DISPUTED: 1} and not node.distrusted


async def test_what_waits_is_bounded_and_ends_with_the_node() -> None:
    node = Swarm(a=None, b=None)
    expert = expert_of(node).eval()
    with torch.no_grad():
        await expert(torch.zeros(MAX_PENDING_BYTES // (2 * 8 * 4) + 1, 8))  # float32, and as much again in the answer
        assert expert.audits.outcomes == {Verdict.SKIPPED: 1}
        await expert(torch.randn(1, 8))
    assert len(node.closing) == 1
    await node.closing[0]()
    assert not [task for task in asyncio.all_tasks() if "audit" in task.get_name()]


def test_one_wrong_row_among_many_shows_and_a_row_of_almost_nothing_does_not() -> None:
    a = torch.randn(1000, 16)
    b = a.clone()
    assert deviation([a], [b]) == 0.0
    b[77] = -b[77]
    assert deviation([a], [b]) > 0.5
    tiny = a.clone()
    tiny[5] = 1e-9
    other = tiny.clone()
    other[5] = -1e-9
    assert deviation([tiny], [other]) < 1e-6
    assert deviation([a], [a * float("nan")]) == math.inf
    assert deviation([torch.zeros(0, 3)], [torch.zeros(0, 3)]) == 0.0


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_is_a_share(share: float) -> None:
    with pytest.raises(ValueError, match="audit_share"):
        expert_of(Swarm(a=None), share=share)


async def test_a_server_that_lies_is_caught_and_asked_no_more() -> None:
    """Real nodes: a frozen expert at three servers, one of which adds to what it answers."""

    class Lying(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 1.0

    def backend(kind: type[nn.Linear]) -> ta.ExpertBackend:
        torch.manual_seed(0)
        return ta.ExpertBackend(kind(4, 4), args_schema=(ta.TensorSpec((4,)),))

    async with ta.TesseractNode() as first, ta.TesseractServer(first, {"y.0": backend(nn.Linear)}):
        async with (
            ta.TesseractNode(initial_peers=[first.address]) as second,
            ta.TesseractNode(initial_peers=[first.address]) as third,
            ta.TesseractNode(initial_peers=[first.address]) as trainer,
        ):
            async with (
                ta.TesseractServer(second, {"y.0": backend(nn.Linear)}, followers=["y.0"]),
                ta.TesseractServer(third, {"y.0": backend(Lying)}, followers=["y.0"]),
            ):
                expert = (await trainer.get_expert("y.0")).with_options(audit_share=1.0).eval()
                assert len(expert.replicas) == 3
                with torch.no_grad():
                    for _ in range(40):
                        await expert(torch.randn(3, 4))
                        await expert.audits.wait()
                assert list(trainer.trust.distrusted) == [third.peer_id]
                assert not trainer.trust.may_host(third.peer_id, "y.0")
                before = third.metrics.total("expert_calls_answered")
                with torch.no_grad():
                    for _ in range(10):
                        await expert(torch.randn(3, 4))
                await expert.audits.wait()
                assert third.metrics.total("expert_calls_answered") == before


@pytest.mark.parametrize("lies", [False, True])
async def test_a_gates_audited_experts_are_asked_apart(lies: bool) -> None:
    node = Swarm(a=None, b=None)
    node.host("x.1", nn.Linear(8, 8), peers=("a", "b"))
    gate = gate_with(node, "x", grid_size=(2,), in_features=8, k_best=2, audit_share=1.0)

    def tamper(method: str, part: Any, buffers: list[memoryview]) -> Any:
        return part, shifted(buffers, None) if lies and method == APPLY else buffers

    node.tamper = tamper
    with torch.no_grad():
        await gate(torch.randn(4, 8))
    await gate.audits.wait()
    assert len(node.messages) == 2, "by no more than one message each"
    assert all(len(asked.ids) == 1 and (asked.weights == 1).all() for _, asked in node.messages)
    assert gate.audits.outcomes == ({Verdict.CAUGHT: 2} if lies else {Verdict.AGREED: 2})


async def test_of_a_gate_that_audits_little_most_experts_are_asked_together() -> None:
    node = Swarm(a=None, b=None)
    node.host("x.1", nn.Linear(8, 8), peers=("a", "b"))
    gate = gate_with(node, "x", grid_size=(2,), in_features=8, k_best=2, audit_share=1e-9)
    with torch.no_grad():
        await gate(torch.randn(4, 8))
    assert [len(asked.ids) for _, asked in node.messages] == [2]


def test_answers_in_every_codec_can_be_compared() -> None:
    assert TOLERANCES.keys() == {*CODECS}
