"""A run from its signature to its saved weights, by commands as processes: what volunteers and an organizer do."""

import asyncio
import contextlib
import dataclasses
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import tesseract_async as ta
from tesseract_async.cli import hosting as hosting_module
from tesseract_async.cli.building import make_builder
from tesseract_async.cli.config_file import read_config
from tesseract_async.cli.hosting import Hosting
from tesseract_async.cli.main import main
from tesseract_async.cli.options import NodeOptions
from tesseract_async.cli.serve import command
from tesseract_async.cli.serve_options import ServeOptions
from tesseract_async.experts.grid import ExpertReplica
from tesseract_async.experts.run import RunMismatch
from tesseract_async.saving.folder import SavedExperts
from tesseract_async.server.contract import VolunteerSettings
from tests.cli.processes import event, finish, tesseract
from tests.stem import Stem

SIZES = ("--size", "in_features=4", "--size", "hidden_features=8")

VOLUNTEER = """
[join]
run = "digits"
initial-peers = ["{seed}"]
num-experts = 3
checkpoint-dir = "{folder}/checkpoints"
identity = "{folder}/volunteer.pem"
[limits]
max-memory = "64 GiB"
max-upload = "1 Gbit/s"
data-quota = "1 TB"
hours = "00:00-24:00"
"""


def test_a_newcomer_does_not_say_that_it_serves_nothing() -> None:
    assert hosting_module.what_is_served(1, None) == "1 expert is being served"
    assert hosting_module.what_is_served(2, 3) == "2 experts are being served"
    assert hosting_module.what_is_served(0, 3) == "ready to take a share of the run's experts"
    assert hosting_module.what_is_served(0, 0) == "ready to keep states of the run's experts"


async def primary_of(node: ta.TesseractNode, uid: str) -> ExpertReplica:
    """The uid's primary, read from the network as often as it takes."""
    node.directory.watch("ffn", (2, 2))
    await node.directory.wait_warm("ffn")
    async with asyncio.timeout(60):
        while not (found := [one for one in await node.directory.find(uid) if one.primary]):
            await node.directory.refresh("ffn")
    return found[0]


def hosting(run: str, seed: str, *, given: dict[str, object] | None = None) -> Hosting:
    """What `tesseract serve --run RUN -p SEED --num-experts 4 --sync-every 1` makes of its options."""
    serving = ServeOptions(run_name=run, num_experts=4, learning_rate=0.1, max_batch_size=1, seed=99, sync_every=1.0)
    limits = VolunteerSettings()
    builder = make_builder(serving, limits, keeps_learning_rate=False)
    return Hosting(serving, node=NodeOptions(initial_peers=(seed,)), limits=limits, given=given, builder=builder)


@contextlib.asynccontextmanager
async def volunteer(hosting: Hosting) -> AsyncIterator[Hosting]:
    """`tesseract serve` in this process, which saves importing torch once more."""
    task = asyncio.create_task(hosting.main())
    ready = asyncio.create_task(hosting.ready.wait())
    try:
        await asyncio.wait([task, ready], return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            await task
        yield hosting
    finally:
        ready.cancel()
        task.cancel()
        await asyncio.gather(task, ready, return_exceptions=True)


async def test_a_run_from_its_signature_to_its_saved_weights(stem: Stem, tmp_path: Path) -> None:
    config = tmp_path / "volunteer.toml"
    author = ("--identity", str(tmp_path / "author.pem"))
    x = torch.ones(3, 4)
    async with tesseract(
        stem, "run", "create", "digits", "--open", "--grid", "2x2", *SIZES, "--learning-rate", "0.01", *author
    ) as organizer:
        started = await event(organizer, "run")
        seed, full_name = started["address"], started["run"]
        assert full_name == f"digits@{ta.Identity.load(tmp_path / 'author.pem').peer_id}"
        config.write_text(VOLUNTEER.format(seed=seed, folder=tmp_path))
        async with (
            ta.TesseractNode(initial_peers=[seed], refresh_period=0.2) as node,
            tesseract(stem, "serve", "--config", str(config)) as first,
        ):
            ready = await event(first, "ready")
            assert ready["run"] == full_name and len(ready["uids"]) == 3 and "followed" not in ready
            taught = ready["uids"][0]
            await node.join_run(full_name)
            expert = await node.get_expert(taught)
            await ta.backward((await expert(x)).sum())

            # who joins with the wrong flags does not start
            with pytest.raises(RunMismatch, match="sizes.in_features is 4 in the run, but 5 here"):
                async with volunteer(hosting(full_name, seed, given={"sizes.in_features": 5})):
                    pass

            async with volunteer(hosting("digits", seed)) as second:
                assert second.server is not None
                backends = second.server.experts
                assert sorted(backends) == ["ffn.0.0", "ffn.0.1", "ffn.1.0", "ffn.1.1"]
                assert sorted(uid for uid in backends if not second.server.is_primary(uid)) == sorted(ready["uids"])
                await ta.backward((await expert(x)).sum())

                # the first one leaves, and its experts go on at the second, with every step
                first.send_signal(signal.SIGTERM)
                assert (await event(first, "left"))["versions"][taught] == 2
                assert await first.wait() == 0
                assert all(second.server.is_primary(uid) for uid in backends)
                assert backends[taught].version == 2
                assert (await primary_of(node, taught)).peer.peer_id == second.node.peer_id
                expert = await node.get_expert(taught)
                await ta.backward((await expert(x)).sum())

                out = tmp_path / "weights"
                status, _, told = await finish(stem, "save", "--run", "digits", "-p", seed, "--out", str(out))
                assert status == 0 and "4 experts written" in told
                experts = SavedExperts(out)
                assert experts.index[taught].version == 3
                assert experts.saved.runs["ffn"].full_name == full_name
                with torch.no_grad():
                    assert torch.equal(experts[taught](x), await expert(x))
        organizer.send_signal(signal.SIGINT)
        assert await organizer.wait() == 0


@pytest.mark.slow
async def test_volunteers_host_what_trainers_share(stem: Stem, tmp_path: Path) -> None:
    author = ("--identity", str(tmp_path / "author.pem"))
    async with tesseract(stem, "run", "create", "digits", "--open", "--grid", "2x2", *SIZES, *author) as organizer:
        started = await event(organizer, "run")
        seed, run = started["address"], started["run"]
        models = [torch.nn.Linear(3, 40) for _ in range(2)]
        async with volunteer(hosting(run, seed)) as one, volunteer(hosting(run, seed)) as other:
            assert one.server is not None and other.server is not None
            async with (
                ta.TesseractNode(initial_peers=[seed]) as node,
                ta.SharedParameters(node, models[0], run=run, host=True) as shared,
            ):
                uids = set(shared.uids)
                async with asyncio.timeout(60):
                    servers = (one.server, other.server)
                    while not all(uids <= server.experts.keys() for server in servers):  # noqa: ASYNC110
                        await asyncio.sleep(0.1)
            async with ta.TesseractNode(initial_peers=[seed]) as node:
                async with ta.SharedParameters(node, models[1], run=run) as shared:
                    assert torch.equal(models[0].weight, models[1].weight)
                    with torch.no_grad():
                        models[1].weight.add_(1.0)
                    await shared.step()
                    await shared.flush()
                    assert shared.steps == 1
        organizer.send_signal(signal.SIGINT)
        assert await organizer.wait() == 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("serve",), "say what to host: --experts PATTERN, or --run NAME"),
        (("serve", "--experts", "ffn.[0:99999]"), "say --num-experts to choose some"),
        (("serve", "--run", "a/b"), "a run's name has"),
        (("serve", "--run", "digits@12"), "not a peer id"),
        (("serve", "--experts", "ffn.0", "--hours", "7-9"), "not hours"),
        (("serve", "--experts", "ffn.0", "--max-memory", "1 MB"), "not even one|only 0 fit"),
        (("serve", "--experts", "ffn.0", "--experts", "ffn.1", "--num-experts", "1"), "one pattern"),
        (("serve", "--run", "digits"), "nobody in the network knows a run called digits"),
        (("run", "create", "digits", "--grid", "2"), "--identity FILE"),
        (("run", "create", "digits", "--grid", "2y2", "--identity", "x"), "is not like 32x32"),
        (("run", "create", "digits", "--grid", "2", "--identity", "x", "--once"), "--once needs --initial-peers"),
        (("run", "create", "digits", "--grid", "2", "--identity", "x", "--size", "wide"), "is not like name=value"),
        (("run", "create", "di gits", "--grid", "2", "--identity", "x"), "a run's name has"),
        (("run", "create", "digits", "--grid", "2", "--identity", "x", "--size", "wide=3"), "it takes in_features"),
        (
            ("run", "create", "digits", "--grid", "2", "--identity", "x", "--training", "magic=3"),
            "training options",
        ),
        (("save", "--run", "digits", "--out", "x"), "Missing option '--initial-peers'"),
    ],
)
def test_mistakes_are_sentences(
    arguments: tuple[str, ...], sentence: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hosting_module, "FIND_ATTEMPTS", 1)
    result = CliRunner().invoke(main, list(arguments))
    assert result.exit_code in (1, 2)
    assert any(part in " ".join(result.output.split()) for part in sentence.split("|")), result.output
    assert "Traceback" not in result.output


def test_the_sample_file_is_understood() -> None:
    """Every line of examples/volunteer.toml is an option of `tesseract serve`, with a value that it takes."""
    values = read_config(Path(__file__).parents[2] / "examples" / "volunteer.toml", command)
    assert values["run_name"] == "digits" and values["num_experts"] == 4
    given = command.make_context("serve", [], default_map=values).params
    assert given["initial_peers"] == ("198.51.100.7:31337",)
    assert given["max_upload_rate"] == 1.25e6 and given["data_quota_bytes"] == 200 * 10**9
    assert len(given["hours"]) == 2 and given["pause_above_load"] == pytest.approx(0.3)
    limits = {field.name for field in dataclasses.fields(VolunteerSettings)}
    assert limits <= set(values), "the sample shows every limit"
