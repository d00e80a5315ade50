"""What `tesseract serve` does: finds the run, claims experts, hosts them, keeps to the limits, leaves."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import logging
import os
import random
import signal
import time
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote

import click
import psutil
import torch

from tesseract_async.cli.access import describe_policy
from tesseract_async.cli.running import say, spare_the_collector, until_told_to_leave
from tesseract_async.cli.units import counted
from tesseract_async.cli.waiting import bar, sign
from tesseract_async.errors import CheckpointError, TesseractError, describe
from tesseract_async.experts import ExpertPattern, PublisherSettings
from tesseract_async.experts.claiming import ExpertClaim, claim_experts
from tesseract_async.experts.manifest import join_uid
from tesseract_async.experts.run import SignedRun
from tesseract_async.experts.run_directory import BareRun, RunKeeper, RunNotFound
from tesseract_async.monitoring import StatusService
from tesseract_async.node import TesseractNode
from tesseract_async.runtime.backend import BackendSettings
from tesseract_async.runtime.runtime import RuntimeSettings
from tesseract_async.server.calls import CallSettings
from tesseract_async.server.contract import Verdict, VolunteerSettings
from tesseract_async.server.folder_lock import FolderLock
from tesseract_async.server.footprint import SHARES, MemoryPlan, measure, plan_memory, size_text
from tesseract_async.server.memory import trim_heap
from tesseract_async.server.other_replicas import ReplicaSettings, adopt_states
from tesseract_async.server.registry import draws_its_own, make_backend
from tesseract_async.server.run_experts import build_run_backend
from tesseract_async.server.server import ServerSettings, TesseractServer
from tesseract_async.server.succession import ReplicaKeeper
from tesseract_async.server.volunteer import VolunteerKeeper
from tesseract_async.transport.throttle import Throttle

if TYPE_CHECKING:
    from tesseract_async.experts.authority import Authority
    from tesseract_async.runtime.backend import ExpertBackend

logger = logging.getLogger(__name__)

JOIN_TIMEOUT: Final = 10.0
FIND_ATTEMPTS: Final = 5
AUTOCAST: Final = {None: None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""What ``--autocast`` takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServePlan:
    """What the command's options said. `None` in `given` is "none", not "not given"."""

    patterns: Sequence[str]
    num_experts: int | None
    run: str | None
    grant: str | None
    """Text of a grant or an invite for the run."""
    allowed_modules: Sequence[str]
    given: Mapping[str, Any]
    """Fields of a run's manifest that the user gave as flags: checked against the run's."""
    expert_class: str
    sizes: Mapping[str, int | float]
    optimizer: str | None
    learning_rate: float
    max_batch_size: int
    seed: int
    devices: Sequence[str]
    """Each computes on a thread of its own; the experts are spread over them in turn."""
    threads: int
    checkpoint_dir: Path | None
    checkpoint_period: float
    ttl: float
    sync_every: float
    report_period: float | None
    limits: VolunteerSettings
    node: Mapping[str, Any]
    """Arguments of `TesseractNode`."""
    leave_with_parent: bool
    computing: Mapping[str, Any] = field(default_factory=dict)
    """The `BackendSettings` that are this computer's own business, such as ``compile_mode``."""
    stall_timeout: float = 60.0
    """Seconds that a batch may compute before the device is taken to hang."""
    leave_within: float = 30.0
    """Seconds that leaving may take: handing over, finishing, withdrawing. Saving comes after."""


class Hosting:
    """One `tesseract serve` from start to end."""

    def __init__(self, plan: ServePlan) -> None:
        self.plan = plan
        self.run: SignedRun | None = None
        self.authority: Authority | None = None
        """Who may do what in the run; None without one, and for runs of version 0.1."""
        self.server: TesseractServer | None = None
        self.ready = asyncio.Event()
        """Set once the experts can be found."""
        throttle = Throttle(upload_rate=plan.limits.max_upload_rate, download_rate=plan.limits.max_download_rate)
        limit = plan.limits.max_memory_bytes
        share, most = SHARES["received"]
        self.memory: MemoryPlan | None = None
        """How the volunteer's memory is divided, once an expert was measured; None without a limit."""
        # beside the process as it is; what is measured later is exact, but this is known before anything is built
        self._max_bytes = None if limit is None else max(0, limit - int(psutil.Process().memory_info().rss))
        self.node = TesseractNode(
            **plan.node, throttle=throttle, max_receive_bytes=most if limit is None else min(most, int(share * limit))
        )

    async def main(self) -> int:
        """Until told to leave. Returns the exit status; raises what `cli.running.run` makes sentences of."""
        torch.set_num_threads(self.plan.threads)
        if self.plan.checkpoint_dir is not None:  # says now what the server would say once all is built
            lock = FolderLock(self.plan.checkpoint_dir)
            lock.acquire()
            lock.release()
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(self.node)
            for line in describe_policy(self.node.policy):
                click.echo(line, err=True)
            await self._find_run()
            await asyncio.to_thread(self._measure)
            uids, claim = await self._choose()
            backends = await self._build_all(uids)
            if self.node.initial_peers and await self._joined():
                followed = await adopt_states(self.node, backends)
            else:
                followed = set(uids) if self.authority is not None else set()
            self.server = server = TesseractServer(
                self.node,
                backends,
                device=self.plan.devices,
                checkpoint_dir=self.plan.checkpoint_dir,
                checkpoint_period=self.plan.checkpoint_period,
                followers=followed,
                publisher_settings=PublisherSettings(ttl=self.plan.ttl),
                settings=self._server_settings(),
            )
            with sign("making the experts known"):
                await stack.enter_async_context(server)
            await stack.enter_async_context(StatusService(self.node, server))
            if claim is not None:
                await claim.release()
            replicas = ReplicaKeeper(server, settings=self._replica_settings())
            await stack.enter_async_context(replicas)
            if self.run is not None and self.authority is None:
                keeper = RunKeeper(self.node.network, self.run)
                keeper.start()
                stack.push_async_callback(keeper.aclose)
            volunteer = VolunteerKeeper(
                server,
                self.plan.limits,
                usage_file=None if self.plan.checkpoint_dir is None else self.plan.checkpoint_dir / "usage.json",
                before_pause=partial(_hand_over, replicas),
                before_resume=replicas.come_back,
                tell=_tell,
            )
            await stack.enter_async_context(volunteer)
            reason = await self._serve(server, volunteer)
            click.echo(f"leaving ({reason}): handing over, finishing, withdrawing, saving", err=True)
            # where the network does not answer, draining is followed by a farewell that is cut short, too
            await _hand_over(replicas, timeout=max(0.0, self.plan.leave_within - 1.5 * self._drain_timeout))
        say("left", versions=_versions(server))
        return 1 if self.node.twin.is_set() else 0

    async def _serve(self, server: TesseractServer, volunteer: VolunteerKeeper) -> str:
        address = str(self.node.peer_address)
        uids = list(server.experts)
        followed = [uid for uid in uids if not server.is_primary(uid)]
        facts: dict[str, Any] = {} if self.run is None else {"run": self.run.full_name}
        facts |= {"followed": followed} if followed else {}
        facts |= {} if volunteer.verdict.serve else {"resting": volunteer.verdict.reason}
        hosted = f"{counted(len(uids), 'expert')} {'is' if len(uids) == 1 else 'are'}"
        click.echo(f"{hosted} being served at {address}; Ctrl-C leaves cleanly", err=True)
        spare_the_collector()

        def tell_ready() -> None:
            self.ready.set()
            peer_id = str(self.node.peer_id)
            say("ready", address=address, peer_id=peer_id, uids=uids, versions=_versions(server), **facts)

        period = self.plan.report_period
        reports = asyncio.create_task(_report(server, period)) if period else None
        try:
            with _saving_on_demand(server):
                told = until_told_to_leave(watch_stdin=self.plan.leave_with_parent, tell_ready=tell_ready)
                leaving = asyncio.create_task(told)
                twin = asyncio.create_task(self.node.twin.wait())
                try:
                    await asyncio.wait({leaving, twin}, return_when=asyncio.FIRST_COMPLETED)
                    return leaving.result() if leaving.done() else "another node has this identity"
                finally:
                    leaving.cancel()
                    twin.cancel()
                    await asyncio.gather(leaving, twin, return_exceptions=True)
        finally:
            if reports is not None:
                reports.cancel()
                await asyncio.gather(reports, return_exceptions=True)

    @property
    def _drain_timeout(self) -> float:
        return min(5.0, self.plan.leave_within / 3)

    # -- what to host ----------------------------------------------------------------------------------------------

    async def _joined(self) -> bool:
        with sign("joining the network"):
            return await self.node.network.wait_joined(JOIN_TIMEOUT)

    async def _find_run(self) -> None:
        if self.plan.run is None:
            return
        await self._joined()
        for attempt in range(FIND_ATTEMPTS):
            try:
                self.run = await self._enter(self.plan.run)
                break
            except RunNotFound:
                if attempt == FIND_ATTEMPTS - 1:
                    raise
                await asyncio.sleep(1.0)  # the network may still be finding its nodes
        assert self.run is not None
        self.run.manifest.check(self.plan.given, run=self.run.full_name)
        click.echo(f"the run is {self.run.full_name}", err=True)

    async def _enter(self, name: str) -> SignedRun:
        """The run, in which the node takes part from then on, if it may."""
        try:
            self.authority = authority = await self.node.join_run(name, grant=self.plan.grant)
        except BareRun as run:  # of version 0.1
            return run.signed
        me, full_name = self.node.peer_id, authority.run.full_name
        if not authority.may(me, "host", now=None):
            state = "was revoked in" if authority.is_revoked(me) else "may not host in"
            kept = "" if self.plan.node.get("identity") else " (and start with --identity FILE, which keeps that id)"
            raise ValueError(
                f"this node {state} {full_name}: ask its owner for `tesseract run grant {full_name} {me}`{kept}, then "
                "start again"
            )
        return authority.run

    async def _choose(self) -> tuple[list[str], ExpertClaim | None]:
        """The uids to host, and the reservation to release once they are declared."""
        patterns = [ExpertPattern.parse(text) for text in self.plan.patterns]
        if self.run is not None:
            run = self.run.manifest
            for pattern in patterns:
                inside = zip(pattern.ranges, run.grid_size, strict=False)
                if pattern.prefix != run.prefix or len(pattern.ranges) != len(run.grid_size):
                    raise ValueError(f"{pattern} is no part of the run's grid {run.pattern}")
                if any(one.stop > size for one, size in inside):
                    raise ValueError(f"{pattern} reaches beyond the run's grid {run.pattern}")
            grant = None if self.authority is None else self.authority.grant_of(self.node.peer_id)
            patterns = patterns or [run.pattern if grant is None or grant.pattern is None else grant.pattern]
            self._check_grant(patterns)
        num_experts = self.plan.num_experts
        if num_experts is None and self.plan.patterns:
            uids = _all_of(patterns, self.memory)
            kept = {uid for pattern in patterns for uid in _checkpointed(self.plan.checkpoint_dir, pattern)}
            return (uids if self._may_begin(kept) else [uid for uid in uids if uid in kept]), None
        if len(patterns) != 1:
            raise ValueError("--num-experts chooses from one pattern; say --experts once")
        (pattern,) = patterns
        num_experts = self._limited(num_experts or 1)
        # what this computer trained before comes first: its checkpoints are worth more than a free place
        mine = _checkpointed(self.plan.checkpoint_dir, pattern)[:num_experts]
        if len(mine) == num_experts:
            return mine, None
        if not self._may_begin(mine):
            return mine, None
        await self._joined()
        claim = await claim_experts(
            self.node.network,
            pattern,
            num_experts,
            random=random.Random(),
            trust=self.node.trust,
            log=lambda text: click.echo(text, err=True),
        )
        more = [uid for uid in claim.uids if uid not in mine]
        return mine + more[: num_experts - len(mine)], claim

    def _may_begin(self, kept: Collection[str]) -> bool:
        """Whether the node may host what it has not hosted before. Raises: ValueError if not, and nothing is `kept`."""
        if self.authority is None or self.authority.may(self.node.peer_id, "host", now=time.time()):
            return True
        if not kept:
            raise ValueError(f"the grant of {self.node.peer_id} has expired: ask the run's owner to renew it")
        click.echo("the grant has expired: only what was hosted here before goes on", err=True)
        return False

    def _check_grant(self, patterns: Sequence[ExpertPattern]) -> None:
        """Raises: ValueError where these are more than the node may host."""
        for pattern in patterns:
            first, last = (join_uid(pattern.prefix, [one[end] for one in pattern.ranges]) for end in (0, -1))
            if self.authority is not None and not all(
                self.authority.may(self.node.peer_id, "host", uid, now=None) for uid in (first, last)
            ):
                raise ValueError(f"the grant of {self.node.peer_id} does not cover {pattern}")

    def _limited(self, num_experts: int) -> int:
        if self.memory is None or self.memory.num_experts >= num_experts:
            return num_experts
        click.echo(f"only {self.memory.num_experts} of {num_experts} experts fit --max-memory", err=True)
        return self.memory.num_experts

    def _measure(self) -> None:
        """Divides the volunteer's memory, after building one expert of the kind and throwing it away."""
        limit = self.plan.limits.max_memory_bytes
        if limit is None:
            return
        if not self._max_bytes:
            size = size_text(int(psutil.Process().memory_info().rss))
            raise ValueError(f"not even one expert fits --max-memory: the process itself has {size}")
        patterns = [ExpertPattern.parse(text) for text in self.plan.patterns]
        pattern = patterns[0] if patterns or self.run is None else self.run.manifest.pattern
        expert = measure(self._build(next(iter(pattern))))
        expert = dataclasses.replace(expert, batch=expert.batch * len(self.plan.devices))  # they compute side by side
        gc.collect()
        trim_heap()
        # with everything in it that the first expert made PyTorch import
        base = int(psutil.Process().memory_info().rss)
        on_gpu = not any(device.startswith("cpu") for device in self.plan.devices)
        self.memory = plan_memory(limit, base=base, expert=expert, on_gpu=on_gpu)
        logger.info("memory: the process has %d bytes; %s; %s", base, expert, self.memory)
        if not self.memory.num_experts:
            raise ValueError(
                f"not even one expert fits --max-memory: the process itself has {size_text(base)}, an expert takes "
                f"{size_text(expert.resident)}, its largest batch {size_text(expert.batch)} while it "
                f"is computed; with what must be kept for callers, one needs {size_text(self.memory.needed_for_one)}"
            )

    def _server_settings(self) -> ServerSettings:
        runtime = RuntimeSettings(stall_timeout=self.plan.stall_timeout)
        settings = ServerSettings(drain_timeout=self._drain_timeout, runtime=runtime)
        if self.memory is None:
            return settings
        return dataclasses.replace(
            settings,
            runtime=dataclasses.replace(runtime, max_queue_bytes=self.memory.queue // len(self.plan.devices)),
            calls=CallSettings(max_inputs_bytes=self.memory.inputs, max_answers_bytes=self.memory.answers),
        )

    def _replica_settings(self) -> ReplicaSettings:
        plan = self.plan
        check_every = min(5.0, plan.sync_every, plan.ttl / 3)
        lease = min(30.0, plan.ttl)
        settings = ReplicaSettings(sync_every=plan.sync_every, check_every=check_every, lease=lease)
        copies = settings.max_copies_bytes if self.memory is None else self.memory.copies
        return dataclasses.replace(settings, max_copies_bytes=copies)

    async def _build_all(self, uids: Sequence[str]) -> dict[str, ExpertBackend]:
        """On all cores where the class allows it; the loop is free meanwhile to join the network."""
        name = self.plan.expert_class if self.run is None else self.run.manifest.expert
        if ":" in name or not draws_its_own(name):
            return {uid: self._build(uid) for uid in uids}
        limit = asyncio.Semaphore(os.cpu_count() or 1)

        async def build(uid: str, advance: Callable[[float], None]) -> ExpertBackend:
            async with limit:
                backend = await asyncio.to_thread(self._build, uid)
            advance(1)
            return backend

        try:
            with bar("building experts", total=len(uids)) as advance:
                async with asyncio.TaskGroup() as group:
                    tasks = {uid: group.create_task(build(uid, advance)) for uid in uids}
        except* ValueError as errors:
            raise errors.exceptions[0] from None
        return {uid: task.result() for uid, task in tasks.items()}

    def _build(self, uid: str) -> ExpertBackend:
        plan = self.plan
        if self.run is not None:
            manifest, allowed = self.run.manifest, plan.allowed_modules
            return build_run_backend(
                manifest, uid, allowed_modules=allowed, computing=plan.computing, max_bytes=self._max_bytes
            )
        return make_backend(
            plan.expert_class,
            optimizer=plan.optimizer,
            learning_rate=plan.learning_rate,
            max_batch_size=plan.max_batch_size,
            # the same first weights at each start, others for each expert
            seed=zlib.crc32(f"{plan.seed}/{uid}".encode()),
            sizes=plan.sizes,
            settings=BackendSettings(**plan.computing),
            max_bytes=self._max_bytes,
        )


def manifest_fields(plan_values: Mapping[str, Any], is_given: Callable[[str], bool]) -> dict[str, Any]:
    """The flags that a run's manifest decides, by its field names, as far as the user gave them."""
    names = {
        "expert_class": "expert",
        "optimizer": "optimizer",
        "learning_rate": "optimizer_options.learning_rate",
        "max_batch_size": "training.max_batch_size",
        "seed": "seed",
    }
    found = {field: plan_values[name] for name, field in names.items() if is_given(name)}
    return found | {f"sizes.{name}": value for name, value in plan_values["sizes"].items()}


def _all_of(patterns: Sequence[ExpertPattern], memory: MemoryPlan | None) -> list[str]:
    uids = list(dict.fromkeys(uid for pattern in patterns for uid in pattern))
    if memory is not None and memory.num_experts < len(uids):
        raise ValueError(
            f"{len(uids)} experts were asked for, but only {memory.num_experts} fit --max-memory: with --num-experts, "
            "so many are chosen"
        )
    return uids


@contextlib.contextmanager
def _saving_on_demand(server: TesseractServer) -> Iterator[None]:
    """Writes checkpoints at each SIGUSR1, where there are such signals."""
    saves: set[asyncio.Task[None]] = set()

    async def save() -> None:
        try:
            num_saved = await server.save_checkpoints()
        except CheckpointError as error:
            click.echo(f"Error: {error}", err=True)
            say("not saved", reason=str(error))
        else:
            say("saved", num_experts=num_saved, versions=_versions(server))

    def begin() -> None:
        task = asyncio.create_task(save(), name="serve: save on demand")
        saves.add(task)
        task.add_done_callback(saves.discard)

    number = getattr(signal, "SIGUSR1", None)
    if number is not None:
        asyncio.get_running_loop().add_signal_handler(number, begin)
    try:
        yield
    finally:
        if number is not None:
            asyncio.get_running_loop().remove_signal_handler(number)
        for task in saves:  # leaving saves anyway
            task.cancel()


def _checkpointed(directory: Path | None, pattern: ExpertPattern) -> list[str]:
    if directory is None or not directory.is_dir():
        return []
    return sorted(unquote(path.name) for path in directory.iterdir() if path.is_dir() and unquote(path.name) in pattern)


def _tell(verdict: Verdict) -> None:
    if verdict.serve:
        click.echo("going on", err=True)
        say("going on")
    else:
        click.echo(f"resting: {verdict.reason}", err=True)
        say("resting", reason=verdict.reason, until=verdict.until)


async def _hand_over(replicas: ReplicaKeeper, *, timeout: float | None = None) -> None:
    try:
        async with asyncio.timeout(timeout):
            await replicas.hand_over()
    except (TesseractError, TimeoutError, OSError) as error:
        logger.warning("the experts could not be handed over: %s", describe(error))


def _versions(server: TesseractServer) -> dict[str, int]:
    return {uid: backend.version for uid, backend in server.experts.items()}


async def _report(server: TesseractServer, period: float) -> None:
    while True:
        await asyncio.sleep(period)
        say("report", versions=_versions(server))
