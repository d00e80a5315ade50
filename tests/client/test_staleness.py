"""How old the answers of followers may be is for the caller to say."""

import itertools
from typing import Any

import pytest
import torch
from torch import nn

from tesseract_async.client.gating_function import GatingFunction
from tesseract_async.client.remote_expert import RemoteExpert
from tesseract_async.errors import ConnectionLost, ExpertNotFound, NotEnoughExperts, TooStale
from tesseract_async.wire.messages import FORWARD, INFO
from tests.client.fake_node import FakeNode, gate_with
from tests.client.virtual_time import in_made_up_time

VERSIONS = {"primary": 100, "fresh": 98, "stale": 90}


def make(*uids: str) -> FakeNode:
    """Followers that lag behind the primary, and answer sooner than it."""
    node = FakeNode()
    node.version_of = lambda asked, hosted: VERSIONS[asked.peer]
    for uid in uids:
        node.host(uid, nn.Linear(8, 8), peers=("primary", "stale", "fresh"))
    node.paths = {"primary": (0.3, 0.0), "stale": (0.1, 0.0), "fresh": (0.2, 0.0)}

    async def fault(method: str, uid: str, number: int) -> None:
        if method == FORWARD and node.calls[number - 1].peer == down:
            raise ConnectionLost(down, "script")

    down = ""
    node.fault = fault
    return node


@pytest.mark.parametrize(("max_staleness", "version"), [(None, 90), (10, 90), (9, 98), (2, 98), (1, 100), (0, 100)])
@in_made_up_time
async def test_answers_are_as_new_as_is_asked_for(max_staleness: int | None, version: int) -> None:
    node = make("f.0")
    expert = RemoteExpert(node, "f.0")
    assert expert.version is None
    if max_staleness is not None:
        expert = expert.with_options(max_staleness=max_staleness)
    await expert(torch.ones(1, 8))
    assert expert.version == version and not node.directory.failed, "an old answer is no failure"
    assert expert.with_options(timeout=3.0).options.max_staleness == max_staleness


@in_made_up_time
async def test_gates_and_eval_say_it_too() -> None:
    uids = [f"ffn.{i}.{j}" for i, j in itertools.product(range(2), range(2))]

    def fresh() -> GatingFunction:
        return gate_with(make(*uids), "ffn", grid_size=(2, 2), in_features=8, k_best=4, max_staleness=5)

    async def versions(gate: GatingFunction) -> set[int]:
        mixed = await gate.mix(torch.randn(4, 8))
        assert mixed.versions.keys() == set(uids)
        return set(mixed.versions.values())

    assert await versions(fresh()) == {100}, "where a backward will follow, the primary is asked"
    with torch.no_grad():
        assert await versions(fresh()) == {98}
        assert await versions(fresh().eval(max_staleness=0)) == {100}
        assert await versions(fresh().eval(max_staleness=0).train()) == {98}
        assert await versions(fresh().eval(max_staleness=0).eval()) == {98}, "what the gate was made with"
    node = make("ffn.0.0")
    expert = RemoteExpert(node, "ffn.0.0").eval(max_staleness=0)
    await expert.with_options(priority=1)(torch.ones(1, 8))
    assert node.calls[-1].peer == "primary" and node.calls[-1].body.training is False


@in_made_up_time
async def test_what_cannot_be_kept_is_said() -> None:
    node = make("f.0")
    expert = RemoteExpert(node, "f.0")
    await expert.info()
    node.directory.replicas["f.0"] = [replica for replica in node.directory.replicas["f.0"] if not replica.primary]
    for steps in (0, 5):
        with pytest.raises(ExpertNotFound, match="nobody is the primary of f.0 now"):
            await expert.with_options(max_staleness=steps)(torch.ones(1, 8))
    await expert(torch.ones(1, 8))
    node = make("f.0")

    async def silent(method: str, uid: str, number: int) -> None:
        if node.calls[number - 1].peer == "primary" and number > 1:
            raise ConnectionLost("primary", "script")

    node.fault = silent
    with pytest.raises((TooStale, ConnectionLost)):
        await RemoteExpert(node, "f.0").with_options(max_staleness=20)(torch.ones(1, 8))
    assert {replica.peer for replica in node.directory.failed} <= {"primary"}
    other = make("g.0")
    gate = gate_with(other, "g", grid_size=(1,), in_features=8, k_best=1, max_staleness=0)
    other.directory.replicas["g.0"].pop(0)
    with pytest.raises(NotEnoughExperts, match="nobody is the primary of g.0"):
        await gate(torch.ones(1, 8))
    assert node.count(INFO) > 0


@pytest.mark.parametrize("steps", [-1, 0.5, True, "3"])
def test_it_counts_steps(steps: Any) -> None:
    node = FakeNode()
    expert = RemoteExpert(node, "f.0")
    for refuse in (
        lambda: expert.with_options(max_staleness=steps),
        lambda: expert.eval(max_staleness=steps),
        lambda: gate_with(node, "f", grid_size=(1,), in_features=1, k_best=1, max_staleness=steps),
    ):
        with pytest.raises(ValueError, match="max_staleness"):
            refuse()
