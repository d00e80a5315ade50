"""An expert's state on disk: one file per expert and version, in the safetensors format, written atomically.

The format (https://github.com/huggingface/safetensors): the header's length as 8 bytes, little-endian; a JSON header
that maps each tensor's name to its dtype, shape and place; the tensors' bytes. Any safetensors reader loads the
weights, whose names begin with ``module/``. What is no tensor travels as JSON in the header's ``__metadata__``, with a
SHA-256 over everything else: nothing is ever unpickled, and a damaged file is noticed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import logging
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import torch

from tesseract_async.errors import CheckpointError, describe
from tesseract_async.identity import sync_folder
from tesseract_async.runtime.states import SAFETENSORS
from tesseract_async.wire.compression import flat_of

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
SUFFIX = ".safetensors"

_DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS.items()}
_MAX_HEADER_BYTES = 16 << 20
MAX_HEADER_VALUES = 1 << 20
"""Lists, maps and what they hold, in a stranger's file: a full journal has a fifth. A byte of JSON may cost 60."""


class CheckpointStore:
    """The checkpoints of one server's experts: ``directory/UID/VERSION.safetensors``, the newest `keep`
    of each. The folders' names are `folder_name`'s.

    Blocking file work: call it where that is welcome.
    """

    def __init__(self, directory: str | Path, *, keep: int = 3) -> None:
        if keep < 1:
            raise ValueError(f"at least one checkpoint is kept, not {keep}")
        self.directory = Path(directory)
        self.keep = keep

    def save(self, uid: str, state: Mapping[str, Any], *, version: int) -> Path:
        """Writes `state` (nested dicts and lists of CPU tensors and plain values) and drops files beyond `keep`.

        It is the newest from now on: files of later versions, from before this server took over another one's state,
        are set aside as ``.superseded``, at most `keep` of them.

        The file appears whole or not at all, even when the machine loses power. Where the disk is full, the expert's
        oldest files give way, but for its newest. Raises: CheckpointError.
        """
        folder = self._folder(uid)
        path = folder / f"{version:012d}{SUFFIX}"
        unfinished = path.with_suffix(".unfinished")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            pieces = encode(state)
            while True:
                try:
                    with open(unfinished, "wb") as file:
                        file.writelines(pieces)
                        file.flush()
                        os.fsync(file.fileno())
                    break
                except OSError as error:
                    if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not self._make_room(uid, path, unfinished):
                        raise
            os.replace(unfinished, path)
            sync_folder(folder)
            self._drop(uid, path)
        except (OSError, TypeError) as error:
            with contextlib.suppress(OSError):
                unfinished.unlink(missing_ok=True)
            raise CheckpointError(f"{path} could not be written: {describe(error)}") from error
        return path

    def set_aside(self, uid: str, state: Mapping[str, Any], *, version: int) -> Path:
        """Writes a file that is neither restored nor ever dropped: ``VERSION.aside``, or with a number if there is one.

        Raises: CheckpointError.
        """
        path = self.save(uid, state, version=version)
        target = path.with_suffix(".aside")
        for number in itertools.count(1):
            if not target.exists():
                break
            target = path.with_suffix(f".{number}.aside")
        try:
            os.replace(path, target)
        except OSError as error:
            raise CheckpointError(f"{target} could not be written: {describe(error)}") from error
        return target

    def load(self, uid: str) -> dict[str, Any] | None:
        """The newest state that is whole; None where there is no checkpoint. Damaged files are passed over, loudly.

        Raises: CheckpointError if files exist but none can be read.
        """
        files = self.files(uid)
        for path in files:
            try:
                return decode(path.read_bytes())
            except (OSError, CheckpointError) as error:
                logger.error("checkpoint %s is damaged (%s); trying the one before", path, describe(error))
                # out of the way: it must neither be tried again nor count among those that are kept
                with contextlib.suppress(OSError):
                    os.replace(path, path.with_suffix(".damaged"))
        if files:
            raise CheckpointError(f"none of the {len(files)} checkpoints in {self._folder(uid)} can be read")
        return None

    def _drop(self, uid: str, newest: Path) -> None:
        files = self.files(uid)
        for late in (path for path in files if path > newest):
            os.replace(late, late.with_suffix(".superseded"))
        superseded = sorted(self._folder(uid).glob("*.superseded"), reverse=True)
        for old in [path for path in files if path <= newest][self.keep :] + superseded[self.keep :]:
            old.unlink(missing_ok=True)

    def _make_room(self, uid: str, newest: Path, unfinished: Path) -> bool:
        """Drops the oldest of an expert's checkpoints, but for the last one before `newest`. False if there is none."""
        unfinished.unlink(missing_ok=True)
        before = [path for path in self.files(uid) if path < newest]
        if len(before) < 2:
            return False
        logger.warning("the disk is full: %s gives way to a newer checkpoint", before[-1])
        before[-1].unlink(missing_ok=True)
        return True

    def files(self, uid: str) -> list[Path]:
        """The checkpoints of an expert, newest first."""
        return sorted(self._folder(uid).glob(f"*{SUFFIX}"), reverse=True)

    def _folder(self, uid: str) -> Path:
        name = folder_name(uid)
        if not re.fullmatch(r"[A-Za-z0-9_~%-]+(\.[A-Za-z0-9_~%-]+)*", name):
            raise CheckpointError(f"{uid!r} cannot name a folder")
        return self.directory / name


def folder_name(uid: str) -> str:
    """What an expert's folder is called: its uid, with what is not plain ASCII as in a URL. ``unquote`` inverts it."""
    return quote(uid, safe="")


def stored_uids(directory: Path | None) -> list[str]:
    """Return the uids of the experts that have a folder in `directory`."""
    if directory is None or not directory.is_dir():
        return []
    return sorted(unquote(path.name) for path in directory.iterdir() if path.is_dir())


def encode(state: Mapping[str, Any]) -> list[bytes | memoryview]:
    """A file's bytes, in pieces. Raises: TypeError for what neither safetensors nor JSON can hold."""
    tensors: dict[str, torch.Tensor] = {}
    rest = _take_tensors(state, "", tensors)
    header: dict[str, Any] = {}
    pieces: list[bytes | memoryview] = []
    offset = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPE_NAMES:
            raise TypeError(f"{name}: safetensors cannot hold {tensor.dtype}")
        header[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
        if tensor.nbytes:
            pieces.append(flat_of(tensor).view(torch.uint8).numpy().data)
    metadata = {"format": "pt", "tesseract_format": str(FORMAT_VERSION), "tesseract_state": json.dumps(rest)}
    header["__metadata__"] = metadata
    metadata["tesseract_sha256"] = _digest(header, pieces)
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    return [len(head).to_bytes(8, "little"), head, *pieces]


def decode(data: bytes | bytearray | memoryview, *, max_values: float = math.inf) -> dict[str, Any]:
    """What `encode` was given. Takes untrusted bytes; of a stranger's, `max_values` bounds what the header makes.

    Raises: CheckpointError for anything damaged or foreign.
    """
    try:
        length = int.from_bytes(data[:8], "little")
        if length > min(_MAX_HEADER_BYTES, len(data) - 8):
            raise CheckpointError("the header is cut off")
        text = bytes(data[8 : 8 + length])
        if sum(map(text.count, (b"[", b"{", b","))) > max_values:
            raise CheckpointError("the header holds too many values")
        header = json.loads(text)
        metadata = header["__metadata__"]
        if metadata.get("tesseract_format") != str(FORMAT_VERSION):
            raise CheckpointError(f"format {metadata.get('tesseract_format')!r} is not {FORMAT_VERSION}")
        # a writable copy: tensors may be trained in place
        body = memoryview(bytearray(data[8 + length :]))
        expected = metadata.pop("tesseract_sha256")
        if _digest(header, [body]) != expected:
            raise CheckpointError("the checksum is wrong")
        tensors = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            start, stop = entry["data_offsets"]
            dtype, shape = SAFETENSORS[entry["dtype"]], tuple(entry["shape"])
            if stop - start != math.prod(shape) * dtype.itemsize or not 0 <= start <= stop <= len(body):
                raise CheckpointError(f"{name} does not fit its place")
            flat = torch.frombuffer(body[start:stop], dtype=dtype) if stop > start else torch.empty(0, dtype=dtype)
            tensors[name] = flat.view(shape).clone()
        state = _put_tensors(json.loads(metadata["tesseract_state"]), tensors)
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError, RuntimeError) as error:
        raise CheckpointError(f"not a checkpoint: {describe(error)}") from error
    if not isinstance(state, dict):
        raise CheckpointError("not a checkpoint: no state inside")
    return state


def _digest(header: Mapping[str, Any], pieces: list[Any]) -> str:
    """SHA-256 of the header without the digest, in one canonical spelling, and of the tensors' bytes."""
    digest = hashlib.sha256(json.dumps(header, sort_keys=True, separators=(",", ":")).encode())
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


# JSON has no integer keys and no tensors: dicts become lists of pairs, tensors are named by where they stood.


def _take_tensors(value: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        while path in tensors:  # a key that holds a slash may spell another one's path
            path += "~"
        tensors[path] = value
        return {"t": path}
    if isinstance(value, Mapping):
        pairs = [
            [key, _take_tensors(item, f"{path}/{key}" if path else str(key), tensors)] for key, item in value.items()
        ]
        return {"d": pairs}
    if isinstance(value, list | tuple):
        return {"l": [_take_tensors(item, f"{path}/{index}", tensors) for index, item in enumerate(value)]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{path}: a {type(value).__name__} cannot be written to a checkpoint")


def _put_tensors(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "t":
        return tensors[content]
    if kind == "d":
        return {key: _put_tensors(item, tensors) for key, item in content}
    return [_put_tensors(item, tensors) for item in content]
