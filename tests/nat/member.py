"""The computers of the laboratory: each a process in its namespace, whose node obeys lines of JSON.

Run by `test_nat`, never by pytest itself.
"""

import asyncio
import ctypes
import gc
import json
import logging
import os
import sys
import time
from typing import Any

from tesseract_async.endpoint.endpoint import IncomingCall, Message
from tesseract_async.errors import describe
from tesseract_async.identity import PeerID
from tesseract_async.nat.reach import ReachSettings
from tesseract_async.node import TesseractNode
from tesseract_async.transport.base import PeerAddress

PORT = 31337


class Member:
    def __init__(self, host: str, seeds: list[str], options: dict[str, Any]) -> None:
        reach = ReachSettings(
            # there is no distance here: a node that does not answer a dial within a second never will
            dial_back_timeout=1.0,
            stun_servers=tuple(options.pop("stun_servers", ())),
        )
        self.own_tasks: set[Any] = set()
        self.node = TesseractNode(host, PORT, initial_peers=seeds, reach=reach, **options)
        self.servers: list[Any] = []
        self.crowd: list[TesseractNode] = []

    async def obey(self, order: dict[str, Any]) -> Any:
        return await getattr(self, "do_" + order.pop("do"))(**order)

    async def do_start(self) -> Any:
        self.own_tasks = asyncio.all_tasks()
        await self.node.start()
        return {"peer_id": str(self.node.peer_id), "pid": os.getpid()}

    async def do_wait_joined(self) -> bool:
        return await self.node.network.wait_joined(20.0)

    async def do_wait_reachable(self) -> Any:
        known = await self.node.wait_reachable(20.0)
        return {"known": known, "role": self.node.reach.reachability.role, "report": self.node.reach.report()}

    async def do_report(self) -> list[str]:
        return self.node.reach.report()

    async def do_find_out(self) -> Any:
        """Looks anew whether it can be reached: the address that others are told then."""
        changed = asyncio.Event()
        stop = self.node.watch_address(changed.set)
        self.node.reach.look_again()
        async with asyncio.timeout(20):
            await changed.wait()
        stop()
        return self.node.peer_address.addresses

    async def do_serve(self, uid: str, width: int = 16) -> bool:
        import torch

        from tesseract_async.runtime.backend import ExpertBackend
        from tesseract_async.server.server import TesseractServer
        from tesseract_async.wire.tensors import TensorSpec

        backend = ExpertBackend(make_expert(width), args_schema=(TensorSpec((width,), torch.float32),))
        server = TesseractServer(self.node, {uid: backend})
        await server.start()
        self.servers.append(server)
        return True

    async def do_train(self, uid: str, rows: int = 4, width: int = 16, timeout: float = 20.0) -> Any:
        """One forward and backward through the expert, against the same module here."""
        import torch

        from tesseract_async.client.autograd import backward

        local = make_expert(width)
        x = torch.linspace(-1, 1, rows * width).reshape(rows, width)
        mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        begun = time.monotonic()
        deadline = begun + timeout
        error = ""
        while time.monotonic() < deadline:
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    found = time.monotonic()
                    expert = await self.node.get_expert(uid)
                    found, called = time.monotonic() - found, time.monotonic()
                    y = await expert(theirs)
                    first = time.monotonic() - called
                    await backward(y.square().sum())
                break
            except Exception as failure:
                error = describe(failure)
                await asyncio.sleep(0.1)
        else:
            return {"error": error, "metrics": self.node.metrics.snapshot()}
        expected = local(mine)
        expected.square().sum().backward()
        return {
            "equal": bool(torch.allclose(y, expected, atol=1e-6) and torch.allclose(theirs.grad, mine.grad, atol=1e-6)),
            "lookup_seconds": found,
            "first_seconds": first,
            "seconds": time.monotonic() - begun,
            "paths": self.paths(),
            "error": error,
        }

    def paths(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for info in self.node.endpoint.connections():
            found.setdefault(str(info.peer_id), []).append(info.path)
        return found

    async def do_crowd(self, count: int, seed: str) -> list[str]:
        """Starts many client nodes in this process, all behind this computer's NAT: their ids."""

        async def echo(call: IncomingCall) -> Message:
            return Message(call.body)

        self.own_tasks = asyncio.all_tasks()
        self.crowd = [
            TesseractNode("0.0.0.0", initial_peers=[seed], reach=ReachSettings(client=True)) for _ in range(count)
        ]
        for node in self.crowd:
            await node.start()
            node.endpoint.handle("echo", echo)
        known = await asyncio.gather(*(node.wait_reachable(30.0) for node in self.crowd))
        assert all(known)
        return [str(node.peer_id) for node in self.crowd]

    async def do_call_crowd(self, peer_ids: list[str], via: str) -> Any:
        """Calls each, at once: the kinds of path, and the slowest call's seconds."""
        begun = time.monotonic()

        async def call(peer_id: str) -> float:
            peer = PeerAddress(PeerID.parse(peer_id), (), (via,))
            reply = await self.node.endpoint.call(peer, "echo", peer_id, timeout=20.0)
            assert reply.body == peer_id
            return time.monotonic() - begun

        seconds = await asyncio.gather(*map(call, peer_ids))
        return {"slowest": max(seconds), "kinds": sorted({path.partition(" ")[0] for path in self.all_paths()})}

    def all_paths(self) -> list[str]:
        return [info.path for info in self.node.endpoint.connections()]

    async def do_echo(self, uid: str, megabytes: int, width: int = 1024) -> float:
        """Bytes per second each way through an expert that gives back what it gets."""
        import torch

        expert = await self.node.get_expert(uid)
        x = torch.zeros(megabytes * 2**20 // (4 * width), width)
        await expert(x[:1])
        begun = time.monotonic()
        await expert(x)
        return x.nbytes / (time.monotonic() - begun)

    async def do_connections(self) -> Any:
        return self.paths()

    async def do_metrics(self) -> Any:
        return self.node.metrics.snapshot()

    async def do_stop(self) -> list[str]:
        """The tasks that are left."""
        for server in self.servers:
            await server.aclose()
        for node in self.crowd:
            await node.aclose()
        await self.node.aclose()
        return [str(task) for task in asyncio.all_tasks() - self.own_tasks - {asyncio.current_task()}]


def make_expert(width: int) -> Any:
    import torch

    torch.manual_seed(7)
    return torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.Tanh(), torch.nn.Linear(width, width))


async def obey_all(member: Member, path: str) -> None:
    """Serves orders on a Unix socket, whose name every network namespace can see, until told to stop."""
    stopped = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            order = json.loads(line)
            stopping = order["do"] == "stop"
            try:
                answer = {"result": await member.obey(order)}
            except Exception as error:
                logging.getLogger("member").exception("the order failed")
                answer = {"error": describe(error)}
            writer.write(json.dumps(answer).encode() + b"\n")
            await writer.drain()
            if stopping:
                stopped.set()
                break
        writer.close()

    async with await asyncio.start_unix_server(serve, path):
        os.write(1, f"{os.path.basename(path)}\n".encode())  # in one piece, between the others' lines
        await stopped.wait()


def enter_namespace(name: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{name}") as handle:
        if libc.setns(handle.fileno(), 0x40000000):  # CLONE_NEWNET; os.setns came with Python 3.12
            raise OSError(ctypes.get_errno(), f"cannot enter the namespace {name}")


def main(folder: str, level: str, members: dict[str, dict[str, Any]]) -> None:
    """Imports once what all need, then forks one process per computer: each in its namespace."""
    import aiortc  # noqa: F401
    import torch

    import tesseract_async.client.autograd
    import tesseract_async.client.remote_expert
    import tesseract_async.server.server  # noqa: F401

    gc.freeze()
    children = []
    for name, place in members.items():
        child = os.fork()
        if child:
            children.append(child)
            continue
        enter_namespace(place["namespace"])
        torch.set_num_threads(1)
        logging.basicConfig(level=level, format=f"{name} %(relativeCreated)d %(name)s %(message)s")
        logging.getLogger("aioice").setLevel(logging.WARNING)
        member = Member(place["host"], place["seeds"], place["options"])
        asyncio.run(obey_all(member, f"{folder}/{name}"))
        os._exit(0)
    for child in children:
        os.waitpid(child, 0)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
