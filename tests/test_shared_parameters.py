"""Trainers that share one model, on real nodes."""

import asyncio
import contextlib
import copy
import math
import textwrap
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import tesseract_async as ta
from tesseract_async import shared_pieces
from tesseract_async.errors import ConnectionLost, Overloaded
from tesseract_async.experts.grants import GRANT_SECONDS, Role, grant_text, sign_grant
from tesseract_async.experts.pattern import ExpertPattern
from tesseract_async.experts.run import RunManifest, RunMismatch, SignedRun, sign_run
from tesseract_async.server import fragment_calls, fragments
from tesseract_async.server.checkpoint import check_state
from tesseract_async.server.fetching import fetch_state
from tesseract_async.server.other_replicas import ReplicaSettings
from tesseract_async.server.placing import Placing
from tesseract_async.server.succession import ReplicaKeeper
from tesseract_async.shared_parameters import SharedParameters, SharingReport
from tesseract_async.shared_part import Arrived
from tesseract_async.sharing import rounds
from tesseract_async.sharing.fragment import LAST, NEWCOMERS
from tesseract_async.sharing.layout import Layout, LayoutMismatch, MergeKind
from tesseract_async.wire import messages
from tests.scripted_node import ScriptedNode

REPLICAS = ReplicaSettings(sync_every=0.3, check_every=0.3, lease=1.0, call_timeout=2.0)


def make_model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.GELU(), nn.Linear(16, 3))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> float:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(32, 6, generator=generator)
    loss = nn.functional.mse_loss(model(x), x[:, :3].sin())
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return float(loss.detach())


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def close(one: nn.Module, other: nn.Module) -> bool:
    """Equal to rounding: local values are added to, not set."""
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.allclose(a, b, atol=1e-5) for a, b in pairs)


def anchored(shared: SharedParameters[Any]) -> nn.Module:
    """The model with the values from which differences are taken: the merged ones, and the momentum's start."""
    model = copy.deepcopy(shared.model)
    for part in shared.parts:
        Layout.of(model).write(model, part.copy.cut, part.copy.anchor)
    return model


def weight(model: nn.Module) -> torch.Tensor:
    return next(model.parameters())


@contextlib.asynccontextmanager
async def sharing(
    model: nn.Module, *seeds: str, every: int = 4, **more: object
) -> AsyncIterator[tuple[ScriptedNode, SharedParameters[nn.Module]]]:
    async with ScriptedNode(initial_peers=seeds) as node:
        shared = SharedParameters(node, model, run="tiny", every=every, replicas=REPLICAS, **more)  # type: ignore[arg-type]
        async with shared:
            yield node, shared


async def steps(shared: SharedParameters[nn.Module], num: int, seed: int) -> None:
    optimizer = torch.optim.Adam(shared.model.parameters(), 0.01)
    for step in range(num):
        train(shared.model, optimizer, 1000 * seed + step)
        await shared.step()
        await asyncio.sleep(0.001)


def all_sent(shared: SharedParameters[nn.Module]) -> bool:
    """Whether what it learned up to its last step counts, in every piece."""
    state = shared.state_dict()
    return {then for _, then in state["parts"]} == {state["steps"]}


async def test_two_trainers_end_with_one_model() -> None:
    one, other = make_model(1), make_model(2)
    async with sharing(one) as (seed, first), sharing(other, seed.address) as (_, second):
        assert same(one, other)
        await asyncio.gather(steps(first, 8, 1), steps(second, 8, 2))
        await asyncio.gather(first.flush(), second.flush())
        assert all_sent(first) and all_sent(second)
        before = [part.copy.base[1] for part in second.parts]
        # the second time only takes what the other one sent last
        await asyncio.gather(first.flush(), second.flush())
        assert all(part.copy.base[1] - version <= 1 for part, version in zip(second.parts, before, strict=True))
        assert same(first.merged(), second.merged())
        assert first.steps == second.steps == 16
        async with sharing(make_model(3), seed.address, host=False) as (_, third):  # a newcomer takes what is there
            assert same(third.model, anchored(second)) and same(third.merged(), second.merged()) and third.steps == 16


async def test_the_first_round_waits_for_all_that_have_entered() -> None:
    async with sharing(make_model(1), every=9) as (seed, first), sharing(make_model(2), seed.address) as (_, second):
        await asyncio.gather(steps(first, 1, 1), steps(second, 1, 2))
        await asyncio.gather(first.flush(), second.flush())
        assert {part.copy.base[1] for part in first.parts if part.copy.cut.kind is not MergeKind.FIXED} == {1}


async def test_alone_without_momentum_and_codec_it_is_plain_training() -> None:
    model, plain = (nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 3)) for _ in range(2))
    plain.load_state_dict(model.state_dict())
    optimizers = [torch.optim.Adam(some.parameters(), 0.01) for some in (model, plain)]
    async with sharing(model, codec="none", momentum=0.0, every=1) as (_, shared):
        for step in range(20):
            for some, optimizer in zip((model, plain), optimizers, strict=True):
                train(some, optimizer, step)
            await shared.step()
            await asyncio.sleep(0)
        await shared.flush()
        for mine, merged, theirs in zip(*(some.parameters() for some in (model, shared.merged(), plain)), strict=True):
            assert torch.allclose(mine, theirs, atol=2e-6) and torch.allclose(merged, theirs, atol=2e-6)


@pytest.mark.slow
async def test_a_step_waits_for_nobody_and_lost_calls_count_once() -> None:
    """The fragments' primary is killed while pushes are under way: a follower goes on, and each push counts once."""
    one, other = make_model(1), make_model(2)
    async with contextlib.AsyncExitStack() as stack:
        bootstrap = await stack.enter_async_context(ta.TesseractNode())
        dying = contextlib.AsyncExitStack()
        node, first = await dying.enter_async_context(sharing(one, bootstrap.address))
        follower, second = await stack.enter_async_context(sharing(other, bootstrap.address))
        await asyncio.gather(steps(first, 4, 1), steps(second, 4, 2))
        await asyncio.gather(first.flush(), second.flush())
        await second.flush()
        await asyncio.sleep(1.0)  # for the follower's pull
        assert follower.metrics.total("fragments_replayed") > 0  # not whole states, but the first
        before = second.steps
        node.network.mute()
        await node.endpoint.aclose()  # as by SIGKILL: nothing is said
        train(other, torch.optim.SGD(other.parameters(), 0.1), 7)
        started = time.perf_counter()
        for _ in range(4):
            await second.step()
        assert time.perf_counter() - started < 1.0
        await second.flush(timeout=60.0)
        assert second.steps == before + 4
        assert close(anchored(second), other)
        await dying.__aexit__(ConnectionError, ConnectionError(), None)


async def test_the_report_says_which_pieces_have_no_primary() -> None:
    model, is_gone, answered = make_model(1), False, 0

    async def failing(call: Any, peer: Any, method: str, body: Any, *rest: Any, **options: Any) -> Any:
        nonlocal answered
        if is_gone and body[0].endswith(".1"):
            raise ConnectionLost("peer", "its computer is off")
        message = await call(peer, method, body, *rest, **options)
        answered += 1
        return message

    async with sharing(model, every=1) as (node, shared):
        node.on_call = failing
        is_gone, answered, started = True, 0, time.monotonic()
        assert not (await shared.step()).without_primary
        while answered < len(shared.uids) - 1:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        silent = (await shared.step()).without_primary
        assert [*silent] == [shared.uids[1]] and 0.0 < silent[shared.uids[1]] <= time.monotonic() - started
        is_gone = False
        await shared.flush()
        report = await shared.step()
        assert report.num_pushed and not report.without_primary


@pytest.mark.slow
async def test_a_push_that_waits_travels_once() -> None:
    """A round waits two seconds for a trainer that is gone; who asks meanwhile does not send again."""
    one, other = make_model(1), make_model(2)
    async with sharing(one, every=1) as (seed, first), sharing(other, seed.address) as (node, second):
        await steps(first, 1, 1)
        await first.flush()
        pushes: list[int] = []

        async def counted(call: Any, peer: Any, method: str, body: Any, buffers: Any, **options: Any) -> Any:
            pushes.extend([len(buffers)] if method == messages.PUSH else [])
            return await call(peer, method, body, buffers, **options | {"timeout": 0.3})

        node.on_call = counted
        await steps(second, 1, 2)
        await second.flush()
        assert sum(pushes) == len(second.parts) < len(pushes)


async def test_what_was_learned_on_a_base_that_is_gone_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trainer that pushes more than eight times between two pushes of another one must not shut it out."""
    monkeypatch.setattr(rounds, "MIN_WAIT", 0.01)
    async with sharing(make_model(1), every=1) as (seed, first), sharing(make_model(2), seed.address) as (_, second):
        for number in range(9):
            await steps(first, 1, number)
            await first.flush()
        await steps(second, 1, 20)
        await second.flush()
        assert all_sent(second) and second.steps == 10
        part = second.parts[0]
        part.steps_sent += 1  # a push of later steps, which is not counted
        second._add(part, Arrived(part.steps, torch.zeros(part.copy.cut.numel)))
        assert part.due_at == second.state_dict()["steps"]  # the next step pushes again


async def test_a_state_that_the_primary_does_not_have_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A follower may give any, and one that is large enough would leave nothing of a trainer's own values."""
    fetch, lies = shared_pieces.SharedPieces.fetch_state, list[int]()

    async def lying(pieces: Any, number: int, **options: Any) -> Any:
        tensors, version = await fetch(pieces, number, **options)
        if not lies and tensors["anchor"].is_floating_point():
            lies.append(number)
            tensors["anchor"] += 1e30
        return tensors, version

    monkeypatch.setattr(rounds, "MIN_WAIT", 0.01)
    async with sharing(make_model(1), every=1) as (seed, first), sharing(make_model(2), seed.address) as (_, second):
        for number in range(9):
            await steps(first, 1, number)
            await first.flush()
        before = weight(first.model).clone()
        monkeypatch.setattr(shared_pieces.SharedPieces, "fetch_state", lying)
        await steps(second, 1, 20)  # its base is too old: the state is fetched whole
        await second.wait_answers()
        await second.step()
        assert lies and torch.allclose(weight(second.model), before, atol=0.1)


async def test_who_waited_for_the_others_pushes_later_the_next_time() -> None:
    model, others_push = make_model(1), asyncio.Event()

    async def waiting(call: Any, *some: Any, **options: Any) -> Any:
        await others_push.wait()
        return await call(*some, **options)

    async with sharing(model, every=16) as (node, shared):
        node.on_call = waiting
        part = shared.parts[0]
        first = part.due_at
        await steps(shared, first + 8, 1)
        others_push.set()
        await shared.wait_answers()
        await steps(shared, 1, 2)
        assert part.due_at == first + 16 + 4  # nine steps after its push the answer was added
        # never later than one push may count as
        shared.every, part.steps_sent = fragments.MAX_STEPS, shared.state_dict()["steps"] - 8
        shared._add(part, Arrived(part.steps, torch.zeros(part.copy.cut.numel), counted=True))
        assert part.due_at == first + 16 + 4


async def test_outside_of_it_nothing_is_shared_in_silence() -> None:
    model = make_model(1)
    async with ta.TesseractNode() as node:
        shared = SharedParameters(node, model, run="tiny")
        for call in (shared.step, shared.flush, shared.merged):
            with pytest.raises(RuntimeError, match="enter them by `async with`"):
                call()
        async with shared:
            await steps(shared, 1, 1)
        assert not same(shared.merged(), make_model(1)) and shared.steps == 1  # what came out is there
        with pytest.raises(RuntimeError, match="enter them by `async with`"):
            shared.step()
        with pytest.raises(RuntimeError, match="entered once"):
            async with shared:
                pass


async def test_whatever_fails_at_the_end_no_host_stays_behind() -> None:
    class Failing:
        def stepped(self) -> None: ...

        async def leave(self) -> None:
            raise ZeroDivisionError

    async with ta.TesseractNode() as node:
        shared = SharedParameters(node, make_model(1), run="tiny")
        with pytest.raises(ZeroDivisionError):
            async with shared:
                shared.attach(Failing())
        with pytest.raises(RuntimeError, match="enter them by `async with`"):
            shared.step()
        broken = make_model(1)
        with torch.no_grad(), pytest.raises(RuntimeError, match="inference"):
            with torch.inference_mode():
                broken.register_buffer("mean", torch.zeros(3))  # such a tensor is never written
            async with SharedParameters(node, broken, run="broken"):
                pass
        # what hosted the pieces has left with it
        async with SharedParameters(node, make_model(1), run="broken"):
            pass


async def test_another_model_is_refused_by_name() -> None:
    async with sharing(make_model(1)) as (seed, _):
        stranger = nn.Sequential(nn.Linear(6, 17), nn.BatchNorm1d(17), nn.GELU(), nn.Linear(17, 3))
        with pytest.raises(LayoutMismatch, match=r"0\.weight is float32\[16, 6\], stepped in the run"):
            async with sharing(stranger, seed.address):
                pass


async def test_a_nan_of_ones_own_is_not_sent(caplog: pytest.LogCaptureFixture) -> None:
    model = make_model(1)
    async with sharing(model, every=1) as (_, shared):
        before = shared.merged()
        with torch.no_grad():
            weight(model)[0, 0] = math.nan
        report = await shared.step()
        assert isinstance(report, SharingReport) and report.num_unsound >= 1
        await shared.flush()
        assert "a NaN or infinity here, and are not shared" in caplog.text
        assert torch.equal(weight(shared.merged()), weight(before))
    async with ta.TesseractNode() as node:
        with pytest.raises(ValueError, match=r"0\.weight: a run begins with finite values"):
            async with SharedParameters(node, model, run="unsound"):
                pass


async def test_a_graph_that_is_alive_is_an_error_at_its_backward() -> None:
    model = make_model(1)
    async with sharing(model, every=1) as (_, shared):
        with torch.no_grad():
            weight(model).add_(1.0)
        await shared.step()
        loss = model(torch.ones(2, 6)).sum()
        versions = [one._version for one in model.parameters()]
        async with asyncio.timeout(20.0):
            while any(one._version == then for one, then in zip(model.parameters(), versions, strict=True)):
                await shared.step()
                await asyncio.sleep(0.01)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            await ta.backward(loss)


async def test_an_async_trainer_shares_its_master() -> None:
    model = make_model(1)

    async def loss_of(module: nn.Module, seed: int) -> torch.Tensor:
        x = torch.randn(32, 6, generator=torch.Generator().manual_seed(seed))
        await asyncio.sleep(0)
        return nn.functional.mse_loss(module(x), x[:, :3])

    async with sharing(model, every=2) as (_, shared):
        trainer = ta.AsyncTrainer(model, torch.optim.Adam(model.parameters(), 0.01), in_flight=3)
        num_merged = 0
        async for _ in trainer.run(loss_of, range(30)):
            report = await shared.step()
            num_merged += 0 if report is None else report.num_merged
        await shared.flush()
        assert num_merged and shared.steps == 30 and close(anchored(shared), model)


async def test_steps_smaller_than_the_last_bit_of_16_bits_add_up() -> None:
    """The anchor moves by a quarter of what the trainer does: less than bfloat16 can hold."""
    model = nn.ParameterList([nn.Parameter(torch.ones(4, dtype=torch.bfloat16))])
    async with sharing(model, every=1, codec="none", learning_rate=0.25, momentum=0.0) as (_, shared):
        for _ in range(8):
            with torch.no_grad():
                model[0].add_(2**-7)  # the last bit of a number between 1 and 2
            await shared.step()
            await shared.flush()
        anchor = torch.cat([part.copy.anchor for part in shared.parts])
        assert anchor.dtype == torch.float32 and torch.allclose(anchor, torch.tensor(1.0 + 2 * 2**-7), atol=1e-6)
        assert torch.equal(model[0].float(), torch.full((4,), 1.0 + 2 * 2**-7))


@pytest.mark.slow
async def test_a_run_may_name_the_values_that_its_trainers_begin_with() -> None:
    genesis = SharedParameters.genesis_of(make_model(1))
    now = int(time.time() * 1000)
    run = sign_run(OWNER, RunManifest("shared", "ffn", (1,), "ffn", created=now, lease=2.0, genesis=genesis))
    async with member(1, run, ("host", "share")) as node:
        with pytest.raises(RunMismatch, match="genesis is 'file:"):
            async with SharedParameters(node, make_model(2), run=run, host=True):
                pass
        model = make_model(1)
        async with SharedParameters(node, model, run=run, host=True) as shared:
            await steps(shared, 1, 1)
            async with (
                member(2, run, ("share",), node.address) as other,
                SharedParameters(other, make_model(3), run=run) as second,
            ):
                assert same(second.merged(), shared.merged())


def test_with_a_background_node_calls_are_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    model, threads = make_model(1), set()
    for name in ("read", "add"):
        plain = getattr(Layout, name)
        monkeypatch.setattr(Layout, name, lambda *some, f=plain: (threads.add(threading.get_ident()), f(*some))[1])
    with ta.BackgroundNode() as node, ta.SharedParameters(node, model, run="plain", every=2) as shared:
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for step in range(6):
            train(model, optimizer, step)
            report = shared.step()
            assert report is None or report.error is None
        shared.flush()
        assert shared.steps == 6 and close(anchored(shared), model)
        pieces = len(shared.uids)
        assert repr(shared) == f"SharedParameters('plain', every=2, pieces={pieces}, steps=6)"
    assert threads == {threading.get_ident()}  # the model is touched by nobody else


@pytest.mark.slow
def test_accelerates_loop_as_the_page_has_it() -> None:
    """Micro-batches are no steps: four of them with accumulation over two are two."""
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = make_model(1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    names = {"accelerator": accelerator, "model": model, "optimizer": optimizer, "loss_of": nn.functional.mse_loss}
    (loop,) = (code for code in snippets() if "accelerator" in code)
    with (
        ta.BackgroundNode() as node,
        ta.SharedParameters(node, accelerator.unwrap_model(model), run="accelerated", every=1) as shared,
    ):
        for _ in range(4):
            exec(loop, names | {"x": torch.randn(8, 6), "y": torch.randn(8, 3), "shared": shared})
        shared.flush()
        assert shared.steps == 2 and close(anchored(shared), accelerator.unwrap_model(model))


def test_lightnings_callback_steps_where_the_optimizer_did() -> None:
    """By a stand-in for its trainer, which calls hooks in Lightning's order, with accumulation over two batches."""
    (code,) = (code for code in snippets() if "Callback" in code)
    steps: list[int] = []
    names: dict[str, Any] = {"Callback": object, "shared": SimpleNamespace(step=lambda: steps.append(batch))}
    exec(code, names)
    callback, trainer = names["Share"](), SimpleNamespace(global_step=0)
    for batch in range(1, 7):
        trainer.global_step = batch // 2
        callback.on_train_batch_end(trainer, None, {}, None, batch)
    assert steps == [2, 4, 6]


def test_a_schedule_follows_everybodys_steps() -> None:
    (code,) = (code for code in snippets() if "schedule" in code)
    optimizer, shared = torch.optim.SGD([torch.zeros(1)], 2.0), SimpleNamespace(steps=0)
    names: dict[str, Any] = {"torch": torch, "optimizer": optimizer, "shared": shared}
    exec(code, names)
    shared.steps = 500  # others', too
    optimizer.step()
    names["schedule"].step()
    assert optimizer.param_groups[0]["lr"] == 1.0


def snippets() -> list[str]:
    page = (Path(__file__).parents[1] / "docs/how-to/one-model.md").read_text()
    return [textwrap.dedent(part.split("```")[0]) for part in page.split("```python\n")[1:]]


@pytest.mark.slow
async def test_two_that_begin_at_once_settle_on_one() -> None:
    one, other = make_model(1), make_model(2)
    async with contextlib.AsyncExitStack() as stack:
        bootstrap = await stack.enter_async_context(ta.TesseractNode())
        (_, first), (_, second) = await asyncio.gather(
            *(stack.enter_async_context(sharing(model, bootstrap.address)) for model in (one, other))
        )
        await asyncio.gather(steps(first, 4, 1), steps(second, 4, 2))
        async with asyncio.timeout(30.0):
            while not same(first.merged(), second.merged()) or first.steps < 8:
                await asyncio.gather(first.flush(), second.flush())


async def test_strange_pushes_are_refused_and_count_nothing() -> None:
    async with (
        sharing(make_model(1), every=1) as (node, shared),
        ta.TesseractNode(initial_peers=[node.address]) as liar,
    ):
        uid, (_, version, root) = shared.parts[0].uid, shared.parts[0].copy.base
        (replica,) = await liar.directory.find(uid)
        file = await fetch_state(liar, replica.peer, uid, weights_only=True)
        assert file and check_state(uid, file, weights_only=True)["module"].keys() == NEWCOMERS | {LAST}
        good = shared.parts[0].copy.push(torch.zeros(shared.parts[0].copy.cut.numel))
        shared.parts[0].copy.cancel()
        bodies: list[tuple[list[object], list[bytes]]] = [
            ([uid], [good]),
            ([uid, b"short", version, root, 1], [good]),
            ([uid, bytes(16), version, root, 2**63], [good]),
            ([uid, bytes(16), version, root, 1], [good, good]),
            ([uid, bytes(16), version, root, 1], [good[:-1]]),
            ([uid, bytes(16), version, root, 1], [b"\xff" * len(good)]),
        ]
        for body, buffers in bodies:
            with pytest.raises(ta.errors.RemoteError):
                await liar.call_expert(replica.peer, messages.PUSH, body, buffers, timeout=10.0)
        reply = await liar.call_expert(
            replica.peer, messages.PUSH, [uid, bytes(16), version, root, 1], [], timeout=10.0
        )
        assert reply.body[:2] == [False, True]  # no such push is here
        reply = await liar.call_expert(replica.peer, messages.PUSH, [uid, bytes(16), 5, root, 1], [good], timeout=10.0)
        assert reply.body[:2] == [False, False]  # of a version that is not here
        for method in (messages.FORWARD, messages.BACKWARD):
            with pytest.raises(ta.errors.UnknownMethod):
                await liar.call_expert(replica.peer, method, [uid], [], timeout=10.0)
        await shared.flush()
        assert shared.parts[0].copy.base == (0, version, root)


@pytest.mark.parametrize("every", [0, 1025])
def test_a_push_holds_no_more_steps_than_count(every: int) -> None:
    with pytest.raises(ValueError, match="at most 1024"):
        SharedParameters(None, make_model(1), run="tiny", every=every)  # type: ignore[arg-type]


def test_the_program_of_the_page_runs() -> None:
    exec(snippets()[0], {})


async def test_of_a_flood_of_pushes_one_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int] = []
    judge, loop, is_measured = fragment_calls.judge, asyncio.get_running_loop(), asyncio.Event()

    def noted_judge(*some: Any) -> Any:  # in the device thread, later than the refusals of the others if it pleases
        measured.append(1)
        loop.call_soon_threadsafe(is_measured.set)
        return judge(*some)

    monkeypatch.setattr(fragment_calls, "judge", noted_judge)
    async with (
        sharing(make_model(1), every=1) as (node, shared),
        ta.TesseractNode(initial_peers=[node.address]) as liar,
    ):
        await steps(shared, 1, 1)
        await shared.flush()  # it takes part now, so rounds wait for it
        part = shared.parts[0]
        _, version, root = part.copy.base
        (replica,) = await liar.directory.find(part.uid)
        data = part.copy.push(part.copy.anchor.clone())
        part.copy.cancel()
        before = len(measured)
        is_measured.clear()
        calls = [
            asyncio.create_task(
                liar.call_expert(
                    replica.peer, messages.PUSH, [part.uid, number.to_bytes(16), version, root, 1], [data], timeout=9.0
                )
            )
            for number in range(30)
        ]
        while len(done := [call for call in calls if call.done()]) < 29:
            await asyncio.wait([call for call in calls if not call.done()], return_when=asyncio.FIRST_COMPLETED)
        await asyncio.wait_for(is_measured.wait(), 9.0)
        assert len(measured) == before + 1 and all(isinstance(call.exception(), Overloaded) for call in done)
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)


class Odd(nn.Module):
    """Tied, frozen and bf16 parameters, floating and integer buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 8)
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.table.weight
        self.low = nn.Linear(8, 8, dtype=torch.bfloat16)
        self.frozen = nn.Parameter(torch.randn(8), requires_grad=False)
        self.register_buffer("scale", torch.ones(3))
        self.register_buffer("seen", torch.zeros(2, dtype=torch.int64))


@pytest.mark.slow
async def test_odd_parameters_are_shared_each_in_its_way() -> None:
    torch.manual_seed(3)
    one, other = Odd(), Odd()
    async with sharing(one) as (seed, first), sharing(other, seed.address) as (_, second):
        assert same(one, other) and other.head.weight is other.table.weight
        frozen = one.frozen.clone()
        with torch.no_grad():
            for number, model in enumerate((one, other), 1):
                model.table.weight.add_(0.5 * number)
                model.low.weight.add_(0.25)
                model.frozen.add_(float(number))
                model.get_buffer("scale").add_(float(number))
                model.get_buffer("seen").add_(100 * number)
        await second.step()
        await second.step()  # it has more steps
        await first.step()
        for _ in range(2):  # the second time with what the other one sent last
            await asyncio.gather(first.flush(), second.flush())
        merged = first.merged()
        assert isinstance(merged, Odd) and same(merged, second.merged())
        assert merged.low.weight.dtype == torch.bfloat16
        assert merged.head.weight is merged.table.weight and not torch.equal(
            merged.table.weight, one.table.weight - 0.5
        )
        assert torch.equal(merged.frozen, frozen) and torch.equal(other.frozen, frozen + 2.0)
        assert bool((merged.get_buffer("scale") > 1.5).all())
        assert merged.get_buffer("seen").tolist()[0] in (100, 200)


OWNER = ta.Identity.from_seed(bytes([9]) * 32)


@contextlib.asynccontextmanager
async def member(
    number: int, run: SignedRun, roles: tuple[Role, ...], *seeds: str, pattern: str = ""
) -> AsyncIterator[ta.TesseractNode]:
    identity, now = ta.Identity.from_seed(bytes([number]) * 32), int(time.time())
    assert run.tag is not None
    run_id = run.tag.run_id("ffn")
    some = ExpertPattern.parse(pattern) if pattern else None
    grant = sign_grant(OWNER, run_id, identity.peer_id, roles, serial=now, not_after=now + GRANT_SECONDS, pattern=some)
    async with ta.TesseractNode(initial_peers=seeds, identity=identity) as node:
        await node.join_run(run, grant=grant_text(grant))
        yield node


async def test_in_a_run_the_role_decides_who_shares_and_who_hosts() -> None:
    manifest = RunManifest("shared", "ffn", (1,), "ffn", created=int(time.time() * 1000), lease=2.0)
    run = sign_run(OWNER, manifest)
    async with member(1, run, ("host", "share")) as host:
        first = SharedParameters(host, make_model(1), run=run, every=2, host=True)
        async with (
            first,
            # some experts are its, but the parameters are one model's
            member(2, run, ("host", "share"), host.address, pattern="ffn.[0:1]") as node,
            member(3, run, ("train",), host.address) as no,
        ):
            async with SharedParameters(node, make_model(2), run=run, every=2) as second:
                assert same(first.model, second.model)
                await asyncio.gather(steps(first, 4, 1), steps(second, 4, 2))
                for _ in range(2):
                    await asyncio.gather(first.flush(), second.flush())
                assert same(first.merged(), second.merged()) and first.steps == 8
            with pytest.raises(ta.errors.NotAllowed, match=r"may not host .* for more than ffn\.0"):
                await SharedParameters(node, make_model(2), run=run, host=True).__aenter__()
            with pytest.raises(ta.errors.NotAllowed, match="ask its owner for the role share"):
                await SharedParameters(no, make_model(3), run=run).__aenter__()
            part = first.parts[0]
            _, version, root = part.copy.base
            with pytest.raises(ta.errors.NotAllowed, match="may not share"):  # asked or not
                (replica,) = await no.directory.find(part.uid)
                body = [part.uid, bytes(16), version, root, 1]
                await no.call_expert(replica.peer, messages.PUSH, body, [b""], timeout=10.0)
            assert first.parts[0].steps == 8


@pytest.mark.slow
async def test_in_a_run_a_follower_takes_over_and_no_push_counts_twice() -> None:
    manifest = RunManifest("shared", "ffn", (1,), "ffn", created=int(time.time() * 1000), lease=2.0)
    run = sign_run(OWNER, manifest)
    async with contextlib.AsyncExitStack() as stack:
        bootstrap = await stack.enter_async_context(ta.TesseractNode())
        dying = contextlib.AsyncExitStack()
        trainers, nodes = [], list[ta.TesseractNode]()
        for number in (1, 2, 3):
            entered = dying if number == 1 else stack
            node = await entered.enter_async_context(member(number, run, ("host", "share"), bootstrap.address))
            nodes.append(node)
            shared = SharedParameters(node, make_model(number), run=run, every=2, host=True)
            trainers.append(await entered.enter_async_context(shared))
        await asyncio.gather(*(steps(one, 4, seed) for seed, one in enumerate(trainers)))
        await asyncio.gather(*(one.flush() for one in trainers))
        await asyncio.sleep(2.0)  # followers have the Seals' files
        first, *others = trainers
        assert sum(one.metrics.total("fragments_replayed") for one in nodes) > 0
        nodes[0].network.mute()
        await nodes[0].endpoint.aclose()  # as by SIGKILL: nothing is said
        await asyncio.gather(*(steps(one, 4, 10 + seed) for seed, one in enumerate(others)))
        for _ in range(2):  # the second time with what the other one sent last
            await asyncio.gather(*(one.flush() for one in others))
        assert same(others[0].merged(), others[1].merged())
        assert others[0].steps == 20
        await dying.__aexit__(ConnectionError, ConnectionError(), None)


@contextlib.asynccontextmanager
async def fragment_server(
    number: int, run: SignedRun, room: int, *seeds: str
) -> AsyncIterator[tuple[ta.TesseractServer, ReplicaKeeper]]:
    async with member(number, run, ("host",), *seeds) as node:
        server, authority = ta.TesseractServer(node, {}), node.trust.authority("ffn")
        assert authority is not None
        async with (
            server,
            ReplicaKeeper(server, settings=ReplicaSettings(check_every=0.5, call_timeout=5.0)) as keeper,
            Placing.of_fragments(server, keeper, authority, room, 16),
        ):
            yield server, keeper


@pytest.mark.slow
async def test_the_runs_servers_lead_follow_and_hold_what_trainers_share() -> None:
    """Three servers see what a trainer begins, and take their part; it leaves, and others train on."""
    manifest = RunManifest("shared", "ffn", (1,), "ffn", created=int(time.time() * 1000), lease=1.0, num_replicas=3)
    run = sign_run(OWNER, manifest)
    async with contextlib.AsyncExitStack() as stack:
        bootstrap = await stack.enter_async_context(ta.TesseractNode())
        leaving = contextlib.AsyncExitStack()
        stack.push_async_callback(leaving.aclose)
        node = await leaving.enter_async_context(member(1, run, ("host", "share"), bootstrap.address))
        model = make_model(1)
        first = await leaving.enter_async_context(SharedParameters(node, model, run=run, every=2, host=True))
        rooms = {2: 16, 3: 16, 4: 0}
        servers = [
            await stack.enter_async_context(fragment_server(number, run, room, bootstrap.address))
            for number, room in rooms.items()
        ]
        holder, keepers = servers[-1][0], [keeper for _, keeper in servers]

        def have(version: int) -> bool:
            held = [
                keeper.tenures.tenure(uid).held if uid in keeper.tenures.uids() else None
                for keeper in keepers
                for uid in first.uids
            ]
            return all(one is not None and one.version >= version for one in held)

        async with asyncio.timeout(60.0):
            while not have(0):  # noqa: ASYNC110
                await asyncio.sleep(0.1)
            assert not holder.experts
            for round_ in range(3):
                await steps(first, 2, round_)
                await first.flush()
            version = min(part.copy.base[1] for part in first.parts if part.copy.cut.kind is not MergeKind.FIXED)
            while not have(version):  # noqa: ASYNC110
                await asyncio.sleep(0.1)
            # a holder has the file, and follows by updates as others do
            assert holder.node.metrics.total("fragments_replayed") > 0
            merged, model = first.merged(), anchored(first)
            await leaving.aclose()
            node = await stack.enter_async_context(member(5, run, ("share",), bootstrap.address))
            second = SharedParameters(node, make_model(2), run=run, every=2)
            async with second:
                assert same(second.model, model) and same(second.merged(), merged) and second.steps == 6
                await steps(second, 4, 7)
                await second.flush()
                assert second.steps == 10
