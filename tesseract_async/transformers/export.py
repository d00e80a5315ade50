"""A model whose experts are elsewhere as a folder that plain Transformers opens: `export_checkpoint`."""

import asyncio
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import save_file
from torch import nn

from tesseract_async.client.expert_rpc import fetch_info
from tesseract_async.errors import ExpertNotFound, Overloaded
from tesseract_async.experts.grid import ExpertReplica
from tesseract_async.node import TesseractNode
from tesseract_async.server.checkpoint import check_state
from tesseract_async.server.fetching import fetch_state, seconds_for
from tesseract_async.transformers.families import library
from tesseract_async.transformers.operator import RemoteLayer
from tesseract_async.transformers.remote import is_stand_in, lockstep_of, remote_layers
from tesseract_async.transformers.shards import INDEX, SINGLE, files_of

_REST: Final = "model-rest.safetensors"
_AT_ONCE: Final = 8
_TIMEOUT: Final = seconds_for(2 * _AT_ONCE)
"""Seconds that a server has for each piece of an expert's state: it may be asked for two pieces of each of `_AT_ONCE`
experts at the same time."""


def export_checkpoint(model: nn.Module, folder: str | Path) -> None:
    """Write the model with its remote experts into a new `folder`, as its checkpoint was: plain Transformers opens it.

    Names and layout are those that ``save_pretrained`` of the whole model would give, and the experts' dtype is the
    model's. In lockstep all experts are of the model's step; otherwise each is as new as when it is asked for. The
    folder comes into being whole, or not at all. At most one layer's experts are in memory.

    Raises: ValueError for a model without remote experts, with an adapter (merge it first), and if a server's experts
    are not of the model's step or shape; FileExistsError; what fetching raises; OSError.
    """
    library()
    from transformers.core_model_loading import revert_weight_conversion

    layers = remote_layers(model)
    round = lockstep_of(model).agree()
    if hasattr(model, "peft_config"):
        raise ValueError("this model has an adapter: merge it first (model.merge_and_unload()), or save it alone")
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} exists: export_checkpoint makes a new folder")
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        rest = {name: tensor for name, tensor in model.state_dict().items() if not is_stand_in(name)}
        model.save_pretrained(partial, state_dict=rest)  # type: ignore[operator]
        _forget_remote(partial / "config.json")
        files = files_of(partial)
        if SINGLE in files.values():
            (partial / SINGLE).rename(partial / _REST)
            files = dict.fromkeys(files, _REST)
        conversions = vars(model).pop("_weight_conversions", None)  # those of the rest alone
        try:
            for path, experts in layers.items():
                layer: RemoteLayer = vars(experts)["tesseract_layer"]
                own = vars(experts)["tesseract_shapes"]
                shapes = {name: shape[1:] for name, (shape, _) in own.items()}
                fused = layer.node.run(_fetch(layer, shapes, round))
                fused = {name: x.to(own[name][1]) for name, x in fused.items()}
                named = revert_weight_conversion(model, {f"{path}.{name}": x for name, x in fused.items()})
                file = f"model-experts-{len(set(files.values())):05d}.safetensors"
                save_file({name: x.contiguous() for name, x in named.items()}, partial / file, {"format": "pt"})
                files |= dict.fromkeys(named, file)
        finally:
            if conversions is not None:
                vars(model)["_weight_conversions"] = conversions
        total = sum((partial / file).stat().st_size for file in set(files.values()))
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}
        (partial / INDEX).write_text(json.dumps(index, indent=2))
        partial.rename(folder)
    except BaseException:  # Ctrl-C, too, must not leave half a model
        shutil.rmtree(partial, ignore_errors=True)
        raise


async def _fetch(layer: RemoteLayer, shapes: Mapping[str, torch.Size], round: int | None) -> dict[str, torch.Tensor]:
    gate = asyncio.Semaphore(_AT_ONCE)
    replicas = await layer.pool.replicas()

    async def one(number: int) -> Mapping[str, torch.Tensor]:
        async with gate:
            uid = f"{layer.pool.uid_prefix}.{number}"
            found = replicas.get(number)
            if not found:
                raise ExpertNotFound(f"no live server hosts the expert {uid}: nothing was exported")
            state = await _state(layer.node.node, uid, found, round)
            if {name: x.shape for name, x in state.items()} != shapes:
                raise ValueError(f"{uid} is not an expert of this model: its parameters have other names or shapes")
            return state

    experts = await asyncio.gather(*(one(number) for number in range(layer.pool.num_experts)))
    return {name: torch.stack([expert[name] for expert in experts]) for name in shapes}


async def _state(
    node: TesseractNode, uid: str, replicas: Sequence[ExpertReplica], round: int | None
) -> Mapping[str, torch.Tensor]:
    """An expert's parameters, after the step `round` if that is not None."""
    peer = next((replica for replica in replicas if replica.primary), replicas[0]).peer
    version = (await fetch_info(node, uid, peer, timeout=_TIMEOUT)).version
    while True:
        try:
            file = await fetch_state(node, peer, uid, weights_only=True, min_version=version, timeout=_TIMEOUT)
            break
        except Overloaded as error:  # it holds as many copies as it may, for others too
            await asyncio.sleep(error.retry_after or 1.0)
    state = None if file is None else check_state(uid, file, weights_only=True)
    if state is None or (round is not None and state["version"] != round):
        took = version if state is None else state["version"]
        raise ValueError(f"{uid} has taken {took} steps, and this model {round}: nothing was exported")
    module: Mapping[str, torch.Tensor] = state["module"]
    return module


def _forget_remote(file: Path) -> None:
    """Take the mark out of a saved configuration that says that the experts are elsewhere."""

    def cleaned(config: object) -> object:
        if not isinstance(config, dict):
            return config
        return {key: cleaned(value) for key, value in config.items() if key != "experts_implementation"}

    file.write_text(json.dumps(cleaned(json.loads(file.read_text())), indent=2, sort_keys=True) + "\n")
