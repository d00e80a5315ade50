"""The commands that join a swarm, do something and end: get, put, call, top; and keygen."""

import asyncio
import contextlib
import json
import logging
import os
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

import tesseract_async as ta
from tesseract_async.cli.main import main
from tesseract_async.cli.options import host_towards
from tesseract_async.cli.running import JsonLines, TextLines
from tesseract_async.endpoint.endpoint import IncomingCall, Message
from tesseract_async.monitoring import StatusService
from tesseract_async.nat import reach
from tesseract_async.nat.dial_back import DIAL_BACK
from tesseract_async.nat.reach import ReachSettings
from tests.nat.test_port_mapping import Router


async def tesseract(*arguments: str) -> Result:
    """The command in a thread with a loop of its own, next to the swarm of the test."""
    return await asyncio.to_thread(CliRunner().invoke, main, list(arguments))


@asynccontextmanager
async def swarm() -> AsyncIterator[str]:
    """The address of a node that hosts ``ffn.0.1``."""
    backend = ta.ExpertBackend(torch.nn.Linear(3, 2), args_schema=(ta.TensorSpec((3,)),))
    async with (
        ta.TesseractNode() as node,
        ta.TesseractServer(node, {"ffn.0.1": backend}) as server,
        StatusService(node, server),
    ):
        yield str(node.peer_address)


async def test_what_is_put_can_be_got() -> None:
    async with swarm() as address:
        put = await tesseract("put", "colour", '{"red": 3}', "-p", address, "--subkey", "mine")
        assert put.exit_code == 0 and "held by" in put.output
        got = await tesseract("get", "colour", "-p", address, "--json")
        entry = json.loads(got.output)
        assert (entry["value"], entry["subkey"]) == ({"red": 3}, "mine")
        assert 0 < entry["expires_in"] <= 300
        manifest = await tesseract("get", "experts/ffn", "-p", address)
        assert '"experts": [[0, 1]]' in manifest.output and "127.0.0.1:" in manifest.output
        nothing = await tesseract("get", "nothing", "-p", address)
        assert nothing.exit_code == 1 and "nothing is held" in nothing.output


async def test_an_expert_can_be_tried() -> None:
    async with swarm() as address:
        result = await tesseract("call", "ffn.0.1", "-p", address, "--rows", "4", "--repeat", "3", "--json")
        assert result.exit_code == 0, result.output
        facts = json.loads(result.output)
        assert facts["uid"] == "ffn.0.1" and "[rows, 3]" in facts["takes"] and "[4, 2]" in facts["gave"]
        people = await tesseract("call", "ffn.0.1", "-p", address)
        assert "answered in" in people.output
        missing = await tesseract("call", "ffn.7.7", "-p", address)
        assert missing.exit_code == 1 and "ffn.7.7" in missing.output and "Traceback" not in missing.output


async def test_top_prints_once() -> None:
    async with swarm() as address:
        result = await tesseract("top", "--once", "-p", address, "--period", "5")
        assert result.exit_code == 0, result.output
        assert "1 expert on 1 server " in result.output and "ffn" in result.output
        state = json.loads((await tesseract("top", "ffn.[0:2].[0:2]", "--once", "--json", "-p", address)).output)
        assert state["grids"][0]["size"] == [2, 2] and len(state["grids"][0]["experts"]) == 1
    assert (await tesseract("top", "-p", "127.0.0.1:1", "--json")).exit_code == 2


def test_keygen_makes_an_identity_once(tmp_path: Path) -> None:
    file = str(tmp_path / "keys" / "identity.pem")
    made = CliRunner().invoke(main, ["keygen", file])
    assert made.exit_code == 0 and len(made.output.strip()) == 64
    assert CliRunner().invoke(main, ["keygen", "--show", file]).output == made.output
    again = CliRunner().invoke(main, ["keygen", file])
    assert again.exit_code == 1 and "not overwritten" in again.output
    missing = CliRunner().invoke(main, ["keygen", "--show", str(tmp_path / "none")])
    assert missing.exit_code == 1 and "no file" in missing.output


def test_options_come_from_the_environment_too() -> None:
    result = CliRunner().invoke(main, ["serve", "--experts", "ffn.0"], env={"TESSERACT_SERVE_PORT": "70000"})
    assert result.exit_code == 2 and "70000" in result.output


def test_options_come_from_a_file_after_flags_and_environment(tmp_path: Path) -> None:
    (tmp_path / "node.toml").write_text('port = 70001\nlog-format = "json"\n')
    arguments = ["dht", "--config", str(tmp_path / "node.toml")]
    assert "70001" in CliRunner().invoke(main, arguments).output
    assert "70002" in CliRunner().invoke(main, arguments, env={"TESSERACT_DHT_PORT": "70002"}).output
    assert "70003" in CliRunner().invoke(main, [*arguments, "--port", "70003"]).output


def test_shells_complete_commands() -> None:
    environment = {"_TESSERACT_COMPLETE": "bash_complete", "COMP_WORDS": "tesseract d", "COMP_CWORD": "1"}
    result = CliRunner().invoke(main, [], prog_name="tesseract", env=environment)
    assert [line.split(",")[1] for line in result.output.split()] == ["dashboard", "demo", "dht", "doctor"]


def test_log_lines_can_be_json() -> None:
    record = logging.LogRecord("tesseract_async.x", logging.WARNING, "f", 1, "dropped %s", ("a peer",), None)
    line = json.loads(JsonLines().format(record))
    assert (line["level"], line["logger"], line["message"]) == ("warning", "tesseract_async.x", "dropped a peer")


async def test_a_strangers_words_do_not_command_a_terminal() -> None:
    record = logging.LogRecord("x", logging.WARNING, "f", 1, "%s\n  at", ("\x1b[2J\u202eevil",), None)
    assert TextLines("%(message)s").format(record) == "\\x1b[2J\\u202eevil\n  at"
    async with ta.TesseractNode() as seed:
        await seed.network.store("colour", "\x9b2J\u202ered", ttl=60.0, subkey="\x1b]0;owned\x07")
        got = await tesseract("get", "colour", "-p", seed.address)
    assert "\\x1b]0;owned\\x07" in got.output and "\\x9b2J\\u202ered" in got.output
    assert not {"\x1b", "\x07", "\x9b", "\u202e"} & {*got.output}


@pytest.mark.parametrize(
    ("seeds", "host"),
    [
        ([], "127.0.0.1"),
        (["127.0.0.1:4000", "localhost:4000"], "127.0.0.1"),
        (["[::1]:4000"], "::1"),
        (["127.0.0.1:4000", "198.51.100.7:31337/" + 64 * "a"], "0.0.0.0"),
        (["seed.example.org:31337"], "0.0.0.0"),
        (["198.51.100.7:31337", "[2001:db8::7]:31337"], "::"),
    ],
)
def test_who_looks_in_listens_where_its_seeds_can_answer(seeds: list[str], host: str) -> None:
    assert host_towards(seeds) == host


@pytest.mark.parametrize(
    "words",
    [["get", "x"], ["put", "x", "1"], ["call", "ffn.0.1"], ["top", "--once"], ["dashboard"], ["doctor", "--json"]],
    ids=lambda words: words[0],
)
async def test_a_swarm_on_another_computer_can_be_looked_at(monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    """From a socket on loopback nothing would get there."""
    hosts: set[str] = set()

    def bind(sock: socket.socket, address: Any) -> None:
        hosts.add(address[0])
        raise OSError("far enough")

    monkeypatch.setattr(socket.socket, "bind", bind)
    result = await tesseract(*words, "-p", "198.51.100.7:31337")
    assert hosts == {"0.0.0.0"} and result.exit_code == 1, result.output


async def test_the_doctor_looks_at_the_machine_and_at_seeds(tmp_path: Path) -> None:
    async with swarm() as address:
        result = await tesseract("doctor", "-p", address, "--checkpoint-dir", str(tmp_path / "new"), "--json")
        findings = [json.loads(line) for line in result.output.splitlines()]
        assert result.exit_code == 0, findings
        what = {finding["what"] for finding in findings}
        assert {"Python", "PyTorch", "CUDA", "disk", "listening", "clock", f"seed {address}"} <= what
        assert all(finding["advice"] for finding in findings if finding["verdict"] != "good")
    alone = (await tesseract("doctor", "--json")).output
    assert "clock and NAT" in alone and "--initial-peers" in alone, "it says what it has not looked at, and how to"
    taken = await tesseract("doctor", "--host", "192.0.2.7")
    assert taken.exit_code == 1 and "BAD   listening" in taken.output and "Choose another" in taken.output


@pytest.mark.skipif(sys.platform == "win32", reason="Windows gives a port in TIME_WAIT to nobody, a node included")
async def test_the_doctor_finds_a_port_free_where_a_node_would() -> None:
    """The end that closes a connection first, such as a node that ended, keeps its port in TIME_WAIT for a minute."""
    port = free_port()
    with socket.create_server(("127.0.0.1", port)) as server, socket.create_connection(("127.0.0.1", port)) as client:
        accepted, _ = server.accept()
        accepted.close()
        assert client.recv(1) == b""
    result = await tesseract("doctor", "--port", str(port), "--json")
    (listening,) = [
        finding for line in result.output.splitlines() if (finding := json.loads(line))["what"] == "listening"
    ]
    assert listening["verdict"] == "good", listening
    async with ta.TesseractNode(port=port):
        pass


async def test_the_doctor_tells_a_closed_door_from_a_broken_one() -> None:
    async with ta.TesseractNode(policy=ta.Policy.only([])) as node, StatusService(node):
        result = await tesseract("doctor", "-p", node.address, "--json")
    findings = [json.loads(line) for line in result.output.splitlines()]
    (refusal,) = [finding for finding in findings if "refuses" in finding["found"]]
    assert refusal["verdict"] == "note" and "does not let" in refusal["found"]
    assert result.exit_code == 0, findings


async def test_a_node_of_a_program_that_tells_no_status_is_a_good_seed() -> None:
    async with ta.TesseractNode() as node:
        result = await tesseract("doctor", "-p", node.address, "--json")
    assert result.exit_code == 0 and '"answers by TCP"' in result.output, result.output


@pytest.fixture
def router(monkeypatch: pytest.MonkeyPatch) -> Router:
    """This computer's, which has no address but that of loopback."""
    made = Router()
    monkeypatch.setattr(reach, "own_addresses", lambda: ["127.0.0.1"])
    monkeypatch.setattr(reach, "_find_router", made.find)
    return made


@pytest.mark.parametrize("reached", [True, False])
async def test_the_doctor_tells_what_others_see_of_the_port(router: Router, reached: bool) -> None:
    """Off loopback: a node on that very port asks to be dialed back."""
    port = free_port()
    async with ta.TesseractNode(public=True, reach=ReachSettings(on_loopback=True)) as seed, StatusService(seed):
        if not reached:

            async def unable(call: IncomingCall) -> Message:
                return Message({"host": call.origin, "addresses": []})

            seed.endpoint.unhandle(DIAL_BACK)
            seed.endpoint.handle(DIAL_BACK, unable)
        result = await tesseract("doctor", "-p", seed.address, "--host", "0.0.0.0", "--port", str(port), "--json")
        assert result.exit_code == 0, result.output
        seen = json.loads(result.output.splitlines()[-1])
        assert seen["what"] == "seen from outside"
        if reached:
            assert seen["verdict"] == "good" and f"127.0.0.1:{port}" in seen["found"]
        else:
            assert seen["verdict"] == "note" and f"forward TCP and UDP port {port}" in seen["advice"]
            assert seed.peer_id.short in seen["advice"]  # the way that is left


async def test_the_doctor_asks_the_router_and_gives_back_what_it_got(router: Router) -> None:
    port = free_port()
    asked = ["doctor", "--host", "0.0.0.0", "--port", str(port), "--json"]
    async with ta.TesseractNode(public=True, reach=ReachSettings(on_loopback=True)) as seed, StatusService(seed):
        for options, num_searches in ((["--upnp"], 1), ([], 1)):
            result = await tesseract(*asked, "-p", seed.address, *options)
            assert result.exit_code == 0, result.output
            seen = json.loads(result.output.splitlines()[-1])
            assert (f"maps its port {port} to" in seen["advice"]) == bool(options)
            assert router.num_searches == num_searches and not router.mappings
    assert router.num_adds == 2  # TCP and UDP


def free_port() -> int:
    """One that nobody is given by chance meanwhile: below those for outgoing connections and port 0, and every process
    of the tests has a stretch of its own."""
    taken_by_chance = Path("/proc/sys/net/ipv4/ip_local_port_range")
    lowest = int(taken_by_chance.read_text().split()[0]) if taken_by_chance.exists() else 49152
    room = (lowest if lowest > 12_000 else 32_768) - 10_000
    start = 10_000 + os.getpid() % (room // 50) * 50
    for port in range(start, start + 2000):
        with socket.socket() as tcp, socket.socket(type=socket.SOCK_DGRAM) as udp, contextlib.suppress(OSError):
            tcp.bind(("0.0.0.0", port))
            udp.bind(("0.0.0.0", port))
            return port
    raise OSError("no port is free")


async def test_bench_says_rows_per_second() -> None:
    result = await tesseract("bench", "--in-features", "8", "--rows", "4", "--seconds", "0.1", "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.output)
    assert facts["forward_rows_per_second"] > 0 and facts["training_rows_per_second"] > 0
