"""What is saved is of one moment: shared parameters, and the experts that were trained with them."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Mapping
from pathlib import Path

import pytest
import torch
from torch import nn

import tesseract_async as ta
from tesseract_async.endpoint.call_table import CallHandler
from tesseract_async.endpoint.endpoint import IncomingCall, Message
from tesseract_async.experts.manifest import join_uid
from tesseract_async.experts.trust import SHARED
from tesseract_async.identity import Identity
from tesseract_async.saving.folder import SavedExperts, open_folder
from tesseract_async.server.fragments import FragmentBackend
from tesseract_async.sharing.fragment import Fragment, Outer
from tesseract_async.sharing.layout import Layout
from tesseract_async.sharing.manifest import SharedManifest
from tesseract_async.sharing.rounds import Rounds, judge
from tesseract_async.wire import compression, messages
from tests.cli.processes import finish
from tests.stem import Stem

PEER = Identity.from_seed(bytes(32)).peer_id


class Training:
    """A swarm in which everything is trained together: expert and pieces hold the number of the step."""

    def __init__(self) -> None:
        self.model = nn.Linear(4, 40)
        for one in self.model.parameters():
            nn.init.zeros_(one)
        self.manifest = SharedManifest(Layout.of(self.model), Outer(momentum=0.0, codec="none"))
        self.expert = ta.ExpertBackend(nn.Linear(4, 4), args_schema=(ta.TensorSpec((4,)),), max_batch_size=4)
        self.pieces: list[FragmentBackend] = []
        for number, cut in enumerate(self.manifest.layout.cuts):
            fragment = Fragment(cut, self.manifest.outer, self.manifest.layout.read(self.model, cut))
            self.pieces.append(FragmentBackend(self.manifest.part(number), fragment))
        self.num_steps = 0

    def step(self) -> None:
        self.num_steps += 1
        with torch.no_grad():
            for parameter in self.expert.module.parameters():
                parameter.fill_(self.num_steps)
        self.expert.version = self.num_steps
        for piece in self.pieces:
            cut, rounds = piece.fragment.cut, Rounds(piece.version, max_steps=1)
            data = bytes(compression.encode(-torch.ones(cut.numel), "none"))
            push = judge(PEER, self.num_steps.to_bytes(16, "big"), 1, data, cut, self.manifest.outer)
            rounds.add(push, piece.version, 0.0)
            piece.close_round(rounds, rounds.close(), piece.samples)

    def check(self, folder: Path) -> None:
        (uid,) = experts = SavedExperts(folder)
        values = {float(one) for tensor in open_folder(folder).tensors().values() for one in tensor.flatten()}
        assert values == {float(experts.index[uid].version)} == {float(experts[uid].state_dict()["bias"][0])} != {0.0}


class SteppingNode(ta.TesseractNode):
    """Its swarm takes a step between any two answers, except those that begin a save point."""

    def __init__(self, training: Training) -> None:
        super().__init__()
        self.training = training

    def host_expert(self, uid: str, handlers: Mapping[str, CallHandler]) -> None:
        stepping = {
            method: self._stepping(handlers[method]) for method in {messages.STATE, messages.PULL} & {*handlers}
        }
        super().host_expert(uid, {**handlers, **stepping})

    def _stepping(self, handler: CallHandler) -> CallHandler:
        async def stepping(call: IncomingCall) -> Message:
            request = messages.decode(messages.StateRequest, call.body) if call.method == messages.STATE else None
            if request is None or request.point == messages.NO_POINT:
                self.training.step()
            answer = handler(call)
            assert isinstance(answer, Awaitable)
            message: Message = await answer
            return message

        return stepping


@pytest.fixture
async def swarm() -> AsyncIterator[tuple[Training, str]]:
    training = Training()
    uids = {join_uid("tiny" + SHARED, (number,)): piece for number, piece in enumerate(training.pieces)}
    async with SteppingNode(training) as host, ta.TesseractServer(host, {"ffn.0": training.expert, **uids}):
        yield training, host.address


async def test_the_command_takes_shared_parameters_with_their_experts(
    swarm: tuple[Training, str], stem: Stem, tmp_path: Path
) -> None:
    training, seed = swarm
    for flags in ((), ("--optimizers",), ()):
        out = ("--out", str(tmp_path / "saved"), "-p", seed)
        status, _, told = await finish(stem, "save", "--experts", "ffn.[0:1]", "--shared", "tiny", *out, *flags)
        assert status == 0, told
        training.check(tmp_path / "saved")
        pieces = [uid for uid in open_folder(tmp_path / "saved").experts if SHARED in uid]
        assert len(pieces) == (len(training.pieces) if flags else 0)


async def test_so_does_the_call(swarm: tuple[Training, str], tmp_path: Path) -> None:
    training, seed = swarm
    async with ta.TesseractNode(initial_peers=[seed]) as node:
        gate = ta.GatingFunction(node, uid_prefix="ffn", grid_size=(1,), in_features=4)
        for parameter in gate.parameters():
            parameter.requires_grad_(False)
        async with ta.SharedParameters(node, training.model, run="tiny", host=False) as shared:
            training.model.gate = gate
            await ta.save_model(node, shared, tmp_path / "saved")
            await asyncio.sleep(0)
    folder = open_folder(tmp_path / "saved")
    trunk = {name: one for name, one in folder.tensors().items() if not name.startswith("gate")}
    folder.put_tensors(trunk)
    folder.write_index()
    training.check(tmp_path / "saved")
