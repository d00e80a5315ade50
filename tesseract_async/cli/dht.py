"""`tesseract dht`: a node that only routes and stores. It imports torch only in order to hold states of a run."""

import contextlib
from pathlib import Path

import click

from tesseract_async.admission import Policy
from tesseract_async.cli.access import access_options, describe_policy
from tesseract_async.cli.config_file import config_option
from tesseract_async.cli.flags import options_of
from tesseract_async.cli.options import JOIN_TIMEOUT, NodeOptions, check_folder, node_options
from tesseract_async.cli.running import asynchronous, importing, say, spinner, until_told_to_leave
from tesseract_async.cli.serve_options import ServeOptions
from tesseract_async.cli.types import FOLDER
from tesseract_async.monitoring import StatusService


@click.command("dht")
@click.option(
    "--run",
    "run_name",
    metavar="NAME[@PEER_ID]",
    help="Keep safety copies of this training run's experts; needs --hold.",
)
@options_of(ServeOptions)["hold_bytes"]
@click.option("--hold-dir", type=FOLDER, help="Keep these copies in this folder, and go on from there after a restart.")
@options_of(ServeOptions)["grant"]
@access_options
@node_options
@config_option
@asynchronous
async def command(
    *,
    node: NodeOptions,
    policy: Policy | None,
    run_name: str | None,
    hold_bytes: float | None,
    hold_dir: Path | None,
    grant: str | None,
) -> int:
    """Run a bootstrap node: a first address for others to join by.

    It stores and routes what others publish, and hosts no experts. With --run and --hold it keeps states of that run's
    experts, so that they outlive their servers. Ends with Ctrl-C. To a program or a file it prints one line of JSON
    with its address.
    """
    if (run_name is None) != (hold_bytes is None):
        raise click.UsageError(
            "--run NAME and --hold SIZE go together: which run's experts to hold, and on how much disk"
        )
    if hold_dir is not None:
        check_folder(hold_dir, "--hold-dir")
    async with (
        node.make(policy=policy) as running,
        StatusService(running),
        contextlib.AsyncExitStack() as stack,
    ):
        for line in describe_policy(running.policy):
            click.echo(line, err=True)
        with spinner("joining the network"):
            # the node warns where nobody answers, and keeps asking
            await running.network.wait_joined(JOIN_TIMEOUT)
        if run_name is not None and hold_bytes is not None:
            with spinner("loading PyTorch"), importing():
                from tesseract_async.server.holder import holding

            held = holding(running, run_name, max_bytes=int(hold_bytes), folder=hold_dir, grant=grant)
            click.echo((await stack.enter_async_context(held)).capacity.sentence, err=True)
        address, peer_id = str(running.peer_address), running.peer_id
        click.echo(f"bootstrap node {peer_id.short} is ready; others join with\n", err=True)
        click.echo(f"    --initial-peers {address}\n", err=True)
        reason = await until_told_to_leave(tell_ready=lambda: say("ready", address=address, peer_id=str(peer_id)))
        click.echo(f"leaving ({reason})", err=True)
    return 0
