"""`tesseract serve`: hosts experts until told to leave."""

import dataclasses
from collections.abc import Callable

import click
from click.core import ParameterSource

from tesseract_async.admission import Policy
from tesseract_async.cli.access import server_access_options
from tesseract_async.cli.config_file import config_option
from tesseract_async.cli.flags import Sectioned
from tesseract_async.cli.options import NodeOptions, check_folder, find_code_here, node_options
from tesseract_async.cli.running import asynchronous, importing, spinner
from tesseract_async.cli.serve_options import ServeOptions, serve_options, volunteer_options
from tesseract_async.server.contract import VolunteerSettings

SIZES = {
    "ffn": "in_features=1024, hidden_features=4 x in_features, out_features=in_features",
    "transformer": "in_features=512, num_heads=8, sequence_length=128, dropout=0",
    "block": "in_features=512, num_heads=8, sequence_length=128",
    "linear": "in_features=1024, out_features=in_features",
    "nop": "in_features=1024",
}
"""The sizes of every ready-made class with their defaults: help loads no PyTorch to find them."""


@click.command(
    "serve",
    cls=Sectioned,
    epilog="\b\nSizes of the ready-made classes (--expert-class, --size):\n"
    + "\n".join(f"  {name}: {sizes}" for name, sizes in SIZES.items()),
)
@serve_options
@volunteer_options
@server_access_options
@node_options
@config_option
@asynchronous
async def command(
    *,
    serving: ServeOptions,
    limits: VolunteerSettings,
    policy: Policy | None,
    node: NodeOptions,
) -> int:
    """Lend this machine: host experts, train them as others send gradients, and keep their weights.

    Say what to host by --experts, by --run and --num-experts, or in a file (--config; see examples/volunteer.toml).

    To a program or a file it prints one line of JSON once the experts can be found. Ctrl-C leaves cleanly: experts that
    other servers have copies of are handed over to them, running work is finished, the experts are withdrawn from the
    network, and their weights are saved. SIGUSR1 saves them at once.
    """
    if serving.grant is not None and (serving.run_name is None or node.identity is None):
        raise click.UsageError("--grant needs --run NAME, and the --identity FILE that it was given to")

    def is_given(name: str) -> bool:
        return click.get_current_context().get_parameter_source(name) not in (ParameterSource.DEFAULT, None)

    if serving.hf_checkpoint is not None and is_given("expert_class"):
        raise click.UsageError(
            "--hf-checkpoint cannot be combined with --expert-class: the experts are the checkpoint's"
        )
    if serving.hf_checkpoint is not None and not is_given("optimizer"):
        serving = dataclasses.replace(serving, optimizer="adamw")  # as Transformers trains
    if ":" in f"{serving.expert_class}{serving.shard}" or serving.allowed_modules:
        find_code_here()
    if serving.checkpoint_dir is not None:
        check_folder(serving.checkpoint_dir, "--checkpoint-dir")

    with spinner("loading PyTorch"), importing():
        import torch

        from tesseract_async.cli.building import SpreadBuilder, make_builder
        from tesseract_async.cli.hosting import Hosting

    torch.set_num_threads(serving.threads)
    # a checkpoint's model is Transformers' own code, which has SciPy for a few losses: a tenth of the imports' time;
    # scikit-learn, which it may look for, does not go without SciPy
    with importing(without=() if serving.hf_checkpoint is None else ("scipy", "sklearn")):
        builder = make_builder(serving, limits, keeps_learning_rate=is_given("learning_rate"))
    if isinstance(builder, SpreadBuilder) and not builder.leads:
        builder.follow()
        return 0
    hosting = Hosting(
        serving,
        node=node,
        policy=policy,
        limits=limits,
        given=given_fields(serving, is_given),
        builder=builder,
    )
    return await hosting.main()


def given_fields(serving: ServeOptions, is_given: Callable[[str], bool]) -> dict[str, object]:
    """Return the fields of a run's manifest that the user gave as flags: they are checked against the run's."""
    fields: dict[str, tuple[str, object]] = {
        "expert_class": ("expert", serving.expert_class),
        "optimizer": ("optimizer", serving.optimizer),
        "learning_rate": ("optimizer_options.learning_rate", serving.learning_rate),
        "schedule": ("schedule", serving.schedule),
        "max_batch_size": ("training.max_batch_size", serving.max_batch_size),
        "seed": ("seed", serving.seed),
        "dtype": ("sizes.dtype", serving.dtype),
        "master": ("sizes.master", serving.master),
        "step": ("training.lockstep", serving.step == "lockstep" or None),
    }
    found = {field: value for flag, (field, value) in fields.items() if is_given(flag)}
    pairs = {
        "sizes": serving.sizes,
        "optimizer_options": serving.optimizer_option,
        "schedule_options": serving.schedule_option,
        "training": serving.training,
    }
    return found | {f"{field}.{name}": value for field, some in pairs.items() for name, value in some}
