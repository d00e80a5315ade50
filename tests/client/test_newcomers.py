"""Rows that have tried every expert wait for those that come, or come back, until their time-out; in virtual time."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import torch

from tesseract_async.client.autograd import backward
from tesseract_async.client.gating_function import GatingFunction
from tesseract_async.client.settings import MixtureSettings
from tesseract_async.errors import ConnectionLost, ExpertFailed, NotEnoughExperts, Overloaded
from tesseract_async.wire.messages import FORWARD
from tesseract_async.wire.tensors import TensorSpec
from tests.client.fake_node import FakeNode, FakeReplica, Hosted, Slope, gate_with
from tests.client.virtual_time import run_in_virtual_time


def host(node: FakeNode, *numbers: int) -> list[Hosted]:
    return [node.host(f"f.{i}", Slope(i + 1.0), TensorSpec((2,))) for i in numbers]


def renew(node: FakeNode, number: int) -> None:
    """The server's next manifest."""
    (old,) = node.directory.replicas[f"f.{number}"]
    node.directory.replicas[f"f.{number}"] = [FakeReplica(old.uid, old.peer, sequence=old.sequence + 1)]
    node.directory.forgive()


def make_gate(node: FakeNode, **settings: Any) -> GatingFunction:
    torch.manual_seed(1)
    return gate_with(node, "f", grid_size=(6,), in_features=2, **{"k_best": 2, **settings})


def failing(error: Callable[[], Exception], *uids: str) -> Callable[[str, str, int], Awaitable[None]]:
    async def fault(method: str, uid: str, number: int) -> None:
        if method == FORWARD and uid in uids:
            raise error()

    return fault


def lost() -> Exception:
    return ConnectionLost("peer", "script")


async def at(seconds: float, act: Callable[[], Any]) -> None:
    await asyncio.sleep(seconds)
    act()


def now() -> float:
    return asyncio.get_running_loop().time()


X = torch.tensor([[1.0, 2.0], [3.0, -1.0]])


@pytest.mark.parametrize("on_missing", ["raise", "zero"])
@pytest.mark.parametrize("what", ["a new expert", "one that failed"])
def test_a_replica_that_comes_while_all_others_have_failed_is_asked(what: str, on_missing: str) -> None:
    async def main() -> None:
        node = FakeNode()
        host(node, 0, 1)
        gate = make_gate(node, on_missing=on_missing)
        await gate(X)
        node.fault = failing(lost, "f.0", "f.1")

        def come() -> None:
            if what == "a new expert":
                host(node, 4)
            else:
                node.fault = None
                renew(node, 1)

        coming = asyncio.create_task(at(6.0, come))
        began = now()
        x = X.clone().requires_grad_()
        mixed = await gate.mix(x)
        assert now() - began == pytest.approx(6.0) and coming.done()
        slope = 5.0 if what == "a new expert" else 2.0
        torch.testing.assert_close(mixed.output, x * slope)
        assert set(mixed.errors) == ({"f.0", "f.1"} if what == "a new expert" else {"f.0"})
        await backward(mixed.output.sum())
        torch.testing.assert_close(x.grad, torch.full_like(X, slope))

    run_in_virtual_time(main())


def test_if_nobody_comes_on_missing_decides_at_the_time_out() -> None:
    async def main() -> None:
        node = FakeNode()
        host(node, 0, 1)
        for on_missing in ("raise", "zero"):
            node.directory.forgive()
            node.fault = None
            gate = make_gate(node, on_missing=on_missing, forward_timeout=7.0)
            await gate(X)
            node.fault = failing(lost, "f.0", "f.1")
            began = now()
            if on_missing == "raise":
                with pytest.raises(NotEnoughExperts, match=r"f\.0, f\.1: ConnectionLost"):
                    await gate(X)
            else:
                assert not (await gate(X)).any()
            assert now() - began == pytest.approx(7.0)

    run_in_virtual_time(main())


@pytest.mark.parametrize(
    "error,settings",
    [
        (lambda: ExpertFailed("not a number"), {}),  # any other replica would say the same
        (lost, {"refill": False}),
        (lost, {"capacity_factor": 1.0}),
    ],
)
def test_nobody_is_waited_for_in_vain(error: Callable[[], Exception], settings: dict[str, Any]) -> None:
    async def main() -> None:
        node = FakeNode()
        host(node, 0, 1)
        gate = make_gate(node, **settings)
        await gate(X)
        node.fault = failing(error, "f.0", "f.1")
        began = now()
        with pytest.raises(NotEnoughExperts):
            await gate(X)
        assert now() == began

    run_in_virtual_time(main())


def test_an_expert_whose_manifest_is_renewed_does_not_answer_a_row_twice() -> None:
    async def main() -> None:
        node = FakeNode()
        host(node, 0)
        gate = make_gate(node, k_min=2, forward_timeout=5.0)
        coming = asyncio.create_task(at(1.0, lambda: renew(node, 0)))
        with pytest.raises(NotEnoughExperts, match="k_min=2"):
            await gate(X)
        assert coming.done() and node.count(FORWARD) == 1
        coming = asyncio.create_task(at(1.0, lambda: host(node, 3)))
        scores = gate.proj(X)[:, [0, 3]].softmax(1)
        y = await gate(X)
        torch.testing.assert_close(y, X * (scores * torch.tensor([1.0, 4.0])).sum(1, keepdim=True))
        await coming

    run_in_virtual_time(main())


def test_full_experts_are_asked_again_when_they_said() -> None:
    async def main() -> None:
        node = FakeNode()
        host(node, 0, 1)
        gate = make_gate(node)
        await gate(X)
        full_until = now() + 4.0

        async def fault(method: str, uid: str, number: int) -> None:
            if method == FORWARD and now() < full_until:
                raise Overloaded("full", retry_after=3.0 if uid == "f.0" else 4.5)

        node.fault = fault
        began, before = now(), node.count(FORWARD)
        y = await gate(X)
        assert node.count(FORWARD) - before == 4  # both, the first in vain again, the other
        assert now() - began == pytest.approx(4.5)
        torch.testing.assert_close(y, X * 2.0)

    run_in_virtual_time(main())


def test_a_beam_goes_on_searching_for_rows_whose_experts_failed() -> None:
    """The first search brought one expert for each row; the next best ones were never looked at."""

    async def main() -> None:
        node = FakeNode()
        host(node, 0, 1, 2)
        gate = make_gate(node, k_best=1, search="beam", spare=0)
        with torch.no_grad():
            gate.proj.weight.zero_()
            gate.proj.bias.copy_(torch.tensor([9.0, 8.0, 7.0, 0.0, 0.0, 0.0]))
        torch.testing.assert_close(await gate(X), X)
        for error in (lambda: ExpertFailed("says no"), lost):
            node.fault = failing(error, "f.0", "f.1")
            began = now()
            torch.testing.assert_close(await gate(X), X * 3.0)
            assert now() == began
            node.directory.forgive()

    run_in_virtual_time(main())


def test_a_search_goes_on_after_its_rows_were_sent_to_an_expert_that_was_full() -> None:
    async def main() -> None:
        node = FakeNode()
        host(node, 0)
        gate = make_gate(node, k_best=1, search="beam", spare=0)
        torch.testing.assert_close(await gate(X), X)
        began = now()

        async def fault(method: str, uid: str, number: int) -> None:
            if now() < began + 0.5:
                raise Overloaded("full", retry_after=0.5)
            await asyncio.sleep(3.0)  # meanwhile no row is in need, and the search looks twice

        node.fault = fault
        finds = node.directory.num_finds
        torch.testing.assert_close(await gate(X), X)
        assert now() - began == pytest.approx(3.5) and node.directory.num_finds > finds + 6 * 3

    run_in_virtual_time(main())


def test_those_found_on_a_cold_start_are_not_the_only_ones() -> None:
    async def main() -> None:
        node = FakeNode()
        host(node, *range(6))
        gate = make_gate(node, k_best=1, spare=0)
        with torch.no_grad():
            gate.proj.weight.zero_()
            gate.proj.bias.copy_(-torch.arange(6.0))
        node.directory.cold = True
        node.fault = failing(lost, "f.0")

        def warm() -> None:
            node.directory.cold = False
            node.directory.warm.set()

        warming = asyncio.create_task(at(2.0, warm))
        torch.testing.assert_close(await gate(X), X * 2.0)
        await warming

    run_in_virtual_time(main())


@pytest.mark.parametrize("search", ["exact", "beam"])
def test_a_network_that_does_not_answer_is_no_group_of_exceptions(search: str) -> None:
    async def main() -> None:
        node = FakeNode()
        node.directory.cold = True

        async def find(uid: str, *, even_failed: bool = False) -> list[FakeReplica]:
            await asyncio.sleep(0.5)
            raise TimeoutError

        node.directory.find = find  # type: ignore[method-assign]
        gate = make_gate(node, search=search, forward_timeout=3.0)
        with pytest.raises(NotEnoughExperts):
            await gate(X)
        assert now() == pytest.approx(3.0)

    run_in_virtual_time(main())


def test_a_beam_search_ends_in_time_with_what_it_found() -> None:
    async def main() -> None:
        node = FakeNode()
        host(node, 5)
        find = node.directory.find

        async def slow(uid: str, *, even_failed: bool = False) -> list[FakeReplica]:
            await asyncio.sleep(0.0 if uid == "f.5" else 60.0)
            return await find(uid, even_failed=even_failed)

        node.directory.find = slow  # type: ignore[method-assign]
        gate = make_gate(node, search="beam", forward_timeout=3.0, k_best=6)
        torch.testing.assert_close(await gate(X), X * 6.0)
        assert now() == pytest.approx(3.0)

    run_in_virtual_time(main())


def test_only_who_is_late_is_masked_for_it() -> None:
    """With little time after the first answer, the others are not waited for: that is no fault of theirs."""

    async def main() -> None:
        node = FakeNode()
        host(node, 0, 1, 2, 3)
        gate = make_gate(node, k_best=4, timeout_after_k_min=0.0)
        node.delay = lambda uid: 0.05 + 0.003 * int(uid[-1])
        for _ in range(6):
            await gate(X)
        assert not node.directory.failed

    run_in_virtual_time(main())


def test_who_is_under_way_when_all_is_lost_is_not_blamed() -> None:
    async def main() -> None:
        node = FakeNode()
        host(node, 0, 1)
        gate = make_gate(node, k_best=1, refill=False)
        with torch.no_grad():
            gate.proj.weight.zero_()
            gate.proj.weight[0, 0] = gate.proj.weight[1, 1] = 1.0
        x = torch.eye(2)  # each expert gets a row
        node.delay = 0.05
        torch.testing.assert_close(await gate(x), x * torch.tensor([1.0, 2.0]))
        node.fault = failing(lost, "f.0")
        for _ in range(4):
            node.directory.forgive()
            with pytest.raises(NotEnoughExperts) as caught:
                await gate(x)
            assert set(caught.value.errors) == {"f.0"}
        assert {replica.uid for replica in node.directory.failed} == {"f.0"}

    run_in_virtual_time(main())


def test_refills_go_by_latency_too() -> None:
    async def main() -> None:
        node = FakeNode()
        host(node, 0, 1, 2)
        gate = make_gate(node, k_best=3, latency_weight=1000.0)
        node.delay = lambda uid: 0.05 if uid == "f.1" else 0.0
        await gate(X)
        gate.k_best, gate.settings = 1, MixtureSettings(spare=0, latency_weight=1000.0)
        with torch.no_grad():
            gate.proj.weight.zero_()
            gate.proj.bias.copy_(torch.tensor([9.0, 8.0, 7.0, 0.0, 0.0, 0.0]))
        node.fault = failing(lost, "f.0")
        torch.testing.assert_close(await gate(X), X * 3.0)

    run_in_virtual_time(main())
