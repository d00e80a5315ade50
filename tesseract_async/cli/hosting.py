"""The course of `tesseract serve`: find the run, claim experts, host them, keep to the limits, leave."""

import asyncio
import contextlib
import dataclasses
import logging
import os
import random
import signal
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from functools import partial
from typing import Final

import click

from tesseract_async.admission import Policy
from tesseract_async.cli.access import describe_policy
from tesseract_async.cli.building import ExpertBuilder
from tesseract_async.cli.options import JOIN_TIMEOUT, NodeOptions
from tesseract_async.cli.running import (
    importing_dashboard,
    progress_bar,
    say,
    spare_the_collector,
    spinner,
    until_told_to_leave,
)
from tesseract_async.cli.serve_options import ServeOptions
from tesseract_async.cli.types import counted
from tesseract_async.errors import CheckpointError, TesseractError, describe
from tesseract_async.experts.authority import Authority
from tesseract_async.experts.choice import select_experts
from tesseract_async.experts.claiming import ExpertClaim, claim_experts
from tesseract_async.experts.grants import read_grant_text
from tesseract_async.experts.publisher import PublisherSettings
from tesseract_async.experts.run import SignedRun
from tesseract_async.experts.run_directory import RunNotFound
from tesseract_async.monitoring import StatusService
from tesseract_async.runtime.backend import ExpertBackend
from tesseract_async.runtime.mesh_link import LOST_STATUS, MeshLink
from tesseract_async.runtime.runtime import RuntimeSettings
from tesseract_async.server.capacity import MAX_ROOM, measure_capacity
from tesseract_async.server.contract import VolunteerSettings, WorkPermission
from tesseract_async.server.footprint import SHARES, MemoryPlan, fit_memory
from tesseract_async.server.other_replicas import ReplicaSettings, adopt_states
from tesseract_async.server.placing import Placing
from tesseract_async.server.server import FAREWELL_TIMEOUT, ServerSettings, TesseractServer
from tesseract_async.server.state_files import CheckpointStore, FolderLock, stored_uids
from tesseract_async.server.succession import ReplicaKeeper
from tesseract_async.server.volunteer import VolunteerKeeper
from tesseract_async.tasks import end
from tesseract_async.transport.base import split_host_port
from tesseract_async.transport.throttle import Throttle

logger = logging.getLogger(__name__)

FIND_ATTEMPTS: Final = 5
REFUSING_SECONDS: Final = 0.3
"""Seconds for which a server whose mesh is lost still says so to its callers."""
MAX_NAMED: Final = 256
"""The most experts that a line for programs names: there may be thousands, and pipes are small."""
SETTLE_TIMEOUT: Final = 20.0
"""Seconds that a server waits until it has taken what its run lacks, before it says that it is ready."""


class Hosting:
    """One `tesseract serve` from start to end."""

    def __init__(
        self,
        serving: ServeOptions,
        *,
        node: NodeOptions,
        policy: Policy | None = None,
        limits: VolunteerSettings,
        given: Mapping[str, object] | None = None,
        builder: ExpertBuilder,
    ) -> None:
        """`given`: fields of a run's manifest that the user gave, checked against the run's."""
        self.serving = serving
        self.ready = asyncio.Event()
        """Set once the experts can be found."""
        self.server: TesseractServer | None = None
        self._given = given or {}
        self._limits = limits
        self._has_identity = node.identity is not None
        self.builder = builder
        self._run: SignedRun | None = None
        self._authority: Authority | None = None
        """The rights of peers in the run; None without a run."""
        self._memory: MemoryPlan | None = None
        """The division of the volunteer's memory, once an expert was measured; None without a limit."""
        throttle = Throttle(upload_rate=limits.max_upload_rate, download_rate=limits.max_download_rate)
        limit = limits.max_memory_bytes
        share, most = SHARES["received"]
        self.node = node.make(
            policy=policy,
            throttle=throttle,
            max_receive_bytes=most if limit is None else min(most, int(share * limit)),
        )

    async def main(self) -> int:
        """Host until told to leave. Returns the exit status; raises as `cli.running.run_command` says."""
        serving = self.serving
        if serving.checkpoint_dir is not None:  # reports a folder in use before anything is built
            lock = FolderLock(serving.checkpoint_dir)
            lock.acquire()
            lock.release()
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(self.node)
            if self.builder.link is not None:
                await stack.enter_async_context(self._leading(self.builder.link))
            for line in describe_policy(self.node.policy):
                click.echo(line, err=True)
            await self._find_run()
            await asyncio.to_thread(self._measure)
            uids, claim = await self._choose()
            backends = await self._build_all(uids)
            if self.node.initial_peers and await self._joined():
                followed = await adopt_states(self.node, backends)
            else:
                followed = dict.fromkeys(uids) if self._authority is not None else {}
            self.server = server = TesseractServer(
                self.node,
                backends,
                device=self.builder.devices,
                checkpoint_dir=serving.checkpoint_dir,
                checkpoint_period=serving.checkpoint_period,
                followers=followed,
                publisher_settings=PublisherSettings(ttl=serving.ttl),
                settings=self._server_settings(),
            )
            with spinner("making the experts known"):
                await stack.enter_async_context(server)
            await stack.enter_async_context(StatusService(self.node, server, name=serving.name))
            if serving.metrics_port is not None:
                with importing_dashboard("--metrics-port"):
                    from tesseract_async.monitoring.dashboard import serving_metrics
                host, port = split_host_port(serving.metrics_port)
                url = await stack.enter_async_context(serving_metrics(self.node.metrics, host, port))
                click.echo(f"metrics are at {url}", err=True)
            if claim is not None:
                await claim.release()
            replicas = ReplicaKeeper(server, settings=self._replica_settings(), adopted=followed)
            await stack.enter_async_context(replicas)
            volunteer = VolunteerKeeper(
                server,
                self._limits,
                usage_file=None if serving.checkpoint_dir is None else serving.checkpoint_dir / "usage.json",
                before_pause=partial(_hand_over, replicas),
                before_resume=partial(replicas.look, even_paused=True),
                tell=_tell,
            )
            await stack.enter_async_context(volunteer)
            room: int | None = None
            if self._authority is not None:
                placing = await self._place(server, replicas, self._authority)
                await stack.enter_async_context(placing)
                room = placing.capacity.room
                num_computed, num_files = placing.capacity.fragments
                if serving.patterns:  # it computes what it was told to
                    num_computed = 0
                fragments = Placing.of_fragments(server, replicas, self._authority, num_computed, num_files)
                await stack.enter_async_context(fragments)
                with spinner("taking what the run lacks"):
                    await placing.wait_settled(SETTLE_TIMEOUT)
            reason = await self._serve(server, volunteer, room)
            click.echo(f"leaving ({reason}): handing over, finishing, withdrawing, saving", err=True)
            # leaves time to drain, and for a farewell that is cut short where the network does not answer
            await _hand_over(replicas, timeout=max(0.0, serving.leave_within - 1.5 * self._drain_timeout))
        say("left", versions=_versions(server))
        return 1 if self.node.twin.is_set() else 0

    async def _serve(self, server: TesseractServer, volunteer: VolunteerKeeper, room: int | None) -> str:
        """Serve until told to leave; return the reason. `room`: for experts of a run, None outside of one."""
        address, peer_id = str(self.node.peer_address), str(self.node.peer_id)
        uids = sorted(server.experts)
        followed = [uid for uid in uids if not server.is_primary(uid)]
        facts: dict[str, object] = {} if self._run is None else {"run": self._run.full_name}
        facts |= {"followed": followed[:MAX_NAMED]} if followed else {}
        facts |= {} if volunteer.verdict.serve else {"resting": volunteer.verdict.reason}
        click.echo(f"{what_is_served(len(uids), room)} at {address}; Ctrl-C leaves cleanly", err=True)
        spare_the_collector()

        def tell_ready() -> None:
            self.ready.set()
            named = {"num_experts": len(uids), "uids": uids[:MAX_NAMED], "versions": _versions(server)}
            say("ready", address=address, peer_id=peer_id, **named, **facts)

        work = [_save_on_demand(server), _report(server, self.serving.report_period)]
        tasks = [asyncio.create_task(one) for one in work]
        leaving = asyncio.create_task(until_told_to_leave(tell_ready=tell_ready))
        twin = asyncio.create_task(self.node.twin.wait())
        try:
            await asyncio.wait({leaving, twin}, return_when=asyncio.FIRST_COMPLETED)
            return leaving.result() if leaving.done() else "another node has this identity"
        finally:
            await end(*tasks, leaving, twin)

    @property
    def _drain_timeout(self) -> float:
        return min(5.0, self.serving.leave_within / 3)

    # -- what to host ----------------------------------------------------------------------------------------------

    async def _joined(self) -> bool:
        with spinner("joining the network"):
            return await self.node.network.wait_joined(JOIN_TIMEOUT)

    async def _find_run(self) -> None:
        if self.serving.run_name is None:
            return
        for attempt in range(FIND_ATTEMPTS):
            try:
                with spinner("joining the network"):
                    authority = await self.node.join_run(self.serving.run_name, grant=self.serving.grant)
                break
            except RunNotFound:
                if attempt == FIND_ATTEMPTS - 1:
                    raise
                await asyncio.sleep(1.0)  # the network may still be finding its nodes
        self._authority, self._run = authority, (run := authority.run)
        self._check_admitted(authority)
        run.manifest.check(self._given, run=run.full_name)
        click.echo(f"the run is {run.full_name}", err=True)

    def _check_admitted(self, authority: Authority) -> None:
        """Raises: ValueError if the run does not let this node host."""
        me, full_name = self.node.peer_id, authority.run.full_name
        if not authority.may(me, "host", now=None):
            grant = self.serving.grant
            if grant is not None and read_grant_text(grant, me, now=time.time()).signer in authority.revoked():
                raise ValueError(f"this invite to {full_name} was revoked: ask its owner for a new one")
            state = "was revoked in" if authority.is_revoked(me) else "may not host in"
            kept = "" if self._has_identity else " (and start with --identity FILE, which keeps that id)"
            raise ValueError(
                f"this node {state} {full_name}: ask its owner for `tesseract run grant {full_name} {me}`{kept}, then "
                "start again"
            )

    async def _place(self, server: TesseractServer, replicas: ReplicaKeeper, authority: Authority) -> Placing:
        serving, uid = self.serving, next(iter(authority.run.manifest.pattern))
        chooses = not serving.patterns
        room = serving.num_experts if chooses else len(server.experts)
        if self._memory is not None:
            room = min(self._memory.num_experts, room or MAX_ROOM)
        capacity, template = await server.call_aside(
            partial(
                measure_capacity,
                partial(self.builder.build, uid, self._run),
                room=room,
                hold_bytes=None if serving.hold_bytes is None else int(serving.hold_bytes),
                folder=serving.checkpoint_dir,
                max_bytes=self._limits.max_memory_bytes,
                devices=self.builder.devices,
            )
        )
        click.echo(capacity.sentence, err=True)
        replicas.tenures.upload_rate = self._limits.max_upload_rate
        return Placing(
            server,
            replicas,
            authority,
            capacity,
            build=partial(self.builder.build, run=self._run),
            template=template,
            chooses=chooses,
        )

    async def _choose(self) -> tuple[list[str], ExpertClaim | None]:
        """Return the uids to host, and the reservation to release once they are declared.

        In a run without patterns these are the ones that were computed here before; the server takes others that the
        run lacks later (`server.placing`).
        """
        stored = stored_uids(self.serving.checkpoint_dir)
        if self._authority is not None and self.serving.checkpoint_dir is not None:
            store, pattern = CheckpointStore(self.serving.checkpoint_dir), self._authority.run.manifest.pattern
            stored = [uid for uid in stored if uid in pattern and store.files(uid)]  # others were only held
        num_experts = self.serving.num_experts
        if num_experts is None and self._authority is not None and not self.serving.patterns:
            num_experts = max(1, len(stored))
        found = select_experts(
            self.node.peer_id,
            self.serving.patterns,
            num_experts=num_experts,
            run=None if self._run is None else self._run.manifest,
            authority=self._authority,
            stored=stored,
            max_experts=None if self._memory is None else self._memory.num_experts,
            now=time.time(),
        )
        for note in found.notes:
            click.echo(note, err=True)
        if found.pattern is None or not found.num_more or (self._authority is not None and not self.serving.patterns):
            return found.uids, None
        await self._joined()
        claim = await claim_experts(
            self.node.network,
            found.pattern,
            len(found.uids) + found.num_more,
            random=random.Random(),
            trust=self.node.trust,
            log=lambda text: click.echo(text, err=True),
        )
        more = [uid for uid in claim.uids if uid not in found.uids]
        return found.uids + more[: found.num_more], claim

    def _measure(self) -> None:
        """Divide the volunteer's memory. Raises: ValueError if not even one expert fits."""
        limit, patterns = self._limits.max_memory_bytes, self.serving.patterns
        if limit is not None:
            pattern = patterns[0] if patterns or self._run is None else self._run.manifest.pattern
            uid = next(iter(pattern))
            self._memory = fit_memory(limit, lambda: self.builder.build(uid, self._run), devices=self.serving.devices)

    def _server_settings(self) -> ServerSettings:
        runtime = RuntimeSettings(stall_timeout=self.serving.stall_timeout)
        settings = ServerSettings(drain_timeout=self._drain_timeout, runtime=runtime)
        if self._memory is None:
            return settings
        budgets = self._memory.budgets
        return dataclasses.replace(
            settings,
            runtime=dataclasses.replace(runtime, max_queue_bytes=budgets["queue"] // len(self.serving.devices)),
            max_inputs_bytes=budgets["inputs"],
            max_answers_bytes=budgets["answers"],
        )

    def _replica_settings(self) -> ReplicaSettings:
        sync_every, ttl = self.serving.sync_every, self.serving.ttl
        check_every = min(5.0, sync_every, ttl / 3)
        settings = ReplicaSettings(sync_every=sync_every, check_every=check_every, lease=min(30.0, ttl))
        copies = settings.max_copies_bytes if self._memory is None else self._memory.budgets["copies"]
        return dataclasses.replace(settings, max_copies_bytes=copies)

    async def _build_all(self, uids: Sequence[str]) -> dict[str, ExpertBackend]:
        with progress_bar("building experts", total=len(uids)) as advance:
            built = await self.builder.build_all(uids, self._run, on_built=lambda: advance(1))
        spare_the_collector()  # else it looks through them again and again while thousands are made known
        return built

    @contextlib.asynccontextmanager
    async def _leading(self, link: MeshLink) -> AsyncIterator[None]:
        watcher = asyncio.create_task(self._watch_mesh(link), name="mesh")
        try:
            yield
        finally:
            await asyncio.to_thread(link.leave)
            await end(watcher)

    async def _watch_mesh(self, link: MeshLink) -> None:
        """End the process once the mesh is lost: its thread may hang, and the program that started it starts it
        again."""
        reason = await link.wait_lost()
        click.echo(f"Error: {reason}; this process ends, to be started again", err=True)
        say("lost", reason=reason)
        try:
            if self.server is not None:
                async with asyncio.timeout(FAREWELL_TIMEOUT):
                    await self.server.pause(f"{reason}: this expert comes back", retry_after=link.retry_after)
                    await asyncio.sleep(REFUSING_SECONDS)
        except (TesseractError, TimeoutError, OSError) as error:
            logger.warning("the network hears late that the mesh is lost: %s", describe(error))
        finally:
            link.end_followers()
            os._exit(LOST_STATUS)


def what_is_served(num_experts: int, room: int | None) -> str:
    """Return what a server does once it is ready; `room` is for experts of a run, None outside of one."""
    if num_experts or room is None:
        return f"{counted(num_experts, 'expert')} {'is' if num_experts == 1 else 'are'} being served"
    if room:
        return "ready to take a share of the run's experts"
    return "ready to keep states of the run's experts"


async def _save_on_demand(server: TesseractServer) -> None:
    if not hasattr(signal, "SIGUSR1"):
        return
    asked, loop = asyncio.Event(), asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGUSR1, asked.set)
    try:
        while await asked.wait():
            asked.clear()
            try:
                num_saved = await server.save_checkpoints()
            except CheckpointError as error:
                click.echo(f"Error: {error}", err=True)
                say("not saved", reason=str(error))
            else:
                click.echo(f"{counted(num_saved, 'expert')} saved", err=True)
                say("saved", num_experts=num_saved, versions=_versions(server))
    finally:
        loop.remove_signal_handler(signal.SIGUSR1)


def _tell(verdict: WorkPermission) -> None:
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
    experts = server.experts
    return {uid: experts[uid].version for uid in sorted(experts)[:MAX_NAMED]}


async def _report(server: TesseractServer, period: float | None) -> None:
    while period is not None:
        await asyncio.sleep(period)
        say("report", on_terminal=True, versions=_versions(server))
