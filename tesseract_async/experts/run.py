"""The run manifest: what one training run consists of, signed by its owner. No I/O.

A volunteer who joins by the run's name takes everything from it (expert class and sizes, optimizer, schedule, schemas,
codecs, grid), so nobody can start with wrong flags. The manifest carries its own signature: any node may store a copy,
and so the run outlives the computer that started it. A run's full name is ``NAME@PEER_ID`` of its signer, its *owner*;
the bare name is enough as long as only one signer uses it. `mode` says who may take part (`experts.authority`).

On the wire it is a signed record (`experts.signed`) whose body is a map. In the network it lies in numbered parts, each
with the first bytes of the whole one's hash.
"""

import contextlib
import dataclasses
import hashlib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from tesseract_async.errors import ProtocolError
from tesseract_async.experts.manifest import MAX_COORDINATE, MAX_DIMS, MODES, RunTag, is_prefix
from tesseract_async.experts.pattern import ExpertPattern
from tesseract_async.experts.signed import MAX_SIGNED_BYTES, Format
from tesseract_async.identity import Identity, PeerID

Scalar = str | int | float | bool | None
"""An option's value."""

MAX_PART_BYTES: Final = 850
MAX_OPTIONS: Final = 64
MAX_TEXT: Final = 256
MAX_DELEGATES: Final = 4
MAX_SHARDS: Final = 384
MAX_SCHEMA_DEPTH: Final = 10
"""The most levels of a schema as data: two more than `wire.tensors` builds."""
MAX_SCHEMA_ITEMS: Final = 2048

_DIGEST: Final = 8
_GENESIS: Final = re.compile(r"seed|shards|(founder|file):[0-9a-f]{64}")
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class RunMismatch(ValueError):
    """This node's settings, or what it built, differ from the run's manifest; holds both values of each field."""

    def __init__(self, run: str, differences: Mapping[str, tuple[object, object]]) -> None:
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
    """All that a run's servers and trainers must agree on. Schemas are as `wire.tensors.encode_schema` makes them."""

    name: str
    prefix: str
    """The first part of the experts' uids."""
    grid_size: tuple[int, ...]
    expert: str
    """A registered name, or ``module:builder``, which a volunteer must allow."""
    sizes: Mapping[str, Scalar] = field(default_factory=dict)
    """Arguments of the expert's class."""
    optimizer: str | None = "adam"
    """A registered name; None freezes the experts."""
    optimizer_options: Mapping[str, Scalar] = field(default_factory=dict)
    schedule: str | None = None
    """A registered name of a learning-rate schedule."""
    schedule_options: Mapping[str, Scalar] = field(default_factory=dict)
    training: Mapping[str, Scalar] = field(default_factory=dict)
    """Options of training: ``max_batch_size``, ``clip_norm`` and the like."""
    codecs: Mapping[str, Scalar] = field(default_factory=dict)
    """The codec that ``inputs``, ``outputs`` or ``gradients`` must have; those that are not named may have any."""
    seed: int = 0
    """The first weights of an expert follow from this and its uid: two servers that start the same one start equal."""
    args_schema: Sequence[object] = ()
    kwargs_schema: Mapping[str, object] = field(default_factory=dict)
    outputs_schema: object = ()
    created: int = 0
    """Milliseconds since 1970. Of two manifests of one signer under one name, the later one holds."""
    mode: str = "granted"
    """``granted``: hosts and trainers need a grant of the owner's. ``open``: all but revoked peers may take part."""
    delegates: Sequence[bytes] = ()
    """Grants with the role ``admit`` of those who may grant, revoke and appoint besides the owner."""
    genesis: str = "seed"
    """The source of first states: ``seed``; ``founder:`` and the id of the peer that has them; ``file:`` and the root
    of the parameters that trainers share (`SharedParameters.genesis_of`), while experts begin as with ``seed``;
    ``shards``: the files of a checkpoint of Hugging Face."""
    shards: Sequence[bytes] = ()
    """The SHA-256 of each of these files."""
    first: int = 0
    """The first coordinate in the grid's first dimension: in a model, the first layer that has experts."""
    num_replicas: int = 3
    """Servers that should hold each expert's state."""
    lease: float = 30.0
    """Seconds of silence after which another server may become an expert's primary."""
    sync_every: float = 30.0
    """Seconds between two states that an expert's other servers fetch."""
    may_restart: bool = True
    """True if an expert may begin again, as `genesis` says, once all copies are lost."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "grid_size", tuple(self.grid_size))
        object.__setattr__(self, "delegates", tuple(self.delegates))
        object.__setattr__(self, "shards", tuple(self.shards))
        _check(self)
        # as they come back from the wire, so that what is equal there is equal here
        for name in ("args_schema", "kwargs_schema", "outputs_schema"):
            object.__setattr__(self, name, _plain(getattr(self, name)))

    @property
    def pattern(self) -> ExpertPattern:
        return ExpertPattern(self.prefix, (range(self.first, self.grid_size[0]), *map(range, self.grid_size[1:])))

    def fields(self) -> dict[str, object]:
        """Return every single value by a printable name: ``grid_size``, ``sizes.in_features``, ``args_schema``."""
        found: dict[str, object] = {}
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Mapping) and not item.name.endswith("_schema"):
                found |= {f"{item.name}.{key}": option for key, option in value.items()}
            else:
                found[item.name] = value
        return found

    def check(self, ours: Mapping[str, object], *, run: str | None = None) -> None:
        """Compare values by their names in `fields` with this manifest's; what it lacks counts as None.

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
    manifest: RunManifest
    signer: PeerID
    blob: bytes
    """The whole on the wire."""

    @property
    def full_name(self) -> str:
        """``NAME@PEER_ID``: what nobody else can sign."""
        return f"{self.manifest.name}@{self.signer}"

    @property
    def tag(self) -> RunTag:
        """The run's name in its servers' manifests."""
        return RunTag(self.signer, self.manifest.name, self.manifest.mode)


def sign_run(identity: Identity, manifest: RunManifest) -> SignedRun:
    """Sign a manifest. Raises: ValueError if it is too large."""
    return RUNS.sign(identity, _plain(dataclasses.asdict(manifest)))


def _signed_run(data: object, signer: PeerID, blob: bytes, digest: bytes) -> SignedRun:
    if type(data) is not dict:
        raise ProtocolError("a run manifest is a map")
    names = [item.name for item in dataclasses.fields(RunManifest)]
    if missing := [name for name in names if name not in data]:
        raise ProtocolError(f"a run manifest without {missing[0]}")
    values = {name: data[name] for name in names}
    if any(type(values[name]) is not list for name in ("grid_size", "delegates", "shards")):
        raise ProtocolError("a run's grid_size, delegates and shards are lists")
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


def join_run(parts: Iterable[object]) -> list[SignedRun]:
    """The signed runs that these parts of one owner make up. Untrusted: what does not fit or hold is left out."""
    chunks: dict[tuple[bytes, int], dict[int, bytes]] = {}
    for part in parts:
        if type(part) is bytes and _DIGEST + 2 < len(part) <= MAX_PART_BYTES:
            digest, number, total = part[:_DIGEST], part[_DIGEST], part[_DIGEST + 1]
            chunks.setdefault((digest, total), {})[number] = part[_DIGEST + 2 :]
    found = []
    for (digest, total), numbered in chunks.items():
        blob = b"".join(numbered.get(number, b"") for number in range(total))
        if hashlib.sha256(blob).digest()[:_DIGEST] == digest:
            with contextlib.suppress(ProtocolError):
                found.append(RUNS.read(blob))
    return found


def newest_by_signer(runs: Iterable[SignedRun], name: str) -> dict[PeerID, SignedRun]:
    """For each signer its latest manifest of this name. (Equal times are decided the same way everywhere.)"""
    ordered = sorted(runs, key=lambda run: (run.manifest.created, run.blob))
    return {run.signer: run for run in ordered if run.manifest.name == name}


def split_run_name(text: str) -> tuple[str, PeerID | None]:
    """Split ``NAME`` or ``NAME@PEER_ID``. Raises: ValueError."""
    name, separator, signer = text.partition("@")
    if not _is_name(name):
        raise ValueError(f"a run's name {_NAME_RULE}: {name!r}")
    return name, PeerID.parse(signer) if separator else None


def run_key(name: str) -> str:
    return f"runs/{name}"


# -- what fields may hold: in a manifest that is made here, and in what strangers wrote --------------------------------


def _is_text(value: object) -> bool:
    return type(value) is str and 0 < len(value) <= MAX_TEXT and value.isprintable()


def _is_name(value: object) -> bool:
    return type(value) is str and _NAME.fullmatch(value) is not None


def _is_number(value: object, least: int = 0, most: int = 2**63 - 1) -> bool:
    return type(value) is int and least <= value <= most


def _is_grid(value: object) -> bool:
    if not isinstance(value, tuple) or not 0 < len(value) <= MAX_DIMS:
        return False
    return all(_is_number(size, 1, MAX_COORDINATE + 1) for size in value)


def _is_option(value: object) -> bool:
    if type(value) is float:
        return math.isfinite(value)
    if type(value) is str:
        return value == "" or _is_text(value)
    return value is None or type(value) is bool or _is_number(value, -(2**63))


def _are_options(value: object) -> bool:
    if not isinstance(value, Mapping) or len(value) > MAX_OPTIONS:
        return False
    names = (type(key) is str and key.isidentifier() and len(key) <= 64 for key in value)
    return all(names) and all(map(_is_option, value.values()))


def _are_bytes(value: object, most: int, length: int | None = None) -> bool:
    if not isinstance(value, tuple) or len(value) > most:
        return False
    return all(type(one) is bytes and length in (None, len(one)) for one in value)


def _are_seconds(value: object) -> bool:
    return isinstance(value, int | float) and type(value) is not bool and 0.1 <= value <= 86400


_NAME_RULE: Final = "has 1 to 64 letters, digits, dots, dashes or underscores"
_OPTIONS = (
    _are_options,
    f"maps at most {MAX_OPTIONS} names, such as in_features, to texts, numbers or truth values",
)
_NAME_OR_NONE = (lambda value: value is None or _is_text(value), "is a name, or none")
_RULES: Final[Mapping[str, tuple[Callable[[object], bool], str]]] = {
    "name": (_is_name, _NAME_RULE),
    "prefix": (lambda value: _is_text(value) and is_prefix(str(value)), "is the first part of uids, such as ffn"),
    "grid_size": (_is_grid, f"is 1 to {MAX_DIMS} numbers above 0"),
    "expert": (_is_text, "is a name"),
    **dict.fromkeys(("optimizer", "schedule"), _NAME_OR_NONE),
    **dict.fromkeys(("sizes", "optimizer_options", "schedule_options", "training", "codecs"), _OPTIONS),
    **dict.fromkeys(("seed", "created"), (_is_number, "is a number, 0 or more")),
    "mode": (lambda value: value in MODES[1:], f"is one of {', '.join(MODES[1:])}"),
    "delegates": (lambda value: _are_bytes(value, MAX_DELEGATES), f"are at most {MAX_DELEGATES} signed grants"),
    "shards": (lambda value: _are_bytes(value, MAX_SHARDS, 32), f"are at most {MAX_SHARDS} digests of 32 bytes"),
    "first": (lambda value: _is_number(value, 0, MAX_COORDINATE), "is a number, 0 or more"),
    "genesis": (
        lambda value: type(value) is str and _GENESIS.fullmatch(value) is not None,
        "is seed, founder:PEER_ID, file:ROOT or shards",
    ),
    "num_replicas": (lambda value: _is_number(value, 1, 16), "is 1 to 16"),
    **dict.fromkeys(("lease", "sync_every"), (_are_seconds, "is 0.1 to 86,400 seconds")),
    "may_restart": (lambda value: type(value) is bool, "is true or false"),
    "args_schema": (lambda value: isinstance(value, list | tuple), "is a list"),
    "kwargs_schema": (lambda value: isinstance(value, Mapping), "is a map"),
}


def _check(manifest: RunManifest) -> None:
    """Raises: ValueError."""
    for name, (holds, rule) in _RULES.items():
        if not holds(getattr(manifest, name)):
            raise ValueError(f"a run's {name} {rule}")
    if manifest.first >= manifest.grid_size[0]:
        raise ValueError("a run's first coordinate lies in its grid")
    if (manifest.genesis == "shards") != bool(manifest.shards):
        raise ValueError("a run whose genesis is shards names their digests")
    budget = [MAX_SCHEMA_ITEMS]
    for schema in (manifest.args_schema, manifest.kwargs_schema, manifest.outputs_schema):
        _check_schema(schema, budget, MAX_SCHEMA_DEPTH)


def _check_schema(part: object, budget: list[int], depth: int) -> None:
    budget[0] -= 1
    if depth == 0 or budget[0] < 0:
        raise ValueError("a run's schema is too large")
    items: Iterable[object] = ()
    if isinstance(part, Mapping) and all(map(_is_text, part)):
        items = part.values()
    elif isinstance(part, list | tuple):
        items = part
    elif type(part) is not int and not _is_text(part):
        raise ValueError("a run's schema consists of lists, maps with text keys, texts and numbers")
    for item in items:
        _check_schema(item, budget, depth - 1)


def _plain(value: object) -> object:
    """Return tuples as lists and any mapping as a dict, as they come back from the wire."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
