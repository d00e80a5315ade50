"""`tesseract top`: all that matters stays in sight, on any terminal, and a key ends it."""

import asyncio
import io
import os
import pty
import signal
import sys
from typing import Any

import pytest
from rich.console import Console

import tesseract_async as ta
from tesseract_async.cli import swarm_picture as picture
from tesseract_async.cli import top
from tests.cli.processes import ENVIRONMENT, ROOT


def peer(number: int, error: str = "") -> dict[str, Any]:
    return {
        "short": f"{number:08x}",
        "number": number,
        "path": f"tcp 192.0.2.{number}:31337",
        "error": error,
        "rtt": 0.01,
        "num_experts": 100,
        "calls_per_second": 12.0,
        "rows_per_second": 1000.0,
        "steps_per_second": 3.0,
        "busy": 0.5,
        "waiting_rows": 3,
        "answered_ago": 1.0,
    }


def state(size: tuple[int, int], *, num_peers: int = 2, num_grids: int = 1) -> dict[str, Any]:
    """Every second row of the grids lives; one expert is lost."""
    cells = [[[row, column], row % num_peers, 1, 7, 0, 0] for row in range(0, size[0], 2) for column in range(size[1])]
    grid = {"prefix": "ffn", "size": list(size), "experts": cells, "lost": [[1, 0]]}
    return {
        "totals": {"experts": float(len(cells)), "servers": float(num_peers)},
        "grids": [grid] * num_grids,
        "peers": [peer(number) for number in range(num_peers)],
        "losses": {f"trainer {number}": (10, 0.5, number + 1, 0, "samples") for number in range(9)},
        "seen": {"samples": 12345},
        "log": [(1.7e9 + number, f"event {number} " + 100 * "x", "note") for number in range(20)],
        "node": {"join": "127.0.0.1:1"},
    }


def shown(state: dict[str, Any], width: int, height: int | None, signs: dict[str, str] = picture.SIGNS) -> list[str]:
    console = Console(width=width, file=io.StringIO())
    with console.capture() as captured:
        console.print(picture.draw(state, width, height, signs=signs))
    return captured.get().splitlines()


@pytest.mark.parametrize(("width", "height"), [(80, 24), (80, 40), (132, 50), (60, 16)])
@pytest.mark.parametrize("size", [(64, 64), (4, 4), (300, 300), (1, 4096), (4096, 1)])
@pytest.mark.parametrize(("num_peers", "num_grids"), [(1, 1), (40, 1), (3, 9)])
def test_servers_legend_and_events_stay_in_sight(
    width: int, height: int, size: tuple[int, int], num_peers: int, num_grids: int
) -> None:
    if size == (300, 300) and num_grids > 1:
        return  # that takes long, and shows nothing more
    lines = shown(state(size, num_peers=num_peers, num_grids=num_grids), width, height)
    text = "\n".join(lines)
    assert len(lines) <= height and all(len(line) <= width for line in lines), text
    left_out = "trainer 0: step 10, loss 0.5000, 1 answer left out"
    for wanted in ("tesseract top", "00000000", "tcp 192.0.2.0", "alive", "nobody", left_out, "event 19"):
        assert wanted in text, (wanted, text)
    assert num_peers < 40 or "servers more" in text


def test_lists_scroll_and_a_run_is_described() -> None:
    swarm = state((4, 4), num_peers=40)
    swarm["run"] = {"name": "digits@ab", "mode": "granted", "num_experts": 16, "expert": "ffn", "losses": 2}
    swarm["run"]["parameters"] = 4096
    swarm["contributors"] = [{"name": "attic", "short": "0", "rows": 1234567}]
    swarm["peers"][7] |= {"name": "cellar", "left_ago": 600, "error": "it cannot be reached"}
    for first, begins, ends in (
        (0, "00000000", "event 19"),
        (8, "00000009", "event 11"),
        (999, "00000027", "event 5 "),
    ):
        console = Console(width=130, file=io.StringIO())
        with console.capture() as captured:
            console.print(picture.draw(swarm, 130, 40, first=first))
        text = captured.get()
        assert begins in text and ends in text and len(text.splitlines()) <= 40, text
        assert "survives the loss of any 2 members" in text and "thanks, last 24 h: attic (1,234,567 rows)" in text
        assert (first == 999) is ("cellar" in text and "left 10 min ago" in text), "those that left come last"


def test_a_narrow_terminal_keeps_the_names() -> None:
    swarm = state((4, 4))
    for name, more in (("attic", ["load"]), ("the computer under the roof", [])):
        swarm["peers"][1] |= {"name": name}
        lines = shown(swarm, 80, 24)
        [head] = [one for one in lines if one.startswith("peer ")]
        assert head.split() == ["peer", "name", "path", "round", "trip", "experts", "calls/s", *more]
        assert any(one.startswith(f"00000001  {name[:11]}") and "tcp 192.0.2.1:31337 " in one for one in lines)


@pytest.mark.parametrize("name", ["x" * 64, "機" * 64, "e" + 63 * "\u0301"])
def test_what_one_server_says_takes_no_room_from_others(name: str) -> None:
    swarm = state((4, 4))
    endless = dict.fromkeys(("calls_per_second", "rows_per_second", "steps_per_second", "busy"), 2.0**90)
    swarm["peers"][1] |= {"name": name, "waiting_rows": 2**62, **endless}
    for width in (80, 132):
        assert any(one.startswith("00000000  ") and "tcp 192.0.2.0:31337  " in one for one in shown(swarm, width, 24))


def test_one_look_says_what_it_cannot_know() -> None:
    def once(swarm: dict[str, Any]) -> str:
        console = Console(width=100, file=io.StringIO())
        with console.capture() as captured:
            console.print(picture.draw(swarm, 100, is_once=True))
        return captured.get()

    swarm = state((4, 4))
    assert "a server that died so long before it" in once(swarm)
    assert "a server that died so long before it" in once(swarm | {"grids": []})
    swarm["grids"][0]["experts"] = [[[at // 4, at % 4], 0, 1, 7, 0, 0] for at in range(16)]
    assert "This is one look" not in once(swarm), "nobody is missing"


def test_an_expert_of_a_run_is_not_lost_while_members_have_its_state() -> None:
    swarm = state((4, 4))
    swarm["grids"][0] |= {"lost": [[1, 0], [1, 1]], "standings": [[[1, 0], "ab", [], ["cd"], 7, 1, "safe"]]}
    assert "8 alive, 1 lost, 1 waiting for another server" in "\n".join(shown(swarm, 100, 40))


def test_of_each_expert_of_a_run_it_shows_who_has_it_those_in_danger_first() -> None:
    swarm = state((4, 4))
    swarm["grids"][0]["standings"] = [
        [[0, 0], "0000000a", ["0000000b"], ["0000000c", "0000000d"], 1234, 3, "safe"],
        [[0, 1], "0000000a", [], [], 7, 0, "at risk"],
        [[0, 2], None, [], [], 0, -1, "lost"],
    ]
    lines = [" ".join(line.split()) for line in shown(swarm, 132, 50)]
    at = lines.index("expert led by followed by held by certified state")
    assert lines[at + 1 : at + 4] == [
        "ffn.0.2 nobody nobody nobody version 0 lost",
        "ffn.0.1 0000000a nobody nobody version 7 at risk",
        "ffn.0.0 0000000a 0000000b 0000000c, 0000000d version 1,234 safe, survives 3",
    ]
    swarm["grids"][0]["standings"] *= 100
    for width, height in ((80, 24), (132, 50)):
        lines = shown(swarm, width, height)
        assert len(lines) <= height and any("experts more" in line for line in lines), lines
    assert picture.safety(-1) == "has lost experts"


def test_keys_are_told_apart() -> None:
    assert top._KEY.findall("q\x1b[Bj\x1b[6~") == ["q", "\x1b[B", "j", "\x1b[6~"]


def test_large_grids_are_drawn_in_blocks() -> None:
    lines = shown(state((64, 64)), 80, 24)
    sheet = [line for line in lines if set(line) <= set("●◐○x· ") and line.strip()]
    assert len(sheet) <= 10 and all(len(line.rstrip()) == 64 for line in sheet)
    assert "x1: ● alive  ◐ some" in "\n".join(lines)
    assert set("".join(sheet)) == {"◐"}, "of each block every second row lives"
    small = shown(state((4, 4)), 80, 24)
    assert any(line.rstrip() == "x · · ·" for line in small) and any(line.rstrip() == "● ● ● ●" for line in small)


def test_blocks_of_one_kind_keep_its_sign() -> None:
    alive, silent, lost = ("alive", "cyan"), ("silent", "red"), ("lost", "red")
    for cells, full, expected in (
        ([], 4, ("nobody", "dim")),
        ([alive] * 4, 4, ("alive", "cyan")),
        ([alive] * 3, 4, ("some", "cyan")),
        ([alive, ("alive", "blue")], 2, ("alive", "white")),
        ([alive, lost], 2, ("some", "red")),
        ([silent, lost], 4, ("silent", "red")),
        ([lost], 4, ("lost", "red")),
    ):
        assert picture.sign_of(cells, full) == expected


@pytest.mark.parametrize("encoding", ["ascii", "iso-8859-1", "cp1252", "nonsense"])
def test_terminals_without_those_letters_get_others(encoding: str) -> None:
    signs = picture.signs_for(encoding)
    text = "\n".join(shown(state((4, 4)), 80, 24, signs))
    assert "●" not in text and "o o o o" in text and "o alive" in text
    assert picture.signs_for("utf-8") is picture.SIGNS


@pytest.mark.parametrize(("key", "kind"), [(b"Q", "xterm"), (b"\x03", "xterm"), (b"q", "dumb")])
async def test_a_key_ends_it_and_the_terminal_is_as_before(key: bytes, kind: str) -> None:
    import termios

    async with ta.TesseractNode() as seed:
        ours, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (24, 80))
        before = termios.tcgetattr(theirs)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", CONTROLLING, "top", "-p", seed.address, "--period", "0.2"),
            cwd=ROOT,
            env={**ENVIRONMENT, "TERM": kind, "PYTHONIOENCODING": "ascii"},
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        try:
            said = b""
            while b"tesseract serve" not in said:
                said += await asyncio.to_thread(os.read, ours, 4096)
            os.write(ours, key)
            reading = asyncio.create_task(asyncio.to_thread(drain, ours))
            assert await process.wait() == 0
            assert termios.tcgetattr(theirs) == before
        finally:
            if process.returncode is None:
                process.send_signal(signal.SIGKILL)
                await process.wait()
            os.close(theirs)
        assert b"Traceback" not in said + await reading
        os.close(ours)


CONTROLLING = """
import fcntl, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from tesseract_async.cli.main import main
main(prog_name="tesseract")
"""


def drain(number: int) -> bytes:
    said = b""
    try:
        while part := os.read(number, 4096):
            said += part
    except OSError:  # its other end is closed
        pass
    return said
