"""Builds the experts of one `tesseract serve`, here or, with ``--shard``, in all processes of its job."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Final

import click
import torch

from tesseract_async.cli.running import importing
from tesseract_async.cli.serve_options import ServeOptions
from tesseract_async.experts.run import RUNS, SignedRun
from tesseract_async.runtime.backend import ExpertBackend
from tesseract_async.server.contract import VolunteerSettings
from tesseract_async.server.footprint import process_bytes
from tesseract_async.server.registry import Built, backend_of, build_all, make_backend
from tesseract_async.server.run_experts import backend_settings, build_run_backend, make_scheduler
from tesseract_async.wire.packed import Value

if TYPE_CHECKING:
    from tesseract_async.runtime.mesh import Spread
    from tesseract_async.runtime.mesh_link import MeshLink


AUTOCAST: Final = {None: None, "bf16": torch.bfloat16, "fp16": torch.float16}


def make_builder(serving: ServeOptions, limits: VolunteerSettings, *, keeps_learning_rate: bool) -> ExpertBuilder:
    """Return the builder of the experts. Blocks with ``--shard``. `keeps_learning_rate`: the given rate wins over a
    checkpoint's.

    Raises: ValueError, TimeoutError, where they cannot be spread.
    """
    computing: dict[str, object] = {
        "autocast": AUTOCAST[serving.autocast],
        "compile_mode": serving.compile_mode,
        "cuda_graphs": serving.cuda_graphs,
        "own_options": ("lr",) if keeps_learning_rate else (),
        "preferred_sizes": tuple(sorted(serving.preferred_sizes)),
    }
    if serving.run_name is None:  # else the run says it
        computing["lockstep"] = serving.step == "lockstep"
    limit = limits.max_memory_bytes
    # what the process leaves; measured exactly later, but this is known before anything is built
    max_bytes = None if limit is None else max(0, limit - process_bytes())
    if serving.hf_checkpoint is not None:
        return CheckpointBuilder(serving, computing, max_bytes)
    return (ExpertBuilder if serving.shard is None else SpreadBuilder)(serving, computing, max_bytes)


class ExpertBuilder:
    spread: Spread | None = None
    link: MeshLink | None = None
    """The link to the other processes, if experts are spread."""

    def __init__(self, serving: ServeOptions, computing: Mapping[str, object], max_bytes: int | None) -> None:
        """`computing`: how this computer computes (`BackendSettings`). `max_bytes`: the largest size of an expert;
        None: what fits."""
        self._serving, self._computing, self._max_bytes = serving, computing, max_bytes
        self.devices: Sequence[str] = serving.devices

    async def build_all(
        self, uids: Sequence[str], run: SignedRun | None, *, on_built: Callable[[], None]
    ) -> dict[str, ExpertBackend]:
        """Return them by uid. Raises: ValueError."""
        name = self._serving.expert_class if run is None else run.manifest.expert
        return await build_all(name, uids, lambda uid: self.build(uid, run), on_built=on_built)

    def build(self, uid: str, run: SignedRun | None) -> ExpertBackend:
        """Return one. Blocking. Raises: ValueError."""
        serving = self._serving
        if run is not None:
            if run.manifest.shards:
                raise ValueError(
                    f"{run.full_name} begins from a checkpoint of Hugging Face: say --hf-checkpoint FOLDER"
                )
            return build_run_backend(
                run.manifest,
                uid,
                allowed_modules=serving.allowed_modules,
                computing=self._computing,
                max_bytes=self._max_bytes,
                spread=self.spread,
            )
        return make_backend(
            serving.expert_class,
            optimizer=serving.optimizer,
            learning_rate=serving.learning_rate,
            optimizer_options=dict(serving.optimizer_option),
            scheduler=make_scheduler(serving.schedule, dict(serving.schedule_option)),
            max_batch_size=serving.max_batch_size,
            # the same first weights at each start, others for each expert
            seed=zlib.crc32(f"{serving.seed}/{uid}".encode()),
            sizes=dict(serving.sizes),
            settings=backend_settings(dict(serving.training), self._computing),
            max_bytes=self._max_bytes,
            spread=self.spread,
        )


class CheckpointBuilder(ExpertBuilder):
    """Reads them from a checkpoint of Hugging Face Transformers."""

    def __init__(self, serving: ServeOptions, computing: Mapping[str, object], max_bytes: int | None) -> None:
        """Reads the checkpoint's configuration. Blocking. Raises: ValueError."""
        super().__init__(serving, {**computing, "stochastic": False}, max_bytes)
        from tesseract_async.transformers.shards import Checkpoint

        assert serving.hf_checkpoint is not None
        self._checkpoint = Checkpoint(serving.hf_checkpoint)

    async def build_all(
        self, uids: Sequence[str], run: SignedRun | None, *, on_built: Callable[[], None]
    ) -> dict[str, ExpertBackend]:
        """Return them by uid: their weights are read together. Raises: ValueError."""
        with importing():
            found = await asyncio.to_thread(self._build, uids, run)
        for _ in found:
            on_built()
        return found

    def build(self, uid: str, run: SignedRun | None) -> ExpertBackend:
        """Return one. Blocking. Raises: ValueError."""
        return self._build([uid], run)[uid]

    def _build(self, uids: Sequence[str], run: SignedRun | None) -> dict[str, ExpertBackend]:
        from tesseract_async.transformers.serving import CheckpointExperts, manifest_fields

        serving, checkpoint = self._serving, self._checkpoint
        if run is None:
            experts = CheckpointExperts(checkpoint, dtype=serving.dtype, master=serving.master)
            rates = {"learning_rate": serving.learning_rate, **dict(serving.optimizer_option)}
            rule = None if serving.optimizer is None else (serving.optimizer, rates)
            scheduler = make_scheduler(serving.schedule, dict(serving.schedule_option))
            settings = backend_settings(dict(serving.training), self._computing)

            def make(_: str, build: Callable[[], Built], like: ExpertBackend | None) -> ExpertBackend:
                return backend_of(
                    build,
                    optimizer=rule,
                    scheduler=scheduler,
                    max_batch_size=serving.max_batch_size,
                    settings=settings,
                    spread=None,
                    like=like,
                )

            return experts.build(uids, make, trains=rule is not None)
        manifest = run.manifest
        numbers = {name: manifest.sizes.get(name) for name in ("dtype", "master")}
        fields = manifest_fields(checkpoint, **numbers)  # type: ignore[arg-type]
        sizes: Mapping[str, object] = fields.pop("sizes")
        manifest.check(fields | {f"sizes.{name}": value for name, value in sizes.items()}, run=run.full_name)
        checkpoint.shards = frozenset(manifest.shards)
        experts = CheckpointExperts(checkpoint, **numbers)  # type: ignore[arg-type]

        def make_of_run(uid: str, build: Callable[[], Built], like: ExpertBackend | None) -> ExpertBackend:
            return build_run_backend(manifest, uid, computing=self._computing, build=build, like=like)

        return experts.build(uids, make_of_run, trains=manifest.optimizer is not None)


class SpreadBuilder(ExpertBuilder):
    """Builds them in all processes of a job, of which each makes one of these."""

    link: MeshLink

    def __init__(self, serving: ServeOptions, computing: Mapping[str, object], max_bytes: int | None) -> None:
        """Meet the others. Blocking. Raises: ValueError for an unknown plan, or without a job; TimeoutError."""
        import torch.distributed as dist

        if not dist.is_available():
            raise ValueError("--shard needs a PyTorch with torch.distributed")
        from torch.distributed.device_mesh import init_device_mesh

        from tesseract_async.runtime.mesh import Spread
        from tesseract_async.runtime.mesh_job import join_job, link_of_job
        from tesseract_async.runtime.mesh_plans import check_torch, find_plan

        assert serving.shard is not None
        check_torch()
        plan = find_plan(serving.shard)
        join_job(serving.stall_timeout)
        self.link = link_of_job(serving.stall_timeout)
        size = self.link.size
        super().__init__(serving, computing, None if max_bytes is None else max_bytes * size)
        on_gpu = "nccl" in str(dist.get_backend())
        mesh = init_device_mesh("cuda" if on_gpu else "cpu", (size,), mesh_dim_names=("processes",))
        self.spread = Spread(mesh, plan, serving.stall_timeout)
        self.devices = [f"cuda:{torch.cuda.current_device()}" if on_gpu else "cpu"]
        self._index = self.link.add(self)

    @property
    def leads(self) -> bool:
        return self.link.rank == 0

    async def build_all(
        self, uids: Sequence[str], run: SignedRun | None, *, on_built: Callable[[], None]
    ) -> dict[str, ExpertBackend]:
        """Return them by uid: one after another, as all processes do. Raises: ValueError; Overloaded."""
        found = {}
        for uid in uids:
            found[uid] = await asyncio.to_thread(self.build, uid, run)
            on_built()
        return found

    def build(self, uid: str, run: SignedRun | None) -> ExpertBackend:
        """Return one, which all processes build. Blocking. Raises: ValueError; Overloaded."""
        built: ExpertBackend = self.link.command(self._index, "build", [uid, None if run is None else run.blob])[0]
        return built

    def carry_out(self, name: str, args: Sequence[Value]) -> ExpertBackend | None:
        uid, blob = args
        backend = super().build(uid, None if blob is None else RUNS.read(blob))
        return backend if self.leads else None

    def recover(self) -> None:
        """Do nothing: what could not be built is not there."""

    def follow(self) -> None:
        click.echo(f"process {self.link.rank} of {self.link.size} follows", err=True)
        self.link.follow()
