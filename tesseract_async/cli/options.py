"""Options that several commands share, and what becomes of their values."""

import contextlib
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal

import click

from tesseract_async.admission import Policy
from tesseract_async.cli.flags import FIRST, NO_FLAG, Decorator, Flag, chain, grouped, in_section
from tesseract_async.cli.running import set_up_logging, spinner
from tesseract_async.cli.types import (
    ADDRESS,
    FILE,
    FOLDER,
    LEARNING_RATE,
    OPTIMIZERS,
    PAIR,
    PATTERN,
    PEER_FILE,
    PORT,
    ROWS,
)
from tesseract_async.experts.pattern import ExpertPattern
from tesseract_async.experts.run import Scalar
from tesseract_async.identity import PeerID
from tesseract_async.nat.reach import ReachSettings
from tesseract_async.node import MAX_RECEIVE_BYTES, TesseractNode
from tesseract_async.transport.base import PeerAddress, is_loopback, split_host_port
from tesseract_async.transport.throttle import Throttle

Pairs = tuple[tuple[str, Scalar], ...]
PAIRS: Final = "NAME=VALUE"
JOIN_TIMEOUT = 5.0
"""Seconds that a command waits for the first answer of the network."""


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


def _none_of_none(context: click.Context, option: click.Parameter, value: str) -> str | None:
    return None if value == "none" else value


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
    "--run",
    "run_name",
    metavar="NAME[@PEER_ID]",
    help="Look at the experts of this training run, instead of experts that belong to no run.",
)
patterns_argument = click.argument("patterns", nargs=-1, type=PATTERN)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertOptions:
    """Options that say what experts are: those of one server, or of all who serve a run."""

    expert_class: str = "ffn"
    """Use this kind of expert, ready-made or your own (module:builder)."""
    sizes: Annotated[Pairs, PAIR, Flag("--size", metavar="NAME=NUMBER")] = ()
    """Set a size of the experts, such as in_features=1024."""
    hf_checkpoint: Annotated[Path | None, FOLDER] = None
    """Take the experts of this mixture-of-experts checkpoint of Hugging Face, as PREFIX.LAYER.EXPERT."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Compute the checkpoint's experts in this number type instead of the one they are stored in."""
    master: Literal["float32"] | None = None
    """Keep and train the checkpoint's weights in this number type, whatever they are computed in."""
    optimizer: Annotated[str | None, OPTIMIZERS, Flag(callback=_none_of_none)] = "adam"
    """Train the experts with this optimizer; none keeps their weights as they are."""
    learning_rate: Annotated[float, LEARNING_RATE] = 1e-3
    """Train at this rate; if given, it replaces a checkpoint's."""
    optimizer_option: Annotated[Pairs, PAIR, Flag(metavar=PAIRS)] = ()
    """Set an option of the optimizer, such as weight_decay=0.01 or beta1=0."""
    schedule: Literal["linear", "cosine"] | None = None
    """Let the learning rate fall over time in this shape, after a warm-up."""
    schedule_option: Annotated[Pairs, PAIR, Flag(metavar=PAIRS)] = ()
    """Set an option of the schedule, such as num_warmup_steps=100 or num_steps=10000."""
    training: Annotated[Pairs, PAIR, Flag(metavar=PAIRS)] = ()
    """Change how the experts learn, such as clip_gradient_norm=1 or merge_backward=false."""
    max_batch_size: Annotated[int, ROWS] = 4096
    """Compute at most this many rows of input at once."""
    seed: int = 0
    """Draw the experts' first weights from this seed; the same seed gives the same weights."""

    def __post_init__(self) -> None:
        """Raises: click.UsageError."""
        if self.hf_checkpoint is None and (self.dtype or self.master):
            raise click.UsageError("--dtype and --master need --hf-checkpoint")
        if self.schedule is None and self.schedule_option:
            raise click.UsageError("--schedule-option needs --schedule")


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeOptions:
    """Options of a long-running command's node: where it listens, and whom it joins."""

    initial_peers: Annotated[Sequence[str], NO_FLAG] = ()
    host: str = "127.0.0.1"
    """Listen on this address; 0.0.0.0 lets other computers reach this one."""
    identity: Annotated[Path | None, FILE] = None
    """Use the key in this file, made if missing, so that a restart is the same node."""

    port: Annotated[int, PORT] = 0
    """Listen on this port, by UDP and by TCP; 0 takes a free one."""
    announce: Annotated[str | None, Flag(metavar="HOST:PORT")] = None
    """Tell others to connect to this address instead of the one of --host."""
    public: bool = False
    """Say that all others can reach this computer, as the first node of a swarm on the internet has to."""
    upnp: bool = False
    """Ask the router to let others in (pip install -e '.[upnp]')."""
    relay: Annotated[bool, Flag("--relay/--no-relay")] = True
    """Pass on traffic between other nodes that cannot connect to each other directly."""
    stun_servers: Annotated[tuple[str, ...], ADDRESS, Flag("--stun-server", metavar="HOST:PORT")] = ()
    """Ask this STUN server, too, by which address the internet sees this computer."""

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
            reach=ReachSettings(stun_servers=self.stun_servers),
            throttle=throttle,
            max_receive_bytes=MAX_RECEIVE_BYTES if max_receive_bytes is None else max_receive_bytes,
        )


node_options = chain(
    grouped(
        "node", NodeOptions, in_section(FIRST, initial_peers_option()), sections={"host": FIRST, "port": "Network"}
    ),
    leave_with_parent_option,
    log_options,
)
"""Options of commands that run a node until they are told to leave: a `NodeOptions` as the argument `node`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Visit:
    """The options of a command that joins a swarm only to look, or to do one thing."""

    initial_peers: Annotated[Sequence[str], NO_FLAG]
    identity: Annotated[Path | None, FILE] = None
    """Join with the key in this file, if only listed members may join."""
    members: Annotated[frozenset[PeerID] | None, PEER_FILE, Flag("--allow-file")] = None
    """Deal only with the peers in this file, one id a line."""

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


visit_options = chain(grouped("visit", Visit, initial_peers_option(required=True)), log_options)
"""Options of commands that join a swarm, do something and end: a `Visit` as the argument `visit`."""


def host_towards(seeds: Sequence[str]) -> str:
    """Return the address to listen on if the user gave none: loopback if all seeds are there, else every interface.

    A socket on loopback cannot reach other computers. Raises: ValueError for a malformed seed.
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
