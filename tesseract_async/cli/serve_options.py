"""The options of `tesseract serve`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import click

from tesseract_async.cli.flags import FIRST, Flag, grouped
from tesseract_async.cli.options import ExpertOptions
from tesseract_async.cli.types import FOLDER, METRICS_ADDRESS, PERIOD, ROWS, SECONDS, TEXT_OR_FILE, THREADS
from tesseract_async.experts.pattern import ExpertPattern
from tesseract_async.server.contract import VolunteerSettings, check_name

MAX_EXPERTS = 16384
"""Experts that one server hosts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions(ExpertOptions):
    """The options that say what to host, and how, as the user gave them."""

    step: Literal["async", "lockstep"] = "async"
    """Let each expert learn as gradients come (async), or all at once when their one trainer says so (lockstep)."""
    shard: Annotated[str | None, Flag(metavar="fsdp|tp|MODULE:FUNCTION")] = None
    """Spread each expert over all processes of the job that torchrun has started, by this plan."""
    checkpoint_period: Annotated[float, PERIOD] = 60.0
    """Save often enough that a crash loses at most this much work, such as '5 min'."""

    patterns: Annotated[tuple[ExpertPattern, ...], Flag("--experts", metavar="PATTERN")] = ()
    """Host these experts, such as ffn.3.7 or 'ffn.[0:4].[0:16]'."""
    num_experts: Annotated[int | None, click.IntRange(1, MAX_EXPERTS)] = None
    """Host this many experts of the pattern or run, free ones first; of a run, as many as fit by default."""
    run_name: Annotated[str | None, Flag("--run", metavar="NAME[@PEER_ID]")] = None
    """Take part in this training run, whose owner sets its experts."""
    grant: Annotated[str | None, TEXT_OR_FILE, Flag(metavar="TEXT|FILE")] = None
    """Present this grant or invite, which the run's owner gave you, as text or as a file; once is enough."""
    devices: Annotated[tuple[str, ...], Flag("--device")] = ("cpu",)
    """Compute on this device, such as cpu or cuda:1, or spread the experts over several."""
    checkpoint_dir: Annotated[Path | None, FOLDER] = None
    """Keep the experts in this folder, and go on from there after a restart."""

    hold_bytes: int | None = None
    """Keep safety copies of other members' experts on at most this much disk, such as '20 GB'; 0 keeps none."""
    allowed_modules: Annotated[tuple[str, ...], Flag("--allow-module", metavar="MODULE")] = ()
    """Let a run use experts from this Python module, whose code then runs on this computer."""
    name: str = ""
    """Show this machine by this name in dashboards and lists of contributors."""

    threads: Annotated[int, THREADS] = 1
    """Use this many CPU threads for one computation."""

    metrics_port: Annotated[str | None, METRICS_ADDRESS, Flag(metavar="[HOST:]PORT")] = None
    """Serve this node's metrics for Prometheus on this port, under /metrics."""

    autocast: Literal["bf16", "fp16"] | None = None
    """Compute in this shorter number type where PyTorch considers that safe (automatic mixed precision)."""
    compile_mode: Annotated[str | None, Flag("--compile", metavar="MODE")] = None
    """Compile the experts by torch.compile in this mode, such as default, for speed."""
    cuda_graphs: bool = False
    """Record the forward pass of each --preferred-size as a CUDA graph, which makes small experts faster."""
    preferred_sizes: Annotated[tuple[int, ...], ROWS, Flag("--preferred-size")] = ()
    """Cut batches at this number of rows, and pad them to it with --compile or --cuda-graphs."""
    sync_every: Annotated[float, PERIOD] = 30.0
    """Copy experts that another server trains at least this often, to replace it if it vanishes."""
    ttl: Annotated[float, PERIOD] = 45.0
    """Let others forget this server this long after it vanished."""
    stall_timeout: Annotated[float, PERIOD] = 60.0
    """Take a device for broken once one batch has taken this long."""
    leave_within: Annotated[float, SECONDS] = 30.0
    """Spend at most this long on finishing work and handing over when leaving."""
    report_period: Annotated[float | None, PERIOD] = None
    """Print the steps that each expert has taken, as a line of JSON, this often."""

    def __post_init__(self) -> None:
        """Raises: ValueError, click.BadParameter."""
        ExpertOptions.__post_init__(self)
        check_name(self.name)
        if not self.patterns and self.run_name is None:
            raise ValueError("say what to host: --experts PATTERN, or --run NAME")
        if self.shard is not None and (
            self.cuda_graphs or self.compile_mode is not None or len(self.devices) > 1 or self.step == "lockstep"
        ):
            raise click.UsageError(
                "--shard takes one --device, and cannot be combined with --compile, --cuda-graphs or --step lockstep"
            )
        if self.hf_checkpoint is not None and (self.shard or self.sizes or self.autocast):
            raise click.UsageError(
                "--hf-checkpoint cannot be combined with --shard, --size or --autocast (use --dtype)"
            )
        for pattern in self.patterns if self.num_experts is None else ():
            if (size := pattern.num_uids) > MAX_EXPERTS:
                raise click.BadParameter(
                    f"{pattern} stands for {size} experts; one server hosts at most {MAX_EXPERTS}: say "
                    "--num-experts to choose some",
                    param_hint="--experts",
                )


serve_options = grouped(
    "serving",
    ServeOptions,
    sections={
        "expert_class": "Experts",
        "patterns": FIRST,
        "hold_bytes": "Run",
        "threads": "Limits",
        "metrics_port": "Network",
        "autocast": "Advanced",
    },
)
volunteer_options = grouped(
    "limits", VolunteerSettings, sections={"max_memory_bytes": FIRST, "max_upload_rate": "Limits"}
)
"""Options about what a volunteer lends of this computer, and when: a `VolunteerSettings` as the argument `limits`."""
