"""The run manifest: what one training run consists of, signed by whoever starts it. No I/O.

A volunteer who joins by the run's name takes everything from it (expert class and sizes, optimizer, schedule, schemas,
codecs, grid), so nobody can start with wrong flags. The manifest carries its own signature: any node may store a copy,
and so the run outlives the computer that started it. A run's full name is ``NAME@PEER_ID`` of its signer, its *owner*;
the bare name will do as long as only one signer uses it. Who may take part says `mode`, and `experts.authority` asks.

On the wire it is a signed record (`experts.signed`) whose body is a map. In the network it lies in numbered parts, each
with the first bytes of the whole one's hash.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from tesseract_async.errors import ProtocolError
from tesseract_async.experts.manifest import MAX_COORDINATE, MAX_DIMS, MODES, RunTag, is_prefix
from tesseract_async.experts.pattern import ExpertPattern
from tesseract_async.experts.signed import MAX_SIGNED_BYTES, Format
from tesseract_async.identity import Identity, PeerID

Value = str | int | float | bool | None
"""What an option may be."""

MAX_PART_BYTES: Final = 850
MAX_OPTIONS: Final = 64
MAX_TEXT: Final = 256
MAX_DELEGATES: Final = 4
MAX_SCHEMA_DEPTH: Final = 10
"""Of schemas as data: two levels more than `wire.tensors` builds."""
MAX_SCHEMA_ITEMS: Final = 2048

_DIGEST: Final = 8
_GENESIS: Final = re.compile(r"seed|(founder|file):[0-9a-f]{64}")
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class RunMismatch(ValueError):
    """What this node was told, or what it built, differs from the run's manifest; holds both values of each field."""

    def __init__(self, run: str, differences: Mapping[str, tuple[Any, Any]]) -> None:
        """`differences`: field -> (the run's value, this node's)."""
        super().__init__(run, differences)
        self.run = run
        self.differences = dict(differences)

    def __str__(self) -> str:
        parts = (
            f"{name} is {theirs!r} in the run, but {ours!r} here" for name, (theirs, ours) in self.differences.items()
        )
        return f"this does not fit the run {self.run}: {'; '.join(parts)}"


@dataclass(frozen=True, slots=True)
class RunManifest:
    """What every server and trainer of a run must agree on. Schemas are as `wire.tensors.encode_schema` makes them."""

    name: str
    prefix: str
    """Of the experts' uids."""
    grid_size: tuple[int, ...]
    expert: str
    """A registered name, or ``module:builder``, which a volunteer must allow."""
    sizes: Mapping[str, Value] = field(default_factory=dict)
    """What the expert's class is built with."""
    optimizer: str | None = "adam"
    """A registered name; None freezes the experts."""
    optimizer_options: Mapping[str, Value] = field(default_factory=dict)
    schedule: str | None = None
    """A registered name of a learning-rate schedule."""
    schedule_options: Mapping[str, Value] = field(default_factory=dict)
    training: Mapping[str, Value] = field(default_factory=dict)
    """How steps are taken: ``max_batch_size``, ``clip_norm`` and the like."""
    codecs: Mapping[str, Value] = field(default_factory=dict)
    """The one codec that ``inputs``, ``outputs`` or ``gradients`` travel in; what is not named may travel in any."""
    seed: int = 0
    """Of the experts' first weights, together with their uids: two servers that start the same one start equal."""
    args_schema: Sequence[Any] = ()
    kwargs_schema: Mapping[str, Any] = field(default_factory=dict)
    outputs_schema: Any = ()
    created: int = 0
    """Milliseconds since 1970. Of two manifests of one signer under one name, the later one holds."""
    mode: str = "granted"
    """``granted``: who hosts or trains has a grant of the owner's. ``open``: everybody may who is not revoked.
    ``bare``: a run of version 0.1, which says nothing of this; its experts are found by their bare names."""
    delegates: Sequence[bytes] = ()
    """Grants with the role ``admit`` of those who may grant, revoke and appoint beside the owner."""
    genesis: str = "seed"
    """Where an expert's first state comes from: ``seed``; ``founder:`` and the id of the peer that has it; ``file:``
    and the root of the checkpoint that it is."""
    num_replicas: int = 3
    """Servers that should hold each expert's state."""
    lease: float = 30.0
    """Seconds of silence after which another server may lead an expert."""
    sync_every: float = 30.0
    """Seconds between two states that an expert's other servers fetch."""
    may_restart: bool = True
    """Whether an expert whose every copy is lost may begin again as `genesis` says."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "grid_size", tuple(self.grid_size))
        object.__setattr__(self, "delegates", tuple(self.delegates))
        try:
            _check(self)
        except ProtocolError as error:
            raise ValueError(str(error)) from None
        # as they come back from the wire, so that what is equal there is equal here
        for name in ("args_schema", "kwargs_schema", "outputs_schema"):
            object.__setattr__(self, name, _plain(getattr(self, name)))

    @property
    def pattern(self) -> ExpertPattern:
        """All uids of the run."""
        return ExpertPattern(self.prefix, tuple(map(range, self.grid_size)))

    def fields(self) -> dict[str, Any]:
        """Every single value by a printable name: ``grid_size``, ``sizes.in_features``, ``args_schema``."""
        found: dict[str, Any] = {}
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Mapping) and not item.name.endswith("_schema"):
                found |= {f"{item.name}.{key}": option for key, option in value.items()}
            else:
                found[item.name] = value
        return found

    def check(self, ours: Mapping[str, Any], *, run: str | None = None) -> None:
        """Compares values by their names in `fields` with this manifest's; what it lacks counts as None.

        Raises: RunMismatch with both values of each that differs.
        """
        theirs = self.fields()
        plain = {name: _plain(value) for name, value in ours.items()}
        differences = {
            name: (theirs.get(name), value) for name, value in plain.items() if _plain(theirs.get(name)) != value
        }
        if differences:
            raise RunMismatch(run or self.name, differences)


@dataclass(frozen=True, slots=True)
class SignedRun:
    """A run manifest with the proof of who wrote it."""

    manifest: RunManifest
    signer: PeerID
    blob: bytes
    """The whole on the wire."""

    @property
    def full_name(self) -> str:
        """``NAME@PEER_ID``: what nobody else can sign."""
        return f"{self.manifest.name}@{self.signer}"

    @property
    def tag(self) -> RunTag | None:
        """What names the run in its servers' manifests; None for a run of bare names."""
        return None if self.manifest.mode == "bare" else RunTag(self.signer, self.manifest.name, self.manifest.mode)


def sign_run(identity: Identity, manifest: RunManifest) -> SignedRun:
    """Sign. Raises: ValueError if the manifest is too large."""
    return RUNS.sign(identity, _plain(dataclasses.asdict(manifest)))


def _signed_run(data: object, signer: PeerID, blob: bytes, digest: bytes) -> SignedRun:
    if type(data) is not dict:
        raise ProtocolError("a run manifest is a map")
    names = [item.name for item in dataclasses.fields(RunManifest)]
    if "mode" not in data:  # of version 0.1, which had no more than these
        names = names[: names.index("mode")]
        data["mode"] = "bare"
    if missing := [name for name in names if name not in data]:
        raise ProtocolError(f"a run manifest without {missing[0]}")
    values = {name: data[name] for name in (*names, "mode")}
    if type(values["grid_size"]) is not list or type(values.get("delegates", [])) is not list:
        raise ProtocolError("a run's grid_size and delegates are lists")
    try:
        manifest = RunManifest(**values)
    except ValueError as error:
        raise ProtocolError(str(error)) from None
    return SignedRun(manifest, signer, blob)


RUNS: Final = Format(b"tesseract run 1\0", _signed_run, max_bytes=MAX_SIGNED_BYTES)


def split_run(blob: bytes) -> list[bytes]:
    """The parts in which a signed run lies in the network, each at most `MAX_PART_BYTES`."""
    digest = hashlib.sha256(blob).digest()[:_DIGEST]
    room = MAX_PART_BYTES - _DIGEST - 2
    chunks = [blob[start : start + room] for start in range(0, len(blob), room)]
    return [digest + bytes([number, len(chunks)]) + chunk for number, chunk in enumerate(chunks)]


def join_run(parts: Iterable[Any]) -> list[SignedRun]:
    """The signed runs that these parts of one owner make up. Untrusted: what does not fit or hold is left out."""
    chunks: dict[tuple[bytes, int], dict[int, bytes]] = {}
    for part in parts:
        if type(part) is bytes and _DIGEST + 2 < len(part) <= MAX_PART_BYTES:
            digest, number, total = part[:_DIGEST], part[_DIGEST], part[_DIGEST + 1]
            if number < total:
                chunks.setdefault((digest, total), {})[number] = part[_DIGEST + 2 :]
    found = []
    for (digest, total), numbered in chunks.items():
        if len(numbered) != total:
            continue
        blob = b"".join(numbered[number] for number in range(total))
        if hashlib.sha256(blob).digest()[:_DIGEST] != digest:
            continue
        try:
            found.append(RUNS.read(blob))
        except ProtocolError:
            continue
    return found


def newest_by_signer(runs: Iterable[SignedRun], name: str) -> dict[PeerID, SignedRun]:
    """Of each signer, the latest manifest of this name. (Equal times are decided the same way everywhere.)"""
    found: dict[PeerID, SignedRun] = {}
    for run in runs:
        known = found.get(run.signer)
        if run.manifest.name != name:
            continue
        if known is None or (run.manifest.created, run.blob) > (known.manifest.created, known.blob):
            found[run.signer] = run
    return found


def split_run_name(text: str) -> tuple[str, PeerID | None]:
    """``NAME`` or ``NAME@PEER_ID``. Raises: ValueError."""
    name, separator, signer = text.partition("@")
    if not _NAME.fullmatch(name):
        raise ValueError(f"a run's name has 1 to 64 letters, digits, dots, dashes or underscores: {name!r}")
    return name, PeerID.parse(signer) if separator else None


def run_key(name: str) -> str:
    """Where manifests of runs of this name are stored."""
    return f"runs/{name}"


def _check(manifest: RunManifest) -> None:
    """Types, sizes and ranges: of an own one, and of what strangers wrote. Raises: ProtocolError."""
    if type(manifest.name) is not str or not _NAME.fullmatch(manifest.name):
        raise ProtocolError("a run's name has 1 to 64 letters, digits, dots, dashes or underscores")
    if not _is_text(manifest.prefix) or not is_prefix(manifest.prefix):
        raise ProtocolError("a run's prefix is the first part of uids, such as ffn")
    if not 0 < len(manifest.grid_size) <= MAX_DIMS or any(
        type(size) is not int or not 0 < size <= MAX_COORDINATE + 1 for size in manifest.grid_size
    ):
        raise ProtocolError(f"a run's grid_size is 1 to {MAX_DIMS} numbers above 0")
    if not _is_text(manifest.expert):
        raise ProtocolError("a run's expert is a name")
    for name in ("optimizer", "schedule"):
        if getattr(manifest, name) is not None and not _is_text(getattr(manifest, name)):
            raise ProtocolError(f"a run's {name} is a name, or none")
    for name in ("sizes", "optimizer_options", "schedule_options", "training", "codecs"):
        options = getattr(manifest, name)
        if not isinstance(options, Mapping) or len(options) > MAX_OPTIONS:
            raise ProtocolError(f"a run's {name} is a map of at most {MAX_OPTIONS} options")
        for key, value in options.items():
            if type(key) is not str or not key.isidentifier() or len(key) > 64:
                raise ProtocolError(f"a run's {name} have names such as in_features")
            if not _is_value(value):
                raise ProtocolError(f"{name}.{key} of a run is no text, number or truth value")
    for name in ("seed", "created"):
        if type(getattr(manifest, name)) is not int or not 0 <= getattr(manifest, name) < 2**63:
            raise ProtocolError(f"a run's {name} is a number, 0 or more")
    if manifest.mode not in MODES:
        raise ProtocolError(f"a run's mode is one of {', '.join(MODES)}")
    if len(manifest.delegates) > MAX_DELEGATES or any(type(grant) is not bytes for grant in manifest.delegates):
        raise ProtocolError(f"a run has at most {MAX_DELEGATES} delegates, each a signed grant")
    if type(manifest.genesis) is not str or not _GENESIS.fullmatch(manifest.genesis):
        raise ProtocolError("a run's genesis is seed, founder:PEER_ID or file:ROOT")
    if type(manifest.num_replicas) is not int or not 0 < manifest.num_replicas <= 16:
        raise ProtocolError("a run's num_replicas is 1 to 16")
    for name in ("lease", "sync_every"):
        if type(getattr(manifest, name)) not in (int, float) or not 0.1 <= getattr(manifest, name) <= 86400:
            raise ProtocolError(f"a run's {name} is 0.1 to 86,400 seconds")
    if type(manifest.may_restart) is not bool:
        raise ProtocolError("a run's may_restart is true or false")
    if not isinstance(manifest.args_schema, list | tuple) or not isinstance(manifest.kwargs_schema, Mapping):
        raise ProtocolError("a run's args_schema is a list and its kwargs_schema a map")
    budget = [MAX_SCHEMA_ITEMS]
    for schema in (manifest.args_schema, manifest.kwargs_schema, manifest.outputs_schema):
        _check_schema(schema, budget, MAX_SCHEMA_DEPTH)


def _check_schema(part: Any, budget: list[int], depth: int) -> None:
    budget[0] -= 1
    if depth == 0 or budget[0] < 0:
        raise ProtocolError("a run's schema is too large")
    if isinstance(part, Mapping):
        if not all(_is_text(key) for key in part):
            raise ProtocolError("a schema's keys are strings")
        for item in part.values():
            _check_schema(item, budget, depth - 1)
    elif isinstance(part, list | tuple):
        for item in part:
            _check_schema(item, budget, depth - 1)
    elif type(part) is not int and not _is_text(part):
        raise ProtocolError("malformed schema")


def _is_text(value: Any) -> bool:
    return type(value) is str and 0 < len(value) <= MAX_TEXT and value.isprintable()


def _is_value(value: Any) -> bool:
    if type(value) is float:
        return math.isfinite(value)
    if type(value) is int:
        return -(2**63) <= value < 2**63
    return (
        value is None or type(value) is bool or (type(value) is str and len(value) <= MAX_TEXT and value.isprintable())
    )


def _plain(value: Any) -> Any:
    """Tuples as lists, any mapping as dict: as it comes back from the wire."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
