"""A run that begins from a checkpoint: made, served, trained in lockstep, held and exported."""

import asyncio
import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import tesseract_async as ta
from tesseract_async.cli.building import make_builder
from tesseract_async.cli.main import main
from tesseract_async.server.contract import VolunteerSettings
from tesseract_async.server.holder import holding
from tests.cli.processes import event, tesseract
from tests.cli.test_run_lifetime import hosting, volunteer
from tests.stem import Stem
from tests.transformers.swarm import local
from tests.transformers.test_remote import IDS, load_with, train

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")


def create(folder: Path, tmp_path: Path, seed: str) -> str:
    """`tesseract run create`: the run's full name."""
    made = CliRunner().invoke(
        main,
        [
            *("run", "create", "tuned", "--once", "--open", "--prefix", "m", "--hf-checkpoint", str(folder)),
            *("--training", "lockstep=true", "--sync-every", "1", "--lease", "2"),
            *("--identity", str(tmp_path / "owner.pem"), "-p", seed),
        ],
    )
    assert made.exit_code == 0, made.stderr
    return str(json.loads(made.stdout.splitlines()[-1])["run"])


def broken_copy(folder: Path, into: Path) -> Path:
    shutil.copytree(folder, into)
    for file in into.glob("*.safetensors"):
        file.write_bytes(file.read_bytes() + b" ")
    return into


def train_and_export(run: str, seed: str, folder: Path, out: Path) -> list[float]:
    with ta.BackgroundNode(initial_peers=[seed]) as node:
        node.join_run(run)
        remote = load_with(folder, node)
        losses = train(remote, num_steps=2)
        ta.transformers.export_checkpoint(remote, out)
    return losses


@pytest.mark.slow
async def test_a_run_begins_from_a_checkpoint(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    folder = checkpoint("deepseek_v3")  # whose first layer has no experts
    async with ta.TesseractNode() as seed:
        run = await asyncio.to_thread(create, folder, tmp_path, seed.address)
        plain = hosting(run, seed.address)
        serving = dataclasses.replace(plain.serving, num_experts=8, hf_checkpoint=folder)
        builder = make_builder(serving, VolunteerSettings(), keeps_learning_rate=False)
        plain.serving, plain.builder = serving, builder
        async with volunteer(plain), ta.TesseractNode(initial_peers=[seed.address]) as other:
            async with holding(other, run, max_bytes=10**9) as placing:
                losses = await asyncio.to_thread(train_and_export, run, seed.address, folder, tmp_path / "out")
                whole = local(folder)
                assert losses == pytest.approx(train(whole, num_steps=2), abs=1e-5)
                with torch.no_grad():
                    exported = local(tmp_path / "out")(IDS).logits
                    torch.testing.assert_close(exported, whole.eval()(IDS).logits, rtol=0, atol=1e-5)
                async with asyncio.timeout(30):
                    while sum(part.has_file for part in placing.place().parts.values()) < 8:  # noqa: ASYNC110
                        await asyncio.sleep(0.1)
        broken = await asyncio.to_thread(broken_copy, folder, tmp_path / "broken")
        for given, reason in (
            ({"hf_checkpoint": broken}, "is not a file of the checkpoint"),
            ({"hf_checkpoint": checkpoint("mixtral")}, "does not fit the run"),
            ({}, "say --hf-checkpoint FOLDER"),
        ):
            refused = hosting(run, seed.address)
            refused.serving = dataclasses.replace(serving, **{"hf_checkpoint": None, **given})
            refused.builder = make_builder(refused.serving, VolunteerSettings(), keeps_learning_rate=False)
            with pytest.raises(ValueError, match=reason):
                async with volunteer(refused):
                    pass


@pytest.mark.slow
async def test_a_killed_servers_experts_go_on_at_another_volunteer(
    checkpoint: Callable[[str], Path], tmp_path: Path, stem: Stem
) -> None:
    folder = checkpoint("mixtral")
    whole = local(folder)
    with torch.no_grad():
        expected = whole(IDS).logits
    async with ta.TesseractNode() as seed:
        run = await asyncio.to_thread(create, folder, tmp_path, seed.address)
        arguments = ("--hf-checkpoint", str(folder), "--num-experts", "16", "--sync-every", "1", "-p", seed.address)
        async with tesseract(stem, "serve", "--run", run, *arguments) as first:
            assert len((await event(first, "ready"))["uids"]) == 16
            second = hosting(run, seed.address)
            second.serving = dataclasses.replace(second.serving, num_experts=16, hf_checkpoint=folder)
            second.builder = make_builder(second.serving, VolunteerSettings(), keeps_learning_rate=False)
            async with volunteer(second):
                server = second.server
                assert server is not None
                async with asyncio.timeout(60):
                    while len(server.experts) < 16:  # noqa: ASYNC110
                        await asyncio.sleep(0.1)
                with ta.BackgroundNode(initial_peers=[seed.address]) as node:
                    await asyncio.to_thread(node.join_run, run)
                    remote = await asyncio.to_thread(load_with, folder, node)
                    await asyncio.to_thread(check_logits, remote, expected)
                    first.kill()
                    async with asyncio.timeout(60):
                        while not all(map(server.is_primary, server.experts)):  # noqa: ASYNC110
                            await asyncio.sleep(0.1)
                    await asyncio.to_thread(check_logits, remote, expected)
                    assert len(await asyncio.to_thread(train, remote, num_steps=2)) == 4, "and learn there"
                    assert all(backend.version for backend in server.experts.values())


def check_logits(model: Any, expected: torch.Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(IDS).logits, expected, rtol=0, atol=1e-6)
