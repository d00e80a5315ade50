"""Reads some experts of a Transformers checkpoint, and nothing else of it.

Transformers' own conversion turns the names and layouts of a family's files into its modules' parameters; it is given
only the tensors of the experts that are wanted, which are read from the files when it asks for them.
"""

import contextlib
import copy
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from tesseract_async.transformers.families import check_config, experts_of, library

INDEX: Final = "model.safetensors.index.json"
SINGLE: Final = "model.safetensors"
_FLOATS: Final = ("F64", "F32", "F16", "BF16")
_SEQUENTIAL: Final = "HF_DEACTIVATE_ASYNC_LOAD"
_OF_EXPERT: Final = re.compile(r"\.experts\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Layer:
    """The experts of one layer, as the family computes them."""

    path: str
    module: nn.Module
    """The family's own, without weights."""
    num_experts: int


class Checkpoint:
    """A folder with a model that Transformers has saved. Nothing of its weights is read before `read`.

    Raises: ValueError for a folder that is not one, a family that cannot take part, or quantized weights.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, str] = files_of(folder)
        """Name of each tensor -> name of its file."""
        transformers = library()
        try:
            self.config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:  # Transformers raises anything at what such a file may say
            raise ValueError(f"{folder} holds no model that Transformers knows: {first_line(error)}") from None
        check_config(self.config)
        try:
            with torch.device("meta"):
                # else the file could name an attention kernel, which is code from elsewhere
                self._skeleton = transformers.AutoModelForCausalLM.from_config(
                    self.config, trust_remote_code=False, attn_implementation="eager"
                )
        except Exception as error:
            raise ValueError(f"{folder} holds no causal language model: {first_line(error)}") from None
        self.layers = {
            number: Layer(path, module, vars(module)["num_experts"])
            for number, (path, module) in experts_of(self._skeleton).items()
        }
        self._layer_of = {
            f"{layer.path}.{name}": number
            for number, layer in self.layers.items()
            for name, _ in layer.module.named_parameters()
        }
        self.opened: set[str] = set()
        """Names of the files of which something was read."""
        self.shards: frozenset[bytes] | None = None
        """Digests of the files that may be read; None: any."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        dtype: torch.dtype = self._skeleton.dtype
        return dtype

    def digest(self, file: str) -> bytes:
        """Return the SHA-256 of one of its files. Raises: OSError."""
        with (self.folder / file).open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").digest()

    def _check(self, file: str) -> None:
        """Raises: ValueError for a file that may not be read."""
        if self.shards is not None and file not in self.opened and self.digest(file) not in self.shards:
            raise ValueError(
                f"{self.folder / file} is not a file of the checkpoint that the run began from: its SHA-256 is "
                "another. Download the one that the run's owner names"
            )

    def tensors_of(self, wanted: Mapping[int, Sequence[int]]) -> dict[str, dict[str, tuple[int, bool]]]:
        """Return the tensors that hold these experts (layer -> ascending numbers), by file: name -> layer, and whether
        it is one expert's alone.

        Raises: ValueError for experts that the model does not have.
        """
        for number, experts in wanted.items():
            if number not in self.layers:
                first, last = min(self.layers), max(self.layers)
                raise ValueError(f"this model has no experts in layer {number}, but in {first} to {last}")
            if experts[-1] >= (most := self.layers[number].num_experts):
                raise ValueError(f"layer {number} of this model has the experts 0 to {most - 1}, and no {experts[-1]}")
        chosen = {number: frozenset(experts) for number, experts in wanted.items()}
        every = frozenset[int]().union(*chosen.values())
        rename = self._renaming()
        layers: dict[str, int | None] = {}  # experts that differ in their numbers alone are of one layer
        found: dict[str, dict[str, tuple[int, bool]]] = {}
        for key, file in self.files.items():
            own = _OF_EXPERT.search(key)
            if own is not None and int(own[1]) not in every:
                continue
            alike = _OF_EXPERT.sub(".experts.0.", key)
            if alike not in layers:
                layers[alike] = self._layer_of.get(rename(alike))
            layer = layers[alike]
            if layer is not None and layer in chosen and (own is None or int(own[1]) in chosen[layer]):
                found.setdefault(file, {})[key] = layer, own is not None
        return found

    def _renaming(self) -> Callable[[str], str]:
        from transformers import conversion_mapping
        from transformers import core_model_loading as loading

        mapping = conversion_mapping.get_model_conversion_mapping(self._skeleton)
        renamings = [one for one in mapping if isinstance(one, loading.WeightRenaming)]
        converters = [one for one in mapping if isinstance(one, loading.WeightConverter)]
        prefix, known = self._skeleton.base_model_prefix, self._skeleton.state_dict()
        return lambda key: str(loading.rename_source_key(key, renamings, converters, prefix, known)[0])

    def read(self, wanted: Mapping[int, Sequence[int]], dtype: torch.dtype) -> dict[int, dict[str, torch.Tensor]]:
        """Return the parameters of these experts (layer -> ascending numbers): layer -> name -> ``[experts, ...]``.

        Blocking. Raises: ValueError for experts that the model does not have, or files that do not hold them.
        """
        from safetensors import SafetensorError, safe_open
        from transformers import conversion_mapping, core_model_loading, modeling_utils

        tensors = self.tensors_of(wanted)
        before = {number: dict(layer.module._parameters) for number, layer in self.layers.items()}
        for number, layer in self.layers.items():
            for name, parameter in before[number].items():
                assert parameter is not None
                layer.module._parameters[name] = nn.Parameter(
                    torch.empty(len(wanted.get(number, ())), *parameter.shape[1:], dtype=dtype, device="meta"),
                    requires_grad=False,
                )
        mapping = conversion_mapping.get_model_conversion_mapping(self._skeleton)
        try:
            with contextlib.ExitStack() as opened, _quietly():
                lazy: dict[str, _Rows] = {}
                for file, inside in tensors.items():
                    self._check(file)
                    shard = opened.enter_context(safe_open(self.folder / file, "pt"))
                    self.opened.add(file)
                    for key, (number, is_alone) in inside.items():
                        lazy[key] = _Rows(key, shard.get_slice(key), None if is_alone else wanted[number])
                info, _ = core_model_loading.convert_and_load_state_dict_in_model(
                    self._skeleton, lazy, modeling_utils.LoadStateDictConfig(weight_mapping=mapping, dtype=dtype)
                )
            wrong = [*info.mismatched_keys, *info.conversion_errors, *info.error_msgs]
            found: dict[int, dict[str, torch.Tensor]] = {number: {} for number in wanted}
            for number in wanted:
                layer = self.layers[number]
                for name, parameter in layer.module._parameters.items():
                    if wrong or parameter is None or parameter.is_meta:
                        what = wrong[0] if wrong else f"{layer.path}.{name} is not there"
                        raise ValueError(f"{self.folder} does not hold the experts of layer {number}: {what}")
                    found[number][name] = parameter.detach()
            return found
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{self.folder} cannot be read: {first_line(error)}") from None
        finally:
            for number, layer in self.layers.items():
                layer.module._parameters.update(before[number])


class _Rows:
    """A tensor in a file, or some of its first dimension, read when Transformers asks for it."""

    def __init__(self, name: str, part: Any, rows: Sequence[int] | None) -> None:
        """`part`: of ``safetensors``. `rows`: ascending; None: all. Raises: ValueError for quantized numbers."""
        if part.get_dtype() not in _FLOATS:
            raise ValueError(
                f"{name} holds numbers of the kind {part.get_dtype()}: save the checkpoint in bfloat16, with a "
                "quantization_config that says dequantize=True, and take that folder"
            )
        self._part, self._rows = part, rows

    def __getitem__(self, index: object) -> torch.Tensor:
        rows = self._rows
        if rows is None:
            return self._part[:]  # type: ignore[no-any-return]
        if rows[-1] - rows[0] == len(rows) - 1:
            return self._part[rows[0] : rows[-1] + 1]  # type: ignore[no-any-return]
        return torch.cat([self._part[row : row + 1] for row in rows])

    def get_shape(self) -> list[int]:
        shape = list(self._part.get_shape())
        return shape if self._rows is None else [len(self._rows), *shape[1:]]

    def get_dtype(self) -> str:
        return str(self._part.get_dtype())


class _Renames:
    """Gives the tensors of experts their parameters' names: a conversion turns those of all of a layer into one."""

    def __init__(self, rename: Callable[..., tuple[str, str | None]]) -> None:
        self._rename = rename
        self._known: dict[str, tuple[str, str | None]] = {}

    def __call__(self, key: str, renamings: Any, converters: Any, *args: Any, **kwargs: Any) -> tuple[str, str | None]:
        alike = _OF_EXPERT.sub(".experts.*.", key) if converters else key
        found = self._known.get(alike)
        if found is None:
            found = self._rename(key, renamings, converters, *args, **kwargs)
            if alike != key and found[1] is not None and not _OF_EXPERT.search(found[0]):
                self._known[alike] = found
        return found


class _Copies:
    """Copies conversions.

    Transformers asks for a copy per name in the files and keeps one per parameter: the latest one of a conversion is
    given again for as long as nothing was collected in it.
    """

    def __init__(self) -> None:
        self._latest: dict[int, Any] = {}

    def __call__(self, one: Any) -> Any:
        made = self._latest.get(id(one))
        if made is None or made.collected_tensors or made.layer_targets:
            made = self._latest[id(one)] = _copied(one)
        return made


def _copied(one: Any) -> Any:
    """Return a copy of a conversion with what it collects of its own: all that changes in it."""
    made = copy.copy(one)
    for name in (name for kind in type(one).__mro__ for name in getattr(kind, "__slots__", ())):
        if isinstance(value := getattr(one, name, None), dict):
            object.__setattr__(made, name, copy.copy(value))
    return made


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Make Transformers read one tensor after the other, when it is needed, and print nothing meanwhile.

    It copies a conversion for every name in the files, to the depth, and matches each name with patterns: most of the
    time for thousands of experts.
    """
    from transformers import core_model_loading
    from transformers.utils import logging

    before, shown = os.environ.get(_SEQUENTIAL), logging.is_progress_bar_enabled()
    copies, core_model_loading.deepcopy = core_model_loading.deepcopy, _Copies()
    rename = core_model_loading.rename_source_key
    core_model_loading.rename_source_key = _Renames(rename)
    os.environ[_SEQUENTIAL] = "1"
    logging.disable_progress_bar()
    try:
        yield
    finally:
        core_model_loading.deepcopy, core_model_loading.rename_source_key = copies, rename
        if before is None:
            del os.environ[_SEQUENTIAL]
        else:
            os.environ[_SEQUENTIAL] = before
        if shown:
            logging.enable_progress_bar()


def files_of(folder: Path) -> dict[str, str]:
    """Return the file of each tensor. Raises: ValueError."""
    from safetensors import SafetensorError, safe_open

    try:
        if (folder / INDEX).exists():
            named = json.loads((folder / INDEX).read_text())["weight_map"]
            return {str(key): _plain(str(file)) for key, file in named.items()}
        with safe_open(folder / SINGLE, "pt") as opened:
            return dict.fromkeys(opened.keys(), SINGLE)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{folder} is no checkpoint of Transformers in safetensors ({INDEX} or {SINGLE}): {first_line(error)}"
        ) from None


def _plain(file: str) -> str:
    """Raises: ValueError for a name that leads out of its folder."""
    if Path(file).name != file:
        raise ValueError(f"a file named {file}")
    return file


def first_line(error: BaseException) -> str:
    """Return the first sentence of an error that may be pages long."""
    return str(error).strip().partition("\n")[0][:200] or type(error).__name__
