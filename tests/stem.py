"""A Python that has PyTorch loaded, and forks: a command started this way costs a tenth of a second, not four.

What it starts ends with it, and it ends with the process that made it, however that comes: killing a test run
finds nothing left behind.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, Self

ROOT: Final = Path(__file__).parents[1]

_CODE: Final = """
import contextlib, importlib, json, os, runpy, select, signal, socket, sys, warnings
for name in sys.argv[2:]:
    importlib.import_module(name)

def forked():
    asked = socket.socket(fileno=int(sys.argv[1]))
    woken, wake = os.pipe()
    for end in (woken, wake):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    children = {}  # number: where its exit status is told
    while True:
        ready = select.select([asked, woken], [], [])[0]
        if woken in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(woken, 4096)
            for number in list(children):
                found, status = os.waitpid(number, os.WNOHANG)
                if found:
                    told = children.pop(number)
                    with contextlib.suppress(BrokenPipeError):
                        os.write(told, str(os.waitstatus_to_exitcode(status)).encode())
                    os.close(told)
        if asked not in ready:
            continue
        text, files, _, _ = socket.recv_fds(asked, 65536, 4)
        if not text:  # the process that asked is gone
            for number in children:
                for kill in (os.killpg, os.kill):  # it may not have a session of its own yet
                    with contextlib.suppress(ProcessLookupError):
                        kill(number, signal.SIGKILL)
            os._exit(0)
        number = os.fork()
        if number == 0:
            signal.set_wakeup_fd(-1)
            for one in (signal.SIGCHLD, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
                signal.signal(one, signal.SIG_DFL)
            # ignored from birth where a script started the tests in the background, or `nohup` did
            signal.signal(signal.SIGINT, signal.default_int_handler)
            asked.close()
            os.setsid()
            for target, source in enumerate(files[:3]):
                os.dup2(source, target)
            for left in (woken, wake, *files, *children.values()):
                os.close(left)
            return json.loads(text)
        children[number] = files.pop()
        for left in files:
            os.close(left)
        asked.send(str(number).encode())

work = forked()
os.chdir(work["folder"])
if work["fresh"]:
    words = [*(["-W", "error"] if work["strict"] else []), *(["-m"] if work["module"] else []), *work["argv"]]
    os.execve(sys.executable, [sys.executable, *words], work["environment"])
os.environ.clear()
os.environ.update(work["environment"])
sys.argv = work["argv"]
sys.path[:1] = work["path"]
if work["strict"]:
    sys.warnoptions[:] = ["error"]
    warnings.simplefilter("error")
if work["module"]:
    runpy.run_module(work["argv"][0], run_name="__main__", alter_sys=True)
else:
    sys.path.insert(0, os.path.dirname(work["argv"][0]))
    runpy.run_path(work["argv"][0], run_name="__main__")
"""

LOADED: Final = (
    *("torch", "torch._dynamo", "torch.optim", "tesseract_async.cli.hosting"),
    *("tesseract_async.client.gating_function", "tesseract_async.client.trainer"),
)


class Stem:
    """A Python that has PyTorch loaded, and forks. Needs POSIX."""

    def __init__(self, loaded: tuple[str, ...] = LOADED) -> None:
        """`loaded`: what all that it starts have imported already."""
        self._socket, theirs = socket.socketpair()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        with theirs:  # it ends when this end of the pair is closed, however that comes
            process = subprocess.Popen(
                [sys.executable, "-u", "-c", _CODE, str(theirs.fileno()), *loaded],
                env=environment,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self._reap: Callable[[], object] = process.wait

    @classmethod
    def forked(cls) -> Self:
        """Fork one off this process, with what it has loaded. There must be no loop and no thread yet."""
        made = cls.__new__(cls)
        made._socket, theirs = socket.socketpair()
        number = os.fork()
        if number == 0:
            made._socket.close()
            os.setsid()
            sys.argv = ["-c", str(theirs.detach())]
            exec(_CODE, {"__name__": "__main__"})
            sys.exit()
        theirs.close()
        made._reap = lambda: os.waitpid(number, 0)
        return made

    def close(self) -> None:
        """Ends it, and all that it has started."""
        self._socket.close()
        self._reap()

    def fork(self, *argv: str, files: Sequence[int], folder: Path, environment: dict[str, str], **more: object) -> int:
        """Does what `start` says, with these files as its own first three; to the fourth its exit status is told.
        Its number, which is its session's, too."""
        work = {"path": (), "module": False, "strict": False, "fresh": False} | more
        work |= {"argv": argv, "folder": str(folder), "environment": environment}
        socket.send_fds(self._socket, [json.dumps(work).encode()], files)
        return int(self._socket.recv(64))

    async def start(
        self,
        *argv: str,
        folder: Path,
        environment: dict[str, str],
        path: tuple[str, ...] = (),
        module: bool = False,
        strict: bool = False,
        fresh: bool = False,
        merge: bool = False,
    ) -> Process:
        """Runs the Python file (with `module`: the module) ``argv[0]``, as ``python argv...`` would.

        `path` goes before `sys.path`. `strict`: warnings are errors. `fresh`: by a Python of its own that has
        nothing loaded yet. `merge`: standard error goes to standard output.
        """
        stdin, out, told = os.pipe(), os.pipe(), os.pipe()
        err = None if merge else os.pipe()
        theirs = [stdin[0], out[1], out[1] if err is None else err[1], told[1]]
        more = {"path": path, "module": module, "strict": strict, "fresh": fresh}
        try:
            number = self.fork(*argv, files=theirs, folder=folder, environment=environment, **more)
        finally:
            for descriptor in set(theirs):
                os.close(descriptor)
        return Process(
            number,
            await writer(stdin[1]),
            await reader(out[0]),
            None if err is None else await reader(err[0]),
            await reader(told[0]),
        )


class Process:
    """What was forked, as much of `asyncio.subprocess.Process` as is wanted here."""

    def __init__(
        self,
        number: int,
        stdin: asyncio.StreamWriter,
        stdout: asyncio.StreamReader,
        stderr: asyncio.StreamReader | None,
        told: asyncio.StreamReader,
    ) -> None:
        self.pid = number
        self.stdin, self.stdout, self.stderr = stdin, stdout, stderr
        self._exit = asyncio.create_task(self._wait(told))

    async def _wait(self, told: asyncio.StreamReader) -> int:
        status = await told.read()
        self.stdin.close()
        return int(status)

    @property
    def returncode(self) -> int | None:
        """The exit status; minus a signal's number; None while it runs."""
        return self._exit.result() if self._exit.done() else None

    async def wait(self) -> int:
        """The exit status, once it has ended."""
        return await asyncio.shield(self._exit)

    async def communicate(self) -> tuple[bytes, bytes]:
        """Reads what is left of both outputs, and waits for the end."""
        out, err = await asyncio.gather(self.stdout.read(), self.stderr.read() if self.stderr else _nothing())
        await self.wait()
        return out, err

    def send_signal(self, number: int) -> None:
        """To it alone."""
        if self.returncode is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)


async def _nothing() -> bytes:
    return b""


async def reader(descriptor: int) -> asyncio.StreamReader:
    """Closes the descriptor when its other end is closed."""
    reader = asyncio.StreamReader(limit=1 << 20)
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(descriptor, "rb")
    )
    return reader


async def writer(descriptor: int) -> asyncio.StreamWriter:
    loop = asyncio.get_running_loop()
    transport, protocol = await loop.connect_write_pipe(
        lambda: asyncio.StreamReaderProtocol(asyncio.StreamReader()), os.fdopen(descriptor, "wb")
    )
    return asyncio.StreamWriter(transport, protocol, None, loop)
