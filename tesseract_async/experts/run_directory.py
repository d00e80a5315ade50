"""Run manifests in the network: finds one by name, and keeps copies of one there while anybody takes part."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Protocol

from tesseract_async.errors import TesseractError, describe
from tesseract_async.experts.run import SignedRun, join_run, newest_by_signer, run_key, split_run, split_run_name
from tesseract_async.identity import PeerID

logger = logging.getLogger(__name__)


class RunNetwork(Protocol):
    """What run manifests need of `TesseractNetwork`."""

    @property
    def peer_id(self) -> PeerID: ...
    async def wait_joined(self, timeout: float | None = None) -> bool: ...
    async def store(self, key: str, value: Any, *, ttl: float, subkey: str | None = None) -> int: ...
    async def get_entries(self, key: str) -> Sequence[Any]: ...


class RunNotFound(TesseractError):
    """No manifest of that run is in the network, or the bare name is not enough to tell which one is meant."""


@dataclass(frozen=True, slots=True)
class RunSettings:
    """How runs are kept in the network. Seconds are plain floats."""

    ttl: float = 3600.0
    """How long a copy outlives the node that keeps it."""
    refresh_period: float = 900.0
    """Copies are counted, and own ones renewed, so often."""
    retry_period: float = 5.0
    """Until the next attempt, where the network failed."""
    num_copies: int = 5
    """Owners that keep a copy; more servers of the run than that only look."""


async def publish_run(network: RunNetwork, run: SignedRun, *, ttl: float = RunSettings().ttl) -> int:
    """Stores a copy under this node's name; returns the number of holders of the part that has the fewest."""
    key = run_key(run.manifest.name)
    # one node may keep copies of equally named runs of several signers
    prefix = run.signer.hex()[:16]
    parts = split_run(run.blob)
    async with asyncio.TaskGroup() as group:
        stores = [
            group.create_task(network.store(key, part, ttl=ttl, subkey=f"{prefix}.{number}"))
            for number, part in enumerate(parts)
        ]
    return min(task.result() for task in stores)


async def find_runs(
    network: RunNetwork, name: str, *, clock: Callable[[], float] = time.time
) -> dict[PeerID, tuple[SignedRun, set[PeerID]]]:
    """Signer -> its latest manifest of this name, and who keeps a copy of that one."""
    parts: dict[PeerID, list[Any]] = {}
    for entry in await network.get_entries(run_key(name)):
        if entry.expiration > clock():
            parts.setdefault(entry.owner, []).append(entry.value)
    # each owner's parts by themselves: nobody can spoil another's copy
    copies = {owner: join_run(some) for owner, some in parts.items()}
    newest = newest_by_signer((run for runs in copies.values() for run in runs), name)
    return {signer: (run, {owner for owner, runs in copies.items() if run in runs}) for signer, run in newest.items()}


async def find_run(network: RunNetwork, text: str, *, clock: Callable[[], float] = time.time) -> SignedRun:
    """The run called ``NAME`` or ``NAME@PEER_ID``.

    Raises: RunNotFound if there is none, or several signers use the bare name; ValueError for a malformed one.
    """
    name, signer = split_run_name(text)
    found = await find_runs(network, name, clock=clock)
    if signer is not None:
        if signer not in found:
            raise RunNotFound(f"nobody in the network knows a run {name} signed by {signer}")
        return found[signer][0]
    if not found:
        raise RunNotFound(f"nobody in the network knows a run called {name}; is this the right swarm?")
    if len(found) > 1:
        names = ", ".join(sorted(run.full_name for run, _ in found.values()))
        raise RunNotFound(f"{len(found)} runs are called {name}; say which one is meant: {names}")
    ((run, _),) = found.values()
    return run


class RunKeeper:
    """Keeps a run's manifest in the network while this node takes part, whoever signed it."""

    def __init__(
        self,
        network: RunNetwork,
        run: SignedRun,
        *,
        settings: RunSettings = RunSettings(),
        random: Random | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.run = run
        self.settings = settings
        self.num_copies = 0
        """Owners that kept a copy when it was counted last, this node included."""
        self._network = network
        self._random = random if random is not None else Random()
        self._clock = clock
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins in the background."""
        self._task = asyncio.create_task(self._keep(), name=f"experts: keep run {self.run.manifest.name}")

    async def aclose(self) -> None:
        """Stops; the copy stays until it expires, for those who come later. Closing twice is harmless."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    async def keep_once(self) -> bool:
        """Counts the copies and stores an own one if it is needed; whether it was stored."""
        found = await find_runs(self._network, self.run.manifest.name, clock=self._clock)
        latest, owners = found.get(self.run.signer, (self.run, set()))
        if latest.manifest.created > self.run.manifest.created:
            logger.warning(
                "the run %s was signed anew: this node goes on with the manifest that it started with",
                self.run.manifest.name,
            )
            return False
        others = owners - {self._network.peer_id} if latest == self.run else set()
        needed = len(others) < self.settings.num_copies
        if needed:
            await publish_run(self._network, self.run, ttl=self.settings.ttl)
        self.num_copies = len(others) + needed
        return needed

    async def _keep(self) -> None:
        while True:
            try:
                await self._network.wait_joined(self.settings.retry_period)
                await self.keep_once()
                # not all servers of a run at the same moment
                wait = self.settings.refresh_period * self._random.uniform(0.8, 1.2)
            except (TesseractError, TimeoutError, OSError) as error:
                logger.warning("could not keep the run %s known: %s", self.run.manifest.name, describe(error))
                wait = self.settings.retry_period
            await asyncio.sleep(wait)
