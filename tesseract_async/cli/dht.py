"""`tesseract dht`: a node that only routes and stores. It never imports torch."""

from __future__ import annotations

from typing import Any

import click

from tesseract_async.cli.access import access_options, describe_policy, policy_of
from tesseract_async.cli.config_file import config_option
from tesseract_async.cli.options import node_options, outside_help, peers
from tesseract_async.cli.running import run, say, set_up_logging, until_told_to_leave
from tesseract_async.cli.waiting import sign

JOIN_TIMEOUT = 12.0


@click.command("dht")
@access_options
@node_options
@config_option
def command(
    host: str,
    port: int,
    initial_peers: tuple[str, ...],
    announce: str | None,
    public: bool,
    identity: str | None,
    verbose: bool,
    leave_with_parent: bool,
    **outside: Any,
) -> None:
    """Run a bootstrap node: a first address for others to join by.

    It stores and routes what others publish, and hosts no experts. Prints one line of JSON with its address on
    standard output, and ends with Ctrl-C.
    """
    set_up_logging(verbose=verbose)
    policy = policy_of(outside)

    async def main() -> int:
        from tesseract_async.monitoring import StatusService
        from tesseract_async.node import TesseractNode

        node = TesseractNode(
            host,
            port,
            initial_peers=peers(initial_peers),
            announce=announce,
            public=public,
            **outside_help(outside),
            identity=identity,
            policy=policy,
        )
        async with node, StatusService(node):
            for line in describe_policy(node.policy):
                click.echo(line, err=True)
            with sign("joining the network"):
                await node.network.wait_joined(JOIN_TIMEOUT)  # the node warns where nobody answers, and goes on asking
            address = str(node.peer_address)
            click.echo(f"bootstrap node {node.peer_id.short} is ready; others join with\n", err=True)
            click.echo(f"    --initial-peers {address}\n", err=True)
            reason = await until_told_to_leave(
                watch_stdin=leave_with_parent,
                tell_ready=lambda: say("ready", address=address, peer_id=str(node.peer_id)),
            )
            click.echo(f"leaving ({reason})", err=True)
        return 0

    run(main)
