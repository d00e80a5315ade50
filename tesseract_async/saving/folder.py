"""A saved model as a folder, which loads without the swarm.

::

    folder/
      model.json                                 what is in it: runs' manifests, how modules are built, each file
      model.safetensors                          gates and trunk; any safetensors reader loads them
      experts/ffn.3.7-0f1e2d3c.safetensors       an expert's weights, whose names begin with ``module/``
      trainer.safetensors                        a trainer's own state, if it was saved

New files are listed once all of them are there, and old ones are dropped once they are no longer listed: whenever
saving stops, the folder holds either the old save point or the new one.
"""

import base64
import contextlib
import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import quote

import safetensors
import safetensors.torch
import torch
from torch import nn

from tesseract_async.errors import CheckpointError, ProtocolError, describe
from tesseract_async.experts.manifest import split_uid
from tesseract_async.experts.run import RUNS, SignedRun
from tesseract_async.experts.trust import SHARED
from tesseract_async.files import mapped, write_whole
from tesseract_async.runtime.states import StateDict
from tesseract_async.runtime.structure import Described, rebuild_module
from tesseract_async.server.checkpoint import check_state, decode_state, encode_state
from tesseract_async.server.run_experts import build_run_module

FORMAT: Final = "tesseract model 1"
INDEX: Final = "model.json"
TENSORS: Final = "model"
TRAINER: Final = "trainer"


class SavedExpert(NamedTuple):
    """One expert, or a piece of shared parameters, in the index."""

    file: str
    """The file's path, relative to the folder."""
    version: int
    """Optimizer steps taken."""
    root: str
    """The file's `experts.pieces.root_of`, in hexadecimal digits."""
    origin: str
    """The role of the server that gave it; see `saver.Origin`."""
    is_whole: bool
    """True if it has the optimizer and the journal, so that a server can go on from it."""
    structure: int | None
    """The number of its structure in the index."""


@dataclass(slots=True)
class SavedModel:
    path: Path
    runs: dict[str, SignedRun] = field(default_factory=dict)
    """The runs, by prefix."""
    experts: dict[str, SavedExpert] = field(default_factory=dict)
    structures: list[Described] = field(default_factory=list)
    """Descriptions of the experts' modules (`runtime.structure`)."""
    model: Described | None = None
    """The description of the rest of the model, with gates by their settings; None if it is not known."""
    files: dict[str, str] = field(default_factory=dict)
    """The other parts that are there: ``model`` and ``trainer``."""
    sums: dict[str, str] = field(default_factory=dict)
    """SHA-256 of ``model``'s file."""

    def add_run(self, run: SignedRun) -> None:
        """Hold experts of this run. Raises: ValueError if another one's are there."""
        known = self.runs.get(run.manifest.prefix)
        if known is not None and (known.signer, known.manifest.name) != (run.signer, run.manifest.name):
            raise ValueError(f"{self.path} holds experts of {known.full_name}, not of {run.full_name}")
        self.runs[run.manifest.prefix] = run

    def put_expert(self, uid: str, data: bytes | memoryview, root: bytes, origin: str, *, is_whole: bool) -> None:
        """Write an expert's file as it came. Raises: ProtocolError for what is no state of it; OSError."""
        state = check_state(uid, data, weights_only=not is_whole)
        structure, number = state.get("structure"), None
        if isinstance(structure, dict):
            if structure not in self.structures:
                self.structures.append(structure)
            number = self.structures.index(structure)
        file = f"experts/{quote(uid, safe='')}-{root.hex()[:8]}.safetensors"
        write_whole(self.path / file, [data])
        self.experts[uid] = SavedExpert(file, state["version"], root.hex(), origin, is_whole, number)

    def put_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write gates and trunk. Raises: OSError."""
        data = safetensors.torch.save({name: one.contiguous() for name, one in tensors.items()}, {"format": "pt"})
        self.sums[TENSORS] = hashlib.sha256(data).hexdigest()
        self.files[TENSORS] = f"model-{self.sums[TENSORS][:8]}.safetensors"
        write_whole(self.path / self.files[TENSORS], [data])

    def put_trainer(self, state: StateDict) -> None:
        """Write a trainer's own state: tensors and plain values. Raises: TypeError for others; OSError."""
        data = b"".join(encode_state(state))
        self.files[TRAINER] = f"trainer-{hashlib.sha256(data).hexdigest()[:8]}.safetensors"
        write_whole(self.path / self.files[TRAINER], [data])

    def write_index(self) -> None:
        """List the files of this save point, and drop those that are not listed. Raises: OSError."""
        index = {
            "format": FORMAT,
            "runs": {prefix: base64.b64encode(run.blob).decode() for prefix, run in self.runs.items()},
            "experts": {uid: one._asdict() for uid, one in sorted(self.experts.items())},
            "structures": self.structures,
            "model": self.model,
            "files": self.files,
            "sums": self.sums,
        }
        write_whole(self.path / INDEX, [json.dumps(index, indent=1).encode()])
        listed = {*self.files.values(), *(one.file for one in self.experts.values())}
        for old in [*self.path.glob("*.safetensors"), *self.path.glob("experts/*.safetensors")]:
            if str(old.relative_to(self.path).as_posix()) not in listed:
                with contextlib.suppress(OSError):
                    old.unlink()

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return gates and trunk. Raises: CheckpointError if they are not there or damaged."""
        path = self._path_of(TENSORS)
        try:
            data = path.read_bytes()
            if hashlib.sha256(data).hexdigest() != self.sums.get(TENSORS):
                raise CheckpointError(f"{path} is damaged: its checksum is wrong")
            return safetensors.torch.load(data)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {describe(error)}") from error
        except (safetensors.SafetensorError, KeyError, ValueError) as error:
            raise CheckpointError(f"{path} is no safetensors file: {describe(error)}") from error

    def trainer(self) -> StateDict:
        """Return what `put_trainer` was given. Raises: CheckpointError if it is not there or damaged."""
        path = self._path_of(TRAINER)
        try:
            return decode_state(mapped(path))
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {describe(error)}") from error

    def _path_of(self, part: str) -> Path:
        if part not in self.files:
            raise CheckpointError(f"{self.path} holds no {part}: it was saved without")
        return self.path / self.files[part]

    def state(self, uid: str) -> StateDict:
        """Return an expert's state as it was saved. Raises: KeyError; CheckpointError for a damaged file."""
        entry = self.experts[uid]
        path = self.path / entry.file
        try:
            state = check_state(uid, mapped(path), weights_only=not entry.is_whole)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {describe(error)}") from error
        except ProtocolError as error:
            raise CheckpointError(f"{path} is damaged: {describe(error)}") from error
        if state["version"] != entry.version:
            raise CheckpointError(f"{path} holds another version than {INDEX} says")
        return state


def open_folder(folder: str | Path) -> SavedModel:
    """Return what a folder holds. Raises: CheckpointError if it holds no saved model."""
    path = Path(folder) / INDEX
    try:
        index = json.loads(path.read_bytes())
        if index["format"] != FORMAT:
            raise CheckpointError(f"{path}: {str(index['format'])[:40]!r} is not {FORMAT!r}")
        experts = {str(uid): _entry(one, len(index["structures"])) for uid, one in index["experts"].items()}
        for uid in experts:
            split_uid(uid)
        model = index["model"]
        return SavedModel(
            Path(folder),
            {str(prefix): RUNS.read(base64.b64decode(blob)) for prefix, blob in index["runs"].items()},
            experts,
            [dict(one) for one in index["structures"]],
            None if model is None else dict(model),
            {str(part): _inside(file) for part, file in index["files"].items()},
            {str(part): str(one) for part, one in index["sums"].items()},
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, ProtocolError) as error:
        raise CheckpointError(f"{path} is no saved model: {describe(error)}") from error


def open_folder_or_make(folder: str | Path) -> SavedModel:
    """Return what a folder holds, or one that is empty; nothing is written yet. Raises: CheckpointError if damaged."""
    return open_folder(folder) if (Path(folder) / INDEX).exists() else SavedModel(Path(folder))


def _entry(one: Mapping[str, object], num_structures: int) -> SavedExpert:
    entry = SavedExpert(**one)  # type: ignore[arg-type]
    number = entry.structure
    if type(entry.version) is not int or not (number is None or (type(number) is int and 0 <= number < num_structures)):
        raise ValueError("malformed entry")
    return entry._replace(file=_inside(entry.file), root=str(entry.root), origin=str(entry.origin))


def _inside(file: object) -> str:
    if not isinstance(file, str) or Path(file).is_absolute() or ".." in Path(file).parts:
        raise ValueError(f"{file!r} leads out of the folder")
    return file


class SavedExperts(Mapping[str, nn.Module]):
    """The experts of a saved model by uid, without the network: ordinary modules, in eval mode, each made when it is
    asked for first."""

    def __init__(self, folder: str | Path | SavedModel, *, allowed_modules: Collection[str] = ()) -> None:
        """`allowed_modules`: those from which code may be imported that builds them. Raises: CheckpointError."""
        self.saved = folder if isinstance(folder, SavedModel) else open_folder(folder)
        self.index = {uid: one for uid, one in self.saved.experts.items() if not split_uid(uid)[0].endswith(SHARED)}
        self._allowed = tuple(allowed_modules)
        self._modules: dict[str, nn.Module] = {}

    def weights(self, uid: str) -> dict[str, torch.Tensor]:
        """Return an expert's weights without building it. Raises: KeyError; CheckpointError for a damaged file."""
        weights: dict[str, torch.Tensor] = self.saved.state(uid)["module"]
        return weights

    def __getitem__(self, uid: str) -> nn.Module:
        if uid not in self._modules:
            weights, number = self.weights(uid), self.index[uid].structure
            run = self.saved.runs.get(split_uid(uid)[0])
            if run is not None:
                module = build_run_module(run.manifest, uid, allowed_modules=self._allowed)
                try:
                    module.load_state_dict(weights)
                except RuntimeError as error:
                    said = f"the weights of {uid} do not fit the run's {run.manifest.expert}: {error}"
                    raise CheckpointError(said) from error
            elif number is None:
                raise CheckpointError(f"its server did not say how {uid} is built: load its weights into your module")
            else:
                own = {name: tensor.clone() for name, tensor in weights.items()}
                module = rebuild_module(self.saved.structures[number], own, allowed_modules=self._allowed)
            self._modules[uid] = module.eval()
        return self._modules[uid]

    def __iter__(self) -> Iterator[str]:
        return iter(self.index)

    def __len__(self) -> int:
        return len(self.index)
