"""`save_model`, `load_model` and `restore_model`: a whole model as a folder, and back."""

import asyncio
import contextlib
import math
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import torch
from torch import nn

from tesseract_async.client.expert_pool import ExpertPool
from tesseract_async.client.gating_function import GatingFunction
from tesseract_async.client.local_mixture import LocalMixture
from tesseract_async.client.ports import Node, PlainCalls, deliver
from tesseract_async.client.remote_expert import RemoteExpert
from tesseract_async.client.settings import MixtureSettings
from tesseract_async.client.trainer import AsyncTrainer
from tesseract_async.errors import CheckpointError, describe
from tesseract_async.experts.manifest import split_uid
from tesseract_async.identity import Identity
from tesseract_async.node import TesseractNode
from tesseract_async.runtime.structure import Described, ParameterOf, describe_module, rebuild_module
from tesseract_async.saving.folder import TRAINER, SavedExperts, SavedModel, open_folder, open_folder_or_make
from tesseract_async.saving.moment import TrainerMoment
from tesseract_async.saving.restorer import enter_owned, restore_experts
from tesseract_async.saving.saver import Origin, SavePoint, SaveReport, find_origins, find_pieces, take_trunk
from tesseract_async.shared_parameters import SharedParameters

M = TypeVar("M", bound=nn.Module)

MAX_PAUSE: Final = 10.0
"""The most seconds that a trainer pauses for the servers' answers; a step waits longer than this for an expert."""
PUSH_PATIENCE: Final = 60.0
"""Seconds that going back waits for a push that is under way."""
MAX_TOLD: Final = 3
"""The most experts that an error names."""


def save_model(
    node: Node | PlainCalls,
    model: nn.Module | SharedParameters[Any],
    folder: str | Path,
    *,
    trainer: AsyncTrainer[Any] | None = None,
    optimizers: bool = False,
) -> Any:
    """Write a model into a folder: gates, trunk, and every expert that its gates may choose; await it.

    Experts are taken at one save point: each holds all steps that were answered before, and none that began after it.
    `load_model` and `restore_model` read the folder. An older one of the same model is replaced when all is there.

    - `model`: with its gates on `node`, or the SharedParameters, of which the merged copy is written.
    - `trainer`: pauses at the save point, no longer than a step; its state is written, too. Experts whose servers do
      not answer meanwhile are `SaveReport.late`.
    - `optimizers`: with the experts' optimizers and journals, for `restore_model`. Takes the role ``host`` in a run.

    Returns (or gives, when awaited) a `SaveReport`. With a `BackgroundNode` the call is plain.

    Raises: CheckpointError, after all others are written, for experts that no server gave, and before anything is
    written for a gate none of whose experts anybody has; ValueError for a model without gates, or on another node;
    OSError.
    """
    if isinstance(model, SharedParameters) and isinstance(node, PlainCalls):
        model.flush()
    save = _save(_node_of(node), model, Path(folder), trainer, optimizers)
    return deliver(node, save)


def _node_of(node: Node | PlainCalls) -> TesseractNode:
    found: Any = node.node if isinstance(node, PlainCalls) else node
    return found  # type: ignore[no-any-return]


async def _save(
    node: TesseractNode,
    given: nn.Module | SharedParameters[Any],
    folder: Path,
    trainer: AsyncTrainer[Any] | None,
    optimizers: bool,
) -> SaveReport:
    shared = given if isinstance(given, SharedParameters) else None
    own = given.model if isinstance(given, SharedParameters) else given
    gates = {path: part for path, part in own.named_modules() if isinstance(part, GatingFunction)}
    if not gates and shared is None:
        raise ValueError(
            "this model has no GatingFunction, whose experts could be written: torch.save writes a model without any, "
            "and export_checkpoint one of Transformers with an ExpertPool"
        )
    for path, gate in gates.items():
        if _node_of(gate.node) is not node:  # it does not know what was answered there
            raise ValueError(f"{path or 'the gate'} is on another node than the one that is to save it")
    store = await asyncio.to_thread(open_folder_or_make, folder)
    origins: dict[str, list[Origin]] = {}
    for prefix, grid_size in {gate.uid_prefix: gate.grid_size for gate in gates.values()}.items():
        found = await find_origins(node, prefix, grid_size)
        if not found:
            raise CheckpointError(f"nobody has an expert of {prefix}: without its experts the model cannot be saved")
        origins |= found
        authority = node.trust.authority(prefix)
        if authority is not None:
            store.add_run(authority.run)
    if shared is not None:
        origins |= await find_pieces(node, shared.pieces, len(shared.uids))
    if shared is not None and not shared.is_plain:
        await shared.flush()
    async with SavePoint(node, origins, is_whole=optimizers) as point:
        async with contextlib.AsyncExitStack() as paused:
            if trainer is not None:
                await paused.enter_async_context(trainer.paused())
            parts = () if shared is None else shared.parts
            known = {part.uid: (part.copy.base[1], part.copy.merged()) for part in parts}
            await point.mark(within=math.inf if trainer is None else MAX_PAUSE)
            model = own if shared is None else shared.merged()
            tensors = {name: one.detach().cpu().clone() for name, one in _tensors_of(model).items()}
            state: dict[str, Any] = {} if trainer is None else {"trainer": trainer.state_dict()}
            moment = TrainerMoment(shared) if optimizers and shared is not None else None
        report = await point.fetch(store)
    if shared is not None:  # of the moment at which the experts were taken
        tensors |= take_trunk(store, shared.uids, report, keeps=optimizers, known=known)
    if shared is not None and moment is not None:
        moment.go_on([store.state(uid) for uid in shared.uids], node.peer_id)
        local = {name: one.detach().cpu() for name, one in _tensors_of(moment.model).items()}
        state |= {"local": local, "shared": moment.state}
    store.experts = {uid: one for uid, one in store.experts.items() if uid in origins}
    names = {id(one): name for name, one in _tensors_of(model).items()}
    store.model = describe_module(model, replace=partial(_describe_gate, names))

    def write() -> None:
        store.put_tensors(tensors)
        store.files.pop(TRAINER, None)
        if state:
            store.put_trainer(state)
        store.write_index()

    await asyncio.to_thread(write)
    if report.failed:
        told = [f"{uid} ({describe(error)})" for uid, error in sorted(report.failed.items())]
        more = f" and {len(told) - MAX_TOLD} more" if len(told) > MAX_TOLD else ""
        raise CheckpointError(f"these experts could not be saved: {', '.join(told[:MAX_TOLD])}{more}")
    return report


def _tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and all buffers by name, tied ones once; experts that are the model's own are among them."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _describe_gate(names: Mapping[int, str], path: str, module: nn.Module) -> Described | None:
    if isinstance(module, ExpertPool | RemoteExpert):
        return {"cannot": f"{path} is {type(module).__name__}, and only gates' experts are saved with the model"}
    if not isinstance(module, GatingFunction):
        return None
    return {
        "gate": {
            "uid_prefix": module.uid_prefix,
            "grid_size": list(module.grid_size),
            "in_features": module.proj.in_features,
            "k_best": module.k_best,
            "k_min": module.k_min,
            "route": module.route,
            "is_switch": module.is_switch,
            "is_awaited": not isinstance(module.node, PlainCalls),
        },
        "on_missing": module.settings.on_missing,
        "capacity_factor": module.settings.capacity_factor,
        "refill": module.settings.refill,
        "parameters": {name: [names[id(one)], one.requires_grad] for name, one in module.proj.named_parameters()},
    }


def load_model(folder: str | Path, model: M | None = None, *, allowed_modules: Collection[str] = ()) -> Any:
    """Return a saved model as an ordinary module in eval mode, which answers as the swarm did, without a network.

    In place of each gate it has a `LocalMixture`, whose calls are awaited if the gate's were.

    - `model`: the module to load into, where its code is not known here, or other gates are wanted: with
      `LocalMixture`s of ``SavedExperts(folder)``, or live gates. By default it is built as it was saved.
    - `allowed_modules`: modules that may be imported to build it, besides PyTorch's own, such as ``["my_model"]``.

    Raises: CheckpointError if the folder holds no model, a damaged one, or one that cannot be built here.
    """
    saved = open_folder(folder)
    tensors = saved.tensors()
    if model is not None:
        _fill(model, tensors)
        return model
    if saved.model is None:
        raise CheckpointError(f"{folder} does not say how the model is built: give the module to load into")
    experts = SavedExperts(saved, allowed_modules=allowed_modules)

    def gate(path: str, described: Described, parameter: ParameterOf) -> nn.Module | None:
        if "gate" not in described:
            return None
        settings = MixtureSettings(
            on_missing=described["on_missing"],
            capacity_factor=described["capacity_factor"],
            refill=described["refill"],
        )
        options, name = described["gate"], f"{path}.proj".lstrip(".")
        # folders of older versions do not say it
        own = described.get("parameters") or {part: [f"{name}.{part}", True] for part in ("weight", "bias")}
        parameters = {part: parameter(*own[part]) for part in ("weight", "bias")}
        if list(parameters["weight"].shape) != [sum(options["grid_size"]), options["in_features"]]:
            raise CheckpointError(f"{name}.weight has another shape than its gate")  # before one of any size is made
        uids = [uid for uid in experts if split_uid(uid)[0] == options["uid_prefix"]]
        mixture = LocalMixture({uid: experts[uid] for uid in uids}, settings=settings, **options)
        for part, one in parameters.items():
            setattr(mixture.proj, part, one)
        return mixture

    loaded = rebuild_module(saved.model, tensors, allowed_modules=allowed_modules, replaced=gate).eval()
    return loaded


def _filled(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the model's tensors that get these values. Raises: CheckpointError if they are not its own."""
    own = _tensors_of(model)
    for path, part in model.named_modules():
        if isinstance(part, LocalMixture):
            start = f"{path}.experts.".lstrip(".")
            own = {name: one for name, one in own.items() if not name.startswith(start)}
    wrong = [f"{name} is not in the folder" for name in own if name not in tensors]
    wrong += [f"{name} is not in the model" for name in tensors if name not in own]
    wrong += [
        f"{name} has shape {list(one.shape)} there"
        for name, one in tensors.items()
        if own.get(name, one).shape != one.shape
    ]
    if wrong:
        raise CheckpointError(f"this is not the model that was saved: {'; '.join(wrong[:MAX_TOLD])}")
    return own


@torch.no_grad()
def _fill(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Give the model these values. Raises: CheckpointError, before any is changed, if they are not its own."""
    for name, one in _filled(model, tensors).items():
        one.copy_(tensors[name])


def restore_model(
    node: Node | PlainCalls,
    model: nn.Module | SharedParameters[Any],
    folder: str | Path,
    *,
    trainer: AsyncTrainer[Any] | None = None,
    identity: Identity | None = None,
) -> Any:
    """Take the model, the trainer and the servers of its experts back to a save point; await it.

    The folder was written by `save_model` with ``optimizers=True``. No other trainer may be training meanwhile. What
    servers have learned since is written down as a file of its own, if they keep checkpoints. Shared parameters' pushes
    that are under way are waited for.

    - `model`, `trainer`: as given to `save_model`.
    - `identity`: the key of the owner of the experts' run, who decides that.

    Returns (or gives, when awaited) the experts' versions by uid. With a `BackgroundNode` the call is plain.

    Raises: CheckpointError if the folder holds no such save point, or a server did not take its experts' states;
    TimeoutError if a push is not answered.
    """
    return deliver(node, _restore(_node_of(node), model, open_folder(folder), trainer, identity))


async def _restore(
    node: TesseractNode,
    given: nn.Module | SharedParameters[Any],
    saved: SavedModel,
    trainer: AsyncTrainer[Any] | None,
    identity: Identity | None,
) -> dict[str, int]:
    state = saved.trainer() if TRAINER in saved.files else {}
    if trainer is not None and "trainer" not in state:
        raise CheckpointError(f"{saved.path} holds no trainer: it was saved without")
    shared = given if isinstance(given, SharedParameters) else None
    model: nn.Module = given.model if isinstance(given, SharedParameters) else given
    values = (state.get("local") if shared is not None else None) or saved.tensors()
    _filled(model, values)  # another model's folder is refused before servers go back to it
    owners = {} if identity is None else await enter_owned(node, saved, identity)
    if shared is not None:
        async with asyncio.timeout(PUSH_PATIENCE):
            await shared.wait_answers()  # a push that is under way would count in the state that is gone back to
    versions = await restore_experts(node, saved, owners=owners)
    _fill(model, values)
    if shared is not None and "shared" in state:
        await shared.rejoin(state["shared"])
    if trainer is not None:
        trainer.load_state_dict(state["trainer"])
    return versions
