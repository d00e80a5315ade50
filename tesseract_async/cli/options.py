"""Options that several commands share."""

from __future__ import annotations

import ipaddress
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from tesseract_async.cli.config_file import config_option
from tesseract_async.cli.running import LOG_FORMAT
from tesseract_async.cli.waiting import sign

if TYPE_CHECKING:
    from tesseract_async.admission import Policy
    from tesseract_async.experts import ExpertPattern
    from tesseract_async.node import TesseractNode

Command = TypeVar("Command", bound=Callable[..., Any])

MEMBERS = "tesseract_async.members"
"""Where the commands' context keeps what `--allow-file` said, for those that visit a swarm."""


def _keep_log_format(ctx: click.Context, param: click.Parameter, value: str) -> None:
    ctx.meta[LOG_FORMAT] = value


LOG_OPTIONS = [
    click.option("--verbose", "-v", is_flag=True, help="Log what goes on, not only what goes wrong."),
    click.option(
        "--log-format",
        type=click.Choice(["text", "json"]),
        default="text",
        show_default=True,
        expose_value=False,
        callback=_keep_log_format,
        help="How log lines are written on standard error.",
    ),
]


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
            "--upnp",
            is_flag=True,
            help="Ask the router to let others in (pip install -e '.[upnp]').",
        ),
        click.option("--relay/--no-relay", default=True, show_default=True, help="Relay for others, where reachable."),
        click.option(
            "--stun-server",
            "stun_servers",
            multiple=True,
            metavar="HOST:PORT",
            help="Ask this one, too, how the internet sees this computer; may be given several times.",
        ),
        click.option(
            "--turn-server",
            metavar="USER:PASSWORD@HOST:PORT",
            help="A TURN server for data channels that cannot be punched otherwise.",
        ),
        click.option(
            "--identity",
            type=click.Path(dir_okay=False),
            help="File with this node's key, made if missing. Without one, the node is a new one at each start.",
        ),
        *LOG_OPTIONS,
        click.option("--leave-with-parent", is_flag=True, hidden=True, help="Leave when standard input ends."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def check_folder(folder: Path, flag: str, *, make: bool = True) -> None:
    """Says now what writing there would say later. Raises: click.BadParameter."""
    try:
        if make:
            folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = f"{folder} cannot be written ({error.strerror}): choose another folder"
        raise click.BadParameter(reason, param_hint=flag) from None


def find_code_here() -> None:
    """Lets modules of the present folder be imported, as ``python -m`` does: one's own expert lies where one stands.

    For commands whose user named such code: a run's manifest never brings it in unasked.
    """
    if "" not in sys.path:
        sys.path.insert(0, "")


def outside_help(values: Mapping[str, Any]) -> dict[str, Any]:
    """What `TesseractNode` takes of the options about NATs. Raises: click.BadParameter."""
    from tesseract_async.nat.reach import ReachSettings
    from tesseract_async.nat.turn import TurnServer

    try:
        turn = TurnServer.parse(values["turn_server"]) if values["turn_server"] is not None else None
        reach = ReachSettings(stun_servers=tuple(values["stun_servers"]), turn=turn)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--stun-server, --turn-server") from None
    return {"upnp": values["upnp"], "relay": values["relay"], "reach": reach}


def peers(values: tuple[str, ...]) -> list[str]:
    """What `--initial-peers` gave, with lists taken apart."""
    return [peer.strip() for value in values for peer in value.split(",") if peer.strip()]


def text_or_file(value: str | None) -> str | None:
    """What an option holds, or what the file holds that it names."""
    if value is None:
        return None
    try:
        return Path(value).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError):  # too long for a name, for one
        return value


def host_towards(seeds: Sequence[str]) -> str:
    """What to listen on where nobody said so: loopback if all seeds live there, else every interface.

    From a socket on loopback nothing leaves this computer. Raises: ValueError for a malformed seed.
    """
    from tesseract_async.transport.base import PeerAddress, split_host_port

    hosts = [split_host_port(address)[0] for seed in seeds for address in PeerAddress.parse(seed).addresses]
    local, speaks_v6 = True, False
    for host in hosts:
        try:
            ip = ipaddress.ip_address(host.partition("%")[0])
        except ValueError:
            local = local and host == "localhost"
        else:
            local, speaks_v6 = local and ip.is_loopback, speaks_v6 or ip.version == 6
    if local:
        return "::1" if speaks_v6 else "127.0.0.1"
    return "::" if speaks_v6 else "0.0.0.0"


async def join(node: TesseractNode, *, timeout: float = 10.0) -> None:
    """Waits until a started node knows another one. Raises: click.ClickException if none of its seeds answers."""
    with sign("joining the network"):
        if not await node.network.wait_joined(timeout):
            raise click.ClickException(node.network.trouble or f"no answer in {timeout:.0f} s")


def _keep_members(ctx: click.Context, param: click.Parameter, value: Path | None) -> None:
    if value is not None:
        from tesseract_async.admission import Policy
        from tesseract_async.cli.access import read_list

        ctx.meta[MEMBERS] = Policy.only(read_list(value))


allow_file_option = click.option(
    "--allow-file",
    type=click.Path(path_type=Path),
    expose_value=False,
    callback=_keep_members,
    help="Hear and call only the peers of this file, one a line, as the members of a swarm that is closed by it do.",
)


def visiting_node(initial_peers: tuple[str, ...], identity: str | None, **more: Any) -> TesseractNode:
    """The node of a command that joins, looks and ends; it keeps to `--allow-file`."""
    from tesseract_async.node import TesseractNode

    seeds = peers(initial_peers)
    return TesseractNode(host_towards(seeds), initial_peers=seeds, identity=identity, policy=listed(), **more)


def listed() -> Policy | None:
    """The policy of `--allow-file`; None without one."""
    policy: Policy | None = click.get_current_context().meta.get(MEMBERS)
    return policy


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
        click.option(
            "--identity",
            type=click.Path(dir_okay=False),
            help="File with the key of a member, made if missing: closed swarms know theirs. Else it is nobody's.",
        ),
        allow_file_option,
        *LOG_OPTIONS,
    ]
    for option in reversed(options):
        command = option(command)
    return config_option(command)


run_option = click.option(
    "--run", "run_name", metavar="NAME[@PEER_ID]", help="The run whose experts are meant; else those with bare uids."
)


async def enter(node: TesseractNode, run_name: str | None) -> list[ExpertPattern]:
    """Takes part in the run, if one is named; its grid, or nothing."""
    if run_name is None:
        return []
    authority = await node.join_run(run_name)
    return [authority.run.manifest.pattern]


patterns_argument = click.argument("patterns", nargs=-1)
"""Which grids to show."""
