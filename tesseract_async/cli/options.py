"""Options that several commands share, and what becomes of their values."""

import contextlib
import functools
import inspect
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import click

from tesseract_async.admission import Policy
from tesseract_async.cli.running import set_up_logging, spinner
from tesseract_async.cli.types import (
    ADDRESS,
    FILE,
    FOLDER,
    OPTIMIZERS,
    PAIR,
    PATTERN,
    PEER_FILE,
    PORT,
    ROWS,
    SIZE,
    THREADS,
)
from tesseract_async.experts.pattern import ExpertPattern
from tesseract_async.identity import PeerID
from tesseract_async.nat.reach import ReachSettings
from tesseract_async.node import MAX_RECEIVE_BYTES, TesseractNode
from tesseract_async.transport.base import PeerAddress, is_loopback, split_host_port
from tesseract_async.transport.throttle import Throttle

Function = Callable[..., object]
Decorator = Callable[[Function], Function]

SECTIONS: Final = ("What matters first", "Experts", "Run", "Limits", "Network", "Advanced")
FIRST: Final = SECTIONS[0]
JOIN_TIMEOUT = 5.0
"""Seconds that a command waits for the first answer of the network."""


def with_options(*options: Decorator | str) -> Decorator:
    """Return a decorator that adds `options` to a command, in the order in which its help lists them.

    A text among them is one of `SECTIONS`: those that follow stand in it, if the command's help has sections.
    """
    title, decorators = SECTIONS[-1], list[Decorator]()
    for one in options:
        if isinstance(one, str):
            title = one
        else:
            decorators.append(functools.partial(_add, one, title))
    return lambda function: functools.reduce(lambda command, option: option(command), reversed(decorators), function)


def _add(option: Decorator, title: str, function: Function) -> Function:
    command = option(function)
    vars(getattr(command, "__click_params__")[-1]).setdefault("section", title)  # noqa: B009  (click's)
    return command


def grouped(name: str | None, make: Callable[..., object], *options: Decorator | str) -> Decorator:
    """Return a decorator that adds `options` to a command, and calls `make` with their values when the command runs.

    The command gets what `make` returns as its argument `name`, in place of the values that `make` has parameters for.
    Without a `name`, `make` is called for what it does. A ValueError that it raises is a usage error.
    """
    parameters = inspect.signature(make).parameters.keys()

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def command(**values: object) -> object:
            taken = {one: values.pop(one) for one in parameters & values.keys()}
            try:
                made = make(**taken)
            except ValueError as error:
                raise click.UsageError(str(error)) from None
            return function(**values, **({} if name is None else {name: made}))

        return with_options(*options)(command)

    return decorate


def several_option(*names: str, help: str, **more: Any) -> Decorator:
    """Return a `click.option` that may be given several times, and says so."""
    return click.option(*names, multiple=True, help=f"{help.removesuffix('.')}; may be given several times.", **more)


class Sectioned(click.Command):
    """A command whose help lists its options in sections; those without one are the advanced ones."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title in SECTIONS:
            mine = (one for one in self.get_params(ctx) if vars(one).get("section", SECTIONS[-1]) == title)
            with formatter.section(title):
                formatter.write_dl([record for one in mine if (record := one.get_help_record(ctx)) is not None])


log_options = grouped(
    None,
    set_up_logging,
    click.option("--verbose", "-v", is_flag=True, help="Log what goes on, not only what goes wrong."),
    click.option(
        "--log-format", type=click.Choice(["text", "json"]), default="text", help="Write the log in this format."
    ),
)


def _split_at_commas(context: click.Context, option: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(part.strip() for value in values for part in value.split(",") if part.strip())


def initial_peers_option(*, required: bool = False, help_text: str = "Join the swarm of this node") -> Decorator:
    """Return the option ``--initial-peers``, whose value is a tuple of addresses."""
    return click.option(
        "--initial-peers",
        "-p",
        multiple=True,
        required=required,
        metavar="HOST:PORT[/PEER_ID]",
        callback=_split_at_commas,
        help=f"{help_text}; may be given several times, or as a list with commas.",
    )


leave_with_parent_option = click.option(
    "--leave-with-parent", is_flag=True, hidden=True, help="Leave when standard input ends."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one line of JSON, for programs.")
run_option = click.option(
    "--run", "run_name", metavar="NAME[@PEER_ID]", help="Look at the experts of this run, not at those outside of runs."
)
expert_class_option = click.option(
    "--expert-class", default="ffn", help="Use this kind of expert, ready-made or your own (module:builder)."
)
checkpoint_options = with_options(
    "Experts",
    click.option(
        "--hf-checkpoint",
        type=FOLDER,
        help="Take the experts of this mixture-of-experts checkpoint of Hugging Face, as PREFIX.LAYER.EXPERT.",
    ),
    click.option(
        "--dtype",
        type=click.Choice(["float32", "bfloat16", "float16"]),
        help="Compute the checkpoint's experts in this number type, not in the checkpoint's.",
    ),
    click.option(
        "--master",
        type=click.Choice(["float32"]),
        help="Keep and train the checkpoint's weights in this number type, whatever they are computed in.",
    ),
)
sizes_option = several_option(
    "--size", "sizes", type=PAIR, metavar="NAME=NUMBER", help="Set a size of the experts, such as in_features=1024."
)
optimizer_option = click.option(
    "--optimizer",
    default="adam",
    type=OPTIMIZERS,
    callback=lambda context, option, value: None if value == "none" else value,
    help="Train the experts with this optimizer; none keeps their weights as they are.",
)


def pairs_option(name: str, help_text: str) -> Decorator:
    """Return an option of NAME=VALUE pairs."""
    return several_option(f"--{name}", name.replace("-", "_"), type=PAIR, metavar="NAME=VALUE", help=help_text)


step_options: tuple[Decorator, ...] = (
    pairs_option("optimizer-option", "Give this to the optimizer, such as weight_decay=0.01 or beta1=0"),
    click.option(
        "--schedule", type=click.Choice(["linear", "cosine"]), help="Change the learning rate over time in this shape."
    ),
    pairs_option("schedule-option", "Give this to the schedule, such as num_warmup_steps=100 or num_steps=10000"),
    pairs_option("training", "Change how steps are taken, such as clip_gradient_norm=1 or merge_backward=false"),
)
"""Options of `tesseract serve`, and of `tesseract run create` for all who serve the run."""
max_batch_size_option = click.option(
    "--max-batch-size", default=4096, type=ROWS, help="Compute at most this many rows at once."
)
threads_option = click.option(
    "--threads", default=1, type=THREADS, help="Use this many CPU threads for one computation."
)
patterns_argument = click.argument("patterns", nargs=-1, type=PATTERN)


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeOptions:
    """Options of a long-running command's node: where it listens, and whom it joins."""

    host: str = "127.0.0.1"
    port: int = 0
    initial_peers: Sequence[str] = ()
    announce: str | None = None
    public: bool = False
    upnp: bool = False
    relay: bool = True
    stun_servers: Sequence[str] = ()
    identity: Path | None = None

    def make(
        self, *, policy: Policy | None = None, throttle: Throttle | None = None, max_receive_bytes: int | None = None
    ) -> TesseractNode:
        """Return the node, not started yet. Raises: what `TesseractNode` raises."""
        return TesseractNode(
            self.host,
            self.port,
            initial_peers=self.initial_peers,
            identity=self.identity,
            announce=self.announce,
            public=self.public,
            upnp=self.upnp,
            relay=self.relay,
            policy=policy,
            reach=ReachSettings(stun_servers=tuple(self.stun_servers)),
            throttle=throttle,
            max_receive_bytes=MAX_RECEIVE_BYTES if max_receive_bytes is None else max_receive_bytes,
        )


_node_group = grouped(
    "node",
    NodeOptions,
    FIRST,
    initial_peers_option(),
    click.option(
        "--host", default="127.0.0.1", help="Listen on this address; 0.0.0.0 lets other computers reach this one."
    ),
    click.option(
        "--identity", type=FILE, help="Use the key in this file, made if missing, so that a restart is the same node."
    ),
    "Network",
    click.option("--port", default=0, type=PORT, help="Listen on this port, by UDP and by TCP; 0 takes a free one."),
    click.option("--announce", metavar="HOST:PORT", help="Tell others to dial this address, not the one of --host."),
    click.option("--public", is_flag=True, help="Be the first node of a swarm: all others can reach this computer."),
    click.option("--upnp", is_flag=True, help="Ask the router to let others in (pip install -e '.[upnp]')."),
    click.option("--relay/--no-relay", default=True, help="Pass on traffic between nodes that cannot meet."),
    several_option(
        "--stun-server",
        "stun_servers",
        type=ADDRESS,
        metavar="HOST:PORT",
        help="Ask this server, too, how the internet sees this computer.",
    ),
    leave_with_parent_option,
)
node_options = with_options(_node_group, log_options)
"""For commands that run a node until they are told to leave: a `NodeOptions` as the argument `node`."""

hold_option = click.option(
    "--hold",
    "hold_bytes",
    type=SIZE,
    help="Keep states of other members' experts of the run on this much disk, such as '20 GB'; 0 for none.",
)

allow_file_option = click.option(
    "--allow-file", "members", type=PEER_FILE, help="Deal only with the peers in this file, one id a line."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Visit:
    """The options of a command that joins a swarm only to look, or to do one thing."""

    initial_peers: Sequence[str]
    identity: Path | None = None
    members: frozenset[PeerID] | None = None

    @contextlib.asynccontextmanager
    async def node(self, *, refresh_period: float = 10.0) -> AsyncIterator[TesseractNode]:
        """Enter with a node that has joined. Raises: click.ClickException if none of its seeds answers."""
        async with TesseractNode(
            host_towards(self.initial_peers),
            initial_peers=self.initial_peers,
            identity=self.identity,
            policy=None if self.members is None else Policy.only(self.members),
            refresh_period=refresh_period,
        ) as node:
            await join(node)
            yield node


def identity_option(flag: str = "--identity") -> Decorator:
    return click.option(flag, type=FILE, help="Join with the key in this file, if only listed members may join.")


visit_options = with_options(
    grouped("visit", Visit, initial_peers_option(required=True), identity_option(), allow_file_option), log_options
)
"""For commands that join a swarm, do something and end: a `Visit` as the argument `visit`."""


def host_towards(seeds: Sequence[str]) -> str:
    """Return what to listen on where the user did not say: loopback if all seeds are there, else every interface.

    From a socket on loopback nothing leaves this computer. Raises: ValueError for a malformed seed.
    """
    hosts = [split_host_port(address)[0] for seed in seeds for address in PeerAddress.parse(seed).addresses]
    local, speaks_v6 = all(map(is_loopback, hosts)), any(":" in host for host in hosts)
    if local:
        return "::1" if speaks_v6 else "127.0.0.1"
    return "::" if speaks_v6 else "0.0.0.0"


async def join(node: TesseractNode) -> None:
    """Wait until a started node knows another one. Raises: click.ClickException if none of its seeds answers."""
    with spinner("joining the network"):
        if not await node.network.wait_joined(JOIN_TIMEOUT):
            raise click.ClickException(node.network.trouble or f"no answer in {JOIN_TIMEOUT:.0f} s")


async def enter(node: TesseractNode, run_name: str | None) -> list[ExpertPattern]:
    """Take part in the run, if one is named; return its grid, or nothing."""
    if run_name is None:
        return []
    authority = await node.join_run(run_name)
    return [authority.run.manifest.pattern]


def check_folder(folder: Path, flag: str, *, make: bool = True) -> None:
    """Check that files can be written in `folder`, before any work is done. Raises: click.BadParameter."""
    try:
        if make:
            folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = f"{folder} cannot be written ({error.strerror}): choose another folder"
        raise click.BadParameter(reason, param_hint=flag) from None


def find_code_here() -> None:
    """Let modules of the working directory be imported, as ``python -m`` does.

    For commands whose user named such code: a run's manifest never brings it in unasked.
    """
    if "" not in sys.path:
        sys.path.insert(0, "")
