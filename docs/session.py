"""Does what a page tells its reader to do, and compares what is seen with what the page shows.

    python docs/session.py [PAGE ...]      writes the outputs into the pages anew where they have changed

In a page, fenced blocks are read in order:

- ``sh`` blocks are run, a command a line. The block's title names a terminal: ``title="Terminal 1"``. Commands that go
  on (`serve`, `dht`, ...) run on there until the page's end.
- A ``text`` block right after an ``sh`` block shows the output of its last command.
- ``python`` and ``toml`` blocks whose title is a file's name are written to that file.
- ``<!-- stop: Terminal 1 -->`` presses Ctrl-C there, ``<!-- kill: Terminal 1 -->`` kills what runs there.
- ``<!-- run: COMMAND -->`` does what an earlier page has told the reader to do.

What differs from what a reader does: everything stays on this computer, on free ports. So ``--host 0.0.0.0`` becomes
loopback, and the addresses of the page become that of the node that was started with ``--port 31337``. And Python
starts and loads PyTorch once: every command is a process forked from that one, which spares three seconds each.
"""

import asyncio
import json
import os
import re
import shlex
import signal
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[1]
if str(ROOT) not in sys.path:  # run as a script, this one's folder is there instead
    sys.path.insert(0, str(ROOT))

from tests.stem import Process, Stem  # noqa: E402

RECORDED: Final = (
    "README.md",
    *(f"docs/tutorial/{path.name}" for path in sorted((ROOT / "docs/tutorial").glob("*.md"))),
)

GO_ON: Final = ("tesseract serve", "tesseract dht", "tesseract dashboard")
NOT_RUN: Final = {
    "make demo": "it takes a minute, and tests/cli/demo runs a smaller one",
    "make demo DEMO_ARGS=--freeze-experts": "as `make demo`",
    "make test": "this is it",
    "pip install -e .": "the tests run from the clone",
}
"""Commands of the pages that are not run, each with its reason. A test sees to it that make has these targets."""
ADDRESSES: Final = ("198.51.100.7:31337", "127.0.0.1:31337")
PATIENCE: Final = 120.0
"""Seconds for a command to end, or to say that it is ready."""

_OF_THE_COMPUTER: Final = "Python|PyTorch|CUDA|disk|open files"
_PIECES = re.compile(
    r"^```(?P<language>\w+)(?: title=\"(?P<title>[^\"]+)\")?\n(?P<body>.*?)^```$"
    r"|^<!-- (?P<verb>stop|kill|run): (?P<whom>[^>]+?) -->$",
    flags=re.S | re.M,
)


@dataclass(frozen=True, slots=True)
class Piece:
    """A fenced block or a directive, in the order of the page."""

    kind: str
    """The block's language, or ``stop``, ``kill``, ``run``."""
    title: str
    """The block's title, or what the directive says."""
    body: str
    span: tuple[int, int]
    """Where the body lies in the page's text."""


def read_pieces(text: str) -> list[Piece]:
    """What a page holds for this module. Raises: ValueError for a block that it would overlook."""
    found = [
        Piece(match["verb"], match["whom"], "", match.span())
        if match["verb"]
        else Piece(match["language"], match["title"] or "", match["body"], match.span("body"))
        for match in _PIECES.finditer(text)
    ]
    left = _PIECES.sub("", text)
    if re.search(r"^\s*```", left, flags=re.M) or re.search(r"\n\n(?: {4}|\t)\S", left):
        raise ValueError("every code block stands between fences, from the first column on, and names its language")
    return found


def commands_of(body: str) -> list[str]:
    """A shell block's commands, lines joined at backslashes, comments left out."""
    lines = re.sub(r"\\\n\s*", "", body).splitlines()
    return [line for line in (line.partition(" #")[0].strip() for line in lines) if line and not line.startswith("#")]


def shape(output: str) -> list[str]:
    """An output without what differs from one time or computer to the next: numbers, ids, widths of columns, empty
    lines, and what `tesseract doctor` says of the computer."""
    text = re.sub(rf"^(?:ok|note) +({_OF_THE_COMPUTER}): .*\n(?: {{6}}.*\n)?", r"\1: HERE\n", output, flags=re.M)
    text = re.sub(r"\b[0-9a-f]{64}\b", "PEER", text)
    text = re.sub(r"\b(?=[0-9a-f]*\d)[0-9a-f]{8}\b|\b[a-f]{8}\b", "PEER", text)
    text = re.sub(r"(?<![\w.])[-+]?\d[\d,.]*", "0", text)
    text = re.sub(r"\b0 ([a-z]+?)s\b", r"0 \1", text)  # one contact or two
    text = re.sub(r"\bversions 0 to 0\b|\bversion 0\b", "versions 0", text)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    return [line for line in lines if line]


class Session:
    """A folder with the clone's examples in it, and the processes that a page has started."""

    def __init__(self, folder: Path, stem: Stem) -> None:
        self.folder = folder
        self.address = ADDRESSES[1]
        self._stem = stem
        self._terminals: dict[str, Process] = {}
        self._rests: dict[str, asyncio.Task[bytes]] = {}
        """Read what is said later, which nobody wants: it must not fill the pipe and hold the command up."""
        (folder / "examples").symlink_to(ROOT / "examples")
        (folder / "bin").mkdir()
        self._tesseract = folder / "bin" / "tesseract"
        self._tesseract.write_text("from tesseract_async.cli.main import main\n\nmain()\n")

    async def _start(self, command: str) -> Process:
        words = shlex.split(command)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "120"}
        path: list[str] = []
        while "=" in words[0]:
            name, _, value = words.pop(0).partition("=")
            environment[name] = value
            if name == "PYTHONPATH":
                path = [str(self.folder / one) for one in value.split(":") if one]
        program, *arguments = words
        assert program in ("tesseract", "python"), f"{command}: how is {program} run?"
        argv = [str(self._tesseract), *arguments] if program == "tesseract" else arguments
        return await self._stem.start(
            *argv, folder=self.folder, environment=environment, path=(*path, str(ROOT)), merge=True
        )

    def localised(self, text: str) -> str:
        """What a page says, with addresses of this computer."""
        for told, real in {
            "--host 0.0.0.0": "--host 127.0.0.1",
            'host = "0.0.0.0"': 'host = "127.0.0.1"',
            "--port 31337": "--port 0",
            **dict.fromkeys(ADDRESSES, self.address),
        }.items():
            text = text.replace(told, real)
        return text

    async def run(self, command: str, terminal: str) -> str:
        """What `command` says, up to its end, or until it is ready if it goes on.

        Raises: AssertionError if it fails.
        """
        real = self.localised(command)
        if real.startswith("tesseract dashboard"):
            real += " --bind-port 0"
        goes_on = real.startswith(GO_ON)
        assert not goes_on or terminal not in self._terminals, f"{command}: {terminal or 'the only terminal'} is taken"
        process = await self._start(real)
        lines: list[str] = []
        try:
            async with asyncio.timeout(PATIENCE):
                if not goes_on:
                    lines.append((await process.stdout.read()).decode())
                    assert await process.wait() == 0, f"{command}\n{''.join(lines)}"
                    return self._as_read("".join(lines))
                await self._until_ready(process, lines, command)
                self._rests[terminal] = asyncio.create_task(process.stdout.read())
        except BaseException as error:
            process.kill()
            await process.communicate()
            if isinstance(error, TimeoutError):
                raise AssertionError(f"{command} took over {PATIENCE:.0f} s; it said:\n{''.join(lines)}") from None
            raise
        self._terminals[terminal] = process
        return self._as_read("".join(line for line in lines if not line.startswith("{")))

    async def _until_ready(self, process: Process, lines: list[str], command: str) -> None:
        """Reads up to the line that says so to programs."""
        while not lines or '"event": "ready"' not in lines[-1]:
            line = (await process.stdout.readline()).decode()
            assert line, f"{command} ended:\n{''.join(lines)}"
            lines.append(line)
        if "--port 31337" in command:
            self.address = json.loads(lines[-1])["address"].partition("/")[0]

    def _as_read(self, output: str) -> str:
        text = output.replace(self.address, ADDRESSES[1]).replace(str(self.folder), "/home/me/tesseract")
        return "".join(f"{line.rstrip()}\n" for line in text.splitlines()).strip("\n") + "\n"

    async def end(self, terminal: str, number: int) -> None:
        """Presses Ctrl-C in a terminal (or kills what runs there), and waits until it has ended."""
        process = self._terminals.pop(terminal)
        process.send_signal(number)
        async with asyncio.timeout(PATIENCE):
            await self._rests.pop(terminal)
            status = await process.wait()
        assert number == signal.SIGKILL or status in (0, 130), f"{terminal} ended with {status}"

    async def aclose(self) -> None:
        """Ends what still runs, what was started first last."""
        for terminal in reversed(list(self._terminals)):
            await self.end(terminal, signal.SIGINT)


@asynccontextmanager
async def session(stem: Stem) -> AsyncIterator[Session]:
    """A session in a folder of its own; both are gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="tesseract-") as folder:
        one = Session(Path(folder), stem)
        try:
            yield one
        except BaseException:
            for terminal in list(one._terminals):
                await one.end(terminal, signal.SIGKILL)
            raise
        await one.aclose()


async def follow(text: str, stem: Stem) -> str:
    """Does what a page's text says. Returns the text with the outputs as they were seen, where their shape has changed.

    Raises: AssertionError if a command fails.
    """
    seen: list[tuple[tuple[int, int], str]] = []
    output = ""
    async with session(stem) as reader:
        for piece in read_pieces(text):
            if piece.kind in ("stop", "kill"):
                await reader.end(piece.title, signal.SIGKILL if piece.kind == "kill" else signal.SIGINT)
            elif piece.kind == "run":
                await reader.run(piece.title, piece.title)
            elif piece.kind in ("python", "toml") and piece.title:
                (reader.folder / piece.title).write_text(reader.localised(piece.body))
            elif piece.kind == "sh":
                for command in commands_of(piece.body):
                    if command not in NOT_RUN:
                        output = await reader.run(command, piece.title)
            elif piece.kind == "text" and shape(piece.body) != shape(output):
                seen.append((piece.span, output))
    for (start, end), output in reversed(seen):
        text = text[:start] + output + text[end:]
    return text


def record(pages: list[str]) -> None:
    """Writes the pages anew where an output has changed."""
    stem = Stem()
    for name in pages:
        print(f"{name}: {'written anew' if rewrite(ROOT / name, stem) else 'as it was'}")
    stem.close()


def rewrite(page: Path, stem: Stem) -> bool:
    """Follows a page and writes it anew where an output has changed; whether one has."""
    text = page.read_text(encoding="utf-8")
    seen = asyncio.run(follow(text, stem))
    page.write_text(seen, encoding="utf-8")
    return seen != text


if __name__ == "__main__":
    record(sys.argv[1:] or list(RECORDED))
