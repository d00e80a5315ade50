"""`tesseract serve`: hosts experts until told to leave."""

from __future__ import annotations

from collections.abc import Callable

import click
from click.core import ParameterSource

from tesseract_async.admission import Policy
from tesseract_async.cli.access import access_options, training_option
from tesseract_async.cli.config_file import config_option
from tesseract_async.cli.options import NodeOptions, check_folder, find_code_here, node_options
from tesseract_async.cli.running import asynchronous, importing, spinner
from tesseract_async.cli.serve_options import ServeOptions, serve_options
from tesseract_async.cli.volunteer_options import volunteer_options
from tesseract_async.server.contract import VolunteerSettings


@click.command("serve")
@serve_options
@volunteer_options
@access_options
@training_option
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
        raise click.UsageError("--grant goes with --run NAME and with --identity FILE, whose grant it is")

    def is_given(name: str) -> bool:
        return click.get_current_context().get_parameter_source(name) not in (ParameterSource.DEFAULT, None)

    if ":" in serving.expert_class or serving.allowed_modules:
        find_code_here()
    if serving.checkpoint_dir is not None:
        check_folder(serving.checkpoint_dir, "--checkpoint-dir")

    with spinner("loading PyTorch"), importing():
        from tesseract_async.cli.hosting import Hosting

    hosting = Hosting(
        serving,
        node=node,
        policy=policy,
        limits=limits,
        given=manifest_fields(serving, is_given),
        keeps_learning_rate=is_given("learning_rate"),
    )
    return await hosting.main()


def manifest_fields(serving: ServeOptions, is_given: Callable[[str], bool]) -> dict[str, object]:
    """Return the fields of a run's manifest that the user gave as flags: they are checked against the run's."""
    fields: dict[str, tuple[str, object]] = {
        "expert_class": ("expert", serving.expert_class),
        "optimizer": ("optimizer", serving.optimizer),
        "learning_rate": ("optimizer_options.learning_rate", serving.learning_rate),
        "max_batch_size": ("training.max_batch_size", serving.max_batch_size),
        "seed": ("seed", serving.seed),
    }
    found = {field: value for flag, (field, value) in fields.items() if is_given(flag)}
    return found | {f"sizes.{name}": value for name, value in serving.sizes}
