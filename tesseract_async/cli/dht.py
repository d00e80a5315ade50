"""`tesseract dht`: a node that only routes and stores. It never imports torch."""

from __future__ import annotations

import click

from tesseract_async.admission import Policy
from tesseract_async.cli.access import access_options, describe_policy
from tesseract_async.cli.config_file import config_option
from tesseract_async.cli.options import JOIN_TIMEOUT, NodeOptions, node_options
from tesseract_async.cli.running import asynchronous, say, spinner, until_told_to_leave
from tesseract_async.monitoring import StatusService


@click.command("dht")
@access_options
@node_options
@config_option
@asynchronous
async def command(*, node: NodeOptions, policy: Policy | None) -> int:
    """Run a bootstrap node: a first address for others to join by.

    It stores and routes what others publish, and hosts no experts. Ends with Ctrl-C. To a program or a file
    it prints one line of JSON with its address.
    """
    async with node.make(policy=policy) as running, StatusService(running):
        for line in describe_policy(running.policy):
            click.echo(line, err=True)
        with spinner("joining the network"):
            # the node warns where nobody answers, and keeps asking
            await running.network.wait_joined(JOIN_TIMEOUT)
        address, peer_id = str(running.peer_address), running.peer_id
        click.echo(f"bootstrap node {peer_id.short} is ready; others join with\n", err=True)
        click.echo(f"    --initial-peers {address}\n", err=True)
        reason = await until_told_to_leave(tell_ready=lambda: say("ready", address=address, peer_id=str(peer_id)))
        click.echo(f"leaving ({reason})", err=True)
    return 0
