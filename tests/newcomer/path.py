"""A newcomer's first quarter of an hour, played through and timed: clone, `make demo`, a second terminal, a look.

    python tests/newcomer/path.py                 # of the last commit, in a folder that is removed at the end
    python tests/newcomer/path.py --keep FOLDER   # in a folder that stays

Does what the README says and nothing else: clones, runs `make demo` (which makes the virtual environment), and while
the demo trains types into a second terminal what it printed: `tesseract serve`, `tesseract top`, `tesseract dashboard`.
Prints the seconds of each step as a table. Exit status 1 if a step did not do what it should.
"""

import argparse
import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
INSTALL_TIMEOUT, STEP_TIMEOUT = 900.0, 120.0
ENVIRONMENT = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}


class Newcomer:
    """Keeps the time."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, float]] = []
        self._since = time.monotonic()

    def did(self, what: str) -> None:
        """A step is over."""
        now = time.monotonic()
        self.steps.append((what, now - self._since))
        print(f"{now - self._since:7.1f} s  {what}", flush=True)
        self._since = now

    def table(self) -> str:
        """As the documents show it."""
        lines = ["| step | seconds |", "|---|---:|"]
        lines += [f"| {what} | {seconds:.1f} |" for what, seconds in self.steps]
        return "\n".join([*lines, f"| all together | {sum(seconds for _, seconds in self.steps):.1f} |"])


@contextlib.contextmanager
def terminal(*words: str, folder: Path, log: Path) -> Iterator[subprocess.Popen[str]]:
    """A command that runs in the background; told to leave at the end."""
    with log.open("w") as errors:
        process = subprocess.Popen(
            words,
            cwd=folder,
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
            # it is ignored from birth in the background of a script, but ends what runs here
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGINT)
                try:
                    process.wait(30)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
            assert process.stdout is not None
            process.stdout.close()


def lines_until(process: subprocess.Popen[str], pattern: str, *, timeout: float) -> list[str]:
    """What it says, up to the line that matches. Raises: RuntimeError if none does in time."""
    assert process.stdout is not None
    said: list[str] = []
    deadline = time.monotonic() + timeout
    for line in process.stdout:
        said.append(line.rstrip())
        if re.search(pattern, line):
            return said
        if time.monotonic() > deadline:
            break
    raise RuntimeError("it never said what was waited for:\n" + "\n".join(said[-20:]))


def play(folder: Path, newcomer: Newcomer) -> None:
    """Raises: RuntimeError, AssertionError, subprocess.CalledProcessError."""
    clone = folder / "tesseract"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    newcomer.did("clone")
    with terminal("make", "demo", "DEMO_ARGS=--no-plot --steps 1200", folder=clone, log=folder / "demo.log") as demo:
        lines_until(demo, "starting a bootstrap node|in a second terminal", timeout=INSTALL_TIMEOUT)
        newcomer.did("`make demo`: environment, packages, until the demo begins")
        said = lines_until(demo, r"tesseract serve", timeout=STEP_TIMEOUT)
        commands = {
            word: shlex.split(line)
            for line in said
            for word in ("top", "dashboard", "serve")
            if f"tesseract {word}" in line
        }
        lines_until(demo, r"s  training$", timeout=STEP_TIMEOUT)
        newcomer.did("the demo's six processes train")

        with terminal(*commands["serve"], folder=clone, log=folder / "serve.log") as server:
            ready = json.loads(lines_until(server, '"ready"', timeout=STEP_TIMEOUT)[-1])
            assert len(ready["uids"]) == 4
            newcomer.did("a second terminal: `tesseract serve` is ready, four experts joined")
            name = ready["peer_id"][:8]

            top = subprocess.run(
                [*commands["top"], "--once"], cwd=clone, env=ENVIRONMENT, capture_output=True, text=True, check=True
            )
            assert name in top.stdout, top.stdout
            newcomer.did("`tesseract top --once` shows it")

            with terminal(*commands["dashboard"], "--bind-port", "0", folder=clone, log=folder / "page.log") as page:
                url = json.loads(lines_until(page, '"ready"', timeout=STEP_TIMEOUT)[-1])["url"]
                wait_for_peer(url, ready["peer_id"])
            newcomer.did("`tesseract dashboard` shows it")
    assert server.returncode == 0, "Ctrl-C leaves cleanly"
    newcomer.did("Ctrl-C in every terminal: all have left")
    print((folder / "serve.log").read_text()[-300:])


def wait_for_peer(url: str, peer_id: str) -> dict[str, Any]:
    """Until the page's state shows this server and its experts."""
    deadline = time.monotonic() + STEP_TIMEOUT
    while time.monotonic() < deadline:
        with urllib.request.urlopen(f"{url}api/state") as answer:
            state: dict[str, Any] = json.load(answer)
        if any(peer["peer_id"] == peer_id and peer["answered_ago"] is not None for peer in state["peers"]):
            return state
        time.sleep(0.2)
    raise RuntimeError("the dashboard does not show the new server")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="play there, and leave it")
    args = parser.parse_args()
    newcomer = Newcomer()
    with contextlib.ExitStack() as stack:
        folder = args.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="newcomer-")))
        folder.mkdir(parents=True, exist_ok=True)
        try:
            play(folder.absolute(), newcomer)
        except (RuntimeError, AssertionError, subprocess.CalledProcessError) as error:
            print(f"failed after {len(newcomer.steps)} steps: {error}", file=sys.stderr)
            for log in sorted(folder.glob("*.log")):
                print(f"---- {log.name}\n{log.read_text()[-1500:]}", file=sys.stderr)
            return 1
    print(f"\n{newcomer.table()}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
