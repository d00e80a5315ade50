"""`tesseract serve`: hosts experts until told to leave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from tesseract_async.cli.access import TRAINING, access_options, policy_of
from tesseract_async.cli.config_file import config_option
from tesseract_async.cli.limits import limit_options, volunteer_settings
from tesseract_async.cli.options import check_folder, find_code_here, node_options, outside_help, peers, text_or_file
from tesseract_async.cli.running import importing, set_up_logging
from tesseract_async.cli.running import run as run_main
from tesseract_async.cli.units import LEARNING_RATE, MANY, MAX_THREADS, PERIOD, SECONDS, SECONDS_ABOVE_ZERO
from tesseract_async.cli.waiting import sign

MAX_EXPERTS = 4096
"""That one server hosts."""


@click.command("serve")
@click.option(
    "--experts",
    "patterns",
    multiple=True,
    metavar="PATTERN",
    help="Uids to host, such as ffn.3.7 or 'ffn.[0:4].[0:16]'; may be given several times.",
)
@click.option(
    "--num-experts",
    type=click.IntRange(1, MAX_EXPERTS),
    help="Host so many of the pattern, or of the run: free ones, else those with the fewest replicas.",
)
@click.option(
    "--run",
    "run_name",
    metavar="NAME[@PEER_ID]",
    help="Take part in this run: everything about its experts comes from the manifest that its author signed.",
)
@click.option(
    "--grant",
    metavar="TEXT|FILE",
    help="What the run's owner handed on, a grant or an invite: needed once; not in open runs.",
)
@click.option(
    "--allow-module",
    "allowed_modules",
    multiple=True,
    metavar="MODULE",
    help="A run may name expert classes of this Python module: its code will run here.",
)
@click.option("--expert-class", default="ffn", show_default=True, help="Name of a ready-made class, or module:builder.")
@click.option(
    "--size",
    "sizes",
    multiple=True,
    metavar="NAME=NUMBER",
    help="A size that the class takes, such as in_features=1024; may be given several times.",
)
@click.option(
    "--optimizer",
    default="adam",
    show_default=True,
    type=click.Choice(["adam", "adamw", "sgd", "none"]),
    help="Steps the experts; none freezes them. Another one than a checkpoint's begins without its memory.",
)
@click.option(
    "--learning-rate",
    default=1e-3,
    show_default=True,
    type=LEARNING_RATE,
    help="Of the optimizer. Given on purpose, it holds instead of a checkpoint's.",
)
@click.option(
    "--max-batch-size", default=4096, show_default=True, type=click.IntRange(1, MANY), help="Rows computed at once."
)
@click.option("--seed", default=0, show_default=True, help="Of the experts' first weights, together with their uids.")
@click.option(
    "--device",
    "devices",
    multiple=True,
    default=("cpu",),
    show_default=True,
    help="cpu, cuda, cuda:1, ...; may be given several times: the experts are spread over them in turn.",
)
@click.option(
    "--threads",
    default=1,
    show_default=True,
    type=click.IntRange(1, MAX_THREADS),
    help="CPU threads of one computation.",
)
@click.option(
    "--autocast",
    type=click.Choice(["bf16", "fp16"]),
    help="Compute in this type where PyTorch deems it safe; weights and answers keep theirs.",
)
@click.option(
    "--compile", "compile_mode", metavar="MODE", help="torch.compile's mode, such as default; needs a C++ compiler."
)
@click.option("--cuda-graphs", is_flag=True, help="Record the forward pass of each preferred size, on a GPU.")
@click.option(
    "--preferred-size",
    "preferred_sizes",
    multiple=True,
    type=click.IntRange(1, MANY),
    help="Rows at which batches are best cut, and padded with --compile or --cuda-graphs; may be given several times.",
)
@click.option(
    "--checkpoint-dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where weights and optimizer states are kept; a restart goes on from there.",
)
@click.option(
    "--sync-every",
    type=SECONDS_ABOVE_ZERO,
    default=30.0,
    show_default=True,
    help="How often state is pulled of experts that another server trains.",
)
@click.option(
    "--leave-within",
    type=SECONDS,
    default=30.0,
    show_default=True,
    help="How long leaving may take before what is not finished is dropped; saving comes after.",
)
@click.option(
    "--stall-timeout",
    type=SECONDS_ABOVE_ZERO,
    default=60.0,
    show_default=True,
    help="How long one batch may take before the device counts as hung, and callers are sent to other servers.",
)
@click.option("--checkpoint-period", default=60.0, show_default=True, type=PERIOD, help="Seconds between checkpoints.")
@click.option(
    "--ttl",
    default=45.0,
    show_default=True,
    type=PERIOD,
    help="Seconds until others forget this server if it vanishes.",
)
@click.option(
    "--report-period", type=PERIOD, help="Print a line of JSON with the experts' versions every so many seconds."
)
@limit_options
@access_options
@TRAINING
@node_options
@config_option
@click.pass_context
def command(ctx: click.Context, /, **values: Any) -> None:
    """Lend this machine: host experts, train them as others send gradients, and keep their weights.

    Say what to host by --experts, by --run and --num-experts, or in a file (--config; see examples/volunteer.toml).

    Prints one line of JSON on standard output once the experts can be found. Ctrl-C leaves cleanly: experts that
    another server follows are handed over to it, what is running is finished, the experts are withdrawn from the
    network, and their weights are saved. SIGUSR1 saves them at once.
    """
    set_up_logging(verbose=values["verbose"])
    limits = volunteer_settings(values)
    policy = policy_of(values)
    values["sizes"] = _sizes(values["sizes"])
    values["optimizer"] = None if values["optimizer"] == "none" else values["optimizer"]
    if not values["patterns"] and values["run_name"] is None:
        raise click.UsageError("say what to host: --experts PATTERN, or --run NAME")
    _check_patterns(values["patterns"], values["num_experts"])
    if values["grant"] is not None and (values["run_name"] is None or values["identity"] is None):
        raise click.UsageError("--grant goes with --run NAME and with --identity FILE, whose grant it is")

    def is_given(name: str) -> bool:
        return ctx.get_parameter_source(name) not in (ParameterSource.DEFAULT, None)

    # a file's ~ is not the shell's business
    checkpoint_dir, identity = (
        None if values[name] is None else Path(values[name]).expanduser() for name in ("checkpoint_dir", "identity")
    )

    if ":" in values["expert_class"] or values["allowed_modules"]:
        find_code_here()
    if checkpoint_dir is not None:
        check_folder(checkpoint_dir, "--checkpoint-dir")

    async def main() -> int:
        with sign("loading PyTorch"), importing():
            from tesseract_async.cli.hosting import AUTOCAST, Hosting, ServePlan, manifest_fields

        plan = ServePlan(
            patterns=values["patterns"],
            num_experts=values["num_experts"],
            run=values["run_name"],
            grant=text_or_file(values["grant"]),
            allowed_modules=values["allowed_modules"],
            given=manifest_fields(values, is_given),
            expert_class=values["expert_class"],
            sizes=values["sizes"],
            optimizer=values["optimizer"],
            learning_rate=values["learning_rate"],
            max_batch_size=values["max_batch_size"],
            seed=values["seed"],
            devices=values["devices"],
            threads=values["threads"],
            checkpoint_dir=checkpoint_dir,
            checkpoint_period=values["checkpoint_period"],
            ttl=values["ttl"],
            sync_every=values["sync_every"],
            stall_timeout=values["stall_timeout"],
            report_period=values["report_period"],
            limits=limits,
            node={
                "host": values["host"],
                "port": values["port"],
                "initial_peers": peers(values["initial_peers"]),
                "announce": values["announce"],
                "public": values["public"],
                **outside_help(values),
                "identity": identity,
                "policy": policy,
            },
            leave_with_parent=values["leave_with_parent"],
            leave_within=values["leave_within"],
            computing={
                "autocast": AUTOCAST[values["autocast"]],
                "compile_mode": values["compile_mode"],
                "cuda_graphs": values["cuda_graphs"],
                "own_options": ("lr",) if is_given("learning_rate") else (),
                "preferred_sizes": tuple(sorted(values["preferred_sizes"])),
            },
        )
        return await Hosting(plan).main()

    run_main(main)


def _check_patterns(patterns: tuple[str, ...], num_experts: int | None) -> None:
    """Raises: click.BadParameter for malformed patterns, and for too many experts unless some are to be chosen."""
    from tesseract_async.experts import ExpertPattern

    for text in patterns:
        try:
            pattern = ExpertPattern.parse(text)
        except ValueError as error:
            raise click.BadParameter(str(error), param_hint="--experts") from None
        size = pattern.num_uids
        if num_experts is None and size > MAX_EXPERTS:
            raise click.BadParameter(
                f"{text} are {size} experts; one server hosts at most {MAX_EXPERTS}: say --num-experts to choose some",
                param_hint="--experts",
            )


def _sizes(values: tuple[str, ...]) -> dict[str, int | float]:
    sizes: dict[str, int | float] = {}
    for value in values:
        name, separator, number = value.partition("=")
        try:
            if not (name.isidentifier() and separator):
                raise ValueError
            sizes[name] = float(number) if "." in number else int(number)
        except ValueError:
            raise click.BadParameter(f"{value!r} is not like in_features=1024", param_hint="--size") from None
    return sizes
