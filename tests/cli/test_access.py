"""Who may ask, and how much, as flags: of processes that refuse strangers, and of mistakes that would let all in."""

import asyncio
import contextlib
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner

import tesseract_async as ta
from tesseract_async.cli.access import describe_policy, server_access_options
from tesseract_async.cli.config_file import config_option
from tesseract_async.cli.main import main
from tesseract_async.errors import NotAllowed
from tesseract_async.experts.manifest import encode_manifest
from tests.cli.processes import event, finish, tesseract
from tests.stem import Stem

ONE, TWO, THREE = (ta.PeerID(bytes([number]) * 32) for number in (1, 2, 3))


def invoke(*flags: str, env: dict[str, str] | None = None) -> tuple[str, ta.Policy | None]:
    """What the command says against these flags (empty: nothing), and the policy."""
    seen: list[ta.Policy | None] = []

    @click.command(context_settings={"auto_envvar_prefix": "T"})
    @config_option
    @server_access_options
    def command(*, policy: ta.Policy | None) -> None:
        seen.append(policy)

    result = CliRunner().invoke(command, flags, env=env)
    assert result.exit_code in (0, 2), result.output
    return " ".join(result.output.split()), seen[0] if seen else None


def test_without_flags_everybody_may_do_everything() -> None:
    assert invoke() == ("", None)
    assert invoke("--peer-period", "5") == ("", None)


def test_lists_come_from_flags_commas_files_and_the_environment(tmp_path: Path) -> None:
    members, config = tmp_path / "members.txt", tmp_path / "node.toml"
    members.write_text(f"# the members\n{ONE}  # at home\n\n{TWO}\n")
    config.write_text(f'[access]\nallow = ["{ONE}"]\nallow-file = "{members}"\npeer-calls = 7\n')
    both = ta.Policy.only([ONE, TWO])
    for flags in (
        ("--allow", str(ONE), "--allow", str(TWO)),
        ("--allow", f"{ONE}, {TWO}"),
        ("--allow-file", str(members)),
        ("--allow-file", str(members), "--allow", str(ONE)),
    ):
        assert invoke(*flags) == ("", both)
    assert invoke(env={"T_ALLOW": f"{ONE} {TWO}"}) == ("", both)
    _, policy = invoke("--config", str(config))
    assert policy == ta.Policy(callers=both.callers, trainers=both.trainers, hosts=both.hosts, quota=ta.Quota(calls=7))
    assert describe_policy(policy) == [
        "only 2 peers may call, train and store here",
        "what each peer may ask for is limited",
    ]


def test_few_may_train_where_more_may_call() -> None:
    _, policy = invoke("--allow-training", str(ONE))
    assert policy is not None
    assert policy.allows(ONE, "train") and not policy.allows(TWO, "train")
    assert policy.allows(TWO, "call") and policy.allows(TWO, "host")
    assert describe_policy(policy) == ["only 1 peer may change weights here"]
    _, policy = invoke("--allow-training", str(ONE), "--allow", f"{ONE},{TWO}")
    assert policy is not None
    assert [policy.allows(TWO, action) for action in ("call", "train", "host")] == [True, False, True]
    assert not policy.allows(THREE, "call")


def test_quotas_take_units() -> None:
    _, policy = invoke("--peer-bytes", "1 GiB", "--peer-period", "1 min", "--peer-concurrent", "4")
    assert policy is not None and policy.callers is None
    assert policy.quota == ta.Quota(num_bytes=2**30, period=60.0, concurrent=4)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--allow", "1234"), "not a peer id (64 hexadecimal digits): '1234'"),
        (("--allow", ""), "not a peer id"),
        (("--allow", ","), "not a peer id"),
        (("--allow-file", "none.txt"), "none.txt cannot be read (No such file or directory)"),
        (("--allow-file", "empty.txt"), "empty.txt lists nobody"),
        (("--allow-file", "words.txt"), "words.txt: not a peer id"),
        (("--allow-file", "binary"), "binary cannot be read (not text)"),
        (("--allow-file", ""), "cannot be read"),
        (("--config", "empty.toml"), "--allow lists nobody"),
        (("--allow", str(ONE), "--allow-training", str(TWO)), "names peers that --allow leaves out: 02020202"),
        (("--peer-calls", "0"), "0 is not in the range"),
        (("--peer-bytes", "0"), "a quota's num_bytes is a positive number"),
        (("--peer-bytes", "many"), "not a size"),
        (("--peer-calls", "1", "--peer-period", "0"), "a quota's period is a positive number"),
    ],
)
def test_mistakes_are_sentences_and_never_let_everybody_in(
    flags: tuple[str, ...], sentence: str, tmp_path: Path
) -> None:
    (tmp_path / "empty.txt").write_text("# nobody yet\n")
    (tmp_path / "words.txt").write_text("alice\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty.toml").write_text("allow = []\n")
    with contextlib.chdir(tmp_path):
        output, policy = invoke(*flags)
    assert policy is None and sentence in output


@pytest.mark.parametrize("flag", ["ALLOW", "ALLOW_FILE", "ALLOW_TRAINING"])
def test_an_empty_variable_lets_nobody_in_unasked(flag: str) -> None:
    variable = f"TESSERACT_SERVE_{flag}"
    result = CliRunner().invoke(main, ["serve", "--experts", "ffn.0", "--device", "nonsense"], env={variable: ""})
    assert result.exit_code == 2 and f"{variable} lists nobody" in result.output


async def test_a_closed_swarm_of_commands_takes_its_members_only(stem: Stem, tmp_path: Path) -> None:
    member, server_identity = ta.Identity.generate(), tmp_path / "server.pem"
    ta.Identity.generate().save(server_identity)
    members = tmp_path / "members.txt"
    members.write_text(f"{member.peer_id}\n{ta.Identity.load(server_identity).peer_id}\n")
    flags = ("--experts", "ffn.0", "--size", "in_features=4", "--size", "hidden_features=8")
    closed = ("--allow-file", str(members))
    x = torch.ones(3, 4)
    async with tesseract(stem, "dht", *closed) as bootstrap:
        address = (await event(bootstrap, "ready"))["address"]
        own = ("--identity", str(server_identity), "--peer-concurrent", "8")
        async with tesseract(stem, "serve", "-p", address, *closed, *own, *flags) as server:
            await event(server, "ready")
            async with ta.TesseractNode(initial_peers=[address], identity=member, refresh_period=0.2) as node:
                expert = await node.get_expert("ffn.0")
                await ta.backward((await expert(x)).sum())
                assert await node.network.store("key", 1, ttl=30.0) >= 1
            async with ta.TesseractNode(initial_peers=[address], refresh_period=0.2) as stranger:
                expert = await stranger.get_expert("ffn.0")
                with pytest.raises(NotAllowed, match="does not let"), torch.no_grad():
                    await expert(x)
            member.save(tmp_path / "member.pem")
            question = ("call", "ffn.0", "-p", address, "--rows", "2")
            status, out, err = await finish(stem, *question, "--identity", str(tmp_path / "member.pem"))
            assert status == 0 and "gave float32[2, 4]" in out, err
            status, _, err = await finish(stem, *question)
            assert status == 1 and "does not let" in err
            # a stranger keeps its own claim; a visitor with the list does not hear it
            async with ta.TesseractNode(initial_peers=[address]) as stranger:
                ((part, _),) = encode_manifest([stranger.address], {(0,): True}, prefix="ffn", sequence=2**47)
                assert await stranger.network.store("experts/ffn", part, ttl=30.0, subkey="0") == 1
                ask = ("get", "experts/ffn", "-p", stranger.address, "-p", address, "--json")
                out = ""
                async with asyncio.timeout(60):
                    while len(out.splitlines()) != 2:  # a visitor reads once one of its seeds has answered
                        status, out, err = await finish(stem, *ask)
                        assert status == 0, err
                status, out, err = await finish(stem, *ask, *closed)
                assert status == 0 and len(out.splitlines()) == 1, err
            server.terminate()
            assert (await event(server, "left"))["versions"] == {"ffn.0": 1}
            assert await server.wait() == 0
