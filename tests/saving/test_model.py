"""A whole model as a folder: saved from real nodes, loaded without any, and restored."""

import asyncio
import contextlib
import copy
import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tesseract_async as ta
from tesseract_async.client.gating_function import SwitchGatingFunction
from tesseract_async.errors import CheckpointError
from tesseract_async.runtime.runtime import RuntimeSettings
from tesseract_async.saving.folder import SavedExperts, open_folder
from tesseract_async.saving.model import restore_model
from tesseract_async.saving.saver import SavePoint
from tesseract_async.server.server import ServerSettings
from tesseract_async.sharing.rounds import Rounds
from tests.sharing.hurried import hurried
from tests.watching import watched

WIDTH, GRID = 6, (2, 2)
HERE = __name__


class Residual(nn.Module):
    """A part of the caller's own."""

    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self.first, self.gate = nn.Linear(WIDTH, WIDTH), gate
        self.scale, self.steps = 0.5, (1, 2)
        self.register_buffer("shift", torch.full((WIDTH,), 0.25), persistent=False)
        self.last = nn.Linear(WIDTH, 3)
        self.tied = self.last

    async def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x)) * self.scale + self.get_buffer("shift")
        y: torch.Tensor = self.tied(x + await self.gate(x))
        return y


def make_server(node: ta.TesseractNode, uids: list[str], folder: Path) -> ta.TesseractServer:
    experts = {}
    for number, uid in enumerate(uids):
        torch.manual_seed(number)
        module = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
        experts[uid] = ta.ExpertBackend(
            module,
            optimizer=torch.optim.Adam(module.parameters(), 0.01),
            args_schema=(ta.TensorSpec((WIDTH,)),),
            max_batch_size=64,
        )
    # each expert alone: what is computed together differs in the last digits
    settings = ServerSettings(runtime=RuntimeSettings(groups_experts=False))
    return ta.TesseractServer(node, experts, checkpoint_dir=folder, settings=settings)


UIDS = [f"ffn.{a}.{b}" for a, b in ((0, 0), (0, 1), (1, 1))]


class Swarm:
    def __init__(self, node: ta.TesseractNode, host: ta.TesseractNode, server: ta.TesseractServer) -> None:
        self.node, self.host, self.server = node, host, server

    def gate(self, **options: Any) -> ta.GatingFunction:
        settings = ta.MixtureSettings(calls=ta.CallOptions(codec="none"))
        given: dict[str, Any] = {"uid_prefix": "ffn", "grid_size": GRID, "in_features": WIDTH, "k_best": 2}
        return ta.GatingFunction(self.node, **given | {"settings": settings} | options)

    def trainer(self) -> ta.AsyncTrainer[Residual]:
        """One whose steps do not depend on how fast experts answer."""
        torch.manual_seed(7)
        settings = ta.MixtureSettings(
            calls=ta.CallOptions(codec="none"),
            refill=False,
            backward_k_min=2,
            forward_timeout=60.0,
            backward_timeout=60.0,
        )
        model = Residual(self.gate(k_min=2, settings=settings))
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
        return ta.AsyncTrainer(model, optimizer, scheduler=schedule, publish=False)


@pytest.fixture
async def swarm(tmp_path: Path) -> AsyncIterator[Swarm]:
    async with ta.TesseractNode() as host, ta.TesseractNode(initial_peers=[host.address]) as node:
        async with make_server(host, UIDS, tmp_path / "experts") as server:
            yield Swarm(node, host, server)


async def loss_of(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    x, y = batch
    return nn.functional.cross_entropy(await model(x), y)


def batches(start: int, num: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    draws = [torch.Generator().manual_seed(start + i) for i in range(num)]
    return [(torch.randn(8, WIDTH, generator=g), torch.randint(3, (8,), generator=g)) for g in draws]


async def train(trainer: ta.AsyncTrainer[Any], start: int, num: int) -> list[float]:
    return [float((await trainer.step(loss_of, batch)).loss) for batch in batches(start, num)]


async def test_a_saved_model_answers_without_the_swarm_as_the_swarm_did(swarm: Swarm, tmp_path: Path) -> None:
    trainer = swarm.trainer()
    await train(trainer, 0, 3)
    folder = tmp_path / "saved"
    report = await ta.save_model(swarm.node, trainer.module, folder)
    assert report.taken == {uid: swarm.server.experts[uid].version for uid in UIDS} and sum(report.taken.values()) > 3
    x = torch.randn(16, WIDTH)
    trainer.module.eval()
    with torch.no_grad():
        expected = await trainer.module(x)
        with pytest.raises(CheckpointError, match=f"allow it with allowed_modules=.'{HERE}'"):
            ta.load_model(folder)
        loaded = ta.load_model(folder, allowed_modules=[HERE])
        assert type(loaded) is Residual and type(loaded.gate) is ta.LocalMixture and loaded.tied is loaded.last
        assert not loaded.training and (loaded.scale, loaded.steps) == (0.5, (1, 2))
        torch.testing.assert_close(await loaded(x), expected, rtol=0, atol=1e-6)
    index = json.loads((folder / "model.json").read_text())
    index["model"]["modules"]["gate"]["gate"]["in_features"] = 10**12  # nothing of that size is made
    shutil.copytree(folder, tmp_path / "large")
    (tmp_path / "large" / "model.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="another shape than its gate"):
        ta.load_model(tmp_path / "large", allowed_modules=[HERE])
    # ... is trained on here, experts included
    (await loaded(x)).sum().backward()
    assert loaded.gate.proj.weight.grad is not None and any(
        one.grad is not None for one in loaded.gate.experts.parameters()
    )
    # ... and in a model of the caller's own
    mixture = ta.LocalMixture(
        SavedExperts(folder), uid_prefix="ffn", grid_size=GRID, in_features=WIDTH, k_best=2, is_awaited=True
    )
    with torch.no_grad():
        torch.testing.assert_close(
            await ta.load_model(folder, Residual(mixture)).eval()(x), expected, rtol=0, atol=1e-6
        )
        with pytest.raises(CheckpointError, match=r"proj\.weight is not in the folder"):
            ta.load_model(folder, mixture)
    # a second time, only what has changed is fetched
    report = await ta.save_model(swarm.node, trainer.module, folder)
    assert not report.taken and sorted(report.kept) == UIDS


@pytest.mark.parametrize("kind", ["sample", "token", "switch", "capacity", "half", "double"])
async def test_every_kind_of_gate_has_its_local_one(swarm: Swarm, tmp_path: Path, kind: str) -> None:
    settings = ta.MixtureSettings(
        calls=ta.CallOptions(codec="none"),
        on_missing="zero" if kind == "capacity" else "raise",
        capacity_factor=0.5 if kind == "capacity" else None,
        refill=kind != "capacity",
    )
    torch.manual_seed(3)
    if kind == "switch":
        gate: ta.GatingFunction = SwitchGatingFunction(
            swarm.node, uid_prefix="ffn", grid_size=GRID, in_features=WIDTH, settings=settings
        )
    else:
        gate = swarm.gate(settings=settings, route="token" if kind == "token" else "sample")
    x = torch.randn(4, 5, WIDTH) if kind in ("token", "switch") else torch.randn(20, WIDTH)
    if kind in ("half", "double"):  # the gate's own: experts keep theirs
        gate, x = gate.to(getattr(torch, kind)), x.to(getattr(torch, kind))
    await ta.save_model(swarm.node, gate.eval(), tmp_path / "saved")
    local = ta.load_model(tmp_path / "saved")
    with torch.no_grad():
        mixed, found = await gate.mix(x), await local.mix(x)
    assert torch.equal(found.num_answers, mixed.num_answers) and found.output.dtype == mixed.output.dtype
    torch.testing.assert_close(found.output, mixed.output, rtol=0, atol=1e-6)
    assert (await local(x[:0])).shape == x[:0].shape
    # states go both ways, and leave or drop the experts
    again = ta.LocalMixture(dict.fromkeys(UIDS, nn.Linear(1, 1)), uid_prefix="ffn", grid_size=GRID, in_features=WIDTH)
    again.load_state_dict(gate.state_dict())
    assert torch.equal(again.proj.weight, gate.proj.weight)
    nn.Sequential(gate).load_state_dict(nn.Sequential(local).state_dict())
    nn.Sequential(local).load_state_dict(nn.Sequential(gate).state_dict())


class Tied(nn.Module):
    """Two gates over one grid's columns, of which the first one's are also the rows of a layer."""

    def __init__(self, *gates: nn.Module) -> None:
        super().__init__()
        self.gates, self.last = nn.ModuleList(gates), nn.Linear(WIDTH, sum(GRID))

    async def forward(self, x: torch.Tensor) -> torch.Tensor:
        for gate in self.gates:
            x = x + await gate(x)
        y: torch.Tensor = self.last(x)
        return y


async def test_what_gates_have_in_common_with_others_and_what_is_frozen_stays_so(swarm: Swarm, tmp_path: Path) -> None:
    model = Tied(swarm.gate(), swarm.gate()).eval()
    one, other = (gate.proj for gate in model.gates)
    other.weight = model.last.weight = one.weight
    other.bias.requires_grad_(False)
    await ta.save_model(swarm.node, model, tmp_path / "saved")
    loaded, x = ta.load_model(tmp_path / "saved", allowed_modules=[HERE]), torch.randn(5, WIDTH)
    with torch.no_grad():
        torch.testing.assert_close(await loaded(x), await model(x), rtol=0, atol=1e-6)
    one, other = (gate.proj for gate in loaded.gates)
    assert one.weight is other.weight is loaded.last.weight
    assert one.bias.requires_grad and not other.bias.requires_grad


async def test_what_is_no_whole_model_is_not_written_in_silence(swarm: Swarm, tmp_path: Path) -> None:
    async with ta.TesseractNode() as alone:
        with pytest.raises(ValueError, match="the gate is on another node"):
            await ta.save_model(alone, swarm.gate(), tmp_path / "saved")
    with pytest.raises(ValueError, match="no GatingFunction, whose experts"):
        await ta.save_model(swarm.node, nn.Linear(1, 1), tmp_path / "saved")
    with pytest.raises(CheckpointError, match="nobody has an expert of other"):
        await ta.save_model(swarm.node, swarm.gate(uid_prefix="other"), tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    for part in (ta.ExpertPool(swarm.node, "ffn.0", num_experts=2), ta.RemoteExpert(swarm.node, "ffn.0.0")):
        model = nn.Sequential(swarm.gate(), part)
        await ta.save_model(swarm.node, model, tmp_path / "saved")
        with pytest.raises(CheckpointError, match=f"1 is {type(part).__name__}, and only gates' experts are saved"):
            ta.load_model(tmp_path / "saved")


async def test_going_on_from_a_save_point_equals_never_having_stopped(swarm: Swarm, tmp_path: Path) -> None:
    trainer = swarm.trainer()
    await train(trainer, 0, 5)
    folder = tmp_path / "saved"
    await ta.save_model(swarm.node, trainer.module, folder, trainer=trainer, optimizers=True)
    expected = await train(trainer, 5, 20)
    states = {uid: one.state()["module"] for uid, one in swarm.server.experts.items()}
    versions = {uid: one.version for uid, one in swarm.server.experts.items()}
    other = swarm.trainer()
    with pytest.raises(CheckpointError, match="not the model that was saved"):
        await restore_model(swarm.node, nn.Linear(2, 2), folder)
    assert versions == {uid: one.version for uid, one in swarm.server.experts.items()}  # no server went back
    restored = await restore_model(swarm.node, other.module, folder, trainer=other)
    assert restored == {uid: one.version for uid, one in open_folder(folder).experts.items()}
    assert restored == {uid: one.version for uid, one in swarm.server.experts.items()} != versions
    assert await train(other, 5, 20) == expected
    assert versions == {uid: one.version for uid, one in swarm.server.experts.items()}
    for uid, state in states.items():
        for name, tensor in swarm.server.experts[uid].state()["module"].items():
            assert torch.equal(tensor, state[name])
    # what was learned after the save point was not thrown away
    assert list((tmp_path / "experts").glob("*/*.aside"))


@pytest.mark.slow
async def test_going_on_with_shared_parameters_equals_never_having_stopped(swarm: Swarm, tmp_path: Path) -> None:
    trainer = swarm.trainer()
    async with ta.SharedParameters(swarm.node, trainer.module, run="tiny", every=3) as shared:

        async def steps(start: int, num: int) -> list[float]:
            losses = []
            for batch in batches(start, num):
                losses.append(float((await trainer.step(loss_of, batch)).loss))
                await shared.step()
                await shared.wait_answers()  # alone, a round closes when its push has come
            return losses

        await steps(0, 5)
        await ta.save_model(swarm.node, shared, tmp_path / "saved", trainer=trainer, optimizers=True)
        expected, state = await steps(5, 20), shared.state_dict()
        await restore_model(swarm.node, shared, tmp_path / "saved", trainer=trainer)
        assert await steps(5, 20) == expected and shared.state_dict() == state


async def test_a_save_point_is_of_one_moment(swarm: Swarm, tmp_path: Path) -> None:
    trainer = ta.AsyncTrainer((first := swarm.trainer()).module, first.optimizer, in_flight=4, publish=False)
    reports = trainer.run(loss_of, batches(0, 40))
    async for report in reports:
        if report.version == 5:
            await ta.save_model(swarm.node, trainer.module, tmp_path / "saved", trainer=trainer)
    saved = open_folder(tmp_path / "saved")
    state = saved.trainer()["trainer"]
    # each step in which a row chose an expert is a step of that expert: no expert is ahead of the trainer
    assert 5 <= state["version"] <= 9 and trainer.version == 40
    assert max(one.version for one in saved.experts.values()) <= state["version"]
    assert max(one.version for one in swarm.server.experts.values()) > state["version"]


async def test_what_nobody_gives_is_told(swarm: Swarm, tmp_path: Path) -> None:
    gate = swarm.gate()
    swarm.host.unhost_expert("ffn.0.1")
    with pytest.raises(CheckpointError, match=r"could not be saved: ffn.0.1 \("):
        await ta.save_model(swarm.node, gate, tmp_path / "saved")
    assert sorted(SavedExperts(tmp_path / "saved")) == ["ffn.0.0", "ffn.1.1"]
    swarm.host.host_expert("ffn.0.1", {})
    with pytest.raises(ValueError, match="no GatingFunction"):
        await ta.save_model(swarm.node, nn.Linear(2, 2), tmp_path / "saved")


async def test_shared_parameters_are_saved_and_restored_with_their_pieces(tmp_path: Path) -> None:
    def make() -> nn.Module:
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(WIDTH, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))

    async def steps(shared: ta.SharedParameters[Any], optimizer: torch.optim.Optimizer, start: int) -> list[float]:
        losses = []
        for x, y in batches(start, 8):
            loss = nn.functional.cross_entropy(shared.model(x), y)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            await shared.step()
            await shared.wait_answers()  # alone, a round closes when its push has come
            losses.append(float(loss.detach()))
        return losses

    folder, model = tmp_path / "saved", make()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    async with ta.TesseractNode() as node, ta.SharedParameters(node, model, run="tiny", every=3) as shared:
        await steps(shared, optimizer, 0)
        await ta.save_model(node, shared, folder, optimizers=True)
        state = shared.state_dict()
        merged, expected = shared.merged(), await steps(shared, optimizer, 8)
        pieces = {one.uid: one.copy.base for one in shared.parts}
        await ta.restore_model(node, shared, folder)
        assert shared.state_dict() == state
        assert await steps(shared, optimizer, 8) == expected
        assert {one.uid: one.copy.base for one in shared.parts} == pieces
        # without a swarm it is the merged copy
        loaded = ta.load_model(folder)
        for name, tensor in merged.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor)


@contextlib.asynccontextmanager
async def two_trainers() -> AsyncIterator[tuple[ta.TesseractNode, list[ta.SharedParameters[nn.Module]]]]:
    async with ta.TesseractNode() as node, ta.TesseractNode(initial_peers=[node.address]) as other:
        async with contextlib.AsyncExitStack() as stack:
            trainers: list[ta.SharedParameters[nn.Module]] = []
            for one in (node, other):
                model: nn.Module = nn.Linear(WIDTH, 40)
                shared = ta.SharedParameters(one, model, run="two", every=1, host=one is node)
                trainers.append(await stack.enter_async_context(shared))
            yield node, trainers


async def learn(shared: ta.SharedParameters[nn.Module]) -> None:
    with torch.no_grad():
        for parameter in shared.model.parameters():
            parameter.add_(torch.randn_like(parameter))
    await shared.step()


@pytest.mark.slow
@pytest.mark.parametrize("pushes", [False, True])
async def test_a_trainer_is_saved_as_it_belongs_to_its_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pushes: bool
) -> None:
    """Others' rounds close between its last answer and the save point, with a push of its own or without one."""
    mark = SavePoint.mark

    async def later(point: SavePoint, **options: Any) -> None:
        if pushes:
            await learn(first)
        await learn(second)
        await hurried(second.wait_answers(), first.wait_answers())
        await mark(point, **options)

    async with two_trainers() as (node, (first, second)):
        for one in (first, second):
            await learn(one)
        await asyncio.gather(first.flush(), second.flush())
        monkeypatch.setattr(SavePoint, "mark", later)
        await ta.save_model(node, first, tmp_path / "saved", optimizers=True)
        before = copy.deepcopy(first.model.state_dict())
        await first.flush()  # adds what has come
        saved = open_folder(tmp_path / "saved").trainer()
        for name, tensor in first.model.state_dict().items():
            torch.testing.assert_close(saved["local"][name], tensor, rtol=0, atol=1e-5)
            assert not torch.equal(tensor, before[name])
        assert [then for _, then in saved["shared"]["parts"]] == [one.steps_then for one in first.parts]


@pytest.mark.slow
async def test_a_push_from_before_does_not_count_in_a_state_that_was_gone_back_to(tmp_path: Path) -> None:
    async with two_trainers() as (node, (first, second)):
        for one in (first, second):
            await learn(one)
        await asyncio.gather(first.flush(), second.flush())
        await ta.save_model(node, first, tmp_path / "saved", optimizers=True)
        saved, num = [part.copy.base[1:] for part in first.parts], len(first.uids)
        for one in (first, second):
            with watched(Rounds.add, Rounds.close) as seen:
                await learn(one)
                await seen.wait(Rounds.add, num)
                for task in second._asking:  # it is gone; its push is there
                    task.cancel()
                await ta.restore_model(node, first, tmp_path / "saved")
                await hurried(seen.wait(Rounds.close, num))
            await first.flush()
            assert [part.copy.base[1:] for part in first.parts] == saved


@pytest.mark.slow
async def test_four_trainers_go_on_from_a_save_point_as_if_they_had_never_stopped(tmp_path: Path) -> None:
    """Where each waits for its answers, rounds close when all four have pushed, in whatever order."""

    def make(number: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(number)
        model = nn.Sequential(nn.Linear(WIDTH, 8), nn.GELU(), nn.Linear(8, 3))
        return model, torch.optim.Adam(model.parameters(), 0.01)

    async with contextlib.AsyncExitStack() as stack:
        trainers: list[tuple[ta.SharedParameters[Any], torch.optim.Optimizer]] = []
        nodes: list[ta.TesseractNode] = []
        for number in range(4):
            seeds = [one.address for one in nodes[:1]]
            nodes.append(await stack.enter_async_context(ta.TesseractNode(initial_peers=seeds)))
            model, optimizer = make(number)
            shared = ta.SharedParameters(nodes[-1], model, run="four", every=100, host=number == 0)
            trainers.append((await stack.enter_async_context(shared), optimizer))

        async def steps(start: int, num: int) -> list[float]:
            losses = []
            for turn in range(start, start + num):
                for number, (shared, optimizer) in enumerate(trainers):
                    ((x, y),) = batches(100 * number + turn, 1)
                    loss = nn.functional.cross_entropy(shared.model(x), y)
                    optimizer.zero_grad()
                    loss.backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
                    await shared.step()
                    losses.append(float(loss.detach()))
                await asyncio.gather(*(shared.flush() for shared, _ in trainers))
            return losses

        await steps(0, 5)
        first = trainers[0][0]
        await ta.save_model(nodes[0], first, tmp_path / "saved", optimizers=True)
        kept = [
            copy.deepcopy((one.model.state_dict(), optimizer.state_dict(), one.state_dict()))
            for one, optimizer in trainers
        ]
        expected, versions = await steps(5, 20), [one.copy.base[1] for one in first.parts]
        assert set(versions) == {25}  # as many rounds as steps: none closed without all
        await ta.restore_model(nodes[0], first, tmp_path / "saved")
        for (shared, optimizer), (model_state, optimizer_state, state) in zip(trainers, kept, strict=True):
            shared.model.load_state_dict(model_state)
            optimizer.load_state_dict(optimizer_state)
            await shared.rejoin(state)
        assert await steps(5, 20) == expected
        assert [one.copy.base[1] for one in first.parts] == versions


def test_plain_calls_save_and_load_plain_models(tmp_path: Path) -> None:
    with ta.BackgroundNode() as node, node.entered(make_server(node.node, UIDS, tmp_path / "experts")):
        gate = ta.GatingFunction(node, uid_prefix="ffn", grid_size=GRID, in_features=WIDTH, k_best=2)
        model = nn.Sequential(nn.Linear(WIDTH, WIDTH), gate, nn.Linear(WIDTH, 2)).eval()
        x = torch.randn(5, WIDTH)
        with torch.no_grad():
            expected = model(x)
            report = ta.save_model(node, model, tmp_path / "saved", optimizers=True)
            assert sorted(report.taken) == UIDS
            torch.testing.assert_close(ta.load_model(tmp_path / "saved")(x), expected, rtol=0, atol=1e-6)
            # half precision is the gate's own: experts keep theirs
            halved = model.half()(x.half())
            assert halved.dtype == torch.float16
            torch.testing.assert_close(halved.float(), expected, rtol=0, atol=2e-2)
        assert ta.restore_model(node, model.float(), tmp_path / "saved") == report.taken
