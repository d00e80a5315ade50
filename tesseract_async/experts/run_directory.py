"""Runs in the network: how a node finds one by name, takes part in it, and keeps its records there meanwhile.

Every member keeps copies of the manifest, of revocations and of appointments. A grant that was renewed lies under a key
of its peer's for a day (`grant_key`), or its signer hands it on.
"""

import asyncio
import contextlib
import hashlib
import logging
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Final

import msgpack

from tesseract_async.errors import ProtocolError, TesseractError, describe
from tesseract_async.experts.authority import Authority
from tesseract_async.experts.directory import read_claims
from tesseract_async.experts.grants import GRANT_SECONDS, RENEW_SECONDS, Grant, read_grant_text, sign_grant
from tesseract_async.experts.run import SignedRun, join_run, newest_by_signer, run_key, split_run, split_run_name
from tesseract_async.experts.trust import Trust
from tesseract_async.files import write_whole
from tesseract_async.identity import Identity, PeerID
from tesseract_async.network.network import TesseractNetwork
from tesseract_async.tasks import end

logger = logging.getLogger(__name__)

COPY_TTL: Final = 3600.0
"""Seconds by which a copy outlives the node that keeps it: members may all be away for as long."""
COUNT_PERIOD: Final = 900.0
"""Seconds between two counts of the copies, by which own ones are renewed: a quarter of `COPY_TTL`."""
CHECK_PERIOD: Final = 30.0
"""Seconds between two looks for revocations, appointments and the node's own grant, so that a revocation comes at most
this late."""
RETRY_PERIOD: Final = 5.0
"""Seconds until the next attempt, where the network failed."""
GRANT_TTL: Final = 86400.0
"""Seconds for which a new grant waits in the network for its peer."""
NUM_COPIES: Final = 5
"""The number of members that keep a copy; further members only look."""


class RunNotFound(TesseractError):
    """No manifest of that run is in the network, or the bare name is not enough to tell which one is meant."""


async def publish_run(network: TesseractNetwork, run: SignedRun) -> int:
    """Store a copy under this node's name; return the number of holders of the part that has the fewest."""
    key = run_key(run.manifest.name)
    # one node may keep copies of equally named runs of several signers
    prefix = run.signer.hex()[:16]
    parts = split_run(run.blob)
    async with asyncio.TaskGroup() as group:
        stores = [
            group.create_task(network.store(key, part, ttl=COPY_TTL, subkey=f"{prefix}.{number}"))
            for number, part in enumerate(parts)
        ]
    return min(task.result() for task in stores)


async def find_runs(
    network: TesseractNetwork, name: str, *, trust: Trust | None = None, clock: Callable[[], float] = time.time
) -> dict[PeerID, tuple[SignedRun, set[PeerID]]]:
    """Return for each signer its latest manifest of this name, and who keeps a copy of that one. Copies of peers that
    the policy of `trust` does not list are not read."""
    trust = Trust() if trust is None else trust
    parts: dict[PeerID, list[object]] = {}
    for entry in await network.get_entries(run_key(name)):
        if entry.expiration > clock() and trust.may_be_read(entry.owner):
            parts.setdefault(entry.owner, []).append(entry.value)
    # each owner's parts by themselves: nobody can spoil another's copy
    copies = {owner: join_run(some) for owner, some in parts.items()}
    newest = newest_by_signer((run for runs in copies.values() for run in runs), name)
    return {signer: (run, {owner for owner, runs in copies.items() if run in runs}) for signer, run in newest.items()}


async def find_run(
    network: TesseractNetwork, text: str, *, trust: Trust | None = None, clock: Callable[[], float] = time.time
) -> SignedRun:
    """Find the run called ``NAME`` or ``NAME@PEER_ID``.

    Raises: RunNotFound if there is none, or several signers use the bare name; ValueError for a malformed one.
    """
    name, signer = split_run_name(text)
    found = await find_runs(network, name, trust=trust, clock=clock)
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


def records_key(run_id: bytes) -> str:
    return f"run-records/{run_id.hex()}"


def grant_key(run_id: bytes, peer_id: PeerID) -> str:
    return f"run-grants/{run_id.hex()}/{peer_id}"


async def publish_grant(network: TesseractNetwork, grant: Grant) -> int:
    """Store a grant where its peer looks for it; return the number of holders."""
    return await network.store(grant_key(grant.run_id, grant.peer), grant.blob, ttl=GRANT_TTL)


async def publish_record(network: TesseractNetwork, authority: Authority, record: bytes) -> int:
    """Store a copy of one of `Authority.records` under this node's name; return the number of holders."""
    subkey = hashlib.sha256(record).hexdigest()[:16]
    return await network.store(records_key(authority.run_id), record, ttl=COPY_TTL, subkey=subkey)


def kept_file(identity: Path, text: str) -> Path:
    """Return the file for what is known of the run ``NAME[@PEER_ID]``: next to the node's key. Raises: ValueError."""
    identity = identity.expanduser()
    return identity.with_name(f"{identity.name}.{split_run_name(text)[0]}.run")


def load_kept(path: Path, text: str) -> Authority | None:
    """Load what this computer kept of the run ``NAME`` or ``NAME@PEER_ID``; None if nothing, or of another run.

    Raises: ValueError for a malformed name.
    """
    name, owner = split_run_name(text)
    try:
        authority = Authority.from_kept(msgpack.unpackb(path.read_bytes()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, ProtocolError, msgpack.UnpackException) as error:
        logger.warning("%s cannot be read, and is written anew: %s", path, describe(error))
        return None
    same = authority.tag.name == name and owner in (None, authority.owner)
    return authority if same else None


async def enter_run(
    network: TesseractNetwork,
    trust: Trust,
    run: str | SignedRun,
    *,
    identity: Identity,
    grant: str | None = None,
    identity_file: Path | None = None,
    clock: Callable[[], float] = time.time,
) -> "RunKeeper":
    """Take part in a run: from now on `trust` follows it. Return the keeper of its records, which is not started yet.

    `run` is its name, or its manifest if that was found already; `grant` the text of a grant or an invite. What is
    learned is kept next to `identity_file`, and used where the network does not know the run.

    Raises: RunNotFound; ValueError for a malformed name, a grant that is not this node's or of another run, or
    if the node is in another run with the same prefix; what the network raises.
    """
    name = run if isinstance(run, str) else run.full_name
    keep_file = None if identity_file is None else kept_file(identity_file, name)
    kept = None if keep_file is None else load_kept(keep_file, name)
    if kept is not None and isinstance(run, str):
        run = kept.run.full_name  # a bare name stays that of the run that it was
    try:
        signed = await find_run(network, run, trust=trust, clock=clock) if isinstance(run, str) else run
    except (RunNotFound, TimeoutError):
        if kept is None:
            raise
        signed = kept.run
    authority = Authority(signed)
    for known in (trust.authority(authority.prefix), kept):
        if known is not None and known.run_id == authority.run_id:
            known.learn_run(signed)
            authority = known
            break
    if grant is not None:
        own = read_grant_text(grant, identity.peer_id, now=clock())
        if not authority.learn_grant(own.blob, identity.peer_id):
            told = "was revoked" if own.run_id == authority.run_id else "is of another run"
            raise ValueError(f"this grant {told}: ask the owner of {signed.full_name} for one of that run")
    trust.add(authority)
    keeper = RunKeeper(
        network,
        authority,
        trust=trust,
        identity=identity,
        keep_file=keep_file,
        clock=clock,
    )
    try:
        await keeper.learn_once()
    except (TesseractError, TimeoutError, OSError) as error:
        logger.warning("could not read who was revoked in %s; it is tried again: %s", signed.full_name, describe(error))
    return keeper


class RunKeeper:
    """Keeps a run's records in the network while this node takes part, no matter who signed them; learns new ones."""

    def __init__(
        self,
        network: TesseractNetwork,
        authority: Authority,
        *,
        trust: Trust | None = None,
        identity: Identity | None = None,
        keep_file: Path | None = None,
        random: Random | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`authority`: the node's view of the run. `identity`, of one who may grant, renews the members' grants before
        they end. `keep_file`: where what is learned is kept on disk."""
        self.run = authority.run
        self.authority = authority
        self.num_copies = 0
        """The number of members that kept a copy at the last count, this node included."""
        self.on_own_grant: Callable[[], None] = lambda: None
        """Called when the node has another grant than before."""
        self._network = network
        self._me = network.peer_id if identity is None else identity.peer_id
        self._trust = Trust() if trust is None else trust
        self._identity = identity
        self._keep_file = keep_file
        self._kept: list[bytes] = []
        self._random = random if random is not None else Random()
        self._clock = clock
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._keep(), name=f"experts: keep run {self.run.manifest.name}")

    async def aclose(self) -> None:
        """Stop; the copy stays until it expires, for those who come later. Closing twice is harmless."""
        await end(self._task)
        self._task = None

    async def keep_once(self) -> bool:
        """Count the copies of the manifest and store one of this node's if needed; return whether it was stored."""
        found = await find_runs(self._network, self.run.manifest.name, trust=self._trust, clock=self._clock)
        latest, owners = found.get(self.run.signer, (self.run, set()))
        self.authority.learn_run(latest)
        if latest.manifest.created > self.run.manifest.created:
            logger.warning(
                "the run %s was signed anew: this node goes on with the experts that it started with",
                self.run.manifest.name,
            )
            return False
        others = owners - {self._network.peer_id} if latest == self.run else set()
        needed = len(others) < NUM_COPIES
        if needed:
            await publish_run(self._network, self.run)
        self.num_copies = len(others) + needed
        return needed

    async def learn_once(self) -> bool:
        """Read the run's other records, and store copies of those that too few others keep. Return whether any is
        new."""
        authority = self.authority
        key, fresh = records_key(authority.run_id), self._clock() + COPY_TTL / 2
        holders: dict[bytes, set[PeerID]] = {}
        mine: set[bytes] = set()
        before, own = authority.kept(self._me), authority.grant_of(self._me)
        for number, entry in enumerate(await self._network.get_entries(key), 1):
            if number % 16 == 0:
                await asyncio.sleep(0)
            if entry.expiration <= self._clock() or type(entry.value) is not bytes:
                continue
            if entry.owner != self._network.peer_id:
                holders.setdefault(entry.value, set()).add(entry.owner)
            elif entry.expiration > fresh:
                mine.add(entry.value)
            try:
                authority.learn(entry.value)
            except ProtocolError as error:
                logger.debug("dropped a record of %s: %s", entry.owner.short, error)
        for entry in await self._network.get_entries(grant_key(authority.run_id, self._me)):
            authority.learn_grant(entry.value, self._me)
        if (now := authority.grant_of(self._me)) != own:
            if now is None:
                logger.warning("this node was revoked in the run %s: no member believes it", authority.run.full_name)
            self.on_own_grant()
        for record in authority.records():
            if record not in mine and len(holders.get(record, ())) < NUM_COPIES:
                await publish_record(self._network, authority, record)
        self.save()
        return authority.kept(self._me) != before

    async def renew_grants(self) -> list[Grant]:
        """Sign anew the grants that end within `grants.RENEW_SECONDS`, if this node may grant. Return the new ones."""
        authority, identity, now = self.authority, self._identity, self._clock()
        if identity is None or not authority.rules(identity.peer_id):
            return []
        via = authority.delegates.get(identity.peer_id)
        renewed = []
        prefix = authority.prefix
        entries = await self._network.get_entries(self._trust.grid_key(prefix))  # servers show what they have
        await read_claims(entries, prefix=prefix, now=now, trust=self._trust)
        for old in authority.grants():
            last = int(now) + GRANT_SECONDS if via is None else min(int(now) + GRANT_SECONDS, via.not_after)
            due = now < old.not_after <= min(now + RENEW_SECONDS, last - 1)
            # those of an invite end with it: it may have leaked
            if not due or "admit" in old.role_names or not authority.rules(old.signer):
                continue
            serial = authority.next_serial(old.peer, now)
            try:
                new = sign_grant(
                    *(identity, old.run_id, old.peer, old.role_names),
                    serial=serial,
                    not_after=last,
                    pattern=old.pattern,
                    via=via,
                )
            except ValueError:  # more than a delegate may give
                continue
            if authority.learn_grant(new.blob):
                await publish_grant(self._network, new)
                renewed.append(new)
        return renewed

    def save(self) -> None:
        """Write what is known to `keep_file`, with what another program wrote there meanwhile. An error is logged."""
        if self._keep_file is None:
            return
        if (others := load_kept(self._keep_file, self.authority.run.full_name)) is not None:
            for record in others.kept(self._me):
                with contextlib.suppress(ProtocolError):
                    self.authority.learn(record)
        kept = self.authority.kept(self._me)
        if kept == self._kept:
            return
        try:
            write_whole(self._keep_file, [msgpack.packb(list(kept))])
            self._kept = kept
        except OSError as error:
            logger.warning("%s cannot be written: %s", self._keep_file, describe(error))

    async def _keep(self) -> None:
        loop = asyncio.get_running_loop()
        count_at = loop.time()
        while True:
            try:
                await self._network.wait_joined(RETRY_PERIOD)
                if loop.time() >= count_at:
                    await self.keep_once()
                    await self.renew_grants()
                    # not all servers of a run at the same moment
                    count_at = loop.time() + COUNT_PERIOD * self._random.uniform(0.8, 1.2)
                await self.learn_once()
                wait = min(max(0.0, count_at - loop.time()), CHECK_PERIOD)
            except (TesseractError, TimeoutError, OSError) as error:
                logger.warning("could not keep the run %s known: %s", self.run.manifest.name, describe(error))
                wait = RETRY_PERIOD
            await asyncio.sleep(wait)
