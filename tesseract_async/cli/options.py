"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])


def node_options(command: Command) -> Command:
    """How the node of a long-running command listens, and whom it joins."""
    options = [
        click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 for all."),
        click.option("--port", default=0, type=click.IntRange(0, 65535), help="UDP and TCP port; 0 takes a free one."),
        click.option(
            "--initial-peers",
            "-p",
            multiple=True,
            metavar="HOST:PORT[/PEER_ID]",
            help="A node of the swarm to join; may be given several times, or as one list with commas.",
        ),
        click.option("--announce", metavar="HOST:PORT", help="What others should dial, if not what is listened on."),
        click.option("--public", is_flag=True, help="This is the first node of a swarm and can be reached by all."),
        click.option(
            "--identity",
            type=click.Path(dir_okay=False),
            help="File with this node's key, made if missing. Without one, the node is a new one at each start.",
        ),
        click.option("--verbose", "-v", is_flag=True, help="Log what goes on, not only what goes wrong."),
        click.option("--leave-with-parent", is_flag=True, hidden=True, help="Leave when standard input ends."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def peers(values: tuple[str, ...]) -> list[str]:
    """What `--initial-peers` gave, with lists taken apart."""
    return [peer.strip() for value in values for peer in value.split(",") if peer.strip()]


def joining_options(command: Command) -> Command:
    """For commands that join a swarm, do something and end: whom to join."""
    options = [
        click.option(
            "--initial-peers",
            "-p",
            multiple=True,
            required=True,
            metavar="HOST:PORT[/PEER_ID]",
            help="A node of the swarm to join; may be given several times, or as one list with commas.",
        ),
        click.option("--verbose", "-v", is_flag=True, help="Log what goes on, not only what goes wrong."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


patterns_argument = click.argument("patterns", nargs=-1)
"""Which grids to show."""
