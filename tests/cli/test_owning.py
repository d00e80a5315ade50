"""What the owner of a run does with the commands: starts it, lets others in and out, moves bare experts into it."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import tesseract_async as ta
from tesseract_async.cli.main import main
from tesseract_async.cli.running import say
from tesseract_async.errors import NotAllowed
from tesseract_async.identity import Identity
from tests.cli.processes import event, finish, tesseract
from tests.stem import Stem

SIZES = ("--size", "in_features=4", "--size", "hidden_features=8")
X = torch.ones(3, 4)


def last_json(out: str) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(out.strip().splitlines()[-1])
    return facts


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_json_only_if_it_was_asked_for() -> None:
    for out, lines in ((io.StringIO(), 2), (Terminal(), 1)):
        with contextlib.redirect_stdout(out):
            say("ready", address="here")
            say("report", on_terminal=True, versions={})
        assert [json.loads(line)["event"] for line in out.getvalue().splitlines()] == ["ready", "report"][-lines:]


def invoke(*arguments: str) -> tuple[int, str, str]:
    """Runs a command here: status, standard output, standard error."""
    result = CliRunner().invoke(main, arguments)
    return result.exit_code, result.stdout, result.stderr


def test_an_owner_lets_members_in_and_out(tmp_path: Path) -> None:
    owner, server = str(tmp_path / "owner.pem"), str(tmp_path / "server.pem")
    module = nn.Linear(4, 4)
    backend = ta.ExpertBackend(
        module, optimizer=torch.optim.SGD(module.parameters(), lr=0.01), args_schema=(ta.TensorSpec((4,)),)
    )
    with ta.BackgroundNode() as seed:
        at = ("-p", seed.node.address)
        create = ("run", "create", "digits", "--once", "--grid", "1x2", *SIZES)
        status, out, told = invoke(*create, "--identity", owner, *at)
        assert status == 0, told
        run, signed = last_json(out)["run"], ("--identity", owner, *at)
        status, _, told = invoke("serve", "--run", run, "--num-experts", "2", "--identity", server, *at)
        me = Identity.load(server).peer_id
        assert status == 1 and f"ask its owner for `tesseract run grant {run} {me}`" in told
        status, invite, _ = invoke("run", "grant", run, "--invite", "--role", "host", *signed)
        assert status == 0
        peers = [seed.node.address]
        with (
            ta.BackgroundNode(initial_peers=peers, identity=server) as host,
            ta.BackgroundNode(initial_peers=peers) as trainer,
        ):
            host.join_run(run, grant=invite)
            view = trainer.join_run(run)
            with host.entered(ta.TesseractServer(host.node, {"ffn.0.1": backend})):
                expert = trainer.get_expert("ffn.0.1")
                with pytest.raises(NotAllowed, match="no member"):
                    expert(X)
                other = str(trainer.node.peer_id)
                status, text, _ = invoke("run", "grant", run, other, "--role", "train", *signed)
                assert status == 0 and len(text.strip()) < 240
                trainer.join_run(run)  # the grant waits in the network
                expert(X).sum().backward()

                status, out, _ = invoke("run", "status", run, "--json", *signed)
                facts = last_json(out)
                assert status == 0 and facts["mode"] == "granted" and facts["hosts"] == {str(me): 1}
                roles = {one["peer"]: one["roles"] for one in facts["members"]}
                assert roles[str(me)] == ["host"] and roles[other] == ["train"] and len(roles) == 4
                (invited,) = (peer for peer, has in roles.items() if has == ["host", "admit"])

                status, out, _ = invoke("run", "appoint", run, "ffn.0.[0:2]", str(me), *signed)
                assert status == 0 and last_json(out)["peer"] == str(me)
                status, out, _ = invoke("run", "revoke", run, "--invite", invited, *signed)
                assert status == 0 and last_json(out)["invites"] == [invited]
                trainer.join_run(run)
                assert not view.may(me, "host", now=None), "who came by the invite went with it"
                appointed = view.appointment("ffn.0.1")
                assert appointed is not None and appointed.peer == me
        status, out, _ = invoke("run", "status", run, *signed)
        assert status == 0 and f"{invited}: revoked" in out and "ffn.0.[0:2]: led by" in out
        status, _, told = invoke("run", "grant", run, str(me), "--identity", server, *at)
        assert status == 1 and "has no say in" in told
        status, _, told = invoke("run", "revoke", run, run.partition("@")[2], *signed)
        assert status == 1 and "nobody revokes the owner" in told


async def test_bare_experts_move_into_a_run(stem: Stem, tmp_path: Path) -> None:
    server, owner, folder = str(tmp_path / "server.pem"), str(tmp_path / "owner.pem"), str(tmp_path / "kept")
    async with ta.TesseractNode() as seed:
        keep = ("--identity", server, "--checkpoint-dir", folder, "-p", seed.address)
        async with tesseract(stem, "serve", "--experts", "ffn.0.[0:2]", *SIZES, *keep) as bare:
            me = (await event(bare, "ready"))["peer_id"]
            await ta.backward((await (await seed.get_expert("ffn.0.1"))(X)).sum())
            create = ("run", "create", "digits", "--adopt", "--once", "--grid", "1x2", *SIZES, "--identity", owner)
            status, out, _ = await finish(stem, *create, "-p", seed.address)
            facts = last_json(out)
            assert status == 0 and facts["adopted"] == [me]
            bare.terminate()
            await event(bare, "left")
        run = facts["run"]
        async with tesseract(stem, "serve", "--run", run, "--num-experts", "2", *keep) as hosting:
            assert (await event(hosting, "ready"))["versions"] == {"ffn.0.0": 0, "ffn.0.1": 1}
        status, _, told = await finish(stem, *create, "-p", seed.address)
        assert status == 1 and "no server hosts experts of the bare prefix 'ffn' now" in told


def test_a_key_is_backed_up_and_restored(tmp_path: Path) -> None:
    owner, backup, again = (str(tmp_path / name) for name in ("owner.pem", "backup.pem", "again.pem"))
    identity = Identity.generate()
    identity.save(owner)

    def run(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(main, ["run", "backup-key", *arguments])
        return result.exit_code, result.output

    assert run(backup, "--identity", owner, "--passphrase", "open") == (0, f"{identity.peer_id}\n")
    assert b"ENCRYPTED" in Path(backup).read_bytes()
    assert "holds no Ed25519 key" in run(backup, "--identity", again, "--restore", "--passphrase", "shut")[1]
    assert run(backup, "--identity", again, "--restore", "--passphrase", "open")[0] == 0
    assert Identity.load(again).peer_id == identity.peer_id
    for arguments in ((backup, "--identity", owner), (backup, "--identity", again, "--restore")):
        status, told = run(*arguments, "--passphrase", "open")
        assert status == 1 and "exists, and is not overwritten" in told
    assert "No such file" in run("nowhere", "--identity", again, "--restore", "--passphrase", "x")[1]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("grant", "digits"), "say whom to let in"),
        (("grant", "digits", "00" * 32, "--invite"), "say whom to let in"),
        (("grant", "digits", "abc"), "not a peer id"),
        (("revoke", "digits"), "say whom to revoke"),
        (("status", "di gits"), "a run's name has"),
        (("appoint", "digits", "ffn", "free"), "not an expert's uid"),
    ],
)
def test_mistakes_are_sentences(tmp_path: Path, arguments: tuple[str, ...], sentence: str) -> None:
    key = tmp_path / "owner.pem"
    Identity.generate().save(key)
    result = CliRunner().invoke(main, ["run", *arguments, "--identity", str(key), "-p", "127.0.0.1:9"])
    assert result.exit_code != 0 and sentence in result.output
