"""Commands between the processes of a mesh, without torch's collectives."""

import contextlib
import socket
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch.distributed import HashStore

from tesseract_async.errors import Overloaded
from tesseract_async.runtime import mesh_meeting
from tesseract_async.runtime.mesh_link import MeshLink


class Told:
    """Carries out what it is told."""

    def carry_out(self, name: str, args: Sequence[Any]) -> Any:
        return name

    def recover(self) -> None:
        raise AssertionError("nothing fails here")


def test_what_outlives_its_expert_is_forgotten_by_itself() -> None:
    link = MeshLink(HashStore(), 0, 1)
    gone, stays = Told(), Told()
    number, other = link.add(gone), link.add(stays)
    link.states[7] = [torch.zeros(3)]  # a copy of its state that is still being saved
    del gone
    assert link.command(other, "work") == ["work"] and link.read(0, 7, 0, 0, 3) == bytes(12)
    link.forget(number, 7)
    assert link.command(other, "work") == ["work"] and not link.states


@pytest.mark.timeout(30)
def test_a_process_that_reads_nothing_is_noticed() -> None:
    store = HashStore()
    with ThreadPoolExecutor(1) as pool:
        joined = pool.submit(MeshLink, store, 1, 2)
        leader = MeshLink(store, 0, 2, timeout=0.5, grace=0.1)
        follower = joined.result()
    told = Told()
    started = time.monotonic()
    with pytest.raises(Overloaded, match="comes back from its last checkpoint"):
        leader.command(leader.add(told), "work", ["x" * (32 << 20)])  # more than what is sent and not read may be
    assert time.monotonic() - started < 5.0
    follower.close()
    leader.close()


def test_a_follower_obeys_nobody_who_has_not_read_the_token() -> None:
    store = HashStore()
    with socket.create_server(("127.0.0.1", 0)) as impostor, ThreadPoolExecutor(1) as pool:
        # where a leader listened that is gone
        store.set("tesseract/mesh", f"127.0.0.1 {impostor.getsockname()[1]} {'0' * 64}")
        joined = pool.submit(MeshLink, store, 1, 2, timeout=10.0)
        with impostor.accept()[0] as one:
            one.sendall(bytes(16 + 32))  # a nonce, and what should be a proof
            one.settimeout(3.0)
            while one.recv(4096):  # the follower hangs up at once
                pass
        leader = MeshLink(store, 0, 2)
        follower = joined.result()
    assert follower.token == leader.token != "0" * 64
    follower.close()
    leader.close()


def test_strangers_are_few_and_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    store, late = HashStore(), 0.3
    with ThreadPoolExecutor(1) as pool, contextlib.ExitStack() as open_ones:
        leading = pool.submit(MeshLink, store, 0, 2)
        host, port, _ = store.get("tesseract/mesh").decode().split()

        def stranger() -> socket.socket:
            return open_ones.enter_context(socket.create_connection((host, int(port)), timeout=3.0))

        def hear_end(one: socket.socket) -> None:
            while one.recv(4096):
                pass

        silent = [stranger() for _ in range(mesh_meeting.MAX_STRANGERS + 1)]
        hear_end(silent[0])  # it made room for the last
        monkeypatch.setattr(mesh_meeting, "HELLO_TIMEOUT", late)
        started = time.monotonic()
        hear_end(stranger())
        assert time.monotonic() - started >= late
        follower = MeshLink(store, 1, 2)
        leader = leading.result()
    follower.close()
    leader.close()


class Failing(Told):
    """Raises when it is told to, and takes a fault that all had."""

    def carry_out(self, name: str, args: Sequence[Any]) -> Any:
        if name == "raise":
            raise LookupError("mine")
        return name

    def recover(self) -> None:
        pass


@pytest.mark.parametrize(
    ("command", "fault", "counts", "is_lost"),
    [
        ("raise", "process 1: mine", {"rows": 5}, False),  # all had it, after as many collectives
        ("raise", "process 1: mine", {"rows": 6}, True),
        ("raise", "process 1: mine", {"rows": 5, "another group of the same processes": 7}, False),
        ("raise", None, {}, True),
        ("work", "process 1: mine", {"rows": 5}, True),
    ],
)
def test_only_a_fault_that_all_had_at_one_point_is_survived(
    command: str, fault: str | None, counts: dict[str, int], is_lost: bool
) -> None:
    store = HashStore()
    with ThreadPoolExecutor(1) as pool:
        joined = pool.submit(MeshLink, store, 1, 2)
        leader = MeshLink(store, 0, 2, grace=2.0)
        follower = joined.result()
        leader.counts = lambda: {"rows": 5}
        told, one = Failing(), follower._sockets[mesh_meeting.COMMANDS, 0]
        asked = pool.submit(leader.command, leader.add(told), command)
        assert mesh_meeting.receive(one)[1] == command
        mesh_meeting.send(one, [fault, counts, None])
        with pytest.raises(Overloaded if is_lost else LookupError):
            asked.result()
        assert (leader.lost is not None) == is_lost
        if not is_lost:
            assert mesh_meeting.receive(one) is None, "go on"
    follower.close()
    leader.close()
