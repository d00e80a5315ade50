"""`tesseract run create`: signs the manifest of a training run and keeps it known."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import click
from click.core import ParameterSource

from tesseract_async.cli.config_file import config_option
from tesseract_async.cli.flags import Flag, grouped
from tesseract_async.cli.options import (
    JOIN_TIMEOUT,
    PAIRS,
    ExpertOptions,
    NodeOptions,
    Pairs,
    find_code_here,
    host_towards,
    join,
    node_options,
)
from tesseract_async.cli.running import asynchronous, say, spinner, until_told_to_leave
from tesseract_async.cli.types import GRID, LEARNING_RATE, PAIR, counted, seconds
from tesseract_async.experts.grants import GRANT_SECONDS, Invite
from tesseract_async.experts.ownership import MEMBER, RunOwner, adopt_servers, with_delegates
from tesseract_async.experts.run import RunManifest, sign_run
from tesseract_async.experts.run_directory import enter_run, publish_run
from tesseract_async.identity import PeerID
from tesseract_async.monitoring import StatusService
from tesseract_async.network.address_scope import PUBLIC, kind_of
from tesseract_async.node import TesseractNode
from tesseract_async.transport.base import PeerAddress, ip_version, split_host_port


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions(ExpertOptions):
    """The options that describe a new run."""

    prefix: str = "ffn"
    """Begin the experts' uids with this word."""
    grid: Annotated[tuple[int, ...] | None, GRID, Flag(metavar="32x32")] = None
    """Make this many experts in each dimension."""
    codec: Annotated[Pairs, PAIR, Flag(metavar=PAIRS)] = ()
    """Send inputs, outputs or gradients in fewer bits, such as inputs=bf16."""
    learning_rate: Annotated[float, LEARNING_RATE] = 1e-3
    """Train at this rate."""
    seed: Annotated[int, click.IntRange(0, 2**63 - 1)] = 0
    """Draw the experts' first weights from this seed; the same seed gives the same weights."""
    is_open: Annotated[bool, Flag("--open")] = False
    """Let everybody host and train, not only those with a grant."""
    delegates: Annotated[tuple[PeerID, ...], Flag("--delegate", metavar="PEER_ID")] = ()
    """Let this peer grant, revoke and appoint as you do."""
    replicas: Annotated[int, click.IntRange(1, 16)] = 3
    """Keep this many more copies of each expert."""
    lease: Annotated[float, seconds(1, 86400)] = 30.0
    """Let another server train an expert once the one that does has been silent for this long."""
    sync_every: Annotated[float, seconds(1, 86400)] = 30.0
    """Copy each expert to its replicas this often."""

    def __post_init__(self) -> None:
        """Raises: click.UsageError."""
        if (self.grid is None) == (self.hf_checkpoint is None):
            raise click.UsageError("say --grid, or --hf-checkpoint, whose model gives the grid")
        ExpertOptions.__post_init__(self)


@click.command("create")
@click.argument("name")
@grouped("options", RunOptions)
@click.option(
    "--adopt", is_flag=True, help="Take over the experts that servers host under this prefix outside of runs."
)
@click.option(
    "--once",
    is_flag=True,
    help="Publish the run and exit; unless a server takes part within the hour, the run is forgotten.",
)
@node_options
@config_option
@asynchronous
async def create(*, name: str, options: RunOptions, adopt: bool, once: bool, node: NodeOptions) -> int:
    """Start a training run: sign the description of all its experts.

    Prints the full name, NAME@PEER_ID, and an invite: with it, `tesseract join` is all that others need. Then stays
    until Ctrl-C, keeps the description known and renews grants before they end; servers that take part keep it known,
    too. The run belongs to the key in --identity: keep that file, and a copy (tesseract run backup-key). To choose who
    takes part, see tesseract run grant.
    """
    if node.identity is None:
        raise click.UsageError("say --identity FILE: the run belongs to the key in it")
    if once and not node.initial_peers:
        raise click.UsageError("--once needs --initial-peers: without others, the manifest would vanish with this node")
    if adopt and not node.initial_peers:
        raise click.UsageError("--adopt needs --initial-peers, to find the servers")
    if ":" in options.expert_class:
        find_code_here()

    from tesseract_async.server.run_experts import complete

    optimizer = options.optimizer
    what: dict[str, Any] = {
        "grid_size": options.grid,
        "expert": options.expert_class,
        "sizes": dict(options.sizes),
        "seed": options.seed,
    }
    if options.hf_checkpoint is not None:
        from tesseract_async.transformers.serving import manifest_fields, shards_of
        from tesseract_async.transformers.shards import Checkpoint

        checkpoint = Checkpoint(options.hf_checkpoint)
        if click.get_current_context().get_parameter_source("optimizer") is ParameterSource.DEFAULT:
            optimizer = "adamw"  # as Transformers trains
        with spinner("reading the checkpoint"):
            fields = manifest_fields(checkpoint, dtype=options.dtype, master=options.master)
            what = {**fields, "shards": shards_of(checkpoint)}
    manifest = RunManifest(
        name=name,
        prefix=options.prefix,
        **what,
        optimizer=optimizer,
        optimizer_options={"learning_rate": options.learning_rate} | dict(options.optimizer_option),
        schedule=options.schedule,
        schedule_options=dict(options.schedule_option),
        training={"max_batch_size": options.max_batch_size} | dict(options.training),
        codecs={direction: "none" if value is None else value for direction, value in options.codec},
        created=int(time.time() * 1000),
        mode="open" if options.is_open else "granted",
        num_replicas=options.replicas,
        lease=options.lease,
        sync_every=options.sync_every,
    )
    # the author's own code may run here
    manifest = complete(manifest, allowed_modules=[manifest.expert.partition(":")[0]])
    async with node.make() as author, StatusService(author):
        signed = sign_run(author.identity, with_delegates(manifest, author.identity, options.delegates))
        if once:
            await join(author)  # nobody else would keep the manifest
        with spinner("joining the network"):
            await author.network.wait_joined(JOIN_TIMEOUT)
            hosting = await author.directory.read_grid(options.prefix, manifest.grid_size) if adopt else {}
            if adopt and not hosting:
                raise click.ClickException(f"no server hosts experts of the bare prefix {options.prefix!r} now")
            holders = await publish_run(author.network, signed)
            authority = await author.join_run(signed)
            keeper = await enter_run(
                author.network, author.trust, signed, identity=author.identity, identity_file=node.identity
            )
        adopted = sorted(map(str, await adopt_servers(author.network, author.identity, authority, hosting)))
        for peer_id in adopted:
            click.echo(f"{peer_id} may go on: start it again with --run {signed.full_name}", err=True)
        click.echo(f"the run is {signed.full_name}, known to {counted(holders, 'node')}", err=True)
        invite = invite_of(RunOwner(author.network, author.identity, keeper), author)
        if invite is not None:
            click.echo(f"everybody who has this may take part: tesseract join {invite}", err=True)
            if (where := reach_of(Invite.parse(invite).seeds)) != "everywhere":
                click.echo(
                    f"it is good {where} only: for others, give --announce ADDRESS (or --host 0.0.0.0), or a seed that "
                    "they reach",
                    err=True,
                )
        click.echo(f"to watch it: tesseract top --run {signed.full_name} -p {author.peer_address}", err=True)
        say(
            "run",
            run=signed.full_name,
            address=str(author.peer_address),
            invite=invite,
            holders=holders,
            manifest=manifest.fields()
            | {"delegates": list(map(str, options.delegates)), "shards": [one.hex() for one in manifest.shards]},
            adopted=adopted,
        )
        if once:
            return 0 if holders else 1
        await until_told_to_leave()
    return 0


def reach_of(seeds: Sequence[str]) -> str:
    """Return in words from where these addresses can be reached, as far as they tell."""
    if host_towards(seeds) in ("127.0.0.1", "::1"):
        return "on this computer"
    addresses = [address for seed in seeds for address in PeerAddress.parse(seed).addresses]
    is_far = [ip_version(one) is None or kind_of(split_host_port(one)[0]) == PUBLIC for one in addresses]  # or a name
    return "everywhere" if any(is_far) else "in this private network"


def invite_of(owner: RunOwner, node: TesseractNode) -> str | None:
    """Return the invite for a new run; None where one is out already (`tesseract run grant --invite` makes more)."""
    authority = owner.authority
    if any("admit" in one.role_names and one.peer not in authority.delegates for one in authority.grants()):
        return None
    is_open = authority.is_open
    seeds = node.initial_peers or [node.peer_address]
    return Invite(
        authority.run.full_name,
        tuple(map(str, seeds)),
        "" if is_open else owner.invite(MEMBER, seconds=GRANT_SECONDS)[1],
    ).text()
