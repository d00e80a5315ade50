"""Jobs of several processes for test_mesh.py, as torchrun starts them: ``python -m tests.runtime.mesh_jobs JOB SIZE``.

This process imports PyTorch once, has the store, and forks. The leader prints its findings as JSON.
"""

import asyncio
import gc
import json
import math
import os
import resource
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _get_default_store
from torch.distributed.fsdp import fully_shard

from tesseract_async.errors import Overloaded, TesseractError
from tesseract_async.files import mapped, write_whole
from tesseract_async.runtime.backend import BackendSettings, ExpertBackend
from tesseract_async.runtime.mesh import MeshBackend
from tesseract_async.runtime.mesh_job import join_job, link_of_job
from tesseract_async.runtime.mesh_meeting import MAX_STRANGERS
from tesseract_async.runtime.mesh_plans import PLANS, Plan, fsdp, tensor_parallel
from tesseract_async.runtime.runtime import TesseractRuntime
from tesseract_async.runtime.spread_tensor import SpreadTensor
from tesseract_async.server import checkpoint
from tesseract_async.server.memory import trim_heap
from tesseract_async.server.registry import Built, build_module
from tesseract_async.wire.tensors import TensorSpec
from tests.computed import computed

SIZES: Final[dict[str, dict[str, object]]] = {
    "ffn": {"in_features": 16, "hidden_features": 52},
    "block": {"in_features": 16, "num_heads": 4, "sequence_length": 3},
    "transformer": {"in_features": 16, "num_heads": 4, "sequence_length": 3},
}
NUM_ROWS: Final = (1, 2, 5, 8, 33)
STORE_TIMEOUT: Final = timedelta(seconds=30)


def make_store() -> int:
    """The port of what torchrun keeps over all restarts, in a process of its own, which ends with this one.

    Its thread works while others connect, and holds locks of libraries: a process forked meanwhile may find one taken
    that nobody will ever give back, and hang.
    """
    ours, its = os.pipe()
    life, lifeline = os.pipe()
    if os.fork() == 0:
        os.close(lifeline)
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=STORE_TIMEOUT)
        os.write(its, str(store.port).encode())
        os.read(life, 1)  # nothing comes: it ends once nobody has the other end
        os._exit(0)
    os.close(its)
    os.close(life)
    with open(ours) as told:
        return int(told.read(5))


def connected(port: int) -> Any:
    return dist.TCPStore("127.0.0.1", port, is_master=False, timeout=STORE_TIMEOUT)


def launch(ranks: Iterable[int], size: int, work: Callable[[], None], port: int) -> list[int]:
    """Fork processes of these ranks, and let each do `work`. Returns their pids.

    Raises: AssertionError where this process has a thread (see `make_store`).
    """
    assert len(os.listdir("/proc/self/task") if sys.platform == "linux" else [0]) == 1
    pids = []
    for rank in ranks:
        pid = os.fork()
        if pid == 0:
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank)}
            os.environ |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
            os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
            status = 1
            try:
                work()
                status = 0
            except SystemExit as error:
                status = int(error.code or 0)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(status)
        pids.append(pid)
    return pids


def build(kind: str) -> Built:
    return build_module(kind, SIZES[kind], seed=3)


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9)


def adam(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(module.parameters(), lr=0.01, eps=1e-3)


def both(module: nn.Module, mesh: DeviceMesh) -> DeviceMesh:
    grid = init_device_mesh(mesh.device_type, (mesh.size() // 2, 2), mesh_dim_names=("rows", "tensors"))
    tensor_parallel(module, grid["tensors"])
    return fsdp(module, grid["rows"])


def hybrid(module: nn.Module, mesh: DeviceMesh) -> DeviceMesh:
    """FSDP within each pair of processes, which have the same as every other pair."""
    grid = init_device_mesh(mesh.device_type, (mesh.size() // 2, 2), mesh_dim_names=("pairs", "parts"))
    fully_shard(module, mesh=grid)
    return mesh


def layers_alone(module: nn.Module, mesh: DeviceMesh) -> DeviceMesh:
    """Leaves each process the whole of what lies outside."""
    fully_shard(module.layers, mesh=mesh)
    return mesh


def whole_mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("all",))


def pair(kind: str, plan: Plan, optimizer: Callable[[nn.Module], torch.optim.Optimizer], **settings: Any) -> Any:
    """The expert spread, and on one device; the latter only where this process leads."""
    options: dict[str, Any] = {"max_batch_size": 64, "settings": BackendSettings(**settings)}
    spread = MeshBackend(partial(build, kind), mesh=whole_mesh(), plan=plan, optimizer=optimizer, **options)
    module, schema = build(kind)
    return spread, ExpertBackend(module, optimizer=partial(optimizer, module), args_schema=schema, **options)


def rows(backend: ExpertBackend, num_rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    numbers = torch.Generator().manual_seed(seed)
    shape = (num_rows, *backend.input_specs[0].shape)
    return torch.randn(shape, generator=numbers), torch.randn(shape, generator=numbers)


def whole(x: Any) -> Any:
    return x.rows(0, x.num_rows).view(x.shape) if isinstance(x, SpreadTensor) else x


def worst(left: Sequence[Any], right: Sequence[Any]) -> float:
    """The largest difference, as a share of the largest number, or of 1 if that is more."""
    pairs = [(whole(x), y) for x, y in zip(left, right, strict=True) if y is not None and y.numel()]
    return max(float((x - y).abs().max()) for x, y in pairs) / max(1.0, *(float(y.abs().max()) for _, y in pairs))


def compare(spread: MeshBackend, one: ExpertBackend) -> dict[str, Any]:
    """Five steps, then states to and fro."""
    found: dict[str, float] = dict.fromkeys(("outputs", "of_inputs", "of_weights", "norm"), 0.0)
    for number, num_rows in enumerate(NUM_ROWS):
        x, g = rows(one, num_rows, number)
        training, weights = bool(number % 2), torch.rand(num_rows) if number > 2 else None
        outputs = [each.forward([x], training=training) for each in (spread, one)]
        found["outputs"] = max(found["outputs"], worst(*outputs))
        (a, of_a), (b, of_b) = (each.gradients([x], [g], training=training, weights=weights) for each in (spread, one))
        found["of_inputs"] = max(found["of_inputs"], worst(a[:1], b[:1]))
        if weights is not None:
            found["of_weights"] = max(found["of_weights"], worst(a[1:], b[1:]))
        found["norm"] = max(found["norm"], abs(spread.norm_of(of_a) / one.norm_of(of_b) - 1))
        summed = [each.scaled(each.add(of, of) or (), 0.5) for each, of in ((spread, of_a), (one, of_b))]
        for each, of in zip((spread, one), summed, strict=True):
            each.step(of, [bytes([number]) * 16], peer=f"peer {number % 4}")
    found["weights_norm"] = abs(spread.weights_norm() / one.weights_norm() - 1)
    states = [spread.state(), one.state()]
    found["parameters"] = worst(*([*state["module"].values()] for state in states))
    moments = [[x for each in state["optimizer"]["state"].values() for x in each.values()] for state in states]
    found["moments"] = worst(*moments)
    if states[1]["accumulated"] is not None:
        found["accumulated"] = worst(*(state["accumulated"] for state in states))
        # what does not fit is refused by all alike, also where only some have a part of it
        short = {**states[1], "accumulated": [states[1]["accumulated"][0][:1, :3], *states[1]["accumulated"][1:]]}
        try:
            spread.load_state(short)
            found["misfit"] = math.inf
        except ValueError:
            found["misfit"] = 0.0
    # the file tells of no spreading, and goes on elsewhere; one from elsewhere goes on here
    files = [b"".join(checkpoint.encode_state(state)) for state in states]
    encoded = checkpoint.encode_state(states[0])
    assert encoded.size == len(files[0]) and bytes(encoded.read(100, 5000)) == files[0][100:5100]
    decoded = [checkpoint.decode_state(file) for file in files]
    assert str(_shapes(decoded[0])) == str(_shapes(decoded[1]))
    x, g = rows(one, 9, 99)
    spread.step(spread.gradients([x], [g])[1])
    spread.load_state(states[0])
    assert list(spread.applied) == list(one.applied) and spread.progress == one.progress
    found["went_back"] = worst([*spread.state()["module"].values()], [*states[1]["module"].values()])
    for each, file in ((spread, decoded[1]), (one, decoded[0])):
        each.load_state(file)
        each.step(each.gradients([x], [g])[1])
    found["went_on"] = worst(*([*each.state()["module"].values()] for each in (spread, one)))
    found["sound"] = float(spread.is_sound())
    return found


def _shapes(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _shapes(item) for key, item in value.items() if key not in ("param_groups", "gradient_norms")}
    if isinstance(value, list):
        return [_shapes(item) for item in value]
    return [value.dtype, value.shape] if isinstance(value, torch.Tensor) else type(value)


def equality(*cases: str) -> None:
    """Each case is ``PLAN KIND OPTIMIZER`` and perhaps settings."""
    join_job(20.0)
    plans = {**PLANS, "both": both, "hybrid": hybrid, "some": layers_alone}
    made = {}
    for case in cases:
        plan, kind, optimizer, *settings = case.split()
        options = {name: json.loads(value) for name, value in (one.split("=") for one in settings)}
        made[case] = pair(kind, plans[plan], {"sgd": sgd, "adam": adam}[optimizer], **options)
    spread = next(iter(made.values()))[0]
    if dist.get_rank():
        spread.follow()
        return
    for case, (spread, one) in made.items():
        print(json.dumps({"case": case, **compare(spread, one)}), flush=True)
    spread.leave()


class Trap(torch.autograd.Function):
    """Raises in the backward pass for rows whose second number is large."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        ctx.is_armed = bool((x[:, 1] > 100).any())
        return y.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        if ctx.is_armed:
            raise ValueError("poison on the way back")
        return gradient, None


class Trapped(nn.Module):
    """Gathered as one: its last layer has its gradients when the trap is met."""

    def __init__(self) -> None:
        super().__init__()
        self.below, self.above = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.above(Trap.apply(self.below(x), x))
        return y


class Poisoned(nn.Module):
    """Raises in the middle of its forward or backward pass for rows that begin with large numbers.

    Leaves its last layer out for some."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(Trapped(), nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4))
        self.last = nn.Sequential(nn.Linear(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        if bool((x[:, 0] > 100).any()):
            raise ValueError("poison")
        z: torch.Tensor = y if bool((x[:, 2] > 100).any()) else self.last(y)
        if bool((x[:, 0] < -100).any()):
            raise ValueError("late poison")
        return z


def poisoned() -> Built:
    torch.manual_seed(0)
    return Poisoned(), (TensorSpec((4,)),)


async def meet_faults(spread: MeshBackend, one: ExpertBackend, timeout: float) -> dict[str, Any]:
    """Poison, idleness, then the follower's end."""
    found: dict[str, Any] = {}
    runtimes = TesseractRuntime(), TesseractRuntime()
    for runtime in runtimes:
        await runtime.start()
    lost = asyncio.create_task(spread.wait_lost())
    ids = iter(range(1, 1000))

    async def both(*requests: torch.Tensor) -> list[list[str]]:
        """What becomes of requests one after another, spread and on one device."""
        outcomes = []
        for runtime, backend in zip(runtimes, (spread, one), strict=True):
            outcomes.append(list[str]())
            for x in requests:
                call_id = next(ids).to_bytes(16, "big")
                try:
                    answer = await computed(runtime, backend, [x], [torch.ones_like(x)], call_id=call_id)
                    outcomes[-1].append(f"version {answer.version}")
                except TesseractError as error:
                    outcomes[-1].append(str(error))
        return outcomes

    def row(start: float, at: int = 0, column: int = 0) -> torch.Tensor:
        x = torch.ones(3, 4)
        x[at, column] = start
        return x

    found["good"] = await both(row(1.0))
    found["poisoned"] = await both(row(1000.0), row(2.0), row(1000.0, at=2), row(-1000.0), row(-1000.0, at=2))
    found["on the way back"] = await both(row(1000.0, column=1), row(2.0), row(1000.0, at=2, column=1))
    found["other ways"] = []
    for way in (
        partial(spread.forward, [row(1000.0, column=2)]),
        partial(spread.gradients, [row(1000.0, 2, 2)], [row(1.0)]),
    ):
        try:
            way()
        except RuntimeError as error:
            found["other ways"].append(str(error))
    found["good again"] = await both(row(1.0))
    states = [await runtime.snapshot(backend) for runtime, backend in zip(runtimes, (spread, one), strict=True)]
    found["difference"] = worst(*([*state["module"].values()] for state in states))
    before = time.process_time(), time.monotonic()
    await asyncio.sleep(1.5 * timeout)
    found["busy"] = (time.process_time() - before[0]) / (time.monotonic() - before[1])
    found["after idling"] = await both(row(1.0))
    follower = int(_get_default_store().get("pid 1"))
    os.kill(follower, signal.SIGSTOP)
    struck = time.monotonic()
    found["stopped"] = (await both(row(1.0)))[0]
    found["noticed"] = time.monotonic() - struck
    found["lost"] = await lost
    os.kill(follower, signal.SIGKILL)
    spread.link.lost = None  # as if nothing had happened: what follows is another mesh's story
    lost = asyncio.create_task(spread.wait_lost())
    found["lost again"] = await lost
    found["refused"] = (await both(row(1.0)))[0]
    for runtime in runtimes:
        await runtime.aclose()
    return found


def faults(text: str) -> None:
    timeout = float(text)
    join_job(timeout)
    _get_default_store().set(f"pid {dist.get_rank()}", str(os.getpid()))
    options: dict[str, Any] = {"max_batch_size": 64, "settings": BackendSettings(max_gradient_norm=None)}
    spread = MeshBackend(poisoned, mesh=whole_mesh(), optimizer=sgd, **options)
    spread.link.grace = 0.5
    if dist.get_rank():
        spread.follow()
        return
    module, schema = poisoned()
    one = ExpertBackend(module, optimizer=partial(sgd, module), args_schema=schema, **options)
    print(json.dumps(asyncio.run(meet_faults(spread, one, timeout))), flush=True)
    os._exit(0)


def attack(store: Any) -> list[socket.socket]:
    """Strangers at the leader's door, before its followers come."""
    host, port, _ = store.get("tesseract/mesh").decode().split()
    strangers = []
    for number in range(MAX_STRANGERS + 20):
        one = socket.create_connection((host, int(port)))
        strangers.append(one)
        if number % 4 == 1:
            one.sendall(b"GET / HTTP/1.1\r\nHost: mesh\r\nUser-Agent: somebody\r\nAccept: */*\r\n\r\n" * 3)
        elif number % 4 == 2:  # as a follower says it, without the token
            one.sendall(bytes([0, 0, 0, 1, number % 3]) + bytes(16 + 32))
        elif number % 4 == 3:
            one.shutdown(socket.SHUT_WR)
    return strangers


def deep(width: int, num_layers: int) -> Built:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(num_layers)]), (
        TensorSpec((width,)),
    )


def adam_step(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(module.parameters(), lr=1e-3)


def resident(name: str) -> int:
    """``VmRSS`` of this process, or the most that it was, ``VmHWM``. Bytes."""
    (line,) = [one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith(name)]
    return int(line.split()[1]) << 10


async def meet_replicas(spreads: Sequence[MeshBackend]) -> dict[str, Any]:
    """A spread expert with a plain follower, and the other way around; then a hand-over."""
    from tests.server import test_replicas

    found: dict[str, Any] = {}

    def plain() -> ExpertBackend:
        module, schema = plain_linear()
        return ExpertBackend(module, optimizer=partial(sgd, module), args_schema=schema)

    def equal(*volunteers: Any) -> bool:
        left, right = (
            {name: whole(x) for name, x in one.server.experts[test_replicas.UID].state()["module"].items()}
            for one in volunteers
        )
        return all(torch.equal(left[name], right[name]) for name in left)

    for name, backends in (("spread leads", [spreads[0], plain()]), ("spread follows", [plain(), spreads[1]])):
        given = iter(backends)
        test_replicas.make_backend = lambda *_: next(given)  # type: ignore[assignment]  # noqa: B023
        async with (
            test_replicas.volunteer() as first,
            test_replicas.volunteer([first.node.address], follow=True) as second,
        ):
            for _ in range(3):
                await test_replicas.backward(first.node, first)
            second.keeper.bare.forget(test_replicas.UID)
            await second.keeper.look()
            found[name] = [first.version, second.version, equal(first, second)]
            await test_replicas.backward(first.node, first)
            handed = await first.keeper.hand_over()
            found[f"{name}, and hands over"] = [handed, second.leads, second.version, equal(first, second)]
    return found


def plain_linear() -> Built:
    torch.manual_seed(0)
    return nn.Linear(4, 4), (TensorSpec((4,)),)


def replicas() -> None:
    dist.init_process_group("gloo")  # somebody else has made it, and calls from a thread, as Ray Train does
    thread = threading.Thread(target=_replicas)
    thread.start()
    thread.join()


def _replicas() -> None:
    spreads = [MeshBackend(plain_linear, mesh=whole_mesh(), optimizer=sgd) for _ in range(2)]
    if dist.get_rank():
        spreads[0].follow()
        return
    print(json.dumps(asyncio.run(meet_replicas(spreads))), flush=True)
    spreads[0].leave()


class Gauge:
    """In each process: builds experts, and says how much memory that process had at most."""

    before = 0

    def carry_out(self, name: str, args: Sequence[Any]) -> Any:
        if name == "build":
            backend = MeshBackend(partial(deep, *args), mesh=whole_mesh(), optimizer=adam_step)
            return None if dist.get_rank() else backend
        if name == "limit":
            (data,) = [one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith("VmData")]
            now = int(data.split()[1]) << 10
            resource.setrlimit(resource.RLIMIT_DATA, (now + args[0], now + args[0]))
        if name == "begin":
            gc.collect()
            trim_heap()
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
            self.before = resident("VmRSS")
        return resident("VmHWM") - self.before

    def recover(self) -> None:
        raise AssertionError("nothing fails here")


def memory(width: str, num_layers: str) -> None:
    """Build an expert, train it, copy its state, write and load it: the most that each process had at once, in bytes
    above what it had after doing the same with a tiny one."""
    join_job(60.0)
    link, gauge, folder = link_of_job(), Gauge(), Path(tempfile.mkdtemp())
    number = link.add(gauge)
    if dist.get_rank():
        link.follow()
        return
    found: dict[str, Any] = {}
    for features, layers in ((8, 1), (int(width), int(num_layers))):
        link.command(number, "begin")
        backend = link.command(number, "build", [features, layers])[0]
        found["built"] = link.command(number, "read")
        for what in ("trained", "copied", "written", "loaded"):
            if what == "copied":
                state = backend.state()
            elif what == "written":
                write_whole(folder / "state", checkpoint.encode_state(state))
                found["file"] = (folder / "state").stat().st_size
            elif what == "loaded":
                del state
                backend.load_state(checkpoint.decode_state(mapped(folder / "state")))
            x = torch.randn(8, features)
            backend.step(backend.gradients([x], [torch.randn_like(x)])[1])
            found[what] = link.command(number, "read")
        del backend
        gc.collect()
    shutil.rmtree(folder)
    print(json.dumps(found), flush=True)
    link.leave()


def limit(num_bytes: str, width: str, num_layers: str) -> None:
    """Train where each process may take so many bytes more than it has."""
    join_job(60.0)
    link, gauge = link_of_job(), Gauge()
    number = link.add(gauge)
    if dist.get_rank():
        link.follow()
        return
    for features, layers in ((8, 1), (int(width), int(num_layers))):
        if layers > 1:
            link.command(number, "limit", [int(num_bytes)])
        trained = True
        try:
            backend = link.command(number, "build", [features, layers])[0]
            for _ in range(2):
                x = torch.randn(8, features)
                backend.step(backend.gradients([x], [torch.randn_like(x)])[1])
        except (RuntimeError, MemoryError, Overloaded):
            trained = False
    print(json.dumps({"trained": trained}), flush=True)
    os._exit(0)


def overhead() -> None:
    """What a command costs the leader, next to a bare round trip over a socket. Seconds, medians."""
    join_job(60.0)
    spread = MeshBackend(partial(deep, 8, 1), mesh=whole_mesh(), optimizer=adam_step)
    if dist.get_rank():
        one = socket.create_connection(("127.0.0.1", int(_get_default_store().get("echo"))))
        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while data := one.recv(64):
            one.sendall(data)
        spread.follow()
        return
    with socket.create_server(("127.0.0.1", 0)) as listener:
        _get_default_store().set("echo", str(listener.getsockname()[1]))
        one, _ = listener.accept()
    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def bare() -> None:
        one.sendall(b"x" * 32)
        one.recv(64)

    def seconds(work: Callable[[], object]) -> list[float]:
        found = []
        for _ in range(2000):
            started = time.perf_counter()
            work()
            found.append(time.perf_counter() - started)
        return sorted(found)

    echo = seconds(bare)
    one.close()
    commands = seconds(lambda: spread.link.command(spread._index, "forget", [-1]))
    print(json.dumps({"echo": echo[1000], "command": commands[1000], "least": commands[0] - echo[0]}), flush=True)
    spread.leave()


def orphans() -> None:
    """The leader is killed before the others follow: one waits in a collective for another, which does not come."""
    join_job(60.0)
    spread = MeshBackend(partial(build, "ffn"), mesh=whole_mesh(), plan=both, optimizer=sgd)
    for group in spread.groups:
        assert group._get_backend(torch.device("cpu")).options._timeout == timedelta(seconds=60)
    rank = dist.get_rank()
    if rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 1:
        assert spread._rows is not None
        dist.all_reduce(torch.zeros(1), group=spread._rows.get_group())  # with process 3
    time.sleep(600.0)


JOBS: Final[dict[str, Callable[..., None]]] = {
    "equality": equality,
    "faults": faults,
    "limit": limit,
    "memory": memory,
    "orphans": orphans,
    "overhead": overhead,
    "replicas": replicas,
}


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    job, size, *arguments = sys.argv[1:]
    port = make_store()
    if job == "faults":  # what somebody left there who is gone; then the leader, strangers, and at last the follower
        store = connected(port)
        store.set("tesseract/mesh", "127.0.0.1 9 0000")
        pids = launch([0], 2, lambda: faults(*arguments), port)
        while store.get("tesseract/mesh").startswith(b"127.0.0.1 9 "):
            time.sleep(0.01)
        strangers = attack(store)
        pids += launch([1], 2, lambda: faults(*arguments), port)
        statuses = [os.waitpid(pid, 0)[1] for pid in pids[:1]]
        assert len(strangers) > MAX_STRANGERS
    else:
        pids = launch(range(int(size)), int(size), lambda: JOBS[job](*arguments), port)
        statuses, times = [], []
        for pid in pids[:1] if job == "limit" else pids:  # whose followers are left behind
            statuses.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
            times.append(time.monotonic())
        if job == "orphans":
            print(json.dumps({"statuses": statuses, "seconds": times[-1] - times[0]}), flush=True)
            return
    sys.exit(0 if job == "limit" else int(any(statuses)))


if __name__ == "__main__":
    main()
