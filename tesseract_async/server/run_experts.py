"""Builds experts from a run's manifest, and fills in what a manifest says of an expert.

A manifest comes from the network. It may choose among registered experts and optimizers and give them plain values;
code by import path runs only where the volunteer allowed that module.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Final

from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from tesseract_async.experts.run import RunManifest, RunMismatch
from tesseract_async.runtime.backend import BackendSettings, ExpertBackend, MakesScheduler
from tesseract_async.server.registry import EXPERTS, Built, backend_of, build_module
from tesseract_async.wire import tensors as wire
from tesseract_async.wire.codecs import CodecPolicy

if TYPE_CHECKING:
    from tesseract_async.runtime.mesh import Spread

TRAINING_OPTIONS: Final = frozenset(
    {
        "clip_gradient_norm",
        "max_gradient_norm",
        "step_every",
        "lockstep",
        "trim_peers",
        "merge_backward",
        "stochastic",
        "allow_batch_statistics",
        "max_staleness",
        "staleness_damping",
    }
)
"""The keys of `RunManifest.training` besides ``max_batch_size``: the `BackendSettings` that change what is learned.
Others (compilation, graphs, journal) are each volunteer's own business."""
CHECKPOINTS: Final = "tesseract_async.transformers.serving"
"""The module whose experts come from a checkpoint of Hugging Face. It is part of this package, and always allowed."""


def check_allowed(manifest: RunManifest, allowed_modules: Collection[str]) -> None:
    """Refuse a run whose expert is code by import path, and not from an allowed module. Raises: ValueError."""
    path, separator, _ = manifest.expert.partition(":")
    if separator and path != CHECKPOINTS and path not in allowed_modules:
        raise ValueError(
            f"the run {manifest.name} wants to run {manifest.expert} here. If you know that code and have it installed "
            f"allow it: --allow-module {path}, or allowed_modules=[{path!r}] in Python"
        )


def build_run_module(manifest: RunManifest, uid: str, *, allowed_modules: Collection[str] = ()) -> nn.Module:
    """Return the expert's module with its first weights, the same wherever it is built (on one kind of device).

    Raises: ValueError if it is not allowed, or if this version has no such expert, or it does not take these sizes.
    """
    with _naming(manifest):
        return _build(manifest, uid, allowed_modules)[0]


def build_run_backend(
    manifest: RunManifest,
    uid: str,
    *,
    allowed_modules: Collection[str] = (),
    computing: Mapping[str, object] | None = None,
    max_bytes: int | None = None,
    spread: Spread | None = None,
    build: Callable[[], Built] | None = None,
    like: ExpertBackend | None = None,
) -> ExpertBackend:
    """Return the expert, ready to be hosted, checked against the manifest's schemas.

    `computing`: the `BackendSettings` that are each volunteer's own business, such as ``compile_mode``. `max_bytes`: of
    the expert with gradients and optimizer, by default this computer's memory. `spread`: over which processes. `build`
    makes the module in place of the manifest's builder, which knows no checkpoint: its weights are zeros then. `like`:
    another one of this manifest, whose module differs in numbers only.

    Raises: ValueError if it is not allowed, is too large, or asks for what this version does not have; RunMismatch if
    its schemas are others.
    """
    with _naming(manifest):
        options: dict[str, object] = {"max_batch_size": 4096, **manifest.training}
        max_batch_size = options.pop("max_batch_size")
        computing = {**(computing or {}), "codecs": CodecPolicy.only(manifest.codecs)}  # type: ignore[arg-type]
        backend = backend_of(
            build or functools.partial(_build, manifest, uid, allowed_modules, max_bytes),
            optimizer=None if manifest.optimizer is None else (manifest.optimizer, manifest.optimizer_options),
            scheduler=make_scheduler(manifest.schedule, manifest.schedule_options),
            max_batch_size=max_batch_size,  # type: ignore[arg-type]
            settings=backend_settings(options, computing),
            spread=spread,
            like=like,
        )
    if like is None:
        manifest.check(schemas_of(backend))
    return backend


def backend_settings(training: Mapping[str, object], computing: Mapping[str, object]) -> BackendSettings:
    """Return the settings of an expert whose steps are taken so. Raises: ValueError for unknown training options."""
    if unknown := training.keys() - TRAINING_OPTIONS:
        raise ValueError(f"unknown training options: {', '.join(sorted(unknown))}")
    return BackendSettings(**{**training, **computing})  # type: ignore[arg-type]


def schemas_of(backend: ExpertBackend) -> dict[str, object]:
    """Return the manifest's fields that follow from the expert itself."""
    return {
        "args_schema": wire.encode_schema(backend.args_schema),
        "kwargs_schema": wire.encode_schema(backend.kwargs_schema),
        "outputs_schema": wire.encode_schema(backend.outputs_schema),
    }


def complete(manifest: RunManifest, *, allowed_modules: Collection[str] = ()) -> RunManifest:
    """Return the manifest with the schemas of the expert that it describes: its author does so before signing.

    Raises: as `build_run_backend`.
    """
    uid = next(iter(manifest.pattern))
    with _naming(manifest):
        module, args_schema = _build(manifest, uid, allowed_modules)
        found = schemas_of(ExpertBackend(module, args_schema=args_schema))
    done = dataclasses.replace(manifest, **found)  # type: ignore[arg-type]
    # says now what a volunteer would be told later
    backend = build_run_backend(done, uid, allowed_modules=allowed_modules)
    try:
        backend.prepare()
    except (TypeError, ValueError) as error:
        raise ValueError(f"the run {manifest.name}: {manifest.optimizer} does not take its options: {error}") from None
    return done


def _build(manifest: RunManifest, uid: str, allowed_modules: Collection[str], max_bytes: int | None = None) -> Built:
    check_allowed(manifest, allowed_modules)
    if ":" not in manifest.expert and manifest.expert not in EXPERTS:
        raise ValueError(
            f"the run {manifest.name} hosts experts called {manifest.expert!r}, which this version does not have: "
            "upgrade tesseract-async"
        )
    return build_module(
        manifest.expert,
        manifest.sizes,
        seed=zlib.crc32(f"{manifest.seed}/{uid}".encode()),
        marked=True,
        max_bytes=max_bytes,
        optimizer=manifest.optimizer,
    )


@contextlib.contextmanager
def _naming(manifest: RunManifest) -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError) as error:
        if isinstance(error, RunMismatch) or str(error).startswith("the run "):
            raise
        what = "max_batch_size or another training option: " if isinstance(error, TypeError) else ""
        raise ValueError(f"the run {manifest.name}: {what}{error}") from None


def _warmup(num_warmup_steps: int = 0, num_steps: int | None = None, least: float = 0.0) -> Callable[[int], float]:
    """Return what rises linearly from 0 over `num_warmup_steps`, then stays, or falls to `least` at `num_steps`."""
    if num_warmup_steps < 0 or (num_steps is not None and num_steps <= num_warmup_steps):
        raise ValueError("num_warmup_steps is 0 or more, and less than num_steps")

    def factor(step: int) -> float:
        if step < num_warmup_steps:
            return (step + 1) / num_warmup_steps
        if num_steps is None:
            return 1.0
        return max(least, 1.0 - (1.0 - least) * (step - num_warmup_steps) / (num_steps - num_warmup_steps))

    return factor


def _cosine(num_steps: int, num_warmup_steps: int = 0, least: float = 0.0) -> Callable[[int], float]:
    """Return what rises linearly over `num_warmup_steps`, then falls by half a cosine to `least` at `num_steps`."""
    rise = _warmup(num_warmup_steps, num_steps)

    def factor(step: int) -> float:
        if step < num_warmup_steps:
            return rise(step)
        done = min(1.0, (step - num_warmup_steps) / (num_steps - num_warmup_steps))
        return least + (1.0 - least) * 0.5 * (1.0 + math.cos(math.pi * done))

    return factor


SCHEDULES: Final[Mapping[str, Callable[..., Callable[[int], float]]]] = {"linear": _warmup, "cosine": _cosine}
"""Factors of the learning rate at each step, by name."""


def make_scheduler(name: str | None, options: Mapping[str, object]) -> MakesScheduler | None:
    """Return what makes the schedule of that name; None without one. Raises: ValueError."""
    if name is None:
        return None
    if name not in SCHEDULES:
        raise ValueError(f"the schedule {name!r} is not known here")
    try:
        factor = SCHEDULES[name](**options)
        factor(0)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} does not take its options: {error}") from None
    return lambda optimizer: LambdaLR(optimizer, factor)
