"""A node whose experts are modules in this process: the real messages and tensors, no network."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgpack
import numpy as np
import torch
from torch import nn

from tesseract_async.client.gating_function import GatingFunction
from tesseract_async.client.settings import CallOptions, MixtureSettings
from tesseract_async.errors import ExpertFailed, ExpertNotFound, InputsForgotten, RemoteError, TooStale
from tesseract_async.experts.progress import Thanks
from tesseract_async.metrics import Metrics
from tesseract_async.uncopied import Uncopied
from tesseract_async.wire import messages, packed
from tesseract_async.wire.apply import APPLY, ApplyPart, ApplyRequest, decode_request, encode_part
from tesseract_async.wire.codecs import CodecPolicy
from tesseract_async.wire.tensors import TensorSpec, encode_schema, flatten, pack_tensors, unflatten, unpack_tensors


async def until(condition: Callable[[], bool]) -> None:
    """Returns in the first turn of the loop that finds `condition` true; after a minute it gives up."""
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 (any condition, not one that has an event)
            await asyncio.sleep(0)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers from `seed` inside. (torch.manual_seed keeps a stack trace for every device not yet in use.)"""
    generator = torch.default_generator
    state = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(state)


REQUESTS: dict[str, Any] = {
    messages.INFO: messages.InfoRequest,
    messages.FORWARD: messages.ForwardRequest,
    messages.BACKWARD: messages.BackwardRequest,
}


@dataclass(frozen=True)
class Reply:
    body: Any = None
    buffers: Sequence[memoryview] = ()


class FakePeer(str):
    """The address and the id of a peer in one."""

    @property
    def peer_id(self) -> FakePeer:
        return self

    @property
    def short(self) -> str:
        return str(self)


@dataclass(frozen=True)
class FakeReplica:
    uid: str
    peer: str
    """A `FakePeer` in fact."""
    primary: bool = True
    sequence: int = 1
    expiration: float = float("inf")
    doubt: int = 0
    epoch: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "peer", FakePeer(self.peer))


class FakeView:
    def __init__(self, replicas: Mapping[tuple[int, ...], list[FakeReplica]], dims: int, version: int) -> None:
        self.replicas = dict(sorted(replicas.items()))
        self.coords = np.array(list(self.replicas), dtype=np.int64).reshape(len(self.replicas), dims)
        self.version = version

    def __len__(self) -> int:
        return len(self.coords)

    def replicas_under(self, first: Sequence[int]) -> dict[int, list[FakeReplica]]:
        return {at[-1]: found for at, found in self.replicas.items() if at[:-1] == tuple(first)}


class FakeDirectory:
    """Warm at once unless `cold`; failed replicas are masked."""

    def __init__(self) -> None:
        self.replicas: dict[str, list[FakeReplica]] = {}
        self.failed: list[FakeReplica] = []
        self.cold = False
        self.mute = False  # the network is not joined yet
        self.num_finds = 0
        self.outdated: list[str] = []
        self.watched: dict[str, tuple[int, ...]] = {}
        self.version = 0
        self._views: dict[tuple[str, tuple[int, ...]], FakeView] = {}
        self.masked: list[tuple[str, FakeReplica]] = []
        """Every report of a failure: its reason, and whose."""
        self.late: list[FakeReplica] = []
        self.warm = asyncio.Event()
        self.came = asyncio.Event()

    def add(self, uid: str, peer: str = "peer", *, primary: bool = True, epoch: int = 0) -> None:
        self.replicas.setdefault(uid, []).append(FakeReplica(uid, peer, primary, epoch=epoch))
        self._views.clear()
        self.version += 1
        self.came.set()

    def alive(self, uid: str) -> list[FakeReplica]:
        return [replica for replica in self.replicas.get(uid, []) if replica not in self.failed]

    async def find(self, uid: str, *, even_failed: bool = False) -> list[FakeReplica]:
        self.num_finds += 1
        if self.mute:
            return []
        return self.alive(uid) or (self.replicas.get(uid, []) if even_failed else [])

    def known(self, uid: str) -> list[FakeReplica]:
        return []

    def watch(self, prefix: str, grid_size: tuple[int, ...]) -> None:
        self.watched[prefix] = grid_size

    trouble: str | None = None

    async def wait_warm(self, prefix: str) -> None:
        if self.cold:
            await self.warm.wait()

    async def wait_read(self, prefix: str) -> None:
        if self.cold:
            return await self.warm.wait()
        self.came.clear()
        await self.came.wait()

    def live(self, prefix: str, grid_size: tuple[int, ...] | None = None) -> FakeView | None:
        if self.cold or prefix not in self.watched:
            return None
        size = grid_size or self.watched[prefix]
        if (prefix, size) not in self._views:
            found = {}
            for uid in self.replicas:
                head, *coords = uid.split(".")
                alive, at = self.alive(uid), tuple(map(int, coords))
                if head == prefix and alive and len(at) == len(size) and np.less(at, size).all():
                    found[at] = alive
            self._views[(prefix, size)] = FakeView(found, len(size), self.version)
        return self._views[(prefix, size)]

    def report_late(self, replica: FakeReplica) -> None:
        self.late.append(replica)

    has_doubts = True

    def report_answer(self, replica: FakeReplica) -> None:
        pass

    def report_outdated(self, uid: str) -> None:
        self.outdated.append(uid)

    def report_failure(self, replica: FakeReplica, *, reason: str = "silent") -> None:
        self.masked.append((reason, replica))
        self.failed.append(replica)
        self._views.clear()
        self.version += 1

    def forgive(self) -> None:
        """The servers' next manifests: nothing is masked any more."""
        self.failed.clear()
        self._views.clear()
        self.version += 1
        self.came.set()


class Slope(nn.Module):
    """Multiplies by a number: what each answer and gradient should be is plain to see."""

    def __init__(self, slope: float) -> None:
        super().__init__()
        self.slope = slope

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.slope


@dataclass(eq=False)
class Hosted:
    module: nn.Module
    args_schema: tuple[Any, ...]
    kwargs_schema: dict[str, Any]
    outputs_schema: Any
    optimizer: torch.optim.Optimizer | None = None
    version: int = 0
    num_forwards: int = 0
    num_backwards: int = 0
    num_rows: int = 0


Answer = tuple[list[Any], torch.Tensor, int]
"""An expert's weighted answer or gradients, the gradients of its weights, and its version."""
Fault = Callable[[str, str, int], Awaitable[None]]


@dataclass
class Asked:
    method: str
    uid: str
    peer: Any
    timeout: float
    num_rows: int
    priority: int = 0
    body: Any = field(default=None, repr=False)


class FakeNode(Uncopied):
    """Hosts modules; `delay` and `backward_delay` are seconds, or functions of the uid. `fault` runs before each call
    (and may raise, or sleep for ever); `tamper` may change a reply."""

    def __init__(self) -> None:
        self.directory = FakeDirectory()
        self.metrics = Metrics()
        self.thanks = Thanks()
        self.client_state: object = None
        self.hosted: dict[str, Hosted] = {}
        self.delay: float | Callable[[str], float] = 0.0
        self.backward_delay: float | Callable[[str], float] | None = None
        self.fault: Fault | None = None
        self.tamper: Callable[[str, Any, list[memoryview]], tuple[Any, list[memoryview]]] | None = None
        self.calls: list[Asked] = []
        self.keeps_inputs = False
        self.kept: dict[bytes, list[Any]] = {}
        self.version_of: Callable[[Asked, Hosted], int] = lambda asked, hosted: hosted.version
        """The version that a reply claims."""
        self.messages: list[tuple[Any, ApplyRequest]] = []
        """By peer, what was asked by `expert.apply`."""
        self.num_cancelled = 0
        self.num_open = 0
        self.paths: dict[Any, tuple[float, float]] = {}
        self.closed = False

    def host(
        self,
        uid: str,
        module: nn.Module,
        *args_schema: Any,
        outputs_schema: Any = None,
        kwargs_schema: dict[str, Any] | None = None,
        lr: float | None = None,
        peers: Sequence[str] | None = None,
    ) -> Hosted:
        """At `peers`, the primary first; by default at a peer of its own."""
        args_schema = args_schema or (TensorSpec((8,)),)
        optimizer = torch.optim.SGD(module.parameters(), lr) if lr is not None else None
        hosted = Hosted(module, args_schema, kwargs_schema or {}, outputs_schema or args_schema[0], optimizer)
        self.hosted[uid] = hosted
        for i, peer in enumerate([f"the peer of {uid}"] if peers is None else peers):
            self.directory.add(uid, peer, primary=i == 0)
        return hosted

    def check_running(self) -> None:
        if self.closed:
            raise RuntimeError("this node is closed")

    def count(self, method: str) -> int:
        return sum(asked.method == method for asked in self.calls)

    def path(self, peer: Any) -> tuple[float, float] | None:
        return self.paths.get(peer)

    async def call_expert(
        self,
        peer: Any,
        method: str,
        body: Any = None,
        buffers: Sequence[Any] = (),
        *,
        timeout: float,
        idempotent: bool = False,
        priority: int = 0,
    ) -> Reply:
        request = messages.decode(REQUESTS[method], body)
        uid, tensors = request.uid, getattr(request, "tensors", None)
        num_rows = tensors[0][1][0] if tensors else 0
        received = [memoryview(bytearray(buffer)) for buffer in buffers]
        asked = Asked(method, uid, peer, timeout, num_rows, priority, request)
        reply, answers = await self.serve(asked, lambda hosted: self._answer(hosted, asked, received))
        out = [memoryview(bytearray(buffer)) for buffer in answers]
        if self.tamper is not None:
            reply, out = self.tamper(method, reply, out)
        return Reply(list(reply) if isinstance(reply, tuple) else reply, out)

    async def serve(self, asked: Asked, answer: Callable[[Hosted], Any]) -> Any:
        """What `answer` gives for the expert, after what the script says."""
        method, uid = asked.method, asked.uid
        self.calls.append(asked)
        self.num_open += 1
        try:
            async with asyncio.timeout(asked.timeout):
                if self.fault is not None:
                    await self.fault(method, uid, len(self.calls))
                if method != messages.INFO:
                    delay = self.delay
                    if method == messages.BACKWARD and self.backward_delay is not None:
                        delay = self.backward_delay
                    seconds = delay(uid) if callable(delay) else delay
                    await asyncio.sleep(seconds)
                if uid not in self.hosted:
                    raise ExpertNotFound(f"peer does not host {uid}")
                return answer(self.hosted[uid])
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        finally:
            self.num_open -= 1

    async def apply_experts(
        self, peer: Any, uids: Sequence[str], body: Any, buffers: Sequence[Any], *, timeout: float, priority: int = 0
    ) -> AsyncGenerator[Reply, None]:
        """Each expert is asked as if by itself (see `Asked`); those that have answered meanwhile are in one part."""
        body, out = through_msgpack(body), [memoryview(bytearray(buffer)) for buffer in buffers]
        request, rest = decode_request(body, out)
        assert [".".join((request.prefix, *map(str, at))) for at in request.experts.tolist()] == list(uids)
        self.messages.append((peer, request))
        method = messages.BACKWARD if request.backward else messages.FORWARD
        tensors, name = unpack_tensors(request.tensors, rest), None
        inputs, gradients = tensors[: request.num_inputs], tensors[request.num_inputs :]
        if not request.backward and self.keeps_inputs and request.keep:
            self.kept[name := os.urandom(16)] = inputs
        if request.kept is not None:
            inputs = self.kept.get(request.kept, [])

        def answer(hosted: Hosted, asked: Asked, place: int, rows: torch.Tensor, weights: torch.Tensor) -> Answer:
            if request.kept is not None and not inputs:
                raise InputsForgotten("they are gone")
            taken = [x.index_select(0, rows).clone() for x in inputs if x is not None]
            if not request.backward:
                version = self.version_of(asked, hosted)
                if version < request.versions[place]:
                    raise TooStale(f"version {version} is too old")
                outputs = self._forward(hosted, taken, request.training, request.seed)
                return [scaled(y, weights) for y in outputs], torch.empty(0, device="cpu"), version
            given = [None if g is None else g.index_select(0, rows) for g in gradients]
            weighted = [None if g is None else scaled(g, weights) for g in given]
            grads, outputs = self._backward(hosted, taken, weighted, request.training, request.seed)
            of_weights = [(g * y).flatten(1).sum(1) for g, y in zip(given, outputs, strict=True) if g is not None]
            return grads, torch.stack(of_weights).sum(0), self.version_of(asked, hosted)

        async def ask(place: int, uid: str) -> Answer | RemoteError:
            pairs = slice(*request.offsets[place : place + 2].tolist())
            rows, weights = (torch.from_numpy(x[pairs].copy()) for x in (request.rows, request.weights))
            asked = Asked(method, uid, peer, timeout, len(rows), priority, request)
            try:
                return await self.serve(asked, lambda hosted: answer(hosted, asked, place, rows, weights))
            except RemoteError as error:
                return error

        tasks = [asyncio.ensure_future(ask(place, uid)) for place, uid in enumerate(uids)]
        waiting = set(tasks)
        try:
            while waiting:
                done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                ended = {place: task.result() for place, task in enumerate(tasks) if task in done}
                yield self._part(request, ended, name)
                name = None
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _part(self, request: ApplyRequest, ended: dict[int, Any], name: bytes | None) -> Reply:
        failures = [(place, result) for place, result in ended.items() if isinstance(result, RemoteError)]
        answers = {place: result for place, result in ended.items() if not isinstance(result, RemoteError)}
        places = np.array(list(answers), dtype=np.int64)
        rows_of = request.rows_of(places)
        sums: list[torch.Tensor | None] = []
        for column in zip(*(answer[0] for answer in answers.values()), strict=True):
            total = None
            for place, x in zip(answers, column, strict=True):
                if x is not None:
                    x = x if x.is_complex() else x.to(torch.promote_types(x.dtype, torch.float32))
                    total = x.new_zeros(len(rows_of), *x.shape[1:]) if total is None else total
                    rows = request.rows[slice(*request.offsets[place : place + 2].tolist())]
                    total.index_add_(0, torch.from_numpy(np.searchsorted(rows_of, rows)), x)
            sums.append(total)
        of_weights = np.concatenate([np.empty(0, np.float32), *(answer[1].float() for answer in answers.values())])
        if (scales := request.scales_of(places)) is not None:
            sums = [None if x is None else scaled(x, 1 / torch.from_numpy(scales)) for x in sums]
        metas, buffers = pack_tensors(sums, request.reply_codec)
        versions, epochs = np.array([answer[2] for answer in answers.values()], dtype=np.int64), np.zeros_like(places)
        part = ApplyPart(places, versions, epochs, failures, metas, of_weights, name)
        out = [memoryview(bytearray(buffer)) for buffer in buffers]
        if self.tamper is not None:
            part, out = self.tamper(APPLY, part, out)
        reply, numbers = encode_part(part, backward=request.backward)
        return Reply(through_msgpack(reply), [*(memoryview(bytearray(buffer)) for buffer in numbers), *out])

    def _answer(self, hosted: Hosted, asked: Asked, buffers: list[memoryview]) -> tuple[Any, list[memoryview]]:
        request = asked.body
        if isinstance(request, messages.InfoRequest):
            info = messages.ExpertInfo(
                uid=request.uid,
                args_schema=encode_schema(hosted.args_schema),
                kwargs_schema=encode_schema(hosted.kwargs_schema),
                outputs_schema=encode_schema(hosted.outputs_schema),
                max_batch_size=1024,
                version=self.version_of(asked, hosted),
                codecs=CodecPolicy(inputs=("none",), outputs=("none",)).encode(),
            )
            return info, []
        if isinstance(request, messages.ForwardRequest):
            inputs = unpack_tensors(request.tensors, buffers)
            metas, answers = pack_tensors(self._forward(hosted, inputs, request.training, request.seed))
            name = None
            if self.keeps_inputs and request.keep_inputs:
                name = os.urandom(16)
                self.kept[name] = inputs
            return messages.ForwardReply(metas, self.version_of(asked, hosted), name), answers
        tensors = unpack_tensors(request.tensors, buffers)
        if request.inputs_cached is not None:
            if request.inputs_cached not in self.kept:
                raise InputsForgotten("they are gone")
            tensors = [*self.kept[request.inputs_cached], *tensors]
        num_inputs = len(flatten((hosted.args_schema, hosted.kwargs_schema)))
        inputs, given = tensors[:num_inputs], tensors[num_inputs:]
        gradients, _ = self._backward(hosted, inputs, given, request.training, request.seed)
        metas, answers = pack_tensors(gradients, request.reply_codec)
        return messages.BackwardReply(metas, self.version_of(asked, hosted)), answers

    def _forward(self, hosted: Hosted, inputs: list[Any], training: bool, seed: int) -> list[torch.Tensor]:
        hosted.module.train(training)
        args, kwargs = unflatten((hosted.args_schema, hosted.kwargs_schema), inputs)
        hosted.num_forwards += 1
        with torch.inference_mode(False), torch.no_grad(), seeded(seed):
            return flatten(self._run(hosted, args, kwargs))

    def _backward(
        self, hosted: Hosted, inputs: list[Any], gradients: list[Any], training: bool, seed: int
    ) -> tuple[list[torch.Tensor | None], list[torch.Tensor]]:
        """The gradients of the inputs, after a step, and the outputs."""
        hosted.module.train(training)
        with torch.inference_mode(False), torch.enable_grad(), seeded(seed):
            inputs = [t.requires_grad_(t.is_floating_point()) for t in inputs]
            args, kwargs = unflatten((hosted.args_schema, hosted.kwargs_schema), inputs)
            outputs = flatten(self._run(hosted, args, kwargs))
            pairs = [(o, g) for o, g in zip(outputs, gradients, strict=True) if g is not None]
            torch.autograd.backward([o for o, _ in pairs], [g for _, g in pairs])
        hosted.num_backwards += 1
        hosted.num_rows += inputs[0].shape[0]
        if hosted.optimizer is not None:
            hosted.optimizer.step()
            hosted.optimizer.zero_grad()
            hosted.version += 1
        return [t.grad for t in inputs], [output.detach() for output in outputs]

    @staticmethod
    def _run(hosted: Hosted, args: Any, kwargs: Any) -> Any:
        try:
            return hosted.module(*args, **kwargs)
        except Exception as error:
            raise ExpertFailed(f"the expert raised {error!r}") from error


def scaled(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Each row times its weight, at least in float32."""
    x = x if x.is_complex() else x.to(torch.promote_types(x.dtype, torch.float32))
    return x * weights.to(x.dtype).reshape(-1, *[1] * (x.dim() - 1))


def through_msgpack(body: Any) -> Any:
    return packed.unpack(msgpack.packb(body), max_bytes=1 << 20)


def gate_with(
    node: Any, uid_prefix: str, *, kind: type[GatingFunction] = GatingFunction, **arguments: Any
) -> GatingFunction:
    """A gate of this kind; what is not an argument of its is a field of its settings, or of their call options."""
    calls = {name: arguments.pop(name) for name in _CALL_OPTIONS & arguments.keys()}
    changed = {name: arguments.pop(name) for name in _SETTINGS & arguments.keys()}
    if calls:
        changed["calls"] = CallOptions(**calls)
    settings = dataclasses.replace(kind.default_settings, **changed)
    return kind(node, uid_prefix=uid_prefix, settings=settings, **arguments)


_CALL_OPTIONS = {"priority", "codec", "max_staleness", "audit_share"}
_SETTINGS = {field.name for field in dataclasses.fields(MixtureSettings)}
