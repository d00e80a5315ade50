"""A run's weights as a folder that loads without the swarm.

::

    folder/
      export.json                      the run's signed manifest, and each expert's file, version and checksum
      experts/ffn.3.7.safetensors      its weights; any safetensors reader loads them

`export_experts` collects them from those who have them, which `find_origins` finds: an expert's primary, else its
followers and those who only hold its state. A second export into the same folder takes only what is newer.
`load_export` gives them back as ordinary modules: ``load_export("folder")["ffn.3.7"](x)``.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import logging
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple
from urllib.parse import quote

import safetensors
import safetensors.torch
import torch
from torch import nn

from tesseract_async.errors import CheckpointError, ProtocolError, TesseractError, describe
from tesseract_async.experts.place_directory import fetch_places
from tesseract_async.experts.placement import Role
from tesseract_async.experts.run import RUNS, RunManifest, SignedRun
from tesseract_async.files import write_whole
from tesseract_async.server.checkpoint import check_state
from tesseract_async.server.fetching import fetch_state
from tesseract_async.server.run_experts import build_run_module
from tesseract_async.transport.base import PeerAddress

if TYPE_CHECKING:
    from tesseract_async.node import TesseractNode

logger = logging.getLogger(__name__)

FORMAT: Final = "tesseract export 1"
INDEX: Final = "export.json"
ROLES: Final = {Role.LEADS: "primary", Role.FOLLOWS: "follower", Role.HOLDS: "holder"}


class ExportedExpert(NamedTuple):
    """One line of the index."""

    file: str
    """Relative to the folder."""
    version: int
    """Optimizer steps taken."""
    sha256: str
    """SHA-256 of the file, in hexadecimal digits."""
    origin: str
    """The role of who gave it; see `Origin`."""


class Origin(NamedTuple):
    """A server that has an expert's state, by its own word."""

    peer: PeerAddress
    role: str
    """``primary``, ``follower``, or ``holder``, which has the sealed file alone."""
    age: tuple[int, int] = (0, 0)
    """The epoch and number of its Seal, as far as they are known."""


@dataclass(slots=True)
class ExportReport:
    """The outcome of an export."""

    taken: dict[str, int] = field(default_factory=dict)
    """uid -> version, of the experts that were written now."""
    kept: dict[str, int] = field(default_factory=dict)
    """... that the folder held already, and no server has newer."""
    origins: dict[str, str] = field(default_factory=dict)
    """uid -> the role of the server that gave it, of those that were written now."""
    failed: dict[str, BaseException] = field(default_factory=dict)
    """uid -> the last error, of those that no server gave. An older file stays, if there is one."""


async def export_experts(
    node: TesseractNode,
    run: SignedRun,
    origins: Mapping[str, Sequence[Origin]],
    folder: str | Path,
    *,
    num_at_once: int = 4,
    timeout: float = 60.0,
    progress: Callable[[str], None] = lambda uid: None,
) -> ExportReport:
    """Write the weights of `origins` (uid -> who has it, the preferred one first) into `folder`.

    `timeout` is for each piece of a state; `progress` is called with each uid that is done or failed. Interrupted, it
    leaves a folder that loads, and a later run goes on from there.

    Raises: OSError if the folder can't be written; ValueError if it holds the export of another run.
    """
    store = _Folder(Path(folder), run)
    report = ExportReport()
    gate = asyncio.Semaphore(num_at_once)

    async def take(uid: str, some: Sequence[Origin]) -> None:
        known = store.experts.get(uid)
        async with gate:
            error: BaseException = ProtocolError(f"nobody has a state of {uid}")
            for origin in some:
                try:
                    file = await fetch_state(
                        node,
                        origin.peer,
                        uid,
                        weights_only=True,
                        min_version=0 if known is None else known.version + 1,
                        timeout=timeout,
                    )
                    if file is not None:
                        state = check_state(uid, file, weights_only=True)
                        store.put(uid, state["module"], state["version"], origin.role)
                        report.taken[uid] = state["version"]
                    elif known is not None:
                        report.kept[uid] = known.version
                    break
                except (TesseractError, TimeoutError) as caught:
                    logger.warning("%s at %s: %s", uid, origin.peer.short, describe(caught))
                    error = caught
            else:
                report.failed[uid] = error
        progress(uid)

    async with asyncio.TaskGroup() as group:
        for uid in sorted(origins):
            group.create_task(take(uid, origins[uid]))
    store.write_index()
    report.origins = {uid: store.experts[uid].origin for uid in report.taken}
    return report


async def find_origins(node: TesseractNode, run: SignedRun) -> dict[str, list[Origin]]:
    """Return who has the state of each expert of a run: primaries first, then the newest Seal, followers first.

    Raises: what the network raises.
    """
    manifest, found = run.manifest, defaultdict[str, dict[PeerAddress, Origin]](dict)
    for uid, replicas in (await node.directory.read_grid(manifest.prefix, manifest.grid_size)).items():
        for one in replicas:
            role = "primary" if one.primary else "follower"
            found[uid][one.peer] = Origin(one.peer, role, (one.epoch, 0))
    authority = node.trust.authority(manifest.prefix)
    if authority is not None:
        places, addresses = await fetch_places(node.network, node.trust, authority, node.scope)
        for peer_id, place in places.items():
            for uid, part in place.parts.items():
                if part.has_file and uid in manifest.pattern:
                    peer = next((one for one in found[uid] if one.peer_id == peer_id), addresses[peer_id])
                    known = found[uid].get(peer)
                    role = ROLES[part.role] if known is None else known.role
                    found[uid][peer] = Origin(peer, role, (part.epoch, part.number))

    def rank(one: Origin) -> tuple[bool, tuple[int, int], bool]:
        return one.role == "primary", one.age, one.role == "follower"

    return {uid: sorted(some.values(), key=rank, reverse=True) for uid, some in found.items() if some}


class _Folder:
    """An export being written. Its index is renewed now and then, so that an interrupted one loads."""

    def __init__(self, path: Path, run: SignedRun) -> None:
        self.path, self.run = path, run
        self.experts: dict[str, ExportedExpert] = {}
        self._num_unlisted = 0
        if (path / INDEX).exists():
            before, experts = read_index(path)
            if (before.signer, before.manifest.name) != (run.signer, run.manifest.name):
                raise ValueError(f"{path} holds an export of {before.full_name}, not of {run.full_name}")
            self.experts = {uid: one for uid, one in experts.items() if (path / one.file).exists()}

    def put(self, uid: str, weights: Mapping[str, torch.Tensor], version: int, origin: str) -> None:
        metadata = {"uid": uid, "version": str(version), "run": self.run.full_name}
        data = safetensors.torch.save({name: tensor.contiguous() for name, tensor in weights.items()}, metadata)
        # a uid may hold what a file system does not take, or takes for a path
        file = f"experts/{quote(uid, safe='')}.safetensors"
        write_whole(self.path / file, [data])
        self.experts[uid] = ExportedExpert(file, version, hashlib.sha256(data).hexdigest(), origin)
        self._num_unlisted += 1
        if self._num_unlisted >= 64:
            self.write_index()

    def write_index(self) -> None:
        self._num_unlisted = 0
        manifest = self.run.manifest
        index = {
            "format": FORMAT,
            "run": manifest.name,
            "signer": str(self.run.signer),
            "expert": manifest.expert,
            "sizes": dict(manifest.sizes),
            "grid_size": list(manifest.grid_size),
            "signed_manifest": base64.b64encode(self.run.blob).decode(),
            "experts": {uid: one._asdict() for uid, one in sorted(self.experts.items())},
        }
        write_whole(self.path / INDEX, [json.dumps(index, indent=1).encode()])


def read_index(folder: str | Path) -> tuple[SignedRun, dict[str, ExportedExpert]]:
    """Return the run and the experts of an export. Raises: CheckpointError for a folder that is none."""
    path = Path(folder) / INDEX
    try:
        index = json.loads(path.read_bytes())
        if index["format"] != FORMAT:
            raise CheckpointError(f"{path}: {str(index['format'])[:40]!r} is not {FORMAT!r}")
        run = RUNS.read(base64.b64decode(index["signed_manifest"]))
        experts = {
            uid: ExportedExpert(_inside(one["file"]), int(one["version"]), str(one["sha256"]), str(one["origin"]))
            for uid, one in index["experts"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, ProtocolError) as error:
        raise CheckpointError(f"{path} is no export: {describe(error)}") from error
    return run, experts


def _inside(file: str) -> str:
    path = Path(file)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{file!r} leads out of the folder")
    return file


class ExportedExperts(Mapping[str, nn.Module]):
    """The experts of an export by uid: ordinary modules, in eval mode, made when they are asked for first."""

    def __init__(self, folder: str | Path, *, allowed_modules: Collection[str] = ()) -> None:
        """`allowed_modules`: those from which a run's own builders may be imported. Raises: CheckpointError."""
        self.folder = Path(folder)
        self.signed_run, self.index = read_index(folder)
        self._allowed = tuple(allowed_modules)
        self._modules: dict[str, nn.Module] = {}

    @property
    def run(self) -> RunManifest:
        """The run's manifest."""
        return self.signed_run.manifest

    def weights(self, uid: str) -> dict[str, torch.Tensor]:
        """Return an expert's weights without building it. Raises: KeyError; CheckpointError for a damaged file."""
        entry = self.index[uid]
        path = self.folder / entry.file
        try:
            data = path.read_bytes()
            if hashlib.sha256(data).hexdigest() != entry.sha256:
                raise CheckpointError(f"{path} is damaged: its checksum is wrong")
            return safetensors.torch.load(data)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {describe(error)}") from error
        except (safetensors.SafetensorError, KeyError, ValueError) as error:
            raise CheckpointError(f"{path} is no safetensors file: {describe(error)}") from error

    def __getitem__(self, uid: str) -> nn.Module:
        if uid not in self._modules:
            weights = self.weights(uid)
            module = build_run_module(self.run, uid, allowed_modules=self._allowed)
            try:
                module.load_state_dict(weights)
            except RuntimeError as error:
                said = f"the weights of {uid} do not fit the run's {self.run.expert}: {error}"
                raise CheckpointError(said) from error
            self._modules[uid] = module.eval()
        return self._modules[uid]

    def __iter__(self) -> Iterator[str]:
        return iter(self.index)

    def __len__(self) -> int:
        return len(self.index)


def load_export(folder: str | Path, *, allowed_modules: Collection[str] = ()) -> ExportedExperts:
    """Return the experts of an export, without the network. See `ExportedExperts`.

    Raises: CheckpointError if the folder is no export.
    """
    return ExportedExperts(folder, allowed_modules=allowed_modules)
