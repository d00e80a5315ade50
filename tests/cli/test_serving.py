"""`tesseract dht` and `tesseract serve` as processes: they report, they serve, they leave."""

import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import tesseract_async as ta
from tesseract_async.cli.main import main
from tesseract_async.server.registry import make_backend
from tesseract_async.server.server import ServerSettings
from tesseract_async.server.state_files import CheckpointStore
from tests.cli.processes import event, tesseract
from tests.stem import Stem

SMALL = ("--experts", "ffn.[0:2].3", "--size", "in_features=4", "--size", "hidden_features=8")


def test_a_port_in_use_is_a_sentence() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = CliRunner().invoke(main, ["dht", "--port", str(port)])
    assert result.exit_code == 1
    assert result.output.startswith(f"Error: port {port} on 127.0.0.1 is in use")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--expert-class", "fnn"), "no expert named 'fnn'; there are"),
        (("--shard", "fsdp"), "--shard is for processes of one job: start them by torchrun"),
        (("--shard", "fdsp"), "no plan named 'fdsp'; there are fsdp, tp, and module:function"),
        (("--size", "wide=3"), "ffn takes no size wide; it takes in_features, hidden_features"),
        (("--initial-peers", "nonsense"), "nonsense"),
        (("--preferred-size", "9999"), "a batch has at least 1 row and at most 4096"),
        (("--device", "meta"), "the device 'meta' computes nothing"),
        (("--compile", "nonsense"), "torch.compile: Unrecognized mode=nonsense, should be one of: default"),
        (("--device", "nonsense"), "not a device, such as 'cpu' or 'cuda:0': 'nonsense'"),
        (("--device", "cuda:99"), "no device cuda:99 here: PyTorch sees "),
        (("--device", "cpu", "--device", "cuda:99"), "no device cuda:99 here: PyTorch sees "),
    ],
)
def test_mistakes_that_only_show_when_starting_are_sentences(arguments: tuple[str, ...], sentence: str) -> None:
    result = CliRunner().invoke(main, ["serve", "--experts", "ffn.0", *arguments])
    assert result.exit_code == 1
    assert result.output.startswith("Error: ") and sentence in result.output


@pytest.mark.parametrize(("given", "seconds"), [((), 60.0), (("--stall-timeout", "250"), 250.0)])
def test_the_time_after_which_a_batch_counts_as_hung_is_the_servers(
    given: tuple[str, ...], seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[ServerSettings] = []

    def server(*_: Any, settings: ServerSettings, **__: Any) -> None:
        seen.append(settings)
        raise ValueError("seen")

    monkeypatch.setattr("tesseract_async.cli.hosting.TesseractServer", server)
    result = CliRunner().invoke(main, ["serve", *SMALL, *given])
    assert (result.exit_code, result.output.splitlines()[-1]) == (1, "Error: seen")
    assert [settings.runtime.stall_timeout for settings in seen] == [seconds]
    refused = CliRunner().invoke(main, ["serve", *SMALL, "--stall-timeout", "0"])
    assert refused.exit_code == 2 and "--stall-timeout" in refused.output


async def test_a_swarm_of_commands_serves_trains_and_remembers(stem: Stem, tmp_path: Path) -> None:
    identity, checkpoints = str(tmp_path / "identity.pem"), str(tmp_path / "checkpoints")
    kept = (*SMALL, "--identity", identity, "--checkpoint-dir", checkpoints)
    async with tesseract(stem, "dht") as bootstrap:
        address = (await event(bootstrap, "ready"))["address"]
        async with ta.TesseractNode(initial_peers=[address], refresh_period=0.2) as node:
            x = torch.ones(3, 4)
            async with tesseract(stem, "serve", "-p", address, *kept) as server:
                first = await event(server, "ready")
                assert first["uids"] == ["ffn.0.3", "ffn.1.3"]
                expert = await node.get_expert("ffn.1.3")
                await ta.backward((await expert(x)).sum())
                with torch.no_grad():
                    before = await expert(x)
                if hasattr(signal, "SIGUSR1"):
                    server.send_signal(signal.SIGUSR1)
                    assert (await event(server, "saved"))["versions"]["ffn.1.3"] == 1
                    assert (tmp_path / "checkpoints" / "ffn.1.3" / "000000000001.safetensors").exists()
                server.send_signal(signal.SIGINT)
                assert (await event(server, "left"))["versions"] == {"ffn.0.3": 0, "ffn.1.3": 1}
                assert await server.wait() == 0

            async with tesseract(stem, "serve", "-p", address, *kept) as server:
                again = await event(server, "ready")
                assert again["peer_id"] == first["peer_id"]
                assert again["versions"] == {"ffn.0.3": 0, "ffn.1.3": 1}
                expert = await node.get_expert("ffn.1.3")
                with torch.no_grad():
                    assert torch.equal(await expert(x), before)
                server.send_signal(signal.SIGTERM)
                await event(server, "left")
                assert await server.wait() == 0
        bootstrap.send_signal(signal.SIGINT)
        assert await bootstrap.wait() == 0


async def test_a_child_leaves_with_its_parent(stem: Stem) -> None:
    async with tesseract(stem, "dht", "--leave-with-parent") as node:
        await event(node, "ready")
        assert node.stdin is not None
        node.stdin.close()
        assert await node.wait() == 0


@pytest.mark.parametrize("given", [(), ("--learning-rate", "0.01")])
async def test_a_rate_that_is_given_on_purpose_wins_over_the_checkpoints(
    stem: Stem, tmp_path: Path, given: tuple[str, ...]
) -> None:
    backend = make_backend("linear", optimizer="sgd", learning_rate=0.5, sizes={"in_features": 4})
    backend.step(backend.gradients([torch.ones(1, 4)], [torch.ones(1, 4)])[1])
    CheckpointStore(tmp_path).save("f.0", backend.state(), version=1)
    kind = ("--expert-class", "linear", "--size", "in_features=4", "--optimizer", "sgd")
    async with tesseract(stem, "serve", "--experts", "f.0", *kind, *given, "--checkpoint-dir", str(tmp_path)) as server:
        assert server.stderr is not None
        lines = [line.decode() async for line in _until(server.stderr, b"lr=")]
        there, here = ("0.01", "0.5") if given else ("0.5", "0.001")
        assert f"f.0: lr={there} holds" in lines[-1] and f"not {here}" in lines[-1]


async def _until(lines: Any, text: bytes) -> AsyncIterator[bytes]:
    async for line in lines:
        yield line
        if text in line:
            return
