"""A pool of experts gives what its experts give, in both directions: all of it, or an error that says who and why."""

import asyncio
import copy
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn

import tesseract_async as ta
from tesseract_async.client.autograd import backward
from tesseract_async.errors import (
    ConnectionLost,
    ExpertFailed,
    ExpertNotFound,
    NotEnoughExperts,
    Overloaded,
    SchemaMismatch,
)
from tesseract_async.wire.messages import BACKWARD, FORWARD, INFO
from tests.client.fake_node import FakeDirectory, FakeNode, FakeView
from tests.client.virtual_time import in_made_up_time

NUM_EXPERTS, NUM_SERVERS, ROWS, K = 12, 3, 10, 4


def make_pool(node: FakeNode, *, copies: int = 1, **options: Any) -> tuple[ta.ExpertPool, list[nn.Module]]:
    """Experts spread over the servers "0" to "2", each at `copies` of them."""
    torch.manual_seed(0)
    modules: list[nn.Module] = [nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(NUM_EXPERTS)]
    for i, module in enumerate(modules):
        peers = [str((i + j) % NUM_SERVERS) for j in range(copies)]
        node.host(f"m.0.{i}", copy.deepcopy(module), peers=peers)
    return ta.ExpertPool(node, "m.0", num_experts=NUM_EXPERTS, **options), modules  # type: ignore[arg-type]


def routed(seed: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(ROWS, 8, generator=generator)
    index = torch.randint(NUM_EXPERTS, (ROWS, K), generator=generator)
    return x.requires_grad_(), index, torch.randn(ROWS, K, generator=generator).requires_grad_()


def local(modules: list[nn.Module], x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    rows = []
    for row, numbers, of_row in zip(x, index.tolist(), weights, strict=True):
        rows.append(sum(w * modules[e](row) for e, w in zip(numbers, of_row, strict=True)))
    return torch.stack(rows)


async def check_equal(pool: ta.ExpertPool, modules: list[nn.Module], seed: int = 1) -> None:
    x, index, weights = routed(seed)
    x2, weights2 = (tensor.detach().clone().requires_grad_() for tensor in (x, weights))
    y, expected = await pool(x, index, weights), local(modules, x2, index, weights2)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-5)
    await backward(y.square().sum())
    expected.square().sum().backward()
    torch.testing.assert_close(x.grad, x2.grad, rtol=0, atol=1e-5)
    torch.testing.assert_close(weights.grad, weights2.grad, rtol=0, atol=1e-5)


async def test_it_is_the_weighted_sum_and_sends_a_server_one_message_each_way(node: FakeNode) -> None:
    pool, modules = make_pool(node)
    for keeps in (False, True):
        node.keeps_inputs = keeps
        node.messages.clear()
        await check_equal(pool, modules)
        assert Counter((peer, asked.backward) for peer, asked in node.messages) == {
            (str(i), backward): 1 for i in range(NUM_SERVERS) for backward in (False, True)
        }
        assert all(asked.num_rows <= ROWS for _, asked in node.messages), "a row travels once"
        assert all((asked.kept is not None) == keeps for _, asked in node.messages if asked.backward)
        forwards = {frozenset(asked.ids) for _, asked in node.messages if not asked.backward}
        assert forwards == {frozenset(asked.ids) for _, asked in node.messages if asked.backward}
    assert node.num_open == 0


async def test_a_block_that_was_forgotten_travels_again_under_the_same_ids(node: FakeNode) -> None:
    pool, modules = make_pool(node)
    node.keeps_inputs = True
    x, index, weights = routed()
    y = await pool(x, index, weights)
    node.kept.clear()
    node.messages.clear()
    await backward(y.sum())
    once, again = ([asked for _, asked in node.messages if (asked.kept is None) == resent] for resent in (False, True))
    assert len(once) == len(again) == NUM_SERVERS
    assert {frozenset(asked.ids) for asked in once} == {frozenset(asked.ids) for asked in again}
    local(modules, x2 := x.detach().clone().requires_grad_(), index, weights.detach()).sum().backward()
    torch.testing.assert_close(x.grad, x2.grad, rtol=0, atol=1e-5)


@in_made_up_time
async def test_what_fails_at_one_server_is_asked_of_another(node: FakeNode) -> None:
    pool, modules = make_pool(node, copies=2)

    async def fault(method: str, uid: str, number: int) -> None:
        if node.calls[-1].peer == "1":
            raise ConnectionLost("1", "script")
        if uid == "m.0.0" and node.calls[-1].peer == "0" and asyncio.get_running_loop().time() < busy_until:
            raise Overloaded("full", retry_after=0.3)

    node.fault = fault
    node.directory.replicas = {
        uid: [type(one)(uid, str(one.peer), primary=True) for one in replicas]
        for uid, replicas in node.directory.replicas.items()
    }
    node.directory.forgive()
    busy_until = asyncio.get_running_loop().time() + 0.5
    await check_equal(pool, modules)
    assert {replica.peer for replica in node.directory.failed} == {"1"}
    retried = [asked.experts.flatten().tolist() for _, asked in node.messages if not asked.backward][NUM_SERVERS:]
    assert retried.count([0]) >= 2 and [one for one in retried if one != [0]] == [[1, 4, 7, 10]], "the unsettled only"


@pytest.mark.parametrize("method", [FORWARD, BACKWARD])
@in_made_up_time
async def test_who_did_not_answer_and_why_is_in_the_error(node: FakeNode, method: str) -> None:
    pool, _ = make_pool(node, timeout=5.0)
    x, index, weights = routed()
    index[0, 0], index[1, 0] = 3, 5
    y = await pool(x, index, weights)

    async def fault(called: str, uid: str, number: int) -> None:
        if called == method and uid == "m.0.3":
            raise ExpertFailed("no: it burns")

    node.fault = fault
    num_rows = int((index == 3).any(1).sum())
    lacking = f"{num_rows} row.* lack.* {'answers' if method == FORWARD else 'gradients'} of .*m.0.3.*it burns"
    with pytest.raises(NotEnoughExperts, match=lacking) as caught:
        await (pool(x, index, weights) if method == FORWARD else backward(y.sum()))
    assert set(caught.value.errors) == {"m.0.3"} and isinstance(caught.value.errors["m.0.3"], ExpertFailed)
    assert x.grad is None and weights.grad is None and node.metrics.total("answers_left_out") == 0

    async def silent(called: str, uid: str, number: int) -> None:
        if called == method and uid == "m.0.5":
            await asyncio.Event().wait()

    node.fault = silent
    began = asyncio.get_running_loop().time()
    with pytest.raises(NotEnoughExperts, match="m.0.5: TimeoutError"):
        await (pool(x, index, weights) if method == FORWARD else backward((await pool(x, index, weights)).sum()))
    assert 4.9 < asyncio.get_running_loop().time() - began < 8 and node.num_open == 0


@in_made_up_time
async def test_one_that_is_still_being_tried_when_time_is_up_says_what_stood_in_the_way(node: FakeNode) -> None:
    pool, _ = make_pool(node, timeout=2.0)
    x, index, weights = routed()
    index[0, 0] = 3
    await pool(x, index, weights)

    async def gone(method: str, uid: str, number: int) -> None:
        if uid == "m.0.3":
            await asyncio.sleep(1.5)
            raise ConnectionLost("its peer", "it is switched off")

    node.fault = gone
    with pytest.raises(NotEnoughExperts, match=r"m.0.3 sent no answer in time after ConnectionLost: .*switched off"):
        await pool(x, index, weights)


@pytest.mark.parametrize("method", [FORWARD, BACKWARD])
@in_made_up_time
async def test_once_all_replicas_are_gone_it_says_so_within_a_second(node: FakeNode, method: str) -> None:
    pool, _ = make_pool(node, copies=2)
    y = await pool(*routed())

    async def gone(called: str, uid: str, number: int) -> None:
        if called == method and uid in ("m.0.3", "m.0.4"):
            raise ConnectionLost("its peer", "it is switched off")

    node.fault = gone
    began = asyncio.get_running_loop().time()
    with pytest.raises(NotEnoughExperts, match="m.0.3.* ConnectionLost: .*switched off"):
        await (pool(*routed()) if method == FORWARD else backward(y.sum()))
    assert asyncio.get_running_loop().time() - began <= 1.0 and node.num_open == 0


@in_made_up_time
async def test_an_expert_that_nobody_hosts_is_named_and_one_that_comes_is_found(node: FakeNode) -> None:
    pool, _ = make_pool(node)
    x, index, weights = routed()
    index[0, 0] = 2
    await pool(x, index, weights)
    gone = node.directory.replicas.pop("m.0.2")
    node.directory.forgive()
    with pytest.raises(NotEnoughExperts, match="m.0.2: ExpertNotFound: no live server hosts the expert m.0.2"):
        await pool(x, index, weights)
    node.directory.replicas.clear()
    node.directory.forgive()
    with pytest.raises(NotEnoughExperts, match="no live server") as caught:
        await pool(x, index, weights)
    assert all(isinstance(error, ExpertNotFound) for error in caught.value.errors.values()) and gone


class ReadBefore(FakeDirectory):
    """A grid that was read before its experts came, and is not read again by itself for a while."""

    was_read = False

    def live(self, prefix: str, grid_size: tuple[int, ...] | None = None) -> FakeView | None:
        return super().live(prefix, grid_size) if self.was_read else FakeView({}, 2, 0)

    async def wait_read(self, prefix: str) -> None:
        self.was_read = True


async def test_experts_that_came_while_the_model_was_loaded_are_found(node: FakeNode) -> None:
    node.directory = ReadBefore()
    pool, modules = make_pool(node)
    await pool.watch()
    await check_equal(pool, modules)


async def test_without_gradients_no_block_is_kept_and_zero_rows_are_fine(node: FakeNode) -> None:
    pool, modules = make_pool(node)
    x, index, weights = routed()
    with torch.no_grad():
        y = await pool.eval()(x, index, weights)
    assert not y.requires_grad and not any(asked.keep or asked.training for _, asked in node.messages)
    torch.testing.assert_close(y, local(modules, x, index, weights).detach(), rtol=0, atol=1e-5)
    assert (await pool(x[:0], index[:0], weights[:0])).shape == (0, 8)
    assert (await pool(x, index[:, :0], weights[:, :0])).eq(0).all()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = await pool(x.bfloat16(), index.int(), weights.bfloat16())
    assert y.dtype == torch.float32


async def test_several_at_once_are_each_their_own(node: FakeNode) -> None:
    pool, modules = make_pool(node)
    await asyncio.gather(*(check_equal(pool, modules, seed) for seed in range(5)))


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda x, i, w: (x, i.float(), w), TypeError, "whole numbers"),
        (lambda x, i, w: (x, i, w.long()), TypeError, "floating-point"),
        (lambda x, i, w: (x, i + NUM_EXPERTS, w), ValueError, "0 to 11"),
        (lambda x, i, w: (x, i, w * torch.nan), ValueError, "finite"),
        (lambda x, i, w: (x, i, w.double() * 1e300), ValueError, "finite"),
        (lambda x, i, w: (x, i * 0, w * 0 + 2e38), ValueError, "finite"),
        (lambda x, i, w: (x, i.tolist(), w), TypeError, "index is a tensor, not a list"),
        (lambda x, i, w: (x[1:], i, w), ValueError, r"\[rows, k\].*\(9, 8\), \(10, 4\)"),
        (lambda x, i, w: (x, i[:, 0], w[:, 0]), ValueError, r"\[rows, k\]"),
    ],
)
async def test_what_makes_no_sense_is_refused_at_once(node: FakeNode, change: Any, error: Any, match: str) -> None:
    pool, _ = make_pool(node)
    with pytest.raises(error, match=match):
        pool(*change(*routed()))
    assert not node.calls


async def test_what_does_not_fit_the_experts_is_refused_before_it_is_sent(node: FakeNode) -> None:
    pool, _ = make_pool(node)
    _, index, weights = routed()
    with pytest.raises(SchemaMismatch, match="pool m.0 takes"):
        await pool(torch.zeros(ROWS, 9), index, weights)
    assert not node.messages
    for wrong in ({"num_experts": 0}, {"num_experts": 2, "timeout": 0.0}):
        with pytest.raises(ValueError, match="num_experts|timeout"):
            ta.ExpertPool(node, "m.0", **wrong)  # type: ignore[arg-type]


async def test_layers_that_are_alike_share_what_was_asked_until_one_turns_out_to_be_another(node: FakeNode) -> None:
    pool, modules = make_pool(node)
    like, other = (ta.ExpertPool(node, f"m.{layer}", num_experts=NUM_EXPERTS) for layer in (1, 2))
    x, index, weights = (tensor.detach() for tensor in routed())
    for i, module in enumerate(modules):
        node.host(f"m.1.{i}", copy.deepcopy(module), peers=["0"])
        node.host(f"m.2.{i}", nn.Linear(8, 7), outputs_schema=ta.TensorSpec((7,)), peers=["0"])
    for one in (like, other):
        one.take_for_like(pool)

    def num_questions() -> int:
        return sum(asked.method == INFO for asked in node.calls)

    await check_equal(pool, modules)
    asked = num_questions()
    await check_equal(like, modules)
    assert num_questions() == asked > 0
    answer = await other.ask(x, index, weights, differentiable=True)
    of_x, _ = await answer.backward(torch.ones(ROWS, 7))
    assert answer.answer.shape == (ROWS, 7) and of_x.any() and num_questions() == 2 * asked, "its own word"
    await check_equal(pool, modules)
    await check_equal(like, modules)
    assert num_questions() == 2 * asked


def test_plain_calls_from_several_threads() -> None:
    modules: list[nn.Module] = [nn.Linear(8, 8) for _ in range(NUM_EXPERTS)]
    with ta.BackgroundNode() as node:
        backends = {
            f"m.0.{i}": ta.ExpertBackend(module, args_schema=(ta.TensorSpec((8,)),)) for i, module in enumerate(modules)
        }
        with node.entered(ta.TesseractServer(node.node, backends)):
            pool = ta.ExpertPool(node, "m.0", num_experts=NUM_EXPERTS)

            def step(seed: int) -> None:
                x, index, weights = routed(seed)
                if seed % 2:
                    with torch.no_grad():
                        y = pool(x, index, weights)
                    assert not y.requires_grad
                else:
                    y = pool(x, index, weights)
                    y.sum().backward()
                    assert x.grad is not None and weights.grad is not None
                expected = local(modules, x.detach(), index, weights.detach())
                torch.testing.assert_close(y.detach(), expected.detach(), rtol=0, atol=1e-4)

            with ThreadPoolExecutor(4) as threads:
                list(threads.map(step, range(8)))
