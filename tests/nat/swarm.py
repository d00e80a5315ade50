"""A swarm in the laboratory: processes of `member`, and a test's hand on each of them."""

import json
import os
import select
import signal
import socket
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.nat.lab import PORT, Host, Lab
from tests.stem import Stem

ROOT = Path(__file__).parents[2]


class Swarm:
    """Every host of `lab` runs a node; those in `public` say so themselves, the first one is everybody's seed.

    `options`: further arguments of the nodes, by host.
    """

    def __init__(
        self,
        stem: Stem,
        lab: Lab,
        folder: Path,
        *,
        public: tuple[str, ...],
        options: dict[str, dict[str, Any]] | None = None,
    ) -> None:
        self.lab = lab
        self.peer_ids: dict[str, str] = {}
        self._folder = folder
        self._pids: dict[str, int] = {}
        self._lines: dict[str, Any] = {}
        members = {
            name: {
                "namespace": lab.namespace(name),
                "host": "::" if host.v6 else host.address if host.kind == "public" else "0.0.0.0",
                "seeds": [] if name == public[0] else [self._seed(lab.hosts[public[0]], host)],
                "options": {**_said(host, name in public), **(options or {}).get(name, {})},
            }
            for name, host in lab.hosts.items()
            if host.kind != "machine"
        }
        self.members = tuple(members)
        level = os.environ.get("TESSERACT_NAT_LOG", "ERROR")
        script = str(Path(__file__).with_name("member.py"))
        out, told, nothing = os.pipe(), os.pipe(), os.open(os.devnull, os.O_RDONLY)
        try:
            self._parent = stem.fork(
                *(script, str(folder), level, json.dumps(members)),
                files=(nothing, out[1], 2, told[1]),
                folder=ROOT,
                environment={**os.environ, "PYTHONPATH": str(ROOT)},
                strict=True,
            )
        finally:
            for descriptor in (nothing, out[1], told[1]):
                os.close(descriptor)
        self._out, self._ended = os.fdopen(out[0]), told[0]

    def _seed(self, seed: Host, host: Host) -> str:
        """IPv4 where there is both: what else there is, the nodes shall find out."""
        only_v6 = self.lab.is_only_v6(host.name)
        return f"[{seed.v6}]:{PORT}" if only_v6 else f"{seed.address}:{PORT}"

    def __enter__(self) -> Self:
        try:
            for _ in self.members:
                name = self._out.readline().strip()  # each says so when it listens
                assert name, "a member did not start"
                self._connect(name)
        except BaseException:
            self._kill_all()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            left = self.do_all([name for name in self.members if name in self._lines], "stop")
            assert not any(left.values()), f"tasks left: {left}"
            assert select.select([self._ended], [], [], 60)[0], "they have not ended"
        finally:
            self._kill_all()

    def start(self, names: Sequence[str]) -> dict[str, Any]:
        """Starts the nodes of these hosts, and waits until each knows how it can be reached: what they found."""
        for name, started in self.do_all(names, "start").items():
            self.peer_ids[name], self._pids[name] = started["peer_id"], started["pid"]
        assert all(self.do_all(names, "wait_joined").values())
        return self.do_all(names, "wait_reachable")

    def start_only(self, name: str) -> None:
        """As `start`, without waiting."""
        started = self.do(name, "start")
        self.peer_ids[name], self._pids[name] = started["peer_id"], started["pid"]

    def do(self, name: str, what: str, **arguments: Any) -> Any:
        """Gives one member an order and waits for its answer. Raises: AssertionError if the order fails."""
        self._say(name, what, arguments)
        return self._hear(name)

    def do_all(self, names: Sequence[str], what: str, **arguments: Any) -> dict[str, Any]:
        """The same order for many at once."""
        for name in names:
            self._say(name, what, arguments)
        return {name: self._hear(name) for name in names}

    def kill(self, name: str) -> None:
        """SIGKILL: no farewell."""
        os.kill(self._pids[name], signal.SIGKILL)
        self._lines.pop(name).close()

    def pid(self, name: str) -> int:
        """The member's process."""
        return self._pids[name]

    def _connect(self, name: str) -> None:
        line = socket.socket(socket.AF_UNIX)
        line.connect(str(self._folder / name))
        self._lines[name] = line.makefile("rw")
        line.close()

    def _say(self, name: str, what: str, arguments: dict[str, Any]) -> None:
        print(json.dumps({"do": what, **arguments}), file=self._lines[name], flush=True)

    def _hear(self, name: str) -> Any:
        line = self._lines[name].readline()
        assert line, f"{name} is gone"
        answer = json.loads(line)
        assert "error" not in answer, f"{name}: {answer['error']}"
        return answer["result"]

    def _kill_all(self) -> None:
        for line in self._lines.values():
            line.close()
        self._lines.clear()
        try:
            os.killpg(self._parent, signal.SIGKILL)
        except ProcessLookupError:
            pass
        if not self._out.closed:
            self._out.close()
            os.read(self._ended, 16)  # its exit status, once it has ended
            os.close(self._ended)


def _said(host: Host, public: bool) -> dict[str, Any]:
    if not public:
        return {}
    addresses = [f"{host.address}:{PORT}", *([f"[{host.v6}]:{PORT}"] if host.v6 else [])]
    return {"public": True, "announce": addresses}
