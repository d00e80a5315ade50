"""The options of `tesseract serve`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from tesseract_async.cli.options import (
    FIRST,
    checkpoint_options,
    expert_class_option,
    grouped,
    hold_option,
    max_batch_size_option,
    optimizer_option,
    several_option,
    sizes_option,
    step_options,
    threads_option,
)
from tesseract_async.cli.types import (
    FOLDER,
    LEARNING_RATE,
    METRICS_ADDRESS,
    PATTERN,
    PERIOD,
    ROWS,
    SECONDS,
    TEXT_OR_FILE,
)
from tesseract_async.experts.pattern import ExpertPattern
from tesseract_async.experts.run import Scalar
from tesseract_async.server.contract import check_name

MAX_EXPERTS = 16384
"""Experts that one server hosts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """The options that say what to host, and how, as the user gave them."""

    patterns: Sequence[ExpertPattern]
    num_experts: int | None
    hold_bytes: int | None
    run_name: str | None
    grant: str | None
    allowed_modules: Sequence[str]
    expert_class: str
    sizes: Sequence[tuple[str, Scalar]]
    optimizer: str | None
    learning_rate: float
    max_batch_size: int
    seed: int
    devices: Sequence[str]
    threads: int
    autocast: str | None
    compile_mode: str | None
    cuda_graphs: bool
    preferred_sizes: Sequence[int]
    checkpoint_dir: Path | None
    checkpoint_period: float
    sync_every: float
    ttl: float
    stall_timeout: float
    leave_within: float
    report_period: float | None
    optimizer_option: Sequence[tuple[str, Scalar]] = ()
    schedule: str | None = None
    schedule_option: Sequence[tuple[str, Scalar]] = ()
    training: Sequence[tuple[str, Scalar]] = ()
    shard: str | None = None
    hf_checkpoint: Path | None = None
    dtype: str | None = None
    master: str | None = None
    step: str = "async"
    name: str = ""
    metrics_port: str | None = None

    def __post_init__(self) -> None:
        """Raises: ValueError, click.BadParameter."""
        check_name(self.name)
        if not self.patterns and self.run_name is None:
            raise ValueError("say what to host: --experts PATTERN, or --run NAME")
        if self.shard is not None and (
            self.cuda_graphs or self.compile_mode is not None or len(self.devices) > 1 or self.step == "lockstep"
        ):
            raise click.UsageError("--shard goes with one --device, without --compile, --cuda-graphs, --step lockstep")
        if self.hf_checkpoint is None and (self.dtype or self.master):
            raise click.UsageError("--dtype and --master go with --hf-checkpoint")
        if self.schedule is None and self.schedule_option:
            raise click.UsageError("--schedule-option goes with --schedule")
        if self.hf_checkpoint is not None and (self.shard or self.sizes or self.autocast):
            raise click.UsageError("--hf-checkpoint goes without --shard, --size and --autocast (say --dtype)")
        for pattern in self.patterns if self.num_experts is None else ():
            if (size := pattern.num_uids) > MAX_EXPERTS:
                raise click.BadParameter(
                    f"{pattern} are {size} experts; one server hosts at most {MAX_EXPERTS}: say --num-experts to "
                    "choose some",
                    param_hint="--experts",
                )


serve_options = grouped(
    "serving",
    ServeOptions,
    FIRST,
    several_option(
        "--experts",
        "patterns",
        type=PATTERN,
        metavar="PATTERN",
        help="Host these experts, such as ffn.3.7 or 'ffn.[0:4].[0:16]'.",
    ),
    click.option(
        "--num-experts",
        type=click.IntRange(1, MAX_EXPERTS),
        help="Host this many experts of the pattern or run, free ones first; of a run, as many as fit by default.",
    ),
    click.option(
        "--run",
        "run_name",
        metavar="NAME[@PEER_ID]",
        help="Take part in this training run, whose owner sets its experts.",
    ),
    click.option(
        "--grant", type=TEXT_OR_FILE, metavar="TEXT|FILE", help="Show this grant or invite of the run's owner, once."
    ),
    several_option(
        "--device",
        "devices",
        default=("cpu",),
        help="Compute on this device, such as cpu or cuda:1, or spread the experts over several.",
    ),
    click.option(
        "--checkpoint-dir", type=FOLDER, help="Keep the experts in this folder, and go on from there after a restart."
    ),
    "Experts",
    expert_class_option,
    sizes_option,
    checkpoint_options,
    click.option(
        "--step",
        type=click.Choice(["async", "lockstep"]),
        default="async",
        help="Step each expert as gradients come, or all at once when their one trainer says so.",
    ),
    optimizer_option,
    click.option(
        "--learning-rate",
        default=1e-3,
        type=LEARNING_RATE,
        help="Train at this rate; if given, it replaces a checkpoint's.",
    ),
    *step_options,
    max_batch_size_option,
    click.option("--seed", default=0, help="Draw the experts' first weights from this seed and their uids."),
    click.option(
        "--shard",
        metavar="fsdp|tp|MODULE:FUNCTION",
        help="Spread each expert over all processes of the job that torchrun has started, by this plan.",
    ),
    click.option(
        "--checkpoint-period",
        default=60.0,
        type=PERIOD,
        help="Save often enough that a crash loses at most this much work, such as '5 min'.",
    ),
    "Run",
    hold_option,
    several_option(
        "--allow-module",
        "allowed_modules",
        metavar="MODULE",
        help="Let a run use experts from this Python module, whose code then runs on this computer.",
    ),
    click.option(
        "--name",
        default="",
        show_default=False,
        help="Show this machine by this name in dashboards and lists of contributors.",
    ),
    "Limits",
    threads_option,
    "Network",
    click.option(
        "--metrics-port",
        metavar="[HOST:]PORT",
        type=METRICS_ADDRESS,
        help="Serve this node's metrics for Prometheus on this port, under /metrics.",
    ),
    "Advanced",
    click.option(
        "--autocast", type=click.Choice(["bf16", "fp16"]), help="Compute in this shorter number type where it is safe."
    ),
    click.option("--compile", "compile_mode", metavar="MODE", help="Use torch.compile in this mode, such as default."),
    click.option(
        "--cuda-graphs", is_flag=True, help="Record the forward pass of each preferred size as a CUDA graph, on a GPU."
    ),
    several_option(
        "--preferred-size",
        "preferred_sizes",
        type=ROWS,
        help="Cut batches at this number of rows, and pad them to it with --compile or --cuda-graphs.",
    ),
    click.option(
        "--sync-every",
        type=PERIOD,
        default=30.0,
        help="Be at most this far behind other servers whose experts this one follows.",
    ),
    click.option("--ttl", default=45.0, type=PERIOD, help="Let others forget this server this long after it vanished."),
    click.option(
        "--stall-timeout", type=PERIOD, default=60.0, help="Consider a device hung once a batch has taken this long."
    ),
    click.option("--leave-within", type=SECONDS, default=30.0, help="Finish work for at most this long when leaving."),
    click.option("--report-period", type=PERIOD, help="Print the experts' versions as a line of JSON this often."),
)
