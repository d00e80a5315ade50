"""From an invite to a computer that takes part, and each thing that can be in the way: a sentence, at once."""

import asyncio
import json
import os
import signal
import socket
import sys
import time
import tomllib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from hypothesis import example, given
from hypothesis import strategies as st

import tesseract_async as ta
from tesseract_async.cli import doctor, join
from tesseract_async.cli.main import main
from tesseract_async.cli.start_run import reach_of
from tesseract_async.endpoint.endpoint import IncomingCall, Message
from tesseract_async.errors import TesseractError
from tesseract_async.experts.grants import Invite, grant_text, read_grant_text, sign_grant
from tesseract_async.identity import Identity
from tesseract_async.monitoring import StatusService, status
from tesseract_async.transport.base import PeerAddress
from tests.cli.processes import event, finish, tesseract
from tests.stem import Stem

SIZES = ("--size", "in_features=4", "--size", "hidden_features=8")
OWNER = Identity.from_seed(b"o" * 32)


def invite(*seeds: str, ends: float = 2**33) -> str:
    """One to a run that nobody has started."""
    key = Identity.from_seed(b"k" * 32)
    grant = sign_grant(OWNER, bytes(16), key.peer_id, ["host", "admit"], serial=1, not_after=int(ends))
    return Invite(f"digits@{OWNER.peer_id}", seeds, grant_text(grant, invite=key)).text()


async def run(*arguments: str) -> Result:
    """The command in a thread with a loop of its own, next to the swarm of the test."""
    return await asyncio.to_thread(CliRunner().invoke, main, list(arguments))


@asynccontextmanager
async def a_seed() -> AsyncIterator[str]:
    async with ta.TesseractNode() as node, StatusService(node):
        yield str(node.peer_address)


async def created(folder: Path, seed: str) -> dict[str, str]:
    made = await run(*("run", "create", "digits", "--once", "--grid", "1x2", *SIZES), "-p", seed, *key(folder))
    facts: dict[str, str] = json.loads(made.stdout.splitlines()[-1])
    return facts


def key(folder: Path) -> tuple[str, str]:
    return "--identity", str(folder / "owner.pem")


@given(st.tuples(st.integers(0, 600), st.sampled_from("aZ09-_ ")), st.integers(1, 600))
@example((0, "a"), 1)
def test_a_damaged_invite_is_never_taken_for_another(change: tuple[int, str], cut: int) -> None:
    whole = invite("198.51.100.7:31337", "example.org:1")
    at, letter = change
    for text in (whole[: at % len(whole)] + letter + whole[at % len(whole) + 1 :], whole[: -1 - cut % len(whole)]):
        try:
            assert Invite.parse(text) == Invite.parse(whole), text
        except ValueError as error:
            assert "invite" in str(error)
    assert Invite.parse("\n ".join(whole[place : place + 60] for place in range(0, len(whole), 60))).text() == whole


@pytest.mark.parametrize(
    ("seeds", "where"),
    [
        (["127.0.0.1:4"], "on this computer"),
        (["192.168.1.7:4", "[fd00::1]:4"], "in this private network"),
        (["169.254.7.1:4", "100.64.0.9:4"], "in this private network"),
        (["192.168.1.7:4", "8.8.8.8:4"], "everywhere"),
        (["seed.example.org:4"], "everywhere"),
    ],
)
def test_an_owner_is_told_from_where_an_invite_is_good(seeds: list[str], where: str) -> None:
    assert reach_of(seeds) == where


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("hello", "this is no invite: one begins with tesseract1-"),
        ("tesseract2-AAAA", "made by a newer version of Tesseract: upgrade this one"),
        (invite("198.51.100.7:31337")[:-3], "damaged: letters are missing or changed"),
        (invite("198.51.100.7:31337", ends=86400 * 365), "this invite ended on 19"),
    ],
)
def test_what_is_wrong_with_an_invite_is_a_sentence(text: str, sentence: str) -> None:
    result = CliRunner().invoke(main, ["join", text])
    assert result.exit_code == 1 and sentence in result.output, result.output


@pytest.mark.skipif(sys.platform != "linux", reason="systemd")
async def test_joining_says_what_it_lends_and_starts_it_by_systemd(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools, home, asked = tmp_path / "tools", tmp_path / "home", tmp_path / "asked"
    tools.mkdir()
    (tools / "systemctl").write_text(f'#!/bin/sh\necho "$@" >> {asked}\n')
    (tools / "systemctl").chmod(0o755)
    monkeypatch.setenv("PATH", str(tools), prepend=os.pathsep)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)

    async def measured(*_: object) -> tuple[float, float]:
        return 1e6, 1e9

    monkeypatch.setattr(doctor, "measure_line", measured)
    async with a_seed() as seed:
        facts = await created(tmp_path, seed)
        more = ("--max-memory", "2 GB", "--hours", "22:00-07:00", "--pause-above-load", "50 %")
        joined = await run("join", facts["invite"], "--install", *more)
        assert joined.exit_code == 0, joined.output
    lines = joined.output.splitlines()
    assert lines[0].startswith("memory: up to 2.0 GB, on cpu; disk: a tenth of what is free")
    assert lines[1] == "rates:  sends up to 4 Mbit/s, receives up to 100 Mbit/s", "half of the line, at most so much"
    assert lines[2].startswith("hours:  22:00-07:00; pauses while other programs use more than 50%")
    (config,) = home.glob(".tesseract/digits-*/serve.toml")
    assert config.stat().st_mode & 0o777 == 0o600 and facts["run"] in config.read_text()
    (installed,) = home.glob(".config/systemd/user/tesseract-digits-*.service")
    unit = installed.read_text()
    assert f"tesseract_async serve --config {config}" in unit and "--hours 22:00-07:00" in unit
    assert asked.read_text().splitlines()[-1] == f"--user enable --now {installed.stem}"


def test_limits_are_kept_in_whatever_folder() -> None:
    folder = Path('/home/é "😀"\\\x7f')
    kept = tomllib.loads(join._config(Invite.parse(invite("[2001:db8::7]:1")), folder, None))
    assert kept["keeps"] == {"identity": str(folder / "identity.pem"), "checkpoint-dir": str(folder / "states")}
    assert kept["join"]["initial-peers"] == ["[2001:db8::7]:1"] and kept["join"]["host"] == "::"


@pytest.mark.parametrize("seed", ["\x1b[2J:1", "a b:1", "x" * 5000 + ":1", "\u202e:1", "[::1\n]:1"])
def test_an_invite_names_addresses_only(seed: str) -> None:
    result = CliRunner().invoke(main, ["join", Invite(f"digits@{OWNER.peer_id}", (seed,)).text()])
    assert result.exit_code == 1 and len(result.output) < 200 and "invite is damaged" in result.output


async def test_what_keeps_a_computer_out_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = ("--folder", str(tmp_path / "joined"))
    async with ta.TesseractNode() as seed:
        text = invite(str(seed.peer_address))
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            result = await run("join", text, *folder, "--port", str(taken.getsockname()[1]))
            assert result.exit_code == 1 and "Choose another --port" in result.output, result.output

        async def late(call: IncomingCall) -> Message:
            return Message(status.encode_status(service.status()) | {"time": time.time() - 3600})

        service = StatusService(seed)
        seed.endpoint.unhandle(status.METHOD)
        seed.endpoint.handle(status.METHOD, late)
        result = await run("join", text, *folder)
        assert result.exit_code == 1 and "-3600.0 s from that of" in result.output
        assert "synchronize it (NTP)" in result.output
    monkeypatch.setattr(doctor, "JOIN_TIMEOUT", 0.2)
    result = await run("join", text, *folder)  # the seed is gone
    assert result.exit_code == 1 and "nor by TCP" in result.output and "Does it run?" in result.output


OLD_SEED = """
import asyncio
from tesseract_async.wire import frames, heads
from tesseract_async.network import datagrams
frames.VERSION = datagrams.VERSION = 3
import tesseract_async as ta
async def main():
    async with ta.TesseractNode() as node:
        print(node.address, flush=True)
        await asyncio.Event().wait()
asyncio.run(main())
"""


@asynccontextmanager
async def a_seed_of_another_version() -> AsyncIterator[str]:
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", OLD_SEED, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    try:
        yield (await process.stdout.readline()).decode().strip()
    finally:
        process.kill()
        await process.wait()


@pytest.mark.slow
async def test_a_seed_that_is_away(tmp_path: Path) -> None:
    """With the timeouts as they are: 10 s at most."""
    for seed in ("127.0.0.1:9", "192.0.2.1:31337"):
        started = time.monotonic()
        result = await run("join", invite(seed), "--folder", str(tmp_path))
        assert result.exit_code == 1 and "no answer by UDP in 5 s; nor by TCP" in result.output, result.output
        assert "Errno" not in result.output and time.monotonic() - started < 10


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ("join", "INVITE", "--folder", "FOLDER"),
        ("serve", "--run", "digits", "-p", "SEED"),
        ("run", "status", "digits", "-p", "SEED", "--identity", "KEY"),
        ("doctor", "-p", "SEED"),
        ("top", "--once", "-p", "SEED"),
        ("call", "ffn.0", "-p", "SEED"),
        ("get", "x", "-p", "SEED"),
        ("save", "--run", "digits", "-p", "SEED", "--out", "FOLDER"),
        ("dashboard", "-p", "SEED"),
        # these go on, and ask again
        ("serve", "--experts", "ffn.0.0", "-p", "SEED"),
        ("dht", "-p", "SEED"),
        ("run", "create", "digits", "--grid", "1x2", "--identity", "KEY", "-p", "SEED"),
    ],
    ids=lambda words: " ".join(words[:2]),
)
async def test_a_seed_of_another_version_is_named(stem: Stem, tmp_path: Path, words: tuple[str, ...]) -> None:
    OWNER.save(tmp_path / "owner.pem")
    await finish(stem, "--version")  # the first command waits until PyTorch is loaded
    async with a_seed_of_another_version() as seed:
        given = {
            "SEED": seed,
            "INVITE": invite(seed),
            "FOLDER": str(tmp_path / "x"),
            "KEY": str(tmp_path / "owner.pem"),
        }
        async with asyncio.timeout(10), tesseract(stem, *(given.get(word, word) for word in words)) as process:
            told = process.stdout if words[0] == "doctor" else process.stderr
            assert told is not None
            while b"wire version 3, this node 2: upgrade this node" not in (line := await told.readline()):
                assert line, "it ended without the sentence"
                assert b"Errno" not in line


@pytest.mark.slow
async def test_from_an_invite_to_the_first_answer(stem: Stem, tmp_path: Path) -> None:
    async with a_seed() as seed:
        facts = await created(tmp_path, seed)
        assert (await created(tmp_path, seed))["invite"] is None, "one is out already"
        (tmp_path / "joined").mkdir()  # as one who joined before, with limits of his own
        config = f'run = "gone"\nidentity = "{tmp_path}/kept.pem"\nmax-memory = "1 GB"\n'
        (tmp_path / "joined" / "serve.toml").write_text(config)
        started = time.monotonic()
        async with tesseract(stem, "join", facts["invite"], "--folder", str(tmp_path / "joined")) as joining:
            await event(joining, "ready")
            async with ta.TesseractNode(initial_peers=[seed]) as trainer:
                await trainer.join_run(facts["run"], grant=facts["invite"])
                expert = await trainer.get_expert("ffn.0.1")
                with torch.no_grad():
                    assert (await expert(torch.ones(3, 4))).shape == (3, 4)
        assert time.monotonic() - started < 30


@pytest.mark.slow
async def test_a_revoked_invite_is_named_not_a_grant_that_is_missing(stem: Stem, tmp_path: Path) -> None:
    async with a_seed() as seed:
        facts = await created(tmp_path, seed)
        invited = read_grant_text(facts["invite"], OWNER.peer_id, now=0.0).signer
        revoked = await run("run", "revoke", facts["run"], "--invite", str(invited), "-p", seed, *key(tmp_path))
        assert "1 invite of digits@" in revoked.stderr and "everybody who came by one" in revoked.stderr
        status, _, said = await finish(stem, "join", facts["invite"], "--folder", str(tmp_path / "joined"))
    assert status == 1 and f"this invite to {facts['run']} was revoked: ask its owner for a new one" in said


@pytest.mark.slow
async def test_the_owners_node_is_a_seed_that_helps_to_measure_the_line(stem: Stem, tmp_path: Path) -> None:
    async with tesseract(stem, "run", "create", "digits", "--grid", "1x2", *SIZES, *key(tmp_path)) as owner:
        facts = await event(owner, "run")
        result = await run("doctor", "-p", facts["address"])
    assert result.exit_code == 0 and "ok    clock" in result.output and "ok    line: sends" in result.output


@pytest.mark.slow
async def test_a_hundred_starts_at_the_same_port_after_kill_9(stem: Stem, tmp_path: Path) -> None:
    """Same port, same identity, killed in the middle of it: each time others get an answer within 5 s."""
    async with ta.TesseractNode() as seed:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        keep = ("--identity", str(tmp_path / "server.pem"), "--checkpoint-dir", str(tmp_path / "kept"))
        words = ("serve", "--experts", "ffn.0.1", *SIZES, "--port", str(port), *keep, "-p", seed.address)
        times = []
        for _ in range(100):
            started = time.monotonic()
            async with tesseract(stem, *words) as server:
                async with asyncio.timeout(30):
                    while True:
                        try:
                            await status.ask_status(seed, PeerAddress.parse(f"127.0.0.1:{port}"), timeout=1.0)
                            break
                        except (TesseractError, TimeoutError):
                            await asyncio.sleep(0.02)
                    with torch.no_grad():
                        await (await seed.get_expert("ffn.0.1"))(torch.ones(3, 4))
                times.append(time.monotonic() - started)
                server.send_signal(signal.SIGKILL)
                await server.wait()
        assert max(times) < 5, sorted(times)[-10:]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals")
async def test_a_terminal_is_asked_once(tmp_path: Path) -> None:
    async with a_seed() as seed:
        facts = await created(tmp_path, seed)
        ours, theirs = os.openpty()
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tesseract_async", "join", facts["invite"], "--folder", str(tmp_path / "joined")),
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
        )
        try:
            said = b""
            while b"Lend this? [Y/n]" not in said:
                said += await asyncio.to_thread(os.read, ours, 4096)
            assert b"memory: up to" in said and b"serve.toml, and join again" in said
            os.write(ours, b"n\n")
            assert await process.wait() == 1
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
            os.close(theirs)
            os.close(ours)
