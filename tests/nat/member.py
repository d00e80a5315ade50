"""One computer of the laboratory: a node that obeys lines of JSON on standard input and answers each with one.

Run by `test_nat`, never by pytest itself.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
from typing import Any

from tesseract_async.errors import describe
from tesseract_async.node import TesseractNode

PORT = 31337


class Member:
    def __init__(self, host: str, seeds: list[str], *, public: bool) -> None:
        self.node = TesseractNode(host, PORT, initial_peers=seeds, public=public)
        self.servers: list[Any] = []

    async def obey(self, order: dict[str, Any]) -> Any:
        return await getattr(self, "do_" + order.pop("do"))(**order)

    async def do_start(self) -> Any:
        await self.node.start()
        return {"peer": f"{self.node.address}/{self.node.peer_id}", "peer_id": str(self.node.peer_id)}

    async def do_wait_joined(self) -> bool:
        return await self.node.network.wait_joined(20.0)

    async def do_wait_reachable(self) -> Any:
        known = await self.node.wait_reachable(20.0)
        return {"known": known, "role": self.node.reach.finding.role, "report": self.node.reach.report()}

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

    async def do_prepare(self) -> bool:
        """Imports what a trainer has imported by the time of its first call."""
        import tesseract_async.client.autograd
        import tesseract_async.client.remote_expert  # noqa: F401

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

    async def do_stop(self) -> bool:
        for server in self.servers:
            await server.aclose()
        await self.node.aclose()
        return not asyncio.all_tasks() - {asyncio.current_task()}


def make_expert(width: int) -> Any:
    import torch

    torch.manual_seed(7)
    return torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.Tanh(), torch.nn.Linear(width, width))


async def main(host: str, public: bool, seeds: list[str]) -> None:
    member = Member(host, seeds, public=public)
    loop = asyncio.get_running_loop()
    while True:
        line = await loop.run_in_executor(None, sys.stdin.readline)
        if not line:
            return
        order = json.loads(line)
        stopping = order["do"] == "stop"
        try:
            answer = {"result": await member.obey(order)}
        except Exception as error:
            logging.getLogger("member").exception("order failed")
            answer = {"error": describe(error)}
        print(json.dumps(answer), flush=True)
        if stopping:
            return


if __name__ == "__main__":
    level = getattr(logging, sys.argv[1])
    logging.basicConfig(
        level=level, stream=sys.stderr, format=f"{sys.argv[2]} %(relativeCreated)d %(name)s %(message)s"
    )
    logging.getLogger("aioice").setLevel(logging.WARNING)
    asyncio.run(main(sys.argv[3], sys.argv[4] == "public", sys.argv[5:]))
